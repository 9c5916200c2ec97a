"""A lone row's decode step before the experts in two kernels, without a Hopper: interpreted against the ops that it is made of. Races are looked for where
those parts are tested: an interpreter doesn't know that blocks wait for earlier ones, which test_hopper_machine.py shows. What the compiler makes of it is
in test_mosaic_gpu.py."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.kernels import hopper
from gptoss_jax.kernels.decode_block import decode_block, hopper_check, mosaic_gpu, reference, takes
from gptoss_jax.kernels.expert_matmul.reference import FACTORS

pytestmark = pytest.mark.usefixtures("quickly_compiled")

needs_new_jax = pytest.mark.skipif(jax.__version_info__ < hopper.OLDEST_JAX, reason=f"the kernels need jax 0.11.2, found {jax.__version__}")

# inputs and outputs, key-value heads, experts, slots, ring, position
CASES = {"a ring gone round": (64, 1, 32, 16, True, 37), "several tiles, fewer than there is room for": (64, 2, 32, 272, False, 130),
         "nobody's row": (64, 1, 32, 16, True, -1)}


@needs_new_jax
@pytest.mark.parametrize("case", CASES, ids=CASES)
def test_interpreted_it_equals_the_ops_that_it_is_made_of(case, monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(hopper_check, "CASES", [CASES[case]])
    assert hopper_check.disagreement(plgpu.InterpretGPUParams()) is None


@needs_new_jax
def test_the_kernels_are_checked_on_the_device_before_they_are_used(monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(hopper_check, "CASES", [CASES["a ring gone round"]])
    right = mosaic_gpu.run
    for index, what in ((0, "sums"), (3, "values")):
        def wrong(*arrays, index=index, **options):
            found = list(right(*arrays, **options))
            found[index] *= 1.25
            return found

        monkeypatch.setattr(mosaic_gpu, "run", wrong)
        assert f"of {what} of 16 slots wrong)" in hopper_check.disagreement(plgpu.InterpretGPUParams())


def test_where_the_kernels_cannot_run_it_is_the_ops_that_it_is_made_of(caplog):
    D, K, E, S, ring, position = CASES["a ring gone round"]
    arrays = [jnp.asarray(array) for array in hopper_check.arguments(D, K, E, S, position)]
    run = functools.partial(decode_block, ring=ring, epsilon=1e-5)
    with caplog.at_level(logging.INFO):
        for options in ({}, {"for_hopper": True}, {"implementation": "reference"}):
            summed, early, keys, values = run(*arrays, **options)
            expected = reference.decode_block(*arrays, ring=ring, epsilon=1e-5, implementation=options.get("implementation", "auto"))
            for found, right in zip((summed, early.rows, early.scores(), keys, values), (expected[0], expected[1].rows, expected[1].scores(), *expected[2:])):
                np.testing.assert_array_equal(found, right)
    assert early.parts.shape == ((8 if jax.__version_info__ >= hopper.OLDEST_JAX else 1), E + FACTORS)
    with pytest.raises(ValueError, match="decode_block implementation 'mosaic_gpu' needs .* \\(found "):
        run(*arrays, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="decode_block implementation 'cpu', expected 'auto' or one of reference, mosaic_gpu"):
        run(*arrays, implementation="cpu")


@needs_new_jax
def test_a_gpu_on_which_it_computes_wrong_is_left_to_the_kernels_of_its_parts(monkeypatch):
    arrays = hopper_check.arguments(64, 1, 32, 16, 3)
    assert takes(*arrays)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for unmet in (None, "kernels that compute right here"):
        monkeypatch.setattr(hopper, "device_unmet", lambda op, unmet=unmet: unmet)
        assert takes(*arrays) == (unmet is None)


@needs_new_jax
def test_what_it_needs_is_said():
    def unmet(change=lambda arrays: None, D=64, K=1, E=32, S=16, **sizes):
        arrays = list(hopper_check.arguments(D, K, E, S, 3, **sizes))
        change(arrays)
        return mosaic_gpu.unmet(*arrays)

    def two_rows(arrays):
        arrays[0] = np.concatenate([arrays[0]] * 2)

    assert unmet() is None and unmet(D=2880, K=8, E=128, S=128) is None and unmet(K=8, S=511 // 8 * 8) is None
    assert unmet(two_rows) == "one row and 8 queries to a key (found 2 and 8)"
    assert unmet(K=2, G=4) == "one row and 8 queries to a key (found 1 and 4)"
    assert unmet(K=8, S=512) == "a cache that isn't split, and an output of 124 blocks at most (found 512 slots, 64 outputs)"
    assert "multiples of 8 (found 12)" in unmet(S=12)
    assert "experts in multiples of 32" in unmet(E=40)
