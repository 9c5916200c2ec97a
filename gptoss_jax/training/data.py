"""Input pipeline: records or seeded conversations -> harmony ids with a loss mask -> packed rows -> batches. The only place that knows grain.

Every stage is deterministic and the iterator's state is a small JSON object, so that a resumed run sees the batches it would have seen.
Every process packs the same global batches and takes its rows of them: neither batches nor states depend on the number of processes.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import absl.flags
import grain
import numpy as np

from gptoss_jax.text import harmony
from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.training import synthetic
from gptoss_jax.training.config import DataConfig
from gptoss_jax.training.examples import Encoded, Encoder, Question, conversation_messages, question_of
from gptoss_jax.training.records import DataError, Records, end_with_parent
from gptoss_jax.training.state import Batch

_PACKING_ROWS = 64  # filled side by side; more rows, less padding
_PACKING_TOKENS = 1 << 21  # in long rows, fewer of them
_FOREVER = 1 << 40
_HELD_OUT_SEED = 0  # of the order of evaluation examples

Rows = Mapping[str, np.ndarray]  # what Batch has, and "records", the number of each token's record; each [B, T]
Report = Callable[[Encoded, Mapping[str, int]], None]  # of a problem, with the counts of "bad" and "too_long" so far


def open_data(config: DataConfig, tokenizer: Tokenizer) -> Synthetic | Files:
    """Return what the configuration says to train on. Raises DataError when a file can't be read or nothing in it can be learnt."""
    return Files(config, tokenizer) if config.sources else Synthetic(config, tokenizer)


def to_batch(rows: Rows) -> Batch:
    """Return what the packer made as a Batch. Segments are numbered from 1 in each row, positions count from 0 in each segment."""
    return Batch(rows["tokens"], rows["targets"], rows["loss_weights"], rows["tokens_segment_ids"], rows["tokens_positions"])


