"""Training data from files: what a record becomes, what is learnt of it, how rows are packed, and that a position is resumed exactly."""

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptoss_jax
from gptoss_jax import finetune
from gptoss_jax.model import GptOss
from gptoss_jax.model.weights import declare, initialize
from gptoss_jax.text import harmony
from gptoss_jax.text.chat import from_chat
from gptoss_jax.text.tokenizer import load_tokenizer
from gptoss_jax.training import data, loop, loss
from gptoss_jax.training.config import DataConfig, SourceConfig, TrainingConfigError, load_config
from gptoss_jax.training.examples import Encoder, encode_record, question_of
from gptoss_jax.training.records import DataError, Records

pytestmark = pytest.mark.usefixtures("quickly_compiled")

TINY = pathlib.Path(gptoss_jax.__file__).parent / "assets" / "tiny"
PRETRAIN_TINY = pathlib.Path(__file__).parents[1] / "configs" / "pretrain_tiny.yaml"


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(TINY)


def chat(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def write_jsonl(path, records):
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return SourceConfig(str(path))


def questions(count, start=0):
    return [chat(f"{number} + {number * 7 % 13}", " ".join(map(str, range(number % 17)))) for number in range(start, start + count)]


def open_files(tokenizer, *sources, **fields):
    return data.Files(DataConfig(**{"row_tokens": 128, "batch_size": 2, "sources": sources} | fields), tokenizer)


def take(batches, count=None):
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def seen(batches):
    """The numbers of the records in batches, sorted, with repetition."""
    numbers = [rows["records"][(rows["tokens_positions"] == 0) & (rows["tokens_segment_ids"] > 0)] for rows in batches]
    return sorted(np.concatenate(numbers).tolist())


def shown(example, tokenizer):
    """The example with ~ for every id that isn't learnt."""
    return "".join(tokenizer.decode([id]) if learnt else "~" for id, learnt in zip(example["targets"], example["loss_weights"]))


def learnt_parts(record, tokenizer, **fields):
    return [part for part in shown(encode_record(record, tokenizer, DataConfig(**fields)), tokenizer).split("~") if part]


# --- records -----------------------------------------------------------------------------------------------------------------------


def test_lines_are_found_by_their_offsets_whatever_ends_them(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "1"}\n\n{"text": "2"}\r\n\r\n{"text": "\xc3\xa9"}')
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "4"}\n')
    records = Records(str(tmp_path / "*.jsonl"))
    assert [records[number]["text"] for number in range(len(records))] == ["1", "2", "é", "4"]
    assert [pathlib.Path(records.place(number)).name for number in range(4)] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:5", "b.jsonl:1"]


def test_lines_longer_than_a_block_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("gptoss_jax.training.records._BLOCK_BYTES", 7)
    texts = ["x" * length for length in (0, 1, 5, 6, 7, 8, 30)]
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    records = Records(source.path)
    assert [records[number]["text"] for number in range(len(records))] == texts


def test_array_record_and_parquet_give_what_jsonl_gives(tmp_path):
    import pickle

    from array_record.python.array_record_module import ArrayRecordWriter

    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "thinking": "so"}],
             "reasoning_effort": "low"}, *questions(20)]
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record-00000-of-00001"), "group_size:1")
    for row in rows:
        writer.write(json.dumps(row).encode())
    writer.close()
    records = Records(str(tmp_path / "a.array_record*"))
    assert [records[number] for number in range(len(records))] == rows
    assert records.place(3).endswith("a.array_record-00000-of-00001, row 3")
    assert pickle.loads(pickle.dumps(records))[20] == rows[20]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=6)
    records = Records(str(tmp_path / "a.parquet"))
    assert [records[number] for number in range(len(records))] == rows
    assert pickle.loads(pickle.dumps(records))[20] == rows[20]


