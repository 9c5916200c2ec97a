"""Write a Hugging Face directory, tensor by tensor: MXFP4 experts as they are, or as plain bfloat16 matrices."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax import mxfp4
from gptoss_jax.checkpoint import safetensors
from gptoss_jax.checkpoint.conversion import write_json, write_sidecars
from gptoss_jax.checkpoint.destination import appearing, check_destination
from gptoss_jax.checkpoint.errors import CheckpointError, check_tensors, read_json
from gptoss_jax.checkpoint.loading import load_targets
from gptoss_jax.checkpoint.opening import INDEX, SINGLE, Checkpoint, open_checkpoint, sidecars_of
from gptoss_jax.config import ConfigError, GptOssConfig
from gptoss_jax.model.weights import Weight, declare

FORMATS = ("mxfp4", "bfloat16")
MAX_SHARD_BYTES = 5_000_000_000  # transformers' own


def save_huggingface(path: str | os.PathLike, config: GptOssConfig, weights: Mapping[str, jax.Array | np.ndarray], *,
                     sidecars_from: str | os.PathLike | None = None, format: str = "mxfp4", overwrite: bool = False,
                     max_shard_bytes: int = MAX_SHARD_BYTES, progress: Callable[[int, int], None] | None = None) -> None:
    """Write weights as a Hugging Face directory that transformers and other engines load.

    weights: by Hugging Face name, as `declare` declares them, experts packed or as matrices [E, in, out]; dense ones in bfloat16 or
    float32 (rounded to bfloat16, the only dtype gpt-oss is published in). format: "mxfp4" keeps packed experts bit for bit and encodes
    matrices; "bfloat16" keeps matrices and decodes packed experts. sidecars_from: a checkpoint directory whose other files (tokenizer,
    generation_config.json, ...) are copied byte for byte, its config.json too where it says the same as `config`.

    Weights are looked up one at a time, when they are written. The directory appears when it is complete; one that is there is replaced
    with `overwrite` only. Raises CheckpointError when weights don't fit the configuration, or Mxfp4Error for numbers MXFP4 can't hold.
    """
    sidecars = () if sidecars_from is None else sidecars_of(Path(sidecars_from))
    _save(Path(path), config, weights, sidecars, None, format, overwrite, max_shard_bytes, progress)


def export(source: str | os.PathLike, destination: str | os.PathLike, *, format: str | None = None, overwrite: bool = False,
           max_shard_bytes: int = MAX_SHARD_BYTES, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the checkpoint `source` (any layout) as a Hugging Face directory; see `save_huggingface`. format None: as stored.

    Holds one stored weight at a time, and of a decoded or encoded one a single expert.
    """
    checkpoint = open_checkpoint(source)
    format = format or ("mxfp4" if checkpoint.config.quantized else "bfloat16")
    _save(Path(destination), checkpoint.config, _Stored(checkpoint), checkpoint.sidecars, checkpoint.path, format, overwrite,
          max_shard_bytes, progress)


