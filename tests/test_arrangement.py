"""Weights rearranged for a GPU, on CPUs: the same logits, and every published weight back bit for bit."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax import checkpoint, generate, sharding
from gptoss_jax.config import GptOssConfig
from gptoss_jax.inference import measure
from gptoss_jax.inference.engine import Engine
from gptoss_jax.inference.sampling import Sampling
from gptoss_jax.kernels import expert_matmul, hopper
from gptoss_jax.model import GptOss, arrangement, cost

pytestmark = pytest.mark.usefixtures("quickly_compiled")

CONFIG = GptOssConfig(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_local_experts=8, num_experts_per_tok=2,
                      num_attention_heads=6, num_key_value_heads=2, head_dim=16, sliding_window=16, max_position_embeddings=64)
run = jax.jit(lambda model, tokens: model(tokens))
HAS_KERNEL = jax.__version_info__ >= hopper.OLDEST_JAX


@pytest.fixture
def as_on_a_hopper(monkeypatch):
    """The CPU devices taken for Hopper GPUs that compute right; programs for them are what `default` branches say."""
    monkeypatch.setattr(arrangement, "_gpus_of", lambda array: sorted(array.sharding.device_set, key=lambda device: device.id))
    monkeypatch.setattr(hopper, "device_unmet", lambda op, device=None: None)


def same_bits(ours, expected):
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        assert ours[name].dtype == array.dtype, name
        np.testing.assert_array_equal(np.asarray(ours[name]).view(np.uint8), np.asarray(array).view(np.uint8), err_msg=name)


def test_an_engine_arranges_its_model_and_nothing_is_lost(as_on_a_hopper, tmp_path):
    model = GptOss(CONFIG, measure.random_weights(CONFIG))
    before, tokens = dict(model.weights()), jnp.arange(20)[None]
    logits = np.asarray(run(model, tokens))
    untouched = Engine(model, arrange=False).weights
    assert untouched.keys() == before.keys()
    kept = Engine(model).weights
    layer = "model.layers.0."
    assert f"{layer}self_attn.qkv_proj.bias" in kept and f"{layer}self_attn.q_proj.weight" not in kept
    assert (f"{layer}mlp.experts.down_proj_hopper_words" in kept) == HAS_KERNEL == (f"{layer}mlp.experts.down_proj_blocks" not in kept)
    assert sum(x.nbytes for x in kept.values()) == sum(x.nbytes for x in before.values())
    same_bits(model.weights(), before)
    np.testing.assert_allclose(run(model, tokens), logits, atol=0.05 * logits.std())  # other kernels, rounded to bfloat16 elsewhere
    again, kept_states = (jax.jit(lambda model, tokens: model.hidden_states(tokens, remat=remat)[0])(model, tokens) for remat in ("layer", "none"))
    np.testing.assert_allclose(again.astype(jnp.float32), kept_states.astype(jnp.float32), atol=2**-4 * float(kept_states.std()))  # as above
    changed = {f"{layer}self_attn.k_proj.bias": before[f"{layer}self_attn.v_proj.bias"],
               f"{layer}mlp.experts.down_proj_scales": before[f"{layer}mlp.experts.down_proj_scales"] + 1}
    other = model.replace(changed)
    same_bits(other.weights(), before | changed)
    assert other.arrays().keys() - before.keys() == {name for name in kept if "gate_up_proj_hopper" in name}  # the rest stays as it is
    checkpoint.save_huggingface(tmp_path / "saved", CONFIG, model.weights())
    same_bits(checkpoint.load(tmp_path / "saved").weights(), before)
    assert Engine(model).weights.keys() == kept.keys()  # a second engine finds it done


def test_what_is_compiled_for_an_arranged_model_is_what_runs_when_its_weights_are_there(as_on_a_hopper, caplog):
    engine = Engine(GptOss(CONFIG, cost.abstract_weights(CONFIG, device=jax.devices()[0])))
    engine.compile(20, 4, Sampling(temperature=0))
    assert engine.hold(GptOss(CONFIG, measure.random_weights(CONFIG)))
    with jax.log_compiles():
        (completion,) = engine.generate([[5] * 20], Sampling(temperature=0), max_new_tokens=4)
    assert len(completion.ids) == 4 and "XLA compilation of jit(_" not in caplog.text


def test_generate_compiles_again_for_scale_bytes_that_cannot_be_arranged(as_on_a_hopper, tmp_path, capfd):
    """Which nobody knows when it compiles while the weights are read."""
    config = CONFIG.replace(vocab_size=checkpoint.load("tiny").config.vocab_size, max_position_embeddings=512)
    weights = measure.random_weights(config)
    name = "model.layers.0.mlp.experts.down_proj_scales"
    weights[name] = weights[name].at[3, 5, 1].set(129)
    checkpoint.save_huggingface(tmp_path / "saved", config, weights, sidecars_from=checkpoint.resolve("tiny"))
    assert generate.main(["What is 17 + 25?", "--checkpoint", str(tmp_path / "saved"), "--max-new-tokens", "3", "--raw"]) == 0
    out, err = capfd.readouterr()
    assert out and "3 out" in err


@pytest.mark.parametrize("config, dtype, name, needs", [
    (CONFIG, "float32", "gate_up_proj_blocks", "rows in bfloat16 (found float32)"),
    (CONFIG.replace(quantized=False), "bfloat16", "gate_up_proj", "a packed weight (found a dense one, bfloat16)")], ids=["float32", "dense"])
def test_what_the_kernel_cannot_take_stays_as_it_is_and_one_line_says_why(as_on_a_hopper, caplog, config, dtype, name, needs):
    model = GptOss(config, cost.abstract_weights(config, dtype, device=jax.devices()[0]))
    expert_matmul.say.cache_clear()
    with caplog.at_level(logging.INFO, "gptoss_jax"):
        model.arrange()
    assert f"model.layers.0.mlp.experts.{name}" in model.arrays()
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("expert_matmul: XLA, slowly, as mosaic_gpu needs " + (needs if HAS_KERNEL else "jax 0.11.2"))


@pytest.mark.skipif(not HAS_KERNEL, reason="the kernel needs jax 0.11.2")
def test_on_a_mesh_each_device_arranges_its_experts_where_their_shares_allow(as_on_a_hopper):
    config, tokens = CONFIG.replace(num_attention_heads=8, num_key_value_heads=4), jnp.arange(20)[None].repeat(2, axis=0)
    mesh = sharding.make_mesh(expert=2, tensor=2, fsdp=2)
    model = GptOss(config, measure.random_weights(config, mesh=mesh), mesh=mesh)
    before, logits = dict(model.weights()), np.asarray(run(model, tokens))
    model.arrange()
    arrays = model.arrays()
    words = arrays["model.layers.0.mlp.experts.gate_up_proj_hopper_words"]
    assert words.sharding.spec == before["model.layers.0.mlp.experts.gate_up_proj_scales"].sharding.spec
    assert "model.layers.0.self_attn.q_proj.weight" in arrays
    same_bits(model.weights(), before)
    np.testing.assert_allclose(run(model, tokens), logits, atol=0.05 * logits.std())
    mesh = sharding.make_mesh(expert=2, tensor=4)  # 32 of 128 hidden on each
    model = GptOss(config, cost.abstract_weights(config, mesh=mesh), mesh=mesh)
    model.arrange()
    assert "model.layers.0.mlp.experts.down_proj_blocks" in model.arrays()


def test_nothing_is_arranged_where_no_gpu_holds_it():
    model = GptOss(CONFIG, measure.random_weights(CONFIG))
    arrays = model.arrays()
    model.arrange()
    assert model.arrays().keys() == arrays.keys() == model.weights().keys()
