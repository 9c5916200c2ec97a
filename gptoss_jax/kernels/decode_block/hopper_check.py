"""Whether the Hopper kernels compute right on the device at hand: a row against the reference."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from gptoss_jax.kernels.decode_block import mosaic_gpu, reference
from gptoss_jax.kernels.hopper import first_disagreement, now

# inputs and outputs, key-value heads, experts, slots, ring, position: a ring gone round, half a row of several tiles, nobody's row
CASES = ((1088, 8, 32, 128, True, 300), (192, 2, 128, 384, False, 200), (192, 2, 32, 128, True, -1))


def disagreement(interpret=None) -> str | None:
    """Return how the kernels' results differ from the reference's on JAX's first device, or why there are none; None where they agree."""
    return first_disagreement([functools.partial(_compare, *case) for case in CASES], interpret)


def arguments(D, K, E, S, position, G=8, H=64):
    """Return numbers for `decode_block`."""
    random, J, I = np.random.default_rng(0), (G + 2) * K * H, G * K * H
    angles = random.uniform(0, 6, (1, H // 2)).astype(np.float32)

    def numbers(*shape, scale=1.0):
        return np.asarray(random.standard_normal(shape) * scale, jnp.bfloat16)

    return (numbers(1, D), numbers(D), numbers(J, D, scale=D**-0.5), numbers(J), np.cos(angles), np.sin(angles), numbers(1, S, K, H), numbers(1, S, K, H),
            numbers(K, G), np.asarray([position], np.int32), numbers(D, I, scale=I**-0.5), numbers(D), numbers(D), numbers(E, D))


def _compare(D, K, E, S, ring, position, interpret):
    arrays = arguments(D, K, E, S, position)

    def flat(run, *arrays):
        summed, early, keys, values = run(*arrays, ring=ring, epsilon=1e-5)
        return summed, early.rows, early.scores(), keys, values

    found, expected = (now(functools.partial(flat, run), *arrays) for run in (
        functools.partial(mosaic_gpu.run, interpret=interpret), functools.partial(reference.decode_block, implementation="reference")))
    for what, ours, right in zip(("sums", "rows", "scores", "keys", "values"), found, expected):
        wrong = ~(np.abs(ours - right) <= 2**-6 * np.abs(right) + 2**-6 * right.std())  # several roundings to bfloat16 on the way; NaN is wrong
        if wrong.any():
            return f"kernels that compute right here (found {wrong.mean():.1%} of {what} of {S} slots wrong)"
    return None
