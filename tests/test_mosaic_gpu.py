"""The Hopper expert matmul without a Hopper: its layout bit by bit, its data movement, decoding and order interpreted with race detection, and
what the compiler makes of it for an H100 and an H200 where the wheels for that are installed (hopper_compile.py says which)."""

import functools
import importlib.metadata
import json
import logging
import math
import os
import pathlib
import subprocess
import sys
import threading
import types

import hopper_compile
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax import mxfp4
from gptoss_jax.kernels import expert_matmul as op, hopper
from gptoss_jax.kernels.expert_matmul import (
    HopperGateUpWeight, HopperWeight, Mxfp4Weight, hopper_check, hopper_layout, mosaic_gpu, reference)
from gptoss_jax.kernels.expert_matmul.reference import FACTORS

pytestmark = pytest.mark.usefixtures("quickly_compiled")

KINDS = [HopperWeight, HopperGateUpWeight]
needs_new_jax = pytest.mark.skipif(jax.__version_info__ < hopper.OLDEST_JAX, reason=f"the kernel needs jax 0.11.2, found {jax.__version__}")


def packed(experts, outputs, inputs, seed=0):
    values = np.random.default_rng(seed).standard_normal((experts, outputs, inputs)).astype(np.float32)
    return Mxfp4Weight(*(jnp.asarray(part) for part in mxfp4.encode(values)))


