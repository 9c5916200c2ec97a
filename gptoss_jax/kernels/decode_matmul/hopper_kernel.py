"""A decode step's dense products for NVIDIA Hopper GPUs in Pallas Mosaic GPU: residual sum, RMSNorm, product and bias in one kernel.

A block owns N outputs, so that about as many blocks as processors read the weights once; every block norms all rows for itself. The rows are
wgmma's operand A, from registers, the same 8 again and again until its 64 are full; the weights, by TMA, are its N side, which any multiple
of 8 can be. The block's warpgroups share the inputs out, norm them while the first weights are on their way, and add their products up at the end.
A lone row is held and normed as one, its groups of inputs one below the other, as seven rows of zeros would take most of a small product's time.
Of the attention's output for a lone row each block also multiplies what it has of the next norm's row by the router, but for the norm's factor, which
no block knows: the router then takes no kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gptoss_jax.kernels.expert_matmul.hopper_instructions import EIGHT_ROWS, MATRIX, Interpreted, Mosaic, fragments
from gptoss_jax.kernels.expert_matmul.hopper_kernel import SHARED_BYTES
from gptoss_jax.kernels.expert_matmul.reference import FACTORS
from gptoss_jax.kernels.hopper import SMS

GROUP, ROWS = 64, 8  # of inputs, and the most at once
_WARPGROUPS = 4
_MOST_GROUPS, _MOST_STAGES = 4, 16

# Layout of rows as wgmma's first are, in every warp the same, where EIGHT_ROWS shares out their columns.
_IN_ALL = plgpu.Layout.TILED(plgpu.Tiling(((8, 8), (2,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-3, -2), vector_dim=-1)

# Layout of a row's four groups, a warp each.
_FOUR_GROUPS = plgpu.Layout.TILED(plgpu.Tiling(((4, GROUP), (2,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


class Plan(NamedTuple):
    """What is fixed when the kernel is compiled."""

    rows: int  # 8 of wgmma's 64; or 1, that stands for 8 alike
    outputs: int  # N: of a block
    groups: int  # of GROUP inputs, in a step; past the last input, zeros; 4 for one row
    stages: int
    interpret: object = None  # plgpu.InterpretGPUParams: what can't be interpreted is computed by jnp instead


class First(NamedTuple):
    """What the first blocks of the same kernel compute, for others to wait for: the row that is multiplied.

    arrays: their inputs; counter: zero, int32 [1], a jax.Ref; scratch: their shared memory; run(block, refs of arrays, the row [D / GROUP, GROUP]
    in memory, scratch), by their first warpgroup.
    """

    blocks: int
    arrays: tuple
    counter: jax.Ref
    scratch: tuple
    run: Callable


def plan(rows: int, outputs: int, inputs: int, summing: bool = False, experts: int = 0, taken: int = 0, blocks: int = SMS) -> Plan | None:
    """Choose a block's outputs, step and ring, None where there are none.

    summing: whether there are two arrays of rows; experts: of the router; taken: bytes of shared memory for something else; blocks: at most.
    """
    each = next((n for n in range(8, 257, 8) if outputs % n == 0 and outputs // n <= blocks), None)
    if each is None or inputs % GROUP or inputs > 252 * GROUP:  # a TMA copy takes up to 256 groups, here whole steps
        return None

    def stages(held, groups):
        steps = -(-inputs // (groups * GROUP))
        room = SHARED_BYTES - ((held * (1 + summing) + 1) * steps * groups * GROUP * 2 + ROWS * (_WARPGROUPS * (GROUP + each) + each) * 4)
        room -= experts * (each * 2 + 4) + taken
        return min(room // (each * groups * GROUP * 2), _MOST_STAGES, steps + _WARPGROUPS - 1) // _WARPGROUPS * _WARPGROUPS

    for held, fewest in [(1, _MOST_GROUPS)] * (rows == 1) + [(ROWS, 1)]:
        plans = [Plan(held, each, groups, stages(held, groups)) for groups in range(_MOST_GROUPS, fewest - 1, -1)]
        if (best := max(plans, key=lambda plan: plan.groups**2 * plan.stages)).stages > 0:  # much in the ring, in few steps
            return best
    return None


def run(x_TD, added_TD, scale_D, weight_OD, bias_O, plan: Plan, *, epsilon: float, dtype, after=None, counters: int = 0, first: First | None = None):
    """Run the kernel; see `reference.decode_matmul`. All bfloat16; added, scale and bias may be None; at most `plan.rows` rows.

    after: (residual [1, O], scale [O], router [E, O]) for a lone row that isn't normed: then see `reference.decode_matmul_scored`.
    counters: how many zeros, int32, are returned after all else, for the next kernel to count up.
    first: how the kernel's first blocks compute that row, in place of x.
    """
    (O, D), (R, N, groups, stages, _) = weight_OD.shape, plan
    T = 1 if first else x_TD.shape[0]
    width = groups * GROUP
    steps = -(-D // width)
    chunks, lone = steps * groups, R == 1
    ops = Interpreted if plan.interpret else Mosaic
    arrays = {"x": x_TD, "added": added_TD, "scale": scale_D, "weight": weight_OD, "bias": bias_O}
    for name in ("x", "added", "scale") if lone else ("scale",):
        arrays[name] = None if arrays[name] is None else arrays[name].reshape(D // GROUP, GROUP)
    arrays |= zip(("residual", "next_scale", "router"), after or ())
    E = len(after[2]) if after else 0
    rows = jax.ShapeDtypeStruct((D // GROUP, GROUP) if lone else (T, D), jnp.bfloat16)
    summing, norming = added_TD is not None, scale_D is not None
    given = [name for name, array in arrays.items() if array is not None]
    others = (*first.arrays, first.counter) if first else ()
    out_type = [jax.ShapeDtypeStruct((T, O), dtype)] + [rows] * (norming + summing)
    out_type += [jax.ShapeDtypeStruct((T, O), dtype), jax.ShapeDtypeStruct((O // N, E + FACTORS), jnp.float32)] if after else []
    out_type += [rows] * bool(first) + [jax.ShapeDtypeStruct((counters,), jnp.int32)] * bool(counters)

    def body(*refs):
        me, block = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("block")
        inputs, refs = dict(zip(given, refs)), refs[len(given) :]
        (*of_first, counter), refs = refs[: len(others)] if first else (None,), refs[len(others) :]
        outs, refs = refs[: len(out_type)], refs[len(out_type) :]
        if not first:
            return multiply(block, me, inputs, outs, refs)
        mine, row = len(refs) - len(first.scratch), outs[-1]

        @pl.when((block < first.blocks) & (me == 0))
        def _():
            first.run(block, of_first, row, refs[mine:])
            ops.count(counter.at[0])

        def wait():
            ops.await_count(counter.at[0], first.blocks)

        pl.when(block >= first.blocks)(lambda: multiply(block - first.blocks, me, inputs | {"x": row}, outs[:-1], refs[:mine], wait))

    def multiply(block, me, inputs, outs, scratch, wait=None):
        out, *out_rows = outs
        rows_smem, sum_smem, scale_smem, weight_smem, square_smem, part_smem, out_smem, acc_smem, full, loaded, together, *scoring = scratch
        router_smem, parts_smem, router_loaded = scoring or (None,) * 3
        mine, out_rows_here = pl.ds(block * N, N), pl.ds(block * 0, ROWS)
        # Past the last row or input, zeros are read and nothing is written.
        here = (pl.ds(block * 0, chunks if lone else R), pl.ds(block * 0, GROUP if lone else chunks * GROUP))

        def meet():
            plgpu.barrier_arrive(together)
            plgpu.barrier_wait(together)

        def copy(step):
            slot = jax.lax.rem(step, stages)
            plgpu.copy_gmem_to_smem(inputs["weight"].at[mine, pl.ds(step * width, width)], weight_smem.at[slot], full.at[slot])

        def copy_row():
            plgpu.copy_gmem_to_smem(inputs["x"].at[here], rows_smem, loaded)

        @pl.when(me == 0)
        def _():
            for name, there, held in (("added", here, sum_smem), ("scale", (pl.ds(block * 0, chunks),), scale_smem)):
                if name in inputs:
                    plgpu.copy_gmem_to_smem(inputs[name].at[there], held, loaded)
            if not wait:
                copy_row()
            if after:
                plgpu.copy_gmem_to_smem(inputs["router"].at[:, mine], router_smem, router_loaded)

        # What is added at the end is on its way before the weights are, so as not to be waited for.
        late = {name: plgpu.load(inputs[name].at[(0, mine) if name == "residual" else mine], layout=_IN_ALL.reduce(0), optimized=False)
                for name in ("bias", "residual", "next_scale") if name in inputs}

        for turn in range(stages // _WARPGROUPS):
            step = me + turn * _WARPGROUPS
            pl.when(step < steps)(functools.partial(copy, step))

        def of_mine(visit, carry=None):
            """Fold `visit(step, carry)` over this warpgroup's steps."""
            turns = (steps - me + _WARPGROUPS - 1) // _WARPGROUPS
            return jax.lax.fori_loop(0, turns, lambda i, carry: visit(me + i * _WARPGROUPS, carry), carry)

        if wait:  # what is needed meanwhile is on its way

            @pl.when(me == 0)
            def _():
                wait()
                copy_row()

        plgpu.barrier_wait(loaded)
        if norming:
            norm = _norm_lone if lone else functools.partial(_norm, groups=groups)
            norm(of_mine, rows_smem, sum_smem if summing else rows_smem, scale_smem, square_smem.at[me], square_smem, meet, inputs=D, epsilon=epsilon)

        y = _product(rows_smem, weight_smem, acc_smem, full, copy, of_mine, plan, steps=steps, me=me)
        part_smem[me] = _once(y, plan, alone=bool(after))
        if norming:
            plgpu.commit_smem()  # the rows, which the first warpgroup sends out
        meet()

        @pl.when(me == 0)
        def _():
            @pl.when(block == 0)
            def _():
                for index in range(counters):
                    out_rows[-1][index] = 0

            if after:
                y = sum(plgpu.load(part_smem.at[i], layout=_IN_ALL.reduce(0), optimized=False) for i in range(_WARPGROUPS))
                plgpu.barrier_wait(router_loaded)
                _score(y, late, router_smem, parts_smem, out_smem, outputs=O, epsilon=epsilon)
                plgpu.commit_smem()
                for row, there in enumerate((out, out_rows[0])):
                    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(row, 1)], there.at[:, mine])
                plgpu.copy_smem_to_gmem(parts_smem, out_rows[1].at[block])
            else:
                y = sum(plgpu.load(part_smem.at[i], layout=_IN_ALL) for i in range(_WARPGROUPS))
                if "bias" in inputs:
                    y += _down(late["bias"].astype(jnp.float32), ROWS)
                out_smem[...] = y.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem, out.at[out_rows_here, mine])
                for held, there in zip((rows_smem, sum_smem), out_rows[: norming + summing]):
                    pl.when(block == 0)(functools.partial(plgpu.copy_smem_to_gmem, held, there.at[here]))
            plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body, out_type=out_type, grid=(O // N + (first.blocks if first else 0),), grid_names=("block",), num_threads=_WARPGROUPS, thread_name="warpgroup",
        scratch_types=[*_scratch_types(plan, chunks, summing, norming, E, dtype), *(first.scratch if first else ())],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plan.interpret)
    y, *found = kernel(*(arrays[name] for name in given), *others)
    if after:
        return y, *found[:2]
    zeros = [found.pop()] if counters else []
    normed, summed, *_ = [*(rows.reshape(T, D) for rows in found), x_TD, x_TD]
    return y, summed, normed, *zeros


