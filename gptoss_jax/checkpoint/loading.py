"""Load weights: any layout, any mesh."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from gptoss_jax.checkpoint.errors import CheckpointError
from gptoss_jax.checkpoint.opening import open_checkpoint, shard_bounds
from gptoss_jax.config import GptOssConfig
from gptoss_jax.model import GptOss
from gptoss_jax.model.weights import Weight, declare
from gptoss_jax.sharding import abstract
from gptoss_jax.text import tokenizer
from gptoss_jax.text.tokenizer import Tokenizer

DTYPES = ("bfloat16", "float32")
_TINY = Path(__file__).parents[1] / "assets" / "tiny"


def load(path: str | os.PathLike, *, dtype: str = "bfloat16", mesh: jax.sharding.Mesh | None = None,
         progress: Callable[[int, int], None] | None = None, admit: Callable[[GptOssConfig], None] | None = None) -> GptOss:
    """Load a model from a checkpoint of any layout, or the embedded one with path "tiny"; otherwise as `load_weights`."""
    config, weights = load_weights(resolve(path), dtype=dtype, mesh=mesh, progress=progress, admit=admit)
    return GptOss(config, weights, mesh=mesh)


def resolve(path: str | os.PathLike) -> Path:
    """Return the directory that a `path` given by the user means: "tiny" is the embedded checkpoint."""
    return _TINY if os.fspath(path) == "tiny" else Path(path)


def load_weights(path: str | os.PathLike, *, dtype: str = "bfloat16", mesh: jax.sharding.Mesh | None = None,
                 progress: Callable[[int, int], None] | None = None,
                 admit: Callable[[GptOssConfig], None] | None = None) -> tuple[GptOssConfig, dict[str, jax.Array]]:
    """Load a checkpoint of any layout (see `open_checkpoint`) and return its configuration and weights by Hugging Face name.

    dtype: of everything but packed experts, which stay uint8: bfloat16 as stored, or float32. mesh: where `sharding.shardings` puts the
    weights; None, on the first device. progress: called with (done_bytes, total_bytes) of what this process reads. admit: called with the
    configuration of the verified checkpoint; what it raises ends the loading.

    Each process reads only the bytes of its own shards. Host memory beside them: from safetensors 32 MiB on CPU (measured: 24 MB), the two
    largest shards on accelerators, on their way to the device. From Orbax about three times the 256 MiB it is asked for at a time, or
    twice a larger weight (measured on four-layer-20b: 0.7 GB on one device, 1.1 GB on eight with `expert` 8, 1.8 GB on one with the full
    vocabulary).
    Raises CheckpointError, ConfigError or ShardingError, before anything is allocated.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype: {dtype!r} found, expected {' or '.join(map(repr, DTYPES))}")
    checkpoint = open_checkpoint(path)
    if admit is not None:
        admit(checkpoint.config)
    declared = declare(checkpoint.config, dtype=dtype, packed=checkpoint.config.quantized)
    targets = load_targets(declared, mesh)
    sizes = {name: _owned_bytes(target, checkpoint.weights[name]) for name, target in targets.items()}
    total, done, arrays = sum(sizes.values()), 0, {}
    for name, array in checkpoint.read(targets):
        arrays[name] = array
        done += sizes[name]
        if progress is not None:
            progress(done, total)
    return checkpoint.config, {name: arrays[name] for name in declared}


def load_targets(declared: dict[str, Weight], mesh: jax.sharding.Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Return what to read: shape, dtype and sharding of each weight; without a mesh on the first local device."""
    return abstract(declared, mesh, jax.local_devices()[0])


def _owned_bytes(target: jax.ShapeDtypeStruct, stored: Weight) -> int:
    itemsize = np.dtype(jax.numpy.dtype(stored.dtype)).itemsize
    return sum(math.prod(stop - start for start, stop in bounds) for bounds in set(shard_bounds(target).values())) * itemsize


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Load the tokenizer of a checkpoint ("tiny" included) or from a file; see `text.tokenizer.load_tokenizer`. Raises TokenizerError."""
    return tokenizer.load_tokenizer(resolve(path))
