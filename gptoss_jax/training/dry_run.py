"""What a run would train on, before it does: token statistics, and an example with its loss mask shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.training.config import DataConfig
from gptoss_jax.training.data import Files

_SURVEYED = 100_000  # records; more don't change the statistics
_PROBLEMS_SHOWN = 5
_SHOWN_TOKENS = 2000
_LEARNT, _CONTEXT, _PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


@dataclasses.dataclass
class Survey:
    """lengths, learnt: tokens of each example, and those whose loss counts; bad, too_long: records that are or aren't examples."""

    records: int
    rows: int
    lengths: np.ndarray
    learnt: np.ndarray
    bad: int
    too_long: int
    problems: list[str]
    example: dict[str, np.ndarray]  # one of them


def survey(data: Files, limit: int = _SURVEYED) -> Survey:
    """Pack one epoch, or so many of its records, and count."""
    problems, counts = [], {"bad": 0, "too_long": 0}

    def report(encoded, state):
        counts.update(bad=state["bad"], too_long=state["too_long"])
        if len(problems) < _PROBLEMS_SHOWN:
            problems.append(encoded.problem)

    iterator, records = data.survey(limit, report)
    rows, lengths, learnt, example = 0, [], [], {}
    for row in iterator:
        rows += 1
        segments = row["tokens_segment_ids"]
        lengths.append(np.bincount(segments)[1:])
        learnt.append(np.bincount(segments, row["loss_weights"])[1:])
        example = example or {name: values[segments == 1] for name, values in row.items()}
    return Survey(records, rows, np.concatenate(lengths), np.concatenate(learnt), counts["bad"], counts["too_long"], problems, example)


def report(data: Files, config: DataConfig, tokenizer: Tokenizer, *, steps: int, colour: bool) -> Iterator[str]:
    """Yield the lines of the report on data that was opened with `on_bad_record` skip, whatever `config` says. steps: those of the run."""
    found = survey(data)
    tokens, learnt = int(found.lengths.sum()), int(found.learnt.sum())
    too_long = "dropped" if config.too_long == "drop" else "truncated"
    yield f"records     {found.records:,} looked at" + (f", the first {_SURVEYED:,} of an epoch" if found.records == _SURVEYED else "")
    yield f"examples    {len(found.lengths):,}; {found.bad:,} bad records, {found.too_long:,} {too_long} at {config.row_tokens:,} tokens"
    yield from (f"            {problem}" for problem in found.problems)
    if found.bad and config.on_bad_record == "stop":
        yield "            data.on_bad_record is stop: the run would stop at the first bad one"
    yield f"tokens      {tokens:,}; {learnt:,} learnt, {learnt / tokens:.1%}"
    shares = ", ".join(f"{name} {np.percentile(found.lengths, at, method='nearest'):,}"
                       for name, at in (("shortest", 0), ("median", 50), ("90 %", 90), ("99 %", 99), ("longest", 100)))
    yield f"lengths     {shares}"
    yield (f"packing     {found.rows:,} rows of {config.row_tokens:,}, {tokens / (found.rows * config.row_tokens):.1%} filled; "
           f"{-(-found.rows // config.batch_size):,} batches of {config.batch_size}")
    if config.epochs and found.records < _SURVEYED and (batches := -(-found.rows * config.epochs // config.batch_size)) < steps:
        yield f"            data.epochs is {config.epochs:,}: the run would stop after some {batches:,} batches, before run.steps, {steps:,}"
    if len(data.held_out_numbers):
        yield f"evaluation  {len(data.held_out_numbers):,} records"
    yield f"example     {data.places(found.example)[0]}, learnt is " + (
        f"{_LEARNT}green{_PLAIN}" if colour else "⟦in brackets⟧")
    yield render(found.example, tokenizer, colour=colour)


def render(example: dict[str, np.ndarray], tokenizer: Tokenizer, *, colour: bool) -> str:
    """Return the text of an example with what is learnt in green, or ⟦in brackets⟧; a long one is cut."""
    ids = [int(example["tokens"][0]), *map(int, example["targets"][:_SHOWN_TOKENS])]
    learnt = np.array([False, *(example["loss_weights"][:_SHOWN_TOKENS] > 0)])
    before, after = ({True: _LEARNT, False: _CONTEXT}, _PLAIN) if colour else ({True: "⟦", False: ""}, "")
    starts = [0, *(np.flatnonzero(learnt[1:] != learnt[:-1]) + 1), len(ids)]
    parts = []
    for start, end in zip(starts, starts[1:]):
        close = after or ("⟧" if learnt[start] else "")
        parts.append(f"{before[bool(learnt[start])]}{tokenizer.decode(ids[start:end])}{close}")
    cut = len(example["tokens"]) - _SHOWN_TOKENS
    return "".join(parts) + (f" ... and {cut:,} more tokens" if cut > 0 else "")
