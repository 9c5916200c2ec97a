"""The transformer against what transformers computed (tests/data/oracle, made with transformers 5.23.0), and against itself."""

import contextlib
import functools
import json
import re
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import DATA
from flax import nnx

from gptoss_jax import mxfp4, sharding
from gptoss_jax.config import PRESETS, GptOssConfig, RopeScaling
from gptoss_jax.model import GptOss, make_cache
from gptoss_jax.model.rope import inverse_frequencies
from gptoss_jax.model.weights import declare

pytestmark = pytest.mark.usefixtures("quickly_compiled")

TOLERANCE = 5e-5  # of the oracle: the mildest mistake tried moves a logit by more


def read_safetensors(directory, dtype):
    """An independent reader: header and bytes by hand."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + struct.unpack("<Q", data[:8])[0]
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                low, high = (start + offset for offset in entry["data_offsets"])
                kind = np.uint8 if entry["dtype"] == "U8" else ml_dtypes.bfloat16
                array = np.frombuffer(data[low:high], kind).reshape(entry["shape"])
                tensors[name] = jnp.asarray(array if kind == np.uint8 else array.astype(dtype))
    return tensors


def load(directory, dtype=np.float32):
    return GptOss(GptOssConfig.from_file(directory / "config.json"), read_safetensors(directory, dtype))


@pytest.fixture(scope="module")
def tiny():
    return load(DATA / "tiny_checkpoint")


@pytest.fixture(scope="module")
def forward():
    return jax.jit(lambda model, tokens: model(tokens, capture=["embed", "layers.*", "final_norm"]))


def compare(model, oracle, forward):
    """Every array of one of the oracle's sequences."""
    logits, activations = forward(model, jnp.asarray(oracle["input_ids"])[None])
    logits = np.asarray(logits)[0]
    np.testing.assert_allclose(logits[oracle["positions"]], oracle["logits"], atol=TOLERANCE)
    np.testing.assert_array_equal(logits.argmax(-1), oracle["argmax"])
    theirs_by_our_name = {re.sub(r"^layer(\d+)", r"layers.\1", name): name for name in oracle}
    compared = 0
    for ours_name in set(theirs_by_our_name) & set(activations):
        name = theirs_by_our_name[ours_name]
        ours, theirs = np.asarray(activations[ours_name])[0], oracle[name]
        if name.endswith("router_indices"):
            sure = oracle[name.replace("indices", "margin")] > 1e-4
            np.testing.assert_array_equal(ours[sure], theirs[sure], err_msg=name)
        else:
            ours = ours if ours.shape == theirs.shape else ours[oracle["positions"]]
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, err_msg=name)
        compared += 1
    assert compared >= 3 * model.config.num_hidden_layers + 1


def continue_greedily(model, oracle, prompt, chunk, step, room=0):
    """Prefill in chunks, decode with a cache that has `room` to spare, and compare logits and tokens of all 32 steps."""
    prompt_ids, new = oracle[f"{prompt}.prompt"], oracle[f"{prompt}.new"]
    cache = make_cache(model.config, 1, len(prompt_ids) + len(new) + room, model.embed_tokens.weight.dtype)
    for start in range(0, len(prompt_ids), chunk):
        logits, cache = step(model, jnp.asarray(prompt_ids[start : start + chunk])[None], cache)
    for token, expected in zip(new, oracle[f"{prompt}.logits"]):
        last = np.asarray(logits)[0, -1]
        np.testing.assert_allclose(last, expected, atol=TOLERANCE)
        assert last.argmax() == token
        logits, cache = step(model, jnp.full((1, 1), token, jnp.int32), cache)


@pytest.fixture(scope="module")
def step():
    return jax.jit(lambda model, tokens, cache: model(tokens, cache=cache))


def test_every_activation_past_the_window_equals_transformers(tiny, forward):
    compare(tiny, dict(np.load(DATA / "oracle" / "s200.npz")), forward)


@pytest.mark.parametrize("prompt, chunk", [("g16", 16), ("g150", 64), ("g150", 150), ("g4090", 1024)])
def test_greedy_continuations_with_a_cache_equal_transformers(tiny, step, prompt, chunk):
    continue_greedily(tiny, dict(np.load(DATA / "oracle" / "greedy.npz")), prompt, chunk, step)


