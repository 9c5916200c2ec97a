"""Adapters above a frozen MXFP4 checkpoint."""

import contextlib
import json

import by_hand
import jax
import numpy as np
import optax
import pytest
from test_step import DATA, TINY, assert_close, configured, keep_gradients, random_batches, small_checkpoint  # noqa: F401 (fixtures)

from gptoss_jax import checkpoint, mxfp4
from gptoss_jax.checkpoint.errors import CheckpointError
from gptoss_jax.model import GptOss, lora
from gptoss_jax.model.weights import declare
from gptoss_jax.training import state as state_module
from gptoss_jax.training.config import LORA_TARGETS, TrainingConfigError
from gptoss_jax.training.export import export
from gptoss_jax.training.state import initial_state
from gptoss_jax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def adapted(path, optimizer, **train):
    """(configuration, state with adapters that all do something, frozen)."""
    config = configured(path, **{"mode": "lora", "rank": 3, "alpha": 6.0, "targets": LORA_TARGETS} | train)
    state, frozen = initial_state(config, optimizer)
    trained = {name: value + 0.02 * jax.random.normal(jax.random.key(index), value.shape)
               for index, (name, value) in enumerate(state.trained.items())}
    return config, state._replace(trained=trained), frozen


def test_adapters_have_the_gradients_that_the_merged_weights_imply(small_checkpoint):  # noqa: F811
    """W + s B A has dA = s B^T dW and dB = s dW A^T, for experts one by one; dW by full fine-tuning of the merged weights."""
    batch = next(random_batches(1))
    config, state, frozen = adapted(small_checkpoint, keep_gradients(), remat="none")
    trained, scale = jax.tree.map(np.array, state.trained), config.train.alpha / config.train.rank
    full = configured(small_checkpoint, mode="full", remat="none")
    merged, _ = initial_state(full, keep_gradients())
    deltas = {name: lora.delta(name, trained, scale) for name in merged.trained}
    merged = merged._replace(trained={name: value if deltas[name] is None else value + deltas[name] for name, value in merged.trained.items()})
    state, metrics = make_train_step(config, keep_gradients())(state, frozen, batch)
    merged, expected = make_train_step(full, keep_gradients())(merged, {}, batch)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    implied = {}
    for name, dw in jax.tree.map(np.asarray, merged.opt_state).items():
        first, second = lora.names_of(name)
        if first in trained:
            a, b = trained[first], trained[second]
            if "experts" in name:  # [E, in, r] and [E, r, out]
                implied |= {first: scale * dw @ b.transpose(0, 2, 1), second: scale * a.transpose(0, 2, 1) @ dw}
            else:
                implied |= {first: scale * b.T @ dw, second: scale * dw @ a.T}
    assert len(implied) == 2 * (4 + 2 + 1 + 1)
    assert_close(state.opt_state, implied, 5e-5)  # float32 sums in another order; 2.2e-5 on a single core


def test_experts_that_a_hoppers_kernel_would_take_for_infinite_are_refused_there(small_checkpoint, monkeypatch):  # noqa: F811
    config = configured(small_checkpoint, mode="lora", compute_dtype="bfloat16", targets=LORA_TARGETS)
    load = state_module.load_weights

    def with_large_scales(*args, **options):
        read, weights = load(*args, **options)
        return read, {name: array.at[1, 2].set(largest) if name.endswith("down_proj_scales") else array for name, array in weights.items()}

    monkeypatch.setattr(state_module, "load_weights", with_large_scales)
    for is_hopper, largest, refused in ((False, 200, False), (True, 128, False), (True, 129, True)):
        monkeypatch.setattr(state_module.hopper, "is_hopper", lambda device, is_hopper=is_hopper: is_hopper)
        with pytest.raises(TrainingConfigError, match=r"init\.checkpoint .*down_proj_scales has a scale byte of 129, expected at most 128") if refused \
                else contextlib.nullcontext():
            state_module.load_frozen(config)


def test_adapters_start_at_the_model_itself(small_checkpoint):  # noqa: F811
    config = configured(small_checkpoint, mode="lora", targets=LORA_TARGETS)
    state, _ = initial_state(config, optax.sgd(1.0))
    deltas = {name: lora.delta(name, state.trained, 2.0) for name in declare(config.model, packed=False)}
    assert sum(delta is not None and not delta.any() for delta in deltas.values()) == 4 + 2 + 1 + 1
    for name, value in state.trained.items():
        if name.endswith("lora_A"):  # its product with a row of ones has variance one
            np.testing.assert_allclose(np.var(value) * value.shape[-2 if "experts" in name else -1], 1, atol=0.3, err_msg=name)


def test_packed_experts_are_never_dequantised_as_a_whole(small_checkpoint):  # noqa: F811
    config, state, frozen = adapted(small_checkpoint, optax.adamw(1e-3))
    text = make_train_step(config, optax.adamw(1e-3)).lower(state, frozen, next(random_batches(1))).as_text()
    assert "8x256x3x16xui8" in text and "8x96x4x16xui8" in text
    for shape in ("8x256x96", "8x96x256", "8x256x3x32", "8x256x3x16x2", "8x96x128", "8x128x96", "8x96x4x32", "8x96x4x16x2"):
        assert f"<{shape}x" not in text


