"""Attention through cuDNN, without cuDNN: two formulas written here stand in for its forward and backward pass, everything around them is ours.

What cuDNN is promised and gives back (softmax statistics in float32, masks by index, a backward pass from the statistics it is told) is all
the formulas know. That the calls are built as XLA takes them is for `test_gpu_programs.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DATA

from gptoss_jax import checkpoint
from gptoss_jax.inference.engine import Engine
from gptoss_jax.inference.sampling import Sampling
from gptoss_jax.kernels.attention import attention, cudnn, reference
from gptoss_jax.model import transformer

pytestmark = pytest.mark.usefixtures("quickly_compiled")
N, K, H = 6, 2, 8


def scores_by_index(q, k, scale, causal, lengths, window):
    T, S = q.shape[1], k.shape[1]
    scores = jnp.einsum("btkgh,bskh->btkgs", q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3]), k, precision="highest") * scale
    distance = jnp.arange(T)[:, None] - jnp.arange(S)
    seen = jnp.ones((1, T, S), bool) if lengths is None else jnp.broadcast_to(jnp.arange(S) < lengths[:, None, None], (len(lengths), T, S))
    seen &= (distance >= 0) if causal else True
    seen &= (distance < window) if window else True
    return jnp.where(seen[:, :, None, None], scores, -jnp.inf)


def stand_in_forward(q, k, v, *, scale, causal=False, lengths=None, window=None):
    scores = scores_by_index(q, k, scale, causal, lengths, window)
    lse = jax.nn.logsumexp(scores, axis=-1)
    out = jnp.einsum("btkgs,bskh->btkgh", jnp.exp(scores - lse[..., None]), v, precision="highest")
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def stand_in_backward(q, k, v, lse, out, g, *, scale, window):
    wide = (*q.shape[:2], k.shape[2], -1, q.shape[3])
    weights = jnp.exp(scores_by_index(q, k, scale, True, None, window) - lse.reshape(wide[:4])[..., None])
    delta = (g * out).sum(-1).reshape(wide[:4])[..., None]
    dscores = weights * (jnp.einsum("btkgh,bskh->btkgs", g.reshape(wide), v, precision="highest") - delta) * scale
    dq = jnp.einsum("btkgs,bskh->btkgh", dscores, k, precision="highest").reshape(q.shape)
    return dq, *(jnp.einsum("btkgs,btkgh->bskh", a, b.reshape(wide), precision="highest") for a, b in ((dscores, q), (weights, g)))


@pytest.fixture(autouse=True)
def formulas_for_cudnn(monkeypatch):
    monkeypatch.setattr(cudnn, "_forward", stand_in_forward)
    monkeypatch.setattr(cudnn, "_backward", stand_in_backward)


def inputs(seed, B, T, S):
    random = np.random.default_rng(seed)
    arrays = (random.standard_normal(shape).astype(np.float32) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
    return *map(jnp.asarray, arrays), jnp.asarray(random.standard_normal(N).astype(np.float32) * 2)


def forward(q, k, v, sinks, tags, window, order):
    """cudnn.forward, compiled as one program."""
    return jax.jit(lambda *arrays: cudnn.forward(*arrays, window, order))(q, k, v, sinks, tags)


def by_formula(q, k, v, sinks, tags, window=None):
    return jax.jit(lambda *arrays, tags: reference.attention(*arrays, **tags, window=window))(q, k, v, sinks, tags=tags)


def tags_of(q_positions, k_positions, q_segments=None, k_segments=None):
    return dict(q_positions=q_positions, k_positions=k_positions, q_segments=q_segments, k_segments=k_segments)


PACKED = np.array([[1] * 10 + [2] * 12 + [3] + [0] * 5, [4] * 1 + [2] * 20 + [3] * 7], np.int32)
PACKED_POSITIONS = np.array([[*range(10), *range(12), 0, *range(5)], [0, *range(20), *range(7)]], np.int32)


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("packed", [False, True])
def test_training_attention_and_its_gradients_are_those_of_the_formula(window, packed):
    q, k, v, sinks = inputs(1, 2, 28, 28)
    positions = PACKED_POSITIONS if packed else np.broadcast_to(np.arange(28, dtype=np.int32), (2, 28))
    tags = tags_of(positions, positions, *([PACKED] * 2 if packed else [None] * 2))
    g = jnp.asarray(np.random.default_rng(2).standard_normal(q.shape).astype(np.float32))

    @jax.jit
    def ours(*arrays):
        out, lse = cudnn.forward(*arrays, tags, window, "aligned")
        return out, *cudnn.backward(*arrays, tags, out, lse, g, window)

    @jax.jit
    def formula(*arrays):
        out, pull_back = jax.vjp(lambda *arrays: reference.attention(*arrays, **tags, window=window), *arrays)
        return out, *pull_back(g)

    # With segments, scores are small differences of numbers of _APART's size, rounded to float32: 1e-4 of a score, 1e-3 in a sum of keys.
    tolerance = dict(atol=2e-3 if packed else 5e-6)
    for name, found, expected in zip(("out", "q", "k", "v", "sinks"), ours(q, k, v, sinks), formula(q, k, v, sinks), strict=True):
        np.testing.assert_allclose(found, expected, **tolerance, err_msg=name)


def test_the_dims_that_keep_segments_apart_are_exact_in_bfloat16():
    segments = jnp.asarray(np.repeat(np.arange(1, 258), 16)[None, :4097].astype(np.int32))
    q, k, v = (jnp.zeros((1, 4097, heads, 64), jnp.bfloat16) for heads in (2, 1, 1))
    wide_q, wide_k, wide_v = cudnn._with_segments(q, k, v, segments)
    assert wide_q.shape[-1] == wide_k.shape[-1] == wide_v.shape[-1] == 80
    scores = np.asarray(wide_q[0, :, 0].astype(jnp.float32) @ wide_k[0, :, 0].astype(jnp.float32).T) * 64**-0.5
    same = np.asarray(segments[0][:, None] == segments[0])
    assert (scores[same] == 0).all() and scores[~same].max() <= -cudnn._APART


@pytest.mark.parametrize("slots", [64, 40, 37])
def test_a_decode_step_split_along_the_keys_is_the_formula(slots, monkeypatch):
    """Rows that fill all slots, end within a part, have one key, and none: nothing but the sink, whose value is zero."""
    monkeypatch.setattr(cudnn, "SHORTEST_SPLIT", 8)
    assert cudnn._splits(8, slots) == {64: 8, 40: 4, 37: 1}[slots]
    q, k, v, sinks = inputs(3, 4, 1, slots)
    newest = np.array([slots - 1, 20, 0, -1], np.int32)
    filled = np.where(np.arange(slots) <= newest[:, None], np.arange(slots), -1).astype(np.int32)
    tags = tags_of(newest[:, None], filled)
    out, _ = forward(q, k, v, sinks, tags, None, "slots")
    np.testing.assert_allclose(out, by_formula(q, k, v, sinks, tags), atol=2e-6)


def test_a_decode_step_over_a_ring_is_the_formula():
    """A ring that has gone round (its newest slot isn't the last), one that is just full, one that isn't."""
    q, k, v, sinks = inputs(4, 3, 1, 12)
    newest = np.array([[29], [11], [4]], np.int32)
    held = newest - (newest - np.arange(12)) % 12
    tags = tags_of(newest, np.where(held >= 0, held, -1).astype(np.int32))
    out, _ = forward(q, k, v, sinks, tags, 12, "ring")
    np.testing.assert_allclose(out, by_formula(q, k, v, sinks, tags, 12), atol=2e-6)


CHUNKS = [(0, 9), (0, 5), (25, 9), (25, 4), (2, 1), (7, 0)]  # of each row: tokens before the chunk, own tokens, behind which is padding


def chunk_positions(T=9):
    rows = [np.where(np.arange(T) < own, start + np.arange(T), -1) for start, own in CHUNKS]
    return np.array(rows, np.int32), np.array([[start] for start, _ in CHUNKS]), np.array([[own] for _, own in CHUNKS])


def test_a_chunk_over_a_full_layers_cache_is_the_formula():
    q, k, v, sinks = inputs(5, len(CHUNKS), 9, 40)
    positions, start, own = chunk_positions()
    slots = np.where(np.arange(40) < start + own, np.arange(40), -1).astype(np.int32)
    tags = tags_of(positions, slots)
    (out, _), real = forward(q, k, v, sinks, tags, None, "slots"), positions >= 0
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(by_formula(q, k, v, sinks, tags))[real], atol=2e-6)


@pytest.mark.parametrize("window", [4, 12])
def test_a_chunk_over_a_ring_is_the_formula(window):
    """Windows smaller and larger than the chunk; the ring has as many slots as the window."""
    q, k, v, sinks = inputs(6, len(CHUNKS), 9, window + 9)
    positions, start, own = chunk_positions()
    held = start - 1 - (start - 1 - np.arange(window)) % window
    tags = tags_of(positions, np.concatenate([np.where(held >= 0, held, -1), positions], axis=1).astype(np.int32))
    (out, _), real = forward(q, k, v, sinks, tags, window, "ring"), positions >= 0
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(by_formula(q, k, v, sinks, tags, window))[real], atol=2e-6)


def test_what_cudnn_needs_is_said_when_it_is_asked_for_by_name(monkeypatch):
    class Plugin:
        cuda_versions = object()

    positions = jnp.zeros((1, 4), jnp.int32)
    q, k, v, sinks = (x.astype(jnp.bfloat16) for x in inputs(7, 1, 4, 4))
    ask = functools.partial(attention, q_positions=positions, k_positions=positions, implementation="cudnn")
    monkeypatch.setattr(cudnn, "fused", None)
    with pytest.raises(ValueError, match=r"'cudnn' needs JAX's CUDA plugin, as in jax\[cuda13\].*found jax"):
        ask(q, k, v, sinks, order="aligned")
    monkeypatch.setattr(cudnn, "fused", Plugin)
    for arguments, order, message in (
        ((q.astype(jnp.float32), k, v, sinks), "aligned", "bfloat16 .found float32, bfloat16 and bfloat16"),
        ((q, k, v, sinks), None, "an order it can mask by index .found order=None"),
        ((q[..., :6], k[..., :6], v[..., :6], sinks), "aligned", "multiple of 8 up to 128.*found 6"),
        ((q, k, v, sinks), "aligned", "an NVIDIA GPU .found cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(*arguments, order=order)


def test_the_model_keeps_the_promises_about_its_keys(monkeypatch):
    """Greedy tokens of the oracle with every attention through cuDNN's formulas: prompts of unequal lengths in chunks, past the window, and in one."""
    asked = set()

    def through_cudnn(*arguments):
        *arrays, tags, window, order, _ = arguments
        asked.add((order, arrays[0].shape[1] == 1))
        return cudnn.forward(*arrays, tags, window, order)[0]

    monkeypatch.setattr(cudnn, "unmet", lambda *_: None)
    monkeypatch.setattr("gptoss_jax.kernels.attention._cudnn", through_cudnn)
    monkeypatch.setattr(transformer, "_run_alike", transformer._run)  # what was traced before, in another test, would ask nothing
    oracle = dict(np.load(DATA / "oracle" / "greedy.npz"))
    engine = Engine(checkpoint.load(DATA / "tiny_checkpoint", dtype="float32"), prefill_chunk=64)
    names = ["g150", "g16"]
    completions = engine.generate([oracle[f"{name}.prompt"].tolist() for name in names], Sampling(temperature=0), max_new_tokens=32)
    assert [c.ids for c in completions] == [oracle[f"{name}.new"].tolist() for name in names]
    assert asked == {(order, one) for order in ("slots", "ring") for one in (False, True)}
    asked.clear()
    (completion,) = engine.generate([oracle["g16.prompt"].tolist()], Sampling(temperature=0), max_new_tokens=4)
    assert completion.ids == oracle["g16.new"].tolist()[:4] and asked == {("aligned", False), ("slots", True), ("ring", True)}