@pytest.mark.parametrize("sequence", ["s48", "s200", "s4224"])
def test_every_stored_sequence_of_the_reference_data_equals_transformers(shared, tiny, forward, sequence):
    compare(tiny, dict(np.load(shared / "oracle" / "tiny" / f"{sequence}.npz")), forward)


def test_no_constant_is_hard_coded():
    """Window 37, SwiGLU limit 3.5, theta 20,000, YaRN 8 over 64 (24, 2), eps 1e-3, 6 experts top 3, 6/3 heads of 20, past all of them."""
    directory = DATA / "other_constants"
    oracle = np.load(directory / "logits.npz")
    logits = jax.jit(GptOss.__call__)(load(directory), jnp.asarray(oracle["input_ids"])[None])
    np.testing.assert_allclose(logits[0], oracle["logits"], atol=TOLERANCE)


@pytest.fixture(scope="module")
def small(shared, tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    subprocess.run([sys.executable, shared / "tools" / "make_checkpoint.py", directory, "--preset", "small"], check=True,
                   capture_output=True)
    return load(directory)


@pytest.mark.parametrize("sequence", ["s48", "s200", "s4224"])
def test_the_small_checkpoint_equals_transformers(shared, small, forward, sequence):
    compare(small, dict(np.load(shared / "oracle" / "small" / f"{sequence}.npz")), forward)


@pytest.mark.parametrize("prompt", ["g16", "g150", "g4090"])
def test_the_small_checkpoints_greedy_continuations_equal_transformers(shared, small, step, prompt):
    oracle = dict(np.load(shared / "oracle" / "small" / "greedy.npz"))
    room = 4090 - len(oracle[f"{prompt}.prompt"])  # caches of one size: the decode step is compiled once
    continue_greedily(small, oracle, prompt, 818, step, room)  # five of them are 4090


def test_keys_and_values_of_the_reference_data_are_what_the_cache_holds(shared, tiny, step):
    oracle = np.load(shared / "oracle" / "tiny" / "s48.npz")
    _, cache = step(tiny, jnp.asarray(oracle["input_ids"])[None], make_cache(tiny.config, 1, 48, "float32"))
    for index, layer in enumerate(cache.layers):
        for ours, name in ((layer.keys, "cache_k"), (layer.values, "cache_v")):
            np.testing.assert_allclose(np.moveaxis(np.asarray(ours)[0], 1, 0), oracle[f"layer{index}.{name}"], atol=TOLERANCE)


def test_rope_frequencies_have_the_references_bits():
    oracle = np.load(DATA / "oracle" / "units.npz")
    frequencies, concentration = inverse_frequencies(GptOssConfig.from_file(DATA / "tiny_checkpoint" / "config.json"))
    np.testing.assert_array_equal(frequencies, oracle["rope_inv_freq"])
    assert concentration == pytest.approx(float(oracle["rope_scaling"]), rel=1e-7)


def test_rope_frequencies_have_transformers_bits_where_the_ramp_is_steep():
    """Those at which a ramp of float64 would round otherwise, from transformers 5.23's GptOssRotaryEmbedding."""
    rope = RopeScaling(factor=40.0, beta_fast=32.0, beta_slow=2.0, original_max_position_embeddings=64)
    frequencies, _ = inverse_frequencies(PRESETS["gpt-oss-20b"].replace(head_dim=60, rope_theta=10.0, rope_scaling=rope))
    np.testing.assert_array_equal(frequencies[18:22], np.float32([0.043336350470781326, 0.02944038435816765, 0.017361178994178772, 0.006906123366206884]))


def test_bfloat16_is_as_near_as_the_references_own_bfloat16():
    oracle = np.load(DATA / "oracle" / "s200.npz")
    exact = load(DATA / "tiny_checkpoint")
    low = load(DATA / "tiny_checkpoint", ml_dtypes.bfloat16)
    tokens = jnp.asarray(oracle["input_ids"])[None]
    run = jax.jit(lambda model: model(tokens, capture="layers.*.router_indices"))
    (logits, chosen), (_, exact_chosen) = run(low), run(exact)
    same = np.all([np.sort(np.asarray(chosen[name])[0]) == np.sort(np.asarray(exact_chosen[name])[0]) for name in chosen], axis=(0, 2))
    errors = np.abs(np.asarray(logits)[0] - oracle["logits"])[same]
    assert same.mean() > 0.94 and errors.mean() < 0.05 and errors.max() < 0.4  # the oracle's README: 0.94, 0.04, 0.35


# The model against itself, on a config in which no two dims are equal, with a layer of each kind.
CONFIG = GptOssConfig(vocab_size=104, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_local_experts=8,
                      num_experts_per_tok=3, num_attention_heads=6, num_key_value_heads=2, head_dim=20, sliding_window=16,
                      max_position_embeddings=512)


def random_weights(config=CONFIG, packed=True):
    random = np.random.default_rng(0)
    weights = {}
    for name, weight in declare(config, packed=False).items():
        values = random.standard_normal(weight.shape).astype(np.float32)
        if name.endswith("norm.weight"):
            values = np.ones_like(values)
        elif not name.endswith(("bias", "sinks")):
            values *= np.float32(0.15)
        if name.endswith(("gate_up_proj", "down_proj")):
            blocks, scales = mxfp4.encode(np.swapaxes(values, 1, 2))
            values = np.swapaxes(mxfp4.decode(blocks, scales), 1, 2)
            if packed:
                weights |= {f"{name}_blocks": jnp.asarray(blocks), f"{name}_scales": jnp.asarray(scales)}
                continue
        weights[name] = jnp.asarray(values)
    return weights


@pytest.fixture(scope="module")
def model():
    return GptOss(CONFIG, random_weights())


run = jax.jit(lambda model, tokens, segments=None: model(tokens, segment_ids=segments))
run_cached = jax.jit(lambda model, tokens, segments, cache: model(tokens, segment_ids=segments, cache=cache))


def tokens_of(B, T, seed=0):
    return jax.random.randint(jax.random.key(seed), (B, T), 0, CONFIG.vocab_size, dtype=jnp.int32)


SAME = 3e-5  # float32 sums in another order, logits of size ten


@pytest.mark.parametrize("chunks", [[40], [1] * 40, [15, 1, 24], [16, 16, 8], [17, 15, 8], [8, 24, 8]])
def test_chunks_of_any_size_with_a_cache_equal_one_forward(model, step, chunks):
    tokens = tokens_of(2, 40)
    cache, parts, start = make_cache(CONFIG, 2, 64, "float32"), [], 0
    for chunk in chunks:
        logits, cache = step(model, tokens[:, start : start + chunk], cache)
        parts.append(logits)
        start += chunk
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), run(model, tokens), atol=SAME)
    np.testing.assert_array_equal(cache.lengths, [40, 40])


