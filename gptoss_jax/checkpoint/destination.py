"""A directory that appears complete or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gptoss_jax.checkpoint.errors import CheckpointError

_CHECKPOINT_MARKS = ("config.json", "adapter_config.json", "_CHECKPOINT_METADATA")


def check_destination(destination: Path, *, overwrite: bool, source: Path | None = None, num_bytes: int = 0) -> None:
    """Raise CheckpointError when writing there would lose something, or has no room for `num_bytes`."""
    real = destination.resolve()
    if source is not None:
        origin = source.resolve()
        if real == origin:
            raise CheckpointError(f"{destination}: the source itself, expected another directory")
        if origin in real.parents or real in origin.parents:
            inside, outside = (destination, source) if origin in real.parents else (source, destination)
            raise CheckpointError(f"{destination}: {inside} is inside {outside}, expected directories apart from each other")
    _check_replaceable(destination, overwrite)
    existing = next(parent for parent in real.parents if parent.exists())
    if not existing.is_dir():
        raise CheckpointError(f"{destination}: {existing} is a file, expected a directory")
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise CheckpointError(f"{destination}: {free / 1e9:.1f} GB free there, {num_bytes / 1e9:.1f} GB needed")


@contextlib.contextmanager
def appearing(destination: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a path to write to, which is renamed to `destination` when the block ends, and removed if it raises.

    With `overwrite` it replaces what is there then, which stays if that fails; without, raises CheckpointError when something has appeared
    there meanwhile. It lies in a directory `.NAME.incomplete-…` beside the destination, which is all that a killed process leaves; a line
    on stderr names such.
    """
    destination = Path(os.path.abspath(destination))
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}.incomplete-"
    for left in destination.parent.glob(f"{glob.escape(prefix)}*"):
        print(f"{left}: left by a killed process, to be removed, unless another is writing it now", file=sys.stderr)
    scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=destination.parent))
    new, old = scratch / "new", scratch / "old"
    try:
        yield new
        _check_replaceable(destination, overwrite)
        if os.path.lexists(destination):
            destination.rename(old)
        new.rename(destination)
    finally:
        if os.path.lexists(old) and not os.path.lexists(destination):  # the new one couldn't take its place
            old.rename(destination)
        shutil.rmtree(scratch, ignore_errors=True)


def _check_replaceable(destination: Path, overwrite: bool) -> None:
    if os.path.lexists(destination) and not overwrite:
        raise CheckpointError(f"{destination}: exists already, expected a new name (or --overwrite to replace it)")
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination}: a file, expected a directory or a new name")
    if os.path.ismount(destination):
        raise CheckpointError(f"{destination}: a mount point, which can't be replaced, expected a new name inside it")
    if destination.is_dir() and any(destination.iterdir()) and not any((destination / name).exists() for name in _CHECKPOINT_MARKS):
        raise CheckpointError(f"{destination}: no {' or '.join(_CHECKPOINT_MARKS)} found, expected a checkpoint to replace, an empty directory "
                              "or a new name")
