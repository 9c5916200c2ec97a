"""Convert any layout to an Orbax checkpoint that carries the configuration and tokenizer files along."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from gptoss_jax.checkpoint import store
from gptoss_jax.checkpoint.destination import appearing, check_destination
from gptoss_jax.checkpoint.loading import load_targets
from gptoss_jax.checkpoint.opening import open_checkpoint
from gptoss_jax.checkpoint.safetensors import num_bytes


def convert(source: str | os.PathLike, destination: str | os.PathLike, *, overwrite: bool = False,
            progress: Callable[[int, int], None] | None = None) -> None:
    """Write the checkpoint `source` (any layout) to `destination` as an Orbax checkpoint: tensors bit for bit, under Hugging Face names.

    Holds `store.GROUP_BYTES` of weights, or one larger one, at a time. The destination appears when it is complete; one that is there is
    replaced with `overwrite` only. Raises CheckpointError or ConfigError.
    """
    destination = Path(destination)
    checkpoint = open_checkpoint(source)
    sizes = {name: num_bytes(weight) for name, weight in checkpoint.weights.items()}
    total = sum(sizes.values())
    check_destination(destination, overwrite=overwrite, source=checkpoint.path, num_bytes=total)
    targets = load_targets(checkpoint.weights, None)

    def groups() -> Iterator[dict[str, jax.Array]]:
        done = 0
        for names in store.grouped(sizes):
            yield dict(checkpoint.read({name: targets[name] for name in names}))
            done += sum(sizes[name] for name in names)  # the group is written when the next one is asked for
            if progress is not None:
                progress(done, total)

    with appearing(destination, overwrite=overwrite) as path:
        store.write(path, groups())
        write_sidecars(path, checkpoint.sidecars, default_config=checkpoint.config.to_json())


def write_sidecars(path: Path, sidecars: tuple[Path, ...], *, default_config: dict) -> None:
    """Copy the files to a directory, byte for byte; `default_config` becomes config.json where none of them is one."""
    for file in sidecars:
        shutil.copyfile(file, path / file.name)
    if not any(file.name == "config.json" for file in sidecars):
        write_json(path / "config.json", default_config)


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
