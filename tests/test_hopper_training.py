"""Training's experts on Hopper GPUs without one: the kernel that takes weights as they are stored, interpreted with race detection, the layer around
it and its gradients, and when it is taken."""

import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax import mxfp4
from gptoss_jax.kernels import expert_matmul as op
from gptoss_jax.kernels import hopper
from gptoss_jax.kernels.expert_matmul import Mxfp4Weight, grouping, hopper_check, hopper_training, mosaic_gpu, reference

pytestmark = pytest.mark.usefixtures("quickly_compiled")
needs_new_jax = pytest.mark.skipif(jax.__version_info__ < hopper.OLDEST_JAX, reason=f"the kernel needs jax 0.11.2, found {jax.__version__}")
LIMIT, ALPHA = 6.0, 1.5


def packed(random, *shape):
    return Mxfp4Weight(*(jnp.asarray(part) for part in mxfp4.encode(random.standard_normal(shape).astype(np.float32) * shape[-1] ** -0.5)))


@needs_new_jax
@pytest.mark.parametrize("transposed", [False, True], ids=["as stored", "transposed"])
@pytest.mark.parametrize("outputs,inputs,sizes,adapter,biased", [
    (64, 64, (0, 8), False, True), (192, 128, (8, 0, 24, 16), True, False), (64, 576, (8, 160), True, True), (320, 64, (0, 0, 0), False, False)],
    ids=["one group", "empty and nobody's", "more steps than stages, both heights", "no rows of anybody"])
def test_interpreted_with_race_detection_products_equal_the_reference(outputs, inputs, sizes, adapter, biased, transposed):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from gptoss_jax.kernels.expert_matmul import hopper_kernel, hopper_stored

    random, experts, rows = np.random.default_rng(0), 3, max(sum(sizes), 8)
    weight, (width, columns) = packed(random, experts, outputs, inputs), (outputs, inputs) if transposed else (inputs, outputs)
    x, low_x, low, bias = (jnp.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in (
        (rows, width), (rows, 64), (experts, 64, columns), (experts, columns)))
    sizes = jnp.asarray((*sizes, 0)[:experts], jnp.int32)
    stored = hopper_stored.stored(weight)
    plan = mosaic_gpu.interpreted(hopper_stored.plan(rows, stored, transposed=transposed), plgpu.InterpretGPUParams(detect_races=True))
    found = hopper_stored.matmul(x, stored, hopper_kernel.tiles(sizes, rows, plan.rows), plan, bias if biased else None,
                                 (low_x, low.swapaxes(1, 2) if transposed else low) if adapter else None, transposed=transposed)
    x, low_x, low = (part.astype(jnp.float32) for part in (x, low_x, low))
    expected = reference.expert_matmul(x, mxfp4.decode(*weight) if transposed else weight, bias if biased else bias * 0, sizes)
    if adapter:
        expected += reference.expert_matmul(low_x, low, bias * 0, sizes)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8, atol=width * 1e-6)  # one rounding, at the end; sums of products


@needs_new_jax
def test_every_code_at_every_scale_byte_that_there_is_room_for_is_decoded_exactly():
    from gptoss_jax.kernels.expert_matmul import hopper_instructions, hopper_stored

    scales = (np.arange(2 * 64 * 2).reshape(1, 128, 2) % 129).astype(np.uint8)
    weight = Mxfp4Weight((np.arange(128 * 32).reshape(1, 128, 2, 16) * 37 % 256).astype(np.uint8), scales)
    blocks, factors = hopper_stored.stored(Mxfp4Weight(*map(jnp.asarray, weight)))
    decoded = [hopper_instructions.Interpreted.decode_stored(blocks[0, 64 * group :][:64], factors[0, group, 0]) for group in range(2)]
    expected = mxfp4.decode(*weight)[0].reshape(2, 64, 64)
    normal = (np.abs(expected) >= 2.0**-126) & (scales.reshape(2, 64, 2).repeat(32, axis=2) > 1)  # XLA on CPU takes what is less for zero
    np.testing.assert_array_equal(np.where(normal, np.asarray(decoded, np.float32), 0), np.where(normal, expected, 0))


def layer(*, tokens, chosen, experts, width, hidden, rank, seed=0):
    """Return the arrays of `lean_mlp`; of experts that tokens choose, one is somebody else's."""
    random = np.random.default_rng(seed)

    def numbers(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.bfloat16)

    def linear(inputs, outputs, far=0):
        low_rank = (numbers(experts, inputs, rank) * 0.125, numbers(experts, rank, outputs) * 0.125) if rank else (None, None)
        return packed(random, experts, outputs, inputs), numbers(experts, outputs) + far, *low_rank

    # A third of the neurons are always past the limit: what is near it has a gradient or none as a rounding falls.
    far = jnp.asarray(random.choice([0, 0, 0, 0, 13, -13], (experts, 2 * hidden)), jnp.bfloat16)

    expert = jnp.asarray(np.stack([random.permutation(experts + 1)[:chosen] for _ in range(tokens)]), jnp.int32)
    return numbers(tokens, width), expert, jnp.asarray(random.random((tokens, chosen)), jnp.float32), linear(width, 2 * hidden, far), linear(hidden, width)


def by_the_reference(x, expert, weight, gate_up, down):
    def apply(x, sizes, matrix, bias, a, b):
        y = reference.expert_matmul(x, matrix, bias, sizes)
        return y if a is None else y + reference.expert_matmul(reference.expert_matmul(x, a, a[:, 0] * 0, sizes), b, bias * 0, sizes)

    return grouping.by_expert(x, expert, weight, gate_up[1].shape[0],
                              lambda x, sizes: apply(reference.swiglu(apply(x, sizes, *gate_up), LIMIT, ALPHA), sizes, *down))