def test_row_groups_are_dropped_when_they_take_too_much_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("gptoss_jax.training.records._ROW_GROUPS_BYTES", 3000)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": str(n) * 100} for n in range(100)]), tmp_path / "a.parquet",
                                row_group_size=10)
    records = Records(str(tmp_path / "a.parquet"))
    order = np.random.default_rng(0).permutation(100)
    assert [records[n]["text"] for n in order] == [str(n) * 100 for n in order]
    assert 1 <= len(records._files[0]._groups) <= 3


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match="a.parquet: reading Parquet needs pyarrow: pip install pyarrow"):
        Records(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.json", b"{}", "a.json: unknown kind of file, expected a name that ends with .jsonl, .parquet or .array_record"),
    ("a.jsonl", b"", "a.jsonl: no records found, expected at least one"),
    ("a.jsonl", b"\n\n", "a.jsonl: no records found"),
    ("a.array_record", b"not one", "a.array_record: not a readable ArrayRecord file"),
    ("b.txt", b"", "a.jsonl: no such file"),
])
def test_files_that_hold_no_records_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        Records(str(tmp_path / (name if name[0] == "a" else "a.jsonl")))


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not one")
    with pytest.raises(DataError, match="a.parquet: not a readable Parquet file"):
        Records(str(tmp_path / "a.parquet"))


# --- what a record becomes ---------------------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}}]


def test_chat_messages_become_harmony_messages():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    messages = from_chat([
        {"role": "system", "content": "Be brief."}, {"role": "developer", "content": [{"type": "text", "text": "Use tools."}]},
        {"role": "user", "content": "1+2"}, {"role": "assistant", "content": "Adding.", "reasoning": "A sum.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"}, {"role": "assistant", "content": "3", "thinking": None},
    ], tools=TOOLS, reasoning_effort="high")
    add = {"channel": "commentary", "recipient": "functions.add", "content_type": "<|constrain|>json"}
    assert messages == [
        harmony.system_message(reasoning_effort="high"), harmony.developer_message("Be brief.\n\nUse tools.", tools=TOOLS),
        harmony.message("user", "1+2"), harmony.message("assistant", "A sum.", channel="analysis"),
        harmony.message("assistant", "Adding.", channel="commentary"), harmony.message("assistant", '{"a":1}', **add),
        harmony.message("tool", "3", name="functions.add", channel="commentary", recipient="assistant"),
        harmony.message("assistant", "3", channel="final")]


def test_of_several_calls_each_is_followed_by_its_result():
    calls = [{"id": name, "function": {"name": name, "arguments": {"x": number}}} for number, name in enumerate("ab")]
    results = [{"role": "tool", "tool_call_id": name, "content": f"result {name}"} for name in "ba"]
    messages = from_chat([{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": calls}, *results])
    assert [(entry.get("recipient"), entry["content"][0].get("text")) for entry in messages[2:]] == [
        ("functions.a", '{"x":0}'), ("assistant", "result a"), ("functions.b", '{"x":1}'), ("assistant", "result b")]


@pytest.mark.parametrize(("messages", "problem"), [
    ([{"role": "robot", "content": ""}], "message 0: role is 'robot'; expected system"),
    ([{"role": "user"}], "message 0: content is missing"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "message 0: a part of the content is"),
    ([{"role": "assistant"}], "message 0: an assistant message without content, reasoning and tool_calls"),
    ([{"role": "tool", "content": "3"}], "message 0: role is 'tool' after no assistant message"),
    ([{"role": "assistant", "content": "x"}, {"role": "tool", "content": "3"}], "message 1: role is 'tool', tool_call_id None"),
    ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "message 0: a tool call is"),
    ([{"role": "assistant", "tool_calls": [{"function": "f"}]}], "message 0: a tool call is"),
    ([{"role": "assistant", "tool_calls": 2 * [{"id": "1", "function": {"name": "f", "arguments": ""}}]}],
     "message 0: call 0 of 2 has no result"),
    ([{"role": "assistant", "content": "x", "thinking": 3}], "message 0: reasoning is int"),
])
def test_a_chat_that_makes_no_sense_is_refused_with_the_message_and_the_reason(messages, problem):
    with pytest.raises(harmony.HarmonyError, match=problem):
        from_chat(messages)


def test_learnt_are_the_assistants_tokens_from_after_the_role_to_the_stop_token(tokenizer):
    record = {"messages": [{"role": "user", "content": "1+2"}, {"role": "assistant", "thinking": "easy", "content": "3"}]}
    assert learnt_parts(record, tokenizer) == ["<|channel|>analysis<|message|>easy<|end|>", "<|channel|>final<|message|>3<|return|>"]
    call = {"function": {"name": "add", "arguments": "{}"}}
    record = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}], "tools": TOOLS}
    assert learnt_parts(record, tokenizer) == [" to=functions.add<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"]


