"""What the next kernel will read, fetched to the L2 cache of a NVIDIA Hopper GPU as one ends: memory isn't idle while the next one starts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gptoss_jax.kernels.expert_matmul.hopper_layout import GROUP

MOST_BYTES = 20_000_000  # about what memory delivers between one kernel's last bytes and the next one's first; well within the cache
_WORDS_BYTES = GROUP * GROUP // 2


def fetch(weight, share, shares: int):
    """Have one of so many shares of a weight [outputs, inputs] in GMEM, or of its first inputs, fetched to the L2 cache, and wait for nothing."""
    (outputs, inputs), size = weight.shape, weight.dtype.itemsize
    rows, columns = min(outputs, 64), min(inputs, 256)
    down, across = -(-outputs // rows), min(-(-inputs // columns), MOST_BYTES // (outputs * columns * size))

    def tile(i, _):
        at = share + i * shares
        plgpu.async_prefetch(weight.at[pl.ds(at % down * rows, rows), pl.ds(at // down * columns, columns)])
        return _

    jax.lax.fori_loop(0, jnp.maximum(0, (down * across - share + shares - 1) // shares), tile, None)


def fetch_experts(words, scales, expert_smem, share, shares: int):
    """Do the same with a HopperWeight's matrices of the experts in expert_smem [chosen, ...], but for those who aren't here."""
    E, outs, ins = scales.shape[:3]
    groups, chosen = min(ins, 8), expert_smem.shape[0]
    across = min(-(-ins // groups), MOST_BYTES // (chosen * outs * groups * _WORDS_BYTES))

    def tile(i, _):
        at = share + i * shares
        expert, here = expert_smem[at % chosen, 0], (pl.ds(at // chosen % outs, 1), pl.ds(at // (chosen * outs) * groups, groups))

        @pl.when(expert < E)
        def _():
            for part in (words, scales):
                plgpu.async_prefetch(part.at[expert, *here])

        return _

    jax.lax.fori_loop(0, jnp.maximum(0, (chosen * outs * across - share + shares - 1) // shares), tile, None)
