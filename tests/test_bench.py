"""The benchmark: what it makes up is usable, what it reports follows from what it timed, wrong kernels and bad input are told."""

import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import io
import json
import os
import pathlib
import shutil
import sys
import time
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from gptoss_jax import bench, checkpoint
from gptoss_jax.checkpoint import opening
from gptoss_jax.config import GptOssConfig
from gptoss_jax.inference import engine, measure, measure_ops
from gptoss_jax.kernels import cpu_library, hopper
from gptoss_jax.model import GptOss, cost

SMALL = GptOssConfig(vocab_size=640, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=2,
                     num_attention_heads=8, num_key_value_heads=4, head_dim=16, sliding_window=32, max_position_embeddings=512)
PRETRAIN = str(pathlib.Path(__file__).parents[1] / "configs" / "pretrain_tiny.yaml")
pytestmark = pytest.mark.usefixtures("quickly_compiled")
LIMITS = measure.Ceilings(bandwidth=1e9, matmul=1e12)


@pytest.fixture(scope="module")
def model():
    return GptOss(SMALL, measure.random_weights(SMALL))


def test_random_weights_are_all_different_and_give_ordinary_logits(model):
    weights = model.weights()
    assert {name: (w.shape, str(w.dtype)) for name, w in weights.items()} == {
        name: (w.shape, str(w.dtype)) for name, w in cost.abstract_weights(SMALL).items()}
    blocks = np.asarray(weights["model.layers.0.mlp.experts.down_proj_blocks"])
    assert np.bincount(np.concatenate([blocks & 15, blocks >> 4]).ravel(), minlength=16).min() > 0.8 * blocks.size * 2 / 16
    assert not np.array_equal(blocks, weights["model.layers.1.mlp.experts.down_proj_blocks"])
    logits = np.asarray(jax.jit(lambda m, t: m(t))(model, jnp.arange(60)[None]))
    assert np.isfinite(logits).all() and 0.3 < logits.std() < 3
    dense = measure.random_weights(SMALL.replace(quantized=False), "float32")["model.layers.0.mlp.experts.gate_up_proj"]
    assert dense.shape == (8, 96, 128) and abs(float(dense.std()) * 96**0.5 - 1) < 0.05


def test_decode_is_timed_at_its_context_and_its_numbers_agree(model, monkeypatch):
    lengths = []
    primed = measure._Primed._prefill_prompts

    def spied(self, prompts, length):
        cache, hidden = primed(self, prompts, length)
        lengths.append((len(prompts), int(cache.lengths[0]), cache.layers[1].keys.shape[1], float(jnp.abs(cache.layers[1].keys.astype(jnp.float32)).mean())))
        return cache, hidden

    monkeypatch.setattr(measure._Primed, "_prefill_prompts", spied)
    runs = measure.decode(model, 2, [20, 300], LIMITS, steps=4, repetitions=2)
    short, row = (run() for run in runs)
    assert len(lengths) == 6 and lengths[3][:3] == (2, 300 - 14, 304) and 0.5 < lengths[3][3] < 1.1  # random, not zeros
    assert lengths[0][1:3] == (20 - 14, 304) and short["context"] == 20  # in the longer one's cache
    assert row["read_bytes"] == cost.decode_bytes(SMALL, 2, 300) and row["lowest"] <= row["seconds"] <= row["highest"] < row["compile_seconds"]
    assert row["tokens_per_second"] == pytest.approx(2 / row["seconds"])
    assert row["floor_fraction"] == pytest.approx(row["read_bytes"] / 1e9 / row["seconds"])


def test_what_is_timed_is_compiled_before(model):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None)
    try:
        runs = [*measure.decode(model, 4, [40, 200], LIMITS, steps=4, repetitions=1), measure.prefill(model, 2, 70, LIMITS, repetitions=1)]
        assert len(compiled) >= 7  # keys and values of two kinds, hidden states, first token and step; prefill, empty state and first token
        compiled.clear()
        assert [run()["context"] for run in runs] == [40, 200, 70]
        assert not compiled
    finally:
        jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize("each", [1, 3, 8])
def test_a_rate_is_that_of_the_tokens_read_while_it_was_measured(model, monkeypatch, each):
    """By a clock that a dispatch moves on as the host reads it: 1 ms a step, more for the first token and the first dispatches."""
    read, now, reads = jax.device_get, 0.0, 0

    def device_get(arrays):
        nonlocal now, reads
        reads += 1
        now += 1e-3 * np.shape(arrays[0])[0] if np.ndim(arrays[0]) > 1 or each == 1 and reads > 4 else 9.0
        return read(arrays)

    monkeypatch.setitem(engine._STEPS, "cpu", each)
    monkeypatch.setattr(engine.jax, "device_get", device_get)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    assert measure.decode(model, 1, [200], LIMITS, steps=12, repetitions=1)[0]()["seconds"] == pytest.approx(1e-3)