matmul = jax.jit(run, static_argnames=("epsilon", "dtype", "plan", "counters"))  # so that a kernel is made once for all layers


def _scratch_types(plan: Plan, chunks: int, summing: bool, norming: bool, experts: int, dtype):
    """Return the shared memory of a block that multiplies rows of so many groups of inputs; experts: of a router that follows, or 0."""
    swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    R, N, groups, stages, interpret = plan

    def held(there):
        if R == 1:
            return plgpu.SMEM((chunks if there else 4, GROUP), jnp.bfloat16)
        return plgpu.SMEM((R, chunks * GROUP if there else GROUP), jnp.bfloat16, transforms=swizzle)

    scoring = plgpu.SMEM((experts, N), jnp.bfloat16), plgpu.SMEM((experts + FACTORS,), jnp.float32), plgpu.Barrier()
    return (
        held(True),
        held(summing),
        plgpu.SMEM((chunks, GROUP), jnp.bfloat16),
        plgpu.SMEM((stages, N, groups * GROUP), jnp.bfloat16, transforms=swizzle),
        plgpu.SMEM((_WARPGROUPS, 4) if R == 1 else (_WARPGROUPS, R, GROUP), jnp.float32),
        plgpu.SMEM((_WARPGROUPS, N) if experts else (_WARPGROUPS, ROWS, N), jnp.float32),
        plgpu.SMEM((ROWS, N), dtype),
        plgpu.SMEM((_WARPGROUPS, GROUP, N) if interpret else (1, 8, 8), jnp.float32),
        plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        plgpu.Barrier(num_arrivals=1 + summing + norming),
        plgpu.Barrier(num_arrivals=_WARPGROUPS),
        *(scoring if experts else ()),
    )


