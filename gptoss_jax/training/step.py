"""One training step: loss, gradients, update. Pure functions of a state that `jax.jit` donates.

One step for all modes: what is differentiated is `trained`, what is not is `frozen`, and `_prepare` makes of both the weights that the model
computes with, a layer at a time.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from gptoss_jax import mxfp4, sharding
from gptoss_jax.model import lora
from gptoss_jax.model.transformer import Capture, GptOss
from gptoss_jax.model.weights import declare
from gptoss_jax.training import loss
from gptoss_jax.training.config import TrainConfig, TrainingConfig
from gptoss_jax.training.state import Batch, TrainState, Weights, abstract_state, declare_trained

_EXPERT_MATRIX = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")
_ROUTING = ("layers.*.router_logits", "layers.*.router_indices")


def make_train_step(config: TrainingConfig, optimizer: optax.GradientTransformation,
                    mesh: jax.sharding.Mesh | None = None) -> Callable[[TrainState, Weights, Batch], tuple[TrainState, dict]]:
    """Return the jitted step (state, frozen, batch) -> (new state, metrics); the old state's buffers are given away.

    metrics: those of `forward_loss`, and grad_norm. A batch is computed in `microbatches` parts whose gradients are summed in float32:
    the same step, but for the router losses, which are means over the parts' own.
    """
    parts = config.train.microbatches

    def gradients_of(trained: Weights, frozen: Weights, batch: Batch) -> tuple[dict, Weights]:
        count = batch.loss_weights.sum(dtype=jnp.float32)
        differentiate = jax.value_and_grad(functools.partial(forward_loss, config, mesh=mesh, count=count, parts=parts), has_aux=True)
        if parts == 1:
            (_, metrics), gradients = differentiate(trained, frozen, batch)
            return metrics, gradients

        def add(sums, part):
            # As if the weights were each part's own: a TPU's compiler would gather what `fsdp` splits of all layers once, before the loop.
            (_, metrics), gradients = differentiate(*jax.lax.optimization_barrier((trained, frozen, part)))
            return jax.tree.map(jnp.add, sums, (metrics, gradients)), None

        # Part i takes rows i, i + parts, ...: of every device's rows, so that none moves.
        split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
        shapes = jax.eval_shape(differentiate, trained, frozen, jax.tree.map(lambda x: x[0], split))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0][1], shapes[1]))
        return jax.lax.scan(add, zeros, split)[0]

    def train_step(state: TrainState, frozen: Weights, batch: Batch) -> tuple[TrainState, dict]:
        metrics, gradients = gradients_of(state.trained, frozen, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
        metrics["grad_norm"] = optax.tree.norm(gradients)
        return TrainState(state.step + 1, optax.apply_updates(state.trained, updates), opt_state), metrics

    if mesh is None:
        return jax.jit(train_step, donate_argnums=0)
    places = jax.tree.map(lambda array: array.sharding, abstract_state(config, optimizer, mesh)[0])
    return jax.jit(train_step, donate_argnums=0, out_shardings=(places, NamedSharding(mesh, PartitionSpec())))


def make_eval_step(config: TrainingConfig, mesh: jax.sharding.Mesh | None = None) -> Callable[[Weights, Weights, Batch], dict]:
    """Return the jitted (trained, frozen, batch) -> metrics."""
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda trained, frozen, batch: forward_loss(config, trained, frozen, batch, mesh=mesh)[1], out_shardings=everywhere)


def forward_loss(config: TrainingConfig, trained: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array], batch: Batch, *,
                 mesh: jax.sharding.Mesh | None = None, count=None, parts: int = 1) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return (what is minimised, metrics) of one batch, or of one of the `parts` of a batch with loss weights that sum to `count`.

    metrics: loss (masked mean cross-entropy), tokens (the sum of loss weights), expert_load float32 [layers, E], balance_loss, z_loss; those
    of the parts sum to those of the batch.
    """
    train, model_config = config.train, config.model
    prepare = functools.partial(_prepare, train, _stored_places(config, mesh), _gathered_axes(config, mesh), mesh)
    weights = {name: value if name.startswith("model.layers.") else prepare(name, value) for name, value in (frozen | trained).items()}
    model = GptOss(model_config, weights, mesh=mesh)
    capture = Capture(_ROUTING)
    x, _ = model.hidden_states(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids, capture=capture,
                               dtype=train.compute_dtype, prepare=prepare, remat=train.remat, expert_transport=train.expert_transport)
    chunk = train.loss_chunk_tokens or loss.chunk_tokens(model_config.vocab_size, 1 if mesh is None else mesh.size)
    total, tokens = loss.chunked_cross_entropy(model.unembed, x, batch.targets, batch.loss_weights, chunk)
    real = batch.segment_ids != 0
    loads, balance, z = [], jnp.float32(0), jnp.float32(0)
    share = 1 / (model_config.num_hidden_layers * parts)
    for layer in range(model_config.num_hidden_layers):
        logits, indices = (capture.values[f"layers.{layer}.router_{part}"] for part in ("logits", "indices"))
        loads.append(loss.expert_load(indices, real, model_config.num_local_experts))
        balance += loss.balance_loss(logits, loads[-1], real) * share
        z += loss.z_loss(logits, real) * share
    mean = total / jnp.maximum(tokens if count is None else count, 1)
    metrics = {"loss": mean, "tokens": tokens, "expert_load": jnp.stack(loads) / parts, "balance_loss": balance, "z_loss": z}
    return mean + train.balance_coefficient * balance + train.z_coefficient * z, metrics


