"""A single token's experts on NVIDIA Hopper GPUs by one kernel: gate and up, SwiGLU, and down.

A unit is 64 outputs of an expert. Blocks take units as they come to them, all of the first product, then of the second, in the order of the token's
experts; so memory is read without a pause, and the first experts' rows h are there when their units of the second product come. Counters in memory
say which unit is next, and how many of an expert's are done. Who waits for a row waits for units that were taken before its own; as each block's first
unit is its own from the start, that needs all blocks to begin: they do where there are no more than multiprocessors, as each has room for one, but
where another process's kernels run beside it (MPS), this relies on a GPU starting all blocks of a grid before the next one's.

Of a block one warpgroup copies the next steps' weights into a ring of stages; some share out a unit's inputs, decode weights, and multiply them by
mma.sync, which unlike wgmma needs no warp to wait for another; one adds up what those have of a unit and stores it, while they are at the next ones.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gptoss_jax.kernels.expert_matmul import hopper_kernel
from gptoss_jax.kernels.expert_matmul.hopper_instructions import ROW, Interpreted, Mosaic, decode
from gptoss_jax.kernels.expert_matmul.hopper_layout import GROUP
from gptoss_jax.kernels.hopper import SMS

_HALF = GROUP // 2
_KILOBYTES = 227 - 3  # of a block's shared memory, less units' numbers and barriers
_FEWEST_STAGES, _MOST_STAGES = 3, 32
_MOST_SPLITS = 3  # of down's sum: what a block takes last should be little
_MOST_COPIED = 256  # groups, by a TMA copy
_MOST_EXPERTS = 32  # of a token: Mosaic GPU makes no more barriers at once
_BUFFERS = 4  # units whose sums are on their way out
_COPYING, _FINISHING = 40, 72  # registers


class Plan(NamedTuple):
    """What is fixed when the kernel is compiled; tests also set the last two."""

    warpgroups: int  # that multiply
    groups: int  # of 64 inputs for each of them, in a stage
    stages: int  # of the ring
    splits: int  # of down's sum
    blocks: int = SMS
    interpret: object = None  # plgpu.InterpretGPUParams: what can't be interpreted is computed by jnp instead

    @property
    def registers(self) -> int:
        """Of a thread that multiplies: with the others' no more than the block got at launch."""
        threads = self.warpgroups + 2
        return min(240, (65536 // (128 * threads) // 8 * 8 * threads - _COPYING - _FINISHING) // self.warpgroups // 8 * 8)


def plan(gate_up, down, experts: int, blocks: int = SMS, share: tuple[int, int] | None = None) -> Plan | None:
    """Choose step, ring and split of down's sum for so many experts of a token, None if their rows don't fit beside a ring or they are more than barriers.

    A step is `groups` of 64 inputs for each warpgroup; share: of how many warpgroups and groups.
    """
    (_, _, F), (_, _, D) = (weight.scales.shape[:3] for weight in (down, gate_up))
    shares = [(warpgroups, groups) for warpgroups in (3, 2, 1) for groups in (3, 2, 1) if D % (warpgroups * groups) == F % (warpgroups * groups) == 0]
    warpgroups, groups = share or max(shares, key=lambda share: share[0] * share[1])
    each = warpgroups * groups

    def kilobytes(rows):
        """Return what an array of so many rows of 128 bytes takes, as each begins at a whole kilobyte."""
        return -(-rows // 8)

    room = _KILOBYTES - kilobytes(D) - kilobytes(experts * F) - kilobytes(2 * _BUFFERS * warpgroups)
    stages = max((n for n in range(_MOST_STAGES + 1) if 2 * n * each + kilobytes(n * each) <= room), default=0)
    found = Plan(warpgroups, groups, stages, min(_MOST_SPLITS, F // each), blocks)
    return found if found.stages >= _FEWEST_STAGES and experts <= _MOST_EXPERTS else None


class _Product(NamedTuple):
    """One of the two products as a block sees it: memory, and how its units are counted."""

    words: object
    scales: object
    bias: object
    before: object  # units of the other product
    units: object  # before its last one ends
    columns: int  # of 64 outputs
    steps: int
    splits: int


def _unit(product: _Product, at, *, chosen, here):
    """Return a unit's (expert's place among the token's, expert, column of outputs, part of the sum, first step, number of steps).

    chosen: the token's experts; here: how many of them are here before each place, and in all.
    """
    at = at - product.before
    rank, part = at // (product.columns * product.splits), at // product.columns % product.splits
    place = sum(jnp.where(before <= rank, 1, 0) for before in here[1:])
    expert = sum(jnp.where(place == index, expert, 0) for index, expert in enumerate(chosen))
    begin, end = part * product.steps // product.splits, (part + 1) * product.steps // product.splits
    return place, expert, at % product.columns, part, begin, end - begin


class _Shared(NamedTuple):
    """What a block's warpgroups share: memory, and the barriers between them."""

    x: object
    h: object
    words: object  # a ring's slots
    scales: object
    unit: object  # of each slot, and the next one that was taken
    sums: object  # of _BUFFERS units
    unit_begun: object
    full: object  # slots
    empty: object
    loaded: object  # x
    rows: object  # of h
    begun: object  # units, of which each is in a buffer: it has its number,
    summed: object  # its sums,
    stored: object  # and room again


class _Block(NamedTuple):
    """A block as each of its warpgroups sees it; counters, h and out are in memory."""

    plan: Plan
    ops: type
    first_unit: object
    first: _Product
    second: _Product
    unit: Callable  # (product, number) -> what `_unit` returns
    counters: object
    counted: list  # barriers in place of counters, if interpreted
    h: object
    out: object
    shared: _Shared

    def over_units(self, run, state):
        """Return what run(product, state) makes of state, unit by unit, the next of which comes first in it."""
        for product in (self.first, self.second):
            state = jax.lax.while_loop(lambda state: state[0] < product.units, functools.partial(run, product), state)
        return state


@functools.partial(jax.jit, static_argnames=("plan", "limit", "alpha"))  # so that a kernel is made once for all layers
def mlp(x_1D, expert_A, factor, counters, gate_up, gate_up_bias, down, down_bias, plan: Plan, *, limit: float, alpha: float):
    """Run the kernel: x bfloat16 [1, D]; experts int32 [A], E for one that isn't here; the factor that x lacks, float32 [1]; zeros, int32 [A + 1].

    Biases in bfloat16 or float32. Returns down's products and biases in parts to be summed, float32 [splits, A, D], anything of experts E.
    """
    wgs, groups, splits = plan.warpgroups, plan.groups, plan.splits
    A, (E, outs, ins) = expert_A.shape[0], down.scales.shape[:3]  # of down: D and F in groups of 64
    each = wgs * groups  # groups of inputs in a step

    def body(experts, factor, x, *refs):
        weights, (counters, h, out), shared, counted = refs[:6], refs[6:9], _Shared(*refs[9:23]), refs[23:]
        me, block = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("block")
        chosen, here = [experts[place] for place in range(A)], [jnp.int32(0)]
        for expert in chosen:
            here.append(here[-1] + jnp.where(expert < E, 1, 0))  # how many experts are here up to a place
        between = here[A] * (2 * ins)
        first = _Product(*weights[:3], 0, between, 2 * ins, outs // each, 1)
        second = _Product(*weights[3:], between, between + here[A] * (outs * splits), outs, ins // each, splits)
        at = _Block(plan, Interpreted if plan.interpret else Mosaic, block, first, second, functools.partial(_unit, chosen=chosen, here=here),
                    counters, counted, h, out, shared)
        pl.when(me == wgs)(lambda: _copy(at, x))
        pl.when(me < wgs)(lambda: _multiply(at, me))
        pl.when(me == wgs + 1)(lambda: _finish(at, factor, functools.partial(hopper_kernel.swiglu, limit=limit, alpha=alpha)))

    run = plgpu.kernel(
        body, out_type=(jax.ShapeDtypeStruct((A, ins, GROUP), jnp.bfloat16), jax.ShapeDtypeStruct((splits, A, outs * GROUP), jnp.float32)),
        grid=(plan.blocks,), grid_names=("block",), num_threads=wgs + 2, thread_name="warpgroup",
        scratch_types=_scratch_types(plan, A, outs, ins),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plan.interpret)
    weights = ((*_as_copied(weight, groups), bias) for weight, bias in ((gate_up, gate_up_bias), (down, down_bias)))
    return run(expert_A, factor, x_1D.reshape(outs, GROUP), *itertools.chain(*weights), jax.new_ref(counters))[1]


def _copy(block: _Block, x) -> None:
    """Copy the row, the weights of each unit that this block takes, and rows h as they are there."""
    plan, shared, (full, empty) = block.plan, block.shared, (block.shared.full, block.shared.empty)
    plgpu.set_max_registers(_COPYING, action="decrease")

    def copy_row(row, held, barrier):
        for part in _parts(row.shape[0]):
            plgpu.copy_gmem_to_smem(row.at[part], held.at[part], barrier)

    def mark(at, slot):
        shared.unit[slot] = at

    def copy_unit(product, state):
        at, done, known = state  # the unit; steps so far; the place whose row is asked for
        place, expert, column, _, begin, length = block.unit(product, at)

        def copy_weights(step, _):
            slot = hopper_kernel.free_slot(done + step, empty, plan.stages)
            mark(at, slot)
            outputs, inputs = expert * product.columns + column, pl.ds((begin + step) * plan.warpgroups, plan.warpgroups)
            plgpu.copy_gmem_to_smem(product.words.at[outputs, inputs], shared.words.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(product.scales.at[outputs, inputs], shared.scales.at[slot], full.at[slot])
            return _

        # As many weights as there is room for come before it is waited for a row.
        ahead = jnp.minimum(length, plan.stages - 1) if product is block.second else length
        jax.lax.fori_loop(0, ahead, copy_weights, None)
        if product is block.second:
            @pl.when(place != known)
            def _():
                block.ops.await_count(block.counters.at[place], block.first.columns, block.counted, place)
                copy_row(block.h.at[place], shared.h.at[place], shared.rows.at[place])

            jax.lax.fori_loop(ahead, length, copy_weights, None)
        block.ops.take(block.counters.at[block.counters.shape[0] - 1], shared.unit.at[pl.ds(plan.stages, 1)])
        return shared.unit[plan.stages] + plan.blocks, done + length, place if product is block.second else known

    copy_row(x, shared.x, shared.loaded)
    at, done, _ = block.over_units(copy_unit, (block.first_unit, jnp.int32(0), jnp.int32(-1)))
    hopper_kernel.end_copies(done, full, empty, plan.stages, copies=2, mark=functools.partial(mark, at))


def _multiply(block: _Block, me) -> None:
    """Decode this warpgroup's share of the inputs of each unit, multiply, and leave its sums in the unit's buffer."""
    plan, ops, shared = block.plan, block.ops, block.shared
    plgpu.set_max_registers(plan.registers, action="increase")

    def load(slot):
        plgpu.barrier_wait(shared.full.at[slot])
        return [(shared.words[slot, me, group], shared.scales[slot, me, group]) for group in range(plan.groups)]

    def await_room(turn):
        """Return the buffer of a unit's sums, once there is room."""
        buffer = jax.lax.rem(turn, _BUFFERS)
        pl.when(turn >= _BUFFERS)(lambda: plgpu.barrier_wait(shared.stored.at[buffer]))
        return buffer

    def begin(at, turn):
        """Say which unit comes next, once there is room for its sums."""
        buffer = await_room(turn)

        @pl.when(me == 0)
        def _():
            shared.unit_begun[buffer] = at
            plgpu.barrier_arrive(shared.begun.at[buffer])

        return buffer

    def compute_unit(product, state):
        at, turn, known, ring = state
        place, _, _, _, first_step, length = block.unit(product, at)
        buffer = begin(at, turn)
        if product is block.second:
            pl.when(place != known)(lambda: plgpu.barrier_wait(shared.rows.at[place]))
        row = shared.x if product is block.first else shared.h.at[place]

        def multiply_step(step, state):
            before, slot, loaded, sums = state
            plgpu.barrier_arrive(shared.empty.at[before])
            following = jnp.where(slot + 1 == plan.stages, 0, slot + 1)
            index = ((first_step + step) * plan.warpgroups + me) * plan.groups
            inputs = [ops.load_inputs(row.at[index + group]) for group in range(plan.groups)]
            for group, weights in enumerate(loaded):
                if group + 1 == plan.groups:
                    loaded = load(following)
                sums = ops.multiply_inputs(sums, decode(*weights, ops), inputs[group])
            return slot, following, loaded, sums

        zeros = plgpu.layout_cast(jnp.zeros((GROUP, 8), jnp.float32), plgpu.Layout.WGMMA)
        *ring, sums = jax.lax.fori_loop(0, length, multiply_step, (*ring, zeros))
        shared.sums[buffer, me] = ops.column(sums)
        plgpu.barrier_arrive(shared.summed.at[buffer])
        return shared.unit[ring[1]], turn + 1, place if product is block.second else known, ring

    plgpu.barrier_wait(shared.loaded)
    state = block.first_unit, jnp.int32(0), jnp.int32(-1), [jnp.int32(plan.stages - 1), jnp.int32(0), load(0)]
    at, turn, *_ = block.over_units(compute_unit, state)
    begin(at, turn)
    for later in range(1, _BUFFERS):  # a barrier isn't left while others arrive
        await_room(turn + later)


def _finish(block: _Block, factor, swiglu: Callable) -> None:
    """Add up what the warpgroups have of each unit, and store h, of which others are told, or the result."""
    ops, shared = block.ops, block.shared
    plgpu.set_max_registers(_FINISHING, action="decrease")

    def following(turn):
        buffer = jax.lax.rem(turn, _BUFFERS)
        plgpu.barrier_wait(shared.begun.at[buffer])
        return shared.unit_begun[buffer]

    def finish_unit(product, state):
        at, turn = state
        place, expert, column, part, *_ = block.unit(product, at)
        bias = ops.load_bias(product.bias.at[expert, pl.ds(column * GROUP, GROUP)], product is block.first)  # on its way before sums are there
        buffer = jax.lax.rem(turn, _BUFFERS)
        plgpu.barrier_wait(shared.summed.at[buffer])
        sums = sum(plgpu.load(shared.sums.at[buffer, i], layout=ROW, optimized=False) for i in range(block.plan.warpgroups))
        plgpu.barrier_arrive(shared.stored.at[buffer])
        if product is block.first:
            gate, up, gate_bias, up_bias = ops.halves(sums * loaded_factor, bias.astype(jnp.float32))
            y = swiglu(gate + gate_bias, up + up_bias).astype(jnp.bfloat16)
            ops.store(block.h.at[place, column // 2, pl.ds(column % 2 * _HALF, _HALF)], y)
            ops.count(block.counters.at[place], block.counted, place)
        else:  # parts of a sum get the bias once
            bias = bias.astype(jnp.float32) * jnp.where(part == 0, jnp.float32(1), jnp.float32(0))
            block.out[part, place, pl.ds(column * GROUP, GROUP)] = sums + bias
        return following(turn + 1), turn + 1

    loaded_factor = factor[0]
    block.over_units(finish_unit, (following(0), jnp.int32(0)))


def _scratch_types(plan: Plan, A: int, outs: int, ins: int):
    """Return the shared memory of a block, for so many experts of a token, of `outs` and `ins` groups of 64 outputs and inputs of down."""
    wgs, groups, stages = plan[:3]
    return [
        plgpu.SMEM((outs, GROUP), jnp.bfloat16),
        plgpu.SMEM((A, ins, GROUP), jnp.bfloat16),
        plgpu.SMEM((stages, wgs, groups, 4, 128), jnp.uint32),
        plgpu.SMEM((stages, wgs, groups, 32), jnp.uint32),
        plgpu.SMEM((stages + 1,), jnp.int32),
        plgpu.SMEM((_BUFFERS, wgs, GROUP), jnp.float32),
        plgpu.SMEM((_BUFFERS,), jnp.int32),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        plgpu.Barrier(num_arrivals=len(_parts(outs))),
        plgpu.Barrier(num_arrivals=len(_parts(ins)), num_barriers=A),
        *(plgpu.Barrier(num_arrivals=arrivals, num_barriers=_BUFFERS) for arrivals in (1, wgs, 1)),
        *([plgpu.Barrier(num_arrivals=2 * ins, num_barriers=A)] if plan.interpret else []),  # the counters of the only block
    ]


def _as_copied(weight, groups):
    """Give a weight's words and scales the dims of a TMA copy, at most five: outputs of all experts, shares of inputs, `groups`, and what is in one."""
    return (part.reshape(-1, part.shape[2] // groups, groups, *part.shape[3:]) for part in weight)


def _parts(groups: int):
    """Return the parts in which so many groups of a row are copied."""
    return [pl.ds(begin, min(_MOST_COPIED, groups - begin)) for begin in range(0, groups, _MOST_COPIED)]
