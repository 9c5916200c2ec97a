"""One training step: against PyTorch, and the same whatever is kept in memory, in parts or at a time."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptoss_jax import checkpoint, mxfp4
from gptoss_jax.model import GptOss
from gptoss_jax.model.weights import declare, initialize
from gptoss_jax.training import loss
from gptoss_jax.config import GptOssConfig
from gptoss_jax.training.config import DataConfig, InitConfig, TrainConfig, TrainingConfig, TrainingConfigError
from gptoss_jax.training.export import export
from gptoss_jax.training.state import Batch, initial_state, resolve
from gptoss_jax.training.step import forward_loss, make_eval_step, make_train_step, model_weights

pytestmark = pytest.mark.usefixtures("quickly_compiled")
DATA = pathlib.Path(__file__).parent / "data"
TINY = DATA / "tiny_checkpoint"
# One layer, which slides, of sizes that a mesh of two by two by two divides whichever way; no two are equal.
SMALL = GptOssConfig(vocab_size=320, hidden_size=96, intermediate_size=128, num_hidden_layers=1, num_local_experts=8, num_experts_per_tok=2,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=20, sliding_window=7, layer_types=("sliding_attention",))
ROWS, TOKENS = 8, 24


def configured(checkpoint=None, **train):
    """A small model from a checkpoint, or one from random weights, trained as stated."""
    data = DataConfig(batch_size=ROWS, row_tokens=TOKENS)
    init = InitConfig("" if checkpoint is None else str(checkpoint))
    return resolve(TrainingConfig(model=SMALL if checkpoint is None else None, init=init, train=TrainConfig(**train), data=data))


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory):
    """SMALL with random weights, experts packed."""
    return save_checkpoint(tmp_path_factory.mktemp("small") / "checkpoint", SMALL)


def save_checkpoint(path, model):
    weights = initialize(declare(model, dtype="float32", packed=False), 1, stddev=0.3)
    checkpoint.save_huggingface(path, model, {name: value + 0.1 if value.ndim < 3 else value for name, value in weights.items()})
    return path


def random_batches(count):
    """Rows of two segments, and padding after the second."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        tokens = rng.integers(0, SMALL.vocab_size, (ROWS, TOKENS + 1)).astype(np.int32)
        lengths = rng.integers(6, 18, ROWS)[:, None]
        column = np.arange(TOKENS)[None]
        segments = np.where(column < lengths, 1, np.where(column < TOKENS - 2, 2, 0)).astype(np.int32)
        positions = np.where(segments == 1, column, column - lengths).astype(np.int32)
        yield Batch(tokens[:, :-1], tokens[:, 1:], (segments > 0).astype(np.float32), segments, positions)


