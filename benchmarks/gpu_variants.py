"""Plans of the Hopper kernels, as section `variants` of `gpu.py` times them, and what training takes, as `train` does."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from gptoss_jax.inference import measure_ops
from gptoss_jax.kernels import hopper
from gptoss_jax.kernels.decode_matmul import hopper_kernel as product_kernel
from gptoss_jax.kernels.expert_matmul import (
    HopperGateUpWeight, HopperWeight, Mxfp4Weight, hopper_kernel, hopper_layout, hopper_one_token, hopper_stored, lean_mlp)


def groups(config, limits) -> Iterator[list]:
    """Yield what `gpu.measured` takes, a group for all that shares arrays: of each product of experts, of a single token's, of dense products."""
    yield from _experts(config, limits)
    yield _one_token(config, limits)
    yield _products(config, limits)


def _point(case, plan, planned, limits, **facts):
    row = {"what": "variant", "size": case.size, **facts, "stages": plan.stages, "planned": plan == planned}
    return [row], lambda: [measure_ops.kernel(case, "", limits, repetitions=3, seconds=0.02)]


def _experts(config, limits):
    E, D, F = config.num_local_experts, config.hidden_size, config.intermediate_size
    key = jax.random.key(0, impl="rbg")
    for kind, outputs, inputs in ((HopperGateUpWeight, 2 * F, D), (HopperWeight, D, F)):
        weight, bias, points = hopper_layout.random(key, E, outputs, inputs, kind), jnp.zeros((E, outputs), jnp.bfloat16), []
        for active, rows in [(config.num_experts_per_tok, 8), *((E // 2, rows) for rows in (8, 16, 32, 64, 128))]:
            x = jax.random.normal(key, (active * rows, inputs), jnp.bfloat16)
            planned = hopper_kernel.plan(len(x), weight, (rows,))
            plans = {planned} if rows > 8 else {planned, planned._replace(stages=max(planned.stages // 2, 2))}
            if kind is HopperWeight and active == config.num_experts_per_tok:
                plans |= {planned._replace(splits=splits) for splits in (1, 2, 3)}
            for plan in plans:

                def run(how, x, first, weight, bias, plan=plan, active=active, rows=rows):
                    index, height = jnp.arange(active, dtype=jnp.int32), rows // 8
                    tiles = hopper_kernel.Tiles((first + index) % E, index * height, jnp.full(active, height), jnp.full(1, active))
                    return hopper_kernel.matmul(x, weight, bias, tiles, plan, limit=config.swiglu_limit, alpha=config.swiglu_alpha)

                case = measure_ops.Case("hopper", f"{kind.__name__} {active} x {rows} rows", (), run, x, (jnp.int32(0), weight, bias),
                                    active * outputs * inputs * 17 // 32, 2 * len(x) * outputs * inputs)
                points.append(_point(case, plan, planned, limits, splits=plan.splits))
        yield points


def _one_token(config, limits):
    E, D, F, A = config.num_local_experts, config.hidden_size, config.intermediate_size, config.num_experts_per_tok
    key, points = jax.random.key(0, impl="rbg"), []
    gate_up, down = hopper_layout.random(key, E, 2 * F, D, HopperGateUpWeight), hopper_layout.random(key, E, D, F, HopperWeight)
    weights = gate_up, jnp.zeros((E, 2 * F), jnp.bfloat16), down, jnp.zeros((E, D), jnp.bfloat16)
    planned = hopper_one_token.plan(gate_up, down, A, hopper.processors())
    plans = {planned, planned._replace(stages=5), *(planned._replace(splits=splits) for splits in (1, 2, 3))}
    plans |= {hopper_one_token.plan(gate_up, down, A, hopper.processors(), (n, 1)) for n in (3, 5) if D // 64 % n == F // 64 % n == 0}
    for plan in plans:

        def run(how, x, first, *weights, plan=plan):
            experts, one, zeros = (first + jnp.arange(A, dtype=jnp.int32)) % E, jnp.ones(1), jnp.zeros(A + 1, jnp.int32)
            return hopper_one_token.mlp(x, experts, one, zeros, *weights, plan, limit=config.swiglu_limit, alpha=config.swiglu_alpha)

        case = measure_ops.Case("hopper", f"one token's {A} experts", (), run, jax.random.normal(key, (1, D), jnp.bfloat16), (jnp.int32(0), *weights),
                            A * 3 * F * D * 17 // 32, 6 * A * F * D)
        points.append(_point(case, plan, planned, limits, splits=plan.splits, warpgroups=plan.warpgroups, groups=plan.groups))
    return points


def _products(config, limits):
    """A decode step's dense products of one row."""
    points = []
    for case in measure_ops.cases(config, 1, 128):
        if case.op != "decode_matmul":
            continue
        added, *_, weight = case.arrays
        planned, of_eight = (product_kernel.plan(rows, *weight.shape, added is not None) for rows in (1, 8))
        plans = {planned, planned._replace(stages=4), of_eight, of_eight._replace(groups=1, stages=12)}
        for plan in plans:

            def multiply(*arrays, plan=plan):
                return product_kernel.matmul(*arrays, plan, epsilon=config.rms_norm_eps, dtype=jnp.dtype(jnp.float32))

            run = case._replace(run=lambda _, *arrays, multiply=multiply: measure_ops.products(multiply, *arrays))
            points.append(_point(run, plan, planned, limits, rows=plan.rows, groups=plan.groups))
    return points


def trained(config, limits, tokens: int) -> Iterator[list]:
    """Yield what `gpu.measured` takes: a layer's experts with adapters of rank 8, forward and backward, by "xla" and, on a Hopper GPU, by "mosaic_gpu",
    compared first, and the products that the kernel does of them.

    The floor is of five products with the matrices: two forward; gate and up again, and two for the gradient of rows, backward.
    """
    E, A, D, F, rank = config.num_local_experts, config.num_experts_per_tok, config.hidden_size, config.intermediate_size, 8
    keys = iter(jax.random.split(jax.random.key(0, impl="rbg"), 32))

    def linear(inputs, outputs):
        blocks = jax.random.bits(next(keys), (E, outputs, inputs // 32, 16), jnp.uint8)
        weight = Mxfp4Weight(blocks, jnp.full((E, outputs, inputs // 32), 120, jnp.uint8))
        return weight, normal(E, outputs), (normal(E, inputs, rank) * 0.02, normal(E, rank, outputs) * 0.02)

    def normal(*shape):
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    def run(how, x, chosen, weight, gate_up, down):
        device = jax.devices()[0] if how == "mosaic_gpu" else jax.devices("cpu")[0]

        def layer(x, weight, *low_rank):
            linears = ((*of[:2], *low) for of, low in zip((gate_up, down), low_rank))
            return lean_mlp(x, chosen, weight, *linears, config.swiglu_limit, config.swiglu_alpha, device)

        out, backward = jax.vjp(layer, x, weight, gate_up[2], down[2])
        dx, *others = jax.tree.leaves(backward(out))
        return dx + sum(part.sum().astype(dx.dtype) for part in others) * 0  # nothing that is timed may be left out

    chosen = jax.lax.top_k(jax.random.uniform(next(keys), (tokens, E)), A)[1].astype(jnp.int32)
    arrays = chosen, jax.random.uniform(next(keys), (tokens, A)), linear(D, 2 * F), linear(F, D)
    by_kernels = hopper.device_unmet("expert_matmul", training=True) is None
    case = measure_ops.Case("lean_mlp", f"{tokens} tokens", ("mosaic_gpu", "xla") if by_kernels else ("xla",), run, normal(tokens, D), arrays,
                        0, 2 * 8 * tokens * A * D * F)

    def error():
        ours, expected = (jax.jit(functools.partial(run, how))(case.carry, *arrays).astype(jnp.float32) for how in case.implementations)
        found = float(jnp.linalg.norm(ours - expected) / jnp.linalg.norm(expected))
        return [lambda: {"error": found}]

    def timed(how):
        return [measure_ops.kernel(case, how, limits, repetitions=3, seconds=0.05)]

    row = {"op": case.op, "size": case.size}
    if by_kernels:
        yield [([row | {"what": "check", "implementation": "mosaic_gpu"}], error)]
    yield [([row | {"what": "kernel", "implementation": how}], functools.partial(timed, how)) for how in case.implementations]
    if by_kernels:
        yield [_stored_product(linear[0], limits, tokens * A, transposed) for linear in arrays[2:] for transposed in (False, True)]


def _stored_product(weight, limits, rows: int, transposed: bool):
    """One product of rows that all experts have as many of."""
    E, outputs, blocks = weight.scales.shape
    inputs, weight = blocks * 32, hopper_stored.stored(weight)
    plan = hopper_stored.plan(rows, weight, transposed=transposed)

    def run(how, x, first, *parts):
        sizes = jnp.full(E, rows // E, jnp.int32) + first
        tiles = hopper_kernel.tiles(sizes, rows, plan.rows)
        return hopper_stored.matmul(x, hopper_stored.StoredWeight(*parts), tiles, plan, transposed=transposed)

    x = jax.random.normal(jax.random.key(0), (rows, outputs if transposed else inputs), jnp.bfloat16)
    case = measure_ops.Case("stored", f"{outputs} x {inputs}{' transposed' * transposed}, {rows} rows", (), run, x, (jnp.int32(0), *weight),
                        0, 2 * rows * outputs * inputs)
    return _point(case, plan, plan, limits)
