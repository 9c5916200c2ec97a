"""Timing the engine, against what this device's memory and matrix units reach in the same run.

Every measurement is a dict with plain values: medians of `repetitions`, `lowest` and `highest` beside them, compilation apart.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.config import GptOssConfig
from gptoss_jax.inference.engine import Engine, cache_length, usual_steps
from gptoss_jax.inference.sampling import Sampling
from gptoss_jax.model import GptOss, cost
from gptoss_jax.model.cache import abstract_cache

GREEDY = Sampling(temperature=0)
WARM_STEPS = 8


class Ceilings(NamedTuple):
    """What this device reaches: bytes per second (the better of reading, and copying with both directions counted) and FLOP per second."""

    bandwidth: float
    matmul: float


def ceilings(dtype: str = "bfloat16") -> Ceilings:
    """Measure a large read and copy (on CPUs a read), and a large matrix product on random numbers in `dtype`."""
    small = jax.local_devices()[0].platform == "cpu"
    bandwidth = _host_bandwidth() if small else _device_bandwidth()
    side = 1024 if small else 8192
    a, b = (jax.random.normal(key, (side, side), dtype) for key in jax.random.split(jax.random.key(1, impl="rbg")))
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype))
    return Ceilings(bandwidth, 2 * side**3 / min(batches(lambda: multiply(a, b), 3, 4 if small else 16)))


def _device_bandwidth() -> float:
    data = jax.random.bits(jax.random.key(0, impl="rbg"), (1 << 28,), jnp.uint32)
    copy, read = jax.jit(lambda x: x ^ jnp.uint32(1)), jax.jit(lambda x: x.max())
    # As many as keep the wait for the last from counting: of 4 reads it was 8 % on an H200. Results of copies are held until all are there.
    return max(2 * data.nbytes / min(batches(lambda: copy(data), 3, 8)), data.nbytes / min(batches(lambda: read(data), 3, 64)))


def _host_bandwidth() -> float:
    """Return bytes per second of reading with a thread a core, by numpy: XLA's loops on CPUs reach a third of it."""
    threads, data = _cores(), np.ones(1 << 25)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return data.nbytes / min(batches(lambda: list(pool.map(np.max, np.array_split(data, threads))), 5, 1))


def read_seconds(files: Sequence[str | os.PathLike]) -> float:
    """Return the seconds that a plain read of files takes, the fastest of three after a first: from the page cache, where they fit. A thread a core
    reads into a buffer that it uses again, so that no memory is made for what is read."""
    threads, size = _cores(), 1 << 20
    buffers = [bytearray(size) for _ in range(threads)]

    def read(share: int) -> None:
        for file in files:
            with open(file, "rb", buffering=0) as stream:
                for start in range(share * size, os.fstat(stream.fileno()).st_size, threads * size):
                    stream.seek(start)
                    stream.readinto(buffers[share])

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return min(batches(lambda: list(pool.map(read, range(threads))), 3, 1))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def random_weights(config: GptOssConfig, dtype: str = "bfloat16", *, seed: int = 0, mesh=None) -> dict[str, jax.Array]:
    """Make weights on the device itself: random bits and numbers, scaled so that activations neither vanish nor overflow."""
    targets = cost.abstract_weights(config, dtype, mesh, None if mesh is not None else jax.local_devices()[0])
    key = jax.random.key(seed, impl="rbg")
    makers: dict[tuple, Callable] = {}
    weights = {}
    for index, (name, target) in enumerate(targets.items()):
        kind = _kind(name)
        what = (kind, target.shape, target.dtype, target.sharding)
        if what not in makers:
            makers[what] = jax.jit(functools.partial(draw, *what[:3]), out_shardings=target.sharding)
        weights[name] = makers[what](jax.random.fold_in(key, index))
    return weights


def _kind(name: str) -> str:
    endings = "_blocks", "_scales", "norm.weight", "bias", "sinks", "embed_tokens.weight", "experts.gate_up_proj", "experts.down_proj"
    return next((ending for ending in endings if name.endswith(ending)), "matrix")


def draw(kind: str, shape, dtype, key):
    if kind == "_blocks":
        return jax.random.bits(key, shape, jnp.uint8)
    if kind == "_scales":  # the mean square of all e2m1 codes is 8.56
        middle = 127 - round(math.log2(8.56**0.5 * (shape[-1] * 32) ** 0.5))
        return jnp.uint8(middle - 1) + jax.random.bits(key, shape, jnp.uint8) % jnp.uint8(3)
    if kind == "norm.weight":
        return jnp.ones(shape, dtype)
    inputs = shape[1] if kind.startswith("experts.") else shape[-1]
    scale = {"bias": 0.02, "sinks": 1.0, "embed_tokens.weight": 1.0}.get(kind, inputs**-0.5)
    return (jax.random.normal(key, shape) * scale).astype(dtype)


