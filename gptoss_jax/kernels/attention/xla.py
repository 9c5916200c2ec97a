"""Attention in blocks of queries and keys, so that memory grows with T + S and never with T x S, forward and backward.

The recurrence over key blocks is FlashAttention's (Dao et al. 2022); a sink only adds exp(sink) to the final sum. Pairs of blocks in which
no query sees a key are skipped at run time, by the smallest and largest position and segment of each block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.kernels.attention import reference

BLOCK = 128  # prefill of 512 tokens of the 20b shape on two CPU cores: 488 tokens/s, 396 with 512
_DENSE_SCORES = 1 << 17  # up to here one matrix of scores is smaller than what surrounds it, and faster
_EMPTY = -1  # position of padding: of a key nobody sees, of a query nobody reads
_LOWEST = -1e30  # instead of -inf, whose differences are NaN


def attention(q_BTNH, k_BSKH, v_BSKH, sinks_N, *, q_positions, k_positions, q_segments=None, k_segments=None, window=None):
    """Same signature and result as `reference.attention`."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    if T * S <= _DENSE_SCORES:
        return reference.attention(q_BTNH, k_BSKH, v_BSKH, sinks_N, q_positions=q_positions, k_positions=k_positions,
                                   q_segments=q_segments, k_segments=k_segments, window=window)
    q, q_tags = whole_blocks((q_BTNH,), q_positions, q_segments)
    keys, k_tags = whole_blocks((k_BSKH, v_BSKH), k_positions, k_segments)
    return _blockwise(*q, *keys, reference.finite(sinks_N), q_tags, k_tags, window)[:, :T]


def whole_blocks(arrays, positions_BT, segments_BT):
    """Return (arrays [B, T, ...], their tags: positions and segments) with T padded to whole blocks."""
    T = positions_BT.shape[1]
    pad = -T % min(BLOCK, T)
    segments_BT = jnp.zeros_like(positions_BT) if segments_BT is None else segments_BT
    return tuple(_pad(x, pad, 0) for x in arrays), (_pad(positions_BT, pad, _EMPTY), _pad(segments_BT, pad, _EMPTY))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _blockwise(q, k, v, sinks, q_tags, k_tags, window):
    return forward(q, k, v, sinks, q_tags, k_tags, window)[0]


