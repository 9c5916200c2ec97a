"""The Hopper kernels as they are compiled, run by their PTX: the order of registers in wgmma, hand-made layouts, TMA, barriers."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import ptx_machine
import pytest
from test_decode_attention import CASES, arguments
from test_decode_matmul import CASES as PRODUCTS
from test_decode_matmul import SCORED, check_scored, planned, run_scored
from test_decode_matmul import arguments as product_arguments
from test_decode_matmul import check as check_product
from test_hopper_routing import check_places

from gptoss_jax import mxfp4
from gptoss_jax.config import GptOssConfig
from gptoss_jax.inference import measure
from gptoss_jax.kernels import hopper
from gptoss_jax.kernels.decode_attention import mosaic_gpu as decode_kernel
from gptoss_jax.kernels.decode_attention import reference as decode_reference
from gptoss_jax.kernels.expert_matmul import HopperGateUpWeight, HopperWeight, Router, expert_mlp, hopper_layout, mosaic_gpu, reference
from gptoss_jax.kernels.expert_matmul.reference import EarlyScores, Mxfp4Weight
from gptoss_jax.model import GptOss, arrangement, make_cache

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None,
                              reason="no jax-cuda13-plugin and jax-cuda13-pjrt: pip install --no-deps both in JAX's version (no GPU needed)")
asynchronous = pytest.mark.parametrize("late", [False, True, "readers", "writers"], ids=["early", "late", "readers late", "writers last"])
WAIT = """.entry kernel(
	.param .u64 kernel_param_0
)
{
	mov.u32 %r1, %tid.x;
	setp.eq.b32 %p1, %r1, 0;
	mov.b32 %r2, 1024;
	mov.b32 %r3, 64;
	@%p1 mbarrier.init.shared::cta.b64 [%r2], %r3;
	bar.sync 0;
	setp.lt.u32 %p2, %r1, ARRIVING;
	@%p2 mbarrier.arrive.release.cta.shared::cta.b64 _, [%r2], 1;
	mov.b32 %r4, 0;
	{
	LAB_WAIT:
	mbarrier.try_wait.parity.shared.b64 P1, [%r2], %r4;
	@P1 bra.uni DONE;
	bra.uni LAB_WAIT;
	DONE:
	}
	ld.param.b64 %rd1, [kernel_param_0];
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
	st.global.b32 [%rd3], %r1;
	ret;
}
"""
COPY = """.entry kernel(
	.param .u64 kernel_param_0
)
{
	mov.u32 %r1, %tid.x;
	setp.eq.b32 %p1, %r1, 0;
	shl.b32 %r2, %r1, 2;
	st.shared.b32 [%r2], %r1;
	FENCE
	bar.sync 0;
	ld.param.b64 %rd1, [kernel_param_0];
	mov.b32 %r3, 0;
	@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r3], 256;
	@%p1 cp.async.bulk.commit_group;
	@%p1 cp.async.bulk.wait_group 0;
	ret;
}
"""
APART = """.entry kernel(
	.param .u64 kernel_param_0
)
{
	mov.u32 %r1, %tid.x;
	mov.b32 %r2, 0;
	setp.eq.b32 %p1, %r1, 0;
	@%p1 bra $FIRST;
$MEET:
	bar.sync 0;
	@%p1 bra $SECOND;
	add.u32 %r2, %r2, 1;
$MEET_AGAIN:
	bar.sync 0;
	ld.param.b64 %rd1, [kernel_param_0];
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
	st.global.b32 [%rd3], %r2;
	ret;
$FIRST:
	add.u32 %r2, %r2, 1;
	bra $MEET;
$SECOND:
	add.u32 %r2, %r2, 1;
	bra $MEET_AGAIN;
}
"""


def test_lanes_that_went_apart_meet_at_each_barrier():
    out = np.zeros(64, np.int32)
    ptx_machine.run_together([ptx_machine.Machine(ptx_machine.Program(APART), ptx_machine.Launch((1, 1, 1), 64, (0,), {}), [out], (0, 0, 0), late=False)])
    np.testing.assert_array_equal(out, [2] + [1] * 63)


def test_threads_that_wait_for_too_few_are_found_out():
    launch = ptx_machine.Launch((1, 1, 1), 64, (0,), {})
    out = np.zeros(64, np.int32)
    ptx_machine.run_together([ptx_machine.Machine(ptx_machine.Program(WAIT.replace("ARRIVING", "64")), launch, [out], (0, 0, 0), late=False)])
    np.testing.assert_array_equal(out, np.arange(64))
    with pytest.raises(ptx_machine.Deadlock, match="try_wait"):
        ptx_machine.run_together([ptx_machine.Machine(ptx_machine.Program(WAIT.replace("ARRIVING", "63")), launch, [out], (0, 0, 0), late=False)])


@asynchronous
@pytest.mark.parametrize("fence", ["fence.proxy.async.shared::cta;", "@%p1 fence.proxy.async.shared::cta;", ""], ids=["all", "one", "none"])
def test_stored_numbers_that_a_thread_has_not_fenced_before_they_are_copied_are_found_out(fence, late):
    out = np.zeros(64, np.int32)
    machine = ptx_machine.Machine(ptx_machine.Program(COPY.replace("FENCE", fence)), ptx_machine.Launch((1, 1, 1), 64, (0,), {}), [out], (0, 0, 0), late=late)
    if fence.startswith("fence"):
        ptx_machine.run_together([machine])
        np.testing.assert_array_equal(out, np.arange(64))
    else:
        with pytest.raises(AssertionError, match="not fenced"):
            ptx_machine.run_together([machine])


@needs_compiler
def test_shared_memory_given_back_before_the_product_that_reads_it_is_done_is_found_out(monkeypatch):
    """Where products and copies are both late, or both early, nothing is overwritten."""
    from hopper_machine import on_machine

    from gptoss_jax.kernels.expert_matmul import hopper_kernel, hopper_stored

    class Late(hopper_stored.Mosaic):
        finish = staticmethod(lambda but=0: None)

    def too_early(length, ring, plan, ops, load, multiply, give_back, decode):
        def give_back_and_wait(slot):
            give_back(slot)
            ops.finish(but=1)

        return hopper_kernel.multiply_steps(length, ring, plan, Late, load, multiply, give_back_and_wait, decode)

    random = np.random.default_rng(0)
    weight = Mxfp4Weight(random.integers(0, 256, (1, 64, 36, 16), np.uint8), random.integers(118, 123, (1, 64, 36), np.uint8))
    x, bias, sizes = jnp.asarray(random.standard_normal((8, 1152)), jnp.bfloat16), jnp.zeros((1, 64)), jnp.full(1, 8, jnp.int32)
    expected = np.asarray(reference.expert_matmul(x.astype(jnp.float32), weight, bias, sizes))
    stored = hopper_stored.stored(Mxfp4Weight(*map(jnp.asarray, weight)))
    plan = hopper_stored.plan(8, stored, transposed=False)._replace(blocks=1)
    wrong = []
    for steps in (hopper_kernel.multiply_steps, too_early):
        monkeypatch.setattr(hopper_stored, "multiply_steps", steps)
        with on_machine(late="readers"):
            found = hopper_stored.matmul(x, stored, hopper_kernel.tiles(sizes, 8, plan.rows), plan)
        wrong.append(float(np.abs(np.asarray(found, np.float32) - expected).max() / expected.std()))
    assert wrong[0] < 2**-6 and not wrong[1] < 0.1


@needs_compiler
@asynchronous
@pytest.mark.parametrize("kind,outputs,inputs,sizes", [
    (HopperGateUpWeight, 128, 192, (5, 0, 9)), (HopperWeight, 128, 576, (5, 0, 9)),  # the second sums in parts
    (HopperWeight, 64, 64, (0, 137)), (HopperGateUpWeight, 192, 320, (1, 0, 130, 3, 7)),  # 7 rows are nobody's
    (HopperGateUpWeight, 64, 704, (2, 161)),  # more steps than the ring has stages, tiles of both heights
])
def test_the_expert_matmul(kind, outputs, inputs, sizes, late, monkeypatch):
    from hopper_machine import on_machine

    monkeypatch.setattr(mosaic_gpu, "interpreted", lambda plan, interpret: plan._replace(blocks=3))
    random, experts = np.random.default_rng(0), min(len(sizes), 4)
    weight = Mxfp4Weight(random.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8),
                         random.integers(118, 123, (experts, outputs, inputs // 32), np.uint8))
    x = np.asarray(random.standard_normal((sum(sizes), inputs)), jnp.bfloat16)
    rest = np.asarray(random.standard_normal((experts, outputs)), jnp.bfloat16), np.asarray(sizes[:experts], np.int32)
    constants = dict(limit=7.0, alpha=1.702) if kind is HopperGateUpWeight else {}
    expected = np.asarray(reference.expert_matmul(x.astype(np.float32), weight, *rest))
    if constants:
        expected = np.asarray(reference.swiglu(expected, **constants))
    with on_machine(late=late) as ran:
        found = mosaic_gpu.run(jnp.asarray(x), hopper_layout.pack(weight, kind), *map(jnp.asarray, rest), **constants)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=2**-8, atol=2**-8 * expected.std())
    assert any(name.startswith("wgmma.mma_async") for name in ran[0])


@needs_compiler
@asynchronous
@pytest.mark.parametrize("outputs,inputs,sizes,adapter,transposed", [
    (192, 128, (8, 0, 16, 8), True, False), (192, 192, (8, 0, 16, 8), True, True), (64, 704, (8, 168), False, False),  # 8 rows are nobody's
    (704, 64, (8, 168), True, True), (320, 64, (0, 24), True, False), (64, 320, (24, 0), False, True),  # tiles of both heights, many steps; one and few
    (192, 448, (56, 72), True, False),  # a ring of five stages
])
def test_products_with_weights_as_they_are_stored(outputs, inputs, sizes, adapter, transposed, late):
    from hopper_machine import on_machine

    from gptoss_jax.kernels.expert_matmul import hopper_kernel, hopper_stored

    random, experts, rows = np.random.default_rng(0), min(len(sizes), 3), sum(sizes)
    weight = Mxfp4Weight(random.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8),
                         random.integers(118, 123, (experts, outputs, inputs // 32), np.uint8))
    width, columns = (outputs, inputs) if transposed else (inputs, outputs)
    x, low_x, low, bias = (np.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in (
        (rows, width), (rows, 64), (experts, 64, columns), (experts, columns)))
    sizes = np.asarray(sizes[:experts], np.int32)
    expected = np.asarray(reference.expert_matmul(x.astype(np.float32), mxfp4.decode(*weight) if transposed else weight, bias, sizes))
    if adapter:
        expected = expected + reference.expert_matmul(low_x.astype(np.float32), low.astype(np.float32), np.zeros_like(bias), sizes)
    stored = hopper_stored.stored(Mxfp4Weight(*map(jnp.asarray, weight)))
    plan = hopper_stored.plan(rows, stored, transposed=transposed)._replace(blocks=3)
    arguments = jnp.asarray(x), stored, hopper_kernel.tiles(jnp.asarray(sizes), rows, plan.rows), plan, jnp.asarray(bias)
    with on_machine(late=late) as ran:
        found = hopper_stored.matmul(*arguments, tuple(map(jnp.asarray, (low_x, low.swapaxes(1, 2) if transposed else low))) if adapter else None,
                                     transposed=transposed)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=2**-8, atol=2**-8 * expected.std())
    assert ran[0]["prmt.b32"] and any(name.startswith("wgmma.mma_async") for name in ran[0])


def experts_on_machine(tokens, monkeypatch, *, late, blocks=3, width=192, hidden=64, first=0, count=4, stages=32):
    """Return what the experts of some tokens come to in the simulator and by the reference, and which operations each kernel ran."""
    from hopper_machine import on_machine

    from gptoss_jax.kernels.expert_matmul import hopper_one_token

    monkeypatch.setattr(hopper_one_token, "_MOST_STAGES", stages)
    monkeypatch.setattr(mosaic_gpu, "interpreted", lambda plan, interpret: plan._replace(blocks=blocks))
    monkeypatch.setattr(hopper, "processors", lambda: blocks)
    random, E = np.random.default_rng(0), 8
    weights = [Mxfp4Weight(random.integers(0, 256, (E, out, inputs // 32, 16), np.uint8), random.integers(119, 122, (E, out, inputs // 32), np.uint8))
               for out, inputs in ((2 * hidden, width), (width, hidden))]
    biases = [jnp.asarray(random.standard_normal((E, out)), jnp.bfloat16) for out in (2 * hidden, width)]
    x = np.asarray(random.standard_normal((tokens, width)), jnp.bfloat16)
    scores = random.standard_normal((tokens, 16 if first else E)).astype(np.float32)
    top, expert = jax.lax.top_k(scores, count)
    weight, here = jax.nn.softmax(top, axis=-1), jnp.where((expert >= first) & (expert < first + E), expert - first, E)
    (gate_up, down), constants = weights, dict(limit=7.0, alpha=1.702)
    expected = np.asarray(expert_mlp(x.astype(np.float32), here, weight, gate_up, biases[0], down, biases[1], **constants, implementation="reference"))
    arranged = [hopper_layout.pack(part, kind) for part, kind in zip(weights, (HopperGateUpWeight, HopperWeight))]
    router = Router(jnp.asarray(scores), jnp.zeros(scores.shape[1]), None, jnp.full(1, first, jnp.int32))
    with on_machine(late=late) as ran:
        found = mosaic_gpu.expert_mlp(jnp.asarray(x), here, weight, arranged[0], biases[0], arranged[1], biases[1], router, **constants)
    return np.asarray(found), expected, ran


@needs_compiler
@asynchronous
@pytest.mark.parametrize("tokens, first", [(3, 0), (8, 0), (17, 0), (40, 4)])
def test_the_experts_of_tokens_that_a_kernel_routes(tokens, first, late, monkeypatch):
    """Gathered or, where all tokens fit a tile, shared by all tiles: fewer rows than a TMA copy takes, too. Of more than 32 into tiles of two heights."""
    found, expected, ran = experts_on_machine(tokens, monkeypatch, late=late, first=first)
    np.testing.assert_allclose(found, expected, rtol=2**-6, atol=2**-6 * expected.std())
    assert len(ran) == 3


@needs_compiler
@asynchronous
@pytest.mark.parametrize("sizes", [{}, dict(blocks=5, width=576, hidden=576, count=1), dict(blocks=3, width=128, hidden=704, count=2, stages=3),
                                   dict(blocks=1, width=64, hidden=128, count=1), dict(blocks=40, width=128, hidden=256, count=3)],
                         ids=["few blocks", "warpgroups of three groups", "more steps than stages", "one block", "more blocks than units"])
@pytest.mark.parametrize("first", [0, 4, 40], ids=["all here", "some here", "none here"])
def test_the_experts_of_one_token(sizes, first, late, monkeypatch):
    """By one kernel, whose blocks wait for each other, however many there are, and with some of the token's experts elsewhere. In one block the second
    product begins while the first's last unit waits for the next step's weights."""
    found, expected, ran = experts_on_machine(1, monkeypatch, late=late, first=first, **sizes)
    np.testing.assert_allclose(found, expected, rtol=2**-6, atol=2**-6 * expected.std())
    assert len(ran) == 2 and (expected.any() or first)


@needs_compiler
@pytest.mark.parametrize("late", [True, "writers"], ids=["late", "writers last"])
def test_the_experts_of_one_token_where_sums_wait_for_who_stores_them(late, monkeypatch):
    """More units of a block than there are buffers for their sums, and more steps of a unit than stages."""
    found, expected, _ = experts_on_machine(1, monkeypatch, late=late, blocks=2, width=128, hidden=704, count=1, stages=3)
    np.testing.assert_allclose(found, expected, rtol=2**-6, atol=2**-6 * expected.std())


@needs_compiler
@pytest.mark.parametrize("lacking", ["barrier", "wait", "fence"])
def test_blocks_that_do_not_wait_for_each_other_as_they_should_are_found_out(lacking, monkeypatch):
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from gptoss_jax.kernels.expert_matmul.hopper_instructions import Mosaic

    def of_counter(emit):
        return lambda counter, *_: plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(lambda _, ref: emit(utils.SemaphoreRef(utils.memref_ptr(ref))))(counter)

    if lacking == "barrier":  # between what a warpgroup's threads store and the one of them that counts
        monkeypatch.setattr(Mosaic, "count", of_counter(lambda counter: counter.signal(1, memory_scope="gpu")))
    else:  # for the last that is counted, or what fences copies
        await_count, number = Mosaic.await_count, 6 - (lacking == "wait")
        unfenced = of_counter(lambda counter: counter.wait(number, decrement=False, memory_scope="gpu"))
        monkeypatch.setattr(Mosaic, "await_count", unfenced if lacking == "fence" else lambda counter, *_: await_count(counter, number))

    def run():
        return experts_on_machine(1, monkeypatch, late=lacking == "barrier", blocks=24, width=192, hidden=192)

    if lacking == "fence":
        with pytest.raises(AssertionError, match="stored and not fenced"):
            run()
    else:
        found, expected, _ = run()
        assert not np.allclose(found, expected, rtol=2**-6, atol=2**-6 * expected.std())


@needs_compiler
@asynchronous
@pytest.mark.parametrize("tokens,experts,rows", [(1, 128, 8), (5, 32, 8), (17, 32, 8), (40, 128, 16), (160, 32, 48)])
def test_routing(tokens, experts, rows, late):
    """Many logits are equal; every third token isn't real."""
    from hopper_machine import on_machine

    from gptoss_jax.kernels.expert_matmul import hopper_routing

    random = np.random.default_rng(0)
    scores, bias = np.round(2 * random.standard_normal((tokens, experts))).astype(np.float32), np.arange(experts) % 2
    real = np.arange(tokens) % 3 != 2
    with on_machine(late=late):
        found = hopper_routing.route(jnp.asarray(scores), jnp.asarray(bias, jnp.bfloat16), jnp.asarray(real), jnp.zeros(1, jnp.int32), count=4,
                                     experts=experts, rows=rows)
    top, expert = jax.lax.top_k(scores + bias, 4)
    np.testing.assert_array_equal(found.expert.T, expert)
    np.testing.assert_allclose(found.weight.T, jax.nn.softmax(top, axis=-1), rtol=1e-5)
    check_places(found, np.where(real[:, None], expert, -1), experts, rows)