def test_every_implementation_that_runs_here_agrees_with_the_reference():
    checked = set()
    for case in {case.op: case for case in measure_ops.cases(SMALL, 2, 64)}.values():
        assert measure_ops.chosen_implementation(case) in case.implementations
        for how in case.implementations:
            if how != "reference" and measure_ops.unmet(case, how) is None:
                assert measure_ops.compare(case, how) < 0.02, (case.op, case.size, how)  # bfloat16
                checked.add((case.op, how))
    ops = ("expert_mlp", "expert_matmul", "attention", "decode_attention", "decode_matmul", "dense_matmul", "cache_write")
    assert {(op, "xla") for op in ops} <= checked


def test_an_output_with_its_scores_is_a_case_where_a_kernel_computes_it(monkeypatch):
    monkeypatch.setattr(measure_ops.hopper, "device_unmet", lambda op: None)
    case = next(case for case in measure_ops.cases(SMALL, 1, 64) if case.op == "decode_matmul_scored")
    assert case.read_bytes == 4 * 2 * 96 * (8 * 16 + 8) and measure_ops.compare(case, "cpu") < 0.01
    monkeypatch.undo()
    assert "decode_matmul_scored" not in {case.op for case in measure_ops.cases(SMALL, 1, 64)}


def test_a_lone_rows_block_is_a_case_where_its_kernels_are_in_use_beside_the_ops_it_is_made_of(monkeypatch):
    monkeypatch.setattr(measure_ops.hopper, "device_unmet", lambda op: None)
    monkeypatch.setattr(measure_ops.decode_block, "takes", lambda *arrays: True)
    (case,) = (case for case in measure_ops.cases(SMALL, 1, 64) if case.op == "decode_block")
    assert case.size == "32 slots of a ring"  # two such layers: their products, keys and values
    assert case.read_bytes == 2 * 2 * (96 * (16 * 16 + 8 * 16 + 8) + 2 * 32 * 4 * 16)
    for how in ("auto", "several"):
        assert measure_ops.compare(case, how) < 0.01
    assert measure_ops.unmet(case, "mosaic_gpu").startswith("decode_block implementation 'mosaic_gpu' needs ")
    assert measure_ops.kernel(case, "several", LIMITS, repetitions=1, seconds=0.005)()["seconds"] > 0
    assert "decode_block" not in {case.op for case in measure_ops.cases(SMALL, 2, 64)}
    monkeypatch.setattr(measure_ops.decode_block, "takes", lambda *arrays: False)
    assert "decode_block" not in {case.op for case in measure_ops.cases(SMALL, 1, 64)}


def test_a_wrong_kernel_is_told_and_one_that_cannot_run_says_why():
    case = next(case for case in measure_ops.cases(SMALL, 1, 64) if case.op == "expert_matmul")
    right = case.run
    wrong = case._replace(run=lambda how, *arrays: right(how, *arrays) * (1.1 if how == "xla" else 1))
    assert 0.05 < measure_ops.compare(wrong, "xla") < 0.2
    assert "expected 'auto' or one of" in measure_ops.unmet(case, "no_such")


def test_the_arrays_of_cases_are_counted_before_there_are_any(monkeypatch):
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype: jnp.zeros(shape, dtype))
    arrays = {id(array): array for case in measure_ops.cases(SMALL, 2, 64, "float32") for array in jax.tree.leaves((case.carry, case.arrays))}
    assert measure_ops.case_bytes(SMALL, 2, 64, "float32") == sum(array.nbytes for array in arrays.values())


def test_a_kernel_is_timed_with_its_bytes(monkeypatch):
    case = next(case for case in measure_ops.cases(SMALL, 1, 64) if case.op == "expert_matmul")
    traced = []
    row = measure_ops.kernel(case, "xla", LIMITS, repetitions=2, seconds=0.005, trace=lambda: contextlib.nullcontext(traced.append(1)))()
    assert traced and row["floor_fraction"] == pytest.approx(max(row["read_bytes"] / 1e9, row["flops"] / 1e12) / row["seconds"])
    assert row["read_bytes"] == 2 * 128 * 96 * 17 // 32 and 0 < row["lowest"] <= row["seconds"] <= row["highest"]
    assert row["gb_per_second"] == pytest.approx(row["read_bytes"] / row["seconds"] / 1e9)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "ceilings", lambda dtype="bfloat16": LIMITS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(bench.RANDOM, "small", SMALL)
    cache = jax.config.jax_compilation_cache_dir
    yield tmp_path / "rows.jsonl"
    jax.config.update("jax_compilation_cache_dir", cache)


def run(capsys, *argv):
    code = bench.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_prefill_prints_a_table_and_writes_what_ran(capsys, quick):
    code, out, err = run(capsys, "prefill", "--random-weights", "small", "--context", "20", "--repetitions", "1", "--json", str(quick))
    assert code == 0 and "[memory: weights" in err and "ran expert_mlp" in out and "of the floor" in out
    rows = [json.loads(line) for line in quick.read_text().splitlines()]
    assert [row["what"] for row in rows] == ["ceilings", "prefill"] and rows[1]["context"] == 20 and rows[1]["jax"] == jax.__version__
    assert set(rows[1]["implementations"]) == {"expert_mlp", "expert_matmul", "attention", "dense_matmul"}  # no decode step's
    (found,) = (case for case in measure_ops.prefill_cases(SMALL, 2, 5000, experts=2) if case.op == "attention")
    assert found.size == "2 x 256 tokens" and measure_ops.compare(found, "auto") < 0.02