@needs_new_jax
@pytest.mark.parametrize("rank,rows", [(3, 1 << 20), (0, 1 << 20), (3, 256)], ids=["adapters", "no adapters", "in three parts, the last of them empty"])
def test_a_layer_and_its_gradients_equal_the_references_but_for_roundings(rank, rows, monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(hopper_training, "ROWS", rows)
    arguments = layer(tokens=9 if rows > 256 else 300, chosen=2, experts=3, width=128, hidden=64, rank=rank)
    x, expert, weight, gate_up, down = arguments
    g = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)
    constants = dict(limit=LIMIT, alpha=ALPHA, interpret=plgpu.InterpretGPUParams())
    out = hopper_training.forward(*arguments, **constants)
    dx, nothing, dweight, (_, *dgate_up), (_, *ddown) = hopper_training.backward(arguments, g, **constants)
    wide = jax.tree.map(lambda part: part.astype(jnp.float32), (x, weight, gate_up[1:], down[1:]))

    def exact(x, weight, gate_up_parts, down_parts):
        return by_the_reference(x, expert, weight, (gate_up[0], *gate_up_parts), (down[0], *down_parts))

    expected, gradients_of = jax.vjp(exact, *wide)
    assert nothing is None and out.dtype == dweight.dtype == jnp.float32 and dx.dtype == jnp.bfloat16
    found, right = (out, dx, dweight, dgate_up, ddown), (expected, *gradients_of(g))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        error, size = (float(jnp.sqrt(jnp.mean(part**2))) for part in (ours.astype(jnp.float32) - theirs, theirs))
        assert error < 2**-7 * size, (ours.shape, error / size)  # three to five roundings to bfloat16 one after the other, of 2^-9 at most each


@needs_new_jax
def test_what_is_not_finite_stays_with_its_token(monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    x, expert, weight, *rest = layer(tokens=9, chosen=2, experts=3, width=64, hidden=64, rank=2)
    constants = dict(limit=LIMIT, alpha=ALPHA, interpret=plgpu.InterpretGPUParams())
    weight = jnp.where(expert == 3, jnp.nan, weight)  # of somebody else's expert
    out = hopper_training.forward(x.at[4].set(jnp.nan), expert, weight, *rest, **constants)
    np.testing.assert_array_equal(np.isnan(out).any(axis=1), np.arange(9) == 4)


@needs_new_jax
def test_it_is_taken_where_the_program_is_for_a_hopper_gpu_and_nothing_else_is_asked(caplog, monkeypatch):
    arguments = layer(tokens=9, chosen=2, experts=3, width=64, hidden=64, rank=2)
    x, expert, weight, gate_up, down = arguments

    def program(device, x=x, gate_up=gate_up):
        def run(x):
            return jax.value_and_grad(lambda x: op.lean_mlp(x, expert, weight, gate_up, down, LIMIT, ALPHA, device).sum())(x)

        op.say.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.INFO, "gptoss_jax"):
            text = str(jax.make_jaxpr(run)(x))
        return "wgmma" in text, [record.getMessage() for record in caplog.records]

    h100, a100 = (types.SimpleNamespace(platform="gpu", compute_capability=capability, device_kind=kind)
                  for capability, kind in (("9.0", "NVIDIA H100 80GB HBM3"), ("8.0", "NVIDIA A100-SXM4-80GB")))
    assert program(h100) == (True, ["expert_matmul: mosaic_gpu where the program runs on a GPU"])
    slowly = "expert_matmul: XLA, slowly, as mosaic_gpu needs "
    assert program(a100) == (False, [f"{slowly}a Hopper GPU (found NVIDIA A100-SXM4-80GB)"])
    assert program(h100, x.astype(jnp.float32)) == (False, [f"{slowly}rows in bfloat16 (found float32)"])
    of_65 = (*gate_up[:2], jnp.zeros((3, 64, 65), jnp.bfloat16), jnp.zeros((3, 65, 128), jnp.bfloat16))
    assert program(h100, gate_up=of_65) == (False, [f"{slowly}adapters of a rank of at most 64 (found 65)"])
    dense = jnp.swapaxes(mxfp4.decode(*gate_up[0], dtype="bfloat16"), 1, 2), *gate_up[1:]
    assert program(h100, gate_up=dense) == program(None) == program(jax.local_devices()[0]) == (False, [])
    monkeypatch.setattr(jax, "local_devices", lambda: [h100])
    monkeypatch.setattr(hopper, "wrong_here", lambda _, training: "a kernel that computes right here (found 50.0% wrong)" if training else None)
    assert program(None) == (False, [f"{slowly}a kernel that computes right here (found 50.0% wrong)"])


@needs_new_jax
def test_the_kernel_is_checked_on_the_device_before_it_is_used(monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from gptoss_jax.kernels.expert_matmul import hopper_stored

    interpret = plgpu.InterpretGPUParams()
    assert hopper_check.disagreement_of_training(interpret) is None
    right = hopper_stored.Interpreted.decode_stored
    monkeypatch.setattr(hopper_stored.Interpreted, "decode_stored", lambda blocks, factors: right(blocks, factors[::-1]))
    jax.clear_caches()
    assert "stored weights' products wrong)" in hopper_check.disagreement_of_training(interpret)
    jax.clear_caches()
