"""Choosing the next token, on the device, each row with its own settings and its own random stream.

On a GPU what a token takes is the number of kernels started: there a pass over the logits does more, and passes are fewer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_KINDS = ("greedy", "plain", "nucleus", "filtered")  # of compiled samplers: each serves what those before it do
_LOWEST = -1e30
_BLOCK = 512  # ids a block: about the square root of their number
_IMPOSSIBLE = -1e8  # a logit whose probability is 0 by far; 1,287,568,417 float32 from here to 0
_SEARCH = {"cuda": (33, 6), "default": (2, 31)}  # (parts, passes) of `_search`: as many parts to the power of passes, at least


class SamplingError(ValueError):
    """A sampling setting out of range; names it, the value found and what was expected."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose tokens: temperature first, then top-k, top-p (of what is left) and min-p, as transformers orders them.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 filter nothing; equal probabilities at a cut are all kept. The same seed gives the
    same tokens whatever else is in the batch. Raises SamplingError naming the field when a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name, holds, expected in (
            ("temperature", lambda v: 0 <= v < math.inf, "a number of at least 0"),
            ("top_k", lambda v: 0 <= v < 2**31 and v == int(v), "an integer of at least 0 (0: no limit)"),
            ("top_p", lambda v: 0 < v <= 1, "a number above 0, at most 1"),
            ("min_p", lambda v: 0 <= v <= 1, "a number from 0 to 1"),
            ("seed", lambda v: 0 <= v < 2**32 and v == int(v), "an integer from 0 to 4294967295"),
        ):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or not holds(value):
                raise SamplingError(f"{name} is {value!r}, expected {expected}")

    @property
    def kind(self) -> str:
        """The cheapest of the compiled samplers that serves these settings."""
        if self.temperature == 0:
            return "greedy"
        if self.top_k:
            return "filtered"
        return "plain" if self.top_p == 1 and self.min_p == 0 else "nucleus"


