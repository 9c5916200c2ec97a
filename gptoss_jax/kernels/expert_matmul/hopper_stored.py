"""Products of sorted rows with packed weights as the checkpoint stores them, and with their transposes, on NVIDIA Hopper GPUs: what training takes.

As in `hopper_kernel` the weights are wgmma's operand A and the rows its N side, and a persistent grid walks over units, copies ahead of it. But A comes
from shared memory, where a warpgroup puts each 64 outputs by 64 inputs that it decoded: from there wgmma also takes them transposed, which
gradients of rows need, and nothing has to be rearranged but scales. A low-rank adapter's last factor is one more step of a unit.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gptoss_jax.kernels.expert_matmul.hopper_instructions import Interpreted, Mosaic
from gptoss_jax.kernels.expert_matmul.hopper_kernel import (
    SHARED_BYTES, Plan, Tiles, across, by_height, end_copies, free_slot, heights, multiply_steps, store_rows)
from gptoss_jax.kernels.expert_matmul.hopper_layout import ALIGNMENT, GROUP
from gptoss_jax.kernels.expert_matmul.reference import Mxfp4Weight

_HALF = GROUP // 2


class StoredWeight(NamedTuple):
    """blocks uint8 [E, out, in/2], a checkpoint's; factors bfloat16 [E, out/64, in/64, 128]: number 2 o + c is 2^(scale - 1) of output o, block c."""

    blocks: jax.Array
    factors: jax.Array


