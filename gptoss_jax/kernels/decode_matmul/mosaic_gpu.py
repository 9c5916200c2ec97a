"""Decode products on NVIDIA Hopper GPUs: what `hopper_kernel` needs, and the op by its means."""

from __future__ import annotations

import jax.numpy as jnp

from gptoss_jax.kernels import hopper
from gptoss_jax.kernels.expert_matmul.reference import FACTORS, EarlyScores


def unmet(x_TD, added_TD, scale_D, weight_OD, bias_O, dtype) -> str | None:
    """Return the requirement that these arguments or this jax don't meet, None if they meet all; of the device, see `hopper.device_unmet`."""
    if requirement := hopper.jax_unmet():
        return requirement
    found = {str(array.dtype) for array in (x_TD, added_TD, scale_D, weight_OD, bias_O) if array is not None}
    if found != {"bfloat16"} or jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"arrays in bfloat16, a result in that or float32 (found {', '.join(sorted(found))}, {jnp.dtype(dtype)})"
    from gptoss_jax.kernels.decode_matmul import hopper_kernel

    outputs, inputs = weight_OD.shape
    rows = x_TD.shape[0], inputs
    if requirement := _other_shape(("x", x_TD, rows), ("added", added_TD, rows), ("scale", scale_D, (inputs,)), ("bias", bias_O, (outputs,))):
        return requirement
    if not 1 <= x_TD.shape[0] <= hopper_kernel.ROWS:  # of 16, XLA's products were up to twice as fast on an H200
        return f"1 to {hopper_kernel.ROWS} rows (found {x_TD.shape[0]})"
    if hopper_kernel.plan(x_TD.shape[0], *weight_OD.shape, added_TD is not None):
        return None
    return f"inputs in multiples of 64, few enough, and outputs that {hopper.SMS} blocks share in multiples of 8 (found {inputs} and {outputs})"


def run(x_TD, added_TD, scale_D, weight_OD, bias_O, *, epsilon: float, dtype, interpret=None):
    """Do what `reference.decode_matmul` defines, for arguments that meet `unmet`, without a look at the device. interpret: plgpu.InterpretGPUParams."""
    from gptoss_jax.kernels.decode_matmul import hopper_kernel

    plan = hopper_kernel.plan(x_TD.shape[0], *weight_OD.shape, added_TD is not None)._replace(interpret=interpret)
    return hopper_kernel.matmul(x_TD, added_TD, scale_D, weight_OD, bias_O, plan, epsilon=epsilon, dtype=jnp.dtype(dtype))


def unmet_scored(x_TD, weight_OD, bias_O, residual_TO, scale_O, router_EO) -> str | None:
    """Return what `unmet` does, of `reference.decode_matmul_scored`."""
    if requirement := unmet(x_TD, None, None, weight_OD, bias_O, x_TD.dtype):
        return requirement
    if x_TD.shape[0] != 1:
        return f"one row (found {x_TD.shape[0]})"
    if not residual_TO.dtype == scale_O.dtype == router_EO.dtype == jnp.bfloat16:
        return f"a residual, a scale and a router in bfloat16 (found {residual_TO.dtype}, {scale_O.dtype} and {router_EO.dtype})"
    E, outputs, plan = router_EO.shape[0], weight_OD.shape[0], _plan_scored(weight_OD, router_EO)
    if requirement := _other_shape(("residual", residual_TO, (1, outputs)), ("scale", scale_O, (outputs,)), ("router", router_EO, (E, outputs))):
        return requirement
    if E % FACTORS == 0 and E < 256 and plan and plan.rows == 1 and outputs // plan.outputs % 8 == 0:  # with the factor 256, as TMA takes
        return None
    return f"up to {256 - FACTORS} experts in multiples of {FACTORS} and outputs in multiples of 8 blocks, few enough (found {E} and {outputs})"


def _other_shape(*expected) -> str | None:
    """Return which of (name, array or None, shape) is of another shape, the first, None if none is."""
    return next((f"{name} of shape {shape} (found {array.shape})" for name, array, shape in expected if array is not None and array.shape != shape), None)


def parts(weight_OD, router_EO) -> int:
    """Return how many parts `run_scored` makes for arguments that meet `unmet_scored`."""
    return weight_OD.shape[0] // _plan_scored(weight_OD, router_EO).outputs


def run_scored(x_TD, weight_OD, bias_O, residual_TO, scale_O, router_EO, *, epsilon: float, interpret=None):
    """Do what `reference.decode_matmul_scored` defines, for arguments that meet `unmet_scored`, without a look at the device."""
    from gptoss_jax.kernels.decode_matmul import hopper_kernel

    summed_TO, *early = hopper_kernel.matmul(x_TD, None, None, weight_OD, bias_O, _plan_scored(weight_OD, router_EO)._replace(interpret=interpret),
                                             epsilon=epsilon, dtype=jnp.dtype(x_TD.dtype), after=(residual_TO, scale_O, router_EO))
    return summed_TO, EarlyScores(*early)


def _plan_scored(weight_OD, router_EO):
    from gptoss_jax.kernels.decode_matmul import hopper_kernel

    return hopper_kernel.plan(1, *weight_OD.shape, experts=router_EO.shape[0])
