"""Expert matmul on NVIDIA Hopper GPUs: what `hopper_kernel` needs, and the op by its means, alone or with clamped SwiGLU.

That module is imported where it is used: Pallas' GPU side isn't in every jax, and takes its time to import.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gptoss_jax.kernels.expert_matmul import hopper_layout
from gptoss_jax.kernels.expert_matmul.hopper_layout import ALIGNMENT, HopperGateUpWeight, HopperWeight
from gptoss_jax.kernels.expert_matmul.reference import Mxfp4Weight

OLDEST_JAX = (0, 11, 2)


def unmet(x_MI, weight, bias_EO) -> str | None:
    """Return the requirement that these arguments or this jax don't meet, None if they meet all; of the device, see `device_unmet`."""
    if jax.__version_info__ < OLDEST_JAX:
        return f"jax {'.'.join(map(str, OLDEST_JAX))} or newer (found {jax.__version__})"
    if not isinstance(weight, (Mxfp4Weight, HopperWeight, HopperGateUpWeight)):
        return f"a packed weight (found a dense one, {weight.dtype})"
    if x_MI.dtype != jnp.bfloat16:
        return f"rows in bfloat16 (found {x_MI.dtype})"
    if bias_EO.dtype not in (jnp.bfloat16, jnp.float32):
        return f"a bias in bfloat16 or float32 (found {bias_EO.dtype})"
    return hopper_layout.unmet(weight) if isinstance(weight, Mxfp4Weight) else None


def device_unmet() -> str | None:
    """Return what is missing where JAX's first device is no Hopper GPU, None if it is one."""
    device = jax.devices()[0]
    hopper = device.platform == "gpu" and getattr(device, "compute_capability", None) == "9.0"
    return None if hopper else f"a Hopper GPU (found {device.device_kind})"


def expert_matmul(x_MI, weight, bias_EO, group_sizes_E, *, aligned: bool = False, interpret=None):
    """Same signature and result as `reference.expert_matmul`, for bfloat16 rows and a HopperWeight, not differentiable.

    An Mxfp4Weight is rearranged in the program, at every call: right, and slow. aligned: a promise that all group sizes and M are
    multiples of ALIGNMENT, else rows are moved apart first and back after. interpret: plgpu.InterpretGPUParams.
    """
    if isinstance(weight, HopperGateUpWeight):
        raise ValueError("expert_matmul implementation 'mosaic_gpu' needs a HopperWeight (a HopperGateUpWeight is for expert_swiglu)")
    return _run("expert_matmul", x_MI, weight, bias_EO, group_sizes_E, HopperWeight, aligned, interpret)


def expert_swiglu(x_MI, weight, bias_EO, group_sizes_E, *, limit: float, alpha: float, aligned: bool = False, interpret=None):
    """Return `reference.swiglu` of `reference.expert_matmul`, rounded once; for a HopperGateUpWeight, otherwise as `expert_matmul` here."""
    return _run("expert_swiglu", x_MI, weight, bias_EO, group_sizes_E, HopperGateUpWeight, aligned, interpret, limit=limit, alpha=alpha)


def _run(name, x_MI, weight, bias_EO, group_sizes_E, kind, aligned, interpret, **constants):
    if requirement := unmet(x_MI, weight, bias_EO) or (None if interpret else device_unmet()):
        raise ValueError(f"{name} implementation 'mosaic_gpu' needs {requirement}")
    return run(x_MI, weight, bias_EO, group_sizes_E, kind, aligned, interpret, **constants)


def run(x_MI, weight, bias_EO, group_sizes_E, kind, aligned=False, interpret=None, **constants):
    """Do what `expert_matmul` and `expert_swiglu` do, without a look at the device: for programs compiled elsewhere than where they run."""
    from gptoss_jax.kernels.expert_matmul import hopper_kernel

    if isinstance(weight, Mxfp4Weight):
        weight = hopper_layout.pack(weight, kind)
    M = x_MI.shape[0]
    if not aligned:
        slot_M, group_sizes_E, slots = align(group_sizes_E, M)
        x_MI = jnp.zeros((slots, x_MI.shape[1]), x_MI.dtype).at[slot_M].set(x_MI, unique_indices=True)
    if not x_MI.shape[0]:
        return jnp.zeros((0, bias_EO.shape[1] // (2 if kind is HopperGateUpWeight else 1)), x_MI.dtype)
    plan = hopper_kernel.plan(x_MI.shape[0], weight)
    if interpret:
        plan = plan._replace(interpret=interpret, blocks=3)
    out = hopper_kernel.matmul(x_MI, weight, bias_EO, group_sizes_E, plan, **constants)
    if plan.splits > 1:
        out = out.sum(axis=0).astype(x_MI.dtype)
    return out if aligned else out[slot_M]


def align(group_sizes_E, num_rows: int):
    """Return where rows sorted by expert go so that every group starts at a multiple of ALIGNMENT: int32 [M]; the groups' sizes then; all slots."""
    E = group_sizes_E.shape[0]
    sizes = jnp.append(group_sizes_E, num_rows - group_sizes_E.sum()).astype(jnp.int32)  # the last: rows past the groups' sum
    room = -(-sizes // ALIGNMENT) * ALIGNMENT
    ends = jnp.cumsum(sizes)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    expert = jnp.searchsorted(ends, row, side="right", method="compare_all")
    slots = -(-(num_rows + (ALIGNMENT - 1) * min(E + 1, num_rows)) // ALIGNMENT) * ALIGNMENT
    return row + (jnp.cumsum(room) - room - ends + sizes)[expert], room[:E], slots
