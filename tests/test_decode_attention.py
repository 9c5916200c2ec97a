"""Decode attention in one kernel, without a Hopper: interpreted with race detection against the ops it replaces. What the compiler makes of it is in
test_mosaic_gpu.py, what a decode step is made of with it in test_gpu_programs.py."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.inference import measure
from gptoss_jax.config import GptOssConfig
from gptoss_jax.kernels import hopper
from gptoss_jax.kernels.attention import say_once
from gptoss_jax.kernels.decode_attention import decode_attention, hopper_check, mosaic_gpu, reference
from gptoss_jax.model import GptOss, arrangement, make_cache

pytestmark = pytest.mark.usefixtures("quickly_compiled")

needs_new_jax = pytest.mark.skipif(jax.__version_info__ < hopper.OLDEST_JAX, reason=f"the kernel needs jax 0.11.2, found {jax.__version__}")


def arguments(S, K, G, positions, sinks=1.0, dtype=jnp.bfloat16, seed=0):
    random, B, J = np.random.default_rng(seed), len(positions), (G + 2) * K * 64
    angles = random.uniform(0, 6, (B, 32)).astype(np.float32)
    qkv, bias = random.standard_normal((B, J)).astype(np.float32), jnp.asarray(random.standard_normal(J), jnp.bfloat16)
    keys, values = (jnp.asarray(random.standard_normal((B, S, K, 64)), dtype) for _ in range(2))
    sinks = jnp.asarray(random.standard_normal((K, G)) + sinks, jnp.float32)
    return qkv, bias, 1.2 * np.cos(angles), 1.2 * np.sin(angles), keys, values, sinks, np.asarray(positions, np.int32)


# slots, key-value heads, queries of each, ring?, positions, parts, how large the sinks are
CASES = {
    "a row of one key, a tile but one, a tile, a tile and one": (256, 2, 8, False, (0, 126, 127, 128), 1, 1.0),
    "parts of a long row, empty parts, no row": (1024, 4, 4, False, (900, 130, -1), 4, 1.0),
    "a partial last tile, the last slot, past it": (328, 3, 3, False, (300, 327, 400), 2, 1.0),
    "a ring not gone round, just, long ago, no row": (128, 2, 8, True, (5, 127, 300, -1), 1, 1.0),
    "a ring of less than a tile": (40, 2, 8, True, (20, 95), 1, 1.0),
    "sinks that leave nothing": (256, 2, 8, False, (200,), 1, 1e4),
    "sinks of no weight, several parts": (512, 4, 3, False, (500, -1), 2, -1e9),
}


@needs_new_jax
@pytest.mark.parametrize("case", CASES, ids=CASES)
def test_interpreted_with_race_detection_it_equals_rotation_writes_and_attention(case):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    S, K, G, ring, positions, splits, sinks = CASES[case]
    arrays = arguments(S, K, G, positions, sinks)
    run = functools.partial(mosaic_gpu.run, ring=ring, splits=splits, interpret=plgpu.InterpretGPUParams(detect_races=True))
    out, keys, values = jax.jit(run)(*arrays)
    expected, right_keys, right_values = jax.jit(functools.partial(reference.decode_attention, ring=ring))(*arrays)
    np.testing.assert_array_equal(keys, right_keys)
    np.testing.assert_array_equal(values, right_values)
    assert out.dtype == expected.dtype == jnp.bfloat16
    out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
    np.testing.assert_allclose(out, expected, rtol=2**-7, atol=2**-8)  # weights and sums are rounded to bfloat16, in another order
    assert not np.asarray(out[np.asarray(positions) < 0]).any()


@pytest.mark.parametrize("ring", [False, True])
def test_the_reference_is_the_formula(ring):
    """One row written out: the newest of 40 slots' keys, its own included, and the sink."""
    position, S, G = (57, 40, 3) if ring else (17, 40, 3)
    qkv, bias, cosine, sine, keys, values, sinks, positions = arguments(S, 1, G, (position,), dtype=jnp.float32)
    out, new_keys, new_values = decode_attention(qkv, bias, cosine, sine, keys, values, sinks.reshape(-1), positions, ring=ring, dtype=jnp.float32)
    x = (qkv + np.asarray(bias, np.float32)).reshape(G + 2, 64).astype(np.float64)
    turned = np.concatenate([x[:, :32] * cosine - x[:, 32:] * sine, x[:, 32:] * cosine + x[:, :32] * sine], axis=1)
    k, v = np.array(keys[0, :, 0], np.float64), np.array(values[0, :, 0], np.float64)
    k[position % S], v[position % S] = turned[G], x[G + 1]
    np.testing.assert_allclose(new_keys[0, :, 0], k, atol=1e-6)
    np.testing.assert_allclose(new_values[0, :, 0], v, atol=1e-6)
    seen = S if ring else position + 1
    weights = np.exp(turned[:G] @ k[:seen].T / 8)
    expected = weights @ v[:seen] / (weights.sum(axis=1) + np.exp(np.asarray(sinks[0], np.float64)))[:, None]
    np.testing.assert_allclose(out.reshape(G, 64), expected, atol=1e-5)


