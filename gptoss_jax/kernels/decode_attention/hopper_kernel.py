"""Decode attention for NVIDIA Hopper GPUs in Pallas Mosaic GPU: rotation, cache write and attention of one query a row in one kernel.

A block has the G query heads of one key-value head of a row, and a part of the row's filled tiles of keys: no key is read twice. One warpgroup
keeps a ring of tiles on their way by TMA, multiplies keys by queries (wgmma, keys as its M side, G padded to 8 as N), keeps a running
softmax, and multiplies the transposed values by its weights. The tile that holds the new key's slot gets it in shared memory, and the eight
slots around go back to the cache from there: nothing that this kernel writes is read back from memory.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gptoss_jax.kernels.attention.cudnn import LOWEST, SHORTEST_SPLIT, merge
from gptoss_jax.kernels.expert_matmul.hopper_instructions import EIGHT_ROWS
from gptoss_jax.kernels.hopper import SMS

HEADS = 8  # wgmma's N: query heads of a key-value head, spare ones included
WIDTH = 64  # of a head
ALIGNMENT = 8  # slots that are written together
TILE = 128  # keys of a step
_STAGES = 3  # with which two blocks fit a multiprocessor
_LOG2E = math.log2(math.e)

# Layout: a column for each query head.
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


class Plan(NamedTuple):
    """What is fixed when the kernel is compiled."""

    splits: int  # of a row's keys
    stages: int
    interpret: object = None  # plgpu.InterpretGPUParams


def plan(rows: int, slots: int, kv_heads: int) -> Plan:
    """Split the keys so that there are about as many blocks as processors, but never a full cache in shorter parts than SHORTEST_SPLIT."""
    return Plan(max(1, min(SMS // (rows * kv_heads), slots // SHORTEST_SPLIT)), min(_STAGES, -(-slots // TILE)))


@functools.partial(jax.jit, static_argnames=("plan", "ring"))  # so that a kernel is made once for all layers
def attend(qkv_BJ, bias_J, cosine_BR, sine_BR, keys_BSKH, values_BSKH, sinks_KG, positions_B, plan: Plan, *, ring: bool):
    """Run the kernel, and where it splits the keys a second one that merges; see `reference.decode_attention`, sinks in rows of G.

    keys and values in bfloat16, so is the result; H = WIDTH, S a multiple of ALIGNMENT, G at most HEADS, G + 2K at least HEADS.
    """
    B, S, K, H = keys_BSKH.shape
    G, splits = sinks_KG.shape[1], plan.splits
    N = K * G

    def body(*refs):
        inputs, out, out_smem, scratch = refs[:8], refs[8], refs[9], refs[10:]
        row, head, split = place = tuple(jax.lax.axis_index(name) for name in ("row", "head", "split"))
        y, top, total = of_head(place, inputs, scratch, plan, ring=ring)
        if splits == 1:
            out_smem.at[0].T[...] = y.astype(jnp.bfloat16)
        else:  # each number with its lse, so that what merges the parts is one kernel
            lse = jnp.where(total > 0, (top + jnp.log2(total)) / _LOG2E, LOWEST)
            for index, x in enumerate((y, plgpu.layout_cast(_down(lse, H), plgpu.Layout.WGMMA))):
                out_smem.at[index].T[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out.at[split, row, head])
        plgpu.wait_smem_to_gmem(0)

    kinds, out_dtype = (1, jnp.bfloat16) if splits == 1 else (2, jnp.float32)
    run = plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct((splits, B, K, kinds, HEADS, H), out_dtype),
        grid=(B, K, splits), grid_names=("row", "head", "split"), num_threads=1, thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((kinds, HEADS, H), out_dtype), *scratch_types(plan)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True),
        interpret=plan.interpret)
    keys, values = jax.new_ref(keys_BSKH), jax.new_ref(values_BSKH)
    out = run(*inputs_of_heads(qkv_BJ, bias_J, cosine_BR, sine_BR, sinks_KG, positions_B, keys, values))
    out = out[0, :, :, 0] if splits == 1 else merge([(part[:, :, 0, ..., None], part[:, :, 1]) for part in out], LOWEST).astype(jnp.bfloat16)
    return out[:, :, :G].reshape(B, N * H), keys[...], values[...]


def inputs_of_heads(qkv_BJ, bias_J, cosine_BR, sine_BR, sinks_KG, positions_B, keys, values):
    """Return what `of_head` takes of `attend`'s arguments, the caches as jax.Refs."""
    (B, J), G = qkv_BJ.shape, sinks_KG.shape[1]
    sinks = sinks_KG if G == HEADS else jnp.pad(sinks_KG, ((0, 0), (0, HEADS - G)))
    return qkv_BJ.reshape(B, J // WIDTH, WIDTH), bias_J.reshape(J // WIDTH, WIDTH), cosine_BR, sine_BR, sinks, positions_B, keys, values


def scratch_types(plan: Plan):
    """Return the shared memory of a block that attends."""
    def swizzled(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))

    tiles = swizzled(plan.stages, TILE, WIDTH)
    return swizzled(HEADS, WIDTH), tiles, tiles, swizzled(HEADS, TILE), plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages)


