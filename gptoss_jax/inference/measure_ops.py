"""The ops of a decode step, each at a model's shapes by every implementation: compared with the reference, and timed."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.config import GptOssConfig
from gptoss_jax.inference.engine import cache_length, chunk_length
from gptoss_jax.inference.measure import Ceilings, draw, seconds_of, timed
from gptoss_jax.kernels import attention, decode_attention, decode_block, decode_matmul, expert_matmul, hopper
from gptoss_jax.kernels.cache_write import cache_write
from gptoss_jax.kernels.dense_matmul import dense_matmul
from gptoss_jax.kernels.expert_matmul import HopperGateUpWeight, HopperWeight, Mxfp4Weight
from gptoss_jax.model import cost

MOST_PREFILLED = 512  # tokens of all rows, that a prompt's ops are looked at with
_ROUND = 10


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


class _Normal:
    """Random numbers of a dtype, or what else `draw` makes, by another key each time."""

    def __init__(self, dtype: str):
        self._dtype, self._keys = dtype, iter(jax.random.split(jax.random.key(2, impl="rbg"), 96))

    def __call__(self, *shape: int) -> jax.Array:
        return jax.random.normal(next(self._keys), shape, self._dtype)

    def draw(self, kind: str, *shape: int) -> jax.Array:
        return draw(kind, shape, self._dtype, next(self._keys))


def cases(config: GptOssConfig, batch: int, context: int, dtype: str = "bfloat16", *, experts: int | None = None) -> list[Case]:
    """Return the ops of a decode step at the model's shapes, on random numbers. experts: how many, instead of the model's."""
    c = config if experts is None else config.replace(num_local_experts=experts)
    E, D = c.num_local_experts, c.hidden_size
    N, K, H, item = c.num_attention_heads, c.num_key_value_heads, c.head_dim, jnp.dtype(dtype).itemsize
    normal = _Normal(dtype)
    found = _expert_cases(c, batch, normal)
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
    found += _dense_cases(c, batch, normal)
    for name, out, width, added in (("q, k and v", inputs, D, False), ("output", D, N * H, None), ("router", E, D, True)):
        before = (normal(batch, width) if added else None, None if added is None else normal(width), normal(out) if added is None else None)
        found.append(Case("decode_matmul", f"{name} {batch} rows", decode_matmul.IMPLEMENTATIONS,
                          lambda how, *arrays: products(functools.partial(_decode_matmul, how, epsilon=c.rms_norm_eps), *arrays), normal(batch, width),
                          (*before, *(normal(out, width) for _ in range(4))), 4 * out * width * item, 8 * batch * out * width))
    if batch == 1 and hopper.device_unmet("decode_matmul") is None:  # elsewhere a model has no use for it
        found += [_scored_case(config, normal, item), *_block_cases(config, normal, min(c.sliding_window, context), angles, positions[:, -1], item)]
    found.append(Case("cache_write", f"{batch} x {context} slots", ("xla", "cpu"),
                      lambda how, old, new, slots: cache_write(old, new, slots, implementation=how),
                      normal(batch, context, K, H), (normal(batch, 1, K, H), positions[:, -1:]), 2 * batch * K * H * item, 0))
    return found


def prefill_cases(config: GptOssConfig, batch: int, tokens: int, dtype: str = "bfloat16", *, experts: int) -> list[Case]:
    """Return the ops of a prompt's prefill likewise, of a chunk as it is computed, or of few of its tokens: which implementation is best doesn't
    depend on how many more there are."""
    c, tokens = config.replace(num_local_experts=experts), max(2, min(chunk_length(tokens, MOST_PREFILLED), MOST_PREFILLED // batch))
    N, K, H, normal = c.num_attention_heads, c.num_key_value_heads, c.head_dim, _Normal(dtype)
    positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))

    def attend(how, q, k, v, sinks, positions):
        return attention.attention(q, k, v, sinks, q_positions=positions, k_positions=positions, order="aligned", implementation=how)

    return [*_expert_cases(c, batch * tokens, normal), *_dense_cases(c, batch * tokens, normal),
            Case("attention", f"{batch} x {tokens} tokens", tuple(attention.IMPLEMENTATIONS), attend, normal(batch, tokens, N, H),
                 (normal(batch, tokens, K, H), normal(batch, tokens, K, H), normal(N), positions), 0, 2 * batch * tokens**2 * N * H)]


def _expert_cases(c: GptOssConfig, tokens: int, normal: _Normal) -> list[Case]:
    E, A, D, F = c.num_local_experts, c.num_experts_per_tok, c.hidden_size, c.intermediate_size

    def experts_of(out, inputs):
        if not c.quantized:
            return normal.draw("experts.gate_up_proj", E, inputs, out)
        shape = (E, out, inputs // 32)
        return Mxfp4Weight(normal.draw("_blocks", *shape, 16), normal.draw("_scales", *shape))

    chosen = np.random.default_rng(0).permuted(np.tile(np.arange(E), (tokens, 1)), axis=1)[:, :A]
    sizes, used = jnp.asarray(np.bincount(chosen.ravel(), minlength=E), jnp.int32), len(np.unique(chosen))
    gate_up, down = (experts_of(2 * F, D), normal(E, 2 * F)), (experts_of(D, F), normal(E, D))
    weight_bytes = 17 / 32 if c.quantized else gate_up[0].dtype.itemsize

    def mlp(how, x, chosen, *weights):
        scores = jnp.full(chosen.shape, 1 / A, jnp.float32)
        ones = (chosen[..., None] == jnp.arange(E)).any(axis=1).astype(jnp.float32)
        router = expert_matmul.Router(ones, jnp.zeros(E), None, np.zeros(1, np.int32))
        return expert_matmul.expert_mlp(x, chosen, scores, *weights, limit=c.swiglu_limit, alpha=c.swiglu_alpha, router=router, implementation=how)

    found = [Case("expert_mlp", f"{tokens} tokens", tuple(expert_matmul.IMPLEMENTATIONS), mlp, normal(tokens, D),
                  (jnp.asarray(chosen, jnp.int32), *gate_up, *down), round(used * 3 * D * F * weight_bytes), 6 * tokens * A * D * F)]
    for name, out, inputs, weight in (("gate_up", 2 * F, D, gate_up), ("down", D, F, down)):
        found.append(Case("expert_matmul", f"{name} {tokens * A} rows", tuple(expert_matmul.IMPLEMENTATIONS),
                          lambda how, x, sizes, weight, bias: expert_matmul.expert_matmul(x, weight, bias, sizes, implementation=how),
                          normal(tokens * A, inputs), (sizes, *weight), round(used * out * inputs * weight_bytes), 2 * tokens * A * out * inputs))
    return found


def _dense_cases(c: GptOssConfig, rows: int, normal: _Normal) -> list[Case]:
    found = []
    for name, out in (("q_proj", c.num_attention_heads * c.head_dim), ("lm_head", c.vocab_size)):
        weight = normal(out, c.hidden_size)
        found.append(Case("dense_matmul", f"{name} {rows} rows", ("xla", "cpu"), lambda how, x, weight: dense_matmul(x, weight, implementation=how),
                          normal(rows, c.hidden_size), (weight,), weight.size * weight.dtype.itemsize, 2 * rows * weight.size))
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


def _block_cases(config: GptOssConfig, normal: Callable, slots: int, angles, last, item: int) -> list[Case]:
    """Return what a sliding layer does of one row before its experts, if a kernel does it here. "several": by kernels of the ops that it is made of."""
    D, E, K, H = config.hidden_size, config.num_local_experts, config.num_key_value_heads, config.head_dim
    I, J, constants = config.num_attention_heads * H, (config.num_attention_heads + 2 * K) * H, {"ring": True, "epsilon": config.rms_norm_eps}

    def several(x, scale, qkv, bias, cosine, sine, keys, values, sinks, last, output, output_bias, *after, ring, epsilon):
        product, _, _ = decode_matmul.decode_matmul(x, qkv, scale_D=scale, epsilon=epsilon, dtype=jnp.float32)
        attended, *cache = decode_attention.decode_attention(product, bias, cosine, sine, keys, values, sinks.ravel(), last, ring=ring, dtype=x.dtype)
        return *decode_matmul.decode_matmul_scored(attended, output, output_bias, x, *after, epsilon=epsilon), *cache

    def run(how, carry, before, attended, after, *weights):
        (x, *cache), block = carry, several if how == "several" else functools.partial(decode_block.decode_block, implementation=how)
        for qkv, output in weights:  # which no cache keeps, each call fed from the one before
            summed, early, *cache = block(x, before[0], qkv, *before[1:], *cache, *attended, output, *after, **constants)
            x += ((summed.ravel()[0] + early.rows.ravel()[0]) * 0).astype(x.dtype)
        return summed, *cache

    before, attended, after = (normal(D), normal(J), *angles), (normal(K, I // H // K), last), (normal(D), normal(D), normal(E, D))
    carry = normal(1, D), normal(1, slots, K, H), normal(1, slots, K, H)
    weights = [(normal(J, D) * D**-0.5, normal(D, I) * I**-0.5) for _ in range(2)]
    if not decode_block.takes(carry[0], before[0], weights[0][0], *before[1:], *carry[1:], *attended, weights[0][1], *after):
        return []
    read = D * (J + I + E) + 2 * slots * K * H
    return [Case("decode_block", f"{slots} slots of a ring", ("reference", "several", "mosaic_gpu"), run, carry, (before, attended, after, *weights),
                 2 * read * item, 4 * (D * (J + I + E) + 2 * slots * I))]


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
    return next(iter(called(text)), "xla")


def called(optimized_hlo: str) -> list[str]:
    """Return the implementations other than XLA's own that a compiled program's text has calls of."""
    calls = " ".join(re.findall(r'custom_call_target="([^"]*)"', optimized_hlo))
    return [name for part, name in (("gptoss_jax_", "cpu"), ("mosaic_gpu", "mosaic_gpu"), ("cudnn", "cudnn")) if part in calls]


def what_runs(config: GptOssConfig, batch: int, context: int, dtype: str, *, prompts: bool) -> dict[str, str]:
    """Return the implementation of each op of a decode step over the cache that an engine has for `context`, or of prompts of as many tokens."""
    made, tokens = (prefill_cases, context) if prompts else (cases, cache_length(context, context))
    return {case.op: chosen_implementation(case) for case in made(config, batch, tokens, dtype, experts=config.num_experts_per_tok)}


def _arranged(case: Case, implementation: str) -> tuple:
    """Return the arrays as a model on this device keeps them: experts rearranged for Hopper where its kernel is what runs."""
    if implementation not in ("auto", "mosaic_gpu") or hopper.device_unmet("expert_matmul") is not None:
        return case.arrays
    kinds = iter((HopperGateUpWeight, HopperWeight) if case.op == "expert_mlp" else (HopperWeight,))
    return tuple(expert_matmul.pack(part, next(kinds)) if isinstance(part, Mxfp4Weight) else part for part in case.arrays)


def compare(case: Case, implementation: str) -> float:
    """Return the relative error (norm of the difference over the norm) against the reference; cache_write's reference is "xla".

    Raises TimeoutError for a kernel that hangs.
    """
    reference = "reference" if "reference" in case.implementations else "xla"
    expected, found = (jax.tree.leaves(hopper.now(functools.partial(case.run, how), case.carry, *_arranged(case, how)))[0]
                       for how in (reference, implementation))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def kernel(case: Case, implementation: str, limits: Ceilings, *, repetitions: int = 5, seconds: float = 0.1, trace=None) -> Callable[[], dict]:
    """Compile, as `decode` does, a loop of one op on the device, each call fed from the one before; return what times it. Experts change from call to
    call, so that no cache keeps them.

    The loop is of rounds of _ROUND calls, a number that XLA knows: on a GPU the host is asked whether to go on after each round only, which takes
    as long as a small op. Raises TimeoutError for a kernel that hangs.
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
    hopper.arrived(loop(1, case.carry, arrays))

    def once(rounds: int) -> float:
        return seconds_of(lambda: jax.block_until_ready(loop(rounds, case.carry, arrays)))

    def measured() -> dict:
        rounds = int(min(max(seconds / min(once(1) for _ in range(3)), 1), 100))
        return timed(lambda: once(rounds) / (rounds * _ROUND), repetitions, trace, floor=max(case.read_bytes / limits.bandwidth, case.flops / limits.matmul),
                     what="kernel", op=case.op, size=case.size, implementation=implementation, read_bytes=case.read_bytes, flops=case.flops)

    return measured


def unmet(case: Case, implementation: str) -> str | None:
    """Return why an implementation can't run this case here, None if it can."""
    try:
        jax.jit(functools.partial(case.run, implementation)).lower(case.carry, *_arranged(case, implementation)).compile()
    except Exception as error:  # whatever refuses, a kernel or a compiler: it is reported, and the others are measured
        return str(error).strip().splitlines()[0][:200]
    return None
