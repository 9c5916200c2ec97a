"""The one declaration of every weight: name, stored shape, dtype and logical axes.

Abstract trees, shardings, initial values, load targets and checkpoint checks all derive from `declare`. Names and orientations are
those of the Hugging Face checkpoint, so that loading is the identity.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gptoss_jax import mxfp4
from gptoss_jax.config import GptOssConfig


@dataclasses.dataclass(frozen=True)
class Weight:
    """shape and dtype as stored; axes: a logical axis per dim (see `sharding.STORAGE_RULES`), None where it is never split."""

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]


def declare(config: GptOssConfig, *, dtype: str = "bfloat16", packed: bool = True) -> dict[str, Weight]:
    """Return every weight of the model by its Hugging Face tensor name.

    dtype: of all weights but the packed ones. packed: experts as MXFP4 (`*_blocks`, `*_scales`, uint8); otherwise as the matrices
    [E, in, out] that transformers stores (`gate_up_proj`, `down_proj`).
    """
    c = config
    query, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    experts, width, hidden = c.num_local_experts, c.hidden_size, c.intermediate_size

    def dense(shape, *axes):
        return Weight(shape, dtype, axes)

    def expert_matrix(name, in_dim, out_dim, in_axis, out_axis):
        if not packed:
            return {name: dense((experts, in_dim, out_dim), "expert", in_axis, out_axis)}
        shape, axes = (experts, out_dim, in_dim // mxfp4.BLOCK), ("expert", out_axis, in_axis)
        return {f"{name}_blocks": Weight((*shape, mxfp4.BLOCK_BYTES), "uint8", (*axes, None)),
                f"{name}_scales": Weight(shape, "uint8", axes)}

    layer = {
        "input_layernorm.weight": dense((width,), None),
        "self_attn.q_proj.weight": dense((query, width), "heads", "embed"),
        "self_attn.q_proj.bias": dense((query,), "heads"),
        "self_attn.k_proj.weight": dense((kv, width), "kv_heads", "embed"),
        "self_attn.k_proj.bias": dense((kv,), "kv_heads"),
        "self_attn.v_proj.weight": dense((kv, width), "kv_heads", "embed"),
        "self_attn.v_proj.bias": dense((kv,), "kv_heads"),
        "self_attn.o_proj.weight": dense((width, query), "embed", "heads"),
        "self_attn.o_proj.bias": dense((width,), None),
        "self_attn.sinks": dense((c.num_attention_heads,), None),
        "post_attention_layernorm.weight": dense((width,), None),
        "mlp.router.weight": dense((experts, width), None, None),
        "mlp.router.bias": dense((experts,), None),
        **expert_matrix("mlp.experts.gate_up_proj", width, 2 * hidden, None, "expert_hidden"),
        "mlp.experts.gate_up_proj_bias": dense((experts, 2 * hidden), "expert", "expert_hidden"),
        **expert_matrix("mlp.experts.down_proj", hidden, width, "expert_hidden", None),
        "mlp.experts.down_proj_bias": dense((experts, width), "expert", None),
    }
    return {
        "model.embed_tokens.weight": dense((c.vocab_size, width), "vocab", "embed"),
        **{f"model.layers.{i}.{name}": weight for i in range(c.num_hidden_layers) for name, weight in layer.items()},
        "model.norm.weight": dense((width,), None),
        "lm_head.weight": dense((c.vocab_size, width), "vocab", "embed"),
    }


def initialize(declared: dict[str, Weight], seed: int = 0, *, stddev: float = 0.02,
               residual_stddev: float | None = None) -> dict[str, jax.Array]:
    """Return random weights to start training from: normal matrices, norms one, biases and sinks zero; packed weights can't be.

    residual_stddev: of the matrices that write to the residual stream (o_proj, down_proj); None takes `stddev`.
    """
    def normal(name: str, weight: Weight) -> jax.Array:
        writes_residual = "o_proj" in name or "down_proj" in name
        return random_matrix(name, weight, seed, residual_stddev if writes_residual and residual_stddev is not None else stddev)

    values = {}
    for name, weight in declared.items():
        if weight.dtype == "uint8":
            raise ValueError(f"{name}: packed MXFP4 weights have no random initial value, declare them with packed=False")
        make: Callable = {"norm": lambda n, w: jnp.ones(w.shape, w.dtype), "bias": lambda n, w: jnp.zeros(w.shape, w.dtype),
                          "matrix": normal}[_kind(name)]
        values[name] = make(name, weight)
    return values


def random_matrix(name: str, weight: Weight, seed: int, stddev: float) -> jax.Array:
    """Return a normal matrix, the same whatever other weights there are."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return (jax.random.normal(key, weight.shape) * stddev).astype(weight.dtype)


def _kind(name: str) -> str:
    if name.endswith("norm.weight"):
        return "norm"
    return "bias" if name.endswith(("bias", "sinks")) else "matrix"