def of_head(place, inputs, scratch, plan: Plan, *, ring: bool):
    """Attend as one warpgroup with the queries of a key-value head, at (row, head, split); inputs: `inputs_of_heads`, in memory.

    Returns (result [H, HEADS], its numbers' top and total [HEADS]), all float32. Copies to the cache are on their way.
    """
    (row, head, split), (qkv, bias, cosine, sine, sinks, positions, keys, values) = place, inputs
    q_smem, key_tiles, value_tiles, weights_smem, full = scratch
    _, S, K, H = keys.shape
    R, splits, stages = H // 2, plan.splits, plan.stages
    N = qkv.shape[1] - 2 * K
    G = N // K

    def copy(tile, stage):
        for cache, held in ((keys, key_tiles), (values, value_tiles)):
            plgpu.copy_gmem_to_smem(cache.at[row, pl.ds(tile * TILE, TILE), head], held.at[stage], full.at[stage])

    # On its way before the position, or anything else, is waited for: the first tile, which all but nobody's position has, and what isn't a key or value.
    if splits == 1:
        copy(row * 0, 0)
    of_row = EIGHT_ROWS.reduce(0)
    projections = [(pl.ds(head * G, HEADS), EIGHT_ROWS), (N + head, of_row), (N + K + head, of_row)]  # rows past G are other heads', for nobody
    projections = [(_load(qkv.at[row, rows], layout), _load(bias.at[rows], layout)) for rows, layout in projections]
    angles = [_load(table.at[row], of_row) for table in (cosine, sine)]
    sink = _load(sinks.at[head], _COLUMNS)

    filled = jnp.minimum(positions[row] + 1, S)
    slot = jax.lax.rem(positions[row], S) if ring else positions[row]
    tiles = (filled + (TILE - 1)) // TILE  # of this row, shared out among its splits
    begin = split * tiles // splits
    count = (split + 1) * tiles // splits - begin

    for step in range(splits == 1, stages):
        pl.when(step < count)(functools.partial(copy, begin + step, step))

    def in_rows(x):
        return _down(x, HEADS)

    cos, sin = (in_rows(angle.astype(jnp.float32)) for angle in angles)
    q, new_key, new_value = ((x.astype(jnp.float32) + b.astype(jnp.float32)).astype(jnp.bfloat16) for x, b in projections)

    def rotate(x):
        first, second = x[:, :R].astype(jnp.float32), x[:, R:].astype(jnp.float32)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1).astype(jnp.bfloat16)

    q_smem[...] = rotate(q)
    new = rotate(in_rows(new_key)), in_rows(new_value)
    plgpu.commit_smem()

    def write_new(stage, at):
        """Put the new key and value into slot `at` of the tiles at hand, and from there into the cache."""
        group = at // ALIGNMENT * ALIGNMENT
        here = plgpu.broadcasted_iota(jnp.int32, (ALIGNMENT, H), 0, layout=EIGHT_ROWS) == at - group
        for held, x in zip((key_tiles, value_tiles), new):
            slots = held.at[stage, pl.ds(group, ALIGNMENT)]
            slots[...] = jnp.where(here, x, plgpu.load(slots, layout=EIGHT_ROWS))
        plgpu.commit_smem()
        for held, cache in ((key_tiles, keys), (value_tiles, values)):
            there = pl.ds(slot - at + group, ALIGNMENT)
            plgpu.copy_smem_to_gmem(held.at[stage, pl.ds(group, ALIGNMENT)], cache.at[row, there, head])

    def attend_tile(step, state):
        top, total, acc = state
        stage, first = jax.lax.rem(step, stages), (begin + step) * TILE
        plgpu.barrier_wait(full.at[stage])
        pl.when((first <= slot) & (slot < first + TILE))(functools.partial(write_new, stage, slot - first))
        index = plgpu.broadcasted_iota(jnp.int32, (TILE, HEADS), 0, layout=plgpu.Layout.WGMMA)
        scores = _multiply(key_tiles.at[stage], q_smem.T) * (H**-0.5 * _LOG2E)
        scores = jnp.where(index < filled - first, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=0))
        weights, shrink = jnp.exp2(scores - _down(new_top, TILE)), jnp.exp2(top - new_top)
        weights_smem.T[...] = weights.astype(jnp.bfloat16)
        plgpu.commit_smem()
        acc = acc * _down(shrink, H) + _multiply(value_tiles.at[stage].T, weights_smem.T)

        @pl.when(step + stages < count)
        def _():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            copy(begin + step + stages, stage)

        return new_top, total * shrink + weights.sum(axis=0), acc

    # The sink is a key of no value, which the first part begins with.
    sink = jnp.maximum(sink.astype(jnp.float32) * _LOG2E, LOWEST)
    zeros = plgpu.layout_cast(jnp.zeros((H, HEADS), jnp.float32), plgpu.Layout.WGMMA)
    first = jnp.where(split == 0, jnp.float32(1), jnp.float32(0))
    state = sink * first + LOWEST * (1 - first), jnp.zeros_like(sink) + first, zeros
    top, total, acc = jax.lax.fori_loop(0, count, attend_tile, state)
    if splits == 1:
        pl.when(count == 0)(functools.partial(plgpu.barrier_wait, full.at[0]))  # a copy isn't left on its way
    y = acc / _down(jnp.maximum(total, 2.0**-100), H)
    return y, top, total


def _load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False)


def _multiply(a, b):
    """Return the product of two matrices in shared memory."""
    def run(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1])))


def _down(x, rows):
    return jax.lax.broadcast_in_dim(x, (rows, x.shape[0]), (1,))
