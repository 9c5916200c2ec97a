"""Whether the Hopper kernel computes right on the device at hand: products of a few small experts against the reference.

The order in which a GPU takes operand A from registers, and what a compiler makes of the kernel, can be wrong in ways that nothing short of a
GPU shows; a model is worth a second of looking.
"""

from __future__ import annotations

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.kernels.expert_matmul import hopper_layout, mosaic_gpu, reference
from gptoss_jax.kernels.expert_matmul.hopper_layout import HopperGateUpWeight, HopperWeight
from gptoss_jax.kernels.expert_matmul.reference import Mxfp4Weight

# kind, outputs, inputs, rows of each expert: the gated product; sums in parts; many rows of an expert.
CASES = ((HopperGateUpWeight, 128, 192, (8, 0, 16)), (HopperWeight, 128, 576, (8, 0, 16)), (HopperWeight, 128, 64, (136, 0, 120)))


def disagreement(interpret=None) -> str | None:
    """Return how the kernel's results differ from the reference's on JAX's first device, or why there are none; None where they agree."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:  # this may be asked while a program is traced, which is a matter of its thread
        return thread.submit(_disagreement, interpret).result()


def _disagreement(interpret):
    try:
        return next((found for case in CASES if (found := _compare(*case, interpret))), None)
    except Exception as error:  # whatever a compiler, a driver or an older GPU may raise: the model runs without this kernel
        return f"a kernel that runs here (found {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]})"


def _compare(kind, outputs, inputs, sizes, interpret):
    random = np.random.default_rng(0)
    experts = len(sizes)
    weight = Mxfp4Weight(random.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8),
                         random.integers(118, 123, (experts, outputs, inputs // 32), np.uint8))
    x = np.asarray(random.standard_normal((sum(sizes), inputs)), jnp.bfloat16)
    rest = np.asarray(random.standard_normal((experts, outputs)), jnp.bfloat16), np.asarray(sizes, np.int32)
    constants = dict(limit=7.0, alpha=1.702) if kind is HopperGateUpWeight else {}
    run = functools.partial(mosaic_gpu.run, kind=kind, aligned=True, interpret=interpret, **constants)
    found = _now(run, x, hopper_layout.pack(weight, kind), *rest)
    expected = _now(reference.expert_matmul, x.astype(np.float32), weight, *rest)
    if constants:
        expected = _now(functools.partial(reference.swiglu, **constants), expected)
    wrong = ~(np.abs(found - expected) <= 2**-6 * np.abs(expected) + 2**-6 * expected.std())  # a rounding to bfloat16 is 2^-9; NaN is wrong
    if not wrong.any():
        return None
    return f"a kernel that computes right here (found {wrong.mean():.1%} of {kind.__name__} {outputs} x {inputs} wrong)"


def _now(function, *arguments) -> np.ndarray:
    return np.asarray(jax.jit(function)(*arguments), np.float32)
