"""A run's directory: one job at a time, its vocabulary, the metrics so far. The first process of a job writes, all read."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from gptoss_jax.checkpoint import load_tokenizer
from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.training import vocabulary
from gptoss_jax.training.config import TrainingConfig, TrainingConfigError
from gptoss_jax.training.records import DataError, json_problem

_VOCABULARY_FILES = {".json": "tokenizer.json", ".tiktoken": "o200k_base.tiktoken"}  # by the suffix of data.tokenizer
METRICS_FILE = "metrics.jsonl"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory for this process, however that ends: the kernel lets go of it. Raises TrainingConfigError when it is taken."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise TrainingConfigError(f"output.directory: {directory} is taken by {file.read().strip() or 'another job'}, expected one that "
                                      "no other job writes to") from None
        except OSError as error:  # a file system without locks
            print(f"{directory}: can't be locked ({error.strerror}): let no other job write to it", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def take_up_metrics(directory: Path, step: int) -> list[dict[str, Any]]:
    """Return the metrics up to a step, and drop those after it: the run goes on from there and reports them again. Raises DataError."""
    file = directory / METRICS_FILE
    if not file.exists():
        return []
    *complete, _ = file.read_bytes().split(b"\n")  # a killed run's last one may not be
    kept = [values for number, line in enumerate(complete, 1) if (values := _values(line, f"{file}:{number}"))["step"] <= step]
    temporary = file.with_suffix(".part")
    temporary.write_text("".join(json.dumps(values) + "\n" for values in kept), encoding="utf-8")
    temporary.replace(file)
    return kept


def _values(line: bytes, place: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: {json_problem(error)}; expected the metrics of a step, or the line to be removed") from None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        raise DataError(f"{place}: {values!r:.80} found, expected the metrics of a step, or the line to be removed")
    return values


def load_vocabulary(config: TrainingConfig, directory: Path | None = None) -> Tokenizer:
    """Load the vocabulary of `init.checkpoint`; or put that of a run from random weights into its directory, if it isn't there, and load it.

    directory: `output.directory` where None. Raises TrainingConfigError when it isn't the model's, TokenizerError when it can't be used.
    """
    own = config.data.tokenizer
    if config.init.checkpoint:
        if own:
            raise TrainingConfigError(f"data.tokenizer: {own!r} found with init.checkpoint, which has its own")
        tokenizer = load_tokenizer(config.init.checkpoint)
        if tokenizer.sampleable > config.model.vocab_size:  # a gather would take the last row for an id past it
            raise TrainingConfigError(f"init.checkpoint: {config.init.checkpoint!r} has a tokenizer of {tokenizer.sampleable} ids, expected at most "
                                      f"{config.model.vocab_size}, the model's vocab_size")
        return tokenizer
    file = _vocabulary_file(config, Path(config.output.directory) if directory is None else directory)
    if jax.process_index() == 0 and not file.exists():
        if own:
            if not Path(own).is_file():
                raise TrainingConfigError(f"data.tokenizer: {own!r} found, expected a file: tokenizer.json, .tiktoken or a SentencePiece .model")
            _load_fitting(config, own)  # a copy of what can't be used would stay
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".part")
        temporary.write_bytes(Path(own).read_bytes() if own else vocabulary.train(config.model.vocab_size, seed=config.data.seed))
        temporary.replace(file)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("vocabulary")
    return _load_fitting(config, file)


def _vocabulary_file(config: TrainingConfig, directory: Path) -> Path:
    return directory / _VOCABULARY_FILES.get(Path(config.data.tokenizer).suffix, "tokenizer.model")


def _load_fitting(config: TrainingConfig, path: Path | str) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise TrainingConfigError(f"model.vocab_size: {config.model.vocab_size} found, expected {tokenizer.vocab_size}, the size of {path}")
    return tokenizer


def write_vocabulary(config: TrainingConfig, destination: Path, tokenizer: Tokenizer) -> None:
    """Write the vocabulary of a run from random weights, and how it ends an answer, into an exported directory."""
    file = _vocabulary_file(config, Path(config.output.directory))
    shutil.copyfile(file, destination / file.name)
    generation = {"bos_token_id": tokenizer.special.get("<|startoftext|>"), "pad_token_id": tokenizer.special.get("<|endoftext|>"), "do_sample": False,
                  "eos_token_id": [tokenizer.special[name] for name in ("<|return|>", "<|call|>", "<|endoftext|>") if name in tokenizer.special]}
    (destination / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
