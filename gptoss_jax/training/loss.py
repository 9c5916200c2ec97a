"""What training minimises."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

_LOGITS_BYTES = 256 << 20  # on a device, of a chunk; their gradients take as much again


def cross_entropy(logits_BTV, targets_BT, weights_BT):
    """Return (sum of weighted losses, sum of weights), both float32: their quotient is the masked mean.

    logits: [B, T, V], row t predicts targets[t]; targets: int32, ignored where weights is 0. Computed in float32.
    """
    logits = logits_BTV.astype(jnp.float32)
    is_target = jnp.arange(logits.shape[-1]) == targets_BT[..., None]  # no gather: V may lie on several devices
    picked = (logits * is_target.astype(jnp.float32)).sum(axis=-1)  # no jnp.where: a loop over chunks would hold its zeros, as large as the logits
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    weights = weights_BT.astype(jnp.float32)
    return (losses * weights).sum(), weights.sum()


def chunked_cross_entropy(unembed: Callable[[jax.Array], jax.Array], x_BTD, targets_BT, weights_BT, chunk_tokens: int):
    """Return what `cross_entropy` does of unembed(x) [B, T, V], of which only about `chunk_tokens` tokens' logits exist at a time, forward
    and backward: in the backward pass they are computed again.
    """
    B, T = targets_BT.shape
    length = max(1, chunk_tokens // B)
    if length >= T:
        return cross_entropy(unembed(x_BTD), targets_BT, weights_BT)
    count = -(-T // length)

    def chunked(x):  # [chunks, B, length, ...]: a chunk takes every so many tokens, which leaves rows split over devices as they are
        x = jnp.pad(x, [(0, 0), (0, length * count - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, length, count, *x.shape[2:]), 2, 0)

    @jax.checkpoint
    def add(total, chunk):
        x, targets, weights = chunk
        return total + cross_entropy(unembed(x), targets, weights)[0], None

    total, _ = jax.lax.scan(add, jnp.float32(0), tuple(map(chunked, (x_BTD, targets_BT, weights_BT))))
    return total, weights_BT.astype(jnp.float32).sum()


def chunk_tokens(vocab_size: int, devices: int = 1) -> int:
    """Return how many tokens' logits to compute at a time, a power of two: spread over `devices` they take at most 256 MiB of each."""
    return 1 << (max(_LOGITS_BYTES * devices // (4 * vocab_size), 1).bit_length() - 1)


def expert_load(indices_BTA, real_BT, num_experts: int):
    """Return the share of routed tokens that each expert gets, float32 [E] with sum 1; padding doesn't count."""
    chosen = jax.nn.one_hot(indices_BTA, num_experts, dtype=jnp.float32).sum(axis=2)
    counts = jnp.where(real_BT[..., None], chosen, 0).sum(axis=(0, 1))
    return counts / jnp.maximum(counts.sum(), 1)


def balance_loss(logits_BTE, load_E, real_BT):
    """Return the router's load-balancing loss of one layer: 1 when experts are used evenly, up to E when one gets everything.

    Source: Fedus et al. 2022, "Switch Transformers", section 2.2, equation 4; `load_E` comes from `expert_load` and carries no gradient.
    """
    probabilities = jnp.where(real_BT[..., None], jax.nn.softmax(logits_BTE, axis=-1), 0)
    mean_E = probabilities.sum(axis=(0, 1)) / jnp.maximum(real_BT.sum(dtype=jnp.float32), 1)
    return load_E.shape[0] * (jax.lax.stop_gradient(load_E) * mean_E).sum()


def z_loss(logits_BTE, real_BT):
    """Return the mean square of the log-sum-exp of one layer's router logits, which keeps them small; padding doesn't count.

    Source: Zoph et al. 2022, "ST-MoE", section 3.2, equation 5.
    """
    squares = jax.nn.logsumexp(logits_BTE.astype(jnp.float32), axis=-1) ** 2
    return jnp.where(real_BT, squares, 0).sum() / jnp.maximum(real_BT.sum(dtype=jnp.float32), 1)
