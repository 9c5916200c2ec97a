"""Grouped-query attention with sinks over keys tagged by position: one signature for training, prefill and decode."""

from __future__ import annotations

import functools
import logging
import typing
from typing import Literal

import jax
import jax.numpy as jnp

from gptoss_jax.kernels import cpu_library
from gptoss_jax.kernels.attention import cpu, cudnn, reference, xla

IMPLEMENTATIONS = ("reference", "xla", "cpu", "cudnn")
Order = Literal["aligned", "slots", "ring"]

__all__ = ["IMPLEMENTATIONS", "Order", "attention", "say_once"]

log = logging.getLogger("gptoss_jax")


def attention(q_BTNH, k_BSKH, v_BSKH, sinks_N, *, q_positions, k_positions, q_segments=None, k_segments=None, window=None,
              order: Order | None = None, implementation: str = "auto"):
    """Same signature and result as `reference.attention`; differentiable in q, k, v and sinks.

    order: a promise about the keys, for implementations that mask by index, not by tags. "aligned": key t is query t's own, positions count
    up within each segment, and a segment's tokens lie together; without segments there may be padding behind the others. "slots": slot s holds
    position s or nothing, the queries' own keys included. "ring": with one query, slots that fill in order and lie within the window; with T
    queries, any such slots, then the queries' own T keys. Of both a row's real queries come first and their positions count up. None: nothing is
    promised.
    implementation: one of IMPLEMENTATIONS, which raises where it can't run, or "auto": the fastest that can.
    """
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"attention implementation {implementation!r}, expected 'auto' or one of {', '.join(IMPLEMENTATIONS)}")
    if order not in (None, *typing.get_args(Order)):
        raise ValueError(f"attention: order {order!r}, expected None or one of {', '.join(typing.get_args(Order))}")
    if q_BTNH.shape[2] % k_BSKH.shape[2]:
        raise ValueError(f"attention: {q_BTNH.shape[2]} query heads and {k_BSKH.shape[2]} key-value heads found, expected the first to be a multiple")
    if window is not None and window < 1:
        raise ValueError(f"attention: window {window}, expected None or at least 1")
    tags = dict(q_positions=q_positions, k_positions=k_positions, q_segments=q_segments, k_segments=k_segments)
    arrays = q_BTNH, k_BSKH, v_BSKH, sinks_N
    if implementation in ("auto", "cudnn"):
        requirement = cudnn.unmet(q_BTNH, k_BSKH, v_BSKH, q_segments, window, order)
        if implementation == "cudnn" and requirement is None and jax.default_backend() != "gpu":
            requirement = f"an NVIDIA GPU (found {jax.default_backend()})"
        if implementation == "cudnn" and requirement:
            raise ValueError(f"attention implementation 'cudnn' needs {requirement}")
        if jax.default_backend() == "gpu":
            say_once("attention: cuDNN" if requirement is None else f"attention: XLA, as cuDNN needs {requirement}")
        if requirement is None:
            return _cudnn(*arrays, tags, window, order, implementation)
    return _elsewhere(*arrays, tags, window, implementation)


def _elsewhere(q, k, v, sinks, tags, window, implementation):
    if implementation == "auto" and not (cpu.unmet(q, k, v, tags["q_segments"]) is None and cpu_library.available()):
        implementation = "xla"
    if implementation in ("auto", "cpu"):
        return _cpu(q, k, v, sinks, tags, window, implementation)
    return {"reference": reference, "xla": xla}[implementation].attention(q, k, v, sinks, **tags, window=window)


@functools.cache
def say_once(message: str) -> None:
    """Log a line once a process."""
    log.info(message)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _cudnn(q, k, v, sinks, tags, window, order, implementation):
    return _cudnn_forward(q, k, v, sinks, tags, window, order, implementation)[0]


def _cudnn_forward(q, k, v, sinks, tags, window, order, implementation):
    def here(*arrays):
        return cudnn.forward(*arrays, window, order)

    def elsewhere(q, k, v, sinks, tags):
        return _elsewhere(q, k, v, sinks, tags, window, "auto"), jnp.zeros(q.shape[:3], jnp.float32)

    arrays = q, k, v, sinks, tags
    out, lse = here(*arrays) if implementation == "cudnn" else jax.lax.platform_dependent(*arrays, cuda=here, default=elsewhere)
    return out, (*arrays, out, lse)


def _cudnn_backward(window, order, implementation, residuals, g):
    def here(q, k, v, sinks, tags, out, lse, g):
        return cudnn.backward(q, k, v, sinks, tags, out, lse, g, window)

    def elsewhere(q, k, v, sinks, tags, out, lse, g):
        return jax.vjp(lambda *arrays: xla.attention(*arrays, **tags, window=window), q, k, v, sinks)[1](g)

    if order != "aligned":
        grads = elsewhere(*residuals, g)
    elif implementation == "cudnn":
        grads = here(*residuals, g)
    else:
        grads = jax.lax.platform_dependent(*residuals, g, cuda=here, default=elsewhere)
    return *grads, xla.no_gradients(residuals[4])


_cudnn.defvjp(_cudnn_forward, _cudnn_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _cpu(q, k, v, sinks, tags, window, implementation):
    here, elsewhere = (functools.partial(op.attention, **tags, window=window) for op in (cpu, xla))
    if implementation == "cpu":
        return here(q, k, v, sinks)
    return jax.lax.platform_dependent(q, k, v, sinks, cpu=here, default=elsewhere)


@_cpu.defjvp
def _tangent_rule(window, implementation, primals, tangents):
    arrays, tags = primals[:4], primals[4]
    tangent = jax.jvp(lambda *arrays: xla.attention(*arrays, **tags, window=window), arrays, tangents[:4])[1]
    return _cpu(*primals, window, implementation), tangent
