"""The error of this package, and the one line that says everything that doesn't fit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from gptoss_jax.model.weights import Weight

_MAX_LISTED = 12


class CheckpointError(ValueError):
    """A checkpoint that can't be read or written as asked: names the thing, what was found and what was expected, in one line."""


def check_tensors(where: Path, found: Mapping[str, Weight], expected: Mapping[str, Weight]) -> None:
    """Raise CheckpointError listing every missing and unexpected tensor and every wrong shape and dtype. Axes aren't compared."""
    complaints = []
    missing = [name for name in expected if name not in found]
    if missing:
        complaints.append(f"{count(missing, 'tensor')} missing: {listed(missing)}")
    extra = [name for name in found if name not in expected]
    if extra:
        complaints.append(f"{count(extra, 'tensor')} found that the configuration doesn't have: {listed(extra)}")
    for field in ("shape", "dtype"):
        wrong: dict[str, list[str]] = {}
        for name in expected:
            if name in found and getattr(found[name], field) != getattr(expected[name], field):
                values = [getattr(weights[name], field) for weights in (found, expected)]
                values = [list(value) if field == "shape" else value for value in values]
                wrong.setdefault(f"{field} {values[0]} found, {values[1]} expected", []).append(name)
        complaints += [f"{listed(names)}: {problem}" for problem, names in wrong.items()]
    if complaints:
        raise CheckpointError(f"{where}: {'; '.join(complaints)}")


def count(things: Iterable, noun: str) -> str:
    number = len(list(things))
    return f"{number} {noun}" + ("" if number == 1 else "s")


def listed(names: Iterable[str]) -> str:
    """Return the names in one line, those that differ in the layer only as one: `model.layers.{0-23}.self_attn.sinks`."""
    layers: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = name if number is None else f"{name[:number.start()]}\0{name[number.end():]}"
        layers.setdefault(pattern, []).extend([] if number is None else [int(number.group())])
    texts = [pattern.replace("\0", _ranges(numbers)) for pattern, numbers in layers.items()]
    more = f" and {len(texts) - _MAX_LISTED} more of other names" if len(texts) > _MAX_LISTED else ""
    return ", ".join(texts[:_MAX_LISTED]) + more


def reason(error: BaseException) -> str:
    """Return in a line why Orbax or TensorStore failed: what their storage did, without where in their source and with which settings."""
    while error.__cause__ is not None:  # Orbax's own tells at length what it has tried
        error = error.__cause__
    if re.search("no space left|quota exceeded", str(error), re.IGNORECASE):
        return "no space left on the disk"
    return re.split(r" \[[a-z_ \d\[\]]+='", (str(error).splitlines() or [type(error).__name__])[0])[0]


def read_json(path: Path) -> dict:
    """Return the object in a JSON file. Raises CheckpointError when it is missing, unreadable, or holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON {type(content).__name__} found, expected an object")
    return content


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return texts[0] if len(numbers) == 1 else "{" + ",".join(texts) + "}"
