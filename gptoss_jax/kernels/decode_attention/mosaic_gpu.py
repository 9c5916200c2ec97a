"""Decode attention on NVIDIA Hopper GPUs: what `hopper_kernel` needs, and the op by its means."""

from __future__ import annotations

import jax.numpy as jnp

from gptoss_jax.kernels import hopper


def unmet(keys_BSKH, values_BSKH, sinks_KG, dtype) -> str | None:
    """Return the requirement that these arguments or this jax don't meet, None if they meet all; of the device, see `hopper.device_unmet`."""
    if requirement := hopper.jax_unmet():
        return requirement
    if {jnp.dtype(dtype), keys_BSKH.dtype, values_BSKH.dtype} != {jnp.dtype(jnp.bfloat16)}:
        return f"activations and a cache in bfloat16 (found {jnp.dtype(dtype)}, {keys_BSKH.dtype} and {values_BSKH.dtype})"
    _, S, K, H = keys_BSKH.shape
    if S % 8:
        return f"cache slots in multiples of 8 (found {S})"
    return unmet_heads(K, sinks_KG.shape[1], H)


def unmet_heads(kv_heads: int, queries_each: int, width: int) -> str | None:
    """Return what the numbers and the width of a model's heads don't meet."""
    if width != 64 or not 8 - 2 * kv_heads <= queries_each <= 8:
        return f"heads of width 64, at most 8 queries to a key, 8 with twice the keys (found {width}, {queries_each} and {kv_heads} keys)"
    return None


def run(qkv_BJ, bias_J, cosine_BR, sine_BR, keys_BSKH, values_BSKH, sinks_KG, positions_B, *, ring: bool, splits: int | None = None, interpret=None):
    """Do what `reference.decode_attention` defines, for arguments that meet `unmet`, without a look at the device.

    splits: into how many parts the keys are cut. interpret: plgpu.InterpretGPUParams.
    """
    from gptoss_jax.kernels.decode_attention import hopper_kernel

    plan = hopper_kernel.plan(*keys_BSKH.shape[:3])._replace(interpret=interpret)
    plan = plan if splits is None else plan._replace(splits=splits)
    return hopper_kernel.attend(qkv_BJ, bias_J, cosine_BR, sine_BR, keys_BSKH, values_BSKH, sinks_KG, positions_B, plan, ring=ring)
