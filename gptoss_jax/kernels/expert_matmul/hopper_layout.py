"""How packed weights lie in a Hopper GPU's memory: a lossless rearrangement, made once by the engine; checkpoints never hold it.

A matrix is cut into groups of 64 outputs by 64 inputs: 512 words of 32 bits, which the 128 threads of a warpgroup load by 16 bytes each, in
the order in which wgmma takes operand A from registers, and 32 words of scales.

`words` uint32 [E, out/64, in/64, 4, 128]: word [w, 16 r + 4 q + 2 v + h] is warp w's, lane 4 r + q's. Its bits hold eight codes, j in 0..3 and
b in 0..1, of output `row(w, h, r)` and input 16 j + 8 v + 2 q + b. Within half b (bits 16 b and up) the four codes are interleaved so that one
shift or rotation and one mask (two of each for j = 3) put a code's sign and its three e2m1 bits where bfloat16 has its sign and the exponent's
last two bits and the mantissa's first, which are bits 15 and 8 7 6; a search found no way to interleave them that takes fewer shifts and masks:

    j = 0: sign 15, bits 8 7 6     j = 1: sign 9, bits 2 1 0     j = 2: sign 3 of the other half, bits 12 11 10     j = 3: sign 13, bits 14 5 4

Read as bfloat16 that is e2m1 times 2^-126 (0.5 and 0 among the denormals), so the factor 2^(scale - 1) gives the value, exactly.

`scales` uint32 [E, out/64, in/64, 32]: word 8 w + r holds in half h the bytes f = scale + 126 of inputs 0..31 and 32..63 of `row(w, h, r)`: the
first in bits 14..7, where bfloat16 has its exponent, the second likewise once the word is rotated left by 8.

`row(w, h, r)` is 16 w + 8 h + r in a HopperWeight and 16 w + 2 r + h in a HopperGateUpWeight: one thread then holds gate and up of a neuron.
A factor has eight bits, so scale bytes may be 128 at most (weights up to 12); published checkpoints stay under 127.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.kernels.expert_matmul.reference import Mxfp4Weight
from gptoss_jax.mxfp4 import BLOCK, Mxfp4Error

GROUP = 64
ALIGNMENT = 8  # of a group's first row: TMA copies tiles of 8 rows by 64 inputs whole, and wgmma's N is a multiple of 8
LARGEST_SCALE = 128
_FACTOR = 126  # factor byte less scale byte
# Of code j: (mask of the code's bits, how far they are rotated up within the word's 32) for each run of bits that moves together.
_FIELDS = (((8, 12), (7, 6)), ((8, 6), (7, 0)), ((8, 16), (7, 10)), ((8, 10), (4, 12), (3, 4)))


class HopperWeight(NamedTuple):
    """words uint32 [E, out/64, in/64, 4, 128] and scales uint32 [E, out/64, in/64, 32]; see this module."""

    words: jax.Array
    scales: jax.Array


class HopperGateUpWeight(NamedTuple):
    """The same with outputs paired: 2i (gate) and 2i + 1 (up) in one thread's registers; see this module."""

    words: jax.Array
    scales: jax.Array


PACKED = (Mxfp4Weight, HopperWeight, HopperGateUpWeight)


def dims(weight) -> tuple[int, int, int]:
    """Return (experts, outputs, inputs) of a weight in any layout, or dense [E, in, out]."""
    if not isinstance(weight, PACKED):
        return weight.shape[0], weight.shape[2], weight.shape[1]
    experts, outputs, inputs = weight.scales.shape[:3]
    return (experts, outputs, inputs * BLOCK) if isinstance(weight, Mxfp4Weight) else (experts, outputs * GROUP, inputs * GROUP)