def test_what_ran_is_said_of_each_prompt_as_it_is_computed_and_of_a_cache_as_it_is_made(capsys, quick, monkeypatch):
    shapes = []
    monkeypatch.setattr(measure_ops, "chosen_implementation", lambda case: shapes.append((case.op, case.size)) or ("few" if "16" in case.size else "many"))
    monkeypatch.setattr(measure, "prefill", lambda model, batch, tokens, *_, **__: lambda: {"batch": batch, "context": tokens})
    code, out, _ = run(capsys, "prefill", "--random-weights", "small", "--context", "7", "10", "33", "--json", str(quick))
    products = [size for op, size in shapes if op == "dense_matmul" and "lm_head" in size]
    assert code == 0 and products == ["lm_head 16 rows", "lm_head 16 rows", "lm_head 64 rows"]
    rows = [json.loads(line)["implementations"]["dense_matmul"] for line in quick.read_text().splitlines()[1:]]
    assert rows == ["few", "few", "many"] and [line.endswith(", 33 tokens") for line in out.splitlines() if line.startswith("ran ")] == [False, True]
    shapes.clear()
    measure_ops.what_runs(SMALL, 1, 100, "bfloat16", prompts=False)
    assert ("decode_attention", "1 x 104 slots") in shapes


@pytest.mark.skipif(not cpu_library.available(), reason="needs the CPU kernels")
def test_a_prompt_of_many_rows_takes_another_product_on_cpus_than_one_of_few():
    few, many = (measure_ops.what_runs(SMALL, 1, tokens, "bfloat16", prompts=True)["dense_matmul"] for tokens in (16, 33))
    assert (few, many) == ("cpu", "xla")  # 33 are computed as 64


@pytest.mark.parametrize("mode, body, first, shown", [
    ("decode", "measure.decode", [lambda: {"batch": 1, "context": 20, "seconds": 0.25}], "1 20 250.00"),
    ("kernels", "measure_ops.compare", 0.125, "expert_mlp 1 tokens reference 1.2e-01"),
])
def test_an_interrupt_shows_what_there_is_and_says_so(capsys, quick, monkeypatch, mode, body, first, shown):
    found = iter([first])

    def interrupted(*_, **__):
        for value in found:
            return value
        raise KeyboardInterrupt

    monkeypatch.setattr(f"gptoss_jax.inference.{body}", interrupted)
    monkeypatch.setattr(measure_ops, "chosen_implementation", lambda case: "xla")
    code, out, err = run(capsys, mode, "--random-weights", "small", "--context", "60", "70")
    assert code == 130 and shown in " ".join(out.split()) and err.endswith("gptoss_jax.bench: interrupted\n")


def test_the_arrays_of_ops_are_gone_before_more_are_made(capsys, quick, monkeypatch):
    random_weights, made, left = measure.random_weights, [], []

    def spied(cases, *args, **options):
        left.append(sum(array() is not None for array in made) if options.get("experts") else 0)  # else those to compare are there, too
        found = cases(*args, **options)
        arrays = [array for array in jax.tree.leaves(found) if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)]
        made.extend(map(weakref.ref, arrays))
        return found

    def weights(*args, **options):
        left.append(sum(array() is not None for array in made))
        return random_weights(*args, **options)

    for name in ("cases", "prefill_cases"):
        monkeypatch.setattr(measure_ops, name, functools.partial(spied, getattr(measure_ops, name)))
    for module, name, replacement in ((measure, "random_weights", weights), (measure, "prefill", lambda *_, **__: dict),
                                      (measure_ops, "chosen_implementation", lambda case: "xla"), (measure_ops, "unmet", lambda *_: "more")):
        monkeypatch.setattr(module, name, replacement)
    for mode, calls in (("kernels", 6), ("prefill", 3)):
        assert run(capsys, mode, "--random-weights", "small", "--batch", "1", "2", "--context", "20")[0] == 0
        assert left == [0] * calls and made
        left.clear()


def test_why_an_implementation_cannot_run_is_told_once_below_the_table(capsys, quick, monkeypatch):
    why = {"reference": "it is too slow", "xla": "it is not there", "cpu": "it is too slow"}
    monkeypatch.setattr(measure_ops, "chosen_implementation", lambda case: "xla")
    monkeypatch.setattr(measure_ops, "unmet", lambda case, implementation: why.get(implementation, "it is a GPU's"))
    code, out, _ = run(capsys, "kernels", "--random-weights", "small", "--context", "20", "--json", str(quick))
    table, told = out.splitlines()[2:-3], out.splitlines()[-3:]
    numbers = {line.split()[-1] for line in table[1:]}
    assert code == 0 and table[0].endswith("not here") and numbers == {"[1]", "[2]", "[3]"}
    assert sorted(line[4:] for line in told) == ["it is a GPU's", "it is not there", "it is too slow"] and [line[:4] for line in told] == ["[1] ", "[2] ", "[3] "]
    rows = [json.loads(line) for line in quick.read_text().splitlines()[1:]]
    assert [f"{line.split()[-1]} {row['not_here']}" in told for line, row in zip(table[1:], rows, strict=True)] == [True] * len(rows)


