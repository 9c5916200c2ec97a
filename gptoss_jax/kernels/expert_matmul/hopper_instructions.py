"""Decoding of packed weights in a Hopper GPU's registers, and what of the kernels can't be interpreted, beside the same by jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from gptoss_jax.kernels.expert_matmul.hopper_layout import GROUP


def decode(words, scales, ops):
    """Return bfloat16 [64 outputs, 64 inputs] of words uint32 [4, 128] and scales uint32 [32]; hopper_layout describes both."""
    field, exponent = np.uint32(0x81C081C0), np.uint32(0x7F807F80)
    pairs = (words & field, words << 6 & field, (words >> 4 | words << 28) & field,
             words << 2 & np.uint32(0x80C080C0) | words >> 6 & np.uint32(0x01000100))
    factors = scales & exponent, (scales << 8 | scales >> 24) & exponent
    return ops.scale(pairs, factors)


# Layouts: [4, 128] words, 4 a thread; a vector of one number for each pair of wgmma's rows 8 apart; two; eight rows, both halves of 64
# columns in the same thread; a block of an output, its factor, and its numbers in a thread; a product's numbers for one row; a
# row of which each warp has all, eight times; a matrix of one row for each pair.
_WORDS = plgpu.Layout.WG_STRIDED((4, 128), vec_size=4)
COLUMN = plgpu.Layout.TILED(plgpu.Tiling(((32,), (8,), (1,))), warp_dims=(-3,), lane_dims=(-2, plgpu.Replicated(4)), vector_dim=-1)
_TWO = plgpu.Layout.TILED(plgpu.Tiling(((64,), (16,), (2,))), warp_dims=(-3,), lane_dims=(-2, plgpu.Replicated(4)), vector_dim=-1)
EIGHT_ROWS = plgpu.Layout.TILED(plgpu.Tiling(((8, 32), (8, 8), (2,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)
_BLOCKS, _FACTORS = plgpu.Layout.WG_STRIDED((GROUP, GROUP // 2), vec_size=16), plgpu.Layout.WG_STRIDED((2 * GROUP,), vec_size=1)
_ROWS = plgpu.Layout.TILED(plgpu.Tiling(((GROUP, GROUP), (16, GROUP), (32,), (8,))), warp_dims=(-6,), lane_dims=(-4, -3), vector_dim=-1)
ROW = plgpu.Layout.WGMMA.reduce(1)
INPUTS = plgpu.Layout.TILED(plgpu.Tiling(((8,), (2,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(plgpu.Replicated(8), -2), vector_dim=-1)
MATRIX = plgpu.Layout.TILED(plgpu.Tiling(((32, 8), (8, 8), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


class Mosaic:
    """What runs on the device and can't be interpreted."""

    @staticmethod
    def decode_stored(blocks, factors):
        """Take uint8 [64, 32] and bfloat16 [128], as `hopper_stored` has them, to bfloat16 [64, 64]."""
        @plgpu.inline_mgpu(arg_types=(_BLOCKS, _FACTORS), return_type=plgpu.ShapeDtypeStruct((GROUP, GROUP), jnp.bfloat16, layout=_ROWS))
        def decoded(_, blocks, factors):
            i32, two = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
            words, factor = vector.bitcast(ir.VectorType.get((4,), i32), blocks.registers.item()), factors.registers.item()
            factor, pieces = vector.shuffle(factor, factor, [0, 0]), []
            for index in range(4):
                word = vector.extract(words, [], [index])
                even, odd = (arith.andi(part, mgpu.utils.c(0x0F0F0F0F, i32)) for part in (word, arith.shrui(word, mgpu.utils.c(4, i32))))
                pairs = []
                for byte in range(4):  # a code in bits 0..3 of each half: its sign to bit 15, the others to bits 8 7 6
                    codes = mgpu.utils.prmt(even, odd, mgpu.utils.c(0x8480 + 0x1111 * byte, i32))  # 8 more: the sign of what has none, zeros
                    bits = arith.andi(arith.muli(codes, mgpu.utils.c(0x1040, i32)), mgpu.utils.c(0x81C081C0 - (1 << 32), i32))
                    pairs.append(arith.mulf(mgpu.utils.bitcast(bits, two), factor))
                four = (vector.shuffle(a, b, [0, 1, 2, 3]) for a, b in (pairs[:2], pairs[2:]))
                pieces.append(vector.shuffle(*four, [*range(8)]))
            return fragments(np.array(pieces, object), _ROWS, (GROUP, GROUP))

        return decoded(blocks, factors)

    @staticmethod
    def scale(pairs, factors):
        """Take pairs[j] [4, 128] and factors[block] [32], both as two bfloat16 a word, to their products in operand A's layout."""
        @plgpu.inline_mgpu(arg_types=((_WORDS,) * 4, (COLUMN,) * 2),
                           return_type=plgpu.ShapeDtypeStruct((GROUP, GROUP), jnp.bfloat16, layout=plgpu.Layout.WGMMA))
        def scaled(_, pairs, factors):
            two = ir.VectorType.get((2,), ir.BF16Type.get())
            halves = [vector.bitcast(two, block.registers.item()) for block in factors]
            factor = [[vector.shuffle(half, half, [h, h]) for h in range(2)] for half in halves]
            products = [arith.mulf(vector.bitcast(two, _part(pairs[j].registers.item(), 2 * v + h)), factor[j // 2][h])
                        for j, v, h in np.ndindex(4, 2, 2)]
            return fragments(np.array(products, object), plgpu.Layout.WGMMA, (GROUP, GROUP))

        return scaled(pairs, factors)

    @staticmethod
    def load_bias(ref, gated):
        return plgpu.load(ref, layout=_TWO if gated else None, optimized=False)

    @staticmethod
    def load_rows(ref):
        return plgpu.load(ref, layout=_ROWS, optimized=False)

    @staticmethod
    def halves(product, bias):
        """Take products [64, N], or of one row [64], and a bias of 64 in order apart: gate, up [32, N] or [32], their biases [32]."""
        of_row = product.ndim == 1
        found = plgpu.ShapeDtypeStruct((32, *product.shape[1:]), jnp.float32, layout=COLUMN if of_row else MATRIX)
        column = plgpu.ShapeDtypeStruct((32,), jnp.float32, layout=COLUMN)

        @plgpu.inline_mgpu(arg_types=(ROW if of_row else plgpu.Layout.WGMMA, _TWO), return_type=(found, found, column, column))
        def apart(_, product, bias):
            pairs, (two,) = product.registers.reshape(-1, 2), bias.registers.flat
            biases = (np.array([_part(two, h)], object) for h in range(2))
            return tuple(fragments(x, each.layout, each.shape) for x, each in
                         ((pairs[:, 0], found), (pairs[:, 1], found), *((x, column) for x in biases)))

        return apart(product, bias)

    @staticmethod
    def multiply(acc, decoded, x):
        plgpu.wgmma(acc, decoded, x.T)

    @staticmethod
    def load_inputs(row):
        """Load 64 inputs from shared memory as each warp's operand B of eight equal columns."""
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((GROUP,), jnp.bfloat16, layout=INPUTS))
        def loaded(_, row):
            i32, words = ir.IntegerType.get_signless(32), []
            # Four matrices of eight equal rows: lane l says where a row of matrix l / 8 is.
            matrix = arith.shrui(arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(32, i32)), mgpu.utils.c(3, i32))
            begin = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(row))
            address = arith.addi(begin, arith.muli(matrix, mgpu.utils.c(16, i32)))
            for half in range(2):
                words += mgpu.utils.inline_ptx("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];",
                                               arith.addi(address, mgpu.utils.c(64 * half, i32)), result_types=[i32] * 4, has_side_effects=True, convergent=True)
            two = ir.VectorType.get((2,), ir.BF16Type.get())
            return fragments(np.array([mgpu.utils.bitcast(word, two) for word in words], object), INPUTS, (GROUP,))

        return loaded(row)

    @staticmethod
    def multiply_inputs(sums, decoded, inputs):
        """Return sums [64, 8] and in each column the products of 64 x 64 weights with 64 inputs, by each warp for itself."""
        layout = plgpu.Layout.WGMMA

        @plgpu.inline_mgpu(arg_types=(layout, layout, INPUTS), return_type=plgpu.ShapeDtypeStruct((GROUP, 8), jnp.float32, layout=layout))
        def multiplied(_, sums, decoded, inputs):
            i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
            weights, inputs = ([mgpu.utils.bitcast(pair, i32) for pair in operand.registers.flat] for operand in (decoded, inputs))
            sums = [vector.extract(pair, [], [index]) for pair in sums.registers.flat for index in range(2)]
            for step in range(4):
                sums = mgpu.utils.inline_ptx(
                    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
                    *weights[4 * step :][:4], *inputs[2 * step :][:2], *sums, result_types=[f32] * 4, convergent=True)
            pairs = [vector.from_elements(ir.VectorType.get((2,), f32), sums[2 * h :][:2]) for h in range(2)]
            return fragments(np.array(pairs, object), layout, (GROUP, 8))

        return multiplied(sums, decoded, inputs)

    @staticmethod
    def column(x):
        """Return one of the columns, which are alike, of products [64, 8]."""
        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=plgpu.ShapeDtypeStruct((GROUP,), jnp.float32, layout=ROW))
        def first(_, x):
            return fragments(np.array([_part(pair, 0) for pair in x.registers.flat], object), ROW, (GROUP,))

        return first(x)

    @staticmethod
    def finish(but=0):
        """Wait for the products that were begun, but for so many of the last."""
        plgpu.wgmma_wait(but)

    @staticmethod
    def accumulator(accumulate, _, __, rows):
        return pl.run_scoped(accumulate, plgpu.ACC((GROUP, rows)))

    @staticmethod
    def store(ref, x, layout=COLUMN):
        """Store numbers in a layout to memory, a matrix transposed: one by one, as Pallas stores no fewer than four bytes a thread."""
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
        def one_by_one(_, ref, x):
            x.foreach(lambda number, index: memref.store(number, ref, index[::-1]))

        one_by_one(ref, x)

    @staticmethod
    def count(counter, *_):
        """Add one to a number in memory; who waits for it sees what this warpgroup had stored."""
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def signal(_, counter):
            mgpu.utils.warpgroup_barrier()
            mgpu.utils.SemaphoreRef(mgpu.utils.memref_ptr(counter)).signal(1, memory_scope="gpu")

        signal(counter)

    @staticmethod
    def take(counter, taken):
        """Add one to a number in memory, and put what it was into taken [1], in shared memory, for all of a warpgroup."""
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
        def take(_, counter, taken):
            i32 = ir.IntegerType.get_signless(32)
            with mgpu.utils.single_thread(scope=mgpu.utils.ThreadSubset.WARPGROUP):
                before = mgpu.utils.inline_ptx("atom.relaxed.gpu.global.add.u32 $0, [$1], 1;", mgpu.utils.memref_ptr(counter),
                                               result_types=i32, has_side_effects=True)
                memref.store(before, taken, [mgpu.utils.c(0, ir.IndexType.get())])
            mgpu.utils.warpgroup_barrier()

        take(counter, taken)

    @staticmethod
    def await_count(counter, number, *_):
        """Wait until the number has come to so much; then copies read what was stored before."""
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def wait(_, counter):
            mgpu.utils.SemaphoreRef(mgpu.utils.memref_ptr(counter)).wait(number, decrement=False, memory_scope="gpu")
            mgpu.utils.inline_ptx("fence.proxy.async.global;", has_side_effects=True)

        wait(counter)


