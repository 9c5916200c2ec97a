"""The safetensors file format: verified headers, the bytes of one shard, a streaming writer.

A file is a little-endian uint64 header length, a JSON header `{name: {"dtype", "shape", "data_offsets": [begin, end]}}` and the
tensors' bytes, row-major, without gaps. Source: huggingface/safetensors, README "Format".

Why not Orbax's safetensors reader: it gathers all that it reads of a file in host buffers beside the arrays it makes of them (0.12.8, one
tensor of 200 MiB: 200 MiB more; four of them in two files: 530 MiB more, this reader 8), reads every `*.safetensors` of a directory whatever
the index says (a test has the case), and can't split OpenAI's fused qkv. Measured with Orbax 0.12.8 on the 2.29 GB of
`four-layer-20b` (vocabulary 32,768) in the page cache, CPU, host memory beside the arrays and medians of five interleaved runs on two busy
cores: Orbax 1.5 GB and 4.3 s; Orbax called for 128 MiB at a time 0.4 GB and 3.7 s; this reader 0.02 GB and 3.1 s (0.5 s on idle cores).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from gptoss_jax.checkpoint.errors import CheckpointError
from gptoss_jax.model.weights import Weight

NUMPY_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32), "uint8": np.dtype(np.uint8)}
_DTYPES = {"BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "F8_E5M2": ("float8_e5m2", 1), "F8_E4M3": ("float8_e4m3fn", 1),
           "I16": ("int16", 2), "U16": ("uint16", 2), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
           "I32": ("int32", 4), "U32": ("uint32", 4), "F32": ("float32", 4),
           "I64": ("int64", 8), "U64": ("uint64", 8), "F64": ("float64", 8)}
_CODES = {dtype: code for code, (dtype, _) in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library
_WINDOW_BYTES, _MAX_READERS = 8 << 20, 4  # at a time, by each of so many threads
_ALIGNMENT = 64  # what XLA on CPU asks of a buffer it takes over without a copy


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are: row-major from `offset` of `file`, dtype as numpy spells it."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    def rows(self, start: int, stop: int) -> StoredTensor:
        """Return the tensor of rows [start, stop) of this one."""
        row_bytes = math.prod(self.shape[1:]) * np.dtype(NUMPY_DTYPES[self.dtype]).itemsize
        return dataclasses.replace(self, offset=self.offset + start * row_bytes, shape=(stop - start, *self.shape[1:]))


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return where each tensor of a file is. Raises CheckpointError for a missing or truncated file, or a header that contradicts itself."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{file}: truncated: {size} bytes found, a safetensors file starts with 8 bytes of header length")
            header_bytes = struct.unpack("<Q", prefix)[0]
            if header_bytes > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{file}: corrupt or truncated: a header of {header_bytes} bytes stated, {size - 8} bytes follow")
            header = json.loads(stream.read(header_bytes))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file}: corrupt: its header is not readable as JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: corrupt: its header is a JSON {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    data_bytes = size - 8 - header_bytes
    spans = {name: _checked_entry(file, name, entry) for name, entry in header.items()}
    end = 0
    for name, (begin, stop, _, _) in sorted(spans.items(), key=lambda item: item[1][:2]):
        if begin != end:
            raise CheckpointError(f"{file}: corrupt: {name} starts at byte {begin} of the data, expected {end}, where the one before ends")
        end = stop
    if end != data_bytes:
        state = "truncated" if data_bytes < end else "corrupt"
        raise CheckpointError(f"{file}: {state}: {data_bytes} bytes of tensors found, its header states {end}")
    return {name: StoredTensor(file, 8 + header_bytes + begin, shape, dtype) for name, (begin, _, shape, dtype) in spans.items()}


def read_shard(tensor: StoredTensor, bounds: tuple[tuple[int, int], ...], dtype: str) -> np.ndarray:
    """Return one rectangle of a tensor, [start, stop) per dim, in `dtype`, reading no other page of the file.

    Whole rows in their own dtype are read into place; of others the file is mapped a window at a time and copied, so that host memory
    beside the result stays at a window a thread, in any cut and dtype. Raises CheckpointError where the file ends too early.
    """
    stored = NUMPY_DTYPES[tensor.dtype]
    shard = _aligned_empty(tuple(stop - start for start, stop in bounds), NUMPY_DTYPES[dtype])
    in_place = shard.dtype == stored and shard.shape[1:] == tensor.shape[1:]
    row_bytes = math.prod(tensor.shape[1:]) * stored.itemsize
    step = max(1, _WINDOW_BYTES // max(row_bytes, 1))
    inner = tuple(slice(start, stop) for start, stop in bounds[1:])
    first, last = bounds[0]

    def read(row: int) -> None:
        stop = min(row + step, last)
        offset, target = tensor.offset + row * row_bytes, shard[row - first:stop - first]
        if in_place:
            _read_into(tensor.file, stream, target.reshape(-1).view(np.uint8), offset)
        else:
            target[...] = _map(stream, offset, (stop - row) * row_bytes).view(stored).reshape(stop - row, *tensor.shape[1:])[:, *inner]

    with tensor.file.open("rb") as stream:
        list(_readers().map(read, range(first, last, step)))
    return shard


def write_file(file: Path, weights: Mapping[str, Weight], pieces: Iterable[tuple[str, Iterable[np.ndarray]]],
               written=lambda size: None) -> None:
    """Write one file, holding one piece at a time.

    pieces: for each of `weights`, in their order, its name and consecutive runs of its row-major bytes; `written(size)` is told of each.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    offset = 0
    for name, weight in weights.items():
        end = offset + num_bytes(weight)
        header[name] = {"dtype": _CODES[weight.dtype], "shape": list(weight.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        start = stream.tell()
        for name, runs in pieces:
            for run in runs:
                written(_write(stream, run))
            assert stream.tell() == start + header[name]["data_offsets"][1], name


def num_bytes(weight: Weight | StoredTensor) -> int:
    return math.prod(weight.shape) * NUMPY_DTYPES[weight.dtype].itemsize


def _checked_entry(file: Path, name: str, entry) -> tuple[int, int, tuple[int, ...], str]:
    try:
        (begin, end), shape, code = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
        whole = isinstance(code, str) and all(isinstance(number, int) and number >= 0 for number in (begin, end, *shape))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"{file}: corrupt: {name} is described by {entry!r}, expected dtype, shape and data_offsets [begin, end]")
    if code not in _DTYPES:
        raise CheckpointError(f"{file}: {name}: dtype {code!r} found, expected one of {', '.join(_DTYPES)}")
    dtype, itemsize = _DTYPES[code]
    if end - begin != math.prod(shape) * itemsize:
        expected = math.prod(shape) * itemsize
        raise CheckpointError(f"{file}: corrupt: {name} has {end - begin} bytes, expected {expected} for {code} {list(shape)}")
    return begin, end, shape, dtype


@functools.cache
def _readers() -> concurrent.futures.ThreadPoolExecutor:
    """One thread's copies don't fill the memory's bandwidth: 2.29 GB in the page cache, two busy cores: 0.71 s with one, 0.51 s with four."""
    return concurrent.futures.ThreadPoolExecutor(min(_MAX_READERS, os.cpu_count() or 1), "read")


def _read_into(file: Path, stream: BinaryIO, target: np.ndarray, offset: int) -> None:
    view = memoryview(target)
    while view:
        count = os.preadv(stream.fileno(), [view], offset)
        if not count:
            raise CheckpointError(f"{file}: truncated while it was read: it ends at byte {offset}, {len(view)} more were expected")
        view, offset = view[count:], offset + count


def _map(stream: BinaryIO, offset: int, size: int) -> np.ndarray:
    """Return bytes [offset, offset + size) of a file as a read-only view, unmapped with its last reference."""
    if size == 0:
        return np.empty(0, np.uint8)
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    mapped = mmap.mmap(stream.fileno(), offset + size - start, access=mmap.ACCESS_READ, offset=start)
    return np.frombuffer(mapped, np.uint8, size, offset - start)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start:start + size].view(dtype).reshape(shape)


def _write(stream: BinaryIO, run: np.ndarray) -> int:
    stream.write(memoryview(np.ascontiguousarray(run).reshape(-1).view(np.uint8)))
    return run.nbytes
