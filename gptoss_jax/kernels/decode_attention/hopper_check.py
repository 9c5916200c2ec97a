"""Whether the Hopper kernel computes right on the device at hand: a few rows against the reference."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from gptoss_jax.kernels.decode_attention import mosaic_gpu, reference
from gptoss_jax.kernels.hopper import first_disagreement, now

# slots, key-value heads, queries of each, ring, positions: a ring gone round, one that isn't, no row at all; parts of a long row, of a short one.
CASES = ((128, 2, 8, True, (300, 40, -1)), (1024, 4, 4, False, (900, 127)))


def disagreement(interpret=None) -> str | None:
    """Return how the kernel's results differ from the reference's on JAX's first device, or why there are none; None where they agree."""
    return first_disagreement([functools.partial(_compare, *case) for case in CASES], interpret)


def _compare(S, K, G, ring, positions, interpret):
    random = np.random.default_rng(0)
    B, H, angles = len(positions), 64, random.uniform(0, 6, (len(positions), 32)).astype(np.float32)
    J = (G + 2) * K * H
    bias, keys, values, sinks = (np.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in ((J,), (B, S, K, H), (B, S, K, H), (K, G)))
    arguments = random.standard_normal((B, J)).astype(np.float32), bias, np.cos(angles), np.sin(angles), keys, values, sinks, np.asarray(positions, np.int32)
    run = functools.partial(mosaic_gpu.run, ring=ring, interpret=interpret)
    expected = now(functools.partial(reference.decode_attention, ring=ring), *arguments)
    for what, found, right in zip(("outputs", "keys", "values"), now(run, *arguments), expected):
        wrong = ~(np.abs(found - right) <= 2**-6 * np.abs(right) + 2**-7)  # weights are rounded to bfloat16, and so is the sum; NaN is wrong
        if wrong.any():
            return f"a kernel that computes right here (found {wrong.mean():.1%} of {what} of {S} slots wrong)"
    return None
