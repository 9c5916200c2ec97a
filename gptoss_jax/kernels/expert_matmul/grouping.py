"""Rows to their experts and back: which rows come together, and the sum of a token's experts."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

FEW_ROWS = 512  # from here on sorting is cheaper than comparing each with each, or each token's experts with each other


def by_expert(x_TD, expert_TA, weight_TA, experts: int, apply: Callable):
    """Return the weighted sum over each token's experts of `apply(rows [M, D] sorted by expert, rows of each expert [E])`, float32 [T, D].

    An expert of `experts` or more is somebody else's and adds nothing: its rows come last, and `apply` gives zeros for them.
    """
    T, A = expert_TA.shape
    order_M, place_M, group_sizes_E = group(expert_TA.reshape(-1), experts)
    x_MD = jnp.broadcast_to(x_TD, (A, x_TD.shape[1])) if T == 1 else x_TD[order_M // A]
    y_MD = apply(x_MD, group_sizes_E)[place_M]
    return weighted_sum(y_MD.reshape(T, A, y_MD.shape[1]), weight_TA)


def weighted_sum(y_TAD, weight_TA):
    """Sum over A, in float32."""
    # One by one: XLA makes a product of matrices of a sum over A, whose overhead on CPUs is 0.2 ms a token and layer.
    return functools.reduce(jnp.add, (y_TAD[:, i].astype(jnp.float32) * weight_TA[:, i, None] for i in range(y_TAD.shape[1])))


def group(expert_M, experts: int):
    """Return (which row comes where when sorted by expert, where each row comes, rows of each expert)."""
    sort, compare = (functools.partial(f, experts=experts) for f in (by_sorting, by_comparing))
    if expert_M.shape[0] > FEW_ROWS:
        return sort(expert_M)
    return jax.lax.platform_dependent(expert_M, cuda=compare, default=sort)


def by_sorting(expert_M, *, experts: int):
    order_M = jnp.argsort(expert_M, stable=True)
    group_sizes_E = jnp.zeros(experts + 1, jnp.int32).at[jnp.minimum(expert_M, experts)].add(1)[:experts]
    return order_M.astype(jnp.int32), jnp.argsort(order_M, stable=True).astype(jnp.int32), group_sizes_E


def by_comparing(expert_M, *, experts: int):
    """For few rows: each with each, no sort and no scatter to launch."""
    row_M = jnp.arange(expert_M.shape[0], dtype=jnp.int32)
    earlier = (expert_M[None, :] < expert_M[:, None]) | (expert_M[None, :] == expert_M[:, None]) & (row_M[None, :] < row_M[:, None])
    place_M = earlier.sum(axis=1, dtype=jnp.int32)
    order_M = jnp.where(place_M[None, :] == row_M[:, None], row_M, 0).sum(axis=1, dtype=jnp.int32)
    return order_M, place_M, (expert_M[None, :] == jnp.arange(experts)[:, None]).sum(axis=1, dtype=jnp.int32)


def ends(sizes):
    """Return the cumulative sum over the first axis, of few numbers, by comparing: one kernel that fuses with others, where a scan is some."""
    index = jnp.arange(len(sizes)).reshape(-1, *[1] * (sizes.ndim - 1))
    return jnp.where(index <= index[:, None], sizes, 0).sum(axis=1, dtype=jnp.int32)
