"""config.json in all its forms, and what is refused."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest

from gptoss_jax.config import PRESETS, ConfigError, GptOssConfig, RopeScaling

OLD = {
    "model_type": "gpt_oss", "vocab_size": 104, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_local_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
    "sliding_window": 5, "rms_norm_eps": 1e-6, "swiglu_limit": 5.5, "max_position_embeddings": 512, "rope_theta": 1234.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False,
                     "original_max_position_embeddings": 64},
    "quantization_config": {"quant_method": "mxfp4"}, "eos_token_id": [3, 4],
}
ORIGINAL = {
    "num_hidden_layers": 36, "num_experts": 128, "experts_per_token": 4, "vocab_size": 201088, "hidden_size": 2880,
    "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
    "sliding_window": 128, "initial_context_length": 4096, "rope_theta": 150000, "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1.0, "rope_ntk_beta": 32.0,
}


def test_every_constant_is_read_from_config_json():
    config = GptOssConfig.from_json(OLD)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts", "num_experts_per_tok",
                 "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "rms_norm_eps", "swiglu_limit",
                 "max_position_embeddings", "rope_theta"):
        assert getattr(config, name) == OLD[name], name
    assert dataclasses.asdict(config.rope_scaling) | OLD["rope_scaling"] == OLD["rope_scaling"] | {"attention_factor": None}
    assert config.layer_types == ("sliding_attention", "full_attention", "sliding_attention")
    assert config.quantized and config.eos_token_ids == (3, 4)


def test_the_rope_parameters_form_of_transformers_5_equals_the_old_form():
    new = {k: v for k, v in OLD.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = OLD["rope_scaling"] | {"rope_theta": OLD["rope_theta"]}
    assert GptOssConfig.from_json(new) == GptOssConfig.from_json(OLD)


@pytest.mark.parametrize("rope, read", [
    ({}, RopeScaling()),  # transformers' GptOssConfig puts gpt-oss's own where there is none
    ({"rope_scaling": None}, RopeScaling()),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1234.0}}, RopeScaling(factor=1.0)),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25}},
     RopeScaling(4.0, original_max_position_embeddings=512, truncate=True, attention_factor=1.25)),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": None}, "original_max_position_embeddings": 32},
     RopeScaling(4.0, original_max_position_embeddings=32)),
    ({"rope_scaling": {"rope_type": "yarn", "factor": math.exp(10), "mscale": 2.0, "mscale_all_dim": 0.5, "truncate": False}},
     RopeScaling(math.exp(10), original_max_position_embeddings=512, attention_factor=2.0)),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 2.0}}, RopeScaling(4.0, original_max_position_embeddings=512, truncate=True)),
    ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, RopeScaling(factor=1.0)),
], ids=str)
def test_positions_are_scaled_as_transformers_reads_the_config(rope, read):
    config = GptOssConfig.from_json({k: v for k, v in OLD.items() if k != "rope_scaling"} | rope)
    assert config.rope_scaling == read and config.rope_theta == 1234.0


def test_a_config_survives_to_json_and_back():
    for config in (GptOssConfig.from_json(OLD), *PRESETS.values(), PRESETS["gpt-oss-20b"].replace(quantized=False)):
        assert GptOssConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_the_original_layouts_config_is_read():
    assert GptOssConfig.from_original(ORIGINAL) == PRESETS["gpt-oss-120b"]


@pytest.mark.parametrize("change, said", [
    ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, expected at most num_local_experts = 8"),
    ({"num_attention_heads": 5}, "num_attention_heads is 5, expected a multiple of num_key_value_heads = 2"),
    ({"head_dim": 15}, "head_dim is 15, expected an even number"),
    ({"hidden_size": 72}, "hidden_size is 72, expected a multiple of 32"),
    ({"hidden_size": "64"}, "hidden_size is '64', expected a positive integer"),
    ({"sliding_window": 0}, "sliding_window is 0"),
    ({"vocab_size": None}, "vocab_size missing"),
    ({"layer_types": ["full_attention"]}, "expected num_hidden_layers = 3 entries"),
    ({"layer_types": ["full_attention"] * 2 + ["linear_attention"]}, "layer_types is 'linear_attention'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq', expected 'mxfp4'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_type is 'llama3'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "rope_scaling.factor is 0.5"),
    ({"swiglu_limit": -1}, "swiglu_limit is -1"),
    ({"swiglu_limit": float("inf")}, "swiglu_limit is inf, expected a positive number"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 8, "mscale": "1", "mscale_all_dim": 1}}, "rope_scaling.mscale is '1', expected a positive number"),
    ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention is {'rope_type': 'default'}, expected the same"),
    ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 8, "attention_factor": "1"}}, "rope_scaling.attention_factor is '1', expected a positive"),
    ({"quantization_config": ["mxfp4"]}, "quantization_config is ['mxfp4'], expected an object"),
    ({"layer_types": 3}, "layer_types is 3, expected a list"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, expected at most 1000"),
    ({"eos_token_id": "<|return|>"}, "eos_token_id is ('<|return|>',), expected a token id or a list of them"),
])
def test_what_is_not_gpt_oss_is_refused_by_name_value_and_expectation(change, said):
    with pytest.raises(ConfigError) as error:
        GptOssConfig.from_json(OLD | change)
    assert said in str(error.value)


@pytest.mark.parametrize("change, said", [
    ({"num_hidden_layers": None}, "num_hidden_layers is None, expected a positive integer"),
    ({"rope_scaling_factor": "32"}, "rope_scaling.factor is '32', expected a number of at least 1"),
])
def test_an_original_config_with_a_wrong_value_is_refused_like_any_other(change, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        GptOssConfig.from_original(ORIGINAL | change)


def test_an_unreadable_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    for content in ("{", "[]", "[" * 100_000, None):
        if content is not None:
            path.write_text(content)
        else:
            path.unlink()
        with pytest.raises(ConfigError, match="config.json"):
            GptOssConfig.from_file(path)


def test_replacing_an_unknown_field_suggests_the_nearest():
    with pytest.raises(ConfigError, match="did you mean num_local_experts"):
        PRESETS["gpt-oss-20b"].replace(num_local_expert=3)


def test_importing_the_package_imports_no_jax_and_stays_under_300_ms():
    code = "import time; t = time.perf_counter(); import gptoss_jax, sys; print(time.perf_counter() - t, 'jax' in sys.modules)"
    seconds, has_jax = min(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
                           for _ in range(3))
    assert has_jax == "False" and float(seconds) < 0.3
