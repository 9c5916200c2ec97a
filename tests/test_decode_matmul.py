"""A decode step's dense products in one kernel, without a Hopper: interpreted with race detection against the ops they replace. What the compiler makes
of it is in test_mosaic_gpu.py, its PTX is run in test_hopper_machine.py, what a decode step is made of with it is in test_gpu_programs.py."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.kernels import hopper
from gptoss_jax.kernels.attention import say_once
from gptoss_jax.kernels.decode_matmul import decode_matmul, decode_matmul_scored, hopper_check, mosaic_gpu, reference
from gptoss_jax.kernels.expert_matmul.reference import FACTORS

pytestmark = pytest.mark.usefixtures("quickly_compiled")

needs_new_jax = pytest.mark.skipif(jax.__version_info__ < hopper.OLDEST_JAX, reason=f"the kernel needs jax 0.11.2, found {jax.__version__}")

# rows, inputs, outputs, what comes before and after, steps of so many groups, stages: None as planned
CASES = {
    "a row summed and normed, fewer steps than warpgroups": (1, 192, 64, ("added", "scale"), None, None),
    "a row summed and normed, stages used again, inputs that end within a step": (1, 1216, 24, ("added", "scale"), None, 4),
    "a row, only a bias": (1, 320, 24, ("bias",), None, None),
    "odd rows normed, with a bias, inputs that end within a step": (3, 320, 40, ("scale", "bias"), None, None),
    "eight rows, only a bias, stages used again": (8, 704, 56, ("bias",), 1, 4),
    "eight rows summed and normed, stages used again": (8, 640, 24, ("added", "scale"), 2, 4),
    "eight rows, nothing else, one group": (8, 64, 8, (), None, None),
}

# inputs, outputs, those of a block, experts, whether there is a bias
SCORED = {
    "fewer steps than warpgroups": (192, 64, 8, 32, True),
    "stages used again, inputs that end within a step, blocks of many outputs": (1216, 320, 40, 64, False),
}


def arguments(rows, inputs, outputs, parts, dtype=jnp.bfloat16, seed=0):
    random = np.random.default_rng(seed)
    shapes = {"x": (rows, inputs), "added": (rows, inputs), "scale": (inputs,), "weight": (outputs, inputs), "bias": (outputs,)}
    return [jnp.asarray(random.standard_normal(shape), dtype) if name in ("x", "weight", *parts) else None for name, shape in shapes.items()]


def planned(rows, inputs, outputs, parts, groups, stages, interpret=None):
    from gptoss_jax.kernels.decode_matmul import hopper_kernel

    plan = hopper_kernel.plan(rows, outputs, inputs, "added" in parts)
    return plan._replace(groups=groups or plan.groups, stages=stages or plan.stages, interpret=interpret)


def scored_arguments(inputs, outputs, experts, bias, seed=0):
    random = np.random.default_rng(seed)
    shapes = (1, inputs), (outputs, inputs), (outputs,) if bias else None, (1, outputs), (outputs,), (experts, outputs)
    return [None if shape is None else jnp.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in shapes]


def run_scored(inputs, outputs, each, experts, bias, interpret=None):
    """Return (arrays, what the kernel makes of them) with blocks of so many outputs."""
    from gptoss_jax.kernels.decode_matmul import hopper_kernel

    x, weight, bias_O, *after = arrays = scored_arguments(inputs, outputs, experts, bias)
    plan = hopper_kernel.plan(1, outputs, inputs, experts=experts)._replace(outputs=each, stages=4, interpret=interpret)
    return arrays, hopper_kernel.matmul(x, None, None, weight, bias_O, plan, epsilon=1e-5, dtype=jnp.dtype(jnp.bfloat16), after=after)


def check_scored(arrays, found, blocks):
    """Each number by those it is made of; roundings in between may be left out by an interpreter."""
    (x, weight, bias, residual, scale, router), (summed, rows, parts) = (
        [0 if array is None else np.asarray(array, np.float64) for array in given] for given in (arrays, found))
    E = len(router)
    assert parts.shape == (blocks, E + FACTORS) and found[0].dtype == found[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(summed, residual + x @ weight.T + bias, rtol=2**-7, atol=2**-7)
    np.testing.assert_allclose(rows, summed * scale, rtol=2**-7)
    np.testing.assert_allclose(parts[:, :E].sum(axis=0), (rows @ router.T)[0], rtol=1e-5, atol=1e-5 * (rows @ router.T).std())
    np.testing.assert_allclose(parts[:, E:].sum(axis=0), np.full(FACTORS, (summed**2).mean() + 1e-5), rtol=2**-10)


def check(found, arrays, dtype):
    """Sums are exact; a norm's last bit may differ, as squares are summed in another order; products are of the norms at hand."""
    y, summed, normed = found
    assert (y.shape, y.dtype) == ((len(arrays[0]), len(arrays[3])), dtype)
    _, right_sum, right_norm = jax.jit(functools.partial(reference.decode_matmul, epsilon=1e-5, dtype=dtype, implementation="xla"))(*arrays)
    np.testing.assert_array_equal(summed, right_sum)
    np.testing.assert_allclose(normed.astype(jnp.float32), right_norm.astype(jnp.float32), rtol=0 if arrays[2] is None else 2**-7)
    x, weight, bias = (0 if array is None else np.asarray(array, np.float64) for array in (normed, *arrays[3:5]))
    right = x @ weight.T + bias
    np.testing.assert_allclose(y.astype(jnp.float32), right, rtol=2**-8 if dtype == jnp.bfloat16 else 1e-5, atol=1e-5 * right.std())


