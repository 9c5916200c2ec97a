"""The Orbax store: packed experts kept, one chunk an expert, written and read a bounded group of weights at a time."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from gptoss_jax.checkpoint.errors import CheckpointError, count, listed, read_json, reason
from gptoss_jax.model.weights import Weight

MANIFEST = "orbax_files.json"
GROUP_BYTES = 256 << 20
_DENSE_CHUNK_BYTES = 32 << 20


def describe(path: Path) -> dict[str, Weight]:
    """Return the weights of an Orbax checkpoint, without axes. Raises CheckpointError when files are missing or truncated, or Orbax can't
    read it."""
    _verify_files(path)
    with _one_line_errors(path, "read"):
        metadata = ocp.metadata(path.absolute()).metadata
    if not isinstance(metadata, dict) or not all(hasattr(array, "shape") for array in metadata.values()):
        raise CheckpointError(f"{path}: damaged, or another kind of Orbax checkpoint: expected a flat tree of named arrays")
    return {name: Weight(tuple(array.shape), np.dtype(array.dtype).name, ()) for name, array in metadata.items()}


def read(path: Path, targets: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, jax.Array]]:
    """Yield each target; each process reads the chunks that overlap its own shards. Raises CheckpointError."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    for names in grouped({name: _device_bytes(target) for name, target in targets.items()}):
        with context, _one_line_errors(path, "read"):
            arrays = jax.block_until_ready(ocp.load(path.absolute(), {name: targets[name] for name in names}))
        yield from ((name, arrays.pop(name)) for name in names)


def write(path: Path, groups: Iterable[dict[str, jax.Array]]) -> None:
    """Write groups of arrays one after the other as one checkpoint, and the sizes of its files; `path` appears when the last is written.

    Raises CheckpointError when Orbax can't.
    """
    context = ocp.Context()
    context.array.saving.use_compression = False  # MXFP4 and bfloat16 weights hardly compress, and zstd costs most of the time
    context.array.saving.scoped_storage_options_creator = _storage
    context.memory.deepcopy_host_arrays = False
    # Ctrl-C reaches the main thread only, which then waits for this one: nobody writes there any more when what is there is removed.
    with context, concurrent.futures.ThreadPoolExecutor(1) as thread:
        run = contextvars.copy_context().run
        for group in groups:  # what reading raises isn't Orbax's
            with _one_line_errors(path, "write"):
                thread.submit(run, ocp.partial.save, path.absolute(), group).result()
        with _one_line_errors(path, "write"):
            thread.submit(run, ocp.partial.finalize, path.absolute()).result()
    sizes = {str(file.relative_to(path)): file.stat().st_size for file in sorted(path.rglob("*")) if file.is_file()}
    (path / MANIFEST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def grouped(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield names in order, `GROUP_BYTES` at a time: an Orbax call costs tens of milliseconds, and holds all it is given."""
    names, size = [], 0
    for name, more in sizes.items():
        if names and size + more > GROUP_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    if names:
        yield names


def _verify_files(path: Path) -> None:
    """Orbax would find out in the middle of loading."""
    if not (path / MANIFEST).exists():  # written by something else than `write`
        return
    sizes = read_json(path / MANIFEST)
    missing = [file for file in sizes if not (path / file).is_file()]
    if missing:
        raise CheckpointError(f"{path}: {count(missing, 'file')} missing: {listed(missing)}")
    wrong = [f"{file} has {found} bytes, expected {size}" for file, size in sizes.items()
             if (found := (path / file).stat().st_size) != size]
    if wrong:
        raise CheckpointError(f"{path}: {count(wrong, 'file')} truncated or changed: {listed(wrong)}")


def _storage(key_path, array) -> ocp.options.ArrayOptions.Saving.StorageOptions:
    """Cut so that a shard is read without its neighbours: experts one by one, dense weights in pieces (along their longest dim)."""
    options = ocp.options.ArrayOptions.Saving.StorageOptions
    if ".experts." in jax.tree_util.keystr(key_path):
        return options(shard_axes=(0,))
    return options(chunk_byte_size=_DENSE_CHUNK_BYTES)


def _device_bytes(target: jax.ShapeDtypeStruct) -> int:
    # The same on every process of a regular mesh, as it must be: Orbax loads are collective.
    shard = math.prod(target.sharding.shard_shape(target.shape)) * np.dtype(target.dtype).itemsize
    return shard * len(target.sharding.addressable_devices)


@contextlib.contextmanager
def _one_line_errors(path: Path, verb: str) -> Iterator[None]:
    """Orbax and TensorStore raise whatever their storage did, often over many lines, and Orbax logs it before that."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{path}: Orbax can't {verb} it: {reason(error)}") from error
    finally:
        logger.setLevel(level)
