"""Matrix products of rows sorted by expert with each expert's own matrix, MXFP4 or dense."""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptoss_jax.kernels import cpu_library, hopper
from gptoss_jax.kernels.expert_matmul import cpu, grouping, hopper_training, mosaic_gpu, reference, xla
from gptoss_jax.kernels.expert_matmul.hopper_layout import HopperGateUpWeight, HopperWeight, dims, pack, unpack
from gptoss_jax.kernels.expert_matmul.reference import EarlyScores, Mxfp4Weight, swiglu

IMPLEMENTATIONS = {"reference": reference.expert_matmul, "xla": xla.expert_matmul, "cpu": cpu.expert_matmul,
                   "mosaic_gpu": mosaic_gpu.expert_matmul}

__all__ = ["IMPLEMENTATIONS", "EarlyScores", "HopperGateUpWeight", "HopperWeight", "Mxfp4Weight", "Router", "expert_matmul", "expert_mlp", "lean_mlp",
           "pack", "say", "unpack"]

log = logging.getLogger("gptoss_jax")


class Router(NamedTuple):
    """What experts are chosen from: scores float32 [T, experts of all devices] and the bias [those] that they lack; real bool [T], or None where
    all tokens are; first int32 [1], of the experts that are here; early: what a single token's scores and x are made of, for a kernel that takes
    that instead.

    Each token gets the experts of its largest logits, the lower of equals first, and their softmax as weights.
    """

    scores: jax.Array
    bias: jax.Array
    real: jax.Array | None
    first: jax.Array
    early: EarlyScores | None = None


def expert_matmul(x_MI, weight, bias_EO, group_sizes_E, *, implementation: str = "auto"):
    """Same signature and result as `reference.expert_matmul`; differentiable in x, bias and a dense weight.

    A packed weight may also be a HopperWeight, or a HopperGateUpWeight: "auto" multiplies the former by "mosaic_gpu" where the program runs
    on a GPU, and both, put back as the checkpoint stores them an expert at a time, by "xla" elsewhere.
    implementation: one of IMPLEMENTATIONS, which raises where it can't run, or "auto": the fastest that can.
    """
    _check("expert_matmul", implementation)
    x_MI, weight, bias_EO, group_sizes_E = jax.tree.map(jnp.asarray, (x_MI, weight, bias_EO, group_sizes_E))
    _check_shapes("expert_matmul", x_MI.shape, weight, bias_EO, group_sizes_E.shape)
    return _matmul(x_MI, weight, bias_EO, group_sizes_E, implementation)


