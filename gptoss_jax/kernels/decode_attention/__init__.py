"""All of a decode step's attention between the product for q, k and v and the output's: rotation, cache write, attention of one query a row."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from gptoss_jax.kernels import attention
from gptoss_jax.kernels.decode_attention import mosaic_gpu, reference
from gptoss_jax.kernels.decode_attention.reference import rotate
from gptoss_jax.kernels.one_kernel import one_kernel_or_several

IMPLEMENTATIONS = (*attention.IMPLEMENTATIONS, "mosaic_gpu")

__all__ = ["IMPLEMENTATIONS", "decode_attention", "rotate"]


def decode_attention(qkv_BJ, bias_J, cosine_BR, sine_BR, keys_BSKH, values_BSKH, sinks_N, positions_B, *, ring: bool, dtype=jnp.bfloat16,
                     for_hopper: bool = False, implementation: str = "auto"):
    """Same result as `reference.decode_attention`; with "mosaic_gpu" the caches are written where they lie, if nobody else holds them.

    for_hopper: a promise that a program for another GPU than the ones here is for a Hopper.
    implementation: one of IMPLEMENTATIONS, which raises where it can't run: "mosaic_gpu" does all in one kernel or two, the others are
    `attention`'s, after separate rotation and writes; or "auto": "mosaic_gpu" where it can run, otherwise what is best of the others.
    """
    sinks_KG = sinks_N.reshape(keys_BSKH.shape[2], -1)
    arrays = qkv_BJ, bias_J, cosine_BR, sine_BR, keys_BSKH, values_BSKH, sinks_KG, positions_B
    return one_kernel_or_several(
        "decode_attention", IMPLEMENTATIONS, implementation, mosaic_gpu.unmet(keys_BSKH, values_BSKH, sinks_KG, dtype), for_hopper,
        functools.partial(mosaic_gpu.run, ring=ring), functools.partial(reference.decode_attention, ring=ring, dtype=dtype, implementation=implementation),
        *arrays)