def _product(rows_smem, weight_smem, acc_smem, full, copy, of_mine, plan: Plan, *, steps: int, me):
    """Multiply a warpgroup's share of the inputs, whose weights come by copy(step) as slots are free: float32 [GROUP, N], as `_once` takes it."""
    groups, stages, ops = plan.groups, plan.stages, Interpreted if plan.interpret else Mosaic

    def operand(group):
        if plan.rows == 1:
            return _down(plgpu.load(rows_smem.at[group], layout=_IN_ALL.reduce(0), optimized=False), 8)
        return plgpu.load(rows_smem.at[:, pl.ds(group * GROUP, GROUP)], layout=_IN_ALL)

    def accumulate(acc):
        def multiply(step, carry):
            slot = jax.lax.rem(step, stages)
            plgpu.barrier_wait(full.at[slot])
            for group in range(groups):
                ops.multiply(acc, _repeated(operand(step * groups + group), plan), weight_smem.at[slot, :, pl.ds(group * GROUP, GROUP)])
                ops.finish(but=1)
            ops.finish()  # here, as a product in flight reads registers that the next step may write

            @pl.when(step + stages < steps)
            def _():
                plgpu.commit_smem()  # so that all four warps have read it
                copy(step + stages)

            return carry

        of_mine(multiply)
        return acc[...]

    return ops.accumulator(accumulate, acc_smem, me, plan.outputs)


