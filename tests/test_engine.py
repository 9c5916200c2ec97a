"""Generation: the oracle's greedy tokens, sampling as defined, batches that don't disturb each other, nothing compiled twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DATA

from gptoss_jax import checkpoint, sharding
from gptoss_jax.inference import sampling
from gptoss_jax.inference.engine import Engine, PromptError
from gptoss_jax.inference.sampling import Sampling, SamplingError, sample, stack
from gptoss_jax.model import GptOss, cost

pytestmark = pytest.mark.usefixtures("quickly_compiled")

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model():
    return checkpoint.load(DATA / "tiny_checkpoint", dtype="float32")


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, prefill_chunk=32)


@pytest.fixture(scope="module")
def oracle():
    return dict(np.load(DATA / "oracle" / "greedy.npz"))


def test_a_batch_of_unequal_prompts_gives_transformers_greedy_tokens(engine, oracle):
    names = ["g150", "g16"]
    completions = engine.generate([oracle[f"{name}.prompt"].tolist() for name in names], GREEDY, max_new_tokens=32)
    for name, completion in zip(names, completions):
        assert completion.ids == oracle[f"{name}.new"].tolist() and completion.finish == "length"
        expected = jax.nn.log_softmax(oracle[f"{name}.logits"])[np.arange(32), oracle[f"{name}.new"]]
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)  # twice the tolerance of a logit


def test_a_row_stops_at_its_stop_id_and_others_go_on(model, oracle):
    new = oracle["g16.new"].tolist()
    stop = new[5]

    class Stops:
        stop_ids, sampleable = frozenset([stop]), 512

    prompts = [oracle["g16.prompt"].tolist(), oracle["g150.prompt"].tolist()]
    first, second = Engine(model, Stops, prefill_chunk=32).generate(prompts, GREEDY, max_new_tokens=12)
    assert first.finish == "stop" and first.ids == new[: new.index(stop) + 1]
    assert second.ids == oracle["g150.new"].tolist()[:12] and second.finish == "length"


def test_other_stop_ids_hold_from_the_next_call_on(model, oracle):
    new, engine = oracle["g16.new"].tolist()[:12], Engine(model, prefill_chunk=32)
    for stop_ids, finish in (({new[3]}, "stop"), (frozenset(), "length")):
        engine.stop_ids = stop_ids
        found, _ = engine.generate([oracle["g16.prompt"].tolist(), [1, 2, 3]], GREEDY, max_new_tokens=12)
        assert found.finish == finish and found.ids == new[: len(found.ids)]


def test_nothing_is_compiled_again_for_another_length_or_setting(model):
    """But once for prompts of one chunk, which attend to nothing before it, and once for longer ones."""
    engine = Engine(model, prefill_chunk=16)  # 40 tokens: chunks of 16, 16 and 8, the last one in a bucket of 16
    for length, settings in ((3, Sampling(seed=1)), (9, Sampling(temperature=0.5)), (16, Sampling(seed=9)), (40, Sampling()), (2, Sampling())):
        engine.generate([[5] * length], settings, max_new_tokens=length % 4 + 1)
    assert [step._cache_size() for step in (engine._prefill, engine._decode, engine._first)] == [2, 1, 1]


@pytest.mark.parametrize("length", [10, 40])
def test_what_is_compiled_before_there_are_weights_is_what_runs(model, caplog, length):
    """For a prompt of one chunk and one of three, of two sizes."""
    weights = cost.abstract_weights(model.config, "float32", device=jax.devices()[0])
    engine, sampling = Engine(GptOss(model.config, weights), prefill_chunk=16, steps_per_dispatch=2), Sampling(temperature=0.5, seed=3)
    engine.compile(length, 5, sampling)
    assert engine.hold(model)
    with jax.log_compiles():
        (found,) = engine.generate([[5] * length], sampling, max_new_tokens=5)
        assert "XLA compilation of jit(_" not in caplog.text
        engine.generate([[5] * length], GREEDY, max_new_tokens=1)
        assert "XLA compilation of jit(_first_token)" in caplog.text
    assert found == Engine(model, prefill_chunk=16, steps_per_dispatch=2).generate([[5] * length], sampling, max_new_tokens=5)[0]
    assert not engine.hold(GptOss(model.config, dict(model.weights()) | {"lm_head.weight": jnp.zeros((201, 64))}))


def test_a_model_trained_in_place_is_held_when_the_engine_is_told(model):
    trained = GptOss(model.config, dict(model.weights()))
    engine, prompts = Engine(trained, prefill_chunk=32), [[1, 2, 3]]
    before = engine.generate(prompts, GREEDY, max_new_tokens=4)
    trained.norm.weight[...] *= -1
    assert engine.generate(prompts, GREEDY, max_new_tokens=4) == before
    assert engine.hold(trained)
    after = engine.generate(prompts, GREEDY, max_new_tokens=4)
    assert after == Engine(trained, prefill_chunk=32).generate(prompts, GREEDY, max_new_tokens=4) != before


def test_rows_share_a_chunk(model):
    """So that the memory of a prompt's activations doesn't grow with the batch; 16 tokens of each are the fewest."""
    engine = Engine(model, prefill_chunk=128)
    shapes = [engine.lower(rows, 256)["prefill"].args_info[0][2].shape for rows in (1, 4, 32)]
    assert shapes == [(1, 128), (4, 32), (32, 16)]


def test_a_long_prompt_is_computed_as_hardly_more_tokens_than_it_has(model):
    engine = Engine(model, prefill_chunk=8192)
    found = {tokens: engine._chunks(1, tokens) for tokens in (600, 1024, 1025, 4096, 4097, 7169)}
    assert found == {600: [1024], 1024: [1024], 1025: [1280], 4096: [4096], 4097: [5120], 7169: [8192]}
    assert engine.lower(1, 4097)["prefill"].args_info[0][2].shape == (1, 5120)
    assert engine._chunks(1, 10_000) == [8192, 2048] and engine._chunks(4, 5000) == [2048, 2048, 1024]


def test_tokens_are_the_same_when_a_dispatch_takes_several_steps(model, oracle):
    """One row stops early at a stop id, others at their room; log-probabilities and finish reasons included."""
    prompts = [oracle["g16.prompt"].tolist(), [1, 2, 3], oracle["g150.prompt"].tolist()]
    settings = [GREEDY, Sampling(seed=3, top_p=0.9), Sampling(seed=4)]
    engine, stop_ids = Engine(model, prefill_chunk=16), frozenset([oracle["g16.new"].tolist()[5]])
    engine.stop_ids = stop_ids
    assert engine.steps_per_dispatch == 1  # on CPUs
    expected = [engine.generate(prompts, settings, max_new_tokens=count) for count in (1, 2, 23)]
    engine = Engine(model, prefill_chunk=16, steps_per_dispatch=3)
    engine.stop_ids = stop_ids
    for count, completions in zip((1, 2, 23), expected):
        ours = engine.generate(prompts, settings, max_new_tokens=count)
        assert [(c.ids, c.finish) for c in ours] == [(c.ids, c.finish) for c in completions]
        for a, b in zip(ours, completions):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-6)
    assert ours[0].finish == "stop" and len(ours[0].ids) <= 6
    assert engine._decode._cache_size() == 1


def test_a_dispatch_is_one_loop_of_known_length(model):
    """So that the host isn't asked before a step, nor before the first, whether any row is open."""
    decode, arguments, static = Engine(model, prefill_chunk=16, steps_per_dispatch=8)._calls(1, 256, 200, GREEDY)[-1]
    text = decode.lower(*arguments, **static).compile().as_text()
    assert '"known_trip_count":{"n":"8"}' in text and (text.count(" while("), text.count(" conditional(")) == (1, 0)
    with pytest.raises(ValueError, match="steps_per_dispatch is 0, expected at least 1"):
        Engine(model, steps_per_dispatch=0)


