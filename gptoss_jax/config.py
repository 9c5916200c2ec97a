"""The architecture of a gpt-oss model: frozen dataclasses whose field names are `config.json`'s own.

Source of the fields and defaults: openai/gpt-oss `gpt_oss/torch/model.py: ModelConfig` and the published `config.json` files.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

SLIDING = "sliding_attention"
FULL = "full_attention"
MXFP4_BLOCK = 32
_MAX_LAYERS = 1000  # far beyond any, and little to list


class ConfigError(ValueError):
    """A configuration that is not gpt-oss, or holds a value that can't be right; names the field, the value and the expectation."""


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value) -> bool:
    return _is_number(value) and value > 0


def _is_token_id(value) -> bool:
    return _is_int(value) and value >= 0


def _require(field: str, value, holds, expected: str) -> None:
    try:
        ok = holds(value)
    except TypeError:
        ok = False
    if not ok:
        raise ConfigError(f"config: {field} is {value!r}, expected {expected}")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN (Peng et al. 2023, "YaRN: Efficient Context Window Extension"): `factor` 1 is plain RoPE."""

    factor: float = 32.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position_embeddings: int = 4096
    truncate: bool = False
    attention_factor: float | None = None  # None: 0.1 ln(factor) + 1

    def __post_init__(self):
        _require("rope_scaling.factor", self.factor, lambda v: _is_number(v) and v >= 1, "a number of at least 1")
        for field in ("beta_fast", "beta_slow"):
            _require(f"rope_scaling.{field}", getattr(self, field), _is_positive, "a positive number")
        _require("rope_scaling.original_max_position_embeddings", self.original_max_position_embeddings,
                 lambda v: _is_int(v) and v > 0, "a positive integer")
        _require("rope_scaling.truncate", self.truncate, lambda v: isinstance(v, bool), "true or false")
        _require("rope_scaling.attention_factor", self.attention_factor, lambda v: v is None or _is_positive(v), "a positive number")


@dataclasses.dataclass(frozen=True)
class GptOssConfig:
    """One gpt-oss architecture. Hashable, so that it can be a static argument of a jitted function."""

    vocab_size: int = 201_088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 36
    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 64
    sliding_window: int = 128  # keys a query of a sliding layer sees, its own included
    layer_types: tuple[str, ...] = ()  # empty: sliding on even layers, full on odd ones
    rms_norm_eps: float = 1e-5
    rope_theta: float = 150_000.0
    rope_scaling: RopeScaling = RopeScaling()
    max_position_embeddings: int = 131_072
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    router_aux_loss_coef: float = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    quantized: bool = True  # experts stored as MXFP4

    def __post_init__(self):
        for field in _POSITIVE_INTEGERS:
            _require(field, getattr(self, field), lambda v: _is_int(v) and v > 0, "a positive integer")
        _require("num_hidden_layers", self.num_hidden_layers, lambda v: v <= _MAX_LAYERS, f"at most {_MAX_LAYERS}")
        if not self.layer_types:
            types = tuple(FULL if layer % 2 else SLIDING for layer in range(self.num_hidden_layers))
            object.__setattr__(self, "layer_types", types)
        for field in ("rms_norm_eps", "rope_theta", "swiglu_limit", "swiglu_alpha"):
            _require(field, getattr(self, field), _is_positive, "a positive number")
        _require("layer_types", self.layer_types, lambda v: len(v) == self.num_hidden_layers,
                 f"num_hidden_layers = {self.num_hidden_layers} entries")
        for kind in self.layer_types:
            _require("layer_types", kind, lambda v: v in (SLIDING, FULL), f"{SLIDING!r} or {FULL!r}")
        _require("num_experts_per_tok", self.num_experts_per_tok, lambda v: v <= self.num_local_experts,
                 f"at most num_local_experts = {self.num_local_experts}")
        _require("num_attention_heads", self.num_attention_heads, lambda v: v % self.num_key_value_heads == 0,
                 f"a multiple of num_key_value_heads = {self.num_key_value_heads}")
        _require("head_dim", self.head_dim, lambda v: v % 2 == 0, "an even number (RoPE rotates pairs)")
        for field in ("bos_token_id", "pad_token_id"):
            _require(field, getattr(self, field), lambda v: v is None or _is_token_id(v), "a token id")
        _require("eos_token_id", self.eos_token_ids, lambda v: all(map(_is_token_id, v)), "a token id or a list of them")
        if self.quantized:
            for field in ("hidden_size", "intermediate_size"):
                _require(field, getattr(self, field), lambda v: v % MXFP4_BLOCK == 0,
                         f"a multiple of {MXFP4_BLOCK}, the MXFP4 block, while quantization_config says mxfp4")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        ids = self.eos_token_id
        return () if ids is None else ids if isinstance(ids, tuple) else (ids,)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> GptOssConfig:
        """Read a Hugging Face `config.json`, in the form of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

        Raises ConfigError when it isn't gpt-oss, when a field the architecture can't do without is missing, or when a value is one
        that gpt-oss doesn't have (another activation, tied embeddings, no attention bias, another quantisation).
        """
        if not isinstance(config, Mapping):
            raise ConfigError(f"config: {type(config).__name__} found, expected a JSON object")
        if config.get("model_type") != "gpt_oss":
            raise ConfigError(f"config: model_type is {config.get('model_type')!r}, expected 'gpt_oss'")
        for field, expected in (("hidden_act", "silu"), ("tie_word_embeddings", False), ("attention_bias", True)):
            if config.get(field, expected) != expected:
                raise ConfigError(f"config: {field} is {config[field]!r}, expected {expected!r}")
        names = [name for name in _FIELDS if name not in ("layer_types", "rope_theta", "rope_scaling", "quantized")]
        fields = {name: config[name] for name in names if config.get(name) is not None}
        if "num_experts_per_tok" not in fields and "experts_per_token" in config:
            fields["num_experts_per_tok"] = config["experts_per_token"]
        missing = [name for name in _REQUIRED if name not in fields]
        if missing:
            raise ConfigError(f"config: {', '.join(missing)} missing")
        if isinstance(fields.get("eos_token_id"), list):
            fields["eos_token_id"] = tuple(fields["eos_token_id"])
        for field, kind, expected in (("rope_parameters", Mapping, "an object"), ("rope_scaling", Mapping, "an object"),
                                      ("quantization_config", Mapping, "an object"), ("layer_types", list, "a list")):
            _require(field, config.get(field), lambda v: v is None or isinstance(v, kind), expected)
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # where there are both, as transformers does
        theta = rope.get("rope_theta", config.get("rope_theta"))
        if theta is not None:
            fields["rope_theta"] = theta
        return cls(**fields, layer_types=tuple(config.get("layer_types") or ()), rope_scaling=_rope_scaling(rope, config),
                   quantized=_is_mxfp4(config.get("quantization_config")))

    @classmethod
    def from_original(cls, config: Mapping[str, Any]) -> GptOssConfig:
        """Read the `config.json` of OpenAI's `original/` layout (the fields of `gpt_oss/torch/model.py: ModelConfig`)."""
        names = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
        fields = {names.get(name, name): value for name, value in config.items() if names.get(name, name) in _FIELDS}
        missing = [name for name in _REQUIRED if name not in fields]
        if missing:
            raise ConfigError(f"original config: {', '.join(missing)} missing")
        rope = RopeScaling(
            factor=config.get("rope_scaling_factor", 32.0), beta_fast=config.get("rope_ntk_beta", 32.0),
            beta_slow=config.get("rope_ntk_alpha", 1.0),
            original_max_position_embeddings=config.get("initial_context_length", 4096))
        fields.setdefault("max_position_embeddings", int(rope.factor * rope.original_max_position_embeddings))
        if fields["vocab_size"] == 201_088:  # the published vocabulary, whose ids this layout doesn't state
            fields = _O200K_IDS | fields
        return cls(**fields, rope_scaling=rope)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> GptOssConfig:
        """Read a `config.json` of either kind. Raises ConfigError naming the file when it can't be read or isn't gpt-oss."""
        try:
            with open(path, encoding="utf-8") as file:
                config = json.load(file)
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{os.fspath(path)}: not a readable JSON file ({error})") from error
        original = isinstance(config, dict) and "model_type" not in config and "num_experts" in config
        try:
            return cls.from_original(config) if original else cls.from_json(config)
        except ConfigError as error:
            raise ConfigError(f"{os.fspath(path)}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """Return the content of a `config.json` that transformers reads and that `from_json` reads back as an equal config."""
        config = {name: getattr(self, name) for name in _FIELDS if name not in ("rope_scaling", "quantized")}
        config = {name: value for name, value in config.items() if value is not None}
        config["layer_types"] = list(self.layer_types)
        if isinstance(self.eos_token_id, tuple):
            config["eos_token_id"] = list(self.eos_token_id)
        rope = {name: value for name, value in dataclasses.asdict(self.rope_scaling).items() if value is not None}
        config |= {
            "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "attention_dropout": 0.0,
            "hidden_act": "silu", "tie_word_embeddings": False, "use_cache": True, "output_router_logits": False,
            "initial_context_length": self.rope_scaling.original_max_position_embeddings,
            "experts_per_token": self.num_experts_per_tok, "rope_scaling": {"rope_type": "yarn"} | rope,
        }
        if self.quantized:
            config["quantization_config"] = {
                "quant_method": "mxfp4",
                "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
            }
        else:
            config["dtype"] = "bfloat16"
        return dict(sorted(config.items()))

    def replace(self, **changes) -> GptOssConfig:
        """Return a copy with other values. Raises ConfigError for a name that isn't a field, with the nearest one."""
        for name in changes:
            if name not in _FIELDS:
                near = difflib.get_close_matches(name, _FIELDS, 1)
                raise ConfigError(f"{name}: no such field of the model configuration" + (f"; did you mean {near[0]}?" if near else ""))
        if "num_hidden_layers" in changes:
            changes.setdefault("layer_types", ())
        return dataclasses.replace(self, **changes)


_FIELDS = tuple(field.name for field in dataclasses.fields(GptOssConfig))
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts", "num_experts_per_tok",
             "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window")
