"""The contract of the expert matmul: every implementation that runs here, on every kind of routing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax import mxfp4
from gptoss_jax.kernels import cpu_library
from gptoss_jax.kernels.expert_matmul import Mxfp4Weight, cpu, expert_matmul, reference, xla

IMPLEMENTATIONS = {"reference": reference.expert_matmul, "xla": xla.expert_matmul}
if cpu_library.available():
    IMPLEMENTATIONS["cpu"] = cpu.expert_matmul
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


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_each_row_meets_its_own_expert_and_spare_rows_give_zeros(implementation, groups, spare):
    packed, dense, bias = weights()
    rows = sum(groups) + spare
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, IN)).astype(np.float32))
    if rows == 0:
        return
    for weight in (packed,) if implementation is cpu.expert_matmul else (packed, dense):
        out = implementation(x, weight, bias, jnp.asarray(groups, jnp.int32))
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

    expected = jax.grad(lambda *a: loss(reference.expert_matmul, *a), argnums=(0, 1, 2))(x, dense, bias)
    for ours, theirs in zip(jax.grad(lambda *a: loss(xla.expert_matmul, *a), argnums=(0, 1, 2))(x, dense, bias), expected):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)  # sums of up to 300 products
    dx = jax.grad(lambda x: (xla.expert_matmul(x, packed, bias, sizes) * g).sum())(x)
    np.testing.assert_allclose(dx, expected[0], atol=2e-4)


def test_bfloat16_rows_are_summed_in_float32():
    packed, dense, bias = weights()
    x = jnp.asarray(np.random.default_rng(3).standard_normal((20, IN)).astype(np.float32)).astype(jnp.bfloat16)
    out = expert_matmul(x, packed, bias, jnp.full(E, 4, jnp.int32))
    assert out.dtype == jnp.bfloat16
    exact = by_hand(x.astype(jnp.float32), dense, bias, [4] * E, 20)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2**-8, atol=1e-4)  # one rounding, at the end


def test_no_more_than_one_expert_is_ever_dequantised():
    experts, width, hidden, rows = 64, 256, 512, 4
    shape = jax.ShapeDtypeStruct
    weight = Mxfp4Weight(shape((experts, hidden, width // 32, 16), jnp.uint8), shape((experts, hidden, width // 32), jnp.uint8))
    memory = jax.jit(xla.expert_matmul).lower(shape((rows, width), jnp.float32), weight, shape((experts, hidden), jnp.float32),
                                          shape((experts,), jnp.int32)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * (4 * width * hidden)  # a few copies of one expert in float32; the layer would be 64


def test_work_grows_with_the_chosen_experts_only():
    """The loop's trip count, read from the tiles: experts without rows take no part."""
    tiles = xla._Tiles(8, jnp.asarray([0, 0, 3, 0, 5], jnp.int32))
    visited = [int(tiles.locate(jnp.int32(t))[0]) for t in range(int(tiles.count))]
    assert set(visited) == {2, 4} and len(visited) <= 6