def test_rows_that_have_ended_stay_ended_in_dispatches_ahead(model, oracle):
    engine, prompts, (_, arrays) = Engine(model, prefill_chunk=16, steps_per_dispatch=2), [oracle["g16.prompt"].tolist(), [1, 2, 3]], stack([GREEDY] * 2)
    new = oracle["g16.new"].tolist()
    engine.stop_ids, room = frozenset([new[2]]), np.array([100, 4], np.int32)
    cache, hidden = engine._prefill_prompts(prompts, 256)
    ids, _ = engine._first(engine.weights, hidden, arrays, kind="greedy")
    rows, lengths = (ids, np.array([True, True])), []
    for count in (1, 3, 5):  # the first row stops in the first dispatch, the other's room ends with the second
        cache, rows, (found, _) = engine._decode(engine.weights, cache, rows, arrays, np.int32(count), room, kind="greedy", stop_ids=engine.stop_ids)
        lengths.append([int(now) - len(prompt) for now, prompt in zip(cache.lengths, prompts)])
        if count == 1:
            assert found[:, 0].tolist() == new[1:3]
    assert lengths == [[2, 2], [2, 4], [2, 4]]


def test_a_row_that_has_ended_is_left_out_of_later_dispatches(model, oracle):
    engine, prompts, (_, arrays) = Engine(model, prefill_chunk=16, steps_per_dispatch=2), [oracle["g16.prompt"].tolist(), [1, 2, 3]], stack([GREEDY] * 2)
    found = {}
    for others_open in (True, False):
        cache, hidden = engine._prefill_prompts(prompts, 256)
        before = cache.lengths.tolist()
        ids, _ = engine._first(engine.weights, hidden, arrays, kind="greedy")
        cache, _, (ids, _) = engine._decode(engine.weights, cache, (ids, np.array([True, others_open])), arrays, np.int32(1), np.full(2, 100, np.int32),
                                            kind="greedy", stop_ids=engine.stop_ids)
        found[others_open] = ids[:, 0].tolist()
        assert cache.lengths.tolist() == [before[0] + 2, before[1] + 2 * others_open]
    assert found[True] == found[False] == oracle["g16.new"][1:3].tolist()


