"""All of a decode step before the experts, of one row: norm and q, k and v, attention, its output with the residual, and the router's early scores."""

from __future__ import annotations

import functools

import jax

from gptoss_jax.kernels import hopper
from gptoss_jax.kernels.decode_block import mosaic_gpu, reference
from gptoss_jax.kernels.one_kernel import one_kernel_or_several

IMPLEMENTATIONS = ("reference", "mosaic_gpu")

__all__ = ["IMPLEMENTATIONS", "decode_block", "takes"]


def takes(*arrays) -> bool:
    """Return whether kernels take `decode_block`'s arguments, on a GPU that is here if they compute right on it: otherwise the ops that it is made of,
    which have kernels of their own, are better called one by one."""
    return mosaic_gpu.unmet(*arrays) is None and (jax.default_backend() != "gpu" or hopper.device_unmet("decode_block") is None)


def decode_block(x_1D, scale_D, qkv_JD, bias_J, cosine_1R, sine_1R, keys_1SKH, values_1SKH, sinks_KG, positions_1, output_DI, output_bias_D, next_scale_D,
                 router_ED, *, ring: bool, epsilon: float, for_hopper: bool = False, implementation: str = "auto"):
    """Same result as `reference.decode_block`: (x + attention's output [1, D], EarlyScores, new keys, new values), all bfloat16.

    implementation: "mosaic_gpu", two kernels, which raises ValueError where it can't run, and writes the caches where they lie, if nobody else holds
    them; "reference"; or "auto": "mosaic_gpu" where it can run, otherwise the reference, its attention by what is best. for_hopper: as of `decode_matmul`.
    """
    arrays = (x_1D, scale_D, qkv_JD, bias_J, cosine_1R, sine_1R, keys_1SKH, values_1SKH, sinks_KG, positions_1, output_DI, output_bias_D, next_scale_D,
              router_ED)
    requirement, constants = mosaic_gpu.unmet(*arrays), {"ring": ring, "epsilon": epsilon}
    several = functools.partial(reference.decode_block, **constants, parts=1 if requirement else mosaic_gpu.parts(arrays),
                                implementation="reference" if implementation == "reference" else "auto")
    return one_kernel_or_several("decode_block", IMPLEMENTATIONS, implementation, requirement, for_hopper, functools.partial(mosaic_gpu.run, **constants),
                                 several, *arrays)
