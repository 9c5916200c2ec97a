"""Expert matmul for NVIDIA Hopper GPUs in Pallas Mosaic GPU: packed weights by TMA, decoded in registers, multiplied by wgmma.

The weights are wgmma's operand A, from registers, and the rows its N side, so that one kernel serves decode (8 rows of an expert) and prefill
(128). A persistent grid walks over units: a tile of at most N rows of one expert, times a block of outputs, times a part of the sum. One
warpgroup copies the next steps' words, scales and rows into a ring of stages, ahead of unit boundaries too; each of the others decodes and
multiplies 64 outputs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gptoss_jax.kernels.expert_matmul.hopper_layout import GROUP, HopperGateUpWeight, HopperWeight

ALIGNMENT = 8  # rows: TMA copies whole tiles of 8 rows by 64 inputs, wgmma's N is a multiple of it
SMS = 132  # of an H100 or H200 (SXM)
_SHARED_BYTES = 232448 - 4096  # of a block, less barriers and what the compiler takes
_MOST_STAGES = 8


class Plan(NamedTuple):
    """What is fixed when the kernel is compiled; the fields that `plan` doesn't set are for tests."""

    rows: int  # N: of a tile
    warpgroups: int  # that multiply: a block is this many times 64 outputs
    groups: int  # of 64 inputs, in a step
    stages: int
    splits: int = 1  # of the sum over inputs
    blocks: int = SMS  # of the grid
    interpret: object = None  # plgpu.InterpretGPUParams: what can't be interpreted is computed by jnp instead