def test_a_cache_keeps_its_dtype_in_a_model_of_another(model, step):
    tokens = tokens_of(2, 19)
    cache, parts = make_cache(CONFIG, 2, 64, "bfloat16"), []
    for chunk in (tokens[:, :9], tokens[:, 9:18], tokens[:, 18:]):
        logits, cache = step(model, chunk, cache)
        parts.append(logits)
        assert {array.dtype for array in jax.tree.leaves(cache.layers)} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), run(model, tokens), atol=0.5)  # keys and values of three digits; logits of size ten


@pytest.mark.parametrize("known_empty", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_the_order_of_a_batch_change_nothing(model, side, known_empty):
    tokens = tokens_of(3, 40)
    lengths = [40, 23, 7]
    padded, real = np.zeros((3, 40), np.int32), np.zeros((3, 40), np.int32)
    where = [slice(40 - n, 40) if side == "left" else slice(0, n) for n in lengths]
    for row, (place, n) in enumerate(zip(where, lengths)):
        padded[row, place], real[row, place] = tokens[row, :n], 1
    order = np.array([2, 0, 1])
    logits = run(model, padded, real)
    np.testing.assert_allclose(run(model, padded[order], real[order]), logits[order], atol=SAME)
    empty = make_cache(CONFIG, 3, 64, "float32")
    cached, cache = run_cached(model, padded, real, empty._replace(lengths=None) if known_empty else empty)
    np.testing.assert_array_equal(cache.lengths, lengths)
    following, _ = run_cached(model, tokens_of(3, 1, 5), np.ones((3, 1), np.int32), cache)
    for row, (place, n) in enumerate(zip(where, lengths)):
        alone = np.zeros((1, 41), np.int32)  # behind its tokens are some that none of them sees
        alone[0, :n], alone[0, n] = tokens[row, :n], tokens_of(3, 1, 5)[row, 0]
        alone = run(model, alone)
        np.testing.assert_allclose(logits[row, place], alone[0, :n], atol=SAME)
        np.testing.assert_allclose(cached[row, place], alone[0, :n], atol=SAME)
        np.testing.assert_allclose(following[row], alone[0, n : n + 1], atol=SAME)


@pytest.mark.parametrize("slots, tokens", [(64, 40), (40, 40), (33, 40), (33, 1)])
def test_a_cache_known_to_be_empty_gets_what_another_does(model, step, slots, tokens):
    """Of as many slots as tokens, more, and fewer, whose last tokens find none; of a single token, the logits, too, as it is told nothing of that."""
    empty = make_cache(CONFIG, 2, slots, "float32")
    (logits, cache), (same, other) = (step(model, tokens_of(2, tokens), cache) for cache in (empty, empty._replace(lengths=None)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=SAME), cache, other)
    if tokens == 1:
        jax.tree.map(np.testing.assert_array_equal, (logits, cache), (same, other))


def test_activations_beside_padding_are_where_their_tokens_are(model):
    tokens = tokens_of(1, 12)
    padded, real = np.zeros((1, 15), np.int32), np.zeros((1, 15), np.int32)
    padded[0, 2:14], real[0, 2:14] = tokens[0], 1
    names = ("embed", "layers.*.router_indices", "layers.1.hidden", "final_norm")
    run = jax.jit(functools.partial(GptOss.__call__, capture=names))
    *_, expected = run(model, tokens)
    *_, found = run(model, padded, segment_ids=real, cache=make_cache(CONFIG, 1, 32, "float32"))
    assert found.keys() == expected.keys() and len(found) > 3
    for name, value in expected.items():
        np.testing.assert_allclose(found[name][:, 2:14], value, atol=SAME, err_msg=name)


def test_packed_segments_equal_each_alone(model):
    tokens = tokens_of(1, 45)
    segments = jnp.asarray([[1] * 24 + [2] * 5 + [3] * 8 + [0] * 8], jnp.int32)
    logits = run(model, tokens, segments)
    for start, end in ((0, 24), (24, 29), (29, 37)):
        alone = jnp.pad(tokens[:, start:end], ((0, 0), (0, 40 - (end - start))))  # behind, where no token sees it
        np.testing.assert_allclose(logits[:, start:end], run(model, alone)[:, : end - start], atol=SAME)


@pytest.mark.parametrize("axes", [dict(expert=8), dict(tensor=2, data=4), dict(fsdp=4, expert=2), dict(data=2, expert=2, tensor=2)], ids=str)
def test_eight_devices_equal_one(axes):
    """Of the mesh that the model is told, or of the one that is set."""
    config = CONFIG.replace(num_attention_heads=8, num_key_value_heads=4, intermediate_size=128)
    weights = random_weights(config)
    tokens = tokens_of(8, 24)
    mesh = sharding.make_mesh(**axes)
    places = sharding.shardings(declare(config, dtype="float32"), mesh)
    placed = {name: jax.device_put(value, places[name]) for name, value in weights.items()}
    told = "tensor" in axes
    with contextlib.nullcontext() if told else jax.set_mesh(mesh):
        found = run(GptOss(config, placed, mesh=mesh if told else None), tokens)
    np.testing.assert_allclose(found, run(GptOss(config, weights), tokens), atol=SAME)


def test_a_mesh_that_does_not_divide_is_refused_by_name():
    mesh = sharding.make_mesh(tensor=8)
    with pytest.raises(sharding.ShardingError, match=r"down_proj_blocks: dim 2 of \(8, 64, 3, 16\).*3 entries.*tensor 8"):
        sharding.shardings({k: v for k, v in declare(CONFIG).items() if "down_proj_blocks" in k}, mesh)
    with pytest.raises(sharding.ShardingError, match="needs 6 devices, 8 given"):
        sharding.make_mesh(data=3, tensor=2)


def test_captured_activations_are_named_and_unknown_names_refused(model):
    capture = ["layers.1.router_indices", "*.hidden"]
    logits, activations = jax.jit(lambda tokens: model(tokens, capture=capture))(tokens_of(1, 5))
    assert sorted(activations) == ["layers.0.hidden", "layers.1.hidden", "layers.1.router_indices"]
    assert activations["layers.1.router_indices"].shape == (1, 5, 3)
    np.testing.assert_allclose(logits, run(model, tokens_of(1, 5)), atol=SAME)
    with pytest.raises(ValueError, match="'layers.9.hidden' matches no activation; there are embed, final_norm and, in layers.N, after_attn"):
        jax.eval_shape(lambda: model(tokens_of(1, 5), capture="layers.9.hidden"))


def test_activations_cost_nothing_when_not_asked_for(model):
    def text(**kwargs):
        return str(jax.make_jaxpr(lambda t: model(t, **kwargs))(tokens_of(1, 5)))

    assert text(capture=()) == text() != text(capture="embed")


def test_grad_of_chosen_weights_and_vmap_work_on_the_model():
    config = CONFIG.replace(num_hidden_layers=1, layer_types=CONFIG.layer_types[:1])
    model = GptOss(config, random_weights(config))
    graph, chosen, rest = nnx.split(model, lambda path, value: "sinks" in path, ...)

    def loss(chosen, tokens):
        return nnx.merge(graph, chosen, rest)(tokens[None]).std()

    gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(chosen, tokens_of(1, 9)[0]))
    assert len(gradients) == 1 and all(g.shape == (6,) and float(abs(g).max()) > 0 for g in gradients)
    batched = jax.jit(jax.vmap(lambda t: model(t[None])[0]))(tokens_of(3, 9))
    np.testing.assert_allclose(batched, run(model, tokens_of(3, 9)), atol=SAME)


