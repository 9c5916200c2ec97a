"""Open a checkpoint directory of any layout: find out which it is and verify everything but the numbers, allocating nothing."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from gptoss_jax.checkpoint import original
from gptoss_jax.checkpoint.errors import CheckpointError, check_tensors, count, listed, read_json
from gptoss_jax.checkpoint.safetensors import StoredTensor, read_header, read_shard
from gptoss_jax.config import GptOssConfig
from gptoss_jax.model.weights import Weight, declare

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_ORBAX_MARK = "_CHECKPOINT_METADATA"
_NOT_SIDECARS = (_ORBAX_MARK, "orbax.checkpoint", "commit_success.txt", "orbax_files.json",
                 "dtypes.json")  # describes OpenAI's tensor names
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")
_MAX_SIDECAR_BYTES = 256 << 20
_READERS = 2  # threads: one copies from the page cache while the other waits for a disk or a device

Targets = Mapping[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    weights: every weight as stored, by its Hugging Face name. files: those that hold them. sidecars: the files beside them (configuration, tokenizer,
    license), config.json among them where it is Hugging Face's. read: yields each target as it arrives, in its sharding, dtype as stored or
    float32.
    """

    path: Path
    config: GptOssConfig
    weights: dict[str, Weight]
    files: tuple[Path, ...]
    sidecars: tuple[Path, ...]
    read: Callable[[Targets], Iterator[tuple[str, jax.Array]]]


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Open a Hugging Face directory (MXFP4 or bfloat16 experts), OpenAI's `original/` or the directory that holds it, or an Orbax
    directory made by `convert`. Raises CheckpointError or ConfigError."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: {'a file' if path.exists() else 'no such directory'}, expected a checkpoint directory")
    if (path / _ORBAX_MARK).exists():
        return _open_orbax(path)
    has_weights = (path / INDEX).exists() or any(path.glob("*.safetensors"))
    nested = not has_weights and (path / "original").is_dir()
    folder = path / "original" if nested else path
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder / 'config.json'}: no such file, expected the configuration of a gpt-oss checkpoint")
    content = read_json(folder / "config.json")
    config = GptOssConfig.from_file(folder / "config.json")
    declared = declare(config, packed=config.quantized)
    if "model_type" in content:
        sidecars = sidecars_of(path)
        stored = _read_hugging_face(folder)
        check_tensors(path, stored, declared)
    else:
        sidecars = tuple(file for file in sidecars_of(path) if file.name != "config.json")  # which is OpenAI's
        stored = _read_headers(sorted(folder.glob("*.safetensors")))
        if not stored:
            raise CheckpointError(f"{folder}: no .safetensors file found, expected the weights")
        check_tensors(folder, stored, original.stacked(declared, config))
        stored = original.split(stored, declared, config)
    files = tuple(sorted({tensor.file for tensor in stored.values()}))
    return Checkpoint(path, config, declared, files, sidecars, lambda targets: _read(stored, targets))


def shard_bounds(target: jax.ShapeDtypeStruct) -> dict[jax.Device, tuple[tuple[int, int], ...]]:
    """Return [start, stop) per dim of the part that each device of this process holds."""
    parts = target.sharding.addressable_devices_indices_map(target.shape)
    return {device: tuple(part.indices(size)[:2] for part, size in zip(index, target.shape)) for device, index in parts.items()}


def sidecars_of(path: Path) -> tuple[Path, ...]:
    """Return the files of a checkpoint directory that aren't its weights: configuration, tokenizer, chat template, license, ..."""
    return tuple(file for file in sorted(path.iterdir())
                 if file.is_file() and file.name not in _NOT_SIDECARS and not file.name.endswith(_WEIGHT_SUFFIXES)
                 and file.stat().st_size <= _MAX_SIDECAR_BYTES)


def _open_orbax(path: Path) -> Checkpoint:
    from gptoss_jax.checkpoint import store  # Orbax takes a second to import, and safetensors don't need it

    if not (path / "config.json").exists():
        raise CheckpointError(f"{path / 'config.json'}: no such file, expected beside an Orbax checkpoint made by gptoss_jax.convert")
    config = GptOssConfig.from_file(path / "config.json")
    declared = declare(config, packed=config.quantized)
    check_tensors(path, store.describe(path), declared)
    sidecars = sidecars_of(path)
    files = tuple(file for file in sorted(path.rglob("*")) if file.is_file() and file not in sidecars)
    return Checkpoint(path, config, declared, files, sidecars, lambda targets: store.read(path, targets))


def _read_hugging_face(path: Path) -> dict[str, StoredTensor]:
    if (path / SINGLE).exists():  # transformers' order: the single file wins
        return read_header(path / SINGLE)
    if not (path / INDEX).exists():
        found = count(path.glob("*.safetensors"), "other .safetensors file")
        raise CheckpointError(f"{path}: {found} found, expected {SINGLE} or {INDEX}")
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path / INDEX}: no weight_map found, expected one from tensor names to file names")
    files = sorted(set(weight_map.values()))
    foreign = [file for file in files if Path(file).name != file]
    if foreign:
        raise CheckpointError(f"{path / INDEX}: names {listed(foreign)}, expected files of its own directory")
    absent = [file for file in files if not (path / file).is_file()]
    if absent:
        raise CheckpointError(f"{path / INDEX}: {count(absent, 'file')} it names not found: {listed(absent)}")
    headers = {file: read_header(path / file) for file in files}
    misplaced = [f"{name} in {file}" for name, file in weight_map.items() if name not in headers[file]]
    if misplaced:
        raise CheckpointError(f"{path / INDEX}: {count(misplaced, 'tensor')} not found where it says: {listed(misplaced)}")
    unlisted = [f"{name} in {file}" for file in files for name in headers[file] if weight_map.get(name) != file]
    if unlisted:
        raise CheckpointError(f"{path / INDEX}: {count(unlisted, 'tensor')} found that it doesn't list there: {listed(unlisted)}")
    return {name: headers[file][name] for name, file in weight_map.items()}


def _read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in stored:
                raise CheckpointError(f"{file}: {name} is in {stored[name].file.name} too, expected each tensor once")
            stored[name] = tensor
    return stored


def _read(stored: Mapping[str, StoredTensor], targets: Targets) -> Iterator[tuple[str, jax.Array]]:
    readers = concurrent.futures.ThreadPoolExecutor(_READERS)
    try:
        yield from zip(targets, readers.map(lambda name: _read_array(stored[name], targets[name]), targets))
    finally:
        readers.shutdown(cancel_futures=True)  # after an error or Ctrl-C, read no more


def _read_array(tensor: StoredTensor, target: jax.ShapeDtypeStruct) -> jax.Array:
    """Read the shards that this process's devices hold, each distinct one once, and wait until they are in place.

    On CPU the array takes over the buffers that were read. XLA copies such a buffer before it would write to it (donation), so devices
    can share one.
    """
    shards: dict[tuple, np.ndarray] = {}
    arrays = []
    for device, bounds in shard_bounds(target).items():
        if bounds not in shards:
            shards[bounds] = read_shard(tensor, bounds, np.dtype(target.dtype).name)
        arrays.append(jax.device_put(shards[bounds], device))
    array = jax.make_array_from_single_device_arrays(target.shape, target.sharding, arrays, dtype=target.dtype)
    return jax.block_until_ready(array)
