"""Matrix products with dense weights kept as the checkpoint has them, [out, in]."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from gptoss_jax.kernels import cpu_library

_MANY_ROWS = 64  # from here on XLA's blocking of bfloat16 products is the faster: 770 to 970 GFLOP/s on two cores, the kernels' 610


def dense_matmul(x, weight_OI, bias_O=None, dtype=None, *, implementation: str = "auto"):
    """Multiply x [..., in] by the weight [out, in] and add the bias [out]. Sums in float32; returns [..., out] in `dtype`, default x's.

    implementation: "xla"; "cpu", the CPU kernels (bfloat16 weights, x in float32 or bfloat16, one device), which raises where they can't
    run; or "auto": the fastest that can.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    numbers = (jnp.float32, jnp.bfloat16)
    fits = weight_OI.dtype == jnp.bfloat16 and x.dtype in numbers and dtype in numbers and (bias_O is None or bias_O.dtype in numbers)
    if implementation == "cpu":
        if not fits:
            others = ", ".join(str(jnp.dtype(part)) for part in (x.dtype, dtype, *(() if bias_O is None else (bias_O.dtype,))))
            raise ValueError(f"dense_matmul implementation 'cpu' needs a weight in bfloat16 (found {weight_OI.dtype}), x, result and bias in that or float32 "
                             f"(found {others})")
        cpu_library.load()
    elif implementation not in ("auto", "xla"):
        raise ValueError(f"dense_matmul implementation {implementation!r}, expected 'auto', 'xla' or 'cpu'")
    few = math.prod(x.shape[:-1]) < _MANY_ROWS or x.dtype == jnp.float32
    if implementation == "xla" or implementation == "auto" and not (fits and few and cpu_library.available()):
        return _xla(x, weight_OI, bias_O, dtype)
    return _cpu_where_on_cpu(x, weight_OI, bias_O, dtype, implementation)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _cpu_where_on_cpu(x, weight_OI, bias_O, dtype, implementation):
    run = functools.partial(_cpu, dtype=dtype)
    if implementation == "cpu":
        return run(x, weight_OI, bias_O)
    return jax.lax.platform_dependent(x, weight_OI, bias_O, cpu=run, default=functools.partial(_xla, dtype=dtype))


@_cpu_where_on_cpu.defjvp
def _tangent_rule(dtype, implementation, primals, tangents):
    out = _cpu_where_on_cpu(*primals, dtype, implementation)
    return out, jax.jvp(functools.partial(_xla, dtype=dtype), primals, tangents)[1]


def _cpu(x, weight_OI, bias_O, *, dtype):
    count = math.prod(x.shape[:-1])
    rows = x.reshape(count, x.shape[-1])
    bias_EO = None if bias_O is None else bias_O[None]
    y = cpu_library.matmul(rows, weight_OI[None], None, bias_EO, jnp.full(1, count, jnp.int32), dtype)
    return y.reshape(*x.shape[:-1], weight_OI.shape[0])


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _xla(x, weight_OI, bias_O, dtype):
    y = _dot(x, weight_OI, jnp.float32)
    if bias_O is not None:
        y = y + bias_O.astype(jnp.float32)
    return y.astype(dtype)


def _xla_tangent_rule(dtype, primals, tangents):
    """Products in x's dtype: JAX's own transpose of one that is summed in float32 takes float32, and for that converts bfloat16 weights, too."""
    x, weight_OI, _ = primals
    dx, dweight_OI, dbias_O = (None if isinstance(tangent, SymbolicZero) else tangent for tangent in tangents)
    parts = [] if dx is None else [_dot(dx, weight_OI, x.dtype)]
    parts += [] if dweight_OI is None else [_dot(x, dweight_OI, x.dtype)]
    parts += [] if dbias_O is None else [dbias_O]
    zero = jnp.zeros((*x.shape[:-1], weight_OI.shape[0]), dtype)
    return _xla(*primals, dtype), sum((part.astype(dtype) for part in parts), start=zero)


_xla.defjvp(_xla_tangent_rule, symbolic_zeros=True)


def _dot(x, weight_OI, dtype):
    return jax.lax.dot_general(x, weight_OI.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype,
                               precision="highest" if x.dtype == jnp.float32 else None)
