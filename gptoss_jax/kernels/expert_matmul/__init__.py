"""Matrix products of rows sorted by expert with each expert's own matrix, MXFP4 or dense."""

from __future__ import annotations

import functools
import logging

import jax
import numpy as np

from gptoss_jax.kernels import cpu_library
from gptoss_jax.kernels.expert_matmul import cpu, mosaic_gpu, reference, xla
from gptoss_jax.kernels.expert_matmul.hopper_layout import HopperGateUpWeight, HopperWeight, pack, unpack
from gptoss_jax.kernels.expert_matmul.reference import Mxfp4Weight, swiglu

IMPLEMENTATIONS = {"reference": reference.expert_matmul, "xla": xla.expert_matmul, "cpu": cpu.expert_matmul,
                   "mosaic_gpu": mosaic_gpu.expert_matmul}

__all__ = ["IMPLEMENTATIONS", "HopperGateUpWeight", "HopperWeight", "Mxfp4Weight", "expert_matmul", "expert_swiglu", "pack", "unpack"]

log = logging.getLogger("gptoss_jax")


def expert_matmul(x_MI, weight, bias_EO, group_sizes_E, *, implementation: str = "auto"):
    """Same signature and result as `reference.expert_matmul`; differentiable in x, bias and a dense weight.

    A packed weight may also be a HopperWeight, or a HopperGateUpWeight: "auto" multiplies the former by "mosaic_gpu" where the program runs
    on a GPU, and both as the checkpoint stores them elsewhere.
    implementation: one of IMPLEMENTATIONS, which raises where it can't run, or "auto": the fastest that can.
    """
    _check(implementation)
    return _matmul(x_MI, weight, bias_EO, group_sizes_E, implementation)


def expert_swiglu(x_MI, weight, bias_EO, group_sizes_E, *, limit: float, alpha: float, implementation: str = "auto"):
    """Return `reference.swiglu` of `expert_matmul`, [M, out/2]: in one kernel, rounded once, where "mosaic_gpu" does it."""
    _check(implementation)
    if implementation == "mosaic_gpu" or implementation == "auto" and isinstance(weight, HopperGateUpWeight) and _takes(x_MI, weight, bias_EO):
        return _swiglu(x_MI, weight, bias_EO, group_sizes_E, limit, alpha, implementation)
    return swiglu(_matmul(x_MI, weight, bias_EO, group_sizes_E, implementation), limit, alpha)


def _check(implementation):
    if implementation != "auto" and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"expert_matmul implementation {implementation!r}, expected 'auto' or one of {', '.join(IMPLEMENTATIONS)}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _matmul(x_MI, weight, bias_EO, group_sizes_E, implementation):
    arguments = (x_MI, weight, bias_EO, group_sizes_E)
    if implementation == "mosaic_gpu":
        return mosaic_gpu.expert_matmul(*arguments)
    if implementation == "auto" and isinstance(weight, HopperWeight) and _takes(*arguments[:3]):
        return jax.lax.platform_dependent(*arguments, cuda=functools.partial(mosaic_gpu.run, kind=HopperWeight), default=_as_stored)
    if isinstance(weight, (HopperWeight, HopperGateUpWeight)):
        return _as_stored(*arguments, implementation=implementation)
    if implementation != "auto":
        return IMPLEMENTATIONS[implementation](*arguments)
    if cpu.unmet(x_MI, weight) is None and cpu_library.available():
        return jax.lax.platform_dependent(*arguments, cpu=cpu.expert_matmul, default=xla.expert_matmul)
    return xla.expert_matmul(*arguments)


def _as_stored(x_MI, weight, bias_EO, group_sizes_E, implementation="xla"):
    return IMPLEMENTATIONS["xla" if implementation == "auto" else implementation](x_MI, unpack(weight), bias_EO, group_sizes_E)


def _backward(implementation, residuals, g_MO):
    x_MI, weight, bias_EO, group_sizes_E = residuals
    if not isinstance(weight, (HopperWeight, HopperGateUpWeight)):
        return xla.backward(residuals, g_MO)
    dx, _, dbias, dsizes = xla.backward((x_MI, unpack(weight), bias_EO, group_sizes_E), g_MO)
    return dx, _no_gradient(weight), dbias, dsizes


_matmul.defvjp(lambda *arguments: (_matmul(*arguments), arguments[:4]), _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _swiglu(x_MI, weight, bias_EO, group_sizes_E, limit, alpha, implementation):
    arguments = (x_MI, weight, bias_EO, group_sizes_E)
    if implementation == "mosaic_gpu":
        return mosaic_gpu.expert_swiglu(*arguments, limit=limit, alpha=alpha)
    return jax.lax.platform_dependent(
        *arguments, cuda=functools.partial(mosaic_gpu.run, kind=HopperGateUpWeight, limit=limit, alpha=alpha),
        default=lambda *arguments: swiglu(_as_stored(*arguments), limit, alpha))


def _swiglu_backward(limit, alpha, implementation, residuals, g_MF):
    x_MI, weight, bias_EO, group_sizes_E = residuals
    stored = unpack(weight) if isinstance(weight, HopperGateUpWeight) else weight
    _, pull = jax.vjp(lambda x, bias: swiglu(xla.expert_matmul(x, stored, bias, group_sizes_E), limit, alpha), x_MI, bias_EO)
    dx, dbias = pull(g_MF)
    return dx, _no_gradient(weight), dbias, np.zeros(group_sizes_E.shape, jax.dtypes.float0)


_swiglu.defvjp(lambda *arguments: (_swiglu(*arguments), arguments[:4]), _swiglu_backward)


def _no_gradient(weight):
    return type(weight)(*(np.zeros(part.shape, jax.dtypes.float0) for part in weight))


def _takes(x_MI, weight, bias_EO) -> bool:
    """Return whether "auto" compiles the Hopper kernel for these; say which, and why not, once in the log."""
    requirement = mosaic_gpu.unmet(x_MI, weight, bias_EO)
    _say(requirement)
    return requirement is None


@functools.cache
def _say(requirement):
    if requirement:
        log.warning("expert_matmul: weights arranged for Hopper GPUs are multiplied by XLA, slowly: mosaic_gpu needs %s", requirement)
    else:
        log.info("expert_matmul: mosaic_gpu on the GPU, for weights arranged for Hopper")
