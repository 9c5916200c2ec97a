"""Choosing a token's experts on NVIDIA Hopper GPUs: within the routing of many tokens, and of a single one by a small kernel.

Experts are chosen in as many rounds of the largest logit and its lowest index. A single token's rows need no place: its kernel only chooses, and sums the
parts that its scores may come in, which read by each block of the experts' product took 3 us of an H200.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gptoss_jax.kernels.expert_matmul.hopper_instructions import EIGHT_ROWS, MATRIX

_ROWS = 32  # of a choice each, where there is no layout for fewer
_SHARES = 4  # warpgroups that sum a single token's parts of scores
_LOWEST = np.finfo(np.float32).min
# Layout: eight rows, two a warp, sixteen lanes for each.
_SIXTEEN_LANES = plgpu.Layout.TILED(plgpu.Tiling(((8, 32), (2, 32), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def choose(x, count: int, put, carry, layout):
    """Choose so many columns of each row of x, float32 [rows, columns] in a layout, by descending number, the lower of equals first.

    put(index, column int32 [rows], exp(its number less the largest), carry) takes each and returns what it is to get with the next one, which for
    the last is the result; the column is `columns` or more in a row with a NaN.
    """
    shape, columns = x.shape, x.shape[1]
    column = plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, shape, 1), layout)
    x = jnp.where(x < _LOWEST, _LOWEST, x)
    largest = x.max(axis=1)

    def across(y):
        return plgpu.layout_cast(jax.lax.broadcast_in_dim(y, shape, (0,)), layout)

    def once(index, state):
        x, carry = state
        top = x.max(axis=1)
        at = jnp.where(x == across(top), column, columns).min(axis=1)  # none for NaN
        return jnp.where(column == across(at), -jnp.inf, x), put(index, at, jnp.exp(top - largest), carry)

    return jax.lax.fori_loop(0, count, once, (x, carry))[1]


@functools.partial(jax.jit, static_argnames=("count", "experts", "interpret"))  # so that a kernel is made once for all layers
def choose_for_one(scores, bias_E, first, *, count: int, experts: int, interpret=None):
    """Choose `count` experts of a single token by a kernel of one block, of a multiple of 8 in all (32 with parts).

    scores: float32 [1, E], or the parts of EarlyScores, a multiple of 8, which four warpgroups sum. first: int32 [1], of the `experts` that are here.
    Returns int32 [count] by descending logit, `experts` for one that isn't here and of a NaN; their weights float32 [count]; the factor of the
    token's norm, float32 [1], which is 1 for scores; and int32 [count + 1], zeros, for the next kernel to count up. The lower of equals comes first;
    -inf counts as the lowest number.
    """
    E, parts = bias_E.shape[0], scores.shape[1] > bias_E.shape[0]
    # A row for each choice, and a layout with few columns a thread where they can be shared out so.
    rows, layout = (8, _SIXTEEN_LANES) if E % 32 == 0 else (_ROWS, MATRIX)
    rows = -(-count // rows) * rows
    shares = range(_SHARES if parts else 1)

    def body(scores, bias, first, expert, weight, factor_out, counter, expert_smem, weight_smem, sums_smem, summed):
        me = jax.lax.axis_index("warpgroup")
        biases, start = in_rows(bias, rows, layout), first[0]  # on their way before the scores are, so as not to be waited for
        if parts:
            sums_smem[me] = _sum_of_share(scores, me)
            plgpu.barrier_arrive(summed)

        @pl.when(me == 0)
        def _():
            if parts:
                plgpu.barrier_wait(summed)
                factor = jax.lax.rsqrt(sum(sums_smem[share, E] for share in shares))
                logits = sum(in_rows(sums_smem.at[share, pl.ds(0, E)], rows, layout) for share in shares) * factor
            else:
                factor, logits = jnp.float32(1), in_rows(scores.at[0], rows, layout)
            row = plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, (rows,), 0), layout.reduce(1))

            def put(index, at, power, found):
                chosen, powers, total = found
                return jnp.where(row == index, at, chosen), jnp.where(row == index, power, powers), total + power

            none = tuple(plgpu.layout_cast(jnp.zeros(rows, dtype), layout.reduce(1)) for dtype in (jnp.int32, jnp.float32, jnp.float32))
            chosen, powers, total = choose(logits + biases, count, put, none, layout)
            expert_smem[...], weight_smem[...] = among(chosen, start, experts, E), powers / total
            for index in range(count):
                expert[index], weight[index] = expert_smem[index], weight_smem[index]
            for index in range(count + 1):
                counter[index] = 0
            factor_out[0] = factor

    run = plgpu.kernel(
        body, out_type=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
            ((count,), jnp.int32), ((count,), jnp.float32), ((1,), jnp.float32), ((count + 1,), jnp.int32))],
        grid=(1,), grid_names=("block",), num_threads=len(shares), thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((rows,), jnp.int32), plgpu.SMEM((rows,), jnp.float32), plgpu.SMEM((len(shares), scores.shape[1]), jnp.float32),
                       plgpu.Barrier(num_arrivals=len(shares))],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret)
    return run(scores, bias_E, first)


def _sum_of_share(parts, me):
    """Return the sum of this warpgroup's share of the rows: every _SHARES-th eight, all on their way at once."""
    count, total = parts.shape[0], None
    for begin in range(0, count, 8 * _SHARES):
        row = begin + me * 8
        part = plgpu.load(parts.at[pl.ds(jnp.minimum(row, count - 8), 8)], layout=EIGHT_ROWS, optimized=False)
        if begin + 8 * _SHARES > count:  # some warpgroups have none left
            part = jnp.where(plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=EIGHT_ROWS) < count - row, part, 0.0)
        total = part if total is None else total + part
    return total.sum(axis=0)


def among(expert, first, experts: int, all_experts: int):
    """Return the place of each expert among the `experts` from `first` on that are here, or `experts`."""
    here = expert - first
    return jnp.where((expert < all_experts) & (here >= 0) & (here < experts), here, experts)


def in_rows(ref, rows: int, layout):
    """Return an array of numbers as so many rows in a layout, float32."""
    row = plgpu.load(ref, layout=layout.reduce(0), optimized=False).astype(jnp.float32)
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(row, (rows, row.shape[0]), (1,)), layout)