class _Primed(Engine):
    """An engine that finds its prompts computed: random keys and values, so that decoding a long context needs no prefill of it. Its cache is for rows
    of max_context, however long they are."""

    def _prefill_prompts(self, prompts, length: int):
        cache, fill, hidden = self._random(len(prompts))
        layers, hidden = jax.tree.map(lambda target: fill[target](jax.random.key(0, impl="rbg")), (cache.layers, hidden))
        lengths = jax.device_put(np.asarray([len(prompt) for prompt in prompts], np.int32), self._everywhere)
        return cache._replace(lengths=lengths, layers=layers), hidden

    def _random(self, batch: int):
        """Return the cache and final hidden states that prompts leave, abstract, and what makes each kind of array at random."""
        slots = cache_length(self.max_context, self.max_context)
        cache = abstract_cache(self.config, batch, slots, self.dtype, mesh=self.mesh, elsewhere=self._everywhere)
        hidden = jax.ShapeDtypeStruct((batch, self.config.hidden_size), self.dtype, sharding=self._everywhere)
        return cache, {target: _normal(target.shape, target.dtype, target.sharding) for target in jax.tree.leaves((cache.layers, hidden))}, hidden

    def _calls(self, batch: int, length: int, tokens: int, sampling: Sampling):
        _, *others = super()._calls(batch, length, tokens, sampling)
        return [(fill, (jax.random.key(0, impl="rbg"),), {}) for fill in self._random(batch)[1].values()], *others


@functools.cache
def _normal(shape, dtype, sharding) -> Callable:
    return jax.jit(functools.partial(jax.random.normal, shape=shape, dtype=dtype), out_shardings=sharding)


def decoded_tokens(steps: int) -> int:
    """Return how many tokens of a row `decode` generates to time `steps` of them: the first, whole dispatches of WARM_STEPS and of those timed, one more."""
    each = usual_steps(jax.default_backend())
    return 1 + each * (_dispatches(WARM_STEPS, each) + _dispatches(steps, each) + 1)


def _dispatches(steps: int, each: int) -> int:
    return -(-steps // each)


def decode(model: GptOss, batch: int, contexts: Sequence[int], limits: Ceilings, *, steps: int = 32, repetitions: int = 5, trace=None,
           sampling: Sampling = GREEDY) -> list[Callable[[], dict]]:
    """Compile decode steps of `batch` rows; return what measures them, for each of the contexts at whose end they are, as `Engine.stream` runs them, the
    tokens read by the host. All contexts have the longest one's cache.

    Whole dispatches are timed, of `steps` steps or what is missing to the next one, from the moment that tokens of one have been read to the moment
    that those of a later one have, the next dispatched each time. A context is longer than `decoded_tokens`.
    """
    engine = _Primed(model, max_context=max(contexts))
    engine.stop_ids = frozenset()
    each, count = engine.steps_per_dispatch, decoded_tokens(steps)
    start, end = (1 + each * (_dispatches(taken, each) - 1) for taken in (WARM_STEPS, count - 1 - each))
    compile_seconds = seconds_of(lambda: engine.compile(engine.max_context - count, count, sampling, batch=batch))

    def measured(context: int) -> dict:
        prompts = [[0] * (context - count)] * batch

        def once() -> float:
            times = [time.perf_counter() for token in engine.stream(prompts, sampling, max_new_tokens=count) if token.row == batch - 1]
            return (times[end] - times[start]) / (end - start)

        needed = cost.decode_bytes(model.config, batch, context, str(engine.dtype))
        return timed(once, repetitions, trace, tokens=batch, floor=needed / limits.bandwidth, what="decode", batch=batch, context=context,
                     read_bytes=needed, compile_seconds=compile_seconds)

    return [functools.partial(measured, context) for context in contexts]


def prefill(model: GptOss, batch: int, tokens: int, limits: Ceilings, *, repetitions: int = 5, trace=None) -> Callable[[], dict]:
    """Compile, as `decode` does, what runs for `batch` prompts of `tokens` random tokens; return what measures it, from the call to the first token of
    each."""
    engine = Engine(model, max_context=min(model.config.max_position_embeddings, tokens + 1))
    tokens = min(tokens, engine.max_context - 1)
    prompts = np.random.default_rng(0).integers(0, engine.sampleable, (batch, tokens)).tolist()
    compile_seconds = seconds_of(lambda: engine.compile(tokens, 1, GREEDY, batch=batch))

    def once() -> float:
        return seconds_of(lambda: list(engine.stream(prompts, GREEDY, max_new_tokens=1)))

    flops = cost.prefill_flops(model.config, batch, tokens)
    weights = cost.decode_bytes(model.config, batch * tokens, 0, str(engine.dtype))  # all of them once
    return functools.partial(timed, once, repetitions, trace, tokens=batch * tokens, floor=max(flops / limits.matmul, weights / limits.bandwidth),
                             what="prefill", batch=batch, context=tokens, read_bytes=weights, flops=flops, compile_seconds=compile_seconds)


def seconds_of(run: Callable) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def timed(once: Callable[[], float], repetitions: int, trace=None, *, tokens: int | None = None, floor: float | None = None, **facts) -> dict:
    """Call `once`, which returns seconds, `repetitions` times after a first; return their median and the rest. trace: opens the context that they run in."""
    once()
    with trace() if trace else contextlib.nullcontext():
        seconds = sorted(once() for _ in range(repetitions))
    median = statistics.median(seconds)
    found = facts | {"seconds": median, "lowest": seconds[0], "highest": seconds[-1]}
    if tokens is not None:
        found["tokens_per_second"] = tokens / median
    if "read_bytes" in facts:
        found["gb_per_second"] = facts["read_bytes"] / median / 1e9
    return found if floor is None else found | {"floor_seconds": floor, "floor_fraction": floor / median}


def batches(run: Callable, repetitions: int, calls: int) -> list[float]:
    """Return seconds a call of `repetitions` runs of `calls` calls that don't wait for each other, after one untimed."""
    jax.block_until_ready(run())
    return [seconds_of(lambda: jax.block_until_ready([run() for _ in range(calls)])) / calls for _ in range(repetitions)]
