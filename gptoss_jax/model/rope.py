"""Rotary positions with YaRN (Peng et al. 2023), as openai/gpt-oss `gpt_oss/torch/model.py: RotaryEmbedding` computes them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.config import GptOssConfig


def inverse_frequencies(config: GptOssConfig) -> tuple[np.ndarray, float]:
    """Return (radians per position float32 [H/2], concentration by which cosine and sine are multiplied).

    The roundings to float32 are transformers': one unit in the last place is 4e-4 radians at position 4,096.
    """
    rope, width = config.rope_scaling, config.head_dim
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    wavelengths = (np.float64(config.rope_theta) ** exponents.astype(np.float64)).astype(np.float32)
    unscaled = np.float32(1) / wavelengths
    if rope.factor == 1:
        return unscaled, 1.0

    def dim_of(rotations: float) -> float:
        """The (fractional) dim that turns `rotations` times over the original context: YaRN section 3.2."""
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return width * math.log(turns) / (2 * math.log(config.rope_theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip(((np.arange(width // 2) - low) / (high - low)).astype(np.float32), 0, 1)
    keep = np.float32(1) - ramp
    stretched = np.float32(1) / (np.float32(rope.factor) * wavelengths)
    concentration = rope.attention_factor if rope.attention_factor is not None else 0.1 * math.log(rope.factor) + 1.0
    return stretched * (np.float32(1) - keep) + unscaled * keep, concentration


def rope_tables(config: GptOssConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cosine and sine, float32 [B, T, H/2], concentration included."""
    frequencies, concentration = inverse_frequencies(config)
    angles = positions_BT.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * np.float32(concentration), jnp.sin(angles) * np.float32(concentration)


def rotate(x_BTNH: jax.Array, cosine_BTH: jax.Array, sine_BTH: jax.Array) -> jax.Array:
    """Rotate the first half of each head against the second, in float32; returns x's dtype."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine_BTH[:, :, None, :], sine_BTH[:, :, None, :]
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x_BTNH.dtype)
