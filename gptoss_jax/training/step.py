"""One training step: loss, gradients, update. Pure functions of a state that `jax.jit` donates."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptoss_jax import mxfp4
from gptoss_jax.config import GptOssConfig
from gptoss_jax.model.transformer import GptOss
from gptoss_jax.training import loss

Weights = dict[str, jax.Array]
_EXPERT_MATRIX = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")
_ROUTING = ("layers.*.router_logits", "layers.*.router_indices")


class TrainState(NamedTuple):
    """step int32; weights: float32 masters by Hugging Face name, experts dense [E, in, out]; opt_state: optax's."""

    step: jax.Array
    weights: Weights
    opt_state: Any


class Batch(NamedTuple):
    """Packed rows [B, T]: tokens int32; targets int32, the next token; loss_weights float32; segment_ids int32, 0 is padding."""

    tokens: jax.Array
    targets: jax.Array
    loss_weights: jax.Array
    segment_ids: jax.Array
    positions: jax.Array


def on_grid(weights: Mapping[str, jax.Array]) -> Weights:
    """Round expert matrices to the MXFP4 grid (straight-through gradients) and all else to bfloat16: what an export will hold."""
    return {name: mxfp4.fake_quantize(value, 1) if _EXPERT_MATRIX.search(name) else _round_bfloat16(value)
            for name, value in weights.items()}


def forward_loss(config: GptOssConfig, weights: Mapping[str, jax.Array], batch: Batch, *, quantize: bool, compute_dtype: str,
                 balance_coefficient: float = 0.0) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return (what is minimised, metrics) of one batch.

    metrics: loss (masked mean cross-entropy), tokens (whose loss counts), expert_load float32 [layers, E], balance_loss.
    """
    weights = on_grid(weights) if quantize else dict(weights)
    embedding = "model.embed_tokens.weight"  # activations take its dtype
    weights[embedding] = weights[embedding].astype(compute_dtype)
    model = GptOss(config, weights)
    logits, routing = model(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids, capture=_ROUTING)
    total, count = loss.cross_entropy(logits, batch.targets, batch.loss_weights)
    real = batch.segment_ids != 0
    loads, balance = [], jnp.float32(0)
    for layer in range(config.num_hidden_layers):
        loads.append(loss.expert_load(routing[f"layers.{layer}.router_indices"], real, config.num_local_experts))
        balance += loss.balance_loss(routing[f"layers.{layer}.router_logits"], loads[-1], real) / config.num_hidden_layers
    mean = total / jnp.maximum(count, 1)
    metrics = {"loss": mean, "tokens": count, "expert_load": jnp.stack(loads), "balance_loss": balance}
    return mean + balance_coefficient * balance, metrics


def make_train_step(loss_fn: Callable[[Weights, Batch], tuple[jax.Array, dict]],
                    optimizer: optax.GradientTransformation) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """Return the jitted step (state, batch) -> (new state, metrics); the old state's buffers are given away."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        (_, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.weights, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.weights)
        metrics["grad_norm"] = optax.tree.norm(gradients)
        return TrainState(state.step + 1, optax.apply_updates(state.weights, updates), opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)


@jax.custom_vjp
def _round_bfloat16(value):
    return value.astype(jnp.bfloat16).astype(value.dtype)


_round_bfloat16.defvjp(lambda value: (_round_bfloat16(value), None), lambda _, gradient: (gradient,))
