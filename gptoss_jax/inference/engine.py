"""Generate and stream for many prompts at once.

Four compiled functions do the work: an empty cache, prefill of a chunk, the first token and a dispatch of decode steps, each compiled once per
bucket: batch and cache length are powers of two, so is a chunk, of which long ones may also end at a quarter between two. Decoding samples on the
device, its cache is donated, and one dispatch takes several steps; the host dispatches the next before it reads the tokens of the one before, so the
device never waits for it.
"""

from __future__ import annotations

import concurrent.futures
import numbers
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptoss_jax import sharding
from gptoss_jax.inference.sampling import Sampling, sample, stack
from gptoss_jax.model import GptOss, make_cache
from gptoss_jax.model.cache import abstract_cache

_SMALLEST_CHUNK = 16
_POWERS_OF_TWO = 1024  # tokens, up to which there is no chunk in between: what is computed in vain costs less than another program
_SMALLEST_CACHE = 256
_PREFILL_CHUNK = {"cpu": 512}  # tokens, elsewhere 8,192: with twice the rows, fewer of the rows in experts' tiles are empty
_STEPS = {"cpu": 1}  # a dispatch, elsewhere 4, in which time the host is done with the next; after a row's end come up to 7 steps, of two dispatches


class PromptError(ValueError):
    """A prompt that can't be run: not integers, empty, too long for the context, or with ids the model doesn't have."""


class Token(NamedTuple):
    """One generated token: of which prompt, its id, its log-probability under the model, and why the row ended with it.

    finish: "stop" for a stop token, "length" when `max_new_tokens` or the context is used up, None while the row goes on.
    """

    row: int
    id: int
    logprob: float
    finish: str | None


class Completion(NamedTuple):
    """All tokens of one prompt, the stop token included."""

    ids: list[int]
    logprobs: list[float]
    finish: str