def test_gradients_through_packed_experts_equal_those_through_dense_ones():
    config = CONFIG.replace(num_hidden_layers=1, layer_types=CONFIG.layer_types[:1])

    def gradient(weights):
        others = {name: value for name, value in weights.items() if "experts" not in name}
        return jax.jit(jax.grad(lambda w: GptOss(config, weights | w)(tokens_of(2, 20)).std()))(others)

    for ours, expected in zip(*(jax.tree.leaves(gradient(random_weights(config, packed=packed))) for packed in (True, False)), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_weights_are_read_and_replaced_by_their_checkpoint_name(model):
    weights = model.weights()
    assert list(sorted(weights)) == sorted(declare(CONFIG))
    changed = model.replace({"model.layers.1.self_attn.sinks": jnp.zeros(6)})
    assert float(abs(run(changed, tokens_of(1, 5)) - run(model, tokens_of(1, 5))).max()) > 1e-3
    with pytest.raises(ValueError, match="model.layers.7.sinks: no such weight"):
        model.replace({"model.layers.7.sinks": jnp.zeros(6)})
    with pytest.raises(ValueError, match=r"shape \(5,\) found, expected \(6,\)"):
        model.replace({"model.layers.1.self_attn.sinks": jnp.zeros(5)})
    with pytest.raises(ValueError, match="model.layers.1.self_attn.q_proj.lora_a: no such weight"):
        GptOss(CONFIG, weights | {"model.layers.1.self_attn.q_proj.lora_a": jnp.zeros((4, 64))})


@pytest.mark.parametrize("cached", [False, True])
def test_of_each_rows_last_token_only_the_states_are_the_same(model, cached):
    """With a cache, whose keys and values are the same too, a row may have no token at all: its state means nothing."""
    lengths, tokens = (9, 23, 1, 0) if cached else (9, 23, 1), tokens_of(4, 23)
    segments = (jnp.arange(23) < jnp.asarray(lengths)[:, None]).astype(jnp.int32)
    given = dict(segment_ids=segments, cache=make_cache(CONFIG, len(lengths), 32, "float32") if cached else None)
    run = jax.jit(lambda last: model.hidden_states(tokens[: len(lengths)], **given, last=last), static_argnums=0)
    (every, cache), (last, same) = run(False), run(True)
    assert last.shape == (len(lengths), 1, CONFIG.hidden_size)
    for row, length in enumerate(lengths[:3]):
        np.testing.assert_allclose(last[row, 0], every[row, length - 1], rtol=1e-5, atol=1e-5 * float(every.std()))
    jax.tree.map(np.testing.assert_array_equal, cache, same)


def test_wrong_inputs_are_named(model):
    with pytest.raises(ValueError, match=r"tokens: int32\[5\] found, expected integers \[batch, tokens\]"):
        model(jnp.zeros(5, jnp.int32))
    for shape in ((1, 0), (0, 4)):
        with pytest.raises(ValueError, match=rf"tokens: int32\[{shape[0]}, {shape[1]}\] found, expected integers \[batch, tokens\], one or more"):
            model(jnp.zeros(shape, jnp.int32))
    with pytest.raises(ValueError, match=r"segment_ids: shape \(1, 4\) found, expected that of tokens, \(1, 5\)"):
        model(tokens_of(1, 5), segment_ids=jnp.ones((1, 4), jnp.int32))
    for config, rows, found in ((CONFIG, 3, r"2 layers of \(3, 2, 20\)"), (CONFIG.replace(head_dim=24), 1, r"2 layers of \(1, 2, 24\)"),
                                (CONFIG.replace(num_hidden_layers=4, layer_types=CONFIG.layer_types * 2), 1, r"4 layers of \(1, 2, 20\)")):
        with pytest.raises(ValueError, match=rf"cache: {found} found, expected 2 layers of \(1, 2, 20\) \(rows, key-value heads, head width\)"):
            model(tokens_of(1, 5), cache=make_cache(config, rows, 8))
    with pytest.raises(ValueError, match="positions: float32 found, expected integers"):
        model(tokens_of(1, 5), positions=jnp.ones((1, 5)))


@pytest.mark.parametrize("dtype", ["uint8", "uint32", "int8", "int64"])
def test_inputs_of_any_integer_dtype_compute_the_same(model, dtype):
    """Positions too, of which those of a chunk's padding are negative inside."""
    tokens, segments, positions = (np.asarray(x).astype(dtype) for x in (tokens_of(2, 24), np.arange(24) < [[24], [9]], [np.arange(24)] * 2))
    run = jax.jit(GptOss.__call__)
    expected, found = run(model, tokens_of(2, 24)), run(model, tokens, positions=positions, segment_ids=segments)
    cached, _ = run(model, tokens, positions=positions, segment_ids=segments, cache=make_cache(CONFIG, 2, 32, "float32"))
    for row, length in enumerate((24, 9)):
        for logits in (found, cached):
            np.testing.assert_allclose(logits[row, :length], expected[row, :length], atol=SAME)


def test_with_64_bit_types_enabled_everything_computes_as_without(model, step):
    tokens, norm, parts = np.asarray(tokens_of(2, 19)), model.weights()["model.norm.weight"], []
    gradient = jax.jit(jax.grad(lambda norm, tokens: model.replace({"model.norm.weight": norm})(tokens).std()))
    expected = run(model, tokens), gradient(norm, tokens)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        cache = make_cache(CONFIG, 2, 64, "float32")
        for chunk in np.split(tokens.astype(np.int64), [9, 18], axis=1):
            logits, cache = step(model, chunk, cache)
            parts.append(logits)
        assert logits.dtype == jnp.float32 and cache.lengths.dtype == jnp.int32
        found = jnp.concatenate(parts, axis=1), gradient(norm, tokens)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=SAME), found, expected)


def test_a_long_prompt_in_chunks_needs_memory_for_one_chunk():
    length = 32_768
    config = CONFIG.replace(max_position_embeddings=length)
    model = jax.eval_shape(lambda: GptOss(config, random_weights(config)))
    cache = jax.eval_shape(lambda: make_cache(config, 1, length, "float32"))
    step = jax.jit(lambda m, t, c: m.hidden_states(t, cache=c), donate_argnums=2)
    memory = step.lower(model, jax.ShapeDtypeStruct((1, 512), jnp.int32), cache).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 60e6  # 512 x 32,768 scores of six heads are 403 MB
    assert max(layer.keys.shape[1] for layer in cache.layers[::2]) == config.sliding_window
