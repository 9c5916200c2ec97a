"""The two small layers everything is made of. Weights keep the checkpoint's orientation, [out, in]."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from gptoss_jax.kernels.dense_matmul import dense_matmul


class Linear(nnx.Module):
    """x [..., in] -> [..., out] with `name.weight` [out, in] and, where there is one, `name.bias` [out]."""

    def __init__(self, weights: Mapping[str, jax.Array], name: str):
        self.weight = nnx.Param(weights[f"{name}.weight"])
        self.bias = nnx.Param(weights[f"{name}.bias"]) if f"{name}.bias" in weights else None

    def __call__(self, x, dtype=None, *, mesh=None):
        """Sum in float32; return `dtype`, default x's. mesh: where the weights lie, if on several devices: then XLA divides the work."""
        bias = None if self.bias is None else self.bias[...]
        implementation = "auto" if mesh is None or mesh.size == 1 else "xla"
        return dense_matmul(x, self.weight[...], bias, dtype, implementation=implementation)


class RMSNorm(nnx.Module):
    """Root mean square normalisation in float32 (Zhang and Sennrich 2019), as openai/gpt-oss: scaled before rounding to x's dtype."""

    def __init__(self, weights: Mapping[str, jax.Array], name: str, epsilon: float):
        self.weight = nnx.Param(weights[f"{name}.weight"])
        self.epsilon = epsilon

    def __call__(self, x):
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * self.weight[...].astype(jnp.float32)).astype(x.dtype)