def _score(y, late, router_smem, parts_smem, out_smem, *, outputs, epsilon):
    """Put a block's outputs with the residual into out_smem's first row, those scaled into its second, and its part of the scores into parts_smem."""
    E, N = router_smem.shape
    if "bias" in late:
        y += late["bias"].astype(jnp.float32)
    summed = late["residual"] + y.astype(jnp.bfloat16)
    wide = summed.astype(jnp.float32)
    scaled = (wide * late["next_scale"].astype(jnp.float32)).astype(jnp.bfloat16)
    out_smem[0], out_smem[1] = summed, scaled
    weight = plgpu.load(router_smem, layout=MATRIX, optimized=False).astype(jnp.float32)
    parts_smem[pl.ds(0, E)] = (weight * plgpu.layout_cast(_down(scaled.astype(jnp.float32), E), MATRIX)).sum(axis=1)
    squares = plgpu.layout_cast(_down(jnp.square(wide), FACTORS), MATRIX).sum(axis=1)
    parts_smem[pl.ds(E, FACTORS)] = squares / outputs + epsilon * N / outputs


def _norm(of_mine, rows_smem, sum_smem, scale_smem, mine_smem, square_smem, meet, *, groups, inputs, epsilon):
    """Put the norm of the rows, or of their sum with what is in sum_smem, which it becomes, into rows_smem.

    Each warpgroup norms what it will multiply, so that it waits for no other but for their sums of squares. A step at a time is stored, as
    every store is one between two barriers.
    """
    R = rows_smem.shape[0]

    def load(ref, group):
        return plgpu.load(ref.at[:, pl.ds(group * GROUP, GROUP)], layout=EIGHT_ROWS)

    def store(ref, step, parts):
        ref[:, pl.ds(step * groups * GROUP, groups * GROUP)] = jnp.concatenate(parts, axis=1)

    def add(step, squares):
        parts = [load(rows_smem, step * groups + group) for group in range(groups)]
        if sum_smem is not rows_smem:
            parts = [part + load(sum_smem, step * groups + group) for group, part in enumerate(parts)]
            store(sum_smem, step, parts)
        return squares + sum(jnp.square(part.astype(jnp.float32)) for part in parts)

    def norm(step, _):
        parts = []
        for group in range(groups):
            here = step * groups + group
            scales = plgpu.load(scale_smem.at[here], layout=EIGHT_ROWS.reduce(0), optimized=False).astype(jnp.float32)
            parts.append((load(sum_smem, here).astype(jnp.float32) * factor * _down(scales, R)).astype(jnp.bfloat16))
        store(rows_smem, step, parts)

    mine_smem[...] = of_mine(add, plgpu.layout_cast(jnp.zeros((R, GROUP), jnp.float32), EIGHT_ROWS))
    meet()
    squares = sum(plgpu.load(square_smem.at[i], layout=_IN_ALL) for i in range(_WARPGROUPS)).sum(axis=1)
    factor = plgpu.layout_cast(jax.lax.rsqrt(squares / inputs + epsilon), EIGHT_ROWS.reduce(1))
    factor = jax.lax.broadcast_in_dim(factor, (R, GROUP), (0,))
    of_mine(norm)


