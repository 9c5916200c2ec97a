"""Keys and values of past tokens, as a plain pytree that is passed in and returned.

A full layer has a slot per position up to a stated length. A sliding layer has a ring of as many slots as its window: position p lies in
slot p mod ring, so which position a slot holds follows from how many tokens the row has, and nothing else is stored.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptoss_jax import sharding
from gptoss_jax.config import SLIDING, GptOssConfig
from gptoss_jax.kernels.cache_write import cache_write


class LayerCache(NamedTuple):
    """keys (after RoPE) and values, [B, S, K, H]."""

    keys: jax.Array
    values: jax.Array


class Cache(NamedTuple):
    """lengths: int32 [B], tokens of each row seen so far; layers: one LayerCache a layer."""

    lengths: jax.Array
    layers: tuple[LayerCache, ...]


def make_cache(config: GptOssConfig, batch: int, length: int, dtype="bfloat16", *, mesh=None) -> Cache:
    """Return an empty cache for `batch` rows of up to `length` tokens. Tokens written past it are dropped: check before calling.

    Bytes: 2 * batch * K * H * itemsize * (length for each full layer, min(window, length) for each sliding one).
    """

    def zeros(shape):
        return sharding.constrain(jnp.zeros(shape, dtype), _AXES, mesh)

    return Cache(jnp.zeros(batch, jnp.int32), tuple(LayerCache(zeros(shape), zeros(shape)) for shape in _shapes(config, batch, length)))


def abstract_cache(config: GptOssConfig, batch: int, length: int, dtype="bfloat16", *, mesh=None, elsewhere=None) -> Cache:
    """Return what `make_cache` does as ShapeDtypeStructs; `elsewhere`: the sharding of what isn't split over `mesh`."""

    def abstract(shape):
        placed = sharding.computed_sharding(shape, _AXES, mesh) or elsewhere
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=elsewhere)
    return Cache(lengths, tuple(LayerCache(abstract(shape), abstract(shape)) for shape in _shapes(config, batch, length)))


_AXES = ("batch", None, "kv_heads", None)


def _shapes(config: GptOssConfig, batch: int, length: int) -> list[tuple[int, ...]]:
    """Return the shape of each layer's keys, which is that of its values."""
    if batch < 1 or length < 1:
        raise ValueError(f"cache of {batch} rows and {length} tokens: both must be at least 1")
    slots = [min(config.sliding_window, length) if kind == SLIDING else length for kind in config.layer_types]
    return [(batch, count, config.num_key_value_heads, config.head_dim) for count in slots]


class Chunk(NamedTuple):
    """Where the tokens of one call lie. Real tokens of a row are contiguous; padding may stand on either side.

    positions: int32 [B, T], -1 at padding; first: index of the first real token; start: its position; end: position after the last.
    """

    positions: jax.Array
    first: jax.Array
    start: jax.Array
    end: jax.Array


def locate(real_BT: jax.Array, positions_BT: jax.Array) -> Chunk:
    """Return the Chunk of tokens with `positions`, of which those not `real` are padding."""
    positions = jnp.where(real_BT, positions_BT, -1)
    first = jnp.argmax(real_BT, axis=1)
    start = jnp.take_along_axis(positions_BT, first[:, None], axis=1)[:, 0]
    return Chunk(positions, first, start, start + real_BT.sum(axis=1))


def update(cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, chunk: Chunk, sliding: bool, implementation: str = "auto"):
    """Write a chunk. Returns (new cache, keys, values, positions int32 [B, S] of those keys) to attend to; position -1 is an empty slot.

    implementation: of `kernels.cache_write`.
    """

    def write(slots_BT):
        return LayerCache(*(cache_write(old, new, slots_BT, implementation=implementation) for old, new in zip(cache, (k_BTKH, v_BTKH))))

    if not sliding:
        new = write(chunk.positions)
        slots = jnp.arange(cache.keys.shape[1])
        return new, *new, jnp.where(slots < chunk.end[:, None], slots, -1)
    ring = cache.keys.shape[1]
    if k_BTKH.shape[1] == 1:  # the ring holds the whole window, the new key included: no copy of it is made
        new = write(jnp.where(chunk.positions >= 0, chunk.positions % ring, -1))
        return new, *new, _ring_positions(chunk.end, ring)
    before = _ring_positions(chunk.start, ring)
    keys = jnp.concatenate([cache.keys, k_BTKH], axis=1)
    values = jnp.concatenate([cache.values, v_BTKH], axis=1)
    positions = jnp.concatenate([before, chunk.positions], axis=1)
    after = _ring_positions(chunk.end, ring)
    # Per slot: the key it keeps, or the chunk's newest key of that slot.
    source = jnp.where(after >= chunk.start[:, None], ring + chunk.first[:, None] + after - chunk.start[:, None], jnp.arange(ring))
    new = LayerCache(*(jnp.take_along_axis(x, source[:, :, None, None], axis=1) for x in (keys, values)))
    return new, keys, values, positions


def _ring_positions(lengths_B, ring: int):
    """Return the newest position below each length that lies in each slot; negative where there is none yet."""
    newest = lengths_B[:, None] - 1
    positions = newest - (newest - jnp.arange(ring)) % ring
    return jnp.where(positions >= 0, positions, -1)
