"""MXFP4, the format of gpt-oss's experts: blocks of 32 four-bit values sharing one power-of-two scale byte.

A value is `e2m1 * 2^(scale - 127)`. Byte j of a block's 16 holds value 2j in its low nibble and 2j+1 in its high one; a nibble is a sign
bit (8) and an index into 0, 0.5, 1, 1.5, 2, 3, 4, 6. Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.2, 5.3.3, 6.3.

Scale byte 255 is NaN in the specification; openai/gpt-oss and transformers compute value * 2^128 there, and so do we: published
checkpoints hold none, and a decoder that agrees with the references on every byte needs no special case. `encode` never makes one.

Decoding on a device assembles the float32's bits with integers: XLA on CPU flushes denormals in products, which would turn every 0.5
into 0 in the usual "bits times 2^126" decoding, and the small numbers of scale bytes 0 to 2 into 0 in any decoding that multiplies.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

BLOCK = 32
BLOCK_BYTES = BLOCK // 2
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_SCALE_BIAS = 127
_MAX_EXPONENT = 2  # of e2m1: its largest value is 1.5 * 2^2
_QUARTER = 1 << 21  # of a float32's mantissa: carries 1.75 and more into the exponent


class Mxfp4Error(ValueError):
    """An array that can't be MXFP4; names the array, what was found and what was expected."""


def decode(blocks, scales, dtype="float32"):
    """Decode packed MXFP4 to numbers.

    blocks: uint8 [..., C, 16]; scales: uint8 [..., C]; both numpy, or both JAX arrays.
    Returns [..., C * 32] in `dtype`, of the same kind. Exact in float32 and bfloat16 (results past the largest number are infinite).
    """
    if blocks.shape[:-1] != scales.shape or blocks.shape[-1] != BLOCK_BYTES:
        raise Mxfp4Error(f"blocks {blocks.shape} with scales {scales.shape}: expected [..., C, {BLOCK_BYTES}] with [..., C]")
    if blocks.dtype != np.uint8 or scales.dtype != np.uint8:
        raise Mxfp4Error(f"blocks {blocks.dtype} with scales {scales.dtype}: expected uint8 with uint8")
    xp = np if isinstance(blocks, np.ndarray) else jnp
    codes = xp.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    if xp is np:
        with np.errstate(over="ignore"):  # codes times 2^128 are infinite by definition
            values = np.ldexp(np.asarray(VALUES, np.float32)[codes], scales[..., None].astype(np.int32) - _SCALE_BIAS)
            values = values.astype(_dtype(dtype))
    else:
        values = _assemble(codes.astype(jnp.uint32), scales[..., None].astype(jnp.int32)).astype(dtype)
    return values.reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK)


def encode(values, *, steady: bool = False):
    """Encode numbers as MXFP4, rounding to nearest even (OCP MX v1.0, section 6.3).

    values: float [..., C * 32], numpy or JAX. Returns (blocks uint8 [..., C, 16], scales uint8 [..., C]) of the same kind.
    The scale is 2^(floor(log2 of the block's largest magnitude) - 2); what rounds past 6 saturates to 6. A block of zeros gets the
    scale byte 0 and keeps its signs.
    steady: numbers that came from MXFP4 and moved a little go back to where they came from. A largest magnitude of 4 that moved to 3.999 has
    a smaller logarithm: by the specification's rule it would saturate in half the scale, at 3. Here what rounds up to the next power of two
    (7 and more of 8) has that one's scale.
    Values must be finite: an infinity or NaN has no code; numpy input holding one raises Mxfp4Error, traced input can't be checked (NaN
    becomes 6 there).
    """
    if values.shape[-1] % BLOCK:
        raise Mxfp4Error(f"values {values.shape}: last dim is {values.shape[-1]}, expected a multiple of {BLOCK}")
    xp = np if isinstance(values, np.ndarray) else jnp
    if xp is np and not np.isfinite(values).all():
        raise Mxfp4Error("values: an infinity or NaN found, expected finite numbers")
    groups = values.reshape(*values.shape[:-1], -1, BLOCK).astype(xp.float32)
    bits = groups.view(np.uint32) if xp is np else jax.lax.bitcast_convert_type(groups, jnp.uint32)
    sign = (bits >> 31).astype(xp.uint8) << 3
    magnitude_bits = bits & xp.uint32(0x7FFFFFFF)
    largest_bits = magnitude_bits.max(axis=-1) + xp.uint32(_QUARTER if steady else 0)
    exponent = (largest_bits >> 23).astype(xp.int32) - 127  # floor(log2), by the bits: exact, denormals at the bottom
    scale = xp.clip(exponent - _MAX_EXPONENT + _SCALE_BIAS, 0, 254)
    if xp is np:
        scaled = np.ldexp(np.abs(groups), _SCALE_BIAS - scale[..., None])
    else:
        # Two factors: 2^127 and more isn't one normal float32.
        shift = _SCALE_BIAS - scale
        half = shift // 2
        scaled = jnp.abs(groups) * _exp2(half)[..., None] * _exp2(shift - half)[..., None]
    code = sum((scaled > limit if up else scaled >= limit).astype(xp.uint8) for limit, up in _ROUND_UP_FROM)
    code = code | sign
    blocks = code[..., 0::2] | (code[..., 1::2] << 4)
    return blocks.astype(xp.uint8), scale.astype(xp.uint8)


# Halfway points between neighbouring magnitudes; a tie goes to the even mantissa, so alternate ones belong to the lower value.
_ROUND_UP_FROM = ((0.25, True), (0.75, False), (1.25, True), (1.75, False), (2.5, True), (3.5, False), (5.0, True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def fake_quantize(values, axis=-1):
    """Round numbers to the MXFP4 grid, blocks of 32 along `axis`: exactly what steady `encode` then `decode` give, in the same dtype.

    The gradient passes straight through (Bengio et al. 2013), so that a model can be trained on the grid it will be stored in.
    """
    moved = jnp.moveaxis(values, axis, -1)
    return jnp.moveaxis(decode(*encode(moved, steady=True), dtype=values.dtype), -1, axis)


fake_quantize.defvjp(lambda values, axis: (fake_quantize(values, axis), None), lambda axis, _, gradient: (gradient,))


def _assemble(codes, scales):
    """Return float32 of e2m1 `codes` (uint32) at scale bytes `scales` (int32): 0.5 is 2^-1, every other magnitude 2^k or 1.5 * 2^k."""
    magnitude = codes & 7
    exponent = scales - 1 + jnp.where(magnitude == 1, 0, magnitude >> 1).astype(jnp.int32)  # of float32, biased by 127
    mantissa = jnp.where(magnitude == 1, jnp.uint32(0), (magnitude & 1) << 22)
    normal = (exponent.astype(jnp.uint32) << 23) | mantissa
    denormal = (mantissa | 0x00800000) >> jnp.maximum(1 - exponent, 0).astype(jnp.uint32)
    bits = jnp.where(exponent >= 255, jnp.uint32(0x7F800000), jnp.where(exponent >= 1, normal, denormal))
    bits = jnp.where(magnitude == 0, jnp.uint32(0), bits) | ((codes & 8) << 28)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _exp2(exponent):
    return jax.lax.bitcast_convert_type((exponent + 127).astype(jnp.uint32) << 23, jnp.float32)


def _dtype(dtype) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if str(dtype) == "bfloat16" else np.dtype(dtype)