@needs_compiler
@asynchronous
@pytest.mark.parametrize("case", CASES, ids=CASES)
def test_decode_attention(case, late):
    from hopper_machine import on_machine

    S, K, G, ring, positions, splits, sinks = CASES[case]
    arrays = arguments(S, K, G, positions, sinks)
    expected = [np.asarray(x, np.float32) for x in decode_reference.decode_attention(*arrays, ring=ring)]
    with on_machine(late=late) as ran:
        found = decode_kernel.run(*map(jnp.asarray, arrays), ring=ring, splits=splits)
    out, keys, values = (np.asarray(x, np.float32) for x in found)
    np.testing.assert_allclose(out, expected[0].reshape(out.shape), rtol=2**-7, atol=2**-8)
    np.testing.assert_array_equal(keys, expected[1])
    np.testing.assert_array_equal(values, expected[2])
    assert any(name.startswith("wgmma.mma_async") for name in ran[0])


@needs_compiler
@asynchronous
@pytest.mark.parametrize("case", PRODUCTS, ids=PRODUCTS)
def test_decode_products(case, late):
    from hopper_machine import on_machine

    from gptoss_jax.kernels.decode_matmul import hopper_kernel

    *sizes, groups, stages = PRODUCTS[case]
    arrays, dtype = product_arguments(*sizes), jnp.bfloat16 if "bias" in sizes[-1] else jnp.float32
    with on_machine(late=late) as ran:
        found = hopper_kernel.matmul(*arrays, planned(*sizes, groups, stages), epsilon=1e-5, dtype=jnp.dtype(dtype))
    check_product(found, arrays, dtype)
    assert any(name.startswith("wgmma.mma_async") for name in ran[0])


