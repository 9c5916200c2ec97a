"""Timing the engine and the kernels, against what this device's memory and matrix units reach in the same run.

Every measurement is a dict with plain values: medians of `repetitions`, `lowest` and `highest` beside them, compilation apart.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.config import GptOssConfig
from gptoss_jax.inference.engine import Engine, usual_steps
from gptoss_jax.inference.sampling import Sampling
from gptoss_jax.kernels import attention, decode_attention, decode_matmul, expert_matmul, hopper
from gptoss_jax.kernels.cache_write import cache_write
from gptoss_jax.kernels.dense_matmul import dense_matmul
from gptoss_jax.kernels.expert_matmul import HopperGateUpWeight, HopperWeight, Mxfp4Weight
from gptoss_jax.model import GptOss, cost
from gptoss_jax.model.cache import abstract_cache

GREEDY = Sampling(temperature=0)
WARM_STEPS = 8
_ROUND = 10


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
    return Ceilings(bandwidth, 2 * side**3 / min(_batches(lambda: multiply(a, b), 3, 4 if small else 16)))


def _device_bandwidth() -> float:
    data = jax.random.bits(jax.random.key(0, impl="rbg"), (1 << 28,), jnp.uint32)
    copy, read = jax.jit(lambda x: x ^ jnp.uint32(1)), jax.jit(lambda x: x.max())
    # As many as keep the wait for the last from counting: of 4 reads it was 8 % on an H200. Results of copies are held until all are there.
    return max(2 * data.nbytes / min(_batches(lambda: copy(data), 3, 8)), data.nbytes / min(_batches(lambda: read(data), 3, 64)))


def _host_bandwidth() -> float:
    """Return bytes per second of reading with a thread a core, by numpy: XLA's loops on CPUs reach a third of it."""
    threads, data = _cores(), np.ones(1 << 25)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return data.nbytes / min(_batches(lambda: list(pool.map(np.max, np.array_split(data, threads))), 5, 1))


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
        return min(_batches(lambda: list(pool.map(read, range(threads))), 3, 1))


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
            makers[what] = jax.jit(functools.partial(_draw, *what[:3]), out_shardings=target.sharding)
        weights[name] = makers[what](jax.random.fold_in(key, index))
    return weights


def _kind(name: str) -> str:
    endings = "_blocks", "_scales", "norm.weight", "bias", "sinks", "embed_tokens.weight", "experts.gate_up_proj", "experts.down_proj"
    return next((ending for ending in endings if name.endswith(ending)), "matrix")


def _draw(kind: str, shape, dtype, key):
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
    """An engine that finds its prompts computed: random keys and values, so that decoding a long context needs no prefill of it."""

    def _prefill_prompts(self, prompts, length: int):
        batch = len(prompts)
        abstract = abstract_cache(self.config, batch, length, self.dtype, mesh=self.mesh, elsewhere=self._everywhere)
        key = jax.random.key(0, impl="rbg")
        fill = {shape: jax.jit(functools.partial(jax.random.normal, shape=shape, dtype=self.dtype), out_shardings=target.sharding)
                for target in jax.tree.leaves(abstract.layers) for shape in [target.shape]}
        layers = jax.tree.map(lambda target: fill[target.shape](key), abstract.layers)
        cache = abstract._replace(lengths=jnp.asarray([len(prompt) for prompt in prompts], jnp.int32), layers=layers)
        hidden = jax.random.normal(key, (batch, self.config.hidden_size), self.dtype)
        return jax.device_put((cache, hidden), self._place(cache, hidden))


def decoded_tokens(steps: int) -> int:
    """Return how many tokens of a row `decode` generates to time `steps` of them: the first, whole dispatches of WARM_STEPS and of those timed, one more."""
    each = usual_steps(jax.default_backend())
    return 1 + each * (_dispatches(WARM_STEPS, each) + _dispatches(steps, each) + 1)


