"""Records of JSONL, Parquet and ArrayRecord files by number, each with the place it comes from. Imports no JAX: workers read with it.

Memory stays bounded: of a JSONL file only the offsets of its lines are held (8 bytes a record), of a Parquet file the row groups read last.
"""

from __future__ import annotations

import bisect
import collections
import glob
import itertools
import json
import multiprocessing
import os
import re
import threading
from typing import Any

import numpy as np

COLUMNS = ("messages", "tools", "reasoning_effort", "text")  # what is read of a Parquet file
_KIND = re.compile(r"\.(jsonl|parquet|array_record)(-\d+-of-\d+)?$")
_BLOCK_BYTES = 1 << 24
_ROW_GROUPS_BYTES = 1 << 28


class DataError(ValueError):
    """Data that can't be trained on; says which and why."""


def end_with_parent(*_) -> None:
    """Have this process end when the one that started it does, in whatever way. A worker that waits for room in its queue doesn't notice."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Records:
    """The records of the files that match the given patterns, in the order of their names.

    records[number] is the JSON object as a dict; it raises DataError, starting with the record's place, when there is none.
    spans: the numbers of each pattern's records. Can be pickled: files are opened where they are read.
    """

    def __init__(self, *patterns: str):
        self._files, self._starts, self.spans = [], [0], []
        for pattern in patterns:
            start = len(self)
            for path in _matches(pattern):
                self._files.append(_open(path))
                self._starts.append(len(self) + len(self._files[-1]))
            self.spans.append(range(start, len(self)))
            if not self.spans[-1]:
                raise DataError(f"{pattern}: no records found, expected at least one")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, number: int) -> dict[str, Any]:
        file, index = self._locate(number)
        try:
            record = file.read(index)
            record = json.loads(record) if isinstance(record, bytes) else record
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file.place(index)}: {json_problem(error)}") from None
        if not isinstance(record, dict):
            raise DataError(f"{file.place(index)}: {type(record).__name__} found, expected a JSON object")
        return record

    def place(self, number: int) -> str:
        """Return "file:line", or "file, row n" counted from 0."""
        file, index = self._locate(number)
        return file.place(index)

    def _locate(self, number: int) -> tuple[Any, int]:
        which = bisect.bisect_right(self._starts, number) - 1
        return self._files[which], number - self._starts[which]


def json_problem(error: ValueError | RecursionError) -> str:
    """Say what is wrong with a JSON text, without its own count of lines, of which a record has one."""
    if isinstance(error, json.JSONDecodeError):
        return f"not readable JSON: {error.msg} at character {error.pos}"
    return "not readable JSON: nested too deeply" if isinstance(error, RecursionError) else f"not readable JSON: {error}"


def _matches(pattern: str) -> list[str]:
    paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    if not paths:
        raise DataError(f"{pattern}: no such file")
    return paths


def _open(path: str) -> _JsonLines | _Parquet | _ArrayRecord:
    kind = _KIND.search(path)
    if not kind:
        raise DataError(f"{path}: unknown kind of file, expected a name that ends with .jsonl, .parquet or .array_record")
    return {"jsonl": _JsonLines, "parquet": _Parquet, "array_record": _ArrayRecord}[kind[1]](path)


class _JsonLines:
    """Lines by their offsets, found in one pass; empty ones are left out."""

    def __init__(self, path: str):
        self._path = path
        ends, at = [], 0
        with open(path, "rb") as file:
            while len(block := np.fromfile(file, np.uint8, _BLOCK_BYTES)):
                ends.append(np.flatnonzero(block == ord("\n")) + (at + 1))
                at += len(block)
        ends = np.concatenate([*ends, [at]]).astype(np.int64)
        starts = np.concatenate([[0], ends[:-1]])
        empty = ends - starts < 2
        if len(short := np.flatnonzero(ends - starts == 2)):
            empty[short] = np.memmap(path, np.uint8, "r")[starts[short]] == ord("\r")
        self._lines = np.flatnonzero(~empty)
        self._starts, self._ends = starts[self._lines], ends[self._lines]

    def __len__(self) -> int:
        return len(self._lines)

    def read(self, index: int) -> bytes:
        with open(self._path, "rb") as file:
            file.seek(self._starts[index])
            return file.read(self._ends[index] - self._starts[index])

    def place(self, index: int) -> str:
        return f"{self._path}:{self._lines[index] + 1}"


class _Rows:
    """What files of rows have in common: a place, and being opened again where they are unpickled."""

    def __init__(self, path: str):
        self._path = path

    def __reduce__(self):
        return type(self), (self._path,)

    def place(self, index: int) -> str:
        return f"{self._path}, row {index}"


class _Parquet(_Rows):
    """Rows out of row groups; the groups read last are kept, so that a shuffle doesn't read each again for every row."""

    def __init__(self, path: str):
        super().__init__(path)
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise DataError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except pyarrow.ArrowException as error:
            raise DataError(f"{path}: not a readable Parquet file: {error}") from None
        metadata = self._file.metadata
        self._columns = [name for name in COLUMNS if name in self._file.schema_arrow.names]
        self._starts = [0, *itertools.accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))]
        self._groups: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> dict[str, Any]:
        number = bisect.bisect_right(self._starts, index) - 1
        with self._lock:
            group = self._groups.pop(number, None)
            if group is None:
                group = self._file.read_row_group(number, columns=self._columns)
            self._groups[number] = group
            while len(self._groups) > 1 and sum(kept.nbytes for kept in self._groups.values()) > _ROW_GROUPS_BYTES:
                self._groups.popitem(last=False)
        return _without_nulls(group.slice(index - self._starts[number], 1).to_pylist()[0])


class _ArrayRecord(_Rows):
    """Records of JSON text by number."""

    def __init__(self, path: str):
        super().__init__(path)
        import grain

        try:
            self._source = grain.sources.ArrayRecordDataSource([path])
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{path}: not a readable ArrayRecord file: {error}") from None

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> bytes:
        return self._source[index]


def _without_nulls(value: Any) -> Any:
    """A column of objects has every field in every row: those that a row doesn't have are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