def unmet(weight: Mxfp4Weight) -> str | None:
    """Return the requirement that a packed weight doesn't meet, None if it can be rearranged; a traced weight's values aren't looked at."""
    outs, ins = weight.scales.shape[-2], weight.scales.shape[-1] * 32
    if outs % GROUP or ins % GROUP:
        return f"dims that divide by {GROUP} (found {outs} outputs, {ins} inputs)"
    if not isinstance(weight.scales, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        with jax.ensure_compile_time_eval():  # another array's program may be traced
            largest = int(weight.scales.max(initial=0))
        if largest > LARGEST_SCALE:
            return f"scale bytes of at most {LARGEST_SCALE} (found {largest})"
    return None


def pack(weight: Mxfp4Weight, kind=HopperWeight):
    """Rearrange a packed weight as the checkpoint stores it into `kind`; numpy or JAX, of the same kind as given.

    Raises Mxfp4Error where a dim or a scale byte can't be. Traced scale bytes can't be checked: blocks past the largest become infinite or NaN.
    """
    if requirement := unmet(weight):
        raise Mxfp4Error(f"Hopper layout needs {requirement}")
    return _arrange(weight, kind, np) if isinstance(weight.blocks, np.ndarray) else _arrange_on_device(weight, kind, jnp)


def _arrange(weight, kind, xp):
    E, O, C = weight.scales.shape
    bytes_ = _split_rows(weight.blocks.reshape(E, O, C // 2, 32), kind)  # [E, n, w, h, r, k, (j, v, q)]
    bytes_ = bytes_.reshape(*bytes_.shape[:6], 4, 2, 4).transpose(0, 1, 5, 2, 4, 8, 7, 3, 6)  # [E, n, k, w, r, q, v, h, j]
    words = xp.zeros(bytes_.shape[:-1], xp.uint32)
    for j, runs in enumerate(_FIELDS):
        for b in range(2):
            code = (bytes_[..., j] >> 4 * b).astype(xp.uint32)
            for mask, shift in runs:
                words = words | (code & mask) << (shift + 16 * b) % 32
    factors = xp.minimum(_split_rows(weight.scales.reshape(E, O, C // 2, 2), kind).astype(xp.uint32) + _FACTOR, 255)
    first, second = (each[..., 0] << 7 | each[..., 1] << 23 for each in factors.transpose(6, 0, 1, 5, 2, 4, 3))  # [block, E, n, k, w, r, h]
    scales = first | second >> 8 | second << 24
    return kind(words.reshape(*words.shape[:4], 128), scales.reshape(*scales.shape[:3], 32))


_arrange_on_device = jax.jit(_arrange, static_argnums=(1, 2))


def unpack(weight) -> Mxfp4Weight:
    """Return the weight as the checkpoint stores it, bit for bit; numpy or JAX, of the same kind as given."""
    xp = np if isinstance(weight.words, np.ndarray) else jnp
    E, n, k = weight.scales.shape[:3]
    words = weight.words.reshape(E, n, k, 4, 8, 4, 2, 2)
    codes = [[sum(words >> (shift + 16 * b) % 32 & mask for mask, shift in runs) for b in range(2)] for runs in _FIELDS]
    bytes_ = xp.stack([(low | high << 4).astype(xp.uint8) for low, high in codes], axis=-1)  # [E, n, k, w, r, q, v, h, j]
    blocks = _join_rows(bytes_.transpose(0, 1, 3, 7, 4, 2, 8, 6, 5).reshape(E, n, 4, 2, 8, k, 32), type(weight))
    scales = weight.scales.reshape(E, n, k, 4, 8)
    turned = xp.stack([scales, scales << 8 | scales >> 24], axis=-1)  # [E, n, k, w, r, block]
    factors = xp.stack([turned >> 7 & 255, turned >> 23 & 255], axis=-1).transpose(0, 1, 3, 6, 4, 2, 5)  # [E, n, w, h, r, k, block]
    scales = _join_rows((factors - _FACTOR).astype(xp.uint8), type(weight))
    return Mxfp4Weight(blocks.reshape(E, n * GROUP, 2 * k, 16), scales.reshape(E, n * GROUP, 2 * k))


def random(key, experts: int, outputs: int, inputs: int, kind=HopperWeight):
    """Make a weight on the device in this layout, to measure without a checkpoint: any codes, in all blocks scale byte 120 (2^-7)."""
    groups = (experts, outputs // GROUP, inputs // GROUP)
    factor = 120 + _FACTOR
    half = factor << 7 | factor >> 1 | (factor & 1) << 15  # alike, so that either's last bit is the other's
    return kind(jax.random.bits(key, (*groups, 4, 128), jnp.uint32), jnp.full((*groups, 32), half << 16 | half, jnp.uint32))


def _split_rows(x, kind):
    """[E, out, k, ...] -> [E, n, w, h, r, k, ...]."""
    E, O = x.shape[:2]
    if kind is HopperGateUpWeight:
        return x.reshape(E, O // GROUP, 4, 8, 2, *x.shape[2:]).swapaxes(3, 4)
    return x.reshape(E, O // GROUP, 4, 2, 8, *x.shape[2:])


def _join_rows(x, kind):
    x = x.swapaxes(3, 4) if kind is HopperGateUpWeight else x
    return x.reshape(x.shape[0], x.shape[1] * GROUP, *x.shape[5:])
