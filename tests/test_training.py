"""Training: configuration, vocabulary and data, losses, rates and saves; a step is in test_step.py, whole runs in test_running.py."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from gptoss_jax import finetune
from gptoss_jax.model import GptOss
from gptoss_jax.checkpoint.training_state import StateStore
from gptoss_jax.model.weights import declare, initialize
from gptoss_jax.text import harmony
from gptoss_jax.text.tokenizer import HARMONY_TOKENS, load_tokenizer
from gptoss_jax.training import data, loop, loss, vocabulary
from gptoss_jax.training.config import DataConfig, OptimizerConfig, TrainingConfigError, load_config
from gptoss_jax.training.optimizer import make_optimizer, schedule
from gptoss_jax.training.run_directory import load_vocabulary, write_vocabulary
from gptoss_jax.training.step import make_eval_step

pytestmark = pytest.mark.usefixtures("quickly_compiled")

PRETRAIN_TINY = pathlib.Path(__file__).parents[1] / "configs" / "pretrain_tiny.yaml"
SMALL = ("--model.hidden_size=32 --model.intermediate_size=64 --model.num_hidden_layers=1 --model.num_local_experts=3 "
         "--model.num_attention_heads=2 --model.num_key_value_heads=1 --model.head_dim=20 --data.batch_size=2").split()


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    file.write_bytes(vocabulary.train(1536, samples=4000))
    return file


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file):
    return load_tokenizer(tokenizer_file)


# --- configuration -----------------------------------------------------------------------------------------------------------------


def test_the_configuration_of_the_embedded_checkpoint_is_its_own():
    config = load_config(PRETRAIN_TINY)
    assert config.model.layer_types[:2] == ("sliding_attention", "full_attention")
    assert config.model.num_local_experts >= 8 and config.model.quantized


@pytest.mark.parametrize(("words", "message"), [
    ("--model.hiden_size 32", "model.hiden_size: no such key; did you mean hidden_size?"),
    ("--optimzer.beta1 0.9", "optimzer: no such key; did you mean optimizer?"),
    ("--data.row_tokens many", "data.row_tokens: 'many' found, expected an integer"),
    ("--data.row_tokens true", "data.row_tokens: True found, expected an integer"),
    ("--optimizer.clip_norm much", "optimizer.clip_norm: 'much' found, expected a number or null"),
    ("--model.eos_token_id end", "model.eos_token_id: 'end' found, expected an integer or a list or null"),
    ("--data.shuffle 1", "data.shuffle: 1 found, expected true or false"),
    ("--optimizer.decay_fraction 1.5", "optimizer.decay_fraction: 1.5 found, expected 0 to 1"),
    ("--optimizer.epsilon 0", "optimizer.epsilon: 0.0 found, expected at least 1e-20"),
    ("--optimizer.beta1 1", "optimizer.beta1: 1.0 found, expected 0 to 0.999999"),
    ("--optimizer.beta2 0.99999999", "optimizer.beta2: 0.99999999 found, expected 0 to 0.999999"),  # 1 in float32
    ("--train.compute_dtype bfloat", "train.compute_dtype: 'bfloat' found, expected one of float32, bfloat16; did you mean bfloat16?"),
    ("--model.hidden_size 33", "model: config: hidden_size is 33, expected a multiple of 32"),
    ("--run.steps", "--run.steps without a value"),
    ("--run.steps --run.answers 5", "--run.steps without a value"),
    ("--data.sources [{path:x", "--data.sources [{path:x: not readable YAML: expected ',' or '}'"),
    ("--steps 5", "unrecognized arguments: --steps 5; --help lists the flags, and --section.field value sets a field of a configuration"),
])
def test_a_wrong_setting_is_one_line_with_key_value_and_expectation(words, message, capsys):
    assert finetune.main([str(PRETRAIN_TINY), *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_null_is_a_value_of_what_may_be_left_out():
    assert load_config(PRETRAIN_TINY, ["--optimizer.clip_norm", "null"]).optimizer.clip_norm is None


def test_numbers_like_1e_3_are_numbers_although_yaml_says_text():
    assert load_config(PRETRAIN_TINY, ["--optimizer.learning_rate", "1e-3"]).optimizer.learning_rate == 1e-3


def test_a_file_that_is_not_there_or_not_yaml_is_named(tmp_path):
    with pytest.raises(TrainingConfigError, match="nowhere.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")
    for content, problem in (("model: [", "while parsing"), ("run: {}\ntrain: {}\nrun: {steps: 3}\n", "'run' found a second time in .*, line 3"),
                             ("run: &run {steps: 3, seed: 1, steps: 4}", "'steps' found a second time in .*, line 1, column 31")):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(TrainingConfigError, match=f"bad.yaml: not readable YAML: {problem}"):
            load_config(tmp_path / "bad.yaml")


# --- vocabulary and data -----------------------------------------------------------------------------------------------------------


def test_the_vocabulary_has_a_token_for_every_digit_and_for_every_harmony_sentence(tokenizer):
    assert [tokenizer.special[name] for name in vocabulary.CONTROL] == list(range(1, 1 + len(vocabulary.CONTROL)))
    assert [tokenizer.decode([id]) for id in tokenizer.encode("1234")] == list("1234")
    prompt = [harmony.system_message(reasoning_effort="low"), harmony.message("user", "17+25")]
    ids = harmony.render(prompt, tokenizer, next_role="assistant")
    spelled = "<|start|> system <|message|> identity effort channels <|end|> <|start|> user <|message|> 1 7 + 2 5 <|end|> <|start|> assistant"
    assert len(ids) == len(spelled.split())


def test_what_is_learnt_is_what_the_model_has_to_produce(tokenizer):
    call = {"channel": "commentary", "recipient": "functions.add", "content_type": "<|constrain|>json"}
    messages = [
        harmony.system_message(), harmony.message("user", "hi"), harmony.message("assistant", "hello", channel="final"),
        harmony.message("user", "1+2"), harmony.message("assistant", "easy", channel="analysis"),
        harmony.message("assistant", "{}", **call),
        harmony.message("tool", "3", name="functions.add", channel="commentary", recipient="assistant"),
        harmony.message("assistant", "3", channel="final")]
    example = data.encode({"messages": messages}, tokenizer, learnt_from=4)
    shown = "".join(tokenizer.decode([id]) if learnt else "~" for id, learnt in zip(example["targets"], example["loss_weights"]))
    assert [part for part in shown.split("~") if part] == [
        "<|channel|>analysis<|message|>easy<|end|><|start|>assistant"
        " to=functions.add<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
        "<|channel|>final<|message|>3<|return|>"]
    assert (example["tokens"][1:] == example["targets"][:-1]).all()


def test_a_conversation_with_nothing_to_learn_is_refused(tokenizer):
    with pytest.raises(data.DataError, match="no assistant message"):
        data.encode({"messages": [harmony.message("user", "hi")]}, tokenizer)


def test_batches_go_on_from_a_saved_position(tokenizer):
    def start():
        return data.open_data(DataConfig(batch_size=3), tokenizer).batches()

    batches = start()
    for _ in range(25):  # past the first set of rows that is packed together
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(3)]
    resumed = start()
    resumed.set_state(state)
    for rows in expected:
        jax.tree.map(np.testing.assert_array_equal, rows, next(resumed))


def test_a_packed_row_has_the_loss_of_its_conversations_one_by_one(tokenizer):
    config = load_config(PRETRAIN_TINY, [*SMALL, "--train.mode=full"])
    weights = initialize(declare(config.model, dtype="float32", packed=False), stddev=0.3)
    row = data.to_batch(next(data.open_data(DataConfig(batch_size=1), tokenizer).batches()))
    metrics = make_eval_step(config)(weights, {}, row)
    summed = jax.jit(lambda weights, tokens, *wanted: loss.cross_entropy(GptOss(config.model, weights)(tokens), *wanted))
    total = count = 0.0
    for segment in range(1, row.segment_ids.max() + 1):
        mine = row.segment_ids[0] == segment
        tokens, targets, learnt, positions = (part[0][mine] for part in (row.tokens, row.targets, row.loss_weights, row.positions))
        assert (positions == np.arange(mine.sum())).all()
        padding = 0, row.tokens.shape[1] - len(tokens)  # behind, where no token sees it
        part_total, part_count = summed(weights, *(np.pad(part, padding)[None] for part in (tokens, targets, learnt)))
        total, count = total + float(part_total), count + float(part_count)
    assert segment > 1
    assert metrics["tokens"] == count
    np.testing.assert_allclose(metrics["loss"], total / count, rtol=1e-5)  # float32 sums in another order


# --- loss and step -----------------------------------------------------------------------------------------------------------------


def test_cross_entropy_is_minus_the_log_probability_where_it_counts():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    total, count = loss.cross_entropy(logits, jnp.array([[1, 0]]), jnp.array([[1.0, 0.0]]))
    np.testing.assert_allclose(total / count, -np.log(0.25), rtol=1e-6)


def test_the_balance_loss_is_one_when_even_and_grows_to_the_number_of_experts():
    real = jnp.array([[True, True, True, False]])
    even = loss.expert_load(jnp.array([[[0], [1], [2], [0]]]), real, 3)
    np.testing.assert_allclose(even, [1 / 3] * 3, rtol=1e-6)
    np.testing.assert_allclose(loss.balance_loss(jnp.zeros((1, 4, 3)), even, real), 1.0, rtol=1e-6)
    collapsed = loss.expert_load(jnp.zeros((1, 4, 1), jnp.int32), real, 3)
    np.testing.assert_allclose(loss.balance_loss(jnp.array([[[50.0, 0, 0]] * 4]), collapsed, real), 3.0, rtol=1e-6)


def test_the_learning_rate_warms_up_stays_and_decays_to_zero():
    rate = schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=10, decay_fraction=0.25), 100)
    np.testing.assert_allclose([rate(step) for step in (0, 5, 10, 75, 100)], [0, 1, 2, 2, 0], atol=1e-6)


def test_only_matrices_decay():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.5), 10)
    weights = {name: jnp.ones(2) for name in ("a.norm.weight", "a.q_proj.bias", "a.sinks", "a.experts.down_proj_bias", "a.q_proj.weight")}
    with jax.numpy_dtype_promotion("standard"):  # optax counts on it
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, weights), optimizer.init(weights), weights)
    assert {name for name, update in updates.items() if update.any()} == {"a.q_proj.weight"}


def test_what_muon_leaves_has_adam_with_nesterov_momentum_and_no_decay():
    """Source: Dozat 2016, "Incorporating Nesterov momentum into Adam", algorithm 2."""
    optimizer = make_optimizer(OptimizerConfig(kind="muon", learning_rate=0.5, warmup_steps=0, weight_decay=0.5, beta2=0.95, clip_norm=None), 10)
    gradients, weights = np.random.default_rng(0).normal(size=(3, 4)), {"model.embed_tokens.weight": jnp.ones(4)}
    state, m, v = optimizer.init(weights), 0, 0
    for step, g in enumerate(gradients, 1):
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it
            updates, state = optimizer.update({"model.embed_tokens.weight": jnp.asarray(g, jnp.float32)}, state, weights)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        ahead = 0.9 * m / (1 - 0.9 ** (step + 1)) + 0.1 * g / (1 - 0.9**step)
        np.testing.assert_allclose(updates["model.embed_tokens.weight"], -0.5 * ahead / (v / (1 - 0.95**step)) ** 0.5, rtol=1e-5)


# --- runs --------------------------------------------------------------------------------------------------------------------------


def test_a_vocabulary_of_another_size_is_refused(tmp_path, tokenizer_file):
    with pytest.raises(TrainingConfigError, match="model.vocab_size: 1600 found, expected 1536"):
        loop.train(load_config(PRETRAIN_TINY, [*SMALL, f"--data.tokenizer={tokenizer_file}", f"--output.directory={tmp_path}", "--model.vocab_size=1600"]))


def test_a_checkpoint_whose_tokenizer_has_more_ids_than_its_model_is_refused():
    with pytest.raises(TrainingConfigError, match="init.checkpoint: 'tiny' has a tokenizer of 1536 ids, expected at most 1500, the model's vocab_size"):
        load_vocabulary(load_config(PRETRAIN_TINY, ["--init.checkpoint=tiny", "--model.vocab_size=1500"]))


@pytest.mark.parametrize("kind", ["model", "json"])
def test_a_vocabulary_of_ones_own_is_exported_with_the_ids_that_end_its_answers(tmp_path, tokenizer_file, kind):
    own, names = tokenizer_file, ["<|return|>", "<|call|>", "<|endoftext|>"]
    if kind == "json":
        bytelevel = tokenizers.Tokenizer(tokenizers.models.BPE(dict(zip(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), range(256))), []))
        bytelevel.pre_tokenizer, bytelevel.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
        bytelevel.add_special_tokens([*HARMONY_TOKENS, "<|endoftext|>"])
        bytelevel.save(str(own := tmp_path / "own.json"))
    run, export, size = tmp_path / "run", tmp_path / "export", load_tokenizer(own).vocab_size
    export.mkdir()
    config = load_config(PRETRAIN_TINY, [*SMALL, f"--data.tokenizer={own}", f"--output.directory={run}", f"--model.vocab_size={size}"])
    write_vocabulary(config, export, load_vocabulary(config))
    exported = load_tokenizer(export)
    assert exported.special == load_tokenizer(run).special == load_tokenizer(own).special
    generation = json.loads((export / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [exported.special[name] for name in names]


@pytest.mark.parametrize(("name", "said"), [("own.model", "own.model: not a readable SentencePiece"), ("", "data.tokenizer: .* found, expected a file"),
                                            ("gone.json", "data.tokenizer: .*gone.json' found, expected a file")])
def test_an_unusable_vocabulary_is_named_and_not_kept(tmp_path, name, said):
    (tmp_path / "own.model").write_bytes(b"?")
    config = load_config(PRETRAIN_TINY, [*SMALL, f"--data.tokenizer={tmp_path / name}", f"--output.directory={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match=said):
        load_vocabulary(config)
    assert not (tmp_path / "run").exists()


def test_a_save_that_comes_while_another_is_being_written_is_not_left_out(tmp_path):
    store = StateStore(tmp_path, keep=10)
    for step in range(1, 5):
        store.save(step, {"weights": jnp.full((1 << 20,), step, jnp.float32)}, {"step": step})
    store.close()
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [1, 2, 3, 4]
