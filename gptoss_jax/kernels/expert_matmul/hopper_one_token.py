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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gptoss_jax.kernels.expert_matmul import hopper_kernel
from gptoss_jax.kernels.expert_matmul.hopper_instructions import ROW, Interpreted, Mosaic, decode
from gptoss_jax.kernels.expert_matmul.hopper_kernel import SHARED_BYTES
from gptoss_jax.kernels.expert_matmul.hopper_layout import GROUP
from gptoss_jax.kernels.hopper import SMS

_HALF = GROUP // 2
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
    room, stage = SHARED_BYTES - ((D + experts * F) * 2 + _BUFFERS * warpgroups * 4) * GROUP, warpgroups * groups * (2048 + 128)
    found = Plan(warpgroups, groups, min(_MOST_STAGES, room // stage), min(_MOST_SPLITS, F // (warpgroups * groups)), blocks)
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


@functools.partial(jax.jit, static_argnames=("plan", "limit", "alpha"))  # so that a kernel is made once for all layers
def mlp(x_1D, expert_A, factor, counters, gate_up, gate_up_bias, down, down_bias, plan: Plan, *, limit: float, alpha: float):
    """Run the kernel: x bfloat16 [1, D]; experts int32 [A], E for one that isn't here; the factor that x lacks, float32 [1]; zeros, int32 [A + 1].

    Biases in bfloat16 or float32. Returns down's products and biases in parts to be summed, float32 [splits, A, D], anything of experts E.
    """
    wgs, groups, stages, splits = plan.warpgroups, plan.groups, plan.stages, plan.splits
    A, (E, outs, ins) = expert_A.shape[0], down.scales.shape[:3]  # of down: D and F in groups of 64
    each = wgs * groups  # groups of inputs in a step
    ops = Interpreted if plan.interpret else Mosaic

    def body(experts, factor, x, *refs):
        weights, (counters, h, out, x_smem, h_smem, words_smem, scales_smem, unit_smem, sums_smem, begun_smem,
                  full, empty, loaded, rows, begun, summed, stored, *counted) = refs[:6], refs[6:]
        me, block = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("block")
        chosen, here = [experts[place] for place in range(A)], [jnp.int32(0)]
        for expert in chosen:
            here.append(here[-1] + jnp.where(expert < E, 1, 0))  # how many experts are here up to a place
        between = here[A] * (2 * ins)
        first = _Product(*weights[:3], 0, between, 2 * ins, outs // each, 1)
        second = _Product(*weights[3:], between, between + here[A] * (outs * splits), outs, ins // each, splits)

        unit = functools.partial(_unit, chosen=chosen, here=here)

        @pl.when(me == wgs)
        def _copy():
            plgpu.set_max_registers(_COPYING, action="decrease")

            def copy_row(row, held, barrier):
                for part in _parts(row.shape[0]):
                    plgpu.copy_gmem_to_smem(row.at[part], held.at[part], barrier)

            def mark(at, slot):
                unit_smem[slot] = at

            def copy_unit(product, state):
                at, done, known = state  # the unit; steps so far; the place whose row is asked for
                place, expert, column, _, begin, length = unit(product, at)

                def copy_weights(step, _):
                    slot = hopper_kernel.free_slot(done + step, empty, stages)
                    mark(at, slot)
                    outputs, inputs = expert * product.columns + column, pl.ds((begin + step) * wgs, wgs)
                    plgpu.copy_gmem_to_smem(product.words.at[outputs, inputs], words_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(product.scales.at[outputs, inputs], scales_smem.at[slot], full.at[slot])
                    return _

                # As many weights as there is room for come before it is waited for a row.
                ahead = jnp.minimum(length, stages - 1) if product is second else length
                jax.lax.fori_loop(0, ahead, copy_weights, None)
                if product is second:
                    @pl.when(place != known)
                    def _():
                        ops.await_count(counters.at[place], first.columns, counted, place)
                        copy_row(h.at[place], h_smem.at[place], rows.at[place])

                    jax.lax.fori_loop(ahead, length, copy_weights, None)
                ops.take(counters.at[A], unit_smem.at[pl.ds(stages, 1)])
                return unit_smem[stages] + plan.blocks, done + length, place if product is second else known

            copy_row(x, x_smem, loaded)
            state = block, jnp.int32(0), jnp.int32(-1)
            for product in (first, second):
                state = jax.lax.while_loop(lambda state: state[0] < product.units, functools.partial(copy_unit, product), state)
            at, done, _ = state
            hopper_kernel.end_copies(done, full, empty, stages, copies=2, mark=functools.partial(mark, at))

        @pl.when(me < wgs)
        def _multiply():
            plgpu.set_max_registers(plan.registers, action="increase")

            def load(slot):
                plgpu.barrier_wait(full.at[slot])
                return [(words_smem[slot, me, group], scales_smem[slot, me, group]) for group in range(groups)]

            def await_room(turn):
                """Return the buffer of a unit's sums, once there is room."""
                buffer = jax.lax.rem(turn, _BUFFERS)
                pl.when(turn >= _BUFFERS)(lambda: plgpu.barrier_wait(stored.at[buffer]))
                return buffer

            def begin(at, turn):
                """Say which unit comes next, once there is room for its sums."""
                buffer = await_room(turn)

                @pl.when(me == 0)
                def _():
                    begun_smem[buffer] = at
                    plgpu.barrier_arrive(begun.at[buffer])

                return buffer

            def compute_unit(product, state):
                at, turn, known, ring = state
                place, _, _, _, first_step, length = unit(product, at)
                buffer = begin(at, turn)
                if product is second:
                    pl.when(place != known)(lambda: plgpu.barrier_wait(rows.at[place]))
                row = x_smem if product is first else h_smem.at[place]

                def multiply_step(step, state):
                    before, slot, loaded, sums = state
                    plgpu.barrier_arrive(empty.at[before])
                    following, index = jnp.where(slot + 1 == stages, 0, slot + 1), ((first_step + step) * wgs + me) * groups
                    inputs = [ops.load_inputs(row.at[index + group]) for group in range(groups)]
                    for group, weights in enumerate(loaded):
                        if group + 1 == groups:
                            loaded = load(following)
                        sums = ops.multiply_inputs(sums, decode(*weights, ops), inputs[group])
                    return slot, following, loaded, sums

                zeros = plgpu.layout_cast(jnp.zeros((GROUP, 8), jnp.float32), plgpu.Layout.WGMMA)
                *ring, sums = jax.lax.fori_loop(0, length, multiply_step, (*ring, zeros))
                sums_smem[buffer, me] = ops.column(sums)
                plgpu.barrier_arrive(summed.at[buffer])
                return unit_smem[ring[1]], turn + 1, place if product is second else known, ring

            plgpu.barrier_wait(loaded)
            state = block, jnp.int32(0), jnp.int32(-1), [jnp.int32(stages - 1), jnp.int32(0), load(0)]
            for product in (first, second):
                state = jax.lax.while_loop(lambda state: state[0] < product.units, functools.partial(compute_unit, product), state)
            at, turn, *_ = state
            begin(at, turn)
            for later in range(1, _BUFFERS):  # a barrier isn't left while others arrive
                await_room(turn + later)

        @pl.when(me == wgs + 1)
        def _finish():
            plgpu.set_max_registers(_FINISHING, action="decrease")

            def following(turn):
                buffer = jax.lax.rem(turn, _BUFFERS)
                plgpu.barrier_wait(begun.at[buffer])
                return begun_smem[buffer]

            def finish_unit(product, state):
                at, turn = state
                place, expert, column, part, *_ = unit(product, at)
                bias = ops.load_bias(product.bias.at[expert, pl.ds(column * GROUP, GROUP)], product is first)  # on its way before sums are there
                buffer = jax.lax.rem(turn, _BUFFERS)
                plgpu.barrier_wait(summed.at[buffer])
                sums = sum(plgpu.load(sums_smem.at[buffer, i], layout=ROW, optimized=False) for i in range(wgs))
                plgpu.barrier_arrive(stored.at[buffer])
                if product is first:
                    gate, up, gate_bias, up_bias = ops.halves(sums * loaded_factor, bias.astype(jnp.float32))
                    y = hopper_kernel.swiglu(gate + gate_bias, up + up_bias, limit, alpha).astype(jnp.bfloat16)
                    ops.store(h.at[place, column // 2, pl.ds(column % 2 * _HALF, _HALF)], y)
                    ops.count(counters.at[place], counted, place)
                else:  # parts of a sum get the bias once
                    bias = bias.astype(jnp.float32) * jnp.where(part == 0, jnp.float32(1), jnp.float32(0))
                    out[part, place, pl.ds(column * GROUP, GROUP)] = sums + bias
                return following(turn + 1), turn + 1

            loaded_factor = factor[0]
            state = following(0), jnp.int32(0)
            for product in (first, second):
                state = jax.lax.while_loop(lambda state: state[0] < product.units, functools.partial(finish_unit, product), state)

    run = plgpu.kernel(
        body, out_type=(jax.ShapeDtypeStruct((A, ins, GROUP), jnp.bfloat16), jax.ShapeDtypeStruct((splits, A, outs * GROUP), jnp.float32)),
        grid=(plan.blocks,), grid_names=("block",), num_threads=wgs + 2, thread_name="warpgroup",
        scratch_types=_scratch_types(plan, A, outs, ins),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plan.interpret)
    weights = ((*_as_copied(weight, groups), bias) for weight, bias in ((gate_up, gate_up_bias), (down, down_bias)))
    return run(expert_A, factor, x_1D.reshape(outs, GROUP), *itertools.chain(*weights), jax.new_ref(counters))[1]


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
