"""The same training on eight devices as on one."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from test_step import configured, random_batches, quickly_compiled, small_checkpoint  # noqa: F401 (fixtures)

from gptoss_jax.training.config import MeshConfig, TrainingConfigError
from gptoss_jax.training.state import abstract_state, initial_state, place_batch, resolve, training_mesh
from gptoss_jax.training.step import make_train_step

STEPS = 20


def losses_of(path, mesh=MeshConfig(), **train):
    config = resolve(dataclasses.replace(configured(path, z_coefficient=0.1, **train), mesh=mesh, model=None))
    optimizer = optax.adamw(1e-3)
    mesh = training_mesh(config)
    state, frozen = initial_state(config, optimizer, mesh)
    step, losses = make_train_step(config, optimizer, mesh), []
    for batch in random_batches(STEPS):
        state, metrics = step(state, frozen, place_batch(batch, mesh))
        losses.append(metrics["loss"])
    if mesh is not None:
        stored, _ = abstract_state(config, optimizer, mesh)
        jax.tree.map(lambda found, declared: found.sharding.is_equivalent_to(declared.sharding, found.ndim) or pytest.fail(str(found.sharding)),
                     state, stored)
    return np.array(losses)


@pytest.fixture(scope="module")
def expected(small_checkpoint):  # noqa: F811
    return {mode: losses_of(small_checkpoint, mode=mode) for mode in ("full", "lora")}


@pytest.mark.parametrize(("mode", "mesh", "train"), [
    ("lora", MeshConfig(data=2, fsdp=2, expert=2), {}),
    ("lora", MeshConfig(expert=2, tensor=2, context=2), {"expert_transport": "all_to_all"}),
    ("full", MeshConfig(fsdp=2, tensor=2, context=2), {"microbatches": 2}),
    ("full", MeshConfig(expert=2, context=4), {}),
], ids=str)
def test_losses_on_a_mesh_are_those_of_one_device(mode, mesh, train, small_checkpoint, expected):  # noqa: F811
    np.testing.assert_allclose(losses_of(small_checkpoint, mesh, mode=mode, **train), expected[mode], rtol=1e-5)
    assert expected[mode][-1] < expected[mode][0]


@pytest.mark.parametrize(("mesh", "message"), [
    (MeshConfig(data=16), "data.batch_size: 8 found, expected a multiple of 16"),
    (MeshConfig(context=7), "data.row_tokens: 24 found, expected a multiple of 7, mesh.context"),
])
def test_a_batch_that_does_not_divide_is_refused(mesh, message):
    with pytest.raises(TrainingConfigError, match=message):
        resolve(dataclasses.replace(configured(), mesh=mesh))
