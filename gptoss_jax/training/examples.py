"""From a record to what one training example is: ids, the id to predict after each, and whether predicting it is learnt. Imports no JAX.

A record is one of {"messages": harmony's JSON form}, {"messages": OpenAI's chat form, "tools"?} and {"text"}; those with messages may
say "reasoning_effort". Messages and tools may be JSON in a string, the way out for tables whose columns have one type.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptoss_jax.text import harmony
from gptoss_jax.text.chat import THINKING, from_chat
from gptoss_jax.text.tokenizer import Tokenizer, TokenizerError
from gptoss_jax.training.config import DataConfig
from gptoss_jax.training.records import DataError, Records, json_problem

Example = dict[str, np.ndarray]
_CHAT_ONLY = ("tool_calls", *THINKING)


class Question(NamedTuple):
    """A conversation up to where the assistant has the word for the last time, and the message it ended with there."""

    messages: list[Mapping]
    answer: Mapping


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What a record gives: an example {"tokens", "targets", "loss_weights", "records"}, each [T], a problem with its place, or both."""

    example: Example | None
    problem: str = ""
    too_long: bool = False  # the problem: otherwise the record is a bad one


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Number of a record -> Encoded. Can be pickled."""

    records: Records
    tokenizer: Tokenizer
    config: DataConfig

    def __call__(self, number: int) -> Encoded:
        try:
            record = self.records[number]
        except DataError as error:
            return Encoded(None, str(error))
        try:
            example = encode_record(record, self.tokenizer, self.config)
        except (DataError, harmony.HarmonyError, TokenizerError) as error:
            return Encoded(None, f"{self.records.place(number)}: {error}")
        length, limit, problem = len(example["tokens"]), self.config.row_tokens, ""
        if length > limit:
            problem = f"{self.records.place(number)}: {length} tokens found, expected at most {limit}"
            example = {name: values[:limit] for name, values in example.items()}
            if self.config.too_long == "drop" or not example["loss_weights"].any():
                return Encoded(None, problem, too_long=True)
        example["records"] = np.full(len(example["tokens"]), number, np.int64)
        return Encoded(example, problem, too_long=bool(problem))


def encode_record(record: Mapping[str, Any], tokenizer: Tokenizer, config: DataConfig) -> Example:
    """Return {"tokens", "targets", "loss_weights"} of a record, each [T].

    Learnt are all tokens of a text up to <|endoftext|>, and of the assistant's messages those from after the role to the stop token,
    where `config.learn_turns` and `config.learn_channels` say so and the message's "weight" isn't 0. An answer that is not the last is
    followed by <|end|> in the history, as inference has it, but <|return|> is what the model learns to end it with.
    Raises DataError when nothing is learnt, HarmonyError and TokenizerError for what can't be rendered.
    """
    if "messages" in record:
        return _conversation(conversation_messages(record, config.reasoning_effort), tokenizer, config)
    text = record.get("text")
    if not isinstance(text, str) or not text:
        raise DataError(f"a record with {', '.join(map(repr, record)) or 'nothing'} found, expected 'messages' or a non-empty 'text'")
    ids = np.array([tokenizer.special["<|startoftext|>"], *tokenizer.encode(text), tokenizer.special["<|endoftext|>"]], np.int32)
    return {"tokens": ids[:-1], "targets": ids[1:], "loss_weights": np.ones(len(ids) - 1, np.float32)}


def conversation_messages(record: Mapping[str, Any], reasoning_effort: str) -> list[Mapping]:
    """Return the messages of a record in harmony's form, with a system message. reasoning_effort: where the record doesn't say."""
    messages, tools = (_parsed(record.get(name) or [], name) for name in ("messages", "tools"))
    effort = record.get("reasoning_effort") or reasoning_effort
    for number, message in enumerate(messages):
        if message.get("weight") not in (None, 0, 1):
            raise DataError(f"message {number}: weight is {message['weight']!r:.80}, expected 0 or 1")
    if not any(map(_is_harmony, messages)):
        return from_chat(messages, tools=tools, reasoning_effort=effort)
    for number, message in enumerate(messages):
        if mixed := [key for key in _CHAT_ONLY if message.get(key)]:
            raise DataError(f"message {number}: {mixed[0]} found in a conversation of harmony's form, expected a message of its own")
    if tools:
        raise DataError("tools found beside a conversation of harmony's form, expected them in its developer message")
    if messages[0].get("role") == "system":
        return messages
    return [harmony.system_message(reasoning_effort=effort), *messages]


def question_of(messages: Sequence[Mapping]) -> Question | None:
    """Return what a conversation asks last, None where it doesn't end with the assistant or with nothing before it."""
    start = len(messages)
    while start and messages[start - 1].get("role") == "assistant":
        start -= 1
    if start in (0, len(messages)):
        return None
    return Question(harmony.drop_past_analysis(list(messages[:start]), while_at_work=True), messages[-1])


def _parsed(value: Any, name: str) -> Sequence[Mapping]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}: {json_problem(error)}") from None
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise DataError(f"{name} is {value!r:.80}, expected a list of objects")
    return value


def _is_harmony(message: Mapping) -> bool:
    """What only harmony's form has; without any of it the same keys mean the same in both."""
    content = message.get("content")
    items = content if isinstance(content, list) else []
    return any(message.get(key) for key in ("channel", "recipient", "content_type")) or any(
        isinstance(item, Mapping) and item.get("type") in ("system_content", "developer_content") for item in items)


def _conversation(messages: Sequence[Mapping], tokenizer: Tokenizer, config: DataConfig) -> Example:
    if config.learn_turns == "last":
        messages, learnt = _last_turn(messages)
    else:
        learnt = range(len(messages))
    learnt = {number for number in learnt if _counts(messages[number], config.learn_channels)}
    rendered, mask = map(np.array, harmony.render_with_mask(messages, tokenizer, training=True))
    message_of = np.cumsum(rendered == tokenizer.special["<|start|>"]) - 1
    mask &= np.isin(message_of, list(learnt))
    if not mask.any():
        raise DataError("no assistant message to learn found, expected at least one")
    targets = rendered[1:].copy()
    for number in learnt:
        if messages[number].get("channel") == "final" and number + 1 < len(messages) and messages[number + 1].get("role") != "assistant":
            targets[np.flatnonzero(message_of == number)[-1] - 1] = tokenizer.special["<|return|>"]
    return {"tokens": rendered[:-1].astype(np.int32), "targets": targets.astype(np.int32), "loss_weights": mask[1:].astype(np.float32)}


def _counts(message: Mapping, channels: Collection[str]) -> bool:
    return message.get("role") == "assistant" and message.get("weight") != 0 and (message.get("channel") or "final") in channels


def _last_turn(messages: Sequence[Mapping]) -> tuple[list[Mapping], range]:
    """Return the conversation up to its last assistant message, as inference would render it, and the numbers of its last turn."""
    roles = [message.get("role") for message in messages]
    if "assistant" not in roles:
        return list(messages), range(0)
    end = len(roles) - roles[::-1].index("assistant")
    start = max((number for number in range(end) if roles[number] == "user"), default=-1) + 1
    past = harmony.drop_past_analysis(messages[:start], while_at_work=True)
    return [*past, *messages[start:end]], range(len(past), len(past) + end - start)
