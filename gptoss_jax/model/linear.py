"""The two small layers everything is made of. Weights keep the checkpoint's orientation, [out, in]."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from gptoss_jax.kernels.decode_matmul import decode_matmul, rms_norm
from gptoss_jax.kernels.dense_matmul import dense_matmul


class Linear(nnx.Module):
    """x [..., in] -> [..., out] with `name.weight` [out, in] and, where there are some, `name.bias` [out] and a low-rank adapter
    `name.lora_A` [r, in], `name.lora_B` [out, r] (Hu et al. 2021, "LoRA"), whose scale is in `lora_B`."""

    def __init__(self, weights: Mapping[str, jax.Array], name: str):
        self.weight = nnx.Param(weights[f"{name}.weight"])
        for part in ("bias", "lora_A", "lora_B"):
            setattr(self, part, nnx.Param(weights[f"{name}.{part}"]) if f"{name}.{part}" in weights else None)

    def __call__(self, x, dtype=None, *, mesh=None, biased: bool = True):
        """Sum in float32; return `dtype`, default x's. mesh: where the weights lie, if on several devices: then XLA divides the work. biased: not
        where the caller adds the bias."""
        bias = self.bias[...] if biased and self.bias is not None else None
        implementation = "auto" if mesh is None or mesh.size == 1 else "xla"
        y = dense_matmul(x, self.weight[...], bias, dtype, implementation=implementation)
        if self.lora_A is None:
            return y
        low = dense_matmul(x, self.lora_A[...], implementation=implementation)
        return y + dense_matmul(low, self.lora_B[...], None, y.dtype, implementation=implementation)


class RMSNorm(nnx.Module):
    """`rms_norm` with its scale, `name.weight` [D]."""

    def __init__(self, weights: Mapping[str, jax.Array], name: str, epsilon: float):
        self.weight = nnx.Param(weights[f"{name}.weight"])
        self.epsilon = epsilon

    def __call__(self, x):
        return rms_norm(x, self.weight[...], self.epsilon)

    def before(self, linear: Linear, x_BD, added_BD=None, *, for_hopper: bool):
        """Return (linear(norm of x + added) in float32 without its bias; the sum; the norm), of a token each: in one kernel where that can run."""
        return decode_matmul(x_BD, linear.weight[...], added_TD=added_BD, scale_D=self.weight[...], epsilon=self.epsilon, dtype=jnp.float32,
                             for_hopper=for_hopper)
