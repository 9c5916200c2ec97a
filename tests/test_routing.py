"""Routing as GPUs compute it, by comparing, against routing by sorting: the same experts, the same order, the same ties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.kernels.expert_matmul import grouping, mosaic_gpu
from gptoss_jax.model import moe

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def logits_with_ties(experts):
    random = np.random.default_rng(0)
    rows = random.standard_normal((40, experts)).astype(np.float32)
    rows[1:8] = np.round(rows[1:8]) + 0.0  # many equal, none -0.0, which sorting puts below 0.0
    rows[8], rows[9, ::2], rows[10] = 3, -1e30, -np.arange(experts)
    return jnp.asarray(rows.reshape(5, 8, experts))


@pytest.mark.parametrize("experts,count", [(7, 3), (32, 4), (5, 5), (4, 1)])
def test_ranks_choose_what_sorting_chooses_and_the_lower_of_equals_first(experts, count):
    logits = logits_with_ties(experts)
    ways = [functools.partial(f, count=count) for f in (moe._top_by_rank, moe._top_by_sorting)]
    (ours, our_weights), (indices, weights) = (jax.jit(f)(logits) for f in ways)
    np.testing.assert_array_equal(ours, indices)
    np.testing.assert_allclose(our_weights, weights, rtol=3e-7)  # two roundings of float32
    assert ours.dtype == indices.dtype and (np.asarray(ours[1, 0]) == np.arange(count)).all()
    gradients = [jax.jit(jax.grad(lambda x: (f(x)[1] ** 2 * jnp.arange(1.0, count + 1)).sum()))(logits) for f in ways]
    np.testing.assert_allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("rows,experts", [(1, 3), (4, 128), (24, 5), (96, 32)])
def test_comparing_groups_rows_as_a_stable_sort_does(rows, experts):
    random = np.random.default_rng(rows)
    ways = [jax.jit(functools.partial(f, experts=experts)) for f in (grouping.by_comparing, grouping.by_sorting)]
    for high in (1, experts, experts + 1, experts + 7):  # one expert has all; some have none; rows of nobody here come last
        expert = jnp.asarray(random.integers(0, high, rows).astype(np.int32))
        ours, expected = (f(expert) for f in ways)
        for a, b in zip(ours, expected, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype == jnp.int32


@pytest.mark.parametrize("tokens,experts", [(1, 3), (2, 128), (63, 7), (64, 32), (65, 4), (1300, 128)])  # of four choices each, counted by 256
def test_counting_gives_an_experts_choices_slots_in_their_order_from_a_multiple_of_eight_on(tokens, experts):
    random, run = np.random.default_rng(tokens), jax.jit(functools.partial(mosaic_gpu.place, experts=experts))
    for low, high in ((0, 1), (0, experts), (0, experts + 1), (0, 2 * experts), (experts, experts + 3)):  # one has all; some have none; nobody here has any
        expert_TA = random.integers(low, high, (tokens, 4)).astype(np.int32)
        slot_TA, slots, room_E = (np.asarray(x) for x in run(jnp.asarray(expert_TA)))
        sizes = np.bincount(np.minimum(expert_TA, experts).ravel(), minlength=experts + 1)[:experts]
        starts = np.cumsum(room_E) - room_E
        expected = np.full(expert_TA.size, slots)
        for expert in range(experts):
            expected[np.flatnonzero(expert_TA.ravel() == expert)] = starts[expert] + np.arange(sizes[expert])
        np.testing.assert_array_equal(room_E, -(-sizes // 8) * 8)
        np.testing.assert_array_equal(slot_TA.ravel(), expected)
        assert slot_TA.dtype == room_E.dtype == np.int32 and slots % 8 == 0 and room_E.sum() <= slots <= 4 * tokens + 7 * min(experts, 4 * tokens) + 7
        choice_S, here = np.asarray(mosaic_gpu.at_slots(jnp.asarray(slot_TA), int(slots))), np.flatnonzero(expected < slots)
        np.testing.assert_array_equal(choice_S[expected[here]], here)
