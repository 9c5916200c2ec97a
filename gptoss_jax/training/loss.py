"""What training minimises."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(logits_BTV, targets_BT, weights_BT):
    """Return (sum of weighted losses, sum of weights), both float32: their quotient is the masked mean.

    logits: [B, T, V], row t predicts targets[t]; targets: int32, ignored where weights is 0. Computed in float32.
    """
    logits = logits_BTV.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets_BT[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    weights = weights_BT.astype(jnp.float32)
    return (losses * weights).sum(), weights.sum()


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