TWO_TURNS = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "thinking": "a", "content": "2"},
                          {"role": "user", "content": "3"}, {"role": "assistant", "thinking": "b", "content": "4"}]}


def test_an_answer_in_the_middle_is_learnt_to_end_with_return_and_followed_by_end(tokenizer):
    example = encode_record(TWO_TURNS, tokenizer, DataConfig())
    rendered = harmony.render(from_chat(TWO_TURNS["messages"]), tokenizer, training=True)
    assert [*example["tokens"], example["targets"][-1]] == rendered
    assert learnt_parts(TWO_TURNS, tokenizer)[1] == "<|channel|>final<|message|>2<|return|>"
    different = np.flatnonzero(example["tokens"][1:] != example["targets"][:-1])
    assert [tokenizer.decode([example["tokens"][index + 1]]) for index in different] == ["<|end|>"]


def test_turns_and_channels_that_count_can_be_chosen(tokenizer):
    final = "<|channel|>final<|message|>4<|return|>"
    assert learnt_parts(TWO_TURNS, tokenizer, learn_turns="last") == ["<|channel|>analysis<|message|>b<|end|>", final]
    assert learnt_parts(TWO_TURNS, tokenizer, learn_turns="last", learn_channels=("final",)) == [final]
    assert learnt_parts(TWO_TURNS, tokenizer, learn_channels=("final",)) == ["<|channel|>final<|message|>2<|return|>", final]
    example = encode_record(TWO_TURNS, tokenizer, DataConfig(learn_turns="last"))
    assert "analysis<|message|>a" not in tokenizer.decode(example["tokens"])  # inference doesn't show it either


def test_what_is_asked_last_shows_no_reasoning_of_earlier_turns_after_a_call_either(tokenizer):
    calling = [{"role": "assistant", "thinking": "c", "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}, {"role": "tool", "content": "3"}]
    last = TWO_TURNS["messages"][-1]
    asked = question_of(from_chat([*TWO_TURNS["messages"][:-1], *calling, last])).messages
    assert [message for message in asked if message.get("channel") == "analysis"] == [harmony.message("assistant", "c", channel="analysis")]


def test_messages_of_weight_0_are_not_learnt(tokenizer):
    call = {"function": {"name": "add", "arguments": "{}"}}
    calling = [{"role": "assistant", "content": "Adding.", "thinking": "a", "tool_calls": [call], "weight": 0}, {"role": "tool", "content": "3"}]
    turns = [{"role": "user", "content": "1"}, *calling, {"role": "assistant", "content": "2", "weight": 1}, {"role": "user", "content": "3"}]
    last = {"role": "assistant", "thinking": "b", "content": "4", "weight": 0.0}
    assert learnt_parts({"messages": [*turns, last], "tools": TOOLS}, tokenizer) == ["<|channel|>final<|message|>2<|return|>"]
    harmonys = [harmony.message("user", "hi"), *(harmony.message("assistant", text, channel="final") | {"weight": weight}
                                                for text, weight in (("no", 0), ("yes", 1)))]
    assert learnt_parts({"messages": harmonys}, tokenizer) == ["<|channel|>final<|message|>yes<|return|>"]


def test_harmony_conversations_are_rendered_as_they_are(tokenizer):
    messages = [harmony.system_message(reasoning_effort="low"), harmony.message("user", "hi"),
                harmony.message("assistant", "yo", channel="final")]
    example = encode_record({"messages": messages}, tokenizer, DataConfig(reasoning_effort="high"))
    ids, mask = harmony.render_with_mask(messages, tokenizer, training=True)
    assert [*example["tokens"], example["targets"][-1]] == ids
    assert example["loss_weights"].tolist() == mask[1:]


@pytest.mark.parametrize(("record", "effort"), [
    (chat("hi", "yo"), "medium"), (chat("hi", "yo", reasoning_effort="low"), "low"),
    ({"messages": [harmony.message("user", "hi"), harmony.message("assistant", "yo", channel="final")], "reasoning_effort": "high"}, "high"),
])
def test_the_record_says_how_much_to_reason_or_the_configuration_does(tokenizer, record, effort):
    assert f"Reasoning: {effort}" in tokenizer.decode(encode_record(record, tokenizer, DataConfig())["tokens"])


def test_a_text_is_learnt_whole(tokenizer):
    example = encode_record({"text": "one <|end|> two"}, tokenizer, DataConfig())
    assert tokenizer.decode(example["tokens"]) == "<|startoftext|>one <|end|> two"
    assert shown(example, tokenizer) == "one <|end|> two<|endoftext|>"
    assert tokenizer.special["<|end|>"] not in example["tokens"]


def test_messages_and_tools_may_be_json_in_a_string(tokenizer):
    record = chat("hi", "yo", tools=TOOLS)
    packed = {name: json.dumps(value) for name, value in record.items()}
    for values in zip(*(encode_record(one, tokenizer, DataConfig()).values() for one in (record, packed))):
        np.testing.assert_array_equal(*values)


# --- bad records -------------------------------------------------------------------------------------------------------------------

BAD = [("{", "not readable JSON"), ("[1]", "list found, expected a JSON object"), ('{"prompt": "x"}', "a record with 'prompt' found"),
       ('{"text": ""}', "expected 'messages' or a non-empty 'text'"), ('{"messages": 3}', "messages is 3, expected a list of objects"),
       ('{"messages": [{"role": "user", "content": "hi"}]}', "no assistant message to learn found"),
       (json.dumps(chat("a", "b", reasoning_effort="max")), "reasoning_effort is 'max'; expected low, medium or high"),
       ('{"messages": ' + "[" * 100_000, "not readable JSON"), ('{"text": "\\ud800"}', "text"),
       (json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]}),
        "message 1: weight is 0.5, expected 0 or 1"),
       (json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}),
        "no assistant message to learn found"),
       (json.dumps({"messages": [{"role": "assistant", "channel": "final", "content": "x", "tool_calls": [{}]}]}),
        "message 0: tool_calls found in a conversation of harmony's form")]


