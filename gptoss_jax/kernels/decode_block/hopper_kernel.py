"""A lone row's attention and its output for NVIDIA Hopper GPUs in one Pallas Mosaic GPU kernel.

The first blocks attend, each for a key-value head. The others, `decode_matmul`'s, fetch the output's weights meanwhile, wait for what those count up,
and multiply. Who waits does so for earlier blocks, so not all need to run at the same time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gptoss_jax.kernels.decode_attention import hopper_kernel as attention
from gptoss_jax.kernels.decode_matmul import hopper_kernel as product
from gptoss_jax.kernels.expert_matmul.hopper_instructions import Interpreted, Mosaic
from gptoss_jax.kernels.hopper import SMS

_MOST_STAGES = 2  # of keys and values, as the weights' ring is in the same shared memory


def plans(slots: int, kv_heads: int, outputs: int, inputs: int, experts: int):
    """Return the plans of the attention, whose keys may be split, and of the output, None where there is none."""
    attending = attention.plan(1, slots, kv_heads)
    attending = attending._replace(stages=min(attending.stages, _MOST_STAGES))
    taken = 4 * attention.WIDTH * (attending.stages * attention.TILE + 4 * attention.HEADS)  # tiles of keys and values; queries and weights
    return attending, product.plan(1, outputs, inputs, experts=experts, taken=taken, blocks=SMS - kv_heads)


@functools.partial(jax.jit, static_argnames=("plans", "ring", "epsilon"))  # so that a kernel is made once for all layers
def attend_and_multiply(qkv_1J, bias_J, cosine_1R, sine_1R, keys_1SKH, values_1SKH, sinks_KG, positions_1, output_DI, output_bias_D, residual_1D,
                        next_scale_D, router_ED, counter, *, plans, ring: bool, epsilon: float):
    """Run the kernel: what `decode_attention` and `decode_matmul_scored` take, and zero, int32 [1].

    Returns (residual + output [1, D], the early scores' rows and parts, new keys, new values).
    """
    attending, multiplying = plans
    ops = Interpreted if attending.interpret else Mosaic

    def attend(head, inputs, row, scratch):
        y, _, _ = attention.of_head((head * 0, head, head * 0), inputs, scratch, attending, ring=ring)
        ops.store(row.at[pl.ds(head * attention.HEADS, attention.HEADS)], y.astype(jnp.bfloat16), plgpu.Layout.WGMMA)
        plgpu.wait_smem_to_gmem(0)

    cache = jax.new_ref(keys_1SKH), jax.new_ref(values_1SKH)
    inputs = attention.inputs_of_heads(qkv_1J, bias_J, cosine_1R, sine_1R, sinks_KG, positions_1, *cache)
    first = product.First(keys_1SKH.shape[2], inputs, jax.new_ref(counter), attention.scratch_types(attending), attend)
    found = product.run(None, None, None, output_DI, output_bias_D, multiplying, epsilon=epsilon, dtype=jnp.dtype(jnp.bfloat16),
                        after=(residual_1D, next_scale_D, router_ED), first=first)
    return *found, *(ref[...] for ref in cache)
