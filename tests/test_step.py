"""One training step: against PyTorch, and the same whatever is kept in memory, in parts or at a time."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptoss_jax import checkpoint, mxfp4
from gptoss_jax.model import GptOss
from gptoss_jax.model.weights import declare
from gptoss_jax.training import loss
from gptoss_jax.training.config import InitConfig, TrainConfig, TrainingConfig
from gptoss_jax.training.state import initial_state, resolve
from gptoss_jax.training.step import Batch, TrainState, forward_loss, make_train_step, model_weights

DATA = pathlib.Path(__file__).parent / "data"
TINY = DATA / "tiny_checkpoint"


def configured(**train):
    """The tiny checkpoint, trained as stated."""
    return resolve(TrainingConfig(init=InitConfig(str(TINY)), train=TrainConfig(**train)))


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
    config = configured(mode="full", loss_chunk_tokens=20)
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
    """(gradients, metrics) of the oracle's batch, everything kept and computed at once."""
    return gradients_of(configured(mode="full", remat="none", loss_chunk_tokens=1000, z_coefficient=0.01, balance_coefficient=0.01))


def gradients_of(config):
    state, frozen = initial_state(config, keep_gradients())
    state, metrics = make_train_step(config, keep_gradients())(state, frozen, oracle_batch()[1])
    return state.opt_state, metrics


def assert_close(found, expected, rtol):
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=rtol * np.abs(value).max() + 1e-12, rtol=0, err_msg=name)


@pytest.mark.parametrize("train", [{"remat": "layer", "loss_chunk_tokens": 14}, {"remat": "dots", "loss_chunk_tokens": 1}])
def test_a_step_is_the_same_whatever_is_kept_and_however_the_loss_is_cut(train, plain_step):
    gradients, metrics = gradients_of(configured(mode="full", z_coefficient=0.01, balance_coefficient=0.01, **train))
    assert_close(gradients, plain_step[0], 1e-5)  # float32 sums in another order
    assert_close(metrics, plain_step[1], 1e-5)


def test_a_batch_in_parts_gives_the_same_step():
    whole, in_parts = (gradients_of(configured(mode="full", microbatches=parts)) for parts in (1, 2))
    assert_close(in_parts[0], whole[0], 1e-5)
    for name in ("loss", "tokens", "grad_norm", "z_loss"):  # rows of 48 and 40 tokens: the z-loss is the mean of their means
        np.testing.assert_allclose(in_parts[1][name], whole[1][name], rtol=2e-2 if name == "z_loss" else 1e-5)
    assert in_parts[1]["expert_load"].shape == (2, 4)
    np.testing.assert_allclose(in_parts[1]["expert_load"].sum(axis=1), 1, rtol=1e-6)


def test_the_logits_of_the_whole_batch_never_exist():
    config = configured(mode="full", loss_chunk_tokens=16)
    state, frozen = initial_state(config, optax.sgd(1.0))
    text = make_train_step(config, optax.sgd(1.0)).lower(state, frozen, oracle_batch()[1]).compile().as_text()
    assert "f32[2,8,512]" in text  # of 16 tokens
    assert "[2,48,512]" not in text and "[96,512]" not in text


def test_the_z_loss_is_the_mean_square_of_the_log_sum_exp():
    logits = jnp.log(jnp.array([[[1.0, 2.0, 4.0], [1.0, 1.0, 1.0], [5.0, 5.0, 5.0]]]))
    np.testing.assert_allclose(loss.z_loss(logits, jnp.array([[True, True, False]])), (np.log(7) ** 2 + np.log(3) ** 2) / 2, rtol=1e-6)
