"""The Hopper kernels as they are compiled, run by their PTX: the order of registers in wgmma, hand-made layouts, TMA, barriers."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import ptx_machine
import pytest

from gptoss_jax.kernels.expert_matmul import HopperGateUpWeight, HopperWeight, hopper_layout, mosaic_gpu, reference
from gptoss_jax.kernels.expert_matmul.reference import Mxfp4Weight

compiled = pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None,
                              reason="no jax-cuda13-plugin and jax-cuda13-pjrt: pip install --no-deps both in JAX's version (no GPU needed)")
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


def test_threads_that_wait_for_too_few_are_found_out():
    launch = ptx_machine.Launch((1, 1, 1), 64, (0,), {})
    out = np.zeros(64, np.int32)
    ptx_machine.Machine(ptx_machine.Program(WAIT.replace("ARRIVING", "64")), launch, [out], (0, 0, 0), late=False).run()
    np.testing.assert_array_equal(out, np.arange(64))
    with pytest.raises(ptx_machine.Deadlock, match="try_wait"):
        ptx_machine.Machine(ptx_machine.Program(WAIT.replace("ARRIVING", "63")), launch, [out], (0, 0, 0), late=False).run()


@compiled
@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("kind,outputs,inputs,sizes", [
    (HopperGateUpWeight, 128, 192, (5, 0, 9)), (HopperWeight, 128, 576, (5, 0, 9)),  # the second sums in parts
    (HopperWeight, 64, 64, (0, 137)), (HopperGateUpWeight, 192, 320, (1, 0, 130, 3, 7)),  # 7 rows are nobody's
])
def test_the_expert_matmul(kind, outputs, inputs, sizes, late, monkeypatch):
    from hopper_machine import on_machine

    from gptoss_jax.kernels.expert_matmul import hopper_kernel

    monkeypatch.setattr(mosaic_gpu, "_plan", lambda slots, weight, interpret, rows=None: hopper_kernel.plan(slots, weight, rows)._replace(blocks=3))
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
        found = mosaic_gpu.run(jnp.asarray(x), hopper_layout.pack(weight, kind), *map(jnp.asarray, rest), kind, **constants)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=2**-8, atol=2**-8 * expected.std())
    assert any(name.startswith("wgmma.mma_async") for name in ran[0])
