"""A single token's experts on NVIDIA Hopper GPUs by one kernel: gate and up, SwiGLU, and down.

Each block has units of the first product, then of the second, whose packed weights are on their way, and the first of them decoded, while others
still multiply the first; only the rows h wait for all blocks, by a counter in memory. So all blocks must run at the same time, which they do where
there are no more than multiprocessors, as each has room for one.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gptoss_jax.kernels.expert_matmul import hopper_kernel
from gptoss_jax.kernels.expert_matmul.hopper_instructions import MATRIX, Interpreted, Mosaic
from gptoss_jax.kernels.expert_matmul.hopper_kernel import SHARED_BYTES, Plan
from gptoss_jax.kernels.expert_matmul.hopper_layout import ALIGNMENT, GROUP
from gptoss_jax.kernels.hopper import SMS

_MOST_STAGES = 9  # so that a block's part of down is all on its way while the first product ends, at the published sizes


def plan(gate_up, down, experts: int, blocks: int = SMS) -> Plan:
    """Choose step, ring and split of the sum of down for so many experts of a token."""
    dims = [weight.scales.shape[dim] for weight in (gate_up, down) for dim in (1, 2)]
    warpgroups = next(n for n in (3, 2, 1) if dims[0] % n == dims[2] % n == 0)
    groups = next(n for n in (3, 2, 1) if dims[1] % n == dims[3] % n == 0)
    stage = groups * (warpgroups * (2048 + 128) + ALIGNMENT * 2 * GROUP)
    stages = min(_MOST_STAGES, SHARED_BYTES // stage)
    units, steps = experts * (dims[2] // warpgroups), dims[3] // groups
    splits = min((1, 2, 3), key=lambda n: -(-units * n // blocks) * -(-steps // n)) if units < blocks else 1  # fill the grid with parts of sums
    return Plan((ALIGNMENT,), warpgroups, groups, stages, splits, blocks)


class _Product(NamedTuple):
    """One of the two products as a block sees it: memory, and how its units are counted."""

    x: object
    words: object
    scales: object
    bias: object
    columns: int  # of `warpgroups` times 64 outputs
    steps: int
    splits: int


@functools.partial(jax.jit, static_argnames=("plan", "limit", "alpha"))  # so that a kernel is made once for all layers
def mlp(x_1D, expert_A, factor, counter, gate_up, gate_up_bias, down, down_bias, plan: Plan, *, limit: float, alpha: float):
    """Run the kernel: x bfloat16 [1, D]; experts int32 [A], E for one that isn't here; the factor that x lacks, float32 [1], and a zero, int32 [1].

    Biases in bfloat16 or float32. Returns down's products and biases in parts to be summed, float32 [splits, A, D], zeros of experts E.
    """
    wgs, groups, stages = plan.warpgroups, plan.groups, plan.stages
    A, E, (D, F) = expert_A.shape[0], down.scales.shape[0], (dim * GROUP for dim in down.scales.shape[1:3])
    ops = Interpreted if plan.interpret else Mosaic

    def body(experts, factor, x, *refs):
        weights, (counter, h, out, x_smem, words_smem, scales_smem, acc_smem, full, rows, empty, *counted) = refs[:6], refs[6:]
        first = _Product(x, *weights[:3], 2 * F // GROUP // wgs, D // GROUP // groups, 1)
        second = _Product(h, *weights[3:], D // GROUP // wgs, F // GROUP // groups, plan.splits)
        me, block = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("block")

        def mine(product):
            return jnp.maximum(0, (A * product.columns * product.splits - block + plan.blocks - 1) // plan.blocks)

        def unit(product, i):
            """Return (expert's place among the token's, expert, column of outputs, part of the sum, its first step, its number of steps) of this
            block's i-th unit, or anything past the last."""
            at = block + i * plan.blocks
            place = jnp.minimum(at // (product.columns * product.splits), A - 1)
            expert, part = experts[place], at // product.columns % product.splits
            begin, end = part * product.steps // product.splits, (part + 1) * product.steps // product.splits
            return place, expert, at % product.columns, part, begin, jnp.where(expert < E, end - begin, 0)

        @pl.when(me == wgs)
        def _copy():
            plgpu.set_max_registers(plan.registers[0], action="decrease")

            def free(step):
                """Wait until a step's slot is given back, which happens as the step after it begins: before the first, the last slot's."""
                slot = jax.lax.rem(step, stages)

                @pl.when(step >= stages - 1)
                def _():
                    plgpu.barrier_wait(empty.at[slot])
                    plgpu.commit_smem()  # it was read otherwise than copies write

                return slot

            def copy_unit(product, first_step, i, done):
                place, expert, column, _, begin, length = unit(product, i)

                def copy_weights(step, _):
                    slot, outputs, inputs = free(done + step), pl.ds(column * wgs, wgs), pl.ds((begin + step) * groups, groups)
                    plgpu.copy_gmem_to_smem(product.words.at[expert, outputs, inputs], words_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(product.scales.at[expert, outputs, inputs], scales_smem.at[slot], full.at[slot])
                    return slot

                def copy_rows(step, slot, barrier):  # past the end of x, zeros are read
                    x, inputs = product.x.at[place] if product is second else product.x, pl.ds((begin + step) * groups * GROUP, groups * GROUP)
                    plgpu.copy_gmem_to_smem(x.at[pl.ds(place * 0, ALIGNMENT), inputs], x_smem.at[slot], barrier)

                ahead = 0
                if product is second:  # as many steps' weights as there is room for before the first product's last slot is given back
                    ahead = jnp.where(done == first_step, jnp.minimum(length, stages - 1), 0)
                    jax.lax.fori_loop(0, ahead, lambda step, _: plgpu.barrier_arrive(full.at[copy_weights(step, _)]), None)

                    @pl.when(ahead > 0)  # not in a unit of no steps: who looks for a step's weights hasn't counted yet
                    def _():
                        ops.await_count(counter, A * first.columns * wgs, counted)
                        jax.lax.fori_loop(0, ahead, lambda step, _: copy_rows(step, jax.lax.rem(done + step, stages), rows), None)
                        jax.lax.fori_loop(ahead, stages - 1, lambda step, _: plgpu.barrier_arrive(rows), None)

                jax.lax.fori_loop(ahead, length, lambda step, _: copy_rows(step, slot := copy_weights(step, _), full.at[slot]), None)
                return done + length

            done = jnp.int32(0)
            for product in (first, second):
                done = jax.lax.fori_loop(0, mine(product), functools.partial(copy_unit, product, done), done)
            last = free(done)
            for _ in range(3):  # nothing comes in the step that is looked for while the last one is multiplied
                plgpu.barrier_arrive(full.at[last])
            jax.lax.fori_loop(done + 1, done + stages - 1, lambda step, _: free(step), 0)  # a barrier isn't left while others arrive

        @pl.when(me < wgs)
        def _multiply():
            plgpu.set_max_registers(plan.registers[1], action="increase")

            def load(slot):
                plgpu.barrier_wait(full.at[slot])
                return [(words_smem[slot, me, group], scales_smem[slot, me, group]) for group in range(groups)]

            def load_bias(product, expert, column):
                outputs = product.bias.at[jnp.minimum(expert, E - 1), pl.ds((column * wgs + me) * GROUP, GROUP)]
                return ops.load_bias(outputs, product is first)

            def begun(product, i):
                found = unit(product, i)
                return found, load_bias(product, found[1], found[2])

            def compute_unit(product, i, carry):
                ((place, expert, column, part, _, length), raw_bias), ring, steps = carry
                following = begun(product, i + 1)

                if product is second:
                    pl.when((steps == 0) & (length > 0))(functools.partial(plgpu.barrier_wait, rows))

                def accumulate(acc):
                    def multiply(decoded, slot, group):
                        ops.multiply(acc, decoded, x_smem.at[slot, :, pl.ds(group * GROUP, GROUP)])

                    ring_after = hopper_kernel.multiply_steps(length, ring, plan, ops, load, multiply, lambda slot: plgpu.barrier_arrive(empty.at[slot]))
                    return acc[...], ring_after

                y, ring = ops.accumulator(accumulate, acc_smem, me, ALIGNMENT)
                # An expert that isn't here gets no bias, parts of a sum get it once.
                bias = raw_bias.astype(jnp.float32) * jnp.where((expert < E) & (part == 0), jnp.float32(1), jnp.float32(0))
                if product is first:
                    y = hopper_kernel.swiglu(*ops.halves(y * loaded_factor, bias), limit, alpha)
                    ops.store(h.at[place, 0, pl.ds((column * wgs + me) * (GROUP // 2), GROUP // 2)], _of_token(y, MATRIX).astype(jnp.bfloat16))
                    ops.count(counter, counted)
                else:
                    out[part, place, pl.ds((column * wgs + me) * GROUP, GROUP)] = _of_token(y, plgpu.Layout.WGMMA) + bias
                return following, ring, steps + length

            # What isn't in shared memory is loaded ahead of what is waited for there.
            loaded_factor, units = factor[0], [begun(product, 0) for product in (first, second)]
            ring = jnp.int32(stages - 1), jnp.int32(0), load(0)
            for product, at in zip((first, second), units):
                _, ring, _ = jax.lax.fori_loop(0, mine(product), functools.partial(compute_unit, product), (at, ring, jnp.int32(0)))

    swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    run = plgpu.kernel(
        body, out_type=(jax.ShapeDtypeStruct((A, 1, F), jnp.bfloat16), jax.ShapeDtypeStruct((plan.splits, A, D), jnp.float32)),
        grid=(plan.blocks,), grid_names=("block",), num_threads=wgs + 1, thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((stages, ALIGNMENT, groups * GROUP), jnp.bfloat16, transforms=swizzle),
            plgpu.SMEM((stages, wgs, groups, 4, 128), jnp.uint32),
            plgpu.SMEM((stages, wgs, groups, 32), jnp.uint32),
            plgpu.SMEM((wgs, GROUP, ALIGNMENT) if plan.interpret else (1, 8, 8), jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=stages - 1),
            plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
            *([plgpu.Barrier(num_arrivals=A * (2 * F // GROUP))] if plan.interpret else []),  # the counter of the only block
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plan.interpret)
    return run(expert_A, factor, x_1D, gate_up.words, gate_up.scales, gate_up_bias, down.words, down.scales, down_bias, jax.new_ref(counter))[1]


def _of_token(y, layout):
    """Return the first of a product's columns, which alone is of a row."""
    return jnp.where(plgpu.broadcasted_iota(jnp.int32, y.shape, 1, layout=layout) == 0, y, 0).sum(axis=1)