def test_merging_adapters_changes_what_they_are_of_and_no_other_byte(small_checkpoint, tmp_path):  # noqa: F811
    config, state, _ = adapted(small_checkpoint, optax.sgd(1.0), targets=("attention",))
    export(config, state.trained, tmp_path / "merged")
    before, after = by_hand.read_directory(small_checkpoint), by_hand.read_directory(tmp_path / "merged")
    assert after.keys() == before.keys()
    for name, old in before.items():
        if "self_attn" in name and name.endswith("proj.weight"):
            a, b = (np.asarray(state.trained[part], np.float32) for part in lora.names_of(name))
            np.testing.assert_allclose(after[name].astype(np.float32), old.astype(np.float32) + 2 * b @ a, rtol=2**-8, err_msg=name)
            assert (after[name] != old).any()
        else:
            assert after[name].tobytes() == old.tobytes(), name
    assert (tmp_path / "merged" / "config.json").read_bytes() == (small_checkpoint / "config.json").read_bytes()
    by_hand.assert_same_bits(checkpoint.load_weights(tmp_path / "merged")[1], after)
    with pytest.raises(CheckpointError, match="exists already"):
        export(config, state.trained, tmp_path / "merged", overwrite=False)


def test_an_expert_that_was_not_trained_keeps_its_bytes(small_checkpoint, tmp_path):  # noqa: F811
    config, state, _ = adapted(small_checkpoint, optax.sgd(1.0), targets=("experts",))
    names = [name for name in state.trained if name.endswith("lora_B")]
    trained = state.trained | {name: state.trained[name].at[3].set(0) for name in names}  # never routed to
    export(config, trained, tmp_path / "merged")
    before, after = by_hand.read_directory(small_checkpoint), by_hand.read_directory(tmp_path / "merged")
    for name in ("gate_up_proj", "down_proj"):
        stem = f"model.layers.0.mlp.experts.{name}"
        for expert in range(8):
            old, new = ([tensors[f"{stem}_{part}"][expert] for part in ("blocks", "scales")] for tensors in (before, after))
            same = [(a == b).all() for a, b in zip(old, new)]
            assert same == [True, True] if expert == 3 else not same[0]
            a, b = (np.asarray(trained[f"{stem}_lora_{part}"][expert]) for part in "AB")
            matrix = mxfp4.decode(*old).T + 2 * a @ b
            expected = mxfp4.decode(*mxfp4.encode(np.ascontiguousarray(matrix.T), steady=True))
            assert (mxfp4.decode(*new) == expected).mean() > 0.999  # a product summed in another order may round to the other side


def merged(path):
    """Export the tiny checkpoint with adapters whose products are exact in float32: the files have the same bytes wherever they are made."""
    config = configured(TINY, mode="lora", rank=2, alpha=2.0, targets=LORA_TARGETS)
    random = np.random.default_rng(5)
    export(config, {name: jax.numpy.asarray(random.integers(-4, 5, weight.shape) / (16 if name.endswith("A") else 64), "float32")
                    for name, weight in lora.declare_adapters(config.model, 2, LORA_TARGETS).items()}, path)


def test_an_export_has_the_logits_that_transformers_computes_of_it(tmp_path):
    """Oracle: transformers in float32 on the same directory (tests/data/merged_adapters), to 1e-4."""
    merged(tmp_path / "merged")
    oracle, run = np.load(DATA / "merged_adapters" / "logits.npz"), jax.jit(GptOss.__call__)
    found, base = (run(checkpoint.load(path, dtype="float32"), oracle["input_ids"][None])[0, oracle["positions"]]
                   for path in (tmp_path / "merged", TINY))
    np.testing.assert_allclose(found, oracle["logits"], atol=1e-4)
    assert np.abs(base - oracle["logits"]).mean() > 0.1


def test_a_peft_directory_holds_the_same_adapters_in_pefts_names_and_shapes(small_checkpoint, tmp_path):  # noqa: F811
    """Names, shapes and the formula are those of peft 0.21.2, `ParamWrapper.get_delta_weight`, of this model."""
    config, state, _ = adapted(small_checkpoint, optax.sgd(1.0))
    export(config, state.trained, tmp_path / "adapter", adapters=True)
    tensors = by_hand.read_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.0"
    modules = {f"{layer}.self_attn.{name}_proj": f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"} | {
        f"{layer}.mlp.router": "model.layers.0.mlp.router.weight", "base_model.model.lm_head": "lm_head.weight",
        f"{layer}.mlp.experts.base_layer": "model.layers.0.mlp.experts.gate_up_proj",
        f"{layer}.mlp.experts": "model.layers.0.mlp.experts.down_proj"}
    assert tensors.keys() == {f"{module}.lora_{part}.weight" for module in modules for part in "AB"}
    for module, weight in modules.items():
        a, b = (tensors[f"{module}.lora_{part}.weight"] for part in "AB")
        if "experts" in module:
            delta = np.einsum("ore,eri->eio", b.reshape(b.shape[0], -1, 8), a.reshape(8, -1, a.shape[1]))
        else:
            delta = b @ a
        np.testing.assert_allclose(2 * delta, lora.delta(weight, state.trained, 2.0), atol=1e-6, err_msg=module)
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stated["r"] == 3 and stated["lora_alpha"] == 6 and stated["target_modules"] == ["k_proj", "lm_head", "o_proj", "q_proj", "v_proj"]
    assert stated["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"]
