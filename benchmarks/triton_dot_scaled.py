"""A plain Triton kernel over packed MXFP4 weights, the rival of our own: tl.dot_scaled does the decoding."""

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(x, blocks, scales, chosen, out, O, I: tl.constexpr, R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    slot, tile = tl.program_id(0), tl.program_id(1)
    expert = tl.load(chosen + slot)
    rows, outs = tl.arange(0, R), tile * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((R, BLOCK_O), tl.float32)
    for start in range(0, I, BLOCK_I):
        inputs, packed, group = start + tl.arange(0, BLOCK_I), start // 2 + tl.arange(0, BLOCK_I // 2), start // 32 + tl.arange(0, BLOCK_I // 32)
        x_tile = tl.load(x + (slot * R + rows[:, None]) * I + inputs[None, :])
        w_tile = tl.load(blocks + (expert * O + outs[None, :]) * (I // 2) + packed[:, None])
        s_tile = tl.load(scales + (expert * O + outs[:, None]) * (I // 32) + group[None, :])
        total = tl.dot_scaled(x_tile, None, "bf16", w_tile, s_tile, "e2m1", total)
    tl.store(out + (slot * R + rows[:, None]) * O + outs[None, :], total.to(tl.bfloat16))


def mxfp4_matmul(x, blocks, scales, chosen):
    """Multiply x [slots, rows, in] by the matrix of each slot's chosen expert: blocks uint8 [E, out, in / 2], scales uint8 [E, out, in / 32]."""
    slots, rows, inputs = x.shape
    out = torch.empty(slots, rows, blocks.shape[1], dtype=torch.bfloat16, device=x.device)
    _kernel[(slots, blocks.shape[1] // 64)](x, blocks, scales, chosen, out, blocks.shape[1], inputs, rows, BLOCK_O=64, BLOCK_I=64, num_warps=4)
    return out