def test_ops_of_dense_experts_are_theirs_at_any_width(capsys, quick):
    config = SMALL.replace(quantized=False, hidden_size=70, intermediate_size=50)
    found = [case for case in measure_ops.cases(config, 2, 64) if case.op.startswith("expert")]
    used = found[1].read_bytes // (2 * 100 * 70)
    assert [case.read_bytes for case in found] == [used * 2 * 3 * 70 * 50, used * 2 * 100 * 70, used * 2 * 70 * 50] and 2 <= used <= 4
    for case in found:
        assert measure_ops.chosen_implementation(case) in case.implementations and measure_ops.compare(case, "xla") < 0.02
        assert measure_ops.unmet(case, "mosaic_gpu")


def test_a_model_of_more_active_experts_than_are_compared_is_measured(capsys, quick, monkeypatch):
    monkeypatch.setitem(bench.RANDOM, "small", SMALL.replace(num_local_experts=24, num_experts_per_tok=10))
    monkeypatch.setattr(measure_ops, "chosen_implementation", lambda case: "xla")
    monkeypatch.setattr(measure_ops, "unmet", lambda *_: "more")
    code, out, err = run(capsys, "kernels", "--random-weights", "small", "--context", "20")
    assert code == 0 and "expert_mlp" in out, err


def test_every_measurement_has_a_trace_of_its_own(capsys, quick, monkeypatch, tmp_path):
    folders = []
    monkeypatch.setattr(jax.profiler, "trace", lambda folder: contextlib.nullcontext(folders.append(pathlib.Path(folder).relative_to(tmp_path))))

    def measured(*_, trace, **__):
        trace()
        return dict

    for module, name, replacement in ((measure, "prefill", measured), (measure, "random_weights", lambda *_: {}), (measure_ops, "kernel", measured),
                                      (measure_ops, "chosen_implementation", lambda case: "xla"), (measure_ops, "compare", lambda *_: 0.0),
                                      (measure_ops, "unmet", lambda case, how: None if how in ("xla", "cpu") else "more")):
        monkeypatch.setattr(module, name, replacement)
    monkeypatch.setattr("gptoss_jax.model.GptOss", lambda *_: None)
    for mode, points in (("prefill", 2), ("kernels", 52), ("load", 3)):
        source = ("--checkpoint", "tiny", "--repetitions", "3") if mode == "load" else ("--random-weights", "small", "--context", "20", "30")
        assert run(capsys, mode, *source, "--profile", str(tmp_path))[0] == 0
        assert len(set(folders)) == len(folders) == points and all(folder.parts[0].startswith(mode) and len(folder.parts) == 1 for folder in folders)
        folders.clear()


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(capsys, quick, monkeypatch):
    quick.touch()
    monkeypatch.setattr(bench.os, "access", lambda path, mode: path != str(quick))
    for file in (str(quick), ""):
        code, out, err = run(capsys, "load", "--checkpoint", "tiny", "--json", file)
        assert code == 2 and f"--json {file}: can't be written" in err and out == ""


def test_load_is_timed(capsys, quick):
    code, out, _ = run(capsys, "load", "--checkpoint", "tiny", "--repetitions", "1", "--json", str(quick))
    row = json.loads(quick.read_text())
    assert code == 0 and row["what"] == "load" and row["weights_bytes"] > 2e6 and "GB/s" in out
    assert 0 < row["floor_fraction"] < 1 and f"floor: {row['floor_seconds'] * 1e3:,.2f} ms, a plain read of the same files" in out


def test_an_interrupted_load_shows_those_before_it_and_the_first_is_not_in_the_median(capsys, quick, monkeypatch):
    load, clock = checkpoint.load, iter([0, 5, 10, 11, 20, 22, 30])

    def interrupted(*args, **options):
        if clock.__length_hint__():
            return load(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "load", interrupted)
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=clock.__next__))
    assert run(capsys, "load", "--checkpoint", "tiny", "--repetitions", "9", "--json", str(quick))[0] == 130
    row = json.loads(quick.read_text())
    assert [row[name] for name in ("first_run_seconds", "lowest", "seconds", "highest")] == [5, 1, 1.5, 2] and "floor_seconds" not in row