class SamplingArrays(NamedTuple):
    """The settings of each row of a batch, [B] each."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array


def stack(settings: Sequence[Sampling]) -> tuple[str, SamplingArrays]:
    """Return (which compiled sampler serves all rows, their settings as arrays)."""
    dtypes = SamplingArrays(np.float32, np.int32, np.float32, np.float32, np.uint32)
    columns = (np.asarray([getattr(s, name) for s in settings], dtype) for name, dtype in dtypes._asdict().items())
    return max((s.kind for s in settings), key=_KINDS.index), SamplingArrays(*columns)


def sample(logits_BV, settings: SamplingArrays, step_B, *, kind: str, sampleable: int):
    """Return (ids int32 [B], their log-probabilities float32 [B] under the model's own distribution, before temperature and filters).

    step: how many tokens the row has generated, so that its random numbers depend on nothing but its seed and the step.
    kind: from `stack`. sampleable: ids from here up are never chosen and have no probability. Compiled for one row on an H100 the greedy kind
    starts 3 kernels, plain 11, nucleus (top-p and min-p) 32, filtered (top-k, too) 52.
    """
    id_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
    logits_BV = jnp.where(id_V < sampleable, logits_BV, _LOWEST)
    one_pass, two_passes = (functools.partial(run, last=sampleable - 1) for run in (_in_one_pass, _in_two_passes))
    largest_B, ids_B, total_B = jax.lax.platform_dependent(logits_BV, cuda=one_pass, default=two_passes)
    logits_BV -= largest_B[:, None]
    if kind != "greedy":
        scaled = jnp.maximum(logits_BV / jnp.maximum(settings.temperature, 1e-6)[:, None], _LOWEST)
        if kind in ("nucleus", "filtered"):
            scaled = jax.vmap(functools.partial(_filter, counting=kind == "filtered"))(scaled, settings)
        drawn_B = jax.vmap(_draw)(scaled, settings.seed, step_B)
        ids_B = jnp.where(settings.temperature > 0, drawn_B, ids_B)
    logprobs_B = jnp.take_along_axis(logits_BV, ids_B[:, None], axis=-1)[:, 0] - jnp.log(total_B)
    return ids_B, logprobs_B


def _in_two_passes(logits_BV, *, last: int):
    """Return of each row (the largest logit, the first id that has it, the sum of exp(logit - largest)). last: the id where there is none."""
    largest_B = logits_BV.max(axis=-1)
    logits_BV -= largest_B[:, None]
    # `argmax` is a loop without vector instructions on CPUs.
    return largest_B, jnp.where(logits_BV == 0, jnp.arange(logits_BV.shape[1], dtype=jnp.int32), last).min(axis=-1), jnp.exp(logits_BV).sum(axis=-1)


def _in_one_pass(logits_BV, *, last: int):
    """Return the same: parts of a row are merged, which takes two exponentials an id."""

    def merge(a, b):
        largest = jnp.maximum(a[0], b[0])
        first = jnp.minimum(*(jnp.where(part[0] == largest, part[1], last) for part in (a, b)))
        return largest, first, sum(part[2] * jnp.exp(part[0] - largest) for part in (a, b))

    id_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
    nothing = np.float32(2 * _LOWEST), np.int32(last), np.float32(0)
    return jax.lax.reduce((logits_BV, id_BV, jnp.ones_like(logits_BV)), nothing, merge, (1,))


def _draw(logits_V, seed, step):
    """Draw an id by inverting the cumulative distribution, of blocks of ids first, then within the block. logits: largest 0.

    Two random numbers; Gumbel noise would take one for each of 201,088 ids, milliseconds a token on a CPU.
    """
    weights_V = jnp.exp(logits_V)
    blocks = jnp.pad(weights_V, (0, -weights_V.shape[0] % _BLOCK)).reshape(-1, _BLOCK)
    uniform = jax.random.uniform(jax.random.fold_in(jax.random.key(seed), step), (2,), jnp.float32)
    block = _invert(blocks.sum(axis=1), uniform[0])
    return (block * _BLOCK + _invert(blocks[block], uniform[1])).astype(jnp.int32)


def _invert(weights, uniform):
    """Return the index where the cumulative weights pass `uniform` of their sum; never one without weight, however sums are rounded."""
    below = functools.partial(jnp.tri, weights.shape[0], dtype=bool)  # for a kernel where `cumsum` is two
    cumulative = jax.lax.platform_dependent(weights, cuda=lambda weights: jnp.where(below(), weights, 0).sum(axis=1), default=jnp.cumsum)
    passed = (cumulative > uniform * cumulative[-1]) & (weights > 0)
    return jnp.argmax(jnp.where(passed, jnp.inf, weights))  # the first that passed; where rounding let none, the largest


def _filter(logits_V, settings: SamplingArrays, *, counting: bool):
    """Lower what the row's settings exclude. logits: scaled by temperature, largest 0. counting: whether a row has a top-k."""
    weights, cut = jnp.exp(logits_V), jnp.float32(_IMPOSSIBLE)
    if counting:
        top_k = jnp.where(settings.top_k > 0, settings.top_k, logits_V.shape[0])
        cut = _cut(logits_V, jnp.ones_like(logits_V), top_k.astype(jnp.float32), cut)
    cut = _cut(logits_V, weights, settings.top_p * jnp.where(logits_V >= cut, weights, 0).sum(), cut)
    return jnp.where((logits_V >= cut) & (weights >= settings.min_p), logits_V, _LOWEST)


def _cut(values_V, weights_V, target, least):
    """Return the largest value such that the weights of all values not below it sum to at least `target`; `least` when none above that does.

    values: float32, the largest 0. least: float32, from _IMPOSSIBLE to 0.
    """
    by_platform = {platform: functools.partial(_search, ways=ways, passes=passes) for platform, (ways, passes) in _SEARCH.items()}
    return jax.lax.platform_dependent(values_V, weights_V, target, least, **by_platform)


def _search(values_V, weights_V, target, least, *, ways: int, passes: int):
    """Search float32's bit patterns: exact, and far cheaper than sorting 201,088 logits.

    A pass sums for the ways - 1 bounds between equal parts of what is left. All sums are taken in the same order, so that none is above that
    of a lower bound, however they are rounded.
    """

    def narrow(bounds_W, steps_2W):
        sums_W = jnp.where(ordered_V[:, None] >= bounds_W, weights_V[:, None], 0).sum(axis=0)
        reached_W = jnp.where(sums_W >= target, bounds_W, bounds_W[0] - steps_2W[0, 0])
        return (reached_W + steps_2W[1, :, None]).max(axis=1), None  # the next bounds: with the largest reached by itself a kernel more

    ordered_V, low = _ordered(values_V), _ordered(least)
    steps_PW = np.asarray([[way * ways**left for way in range(1, ways)] for left in reversed(range(passes))] + [[0] * (ways - 1)], np.int32)
    bounds_W, _ = jax.lax.scan(narrow, low + steps_PW[0], np.stack([steps_PW[:-1], steps_PW[1:]], 1), unroll=ways > 2)
    low = jnp.minimum(bounds_W[0], 0)
    return jax.lax.bitcast_convert_type(jnp.where(low < 0, low ^ 0x7FFFFFFF, low), jnp.float32)


def _ordered(values):
    """Return int32 in the order of the float32."""
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