def every_code():
    """16 experts of one group: each of its 64 x 64 places holds each code once. Scale bytes take every value that has room."""
    codes = (np.arange(64 * 64, dtype=np.int64).reshape(1, 64, 64) * 7 + np.arange(16)[:, None, None]) % 16
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8).reshape(16, 64, 2, 16)
    return Mxfp4Weight(blocks, (np.arange(16 * 64 * 2) * 5 % 129).astype(np.uint8).reshape(16, 64, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [every_code(), Mxfp4Weight(*(np.asarray(part) for part in packed(2, 192, 128)))], ids=["every code", "several groups"])
def test_the_layout_is_bit_exact_both_ways_in_numpy_and_jax(kind, weight):
    arranged = hopper_layout.pack(weight, kind)
    assert isinstance(arranged.words, np.ndarray) and arranged.words.nbytes == weight.blocks.nbytes
    on_device = hopper_layout.pack(Mxfp4Weight(*(jnp.asarray(part) for part in weight)), kind)
    for ours, theirs in zip(on_device, arranged, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for back in (hopper_layout.unpack(arranged), jax.jit(hopper_layout.unpack)(on_device)):
        for ours, theirs in zip(back, weight, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@needs_new_jax
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_decoding_is_exact_for_every_code_and_scale(kind):
    from gptoss_jax.kernels.expert_matmul import hopper_instructions

    weight = every_code()
    arranged = hopper_layout.pack(weight, kind)
    decode = jax.vmap(lambda words, scales: hopper_instructions.decode(words, scales, hopper_instructions.Interpreted))
    decoded = np.asarray(decode(arranged.words[:, 0, 0], arranged.scales[:, 0, 0]).astype(jnp.float32))
    expected = mxfp4.decode(*weight)
    if kind is HopperGateUpWeight:  # wgmma's row 16 w + 8 h + r holds output 16 w + 2 r + h
        expected = expected.reshape(16, 4, 8, 2, 64).swapaxes(2, 3).reshape(16, 64, 64)
    normal = np.repeat(weight.scales, 32, axis=-1) > 2  # under that a CPU may take numbers for zero
    normal = normal if kind is HopperWeight else normal.reshape(16, 4, 8, 2, 64).swapaxes(2, 3).reshape(16, 64, 64)
    np.testing.assert_array_equal(decoded[normal], expected[normal])


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_are_valid_ones(kind):
    weight = hopper_layout.unpack(hopper_layout.random(jax.random.key(0), 2, 128, 64, kind))
    assert weight.blocks.shape == (2, 128, 2, 16) and (weight.scales == 120).all() and len(np.unique(weight.blocks)) == 256


def test_what_the_layout_has_no_room_for_is_refused():
    blocks, scales = (np.array(part) for part in every_code())
    scales[3, 5, 1] = 129
    with pytest.raises(mxfp4.Mxfp4Error, match=r"needs scale bytes of at most 128 \(found 129\)"):
        hopper_layout.pack(Mxfp4Weight(blocks, scales))
    with pytest.raises(mxfp4.Mxfp4Error, match=r"needs dims that divide by 64 \(found 48 outputs, 64 inputs\)"):
        hopper_layout.pack(packed(2, 48, 64))


# rows of each expert, rows, inputs, the gate's limit and alpha; groups that differ in the first alone share a program
GROUPS = {
    "ragged, empty experts, rows past the sum": ([0, 9, 0, 21], 45, 192, 7.0, 1.702),
    "one expert owns all rows, several tiles": ([0, 0, 45, 0], 45, 192, 7.0, 1.702),
    "one row": ([0, 0, 1, 0], 1, 192, 7.0, 1.702),
    "more steps than the ring has stages": ([2, 0, 0, 3], 5, 64 * 11, 5.0, 3.0),
    "no rows of ours": ([0, 0, 0, 0], 5, 64 * 11, 5.0, 3.0),
    "tiles of both heights": ([3, 0, 72 + 152, 73], 300, 64, 7.0, 1.702),
}


@functools.cache
def interpreted(**constants):
    """Return the kernel, interpreted with race detection: the gated one where there are constants."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpret = plgpu.InterpretGPUParams(detect_races=True)
    run = functools.partial(mosaic_gpu.run, **constants) if constants else mosaic_gpu.expert_matmul
    return jax.jit(functools.partial(run, interpret=interpret))


@needs_new_jax
@pytest.mark.parametrize("groups", GROUPS, ids=GROUPS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "swiglu"])
def test_interpreted_with_race_detection_it_equals_the_reference(groups, gated):
    sizes, rows, inputs, limit, alpha = GROUPS[groups]
    random, constants = np.random.default_rng(1), {"limit": limit, "alpha": alpha} if gated else {}
    weight = packed(4, 192 if gated else 128, inputs)
    x = jnp.asarray(random.standard_normal((rows, inputs)), jnp.bfloat16)
    bias = jnp.asarray(random.standard_normal((4, weight.scales.shape[1])), jnp.bfloat16 if gated else jnp.float32)
    rest = bias, jnp.asarray(sizes, jnp.int32)
    out = interpreted(**constants)(x, hopper_layout.pack(weight, HopperGateUpWeight) if gated else weight, *rest)
    expected = jax.jit(reference.expert_matmul)(x.astype(jnp.float32), weight, *rest)
    expected = reference.swiglu(expected, **constants) if gated else expected
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2**-8, atol=inputs * 1e-6)  # one rounding, at the end; sums of products
    assert not np.asarray(out[sum(sizes):].astype(jnp.float32)).any()


@needs_new_jax
def test_race_detection_fails_where_two_warpgroups_write_without_a_barrier():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(out, held):
        held[...] = jnp.full(held.shape, jax.lax.axis_index("warpgroup"), jnp.float32)

    run = plgpu.kernel(body, out_type=jax.ShapeDtypeStruct((8, 64), jnp.float32), grid=(1,), grid_names=("block",), num_threads=2, thread_name="warpgroup",
                       scratch_types=[plgpu.SMEM((8, 64), jnp.float32)], interpret=plgpu.InterpretGPUParams(detect_races=True))
    with pytest.raises(Exception, match="RACE DETECTED"):
        jax.block_until_ready(run())


@needs_new_jax
@pytest.mark.parametrize("kind", KINDS)
def test_every_unit_of_the_grid_is_planned_within_a_hoppers_limits(kind):
    from gptoss_jax.kernels.expert_matmul import hopper_kernel

    for experts in (32, 128):
        for outputs, inputs in ((5760, 2880), (2880, 2880), (64, 64), (128, 320)):
            groups = (experts, outputs // 64, inputs // 64)
            weight = kind(jax.ShapeDtypeStruct((*groups, 4, 128), jnp.uint32), jax.ShapeDtypeStruct((*groups, 32), jnp.uint32))
            for rows in (8, 32, 64, 512, 4096, 65536):
                plan = hopper_kernel.plan(rows, weight, hopper_kernel.heights(rows, experts))
                assert not any(height % 8 for height in plan.heights) and plan.rows <= 152 and plan.stages >= 4
                assert groups[1] % plan.warpgroups == 0 and groups[2] % plan.groups == 0
                copying, multiplying = plan.registers
                assert 128 * (copying + plan.warpgroups * multiplying) <= 65536
    few = hopper_kernel.plan(32, HopperWeight(*(jax.ShapeDtypeStruct((128, 45, 45, *last), jnp.uint32) for last in ((4, 128), (32,)))), (8,))
    assert few.splits == 2  # 4 experts of 15 blocks would leave more than half of 132 multiprocessors idle


@needs_new_jax
def test_a_tile_is_as_tall_as_most_experts_rows_and_its_twin_as_what_few_have():
    """Were the room that ALIGNMENT leaves counted, 256 tokens of 128 experts would take tiles of 32 rows for 8, of 32 experts 64 for 32."""
    from gptoss_jax.kernels.expert_matmul import hopper_kernel, hopper_routing

    for tokens, experts, expected in ((64, 128, (8,)), (256, 128, (16, 32)), (256, 32, (40, 80)), (2048, 128, (72, 152)), (8192, 32, (72, 152))):
        assert hopper_kernel.heights(4 * tokens, experts) == expected
    assert hopper_kernel.heights(3, 128) == hopper_kernel.heights(8, 1) == (8,) and hopper_kernel.heights(17, 1) == (24,)  # no more than there are
    assert hopper_routing.heights(256, 4, 16, 128) == (16, 32)  # a mesh's share of them: as many rows of each


@needs_new_jax
def test_tiles_cover_every_row_once():
    from gptoss_jax.kernels.expert_matmul import hopper_kernel

    for sizes, rows, height in (([0, 16, 0, 40], 64, 16), ([0, 0, 0, 0], 24, 8), ([128, 0, 8, 0], 136, 32)):
        tiles = jax.jit(hopper_kernel.tiles, static_argnums=(1, 2))(jnp.asarray(sizes, jnp.int32), rows, height)
        expert_of, firsts, talls, count = map(np.asarray, tiles)
        owner = np.full(rows, -1)
        for expert, first, tall in list(zip(expert_of, firsts, talls))[: int(count[0])]:
            assert (owner[first * 8 : (first + tall) * 8] == -1).all() and 0 < tall <= height // 8
            owner[first * 8 : (first + tall) * 8] = expert
        np.testing.assert_array_equal(owner, np.repeat(np.arange(5), [*sizes, rows - sum(sizes)]))


def mlp_arguments(tokens, experts=4, active=2, width=64, hidden=64, seed=2):
    """x, experts of each token (one of nobody), their weights, both matrices as stored and their biases."""
    random = np.random.default_rng(seed)
    chosen = np.argsort(random.random((tokens, experts)), axis=1)[:, :active].astype(np.int32)
    chosen[-1, -1] = experts + 3
    gate_up, down = packed(experts, 2 * hidden, width), packed(experts, width, hidden, seed=1)
    biases = (jnp.asarray(random.standard_normal((experts, outputs)), jnp.bfloat16) for outputs in (2 * hidden, width))
    x, weights = jnp.asarray(random.standard_normal((tokens, width)), jnp.bfloat16), jnp.asarray(random.random((tokens, active)), jnp.float32)
    return x, jnp.asarray(chosen), weights, gate_up, next(biases), down, next(biases)


def arranged(arguments):
    kinds = {3: HopperGateUpWeight, 5: HopperWeight}
    return [hopper_layout.pack(part, kinds[index]) if index in kinds else part for index, part in enumerate(arguments)]


@needs_new_jax
@pytest.mark.parametrize("tokens,routed,parts,sizes", [(1, True, 0, ()), (1, True, 24, ()), (1, True, 0, (128, 640)), (5, True, 0, ()), (21, True, 0, ()),
                                                       (70, True, 0, ()), (21, False, 0, ())],
                         ids=["one token", "one token by parts of its scores", "more steps than stages", "tokens of one tile", "few tokens", "many tokens", "sorted"])
def test_interpreted_the_experts_of_each_token_equal_the_reference(tokens, routed, parts, sizes, monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from gptoss_jax.kernels.expert_matmul import hopper_one_token

    if sizes:
        monkeypatch.setattr(hopper_one_token, "_MOST_STAGES", 3)
    arguments, router = mlp_arguments(tokens, 4, 2, *sizes), None
    if routed:  # experts 2 to 5 are here; a token isn't real
        all_experts, random, early = 32 if parts else 8, np.random.default_rng(3), None
        scores, real = random.standard_normal((tokens, all_experts)).astype(np.float32), np.arange(tokens) != 2
        bias = jnp.asarray(random.standard_normal(all_experts), jnp.bfloat16)
        if parts:  # one of the chosen is here; the factor is 4, which rows and scores lack
            scores[:, [3, 30]] += 8
            sums = random.standard_normal((parts, all_experts + FACTORS)).astype(np.float32)
            sums[:, :all_experts] += (scores / 4 - sums[:, :all_experts].sum(axis=0)) / parts
            sums[:, all_experts:] = 1 / 16 / parts
            early = op.EarlyScores(arguments[0] / 4, jnp.asarray(sums))
            np.testing.assert_allclose(early.scores(), scores, rtol=1e-4, atol=1e-4)
        logits = scores + np.asarray(bias, np.float32)
        chosen = np.argsort(-logits, axis=1)[:, :2]
        weights = jax.nn.softmax(np.take_along_axis(logits, chosen, axis=1), axis=1)
        here = np.where((chosen >= 2) & (chosen < 6) & real[:, None], chosen - 2, 4).astype(np.int32)
        arguments = arguments[0], jnp.asarray(here), weights, *arguments[3:]
        router = op.Router(jnp.asarray(scores), bias, jnp.asarray(real) if tokens > 1 else None, jnp.full(1, 2, jnp.int32), early)
    constants = dict(limit=7.0, alpha=1.702)
    run = jax.jit(functools.partial(mosaic_gpu.expert_mlp, **constants, interpret=plgpu.InterpretGPUParams(detect_races=True)))
    out = run(*arranged(arguments), router)
    expected = jax.jit(functools.partial(op.expert_mlp, **constants, implementation="reference"))(arguments[0].astype(jnp.float32), *arguments[1:])
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=2**-6, atol=2**-6 * float(jnp.abs(expected).max()))  # h and y of each expert are rounded


@needs_new_jax
def test_the_kernel_of_a_single_token_takes_no_more_experts_than_a_block_has_barriers_for():
    from gptoss_jax.kernels.expert_matmul import hopper_one_token

    weight = hopper_layout.HopperWeight(None, jax.ShapeDtypeStruct((64, 1, 1, 32), jnp.uint32))
    assert hopper_one_token.plan(weight, weight, 32) and hopper_one_token.plan(weight, weight, 33) is None


@needs_new_jax
@pytest.mark.parametrize("width,hidden,count,stages", [(45, 45, 4, 10), (57, 81, 4, 26), (9, 93, 4, 26), (66, 81, 2, 29), (9, 7, 32, 32)])
def test_the_kernel_of_a_single_token_fits_shared_memory_where_each_array_begins_at_a_kilobyte(width, hidden, count, stages):
    from gptoss_jax.kernels.expert_matmul import hopper_one_token

    gate_up, down = (HopperWeight(None, jax.ShapeDtypeStruct((8, *groups, 32), jnp.uint32)) for groups in ((2 * hidden, width), (width, hidden)))
    plan = hopper_one_token.plan(gate_up, down, count)
    arrays = [part for part in hopper_one_token._scratch_types(plan, count, width, hidden) if hasattr(part, "dtype")]
    barriers = 8 * (2 * stages + 1 + count + 12)
    assert plan.stages == stages
    assert sum(-(-math.prod(array.shape) * jnp.dtype(array.dtype).itemsize // 1024) * 1024 for array in arrays) + barriers <= 232448


def test_arranged_weights_run_and_have_gradients_where_there_is_no_gpu(caplog):
    arguments = mlp_arguments(9)
    op.say.cache_clear()

    def run(arguments, x, weights, gate_up_bias, down_bias):
        _, chosen, _, gate_up, _, down, _ = arguments
        with caplog.at_level(logging.INFO, "gptoss_jax"):
            return op.expert_mlp(x, chosen, weights, gate_up, gate_up_bias, down, down_bias, limit=7.0, alpha=1.702)

    trained, results, gradients = [arguments[index] for index in (0, 2, 4, 6)], [], []
    for kind in (arranged(arguments), arguments):
        result, pull_back = jax.vjp(jax.jit(functools.partial(run, kind)), *trained)
        results.append(result)
        gradients.append(jax.jit(pull_back)(jnp.ones_like(result)))
    np.testing.assert_allclose(*results, rtol=2**-6, atol=2**-4)  # maybe other kernels'
    for ours, theirs in zip(*gradients, strict=True):
        scale = float(jnp.abs(theirs.astype(jnp.float32)).max())
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=2**-5, atol=2**-6 * scale)  # rounded at other places
    assert len([r for r in caplog.records if "mosaic_gpu" in r.message]) == 1
    (x, _, _, _, _, down, bias), sizes = arguments, jnp.asarray([4, 0, 3, 2], jnp.int32)
    both = [op.expert_matmul(x, w, bias, sizes) for w in (hopper_layout.pack(down), down)]
    np.testing.assert_allclose(*(y.astype(jnp.float32) for y in both), rtol=2**-7, atol=1e-3)


@needs_new_jax
def test_checks_of_a_device_compile_beside_each_other_and_the_first_that_finds_something_counts():
    together = threading.Barrier(3)

    def check(found, interpret):
        assert interpret is None and together.wait(timeout=30) is not None
        return found() if found else None

    checks = [functools.partial(check, found) for found in (None, lambda: 1 / 0, lambda: "wrong")]
    assert hopper.first_disagreement(checks, None) == "a kernel that runs here (found ZeroDivisionError: division by zero)"


def test_a_kernel_that_never_ends_is_found_wrong_though_others_wait_for_it(monkeypatch):
    class Result:
        def is_ready(self):
            return False

    monkeypatch.setattr(hopper, "_NO_RESULT_AFTER", 0.1)
    found = Result()
    assert hopper.arrived(found) is found  # what is slow on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    forever = threading.Event()
    checks = [lambda interpret: forever.wait(), lambda interpret: hopper.arrived(found)]
    assert hopper.first_disagreement(checks, None) == "a kernel that ends here (found no result after 0.1 s)"
    forever.set()
    assert hopper.usable()
    monkeypatch.setattr(hopper, "_one", Result)
    assert not hopper.usable()


@needs_new_jax
def test_the_kernel_is_checked_on_the_device_before_it_is_used(monkeypatch, caplog):
    """Right, then with a wrong order of registers, then not compiling; then what a Hopper GPU that computes wrong comes to."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from gptoss_jax.kernels.expert_matmul import hopper_kernel

    interpret = plgpu.InterpretGPUParams()
    monkeypatch.setattr(hopper_check, "CASES", [hopper_check.CASES[0], hopper_check.CASES[-1]])  # others differ in sizes, which the tests above have
    asked = []
    jax.make_jaxpr(lambda x: asked.append(hopper_check.disagreement(interpret)) or x)(1.0)  # while a program is traced
    assert asked == [None]
    monkeypatch.setattr(hopper_check, "CASES", [(HopperWeight, 64, 64, (0, 8), 0)])
    right = hopper_kernel.Interpreted.scale
    with monkeypatch.context() as patch:
        patch.setattr(hopper_kernel.Interpreted, "scale", lambda pairs, factors: right((pairs[1], pairs[0], *pairs[2:]), factors))
        assert "a kernel that computes right here (found " in hopper_check.disagreement(interpret)
        patch.setattr(hopper_check, "CASES", [(HopperWeight, 64, 64, (0, 16), 0)])  # which isn't compiled yet
        patch.setattr(hopper_kernel.Interpreted, "scale", lambda pairs, factors: right(pairs[:2], factors))
        assert "a kernel that runs here (found IndexError" in hopper_check.disagreement(interpret)
    device = types.SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H100 80GB HBM3")
    assert hopper.device_unmet("expert_matmul", device) is None  # not here to be asked
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(hopper, "wrong_here", lambda *_: "a kernel that computes right here (found 50.0% wrong)")
    arguments = mlp_arguments(3)
    with pytest.raises(ValueError, match=r"expert_mlp implementation 'mosaic_gpu' needs a kernel that computes right here \(found 50.0% wrong\)"):
        op.expert_mlp(*arranged(arguments), limit=7.0, alpha=1.702, implementation="mosaic_gpu")
    op.say.cache_clear()
    with caplog.at_level(logging.INFO, "gptoss_jax"):
        program = jax.make_jaxpr(lambda *a: op.expert_mlp(*a, limit=7.0, alpha=1.702))(*arranged(arguments))
    assert "mosaic" not in str(program) and ["computes right here" in r.message for r in caplog.records] == [True]


def test_kernels_found_right_are_not_looked_at_again_before_something_has_changed(monkeypatch, tmp_path, caplog):
    device = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", client=types.SimpleNamespace(platform_version="cuda 13000"))
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    looked, found = [], {("decode_block", False): "luck"}

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    def check(name):
        return types.SimpleNamespace(**{function: lambda which=(name.split(".")[-2], training): looked.append(which) or found.get(which)
                                        for function, training in (("disagreement", False), ("disagreement_of_training", True))})

    monkeypatch.setattr(hopper.importlib, "import_module", check)

    def ask(*which):
        looked.clear()
        hopper.wrong_here.cache_clear()  # as another process would
        answers = [hopper.wrong_here(*which) for _ in range(2)]
        assert answers == [found.get(which)] * 2
        return len(looked)

    try:
        assert [ask("decode_attention", False) for _ in range(2)] == [1, 0]
        assert [ask("expert_matmul", training) for training in (False, True, False, True)] == [1, 1, 0, 0]
        assert [ask("decode_block", False) for _ in range(2)] == [1, 1]  # that a kernel is wrong isn't remembered
        assert all(path.read_bytes() == b"" for path in (tmp_path / "new" / "gptoss_jax").iterdir())  # nothing that could be half written
        for owner, name, other in ((jax, "__version__", "0.99"), (device, "device_kind", "NVIDIA H200"), (device.client, "platform_version", "cuda 13010")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, other)
                assert [ask("decode_attention", False) for _ in range(2)] == [1, 0]
        with monkeypatch.context() as patch:
            patch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0")
            assert ask("decode_attention", False) == 1
            patch.setattr(pathlib.Path, "read_bytes", lambda path: b"another kernel")
            assert ask("decode_attention", False) == 1
        with monkeypatch.context() as patch:
            distributions = [*importlib.metadata.distributions(), types.SimpleNamespace(name="nvidia-nvvm", version="99")]
            patch.setattr(importlib.metadata, "distributions", lambda: distributions)
            assert ask("decode_attention", False) == 1
        assert ask("decode_attention", False) == 0
        assert {record.message for record in caplog.records} == {f"checking the {kernels} on this {device}, a few seconds" for kernels, device in (
            ("decode_attention kernels", "NVIDIA H100 80GB HBM3"), ("decode_attention kernels", "NVIDIA H200"), ("decode_block kernels", "NVIDIA H100 80GB HBM3"),
            ("expert_matmul kernels", "NVIDIA H100 80GB HBM3"), ("expert_matmul kernels of training", "NVIDIA H100 80GB HBM3"))}
        found["decode_attention", False] = "wrong now"
        assert hopper.wrong_here("decode_attention", False) is None and hopper.disagreement("decode_attention", False) == "wrong now"
        assert [ask("decode_attention", False) for _ in range(2)] == [1, 1]  # that it was right once is forgotten
        with monkeypatch.context() as patch:  # as after an illegal address
            patch.setattr(hopper, "usable", lambda: False)
            with pytest.raises(hopper.GpuLost, match="the decode_attention kernels left this NVIDIA H100 80GB HBM3 unusable for this process: they need wrong now;"):
                hopper.disagreement("decode_attention", False)
            assert "does without them" in caplog.records[-1].message  # before anything waits for the GPU
            looked.clear()
            hopper.wrong_here.cache_clear()
            with pytest.raises(hopper.GpuLost, match="unusable for this process"):  # as long as it lasts
                hopper.wrong_here("expert_matmul", False)
            hopper._lost.clear()  # as in another process
            assert "without " in hopper.wrong_here("decode_attention", False) and not looked
        found["decode_attention", False] = "wrong again"
        assert hopper.disagreement("decode_attention", False) == "wrong again" and [ask("decode_attention", False) for _ in range(2)] == [1, 1]
        del found["decode_attention", False]
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # where nothing can be kept
        assert [ask("decode_attention", False) for _ in range(2)] == [1, 1]
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(pathlib.Path, "home", no_home)
        assert ask("decode_attention", False) == 1
    finally:
        hopper.wrong_here.cache_clear()


def test_named_it_says_what_is_missing(monkeypatch):
    weight, x, sizes = packed(2, 64, 64), jnp.ones((4, 64), jnp.bfloat16), jnp.full(2, 2, jnp.int32)
    bias = jnp.zeros((2, 64))
    if jax.__version_info__ < hopper.OLDEST_JAX:
        with pytest.raises(ValueError, match="'mosaic_gpu' needs jax 0.11.2 or newer"):
            op.expert_matmul(x, weight, bias, sizes, implementation="mosaic_gpu")
        return
    for arguments, message in (((x, weight), r"a Hopper GPU \(found cpu\)"), ((x.astype(jnp.float32), weight), r"rows in bfloat16 \(found float32\)"),
                               ((x, jnp.ones((2, 64, 64))), r"a packed weight \(found a dense one, float32\)"),
                               ((x, packed(2, 32, 64)), r"dims that divide by 64 \(found 32 outputs"),
                               ((x, hopper_layout.pack(weight, HopperGateUpWeight)), "a HopperWeight")):
        with pytest.raises(ValueError, match=f"expert_matmul implementation 'mosaic_gpu' needs {message}"):
            op.expert_matmul(*arguments, bias[:, : hopper_layout.dims(arguments[1])[1]], sizes, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=r"expert_mlp implementation 'mosaic_gpu' needs a Hopper GPU \(found cpu\)"):
        op.expert_mlp(*arranged(mlp_arguments(3)), limit=7.0, alpha=1.702, implementation="mosaic_gpu")
    monkeypatch.setattr(hopper, "device_unmet", lambda op: None)
    with pytest.raises(ValueError, match="expert_mlp implementation 'mosaic_gpu' needs a HopperGateUpWeight and a HopperWeight"):
        op.expert_mlp(*mlp_arguments(3), limit=7.0, alpha=1.702, implementation="mosaic_gpu")


@needs_new_jax
def test_compiled_for_hopper_it_spills_nothing_and_decodes_cheaply(tmp_path):
    if missing := hopper_compile.missing():
        pytest.skip(f"not installed: {', '.join(missing)}")
    root = pathlib.Path(__file__).parents[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, hopper_compile.__file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == sum(map(len, (hopper_compile.CASES, hopper_compile.LONE_CASES, hopper_compile.STORED_CASES, hopper_compile.DECODE_CASES,
                                         hopper_compile.ROUTINGS, hopper_compile.PRODUCTS, hopper_compile.BLOCKS)))
    for report in reports:
        assert report["spilled_bytes"] == 0 and not report["warned"], report
        if report["op"] == "decode_attention":
            # Two blocks fit a multiprocessor. 16 HGMMA a tile of 128 keys; 393 instructions when written, which take a quarter of its bytes' time.
            assert report["products"] == 16 and 0 < report["shared_bytes"] <= 113_000 and report["registers_each"] <= 128 and report["loop"] <= 420, report
            assert report["loops"] == (report["slots"] > 128), report
            assert report["alias"] == report["cache"] and report["temp"] < 1.5e6, report  # written where it lies
            continue
        if report["op"] == "routing":
            assert 0 < report["shared_bytes"] <= 232448, report
            continue
        if report["op"] == "product":
            # 165 to 206 instructions a step of 3 or 4 groups of inputs when written.
            assert report["products"] == 4 * report["groups"] and 0 < report["shared_bytes"] <= 232448 and 0 < report["loop"] <= 215, report
            assert report["registers_each"] * 128 * 4 <= 65536, report
            continue
        if report["op"] == "block":
            # Most of the output's weights are there, or on their way, while a few blocks attend: 12 or 8 of 16 steps.
            assert report["output"]["stages"] == (12 if report["slots"] <= 128 else 8) and 0 < report["shared_bytes"] <= 232448, report
            assert report["products"] == 32 and report["registers_each"] * 128 * 4 <= 65536, report
            continue
        if report["op"] == "stored":
            # A loop over two steps for each height. 3.94 to 4.23 instructions a weight when written: of a product with 152 rows, which takes twice their time.
            assert report["loops"] == len(report["heights"]) and report["shared_bytes"] <= 232448 and 0 < report["instructions_per_weight"] <= 4.3, report
            continue
        lone = report["op"] == "lone"
        # For each height, or both products, a loop over a step of three groups, or over two steps of one and an odd one behind it.
        assert report["loops"] == (2 if lone else len(report["heights"])) and report["products"] == 4 * report["loops"] * (report["groups"] if lone else 3), report
        assert 0 < report["shared_bytes"] <= 232448 and report["registers_each"] * 128 * (report["warpgroups"] + 1 + lone) <= 65536, report
        # 2.62 (2.36 of a single token's experts) and 3.08 when written: everything in a loop, over the weights it decodes.
        assert 0 < report["instructions_per_weight"] <= ({3: 2.45, 1: 3.1} if lone else {3: 2.75, 1: 3.2})[report["groups"]], report