def test_a_row_computed_past_its_end_and_the_caches_disturbs_no_other(model, oracle):
    """The first row's room ends with the context in a dispatch's third step; the others go on, one up to the same slot."""
    model = GptOss(model.config.replace(max_position_embeddings=192), model.weights())
    prompts = [[3, 9] * 94, oracle["g16.prompt"].tolist(), [7, 5] * 81]
    completions = [Engine(model, steps_per_dispatch=steps).generate(prompts, GREEDY, max_new_tokens=40) for steps in (1, 8)]
    assert [len(completion.ids) for completion in completions[1]] == [4, 40, 30]
    assert [completion.ids for completion in completions[0]] == [completion.ids for completion in completions[1]]


def test_a_seed_reproduces_its_tokens_in_any_batch(engine):
    prompts = [[1, 2, 3], [7] * 30, [9, 4]]
    settings = [Sampling(seed=s, top_p=0.9, top_k=50) for s in (3, 4, 5)]
    together = engine.generate(prompts, settings, max_new_tokens=20)
    order = [2, 0, 1]
    for place, row in zip(engine.generate([prompts[i] for i in order], [settings[i] for i in order], max_new_tokens=20), order):
        assert place.ids == together[row].ids
    assert engine.generate(prompts[:1], settings[:1], max_new_tokens=20)[0].ids == together[0].ids
    assert engine.generate(prompts[:1], Sampling(seed=99, top_p=0.9, top_k=50), max_new_tokens=20)[0].ids != together[0].ids


def test_tokens_are_the_same_with_64_bit_types_enabled(model, engine):
    asked = [[1, 2, 3]], Sampling(seed=3, top_p=0.9, top_k=50)
    expected = engine.generate(*asked, max_new_tokens=20)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        found = Engine(model, prefill_chunk=32).generate(*asked, max_new_tokens=20)
    assert [completion.ids for completion in found] == [completion.ids for completion in expected]


@pytest.mark.parametrize("axes, told", [(dict(data=2, expert=2, fsdp=2), True), (dict(context=4, expert=2), True), (dict(data=4, fsdp=2), False)])
def test_a_model_loaded_on_a_mesh_generates_the_same_tokens(oracle, axes, told):
    """Prompts of unequal lengths in chunks; and, where `context` splits tokens, in a single chunk. Also of a model that isn't told of the mesh."""
    model = checkpoint.load(DATA / "tiny_checkpoint", dtype="float32", mesh=sharding.make_mesh(**axes))
    engine = Engine(model if told else GptOss(model.config, model.weights()), prefill_chunk=32)
    assert (engine.mesh is not None) == told
    names = ["g150", "g16"]
    completions = engine.generate([oracle[f"{name}.prompt"].tolist() for name in names], GREEDY, max_new_tokens=8)
    assert [c.ids for c in completions] == [oracle[f"{name}.new"].tolist()[:8] for name in names]
    if "context" in axes:
        assert engine.generate([oracle["g16.prompt"].tolist(), [1, 2, 3]], GREEDY, max_new_tokens=3)[0].ids == oracle["g16.new"].tolist()[:3]


def test_the_context_ends_a_row(model):
    engine = Engine(model, max_context=40, prefill_chunk=16)
    completion = engine.generate([[3] * 30], GREEDY, max_new_tokens=100)[0]
    assert len(completion.ids) == 10 and completion.finish == "length"
    with pytest.raises(PromptError, match="prompt 0 has 40 tokens, expected fewer than the context of 40"):
        engine.generate([[3] * 40], GREEDY)


