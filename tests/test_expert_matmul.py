"""The contract of the expert matmul: every implementation that runs here, on every kind of routing."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax import mxfp4
from gptoss_jax.kernels.expert_matmul import (
    IMPLEMENTATIONS, HopperGateUpWeight, HopperWeight, Mxfp4Weight, expert_matmul, expert_mlp, grouping, lean_mlp, pack, reference, xla)

pytestmark = pytest.mark.usefixtures("quickly_compiled")

E, IN, OUT = 5, 64, 48
GROUPS = {
    "one row": [0, 0, 1, 0, 0],
    "even": [4, 4, 4, 4, 4],
    "ragged with empty experts": [0, 7, 0, 129, 3],
    "one expert owns all rows": [0, 0, 0, 300, 0],
    "first and last only": [127, 0, 0, 0, 128],
    "no rows at all": [0, 0, 0, 0, 0],
}


def weights(seed=0):
    random = np.random.default_rng(seed)
    matrices = random.standard_normal((E, OUT, IN)).astype(np.float32)
    packed = Mxfp4Weight(*(jnp.asarray(x) for x in mxfp4.encode(matrices)))
    dense = np.swapaxes(mxfp4.decode(*mxfp4.encode(matrices)), 1, 2)
    return packed, jnp.asarray(dense), jnp.asarray(random.standard_normal((E, OUT)).astype(np.float32))


def by_hand(x, dense, bias, groups, rows):
    """Row by row in float64."""
    out, row = np.zeros((rows, OUT)), 0
    for expert, count in enumerate(groups):
        for _ in range(count):
            out[row] = np.asarray(x[row], np.float64) @ np.asarray(dense[expert], np.float64) + np.asarray(bias[expert], np.float64)
            row += 1
    return out


@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "mosaic_gpu"])  # that one: test_mosaic_gpu.py
def test_each_row_meets_its_own_expert_and_spare_rows_give_zeros(implementation, groups, spare):
    packed, dense, bias = weights()
    rows = 303 if spare else sum(groups)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, IN)).astype(np.float32))
    for weight in (packed,) if implementation == "cpu" else (packed, dense):
        out = jax.jit(IMPLEMENTATIONS[implementation])(x, weight, bias, jnp.asarray(groups, jnp.int32))
        np.testing.assert_allclose(out, by_hand(x, dense, bias, groups, rows), atol=2e-5)  # 64 float32 products of size up to 20


@pytest.mark.parametrize("groups", [GROUPS["ragged with empty experts"], GROUPS["one expert owns all rows"]], ids=["ragged", "one"])
def test_gradients_equal_those_of_the_reference(groups):
    packed, dense, bias = weights()
    rows = sum(groups) + 2
    random = np.random.default_rng(2)
    x, g = (jnp.asarray(random.standard_normal((rows, width)).astype(np.float32)) for width in (IN, OUT))
    sizes = jnp.asarray(groups, jnp.int32)

    def loss(implementation, x, dense, bias):
        return (implementation(x, dense, bias, sizes) * g).sum()

    ours, expected = (jax.jit(jax.grad(lambda *a: loss(f, *a), argnums=(0, 1, 2)))(x, dense, bias) for f in (expert_matmul, reference.expert_matmul))
    for mine, theirs in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)  # sums of up to 300 products
    dx = jax.jit(jax.grad(lambda x: (expert_matmul(x, packed, bias, sizes) * g).sum()))(x)
    np.testing.assert_allclose(dx, expected[0], atol=2e-4)


def test_bfloat16_rows_are_summed_in_float32():
    packed, dense, bias = weights()
    x = jnp.asarray(np.random.default_rng(3).standard_normal((20, IN)).astype(np.float32)).astype(jnp.bfloat16)
    out = expert_matmul(x, packed, bias, jnp.full(E, 4, jnp.int32))
    assert out.dtype == jnp.bfloat16
    exact = by_hand(x.astype(jnp.float32), dense, bias, [4] * E, 20)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2**-8, atol=1e-4)  # one rounding, at the end


def test_a_lean_layer_has_the_values_and_gradients_of_one_matrix_after_the_other_and_no_array_of_all_rows():
    T, A, D, F, R = 27, 2, 64, 128, 3
    random = np.random.default_rng(4)
    x, weight, g, bias_up, bias_down, *low_rank = [jnp.asarray(random.standard_normal(shape).astype(np.float32)) for shape in (
        (T, D), (T, A), (T, D), (E, 2 * F), (E, D), (E, D, R), (E, R, 2 * F), (E, F, R), (E, R, D))]
    chosen = jnp.asarray(np.stack([random.permutation(E + 2)[:A] for _ in range(T)]).astype(np.int32))  # some are somebody else's
    up, down = (Mxfp4Weight(*map(jnp.asarray, mxfp4.encode(random.standard_normal((E, *shape))))) for shape in ((2 * F, D), (D, F)))

    def lean(x, weight, bias_up, bias_down, *low_rank, up=up, down=down):
        return lean_mlp(x, chosen, weight, (up, bias_up, *low_rank[:2]), (down, bias_down, *low_rank[2:]), 7, 1.7)

    def plain(x, weight, bias_up, bias_down, *low_rank):
        def apply(x, sizes, matrix, bias, a, b):
            low = reference.expert_matmul(x, a, a[:, 0] * 0, sizes)
            return reference.expert_matmul(x, matrix, bias, sizes) + reference.expert_matmul(low, b, bias * 0, sizes)

        def layer(x, sizes):
            return apply(reference.swiglu(apply(x, sizes, up, bias_up, *low_rank[:2]), 7, 1.7), sizes, down, bias_down, *low_rank[2:])

        return grouping.by_expert(x, chosen, weight, E, layer)

    def differentiated(layer):
        trained = x, weight, bias_up, bias_down, *low_rank
        lowered = jax.jit(jax.value_and_grad(lambda *trained: (layer(*trained) * g).sum(), argnums=range(len(trained)))).lower(*trained)
        return lowered.as_text(), jax.tree.leaves(lowered.compile()(*trained))

    on_hopper = functools.partial(lean, up=pack(up, HopperGateUpWeight), down=pack(down, HopperWeight))
    (text, ours), (_, of_arranged), (_, expected) = map(differentiated, (lean, on_hopper, plain))
    assert not any(f"<{T * A}x{width}x" in text for width in (D, F, 2 * F))
    for mine, again, theirs in zip(ours, of_arranged, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)  # sums of up to 128 products and 54 rows
        np.testing.assert_allclose(again, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize("layer", ["expert_mlp", "arranged", "reference", "dense", "lean", "adapted"])
def test_the_experts_of_no_tokens_are_nothing_and_so_are_their_gradients(layer):
    D, F, A = 64, 128, 2
    random = np.random.default_rng(0)
    up, down = (Mxfp4Weight(*map(jnp.asarray, mxfp4.encode(random.standard_normal((E, out, inner))))) for out, inner in ((2 * F, D), (D, F)))
    bias_up, bias_down, x = jnp.ones((E, 2 * F), jnp.bfloat16), jnp.ones((E, D), jnp.bfloat16), jnp.zeros((0, D), jnp.bfloat16)
    chosen, weight = jnp.zeros((0, A), jnp.int32), jnp.zeros((0, A))
    if layer == "arranged":
        up, down = pack(up, HopperGateUpWeight), pack(down, HopperWeight)
    if layer == "dense":
        up, down = (jnp.ones((E, inner, out), jnp.bfloat16) for out, inner in ((2 * F, D), (D, F)))

    def loss(x, weight, bias_up, bias_down):
        if layer in ("lean", "adapted"):
            low_rank = (jnp.ones((E, D, 4)), jnp.ones((E, 4, 2 * F))) if layer == "adapted" else (None, None)
            return lean_mlp(x, chosen, weight, (up, bias_up, *low_rank), (down, bias_down, None, None), 7.0, 1.7)
        how = "reference" if layer == "reference" else "auto"
        return expert_mlp(x, chosen, weight, up, bias_up, down, bias_down, limit=7.0, alpha=1.7, implementation=how)

    out, backward = jax.vjp(loss, x, weight, bias_up, bias_down)
    assert out.shape == (0, D) and out.dtype == jnp.float32
    gradients = backward(out)
    assert [each.shape for each in gradients] == [x.shape, weight.shape, bias_up.shape, bias_down.shape]
    assert not any(each.any() for each in gradients)


@pytest.mark.parametrize("kind", [Mxfp4Weight, HopperWeight, HopperGateUpWeight])
def test_no_more_than_one_expert_is_ever_dequantised_however_the_weight_lies(kind):
    experts, width, hidden, rows = 64, 256, 512, 4
    shape = jax.ShapeDtypeStruct
    weight = Mxfp4Weight(shape((experts, hidden, width // 32, 16), jnp.uint8), shape((experts, hidden, width // 32), jnp.uint8))
    weight = weight if kind is Mxfp4Weight else jax.eval_shape(functools.partial(pack, kind=kind), weight)
    arguments = shape((rows, width), jnp.float32), weight, shape((experts, hidden), jnp.float32), shape((experts,), jnp.int32)
    memory = jax.jit(functools.partial(expert_matmul, implementation="xla")).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * (4 * width * hidden)  # a few copies of one expert in float32; the layer would be 64


def test_work_grows_with_the_chosen_experts_only():
    """The loop's trip count, read from the tiles: experts without rows take no part."""
    tiles = xla._Tiles(8, jnp.asarray([0, 0, 3, 0, 5], jnp.int32))
    visited = [int(tiles.locate(jnp.int32(t))[0]) for t in range(int(tiles.count))]
    assert set(visited) == {2, 4} and len(visited) <= 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_code_at_every_scale_byte_is_decoded_as_defined(dtype):
    """Rows of the identity read the weight itself. Below 2^-126 a processor may take a number for zero."""
    codes = np.arange(32, dtype=np.uint8).reshape(16, 2) & 15
    blocks = jnp.asarray(np.broadcast_to(codes[:, 0] | codes[:, 1] << 4, (1, 256, 1, 16)))
    weight = Mxfp4Weight(blocks, jnp.arange(256, dtype=jnp.uint8).reshape(1, 256, 1))
    rows = jnp.eye(32, dtype=dtype)[:16]
    with jax.default_matmul_precision("highest"):
        out = np.asarray(expert_matmul(rows, weight, jnp.zeros((1, 256)), jnp.full(1, 16, jnp.int32), implementation="cpu").astype("float32"))
    expected = np.asarray(mxfp4.decode(*(np.asarray(part[0]) for part in weight), dtype="float32")).T[:16]
    for scale in range(256):
        finite = np.isfinite(expected[:, scale]).all()  # zero times infinity is NaN, in any implementation
        if finite:
            np.testing.assert_allclose(out[:, scale], expected[:, scale], rtol=0, atol=2.0**-126 if scale < 3 else 0, err_msg=str(scale))


