"""Write rows into slots of a cache, in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gptoss_jax.kernels import cpu_library


def cache_write(old_BSKH, new_BTKH, slots_BT, *, implementation: str = "auto"):
    """Return `old` with row t of `new`, in old's dtype, in slot slots[b, t]; slots (int32) outside 0 to S - 1 are left out, the others differ
    within a row.

    implementation: "xla", whose scatter of bfloat16 goes through float32 copies of the whole cache on CPUs before jax 0.12; "cpu", the
    CPU kernel (one device), which raises where it can't run; or "auto": the fastest that can.
    """
    if implementation not in ("auto", "xla", "cpu"):
        raise ValueError(f"cache_write implementation {implementation!r}, expected 'auto', 'xla' or 'cpu'")
    arguments = (old_BSKH, new_BTKH.astype(old_BSKH.dtype), slots_BT)
    if implementation == "cpu":
        cpu_library.load()
        return cpu_library.write(*arguments)
    if implementation == "auto" and cpu_library.available():
        return _cpu_where_on_cpu(*arguments)
    return _xla(*arguments)


@jax.custom_jvp
def _cpu_where_on_cpu(old_BSKH, new_BTKH, slots_BT):
    return jax.lax.platform_dependent(old_BSKH, new_BTKH, slots_BT, cpu=cpu_library.write, default=_xla)


@_cpu_where_on_cpu.defjvp
def _tangent_rule(primals, tangents):
    return _cpu_where_on_cpu(*primals), _xla(*tangents[:2], primals[2])  # linear in both


def _xla(old_BSKH, new_BTKH, slots_BT):
    B, T = slots_BT.shape
    S = old_BSKH.shape[1]
    slots_BT = jnp.where((slots_BT >= 0) & (slots_BT < S), slots_BT, S + jnp.arange(T))  # unique also out of bounds, for the transpose
    return old_BSKH.at[jnp.arange(B)[:, None], slots_BT].set(new_BTKH, mode="drop", unique_indices=True)
