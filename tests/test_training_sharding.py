"""The same training on eight devices as on one."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from test_step import configured

from gptoss_jax import sharding
from gptoss_jax.training.config import DataConfig, MeshConfig
from gptoss_jax.training.state import abstract_state, initial_state, place_batch, resolve, training_mesh
from gptoss_jax.training.step import Batch, make_train_step

ROWS, TOKENS, STEPS = 8, 24, 4


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = rng.integers(0, 512, (ROWS, TOKENS + 1)).astype(np.int32)
        lengths = rng.integers(6, 18, ROWS)[:, None]  # two segments a row, and padding after the second
        column = np.arange(TOKENS)[None]
        segments = np.where(column < lengths, 1, np.where(column < TOKENS - 2, 2, 0)).astype(np.int32)
        positions = np.where(segments == 1, column, column - lengths).astype(np.int32)
        yield Batch(tokens[:, :-1], tokens[:, 1:], (segments > 0).astype(np.float32), segments, positions)


def losses_of(mesh=MeshConfig(), **train):
    config = dataclasses.replace(configured(**train), mesh=mesh, data=DataConfig(batch_size=ROWS, row_tokens=TOKENS))
    optimizer = optax.adamw(1e-3)
    mesh = training_mesh(config)
    state, frozen = initial_state(config, optimizer, mesh)
    step, losses = make_train_step(config, optimizer, mesh), []
    for batch in batches():
        state, metrics = step(state, frozen, place_batch(batch, mesh))
        losses.append(metrics["loss"])
    if mesh is not None:
        stored, _ = abstract_state(config, optimizer, mesh)
        jax.tree.map(lambda found, declared: found.sharding.is_equivalent_to(declared.sharding, found.ndim) or pytest.fail(str(found.sharding)),
                     state, stored)
    return np.array(losses)


@pytest.fixture(scope="module")
def expected():
    return {mode: losses_of(mode=mode, z_coefficient=0.1) for mode in ("full", "lora")}


@pytest.mark.parametrize(("mode", "mesh", "train"), [
    ("full", MeshConfig(data=2, fsdp=2, expert=2), {}),
    ("full", MeshConfig(fsdp=2, tensor=2, context=2), {"microbatches": 2}),
    ("lora", MeshConfig(fsdp=2, expert=4), {"targets": ("attention", "experts")}),
    ("lora", MeshConfig(data=2, expert=2, context=2), {"expert_transport": "all_to_all"}),
    ("full", MeshConfig(expert=4, tensor=2), {"expert_transport": "all_to_all"}),
], ids=str)
def test_losses_on_a_mesh_are_those_of_one_device(mode, mesh, train, expected):
    np.testing.assert_allclose(losses_of(mesh, mode=mode, z_coefficient=0.1, **train), expected[mode], rtol=1e-5)
    assert expected[mode][-1] < expected[mode][0]
