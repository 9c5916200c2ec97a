"""Meshes and shardings: two tables say how logical axes lie on mesh axes, one for stored weights, one for computed arrays.

Mesh axes: `data`, `fsdp` and `expert` split the batch; `fsdp` the weights too, which are gathered when used, and `expert` the experts, to
which tokens travel. `tensor` splits heads, expert hidden width and vocabulary, `context` the tokens of a row. An axis of size one costs
nothing, so every mesh has all five.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")

STORAGE_RULES: dict[str, tuple[str, ...]] = {
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "expert": ("expert", "fsdp"),
    "expert_hidden": ("tensor",),
}
COMPUTE_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "tokens": ("context",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "expert": ("expert",),
    "expert_hidden": ("tensor",),
}


class ShardingError(ValueError):
    """A mesh that doesn't fit: names the array, the dim, its size, the mesh axes and their sizes."""


def make_mesh(*, data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1, context: int = 1,
              devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh of the five axes over `devices` (default: all), axis types Auto. Raises ShardingError when the sizes don't multiply
    to the number of devices."""
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor, "context": context}
    devices = jax.devices() if devices is None else devices
    if math.prod(sizes.values()) != len(devices):
        stated = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ShardingError(f"mesh {stated} needs {math.prod(sizes.values())} devices, {len(devices)} given")
    types = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # of a TPU's torus, where no sides multiply to an axis: that one gets a part of a side
        return Mesh(mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True), MESH_AXES, axis_types=types)


def partition_spec(axes: Sequence[str | None], rules: Mapping[str, tuple[str, ...]], mesh: Mesh) -> PartitionSpec:
    """Return the PartitionSpec of logical `axes` under `rules`, without the mesh axes of size one or absent from the mesh.

    Raises ShardingError when two dims would lie on one mesh axis.
    """
    dims, taken = [], set()
    for axis in axes:
        names = tuple(name for name in rules.get(axis, ()) if mesh.shape.get(name, 1) > 1)
        if taken & set(names):
            raise ShardingError(f"logical axes {tuple(axes)}: mesh axis {sorted(taken & set(names))[0]!r} would split two dims")
        taken |= set(names)
        dims.append(names if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*dims)


def named_sharding(name: str, shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh,
                   rules: Mapping[str, tuple[str, ...]] = STORAGE_RULES) -> NamedSharding:
    """Return the sharding of one array. Raises ShardingError naming it when a dim doesn't divide by its mesh axes."""
    spec = partition_spec(axes, rules, mesh)
    for dim, (size, names) in enumerate(zip(shape, spec)):
        names = (names,) if isinstance(names, str) else names or ()
        split = math.prod(mesh.shape[axis] for axis in names)
        if size % split:
            stated = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in names)
            raise ShardingError(f"{name}: dim {dim} of {tuple(shape)} ({axes[dim]}) has {size} entries, which mesh axes {stated} don't divide")
    return NamedSharding(mesh, spec)


def shardings(declared: Mapping[str, object], mesh: Mesh | AbstractMesh) -> dict[str, NamedSharding]:
    """Return the storage sharding of each declared weight (`model.weights.declare`). Raises ShardingError."""
    return {name: named_sharding(name, weight.shape, weight.axes, mesh) for name, weight in declared.items()}


def abstract(declared: Mapping[str, object], mesh: Mesh | AbstractMesh | None, device: jax.Device | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape, dtype and storage sharding of each declared weight; without a mesh on `device`, nowhere where None. Raises ShardingError."""
    single = None if device is None else jax.sharding.SingleDeviceSharding(device)
    places = dict.fromkeys(declared, single) if mesh is None else shardings(declared, mesh)
    return {name: jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=places[name]) for name, weight in declared.items()}


def compute_spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Return how COMPUTE_RULES lay out an array; a dim is split by as many of its mesh axes, from the first on, as divide it."""
    dims = []
    for size, names in zip(shape, partition_spec(axes, COMPUTE_RULES, mesh)):
        names = (names,) if isinstance(names, str) else names or ()
        while size % split_of(names, mesh):
            names = names[:-1]
        dims.append(names if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*dims)


def constrain(x: jax.Array, axes: Sequence[str | None], mesh: Mesh | AbstractMesh | None) -> jax.Array:
    """Ask the compiler to lay out `x` by COMPUTE_RULES, see `compute_spec`; the identity without a mesh."""
    placed = computed_sharding(x.shape, axes, mesh)
    return x if placed is None else jax.lax.with_sharding_constraint(x, placed)


def computed_sharding(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh | None) -> NamedSharding | None:
    """Return the sharding of a computed array by COMPUTE_RULES, see `compute_spec`; None without a mesh."""
    return None if mesh is None or mesh.size == 1 else NamedSharding(mesh, compute_spec(shape, axes, mesh))


def ambient_mesh() -> Mesh | AbstractMesh | None:
    """Return the mesh of `jax.set_mesh`, inside a traced function too, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    return mesh if isinstance(jnp.zeros(()), jax.core.Tracer) else jax.sharding.get_mesh()


def split_of(names: str | tuple[str, ...] | None, mesh) -> int:
    """Return into how many parts a PartitionSpec entry splits its dim."""
    names = (names,) if isinstance(names, str) else names or ()
    return int(np.prod([mesh.shape[axis] for axis in names]))
