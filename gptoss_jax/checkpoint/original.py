"""OpenAI's `original/` layout: its tensor names, beside Hugging Face's. The bytes are the same, q, k and v stacked in one tensor.

Source: openai/gpt-oss `gpt_oss/torch/weights.py: PARAM_NAME_MAP` and `gpt_oss/torch/model.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from gptoss_jax.checkpoint.safetensors import StoredTensor
from gptoss_jax.config import GptOssConfig
from gptoss_jax.model.weights import Weight

_LAYER = {
    "attn.norm.scale": ("input_layernorm.weight",),
    "attn.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attn.qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "attn.sinks": ("self_attn.sinks",),
    "attn.out.weight": ("self_attn.o_proj.weight",),
    "attn.out.bias": ("self_attn.o_proj.bias",),
    "mlp.norm.scale": ("post_attention_layernorm.weight",),
    "mlp.gate.weight": ("mlp.router.weight",),
    "mlp.gate.bias": ("mlp.router.bias",),
    "mlp.mlp1_weight.blocks": ("mlp.experts.gate_up_proj_blocks",),
    "mlp.mlp1_weight.scales": ("mlp.experts.gate_up_proj_scales",),
    "mlp.mlp1_bias": ("mlp.experts.gate_up_proj_bias",),
    "mlp.mlp2_weight.blocks": ("mlp.experts.down_proj_blocks",),
    "mlp.mlp2_weight.scales": ("mlp.experts.down_proj_scales",),
    "mlp.mlp2_bias": ("mlp.experts.down_proj_bias",),
}


def names(config: GptOssConfig) -> dict[str, tuple[str, ...]]:
    """Return, for each tensor of the layout, the Hugging Face tensors whose rows it stacks."""
    return {
        "embedding.weight": ("model.embed_tokens.weight",),
        **{f"block.{layer}.{name}": tuple(f"model.layers.{layer}.{part}" for part in parts)
           for layer in range(config.num_hidden_layers) for name, parts in _LAYER.items()},
        "norm.scale": ("model.norm.weight",),
        "unembedding.weight": ("lm_head.weight",),
    }


def stacked(declared: Mapping[str, Weight], config: GptOssConfig) -> dict[str, Weight]:
    """Return what the layout's files hold when Hugging Face's hold `declared`."""
    result = {}
    for name, parts in names(config).items():
        first = declared[parts[0]]
        rows = sum(declared[part].shape[0] for part in parts)
        result[name] = Weight((rows, *first.shape[1:]), first.dtype, first.axes)
    return result


def split(stored: Mapping[str, StoredTensor], declared: Mapping[str, Weight], config: GptOssConfig) -> dict[str, StoredTensor]:
    """Return where each Hugging Face tensor is inside the layout's tensors."""
    result = {}
    for name, parts in names(config).items():
        row = 0
        for part in parts:
            rows = declared[part].shape[0]
            result[part] = stored[name].rows(row, row + rows)
            row += rows
    return result