@pytest.mark.parametrize("array", [np.array, jnp.array, lambda prompts: list(map(np.int64, prompts))], ids=["numpy", "jax", "list of numpy"])
def test_prompts_may_be_arrays(engine, array):
    prompts = [[1, 2, 3], [7, 7, 7]]
    assert engine.generate(array(prompts), GREEDY, max_new_tokens=3) == engine.generate(prompts, GREEDY, max_new_tokens=3)
    assert engine.generate(array(prompts)[:0]) == []


def test_unusable_prompts_and_settings_are_named(engine):
    with pytest.raises(PromptError, match="prompt 1 is empty"):
        engine.generate([[1], []])
    with pytest.raises(PromptError, match="prompt 0 holds the id 512, expected 0 to 511"):
        engine.generate([[512]])
    for prompt, said in (("text", "'text'"), ([1, 2.5], r"\[1.0, 2.5\]"), (7, "7"), ([[1, 2]], r"\[\[1, 2\]\]")):
        with pytest.raises(PromptError, match=f"prompt 1 is {said}, expected integers, the ids of tokens"):
            engine.generate([[1], prompt])
    for count in (0, 2.5):
        with pytest.raises(ValueError, match=f"max_new_tokens is {count}, expected an integer of at least 1"):
            engine.generate([[1]], max_new_tokens=count)
    for field, value in (("temperature", -1), ("top_p", 0), ("top_p", 1.5), ("top_k", -1), ("min_p", 2), ("seed", -1), ("temperature", float("nan"))):
        with pytest.raises(SamplingError, match=f"{field} is {value}, expected"):
            Sampling(**{field: value})


draw = jax.jit(sample, static_argnames=("kind", "sampleable"))


def allowed(logits, settings):
    """Which tokens may be drawn, by sorting: temperature, then top-k, then top-p of what is left, then min-p."""
    p = np.exp((logits - logits.max()) / settings.temperature)
    order = np.argsort(-p)
    keep = order[: settings.top_k] if settings.top_k else order
    share = p[keep] / p[keep].sum()
    keep = keep[: np.searchsorted(np.cumsum(share), settings.top_p - 1e-6) + 1] if settings.top_p < 1 else keep
    return {i for i in keep if p[i] >= settings.min_p * p.max()}


@pytest.mark.parametrize("settings", [Sampling(top_k=1), Sampling(top_k=7), Sampling(top_p=0.1), Sampling(top_p=0.8), Sampling(min_p=0.2),
                                      Sampling(temperature=2.0, top_k=20, top_p=0.7, min_p=0.05), Sampling(temperature=0.3, top_p=0.95)],
                         ids=str)
def test_filters_allow_exactly_the_tokens_their_definition_allows(settings):
    logits = np.random.default_rng(0).standard_normal(60).astype(np.float32) * 2
    rows = 4000
    kind, arrays = stack([settings])
    arrays = type(arrays)(*(jnp.repeat(jnp.asarray(x), rows) for x in arrays))
    ids, _ = draw(jnp.broadcast_to(logits, (rows, 60)), arrays, jnp.arange(rows), kind=kind, sampleable=60)
    drawn, may = set(np.asarray(ids).tolist()), allowed(logits, settings)
    assert drawn <= may
    p = np.array([np.exp((logits[i] - logits.max()) / settings.temperature) for i in may])
    likely = {i for i, share in zip(may, p / p.sum()) if share > 0.005}  # drawn 20 times on average
    assert likely <= drawn


def test_draws_follow_the_distribution_and_unsampleable_ids_never_come():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.2, 100.0]))
    kind, arrays = stack([Sampling()])
    rows = 20_000
    arrays = type(arrays)(*(jnp.repeat(jnp.asarray(x), rows) for x in arrays))
    ids, logprobs = draw(jnp.broadcast_to(logits, (rows, 4)), arrays, jnp.arange(rows), kind=kind, sampleable=3)
    np.testing.assert_allclose(np.bincount(ids, minlength=4) / rows, [0.5, 0.3, 0.2, 0], atol=0.015)  # four standard deviations
    np.testing.assert_allclose(np.exp(logprobs), np.asarray([0.5, 0.3, 0.2])[ids], rtol=1e-5)