def test_a_plain_read_is_of_every_byte_of_the_files_that_hold_weights(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint.resolve("tiny"), folder)
    (folder / "original").mkdir()  # as published ones have it, and none of what is loaded
    (folder / "original" / "model.safetensors").write_bytes(b"other")
    found = opening.open_checkpoint(folder)
    assert found.files == (folder / "model.safetensors",)
    checkpoint.convert(folder, tmp_path / "orbax")
    orbax = opening.open_checkpoint(tmp_path / "orbax").files
    assert sum(file.stat().st_size for file in orbax) > 2e6 and not {"config.json", "tokenizer.model"} & {file.name for file in orbax}
    spans = []

    class Stream(io.FileIO):
        def readinto(self, buffer):
            at = self.tell()
            spans.append((at, at + super().readinto(buffer)))

    monkeypatch.setattr(measure, "open", lambda file, *_, **__: Stream(file), raising=False)
    assert measure.read_seconds(found.files) > 0
    size = found.files[0].stat().st_size
    read = sorted(spans)[::4]  # a first time and three more
    assert len(spans) == 4 * len(read) and [start for start, _ in read] == [0, *(end for _, end in read[:-1])] and read[-1][1] == size


def test_training_steps_of_a_configuration_are_timed(capsys, quick, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.RANDOM, "smaller", SMALL.replace(num_hidden_layers=1, layer_types=SMALL.layer_types[:1]))
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"init": {"checkpoint": "/no/such"}, "data": {"row_tokens": 16, "batch_size": 2}}))
    code, out, err = run(capsys, "train", str(file), "--random-weights", "smaller", "--train.mode", "lora", "--steps", "1", "--repetitions", "1",
                         "--json", str(quick))
    assert code == 0 and "frozen weights" in err, err
    row = json.loads(quick.read_text().splitlines()[-1])
    assert row["what"] == "train" and row["tokens_per_second"] == pytest.approx(32 / row["seconds"]) and row["compiled_peak_bytes"] > 1e5
    assert row["mode"] == "lora" and "lora, batch 2 x 16 tokens" in out and "host peak GB" in out
    assert row["floor_fraction"] == pytest.approx(row["flops"] / 1e12 / row["seconds"])
    assert "of the floor" in out and "and the layers forward again (remat layer)" in out
    assert "ran attention xla, expert_mlp xla" in out and row["implementations"] == {"attention": "xla", "expert_mlp": "xla"}
    assert measure_ops.called('custom_call_target="__cudnn$fmhaSoftmax", x custom_call_target="mosaic_gpu_v2"') == ["mosaic_gpu", "cudnn"]


@pytest.mark.parametrize("argv, said", [
    (["decode", "--random-weights", "gpt-oss-200b"], "--random-weights 'gpt-oss-200b': no such model, expected one of gpt-oss-20b, gpt-oss-120b"),
    (["decode", "--random-weights", "tiny", "--context", "5000"], "context is 5000, expected 2 to the model's maximum of 4096"),
    (["decode", "--random-weights", "tiny", "--context", "64", "--steps", "60"], "--context is 64, expected more than the 70 tokens that --steps 60 decodes"),
    (["decode", "--random-weights", "tiny", "--batch", "3"], "batch is 3, expected a power of two"),
    (["prefill", "--checkpoint", ""], "model '': no such checkpoint directory"),
    (["prefill", "--checkpoint", "/no/such/place"], "model '/no/such/place': no such checkpoint directory"),
    (["kernels", "--random-weights", "tiny", "--repetitions", "0"], "--repetitions is 0, expected at least 1"),
    (["kernels", "--random-weights", "tiny", "--context", "0"], "context is 0, expected 2 to the model's maximum of 4096"),
    (["load", "--checkpoint", "tiny", "--json", "/no/such/rows.jsonl"], "--json /no/such/rows.jsonl: can't be written, expected a file in a"),
    (["decode", "--random-weights", "tiny", "--profile", __file__], f"--profile {__file__}: a file, expected a directory or the name of a new one"),
    (["decode", "--random-weights", "tiny", "--profile", ""], "--profile : no name, expected a directory or the name of a new one"),
    (["load"], "one of the arguments --checkpoint is required"),
    (["train", "/no/such.yaml"], "/no/such.yaml"),
    (["decode", "--random-weights", "tiny", "--train.mode", "qat"], "--train.mode: of a training configuration, found with decode"),
    (["train", PRETRAIN, "--random-weights", "tiny"], "--random-weights tiny: "),
])
def test_bad_input_is_one_clear_line_and_exit_code_2(capsys, quick, argv, said):
    code, out, err = run(capsys, *argv)
    assert code == 2 and said in err and len(err.splitlines()) == 1 and "GB/s" not in out  # nothing was measured


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_named_and_what_was_measured_is_shown(capsys, quick):
    code, out, err = run(capsys, "load", "--checkpoint", "tiny", "--repetitions", "1", "--json", "/dev/full")
    assert code == 2 and err.splitlines()[-1].endswith("error: /dev/full: No space left on device") and "host peak MB" in out