def oracle_batch():
    """(reference data, its batch): two rows of 48 tokens, one of them padded."""
    oracle = np.load(DATA / "oracle" / "train.npz")
    real = oracle["attention_mask"].astype(np.int32)
    labels = np.pad(oracle["labels"][:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    positions = np.broadcast_to(np.arange(real.shape[1], dtype=np.int32), real.shape)
    return oracle, Batch(*map(jnp.asarray, (oracle["input_ids"].astype(np.int32), np.maximum(labels, 0).astype(np.int32),
                                            (labels >= 0).astype(np.float32), real, positions)))


def keep_gradients():
    """An optimizer in front of another whose state is the gradients."""
    return optax.GradientTransformation(lambda weights: jax.tree.map(jnp.zeros_like, weights), lambda gradients, *_: (gradients, gradients))


def test_one_step_equals_pytorch():
    """Oracle: transformers and torch.optim.AdamW in float32 (tests/data/oracle/train.npz), to 1e-4 relative."""
    oracle, batch = oracle_batch()
    config = configured(TINY, mode="full", loss_chunk_tokens=20)
    optimizer = optax.chain(keep_gradients(), optax.adamw(1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01))
    state, frozen = initial_state(config, optimizer)
    before, step = jax.tree.map(np.array, state.trained), make_train_step(config, optimizer)
    for number, expected in enumerate(oracle["losses"]):
        state, metrics = step(state, frozen, batch)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
        if number > 0:
            continue
        np.testing.assert_allclose(metrics["grad_norm"], oracle["grad_norm_total"], rtol=1e-4)
        for name, gradient in state.opt_state[0].items():
            norm = oracle[f"grad_norm/{name}"]
            np.testing.assert_allclose(np.linalg.norm(gradient), norm, rtol=1e-4, atol=1e-7, err_msg=name)
            if f"grad/{name}" in oracle:
                np.testing.assert_allclose(gradient, oracle[f"grad/{name}"], rtol=1e-4, atol=1e-4 * norm / gradient.size**0.5, err_msg=name)
            update_norm = oracle[f"adamw1_update_norm/{name}"]
            update = np.asarray(state.trained[name], np.float64) - before[name]
            np.testing.assert_allclose(np.linalg.norm(update), update_norm, rtol=1e-4, err_msg=name)
    assert state.step == 4


@pytest.fixture(scope="module")
def plain_step():
    """(gradients, metrics) of a batch, everything kept and computed at once."""
    return gradients_of(configured(remat="none", loss_chunk_tokens=1000))


def gradients_of(config):
    state, frozen = initial_state(config, keep_gradients())
    state, metrics = make_train_step(config, keep_gradients())(state, frozen, next(random_batches(1)))
    return state.opt_state, metrics


def assert_close(found, expected, rtol):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=rtol * np.abs(value).max() + 1e-12, rtol=0, err_msg=name)


@pytest.mark.parametrize("train", [
    {"remat": "layer", "loss_chunk_tokens": 80}, {"remat": "dots", "loss_chunk_tokens": 1}, {"microbatches": 4, "loss_chunk_tokens": 16}], ids=str)
def test_a_step_is_the_same_whatever_is_kept_and_however_it_is_cut(train, plain_step):
    gradients, metrics = gradients_of(configured(**train))
    assert_close(gradients, plain_step[0], 1e-5)  # float32 sums in another order
    if "microbatches" in train:  # the router's are means over the parts' own
        expected = plain_step[1] | {name: metrics[name] for name in ("z_loss", "balance_loss")}
        for name in ("z_loss", "balance_loss"):
            np.testing.assert_allclose(metrics[name], plain_step[1][name], rtol=0.1)
    else:
        expected = plain_step[1]
    assert_close(metrics, expected, 1e-5)


def test_the_logits_of_a_whole_batch_never_exist():
    config = configured(loss_chunk_tokens=48)
    state, frozen = initial_state(config, optax.sgd(1.0))
    text = make_train_step(config, optax.sgd(1.0)).lower(state, frozen, next(random_batches(1))).as_text()
    assert "8x6x320xf32" in text  # of 48 tokens
    assert "8x24x320x" not in text and "192x320x" not in text


def test_as_many_logits_exist_at_a_time_as_their_vocabulary_and_devices_allow():
    assert loss.chunk_tokens(201_088) == 256 and loss.chunk_tokens(201_088, 8) == 2048  # 4 bytes x 201,088 x 256 are 206 MB
    assert loss.chunk_tokens(1 << 30) == 1


def test_router_losses_count_as_much_as_their_coefficients_say():
    config = configured(balance_coefficient=0.5, z_coefficient=0.25)
    weights = initial_state(config, optax.sgd(1.0))[0].trained
    minimised, metrics = jax.jit(lambda weights: forward_loss(config, weights, {}, next(random_batches(1))))(weights)
    assert metrics["z_loss"] > 1 and metrics["balance_loss"] > 1
    np.testing.assert_allclose(minimised, metrics["loss"] + 0.5 * metrics["balance_loss"] + 0.25 * metrics["z_loss"], rtol=1e-6)


def test_the_z_loss_is_the_mean_square_of_the_log_sum_exp():
    logits = jnp.log(jnp.array([[[1.0, 2.0, 4.0], [1.0, 1.0, 1.0], [5.0, 5.0, 5.0]]]))
    np.testing.assert_allclose(loss.z_loss(logits, jnp.array([[True, True, False]])), (np.log(7) ** 2 + np.log(3) ** 2) / 2, rtol=1e-6)


def test_the_export_of_quantised_training_computes_what_its_last_forward_did(tmp_path):
    """The same numbers bit for bit, and logits in another order of sums; gradients pass straight through."""
    config, batch = configured(mode="qat"), next(random_batches(1))
    state, frozen = initial_state(config, optax.sgd(1.0))
    export(config, state.trained, tmp_path / "export")
    exported_config, exported = checkpoint.load_weights(tmp_path / "export", dtype="float32")
    used = model_weights(config, state.trained, frozen)
    for name, value in used.items():
        if f"{name}_blocks" in exported:
            found = np.swapaxes(mxfp4.decode(*(np.asarray(exported[f"{name}_{part}"]) for part in ("blocks", "scales"))), 1, 2)
        else:
            found = np.asarray(exported[name])
        assert (found == np.asarray(value)).all(), name
    apply = jax.jit(lambda weights: GptOss(SMALL, weights)(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids))
    logits = apply(exported)
    np.testing.assert_allclose(logits, apply(used), atol=2e-5)
    total, count = loss.cross_entropy(logits, batch.targets, batch.loss_weights)
    np.testing.assert_allclose(total / count, make_eval_step(config)(state.trained, frozen, batch)["loss"], rtol=1e-6)


def test_quantised_training_starts_at_the_checkpoint_and_tiny_steps_stay_there():
    """Of the embedded checkpoint's blocks a third have 4 as their largest magnitude, and another scale when that becomes smaller."""
    config = configured("tiny", mode="qat")
    weights = initial_state(config, optax.sgd(1.0))[0].trained
    rng = np.random.default_rng(0)
    moved = {name: value + 1e-6 * rng.choice([-1, 1], value.shape).astype(np.float32) for name, value in weights.items()}
    for name, used in model_weights(config, moved, {}).items():
        if re.search("gate_up_proj$|down_proj$", name):
            np.testing.assert_array_equal(used, weights[name], err_msg=name)
        else:
            np.testing.assert_allclose(used, weights[name], rtol=2**-7, atol=2e-6, err_msg=name)


def test_gradients_pass_straight_through_the_grid():
    config = configured(mode="qat")
    state, _ = initial_state(config, optax.sgd(1.0))
    gradient = jax.jit(jax.grad(lambda trained: sum((value * 3).sum() for value in model_weights(config, trained, {}).values())))(state.trained)
    assert all((value == 3).all() for value in gradient.values())


@pytest.mark.parametrize(("config", "message"), [
    (TrainingConfig(), "model: missing, expected the section or init.checkpoint"),
    (TrainingConfig(model=SMALL, init=InitConfig("tiny")), "model: a section found with init.checkpoint 'tiny', expected none"),
    (TrainingConfig(model=SMALL, train=TrainConfig(mode="lora")), "init.checkpoint: none found, expected one with train.mode lora"),
    (TrainingConfig(init=InitConfig("tiny"), train=TrainConfig(mode="lora", targets=())), "train.targets: none found"),
    (TrainingConfig(model=SMALL.replace(quantized=False, intermediate_size=33)), "model: intermediate_size is 33, expected a multiple of 32"),
    (TrainingConfig(model=SMALL, train=TrainConfig(microbatches=3)), "data.batch_size: 16 found, expected a multiple of 3: train.microbatches 3"),
])
def test_settings_that_do_not_fit_together_are_refused_before_anything_is_loaded(config, message):
    with pytest.raises(TrainingConfigError, match=message):
        resolve(config)