LARGEST_0 = {
    "one": [0],
    "ties": [-1, 0, -2, -1, 0, -1, -2, -3] * 9,
    "all equal": [0] * 40,
    "masked": [-1e30, 0, -1e30, -0.5, -1e30] * 5,
    "minus infinity": [0, -np.inf, -1, -np.inf],
    "one by far": [-3e7] * 20 + [0] + [-2.9e7] * 20,
    "denormals": [0, -1e-45, -1e-40, -1e-38, -2e-45, -1e-30],
    "minus zero": [-0.0, 0, -0.0, -1e-45, -1],
    "neighbours": [*(np.float32(-3).view(np.int32) + np.arange(-20, 20, dtype=np.int32)).view(np.float32), 0, -3],
} | {f"{size} random": np.append(-5 * np.abs(np.random.default_rng(size).standard_normal(size - 1)), 0) for size in (2, 513, 7000, 70_001)}
search = jax.jit(sampling._search, static_argnames=("ways", "passes"))


@pytest.mark.parametrize("values", LARGEST_0.values(), ids=LARGEST_0)
@pytest.mark.parametrize("ways, passes", sampling._SEARCH.values(), ids=sampling._SEARCH)
def test_a_cut_is_the_largest_value_that_reaches_the_target(values, ways, passes):
    """In integers, so that no sum is rounded. What is below -1e8 has no probability and goes."""
    values = np.asarray(values, np.float32)
    weights = np.random.default_rng(1).integers(0, 4, values.size).astype(np.float32)
    weights[values == 0] = 1
    for weights in (np.ones_like(weights), weights):
        distinct, place = np.unique(-values, return_inverse=True)  # the largest value first
        sums = np.cumsum(np.bincount(place, weights))
        for target in {0, 1, 2, 3, sums[-1] // 3, sums[-1] - 1, sums[-1], sums[-1] + 1, 1e9}:
            for least in np.float32([-1e8, -1.5, 0]):
                cut = max(-distinct[min(np.searchsorted(sums, target), distinct.size - 1)], least)
                kept = values >= np.asarray(search(values, weights, np.float32(target), least, ways=ways, passes=passes))
                np.testing.assert_array_equal(kept, values >= cut, err_msg=f"target {target}, least {least}")


@pytest.mark.parametrize("ways, passes", sampling._SEARCH.values(), ids=sampling._SEARCH)
@pytest.mark.parametrize("share", [1e-6, 0.3, 0.9, 0.999])
def test_a_cut_by_probability_keeps_no_more_than_reaches_it(share, ways, passes):
    values = LARGEST_0["7000 random"].astype(np.float32)
    weights = np.exp(values)
    cut = np.asarray(search(values, weights, np.float32(share * weights.sum()), np.float32(-1e8), ways=ways, passes=passes))
    p = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    assert cut in values and p[values > cut].sum() - 1e-6 < share < p[values >= cut].sum() + 1e-6


def test_a_gpu_samples_the_same_tokens(monkeypatch):
    """By what it runs instead of what CPUs do, run here; the rows of each kind, of ties and of masked logits, too. Rows without a top-k get the same
    where others have one."""
    rng = np.random.default_rng(0)
    settings = [Sampling(temperature=0), Sampling(seed=5), Sampling(top_k=1), Sampling(top_k=50, temperature=1.3), Sampling(top_p=0.8, seed=9),
                Sampling(top_k=300, top_p=0.95, min_p=0.01), Sampling(top_p=1e-30), Sampling(top_k=10**6, temperature=1e-3)]
    logits = rng.standard_normal((len(settings), 3001)).astype(np.float32) * 3
    masked = np.where(rng.random(logits.shape) < 0.99, -np.inf, logits)
    several = [logits, np.round(logits), np.zeros_like(logits), masked, 1e-30 * logits, 1e6 * logits]

    def tokens():
        run = jax.jit(lambda *args, kind: sample(*args, kind=kind, sampleable=2990), static_argnames="kind")
        return [run(logits, stack(settings)[1], np.full(len(settings), step, np.int32), kind=kind)
                for logits in several for step in range(3) for kind in sampling._KINDS]

    expected = tokens()
    uncounted = [index for index, each in enumerate(settings) if not each.top_k]
    for (nucleus, _), (filtered, _) in zip(expected[2::4], expected[3::4], strict=True):
        np.testing.assert_array_equal(nucleus[np.asarray(uncounted)], filtered[np.asarray(uncounted)])
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, default: cuda(*args))
    for (ids, logprobs), (expected_ids, expected_logprobs) in zip(tokens(), expected):
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(logprobs, expected_logprobs, rtol=1e-5, atol=1e-5)