def forward(q, k, v, sinks, q_tags, k_tags, window):
    """Return (attention [B, T, N, H] in q's dtype; its top score and the sum of exp(score - top), float32 [B, T, N]), of whole blocks.

    sinks: float32 [N] or, for a part of the keys that is to be merged with others, None: where a query sees none of them, the top is so
    low that the part weighs nothing. The sum's logarithm isn't taken, as that would round it where the top is large.
    """
    B, T, N, H = q.shape
    K, G = k.shape[2], N // k.shape[2]
    rows, cols = min(BLOCK, T), min(BLOCK, k.shape[1])
    first_top = jnp.full((1, K, G, 1), _LOWEST, jnp.float32) if sinks is None else sinks.reshape(1, K, G, 1)
    bounds = _block_bounds(k_tags, cols)

    def one_query_block(_, i):
        q_i = _block(q, i, rows).reshape(B, rows, K, G, H)
        tags_i = [_block(tag, i, rows) for tag in q_tags]

        def add_key_block(j, state):
            def visit(state):
                acc, top, total = state
                scores = _scores(q_i, _block(k, j, cols), tags_i, [_block(tag, j, cols) for tag in k_tags], window)
                new_top = jnp.maximum(top, scores.max(axis=-1))
                weights = jnp.exp(scores - new_top[..., None])
                decay = jnp.exp(top - new_top)
                values = _einsum("bkgts,bskh->bkgth", weights.astype(v.dtype), _block(v, j, cols))
                return acc * decay[..., None] + values, new_top, total * decay + weights.sum(axis=-1)

            return jax.lax.cond(_meet(tags_i, bounds, j, window), visit, lambda state: state, state)

        # The sink opens the softmax: weight one at its own logit, no value.
        top = jnp.broadcast_to(first_top, (B, K, G, rows))
        state = (jnp.zeros((B, K, G, rows, H), jnp.float32), top, jnp.ones_like(top))
        acc, top, total = jax.lax.fori_loop(0, k.shape[1] // cols, add_key_block, state)
        out = (acc / total[..., None]).astype(q.dtype)
        return None, tuple(jnp.moveaxis(x, 3, 1).reshape(B, rows, N, *x.shape[4:]) for x in (out, top, total))

    _, parts = jax.lax.scan(one_query_block, None, jnp.arange(T // rows))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(B, T, *x.shape[3:]) for x in parts)


def _forward_rule(q, k, v, sinks, q_tags, k_tags, window):
    out, top, total = forward(q, k, v, sinks, q_tags, k_tags, window)
    return out, (q, k, v, sinks, q_tags, k_tags, out, top + jnp.log(total))


def _backward_rule(window, residuals, g):
    q, k, v, sinks, q_tags, k_tags, out, lse = residuals
    delta, dsinks = delta_and_sink_gradient(sinks, out, lse, g)
    gradients = (dx.astype(x.dtype) for x, dx in zip((q, k, v), backward(q, k, v, q_tags, k_tags, lse, delta, g, window)))
    return *gradients, dsinks, *no_gradients((q_tags, k_tags))


def delta_and_sink_gradient(sinks, out, lse, g):
    """Return (delta = sum(dO * O) [B, T, N], which all scores' gradients share; the sinks' gradient [N]), float32.

    The sink is a key of logit `sink` whose value is zero, so dsink = -P_sink * delta.
    """
    delta = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)
    return delta, -(jnp.exp(sinks.astype(jnp.float32) - lse) * delta).sum(axis=(0, 1))


def no_gradients(tags):
    """Return the gradients of integers: none."""
    return jax.tree.map(lambda tag: np.zeros(tag.shape, jax.dtypes.float0), tags)


def backward(q, k, v, q_tags, k_tags, lse, delta, g, window):
    """Return the gradients of q, k and v, float32, of whole blocks: dS = P * (dP - delta). k and v may be a part of the keys that `lse` is of."""
    B, T, N, H = q.shape
    K, G = k.shape[2], N // k.shape[2]
    rows, cols = min(BLOCK, T), min(BLOCK, k.shape[1])
    bounds = _block_bounds(k_tags, cols)

    def one_query_block(carry, i):
        q_i, g_i = (_block(x, i, rows).reshape(B, rows, K, G, H) for x in (q, g))
        lse_i, delta_i = (jnp.moveaxis(_block(x, i, rows).reshape(B, rows, K, G), 1, 3) for x in (lse, delta))
        tags_i = [_block(tag, i, rows) for tag in q_tags]

        def add_key_block(j, state):
            def visit(state):
                dq, dk, dv = state
                k_j, v_j = _block(k, j, cols), _block(v, j, cols)
                scores = _scores(q_i, k_j, tags_i, [_block(tag, j, cols) for tag in k_tags], window)
                weights = jnp.exp(scores - lse_i[..., None])
                dweights = _einsum("btkgh,bskh->bkgts", g_i, v_j)
                dscores = (weights * (dweights - delta_i[..., None]) * H**-0.5).astype(q.dtype)
                dq = dq + _einsum("bkgts,bskh->btkgh", dscores, k_j)
                dk = _add_block(dk, j, cols, _einsum("bkgts,btkgh->bskh", dscores, q_i))
                dv = _add_block(dv, j, cols, _einsum("bkgts,btkgh->bskh", weights.astype(g.dtype), g_i))
                return dq, dk, dv

            return jax.lax.cond(_meet(tags_i, bounds, j, window), visit, lambda state: state, state)

        dq = jnp.zeros((B, rows, K, G, H), jnp.float32)
        dq, *carry = jax.lax.fori_loop(0, k.shape[1] // cols, add_key_block, (dq, *carry))
        return tuple(carry), dq

    zeros = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(one_query_block, (zeros, zeros), jnp.arange(T // rows))
    return jnp.moveaxis(dq, 0, 1).reshape(q.shape), dk, dv


_blockwise.defvjp(_forward_rule, _backward_rule)


def _scores(q_BTKGH, k_BSKH, q_tags, k_tags, window):
    scores = _einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH) * q_BTKGH.shape[-1] ** -0.5
    seen = reference.visible(q_tags[0], k_tags[0], q_tags[1], k_tags[1], window)
    return jnp.where(seen[:, None, None], scores, _LOWEST)


def _block_bounds(k_tags, cols):
    """Return per key block and over the batch: first and last position of a real key, smallest and largest segment."""
    positions, segments = (jnp.moveaxis(tag.reshape(tag.shape[0], -1, cols), 1, 0) for tag in k_tags)
    first = jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max).min(axis=(1, 2))
    return first, positions.max(axis=(1, 2)), segments.min(axis=(1, 2)), segments.max(axis=(1, 2))


def _meet(q_tags, bounds, j, window):
    """Return whether any query of the block can see any key of key block j: False only when none does."""
    positions, segments = q_tags
    first, last, low, high = (bound[j] for bound in bounds)
    real = jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max // 2)
    meet = (first <= positions.max()) & (segments.min() <= high) & (low <= segments.max())
    return meet if window is None else meet & (last > real.min() - window)


def _einsum(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32, precision="highest" if a.dtype == jnp.float32 else None)


def _pad(x, count, value):
    return jnp.pad(x, [(0, 0), (0, count)] + [(0, 0)] * (x.ndim - 2), constant_values=value) if count else x


def _block(x, index, size):
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1)


def _add_block(x, index, size, update):
    return jax.lax.dynamic_update_slice_in_dim(x, _block(x, index, size) + update, index * size, axis=1)
