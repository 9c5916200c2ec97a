"""Attention by cuDNN on NVIDIA GPUs, in bfloat16.

Attention with a sink is attention without one times sigmoid(lse - sink), and two parts of the keys merge by their lse, so nothing here holds a
score. cuDNN masks by index and knows no tags: the caller's `order` says where the keys lie, see `attention` of this package.

JAX's public function rounds the lse to bfloat16 (3 % of a weight at an lse of 12) and stops its gradient, so this takes the function under
it, whose lse is float32, and its backward pass: fed with the lse and the output that include the sink, it gives the exact gradients.
"""

from __future__ import annotations

import functools
import inspect
import math

import jax
import jax.numpy as jnp

from gptoss_jax.kernels.attention import reference, xla
from gptoss_jax.kernels.hopper import SMS

try:
    from jax._src.cudnn import fused_attention_stablehlo as fused

    _NEWER = {"score_mod": None} if "score_mod" in inspect.signature(fused.dot_product_attention).parameters else {}  # from jax 0.12 on
    _FORWARD, _BACKWARD = fused._dot_product_attention_fwd_p_wrapper, fused._dot_product_attention_bwd_p_wrapper
except (ImportError, AttributeError):
    fused = None

LOWEST = -1e30
SHORTEST_SPLIT = 256  # keys
_APART = 1024  # by which the score of a key of another segment is lowered: exp of it is zero


def unmet(q_BTNH, k_BSKH, v_BSKH, q_segments, window, order) -> str | None:
    """Return the requirement that these arguments or this machine don't meet, None if they meet all."""
    if fused is None or fused.cuda_versions is None:
        return f"JAX's CUDA plugin, as in jax[cuda13], in a version whose cuDNN functions this package knows (found jax {jax.__version__})"
    if {q_BTNH.dtype, k_BSKH.dtype, v_BSKH.dtype} != {jnp.dtype(jnp.bfloat16)}:
        return f"q, k and v in bfloat16 (found {q_BTNH.dtype}, {k_BSKH.dtype} and {v_BSKH.dtype})"
    if order is None or (q_segments is not None and order != "aligned") or (window is not None and order == "slots"):
        return f"keys in an order it can mask by index (found order={order!r}, {'no ' if q_segments is None else ''}segments, window={window})"
    width = q_BTNH.shape[3] + (0 if q_segments is None else _segment_dims(q_BTNH.shape[1])[1])
    if width % 8 or width > 128:
        return f"a head width that is a multiple of 8 up to 128, {width - q_BTNH.shape[3]} for segments included (found {width})"
    if jax.default_backend() == "gpu" and float(getattr(jax.devices()[0], "compute_capability", 0)) < 8:
        return f"an NVIDIA GPU of compute capability 8.0 or newer (found {jax.devices()[0].device_kind})"
    return None


def forward(q, k, v, sinks, tags, window, order):
    """Return (the result of `reference.attention`, the lse [B, T, N] float32 with the sink where order is "aligned", else of no meaning)."""
    B, T, N, H = q.shape
    sinks = sinks.astype(jnp.float32)
    if order == "aligned":
        wide = _with_segments(q, k, v, tags["q_segments"])
        out, lse = _forward(*wide, scale=H**-0.5, causal=True, window=window)
        total = jnp.logaddexp(lse, sinks)
        return (out[..., :H].astype(jnp.float32) * jnp.exp(lse - total)[..., None]).astype(q.dtype), total
    out = _one_query(q, k, v, sinks, tags) if T == 1 else _chunk(q, k, v, sinks, tags, window, order)
    return out, jnp.zeros((B, T, N), jnp.float32)


def backward(q, k, v, sinks, tags, out, lse, g, window):
    """Return the gradients of q, k, v and sinks for order "aligned". out, lse: of `forward`."""
    H = q.shape[-1]
    wide_q, wide_k, wide_v = _with_segments(q, k, v, tags["q_segments"])
    extra = [(0, 0)] * 3 + [(0, wide_q.shape[-1] - H)]
    grads = _backward(wide_q, wide_k, wide_v, lse, jnp.pad(out, extra), jnp.pad(g.astype(q.dtype), extra), scale=H**-0.5, window=window)
    _, dsinks = xla.delta_and_sink_gradient(sinks, out, lse, g)
    return *(grad[..., :H] for grad in grads), dsinks.astype(sinks.dtype)


