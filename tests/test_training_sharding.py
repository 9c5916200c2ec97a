"""The same training on eight devices as on one."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from test_step import configured, random_batches, small_checkpoint  # noqa: F401 (fixtures)

from gptoss_jax.config import GptOssConfig
from gptoss_jax.training.config import MeshConfig, OptimizerConfig, TrainingConfigError
from gptoss_jax.training.optimizer import make_optimizer
from gptoss_jax.training.state import abstract_state, initial_state, place_batch, resolve, training_mesh
from gptoss_jax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("quickly_compiled")
STEPS = 20


def losses_of(path, mesh=MeshConfig(), learning_rate=1e-3, **train):
    config = resolve(dataclasses.replace(configured(path, z_coefficient=0.1, **train), mesh=mesh, model=None))
    optimizer = optax.adamw(learning_rate)
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


def test_adafactor_keeps_rows_and_columns_and_updates_alike_on_a_mesh():
    """Of a matrix with m x n entries its state has m + n, wherever the weight's shards lie; what is too small for that lies with its weight."""
    model = GptOssConfig(vocab_size=320, hidden_size=256, intermediate_size=128, num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=1,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=20)
    config = resolve(dataclasses.replace(configured(), model=model, mesh=MeshConfig(fsdp=2, expert=2, tensor=2)))
    optimizer, mesh = make_optimizer(OptimizerConfig(kind="adafactor", warmup_steps=0), 10), training_mesh(config)
    (alone, _), (spread, _) = abstract_state(config, optimizer), abstract_state(config, optimizer, mesh)
    matrix, small = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.router.weight"
    sizes = {name: sum(leaf.size for path, leaf in jax.tree.leaves_with_path(alone.opt_state) if path[-1] == jax.tree_util.DictKey(name))
             for name in (matrix, small)}
    assert sizes == {matrix: 4 * (256 + 256) + 1, small: 4 * 256 + 2}  # four experts' rows and columns; and placeholders
    moments = next(part for part in jax.tree.leaves(spread.opt_state, is_leaf=lambda x: hasattr(x, "v_row")) if hasattr(part, "v_row"))
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert moments.v[bias].sharding == spread.trained[bias].sharding and not moments.v[bias].sharding.is_fully_replicated
    random = np.random.default_rng(0)
    gradients, weights = ({name: random.standard_normal(array.shape, np.float32) for name, array in alone.trained.items()} for _ in range(2))

    @jax.jit
    def updated(gradients, weights):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(gradients, optimizer.init(weights), weights)[0]

    places = {name: array.sharding for name, array in spread.trained.items()}
    expected, found = updated(gradients, weights), updated(*(jax.device_put(tree, places) for tree in (gradients, weights)))
    for name, update in expected.items():
        np.testing.assert_allclose(found[name], update, rtol=1e-5, atol=1e-9, err_msg=name)
    assert 0.5e-3 < np.sqrt((np.asarray(expected[matrix]) ** 2).mean()) < 1.2e-3  # the rate's size, as AdamW's


@pytest.mark.parametrize(("mesh", "message"), [
    (MeshConfig(data=16), "data.batch_size: 8 found, expected a multiple of 16"),
    (MeshConfig(context=7), "data.row_tokens: 24 found, expected a multiple of 7, mesh.context"),
])
def test_a_batch_that_does_not_divide_is_refused(mesh, message):
    with pytest.raises(TrainingConfigError, match=message):
        resolve(dataclasses.replace(configured(), mesh=mesh))
