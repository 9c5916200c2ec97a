"""generate and chat as a newcomer meets them, on the embedded checkpoint."""

import argparse
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings

import jax
import pytest

from gptoss_jax import chat, checkpoint, command, devices, generate
from gptoss_jax.inference.engine import Token
from gptoss_jax.inference.turn import Turn
from gptoss_jax.kernels import hopper
from gptoss_jax.text import harmony

FUNCTION = {"name": "get_weather", "description": "Gets the current weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}


def ask(capfd, *argv):
    """Run generate in this process; return (exit code, stdout, stderr)."""
    code = generate.main(list(argv))
    out, err = capfd.readouterr()
    return code, out, err


def ask_json(capfd, *argv):
    code, out, err = ask(capfd, *argv, "--json")
    assert code == 0, err
    return json.loads(out)


def text(message):
    return "".join(item["text"] for item in message["content"])


def test_the_answer_is_on_stdout_and_everything_else_on_stderr(capfd):
    code, out, err = ask(capfd, "What is 17 + 25?")
    assert code == 0 and out.strip().rstrip(".").endswith("42") and out.endswith("\n") and "<|" not in out
    assert "tokens in" in err and "tokens/s" in err
    _, again, err = ask(capfd, "What is 17 + 25?", "--show-analysis")
    assert again == out and len(err.splitlines()) > 2


def test_reasoning_grows_with_the_effort(capfd):
    lengths = {}
    for effort in ("low", "medium", "high"):
        answer = ask_json(capfd, "What is 48 + 27?", "--reasoning", effort)
        assert answer["finish"] == "stop" and answer["messages"][-1]["channel"] == "final"
        lengths[effort] = sum(len(text(m)) for m in answer["messages"] if m["channel"] == "analysis")
    assert lengths["low"] < lengths["medium"] < lengths["high"]


def test_json_output_has_messages_usage_and_a_logprob_for_each_token(capfd):
    answer = ask_json(capfd, "What is 9 - 4?")
    assert answer["usage"]["completion_tokens"] == len(answer["tokens"]) and all(t["logprob"] <= 0 for t in answer["tokens"])
    assert answer["tokens"][-1]["text"] == "<|return|>" and answer["skipped"] == []


def test_a_mesh_of_devices_holds_its_shares_of_the_weights_and_gives_the_same_answer(capfd):
    code, out, err = ask(capfd, "What is 17 + 25?", "--mesh", "expert=8")
    assert code == 0 and (out, err.split(", ")[0]) == ("17 + 25 = 42\n", "[memory: weights 1.78 MB")
    _, alone, err = ask(capfd, "What is 17 + 25?", "--mesh", "expert=1")
    assert (alone, err.split(", ")[0]) == (out, "[memory: weights 2.95 MB")


def test_raw_output_spells_special_tokens_and_the_prompt_can_come_from_standard_input(capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What is 3 + 4?\n")))
    code, out, _ = ask(capfd, "-", "--raw")
    assert code == 0 and "7" in out and out.startswith("<|channel|>") and out.rstrip().endswith("<|return|>")


def test_a_given_function_is_called_with_well_formed_arguments(capfd, tmp_path):
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"type": "function", "function": FUNCTION}]))
    answer = ask_json(capfd, "What is the weather in Paris?", "--tools", str(tools))
    call = answer["messages"][-1]
    assert answer["finish"] == "call" and call["recipient"] == "functions.get_weather" and call["channel"] == "commentary"
    assert json.loads(text(call)) == {"city": "Paris"}
    _, out, _ = ask(capfd, "What is the weather in Paris?", "--tools", str(tools))
    assert out.startswith("functions.get_weather {")


def test_the_python_tool_is_called(capfd):
    answer = ask_json(capfd, "What is 84 * 67?", "--tools", "python")
    assert answer["finish"] == "call" and answer["messages"][-1]["recipient"] == "python" and text(answer["messages"][-1]) == "print(84*67)"


def test_an_answer_follows_a_given_schema(capfd, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"result": {"type": "integer"}}, "required": ["result"]}))
    code, out, _ = ask(capfd, "What is 12 + 30?", "--response-format", str(schema))
    assert code == 0 and json.loads(out) == {"result": 42}


def test_a_seed_reproduces_and_settings_are_taken(capfd):
    flags = ["What is 123 * 7?", "--temperature", "1.5", "--top-p", "0.95", "--top-k", "40", "--seed", "7"]
    first, second = ask_json(capfd, *flags), ask_json(capfd, *flags)
    assert first["tokens"] == second["tokens"]