def random_packed(random, experts, out, blocks, scales=(118, 128)):
    codes = random.integers(0, 256, (experts, out, blocks, 16), dtype=np.uint8)
    return Mxfp4Weight(jnp.asarray(codes), jnp.asarray(random.integers(*scales, (experts, out, blocks), dtype=np.uint8)))


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-8)])  # of the largest output: its rounding
@pytest.mark.parametrize("out, blocks", [(1, 1), (33, 3), (31, 7), (96, 45)])
def test_the_cpu_kernel_is_right_on_odd_shapes_with_every_instruction_set(cpu_level, out, blocks, dtype, tolerance, level):
    cpu_level(level)
    random = np.random.default_rng(out)
    weight, bias = random_packed(random, 3, out, blocks), jnp.asarray(random.standard_normal((3, out)), dtype)
    for rows in (0, 1, 3, 8, 9, 17, 40):
        x = jnp.asarray(random.standard_normal((rows, blocks * 32)), dtype)
        groups = jnp.asarray(np.bincount(random.integers(0, 4, rows), minlength=4)[:3], jnp.int32)
        ours = cpu.expert_matmul(x, weight, bias, groups)
        assert ours.dtype == dtype and ours.shape == (rows, out)
        expected = np.asarray(reference.expert_matmul(x.astype(jnp.float32), weight, bias, groups))
        np.testing.assert_allclose(ours.astype(jnp.float32), expected, atol=tolerance * max(np.abs(expected).max(initial=0), 1e-6))


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [0, 1, 2, 3, 127, 252, 253, 254, 255])
def test_the_cpu_kernel_knows_every_scale_byte(cpu_level, scale, dtype, level):
    """In few and in many rows. A weight past float32's largest isn't infinite as in the reference: its product is what counts."""
    cpu_level(level)
    weight = Mxfp4Weight(jnp.full((1, 40, 5, 16), 7, jnp.uint8), jnp.full((1, 40, 5), scale, jnp.uint8))  # 6 and 0 in turns
    for rows in (1, 33):
        x = np.zeros((rows, 160), np.float32)
        x[:, 0] = 2.0 ** np.clip(127 - scale, -100, 100)
        out = cpu.expert_matmul(jnp.asarray(x, dtype), weight, jnp.zeros((1, 40), dtype), jnp.asarray([rows], jnp.int32))
        np.testing.assert_array_equal(out.astype(jnp.float32), np.full((rows, 40), 6.0 * 2.0 ** (scale - 127) * float(x[0, 0])))


@pytest.mark.parametrize("rows", [1, 40])
def test_the_cpu_kernel_passes_nan_on(cpu_level, rows):
    random = np.random.default_rng(0)
    weight = random_packed(random, 1, 5, 4)
    x = jnp.ones((rows, 128), jnp.bfloat16).at[0, 77].set(jnp.nan)
    out = cpu.expert_matmul(x, weight, jnp.zeros((1, 5), jnp.bfloat16), jnp.asarray([rows], jnp.int32)).astype(jnp.float32)
    assert np.isnan(out[0]).all() and np.isfinite(out[1:]).all()


def test_a_named_implementation_never_falls_back(cpu_level):
    _, dense, bias = weights()
    with pytest.raises(ValueError, match="implementation 'cpu': the weight is dense, expected MXFP4"):
        expert_matmul(jnp.ones((1, IN)), dense, bias, jnp.asarray([1, 0, 0, 0, 0], jnp.int32), implementation="cpu")


def test_auto_takes_the_kernel_on_cpu_and_xla_elsewhere(cpu_level):
    packed, _, bias = weights()
    traced = jax.jit(expert_matmul).trace(jnp.ones((2, IN)), packed, bias, jnp.asarray([2, 0, 0, 0, 0], jnp.int32))
    assert "gptoss_expert_matmul" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "gptoss_expert_matmul" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_auto_works_under_shard_map_and_vmap_and_grad(cpu_level):
    packed, dense, bias = weights()
    random = np.random.default_rng(5)
    x = jnp.asarray(random.standard_normal((8, 3, IN)).astype(np.float32))
    sizes = jnp.asarray([1, 0, 1, 0, 1], jnp.int32)
    expected = np.stack([by_hand(rows, dense, bias, sizes.tolist(), 3) for rows in x])
    np.testing.assert_allclose(jax.vmap(lambda rows: expert_matmul(rows, packed, bias, sizes))(x), expected, atol=2e-5)
    mesh, P = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec
    split = jax.shard_map(lambda rows: expert_matmul(rows[0], packed, bias, sizes)[None], mesh=mesh, in_specs=P("data"), out_specs=P("data"),
                          check_vma=False)
    np.testing.assert_allclose(jax.jit(split)(x), expected, atol=2e-5)
    ours, theirs = (jax.grad(lambda rows: (f(rows, packed, bias, sizes) ** 2).sum())(x[0]) for f in (expert_matmul, reference.expert_matmul))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)
