"""Expert matmul for NVIDIA Hopper GPUs in Pallas Mosaic GPU: packed weights by TMA, decoded in registers, multiplied by wgmma.

The weights are wgmma's operand A, from registers, and the rows its N side, so that one kernel serves decode (8 rows of an expert) and prefill
(152). A persistent grid walks over units: a tile of at most N rows of one expert, times a column of outputs, times a part of the sum. One
warpgroup copies the next steps' words, scales and rows into a ring of stages, ahead of unit boundaries too; each of the others decodes and
multiplies 64 outputs, and decodes the next inputs while these are multiplied.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gptoss_jax.kernels.expert_matmul import grouping
from gptoss_jax.kernels.expert_matmul.hopper_instructions import Interpreted, Mosaic, decode
from gptoss_jax.kernels.expert_matmul.hopper_layout import ALIGNMENT, GROUP, HopperGateUpWeight
from gptoss_jax.kernels.hopper import SMS

SHARED_BYTES = 232448 - 4096  # of a block, less barriers and what the compiler takes
_FEWEST_STAGES, _MOST_STAGES = 4, 8
_MOST_ROWS = 152  # of a tile: what the registers of three warpgroups hold, by ptxas's reckoning beside half as many


class Plan(NamedTuple):
    """What is fixed when the kernel is compiled; tests also set the last two."""

    heights: tuple[int, ...]  # N: of how many rows a tile's product may be, ascending, so that one of few rows takes less time
    warpgroups: int  # that multiply: a block is this many times 64 outputs
    groups: int  # of 64 inputs, in a stage
    stages: int  # of the ring
    splits: int  # of the sum over inputs
    blocks: int = SMS  # of the grid
    interpret: object = None  # plgpu.InterpretGPUParams: what can't be interpreted is computed by jnp instead

    @property
    def rows(self) -> int:
        """Of a tile, at most."""
        return self.heights[-1]

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread that copies and of one that multiplies: together no more than the block got at launch."""
        each, copying = 65536 // (128 * (self.warpgroups + 1)) // 8 * 8, 40 if len(self.heights) == 1 else 24  # two heights leave who multiplies the most
        return copying, min(240, (each * (self.warpgroups + 1) - copying) // self.warpgroups // 8 * 8)


def heights(num_rows: int, experts: int) -> tuple[int, ...]:
    """Return how tall the tiles of so many rows of all experts may be: what most experts' rows fit, and twice that if it takes more for some.

    Where tokens choose at random, the mean's root is the standard deviation: few experts have one more than the mean, next to none four.
    """
    mean, half = num_rows / experts, _MOST_ROWS // 2 // ALIGNMENT * ALIGNMENT
    deviation, most = math.sqrt(mean), -(-num_rows // ALIGNMENT) * ALIGNMENT
    lower = min(math.ceil((mean + deviation) / ALIGNMENT) * ALIGNMENT, half)
    taller = min(_MOST_ROWS if lower == half else 2 * lower, most)
    return (taller,) if taller <= lower else (lower,) if mean + 4 * deviation <= lower else (lower, taller)


def plan(slots: int, weight, heights: tuple[int, ...]) -> Plan:
    """Choose step, ring and split for tiles of these heights, all of the one height if there is one, that take so many slots."""
    E, outs, ins = weight.scales.shape[:3]
    rows = heights[-1]
    warpgroups = next(n for n in (3, 2, 1) if outs % n == 0)
    units = (-(-slots // rows) if len(heights) == 1 else most_tiles(slots, E, rows)) * (outs // warpgroups)
    gated, few = isinstance(weight, HopperGateUpWeight), units < SMS
    room = SHARED_BYTES - warpgroups * rows * GROUP * (1 if gated else 4 if few else 2)  # beside the rows that are on their way out
    group = warpgroups * (2048 + 128) + rows * 2 * GROUP
    groups = next(n for n in (3, 2, 1) if ins % n == 0 and (n == 1 or room // (n * group) >= _FEWEST_STAGES))
    steps = ins // groups
    splits = 1
    if few and not gated:  # fill the grid with parts of sums
        splits = min((1, 2, 3), key=lambda n: -(-units * n // SMS) * -(-steps // n))
    return Plan(heights, warpgroups, groups, min(_MOST_STAGES, room // (groups * group)), splits)


def most_tiles(num_rows: int, num_experts: int, rows: int) -> int:
    """Return how many tiles of at most so many rows sorted rows can need, each group's and nobody's."""
    return min(num_rows // ALIGNMENT, num_rows // rows + num_experts + 1)


class Tiles(NamedTuple):
    """Of each tile its expert, first row and number of rows, int32 [T], the last two in ALIGNMENTs; count: int32 [1], how many there are.

    Arrays apart, not a table: what is constant of them takes no kernel.
    """

    expert: jax.Array
    first: jax.Array
    rows: jax.Array
    count: jax.Array


def tiles(group_sizes_E, num_rows: int, rows: int, *, nobodys: bool = True) -> Tiles:
    """Cut rows sorted by expert into tiles of at most `rows`.

    Group sizes and num_rows are multiples of ALIGNMENT. Rows past the groups' sum belong to expert E, which means nobody, or if not nobodys are in no tile.
    """
    E, height, sizes = group_sizes_E.shape[0], rows // ALIGNMENT, group_sizes_E.astype(jnp.int32) // ALIGNMENT
    if nobodys:
        sizes = jnp.append(sizes, num_rows // ALIGNMENT - sizes.sum())
    row_end, tile_end = grouping.ends(sizes), grouping.ends(-(-sizes // height))
    tile = jnp.arange(most_tiles(num_rows, E, rows), dtype=jnp.int32)
    expert = jnp.minimum((tile_end <= tile[:, None]).sum(axis=1, dtype=jnp.int32), len(sizes) - 1)
    first = row_end[expert] - sizes[expert] + (tile - tile_end[expert] + -(-sizes[expert] // height)) * height
    return Tiles(expert, first, jnp.clip(row_end[expert] - first, 0, height), tile_end[-1:])


@functools.partial(jax.jit, static_argnames=("plan", "slots", "limit", "alpha"))  # so that a kernel is made once for all layers
def matmul(x_MI, weight, bias_EO, tiles: Tiles, plan: Plan, *, slots: int | None = None, limit: float = 0.0, alpha: float = 0.0):
    """Run the kernel: x bfloat16 [M, in], M a multiple of ALIGNMENT; bias bfloat16 or float32 [E, out]; tiles of at most `plan.rows`.

    slots: M of the result where every tile takes the same rows, all of x's: at most `plan.rows`, and fewer than ALIGNMENT or a multiple.
    Returns [M, out] of a HopperWeight, in bfloat16, or in float32 [splits, M, out] to be summed where the plan splits the sum; of a
    HopperGateUpWeight clamped SwiGLU's [M, out/2], bfloat16. Rows of no tile are left as they are in memory; rows of expert E are zeros.
    """
    gated = isinstance(weight, HopperGateUpWeight)
    M = slots or x_MI.shape[0]
    E, outs, ins = weight.scales.shape[:3]
    wgs, groups, N, stages, splits = plan.warpgroups, plan.groups, plan.rows, plan.stages, plan.splits
    steps, columns = ins // groups, outs // wgs
    out_dtype = jnp.bfloat16 if splits == 1 else jnp.float32
    each = GROUP // 2 if gated else GROUP  # outputs of a warpgroup
    ops = Interpreted if plan.interpret else Mosaic

    def body(experts, firsts, tall, count, x, words, scales, bias, out, x_smem, words_smem, scales_smem, out_smem, acc_smem, full, empty):
        me, block = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("block")

        units = count[0] * (columns * splits)
        mine = jnp.maximum(0, (units - block + plan.blocks - 1) // plan.blocks)

        def unit(i):
            """Return (expert, first row and rows of its tile, column of outputs, part of the sum, its first step, its number of steps) of this
            block's i-th unit, or anything past the last: a unit ahead is looked up, so that its tile isn't waited for."""
            at = block + i * plan.blocks
            tile, part, column = jnp.minimum(at // (columns * splits), experts.shape[0] - 1), at // columns % splits, at % columns
            expert, first, rows = experts[tile], firsts[tile], tall[tile]
            begin, end = part * steps // splits, (part + 1) * steps // splits
            return expert, first, rows, column, part, begin, jnp.where(expert < E, end - begin, 0)

        @pl.when(me == wgs)
        def _copy():
            plgpu.set_max_registers(plan.registers[0], action="decrease")

            def copy_unit(i, carry):
                done, (expert, first, rows, column, _, begin, length) = carry
                following = unit(i + 1)
                if slots:
                    first = block * 0  # past the end of x, zeros are read

                def copy_step(step, _):
                    slot, at = free_slot(done + step, empty, stages), begin + step
                    outputs, inputs = pl.ds(column * wgs, wgs), pl.ds(at * groups, groups)
                    plgpu.copy_gmem_to_smem(words.at[expert, outputs, inputs], words_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(scales.at[expert, outputs, inputs], scales_smem.at[slot], full.at[slot])
                    by_height(plan, rows, lambda height: plgpu.copy_gmem_to_smem(
                        x.at[pl.ds(first * ALIGNMENT, height), pl.ds(at * groups * GROUP, groups * GROUP)],
                        x_smem.at[slot, pl.ds(0, height)], full.at[slot]))
                    return _

                jax.lax.fori_loop(0, length, copy_step, None)
                return done + length, following

            done, _ = jax.lax.fori_loop(0, mine, copy_unit, (jnp.int32(0), unit(0)))
            end_copies(done, full, empty, stages)

        @pl.when(me < wgs)
        def _multiply():
            plgpu.set_max_registers(plan.registers[1], action="increase")

            def load(slot):
                plgpu.barrier_wait(full.at[slot])
                return [(words_smem[slot, me, group], scales_smem[slot, me, group]) for group in range(groups)]

            def load_bias(expert, column):
                outputs = bias.at[jnp.minimum(expert, E - 1), pl.ds((column * wgs + me) * GROUP, GROUP)]
                return ops.load_bias(outputs, gated)

            def compute_unit(i, carry):
                (expert, first, rows, column, part, _, length), raw_bias, ring = carry
                following = unit(i + 1)
                following_bias = load_bias(following[0], following[3])

                def compute(height, ring):
                    def accumulate(acc):
                        def multiply(decoded, slot, group, _):
                            ops.multiply(acc, decoded, x_smem.at[slot, pl.ds(0, height), pl.ds(group * GROUP, GROUP)])

                        ring_after = multiply_steps(
                            length, ring, plan, ops, load, multiply, lambda slot: plgpu.barrier_arrive(empty.at[slot]), functools.partial(decode, ops=ops))
                        return acc[...], ring_after

                    product, ring = ops.accumulator(accumulate, acc_smem, me, height)
                    # Rows of no expert get no bias, parts of a sum get it once.
                    added = raw_bias.astype(jnp.float32) * jnp.where((expert < E) & (part == 0), jnp.float32(1), jnp.float32(0))
                    if gated:
                        gate, up, *biases = ops.halves(product, added)
                        y = swiglu(*(y + across(bias, height) for y, bias in zip((gate, up), biases)), limit, alpha).astype(out_dtype)
                    else:
                        y = product + across(added, height)
                        y = y.astype(out_dtype) if splits == 1 else plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_smem.at[me, pl.ds(0, height)].T[...] = y
                    return ring

                ring = by_height(plan, rows, compute, ring)
                plgpu.commit_smem()
                store_rows(out_smem.at[me], out.at[part, :, pl.ds((column * wgs + me) * each, each)], first, rows, N)
                return following, following_bias, ring

            # What isn't in shared memory is loaded ahead of what is waited for there.
            begun = unit(0)
            begun_bias = load_bias(begun[0], begun[3])
            jax.lax.fori_loop(0, mine, compute_unit, (begun, begun_bias, (jnp.int32(stages - 1), jnp.int32(0), load(0))))
            plgpu.wait_smem_to_gmem(0)

    swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    run = plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct((splits, M, outs * each), out_dtype), grid=(plan.blocks,), grid_names=("block",), num_threads=wgs + 1, thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((stages, N, groups * GROUP), jnp.bfloat16, transforms=swizzle),
            plgpu.SMEM((stages, wgs, groups, 4, 128), jnp.uint32),
            plgpu.SMEM((stages, wgs, groups, 32), jnp.uint32),
            plgpu.SMEM((wgs, N, each), out_dtype),
            plgpu.SMEM((wgs, GROUP, N) if plan.interpret else (1, 8, 8), jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plan.interpret)
    out = run(*tiles, x_MI, weight.words, weight.scales, bias_EO)
    return out[0] if splits == 1 else out


def by_height(plan: Plan, rows, run, *operands):
    """Return run(height, *operands) of the least height that so many rows, in ALIGNMENTs, fit."""
    runs = [functools.partial(run, height) for height in plan.heights]
    return jax.lax.cond(rows * ALIGNMENT > plan.heights[0], *reversed(runs), *operands) if len(runs) > 1 else runs[0](*operands)


def free_slot(step, empty, stages):
    """Return a step's slot of the ring when it is given back, which happens as the step after it begins: before the first, the last slot's."""
    slot = jax.lax.rem(step, stages)

    @pl.when(step >= stages - 1)
    def _():
        plgpu.barrier_wait(empty.at[slot])
        plgpu.commit_smem()  # it was read otherwise than copies write

    return slot


def end_copies(done, full, empty, stages, copies=3, mark=lambda slot: None):
    """End what copied so many steps into the ring, each by so many copies; mark(slot) says so in the one after the last."""
    last = free_slot(done, empty, stages)
    mark(last)
    for _ in range(copies):  # nothing comes in the step that is looked for while the last one is multiplied
        plgpu.barrier_arrive(full.at[last])
    jax.lax.fori_loop(done + 1, done + stages - 1, lambda step, _: free_slot(step, empty, stages), 0)  # a barrier isn't left while others arrive


def multiply_steps(length, ring, plan: Plan, ops, load, multiply, give_back, decode):
    """Take so many steps through the ring: (slot of the step before, this step's, its loaded words and scales), returned as the next unit finds it.

    While a group of inputs is multiplied the next one is decoded, in registers of its own, over the steps' ends too. load(slot) waits for a
    step's words; multiply(decoded, slot, group, turn) begins a product, turn 0 and 1 by turns where a step is one group; give_back(slot) lets the
    slot be filled again; decode(words, scales).
    """
    def step(state, turn=0):
        before, slot, decoded, loaded = state
        following = jnp.where(slot + 1 == plan.stages, 0, slot + 1)
        for group in range(plan.groups):
            multiply(decoded, slot, group, turn)
            if group + 1 == plan.groups:
                loaded = load(following)
            ops.finish(but=1)
            if group == 0:
                give_back(before)
            decoded = decode(*loaded[(group + 1) % plan.groups])
        return slot, following, decoded, loaded

    before, slot, loaded = ring
    state = before, slot, decode(*loaded[0]), loaded
    if plan.groups > 1:
        state = jax.lax.fori_loop(0, length, lambda _, state: step(state), state)
    else:  # two by two, as registers that a product reads can't be the next one's
        state = jax.lax.fori_loop(0, length // 2, lambda _, state: step(step(state), 1), state)
        state = jax.lax.cond(length % 2 == 1, step, lambda state: state, state)
    before, slot, _, loaded = state
    return before, slot, loaded


def across(x, rows):
    return jax.lax.broadcast_in_dim(x, (x.shape[0], rows), (0,))


def swiglu(gate, up, limit, alpha):
    gate, up = jnp.minimum(gate, limit), jnp.maximum(jnp.minimum(up, limit), -limit)
    return gate / (1 + jnp.exp(-alpha * gate)) * (up + 1)


def store_rows(smem, gmem, first, rows, most):
    """Copy the first rows of smem to gmem from row `first`, both in ALIGNMENTs: by powers of two, as a copy's shape is fixed."""
    done = 0
    for power in reversed(range((most // ALIGNMENT).bit_length())):
        size = 1 << power

        @pl.when(rows & size != 0)
        def _():
            plgpu.copy_smem_to_gmem(smem.at[pl.ds(done * ALIGNMENT, size * ALIGNMENT)], gmem.at[pl.ds((first + done) * ALIGNMENT, size * ALIGNMENT)])

        done = done + (rows & size)