@needs_new_jax
@pytest.mark.parametrize("case", CASES, ids=CASES)
def test_interpreted_with_race_detection_it_equals_sum_norm_and_product(case):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from gptoss_jax.kernels.decode_matmul import hopper_kernel

    *sizes, groups, stages = CASES[case]
    arrays, dtype = arguments(*sizes), jnp.bfloat16 if "bias" in sizes[-1] else jnp.float32
    plan = planned(*sizes, groups, stages, plgpu.InterpretGPUParams(detect_races=True))
    found = jax.jit(lambda *arrays: hopper_kernel.matmul(*arrays, plan, epsilon=1e-5, dtype=jnp.dtype(dtype)))(*arrays)
    check(found, arrays, dtype)


@needs_new_jax
@pytest.mark.parametrize("case", SCORED, ids=SCORED)
def test_interpreted_with_race_detection_an_output_is_scored_by_the_router(case):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    _, outputs, each, *_ = SCORED[case]
    check_scored(*run_scored(*SCORED[case], plgpu.InterpretGPUParams(detect_races=True)), outputs // each)


def test_early_scores_are_those_of_the_norm():
    """However many the parts: the norm, its product with the router, and what they are of, as several ops."""
    x, weight, bias, residual, scale, router = scored_arguments(192, 64, 32, True)
    y, _, _ = decode_matmul(x, weight, bias)
    right, summed, _ = decode_matmul(residual, router, added_TD=y, scale_D=scale, epsilon=1e-5, dtype=jnp.float32)
    found, early = decode_matmul_scored(x, weight, bias, residual, scale, router, epsilon=1e-5, for_hopper=True)
    np.testing.assert_array_equal(found, summed)
    np.testing.assert_allclose(early.scores(), right, atol=2**-6 * float(right.std()))  # rounded before, not after the factor
    assert early.parts.shape == ((8 if jax.__version_info__ >= hopper.OLDEST_JAX else 1), 32 + FACTORS)


def test_the_reference_is_the_formula():
    x, added, scale, weight, bias = (np.asarray(array, np.float64) for array in arguments(2, 96, 40, ("added", "scale", "bias"), jnp.float32)[:5])
    given = (jnp.asarray(array, jnp.float32) for array in (x, weight, bias, added, scale))
    y, summed, normed = decode_matmul(*(arrays := list(given))[:3], added_TD=arrays[3], scale_D=arrays[4], epsilon=1e-5)
    right = (x + added) / np.sqrt(((x + added) ** 2).mean(axis=1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(summed, x + added, atol=1e-6)
    np.testing.assert_allclose(normed, right, atol=1e-5)
    np.testing.assert_allclose(y, right @ weight.T + bias, atol=1e-4)


@needs_new_jax
def test_about_as_many_blocks_as_processors_share_the_outputs():
    from gptoss_jax.kernels.decode_matmul import hopper_kernel

    blocks = {(outputs, inputs): outputs // hopper_kernel.plan(rows, outputs, inputs, summing).outputs for rows, outputs, inputs, summing in
              ((1, 5120, 2880, False), (8, 2880, 4096, False), (8, 128, 2880, True), (8, 32, 2880, True))}
    assert blocks == {(5120, 2880): 128, (2880, 4096): 120, (128, 2880): 16, (32, 2880): 4}
    assert [hopper_kernel.plan(rows, 132 * 128, 2880).rows for rows in (1, 2)] == [8, 8]  # four groups of 128 outputs for each warpgroup don't fit
    assert hopper_kernel.plan(1, 201_088, 2880) is None and hopper_kernel.plan(1, 5120, 2872) is None
    assert hopper_kernel.plan(1, 5124, 2880) is None and hopper_kernel.plan(8, 8, 8192, True) is None  # 260 kB of rows


@needs_new_jax
def test_the_kernel_is_checked_on_the_device_before_it_is_used(monkeypatch, caplog):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpret = plgpu.InterpretGPUParams()
    monkeypatch.setattr(hopper_check, "CASES", [(3, 64, 16, True, True), (8, 192, 8, False, False)])
    assert hopper_check.disagreement(interpret) is None
    monkeypatch.setattr(hopper_check, "CASES", hopper_check.CASES[:1])
    right = mosaic_gpu.run
    for index, what in enumerate(("products", "sums", "norms")):
        def wrong(*arrays, index=index, **options):
            return [1.25 * array if at == index else array for at, array in enumerate(right(*arrays, **options))]

        monkeypatch.setattr(mosaic_gpu, "run", wrong)
        assert f"% of {what} of 16 x 64 wrong)" in hopper_check.disagreement(interpret)
    monkeypatch.setattr(hopper_check, "CASES", [])
    scored = mosaic_gpu.run_scored
    monkeypatch.setattr(mosaic_gpu, "run_scored", lambda *arrays, **options: scored(*arrays[:-1], -arrays[-1], **options))
    assert "a kernel that scores right here (found 100.0% of scores wrong)" == hopper_check.disagreement(interpret)
    device = types.SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(hopper, "wrong_here", lambda *_: "a kernel that computes right here (found 50.0% wrong)")
    x, _, _, weight, *_ = arguments(1, 64, 8, ())
    with pytest.raises(ValueError, match=r"decode_matmul implementation 'mosaic_gpu' needs a kernel that computes right here \(found 50.0% wrong\)"):
        decode_matmul(x, weight, implementation="mosaic_gpu")
    say_once.cache_clear()
    with caplog.at_level("INFO", "gptoss_jax"):
        programs = [str(jax.make_jaxpr(functools.partial(decode_matmul, for_hopper=True))(x, weight)) for _ in range(2)]
    assert not any("mosaic" in program or "mpmd" in program for program in programs)
    assert ["decode_matmul: several kernels" in record.message for record in caplog.records if "decode" in record.message] == [True]


def test_named_it_says_what_is_missing():
    x, added, scale, weight, *_ = arguments(2, 64, 8, ("added", "scale"))
    with pytest.raises(ValueError, match="decode_matmul implementation 'pallas', expected 'auto' or one of xla, cpu, mosaic_gpu"):
        decode_matmul(x, weight, implementation="pallas")
    with pytest.raises(ValueError, match="added_TD without scale_D"):
        decode_matmul(x, weight, added_TD=added)
    with pytest.raises(ValueError, match="decode_matmul_scored: 2 rows found, expected one"):
        decode_matmul_scored(x, weight, None, added, scale, weight)
    needs = functools.partial(pytest.raises, ValueError)
    if jax.__version_info__ < hopper.OLDEST_JAX:
        with needs(match="'mosaic_gpu' needs jax 0.11.2 or newer"):
            decode_matmul(x, weight, implementation="mosaic_gpu")
        return
    wide, tall = arguments(2, 72, 8, ()), arguments(12, 64, 8, ())
    for x, weight, options, message in ((x, weight, {}, r"a Hopper GPU \(found cpu\)"),
                                        (x, weight, {"scale_D": scale.astype(jnp.float32)}, r"in bfloat16.*\(found bfloat16, float32, bfloat16\)"),
                                        (x, weight, {"dtype": jnp.float16}, r"a result in that or float32 \(found bfloat16, float16\)"),
                                        (tall[0], tall[3], {}, r"1 to 8 rows \(found 12\)"),
                                        (wide[0], wide[3], {}, r"inputs in multiples of 64.*\(found 72 and 8\)"),
                                        (jnp.ones((1, 16640), jnp.bfloat16), jnp.ones((8, 16640), jnp.bfloat16), {}, r"few enough.*\(found 16640 and 8\)"),
                                        (x[:, :64], jnp.ones((8, 128), jnp.bfloat16), {}, r"x of shape \(\d+, 128\) \(found \(\d+, 64\)\)"),
                                        (x, weight, {"bias_O": jnp.ones(7, jnp.bfloat16)}, r"bias of shape \(\d+,\) \(found \(7,\)\)")):
        with needs(match=f"decode_matmul implementation 'mosaic_gpu' needs .*{message}"):
            decode_matmul(x, weight, implementation="mosaic_gpu", **options)
    for outputs, experts, found in ((64, 40, "40 and 64"), (64, 256, "256 and 64"), (72, 32, "32 and 72")):  # nine blocks
        with needs(match=rf"needs up to 224 experts in multiples of 32 and outputs in multiples of 8 blocks, few enough \(found {found}\)"):
            decode_matmul_scored(*scored_arguments(64, outputs, experts, True), implementation="mosaic_gpu")
    *others, router = scored_arguments(64, 64, 32, True)
    with needs(match=r"needs a residual, a scale and a router in bfloat16 \(found bfloat16, bfloat16 and float32\)"):
        decode_matmul_scored(*others, router.astype(jnp.float32), implementation="mosaic_gpu")


@needs_new_jax
def test_a_program_that_may_run_the_kernel_has_the_gradients_of_the_several_ops():
    x, added, scale, weight, bias = arguments(2, 64, 8, ("added", "scale", "bias"))

    def loss(for_hopper, *trained):
        x, added, scale, weight, bias = trained
        return decode_matmul(x, weight, bias, added_TD=added, scale_D=scale, for_hopper=for_hopper)[0].astype(jnp.float32).sum()

    ours, expected = (jax.grad(functools.partial(loss, kind), argnums=(0, 1, 2, 3, 4))(x, added, scale, weight, bias) for kind in (True, False))
    for found, wanted in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
