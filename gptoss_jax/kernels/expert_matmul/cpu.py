"""Expert matmul by the CPU kernels: packed weights are decoded a few rows at a time into the processor's cache."""

from __future__ import annotations

import jax.numpy as jnp

from gptoss_jax.kernels import cpu_library
from gptoss_jax.kernels.expert_matmul.reference import Mxfp4Weight


def unmet(x_MI, weight) -> str | None:
    """Return the requirement that these arguments don't meet, None if they meet all."""
    if not isinstance(weight, Mxfp4Weight):
        return f"a packed weight (found a dense one, {weight.dtype})"
    if x_MI.dtype not in (jnp.float32, jnp.bfloat16):
        return f"rows in float32 or bfloat16 (found {x_MI.dtype})"
    return None


def expert_matmul(x_MI, weight, bias_EO, group_sizes_E):
    """Same signature and result as `reference.expert_matmul`, for packed weights, not differentiable."""
    if requirement := unmet(x_MI, weight):
        raise ValueError(f"expert_matmul implementation 'cpu' needs {requirement}")
    cpu_library.load()
    bias_EO = bias_EO if bias_EO.dtype in (jnp.float32, jnp.bfloat16) else bias_EO.astype(jnp.float32)
    return cpu_library.matmul(x_MI, weight.blocks, weight.scales, bias_EO, group_sizes_E, x_MI.dtype)
