"""Attention of one query a row over its cache, by the CPU kernels."""

from __future__ import annotations

import jax.numpy as jnp

from gptoss_jax.kernels import cpu_library


def unmet(q_BTNH, k_BSKH, v_BSKH, q_segments) -> str | None:
    """Return the requirement that these arguments don't meet, None if they meet all."""
    if q_BTNH.shape[1] != 1 or q_segments is not None:
        return f"one query a row and no segments (found {q_BTNH.shape[1]} queries{'' if q_segments is None else ' with segments'})"
    dtypes = {q_BTNH.dtype, k_BSKH.dtype, v_BSKH.dtype}
    if len(dtypes) > 1 or dtypes.pop() not in (jnp.float32, jnp.bfloat16):
        return f"q, k and v all in float32 or all in bfloat16 (found {q_BTNH.dtype}, {k_BSKH.dtype} and {v_BSKH.dtype})"
    return None


def attention(q_BTNH, k_BSKH, v_BSKH, sinks_N, *, q_positions, k_positions, q_segments=None, k_segments=None, window=None):
    """Same signature and result as `reference.attention`, for T = 1 without segments, not differentiable."""
    if requirement := unmet(q_BTNH, k_BSKH, v_BSKH, q_segments):
        raise ValueError(f"attention implementation 'cpu' needs {requirement}")
    cpu_library.load()
    return cpu_library.attention(q_BTNH[:, 0], k_BSKH, v_BSKH, sinks_N.astype(jnp.float32), q_positions[:, 0], k_positions, window)[:, None]
