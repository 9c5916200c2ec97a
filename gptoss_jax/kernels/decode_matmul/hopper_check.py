"""Whether the Hopper kernel computes right on the device at hand: a few products against the reference."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from gptoss_jax.kernels.decode_matmul import mosaic_gpu, reference
from gptoss_jax.kernels.hopper import first_disagreement, now

# rows, inputs, outputs, whether they are summed and normed, whether only normed: eight rows and one, with more steps than stages and with fewer;
# blocks of 8, 16 and 24 outputs; inputs that end within a step.
CASES = ((3, 4160, 128, True, True), (1, 4160, 1088, True, True), (1, 704, 1088, False, True), (8, 192, 2880, False, False))


def disagreement(interpret=None) -> str | None:
    """Return how the kernel's results differ from the reference's on JAX's first device, or why there are none; None where they agree."""
    return first_disagreement([*(functools.partial(_compare, *case) for case in CASES), _misscored], interpret)


def _compare(rows, inputs, outputs, summed, normed, interpret):
    random = np.random.default_rng(0)

    def numbers(*shape):
        return np.asarray(random.standard_normal(shape), jnp.bfloat16)

    x, added, scale = numbers(rows, inputs), numbers(rows, inputs) if summed else None, numbers(inputs) if normed else None
    weight = numbers(outputs, inputs)
    arguments = x, added, scale, weight, None if normed else numbers(outputs)
    constants = {"epsilon": 1e-5, "dtype": jnp.float32 if normed else jnp.bfloat16}
    expected = now(functools.partial(reference.decode_matmul, **constants, implementation="xla"), *arguments)
    found = now(functools.partial(mosaic_gpu.run, interpret=interpret, **constants), *arguments)
    wrong = _wrong(("products", "sums", "norms"), found, expected)
    return wrong and f"a kernel that computes right here (found {wrong} of {outputs} x {inputs} wrong)"


def _misscored(*, interpret, inputs=192, outputs=64, experts=32):
    random = np.random.default_rng(0)
    shapes = (1, inputs), (outputs, inputs), (outputs,), (1, outputs), (outputs,), (experts, outputs)
    arrays = [np.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in shapes]

    def scored(*arrays, run):
        summed, early = run(*arrays, epsilon=1e-5)
        return summed, early.rows, early.scores()

    found, expected = (now(functools.partial(scored, run=run), *arrays) for run in (
        functools.partial(mosaic_gpu.run_scored, interpret=interpret),
        functools.partial(reference.decode_matmul_scored, parts=1, implementation="xla")))
    wrong = _wrong(("sums", "rows", "scores"), found, expected)
    return wrong and f"a kernel that scores right here (found {wrong} wrong)"


def _wrong(names, found, expected) -> str | None:
    """Return how much of the first array that differs does, by name; None where all agree but for a norm's last bit. NaN is wrong."""
    for name, ours, right in zip(names, found, expected):
        wrong = ~(np.abs(ours - right) <= 2**-7 * np.abs(right) + 2**-7 * right.std())
        if wrong.any():
            return f"{wrong.mean():.1%} of {name}"
    return None
