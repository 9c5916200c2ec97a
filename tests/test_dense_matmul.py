"""The contract of the dense matmul, and of its C++ kernel for few rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.kernels.dense_matmul import cpu, dense_matmul, reference, xla


def inputs(rows, out, depth, dtype=jnp.bfloat16):
    random = np.random.default_rng(rows)
    return jnp.asarray(random.standard_normal((rows, depth)), dtype), jnp.asarray(random.standard_normal((out, depth)), dtype)


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("out, depth", [(1, 32), (33, 96), (95, 32 * 45)])
def test_the_cpu_kernel_sums_bfloat16_products_in_float32(cpu_level, out, depth, level):
    cpu_level(level)
    for rows in (0, 1, 2, 3, 8, 9, 17, 40):
        x, weight = inputs(rows, out, depth)
        ours = cpu.dense_matmul(x, weight)
        assert ours.dtype == jnp.float32 and ours.shape == (rows, out)
        exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
        np.testing.assert_allclose(ours, exact, atol=1e-6 * depth)


def test_xla_and_the_reference_agree():
    x, weight = inputs(5, 7, 13, jnp.float32)
    np.testing.assert_allclose(xla.dense_matmul(x, weight), reference.dense_matmul(x, weight), atol=1e-5)


def test_auto_takes_the_kernel_for_few_bfloat16_rows_on_cpu_only(cpu_level):
    def program(rows, dtype, platform):
        return jax.jit(dense_matmul).trace(*inputs(rows, 64, 64, dtype)).lower(lowering_platforms=(platform,)).as_text()

    assert "gptoss_dense" in program(4, jnp.bfloat16, "cpu")
    for other in ((512, jnp.bfloat16, "cpu"), (4, jnp.float32, "cpu"), (4, jnp.bfloat16, "cuda")):
        assert "gptoss_dense" not in program(*other)


def test_a_named_implementation_never_falls_back(cpu_level):
    with pytest.raises(ValueError, match="'cpu': rows of 40 found, expected a multiple of 32"):
        dense_matmul(*inputs(2, 3, 40), implementation="cpu")


def test_gradients_equal_those_of_xla(cpu_level):
    x, weight = inputs(3, 5, 64)
    for ours, theirs in zip(*(jax.grad(lambda *a: (f(*a) ** 2).sum(), argnums=(0, 1))(x, weight) for f in (cpu.dense_matmul, xla.dense_matmul))):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=0.02, atol=0.5)  # bfloat16 cotangents up to 200
