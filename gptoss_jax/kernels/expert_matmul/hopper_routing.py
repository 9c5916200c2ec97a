"""Routing of few tokens on NVIDIA Hopper GPUs by one small kernel: each token's experts, their weights, and where its rows go.

One block, of a warpgroup for every 32 tokens, four lanes a token. Experts are chosen in as many rounds of the largest logit and its lowest index;
then the pairs of a token and an expert, which are few, are compared each with each.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gptoss_jax.kernels.expert_matmul.hopper_instructions import COLUMN, EIGHT_ROWS, MATRIX
from gptoss_jax.kernels.expert_matmul.hopper_kernel import Tiles
from gptoss_jax.kernels.expert_matmul.hopper_layout import ALIGNMENT

MOST_TOKENS, MOST_PAIRS, MOST_EXPERTS = 128, 512, 256  # what a block's registers hold, what a key has bits for, and what a TMA copy takes
_TOKENS = 32  # of a warpgroup
_RANK_BITS = 10
_LOWEST = np.finfo(np.float32).min
_ROW = plgpu.Layout.TILED(plgpu.Tiling(((8,), (2,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(plgpu.Replicated(8), -2), vector_dim=-1)


class Routing(NamedTuple):
    """What becomes of T tokens with A choices each, and the tiles of `rows` slots that hold their rows.

    expert: int32 [A, T] by descending logit; weight: float32 [A, T]; slot: int32 [A, T], past the last for an expert that isn't here;
    token: int32 [slots], any where a slot is spare; None where every tile takes all tokens in order, which `rows` of T or more means.
    """

    expert: jax.Array
    weight: jax.Array
    slot: jax.Array
    token: jax.Array | None
    tiles: Tiles


def takes(tokens: int, experts: int, count: int) -> bool:
    """Return whether `route` takes so many tokens, experts and choices of a token, in tiles of as many rows as `tile_rows` says."""
    return tokens <= MOST_TOKENS and tokens * count <= min(MOST_PAIRS, 64 * experts) and experts <= MOST_EXPERTS  # tiles of 128 rows and fewer


def most_tiles(pairs: int, experts: int, rows: int) -> int:
    """Return how many tiles of `rows` the rows of so many pairs can need."""
    return pairs if pairs <= experts else experts + (pairs - experts) // rows


@functools.partial(jax.jit, static_argnames=("count", "experts", "rows", "interpret"))  # so that a kernel is made once for all layers
def route(scores_TE, bias_E, real_T, first, *, count: int, experts: int, rows: int, interpret=None) -> Routing:
    """Choose `count` experts of each token by scores + bias: float32 [T, E], float32 or bfloat16 [E].

    real: bool [T], or None: all are. first: int32 [1], of the `experts` that are here. rows: a power of two, of ALIGNMENT or more.
    The lower of equals comes first; -inf counts as the lowest number. A token with a NaN goes to no expert, index E, and its weights are NaN.
    """
    (T, E), A = scores_TE.shape, count
    warpgroups, width = -(-T // _TOKENS), -(-T // 8) * 8
    room = warpgroups * _TOKENS
    tiles = most_tiles(T * A, experts, rows)
    chunks = -(-tiles // _TOKENS)
    scores_TE, bias_E = jnp.pad(scores_TE, ((0, 0), (0, -E % 8)), constant_values=-np.inf), jnp.pad(bias_E, (0, -E % 8))
    columns = len(bias_E)
    real = np.asarray(np.arange(room) < T, np.int32) if real_T is None else jnp.pad(real_T.astype(jnp.int32), (0, room - T))

    def body(first, scores, bias, real, expert, weight, slot, token, tile_expert, tile_first, tile_rows, tile_count,
             scores_smem, bias_smem, real_smem, expert_smem, weight_smem, here_smem, key_smem, slot_smem, table_smem, loaded, together):
        me = jax.lax.axis_index("warpgroup")
        mine = pl.ds(me * _TOKENS, _TOKENS)

        def of_mine(ref, *index):
            return plgpu.load(ref.at[(*index, mine)], layout=COLUMN, optimized=False)

        def of_all(ref, a):
            """Return what a choice of each token has, along the columns of a matrix."""
            return _down(plgpu.load(ref.at[a, pl.ds(0, width)], layout=_ROW, optimized=False))

        def meet():
            plgpu.barrier_arrive(together)
            plgpu.barrier_wait(together)

        @pl.when(me == 0)
        def _():
            plgpu.copy_gmem_to_smem(scores, scores_smem.at[pl.ds(0, T)], loaded)
            plgpu.copy_gmem_to_smem(bias, bias_smem, loaded)
            plgpu.copy_gmem_to_smem(real, real_smem, loaded)

        plgpu.barrier_wait(loaded)
        is_real = of_mine(real_smem) != 0

        def put(a, at, power):
            here_smem[a, mine] = jnp.where(is_real, among(at, first[0], experts, E), experts)
            expert_smem[a, mine], weight_smem[a, mine] = jnp.minimum(at, E), power

        x = plgpu.load(scores_smem.at[mine], layout=MATRIX, optimized=False)
        total = choose(x + in_all_rows(bias_smem), A, put)
        meet()

        # A pair's key is its expert and how many pairs of that come before it; every `rows`-th opens a tile.
        def rank(a, _):
            here, ahead = of_mine(here_smem, a), _iota(width, 1) - _iota(width, 0) - me * _TOKENS

            def before(b, count):
                return count + jnp.where((of_all(here_smem, b) == _across(here, width)) & (ahead < (a - b) * room), 1, 0)

            key_smem[a, mine] = here << _RANK_BITS | jax.lax.fori_loop(0, a + 1, before, _full(0, width)).sum(axis=1)
            weight_smem[a, mine] = of_mine(weight_smem, a) / total
            return _

        jax.lax.fori_loop(0, A, rank, None)
        meet()

        def opened(last):
            """Return how many tiles the pairs up to a key open."""
            def count(b, found):
                key = of_all(key_smem, b)
                return found + jnp.where((key & rows - 1 == 0) & (key <= last), 1, 0)

            return jax.lax.fori_loop(0, A, count, _full(0, width)).sum(axis=1)

        def place(a, _):
            key = of_mine(key_smem, a)
            row = _index() + me * _TOKENS if T <= rows else key & rows - 1
            at = (opened(_across(key, width)) - 1) * rows + row
            slot_smem[a, mine] = jnp.where(key < experts << _RANK_BITS, at, tiles * rows)
            return _

        jax.lax.fori_loop(0, A, place, None)
        plgpu.commit_smem()
        meet()

        if T > rows:  # one by one, each warpgroup its own
            def put(t, _):
                for a in range(A):
                    at = slot_smem[a, t]

                    @pl.when(at < tiles * rows)
                    def _():
                        token[at] = t
                return _

            jax.lax.fori_loop(me * _TOKENS, jnp.minimum((me + 1) * _TOKENS, T), put, None)

        opened_tiles = opened((experts << _RANK_BITS) - 1)

        def tabulate(i, _):
            begin = (me + i * warpgroups) * _TOKENS
            part, tile = pl.ds(begin, _TOKENS), _index() + begin

            def find(b, owner):
                mine = of_all(slot_smem, b) >> rows.bit_length() - 1 == _across(tile, width)
                return jnp.where(mine, of_all(key_smem, b) >> _RANK_BITS, owner)

            table_smem[0, part] = jax.lax.fori_loop(0, A, find, _full(experts, width)).min(axis=1)
            table_smem[1, part], table_smem[2, part] = tile * (rows // ALIGNMENT), jnp.where(tile < opened_tiles, rows // ALIGNMENT, 0)
            table_smem[3, part] = opened_tiles
            plgpu.commit_smem()
            for row, out in enumerate((tile_expert, tile_first, tile_rows, tile_count)):
                plgpu.copy_smem_to_gmem(table_smem.at[row, part], out.at[part])
            return _

        jax.lax.fori_loop(0, (chunks - me + warpgroups - 1) // warpgroups, tabulate, None)

        @pl.when(me == 0)
        def _():
            for here, out in ((expert_smem, expert), (weight_smem, weight), (slot_smem, slot)):
                plgpu.copy_smem_to_gmem(here, out)
        plgpu.wait_smem_to_gmem(0)

    choices, weights, table, token = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
        ((A, room), jnp.int32), ((A, room), jnp.float32), ((chunks * _TOKENS,), jnp.int32), ((tiles * rows,), jnp.int32)))
    smem = [plgpu.SMEM(shape.shape, shape.dtype) for shape in (choices, weights, choices, choices, choices)]
    run = plgpu.kernel(
        body, out_type=(choices, weights, choices, token, *(table,) * 4), grid=(1,), grid_names=("block",),
        num_threads=warpgroups, thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((room, columns), jnp.float32), plgpu.SMEM((columns,), bias_E.dtype), plgpu.SMEM((room,), jnp.int32), *smem,
                       plgpu.SMEM((4, *table.shape), jnp.int32), plgpu.Barrier(num_arrivals=3), plgpu.Barrier(num_arrivals=warpgroups)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret)
    expert, weight, slot, token, *found = run(first, scores_TE, bias_E, real)
    return Routing(expert[:, :T], weight[:, :T], slot[:, :T], None if T <= rows else token, Tiles(*found))


def choose(x, count: int, put):
    """Choose so many columns of each row of x, float32 [32, columns] in layout MATRIX, by descending number, the lower of equals first.

    put(index, column int32 [32], exp(its number less the largest)) takes each; the column is `columns` or more in a row with a NaN.
    Returns the sum of the powers.
    """
    column, columns = _iota(x.shape[1], 1), x.shape[1]
    x = jnp.where(x < _LOWEST, _LOWEST, x)
    largest = x.max(axis=1)

    def once(index, carry):
        x, total = carry
        top = x.max(axis=1)
        at = jnp.where(x == _across(top, columns), column, columns).min(axis=1)  # none for NaN
        power = jnp.exp(top - largest)
        put(index, at, power)
        return jnp.where(column == _across(at, columns), -jnp.inf, x), total + power

    return jax.lax.fori_loop(0, count, once, (x, plgpu.layout_cast(jnp.zeros(_TOKENS, jnp.float32), COLUMN)))[1]


def chosen_from(router):
    """Return the arrays of a Router that `choose_for_one` reads."""
    return [router.early.parts if router.early else router.scores, router.bias, router.first]


def choice_types(count: int, table):
    """Return (types of what `choose_for_one` gives of `count` choices from `chosen_from`'s table, types of the shared memory that it takes)."""
    found = [jax.ShapeDtypeStruct((count,), dtype) for dtype in (jnp.int32, jnp.float32)]
    return found, [plgpu.SMEM((count, _TOKENS), jnp.int32), plgpu.SMEM((count + 2, _TOKENS), jnp.float32),
                   plgpu.SMEM((table[0].shape[1],), jnp.float32), plgpu.Barrier()]


def choose_for_one(scores, bias, first, experts: int, expert, weight, expert_smem, power_smem, sums_smem, ready, writes):
    """Choose a single token's experts in one of a kernel's warpgroups, of the `experts` from `first` on that are here.

    scores: float32 [1, all experts], or parts as in EarlyScores. expert_smem int32 [count, 32] gets them, all columns alike, before the barrier
    `ready`, and power_smem [count + 1] the factor of the token's norm; expert and weight [count] do where `writes`.
    """
    count, E = expert.shape[0], bias.shape[0]
    biases, start = in_all_rows(bias), first[0]  # on their way before the scores are, so as not to be waited for

    def put(index, at, power):
        expert_smem[index], power_smem[index] = among(at, start, experts, E), power

    if scores.shape[1] == E:
        logits = in_all_rows(scores.at[0])
    else:
        eights = [plgpu.load(scores.at[pl.ds(row, 8)], layout=EIGHT_ROWS, optimized=False) for row in range(0, scores.shape[0], 8)]
        sums_smem[...] = functools.reduce(jnp.add, eights).sum(axis=0)
        factor = jax.lax.rsqrt(sums_smem[E])
        power_smem[count + 1] = plgpu.layout_cast(jnp.full(_TOKENS, factor), COLUMN)
        logits = in_all_rows(sums_smem.at[pl.ds(0, E)]) * factor
    power_smem[count] = choose(logits + biases, count, put)
    plgpu.commit_smem()
    plgpu.barrier_arrive(ready)

    @pl.when(writes)
    def _():
        for index in range(count):
            expert[index], weight[index] = expert_smem[index, 0], power_smem[index, 0] / power_smem[count, 0]


def among(expert, first, experts: int, all_experts: int):
    """Return the place of each expert among the `experts` from `first` on that are here, or `experts`."""
    here = expert - first
    return jnp.where((expert < all_experts) & (here >= 0) & (here < experts), here, experts)


def in_all_rows(ref):
    """Return a row of numbers as float32 [32, columns], 32 times, in layout MATRIX."""
    return _down(plgpu.load(ref, layout=_ROW, optimized=False).astype(jnp.float32))


def _iota(columns, dim):
    return plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, (_TOKENS, columns), dim), MATRIX)


def _index():
    return plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, (_TOKENS,), 0), COLUMN)


def _full(number, columns):
    return plgpu.layout_cast(jnp.full((_TOKENS, columns), number, jnp.int32), MATRIX)


def _across(x, columns):
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(x, (_TOKENS, columns), (0,)), MATRIX)


def _down(x):
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(x, (_TOKENS, x.shape[0]), (1,)), MATRIX)