@pytest.mark.parametrize("mode", ["decode", "kernels"])
def test_what_does_not_fit_is_refused_with_the_table(capsys, quick, monkeypatch, mode):
    from gptoss_jax import devices

    monkeypatch.setattr(devices, "usable_bytes", lambda device=None: 1000)
    code, _, err = run(capsys, mode, "--random-weights", "small")
    assert code == 2 and "  left" in err and "more than the 0.00 MB free on this host" in err


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(pathlib.Path(__file__).parents[1] / "benchmarks")
        yield importlib.import_module("gpu")


def test_the_gpu_script_keeps_going_past_what_fails_and_stops_in_time(gpu, tmp_path, monkeypatch):
    arguments = argparse.Namespace(out=tmp_path / "rows.jsonl", section="torch", model="tiny", seconds=60.0)

    def late():
        arguments.end = 0
        return {"seconds": 1}

    def section(arguments, record):
        right, wrong = lambda: {"seconds": 2, "what": "kernel"}, lambda: 1 / 0
        points = [("ab", wrong), ("c", lambda: [right]), ("de", lambda: [wrong, right]), ("fg", lambda: [late, late])]
        gpu.measured(arguments, record, [([{"what": what} for what in letters], prepare) for letters, prepare in points])
        gpu.measured(arguments, record, [([{"what": "h"}], pytest.fail)])  # isn't begun
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setitem(gpu.SECTIONS, "torch", section)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n"))
    assert gpu.run_section(arguments) == 1
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()]
    division = "ZeroDivisionError: division by zero"
    assert [row.get("failed") or row.get("skipped") or row["seconds"] for row in rows] == [
        division, division, 2, division, 2, 1, gpu.NO_TIME, gpu.NO_TIME, "RuntimeError: out of luck"]
    assert [row["what"] for row in rows[:-1]] == list("abcdefgh")


@pytest.mark.parametrize("said, tries", [("INTERNAL: Failed to launch ptxas", 2), ("INTERNAL: ptxas died", 1)])
def test_the_gpu_script_compiles_again_what_found_no_process(gpu, said, tries):
    tried = []

    def prepare():
        tried.append(said)
        raise RuntimeError(said)

    with pytest.raises(RuntimeError, match=said):
        gpu.prepared(prepare)
    assert len(tried) == tries


def test_the_gpu_script_ends_a_section_whose_kernel_hangs_while_it_gets_ready(gpu, monkeypatch):
    class Never:
        def is_ready(self):
            return False

    rows, points = [], [([{"what": "a"}], lambda: hopper.arrived([Never()])), ([{"what": "b"}], lambda: [lambda: {"seconds": 1}])]
    arguments = argparse.Namespace(end=time.monotonic() + 100, took=0.0)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n" * 4))
    for name, value in (("_NO_RESULT_AFTER", 0.1), ("_one", Never)):
        monkeypatch.setattr(hopper, name, value)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(hopper.GpuLost, match="after {'what': 'a'}") as caught:
        gpu.measured(arguments, lambda **row: rows.append(row), points)
    assert rows == [{"what": "a", "failed": "TimeoutError: no result after 0.1 s"}] and caught.value.ends_process


def test_the_gpu_script_begins_as_many_points_as_find_time_and_measures_ceilings_once_a_run(gpu, tmp_path, monkeypatch):
    arguments = argparse.Namespace(out=tmp_path / "rows.jsonl", section="torch", model="tiny", end=time.monotonic() + 10, took=4.0, checked=False, earlier=1)
    arguments.out.write_text('{"what": "ceilings", "gb_per_second": 7, "tflop_per_second": 7}\n')  # of an earlier run
    record = functools.partial(gpu.write, arguments.out)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n" * 4))
    gpu.measured(arguments, lambda **row: record(row), [([{"what": what}], lambda: [lambda: {"seconds": 1}]) for what in "abc"])
    assert [row.get("skipped") for row in gpu.read(arguments.out)[1:]] == [None, None, gpu.NO_TIME]
    found = iter([measure.Ceilings(4e9, 5e12)])
    monkeypatch.setattr(measure, "ceilings", lambda: next(found))
    assert [gpu.begin(arguments, lambda **row: record(row))[1] for _ in range(2)] == [(4e9, 5e12)] * 2
    (row,) = gpu.read(arguments.out)[4:]
    assert row["package"] is None or len(row["package"]) == 40


def test_the_gpu_script_checks_every_hopper_kernel_in_a_process_of_its_own(gpu, monkeypatch):
    ops = {path.parent.name for path in pathlib.Path(hopper.__file__).parent.glob("*/hopper_check.py")}
    assert set(gpu.HOPPER_KERNELS) == ops | {gpu.TRAINING}
    monkeypatch.setattr(hopper, "wrong_here", pytest.fail)  # which may only remember
    monkeypatch.setattr(hopper, "device_unmet", lambda op, *, training=False: "luck" if training else op)
    rows = [{"what": "ceilings"}]
    for kernel in gpu.HOPPER_KERNELS:
        gpu.check(argparse.Namespace(kernel=kernel), lambda **row: rows.append(row))
    assert hopper.wrong_here is hopper.disagreement
    assert gpu.hopper_checks(rows) == {op: op for op in ops} | {gpu.TRAINING: "luck"}