@needs_compiler
@asynchronous
@pytest.mark.parametrize("case", SCORED, ids=SCORED)
def test_decode_products_with_scores(case, late):
    from hopper_machine import on_machine

    _, outputs, each, *_ = SCORED[case]
    with on_machine(late=late):
        arrays, found = run_scored(*SCORED[case])
    check_scored(arrays, found, outputs // each)


@needs_compiler
@pytest.mark.parametrize("case,late", [((64, 1, 32, 16, True, 37), False), ((64, 1, 32, 16, True, 37), "readers"), ((192, 2, 32, 272, False, 130), True),
                                       ((192, 2, 32, 272, False, 130), "writers"), ((64, 2, 32, 16, True, -1), True)],
                         ids=["a ring gone round, early", "a ring gone round, late readers", "several tiles, late", "several tiles, writers last",
                              "nobody's row, late"])
def test_a_lone_rows_attention_and_its_output(case, late):
    """The output's blocks wait for those that attend, before them."""
    D, K, E, S, ring, position = case
    found, expected, ran = block_on_machine(D, K, E, S, position, ring=ring, late=late)
    for ours, right in zip(found, expected):
        np.testing.assert_allclose(ours, right, rtol=2**-6, atol=2**-6 * right.std())
    assert len(ran) == 1


def block_on_machine(D, K, E, S, position, *, ring, late):
    """Return the arrays of a `decode_block` but for q, k and v in the simulator and all by the reference, and which operations ran."""
    from hopper_machine import on_machine

    from gptoss_jax.kernels.decode_block import hopper_check, hopper_kernel
    from gptoss_jax.kernels.decode_block import reference as block_reference
    from gptoss_jax.kernels.decode_matmul.reference import decode_matmul

    x, scale, weight, *others = arrays = [jnp.asarray(array) for array in hopper_check.arguments(D, K, E, S, position)]

    def flat(summed, rows, scores, *cache):
        return [np.asarray(array, np.float32) for array in (summed, rows, scores, *cache)]

    summed, early, *cache = block_reference.decode_block(*arrays, ring=ring, epsilon=1e-5)
    qkv, _, _ = decode_matmul(x, None, scale, weight, None, epsilon=1e-5, dtype=jnp.float32)
    plans = hopper_kernel.plans(S, K, D, K * 8 * 64, E)
    with on_machine(late=late) as ran:
        found = hopper_kernel.attend_and_multiply(qkv, *others[:-3], others[-3], x, *others[-2:], jnp.zeros(1, jnp.int32), plans=plans, ring=ring, epsilon=1e-5)
    return flat(*found[:2], EarlyScores(*found[1:3]).scores(), *found[3:]), flat(summed, early.rows, early.scores(), *cache), ran


@needs_compiler
@pytest.mark.parametrize("lacking", ["wait", "fence"])
def test_an_output_that_does_not_wait_for_its_row_is_found_out(lacking, monkeypatch):
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from gptoss_jax.kernels.expert_matmul.hopper_instructions import Mosaic

    def unfenced(counter, number, *_):
        wait = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        wait(lambda _, ref: utils.SemaphoreRef(utils.memref_ptr(ref)).wait(number, decrement=False, memory_scope="gpu"))(counter)

    monkeypatch.setattr(Mosaic, "await_count", unfenced if lacking == "fence" else lambda *_: None)
    if lacking == "fence":
        with pytest.raises(AssertionError, match="stored and not fenced"):
            block_on_machine(64, 1, 32, 16, 37, ring=True, late=False)
    else:
        found, expected, _ = block_on_machine(64, 1, 32, 16, 37, ring=True, late=False)
        assert not np.allclose(found[0], expected[0], rtol=2**-6, atol=2**-6 * expected[0].std())


@needs_compiler
@pytest.mark.parametrize("late", [False, True, "writers"], ids=["early", "late", "writers last"])
def test_a_single_rows_decode_step(late, monkeypatch):
    """Four kernels a layer, each fed by the one before: what the several ops of another device make of it, but for roundings at other places."""
    from hopper_machine import on_machine

    monkeypatch.setattr(hopper, "processors", lambda: 3)
    config = GptOssConfig(vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_local_experts=32, num_experts_per_tok=4,
                          num_attention_heads=8, num_key_value_heads=1, head_dim=64, sliding_window=8, max_position_embeddings=64)
    apart, joined = (GptOss(config, measure.random_weights(config)) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(arrangement, "_gpus_of", lambda array: sorted(array.sharding.device_set, key=lambda device: device.id))
        patch.setattr(hopper, "device_unmet", lambda op, device=None: None)
        joined.arrange()
    _, cache = apart(jnp.arange(11)[None], cache=make_cache(config, 1, 16))
    expected, _ = apart(jnp.full((1, 1), 11), cache=cache)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, default, **kernels: kernels.get("cuda", default)(*arrays))
    with on_machine(late=late) as ran:
        found, _ = joined(jnp.full((1, 1), 11), cache=cache)
    assert len(ran) == 8
    np.testing.assert_allclose(found, expected, atol=2**-5 * float(expected.std()))