ANY_JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["type", "text", "function", "name", "arguments", "parameters", "properties", "items", "enum", "anyOf", "tools", "id"]),
    inner, max_size=4), max_leaves=8)
ANY_MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]) | ANY_JSON}, optional={
    name: st.text(max_size=4) | ANY_JSON for name in ("content", "name", "channel", "recipient", "content_type", "tool_calls", "thinking",
                                                      "tool_call_id", "weight")})


@settings(max_examples=300, deadline=None)
@given(record=st.fixed_dictionaries({}, optional={"messages": st.lists(ANY_MESSAGE, max_size=4) | ANY_JSON, "tools": ANY_JSON, "text": ANY_JSON,
                                                  "reasoning_effort": ANY_JSON}), turns=st.sampled_from(["all", "last"]))
def test_any_record_is_an_example_or_a_bad_record(tmp_path_factory, tokenizer, record, turns):
    (file := tmp_path_factory.getbasetemp() / "any.jsonl").write_text(json.dumps(record))
    encoded = Encoder(Records(str(file)), tokenizer, DataConfig(learn_turns=turns))(0)
    assert encoded.example is not None and encoded.example["loss_weights"].any() or encoded.problem.startswith(f"{file}:1: ")


@pytest.mark.parametrize(("line", "problem"), BAD, ids=range(len(BAD)))
def test_a_bad_record_stops_with_file_and_line_or_is_counted_and_skipped(tmp_path, tokenizer, capsys, line, problem):
    source = write_jsonl(tmp_path / "a.jsonl", [*questions(3), line + "\n", *questions(2)])
    with pytest.raises(DataError, match=r"a\.jsonl:4: .*skip leaves such records out") as stopped:
        take(open_files(tokenizer, source, epochs=1).batches())
    assert problem in str(stopped.value)
    files = open_files(tokenizer, source, epochs=1, on_bad_record="skip")
    assert seen(take(files.batches())) == [0, 1, 2, 4, 5]
    assert capsys.readouterr().err.startswith(f"bad record 1: {tmp_path / 'a.jsonl'}:4: ")


def test_many_bad_records_are_reported_ever_more_rarely(tmp_path, tokenizer, capsys):
    take(open_files(tokenizer, write_jsonl(tmp_path / "a.jsonl", [*questions(1), *40 * ["{\n"]]), epochs=1, on_bad_record="skip").batches())
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.removeprefix("bad record ").split(":")[0]) for line in lines] == [*range(1, 11), 16, 32]


