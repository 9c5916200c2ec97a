"""The choice that a decode step's ops share: all of an op in one kernel for Hopper GPUs where that can run, otherwise by the ops it is made of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax

from gptoss_jax.kernels import hopper
from gptoss_jax.kernels.attention import say_once


def one_kernel_or_several(op: str, implementations: Sequence[str], implementation: str, requirement: str | None, for_hopper: bool, kernel: Callable,
                          several: Callable, *arrays):
    """Return kernel(*arrays), which does all, or several(*arrays). Raises ValueError where "mosaic_gpu" is named and can't run.

    implementation: "mosaic_gpu"; "auto": that, where it can run; or another of `implementations`, otherwise ValueError. op: its folder in `kernels`.
    requirement: what the arguments don't meet. for_hopper: a promise that a program for another GPU than the ones here is for a Hopper.
    """
    if implementation not in ("auto", *implementations):
        raise ValueError(f"{op} implementation {implementation!r}, expected 'auto' or one of {', '.join(implementations)}")
    if implementation not in ("auto", "mosaic_gpu"):
        return several(*arrays)
    here = jax.default_backend() == "gpu"
    if requirement is None and (here or implementation == "mosaic_gpu"):
        requirement = hopper.device_unmet(op)
    if implementation == "mosaic_gpu":
        if requirement:
            raise ValueError(f"{op} implementation 'mosaic_gpu' needs {requirement}")
        return _differentiable(kernel, several)(*arrays)
    if here:
        say_once(f"{op}: mosaic_gpu" if requirement is None else f"{op}: several kernels, as mosaic_gpu needs {requirement}")
    if requirement or not (here or for_hopper):
        return several(*arrays)
    return _differentiable(functools.partial(jax.lax.platform_dependent, cuda=kernel, default=several), several)(*arrays)


def _differentiable(run: Callable, several: Callable) -> Callable:
    """Return `run` with the gradients of `several`, as kernels have none."""
    run_or_differentiate = jax.custom_vjp(run)
    run_or_differentiate.defvjp(lambda *arrays: (run(*arrays), arrays), lambda arrays, gradients: jax.vjp(several, *arrays)[1](gradients))
    return run_or_differentiate