def save_retrained(path: str | os.PathLike, source: str | os.PathLike, trained: Mapping[str, Callable], *, overwrite: bool = False,
                   max_shard_bytes: int = MAX_SHARD_BYTES, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the checkpoint `source`, whose experts are packed, with what was trained since, as a Hugging Face directory with MXFP4 experts.

    trained: by name in `declare(config, packed=False)` a function from the source's numbers, float32, to the trained ones: of a weight
    (numbers) -> numbers, of an expert matrix (numbers [in, out], expert) -> numbers. Weights that aren't named keep their bytes, and so does
    every block of 32 numbers that training left as they were. Raises CheckpointError, or Mxfp4Error for numbers MXFP4 can't hold.
    """
    checkpoint = open_checkpoint(source)
    if not checkpoint.config.quantized:
        raise CheckpointError(f"{source}: bfloat16 experts found, expected MXFP4")
    _save(Path(path), checkpoint.config, _Retrained(checkpoint, trained), checkpoint.sidecars, checkpoint.path, "mxfp4", overwrite,
          max_shard_bytes, progress)


class _Stored(Mapping):
    """The weights of a checkpoint, read when looked up."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint, self._targets = checkpoint, load_targets(checkpoint.weights, None)

    def __getitem__(self, name: str) -> np.ndarray:
        (_, array), = self._checkpoint.read({name: self._targets[name]})
        return np.asarray(array)

    def __iter__(self):
        return iter(self._targets)

    def __len__(self):
        return len(self._targets)

    def __contains__(self, name) -> bool:  # Mapping's own would read the weight
        return name in self._targets


class _Retrained(_Stored):
    """The same, with what was trained since."""

    def __init__(self, checkpoint: Checkpoint, trained: Mapping[str, Callable]):
        super().__init__(checkpoint)
        self._trained = trained
        self._scales: dict[str, np.ndarray] = {}  # made with the blocks, looked up after them

    def __getitem__(self, name: str) -> np.ndarray:
        stem = name.removesuffix("_blocks")
        if name in self._scales:
            return self._scales.pop(name)
        if name in self._trained:
            return np.asarray(self._trained[name](super().__getitem__(name).astype(np.float32))).astype(safetensors.NUMPY_DTYPES["bfloat16"])
        if name == stem or stem not in self._trained:
            return super().__getitem__(name)
        blocks, scales = (super(_Retrained, self).__getitem__(f"{stem}_{part}").copy() for part in ("blocks", "scales"))
        for expert in range(len(blocks)):
            before = np.asarray(_decode(blocks[expert], scales[expert], "float32"))
            after = np.asarray(self._trained[stem](before, expert))
            if not np.isfinite(after).all():
                raise mxfp4.Mxfp4Error(f"{stem}: an infinity or NaN found in expert {expert}, expected finite numbers")
            # [in, out] -> [out, in/32]: encoded anew, a block could get another scale for the same numbers.
            changed = (after != before).T.reshape(*scales[expert].shape, mxfp4.BLOCK).any(axis=-1)
            new_blocks, new_scales = map(np.asarray, _encode(after))
            blocks[expert][changed], scales[expert][changed] = new_blocks[changed], new_scales[changed]
        self._scales[f"{stem}_scales"] = scales
        return blocks


def _save(path, config, weights, sidecars, source, format, overwrite, max_shard_bytes, progress) -> None:
    if format not in FORMATS:
        raise CheckpointError(f"format: {format!r} found, expected {' or '.join(map(repr, FORMATS))}")
    config = config.replace(quantized=format == "mxfp4")
    packed = any(name.endswith("_blocks") for name in weights)
    _check(path, weights, declare(config, packed=packed))
    shards = _shards(declare(config, packed=config.quantized), max_shard_bytes)
    total = sum(safetensors.num_bytes(weight) for shard in shards.values() for weight in shard.values())
    check_destination(path, overwrite=overwrite, source=source, num_bytes=total)
    done = 0

    def written(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    experts = _Experts(weights)
    with appearing(path, overwrite=overwrite) as folder:
        folder.mkdir()
        for file, shard in shards.items():
            safetensors.write_file(folder / file, shard, ((name, experts.pieces(name, weight)) for name, weight in shard.items()), written)
        if len(shards) > 1:
            weight_map = {name: file for file, shard in shards.items() for name in shard}
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
        _write_config(folder, config, sidecars)


def _check(path: Path, weights: Mapping, declared: dict[str, Weight]) -> None:
    if isinstance(weights, _Stored):  # verified when it was opened
        return
    found = {}
    for name, array in weights.items():
        dtype = np.dtype(array.dtype).name
        rounded = name in declared and declared[name].dtype == "bfloat16" and dtype == "float32"
        found[name] = Weight(tuple(array.shape), "bfloat16" if rounded else dtype, ())
        if not getattr(array, "is_fully_addressable", True):
            raise CheckpointError(f"{name}: only partly on this process, expected weights that this process holds entirely")
    check_tensors(path, found, declared)


def _shards(declared: dict[str, Weight], max_bytes: int) -> dict[str, dict[str, Weight]]:
    """Cut in the declared order, and name files as transformers does. Inside a file wide dtypes come first, which keeps all aligned."""
    shards: list[dict[str, Weight]] = [{}]
    size = 0
    for name, weight in declared.items():
        more = safetensors.num_bytes(weight)
        if shards[-1] and size + more > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += more
    shards = [dict(sorted(shard.items(), key=lambda item: item[1].dtype == "uint8")) for shard in shards]
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


class _Experts:
    """The stored form of each weight, from whichever form it is in, an expert at a time."""

    def __init__(self, weights: Mapping[str, jax.Array | np.ndarray]):
        self._weights = weights
        self._scales: dict[str, np.ndarray] = {}  # made with the blocks, written after them

    def pieces(self, name: str, weight: Weight) -> Iterator[np.ndarray]:
        """Yield the row-major bytes of a weight in runs."""
        if name in self._scales:
            yield self._scales.pop(name)
        elif name in self._weights:
            yield np.asarray(self._weights[name]).astype(safetensors.NUMPY_DTYPES[weight.dtype], copy=False)
        elif name.endswith("_blocks"):
            yield from self._encoded(name.removesuffix("_blocks"))
        else:
            yield from self._decoded(name)

    def _encoded(self, name: str) -> Iterator[np.ndarray]:
        matrices = np.asarray(self._weights[name])
        scales = []
        for matrix in matrices:
            if not np.isfinite(matrix.astype(np.float32)).all():
                raise mxfp4.Mxfp4Error(f"{name}: an infinity or NaN found, expected finite numbers")
            blocks, scale = _encode(matrix)
            scales.append(np.asarray(scale))
            yield np.asarray(blocks)
        self._scales[f"{name}_scales"] = np.stack(scales)

    def _decoded(self, name: str) -> Iterator[np.ndarray]:
        blocks, scales = (np.asarray(self._weights[f"{name}_{part}"]) for part in ("blocks", "scales"))
        for expert in range(len(blocks)):
            yield np.asarray(_decode(blocks[expert], scales[expert]))


@jax.jit
def _encode(matrix):  # [in, out] -> [out, in/32, 16], [out, in/32]
    return mxfp4.encode(matrix.T.astype(jnp.float32), steady=True)  # weights often come from MXFP4, and what an adapter adds is small


@functools.partial(jax.jit, static_argnames="dtype")
def _decode(blocks, scales, dtype="bfloat16"):  # [out, in/32, 16], [out, in/32] -> [in, out]
    return mxfp4.decode(blocks, scales, dtype).T


def _write_config(folder: Path, config: GptOssConfig, sidecars: tuple[Path, ...]) -> None:
    """Keep the source's config.json where it says the same; where only the format of the experts differs, change nothing else in it."""
    theirs = next((file for file in sidecars if file.name == "config.json"), None)
    others = tuple(file for file in sidecars if file is not theirs)
    if theirs is not None:
        content = read_json(theirs)
        try:
            read = GptOssConfig.from_json(content)
        except ConfigError:
            read = None
        if read == config:
            return write_sidecars(folder, sidecars, default_config={})
        if read is not None and read.replace(quantized=config.quantized) == config:
            return write_sidecars(folder, others, default_config=_with_format(content, config))
    write_sidecars(folder, others, default_config=_with_format(config.to_json(), config))


def _with_format(content: dict, config: GptOssConfig) -> dict:
    content = dict(content)
    if config.quantized:
        content["quantization_config"] = config.to_json()["quantization_config"]
    else:
        content.pop("quantization_config", None)
        content |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}  # newer and older transformers' names
    return content
