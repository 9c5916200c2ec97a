"""Self-attention of one layer: projections with biases, RoPE, cache, attention with sinks."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from gptoss_jax import sharding
from gptoss_jax.config import SLIDING, GptOssConfig
from gptoss_jax.kernels.attention import attention
from gptoss_jax.kernels.decode_attention import decode_attention, rotate
from gptoss_jax.kernels.decode_block import decode_block, takes
from gptoss_jax.model import cache as cache_lib, ring
from gptoss_jax.model.linear import Linear

# As published, and as `arrangement` has them: q, k and v as one; sinks under another name, which says that decode's kernels for Hopper GPUs take them.
PROJECTIONS, QKV = ("q_proj", "k_proj", "v_proj"), "qkv_proj"
SINKS, HOPPER_SINKS = "sinks", "hopper_sinks"


class Attention(nnx.Module):
    """Grouped-query attention; window and sinks as openai/gpt-oss `gpt_oss/torch/model.py: AttentionBlock`."""

    def __init__(self, config: GptOssConfig, layer: int, weights: Mapping[str, jax.Array]):
        prefix = f"model.layers.{layer}.self_attn"
        self.config = config
        self.window = config.sliding_window if config.layer_types[layer] == SLIDING else None
        for name in (QKV,) if f"{prefix}.{QKV}.weight" in weights else PROJECTIONS:
            setattr(self, name, Linear(weights, f"{prefix}.{name}"))
        self.o_proj = Linear(weights, f"{prefix}.o_proj")
        name = HOPPER_SINKS if f"{prefix}.{HOPPER_SINKS}" in weights else SINKS
        setattr(self, name, nnx.Param(weights[f"{prefix}.{name}"]))

    def __call__(self, x_BTD, rope, positions_BT, segments_BT, cache, chunk, mesh):
        """Return (output [B, T, D] before the residual, this layer's new cache or None)."""
        c = self.config
        implementation = "auto" if mesh is None or mesh.size == 1 else "xla"
        B, T, _ = x_BTD.shape
        q, k, v = (x.reshape(B, T, -1, c.head_dim) for x in self._project(x_BTD, mesh))
        q = sharding.constrain(rotate(q, *rope), ("batch", "tokens", "heads", None), mesh)
        k = sharding.constrain(rotate(k, *rope), ("batch", "tokens", "kv_heads", None), mesh)
        if cache is None:
            key_positions, key_segments, order = positions_BT, segments_BT, "aligned"
        else:
            cache, k, v, key_positions = cache_lib.update(cache, k, v, chunk, self.window is not None, implementation)
            if T > 1:  # a compiler that put off writing would keep projections until then: 1.9 GB of 120b's 36 layers for 8,192 tokens
                cache, k, v = jax.lax.optimization_barrier((cache, k, v))
            positions_BT, segments_BT, key_segments = chunk.positions, None, None
            order = "aligned" if chunk.start is None and T > 1 else "slots" if self.window is None else "ring"
        tags = (positions_BT, key_positions, segments_BT, key_segments)
        out = self._attend(q, k.astype(q.dtype), v.astype(q.dtype), self._sinks_N, *tags, mesh=mesh, order=order)
        return self.o_proj(out.reshape(B, T, -1), mesh=mesh), cache

    @property
    def for_hopper(self) -> bool:
        """Whether the weights are arranged for decode's kernels on a Hopper GPU."""
        return hasattr(self, HOPPER_SINKS)

    @property
    def _sinks_N(self):
        return getattr(self, HOPPER_SINKS if self.for_hopper else SINKS)[...]

    def decode(self, qkv_BJ, rope, cache, chunk, dtype):
        """Attend for one token a row, of what the joined projections gave, float32 without the bias: on one device. Returns (what the output
        projection takes [B, I], cache)."""
        out_BI, *new = decode_attention(qkv_BJ, getattr(self, QKV).bias[...], *(table[:, 0] for table in rope), *cache, self._sinks_N,
                                        chunk.positions[:, 0], ring=self.window is not None, dtype=dtype, for_hopper=self.for_hopper)
        return out_BI, cache_lib.LayerCache(*new)

    def decode_block(self, x_BD, norm, rope, cache, chunk, after):
        """Do all before the experts for a lone row on a Hopper GPU, if kernels can: what `norm` is before this and what comes after it (the output's
        weight and bias, the next norm's, the router's) too. Returns (x after it [1, D], EarlyScores, cache) or None."""
        qkv = getattr(self, QKV)
        arrays = (x_BD, norm.weight[...], qkv.weight[...], qkv.bias[...], *(table[:, 0] for table in rope), *cache,
                  self._sinks_N.reshape(self.config.num_key_value_heads, -1), chunk.positions[:, 0], *after)
        if not takes(*arrays):
            return None
        x_BD, early, *new = decode_block(*arrays, ring=self.window is not None, epsilon=norm.epsilon, for_hopper=True)
        return x_BD, early, cache_lib.LayerCache(*new)

    def _project(self, x_BTD, mesh):
        if not hasattr(self, QKV):
            return [getattr(self, name)(x_BTD, mesh=mesh) for name in PROJECTIONS]
        query, kv = (heads * self.config.head_dim for heads in (self.config.num_attention_heads, self.config.num_key_value_heads))
        return jnp.split(getattr(self, QKV)(x_BTD, mesh=mesh), (query, query + kv), axis=-1)

    def _attend(self, q, k, v, sinks, *tags, mesh, order):
        """Attend, each device for its rows and heads and, where `context` splits the rows' tokens, for its tokens.

        tags: positions of queries and of keys, segments of both or None; order: of `attention`.
        """

        def local(q, k, v, sinks, *tags):
            names = ("q_positions", "k_positions", "q_segments", "k_segments")
            return attention(q, k, v, sinks, **dict(zip(names, tags)), window=self.window, order=order)

        def part_of_rows(q, k, v, sinks, positions, _, segments, __):
            return ring.attention(q, k, v, sinks, positions=positions, segments=segments, window=self.window, axis=context)

        if mesh is None or mesh.size == 1:
            return local(q, k, v, sinks, *tags)
        rows, context, heads, _ = sharding.compute_spec(k.shape, ("batch", "tokens" if order == "aligned" else None, "kv_heads", None), mesh)
        wide, narrow = P(rows, context, heads), P(rows, context)
        run = jax.shard_map(local if context is None else part_of_rows, mesh=mesh, in_specs=(wide, wide, wide, P(heads), *(narrow,) * 4),
                            out_specs=wide, check_vma=False)
        return run(q, k, v, sinks, *tags)
