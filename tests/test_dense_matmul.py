"""Products with dense weights: the CPU kernels against float64, at every odd size, with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.kernels.dense_matmul import dense_matmul

SIZES = [(1, 37, 5), (2, 64, 6), (3, 96, 7), (5, 31, 1), (97, 101, 77), (200, 33, 25), (1, 1, 1), (0, 8, 4)]  # rows, in, out


def arguments(rows, inputs, outs, x_dtype, bias_dtype):
    random = np.random.default_rng(rows)
    x, weight, bias = (jnp.asarray(random.standard_normal(shape), dtype) for shape, dtype in
                       (((rows, inputs), x_dtype), ((outs, inputs), "bfloat16"), (outs, bias_dtype or "float32")))
    return x, weight, bias if bias_dtype else None


@pytest.mark.parametrize("implementation", ["xla", "cpu", "auto"])
@pytest.mark.parametrize("bias_dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rows_meet_the_weight_and_are_summed_in_float32(sizes, x_dtype, bias_dtype, implementation):
    x, weight, bias = arguments(*sizes, x_dtype, bias_dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T + (0 if bias is None else np.asarray(bias, np.float64))
    wide = dense_matmul(x, weight, bias, jnp.float32, implementation=implementation)
    np.testing.assert_allclose(wide, exact, atol=2e-5)  # up to 101 products of size up to 10
    narrow = dense_matmul(x, weight, bias, jnp.bfloat16, implementation=implementation)
    np.testing.assert_allclose(narrow.astype(jnp.float32), exact, rtol=2**-8, atol=1e-4)  # one rounding, at the end


def test_leading_dims_are_kept_and_the_dtype_is_that_of_x():
    x, weight, _ = arguments(6, 32, 9, "bfloat16", None)
    out = dense_matmul(x.reshape(2, 3, 32), weight, implementation="cpu")
    assert (out.shape, out.dtype) == ((2, 3, 9), jnp.bfloat16)


def test_gradients_and_tangents_are_those_of_xla():
    primals = arguments(5, 48, 11, "float32", "bfloat16")
    tangents = tuple(jnp.ones_like(x) for x in primals)

    def loss(implementation):
        return lambda x, weight, bias: (dense_matmul(x, weight, bias, implementation=implementation) ** 2).sum()

    for ours, theirs in zip(jax.grad(loss("cpu"), (0, 1, 2))(*primals), jax.grad(loss("xla"), (0, 1, 2))(*primals), strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(jax.jvp(loss("cpu"), primals, tangents)[1], jax.jvp(loss("xla"), primals, tangents)[1], rtol=1e-5)


def test_the_backward_of_bfloat16_rows_multiplies_in_bfloat16():
    x, weight, bias = arguments(6, 32, 9, "bfloat16", "float32")
    text = jax.jit(jax.grad(lambda x: dense_matmul(x, weight, bias, jnp.float32).sum())).lower(x).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("xf32" not in line.split(":")[-1].split("->")[0] for line in products)


def test_a_mapped_product_is_the_product_of_each():
    x, weight, bias = arguments(12, 40, 8, "float32", "float32")
    mapped = jax.vmap(lambda row: dense_matmul(row, weight, bias, implementation="cpu"))(x.reshape(4, 3, 40))
    np.testing.assert_allclose(mapped.reshape(12, 8), dense_matmul(x, weight, bias, implementation="xla"), atol=2e-5)


def test_an_implementation_that_cannot_run_or_does_not_exist_is_refused():
    x, weight, _ = arguments(2, 8, 4, "float32", None)
    with pytest.raises(ValueError, match="needs a weight in bfloat16 .found float32"):
        dense_matmul(x, weight.astype(jnp.float32), implementation="cpu")
    with pytest.raises(ValueError, match=r"'cpu' needs a weight in bfloat16 \(found float32\), x, result and bias in that or float32 \(found float16, float32\)"):
        dense_matmul(jnp.zeros((1, 8), jnp.float16), jnp.zeros((4, 8)), dtype="float32", implementation="cpu")
    with pytest.raises(ValueError, match="'triton', expected 'auto', 'xla' or 'cpu'"):
        dense_matmul(x, weight, implementation="triton")


def test_lowered_for_another_platform_no_cpu_kernel_is_called():
    x, weight, bias = arguments(2, 8, 4, "bfloat16", "bfloat16")
    lowered = jax.jit(dense_matmul).trace(x, weight, bias).lower(lowering_platforms=("cuda",)).as_text()
    assert "dot_general" in lowered and "gptoss_jax_matmul" not in lowered