def test_the_gpu_scripts_sections_do_without_a_kernel_whose_check_never_ends(gpu, tmp_path, monkeypatch, capsys):
    out, begun = tmp_path / "rows.jsonl", []

    def lane(sections, share, command, path, end, turns):
        kernel = command[command.index("--kernel") + 1] if "--kernel" in command else None
        begun.append((sections[0][0], kernel, "--checked" in command, share))
        if kernel not in (None, "decode_block"):
            gpu.write(path, {"section": "check", "model": "tiny"} | gpu.checked(kernel, "luck" if kernel == gpu.TRAINING else None))
        return kernel == "decode_block"

    monkeypatch.setattr(gpu, "run_lane", lane)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(out), "--models", "tiny"])
    monkeypatch.setattr("sys.path", sys.path[:])
    assert gpu.main() == 1
    assert sum(share for *_, share in begun[:6]) <= gpu.GPU_FRACTION
    assert {entry[:3] for entry in begun[:6]} == {("ceilings", None, False), *(("check", kernel, False) for kernel in gpu.HOPPER_KERNELS)}
    assert [entry[:3] for entry in begun[6:]] == [("model", None, True)]
    shown = capsys.readouterr().out
    assert "Hopper kernel of decode_block: needs a check that comes to its end" in shown and "expert_matmul: equals the reference" in shown
    gpu.write(out, {"what": "ceilings", "gb_per_second": 7, "tflop_per_second": 7})
    monkeypatch.setattr(hopper, "wrong_here", None)
    gpu.begin(argparse.Namespace(out=out, earlier=0, checked=True, model="tiny"), pytest.fail)
    asked = [("expert_matmul", False), ("decode_block", False), ("expert_matmul", True)]
    assert [hopper.wrong_here(*kernels) for kernels in asked] == [None, "a check that comes to its end", "luck"]


def test_the_gpu_script_traces_what_matters_most_after_it_was_measured(gpu, monkeypatch, capsys):
    def line(name, *events):
        return types.SimpleNamespace(name=name, events=[types.SimpleNamespace(name=name, start_ns=at, duration_ns=time) for name, at, time in events])

    planes = [types.SimpleNamespace(name="/host:CPU", lines=[line("Stream", ("host", 1, 1))]),
              types.SimpleNamespace(name="/device:GPU:0", lines=[line("Stream #7(Compute)", ("b", 5000, 1500), ("a", 3000, 900), ("b", 7000, 2500)), line("XLA Ops", ("x", 1, 1))])]
    rows, ways = [], []

    def decode(trace):
        def run():
            with trace() as way:
                ways.append(way)
            return {"seconds": 1.0}

        return [run, run]

    @contextlib.contextmanager
    def traced(folder, profiler_options):
        assert profiler_options.python_tracer_level == 0
        yield (pathlib.Path(folder) / "host.xplane.pb").touch() or "traced"

    monkeypatch.setattr(jax.profiler, "trace", traced)
    monkeypatch.setattr(jax.profiler, "ProfileData", types.SimpleNamespace(from_file=lambda path: types.SimpleNamespace(planes=planes)))
    assert [run() for run in gpu.traced_as_well(decode, lambda **row: rows.append(row))] == [{"seconds": 1.0}] * 2 and ways == [None, "traced", None]
    assert rows == [{"what": "trace", "names": ["a", "b"], "events": [[0, 0, 0.9], [1, 2, 1.5], [1, 4, 2.5]]}]
    gpu.show([rows[0] | {"model": "tiny", "section": "model"}])
    assert "tiny b: 2 x 2.5 us" in capsys.readouterr().out
    planes[1].lines = 5
    assert gpu.traced_as_well(decode, lambda **row: rows.append(row))[0]() == {"seconds": 1.0} and rows[1]["failed"].startswith("TypeError")


def test_the_gpu_script_refuses_what_it_cannot_use_before_it_begins(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.path", sys.path[:])
    monkeypatch.setattr(gpu, "run_lane", pytest.fail)
    for flags, message in ((["--models", "nope"], "model 'nope'"), (["--models", "tiny", "--seconds", "-5"], "--seconds is -5, expected"),
                           (["--models", "tiny", "--out", str(tmp_path / "none" / "rows.jsonl")], "No such file")):
        monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(tmp_path / "rows.jsonl"), *flags])
        with pytest.raises(SystemExit, match="2"):
            gpu.main()
        assert message in capsys.readouterr().err


def test_the_gpu_script_shows_what_this_run_found_and_a_kernel_of_nan_is_wrong(gpu, tmp_path, monkeypatch, capsys):
    found = {"section": "kernels", "model": "tiny", "what": "check", "op": "attention", "size": "1 x 64 keys", "implementation": "xla"}
    out = tmp_path / "rows.jsonl"
    out.write_text("not ours }\n" + json.dumps(found | {"error": 0.5}) + '\n{"half": {}')
    monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(out), "--models", "tiny"])
    monkeypatch.setattr(gpu, "run_lane", lambda sections, *_: sum(gpu.write(out, found | {"error": error}) or 0 for error in sections if isinstance(error, float)))
    monkeypatch.setattr(gpu, "lanes", lambda *_: [(0.5, [float("nan"), 0.01])])
    monkeypatch.setattr("sys.path", sys.path[:])
    assert gpu.main() == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line] == ["WRONG: tiny attention 1 x 64 keys by xla: nan"]