class Files:
    """Records of files: opened, those for evaluation held aside, and of each source one that can be learnt found.

    held_out_numbers: the records held aside.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self._config = config
        self._records = Records(*(source.path for source in config.sources))
        self._encoder = self._held_out_encoder = Encoder(self._records, tokenizer, config)
        spans, self.held_out_numbers = self._records.spans, range(0)
        if config.eval_sources:
            records = Records(*(source.path for source in config.eval_sources))
            self._held_out_encoder, self.held_out_numbers = Encoder(records, tokenizer, config), range(len(records))
        elif config.eval_fraction:
            aside = [_held_aside(len(span), config.eval_fraction) for span in spans]
            self.held_out_numbers = np.concatenate([np.flatnonzero(mask) + span.start for mask, span in zip(aside, spans)])
            spans = [np.flatnonzero(~mask) + span.start for mask, span in zip(aside, spans)]
            if not len(self.held_out_numbers) or not all(map(len, spans)):
                raise DataError(f"data.eval_fraction: {config.eval_fraction} holds {len(self.held_out_numbers)} of {len(self._records)} records "
                                "aside, expected at least one, and one left in each source")
        self._weights = [source.weight for source in config.sources if source.weight is not None]
        self._parts = spans if self._weights else [np.concatenate(spans) if config.eval_fraction else range(len(self._records))]
        self._count = sum(map(len, self._parts))
        for numbers in self._parts:
            _check_learnable(self._encoder, numbers)
        if len(self.held_out_numbers):
            _check_learnable(self._held_out_encoder, self.held_out_numbers)

    def batches(self, *, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator:
        """Return the iterator over this process's rows of the training batches; it has `get_state`, `set_state` and `close`.

        It ends with the epochs; the last batch is filled up with empty rows. Raises DataError for a bad record if these aren't skipped.
        """
        config = self._config
        examples = _Examples(self._order(config.epochs), self._encoder, _reporter(process_index), records=self._count, workers=config.workers)
        batched = _batched(_packed(examples, config.row_tokens, config.seed), config.batch_size, process_index, process_count)
        return iter(grain.experimental.ThreadPrefetchIterDataset(batched, prefetch_buffer_size=2))

    def held_out(self, count: int, *, process_index: int = 0, process_count: int = 1) -> list[Batch]:
        """Return the first `count` batches held aside for evaluation, fewer where there are no more."""
        if not len(self.held_out_numbers):
            return []
        order = grain.MapDataset.source(self.held_out_numbers).shuffle(seed=_HELD_OUT_SEED)
        examples = _Examples(order, self._held_out_encoder, _reporter(process_index), records=len(self.held_out_numbers))
        rows = _packed(examples, self._config.row_tokens, _HELD_OUT_SEED)
        batched = iter(_batched(rows, self._config.batch_size, process_index, process_count))
        try:
            return [to_batch(batch) for batch in itertools.islice(batched, count)]
        finally:
            batched.close()

    def questions(self, count: int) -> list[Question]:
        """Return the first `count` questions held aside, of those that fit into a row; fewer where there are no more."""
        if not len(self.held_out_numbers):
            return []
        encoder, order = self._held_out_encoder, grain.MapDataset.source(self.held_out_numbers).shuffle(seed=_HELD_OUT_SEED)
        numbers = (int(order[index]) for index in range(len(order)))
        records = (encoder.records[number] for number in numbers if encoder(number).example is not None)
        asked = (question_of(conversation_messages(record, self._config.reasoning_effort)) for record in records if "messages" in record)
        return list(itertools.islice((question for question in asked if question), count))

    def places(self, rows: Rows) -> list[str]:
        """Return "file:line" of the records in what `batches` or `survey` gave."""
        return [self._records.place(int(number)) for number in np.unique(rows["records"][rows["tokens_segment_ids"] > 0])]

    def survey(self, limit: int, report: Report) -> tuple[grain.DatasetIterator, int]:
        """Return the packed rows, each [T], of the first epoch or so many of its records, and how many these are."""
        count = min(limit, self._count)
        examples = _Examples(self._order(None).slice(slice(count)), self._encoder, report, records=count, workers=self._config.workers)
        return iter(_packed(examples, self._config.row_tokens, self._config.seed)), count

    def _order(self, epochs: int | None) -> grain.MapDataset:
        """The numbers of the training records, shuffled anew in every epoch: an index is all the state there is."""
        parts = [grain.MapDataset.source(numbers) for numbers in self._parts]
        if self._config.shuffle:
            parts = [part.shuffle(seed=(self._config.seed + index) % 2**32) for index, part in enumerate(parts)]
        parts = [part.repeat(epochs) for part in parts]
        return grain.MapDataset.mix(parts, self._weights) if self._weights else parts[0]


class _Examples(grain.IterDataset):
    """The examples among what records give, in their order, however many workers make them; the others are reported and counted."""

    def __init__(self, order: grain.MapDataset, encoder: Encoder, report: Report, *, records: int, workers: int = 0):
        super().__init__()
        self.encoded, self.report, self.records, self.workers = order.map(encoder), report, records, workers
        self.stops = encoder.config.on_bad_record == "stop"

    def __iter__(self) -> grain.DatasetIterator:
        return _ExampleIterator(self)


class _ExampleIterator(grain.DatasetIterator):
    def __init__(self, dataset: _Examples):
        super().__init__()
        self._dataset, self._elements = dataset, None
        self._state = {"next": 0, "bad": 0, "too_long": 0, "records": dataset.records}

    def __next__(self) -> dict[str, np.ndarray]:
        if self._elements is None:
            if not absl.flags.FLAGS.is_parsed():
                absl.flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for flags that only absl's own programs have parsed
            rest = self._dataset.encoded.slice(slice(self._state["next"], None))
            self._elements = iter(rest.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=64)).mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._dataset.workers, per_worker_buffer_size=64), end_with_parent))
        while True:
            encoded = next(self._elements)
            self._state["next"] += 1
            if encoded.problem:
                if not encoded.too_long and self._dataset.stops:
                    raise DataError(f"{encoded.problem} (data.on_bad_record: skip leaves such records out)")
                self._state["too_long" if encoded.too_long else "bad"] += 1
                self._dataset.report(encoded, self._state)
            if encoded.example is not None:
                return encoded.example

    def get_state(self) -> dict[str, int]:
        return dict(self._state)

    def set_state(self, state: dict[str, int]) -> None:
        if state["records"] != self._state["records"]:
            raise DataError(f"data.sources: {self._state['records']} records found, expected {state['records']} as when the run was interrupted")
        self._stop()
        self._state = dict(state)

    def close(self) -> None:
        super().close()
        self._stop()

    def _stop(self) -> None:
        if self._elements is not None:
            self._elements.close()
            self._elements = None


def _printed(encoded: Encoded, state: Mapping[str, int]) -> None:
    """Say what is wrong with a record: the first ten times, then ever more rarely, always with the count."""
    count = state["too_long" if encoded.too_long else "bad"]
    if count <= 10 or count & (count - 1) == 0:
        kind = "bad record" if not encoded.too_long else "truncated example" if encoded.example is not None else "dropped example"
        print(f"{kind} {count}: {encoded.problem}", file=sys.stderr, flush=True)


def _reporter(process_index: int) -> Report:
    """All processes see all records: one of them reports."""
    return _printed if process_index == 0 else lambda encoded, state: None


def _check_learnable(encoder: Encoder, numbers: Sequence[int]) -> None:
    """Find an example: endless epochs over a source without one would never give a batch."""
    first = None
    for number in numbers:
        encoded = encoder(int(number))
        if encoded.example is not None:
            return
        first = first or encoded
        if not encoded.too_long and encoder.config.on_bad_record == "stop":
            raise DataError(encoded.problem)
    raise DataError(f"{first.problem}" + (f"; nothing to learn in the {len(numbers) - 1} records after it either" if len(numbers) > 1 else ""))


def _held_aside(count: int, fraction: float) -> np.ndarray:
    """Return bool [count]: the same for a record whatever the seed, and when others are added. Source: Steele et al. 2014, SplitMix."""
    bits = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (bits ^ (bits >> np.uint64(31))) < np.uint64(fraction * 2**64)


def _packed(examples: grain.IterDataset, row_tokens: int, seed: int) -> grain.IterDataset:
    """Return rows with as little padding as best fit leaves: "tokens", ..., "tokens_segment_ids" and "tokens_positions", each [T]."""
    lengths = dict.fromkeys(("tokens", "targets", "loss_weights", "records"), row_tokens)
    return grain.experimental.BestFitPackIterDataset(
        examples, length_struct=lengths, num_packing_bins=max(1, min(_PACKING_ROWS, _PACKING_TOKENS // row_tokens)), seed=seed)


def _batched(rows: grain.IterDataset, batch_size: int, process_index: int, process_count: int) -> grain.IterDataset:
    """Return batches of this process's rows; the last one is filled up with empty rows."""
    if batch_size % process_count:
        raise DataError(f"data.batch_size: {batch_size} found, expected a multiple of {process_count}, the number of processes")
    size = batch_size // process_count

    def mine(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        missing = batch_size - len(batch["tokens"])
        return {name: np.pad(values, ((0, missing), (0, 0)))[process_index * size : (process_index + 1) * size]
                for name, values in batch.items()}

    return rows.batch(batch_size).map(mine)


# --- synthetic conversations -------------------------------------------------------------------------------------------------------


class Synthetic:
    """Seeded conversations without end; the methods are those of Files."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self._config, self._tokenizer = config, tokenizer

    def batches(self, *, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator:
        return self._batches("train", process_index, process_count)

    def held_out(self, count: int, *, process_index: int = 0, process_count: int = 1) -> list[Batch]:
        return [to_batch(rows) for rows in itertools.islice(self._batches("test", process_index, process_count), count)]

    def questions(self, count: int) -> list[Question]:
        samples = (synthetic.conversation(self._config.seed, index, "test") for index in itertools.count())
        return list(itertools.islice((question for sample in samples if (question := question_of(sample.messages))), count))

    def places(self, rows: Rows) -> list[str]:
        return ["synthetic conversations"]

    def _batches(self, split: str, process_index: int, process_count: int) -> grain.DatasetIterator:
        config = self._config
        examples = synthetic_examples(self._tokenizer, seed=config.seed, split=split, max_tokens=config.row_tokens)
        lengths = dict.fromkeys(("tokens", "targets", "loss_weights"), config.row_tokens)
        rows = grain.experimental.FirstFitPackIterDataset(examples, length_struct=lengths, num_packing_bins=_PACKING_ROWS, seed=config.seed)
        return iter(_batched(rows, config.batch_size, process_index, process_count))


def synthetic_examples(tokenizer: Tokenizer, *, seed: int, split: str, max_tokens: int) -> grain.IterDataset:
    """Return the endless stream of synthetic conversations as examples; those longer than a row are left out."""

    def example(index: int) -> dict[str, np.ndarray] | None:
        sample = synthetic.conversation(seed, index, split)
        encoded = encode(sample.conversation, tokenizer, sample.prompt_length)
        return encoded if len(encoded["tokens"]) <= max_tokens else None

    return grain.MapDataset.range(_FOREVER).map(example).filter(lambda example: example is not None).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=64), allow_nones=False)


def encode(conversation: Mapping[str, Any], tokenizer: Tokenizer, learnt_from: int = 0) -> dict[str, np.ndarray]:
    """Return {"tokens", "targets", "loss_weights"}, each [T]: ids but the last, the next id of each, and whether predicting it is learnt.

    Learnt is what the model has to produce: of the assistant's messages from number `learnt_from` on, all after the role up to the stop
    token, and the opening of a message that follows another one of the assistant's in the same turn.
    Raises DataError when nothing is learnt.
    """
    messages = conversation["messages"]
    ids, mask = harmony.render_with_mask(messages, tokenizer, training=True)
    given = len(harmony.render(messages[:learnt_from], tokenizer))
    mask = [learnt and index >= given for index, learnt in enumerate(mask)]
    start, end = tokenizer.special["<|start|>"], tokenizer.special["<|end|>"]
    for index in range(1, len(ids)):
        if ids[index] == start and ids[index - 1] == end and mask[index - 1]:  # the assistant goes on by itself
            opening = next((i for i in range(index, len(ids)) if mask[i]), index)
            if ids[index + 1 : opening] == tokenizer.encode("assistant"):
                mask[index:opening] = [True] * (opening - index)
    if not any(mask):
        raise DataError("conversation: no assistant message to learn found, expected at least one")
    return {"tokens": np.asarray(ids[:-1], np.int32), "targets": np.asarray(ids[1:], np.int32),
            "loss_weights": np.asarray(mask[1:], np.float32)}