_POSITIVE_INTEGERS = (*_REQUIRED, "max_position_embeddings")


def _rope_scaling(rope: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling:
    """As transformers reads them: `modeling_rope_utils.py`, `_compute_yarn_parameters` and `standardize_rope_params`."""
    if not rope:  # gpt-oss's own YaRN, as in transformers' GptOssConfig
        return RopeScaling()
    for kind in (SLIDING, FULL):
        if kind in rope:
            raise ConfigError(f"config: rope_parameters.{kind} is {rope[kind]!r}, expected the same parameters for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RopeScaling(factor=1.0)
    if kind != "yarn":
        raise ConfigError(f"config: rope_type is {kind!r}, expected 'yarn' or 'default'")
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    fields = {name: rope[name] for name in names if rope.get(name) is not None}
    if "factor" not in fields:
        raise ConfigError("config: rope_scaling.factor missing")
    if "attention_factor" not in fields and rope.get("mscale") and rope.get("mscale_all_dim"):  # another way to state it
        for name in ("factor", "mscale", "mscale_all_dim"):
            _require(f"rope_scaling.{name}", rope[name], _is_positive, "a positive number")
        above, below = (0.1 * rope[name] * math.log(rope["factor"]) + 1 for name in ("mscale", "mscale_all_dim"))
        fields["attention_factor"] = above / below
    original = "original_max_position_embeddings"
    fields[original] = config.get(original) or fields.get(original) or config.get("max_position_embeddings") or GptOssConfig.max_position_embeddings
    fields.setdefault("truncate", "truncate" not in rope)  # transformers' default is true, and null is false; gpt-oss states false
    return RopeScaling(**fields)


def _is_mxfp4(quantization: Mapping[str, Any] | None) -> bool:
    if quantization is None:
        return False
    method = quantization.get("quant_method")
    if method != "mxfp4":
        raise ConfigError(f"config: quantization_config.quant_method is {method!r}, expected 'mxfp4' or no quantization_config")
    return True


_O200K_IDS = {"bos_token_id": 199_998, "eos_token_id": 200_002, "pad_token_id": 199_999}

PRESETS: dict[str, GptOssConfig] = {
    "gpt-oss-20b": GptOssConfig(num_hidden_layers=24, num_local_experts=32, **_O200K_IDS),
    "gpt-oss-120b": GptOssConfig(num_hidden_layers=36, num_local_experts=128, **_O200K_IDS),
}