@pytest.mark.parametrize("argv, said", [
    (["hi", "--checkpoint", "/no/such/place"], "/no/such/place: no such"),
    (["hi", "--checkpoint", __file__], "test_generate.py: a file, expected a checkpoint directory"),
    (["hi", "--temperature", "-1"], "temperature is -1.0, expected a number of at least 0"),
    (["hi", "--top-p", "0"], "top_p is 0.0, expected"),
    (["hi", "--max-new-tokens", "0"], "--max-new-tokens is 0, expected at least 1"),
    (["hi", "--reasoning", "extreme"], "invalid choice: 'extreme'"),
    (["hi", "--tools", "/no/tools.json"], "--tools /no/tools.json: not a readable JSON file"),
    (["hi", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    (["hi", "--mesh", "expert=0"], "--mesh 'expert=0': 'expert=0' found, expected each of data, fsdp, expert, tensor once"),
    (["hi", "--mesh", "expert=16"], "needs 16 devices, 8 given"),
    (["hi", "--mesh", "tensor=2"], "down_proj_blocks: dim 2 of (8, 160, 5, 16) (expert_hidden) has 5 entries, which mesh axes tensor 2 don't divide"),
    ([" "], "the prompt is empty"),
    (["7 " * 5000], "tokens, expected fewer than the context of"),
])
def test_bad_input_is_one_clear_line_and_exit_code_2(capfd, argv, said):
    code, out, err = ask(capfd, *argv)
    assert code == 2 and out == "" and said in err and "Traceback" not in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("content, said", [
    ('{"json_schema": null}', "response_format is None; expected an object with a schema"),
    ('{"type": "json_object"}', "response_format is {'type': 'json_object'}; expected an object with a schema"),
    ('{"type": "json_schema"}', "response_format is {'type': 'json_schema'}; expected an object with a schema"),
    ('{"items":' * 500 + "{}" + "}" * 500, "response_format has a schema that is nested too deeply"),
    ("[" * 100_000 + "]" * 100_000, "not a readable JSON file (maximum recursion depth exceeded"),
])
def test_an_unusable_response_format_is_named(capfd, tmp_path, content, said):
    (form := tmp_path / "form.json").write_text(content)
    code, out, err = ask(capfd, "hi", "--response-format", str(form))
    assert code == 2 and out == "" and said in err and len(err.splitlines()) == 1


def test_the_apis_response_format_of_text_asks_for_nothing(tmp_path):
    (form := tmp_path / "form.json").write_text('{"type": "text"}')
    args = generate.parser().parse_args(["hi", "--response-format", str(form)])
    assert [entry["role"] for entry in generate.opening_messages(args)] == ["system"]


@pytest.mark.parametrize("content, said", [('{"temperature": "hot"}', "temperature is 'hot', expected a number"), ("[1]", "list found")])
def test_an_unusable_generation_config_is_named(capfd, tmp_path, content, said):
    shutil.copytree(checkpoint.resolve("tiny"), tmp_path / "tiny")
    (tmp_path / "tiny" / "generation_config.json").write_text(content)
    code, out, err = ask(capfd, "hi", "--checkpoint", str(tmp_path / "tiny"))
    assert code == 2 and out == "" and said in err and len(err.splitlines()) == 1


def test_after_an_error_for_which_other_threads_wait_for_ever_the_process_ends_all_the_same(capsys, monkeypatch):
    def lost(arguments):
        raise hopper.GpuLost("the GPU is gone")

    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    assert command.run(lost, argparse.ArgumentParser("test"), []) == 2 and codes == [2]
    assert capsys.readouterr().err == "test: error: the GPU is gone\n"


def test_debug_shows_the_traceback(capfd):
    code, _, err = ask(capfd, "hi", "--checkpoint", "/no/such/place", "--debug")
    assert code == 2 and "Traceback" in err


@pytest.mark.parametrize("closed, code, out, err", [
    ("<&-", 2, "", "error: the prompt is empty"), ("'What is 3 + 4?' 2>&-", 0, "3 + 4 = 7\n", ""), ("'What is 3 + 4?' >&- <&-", 0, "", "tokens in"),
])
def test_standard_streams_may_be_closed(closed, code, out, err):
    done = subprocess.run(["sh", "-c", f'exec "$0" -m gptoss_jax.generate {closed}', sys.executable], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (code, out) and err in done.stderr and "Error" not in done.stderr


def start(*argv):
    return subprocess.Popen([sys.executable, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            errors="replace")  # sampled bytes need not be UTF-8


def test_a_closed_pipe_ends_quietly():
    process = start("-m", "gptoss_jax.generate", "What is 123 + 456?", "--raw")
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) in (0, 141) and "Traceback" not in err and "Exception ignored" not in err


NEVER_STOPS = """
import signal, sys
from gptoss_jax import generate
from gptoss_jax.text import tokenizer
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
tokenizer.STOP_TOKENS = ()
sys.exit(generate.main())
"""


def test_ctrl_c_stops_with_what_was_said_so_far():
    process = start("-c", NEVER_STOPS, "What is 123 + 456?", "--raw", "--max-new-tokens", "1500")
    said = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and said and "Traceback" not in err and "interrupted" in err, err


def test_chat_remembers_changes_effort_resets_and_saves(tmp_path):
    saved = tmp_path / "talk.json"
    lines = ["What is 5 + 6?", "/reasoning high", "What is 40 + 7?", f"/save {saved}", "/nonsense", "/reset", "What is 2 + 2?", "/quit"]
    done = subprocess.run([sys.executable, "-m", "gptoss_jax.chat", "--hide-analysis"], input="\n".join(lines), capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == 3 and "11" in answers[0] and "47" in answers[1] and "4" in answers[2]
    conversation = json.loads(saved.read_text())["messages"]
    assert [text(m) for m in conversation if m["role"] == "user"] == ["What is 5 + 6?", "What is 40 + 7?"]
    assert conversation[0]["content"][0]["reasoning_effort"] == "high"
    assert "/nonsense: no such command" in done.stderr and "(forgotten)" in done.stderr


@pytest.mark.parametrize("environment", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "utf-8:strict"}], ids=str)
def test_a_line_that_is_not_text_is_dropped_and_the_chat_goes_on(environment):
    done = subprocess.run([sys.executable, "-m", "gptoss_jax.chat", "--hide-analysis"], input=b"What is 5 + 6?\ncaf\xe9\nWhat is 2 + 2?\n",
                          capture_output=True, env=os.environ | environment, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines() == [b"5 + 6 = 11", b"2 + 2 = 4"]
    assert b"standard input is not UTF-8 text (at character 4); that line is dropped\n" in done.stderr


def test_a_tools_result_may_look_like_a_command_or_be_empty(monkeypatch, capfd, tmp_path):
    (tools := tmp_path / "tools.json").write_text(json.dumps([FUNCTION]))
    asked, results = "What is the weather in Paris?", ["/var/log: 3 files", ""]
    lines = iter([asked, "/help", results[0], "/reset", asked, results[1], f"/save {tmp_path / 'talk.json'}", "", "/var"])
    said = []
    monkeypatch.setattr(chat, "read_line", lambda prompt: next(lines, None))
    monkeypatch.setattr(chat.Chat, "say", lambda self, text, say=chat.Chat.say: (said.append(text), say(self, text)))
    assert chat.main(["--hide-analysis", "--tools", str(tools)]) == 0
    assert said == [asked, results[0], asked, results[1]] and "/var: no such command" in capfd.readouterr().err
    assert [text(m) for m in json.loads((tmp_path / "talk.json").read_text())["messages"] if m["role"] == "tool"] == [""]


def test_a_turn_whose_cache_does_not_fit_is_refused_and_the_chat_goes_on(monkeypatch, capfd, tmp_path):
    saved = tmp_path / "talk.json"
    lines = iter(["What is 5 + 6?", "What is 2 + 3?" * 60, f"/save {saved}", "What is 2 + 2?"])
    monkeypatch.setattr(chat, "read_line", lambda prompt: next(lines, None))
    load = generate.load

    def filled(*arguments):
        found = load(*arguments)
        monkeypatch.setattr(devices, "usable_bytes", lambda device=None: 1000)
        return found

    monkeypatch.setattr(generate, "load", filled)
    assert chat.main(["--hide-analysis", "--max-new-tokens", "100"]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == ["5 + 6 = 11", "2 + 2 = 4"]
    refusal = err[err.index("  cache of 1 x ") :]
    assert "  left " in refusal and "of 1 x 1,024 tokens takes 0.74 MB, more than the 0.00 MB free on this host; /reset starts anew" in refusal
    assert [text(m) for m in json.loads(saved.read_text())["messages"] if m["role"] == "user"] == ["What is 5 + 6?"]


def test_an_answer_cut_off_in_a_header_is_not_called_malformed(capfd):
    for tokens in (2, 3):  # of the header; where the text begins
        _, _, err = ask(capfd, "What is 5 + 6?", "--max-new-tokens", str(tokens))
        assert f"cut off after {tokens} tokens" in err and "malformed" not in err


def test_an_answer_that_fills_the_context_says_so_as_no_flag_allows_more(capfd):
    _, _, err = ask(capfd, "7 " * 2040)
    assert "cut off after 3 tokens; the context of 4096 is full" in err and "--max-new-tokens" not in err


def test_malformed_output_is_counted_without_the_end_that_was_cut_off(capfd):
    tokenizer = checkpoint.load_tokenizer("tiny")
    end, start = tokenizer.special["<|end|>"], tokenizer.special["<|start|>"]
    ids = [tokenizer.special["<|message|>"], end, *tokenizer.encode("loose"), start, *tokenizer.encode("assistant")]

    class Engine:
        max_context = 4096

        def stream(self, *_, **__):
            return (Token(0, id, 0.0, "length" if number == len(ids) else None) for number, id in enumerate(ids, 1))

    turn = Turn(Engine(), tokenizer, [harmony.message("user", "hi")], None, len(ids))
    list(turn)
    generate.report(turn)
    assert [part.text for part in turn.skipped] == ["loose", "assistant"]
    assert "malformed in 1 place;" in capfd.readouterr().err


def test_a_prompt_shows_no_reasoning_of_finished_turns_after_a_call_either():
    class Engine:
        max_context = 4096

        def stream(self, *_, **__):
            return iter(())

    tokenizer = checkpoint.load_tokenizer("tiny")
    finished = [harmony.message("assistant", "old thought", channel="analysis"), harmony.message("assistant", "Yes.", channel="final")]
    at_work = [harmony.message("assistant", "new thought", channel="analysis"), harmony.message("assistant", "{}", recipient="functions.f")]
    question, result = harmony.message("user", "hi"), harmony.message("tool", "1", name="functions.f")
    prompt = tokenizer.decode(Turn(Engine(), tokenizer, [question, *finished, question, *at_work, result], None, 1).prompt_ids)
    assert "new thought" in prompt and "old thought" not in prompt


def test_raw_is_recommended_for_malformed_output_where_it_shows_more(capfd, monkeypatch):
    monkeypatch.setattr(Turn, "skipped", [harmony.Skipped(0, "loose", "no message")])
    lines = iter(["hi"])
    monkeypatch.setattr(chat, "read_line", lambda prompt: next(lines, None))
    assert ask(capfd, "hi")[2].endswith("malformed in 1 place; --raw shows it whole\n")
    assert ask(capfd, "hi", "--raw")[2].endswith("malformed in 1 place\n")
    chat.main([])
    assert capfd.readouterr().err.endswith("malformed in 1 place\n")


def test_the_embedded_checkpoint_is_small_and_shaped_like_gpt_oss():
    path = checkpoint.resolve("tiny")
    assert sum(file.stat().st_size for file in path.iterdir()) <= 12e6
    model = checkpoint.load("tiny")
    config = model.config
    assert config.quantized and config.num_local_experts >= 8 and set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert any(name.endswith("down_proj_blocks") for name in model.weights())


def test_damaged_compiled_programs_are_removed_and_one_line_says_so(tmp_path, monkeypatch, capsys):
    (folder := tmp_path / "gptoss_jax" / "xla").mkdir(parents=True)
    for name in ("a-cache", "b-cache", "other"):
        (folder / name).write_text("half")
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    with pytest.warns(UserWarning, match="something else") as others:
        command.enable_compilation_cache()
        jax.config.update("jax_compilation_cache_dir", before)
        for name in "ab":
            warnings.warn(f"Error reading persistent compilation cache entry for 'jit_{name}': zlib.error", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [path.name for path in folder.iterdir()] == ["other"] and len(others) == 1
    assert capsys.readouterr().err == f"compiled programs in {folder} are damaged: removed, to be compiled again\n"


@pytest.mark.parametrize("verb, problem, said", [
    ("reading", "zlib.error", "are damaged, and can't be removed: Permission denied"),
    ("writing", "OSError: [Errno 28] No space left on device", "can't be kept: OSError: [Errno 28] No space left on device"),
])
def test_compiled_programs_that_cannot_be_removed_or_written_break_nothing(tmp_path, monkeypatch, capsys, verb, problem, said):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a-cache").write_text("half")
    monkeypatch.setattr(type(tmp_path), "unlink", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = functools.partial(command._show_or_remove, warnings.showwarning, tmp_path)
        for name in "ab":
            warnings.warn(f"Error {verb} persistent compilation cache entry for 'jit_{name}': {problem}", stacklevel=1)
    assert capsys.readouterr().err == f"compiled programs in {tmp_path} {said}\n"
