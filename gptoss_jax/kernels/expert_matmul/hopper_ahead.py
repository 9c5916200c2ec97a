"""What the next kernel will read, fetched to the L2 cache of a NVIDIA Hopper GPU as one ends: memory isn't idle while the next one starts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gptoss_jax.kernels.expert_matmul.hopper_layout import GROUP

MOST_BYTES = 20_000_000  # by estimate what memory delivers between a kernel's last bytes and the next one's first; well within the cache
_WORDS_BYTES = GROUP * GROUP // 2


def fetch(weight, share, shares: int, expert_smem=None):
    """Have one of so many shares of a weight in GMEM, or of its first inputs, fetched to the L2 cache, and wait for nothing.

    weight: a sequence of one array [outputs, inputs]; or a HopperWeight, of which the experts in expert_smem [chosen, ...] are fetched, but for
    those who aren't here.
    """
    count, fetch_tile = _dense(*weight) if expert_smem is None else _experts(*weight, expert_smem)

    def one(i, _):
        fetch_tile(share + i * shares)
        return _

    jax.lax.fori_loop(0, jnp.maximum(0, (count - share + shares - 1) // shares), one, None)


def _dense(weight):
    """Return how many tiles there are, and what fetches one."""
    (outputs, inputs), size = weight.shape, weight.dtype.itemsize
    rows, columns = min(outputs, 64), min(inputs, 256)
    down, across = -(-outputs // rows), min(-(-inputs // columns), MOST_BYTES // (outputs * columns * size))
    return down * across, lambda at: plgpu.async_prefetch(weight.at[pl.ds(at % down * rows, rows), pl.ds(at // down * columns, columns)])


def _experts(words, scales, expert_smem):
    """Return how many tiles there are, and what fetches one."""
    E, outs, ins = scales.shape[:3]
    groups, chosen = min(ins, 8), 4
    across = min(-(-ins // groups), MOST_BYTES // (chosen * outs * groups * _WORDS_BYTES))

    def fetch_tile(at):
        expert, here = expert_smem[at % chosen], (pl.ds(at // chosen % outs, 1), pl.ds(at // (chosen * outs) * groups, groups))

        @pl.when(expert < E)
        def _():
            for part in (words, scales):
                plgpu.async_prefetch(part.at[expert, *here])

    return chosen * outs * across, fetch_tile
