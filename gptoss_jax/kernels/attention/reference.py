"""The definition of the op, every score at once: what the other implementations are tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

LOWEST_SINK = -1e29  # instead of -inf, so that a query that sees nothing is zero, not NaN; above what stands for scores that aren't seen


def visible(q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, window: int | None):
    """Return which keys a query sees, bool [B, T, S]: not later than itself, within the last `window` positions (its own included),
    in its own segment, and not in an empty slot (negative position)."""
    distance = q_positions_BT[:, :, None] - k_positions_BS[:, None, :]
    seen = (distance >= 0) & (k_positions_BS >= 0)[:, None, :]
    if window is not None:
        seen &= distance < window
    if q_segments_BT is not None:
        seen &= q_segments_BT[:, :, None] == k_segments_BS[:, None, :]
    return seen


def attention(q_BTNH, k_BSKH, v_BSKH, sinks_N, *, q_positions, k_positions, q_segments=None, k_segments=None, window=None):
    """Attend with a learned sink per query head: one more logit in the softmax, with no value.

    q: [B, T, N, H]; k, v: [B, S, K, H] with N a multiple of K; sinks: [N]; positions and segments: int32 [B, T] and [B, S];
    window: keys a query sees, None for all. A sink of -inf is none. Scores are scaled by H^-0.5; softmax in float32. Returns [B, T, N, H] in q's dtype.
    Source: openai/gpt-oss `gpt_oss/torch/model.py: sdpa`.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    precision = "highest" if q_BTNH.dtype == jnp.float32 else None
    q_BKGTH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3)  # so that no product is transposed after it: they are the large ones
    scores = jnp.einsum("bkgth,bskh->bkgts", q_BKGTH, k_BSKH, preferred_element_type=jnp.float32, precision=precision) * H**-0.5
    seen = visible(q_positions, k_positions, q_segments, k_segments, window)[:, None, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    sinks = finite(sinks_N).reshape(K, N // K)[None, :, :, None, None]
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True, initial=-jnp.inf), sinks))
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True) + jnp.exp(sinks - top)
    out = jnp.einsum("bkgts,bskh->bkgth", weights.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32, precision=precision)
    return jnp.moveaxis(out / total, 3, 1).reshape(B, T, N, H).astype(q_BTNH.dtype)


def finite(sinks_N):
    """Return sinks in float32, LOWEST_SINK for lower ones."""
    return jnp.maximum(sinks_N.astype(jnp.float32), LOWEST_SINK)