def test_arrays_of_numpy_are_taken_as_those_of_jax():
    packed, _, bias = weights()
    x, sizes = np.ones((5, IN), np.float32), np.ones(E, np.int32)
    expected = expert_matmul(jnp.asarray(x), packed, bias, jnp.asarray(sizes), implementation="xla")
    found = expert_matmul(x, jax.tree.map(np.asarray, packed), np.asarray(bias), sizes, implementation="xla")
    np.testing.assert_array_equal(found, expected)


def test_an_implementation_that_cannot_run_or_does_not_exist_is_refused():
    packed, dense, bias = weights()
    x, sizes = jnp.ones((5, IN)), jnp.ones(E, jnp.int32)
    with pytest.raises(ValueError, match=r"'cpu' needs a packed weight \(found a dense one, float32\)"):
        expert_matmul(x, dense, bias, sizes, implementation="cpu")
    with pytest.raises(ValueError, match=r"'cpu' needs rows in float32 or bfloat16 \(found float16\)"):
        expert_matmul(x.astype(jnp.float16), packed, bias, sizes, implementation="cpu")
    with pytest.raises(ValueError, match=r"rows \(5, 32\), weight \(5, 48, 64\).* don't fit together"):
        expert_matmul(x[:, :32], packed, bias, sizes, implementation="cpu")
    for implementation, weight in itertools.product((*IMPLEMENTATIONS, "auto"), (packed, dense)):
        said = r"expert_matmul: rows \(5, 64\), weight \(5, 48, 64\) \(experts, out, in\), bias \(5, 48\) and group sizes \(4,\) don't fit together"
        with pytest.raises(ValueError, match=said):
            expert_matmul(x, weight, bias, sizes[1:], implementation=implementation)
        with pytest.raises(ValueError, match=r"expert_mlp: rows \(5, 24\), weight \(5, 48, 64\) .* don't fit together"):
            expert_mlp(x, sizes[:, None], sizes[:, None], weight, bias, weight, bias, limit=7, alpha=1.7, implementation=implementation)
    with pytest.raises(ValueError, match="'mosaic', expected 'auto' or one of reference, xla, cpu"):
        expert_matmul(x, packed, bias, sizes, implementation="mosaic")
    with pytest.raises(ValueError, match="expert_mlp implementation 'mosaic', expected 'auto' or one of"):
        expert_mlp(*[None] * 7, limit=7, alpha=1.7, implementation="mosaic")
