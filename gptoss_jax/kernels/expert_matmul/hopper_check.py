"""Whether the Hopper kernels compute right on the device at hand: products of a few small experts and a routing against the reference.

The order in which a GPU takes operand A from registers, and what a compiler makes of the kernel, can be wrong in ways that nothing short of a
GPU shows; a model is worth a second of looking.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax import mxfp4
from gptoss_jax.kernels.expert_matmul import Router, hopper_layout, mosaic_gpu, reference
from gptoss_jax.kernels.expert_matmul.hopper_layout import ALIGNMENT, GROUP, HopperGateUpWeight, HopperWeight
from gptoss_jax.kernels.expert_matmul.reference import FACTORS, EarlyScores, Mxfp4Weight
from gptoss_jax.kernels.hopper import arrived, first_disagreement, now

# kind, outputs, inputs, rows of each expert, how many rows all tiles share: the gated product; sums in parts; many rows of an expert; a tile of few.
CASES = ((HopperGateUpWeight, 128, 192, (8, 0, 16), 0), (HopperWeight, 128, 576, (8, 0, 16), 0), (HopperWeight, 128, 64, (136, 0, 120), 0),
         (HopperGateUpWeight, 128, 192, (8, 0, 8), 3))


def disagreement(interpret=None) -> str | None:
    """Return how the kernel's results differ from the reference's on JAX's first device, or why there are none; None where they agree."""
    one_token = (dict(parts=0, inputs=192, hidden=320, count=2), dict(parts=16, inputs=1152, hidden=576, count=1))
    routed = dict(tokens=20, rows=8), dict(tokens=40, rows=16)  # each pair compared with each; experts' counted
    checks = [functools.partial(_compare, *case) for case in CASES]
    checks += [functools.partial(check, **case) for check, cases in ((_misrouted, routed), (_one_token, one_token)) for case in cases]
    return first_disagreement(checks, interpret)


def disagreement_of_training(interpret=None) -> str | None:
    """Return the same of the kernel that training takes."""
    return first_disagreement([functools.partial(_stored, transposed=transposed) for transposed in (False, True)], interpret)