def expert_mlp(x_TD, expert_TA, weight_TA, gate_up, gate_up_bias, down, down_bias, *, limit: float, alpha: float, router: Router | None = None,
               implementation: str = "auto"):
    """Return each token's weighted sum over its experts' down(swiglu(gate_up(x))), float32 [T, D]; differentiable in all but packed weights.

    expert: int32 [T, A]; an expert of E or more is somebody else's and adds nothing. gate_up: [E, 2F, D], gate and up interleaved, and down
    [E, D, F] with their biases as `expert_matmul` takes them, or arranged as HopperGateUpWeight and HopperWeight: then "auto" is "mosaic_gpu",
    with h rounded once, where the program runs on a GPU. router: what `expert` and `weight` were chosen from, for a kernel that chooses itself.
    implementation: as of `expert_matmul`.
    """
    _check("expert_mlp", implementation)
    arguments = jax.tree.map(jnp.asarray, (x_TD, expert_TA, weight_TA, gate_up, gate_up_bias, down, down_bias))
    x_TD, _, _, gate_up, gate_up_bias, down, down_bias = arguments
    experts, outputs, _ = dims(gate_up)
    _check_shapes("expert_mlp", x_TD.shape, gate_up, gate_up_bias, (experts,))
    _check_shapes("expert_mlp", (len(x_TD), outputs // 2), down, down_bias, (experts,))
    arranged = isinstance(gate_up, HopperGateUpWeight) and isinstance(down, HopperWeight)
    if implementation == "mosaic_gpu":
        mosaic_gpu.require("expert_mlp", x_TD, gate_up, gate_up_bias)
        if not arranged:
            raise ValueError("expert_mlp implementation 'mosaic_gpu' needs a HopperGateUpWeight and a HopperWeight")
        return _mlp_on_hopper(*arguments, router, limit, alpha)
    if implementation == "auto" and arranged and _takes(x_TD, gate_up, gate_up_bias):
        return _mlp_on_hopper(*arguments, router, limit, alpha)
    return _mlp(*arguments, limit, alpha, implementation)


def _mlp(x_TD, expert_TA, weight_TA, gate_up, gate_up_bias, down, down_bias, limit, alpha, implementation="auto"):
    def apply(x_MD, group_sizes_E):
        h_MF = swiglu(_matmul(x_MD, gate_up, gate_up_bias, group_sizes_E, implementation), limit, alpha)
        return _matmul(h_MF, down, down_bias, group_sizes_E, implementation)

    return grouping.by_expert(x_TD, expert_TA, weight_TA, gate_up_bias.shape[0], apply)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _mlp_on_hopper(*arguments):
    *arrays, limit, alpha = arguments
    here = functools.partial(mosaic_gpu.expert_mlp, limit=limit, alpha=alpha)
    return jax.lax.platform_dependent(*arrays, cuda=here, default=lambda *arrays: _mlp(*arrays[:7], limit, alpha))


def _mlp_backward(limit, alpha, arrays, g_TD):
    x_TD, expert_TA, weight_TA, gate_up, gate_up_bias, down, down_bias, router = arrays

    def run(x_TD, weight_TA, gate_up_bias, down_bias):
        return _mlp(x_TD, expert_TA, weight_TA, gate_up, gate_up_bias, down, down_bias, limit, alpha)

    dx, dweight, dgate_up_bias, ddown_bias = jax.vjp(run, x_TD, weight_TA, gate_up_bias, down_bias)[1](g_TD)
    nothing = jax.tree.map(lambda x: jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else xla.no_gradient(x), router)
    return dx, xla.no_gradient(expert_TA), dweight, xla.no_gradient(gate_up), dgate_up_bias, xla.no_gradient(down), ddown_bias, nothing


_mlp_on_hopper.defvjp(lambda *arguments: (_mlp_on_hopper(*arguments), arguments[:8]), _mlp_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def lean_mlp(x_TD, expert_TA, weight_TA, gate_up, down, limit: float, alpha: float, device: jax.Device | None = None):
    """Return each token's weighted sum over its experts' down(swiglu(gate_up(x))), float32 [T, D]; differentiable in all but packed weights.

    expert: int32 [T, A], a token's all different; one of E or more is somebody else's and adds nothing. gate_up, down: weight and bias as
    `expert_matmul` takes them and, of a low-rank adapter, A [E, in, r] and B [E, r, out], or None and None. device: one that the program is for, by
    default this process's first. Nothing is kept for the backward pass: what rows have between the matrices is computed again, on a Hopper GPU and
    of weights as the checkpoint stores them by kernels, `hopper_training.ROWS` rows at a time, and elsewhere a tile of one expert's rows.
    """
    return _lean(hopper_training.forward, xla.lean_mlp, limit, alpha, device, x_TD, gate_up, down)(x_TD, expert_TA, weight_TA, gate_up, down)


def _lean_backward(limit, alpha, device, residuals, g_TD):
    x_TD, *_, gate_up, down = residuals
    return _lean(hopper_training.backward, xla.lean_backward, limit, alpha, device, x_TD, gate_up, down)(residuals, g_TD)


lean_mlp.defvjp(lambda *arguments: (lean_mlp(*arguments), arguments[:5]), _lean_backward)


def _lean(on_hopper, elsewhere, limit, alpha, device, x_TD, *linears):
    """Return the function that takes these on a device."""
    on_hopper, elsewhere = (functools.partial(function, limit=limit, alpha=alpha) for function in (on_hopper, elsewhere))
    device = device or jax.local_devices()[0]
    if device.platform != "gpu" or not len(x_TD) or not all(isinstance(weight, Mxfp4Weight) for weight, *_ in linears):
        return elsewhere
    requirement = next(filter(None, (hopper_training.unmet(x_TD, *linear) for linear in linears)), None)
    requirement = requirement or hopper.device_unmet("expert_matmul", device, training=True)
    say(requirement)
    # Programs of a process that has a GPU may be for its CPU.
    return elsewhere if requirement else lambda *arguments: jax.lax.platform_dependent(*arguments, cuda=on_hopper, default=elsewhere)


def _check(op, implementation):
    if implementation != "auto" and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{op} implementation {implementation!r}, expected 'auto' or one of {', '.join(IMPLEMENTATIONS)}")


def _check_shapes(op, rows, weight, bias_EO, sizes):
    experts, outputs, inputs = dims(weight)
    if rows[1:] != (inputs,) or bias_EO.shape != (experts, outputs) or sizes != (experts,):
        shapes = f"rows {rows}, weight {(experts, outputs, inputs)} (experts, out, in), bias {bias_EO.shape} and group sizes {sizes}"
        raise ValueError(f"{op}: {shapes} don't fit together")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _matmul(x_MI, weight, bias_EO, group_sizes_E, implementation):
    arguments = (x_MI, weight, bias_EO, group_sizes_E)
    if implementation == "mosaic_gpu":
        return mosaic_gpu.expert_matmul(*arguments)
    if implementation == "auto" and isinstance(weight, HopperWeight) and _takes(*arguments[:3]):
        return jax.lax.platform_dependent(*arguments, cuda=mosaic_gpu.run, default=xla.expert_matmul)
    arranged = isinstance(weight, (HopperWeight, HopperGateUpWeight))
    if implementation not in ("auto", "xla"):
        return IMPLEMENTATIONS[implementation](x_MI, unpack(weight) if arranged else weight, bias_EO, group_sizes_E)
    if implementation == "auto" and not arranged and cpu.unmet(x_MI, weight) is None and cpu_library.available():
        return jax.lax.platform_dependent(*arguments, cpu=cpu.expert_matmul, default=xla.expert_matmul)
    return xla.expert_matmul(*arguments)


_matmul.defvjp(lambda *arguments: (_matmul(*arguments), arguments[:4]), lambda _, residuals, g_MO: xla.backward(residuals, g_MO))


def _takes(x_MI, weight, bias_EO) -> bool:
    """Return whether "auto" compiles the Hopper kernel for these; say which, and why not, once in the log."""
    requirement = mosaic_gpu.unmet(x_MI, weight, bias_EO)
    if requirement is None and jax.default_backend() == "gpu":  # where programs run; one may be compiled for a GPU elsewhere
        requirement = hopper.device_unmet("expert_matmul")
    say(requirement)
    return requirement is None


@functools.cache
def say(requirement: str | None) -> None:
    """Log once what multiplies packed weights on a GPU, and why."""
    if requirement:
        log.warning("expert_matmul: XLA, slowly, as mosaic_gpu needs %s", requirement)
    else:
        log.info("expert_matmul: mosaic_gpu where the program runs on a GPU")