class Engine:
    """Run a model with a tokenizer's stop and sampleable ids.

    model: GptOss, whose arrays are kept as they are now; `hold` takes those of one trained since. tokenizer: gives `stop_ids` and `sampleable`;
    None stops at the config's eos_token_id and samples every id.
    max_context: tokens of prompt and answer together, at most the config's max_position_embeddings. prefill_chunk: tokens of prompts
    computed at once, of all rows together but at least 16 of each; memory for activations grows with it, not with the prompts. steps_per_dispatch:
    tokens of a row decoded before the host sees them. None takes what suits the device; tokens are the same with any.
    arrange: on a GPU, rearrange the model's weights in place for it (`GptOss.arrange`), as they are never twice in memory.
    """

    def __init__(self, model: GptOss, tokenizer=None, *, max_context: int | None = None, prefill_chunk: int | None = None,
                 steps_per_dispatch: int | None = None, arrange: bool = True):
        config = model.config
        limit = config.max_position_embeddings
        self.max_context = limit if max_context is None else max_context
        if not 1 < self.max_context <= limit:
            raise ValueError(f"max_context is {max_context}, expected 2 to max_position_embeddings = {limit}")
        if arrange:
            model.arrange()
        self.weights = model.arrays()
        home = self.weights["model.embed_tokens.weight"].sharding
        platform = jax.default_backend() if home is None else next(iter(home.device_set)).platform
        self.prefill_chunk = _PREFILL_CHUNK.get(platform, 8192) if prefill_chunk is None else prefill_chunk
        if self.prefill_chunk < _SMALLEST_CHUNK or self.prefill_chunk & (self.prefill_chunk - 1):
            raise ValueError(f"prefill_chunk is {prefill_chunk}, expected a power of two of at least {_SMALLEST_CHUNK}")
        self.steps_per_dispatch = usual_steps(platform) if steps_per_dispatch is None else steps_per_dispatch
        if self.steps_per_dispatch < 1:
            raise ValueError(f"steps_per_dispatch is {steps_per_dispatch}, expected at least 1")
        self.config, self.mesh = config, model.mesh or sharding.ambient_mesh()
        mesh = self.mesh or (home.mesh if isinstance(home, NamedSharding) else None)  # a model may lie on one that it isn't told of
        self._everywhere = home if mesh is None else NamedSharding(mesh, PartitionSpec())
        self.stop_ids = frozenset(config.eos_token_ids if tokenizer is None else tokenizer.stop_ids)
        self.sampleable = config.vocab_size if tokenizer is None else min(tokenizer.sampleable, config.vocab_size)
        self.dtype = self.weights["model.embed_tokens.weight"].dtype
        self._empty = jax.jit(self._empty_state, static_argnums=(0, 1), out_shardings=self._everywhere if self.mesh is None else None)
        self._prefill = jax.jit(self._prefill_step, donate_argnums=(1,))
        read = None if self.mesh is None else self._everywhere  # what the host reads is whole in every process
        self._first = jax.jit(self._first_token, static_argnames=("kind",), out_shardings=read)
        self._decode = jax.jit(self._decode_steps, donate_argnums=(1,), static_argnames=("kind", "stop_ids"), out_shardings=(None, read, read))

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling] = Sampling(), *,
                 max_new_tokens: int = 512) -> list[Completion]:
        """Return a Completion for each prompt (token ids), in order. Arguments and errors as `stream`."""
        rows = [([], []) for _ in prompts]
        finish = [""] * len(rows)
        for token in self.stream(prompts, sampling, max_new_tokens=max_new_tokens):
            rows[token.row][0].append(token.id)
            rows[token.row][1].append(token.logprob)
            finish[token.row] = token.finish or ""
        return [Completion(ids, logprobs, end) for (ids, logprobs), end in zip(rows, finish)]

    def stream(self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling] = Sampling(), *,
               max_new_tokens: int = 512) -> Iterator[Token]:
        """Yield tokens of all prompts as they come, a step at a time.

        sampling: one for all, or one for each. A row ends at a stop id, after `max_new_tokens`, or where the context is full. Raises
        PromptError for an empty prompt, what isn't ids of the vocabulary or a prompt that leaves no room in the context.
        """
        settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(settings) != len(prompts):
            raise ValueError(f"sampling: {len(settings)} settings found, expected one for each of {len(prompts)} prompts")
        if not isinstance(max_new_tokens, numbers.Integral) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens!r}, expected an integer of at least 1")
        self._check(prompts)
        return self._stream(prompts, settings, max_new_tokens) if len(prompts) else iter(())

    def _stream(self, prompts, settings, max_new_tokens) -> Iterator[Token]:
        room = [min(max_new_tokens, self.max_context - len(prompt)) for prompt in prompts]
        length = max(len(prompt) + new for prompt, new in zip(prompts, room))
        batch = _power_of_two(len(prompts))
        spare = batch - len(prompts)
        kind, arrays = stack(settings + settings[-1:] * spare)
        arrays = jax.device_put(arrays)  # which compiles nothing, as jnp.asarray would
        cache, hidden = self._prefill_prompts([*prompts, *[()] * spare], cache_length(length, self.max_context))
        ids, logprobs = self._first(self.weights, hidden, arrays, kind=kind)
        steps = self._steps(cache, ids, logprobs, arrays, np.asarray(room + [0] * spare, np.int32), kind)
        open_rows = set(range(len(prompts)))
        for count, (step_ids, step_logprobs) in enumerate(steps, start=1):
            for row in sorted(open_rows):
                id = int(step_ids[row])
                finish = "stop" if id in self.stop_ids else "length" if count >= room[row] else None
                if finish:
                    open_rows.discard(row)
                yield Token(row, id, float(step_logprobs[row]), finish)
            if not open_rows:
                return

    def _steps(self, cache, ids, logprobs, settings, room_B, kind):
        """Yield (ids [B], logprobs [B]) of each step on the host, the first token's first; each dispatch before those at hand are read.

        After the last row's end come up to two dispatches of steps, less one, that are nobody's.
        """
        pending, count = (ids, logprobs), 1
        open_B = jax.device_put(room_B > 1, self._everywhere)
        while pending:
            read, pending = pending, None
            if count < room_B.max():
                cache, (ids, open_B), pending = self._decode(self.weights, cache, (ids, open_B), settings, np.int32(count), room_B, kind=kind,
                                                              stop_ids=frozenset(self.stop_ids))
                count += self.steps_per_dispatch
            yield from zip(*map(np.atleast_2d, jax.device_get(read)))

    def _prefill_prompts(self, prompts, length: int):
        """Return (cache of `length` slots, final hidden state of each prompt's last token [B, D]), computed chunk by chunk."""
        batch, longest = len(prompts), max(map(len, prompts))
        cache, hidden = self._empty(batch, length)
        chunks = self._chunks(batch, longest)
        if len(chunks) == 1:  # else one program serves all chunks
            cache = cache._replace(lengths=None)
        for start, chunk in zip(range(0, longest, chunks[0]), chunks):
            tokens = np.zeros((batch, chunk), np.int32)
            counts = np.zeros(batch, np.int32)
            for row, prompt in enumerate(prompts):
                part = prompt[start : start + chunk]
                tokens[row, : len(part)], counts[row] = part, len(part)
            cache, hidden = self._prefill(self.weights, (cache, hidden), tokens, counts)
        return cache, hidden

    def _chunks(self, batch: int, tokens: int) -> list[int]:
        """Return how many tokens of each row are computed at once, chunk by chunk, where the longest prompt has `tokens`."""
        most = max(_SMALLEST_CHUNK, self.prefill_chunk // batch)
        return [chunk_length(tokens - start, most) for start in range(0, tokens, most)]

    def _model(self, weights) -> GptOss:
        return GptOss(self.config, weights, mesh=self.mesh)

    def _empty_state(self, batch: int, length: int):
        """Return (cache, final hidden states [B, D]) of rows that have seen nothing, where a prefill's outputs lie too: compiled once."""
        hidden = jnp.zeros((batch, self.config.hidden_size), self.dtype)
        if self.mesh is not None:
            hidden = jax.lax.with_sharding_constraint(hidden, self._everywhere)
        return make_cache(self.config, batch, length, self.dtype, mesh=self.mesh), hidden

    def _prefill_step(self, weights, state, tokens_BT, counts_B):
        cache, hidden_BD = state
        real_BT = jnp.arange(tokens_BT.shape[1]) < counts_B[:, None]
        last_B1D, cache = self._model(weights).hidden_states(tokens_BT, segment_ids=real_BT.astype(jnp.int32), cache=cache, last=True)
        return cache, jnp.where((counts_B > 0)[:, None], last_B1D[:, 0], hidden_BD)

    def _first_token(self, weights, hidden_BD, settings, *, kind):
        step_B = jnp.zeros(len(hidden_BD), jnp.int32)
        return sample(self._model(weights).unembed(hidden_BD), settings, step_B, kind=kind, sampleable=self.sampleable)

    def _decode_steps(self, weights, cache, rows, settings, count, room_B, *, kind, stop_ids):
        """Decode steps_per_dispatch steps. count: tokens each row has. rows: (last ids, which rows are open). Returns (cache, rows, (ids [steps, B],
        logprobs [steps, B])).

        A row is open until a stop id or its room. It goes on being computed until the dispatch is done: a loop of a number of steps that XLA knows
        never waits for the host. In later ones it goes to no expert and reads no keys, or one tile; only a lone row, after whose end no more than one
        dispatch comes, is computed as if it were open.
        """
        model, (ids_B, open_B) = self._model(weights), rows
        stop_ids = jnp.asarray(sorted(stop_ids), jnp.int32)

        def goes_on(ids):
            return ~(ids[..., None] == stop_ids).any(axis=-1)

        def step(done, carry):
            cache, ids_B, *tokens = carry
            x_BTD, cache = model.hidden_states(ids_B[:, None], segment_ids=segments_B1, cache=cache)
            ids_B, logprobs_B = sample(model.unembed(x_BTD[:, 0]), settings, jnp.broadcast_to(count + done, ids_B.shape), kind=kind, sampleable=self.sampleable)
            here = jnp.arange(shape[0])[:, None] == done  # a select: an update of a slice would be a copy on another stream
            return cache, ids_B, *(jnp.where(here, new, old) for new, old in zip((ids_B, logprobs_B), tokens, strict=True))

        shape = self.steps_per_dispatch, ids_B.shape[0]
        several = len(open_B) > 1
        if several:
            open_B &= goes_on(ids_B) & (count < room_B)
        segments_B1 = open_B[:, None].astype(jnp.int32) if several else None
        carry = cache, ids_B, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
        cache, ids_B, *tokens = jax.lax.fori_loop(0, shape[0], step, carry)
        return cache, (ids_B, open_B & goes_on(tokens[0]).all(axis=0) if several else open_B), tuple(tokens)

    def lower(self, batch: int, tokens: int) -> dict[str, jax.stages.Lowered]:
        """Lower what runs, for `batch` rows of up to `tokens` tokens, with the sampler that takes most memory. Nothing is allocated or run.

        The model may hold jax.ShapeDtypeStructs, with shardings of devices that aren't here.
        """
        (prefill, *_), _, decode = self._calls(batch, cache_length(tokens, self.max_context), tokens, Sampling(top_k=1))
        return {name: jitted.lower(*arguments, **static) for name, (jitted, arguments, static) in (("prefill", prefill), ("decode", decode))}

    def compile(self, tokens: int, max_new_tokens: int, sampling: Sampling, *, batch: int = 1) -> None:
        """Compile what `stream` will run for `batch` prompts of so many tokens. The model may hold jax.ShapeDtypeStructs: `hold` then gives the arrays."""
        length = cache_length(min(tokens + max_new_tokens, self.max_context), self.max_context)
        prompts, first, decode = self._calls(_power_of_two(batch), length, tokens, sampling)
        calls = [*prompts, first, *[decode] * (max_new_tokens > 1)]
        with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:  # lowered one after another, which is Python's; compiled beside each other
            for compiled in [pool.submit(jitted.lower(*arguments, **static).compile) for jitted, arguments, static in calls]:
                compiled.result()

    def hold(self, model: GptOss) -> bool:
        """Take a model's arrays in place of those that this engine was made with, which its own may have stood for; return whether they are alike, as
        it takes no others: scale bytes decide how experts are arranged, and abstract ones can't be looked at."""
        model.arrange()
        arrays = model.arrays()
        ours, theirs = ({name: (array.dtype, array.shape) for name, array in named.items()} for named in (self.weights, arrays))
        if ours == theirs:
            self.weights = arrays
        return ours == theirs

    def _calls(self, batch: int, length: int, tokens: int, sampling: Sampling):
        """Return [prefill, largest chunk first, and empty state], first token, decode for rows of up to `tokens` tokens of prompt over a cache of
        `length` slots: (function, abstract arguments, static arguments) of each."""
        abstract, everywhere = jax.ShapeDtypeStruct, self._everywhere
        cache = abstract_cache(self.config, batch, length, self.dtype, mesh=self.mesh, elsewhere=everywhere)
        hidden = abstract((batch, self.config.hidden_size), self.dtype, sharding=everywhere)
        ids, counts = abstract((batch,), np.int32, sharding=everywhere), abstract((batch,), np.int32)
        kind, settings = stack([sampling] * batch)
        chunks = self._chunks(batch, tokens)
        state = (cache._replace(lengths=None) if len(chunks) == 1 else cache), hidden
        prefills = [(self._prefill, (self.weights, state, abstract((batch, chunk), np.int32), counts), {}) for chunk in sorted(set(chunks), reverse=True)]
        first = self._first, (self.weights, hidden, settings), {"kind": kind}
        rows = ids, abstract((batch,), np.bool, sharding=everywhere)
        decode = self._decode, (self.weights, cache, rows, settings, abstract((), np.int32), counts), {"kind": kind, "stop_ids": frozenset(self.stop_ids)}
        return [*prefills, (self._empty, (batch, length), {})], first, decode

    def _check(self, prompts) -> None:
        for row, prompt in enumerate(prompts):
            ids = np.asarray(prompt)
            if ids.shape == (0,):
                raise PromptError(f"prompt {row} is empty, expected at least one token")
            if ids.ndim != 1 or ids.dtype.kind not in "iu":
                raise PromptError(f"prompt {row} is {ids.tolist()!r:.80}, expected integers, the ids of tokens")
            if len(ids) >= self.max_context:
                raise PromptError(f"prompt {row} has {len(ids)} tokens, expected fewer than the context of {self.max_context}")
            if (outside := ids[(ids < 0) | (ids >= self.config.vocab_size)]).size:
                raise PromptError(f"prompt {row} holds the id {outside[0]}, expected 0 to {self.config.vocab_size - 1}")


def usual_steps(platform: str) -> int:
    """Return the steps of a dispatch where none are asked for."""
    return _STEPS.get(platform, 4)


def cache_length(tokens: int, max_context: int) -> int:
    """Return the slots of the cache that rows of up to `tokens` tokens, answer included, get: a multiple of 8, as decode's kernel takes it."""
    return min(_power_of_two(max(tokens, _SMALLEST_CACHE)), -(-max_context // 8) * 8)


def chunk_length(tokens: int, most: int) -> int:
    """Return as how many tokens of a row so many of its prompt are computed at once, `most` if it is that many or more."""
    return max(_SMALLEST_CHUNK, min(_bucket(tokens), most))


def _bucket(tokens: int) -> int:
    """Return the tokens that so many are computed as: a power of two or, where that is many, a multiple of a quarter of the one below."""
    whole = _power_of_two(tokens)
    step = whole // 8 if whole > _POWERS_OF_TWO else whole
    return -(-tokens // step) * step


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()
