"""Whether a model fits: weights and cache by arithmetic, temporaries by compiling the engine's own steps for the device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from gptoss_jax import devices, sharding
from gptoss_jax.config import GptOssConfig
from gptoss_jax.devices import Plan, PlanError
from gptoss_jax.inference.engine import Engine, cache_length
from gptoss_jax.model import GptOss, cost

CONTEXT_STEP = 1024
MOST_ROWS = 4096  # that are looked at


def check_request(config: GptOssConfig, batch: int, context: int) -> None:
    """Raise PlanError for a batch or a context that the engine doesn't take."""
    if batch < 1 or batch & (batch - 1):
        raise PlanError(f"batch is {batch}, expected a power of two: the engine rounds up to one")
    if not 1 < context <= config.max_position_embeddings:
        raise PlanError(f"context is {context}, expected 2 to the model's maximum of {config.max_position_embeddings}")


def by_arithmetic(config: GptOssConfig, batch: int, context: int, *, dtype: str = "bfloat16", mesh=None, memory: int) -> Plan:
    """Return the plan of weights and cache alone: exact, and temporaries unknown. Raises ShardingError."""
    return Plan(memory, {"weights": cost.weight_bytes(config, dtype, mesh), "cache": _cache_bytes(config, batch, context, dtype, mesh)})


def _cache_bytes(config: GptOssConfig, batch: int, context: int, dtype: str, mesh) -> int:
    """Return the bytes of the cache that an engine of max_context `context` has when rows are as long."""
    return cost.cache_bytes(config, batch, cache_length(context, context), dtype, mesh)


def announce(config: GptOssConfig, batch: int, context: int, *, dtype: str = "bfloat16", mesh=None, loaded: bool = False,
             write: Callable[[str], None]) -> None:
    """Write a line of what weights, unless they are loaded, and cache will take of this process's first device. Raises PlanError, the table written,
    where it has less."""
    memory, where = devices.free_here(1 if mesh is None else mesh.size)
    weights, cache = by_arithmetic(config, batch, context, dtype=dtype, mesh=mesh, memory=memory).parts.values()
    Plan(memory, ({} if loaded else {"weights": weights}) | {f"cache of {batch} x {context:,} tokens": cache}).announce(where, write)