def test_long_examples_are_dropped_or_truncated_and_counted(tmp_path, tokenizer, capsys):
    long = chat("count", " ".join(map(str, range(100))))
    hopeless = chat(" ".join(map(str, range(100))), "what?")
    source = write_jsonl(tmp_path / "a.jsonl", [chat("hi", "yo"), long, hopeless])
    files = open_files(tokenizer, source, epochs=1)
    assert seen(take(files.batches())) == [0]
    assert "dropped example 2: " in capsys.readouterr().err
    files = open_files(tokenizer, source, epochs=1, too_long="truncate")
    rows, = take(files.batches())
    assert seen([rows]) == [0, 1]
    assert (rows["records"] == 1).sum() == 128
    assert "truncated example" in (err := capsys.readouterr().err) and "dropped example" in err and "tokens found, expected at most 128" in err


def test_nothing_to_learn_is_one_error_before_anything_is_allocated(tmp_path, tokenizer, monkeypatch, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}] * 5)
    with pytest.raises(DataError, match=r"a.jsonl:1: no assistant message to learn found.*nothing to learn in the 4 records after it either"):
        open_files(tokenizer, source, on_bad_record="skip")
    monkeypatch.setattr(loop, "initial_state", lambda *_: pytest.fail("allocated"))
    (tmp_path / "config.yaml").write_text(PRETRAIN_TINY.read_text().replace("  row_tokens: 256", f"  sources: [{{path: {source.path}}}]"))
    words = [str(tmp_path / "config.yaml"), f"--data.tokenizer={TINY / 'tokenizer.model'}", f"--output.directory={tmp_path / 'run'}"]
    assert finetune.main(words) == 2
    error = capsys.readouterr().err
    assert "a.jsonl:1: no assistant message to learn found" in error and error.count("\n") == 1


# --- packing -----------------------------------------------------------------------------------------------------------------------


def test_packed_rows_have_the_loss_and_the_gradients_of_their_examples_one_by_one(tmp_path, tokenizer):
    words = ("--model.hidden_size=32 --model.intermediate_size=64 --model.num_hidden_layers=2 --model.num_local_experts=3 "
             "--model.num_attention_heads=2 --model.num_key_value_heads=1 --model.head_dim=20 --model.sliding_window=16").split()
    config = load_config(PRETRAIN_TINY, words).model
    weights = initialize(declare(config, dtype="float32", packed=False), stddev=0.3)
    source = write_jsonl(tmp_path / "a.jsonl", questions(12))
    files = open_files(tokenizer, source, epochs=1, row_tokens=192, batch_size=3)
    rows, = take(files.batches())
    assert rows["tokens_segment_ids"].max() >= 3

    @jax.jit
    def summed(weights, tokens, targets, learnt, positions, segments):
        logits = GptOss(config, weights)(tokens, positions=positions, segment_ids=segments)
        return loss.cross_entropy(logits, targets, learnt)[0]

    value_and_grad = jax.jit(jax.value_and_grad(summed))
    batch = data.to_batch(rows)
    packed = value_and_grad(weights, batch.tokens, batch.targets, batch.loss_weights, batch.positions, batch.segment_ids)
    total, gradients = 0.0, jax.tree.map(np.zeros_like, weights)
    examples = [encode_record(record, tokenizer, DataConfig()) for record in questions(12)]
    for three in zip(*[iter(examples)] * 3):  # each in a row of its own
        lengths = [len(example["tokens"]) for example in three]
        alone = [np.stack([np.pad(example[name], (0, 192 - length)) for example, length in zip(three, lengths)])
                 for name in ("tokens", "targets", "loss_weights")]
        column = np.broadcast_to(np.arange(192, dtype=np.int32), (3, 192))
        value, gradient = value_and_grad(weights, *alone, column, (column < np.array(lengths)[:, None]).astype(np.int32))
        total, gradients = total + float(value), jax.tree.map(lambda a, b: a + np.asarray(b), gradients, gradient)
    np.testing.assert_allclose(packed[0], total, rtol=2e-6)  # float32 sums in another order
    for name, gradient in gradients.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(packed[1][name], gradient, rtol=1e-4, atol=1e-5 * scale, err_msg=name)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 150), min_size=1, max_size=60), batch_size=st.integers(1, 4), seed=st.integers(0, 5))