def _dispatches(steps: int, each: int) -> int:
    return -(-steps // each)


def decode(model: GptOss, batch: int, context: int, limits: Ceilings, *, steps: int = 32, repetitions: int = 5, trace=None,
           sampling: Sampling = GREEDY) -> Callable[[], dict]:
    """Get ready to time decode steps of `batch` rows whose contexts end at `context` tokens, as `Engine.stream` runs them, the tokens read by the
    host: everything is compiled and has run once when this returns. Call what it returns for the measurement.

    Whole dispatches are timed, of `steps` steps or what is missing to the next one, from the moment that tokens of one have been read to the moment
    that those of a later one have, the next dispatched each time. A context is longer than `decoded_tokens`.
    """
    engine = _Primed(model, max_context=context)
    engine.stop_ids = frozenset()
    each, count = engine.steps_per_dispatch, decoded_tokens(steps)
    start, end = (1 + each * (_dispatches(taken, each) - 1) for taken in (WARM_STEPS, count - 1 - each))
    prompts = [[0] * (context - count)] * batch

    def once() -> float:
        times = [time.perf_counter() for token in engine.stream(prompts, sampling, max_new_tokens=count) if token.row == batch - 1]
        return (times[end] - times[start]) / (end - start)

    dtype = str(engine.dtype)
    needed = cost.decode_bytes(model.config, batch, context, dtype)
    return ready(once, repetitions, trace, tokens=batch, floor=needed / limits.bandwidth, what="decode", batch=batch, context=context,
                 read_bytes=needed)


def prefill(model: GptOss, batch: int, tokens: int, limits: Ceilings, *, repetitions: int = 5, trace=None) -> Callable[[], dict]:
    """Get ready, as `decode` does, to time `batch` prompts of `tokens` random tokens, from the call to the first token of each."""
    engine = Engine(model, max_context=min(model.config.max_position_embeddings, tokens + 1))
    tokens = min(tokens, engine.max_context - 1)
    prompts = np.random.default_rng(0).integers(0, engine.sampleable, (batch, tokens)).tolist()

    def once() -> float:
        start = time.perf_counter()
        for _ in engine.stream(prompts, GREEDY, max_new_tokens=1):
            pass
        return time.perf_counter() - start

    flops = cost.prefill_flops(model.config, batch, tokens)
    weights = cost.decode_bytes(model.config, batch * tokens, 0, str(engine.dtype))  # all of them once
    floor = max(flops / limits.matmul, weights / limits.bandwidth)
    return ready(once, repetitions, trace, tokens=batch * tokens, floor=floor, what="prefill", batch=batch, context=tokens, read_bytes=weights, flops=flops)


def ready(once: Callable[[], float], repetitions: int, trace=None, *, tokens: int, floor: float | None = None, **facts) -> Callable[[], dict]:
    """Call `once`, which returns seconds, a first time; return what calls it `repetitions` times more. trace: opens the context that those run in."""
    start = time.perf_counter()
    once()
    first = time.perf_counter() - start

    def measured() -> dict:
        with trace() if trace else contextlib.nullcontext():
            seconds = sorted(once() for _ in range(repetitions))
        median = statistics.median(seconds)
        found = facts | {"seconds": median, "lowest": seconds[0], "highest": seconds[-1], "first_run_seconds": first, "tokens_per_second": tokens / median}
        if "read_bytes" in facts:
            found["gb_per_second"] = facts["read_bytes"] / median / 1e9
        return found if floor is None else found | {"floor_seconds": floor, "floor_fraction": floor / median}

    return measured


class Case(NamedTuple):
    """One op at one size. run: (implementation, carry, *arrays) -> output; carry: the operand that changes from call to call, or a tuple of
    it and what the op updates, whose output then is a tuple too."""

    op: str
    size: str
    implementations: tuple[str, ...]
    run: Callable
    carry: jax.Array | tuple[jax.Array, ...]
    arrays: tuple
    read_bytes: int
    flops: int


def cases(config: GptOssConfig, batch: int, context: int, dtype: str = "bfloat16", *, experts: int | None = None) -> list[Case]:
    """Return the ops of a decode step at the model's shapes, on random numbers. experts: how many, instead of the model's."""
    c = config if experts is None else config.replace(num_local_experts=experts)
    keys = iter(jax.random.split(jax.random.key(2, impl="rbg"), 64))
    E, A, D, F = c.num_local_experts, c.num_experts_per_tok, c.hidden_size, c.intermediate_size
    N, K, H = c.num_attention_heads, c.num_key_value_heads, c.head_dim

    def normal(*shape):
        return jax.random.normal(next(keys), shape, dtype)

    def experts_of(out, inputs):
        if not c.quantized:
            return _draw("experts.gate_up_proj", (E, inputs, out), dtype, next(keys))
        shape = (E, out, inputs // 32)
        return Mxfp4Weight(_draw("_blocks", (*shape, 16), None, next(keys)), _draw("_scales", shape, None, next(keys)))

    chosen = np.random.default_rng(0).permuted(np.tile(np.arange(E), (batch, 1)), axis=1)[:, :A]
    sizes, used = jnp.asarray(np.bincount(chosen.ravel(), minlength=E), jnp.int32), len(np.unique(chosen))
    chosen, item = jnp.asarray(chosen, jnp.int32), jnp.dtype(dtype).itemsize
    weight_bytes = 17 / 32 if c.quantized else item
    gate_up, down = (experts_of(2 * F, D), normal(E, 2 * F)), (experts_of(D, F), normal(E, D))

    def mlp(how, x, chosen, *weights):
        scores = jnp.full(chosen.shape, 1 / A, jnp.float32)
        ones = (chosen[..., None] == jnp.arange(E)).any(axis=1).astype(jnp.float32)
        router = expert_matmul.Router(ones, jnp.zeros(E), None, np.zeros(1, np.int32))
        return expert_matmul.expert_mlp(x, chosen, scores, *weights, limit=c.swiglu_limit, alpha=c.swiglu_alpha, router=router, implementation=how)

    found = [Case("expert_mlp", f"{batch} tokens", tuple(expert_matmul.IMPLEMENTATIONS), mlp, normal(batch, D), (chosen, *gate_up, *down),
                  round(used * 3 * D * F * weight_bytes), 6 * batch * A * D * F)]
    for name, out, inputs, weight in (("gate_up", 2 * F, D, gate_up), ("down", D, F, down)):
        found.append(Case("expert_matmul", f"{name} {batch * A} rows", tuple(expert_matmul.IMPLEMENTATIONS),
                          lambda how, x, sizes, weight, bias: expert_matmul.expert_matmul(x, weight, bias, sizes, implementation=how),
                          normal(batch * A, inputs), (sizes, *weight), round(used * out * inputs * weight_bytes), 2 * batch * A * out * inputs))
    positions = jnp.broadcast_to(jnp.arange(context, dtype=jnp.int32), (batch, context))
    inputs, angles = (N + 2 * K) * H, (jnp.ones((batch, H // 2)), jnp.zeros((batch, H // 2)))
    for window in (None, c.sliding_window):
        slots = context if window is None else min(window, context)
        found.append(Case("attention", f"{batch} x {slots} keys{'' if window is None else ' of a ring'}", tuple(attention.IMPLEMENTATIONS),
                          lambda how, q, k, v, sinks, last, kept, window=window: attention.attention(
                              q, k, v, sinks, q_positions=last, k_positions=kept, window=window, implementation=how),
                          normal(batch, 1, N, H), (normal(batch, slots, K, H), normal(batch, slots, K, H), normal(N), positions[:, -1:], positions[:, -slots:]),
                          2 * batch * slots * K * H * item, 4 * batch * slots * N * H))
        found.append(Case("decode_attention", f"{batch} x {slots} slots{'' if window is None else ' of a ring'}", decode_attention.IMPLEMENTATIONS,
                          lambda how, carry, bias, cosine, sine, sinks, last, ring=window is not None: decode_attention.decode_attention(
                              carry[0], bias, cosine, sine, *carry[1:], sinks, last, ring=ring, dtype=dtype, implementation=how),
                          (normal(batch, inputs).astype(jnp.float32), normal(batch, slots, K, H), normal(batch, slots, K, H)),
                          (normal(inputs), *angles, normal(N), positions[:, -1]), 2 * batch * slots * K * H * item, 4 * batch * slots * N * H))
    for name, out, inputs in (("q_proj", N * H, D), ("lm_head", c.vocab_size, D)):
        found.append(Case("dense_matmul", f"{name} {batch} rows", ("xla", "cpu"),
                          lambda how, x, weight: dense_matmul(x, weight, implementation=how), normal(batch, inputs), (normal(out, inputs),),
                          out * inputs * item, 2 * batch * out * inputs))
    for name, out, width, added in (("q, k and v", inputs, D, False), ("output", D, N * H, None), ("router", E, D, True)):
        before = (normal(batch, width) if added else None, None if added is None else normal(width), normal(out) if added is None else None)
        found.append(Case("decode_matmul", f"{name} {batch} rows", decode_matmul.IMPLEMENTATIONS,
                          lambda how, *arrays: products(functools.partial(_decode_matmul, how, epsilon=c.rms_norm_eps), *arrays), normal(batch, width),
                          (*before, *(normal(out, width) for _ in range(4))), 4 * out * width * item, 8 * batch * out * width))
    if batch == 1 and hopper.device_unmet("decode_matmul") is None:  # elsewhere a model has no use for it
        found.append(_scored_case(config, normal, item))
    found.append(Case("cache_write", f"{batch} x {context} slots", ("xla", "cpu"),
                      lambda how, old, new, slots: cache_write(old, new, slots, implementation=how),
                      normal(batch, context, K, H), (normal(batch, 1, K, H), positions[:, -1:]), 2 * batch * K * H * item, 0))
    return found


def case_bytes(config: GptOssConfig, batch: int, context: int, dtype: str = "bfloat16", experts: int | None = None) -> int:
    """Return the bytes of all arrays of `cases`, of which none is made."""

    def arrays():
        shared = jax.tree.leaves([(case.carry, case.arrays) for case in cases(config, batch, context, dtype, experts=experts)])
        return list({id(array): array for array in shared}.values())

    return cost.shard_bytes(jax.eval_shape(arrays))


def _scored_case(config: GptOssConfig, normal: Callable, item: int) -> Case:
    """Return the attention's output with its scores by the router, of one row; what is compared is the sum."""
    D, E, inputs = config.hidden_size, config.num_local_experts, config.num_attention_heads * config.head_dim

    def run(how, x, bias, residual, scale, router, *weights):
        def multiply(x, _, scale, weight, bias):
            summed, early = decode_matmul.decode_matmul_scored(x, weight, bias, residual, scale, router, epsilon=config.rms_norm_eps, implementation=how)
            return summed, early, None

        return products(multiply, x, None, scale, bias, *weights)

    return Case("decode_matmul_scored", "output and router", decode_matmul.IMPLEMENTATIONS, run, normal(1, inputs),
                (normal(D), normal(1, D), normal(D), normal(E, D), *(normal(D, inputs) for _ in range(4))), 4 * D * (inputs + E) * item,
                8 * D * (inputs + E))


def _decode_matmul(how, x, added, scale, weight, bias, *, epsilon):
    return decode_matmul.decode_matmul(x, weight, bias, added_TD=added, scale_D=scale, epsilon=epsilon, implementation=how)


def products(multiply: Callable, x, added, scale, bias, *weights):
    """Call multiply(x, added, scale, weight, bias) for several weights, which no cache keeps, each call fed from the one before."""
    for weight in weights:
        y, _, _ = multiply(x, added, scale, weight, bias)
        x += (y.ravel()[0] * 0).astype(x.dtype)
    return y


def chosen_implementation(case: Case) -> str:
    """Return what "auto" comes to on this device, read off the compiled program's calls."""
    text = jax.jit(functools.partial(case.run, "auto")).lower(case.carry, *_arranged(case, "auto")).compile().as_text()
    calls = " ".join(re.findall(r'custom_call_target="([^"]*)"', text))
    return next((name for part, name in (("gptoss_jax_", "cpu"), ("mosaic_gpu", "mosaic_gpu"), ("cudnn", "cudnn")) if part in calls), "xla")


def _arranged(case: Case, implementation: str) -> tuple:
    """Return the arrays as a model on this device keeps them: experts rearranged for Hopper where its kernel is what runs."""
    if implementation not in ("auto", "mosaic_gpu") or hopper.device_unmet("expert_matmul") is not None:
        return case.arrays
    kinds = iter((HopperGateUpWeight, HopperWeight) if case.op == "expert_mlp" else (HopperWeight,))
    return tuple(expert_matmul.pack(part, next(kinds)) if isinstance(part, Mxfp4Weight) else part for part in case.arrays)


def compare(case: Case, implementation: str) -> float:
    """Return the relative error (norm of the difference over the norm) against the reference; cache_write's reference is "xla"."""
    reference = "reference" if "reference" in case.implementations else "xla"
    expected, found = (np.asarray(jax.tree.leaves(jax.jit(functools.partial(case.run, how))(case.carry, *_arranged(case, how)))[0], np.float32)
                       for how in (reference, implementation))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def kernel(case: Case, implementation: str, limits: Ceilings, *, repetitions: int = 5, seconds: float = 0.1, trace=None) -> Callable[[], dict]:
    """Get ready, as `decode` does, to time one op by a loop on the device, each call fed from the one before; experts change from call to call, so
    that no cache keeps them.

    The loop is of rounds of _ROUND calls, a number that XLA knows: on a GPU the host is asked whether to go on after each round only, which takes
    as long as a small op.
    """

    @jax.jit
    def loop(rounds, carry, arrays):
        def body(index, carry):
            turn = {"expert_matmul": lambda sizes: jnp.roll(sizes, index * 5), "expert_mlp": lambda chosen: (chosen + index * 5) % len(arrays[2]),
                    "hopper": lambda first: first + index * 5}
            out = case.run(implementation, carry, turn.get(case.op, lambda same: same)(arrays[0]), *arrays[1:])
            if isinstance(carry, tuple):
                return carry[0] + (out[0].ravel()[0] * 0).astype(carry[0].dtype), *out[1:]
            return out if case.op == "cache_write" else carry + (out.ravel()[0] * 0).astype(carry.dtype)

        def round(index, carry):
            return jax.lax.fori_loop(0, _ROUND, lambda within, carry: body(index * _ROUND + within, carry), carry)

        return jax.lax.fori_loop(0, rounds, round, carry)

    arrays = _arranged(case, implementation)
    jax.block_until_ready(loop(1, case.carry, arrays))

    def measured() -> dict:
        once = min(_batches(lambda: loop(1, case.carry, arrays), 2, 1))
        rounds = int(min(max(seconds / once, 1), 100))
        with trace() if trace else contextlib.nullcontext():
            times = sorted(time / (rounds * _ROUND) for time in _batches(lambda: loop(rounds, case.carry, arrays), repetitions, 1))
        median = statistics.median(times)
        floor = max(case.read_bytes / limits.bandwidth, case.flops / limits.matmul)
        return {"what": "kernel", "op": case.op, "size": case.size, "implementation": implementation, "seconds": median, "lowest": times[0],
                "highest": times[-1], "read_bytes": case.read_bytes, "flops": case.flops, "gb_per_second": case.read_bytes / median / 1e9,
                "floor_seconds": floor, "floor_fraction": floor / median}

    return measured


def _batches(run: Callable, repetitions: int, calls: int) -> list[float]:
    """Return seconds a call of `repetitions` runs of `calls` calls that don't wait for each other, after one untimed."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready([run() for _ in range(calls)])
        seconds.append((time.perf_counter() - start) / calls)
    return seconds


def unmet(case: Case, implementation: str) -> str | None:
    """Return why an implementation can't run this case here, None if it can."""
    try:
        jax.jit(functools.partial(case.run, implementation)).lower(case.carry, *_arranged(case, implementation)).compile()
    except Exception as error:  # whatever refuses, a kernel or a compiler: it is reported, and the others are measured
        return str(error).strip().splitlines()[0][:200]
    return None
