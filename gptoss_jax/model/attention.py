"""Self-attention of one layer: projections with biases, RoPE, cache, attention with sinks."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from flax import nnx

from gptoss_jax import sharding
from gptoss_jax.config import SLIDING, GptOssConfig
from gptoss_jax.kernels.attention import attention
from gptoss_jax.model import cache as cache_lib
from gptoss_jax.model.linear import Linear
from gptoss_jax.model.rope import rotate


class Attention(nnx.Module):
    """Grouped-query attention; window and sinks as openai/gpt-oss `gpt_oss/torch/model.py: AttentionBlock`."""

    def __init__(self, config: GptOssConfig, layer: int, weights: Mapping[str, jax.Array]):
        prefix = f"model.layers.{layer}.self_attn"
        self.config = config
        self.window = config.sliding_window if config.layer_types[layer] == SLIDING else None
        self.q_proj = Linear(weights, f"{prefix}.q_proj")
        self.k_proj = Linear(weights, f"{prefix}.k_proj")
        self.v_proj = Linear(weights, f"{prefix}.v_proj")
        self.o_proj = Linear(weights, f"{prefix}.o_proj")
        self.sinks = nnx.Param(weights[f"{prefix}.sinks"])

    def __call__(self, x_BTD, rope, positions_BT, segments_BT, cache, chunk, mesh):
        """Return (output [B, T, D] before the residual, this layer's new cache or None)."""
        c = self.config
        implementation = "auto" if mesh is None or mesh.size == 1 else "xla"
        B, T, _ = x_BTD.shape
        q = self.q_proj(x_BTD, mesh=mesh).reshape(B, T, c.num_attention_heads, c.head_dim)
        k = self.k_proj(x_BTD, mesh=mesh).reshape(B, T, c.num_key_value_heads, c.head_dim)
        v = self.v_proj(x_BTD, mesh=mesh).reshape(B, T, c.num_key_value_heads, c.head_dim)
        q = sharding.constrain(rotate(q, *rope), ("batch", None, "heads", None), mesh)
        k = sharding.constrain(rotate(k, *rope), ("batch", None, "kv_heads", None), mesh)
        if cache is None:
            key_positions, key_segments, order = positions_BT, segments_BT, "aligned"
        else:
            cache, k, v, key_positions = cache_lib.update(cache, k, v, chunk, self.window is not None, implementation)
            positions_BT, segments_BT, key_segments = chunk.positions, None, None
            order = "slots" if self.window is None else "ring"
        out = attention(q, k.astype(q.dtype), v.astype(q.dtype), self.sinks[...], q_positions=positions_BT, k_positions=key_positions,
                        q_segments=segments_BT, k_segments=key_segments, window=self.window,
                        order=order, implementation=implementation)
        return self.o_proj(out.reshape(B, T, -1), mesh=mesh), cache
