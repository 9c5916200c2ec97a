"""The definition of the op, by the plainest means: what the other implementations are tested against."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptoss_jax import mxfp4


FACTORS = 32  # numbers that are the same, as many as a layout of a kernel has rows


class EarlyScores(NamedTuple):
    """What a router makes of a single token before the factor of the norm in front of it is known.

    rows: the token times the norm's scale [1, D]. parts: float32 [P, E + FACTORS], whose sums over P are the router's product of `rows` and, FACTORS
    times, the norm's factor to the power of -2.
    """

    rows: jax.Array
    parts: jax.Array

    def scores(self):
        """Return the router's product of the normed token, float32 [1, E]."""
        sums = self.parts.sum(axis=0)
        return sums[None, :-FACTORS] * jax.lax.rsqrt(sums[-1])


class Mxfp4Weight(NamedTuple):
    """blocks uint8 [E, out, C, 16], scales uint8 [E, out, C], as the checkpoint stores them; C * 32 = in."""

    blocks: jax.Array
    scales: jax.Array


def expert_matmul(x_MI, weight, bias_EO, group_sizes_E):
    """Multiply each row by its expert's matrix and add its expert's bias.

    x: [M, in], rows sorted by expert; weight: Mxfp4Weight, or dense [E, in, out]; bias: [E, out]; group_sizes: int32 [E], rows of each
    expert in order, zeros allowed; rows past their sum give zeros. Sums in float32. Returns [M, out] in x's dtype.
    """
    if isinstance(weight, Mxfp4Weight):
        matrices = jnp.swapaxes(mxfp4.decode(*weight, dtype=x_MI.dtype), 1, 2)
    else:
        matrices = weight.astype(x_MI.dtype)
    ends = jnp.cumsum(group_sizes_E)
    rows = jnp.arange(x_MI.shape[0])
    expert = jnp.minimum(jnp.searchsorted(ends, rows, side="right"), matrices.shape[0] - 1)
    out = jnp.einsum("mi,mio->mo", x_MI, matrices[expert], preferred_element_type=jnp.float32, precision="highest")
    out = out + bias_EO[expert].astype(jnp.float32)
    return jnp.where((rows < ends[-1])[:, None], out, 0).astype(x_MI.dtype)


def swiglu(x, limit: float, alpha: float):
    """Gate and up interleaved in the last dim [..., 2F] -> [..., F]: gate clamped from above, up on both sides, and up + 1.

    Source: openai/gpt-oss `gpt_oss/torch/model.py: swiglu`.
    """
    gate, up = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (gate * jax.nn.sigmoid(alpha * gate) * (up + 1)).astype(x.dtype)
