"""Rotary positions with YaRN (Peng et al. 2023), as openai/gpt-oss `gpt_oss/torch/model.py: RotaryEmbedding` computes them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.config import GptOssConfig


def inverse_frequencies(config: GptOssConfig) -> tuple[np.ndarray, float]:
    """Return (radians per position float32 [H/2], concentration by which cosine and sine are multiplied).

    Rounded to float32 as both references round: one unit in the last place of two frequencies moves logits by 5e-5 at position 4,096.
    """
    rope, width = config.rope_scaling, config.head_dim
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    wavelengths = _power_as_torch(config.rope_theta, exponents)
    unscaled = np.float32(1) / wavelengths
    concentration = rope.attention_factor if rope.attention_factor is not None else 0.1 * math.log(rope.factor) + 1.0
    if rope.factor == 1:
        return unscaled, concentration

    def dim_of(rotations: float) -> float:
        """The (fractional) dim that turns `rotations` times over the original context: YaRN section 3.2."""
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return width * math.log(turns) / (2 * math.log(config.rope_theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(width // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = np.float32(1) - ramp
    stretched = np.float32(1) / (np.float32(rope.factor) * wavelengths)
    return stretched * (np.float32(1) - keep) + unscaled * keep, concentration


def rope_tables(config: GptOssConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cosine and sine, float32 [B, T, H/2], concentration included."""
    frequencies, concentration = inverse_frequencies(config)
    angles = positions_BT.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * np.float32(concentration), jnp.sin(angles) * np.float32(concentration)


def _power_as_torch(base: float, exponents: np.ndarray) -> np.ndarray:
    """Return base ** exponents as PyTorch's CPU kernel rounds it: exactly, but for whole groups of 32 by Sleef's `powf_u10`.

    That polynomial is within one unit in the last place; only its float32 roundings matter, the rest is done in float64.
    """
    f32, f64 = np.float32, np.float64
    powers = (f64(base) ** exponents.astype(f64)).astype(f32)
    count = len(exponents) // 32 * 32

    def polynomial(x: np.ndarray, *coefficients: float) -> np.ndarray:
        value = np.full_like(x, coefficients[0])
        for coefficient in coefficients[1:]:  # one rounding a step: a fused multiply-add
            value = (value.astype(f64) * x + f64(f32(coefficient))).astype(f32)
        return value.astype(f64)

    exponent = np.floor(np.log2(f64(f32(base)) / 0.75))
    mantissa = f64(f32(base)) / 2**exponent
    r = (mantissa - 1) / (mantissa + 1)
    series = polynomial(np.asarray(r * r, f32), 0.24032035, 0.28511268, 0.4000080) * r * r + 0.66666666661861
    logarithm = exponent * np.log(2) + 2 * r + r**3 * series
    scaled = logarithm * exponents[:count].astype(f64)
    whole = np.rint(scaled.astype(f32) * f32(np.log2(np.e)))
    rest = scaled - whole * np.log(2)
    series = polynomial(rest.astype(f32), 0.0013632465, 0.008365969, 0.041671082, 0.16666552, 0.49999985)
    powers[:count] = (1 + (rest + rest * rest * series)).astype(f32) * np.exp2(whole).astype(f32)
    return powers
