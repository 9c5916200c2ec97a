"""A decode step before the experts on NVIDIA Hopper GPUs by two kernels: what they need, and the op by their means.

The second is attention's and its output's: its first blocks attend, each for a key-value head, while the others fetch the output's weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gptoss_jax.kernels.decode_attention import mosaic_gpu as attention
from gptoss_jax.kernels.decode_matmul import mosaic_gpu as products
from gptoss_jax.kernels.expert_matmul.reference import EarlyScores
from gptoss_jax.kernels.hopper import SMS


def unmet(x_1D, scale_D, qkv_JD, bias_J, cosine_1R, sine_1R, keys, values, sinks_KG, positions_1, output_DI, output_bias_D, next_scale_D,
          router_ED) -> str | None:
    """Return the requirement that these arguments or this jax don't meet, None if they meet all; of the device, see `hopper.device_unmet`."""
    if x_1D.shape[0] != 1 or sinks_KG.shape[1] != 8:
        return f"one row and 8 queries to a key (found {x_1D.shape[0]} and {sinks_KG.shape[1]})"
    attended = jax.ShapeDtypeStruct((1, output_DI.shape[1]), x_1D.dtype)
    requirement = (products.unmet(x_1D, None, scale_D, qkv_JD, None, jnp.float32) or attention.unmet(keys, values, sinks_KG, x_1D.dtype)
                   or products.unmet_scored(attended, output_DI, output_bias_D, x_1D, next_scale_D, router_ED))
    if requirement:
        return requirement
    attending, multiplying = _plans(keys, output_DI, router_ED)
    if attending.splits > 1 or multiplying is None or multiplying.rows != 1:
        return f"a cache that isn't split, and an output of {SMS - keys.shape[2]} blocks at most (found {keys.shape[1]} slots, {output_DI.shape[0]} outputs)"
    return None


def _plans(keys, output_DI, router_ED):
    from gptoss_jax.kernels.decode_block import hopper_kernel

    return hopper_kernel.plans(keys.shape[1], keys.shape[2], *output_DI.shape, router_ED.shape[0])


def parts(arrays) -> int:
    """Return how many parts of scores there are for arguments that meet `unmet`."""
    keys, output_DI, router_ED = arrays[6], arrays[10], arrays[13]
    return output_DI.shape[0] // _plans(keys, output_DI, router_ED)[1].outputs


def run(x_1D, scale_D, qkv_JD, bias_J, *arrays, ring: bool, epsilon: float, interpret=None):
    """Do what `reference.decode_block` defines, for arguments that meet `unmet`, without a look at the device. interpret: plgpu.InterpretGPUParams."""
    from gptoss_jax.kernels.decode_block import hopper_kernel
    from gptoss_jax.kernels.decode_matmul import hopper_kernel as product

    plan = product.plan(1, *qkv_JD.shape)._replace(interpret=interpret)
    qkv_1J, _, _, counter = product.matmul(x_1D, None, scale_D, qkv_JD, None, plan, epsilon=epsilon, dtype=jnp.dtype(jnp.float32), counters=1)
    *of_attention, output_DI, output_bias_D, next_scale_D, router_ED = arrays
    plans = tuple(plan._replace(interpret=interpret) for plan in _plans(of_attention[2], output_DI, router_ED))
    summed, rows, parts, *cache = hopper_kernel.attend_and_multiply(
        qkv_1J, bias_J, *of_attention, output_DI, output_bias_D, x_1D, next_scale_D, router_ED, counter, plans=plans, ring=ring, epsilon=epsilon)
    return summed, EarlyScores(rows, parts), *cache
