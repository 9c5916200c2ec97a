"""How much a training step computes, and how much the devices could: model FLOPs utilisation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax

from gptoss_jax.config import GptOssConfig
from gptoss_jax.model.weights import declare

_PEAK_TFLOPS = {  # dense bfloat16, by the start of `device_kind`; the vendors' data sheets
    "NVIDIA A100": 312, "NVIDIA H100 PCIe": 756, "NVIDIA H100": 989, "NVIDIA H200": 989, "NVIDIA GH200": 989, "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500, "NVIDIA L4": 121, "NVIDIA L40S": 362,
    "TPU v4": 275, "TPU v5 lite": 197, "TPU v5e": 197, "TPU v5p": 459, "TPU v5": 459, "TPU v6 lite": 918, "TPU v6e": 918, "TPU7x": 2307}


def peak_flops(device: jax.Device) -> float | None:
    """Return the device's bfloat16 FLOPs a second, None where it isn't known."""
    names = [name for name in _PEAK_TFLOPS if device.device_kind.startswith(name)]
    return _PEAK_TFLOPS[max(names, key=len)] * 1e12 if names else None


def flops_per_token(config: GptOssConfig, trained: Mapping[str, jax.ShapeDtypeStruct], row_tokens: int, *, again: bool = False) -> float:
    """Return the FLOPs of one training token, of the experts those it is routed to.

    Forward 2 a weight, backward 2 to the activations and 2 to a weight that is trained. trained: arrays by name, adapters among them.
    again: count the forward pass of the layers twice, which is then computed again for the backward pass.
    Attention as if every row were one example: packed rows take less.
    Source of the counting: Chowdhery et al. 2022, "PaLM", appendix B.
    """
    active_share = config.num_experts_per_tok / config.num_local_experts
    weights = {name: weight.shape for name, weight in declare(config, packed=False).items()}
    adapters = {name: array.shape for name, array in trained.items() if name not in weights}
    flops = 0.0
    for name, shape in (weights | adapters).items():
        if len(shape) < 2 or name.endswith(("embed_tokens.weight", "bias")):
            continue  # a lookup; additions
        passes = (6 if name in trained else 4) + 2 * (again and ".layers." in name)
        flops += passes * math.prod(shape) * (active_share if ".mlp.experts." in name else 1)
    for kind in config.layer_types:
        keys = row_tokens / 2 if kind == "full_attention" else min(config.sliding_window, row_tokens / 2)
        flops += (3 + again) * 4 * config.num_attention_heads * config.head_dim * keys
    return flops
