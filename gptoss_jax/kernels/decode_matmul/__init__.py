"""A decode step's products with dense weights, of few rows: with the sum and the norm before, and the bias after."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from gptoss_jax.kernels.decode_matmul import mosaic_gpu, reference
from gptoss_jax.kernels.decode_matmul.reference import rms_norm
from gptoss_jax.kernels.one_kernel import one_kernel_or_several

IMPLEMENTATIONS = ("xla", "cpu", "mosaic_gpu")

__all__ = ["IMPLEMENTATIONS", "decode_matmul", "decode_matmul_scored", "rms_norm"]


def decode_matmul(x_TD, weight_OD, bias_O=None, *, added_TD=None, scale_D=None, epsilon: float = 0.0, dtype=None, for_hopper: bool = False,
                  implementation: str = "auto"):
    """Same result as `reference.decode_matmul`; dtype: of the product, default x's. Raises ValueError for something to add where nothing is normed.

    for_hopper: a promise that a program for another GPU than the ones here is for a Hopper. implementation: one of IMPLEMENTATIONS, which raises
    where it can't run: "mosaic_gpu" does all in one kernel, the others are `dense_matmul`'s, after a separate sum and norm; or "auto":
    "mosaic_gpu" where it can run, otherwise what is best of the others.
    """
    if added_TD is not None and scale_D is None:
        raise ValueError("decode_matmul: added_TD without scale_D found, expected a sum only where it is normed")
    arrays, constants = (x_TD, added_TD, scale_D, weight_OD, bias_O), {"epsilon": epsilon, "dtype": jnp.dtype(dtype or x_TD.dtype)}
    return one_kernel_or_several(
        "decode_matmul", IMPLEMENTATIONS, implementation, mosaic_gpu.unmet(*arrays, constants["dtype"]), for_hopper,
        functools.partial(mosaic_gpu.run, **constants), functools.partial(reference.decode_matmul, **constants, implementation=implementation), *arrays)


def decode_matmul_scored(x_TD, weight_OD, bias_O, residual_TO, scale_O, router_EO, *, epsilon: float = 0.0, for_hopper: bool = False,
                         implementation: str = "auto"):
    """Same result as `reference.decode_matmul_scored`: (residual + product [1, O], EarlyScores), of one row. Raises ValueError for more.

    for_hopper, implementation: as of `decode_matmul`. What "mosaic_gpu" needs, `mosaic_gpu.unmet_scored` says.
    """
    arrays = x_TD, weight_OD, bias_O, residual_TO, scale_O, router_EO
    if x_TD.shape[0] != 1:
        raise ValueError(f"decode_matmul_scored: {x_TD.shape[0]} rows found, expected one")
    requirement = mosaic_gpu.unmet_scored(*arrays)
    several = functools.partial(reference.decode_matmul_scored, parts=1 if requirement else mosaic_gpu.parts(weight_OD, router_EO), epsilon=epsilon,
                                implementation=implementation)
    return one_kernel_or_several("decode_matmul", IMPLEMENTATIONS, implementation, requirement, for_hopper,
                                 functools.partial(mosaic_gpu.run_scored, epsilon=epsilon), several, *arrays)