def _compare(kind, outputs, inputs, sizes, shared, interpret):
    random = np.random.default_rng(0)
    experts = len(sizes)
    weight = Mxfp4Weight(random.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8),
                         random.integers(118, 123, (experts, outputs, inputs // 32), np.uint8))
    x = np.asarray(random.standard_normal((sum(sizes), inputs)), jnp.bfloat16)
    rest = np.asarray(random.standard_normal((experts, outputs)), jnp.bfloat16), np.asarray(sizes, np.int32)
    constants = dict(limit=7.0, alpha=1.702) if kind is HopperGateUpWeight else {}
    run, given = functools.partial(mosaic_gpu.run, interpret=interpret, **constants), x
    if shared:
        run, given = functools.partial(_of_shared, slots=len(x), interpret=interpret, **constants), x[:shared]
        x = np.tile(np.pad(given, ((0, 8 - shared), (0, 0))), (len(x) // 8, 1))
    found = now(run, given, hopper_layout.pack(weight, kind), *rest)
    expected = now(reference.expert_matmul, x.astype(np.float32), weight, *rest)
    if constants:
        expected = now(functools.partial(reference.swiglu, **constants), expected)
    wrong = ~(np.abs(found - expected) <= 2**-6 * np.abs(expected) + 2**-6 * expected.std())  # a rounding to bfloat16 is 2^-9; NaN is wrong
    if not wrong.any():
        return None
    return f"a kernel that computes right here (found {wrong.mean():.1%} of {kind.__name__} {outputs} x {inputs} wrong)"


def _of_shared(x, weight, bias, sizes, *, slots, interpret, **constants):
    """Run the kernel on tiles of 8 rows that all take the same x."""
    from gptoss_jax.kernels.expert_matmul import hopper_kernel

    plan = mosaic_gpu.interpreted(hopper_kernel.plan(slots, weight, (8,)), interpret)
    return hopper_kernel.matmul(x, weight, bias, hopper_kernel.tiles(sizes, slots, 8), plan, slots=slots, **constants)


def _misrouted(*, interpret, tokens, rows, experts=32, count=4):
    from gptoss_jax.kernels.expert_matmul import hopper_routing

    random = np.random.default_rng(0)
    scores, bias = (random.integers(-8, 8, shape).astype(np.float32) for shape in ((tokens, experts), experts))
    logits = scores + bias  # many are equal
    expert = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    weight = np.exp(np.take_along_axis(logits - logits.max(axis=1, keepdims=True), expert, axis=1))
    run = functools.partial(hopper_routing.route, count=count, experts=experts, rows=rows, interpret=interpret)
    found = jax.tree.map(np.asarray, arrived(run(scores, bias.astype(jnp.bfloat16), None, np.zeros(1, np.int32))))
    slot, tiles = np.clip(found.slot.T, 0, len(found.token) - 1), found.tiles
    tile = np.maximum(np.searchsorted(tiles.first[: tiles.count[0]] * ALIGNMENT, slot, side="right") - 1, 0)
    right = (found.expert.T == expert) & (np.abs(found.weight.T - weight / weight.sum(axis=1, keepdims=True)) <= 2**-18)
    right &= (found.token[slot] == np.arange(tokens)[:, None]) & (tiles.expert[tile] == expert) & (slot < (tiles.first + tiles.rows)[tile] * ALIGNMENT)
    if right.all() and tiles.count[0] == np.sum(-(-np.bincount(expert.ravel()) // rows)):
        return None
    return f"a kernel that routes right here (found {1 - right.mean():.1%} of choices wrong, {tiles.count[0]} tiles)"


def _one_token(*, interpret, parts, inputs, hidden, count, experts=32):
    """Compare a token's experts, chosen by its scores or by so many parts of them."""
    random = np.random.default_rng(0)
    gate_up, down = (Mxfp4Weight(random.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8),
                                 random.integers(118, 123, (experts, rows, columns // 32), np.uint8)) for rows, columns in ((2 * hidden, inputs), (inputs, hidden)))
    x, *biases = (np.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in ((1, inputs), (experts, 2 * hidden), (experts, inputs)))
    sums, constants = random.standard_normal((max(parts, 1), experts + FACTORS)).astype(np.float32), dict(limit=7.0, alpha=1.702)
    sums[:, experts:] = 1  # so that a norm's factor is 1/4 for 16 parts
    scores = sums[:, :experts].sum(axis=0, keepdims=True) * len(sums) ** -0.5
    chosen = np.sort(np.argsort(-scores[0])[:count])
    weight, sizes = np.exp(scores[:, chosen]), np.bincount(chosen, minlength=experts).astype(np.int32)

    def expected(x, weight, gate_up, gate_up_bias, down, down_bias, sizes):
        h = reference.swiglu(reference.expert_matmul(jnp.tile(x, (count, 1)), gate_up, gate_up_bias, sizes), **constants)
        return weight @ reference.expert_matmul(h, down, down_bias, sizes) / weight.sum()

    arranged = hopper_layout.pack(gate_up, HopperGateUpWeight), biases[0], hopper_layout.pack(down, HopperWeight), biases[1]
    router = Router(scores, np.zeros(experts, np.float32), None, np.zeros(1, np.int32), EarlyScores(x, sums) if parts else None)
    found = now(functools.partial(mosaic_gpu.expert_mlp, **constants, interpret=interpret), x, np.zeros((1, count), np.int32), weight, *arranged, router)
    right = now(expected, x.astype(np.float32) * len(sums) ** -0.5, weight, gate_up, biases[0], down, biases[1], sizes)
    wrong = ~(np.abs(found - right) <= 2**-5 * np.abs(right) + 2**-5 * right.std())  # h and y of each expert are rounded; NaN is wrong
    return f"a kernel that computes right here (found {wrong.mean():.1%} of a token's result wrong)" if wrong.any() else None


def _stored(*, interpret, transposed, sizes=(8, 0, 136), outputs=128, inputs=320):
    """Compare products of both heights with weights as they are stored, or with their transposes, and of adapters."""
    from gptoss_jax.kernels.expert_matmul import hopper_kernel, hopper_stored

    random = np.random.default_rng(0)
    experts, (width, columns) = len(sizes), (outputs, inputs) if transposed else (inputs, outputs)
    weight = Mxfp4Weight(random.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8),
                         random.integers(118, 123, (experts, outputs, inputs // 32), np.uint8))
    x, low_x, low, bias = (np.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in (
        (sum(sizes), width), (sum(sizes), GROUP), (experts, GROUP, columns), (experts, columns)))
    sizes = np.asarray(sizes, np.int32)

    def run(x, low_x, low, weight, bias):
        weight = hopper_stored.stored(weight)
        plan = mosaic_gpu.interpreted(hopper_stored.plan(len(x), weight, transposed=transposed), interpret)
        tiles = hopper_kernel.tiles(sizes, len(x), plan.rows)
        return hopper_stored.matmul(x, weight, tiles, plan, bias, (low_x, low.swapaxes(1, 2) if transposed else low), transposed=transposed)

    def expected(x, low_x, low, weight, bias):
        matrix = mxfp4.decode(*weight) if transposed else weight
        return reference.expert_matmul(x, matrix, bias, sizes) + reference.expert_matmul(low_x, low, bias * 0, sizes)

    found, right = now(run, x, low_x, low, weight, bias), now(expected, *(part.astype(np.float32) for part in (x, low_x, low)), weight, bias)
    wrong = ~(np.abs(found - right) <= 2**-6 * np.abs(right) + 2**-6 * right.std())  # a rounding to bfloat16 is 2^-9; NaN is wrong
    return f"a kernel that computes right here (found {wrong.mean():.1%} of {'transposed ' * transposed}stored weights' products wrong)" if wrong.any() else None