def _one_query(q_B1NH, k_BSKH, v_BSKH, sinks_N, tags):
    """Decode: the query heads of a key-value head take the place of queries, parts of the slots that of rows; no key is read twice."""
    B, S, K, H = k_BSKH.shape
    G = q_B1NH.shape[2] // K
    C = _splits(B * K, S)
    filled_B = jnp.minimum(tags["q_positions"][:, 0] + 1, S)  # a ring's slots fill in order too
    filled_BC = jnp.clip(filled_B[:, None] - jnp.arange(C) * (S // C), 0, S // C)
    q_BCGKH = jnp.broadcast_to(jnp.swapaxes(q_B1NH.reshape(B, 1, K, G, H), 2, 3), (B, C, G, K, H))
    k, v = (x.reshape(B * C, S // C, K, H) for x in (k_BSKH, v_BSKH))
    out, lse = _forward(q_BCGKH.reshape(B * C, G, K, H), k, v, scale=H**-0.5, lengths=jnp.maximum(filled_BC, 1).reshape(-1))
    lse = jnp.where((filled_BC > 0)[:, :, None, None], lse.reshape(B, C, G, K), LOWEST)
    out = out.reshape(B, C, G, K, H)
    out = merge([(out[:, c], lse[:, c]) for c in range(C)], jnp.swapaxes(sinks_N.reshape(K, G), 0, 1))
    return jnp.swapaxes(out, 1, 2).reshape(B, 1, K * G, H).astype(q_B1NH.dtype)


def _chunk(q, k, v, sinks, tags, window, order):
    """Prefill on top of a cache: what came before the chunk has no mask but its length, or is a ring of few slots; the chunk is causal."""
    B, T, N, H = q.shape
    positions_BT = tags["q_positions"]
    if order == "slots":
        start_B1 = jnp.maximum(positions_BT[:, :1], 0)
        slots_BT = jnp.minimum(start_B1 + jnp.arange(T), k.shape[1] - 1)[:, :, None, None]
        past, past_lse = _forward(q, k, v, scale=H**-0.5, lengths=jnp.maximum(start_B1[:, 0], 1))
        past_lse = jnp.where((start_B1 > 0)[..., None], past_lse, LOWEST)
        k, v = (jnp.take_along_axis(x, slots_BT, axis=1) for x in (k, v))
    else:
        ring = k.shape[1] - T
        past, past_lse = _few_keys(q, k[:, :ring], v[:, :ring], positions_BT, tags["k_positions"][:, :ring], window)
        k, v = k[:, ring:], v[:, ring:]
    out, lse = _forward(q, k, v, scale=H**-0.5, causal=True, window=window)
    return merge([(past, past_lse), (out, lse)], sinks).astype(q.dtype)


def _few_keys(q, k_BRKH, v_BRKH, q_positions, k_positions, window):
    """Attend to the R slots of a ring: only the first window - 1 queries of the chunk can see any."""
    B, T, N, H = q.shape
    K, seeing = k_BRKH.shape[2], min(T, window - 1)
    scores = jnp.einsum("btkgh,brkh->btkgr", q[:, :seeing].reshape(B, seeing, K, N // K, H), k_BRKH, preferred_element_type=jnp.float32)
    seen = reference.visible(q_positions[:, :seeing], k_positions, None, None, window)[:, :, None, None]
    scores = jnp.where(seen, scores * H**-0.5, LOWEST)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - lse[..., None]).astype(v_BRKH.dtype)
    out = jnp.einsum("btkgr,brkh->btkgh", weights, v_BRKH).reshape(B, seeing, N, H)
    late = [(0, 0), (0, T - seeing), (0, 0)]
    return jnp.pad(out, [*late, (0, 0)]), jnp.pad(lse.reshape(B, seeing, N), late, constant_values=LOWEST)


def merge(parts, sinks):
    """Return the attention over all parts (out, lse) and the sink, float32. A part of lse LOWEST has no keys.

    A Python loop: without reductions the compiler makes it one kernel.
    """
    top = functools.reduce(jnp.maximum, [lse for _, lse in parts], sinks)
    total, acc = jnp.exp(sinks - top), 0.0
    for out, lse in parts:
        weight = jnp.exp(lse - top)
        total += weight
        acc += weight[..., None] * out.astype(jnp.float32)
    return acc / total[..., None]


def _splits(blocks: int, slots: int) -> int:
    """Return into how many parts to cut the slots, so that `blocks` thread blocks a part fill the processors once."""
    splits = 1
    while 2 * splits * blocks <= SMS and slots % (2 * splits) == 0 and slots // (2 * splits) >= SHORTEST_SPLIT:
        splits *= 2
    return splits


def _segment_dims(tokens: int) -> tuple[int, int]:
    """Return (bits that number the segments of a row of `tokens`, dims they take, padded to what cuDNN allows)."""
    bits = max(1, (tokens - 1).bit_length())
    return bits, -(bits + 1) // 8 * -8


def _with_segments(q, k, v, segments_BT):
    """Widen the heads so that q . k falls by _APART / scale or more between segments and stays as it is within one.

    A segment's number in binary, its bits as signs: the product of two is the number of bits less twice those that differ; one more dim takes
    the number of bits off again. All exact in bfloat16. Costs H + 16 instead of H dims for rows of up to 32,768 tokens, and no T x T mask.
    """
    if segments_BT is None:
        return q, k, v
    T, H = q.shape[1], q.shape[-1]
    bits, dims = _segment_dims(T)
    number_BT = jnp.cumsum(jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1]) != 0, axis=1)
    signs = 2 * (number_BT[..., None] >> jnp.arange(bits) & 1) - 1
    ones = jnp.ones((*signs.shape[:2], 1), signs.dtype)
    height = 2 ** math.ceil(math.log2(_APART / 2 * H**0.5))
    q_extra, k_extra = (jnp.pad(jnp.concatenate([signs, last], axis=-1), [(0, 0), (0, 0), (0, dims - bits - 1)]) for last in (-bits * ones, ones))

    def widen(x, extra):
        return jnp.concatenate([x, jnp.broadcast_to(extra[:, :, None].astype(x.dtype), (*x.shape[:3], dims))], axis=-1)

    return widen(q, q_extra * height), widen(k, k_extra), jnp.pad(v, [(0, 0)] * 3 + [(0, dims)])


def _forward(q, k, v, *, scale, causal=False, lengths=None, window=None):
    """Return (out [B, T, N, H], lse float32 [B, T, N]) by cuDNN. lengths: int32 [B], keys of each row, at least 1."""
    unused = jnp.zeros(0, q.dtype)
    padding = [unused] * 2 if causal else [jnp.full(q.shape[0], q.shape[1], jnp.int32), lengths]
    kind = fused.MaskType.CAUSAL if causal else fused.MaskType.PADDING
    out, lse = _FORWARD.bind(q, k, v, unused, *padding, *[unused] * 4, mask_type=kind, is_training=True, **_options(scale, window))
    return out, jnp.swapaxes(lse, 1, 2)


def _backward(q, k, v, lse, out, g, *, scale, window):
    """Return cuDNN's gradients of q, k and v under a causal mask, from the lse and the output it is told."""
    unused = [jnp.zeros(0, q.dtype)] * 7
    return _BACKWARD.bind(q, k, v, *unused, jnp.swapaxes(lse, 1, 2), out, g, mask_type=fused.MaskType.CAUSAL, **_options(scale, window))


def _options(scale, window) -> dict:
    return dict(scale=scale, seed=42, dropout_rate=0.0, variadic_args=(False, False), layout=fused.AttentionLayout.BTNH.value,
                sliding_window_length=window, **_NEWER)
