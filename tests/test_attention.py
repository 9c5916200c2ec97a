"""Attention kernels against the formula, at the edges of blocks and windows, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.kernels.attention import attention, reference, xla

pytestmark = pytest.mark.usefixtures("quickly_compiled")

N, K, H = 6, 2, 8
by_reference = jax.jit(reference.attention, static_argnames="window")


def inputs(seed, B, T, S, dtype=np.float32):
    random = np.random.default_rng(seed)
    q, k, v = (random.standard_normal(shape).astype(dtype) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(random.standard_normal(N).astype(dtype) * 2)


def positions(B, T, start=0):
    return jnp.broadcast_to(jnp.arange(start, start + T, dtype=jnp.int32), (B, T))


def formula(q, k, v, sinks, window):
    """One query and head at a time, in float64, straight from the definition."""
    q, k, v, sinks = (np.asarray(x, np.float64) for x in (q, k, v, sinks))
    B, T = q.shape[:2]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        first = 0 if window is None else max(0, t - window + 1)
        keys, values = k[b, first : t + 1, n // (N // K)], v[b, first : t + 1, n // (N // K)]
        weights = np.exp(keys @ q[b, t, n] / np.sqrt(H))
        out[b, t, n] = weights @ values / (weights.sum() + np.exp(sinks[n]))
    return out


@pytest.mark.parametrize("window", [None, 1, 5, 128])
def test_reference_is_the_formula(window):
    q, k, v, sinks = inputs(0, 2, 19, 19)
    out = by_reference(q, k, v, sinks, q_positions=positions(2, 19), k_positions=positions(2, 19), window=window)
    np.testing.assert_allclose(out, formula(q, k, v, sinks, window), atol=1e-6)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8, so that every edge of a block is met with few tokens."""
    monkeypatch.setattr(xla, "BLOCK", 8)
    monkeypatch.setattr(xla, "_DENSE_SCORES", 0)


@pytest.mark.parametrize("T, windows", [(1, [None, 1]), (7, [None, 1, 8]), (8, [None, 8, 9]), (9, [None, 8, 9]), (16, [None, 8, 13]),
                                        (17, [None, 1, 8, 9, 13]), (40, [None, 1, 8, 9, 13])])
def test_blockwise_is_the_formula_at_block_and_window_edges(small_blocks, T, windows):
    q, k, v, sinks = inputs(T, 2, T, T)
    for window in windows:
        out = jax.jit(functools.partial(xla.attention, window=window))(q, k, v, sinks, q_positions=positions(2, T), k_positions=positions(2, T))
        np.testing.assert_allclose(out, formula(q, k, v, sinks, window), atol=2e-6, err_msg=f"window {window}")


def test_blockwise_equals_the_reference_on_empty_slots_and_late_queries(small_blocks):
    q, k, v, sinks = inputs(3, 2, 5, 37)
    k_positions = jnp.where(positions(2, 37) < jnp.array([[30], [12]]), positions(2, 37), -1)
    tags = dict(q_positions=jnp.stack([positions(1, 5, 25)[0], positions(1, 5, 7)[0]]), k_positions=k_positions, window=None)
    ours, expected = (jax.jit(lambda *a: f(*a, **tags))(q, k, v, sinks) for f in (xla.attention, reference.attention))
    np.testing.assert_allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize("window", [None, 6])
def test_blockwise_gradients_of_packed_rows_equal_those_of_the_reference(small_blocks, window):
    q, k, v, sinks = inputs(5, 2, 27, 27)
    segments = jnp.asarray([[1] * 10 + [2] * 12 + [0] * 5, [1] * 1 + [2] * 20 + [3] * 6], jnp.int32)
    starts = jnp.asarray([[0] * 10 + [10] * 12 + [22] * 5, [0] + [1] * 20 + [21] * 6], jnp.int32)
    tags = dict(q_positions=positions(2, 27) - starts, k_positions=positions(2, 27) - starts, q_segments=segments, k_segments=segments,
                window=window)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape).astype(np.float32))

    def loss(implementation, *arrays):
        return (implementation(*arrays, **tags) * weights).sum()

    ours, expected = (jax.jit(jax.grad(functools.partial(loss, f), argnums=(0, 1, 2, 3)))(q, k, v, sinks)
                      for f in (xla.attention, reference.attention))
    for name, a, b in zip(("q", "k", "v", "sinks"), ours, expected):
        np.testing.assert_allclose(a, b, atol=3e-6, err_msg=name)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_sink_of_minus_infinity_is_none_and_a_query_that_sees_nothing_is_zero(small_blocks, implementation):
    q, k, v, sinks = inputs(6, 2, 19, 19)
    real = positions(2, 19) < jnp.array([[19], [13]])
    tags = jnp.where(real, positions(2, 19), -1)
    attend = jax.jit(functools.partial(attention, q_positions=tags, k_positions=tags, window=5, implementation=implementation))
    out, gradients = jax.vjp(attend, q, k, v, jnp.full_like(sinks, -jnp.inf))
    expected = np.where(real[..., None, None], formula(q, k, v, np.full(N, -np.inf), 5), 0)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for gradient in gradients(jnp.ones_like(out)):
        assert np.isfinite(gradient).all()
    assert not attend(q, k[:, :0], v[:, :0], sinks, k_positions=tags[:, :0]).any()


