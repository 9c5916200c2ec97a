"""Low-rank adapters (Hu et al. 2021, "LoRA"): which there are, their first values, and what they add to a weight.

An adapter of `X` is `X.lora_A` and `X.lora_B`, for a linear layer [r, in] and [out, r]; of the experts' matrices `X_lora_A` [E, in, r] and
`X_lora_B` [E, r, out], a pair for each expert. Their product counts `alpha / rank` times.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from gptoss_jax.config import GptOssConfig
from gptoss_jax.model.weights import Weight, declare, random_matrix

_TARGETS = {
    "attention": re.compile(r"self_attn\.[qkvo]_proj\.weight$"),
    "experts": re.compile(r"mlp\.experts\.(gate_up|down)_proj$"),
    "router": re.compile(r"mlp\.router\.weight$"),
    "unembedding": re.compile(r"^lm_head\.weight$"),
}


def declare_adapters(config: GptOssConfig, rank: int, targets: Sequence[str]) -> dict[str, Weight]:
    """Return every adapter's arrays, float32. targets: of "attention", "experts", "router", "unembedding"."""
    declared = {}
    for name, weight in declare(config, packed=False).items():
        if not any(_TARGETS[target].search(name) for target in targets):
            continue
        *expert_dims, rows, columns = weight.shape
        *expert_axes, row_axis, column_axis = weight.axes
        first, second = names_of(name)
        if expert_dims:  # [E, in, out]
            declared[first] = Weight((*expert_dims, rows, rank), "float32", (*expert_axes, row_axis, None))
            declared[second] = Weight((*expert_dims, rank, columns), "float32", (*expert_axes, None, column_axis))
        else:  # [out, in]
            declared[first] = Weight((rank, columns), "float32", (None, column_axis))
            declared[second] = Weight((rows, rank), "float32", (row_axis, None))
    return declared


def names_of(weight: str) -> tuple[str, str]:
    """Return the names of the adapter of a weight."""
    stem, joint = (weight.removesuffix(".weight"), ".") if weight.endswith(".weight") else (weight, "_")
    return f"{stem}{joint}lora_A", f"{stem}{joint}lora_B"


def initialize_adapters(declared: Mapping[str, Weight], seed: int = 0) -> dict[str, jax.Array]:
    """Return first values: lora_A normal with variance 1/in, lora_B zero, so that training starts at the model itself."""

    def first(name: str, weight: Weight) -> jax.Array:
        if name.endswith("lora_B"):
            return jnp.zeros(weight.shape, weight.dtype)
        return random_matrix(name, weight, seed, 1 / math.sqrt(weight.shape[-2 if "experts" in name else -1]))

    return {name: first(name, weight) for name, weight in declared.items()}


def delta(weight: str, adapters: Mapping[str, jax.Array], scale: float, expert: int | None = None) -> jax.Array | None:
    """Return what the adapter of a weight adds to it, float32 in its shape ([out, in]; [E, in, out], of one expert [in, out]), or None."""
    names = names_of(weight)
    if names[0] not in adapters:
        return None
    a, b = (jnp.asarray(adapters[name] if expert is None else adapters[name][expert]) for name in names)
    return scale * (jnp.matmul(b, a, precision="highest") if weight.endswith(".weight") else jnp.matmul(a, b, precision="highest"))
