"""What a training run holds: the state that is saved, the weights that stay frozen, and where on the mesh both lie."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from gptoss_jax import mxfp4, sharding
from gptoss_jax.checkpoint import load_weights
from gptoss_jax.checkpoint.loading import load_targets, resolve as resolve_path
from gptoss_jax.checkpoint.opening import open_checkpoint
from gptoss_jax.config import GptOssConfig
from gptoss_jax.kernels import hopper
from gptoss_jax.kernels.expert_matmul.hopper_layout import LARGEST_SCALE
from gptoss_jax.model import lora
from gptoss_jax.model.weights import Weight, declare, initialize
from gptoss_jax.training.config import TrainingConfig, TrainingConfigError

Weights = dict[str, jax.Array]


class TrainState(NamedTuple):
    """step int32; trained: float32 by Hugging Face name, every weight (experts dense [E, in, out]) or the adapters; opt_state: optax's."""

    step: jax.Array
    trained: Weights
    opt_state: Any


class Batch(NamedTuple):
    """Packed rows [B, T]: tokens int32; targets int32, the next token; loss_weights float32; segment_ids int32, 0 is padding."""

    tokens: jax.Array
    targets: jax.Array
    loss_weights: jax.Array
    segment_ids: jax.Array
    positions: jax.Array


def resolve(config: TrainingConfig, stand_in: GptOssConfig | None = None) -> TrainingConfig:
    """Return the configuration with the model that `init.checkpoint` holds, or with `stand_in` for a checkpoint that isn't there to be opened.

    Raises TrainingConfigError for what doesn't fit together, and what opening the checkpoint raises; nothing is allocated.
    """
    train, path = config.train, config.init.checkpoint
    if path:
        if config.model is not None:
            raise TrainingConfigError(f"model: a section found with init.checkpoint {path!r}, expected none: the checkpoint has its own")
        config = dataclasses.replace(config, model=stand_in or open_checkpoint(resolve_path(path)).config)
    elif config.model is None:
        raise TrainingConfigError("model: missing, expected the section or init.checkpoint")
    if train.mode == "lora":
        if not path:
            raise TrainingConfigError("init.checkpoint: none found, expected one with train.mode lora")
        if not train.targets:
            raise TrainingConfigError("train.targets: none found, expected what the adapters are of")
        if not config.model.quantized:
            raise TrainingConfigError(f"init.checkpoint: {path!r} has bfloat16 experts, expected MXFP4 with train.mode lora")
    for field in () if config.model.quantized else ("hidden_size", "intermediate_size"):
        if (size := getattr(config.model, field)) % mxfp4.BLOCK:
            raise TrainingConfigError(f"{'init.checkpoint' if path else 'model'}: {field} is {size}, expected a multiple of {mxfp4.BLOCK}: experts are "
                                      "exported in MXFP4's blocks")
    rows, context = config.data.batch_size, config.mesh.context
    split = config.mesh.data * config.mesh.fsdp * config.mesh.expert
    if rows % (train.microbatches * split):
        raise TrainingConfigError(f"data.batch_size: {rows} found, expected a multiple of {train.microbatches * split}: train.microbatches "
                                  f"{train.microbatches} x mesh data {config.mesh.data} x fsdp {config.mesh.fsdp} x expert {config.mesh.expert}")
    if config.data.row_tokens % context:
        raise TrainingConfigError(f"data.row_tokens: {config.data.row_tokens} found, expected a multiple of {context}, mesh.context")
    return config


def training_mesh(config: TrainingConfig) -> Mesh | None:
    """Return the mesh of all devices, or None for the first device alone. Raises ShardingError where sizes don't fit the devices."""
    sizes = dataclasses.asdict(config.mesh)
    return sharding.make_mesh(**sizes) if math.prod(sizes.values()) > 1 or jax.process_count() > 1 else None


def declare_trained(config: TrainingConfig) -> dict[str, Weight]:
    """Return what is trained, float32, by name: every weight, or the adapters."""
    if config.train.mode == "lora":
        return lora.declare_adapters(config.model, config.train.rank, config.train.targets)
    return declare(config.model, dtype="float32", packed=False)


def declare_frozen(config: TrainingConfig) -> dict[str, Weight]:
    """Return what stays as it is: with adapters the checkpoint, experts packed, all else in `compute_dtype`; otherwise nothing."""
    return declare(config.model, dtype=config.train.compute_dtype, packed=True) if config.train.mode == "lora" else {}


def abstract_state(config: TrainingConfig, optimizer: optax.GradientTransformation, mesh: Mesh | None = None) -> tuple[TrainState, Weights]:
    """Return (state, frozen weights) as ShapeDtypeStructs with shardings: to restore into, to compile for. Raises ShardingError."""
    trained = load_targets(declare_trained(config), mesh)
    place = SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else NamedSharding(mesh, PartitionSpec())

    def placed(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # An optimizer's array of a weight's name and shape lies where the weight does.
        like = trained.get(getattr(path[-1], "key", None)) if path else None
        at = like.sharding if like is not None and like.shape == leaf.shape else place
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)

    opt_state = jax.tree_util.tree_map_with_path(placed, jax.eval_shape(optimizer.init, trained))
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=place), trained, opt_state)
    return state, load_targets(declare_frozen(config), mesh)


