"""The definition of the op, by the ops it is made of: rotation, two cache writes, attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gptoss_jax.kernels.attention import attention
from gptoss_jax.kernels.cache_write import cache_write


def rotate(x_BTNH: jax.Array, cosine_BTR: jax.Array, sine_BTR: jax.Array) -> jax.Array:
    """Rotate the first half of each head against the second, in float32; returns x's dtype. R = H/2."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine_BTR[:, :, None, :], sine_BTR[:, :, None, :]
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def decode_attention(qkv_BJ, bias_J, cosine_BR, sine_BR, keys_BSKH, values_BSKH, sinks_KG, positions_B, *, ring: bool, dtype=jnp.bfloat16,
                     implementation: str = "reference"):
    """Attend with one query a row, its own key and value included, which are put into the cache.

    qkv: float32, the row's N queries, K keys and K values after each other, J = (N + 2K) * H, which with their bias are rounded to `dtype`
    before rotation and after; cosine, sine: float32, of the row's position; sinks: a row of G for each key-value head; positions: int32, -1 for
    a row that is nobody's: it gets zeros and writes nothing.
    ring: position p lies in slot p mod S, and only the last S positions are seen; otherwise in slot p, and what lies past S is dropped.
    implementation: of `attention`. Returns (out [B, N*H] in `dtype`, new keys, new values).
    """
    B, S, K, H = keys_BSKH.shape
    x_BJ = (qkv_BJ + bias_J.astype(jnp.float32)).astype(dtype)
    q, k, v = jnp.split(x_BJ.reshape(B, 1, -1, H), (sinks_KG.size, sinks_KG.size + K), axis=2)
    q, k = (rotate(x, cosine_BR[:, None], sine_BR[:, None]) for x in (q, k))
    last_B1, slots_S = positions_B[:, None], jnp.arange(S)
    new_B1 = jnp.where(last_B1 >= 0, last_B1 % S, -1) if ring else last_B1
    write = "xla" if implementation == "reference" else "auto"
    keys, values = (cache_write(old, new, new_B1, implementation=write) for old, new in ((keys_BSKH, k), (values_BSKH, v)))
    held_BS = last_B1 - (last_B1 - slots_S) % S if ring else jnp.broadcast_to(slots_S, (B, S))
    held_BS = jnp.where((held_BS >= 0) & (held_BS <= last_B1), held_BS, -1)
    out = attention(q, keys.astype(q.dtype), values.astype(q.dtype), sinks_KG.reshape(-1), q_positions=last_B1, k_positions=held_BS,
                    window=S if ring else None, order="ring" if ring else "slots", implementation=implementation)
    return out.reshape(B, -1), keys, values
