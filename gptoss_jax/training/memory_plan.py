"""Whether a training step fits: what stays on a device by arithmetic, temporaries by compiling the very step for the device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax

from gptoss_jax import devices, sharding
from gptoss_jax.devices import Plan
from gptoss_jax.model import cost
from gptoss_jax.training.config import TrainingConfig
from gptoss_jax.training.optimizer import make_optimizer
from gptoss_jax.training.state import abstract_batch, abstract_state
from gptoss_jax.training.step import make_train_step

STEP = "the step"
DEPTHS = (4, 6)  # layers, both with as many that slide as that don't


def by_arithmetic(config: TrainingConfig, memory: int, mesh=None) -> Plan:
    """Return the plan of what stays on a device between steps, exact; gradients and other temporaries are unknown. Raises ShardingError.

    config: resolved. mesh: of devices or abstract, default: the configuration's, abstract.
    """
    mesh = mesh or cost.abstract_mesh(**dataclasses.asdict(config.mesh))
    state, frozen = abstract_state(config, make_optimizer(config.optimizer, config.run.steps), mesh)
    parts = {"trained weights": state.trained, "frozen weights": frozen, "optimizer state": state.opt_state, "batch": abstract_batch(config, mesh)}
    return Plan(memory, {name: cost.shard_bytes(jax.tree.leaves(arrays)) for name, arrays in parts.items() if jax.tree.leaves(arrays)})


def describe(config: TrainingConfig) -> str:
    """Say what a step of a configuration computes."""
    train, data = config.train, config.data
    return f"{train.mode}, batch {data.batch_size} x {data.row_tokens:,} tokens, microbatches {train.microbatches}, {train.compute_dtype}"


def summary(config: TrainingConfig) -> list[str]:
    """Return the lines of a dry run on what stays on each device of the configuration's mesh."""
    plan, count = by_arithmetic(config, 0), math.prod(dataclasses.asdict(config.mesh).values())
    lines = [f"{name} {devices.amount(size)}" for name, size in plan.parts.items()]
    where = "on one device" if count == 1 else f"on each of {count} devices"
    return [f"memory      {where}: {', '.join(lines)}; {devices.amount(plan.kept)} in all, and what a step takes beside it:",
            "            python -m gptoss_jax.plan finds that by compiling the step for --device H100, v5p, cpu, ..."]


def announce(config: TrainingConfig, mesh, write: Callable[[str], None]) -> None:
    """Write a line of what a run will hold on this process's first device. Raises PlanError, the table written, where it has less."""
    mine = 1 if mesh is None else sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
    memory, where = devices.free_here(mine)
    by_arithmetic(config, memory, mesh).announce(where, write)


def compiled(config: TrainingConfig, kind: str, *, all_layers: bool = True) -> Plan:
    """Return the plan of a step compiled for devices of a kind (`devices.KINDS`), as many as the configuration's mesh has.

    all_layers: otherwise what programs of 4 and of 6 layers take is extended in a straight line. Raises DeviceError, ShardingError.
    """
    axes = dataclasses.asdict(config.mesh)
    count = math.prod(axes.values())
    exact = by_arithmetic(config, devices.memory_of_each(kind, count))  # first: what doesn't divide needs no compiler
    mesh = sharding.make_mesh(**axes, devices=devices.described(kind, count))
    layers = config.model.num_hidden_layers
    if all_layers or layers <= DEPTHS[1]:
        padding, temporaries, collectives = _compile(config, mesh, exact)
    else:
        share = (layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
        shallow = [_shallow(config, depth) for depth in DEPTHS]
        few, more = (_compile(each, mesh, by_arithmetic(each, exact.memory, mesh)) for each in shallow)
        padding, temporaries = (round(a + (b - a) * share) for a, b in zip(few[:2], more[:2]))
        collectives = {kind: tuple(round(a + (b - a) * share) for a, b in zip(few[2].get(kind, (0, 0)), sizes)) for kind, sizes in more[2].items()}
    return dataclasses.replace(exact, padding=padding, temporaries={STEP: temporaries}, collectives={STEP: collectives})


def _shallow(config: TrainingConfig, layers: int) -> TrainingConfig:
    model = config.model.replace(num_hidden_layers=layers, layer_types=config.model.layer_types[:layers])
    return dataclasses.replace(config, model=model)


def _compile(config: TrainingConfig, mesh, exact: Plan) -> tuple[int, int, Mapping[str, tuple[int, int]]]:
    """Return (padding, temporaries, collectives) of the step."""
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    arguments = (*abstract_state(config, optimizer, mesh), abstract_batch(config, mesh))
    try:
        step = devices.compile_step(make_train_step(config, optimizer, mesh), *arguments)
    except devices.OutOfMemory as error:
        return 0, error.temporaries(exact), {}
    padding = max(step.memory.arguments_bytes - exact.kept, 0)
    return padding, step.memory.temporaries_bytes + step.memory.outputs_bytes, step.collectives
