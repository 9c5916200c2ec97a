"""Grouped-query attention with sinks over keys tagged by position: one signature for training, prefill and decode."""

from __future__ import annotations

import functools

import jax

from gptoss_jax.kernels import cpu_library
from gptoss_jax.kernels.attention import cpu, reference, xla

IMPLEMENTATIONS = {"reference": reference.attention, "xla": xla.attention, "cpu": cpu.attention}

__all__ = ["IMPLEMENTATIONS", "attention"]


def attention(q_BTNH, k_BSKH, v_BSKH, sinks_N, *, q_positions, k_positions, q_segments=None, k_segments=None, window=None,
              implementation: str = "auto"):
    """Same signature and result as `reference.attention`; differentiable in q, k, v and sinks.

    implementation: one of IMPLEMENTATIONS, which raises where it can't run, or "auto": the fastest that can.
    """
    if implementation != "auto" and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r}, expected 'auto' or one of {', '.join(IMPLEMENTATIONS)}")
    tags = dict(q_positions=q_positions, k_positions=k_positions, q_segments=q_segments, k_segments=k_segments)
    if implementation == "auto" and not (cpu.unmet(q_BTNH, k_BSKH, v_BSKH, q_segments) is None and cpu_library.available()):
        implementation = "xla"
    if implementation in ("auto", "cpu"):
        return _cpu(q_BTNH, k_BSKH, v_BSKH, sinks_N, tags, window, implementation)
    return IMPLEMENTATIONS[implementation](q_BTNH, k_BSKH, v_BSKH, sinks_N, **tags, window=window)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _cpu(q, k, v, sinks, tags, window, implementation):
    if implementation == "cpu":
        return cpu.attention(q, k, v, sinks, **tags, window=window)
    here, elsewhere = (lambda *arrays, attend=attend: attend(*arrays[:4], **arrays[4], window=window) for attend in (cpu.attention, xla.attention))
    return jax.lax.platform_dependent(q, k, v, sinks, tags, cpu=here, default=elsewhere)


@_cpu.defjvp
def _tangent_rule(window, implementation, primals, tangents):
    arrays, tags = primals[:4], primals[4]
    tangent = jax.jvp(lambda *arrays: xla.attention(*arrays, **tags, window=window), arrays, tangents[:4])[1]
    return _cpu(*primals, window, implementation), tangent
