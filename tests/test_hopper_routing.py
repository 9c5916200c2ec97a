"""The routing kernel for Hopper GPUs, interpreted with race detection: experts and weights as sorting gives them, and a place for every row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.kernels import hopper
from gptoss_jax.model import moe

pytestmark = [pytest.mark.usefixtures("quickly_compiled"),
              pytest.mark.skipif(jax.__version_info__ < hopper.OLDEST_JAX, reason=f"the kernel needs jax 0.11.2, found {jax.__version__}")]

# tokens, experts, experts here and the first of them, rows of a tile, what is special
CASES = [(1, 32, (32, 0), 8, ""), (2, 13, (5, 4), 8, "nan"), (3, 128, (128, 0), 8, "ties"), (5, 32, (8, 24), 8, "unreal"), (16, 128, (128, 0), 16, "one"),
         (17, 32, (32, 0), 8, "ties unreal"), (32, 32, (16, 8), 16, "one unreal"), (33, 40, (33, 2), 16, "one unreal"), (64, 128, (128, 0), 8, ""),
         (128, 32, (32, 0), 48, "ties one"), (200, 128, (64, 64), 32, ""), (256, 32, (32, 0), 80, "unreal")]


@pytest.mark.parametrize("tokens,experts,here,rows,special", CASES)
def test_routing_equals_sorting_and_gives_each_row_a_slot_in_a_tile_of_its_expert(tokens, experts, here, rows, special):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from gptoss_jax.kernels.expert_matmul import hopper_routing

    random, (local, first) = np.random.default_rng(tokens), here
    logits = random.standard_normal((tokens, experts)).astype(np.float16).astype(np.float32)  # so that logits less bias are exact
    logits = np.round(logits) + 0.0 if "ties" in special else logits  # none -0.0, which sorting puts below 0.0
    logits[:, first + 1] = 9 if "one" in special else logits[:, first + 1]
    real = random.random(tokens) < 0.6 if "unreal" in special else np.full(tokens, True)
    number = np.arange(tokens) != 1 if "nan" in special else np.full(tokens, True)
    logits[~number, 3] = np.nan
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    bias = random.integers(-1, 2, experts).astype(np.float32)
    found = hopper_routing.route(jnp.asarray(logits - bias), jnp.asarray(bias, jnp.bfloat16), None if real.all() else jnp.asarray(real),
                                 jnp.full(1, first, jnp.int32), count=4, experts=local, rows=rows, interpret=interpret)
    expert, weight, slot, token, tiles = jax.tree.map(np.asarray, found)
    chosen, weights = map(np.asarray, moe._top_by_sorting(jnp.asarray(logits), count=4))
    np.testing.assert_array_equal(expert.T[number], chosen[number])
    np.testing.assert_allclose(weight.T[number], weights[number], rtol=3e-7)
    assert np.isnan(weight.T[~number]).all() and (expert.T[~number] == experts).all()

    check_places(found, np.where(real[:, None] & number[:, None], chosen - first, -1), local, rows)


def check_places(found, index, local, rows):
    """Check that a routing gives each row of an expert that is here a slot in a tile of it. index: the experts of each token, any others elsewhere."""
    from gptoss_jax.kernels.expert_matmul import hopper_routing

    _, _, slot, token, tiles = jax.tree.map(np.asarray, found)
    tokens, ours = len(index), (index >= 0) & (index < local)
    slots, sizes = slot.T[ours], np.bincount(index[ours], minlength=local)
    count = int((sizes > 0).sum() if tokens <= rows else (-(-sizes // rows)).sum())
    most, all_slots = hopper_routing.most_tiles(tokens, 4, local, rows)
    assert tiles.count[0] == count <= most and len(set(slots)) == len(slots) and (slot.T[~ours] == all_slots).all()
    begins, heights = 8 * tiles.first[:count], 8 * tiles.rows[:count]
    np.testing.assert_array_equal(begins[1:], (begins + heights)[:-1])
    assert begins[0] == 0 and begins[-1] + heights[-1] <= all_slots and (heights <= rows).all()
    tile = np.searchsorted(begins, slots, side="right") - 1
    assert (slots < begins[tile] + heights[tile]).all()
    np.testing.assert_array_equal(tiles.expert[tile], index[ours])
    np.testing.assert_array_equal((slots - begins[tile]) if token is None else token[slots], np.nonzero(ours)[0])
    if tokens <= 32:
        assert (heights == rows).all()
    else:  # no taller than its rows, which begin with it
        held = np.bincount(tile, minlength=count)
        np.testing.assert_array_equal(heights, -(-held // 8) * 8)
        np.testing.assert_array_equal([slots[tile == i].max() - begins[i] + 1 for i in range(count)], held)


# experts, experts here and the first of them, choices, parts of the scores or 0 for the scores, what is special
LONE = [(24, (24, 0), 4, 0, "ties"), (128, (128, 0), 4, 0, "-inf"), (128, (64, 32), 4, 120, ""), (32, (16, 8), 9, 8, "ties"), (32, (32, 0), 4, 40, "nan")]


@pytest.mark.parametrize("experts,here,count,parts,special", LONE)
def test_a_single_tokens_experts_are_chosen_by_its_scores_or_their_parts(experts, here, count, parts, special):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from gptoss_jax.kernels.expert_matmul import hopper_choosing
    from gptoss_jax.kernels.expert_matmul.reference import FACTORS

    random, (local, first) = np.random.default_rng(experts + parts), here
    sums = random.integers(-8, 8, (max(parts, 1), experts)).astype(np.float32)  # exact in any order
    sums[0, : experts - 2] = -np.inf if special == "-inf" else np.where(special == "ties", 1 - sums[1:, : experts - 2].sum(axis=0), sums[0, : experts - 2])
    sums[-1, 5] = np.nan if special == "nan" else sums[-1, 5]
    bias = random.integers(-3, 4, experts) / np.float32(2)
    given = np.concatenate([sums, np.full((parts, FACTORS), 4 / parts)], axis=1, dtype=np.float32) if parts else sums
    expert, weight, factor, zeros = map(np.asarray, hopper_choosing.choose_for_one(
        jnp.asarray(given), jnp.asarray(bias, jnp.bfloat16), jnp.full(1, first, jnp.int32), count=count, experts=local,
        interpret=plgpu.InterpretGPUParams(detect_races=True)))
    logits = sums.sum(axis=0) * (0.5 if parts else 1) + bias
    chosen = np.argsort(-logits, stable=True)[:count]
    np.testing.assert_allclose(factor, 0.5 if parts else 1, rtol=1e-6)
    np.testing.assert_array_equal(zeros, [0] * (count + 1))
    if special == "nan":
        assert (expert == local).all() and np.isnan(weight).all()
        return
    np.testing.assert_array_equal(expert, np.where((chosen >= first) & (chosen < first + local), chosen - first, local))
    np.testing.assert_allclose(weight, jax.nn.softmax(np.maximum(logits[chosen], np.finfo(np.float32).min)), rtol=1e-5)


def test_what_the_kernel_has_no_room_for_is_left_to_others():
    from gptoss_jax.kernels.expert_matmul import hopper_routing

    for tokens, experts, count in np.ndindex(33, 33, 9):  # tiles of few tokens are of a power of two of rows
        if tokens and experts and 0 < count <= experts:
            (rows,) = hopper_routing.heights(tokens, count, experts, experts)
            assert rows.bit_count() == 1 and 8 <= rows <= 64

    assert hopper_routing.takes(256, 128, 4) and hopper_routing.takes(128, 256, 8) and hopper_routing.takes(1, 4, 4)
    for too_much in ((257, 32, 1), (25, 8, 1), (64, 8, 1), (129, 256, 4), (256, 128, 5), (1, 257, 4)):
        assert not hopper_routing.takes(*too_much)