def plan(num_rows: int, weight, *, splits: int = 1) -> Plan:
    """Choose tile, step and ring for `num_rows` rows over all experts."""
    E, outs, ins = weight.scales.shape[:3]
    rows = min(128, max(8, 1 << (2 * -(-num_rows // E) - 1).bit_length()))
    warpgroups = next(n for n in (3, 2, 1) if outs % n == 0)
    groups = next(n for n in (3, 2, 1) if ins % n == 0)
    stage = groups * (warpgroups * (2048 + 128) + rows * 2 * GROUP)
    stages = min(_MOST_STAGES, (_SHARED_BYTES - rows * warpgroups * GROUP * 4 // (2 if splits == 1 else 1)) // stage)
    return Plan(rows, warpgroups, groups, stages, splits)


def tiles(group_sizes_E, num_rows: int, rows: int):
    """Cut rows sorted by expert into tiles: int32 [3, T] of expert, first row, number of rows, the last two in ALIGNMENTs; int32 [1], how many.

    Group sizes and num_rows are multiples of ALIGNMENT. Rows past the groups' sum belong to expert E. T is the most tiles there can be.
    """
    E, most, height = group_sizes_E.shape[0], num_rows // ALIGNMENT, rows // ALIGNMENT
    sizes = jnp.append(group_sizes_E, num_rows - group_sizes_E.sum()).astype(jnp.int32) // ALIGNMENT
    row_end, tile_end = jnp.cumsum(sizes), jnp.cumsum(-(-sizes // height))
    tile = jnp.arange(most // height + min(E + 1, most), dtype=jnp.int32)
    expert = jnp.minimum((tile_end <= tile[:, None]).sum(axis=1, dtype=jnp.int32), E)
    first = row_end[expert] - sizes[expert] + (tile - tile_end[expert] + -(-sizes[expert] // height)) * height
    return jnp.stack([expert, first, jnp.clip(row_end[expert] - first, 0, height)]), tile_end[-1:]


def matmul(x_MI, weight: HopperWeight, bias_EO, group_sizes_E, plan: Plan):
    """Run the kernel: x bfloat16 [M, in], bias [E, out]. Returns [M, out] in bfloat16, or float32 [splits, M, out] to be summed."""
    M, I = x_MI.shape
    E, outs, ins = weight.scales.shape[:3]
    wgs, groups, N, stages, splits = plan.warpgroups, plan.groups, plan.rows, plan.stages, plan.splits
    steps, blocks, width = ins // groups, outs // wgs, wgs * GROUP
    out_dtype = jnp.bfloat16 if splits == 1 else jnp.float32
    ops = _Interpreted if plan.interpret else _Mosaic

    def body(table, count, x, words, scales, bias, out, x_smem, words_smem, scales_smem, out_smem, acc_smem, full, empty):
        me, block = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("block")
        units = count[0] * (blocks * splits)
        mine = jnp.maximum(0, (units - block + plan.blocks - 1) // plan.blocks)

        def unit(i):
            """Return (tile, block of outputs, part of the sum, its first step, its number of steps) of this block's i-th unit."""
            at = block + i * plan.blocks
            tile, part, column = at // (blocks * splits), at // blocks % splits, at % blocks
            begin, end = part * steps // splits, (part + 1) * steps // splits
            return tile, column, part, begin, jnp.where(table[0, tile] < E, end - begin, 0)

        @pl.when(me == wgs)
        def _copy():
            plgpu.set_max_registers(40, action="decrease")

            def copy_unit(i, done):
                tile, column, _, begin, length = unit(i)
                expert, first = table[0, tile], table[1, tile]

                def copy_step(step, _):
                    at = done + step
                    slot = jax.lax.rem(at, stages)

                    @pl.when(at >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    outputs, inputs = pl.ds(column * wgs, wgs), pl.ds((begin + step) * groups, groups)
                    plgpu.copy_gmem_to_smem(words.at[expert, outputs, inputs], words_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(scales.at[expert, outputs, inputs], scales_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(x.at[pl.ds(first * ALIGNMENT, N), pl.ds((begin + step) * groups * GROUP, groups * GROUP)],
                                            x_smem.at[slot], full.at[slot])
                    return _

                jax.lax.fori_loop(0, length, copy_step, None)
                return done + length

            jax.lax.fori_loop(0, mine, copy_unit, jnp.int32(0))

        @pl.when(me < wgs)
        def _multiply():
            plgpu.set_max_registers(160, action="increase")

            def compute_unit(i, done):
                tile, column, part, _, length = unit(i)
                expert, first, rows = table[0, tile], table[1, tile], table[2, tile]

                def accumulate(acc):
                    def step(step, _):
                        slot = jax.lax.rem(done + step, stages)
                        plgpu.barrier_wait(full.at[slot])
                        for group in range(groups):
                            decoded = _decode(words_smem[slot, me, group], scales_smem[slot, me, group], ops)
                            ops.multiply(acc, decoded, x_smem.at[slot, :, pl.ds(group * GROUP, GROUP)])
                        ops.finish()
                        plgpu.barrier_arrive(empty.at[slot])
                        return _

                    jax.lax.fori_loop(0, length, step, None)
                    return acc[...]

                product = ops.accumulator(accumulate, acc_smem, me, N)
                outputs = column * width + me * GROUP
                once = jnp.where((expert < E) & (part == 0), jnp.float32(1), jnp.float32(0))
                added = plgpu.load(bias.at[jnp.minimum(expert, E - 1), pl.ds(outputs, GROUP)], optimized=False).astype(jnp.float32) * once
                y = product + jax.lax.broadcast_in_dim(added, (GROUP, N), (0,))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem.at[me].T[...] = y.astype(out_dtype) if splits == 1 else plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()
                _store_rows(out_smem.at[me], out.at[part, :, pl.ds(outputs, GROUP)], first, rows, N)
                return done + length

            jax.lax.fori_loop(0, mine, compute_unit, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    run = plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct((splits, M, outs * GROUP), out_dtype),
        grid=(plan.blocks,), grid_names=("block",), num_threads=wgs + 1, thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((stages, N, groups * GROUP), jnp.bfloat16, transforms=swizzle),
            plgpu.SMEM((stages, wgs, groups, 4, 128), jnp.uint32),
            plgpu.SMEM((stages, wgs, groups, 32), jnp.uint32),
            plgpu.SMEM((wgs, N, GROUP), out_dtype),
            plgpu.SMEM((wgs, GROUP, N) if plan.interpret else (1, 8, 8), jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({"interpret": plan.interpret} if plan.interpret else {}))
    table, count = tiles(group_sizes_E, M, N)
    out = run(table, count, x_MI, weight.words, weight.scales, bias_EO)
    return out[0] if splits == 1 else out


def _store_rows(smem, gmem, first, rows, most):
    """Copy the first rows of smem to gmem from row `first`, both in ALIGNMENTs: by powers of two, as a copy's shape is fixed."""
    done = 0
    for power in reversed(range((most // ALIGNMENT).bit_length())):
        size = 1 << power

        @pl.when(rows & size != 0)
        def _():
            plgpu.copy_smem_to_gmem(smem.at[pl.ds(done * ALIGNMENT, size * ALIGNMENT)], gmem.at[pl.ds((first + done) * ALIGNMENT, size * ALIGNMENT)])

        done = done + (rows & size)


def _decode(words, scales, ops):
    """Return bfloat16 [64 outputs, 64 inputs] of words uint32 [4, 128] and scales uint32 [32]; hopper_layout describes both."""
    field, exponent = np.uint32(0x81C081C0), np.uint32(0x7F807F80)
    pairs = (words & field, words << 3 & field, words << 6 & field,
             words << 1 & np.uint32(0x80008000) | words >> 5 & np.uint32(0x01000100) | words >> 4 & np.uint32(0x00C000C0))
    twice = (scales & np.uint32(0xFFFF) | scales << 16, scales >> 16 | scales & np.uint32(0xFFFF0000))
    factors = tuple(half & exponent for half in twice), tuple((half << 8 | half >> 24) & exponent for half in twice)
    return ops.scale(pairs, factors)


_WORDS = plgpu.Layout.WG_STRIDED((4, 128), vec_size=4)
_SCALES = plgpu.Layout.TILED(plgpu.Tiling(((32,), (8,), (1,))), warp_dims=(-3,), lane_dims=(-2, plgpu.Replicated(4)), vector_dim=-1)


class _Mosaic:
    """What runs on the device and can't be interpreted."""

    @staticmethod
    def scale(pairs, factors):
        """Take pairs[j] [4, 128] and factors[block][h] [32], both as two bfloat16 a word, to their products in operand A's layout."""
        @plgpu.inline_mgpu(arg_types=((_WORDS,) * 4, ((_SCALES,) * 2,) * 2),
                           return_type=plgpu.ShapeDtypeStruct((GROUP, GROUP), jnp.bfloat16, layout=plgpu.Layout.WGMMA))
        def scaled(_, pairs, factors):
            from jax.experimental.mosaic import gpu as mgpu
            from jaxlib.mlir import ir
            from jaxlib.mlir.dialects import arith, vector
            two = ir.VectorType.get((2,), ir.BF16Type.get())
            as_two = lambda word: vector.bitcast(two, word)
            factor = [[as_two(half.registers.item()) for half in block] for block in factors]
            registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((GROUP, GROUP)), object)
            flat = registers.reshape(4, 2, 2)  # j, v, h
            for j, v, h in np.ndindex(4, 2, 2):
                word = vector.extract_strided_slice(ir.VectorType.get((1,), ir.IntegerType.get_signless(32)), pairs[j].registers.item(), [2 * v + h], [1], [1])
                flat[j, v, h] = arith.mulf(as_two(word), factor[j // 2][h])
            return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

        return scaled(pairs, factors)

    @staticmethod
    def multiply(acc, decoded, x):
        plgpu.wgmma(acc, decoded, x.T)
        plgpu.wgmma_wait(1)

    @staticmethod
    def finish():
        plgpu.wgmma_wait(0)

    @staticmethod
    def accumulator(accumulate, _, __, rows):
        return pl.run_scoped(accumulate, plgpu.ACC((GROUP, rows)))


class _Interpreted:
    """The same by jnp."""

    @staticmethod
    def scale(pairs, factors):
        def numbers(words):  # [..., 2] float32; e2m1's bits go through float16, as XLA on CPU flushes denormals
            return jnp.stack([words & 0xFFFF, words >> 16], axis=-1)

        values = []
        for j, v, h in np.ndindex(4, 2, 2):
            bits = numbers(pairs[j].reshape(4, 8, 4, 2, 2)[..., v, h])  # [w, r, q, b]
            code = jax.lax.bitcast_convert_type((bits & 0x8000 | (bits & 0x1C0) << 3).astype(jnp.uint16), jnp.float16).astype(jnp.float32)
            exponent = (numbers(factors[j // 2][h].reshape(4, 8, 1)) >> 7).astype(jnp.int32)  # times 2^14 for float16's, less 126 for e2m1's
            values.append(code * 2.0**14 * jnp.exp2((exponent - 253).astype(jnp.float32)))
        return jnp.stack(values).reshape(4, 2, 2, 4, 8, 4, 2).transpose(3, 2, 4, 0, 1, 5, 6).reshape(GROUP, GROUP).astype(jnp.bfloat16)

    @staticmethod
    def multiply(acc, decoded, x):
        acc[...] += jnp.dot(decoded.astype(jnp.float32), x[...].T.astype(jnp.float32), precision="highest")

    @staticmethod
    def finish():
        pass

    @staticmethod
    def accumulator(accumulate, acc_smem, me, _):
        acc_smem[me] = jnp.zeros(acc_smem.shape[1:], jnp.float32)
        return accumulate(acc_smem.at[me])
