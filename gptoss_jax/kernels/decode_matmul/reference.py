"""The definition of the op, by the ops it is made of: a sum, RMSNorm, a product."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gptoss_jax.kernels.dense_matmul import dense_matmul
from gptoss_jax.kernels.expert_matmul.reference import FACTORS, EarlyScores


def rms_norm(x, scale_D, epsilon: float):
    """Root mean square normalisation in float32 (Zhang and Sennrich 2019), as openai/gpt-oss: scaled before rounding to x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale_D.astype(jnp.float32)).astype(x.dtype)


def decode_matmul(x_TD, added_TD, scale_D, weight_OD, bias_O, *, epsilon: float, dtype, implementation: str = "auto"):
    """Return (product float32 or bfloat16 [T, O], what was normed [T, D], what was multiplied [T, D]).

    Normed is x, or x + added, rounded to x's dtype, if `added` isn't None; multiplied is its `rms_norm`, or x itself if `scale` is None. The
    product has a bias unless that is None. implementation: of `dense_matmul`.
    """
    summed_TD = x_TD if added_TD is None else x_TD + added_TD
    rows_TD = summed_TD if scale_D is None else rms_norm(summed_TD, scale_D, epsilon)
    return dense_matmul(rows_TD, weight_OD, bias_O, dtype, implementation=implementation), summed_TD, rows_TD


def decode_matmul_scored(x_TD, weight_OD, bias_O, residual_TO, scale_O, router_EO, *, parts: int, epsilon: float, implementation: str = "auto"):
    """Return (residual + product [1, O], its EarlyScores by the router's weight, of so many parts), of one row.

    Of the parts only their sum means something.
    """
    summed_TO = residual_TO + dense_matmul(x_TD, weight_OD, bias_O, implementation=implementation)
    wide_TO = summed_TO.astype(jnp.float32)
    scaled_TO = (wide_TO * scale_O.astype(jnp.float32)).astype(x_TD.dtype)
    factors_1F = jnp.broadcast_to(jnp.mean(jnp.square(wide_TO)) + epsilon, (1, FACTORS))
    all_1S = jnp.concatenate([dense_matmul(scaled_TO, router_EO, None, jnp.float32, implementation=implementation), factors_1F], axis=1)
    return summed_TO, EarlyScores(scaled_TO, jnp.pad(all_1S, ((0, parts - 1), (0, 0))))
