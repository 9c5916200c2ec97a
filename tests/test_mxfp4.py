"""MXFP4: exact for every code and scale byte, in numpy and on the device, and rounded as the OCP specification says."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax import mxfp4

TABLE = dict(np.load(DATA / "oracle" / "mxfp4_table.npz"))
ALL_SCALES = np.arange(256, dtype=np.uint8)[:, None]
ALL_CODES = np.broadcast_to(TABLE["block_bytes"], (256, 1, 16)).copy()


def on_device(blocks, scales, dtype):
    return np.asarray(jax.jit(lambda b, s: mxfp4.decode(b, s, dtype))(jnp.asarray(blocks), jnp.asarray(scales)))


@pytest.mark.parametrize("decode", [mxfp4.decode, on_device])
def test_decode_gives_the_references_bits_for_every_code_and_scale_byte(decode):
    for dtype, name in (("float32", "float32"), ("bfloat16", "bfloat16_as_float32")):
        values = decode(ALL_CODES, ALL_SCALES, dtype).astype(np.float32)
        assert values.shape == (256, 32)
        for half in (values[:, :16], values[:, 16:]):  # bits, so that signed zeros and denormals count
            np.testing.assert_array_equal(half.view(np.uint32), TABLE[name].view(np.uint32))


def test_a_bytes_low_nibble_comes_first():
    blocks = np.zeros((1, 16), np.uint8)
    blocks[0, 3] = 0x72  # 1.0 low, 6.0 high
    values = mxfp4.decode(blocks, np.full(1, 127, np.uint8))
    assert values[6] == 1.0 and values[7] == 6.0 and np.count_nonzero(values) == 2


def spec_encode(group, steady):
    """OCP MX v1.0 section 6.3, one block of 32 at a time, in float64, rounding by ml_dtypes; steady: with the top rounded to the grid first."""
    top = np.abs(group).max()
    if steady and top and top >= 1.75 * 2.0 ** np.floor(np.log2(top)):
        top = 2.0 ** (np.floor(np.log2(top)) + 1)
    scale = 0 if top == 0 else int(np.clip(np.floor(np.log2(top)) - 2 + 127, 0, 254))
    scaled = np.clip(group.astype(np.float64) * 2.0 ** (127 - scale), -6, 6).astype(ml_dtypes.float4_e2m1fn)
    return scaled.astype(np.float64) * 2.0 ** (scale - 127), scale


@pytest.mark.parametrize("steady", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_encode_rounds_to_nearest_even_as_the_specification_says(seed, steady):
    random = np.random.default_rng(seed)
    values = random.standard_normal((40, 64)).astype(np.float32) * np.exp2(random.integers(-100, 100, (40, 1))).astype(np.float32)
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.9, 7.0, 7.99, 4.0, 0.0], np.float32)
    values[:4, :12], values[:4, 12:32] = ties * np.array([[1], [-1], [2], [0.25]], np.float32), 0
    values[:3, 9] = 0, 6.99, 0  # tops of 7, 6.99 and 7.99
    blocks, scales = mxfp4.encode(values, steady=steady)
    decoded = mxfp4.decode(blocks, scales)
    for row in range(40):
        for group in range(2):
            expected, scale = spec_encode(values[row, group * 32 : group * 32 + 32], steady)
            assert scales[row, group] == scale
            np.testing.assert_array_equal(decoded[row, group * 32 : group * 32 + 32], expected)


def test_numpy_and_device_encode_to_the_same_bytes():
    values = np.random.default_rng(1).standard_normal((7, 3, 96)).astype(np.float32)
    values[0] = 0
    values[1, 0] = -0.0
    for ours, device in zip(mxfp4.encode(values), jax.jit(mxfp4.encode)(jnp.asarray(values))):
        np.testing.assert_array_equal(ours, np.asarray(device))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 15), min_size=32, max_size=32), st.integers(1, 250))
def test_whatever_is_on_the_grid_survives_encoding(codes, scale):
    codes = np.asarray(codes, np.uint8)
    values = mxfp4.decode((codes[0::2] | codes[1::2] << 4)[None], np.full(1, scale, np.uint8))
    again = mxfp4.decode(*mxfp4.encode(values))
    np.testing.assert_array_equal(again.view(np.uint32), values.view(np.uint32))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 15), min_size=32, max_size=32), st.integers(5, 250), st.integers(0, 9))
def test_what_moved_a_little_from_the_grid_goes_back_to_it_where_encoding_is_steady(codes, scale, seed):
    codes = np.asarray(codes, np.uint8)
    values = mxfp4.decode((codes[0::2] | codes[1::2] << 4)[None], np.full(1, scale, np.uint8))
    moved = values * (1 + 0.02 * np.random.default_rng(seed).uniform(-1, 1, 32)).astype(np.float32)
    np.testing.assert_array_equal(mxfp4.decode(*mxfp4.encode(moved, steady=True)), values)


def test_fake_quantize_is_encode_and_decode_with_the_gradient_passed_through():
    values = jax.random.normal(jax.random.key(0), (3, 64, 5))
    expected = np.moveaxis(mxfp4.decode(*mxfp4.encode(np.moveaxis(np.asarray(values), 1, -1).copy(), steady=True)), -1, 1)
    np.testing.assert_array_equal(np.asarray(jax.jit(mxfp4.fake_quantize, static_argnums=1)(values, 1)), expected)
    gradient = jax.jit(jax.grad(lambda v: (mxfp4.fake_quantize(v, 1) * values).sum()))(values)
    np.testing.assert_array_equal(np.asarray(gradient), np.asarray(values))


def test_bad_arrays_are_named():
    with pytest.raises(mxfp4.Mxfp4Error, match="multiple of 32"):
        mxfp4.encode(np.zeros((2, 33), np.float32))
    with pytest.raises(mxfp4.Mxfp4Error, match="infinity or NaN"):
        mxfp4.encode(np.full((1, 32), np.nan, np.float32))
    with pytest.raises(mxfp4.Mxfp4Error, match=r"expected \[..., C, 16\]"):
        mxfp4.decode(np.zeros((2, 15), np.uint8), np.zeros(2, np.uint8))
    with pytest.raises(mxfp4.Mxfp4Error, match="expected uint8"):
        mxfp4.decode(np.zeros((2, 16), np.int8), np.zeros(2, np.uint8))
