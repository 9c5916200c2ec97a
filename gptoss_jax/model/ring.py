"""Attention in rows whose tokens are split over a mesh axis, inside `jax.shard_map`: keys and values travel from device to device.

The attention to the keys of one device is a part of the whole, and parts merge by their log-sum-exps (Liu et al. 2023, "Ring Attention with
Blockwise Transformers"). The sink is a part too, without a value: the one that merging starts from. Gradients of keys and values travel with
them and return. Nothing here is as long as a row: a device holds its own shard, one that visits and one that is on its way.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from gptoss_jax.kernels.attention import reference, xla


def attention(q_BTNH, k_BTKH, v_BTKH, sinks_N, *, positions, segments, window: int | None, axis: str):
    """Return what `kernels.attention` does of whole rows, for the tokens here. Positions count up within a segment, whose tokens lie together.

    All arrays are this device's part; T is the tokens of a row here. positions, segments (or None): int32 [B, T].
    """
    T, shards = q_BTNH.shape[1], jax.lax.axis_size(axis)
    hops = shards - 1 if window is None else min(shards - 1, -(-(window - 1) // T))  # no key further back than window - 1 rows is seen
    arrays, tags = xla.whole_blocks((q_BTNH, k_BTKH, v_BTKH), positions, segments)
    return _attention(*arrays, reference.finite(sinks_N), tags, window, axis, hops)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q, k, v, sinks, tags, window, axis, hops):
    return _forward_rule(q, k, v, sinks, tags, window, axis, hops)[0]


def _forward_rule(q, k, v, sinks, tags, window, axis, hops):
    def merge(whole, keys, _):
        k, v, k_tags = keys
        (acc, top, total), (part, part_top, part_total) = whole, xla.forward(q, k, v, None, tags, k_tags, window)
        new_top = jnp.maximum(top, part_top)
        decay, weight = jnp.exp(top - new_top), part_total * jnp.exp(part_top - new_top)
        return (acc * decay[..., None] + part.astype(jnp.float32) * weight[..., None], new_top, total * decay + weight), ()

    sink_alone = jnp.zeros(q.shape, jnp.float32), jnp.broadcast_to(sinks, q.shape[:3]), jnp.ones(q.shape[:3], jnp.float32)
    (acc, top, total), _ = _around(merge, sink_alone, (k, v, tags), (), axis, hops)
    out = (acc / total[..., None]).astype(q.dtype)
    return out, (q, k, v, sinks, tags, out, top + jnp.log(total))


def _backward_rule(window, axis, hops, residuals, g):
    q, k, v, sinks, tags, out, lse = residuals
    delta, dsinks = xla.delta_and_sink_gradient(sinks, out, lse, g)

    def add(dq, keys, sums):
        k, v, k_tags = keys
        part, *parts = xla.backward(q, k, v, tags, k_tags, lse, delta, g, window)
        return dq + part, tuple(map(jnp.add, sums, parts))

    zeros = jnp.zeros(k.shape, jnp.float32)
    dq, sums = _around(add, jnp.zeros(q.shape, jnp.float32), (k, v, tags), (zeros, zeros), axis, hops)
    dk, dv = _sent(sums, axis, -hops)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dsinks, xla.no_gradients(tags)


_attention.defvjp(_forward_rule, _backward_rule)


def _around(visit, state, keys, sums, axis, hops):
    """Return (state, sums) after visit(state, keys, sums) -> (state, sums) of this device's keys and those of the `hops` devices before it.

    The state stays, the sums go on with the keys. Keys are sent before they are used, so that the next ones come meanwhile.
    """

    def step(_, carry):
        state, keys, sums = carry
        coming = _sent(keys, axis, 1)
        state, sums = visit(state, keys, sums)
        return state, coming, _sent(sums, axis, 1)

    return visit(*jax.lax.fori_loop(0, hops, step, (state, keys, sums)))


def _sent(tree, axis, distance):
    """Give everything to the device that is so many further, around the end of the axis to its beginning."""
    size = jax.lax.axis_size(axis)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, [(i, (i + distance) % size) for i in range(size)]), tree) if distance else tree
