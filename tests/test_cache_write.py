"""Writing new keys and values into a cache, by each implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.kernels import cpu_library
from gptoss_jax.kernels.cache_write import cache_write

IMPLEMENTATIONS = ["auto", "xla", pytest.param("cpu", marks=pytest.mark.skipif(not cpu_library.available(), reason="no C++ compiler"))]


def expected(old, new, slots):
    out = np.array(old)
    for b, t in np.ndindex(slots.shape):
        if 0 <= slots[b, t] < old.shape[1]:
            out[b, slots[b, t]] = new[b, t]
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_go_to_their_slots_and_those_out_of_bounds_nowhere(implementation, dtype):
    rng = np.random.default_rng(0)
    old, new = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((3, 7, 2, 5), (3, 4, 2, 5)))
    slots = np.array([[0, 6, -1, 3], [7, 2, 1, 100], [-7, -1, -100, 5]], np.int32)
    got = jax.jit(lambda *a: cache_write(*a, implementation=implementation))(old, new, slots)
    assert got.dtype == old.dtype
    np.testing.assert_array_equal(got, expected(old, new, slots))
    np.testing.assert_array_equal(cache_write(old, new[:, :0], slots[:, :0], implementation=implementation), old)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_cache_still_needed_elsewhere_is_not_overwritten(implementation):
    old, new, slots = jnp.zeros((2, 5, 3)), jnp.ones((2, 1, 3)), jnp.array([[1], [4]], jnp.int32)
    before, after = jax.jit(lambda old: (old * 2 + 1, cache_write(old, new, slots, implementation=implementation)))(old)
    assert float(after.sum()) == 6 and float(old.sum()) == 0
    np.testing.assert_array_equal(before, np.ones((2, 5, 3)))


@pytest.mark.skipif(not cpu_library.available(), reason="no C++ compiler")
def test_a_donated_cache_is_written_in_place():
    old, new, slots = jnp.zeros((2, 1024, 8, 64), jnp.bfloat16), jnp.ones((2, 1, 8, 64), jnp.bfloat16), jnp.zeros((2, 1), jnp.int32)
    memory = jax.jit(cache_write, donate_argnums=0).lower(old, new, slots).compile().memory_analysis()
    assert memory.alias_size_in_bytes == old.nbytes and memory.temp_size_in_bytes < 4096


def test_a_written_cache_has_derivatives():
    old, new, slots = jnp.arange(12.0).reshape(2, 3, 2), jnp.ones((2, 1, 2)), jnp.array([[1], [3]], jnp.int32)
    weights = jnp.arange(12.0).reshape(2, 3, 2) + 1
    by_old, by_new = jax.jit(jax.grad(lambda *rows: (cache_write(*rows, slots) * weights).sum(), argnums=(0, 1)))(old, new)
    np.testing.assert_array_equal(by_old, weights.at[0, 1].set(0))
    np.testing.assert_array_equal(by_new, jnp.stack([weights[0, 1:2], jnp.zeros((1, 2))]))


def test_a_batch_of_caches_is_written_under_vmap():
    old, new, slots = jnp.zeros((4, 2, 3, 2)), jnp.ones((4, 2, 1, 2)), jnp.arange(8, dtype=jnp.int32).reshape(4, 2, 1) % 3
    got = jax.jit(jax.vmap(cache_write))(old, new, slots)
    np.testing.assert_array_equal(got, np.stack([expected(*rows) for rows in zip(old, np.asarray(new), np.asarray(slots))]))


def test_what_does_not_fit_is_named():
    old = jnp.zeros((2, 5, 3))
    with pytest.raises(ValueError, match="cache_write implementation 'gpu', expected 'auto', 'xla' or 'cpu'"):
        cache_write(old, old[:, :1], jnp.zeros((2, 1), jnp.int32), implementation="gpu")
    if cpu_library.available():
        with pytest.raises(ValueError, match=r"float32 \(2, 5, 3\): rows float32 \(2, 1, 3\) and slots \(2, 2\) don't fit it"):
            cache_write(old, old[:, :1], jnp.zeros((2, 2), jnp.int32), implementation="cpu")