def initial_state(config: TrainingConfig, optimizer: optax.GradientTransformation, mesh: Mesh | None = None,
                  weights: Weights | None = None) -> tuple[TrainState, Weights]:
    """Return (state at step 0, frozen weights): of `init.checkpoint`, or random from `run.seed`, with an empty optimizer state.

    weights: to start from instead, as `declare_frozen` has them with adapters, otherwise as `declare_trained` has.
    """
    abstract, _ = abstract_state(config, optimizer, mesh)
    if config.train.mode == "lora":
        trained = lora.initialize_adapters(declare_trained(config), config.run.seed)
    elif weights is not None:
        trained = weights
    elif config.init.checkpoint:
        trained = _unpacked(load_weights(resolve_path(config.init.checkpoint), dtype="float32", mesh=mesh)[1])
    else:
        trained = initialize(declare_trained(config), config.run.seed, stddev=0.05,
                             residual_stddev=0.05 / (2 * config.model.num_hidden_layers) ** 0.5)
    trained = {name: jax.device_put(trained[name], target.sharding) for name, target in abstract.trained.items()}
    opt_state = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state))(trained)
    frozen = load_frozen(config, mesh) if weights is None or config.train.mode != "lora" else weights
    return TrainState(jax.device_put(jnp.int32(0), abstract.step.sharding), trained, opt_state), frozen


def load_frozen(config: TrainingConfig, mesh: Mesh | None = None) -> Weights:
    """Return the weights that aren't trained, from `init.checkpoint`. Raises TrainingConfigError for experts that a kernel would take for infinite."""
    if config.train.mode != "lora":
        return {}
    frozen = load_weights(resolve_path(config.init.checkpoint), dtype=config.train.compute_dtype, mesh=mesh)[1]
    if config.train.compute_dtype == "bfloat16" and hopper.is_hopper(jax.local_devices()[0]):  # in a traced step nobody can look
        for name, scales in frozen.items():
            if name.endswith("_scales") and (largest := int(scales.max())) > LARGEST_SCALE:
                raise TrainingConfigError(f"init.checkpoint {config.init.checkpoint}: {name} has a scale byte of {largest}, expected at most "
                                          f"{LARGEST_SCALE} to train adapters above it on a Hopper GPU")
    return frozen


def data_part(mesh: Mesh | None) -> tuple[int, int]:
    """Return (index, count): of so many equal parts of a batch's rows, the one that this process's devices compute."""
    if mesh is None:
        return 0, 1
    axes = sharding.COMPUTE_RULES["batch"]
    devices = np.moveaxis(mesh.devices, [mesh.axis_names.index(axis) for axis in axes], range(len(axes)))
    split = math.prod(devices.shape[: len(axes)])
    owners = np.vectorize(lambda device: device.process_index)(devices.reshape(split, -1))
    mine = np.flatnonzero((owners == jax.process_index()).any(axis=1))
    first, size = int(mine[0]), len(mine)
    whole = size == mine[-1] - first + 1 and first % size == 0 and split % size == 0
    return (first // size, split // size) if whole else (0, 1)  # rows that don't lie together: all of them


def abstract_batch(config: TrainingConfig, mesh: Mesh) -> Batch:
    """Return a batch as ShapeDtypeStructs with shardings."""
    shape = (config.data.batch_size, config.data.row_tokens)
    place = NamedSharding(mesh, sharding.compute_spec(shape, ("batch", "tokens"), mesh))
    return Batch(*(jax.ShapeDtypeStruct(shape, jnp.float32 if name == "loss_weights" else jnp.int32, sharding=place) for name in Batch._fields))


def place_batch(batch: Batch, mesh: Mesh | None = None) -> Batch:
    """Return this process's rows of a batch as parts of global arrays on the mesh; without a mesh, as it is."""
    if mesh is None:
        return batch
    which, count = data_part(mesh)

    def place(rows: Any) -> jax.Array:
        rows = np.asarray(rows)
        first = which * len(rows)
        shape = (len(rows) * count, *rows.shape[1:])
        spec = sharding.compute_spec(shape, ("batch", "tokens"), mesh)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            assert first <= start and stop <= first + len(rows), "a process holds other rows than its devices compute"
            return rows[start - first : stop - first, index[1]]

        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), part)

    return jax.tree.map(place, batch)


def _unpacked(weights: Weights) -> Weights:
    """Return packed experts as matrices [E, in, out], everything in float32 where it was."""
    decode = jax.jit(lambda blocks, scales: jnp.swapaxes(mxfp4.decode(blocks, scales), 1, 2))
    dense = {name: value for name, value in weights.items() if not name.endswith(("_blocks", "_scales"))}
    for name in [name for name in weights if name.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        dense[stem] = decode(weights[name], weights[f"{stem}_scales"])
    return dense
