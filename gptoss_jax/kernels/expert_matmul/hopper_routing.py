"""Routing of up to 256 tokens on NVIDIA Hopper GPUs by one small kernel: each token's experts, their weights, and where its rows go.

One block; a warpgroup takes 32 tokens at a time, four lanes each. Of 32 tokens and fewer, the pairs of a token and an expert are compared each with each,
by one warpgroup; of more, each expert's are counted, and a pair is compared with those of the same 32 tokens.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gptoss_jax.kernels.expert_matmul import hopper_kernel
from gptoss_jax.kernels.expert_matmul.hopper_choosing import among, choose, in_rows
from gptoss_jax.kernels.expert_matmul.hopper_instructions import COLUMN, INPUTS, MATRIX
from gptoss_jax.kernels.expert_matmul.hopper_kernel import Tiles
from gptoss_jax.kernels.expert_matmul.hopper_layout import ALIGNMENT
from gptoss_jax.kernels.expert_matmul.mosaic_gpu import most_slots

MOST_TOKENS = MOST_EXPERTS = 256  # of a TMA copy
MOST_PAIRS, _MOST_SCORES = 1024, 32768  # in shared memory
_TOKENS = 32  # of a group, which a warpgroup takes at once
_WARPGROUPS = 4  # of more tokens than a group
_RANK_BITS = 10


class Routing(NamedTuple):
    """What becomes of T tokens with A choices each, and the tiles of slots that hold their rows.

    expert: int32 [A, T] by descending logit; weight: float32 [A, T]; slot: int32 [A, T], past the last for an expert that isn't here;
    token: int32 [slots], any where a slot is spare; None where every tile takes all tokens in order, which tiles of T rows or more mean.
    """

    expert: jax.Array
    weight: jax.Array
    slot: jax.Array
    token: jax.Array | None
    tiles: Tiles


def takes(tokens: int, experts: int, count: int) -> bool:
    """Return whether `route` takes so many tokens, experts and choices of a token."""
    if count == 1 and tokens > _TOKENS - 8:  # for which Mosaic GPU finds no layouts (jax 0.11.2 and 0.12)
        return False
    room = -(-tokens // _TOKENS) * _TOKENS
    return tokens <= MOST_TOKENS and tokens * count <= MOST_PAIRS and experts <= MOST_EXPERTS and room * (-(-experts // 8) * 8) <= _MOST_SCORES


def heights(tokens: int, count: int, experts: int, all_experts: int) -> tuple[int, ...]:
    """Return how tall the tiles may be that `route` makes for some experts of all; of 32 tokens and fewer all the same, the next power of two of twice
    the mean."""
    if tokens > _TOKENS:
        return hopper_kernel.heights(-(-tokens * count * experts // all_experts), experts)
    mean = -(-tokens * count // all_experts)
    return (max(ALIGNMENT, 1 << (2 * mean - 1).bit_length()),)


def most_tiles(tokens: int, count: int, experts: int, rows: int) -> tuple[int, int]:
    """Return (how many tiles of at most so many rows tokens can need; how many slots)."""
    pairs = tokens * count
    if tokens > _TOKENS:
        slots = most_slots(pairs, experts)
        return hopper_kernel.most_tiles(slots, experts, rows), slots
    tiles = pairs if pairs <= experts else experts + (pairs - experts) // rows
    return tiles, tiles * rows


@functools.partial(jax.jit, static_argnames=("count", "experts", "rows", "interpret"))  # so that a kernel is made once for all layers
def route(scores_TE, bias_E, real_T, first, *, count: int, experts: int, rows: int, interpret=None) -> Routing:
    """Choose `count` experts of each token by scores + bias: float32 [T, E], float32 or bfloat16 [E].

    real: bool [T], or None: all are. first: int32 [1], of the `experts` that are here. rows: of a tile at most, see `heights`.
    The lower of equals comes first; -inf counts as the lowest number. A token with a NaN goes to no expert, index E, and its weights are NaN.
    """
    (T, E), A = scores_TE.shape, count
    groups = -(-T // _TOKENS)
    few, shared = groups == 1, T <= min(rows, _TOKENS)
    room, warpgroups = groups * _TOKENS, 1 if few else _WARPGROUPS
    tiles, slots = most_tiles(T, A, experts, rows)
    chunks, expert_chunks = -(-tiles // _TOKENS), -(-experts // _TOKENS)
    scores_TE, bias_E = jnp.pad(scores_TE, ((0, 0), (0, -E % 8)), constant_values=-np.inf), jnp.pad(bias_E, (0, -E % 8))
    columns = len(bias_E)
    real = np.asarray(np.arange(room) < T, np.int32) if real_T is None else jnp.pad(real_T.astype(jnp.int32), (0, room - T))

    def body(first, scores, bias, real, expert, weight, slot, token, tile_expert, tile_first, tile_height, tile_count,
             scores_smem, bias_smem, real_smem, expert_smem, weight_smem, here_smem, slot_smem, table_smem, loaded, together, *places):
        me = jax.lax.axis_index("warpgroup")

        def share(parts, run):
            """Run run(part, the 32 of it) of this warpgroup's parts of 32 each."""
            if parts == warpgroups:
                return run(me, pl.ds(me * _TOKENS, _TOKENS))
            return jax.lax.fori_loop(0, (parts - me + warpgroups - 1) // warpgroups, lambda i, _: run(
                me + i * warpgroups, pl.ds((me + i * warpgroups) * _TOKENS, _TOKENS)), None)

        def meet():
            plgpu.barrier_arrive(together)
            plgpu.barrier_wait(together)

        @pl.when(me == 0)
        def _():
            plgpu.copy_gmem_to_smem(scores, scores_smem.at[pl.ds(0, T)], loaded)
            plgpu.copy_gmem_to_smem(bias, bias_smem, loaded)
            plgpu.copy_gmem_to_smem(real, real_smem, loaded)

        plgpu.barrier_wait(loaded)

        def choose_of_group(_, mine):
            is_real = _column(real_smem.at[mine]) != 0

            def put(a, at, power, total):
                here_smem[a, mine] = jnp.where(is_real, among(at, first[0], experts, E), experts)
                expert_smem[a, mine], weight_smem[a, mine] = jnp.minimum(at, E), power
                return total + power

            def normalise(a, _):
                weight_smem[a, mine] = _column(weight_smem.at[a, mine]) / total
                return _

            logits = plgpu.load(scores_smem.at[mine], layout=MATRIX, optimized=False) + in_rows(bias_smem, _TOKENS, MATRIX)
            total = choose(logits, A, put, plgpu.layout_cast(jnp.zeros(_TOKENS, jnp.float32), COLUMN), MATRIX)
            jax.lax.fori_loop(0, A, normalise, None)

        share(groups, choose_of_group)
        meet()
        given = here_smem, slot_smem, *places
        of_tiles = _place_few(*given, T, experts, rows, slots, meet) if few else _place_many(*given, experts, rows, slots, share, meet)
        plgpu.commit_smem()
        meet()

        if not shared:  # one by one, each warpgroup its own
            def put(t, _):
                for a in range(A):
                    at = slot_smem[a, t]

                    @pl.when(at < slots)
                    def _():
                        token[at] = t
                return _

            share(groups, lambda group, _: jax.lax.fori_loop(group * _TOKENS, jnp.minimum((group + 1) * _TOKENS, T), put, None))

        def tabulate(chunk, part):
            for row, column in enumerate(of_tiles(_index() + chunk * _TOKENS)):
                table_smem[row, part] = column
            plgpu.commit_smem()
            for row, out in enumerate((tile_expert, tile_first, tile_height, tile_count)):
                plgpu.copy_smem_to_gmem(table_smem.at[row, part], out.at[part])

        share(chunks, tabulate)

        @pl.when(me == 0)
        def _():
            for here, out in ((expert_smem, expert), (weight_smem, weight), (slot_smem, slot)):
                plgpu.copy_smem_to_gmem(here, out)
        plgpu.wait_smem_to_gmem(0)

    choices, weights, table, token = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
        ((A, room), jnp.int32), ((A, room), jnp.float32), ((chunks * _TOKENS,), jnp.int32), ((slots,), jnp.int32)))
    smem = [plgpu.SMEM(shape.shape, shape.dtype) for shape in (choices, weights, choices, choices)]
    of_experts = plgpu.SMEM((expert_chunks * _TOKENS,), jnp.int32)
    run = plgpu.kernel(
        body, out_type=(choices, weights, choices, token, *(table,) * 4), grid=(1,), grid_names=("block",),
        num_threads=warpgroups, thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((room, columns), jnp.float32), plgpu.SMEM((columns,), bias_E.dtype), plgpu.SMEM((room,), jnp.int32), *smem,
                       plgpu.SMEM((4, *table.shape), jnp.int32), plgpu.Barrier(num_arrivals=3), plgpu.Barrier(num_arrivals=warpgroups),
                       *([plgpu.SMEM((A, room), jnp.int32)] if few else [plgpu.SMEM((groups, *of_experts.shape), jnp.int32), *(of_experts,) * 3])],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret)
    expert, weight, slot, token, *found = run(first, scores_TE, bias_E, real)
    return Routing(expert[:, :T], weight[:, :T], slot[:, :T], None if shared else token, Tiles(*found))