LANE = """
import os, sys, time
out, section = sys.argv[1], sys.argv[sys.argv.index("--section") + 1]
def say(state):
    with open(out, "a") as file:
        file.write(section + " " + state + "\\n")
for turn in range(3):
    say("compiles")
    time.sleep({"a": 0.1, "b": 0.2, "c": 0.05}[section[0]])
    say("waits")
    print("ready to time", flush=True)
    sys.stdin.readline()
    say("times")
    time.sleep(0.02)
    say("ends")
    if section == "a1":
        os._exit(3)
    print("timed", flush=True)
    sys.stdin.readline()
say("waits")
"""


def test_the_gpu_scripts_lanes_time_while_nobody_compiles(gpu, tmp_path):
    turns, log, end = gpu.Turns(), tmp_path / "log", time.monotonic() + 60
    lanes = [[("a1", "tiny", 1), ("a2", "tiny", 1)], [("b1", "tiny", 1)], [("c1", "tiny", 1), ("c2", "tiny", 1)]]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        failed = list(pool.map(lambda lane: gpu.run_lane(lane, 0.3, [sys.executable, "-c", LANE, str(log)], tmp_path / "rows.jsonl", end, turns), lanes))
    assert failed == [1, 0, 0]  # one died while it had its turn
    states, beside = {}, 0
    for section, state in map(str.split, log.read_text().splitlines()):
        states[section] = state
        busy = [other for other, doing in states.items() if doing in ("compiles", "times")]
        assert len(busy) == 1 or "times" not in states.values()
        beside += state == "compiles" and len(busy) > 1
    assert len(states) == 5 and set(states.values()) == {"waits", "ends"} and beside  # they do compile beside each other


def test_the_gpu_script_stops_a_section_that_hangs_while_it_times(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[gpu.run_lane.__module__], "LONGEST", 2)
    turns, out = gpu.Turns(), tmp_path / "rows.jsonl"
    command = [sys.executable, "-c", LANE.replace('0.02', '0.02 if section[0] == "a" else 60'), str(tmp_path / "log")]
    begun = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(gpu.run_lane, [(section, "tiny", 1)], 0.3, command, out, begun + 600, turns) for section in ("a2", "b1")]
        assert [end.result(timeout=30) for end in ends] == [0, 1]  # the other comes to its end
    assert [row["section"] for row in gpu.read(out)] == ["b1"] and time.monotonic() < begun + 30


def test_the_gpu_script_interrupted_stops_its_sections_and_begins_no_others(gpu, tmp_path, monkeypatch, capsys):
    turns, log, out = gpu.Turns(), tmp_path / "log", tmp_path / "rows.jsonl"
    lanes = [[("a2", "tiny", 1), ("a3", "tiny", 1)], [("b1", "tiny", 1)]]
    command = [sys.executable, "-c", LANE.replace('"a": 0.1', '"a": 60'), str(log)]  # lane b waits for its turn
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(gpu.run_lane, lane, 0.3, command, out, time.monotonic() + 600, turns) for lane in lanes]
        begun = time.monotonic()
        while time.monotonic() < begun + 30 and not (log.exists() and {"a2 compiles", "b1 waits"} <= set(log.read_text().splitlines())):
            time.sleep(0.01)
        turns.interrupt()
        assert [end.result(timeout=10) for end in ends] == [1, 1]
    assert sorted((row["section"], row["skipped"]) for row in gpu.read(out)) == [(section, "interrupted") for section in ("a2", "a3", "b1")]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(out), "--models", "tiny"])
    monkeypatch.setattr("sys.path", sys.path[:])
    monkeypatch.setattr(gpu, "run_lane", interrupt)
    shown = []
    monkeypatch.setattr(gpu, "show", shown.append)
    assert gpu.main() == 1 and shown == [[]]


def test_the_gpu_scripts_points_share_programs_and_lanes_its_memory(gpu):
    points = [("decode", 1, 128), ("prefill", 1, 128), ("decode", 1, 8192), ("prefill", 1, 8192), ("decode", 4, 8192), ("decode", 1, 131_072)]
    assert gpu.by_program(points, lambda batch, context: context > 256) == [points[:1], points[1:2], [points[2], points[5]], points[3:4], points[4:5]]
    whole, shared = gpu.lanes(["large", "small"], 80 << 30), gpu.lanes(["large", "small"], 141 << 30)
    assert len(whole) == 1 and sum(share for share, _ in shared) <= gpu.GPU_FRACTION
    assert {section[:2] for _, lane in whole for section in lane} == {section[:2] for _, lane in shared for section in lane}