def _norm_lone(of_mine, rows_smem, sum_smem, scale_smem, mine_smem, square_smem, meet, *, inputs, epsilon):
    """The same for one row."""
    def load(ref, step):
        return plgpu.load(ref.at[pl.ds(step * 4, 4)], layout=_FOUR_GROUPS, optimized=False)

    def add(step, squares):
        row = load(rows_smem, step)
        if sum_smem is not rows_smem:
            row = row + load(sum_smem, step)
            sum_smem[pl.ds(step * 4, 4)] = row
        return squares + jnp.square(row.astype(jnp.float32))

    def norm(step, _):
        row = load(sum_smem, step).astype(jnp.float32) * factor * load(scale_smem, step).astype(jnp.float32)
        rows_smem[pl.ds(step * 4, 4)] = row.astype(jnp.bfloat16)

    mine_smem[...] = of_mine(add, plgpu.layout_cast(jnp.zeros((4, GROUP), jnp.float32), _FOUR_GROUPS)).sum(axis=1)
    meet()
    factor = jax.lax.rsqrt(sum(square_smem[i, j] for i in range(_WARPGROUPS) for j in range(4)) / inputs + epsilon)
    of_mine(norm)


def _down(x, rows):
    return jax.lax.broadcast_in_dim(x, (rows, x.shape[0]), (1,))


def _repeated(rows, plan: Plan):
    """Return operand A's 64 rows of a group: the few at hand, again and again."""
    if plan.interpret:
        return jnp.tile(rows, (GROUP // rows.shape[0], 1))
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(arg_types=(_IN_ALL,), return_type=plgpu.ShapeDtypeStruct((GROUP, GROUP), jnp.bfloat16, layout=layout))
    def repeated(_, rows):
        registers = rows.registers.reshape(-1, GROUP // 8)
        return fragments(np.broadcast_to(registers, (2, GROUP // 8)).T, layout, (GROUP, GROUP))

    return repeated(rows)


def _once(product, plan: Plan, alone: bool):
    """Return the first of a product's 64 rows, which the others repeat: eight, or one alone."""
    if plan.interpret:
        return product[0] if alone else product[:ROWS]
    shape, layout = ((plan.outputs,), _IN_ALL.reduce(0)) if alone else ((ROWS, plan.outputs), _IN_ALL)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout))
    def first(_, product):
        return fragments(product.registers.reshape(plan.outputs // 8, 2)[:, 0], layout, shape)

    return first(product)