class Planner:
    """Compiles the engine's steps of one model for one device kind and mesh.

    kind: of `devices.KINDS`; axes: mesh axes of more than one device. Raises DeviceError, ShardingError.
    """

    def __init__(self, config: GptOssConfig, kind: str, axes: Mapping[str, int] = {}, *, dtype: str = "bfloat16"):
        self.config, self.kind, self.dtype = config, kind, dtype
        count = cost.abstract_mesh(**axes).size
        self.memory = devices.memory_of_each(kind, count)
        cost.weight_bytes(config, dtype, cost.abstract_mesh(**axes))  # finds what doesn't divide, before a compiler is asked for
        self.devices = devices.described(kind, count)
        self.mesh = sharding.make_mesh(**axes, devices=self.devices) if count > 1 else None
        self._seen: dict[tuple, Plan] = {}

    def at(self, batch: int, context: int) -> Plan:
        """Return the plan of the whole model, its steps compiled. Raises PlanError for what the engine doesn't take."""
        check_request(self.config, batch, context)
        return self._compile(self.config, batch, context)

    def chunk_tokens(self, batch: int, context: int) -> int:
        """Return how many tokens of all rows together the plan's prefill computes at once."""
        return batch * self._engine(self.config, context)._chunks(batch, context)[0]

    def longest_context(self, batch: int, known: Plan, context: int) -> int | None:
        """Return the longest context that fits, to 1,024 tokens or, below, a power of two; None for none. known: the plan at (batch, context)."""
        limit = self.config.max_position_embeddings
        candidates = [length for length in (16, 32, 64, 128, 256, 512, *range(CONTEXT_STEP, limit, CONTEXT_STEP)) if length < limit] + [limit]
        return self._largest(candidates, context, known, lambda length: (batch, length))

    def largest_batch(self, context: int, known: Plan, batch: int) -> int | None:
        """Return the largest batch that fits, a power of two up to 4,096, None for none. known: the plan at (batch, context)."""
        return self._largest([1 << power for power in range(MOST_ROWS.bit_length())], batch, known, lambda rows: (rows, context))

    def _largest(self, candidates: Sequence[int], at: int, known: Plan, point: Callable[[int], tuple[int, int]]) -> int | None:
        """Guess by arithmetic, compile, guess again between what fits and what was refused: temporaries are taken as linear, between the two or
        through the last two found, whichever is less.

        What fits at `at` is the least to be returned; None only where the smallest candidate, compiled whole, doesn't fit. Compiled otherwise
        is a model with one layer of each kind, two where there is one kind, as the last layer's experts get few tokens of a prompt: temporaries
        hardly depend on the number of layers, by a constant that `known` tells. On TPUs they do: a decode step keeps a padded copy of every layer's
        cache. There the whole model is compiled, which takes little longer.
        """
        kinds = tuple(dict.fromkeys(self.config.layer_types))
        kinds = kinds if len(kinds) > 1 else self.config.layer_types[:2]
        whole = devices.kind_named(self.kind).platform == "tpu"
        shallow = self.config if whole else self.config.replace(num_hidden_layers=len(kinds), layer_types=kinds)

        def extra(plan: Plan) -> int:
            return plan.needed - plan.kept

        def needed(value: int, beside: float) -> float:
            return known.parts["weights"] + _cache_bytes(self.config, *point(value), self.dtype, self.mesh) + beside

        refused = None
        if known.needed > self.memory:
            refused, at = (at, extra(known)), candidates[0]
            if needed(at, 0) > self.memory or (known := self._compile(self.config, *point(at))).needed > self.memory:
                return None
        fits, constant, halve = (at, extra(known)), extra(known) - extra(self._compile(shallow, *point(at))), False
        last = refused or (0, extra(known)), fits
        while True:
            lines = [last, (fits, refused)] if refused else [last]
            likely = [value for value in candidates if fits[0] < value < (refused[0] if refused else math.inf) and needed(
                value, min(y + (value - x) * (y - before) / (x - start) for (start, before), (x, y) in lines)) <= self.memory]
            if not likely:
                return fits[0]
            guess = likely[len(likely) // 2 if halve else -1]  # the largest, but after one that was refused the middle: no creeping down
            tried = guess, extra(self._compile(shallow, *point(guess), guess=True)) + constant
            if halve := needed(*tried) > self.memory:
                refused = tried
            else:
                fits = tried
            last = last[1], tried

    def _engine(self, config: GptOssConfig, context: int) -> Engine:
        weights = cost.abstract_weights(config, self.dtype, self.mesh, self.devices[0])
        return Engine(GptOss(config, weights, mesh=self.mesh), max_context=context)

    def _compile(self, config: GptOssConfig, batch: int, context: int, guess: bool = False) -> Plan:
        """guess: a decode step that doesn't fit is enough, prefill isn't compiled, too, which on TPUs takes longer."""
        key = (config, batch, context, guess)
        if key not in self._seen:
            exact = by_arithmetic(config, batch, context, dtype=self.dtype, mesh=self.mesh, memory=self.memory)
            padding, temporaries, collectives = 0, {}, {}
            programs = self._engine(config, context).lower(batch, context)
            for name in sorted(programs, key="decode".__ne__) if guess else programs:
                try:
                    step = devices.finish(programs[name])
                except devices.OutOfMemory as error:
                    temporaries[name] = error.temporaries(exact)
                    if guess:
                        break
                    continue
                memory = step.memory
                if name == "decode":  # which takes every weight
                    padding = max(memory.arguments_bytes - exact.kept, 0)
                temporaries[name] = memory.temporaries_bytes + memory.outputs_bytes
                collectives[name] = step.collectives
            self._seen[key] = dataclasses.replace(exact, padding=padding, temporaries=temporaries, collectives=collectives)
        return self._seen[key]