def test_an_epoch_has_every_example_once_and_whole(tmp_path_factory, tokenizer, lengths, batch_size, seed):
    source = write_jsonl(tmp_path_factory.mktemp("lengths") / "a.jsonl", [{"text": "7" * (length + 1)} for length in lengths])
    rows = take(open_files(tokenizer, source, epochs=1, row_tokens=160, batch_size=batch_size, seed=seed).batches())
    found = {}
    for batch in rows:
        assert batch["tokens"].shape == (batch_size, 160)
        for row in range(batch_size):
            for segment in range(1, batch["tokens_segment_ids"][row].max() + 1):
                mine = batch["tokens_segment_ids"][row] == segment
                number, = set(batch["records"][row][mine])
                assert number not in found
                assert (batch["tokens_positions"][row][mine] == np.arange(mine.sum())).all()
                found[number] = "".join(tokenizer.decode([id]) for id in batch["targets"][row][mine][:-1])
        assert (batch["loss_weights"][batch["tokens_segment_ids"] == 0] == 0).all()
    assert found == {number: "7" * (length + 1) for number, length in enumerate(lengths)}


# --- order, mixtures, processes, positions -----------------------------------------------------------------------------------------


def order(batches):
    return np.concatenate([rows["records"][rows["tokens_segment_ids"] > 0] for rows in batches]).tolist()


def equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_each_epoch_is_shuffled_anew_by_the_seed(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", questions(40))
    first, again, other = (take(open_files(tokenizer, source, seed=seed).batches(), 30) for seed in (1, 1, 2))
    equal(first, again)
    assert order(first) != order(other)
    files = open_files(tokenizer, source, epochs=3, batch_size=1)
    assert seen(take(files.batches())) == sorted(3 * list(range(40)))
    orders = [list(open_files(tokenizer, source, seed=seed)._order(1)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    straight = open_files(tokenizer, source, epochs=2, batch_size=1, shuffle=False)
    numbers = list(files._order(2))
    assert sorted(numbers[:40]) == sorted(numbers[40:]) == list(range(40)) and numbers[:40] != numbers[40:]
    assert list(straight._order(2)) == 2 * list(range(40))


def test_sources_are_mixed_by_weight(tmp_path, tokenizer):
    sources = [SourceConfig(write_jsonl(tmp_path / f"{name}.jsonl", questions(count)).path, weight)
               for name, count, weight in (("a", 10, 3.0), ("b", 50, 1.0))]
    files = open_files(tokenizer, *sources)
    numbers = np.array(seen(take(files.batches(), 60)))
    assert 0.7 < (numbers < 10).mean() < 0.8


def test_processes_get_their_rows_of_the_same_batches_and_have_the_same_state(tmp_path, tokenizer):
    files = open_files(tokenizer, write_jsonl(tmp_path / "a.jsonl", questions(60)), batch_size=6, epochs=1)
    whole = take(files.batches())
    parts = [take(files.batches(process_index=index, process_count=3)) for index in range(3)]
    for rows, *pieces in zip(whole, *parts, strict=True):
        equal(rows, {name: np.concatenate([piece[name] for piece in pieces]) for name in rows})
    with pytest.raises(DataError, match="data.batch_size: 6 found, expected a multiple of 4, the number of processes"):
        files.batches(process_count=4)


@settings(max_examples=8, deadline=None)
@given(before=st.integers(0, 45), seed=st.integers(0, 3), then=st.integers(0, 10))
def test_a_resumed_run_sees_the_batches_it_would_have_seen(tmp_path_factory, tokenizer, before, seed, then):
    """Interrupted anywhere: before the first batch, inside rows packed together, between epochs, and twice."""
    records = questions(150)
    records[17] = "{\n"
    source = write_jsonl(tmp_path_factory.mktemp("resume") / "a.jsonl", records)
    files = open_files(tokenizer, source, seed=seed, on_bad_record="skip")
    batches, at = files.batches(), before
    expected = [next(batches) for _ in range(before)]
    state = json.dumps(batches.get_state())
    expected += take(batches, then + 5)
    for count in (then, 5):
        assert len(state) < 500
        batches = open_files(tokenizer, source, seed=seed, on_bad_record="skip").batches(process_index=1, process_count=2)
        batches.set_state(json.loads(state))
        equal([next(batches) for _ in range(count)], [{name: values[1:] for name, values in rows.items()} for rows in expected[at : at + count]])
        state, at = json.dumps(batches.get_state()), at + count
        batches.close()


def test_a_position_can_be_set_in_the_middle_of_reading(tmp_path, tokenizer):
    files = open_files(tokenizer, write_jsonl(tmp_path / "a.jsonl", questions(150)))
    batches = files.batches()
    for _ in range(25):
        next(batches)
    state = batches.get_state()
    expected = [next(batches) for _ in range(40)]
    batches.set_state(state)
    equal(take(batches, 40), expected)


def test_worker_processes_change_nothing_and_any_number_of_them_can_resume(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", [*questions(50), "{\n"])
    expected = take(open_files(tokenizer, source, on_bad_record="skip").batches(), 14)
    batches = open_files(tokenizer, source, on_bad_record="skip", workers=2).batches()
    got = [next(batches) for _ in range(7)]
    state = batches.get_state()
    batches.close()
    resumed = open_files(tokenizer, source, on_bad_record="skip").batches()
    resumed.set_state(state)
    equal([*got, *take(resumed, 7)], expected)


def test_worker_processes_end_with_the_run_that_is_killed(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", questions(500))
    (tmp_path / "run.py").write_text(f"""if True:
        import time
        from gptoss_jax.training import data
        from gptoss_jax.training.config import DataConfig, SourceConfig
        from gptoss_jax.text.tokenizer import load_tokenizer
        if __name__ == "__main__":
            config = DataConfig(row_tokens=128, batch_size=2, sources=(SourceConfig({source.path!r}),), workers=2)
            batches = data.Files(config, load_tokenizer({str(TINY)!r})).batches()
            next(batches)
            print("begun", flush=True)
            time.sleep(600)
        """)
    run = subprocess.Popen([sys.executable, tmp_path / "run.py"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                           env=os.environ | {"PYTHONPATH": str(PRETRAIN_TINY.parents[1])})
    assert run.stdout.readline() == b"begun\n"
    run.kill()
    run.communicate(timeout=60)  # they hold its stdout, too


def test_a_position_in_other_data_is_refused(tmp_path, tokenizer):
    batches = open_files(tokenizer, write_jsonl(tmp_path / "a.jsonl", questions(9))).batches()
    state = batches.get_state()
    batches.close()
    other = open_files(tokenizer, write_jsonl(tmp_path / "b.jsonl", questions(8))).batches()
    with pytest.raises(DataError, match="data.sources: 8 records found, expected 9 as when the run was interrupted"):
        other.set_state(state)


def test_batches_name_their_records(tmp_path, tokenizer):
    files = open_files(tokenizer, write_jsonl(tmp_path / "a.jsonl", questions(3)), epochs=1)
    rows, = take(files.batches())
    assert files.places(rows) == [f"{tmp_path / 'a.jsonl'}:{line}" for line in (1, 2, 3)]


# --- evaluation split --------------------------------------------------------------------------------------------------------------


def test_records_held_aside_are_the_same_for_every_seed_and_never_trained_on(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", questions(200))
    one, other = (open_files(tokenizer, source, eval_fraction=0.1, seed=seed, epochs=1) for seed in (0, 1))
    held = set(one.held_out_numbers)
    assert 10 <= len(held) <= 30 and held == set(other.held_out_numbers)
    assert seen(take(one.batches())) == sorted(set(range(200)) - held)
    equal(one.held_out(100), other.held_out(100))
    tokens = sum(int((batch.segment_ids > 0).sum()) for batch in one.held_out(100))
    assert tokens == sum(len(one._encoder(number).example["tokens"]) for number in held)
    write_jsonl(tmp_path / "b.jsonl", questions(210))
    longer = open_files(tokenizer, SourceConfig(str(tmp_path / "b.jsonl")), eval_fraction=0.1)
    assert {number for number in longer.held_out_numbers if number < 200} == held


def test_evaluation_files_are_read_as_they_are_named(tmp_path, tokenizer):
    files = open_files(tokenizer, write_jsonl(tmp_path / "a.jsonl", questions(5)), eval_sources=(
        write_jsonl(tmp_path / "b.jsonl", [chat("only", "here")]),))
    batch, = files.held_out(3)
    assert "only" in tokenizer.decode(batch.tokens[0]) and batch.segment_ids.max() == 1
    assert open_files(tokenizer, SourceConfig(str(tmp_path / "a.jsonl"))).held_out(3) == []


# --- configuration, dry run, a run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("section", "message"), [
    ({"sources": [{"paht": "a"}]}, r"data.sources\[0\].paht: no such key; did you mean path\?"),
    ({"sources": [{"path": "a"}, {"weight": 1}]}, r"data.sources\[1\].path: missing"),
    ({"sources": [{"path": "a", "weight": 1}, {"path": "b"}]}, r"data.sources\[1\].weight: missing, expected one as other sources have"),
    ({"sources": [{"path": "a", "weight": 1}], "epochs": 2}, "data.epochs: 2 found with weighted sources"),
    ({"sources": [{"path": "a", "weight": 0}]}, r"data.sources\[0\].weight: 0.0 found, expected at least"),
    ({"sources": [{"path": "a", "weight": "inf"}]}, r"data.sources\[0\].weight: inf found, expected a finite number"),
    ({"epochs": 2}, "data.sources: none found"),
    ({"sources": [{"path": "a"}], "learn_channels": ["final", "analyse"]},
     r"data.learn_channels\[1\]: 'analyse' found, expected one of analysis, commentary, final; did you mean analysis\?"),
    ({"sources": [{"path": "a"}], "learn_channels": []}, "data.learn_channels: none found"),
    ({"sources": [{"path": "a"}], "eval_fraction": 0.1, "eval_sources": [{"path": "b"}]}, "data.eval_fraction: 0.1 found with"),
    ({"on_bad_record": "skp"}, "data.on_bad_record: 'skp' found, expected one of stop, skip; did you mean skip"),
])
def test_a_wrong_data_section_is_refused_with_the_key(tmp_path, section, message):
    (tmp_path / "config.yaml").write_text(json.dumps({"model": {}, "data": section}))
    with pytest.raises(TrainingConfigError, match=message):
        load_config(tmp_path / "config.yaml")


def test_a_dry_run_shows_what_would_be_trained_on(tmp_path, tokenizer, capsys):
    records = [*questions(30), "{\n", chat("count", " ".join(map(str, range(200))))]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    words = [str(PRETRAIN_TINY), "--dry-run", f"--data.sources=[{{path: {source.path}}}]", f"--data.tokenizer={TINY / 'tokenizer.model'}",
             f"--output.directory={tmp_path / 'run'}"]
    assert finetune.main(words) == 0
    out = capsys.readouterr().out
    lengths = [encode_record(record, tokenizer, DataConfig())["loss_weights"] for record in records[:30]]
    tokens, learnt = sum(map(len, lengths)), int(sum(map(sum, lengths)))
    assert "examples    30; 1 bad records, 1 dropped at 256 tokens" in out and "a.jsonl:31: not readable JSON" in out
    assert f"tokens      {tokens:,}; {learnt:,} learnt, {learnt / tokens:.1%}" in out
    assert f"longest {max(map(len, lengths))}" in out and "⟦<|channel|>final<|message|>" in out and "<|return|>⟧" in out
    assert "memory      on one device: trained weights 13.12 MB, optimizer state 15.18 MB, batch 0.04 MB; 28.34 MB in all" in out
    assert not (tmp_path / "run").exists() and "before run.steps" not in out
    rows = int(re.search(r"(\d+) rows of 256", out)[1])
    for steps, said in ((2 * rows, False), (2 * rows + 1, True)):
        assert finetune.main([*words, "--data.epochs=2", "--data.batch_size=1", f"--run.steps={steps}"]) == 0
        line = f"data.epochs is 2: the run would stop after some {2 * rows} batches, before run.steps, {steps}\n"
        assert (line in capsys.readouterr().out) == said
    assert finetune.main([str(PRETRAIN_TINY), f"--data.tokenizer={TINY / 'tokenizer.model'}", "--dry-run"]) == 0
    assert "synthetic conversations without end" in capsys.readouterr().out