def model_weights(config: TrainingConfig, trained: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array]) -> Weights:
    """Return the weights of the model that the forward pass computes with, by name: for evaluation and sampled generations."""
    changed = {name: value for name, value in trained.items() if config.train.mode == "qat" or name.endswith("lora_B")}
    return frozen | trained | _prepared(config.train, changed)  # the others are not copied


@functools.partial(jax.jit, static_argnums=0)
def _prepared(train: TrainConfig, weights: Weights) -> Weights:
    return {name: _prepare(train, {}, {}, None, name, value) for name, value in weights.items()}


def _prepare(train: TrainConfig, stored: Mapping[str, NamedSharding], gathered: Mapping[str, tuple], mesh, name: str, value: jax.Array) -> jax.Array:
    """Return a stored weight as it is computed with.

    On the grid: experts rounded to MXFP4 and all else to bfloat16, what an export will hold, with straight-through gradients. What `fsdp`
    splits is gathered in the dtype it is computed in: here, the experts' by `model.moe`.
    """
    if name in stored:  # a constraint of its gradient, too: those of all layers wait for the optimizer, and whole ones would fill a device
        value = jax.lax.with_sharding_constraint(value, stored[name])
    if name.endswith("lora_B"):
        value = value * (train.alpha / train.rank)
    if train.mode == "qat":
        value = mxfp4.fake_quantize(value, 1) if _EXPERT_MATRIX.search(name) else _round_bfloat16(value)
    if name in gathered:
        value = sharding.constrain(value.astype(train.compute_dtype), gathered[name], mesh)
    elif gathered and _EXPERT_MATRIX.search(name):
        value = value.astype(train.compute_dtype)
    return value


def _stored_places(config: TrainingConfig, mesh) -> dict[str, NamedSharding]:
    """Return where what is trained lies, if on several devices."""
    return {} if mesh is None or mesh.size == 1 else sharding.shardings(declare_trained(config), mesh)


def _gathered_axes(config: TrainingConfig, mesh) -> dict[str, tuple[str | None, ...]]:
    """Return the logical axes of the weights that are split over `fsdp` by their width; the experts' are gathered by `model.moe`."""
    if mesh is None or mesh.shape["fsdp"] == 1:
        return {}
    declared = declare(config.model, packed=False) | lora.declare_adapters(config.model, config.train.rank, config.train.targets)
    return {name: weight.axes for name, weight in declared.items() if "embed" in weight.axes}


@jax.custom_vjp
def _round_bfloat16(value):
    return value.astype(jnp.bfloat16).astype(value.dtype)


_round_bfloat16.defvjp(lambda value: (_round_bfloat16(value), None), lambda _, gradient: (gradient,))