def _place_few(here_smem, slot_smem, key_smem, T, experts, rows, slots, meet):
    """Give the pairs of 32 tokens and fewer their slots, each compared with each. Returns a function from tiles to their `Tiles`."""
    A, width, bits = here_smem.shape[0], -(-T // 8) * 8, rows.bit_length() - 1
    mine = pl.ds(0, _TOKENS)

    def of_all(ref, a):
        """Return what a choice of each token has, along the columns of a matrix."""
        return _down(ref.at[a, pl.ds(0, width)])

    # A pair's key is its expert and how many pairs of that come before it; every `rows`-th opens a tile.
    def rank(a, _):
        here, ahead = _column(here_smem.at[a, mine]), _iota(width, 1) - _iota(width, 0)

        def before(b, count):
            return count + jnp.where((of_all(here_smem, b) == _across(here, width)) & (ahead < (a - b) * _TOKENS), 1, 0)

        key_smem[a, mine] = here << _RANK_BITS | jax.lax.fori_loop(0, a + 1, before, _full(0, width)).sum(axis=1)
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
        key = _column(key_smem.at[a, mine])
        row = _index() if T <= rows else key & rows - 1
        slot_smem[a, mine] = jnp.where(key < experts << _RANK_BITS, (opened(_across(key, width)) - 1) * rows + row, slots)
        return _

    jax.lax.fori_loop(0, A, place, None)
    opened_tiles = opened((experts << _RANK_BITS) - 1)

    def of_tiles(tile):
        def find(b, owner):
            return jnp.where(of_all(slot_smem, b) >> bits == _across(tile, width), of_all(key_smem, b) >> _RANK_BITS, owner)

        owner = jax.lax.fori_loop(0, A, find, _full(experts, width)).min(axis=1)
        return owner, tile * (rows // ALIGNMENT), jnp.where(tile < opened_tiles, rows // ALIGNMENT, 0), opened_tiles

    return of_tiles


def _place_many(here_smem, slot_smem, slot_of_smem, size_smem, first_smem, tile_smem, experts, rows, slots, share, meet):
    """Do the same for more tokens: each expert's slots follow those of the one before, from a multiple of ALIGNMENT on, and its tiles likewise."""
    A, groups = here_smem.shape[0], slot_of_smem.shape[0]
    chunks = size_smem.shape[0] // _TOKENS
    row, column = _iota(_TOKENS, 0), _iota(_TOKENS, 1)

    def over(parts, add, *found):
        """Return what add(part, the 32 of it, *found), a tuple, has found after so many parts."""
        return jax.lax.fori_loop(0, parts, lambda i, found: add(i, pl.ds(i * _TOKENS, _TOKENS), *found), found)

    def count(chunk, part):
        """How many pairs each of 32 experts has, in all and before each group of tokens."""
        expert = _index() + chunk * _TOKENS

        def of_group(group, tokens, before):
            def of_choice(a, found):
                return found + jnp.where(_down(here_smem.at[a, tokens]) == _across(expert, _TOKENS), 1, 0)

            slot_of_smem[group, part] = before
            return before + _summed(jax.lax.fori_loop(0, A, of_choice, _full(0, _TOKENS))),

        (total,) = over(groups, of_group, plgpu.layout_cast(jnp.zeros(_TOKENS, jnp.int32), COLUMN))
        size_smem[part] = jnp.where(expert < experts, total, 0)

    share(chunks, count)
    meet()

    def begin(chunk, part):
        """Where the slots and tiles of each of 32 experts begin."""
        def add(i, others, eights, tiles):
            size = jnp.where(column + i * _TOKENS < row + chunk * _TOKENS, _down(size_smem.at[others]), 0)
            return eights + _cut(size, ALIGNMENT), tiles + _cut(size, rows)

        eights, tiles = map(_summed, over(chunks, add, _full(0, _TOKENS), _full(0, _TOKENS)))
        first_smem[part], tile_smem[part] = eights, tiles

        def shift(group, _):
            slot_of_smem[group, part] = _column(slot_of_smem.at[group, part]) + eights * ALIGNMENT
            return _

        jax.lax.fori_loop(0, groups, shift, None)

    share(chunks, begin)
    meet()

    def place(group, mine):
        def of_choice(a, _):
            here = _across(_column(here_smem.at[a, mine]), _TOKENS)

            def earlier(b, found):
                return found + jnp.where((_down(here_smem.at[b, mine]) == here) & (column < row), 1, 0)

            def find(i, others, found):
                return found + jnp.where(column + i * _TOKENS == here, _down(slot_of_smem.at[group, others]), 0),

            (found,) = over(chunks, find, jax.lax.fori_loop(0, A, earlier, _full(0, _TOKENS)))
            slot_smem[a, mine] = jnp.where(_column(here_smem.at[a, mine]) < experts, _summed(found), slots)
            return _

        jax.lax.fori_loop(0, A, of_choice, None)

    share(groups, place)

    def of_tiles(tile):
        def find(i, others, owner, first, height, opened):
            size, ahead = _down(size_smem.at[others]), _across(tile, _TOKENS) - _down(tile_smem.at[others])
            left = size - ahead * rows
            owns = (ahead >= 0) & (left > 0)
            first = first + jnp.where(owns, _down(first_smem.at[others]) + ahead * (rows // ALIGNMENT), 0)
            height = height + jnp.where(owns, _cut(jnp.minimum(left, rows), ALIGNMENT), 0)
            return jnp.where(owns, column + i * _TOKENS, owner), first, height, opened + _cut(size, rows)

        owner, *others = over(chunks, find, _full(experts, _TOKENS), *(_full(0, _TOKENS),) * 3)
        return plgpu.layout_cast(owner.min(axis=1), COLUMN), *map(_summed, others)

    return of_tiles


def _iota(columns, dim):
    return plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, (_TOKENS, columns), dim), MATRIX)


def _index():
    return plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, (_TOKENS,), 0), COLUMN)


def _full(number, columns):
    return plgpu.layout_cast(jnp.full((_TOKENS, columns), number, jnp.int32), MATRIX)


def _across(x, columns):
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(x, (_TOKENS, columns), (0,)), MATRIX)


def _down(ref):
    """Load numbers along the columns of a matrix."""
    x = plgpu.load(ref, layout=INPUTS, optimized=False)
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(x, (_TOKENS, x.shape[0]), (1,)), MATRIX)


def _column(ref):
    return plgpu.load(ref, layout=COLUMN, optimized=False)


def _summed(x):
    return plgpu.layout_cast(x.sum(axis=1), COLUMN)


def _cut(numbers, size: int):
    """Return into how many parts of at most `size` numbers up to 1,024 are cut."""
    factor = (1 << 20) // size + 1  # whose product with 1,024 and more is right to the unit
    return (numbers + (size - 1)) * factor >> 20
