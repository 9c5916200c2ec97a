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
    """lengths: int32 [B], tokens of each row seen so far; layers: one LayerCache a layer.

    lengths None: no row has seen any, which a program then knows, and attends to a chunk's own keys alone. Smaller lengths take tokens back only
    while none has been written past the window: sliding layers have lost what was before those. An older cache, which nothing modifies, hasn't.
    """

    lengths: jax.Array | None
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
    """Where the tokens of one call lie: of a row its real tokens first, then padding.

    positions: int32 [B, T], -1 at padding; start: that of the first token, None where nothing is in the cache; end: position after the last.
    """

    positions: jax.Array
    start: jax.Array | None
    end: jax.Array


def locate(real_BT: jax.Array, positions_BT: jax.Array, empty: bool) -> Chunk:
    """Return the Chunk of tokens with `positions`, of which those not `real` are padding. empty: nothing is in the cache."""
    start_B = positions_BT[:, 0]
    return Chunk(jnp.where(real_BT, positions_BT, -1), None if empty else start_B, start_B + real_BT.sum(axis=1, dtype=jnp.int32))


def update(cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, chunk: Chunk, sliding: bool, implementation: str = "auto"):
    """Write a chunk. Returns (new cache, keys, values, positions int32 [B, S] of those keys) to attend to; position -1 is an empty slot.

    They are the chunk's own where nothing is in the cache (but for a single token, whose own are in it). implementation: of `kernels.cache_write`.
    """
    T = k_BTKH.shape[1]
    if chunk.start is None and T > 1:
        new = LayerCache(*(_fill(old, x, chunk, sliding) for old, x in zip(cache, (k_BTKH, v_BTKH))))
        return new, k_BTKH, v_BTKH, chunk.positions
    k_BTKH, v_BTKH = k_BTKH.astype(cache.keys.dtype), v_BTKH.astype(cache.values.dtype)

    def write(slots_BT):
        return LayerCache(*(cache_write(old, new, slots_BT, implementation=implementation) for old, new in zip(cache, (k_BTKH, v_BTKH))))

    if not sliding:
        new = write(chunk.positions)
        slots = jnp.arange(cache.keys.shape[1], dtype=jnp.int32)
        return new, *new, jnp.where(slots < chunk.end[:, None], slots, -1)
    ring = cache.keys.shape[1]
    if T == 1:  # the ring holds the whole window, the new key included: no copy of it is made
        new = write(jnp.where(chunk.positions >= 0, chunk.positions % ring, -1))
        return new, *new, _ring_positions(chunk.end, ring)
    before = _ring_positions(chunk.start, ring)
    keys = jnp.concatenate([cache.keys, k_BTKH], axis=1)
    values = jnp.concatenate([cache.values, v_BTKH], axis=1)
    positions = jnp.concatenate([before, chunk.positions], axis=1)
    after = _ring_positions(chunk.end, ring)
    # Per slot: the key it keeps, or the chunk's newest key of that slot.
    source = jnp.where(after >= chunk.start[:, None], ring + after - chunk.start[:, None], jnp.arange(ring))
    new = LayerCache(*(jnp.take_along_axis(x, source[:, :, None, None], axis=1) for x in (keys, values)))
    return new, keys, values, positions


def _fill(old_BSKH, new_BTKH, chunk: Chunk, sliding: bool):
    """Return `old`, in which nothing is, with a chunk from position 0 on; without a scatter, as which token a slot gets is known."""
    new_BTKH = jnp.where((chunk.positions >= 0)[:, :, None, None], new_BTKH, 0).astype(old_BSKH.dtype)
    S = old_BSKH.shape[1]
    if not sliding or new_BTKH.shape[1] <= S:
        return jax.lax.dynamic_update_slice_in_dim(old_BSKH, new_BTKH[:, :S], 0, axis=1)
    kept = _ring_positions(chunk.end, S)[:, :, None, None]
    return jnp.where(kept >= 0, jnp.take_along_axis(new_BTKH, jnp.maximum(kept, 0), axis=1), old_BSKH)


def _ring_positions(lengths_B, ring: int):
    """Return the newest position below each length that lies in each slot; negative where there is none yet."""
    newest = lengths_B[:, None] - 1
    positions = newest - (newest - jnp.arange(ring, dtype=jnp.int32)) % ring
    return jnp.where(positions >= 0, positions, -1)