def stored(weight: Mxfp4Weight) -> StoredWeight:
    """Return a packed weight for the kernel: its scales, a sixteenth of it, in another order; scale bytes past 128 become infinite."""
    E, O, C = weight.scales.shape
    exponents = jnp.minimum(weight.scales.astype(jnp.uint16) + 126, 255).reshape(E, O // GROUP, GROUP, C // 2, 2).transpose(0, 1, 3, 2, 4)
    factors = jax.lax.bitcast_convert_type(exponents << 7, jnp.bfloat16).reshape(E, O // GROUP, C // 2, 2 * GROUP)
    return StoredWeight(weight.blocks.reshape(E, O, C * 16), factors)


def plan(num_rows: int, weight: StoredWeight, *, transposed: bool) -> Plan:
    """Choose tile and ring for `num_rows` rows over all experts."""
    E, outs, ins = weight.factors.shape[:3]
    tall = heights(num_rows, E)
    rows = tall[-1]
    warpgroups = next(n for n in (3, 2, 1) if (ins if transposed else outs) % n == 0)
    room = SHARED_BYTES - warpgroups * 2 * GROUP * (2 * GROUP + rows)
    stages = room // (warpgroups * (GROUP * _HALF + 4 * GROUP) + 2 * rows * GROUP)
    return Plan(tall, warpgroups, 1, min(8, stages), 1)


@functools.partial(jax.jit, static_argnames=("plan", "transposed"))  # so that a kernel is made once for all layers
def matmul(x_MI, weight: StoredWeight, tiles: Tiles, plan: Plan, bias_EO=None, low_rank=None, *, transposed: bool = False):
    """Run the kernel: x bfloat16 [M, in], M a multiple of ALIGNMENT, tiles of at most `plan.rows`; returns [M, out], bfloat16.

    Transposed, x is [M, out] and the result [M, in]. bias: bfloat16 or float32 [E, columns of the result]. low_rank: bfloat16 [M, 64] and
    [E, 64, out], transposed [E, in, 64], whose product is added. Rows of no tile are left as they are in memory; rows of expert E are zeros.
    """
    M, (E, outs, ins) = x_MI.shape[0], weight.factors.shape[:3]
    wgs, N, stages = plan.warpgroups, plan.rows, plan.stages
    columns, steps = (ins // wgs, outs) if transposed else (outs // wgs, ins)
    copies, ops = 2 * wgs + 1, Interpreted if plan.interpret else Mosaic
    optional = [operand for operand in (bias_EO, *(low_rank or ())) if operand is not None]

    def body(experts, firsts, tall, count, x, blocks, factors, *refs):
        given, (out, x_smem, blocks_smem, factors_smem, decoded_smem, out_smem, acc_smem, full, empty) = refs[:len(optional)], refs[len(optional):]
        me, block = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("block")

        mine = jnp.maximum(0, (count[0] * columns - block + plan.blocks - 1) // plan.blocks)

        def unit(i):
            """Return (expert, first row and rows of its tile, column, number of steps) of this block's i-th unit, or anything past the last."""
            at = block + i * plan.blocks
            tile = jnp.minimum(at // columns, experts.shape[0] - 1)
            expert = experts[tile]
            return expert, firsts[tile], tall[tile], at % columns, jnp.where(expert < E, steps, 0)

        @pl.when(me == wgs)
        def _copy():
            plgpu.set_max_registers(plan.registers[0], action="decrease")

            def copy_unit(i, carry):
                done, (expert, first, rows, column, length) = carry
                following = unit(i + 1)

                def copy_rows(source, step, slot):
                    by_height(plan, rows, lambda height: plgpu.copy_gmem_to_smem(
                        source.at[pl.ds(first * ALIGNMENT, height), pl.ds(step * GROUP, GROUP)], x_smem.at[slot, pl.ds(0, height)], full.at[slot]))

                def copy_step(step, _):
                    slot = free_slot(done + step, empty, stages)
                    for wg in range(wgs):
                        place = (expert, step, column * wgs + wg) if transposed else (expert, column * wgs + wg, step)
                        plgpu.copy_gmem_to_smem(blocks.at[(*place[:2], slice(None), place[2])], blocks_smem.at[slot, wg], full.at[slot])
                        plgpu.copy_gmem_to_smem(factors.at[place], factors_smem.at[slot, wg], full.at[slot])
                    copy_rows(x, step, slot)
                    return _

                if low_rank:
                    @pl.when(length > 0)
                    def _():
                        slot = free_slot(done, empty, stages)
                        copy_rows(given[-2], 0, slot)
                        for _ in range(copies - 1):  # what it is multiplied by doesn't come this way
                            plgpu.barrier_arrive(full.at[slot])

                    done = done + jnp.where(length > 0, 1, 0)
                jax.lax.fori_loop(0, length, copy_step, None)
                return done + length, following

            done, _ = jax.lax.fori_loop(0, mine, copy_unit, (jnp.int32(0), unit(0)))
            end_copies(done, full, empty, stages, copies)

        @pl.when(me < wgs)
        def _multiply():
            plgpu.set_max_registers(plan.registers[1], action="increase")

            def load(slot):
                plgpu.barrier_wait(full.at[slot])
                return [(blocks_smem[slot, me], factors_smem[slot, me])]

            def give_back(slot):
                plgpu.barrier_arrive(empty.at[slot])

            def begin(i):
                """Return a unit, and what is loaded ahead of it: its bias and the adapter's columns."""
                expert, _, _, column, _ = found = unit(i)
                outputs, expert = pl.ds((column * wgs + me) * GROUP, GROUP), jnp.minimum(expert, E - 1)
                bias = None if bias_EO is None else ops.load_bias(given[0].at[expert, outputs], False)
                low = None if low_rank is None else ops.load_rows(given[-1].at[(expert, *((outputs, slice(None)) if transposed else (slice(None), outputs)))])
                return found, bias, low

            def compute_unit(i, carry):
                ((expert, first, rows, column, length), bias, low), ring = carry
                following = begin(i + 1)

                def compute(height, ring):
                    def accumulate(acc):
                        def multiply(decoded, slot, _, turn, transposed=transposed):
                            place = decoded_smem.at[me, turn]
                            place[...] = decoded  # all threads wait first, so that the product before the last, of this place, is done
                            plgpu.commit_smem()
                            ops.multiply(acc, place.T if transposed else place, x_smem.at[slot, pl.ds(0, height)])

                        def multiply_low(ring):
                            before, slot, _ = ring
                            multiply(low, slot, 0, turn=1, transposed=not transposed)  # a unit's steps begin at turn 0
                            give_back(before)
                            following = jnp.where(slot + 1 == stages, 0, slot + 1)
                            return slot, following, load(following)

                        begun = jax.lax.cond(length > 0, multiply_low, lambda ring: ring, ring) if low_rank else ring
                        ring_after = multiply_steps(length, begun, plan, ops, load, multiply, give_back, ops.decode_stored)
                        return acc[...], ring_after

                    y, ring = ops.accumulator(accumulate, acc_smem, me, height)
                    if bias_EO is not None:
                        y += across(bias.astype(jnp.float32) * jnp.where(expert < E, jnp.float32(1), jnp.float32(0)), height)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_smem.at[me, pl.ds(0, height)].T[...] = y.astype(jnp.bfloat16)
                    return ring

                ring = by_height(plan, rows, compute, ring)
                plgpu.commit_smem()
                store_rows(out_smem.at[me], out.at[:, pl.ds((column * wgs + me) * GROUP, GROUP)], first, rows, N)
                return following, ring

            # What isn't in shared memory is loaded ahead of what is waited for there.
            first = begin(0)
            jax.lax.fori_loop(0, mine, compute_unit, (first, (jnp.int32(stages - 1), jnp.int32(0), load(0))))
            plgpu.wait_smem_to_gmem(0)

    swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    run = plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct((M, columns * wgs * GROUP), jnp.bfloat16), grid=(plan.blocks,), grid_names=("block",),
        num_threads=wgs + 1, thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((stages, N, GROUP), jnp.bfloat16, transforms=swizzle),
            plgpu.SMEM((stages, wgs, GROUP, _HALF), jnp.uint8),
            plgpu.SMEM((stages, wgs, 2 * GROUP), jnp.bfloat16),
            plgpu.SMEM((wgs, 2, GROUP, GROUP), jnp.bfloat16, transforms=swizzle),
            plgpu.SMEM((wgs, N, GROUP), jnp.bfloat16),
            plgpu.SMEM((wgs, GROUP, N) if plan.interpret else (1, 8, 8), jnp.float32),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plan.interpret)
    return run(*tiles, x_MI, weight.blocks.reshape(E, outs, GROUP, ins, _HALF), weight.factors, *optional)