@needs_new_jax
def test_keys_are_split_until_the_processors_are_busy_and_never_too_short():
    from gptoss_jax.kernels.decode_attention import hopper_kernel

    assert [hopper_kernel.plan(rows, slots, 8)[:2] for rows, slots in ((1, 131_072), (1, 128), (1, 1024), (4, 8192), (64, 8192))] == [
        (16, 3), (1, 1), (4, 3), (4, 3), (1, 3)]


@needs_new_jax
def test_the_kernel_is_checked_on_the_device_before_it_is_used(monkeypatch, caplog):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpret = plgpu.InterpretGPUParams()
    assert hopper_check.disagreement(interpret) is None
    monkeypatch.setattr(hopper_check, "CASES", hopper_check.CASES[:1])
    right = mosaic_gpu.run
    monkeypatch.setattr(mosaic_gpu, "run", lambda qkv, *rest, **options: right(qkv * 1.25, *rest, **options))
    assert "a kernel that computes right here (found " in hopper_check.disagreement(interpret)
    device = types.SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(hopper, "wrong_here", lambda *_: "a kernel that computes right here (found 50.0% wrong)")
    arrays = arguments(256, 2, 8, (3,))
    with pytest.raises(ValueError, match=r"decode_attention implementation 'mosaic_gpu' needs a kernel that computes right here \(found 50.0% wrong\)"):
        decode_attention(*arrays, ring=False, implementation="mosaic_gpu")
    say_once.cache_clear()
    with caplog.at_level("INFO", "gptoss_jax"):
        programs = [str(jax.make_jaxpr(functools.partial(decode_attention, ring=False))(*arrays)) for _ in range(2)]
    assert not any("mosaic" in program or "mpmd" in program for program in programs)
    assert ["decode_attention: several kernels" in record.message for record in caplog.records if "decode" in record.message] == [True]


def test_named_it_says_what_is_missing():
    arrays = arguments(256, 2, 8, (3,))
    with pytest.raises(ValueError, match="decode_attention implementation 'pallas', expected 'auto' or one of reference"):
        decode_attention(*arrays, ring=False, implementation="pallas")
    needs = functools.partial(pytest.raises, ValueError)
    if jax.__version_info__ < hopper.OLDEST_JAX:
        with needs(match="'mosaic_gpu' needs jax 0.11.2 or newer"):
            decode_attention(*arrays, ring=False, implementation="mosaic_gpu")
        return
    for arrays, dtype, message in ((arrays, jnp.bfloat16, r"a Hopper GPU \(found cpu\)"),
                                   (arrays, jnp.float32, r"activations and a cache in bfloat16 \(found float32, bfloat16"),
                                   (arguments(250, 2, 8, (3,)), jnp.bfloat16, r"cache slots in multiples of 8 \(found 250\)"),
                                   (arguments(256, 1, 16, (3,)), jnp.bfloat16, r"at most 8 queries to a key.*\(found 64, 16 and 1 keys\)"),
                                   (arguments(256, 2, 3, (3,)), jnp.bfloat16, r"8 with twice the keys \(found 64, 3 and 2 keys\)")):
        with needs(match=f"decode_attention implementation 'mosaic_gpu' needs .*{message}"):
            decode_attention(*arrays, ring=False, dtype=dtype, implementation="mosaic_gpu")


def test_a_model_arranged_for_a_hopper_decodes_the_same_and_gives_its_sinks_back(monkeypatch):
    """Past its window, with rows of unequal lengths; the programs are what `default` branches say."""
    config = GptOssConfig(vocab_size=96, hidden_size=96, intermediate_size=32, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
                          num_attention_heads=6, num_key_value_heads=3, head_dim=64, sliding_window=16, max_position_embeddings=64)
    weights = measure.random_weights(config, "float32")
    apart, joined = (GptOss(config, weights) for _ in range(2))
    monkeypatch.setattr(arrangement, "_gpus_of", lambda array: sorted(array.sharding.device_set, key=lambda device: device.id))
    monkeypatch.setattr(hopper, "device_unmet", lambda op, device=None: None)
    monkeypatch.setattr(mosaic_gpu, "unmet_heads", lambda *_: None)
    joined.arrange()
    assert "model.layers.1.self_attn.hopper_sinks" in joined.arrays()
    name = "model.layers.1.self_attn.sinks"
    np.testing.assert_array_equal(joined.weights()[name], weights[name])
    other = joined.replace({name: weights[name] + 1})
    other.arrange()  # again, what was replaced
    assert other.arrays().keys() == joined.arrays().keys()
    np.testing.assert_array_equal(other.weights()[name], weights[name] + 1)
    step = jax.jit(lambda model, tokens, real, cache: model(tokens, segment_ids=real, cache=cache))
    tokens, real, found = jnp.arange(40).reshape(2, 20), (jnp.arange(20) < jnp.asarray([[3], [20]])).astype(jnp.int32), []
    for model in (apart, joined):
        logits, cache = step(model, tokens, real, make_cache(config, 2, 32, "float32"))
        found.append([np.asarray(logits)[np.asarray(real) > 0]])
        for token in range(6):
            logits, cache = step(model, jnp.full((2, 1), token), jnp.ones((2, 1), jnp.int32), cache)
            found[-1].append(np.asarray(logits)[:, 0])
    for one, other in zip(*map(np.concatenate, found), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
