"""A single token's experts on NVIDIA Hopper GPUs by one kernel: gate and up, SwiGLU, and down.

A unit is 64 outputs of an expert, whose inputs a block's warpgroups share out. A block has every so manyth unit of the first product, then of the
second, in the order of the token's experts; so the first experts' rows h are long there when their units of the second product come, and memory is
read without a pause. A counter of each expert in memory tells when they are. That needs all blocks to run at the same time, which they do where there
are no more than multiprocessors, as each has room for one. Pallas can't launch cooperatively: where another process's kernels run beside it (MPS), this
relies on a GPU starting all blocks of a grid before the next one's.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gptoss_jax.kernels.expert_matmul import hopper_kernel
from gptoss_jax.kernels.expert_matmul.hopper_instructions import COLUMN, MATRIX, Interpreted, Mosaic, decode
from gptoss_jax.kernels.expert_matmul.hopper_kernel import SHARED_BYTES, Plan
from gptoss_jax.kernels.expert_matmul.hopper_layout import ALIGNMENT, GROUP
from gptoss_jax.kernels.hopper import SMS

_HALF = GROUP // 2
_MOST_STAGES = 8
_ROW = plgpu.Layout.WGMMA.reduce(1)  # of a product's numbers for one row


def plan(gate_up, down, experts: int, blocks: int = SMS) -> Plan:
    """Choose step, ring and split of down's sum for so many experts of a token. A step is `groups` of 64 inputs for each warpgroup."""
    (_, columns, F), (_, outputs, D) = (weight.scales.shape[:3] for weight in (down, gate_up))
    shares = [(warpgroups, groups) for warpgroups in (3, 2, 1) for groups in (3, 2, 1) if D % (warpgroups * groups) == F % (warpgroups * groups) == 0]
    warpgroups, groups = max(shares, key=lambda share: share[0] * share[1])
    stage = warpgroups * groups * (2048 + 128 + ALIGNMENT * 2 * GROUP)
    steps = [ins // (warpgroups * groups) for ins in (D, F)]

    def longest(splits):
        """Return the most steps of a block."""
        first, at = experts * outputs, np.arange(experts * (outputs + columns * splits))
        ends = (np.arange(splits + 1) * steps[1]) // splits
        lengths = np.where(at < first, steps[0], np.diff(ends)[(at - first) // columns % splits])
        return np.bincount(at % blocks, lengths).max()

    return Plan((ALIGNMENT,), warpgroups, groups, min(_MOST_STAGES, SHARED_BYTES // stage), min((1, 2, 3), key=longest), blocks)


class _Product(NamedTuple):
    """One of the two products as a block sees it: memory, and how its units are counted."""

    x: object
    words: object
    scales: object
    bias: object
    before: int  # units of the other product
    columns: int  # of 64 outputs
    steps: int
    splits: int


@functools.partial(jax.jit, static_argnames=("plan", "limit", "alpha"))  # so that a kernel is made once for all layers
def mlp(x_1D, expert_A, factor, counter_A, gate_up, gate_up_bias, down, down_bias, plan: Plan, *, limit: float, alpha: float):
    """Run the kernel: x bfloat16 [1, D]; experts int32 [A], E for one that isn't here; the factor that x lacks, float32 [1]; zeros, int32 [A].

    Biases in bfloat16 or float32. Returns down's products and biases in parts to be summed, float32 [splits, A, D], zeros of experts E.
    """
    wgs, groups, stages, splits = plan.warpgroups, plan.groups, plan.stages, plan.splits
    A, (E, outs, ins) = expert_A.shape[0], down.scales.shape[:3]  # of down: D and F in groups of 64
    each = wgs * groups  # groups of inputs in a step
    ops = Interpreted if plan.interpret else Mosaic

    def body(experts, factor, x, *refs):
        weights, (counter, h, out, x_smem, words_smem, scales_smem, sums_smem, acc_smem, full, rows, empty, together, *counted) = refs[:6], refs[6:]
        first = _Product(x, *weights[:3], 0, 2 * ins, outs // each, 1)
        second = _Product(h, *weights[3:], A * first.columns, outs, ins // each, splits)
        me, block = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("block")

        def up_to(units):
            """Return how many of so many units are this block's."""
            return jnp.maximum(0, (units - block + plan.blocks - 1) // plan.blocks)

        def range_of(product):
            return up_to(product.before), up_to(product.before + A * product.columns * product.splits)

        def unit(product, i):
            """Return (expert's place among the token's, expert, column of outputs, part of the sum, its first step, its number of steps) of this
            block's i-th unit, or anything past the last."""
            at = block + i * plan.blocks - product.before
            place = jnp.minimum(at // (product.columns * product.splits), A - 1)
            expert, part = experts[place], at // product.columns % product.splits
            begin, end = part * product.steps // product.splits, (part + 1) * product.steps // product.splits
            return place, expert, at % product.columns, part, begin, jnp.where(expert < E, end - begin, 0)

        @pl.when(me == wgs)
        def _copy():
            plgpu.set_max_registers(plan.registers[0], action="decrease")

            def copy_unit(product, first_step, i, carry):
                done, known = carry  # steps so far; the expert whose rows are known to be there
                place, expert, column, _, begin, length = unit(product, i)

                def copy_weights(step, _):
                    slot = hopper_kernel.free_slot(done + step, empty, stages)
                    outputs, inputs = expert * product.columns + column, pl.ds((begin + step) * wgs, wgs)
                    plgpu.copy_gmem_to_smem(product.words.at[outputs, inputs], words_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(product.scales.at[outputs, inputs], scales_smem.at[slot], full.at[slot])
                    return slot

                def copy_rows(step, slot, barrier):  # past the end of x, zeros are read
                    x = product.x.at[place] if product is second else product.x
                    plgpu.copy_gmem_to_smem(x.at[pl.ds((begin + step) * wgs, wgs), :, pl.ds(place * 0, ALIGNMENT)], x_smem.at[slot], barrier)

                ahead = 0
                if product is second:
                    # The first steps' weights come before it is waited for rows: who looks for them may not have counted its own of the first product yet.
                    ahead = jnp.where(done == first_step, jnp.minimum(length, stages - 1), 0)
                    jax.lax.fori_loop(0, ahead, lambda step, _: plgpu.barrier_arrive(full.at[copy_weights(step, _)]), None)
                    pl.when((place != known) & (length > 0))(lambda: ops.await_count(counter.at[place], first.columns, counted, place))
                    known = jnp.where(length > 0, place, known)

                    @pl.when(ahead > 0)
                    def _():
                        jax.lax.fori_loop(0, ahead, lambda step, _: copy_rows(step, jax.lax.rem(done + step, stages), rows), None)
                        jax.lax.fori_loop(ahead, stages - 1, lambda step, _: plgpu.barrier_arrive(rows), None)

                jax.lax.fori_loop(ahead, length, lambda step, _: copy_rows(step, slot := copy_weights(step, _), full.at[slot]), None)
                return done + length, known

            done = jnp.int32(0)
            for product in (first, second):
                done, _ = jax.lax.fori_loop(*range_of(product), functools.partial(copy_unit, product, done), (done, jnp.int32(-1)))
            hopper_kernel.end_copies(done, full, empty, stages)

        @pl.when(me < wgs)
        def _multiply():
            plgpu.set_max_registers(plan.registers[1], action="increase")

            def load(slot):
                plgpu.barrier_wait(full.at[slot])
                return [(words_smem[slot, me, group], scales_smem[slot, me, group]) for group in range(groups)]

            def begun(product, i):
                _, expert, column, *_ = found = unit(product, i)
                return found, ops.load_bias(product.bias.at[jnp.minimum(expert, E - 1), pl.ds(column * GROUP, GROUP)], product is first)

            def compute_unit(product, i, carry):
                ((place, expert, column, part, _, length), raw_bias), ring, steps = carry
                following = begun(product, i + 1)
                if product is second:
                    pl.when((steps == 0) & (length > 0))(functools.partial(plgpu.barrier_wait, rows))

                def accumulate(acc):
                    def multiply(decoded, slot, group):
                        ops.multiply(acc, decoded, x_smem.at[slot, me, group])

                    ring_after = hopper_kernel.multiply_steps(
                        length, ring, plan, ops, load, multiply, lambda slot: plgpu.barrier_arrive(empty.at[slot]), functools.partial(decode, ops=ops))
                    return acc[...], ring_after

                y, ring = ops.accumulator(accumulate, acc_smem, me, ALIGNMENT)
                # An expert that isn't here gets no bias, parts of a sum get it once.
                bias = raw_bias.astype(jnp.float32) * jnp.where((expert < E) & (part == 0), jnp.float32(1), jnp.float32(0))
                sums = sums_smem.at[jax.lax.rem(i, 2)]  # who has met for a unit is done with the one before
                if product is first:
                    gate, up, gate_bias, up_bias = ops.halves(y, bias)
                    sums[me, pl.ds(0, _HALF)], sums[me, pl.ds(_HALF, _HALF)] = _of_row(gate, MATRIX), _of_row(up, MATRIX)
                else:
                    sums[me] = _of_row(y, plgpu.Layout.WGMMA)
                plgpu.barrier_arrive(together)
                plgpu.barrier_wait(together)

                def in_all(part, layout):
                    return sum(plgpu.load(sums.at[i, part], layout=layout, optimized=False) for i in range(wgs))

                @pl.when(me == 0)
                def _():
                    if product is first:
                        gate, up = (in_all(pl.ds(half * _HALF, _HALF), COLUMN) * loaded_factor for half in range(2))
                        y = hopper_kernel.swiglu(gate + gate_bias, up + up_bias, limit, alpha).astype(jnp.bfloat16)
                        group = column // 2
                        ops.store(h.at[place, group // groups, group % groups, 0, pl.ds(column % 2 * _HALF, _HALF)], y)
                        ops.count(counter.at[place], counted, place)
                    else:
                        out[part, place, pl.ds(column * GROUP, GROUP)] = in_all(pl.ds(0, GROUP), _ROW) + bias

                return following, ring, steps + length

            # What isn't in shared memory is loaded ahead of what is waited for there.
            loaded_factor, ranges = factor[0], [range_of(product) for product in (first, second)]
            units = [begun(product, begin) for product, (begin, _) in zip((first, second), ranges)]
            ring = jnp.int32(stages - 1), jnp.int32(0), load(0)
            for product, mine, at in zip((first, second), ranges, units):
                _, ring, _ = jax.lax.fori_loop(*mine, functools.partial(compute_unit, product), (at, ring, jnp.int32(0)))

    swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    run = plgpu.kernel(
        body, out_type=(jax.ShapeDtypeStruct((A, ins // groups, groups, 1, GROUP), jnp.bfloat16), jax.ShapeDtypeStruct((splits, A, outs * GROUP), jnp.float32)),
        grid=(plan.blocks,), grid_names=("block",), num_threads=wgs + 1, thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((stages, wgs, groups, ALIGNMENT, GROUP), jnp.bfloat16, transforms=swizzle),
            plgpu.SMEM((stages, wgs, groups, 4, 128), jnp.uint32),
            plgpu.SMEM((stages, wgs, groups, 32), jnp.uint32),
            plgpu.SMEM((2, wgs, GROUP), jnp.float32),
            plgpu.SMEM((wgs, GROUP, ALIGNMENT) if plan.interpret else (1, 8, 8), jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=stages - 1),
            plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
            plgpu.Barrier(num_arrivals=wgs),
            *([plgpu.Barrier(num_arrivals=2 * ins, num_barriers=A)] if plan.interpret else []),  # the counters of the only block
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plan.interpret)
    weights = ((*_as_copied(weight, groups), bias) for weight, bias in ((gate_up, gate_up_bias), (down, down_bias)))
    return run(expert_A, factor, x_1D.reshape(outs // groups, groups, 1, GROUP), *itertools.chain(*weights), jax.new_ref(counter_A))[1]


def _as_copied(weight, groups):
    """Give a weight's words and scales the dims of a TMA copy, at most five: outputs of all experts, shares of inputs, `groups`, and what is in one."""
    return (part.reshape(-1, part.shape[2] // groups, groups, *part.shape[3:]) for part in weight)


def _of_row(y, layout):
    """Return the first of a product's columns, which alone is of a row."""
    return jnp.where(plgpu.broadcasted_iota(jnp.int32, y.shape, 1, layout=layout) == 0, y, 0).sum(axis=1)