def _part(register, index):
    """Return one element of a register's vector, as a vector of one."""
    return vector.extract_strided_slice(ir.VectorType.get((1,), ir.VectorType(register.type).element_type), register, [index], [1], [1])


def fragments(registers, layout, shape):
    layout = layout.to_mgpu()
    return mgpu.FragmentedArray(_registers=registers.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None)


class Interpreted:
    """The same by jnp."""

    @staticmethod
    def load_bias(ref, gated):
        return ref[...]

    @staticmethod
    def load_rows(ref):
        return ref[...]

    @staticmethod
    def halves(product, bias):
        gate, up = (product.reshape(4, 2, 8, -1)[:, half].reshape(32, *product.shape[1:]) for half in range(2))
        return gate, up, *bias.reshape(32, 2).T

    @staticmethod
    def scale(pairs, factors):
        def numbers(words):  # [..., 2] float32; e2m1's bits go through float16, as XLA on CPU flushes denormals
            return jnp.stack([words & 0xFFFF, words >> 16], axis=-1)

        values = []
        for j, v, h in np.ndindex(4, 2, 2):
            bits = numbers(pairs[j].reshape(4, 8, 4, 2, 2)[..., v, h])  # [w, r, q, b]
            code = jax.lax.bitcast_convert_type((bits & 0x8000 | (bits & 0x1C0) << 3).astype(jnp.uint16), jnp.float16).astype(jnp.float32)
            exponent = (numbers(factors[j // 2].reshape(4, 8, 1))[..., h, None] >> 7).astype(jnp.int32)  # times 2^14 for float16's, less 126 for e2m1's
            values.append(code * 2.0**14 * jnp.exp2((exponent - 253).astype(jnp.float32)))
        return jnp.stack(values).reshape(4, 2, 2, 4, 8, 4, 2).transpose(3, 2, 4, 0, 1, 5, 6).reshape(GROUP, GROUP).astype(jnp.bfloat16)

    @staticmethod
    def decode_stored(blocks, factors):
        codes = jnp.stack([blocks & 15, blocks >> 4], axis=-1).reshape(GROUP, GROUP).astype(jnp.uint16)
        code = jax.lax.bitcast_convert_type((codes & 8) << 12 | (codes & 7) << 9, jnp.float16).astype(jnp.float32)  # e2m1 times 2^-14
        exponents = (jax.lax.bitcast_convert_type(factors, jnp.uint16) >> 7).astype(jnp.int32).reshape(GROUP, 2)
        return (code * 2.0**14 * jnp.repeat(jnp.exp2((exponents - 253).astype(jnp.float32)), 32, axis=1)).astype(jnp.bfloat16)

    @staticmethod
    def multiply(acc, decoded, x):
        acc[...] += jnp.dot(decoded[...].astype(jnp.float32), x[...].T.astype(jnp.float32), precision="highest")

    @staticmethod
    def load_inputs(row):
        return row[...]

    @staticmethod
    def multiply_inputs(sums, decoded, inputs):
        return sums + jnp.dot(decoded.astype(jnp.float32), inputs.astype(jnp.float32), precision="highest")[:, None]

    @staticmethod
    def column(x):
        return x[:, 0]

    @staticmethod
    def finish(but=0):
        pass

    @staticmethod
    def accumulator(accumulate, acc_smem, me, rows):
        acc = acc_smem.at[me, :, pl.ds(0, rows)]
        acc[...] = jnp.zeros((GROUP, rows), jnp.float32)
        return accumulate(acc)

    @staticmethod
    def store(ref, x, layout=COLUMN):
        ref[...] = x.T

    @staticmethod
    def count(_, counted=(), index=0):
        for barrier in counted:  # none where blocks wait for earlier ones, as they are interpreted one after the other
            plgpu.barrier_arrive(barrier.at[index])

    @staticmethod
    def take(counter, taken):
        taken[0] = counter[...]
        counter[...] = counter[...] + 1

    @staticmethod
    def await_count(_, __, counted=(), index=0):
        for barrier in counted:
            plgpu.barrier_wait(barrier.at[index])
