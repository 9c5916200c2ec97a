"""Matrix products of rows sorted by expert with each expert's own matrix, MXFP4 or dense."""

from __future__ import annotations

import functools

import jax

from gptoss_jax.kernels import cpu_library
from gptoss_jax.kernels.expert_matmul import cpu, reference, xla
from gptoss_jax.kernels.expert_matmul.reference import Mxfp4Weight

IMPLEMENTATIONS = {"reference": reference.expert_matmul, "xla": xla.expert_matmul, "cpu": cpu.expert_matmul}

__all__ = ["IMPLEMENTATIONS", "Mxfp4Weight", "expert_matmul"]


def expert_matmul(x_MI, weight, bias_EO, group_sizes_E, *, implementation: str = "auto"):
    """Same signature and result as `reference.expert_matmul`; differentiable in x, bias and a dense weight.

    implementation: one of IMPLEMENTATIONS, which raises where it can't run, or "auto": the fastest that can.
    """
    if implementation != "auto" and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"expert_matmul implementation {implementation!r}, expected 'auto' or one of {', '.join(IMPLEMENTATIONS)}")
    return _matmul(x_MI, weight, bias_EO, group_sizes_E, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _matmul(x_MI, weight, bias_EO, group_sizes_E, implementation):
    arguments = (x_MI, weight, bias_EO, group_sizes_E)
    if implementation != "auto":
        return IMPLEMENTATIONS[implementation](*arguments)
    if cpu.unmet(x_MI, weight) is None and cpu_library.available():
        return jax.lax.platform_dependent(*arguments, cpu=cpu.expert_matmul, default=xla.expert_matmul)
    return xla.expert_matmul(*arguments)


_matmul.defvjp(lambda *arguments: (_matmul(*arguments), arguments[:4]), lambda implementation, *rest: xla.backward(*rest))
