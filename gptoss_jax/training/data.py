"""Input pipeline: seeded conversations -> harmony ids with a loss mask -> packed rows -> batches. The only place that knows grain.

Every stage is deterministic and the iterator's state is a small JSON object, so that a resumed run sees the batches it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from gptoss_jax.text import harmony
from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.training import synthetic
from gptoss_jax.training.step import Batch

_PACKING_ROWS = 64  # filled side by side; more rows, less padding
_FOREVER = 1 << 40


class DataError(ValueError):
    """An example that can't be trained on; says which and why."""


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


def synthetic_examples(tokenizer: Tokenizer, *, seed: int, split: str, max_tokens: int) -> grain.IterDataset:
    """Return the endless stream of synthetic conversations as examples; those longer than a row are left out."""

    def example(index: int) -> dict[str, np.ndarray] | None:
        sample = synthetic.conversation(seed, index, split)
        encoded = encode(sample.conversation, tokenizer, sample.prompt_length)
        return encoded if len(encoded["tokens"]) <= max_tokens else None

    return grain.MapDataset.range(_FOREVER).map(example).filter(lambda example: example is not None).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=64), allow_nones=False)


def batches(examples: grain.IterDataset, *, batch_size: int, row_tokens: int, seed: int) -> grain.DatasetIterator:
    """Pack examples into rows of `row_tokens` and rows into batches; an iterator of dicts with `get_state` and `set_state`."""
    lengths = {"tokens": row_tokens, "targets": row_tokens, "loss_weights": row_tokens}
    packed = grain.experimental.FirstFitPackIterDataset(examples, length_struct=lengths, num_packing_bins=_PACKING_ROWS, seed=seed)
    return iter(packed.batch(batch_size, drop_remainder=True))


def to_batch(rows: Mapping[str, np.ndarray]) -> Batch:
    """Return what the packer made as a Batch. Segments are numbered from 1 in each row, positions count from 0 in each segment."""
    return Batch(rows["tokens"], rows["targets"], rows["loss_weights"], rows["tokens_segment_ids"], rows["tokens_positions"])


def fixed_batches(tokenizer: Tokenizer, *, seed: int, split: str, count: int, batch_size: int, row_tokens: int) -> list[Batch]:
    """Return the first `count` batches of a split, for evaluation at intervals."""
    examples = synthetic_examples(tokenizer, seed=seed, split=split, max_tokens=row_tokens)
    iterator: Iterator = batches(examples, batch_size=batch_size, row_tokens=row_tokens, seed=seed)
    return [to_batch(next(iterator)) for _ in range(count)]
