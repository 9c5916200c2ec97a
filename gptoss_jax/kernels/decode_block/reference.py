"""The definition of the op, by the ops it is made of."""

from __future__ import annotations

import jax.numpy as jnp

from gptoss_jax.kernels.decode_attention import reference as attention
from gptoss_jax.kernels.decode_matmul import reference as products


def decode_block(x_1D, scale_D, qkv_JD, bias_J, cosine_1R, sine_1R, keys_1SKH, values_1SKH, sinks_KG, positions_1, output_DI, output_bias_D, next_scale_D,
                 router_ED, *, ring: bool, epsilon: float, parts: int = 1, implementation: str = "auto"):
    """Return (x + attention's output [1, D], its EarlyScores in so many parts, new keys, new values).

    x is normed by scale and multiplied by qkv for `decode_attention`'s arguments; what that gives, by output; see `decode_matmul_scored`.
    implementation: of `attention`.
    """
    qkv_1J, _, _ = products.decode_matmul(x_1D, None, scale_D, qkv_JD, None, epsilon=epsilon, dtype=jnp.float32)
    attended_1I, *cache = attention.decode_attention(qkv_1J, bias_J, cosine_1R, sine_1R, keys_1SKH, values_1SKH, sinks_KG, positions_1, ring=ring,
                                                     dtype=x_1D.dtype, implementation=implementation)
    found = products.decode_matmul_scored(attended_1I, output_DI, output_bias_D, x_1D, next_scale_D, router_ED, parts=parts, epsilon=epsilon)
    return *found, *cache
