"""One assistant turn: a conversation rendered with harmony, generated, and parsed as it streams."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from gptoss_jax.inference.engine import Engine
from gptoss_jax.inference.sampling import Sampling
from gptoss_jax.text import harmony


class Turn:
    """Iterate to generate: yields (token id, harmony events it brought about). Afterwards, or when interrupted, the rest is filled in.

    messages: what the assistant said, in harmony's JSON form; skipped: output that belongs to no message, of which the last is not malformed where
    ends_in_header: it was cut off there. finish: "stop",
    "call" when it waits for a tool's result, "length", or "interrupted". prompt_ids, ids, logprobs: tokens in and out, at most max_context together.
    """

    def __init__(self, engine: Engine, tokenizer, messages: Sequence[dict], sampling: Sampling, max_new_tokens: int):
        conversation = harmony.drop_past_analysis(messages, while_at_work=True)
        self.prompt_ids = harmony.render(conversation, tokenizer, next_role="assistant")
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish, self.ends_in_header = "interrupted", False
        self.first_token_seconds = self.seconds = 0.0
        self.max_context = engine.max_context
        self._started = time.perf_counter()
        self._tokens = engine.stream([self.prompt_ids], sampling, max_new_tokens=max_new_tokens)
        self._parser = harmony.StreamParser(tokenizer, "assistant")
        self._call_id = tokenizer.special["<|call|>"]

    @property
    def messages(self) -> list[dict]:
        return self._parser.messages

    @property
    def skipped(self) -> list[harmony.Skipped]:
        return self._parser.skipped

    def __iter__(self) -> Iterator[tuple[int | None, list[harmony.Event]]]:
        try:
            for token in self._tokens:
                self.seconds = time.perf_counter() - self._started
                self.first_token_seconds = self.first_token_seconds or self.seconds
                self.ids.append(token.id)
                self.logprobs.append(token.logprob)
                events = self._parser.feed(token.id)
                if token.finish:
                    self.finish = "call" if token.id == self._call_id else token.finish
                yield token.id, events
        finally:
            cut = self.finish in ("length", "interrupted") and self._parser.state == "header"
            ending = self._parser.finish()
            self.ends_in_header = cut and bool(ending)
        yield None, ending

    def usage(self) -> dict:
        """Return token counts, seconds to the first token, and tokens per second after it."""
        decoding = self.seconds - self.first_token_seconds
        rate = (len(self.ids) - 1) / decoding if len(self.ids) > 1 and decoding > 0 else None
        return {"prompt_tokens": len(self.prompt_ids), "completion_tokens": len(self.ids),
                "first_token_seconds": round(self.first_token_seconds, 4), "tokens_per_second": rate and round(rate, 2)}
