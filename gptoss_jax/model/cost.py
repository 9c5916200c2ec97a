"""What a model weighs, holds and moves, by arithmetic from its configuration: nothing is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from gptoss_jax import sharding
from gptoss_jax.config import SLIDING, GptOssConfig
from gptoss_jax.model.cache import abstract_cache
from gptoss_jax.model.weights import declare


def abstract_mesh(**axes: int) -> AbstractMesh:
    """Return the mesh of `sharding.make_mesh` without devices, enough to divide shapes by."""
    sizes = tuple(axes.get(axis, 1) for axis in sharding.MESH_AXES)
    return AbstractMesh(sizes, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


def abstract_weights(config: GptOssConfig, dtype: str = "bfloat16", mesh=None, device: jax.Device | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Return every weight as stored, with its sharding over `mesh` or on `device`. Raises ShardingError."""
    return sharding.abstract(declare(config, dtype=dtype, packed=config.quantized), mesh, device)


def weight_bytes(config: GptOssConfig, dtype: str = "bfloat16", mesh=None) -> int:
    """Return the bytes of all weights, or of one device's share on `mesh`; packed experts take the same in every dtype. Raises ShardingError."""
    return shard_bytes(abstract_weights(config, dtype, mesh).values())


def cache_bytes(config: GptOssConfig, batch: int, length: int, dtype: str = "bfloat16", mesh=None) -> int:
    """Return the bytes of a cache's keys and values (`make_cache`), or of one device's share on `mesh`."""
    return shard_bytes(jax.tree.leaves(abstract_cache(config, batch, length, dtype, mesh=mesh).layers))


def decode_bytes(config: GptOssConfig, batch: int, context: int, dtype: str = "bfloat16") -> int:
    """Return what one decode step has to read: dense weights, the experts that `batch` tokens choose, the unembedding, keys and values seen.

    Experts are counted as if chosen evenly and independently: E * (1 - (1 - A / E)^batch) of them, A for one token. Embedding rows,
    norms and biases, and what is written, are left out: below a thousandth.
    """
    c = config
    item = jax.numpy.dtype(dtype).itemsize
    width, query, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    touched = c.num_local_experts * (1 - (1 - c.num_experts_per_tok / c.num_local_experts) ** batch)
    matrices = 3 * width * c.intermediate_size * (17 / 32 if c.quantized else item)
    layer = item * width * (2 * query + 2 * kv + c.num_local_experts) + touched * matrices
    seen = sum(min(context, c.sliding_window) if kind == SLIDING else context for kind in c.layer_types)
    return round(c.num_hidden_layers * layer + item * c.vocab_size * width + 2 * batch * kv * item * seen)


def prefill_flops(config: GptOssConfig, batch: int, tokens: int) -> int:
    """Return the floating-point operations of prefilling: matrix products with weights, scores and values; the unembedding of one token a row, to which
    the last layer's keys and values of all tokens are enough."""
    c = config
    width, query, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = width * (2 * query + 2 * kv + c.num_local_experts) + c.num_experts_per_tok * 3 * width * c.intermediate_size

    def pairs(window: int) -> int:  # of a query and a key it sees
        return tokens * window - window * (window - 1) // 2 if tokens > window else tokens * (tokens + 1) // 2

    *windows, last = (c.sliding_window if kind == SLIDING else tokens for kind in c.layer_types)
    seen, written = sum(map(pairs, windows)) + min(last, tokens), 2 * width * kv
    products = (tokens * len(windows) + 1) * layer + (tokens - 1) * written
    return 2 * batch * (products + 2 * query * seen + c.vocab_size * width)


def shard_bytes(arrays: Iterable[jax.ShapeDtypeStruct]) -> int:
    """Return the bytes of abstract arrays on one device of their shardings."""

    def one(array):
        shape = array.sharding.shard_shape(array.shape) if isinstance(array.sharding, NamedSharding) else array.shape
        return math.prod(shape) * jax.numpy.dtype(array.dtype).itemsize

    return sum(map(one, arrays))
