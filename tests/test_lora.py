"""Adapters above a frozen MXFP4 checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_step import TINY, assert_close, configured, keep_gradients, oracle_batch

from gptoss_jax import mxfp4
from gptoss_jax.model import lora
from gptoss_jax.training.config import LORA_TARGETS, TrainingConfig
from gptoss_jax.training.state import declare_trained, initial_state
from gptoss_jax.training.step import TrainState, make_train_step, model_weights


def adapted(optimizer, **train):
    """(configuration, state with adapters that all do something, frozen)."""
    config = configured(**{"mode": "lora", "rank": 3, "alpha": 6.0, "targets": LORA_TARGETS} | train)
    state, frozen = initial_state(config, optimizer)
    trained = {name: value + 0.02 * jax.random.normal(jax.random.key(index), value.shape)
               for index, (name, value) in enumerate(state.trained.items())}
    return config, state._replace(trained=trained), frozen


def merged_state(config, trained, frozen, optimizer):
    """The state of full fine-tuning at the weights that base and adapters amount to."""
    full = configured(mode="full")
    state, _ = initial_state(full, optimizer)
    deltas = {name: lora.delta(name, trained, config.train.alpha / config.train.rank) for name in state.trained}
    return full, state._replace(trained={name: value if deltas[name] is None else value + deltas[name] for name, value in state.trained.items()})


def test_adapters_have_the_gradients_that_the_merged_weights_imply():
    """W + s B A has dA = s B^T dW and dB = s dW A^T, for experts one by one; dW by full fine-tuning of the merged weights."""
    config, state, frozen = adapted(keep_gradients())
    full, merged = merged_state(config, state.trained, frozen, keep_gradients())
    trained = jax.tree.map(np.asarray, state.trained)
    state, metrics = make_train_step(config, keep_gradients())(state, frozen, oracle_batch()[1])
    merged, expected = make_train_step(full, keep_gradients())(merged, {}, oracle_batch()[1])
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    scale, implied = config.train.alpha / config.train.rank, {}
    for name, dw in jax.tree.map(np.asarray, merged.opt_state).items():
        first, second = lora.names_of(name)
        if first in trained:
            a, b = trained[first], trained[second]
            if "experts" in name:  # [E, in, r] and [E, r, out]
                implied |= {first: scale * dw @ b.transpose(0, 2, 1), second: scale * a.transpose(0, 2, 1) @ dw}
            else:
                implied |= {first: scale * b.T @ dw, second: scale * dw @ a.T}
    assert implied.keys() == state.opt_state.keys() == declare_trained(config).keys() and len(implied) == 2 * (7 * 2 + 1)
    assert_close(state.opt_state, implied, 2e-5)


def test_adapters_start_at_the_model_itself():
    config = configured(mode="lora", rank=2)
    state, frozen = initial_state(config, optax.sgd(1.0))
    _, metrics = make_train_step(config, optax.sgd(1.0))(state, frozen, oracle_batch()[1])
    np.testing.assert_allclose(metrics["loss"], oracle_batch()[0]["losses"][0], rtol=1e-5)


def test_packed_experts_are_never_dequantised_as_a_whole():
    config, state, frozen = adapted(optax.adamw(1e-3))
    text = make_train_step(config, optax.adamw(1e-3)).lower(state, frozen, oracle_batch()[1]).compile().as_text()
    assert "u8[4,192,2,16]" in text
    for numbers in ("f32", "bf16"):
        for shape in ("4,192,64", "4,64,192", "4,192,2,32", "4,64,96", "4,96,64", "4,64,3,32"):
            assert f"{numbers}[{shape}]" not in text