def test_a_long_prompt_never_holds_all_scores_at_once():
    T = 32_768
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    tags = jax.ShapeDtypeStruct((1, T), jnp.int32)
    arrays = (shape((1, T, N, H)), shape((1, T, K, H)), shape((1, T, K, H)), shape((N,)))

    def loss(q, k, v, sinks, tags):
        return attention(q, k, v, sinks, q_positions=tags, k_positions=tags).sum()

    for function in (loss, jax.grad(loss, argnums=(0, 1, 2, 3))):
        memory = jax.jit(function).lower(*arrays, tags).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 120e6  # T x T scores of one head are 4.3 GB


def test_bfloat16_stays_near_float32():
    q, k, v, sinks = inputs(7, 1, 50, 50)
    tags = dict(q_positions=positions(1, 50), k_positions=positions(1, 50), window=20)
    low = jax.jit(lambda *a: attention(*(x.astype(jnp.bfloat16) for x in a), **tags))(q, k, v, sinks)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), formula(q, k, v, sinks, 20), atol=0.04)  # 2^-8 of values up to 4


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 1, 6, 128])
@pytest.mark.parametrize("implementation", ["cpu", "auto"])
def test_one_query_a_row_over_its_cache(implementation, window, dtype):
    """Rows of different lengths over a full cache, over a ring whose newest slot isn't the last, and over nothing but the sink."""
    q, k, v, sinks = inputs(7, 4, 1, 37, dtype)
    slots = positions(1, 37)[0]
    newest = jnp.asarray([36, 12, 50, 5], jnp.int32)
    ring = newest[2] - (newest[2] - slots) % 37
    k_positions = jnp.stack([slots, jnp.where(slots < 13, slots, -1), ring, jnp.full(37, -1)])
    tags = dict(q_positions=newest[:, None], k_positions=k_positions, window=window)
    ours = jax.jit(functools.partial(attention, implementation=implementation, window=window))(
        q, k, v, sinks, q_positions=newest[:, None], k_positions=k_positions)
    wide = [x.astype(np.float32) for x in (q, k, v, sinks)]
    expected = np.asarray(by_reference(*wide, **tags))
    assert ours.dtype == dtype and not np.asarray(ours[3], np.float32).any()
    np.testing.assert_allclose(ours.astype(np.float32), expected, **(dict(atol=2e-6) if dtype == np.float32 else dict(rtol=2**-8, atol=1e-5)))


def test_gradients_of_one_query_equal_those_of_the_reference():
    q, k, v, sinks = inputs(8, 2, 1, 9)
    tags = dict(q_positions=positions(2, 1, 8), k_positions=positions(2, 9), window=4)
    ours, expected = (jax.jit(jax.grad(lambda *a: (f(*a, **tags) ** 2).sum(), argnums=(0, 1, 2, 3)))(q, k, v, sinks)
                      for f in (attention, reference.attention))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_an_implementation_that_cannot_run_or_does_not_exist_is_refused():
    q, k, v, sinks = inputs(9, 1, 2, 2)
    tags = dict(q_positions=positions(1, 2), k_positions=positions(1, 2))
    with pytest.raises(ValueError, match=r"'cpu' needs one query a row and no segments \(found 2 queries\)"):
        attention(q, k, v, sinks, **tags, implementation="cpu")
    with pytest.raises(ValueError, match=r"k \(1, 2, 2, 8\).* positions \(1,\), \(1, 1\) don't fit"):
        attention(q[:, :1], k, v, sinks, q_positions=positions(1, 1), k_positions=positions(1, 1), implementation="cpu")
    with pytest.raises(ValueError, match="3 query heads and 2 key-value heads found"):
        attention(jnp.zeros((1, 2, 3, 8)), k, v, jnp.zeros(3), **tags)
    with pytest.raises(ValueError, match="window 0, expected None or at least 1"):
        attention(q, k, v, sinks, **tags, window=0)
    with pytest.raises(ValueError, match="'flash', expected 'auto' or one of reference, xla, cpu, cudnn"):
        attention(q, k, v, sinks, **tags, implementation="flash")
    with pytest.raises(ValueError, match="order 'slot', expected None or one of aligned, slots, ring"):
        attention(q, k, v, sinks, **tags, order="slot")
