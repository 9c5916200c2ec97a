"""Decode products on NVIDIA Hopper GPUs: what `hopper_kernel` needs, and the op by its means.

That module is imported where it is used: Pallas' GPU side isn't in every jax, and takes its time to import.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from gptoss_jax.kernels.expert_matmul import mosaic_gpu


def unmet(x_TD, added_TD, scale_D, weight_OD, bias_O, ahead_OD, dtype) -> str | None:
    """Return the requirement that these arguments or this jax don't meet, None if they meet all; of the device, see `device_unmet`."""
    if requirement := mosaic_gpu.jax_unmet():
        return requirement
    found = {str(array.dtype) for array in (x_TD, added_TD, scale_D, weight_OD, bias_O, ahead_OD) if array is not None}
    if found != {"bfloat16"} or jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"arrays in bfloat16, a result in that or float32 (found {', '.join(sorted(found))}, {jnp.dtype(dtype)})"
    from gptoss_jax.kernels.decode_matmul import hopper_kernel

    if not 1 <= x_TD.shape[0] <= hopper_kernel.ROWS:  # of 16, XLA's products were up to twice as fast on an H200
        return f"1 to {hopper_kernel.ROWS} rows (found {x_TD.shape[0]})"
    if hopper_kernel.plan(x_TD.shape[0], *weight_OD.shape, added_TD is not None):
        return None
    outputs, inputs = weight_OD.shape
    return f"inputs in multiples of 64, few enough, and outputs that {hopper_kernel.SMS} blocks share in multiples of 8 (found {inputs} and {outputs})"


def device_unmet(device: jax.Device | None = None) -> str | None:
    """Return what a device lacks, by default this process's first; None for a Hopper GPU that computes right, or one that isn't here to be asked."""
    return mosaic_gpu.device_unmet(device, wrong_here)


@functools.cache
def wrong_here() -> str | None:
    """Look once a process whether the first device computes right; see `hopper_check.disagreement`."""
    from gptoss_jax.kernels.decode_matmul import hopper_check

    return hopper_check.disagreement()


def run(x_TD, added_TD, scale_D, weight_OD, bias_O, ahead_OD, *, epsilon: float, dtype, interpret=None):
    """Do what `reference.decode_matmul` defines, for arguments that meet `unmet`, without a look at the device. interpret: plgpu.InterpretGPUParams."""
    from gptoss_jax.kernels.decode_matmul import hopper_kernel

    plan = hopper_kernel.plan(x_TD.shape[0], *weight_OD.shape, added_TD is not None)._replace(interpret=interpret)
    return hopper_kernel.matmul(x_TD, added_TD, scale_D, weight_OD, bias_O, ahead_OD, plan, epsilon=epsilon, dtype=jnp.dtype(dtype))
