"""Running a training: what is saved when, what stops it, what it says, several processes, and the files people start from."""

import contextlib
import gc
import importlib.util
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from gptoss_jax import finetune
from gptoss_jax.checkpoint import CheckpointError
from gptoss_jax.checkpoint.training_state import StateStore
from gptoss_jax.config import GptOssConfig
from gptoss_jax.text.tokenizer import load_tokenizer
from gptoss_jax.training import data, loop, report, run_directory, speed
from gptoss_jax.training.config import OptimizerConfig, RateConfig, TrainingConfigError, load_config
from gptoss_jax.training.optimizer import check_rates, make_optimizer, schedule
from gptoss_jax.training.records import DataError
from gptoss_jax.training.state import declare_trained, resolve
from gptoss_jax.training.synthetic import clock

pytestmark = pytest.mark.usefixtures("quickly_compiled")
ROOT = pathlib.Path(__file__).parents[1]
STEPS = 10
CONFIGS, LAUNCH = sorted((ROOT / "configs").glob("*.yaml")), ROOT / "launch"
TINY_VOCABULARY = ROOT / "gptoss_jax" / "assets" / "tiny" / "tokenizer.model"
SMALL = ("--model.hidden_size=32 --model.intermediate_size=64 --model.num_hidden_layers=1 --model.num_local_experts=4 "
         "--model.num_attention_heads=2 --model.num_key_value_heads=1 --model.head_dim=20 --train.remat=none --data.row_tokens=128 "
         "--run.log_every_steps=1 --run.eval_every_steps=100 --run.eval_batches=1 --optimizer.kind=adamw --optimizer.warmup_steps=2 "
         f"--optimizer.learning_rate=0.0003 --output.tensorboard=false --data.batch_size=8 --data.tokenizer={TINY_VOCABULARY}").split()


def words(directory, *more):
    return [str(ROOT / "configs" / "pretrain_tiny.yaml"), *SMALL, f"--output.directory={directory}", *more]


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def exported(directory):
    return (directory / "export" / "model.safetensors").read_bytes()


def after_step(monkeypatch, number, act):
    """Call act() once, after the step of that number has been dispatched."""
    make, calls = loop.make_train_step, []

    def make_and_act(*arguments):
        step = make(*arguments)

        def train_step(state, frozen, batch):
            result = step(state, frozen, batch)
            calls.append(None)
            if len(calls) == number:
                act()
            return result

        return train_step

    monkeypatch.setattr(loop, "make_train_step", make_and_act)


# --- optimizer ---------------------------------------------------------------------------------------------------------------------


def update(optimizer, gradients, weights):
    with jax.numpy_dtype_promotion("standard"):  # optax counts on it
        return optimizer.update(gradients, optimizer.init(weights), weights)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_rates_and_decay_go_by_the_names_of_weights(kind):
    names = ("layers.0.q_proj.weight", "layers.0.q_proj.lora_A", "layers.0.q_proj.lora_B", "layers.0.q_proj.bias")
    weights = {name: jnp.ones((4, 4)) for name in names}
    config = OptimizerConfig(kind=kind, learning_rate=1.0, warmup_steps=0, weight_decay=0.5 if kind == "adamw" else 0.0, clip_norm=None,
                             rates=(RateConfig("*.lora_B", 16.0), RateConfig("*.lora_?", 2.0)))
    updates, _ = update(make_optimizer(config, 10), {name: jnp.eye(4) + 1 for name in names}, weights)
    plain, _ = update(make_optimizer(OptimizerConfig(kind=kind, learning_rate=1.0, warmup_steps=0, weight_decay=config.weight_decay,
                                                     clip_norm=None), 10), {name: jnp.eye(4) + 1 for name in names}, weights)
    factors = {name: float((updates[name] / plain[name]).mean()) for name in names}
    assert factors == dict(zip(names, (1, 2, 16, 1)))
    if kind == "adamw":  # Adam's first update is the gradient's sign
        np.testing.assert_allclose(plain[names[0]] - plain[names[3]], -0.5 * jnp.ones((4, 4)), rtol=1e-5)


def test_a_rate_for_weights_that_are_not_trained_is_refused():
    expected = r"optimizer.rates\[1\].weights: '\*lora_C' found, expected a pattern of trained weights, such as a.lora_A"
    with pytest.raises(TrainingConfigError, match=expected):
        check_rates(OptimizerConfig(rates=(RateConfig("*lora_A"), RateConfig("*lora_C"))), ["a.lora_A", "a.lora_B"])


def test_the_learning_rate_decays_by_a_cosine_to_a_fraction():
    rate = schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=10, decay_fraction=1.0, decay_shape="cosine", final_fraction=0.1), 110)
    np.testing.assert_allclose([rate(step) for step in (0, 5, 10, 60, 110)], [0, 1, 2, 1.1, 0.2], atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradients_that_are_not_finite_change_neither_weights_nor_moments(bad):
    optimizer, weights = make_optimizer(OptimizerConfig(warmup_steps=0), 10), {"a.weight": jnp.ones(3), "b.weight": jnp.ones(2)}
    with jax.numpy_dtype_promotion("standard"):
        _, state = optimizer.update({"a.weight": jnp.ones(3), "b.weight": jnp.ones(2)}, optimizer.init(weights), weights)
        updates, after = optimizer.update({"a.weight": jnp.ones(3), "b.weight": jnp.array([1.0, bad])}, state, weights)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert not any(update.any() for update in updates.values())


# --- checkpoints of the state ------------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_checkpoints_stay(tmp_path):
    store = StateStore(tmp_path, keep=1, keep_best=2)
    for step, loss in enumerate((3.0, 1.0, 4.0, 2.0, 5.0), 1):
        store.save(step, {"weights": jnp.full(8, step)}, {"step": step}, {"eval_loss": loss} if step != 3 else None)
    store.close()
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [2, 4, 5]
    again = StateStore(tmp_path, keep=1, keep_best=2)
    assert (again.latest_step(), again.best_step(), again.record(4)) == (5, 2, {"step": 4})
    assert (again.restore(2, {"weights": jnp.zeros(8, jnp.int32)})["weights"] == 2).all()


def test_what_is_saved_is_the_state_of_its_step_although_its_buffers_are_given_away(tmp_path):
    add = jax.jit(lambda state: jax.tree.map(lambda value: value + 1, state), donate_argnums=0)
    store, state = StateStore(tmp_path, keep=9), {"a": jnp.zeros(1 << 21), "b": jnp.zeros(1 << 18)}
    for step in range(1, 4):
        state = add(state)
        store.save(step, state, {"step": step})
        state = add(add(state))
    store.close()
    for step in range(1, 4):
        saved = store.restore(step, state)
        assert all((value == 3 * step - 2).all() for value in saved.values())


def test_what_an_interrupted_save_left_is_removed(tmp_path):
    store = StateStore(tmp_path)
    store.save(1, {"weights": jnp.zeros(8)}, {"step": 1})
    store.close()
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert StateStore(tmp_path).latest_step() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_full_disk_is_one_line_and_earlier_checkpoints_stay_loadable(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk isn't allowed here")
    try:
        state = {"weights": jnp.asarray(np.random.default_rng(0).standard_normal(1 << 20), jnp.float32)}
        store = StateStore(disk / "checkpoints")
        with pytest.raises(CheckpointError, match="no space left on the disk; step 2 is the newest complete one") as caught:
            for step in range(1, 9):
                store.save(step, state, {"step": step})
        assert "\n" not in str(caught.value)
        again = StateStore(disk / "checkpoints")
        assert (again.restore(again.latest_step(), state)["weights"] == state["weights"]).all()
        with pytest.raises(CheckpointError, match="GB free there, 4.295 GB needed for a checkpoint"):
            again.check_room({"weights": jax.ShapeDtypeStruct((1 << 30,), jnp.float32)})
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize(("file", "said"), [
    ("2/state/manifest.ocdbt", "step 2 can't be restored: .*Error decoding manifest: .*; move .*/2 away to go on from step 1$"),
    ("2/state/_METADATA", "step 2 can't be restored: Unterminated string .*; move .*/2 away to go on from step 1$"),
    ("2/record/manifest.ocdbt", "step 2 can't be restored: .*; move .*/2 away to go on from step 1$"),
    ("1/metrics/metrics", "1/metrics/metrics: not readable as JSON")])
def test_a_damaged_checkpoint_is_one_line_with_its_cause_and_what_is_left(file, said, tmp_path, caplog, capsys):
    store, state = StateStore(tmp_path), {"weights": jnp.zeros(8), "moments": jnp.zeros(8)}
    for step in (1, 2):
        store.save(step, state, {"step": step}, {"eval_loss": 1.0})
    store.close()
    file = tmp_path / file
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=said) as caught:
        again = StateStore(tmp_path)
        again.record(again.latest_step())
        again.restore(again.latest_step(), state)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    del caught
    gc.collect()  # what Orbax has left behind is told then
    assert not caplog.records and capsys.readouterr().err == ""


def test_a_save_that_fails_in_the_background_is_told_at_the_next_look(tmp_path, monkeypatch):
    store, state = StateStore(tmp_path), {"weights": jnp.zeros(8)}
    store.save(1, state, {"step": 1})
    store.close()
    store.check()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store._checkpointer._manager, "_finalize_checkpoint", full)
    store.save(2, state, {"step": 1})
    with pytest.raises(CheckpointError, match="a checkpoint can't be saved: no space left on the disk; step 1 is the newest complete one"):
        for _ in range(1000):
            store.check()
            time.sleep(0.01)
    store.check()  # it is told once
    store.close()


# --- a run's directory -------------------------------------------------------------------------------------------------------------


def test_a_second_job_in_a_directory_is_refused_until_the_first_is_gone_however_it_went(tmp_path, capsys):
    code = f"import sys, time; from gptoss_jax.training.run_directory import locked; from pathlib import Path\n" \
           f"with locked(Path({str(tmp_path)!r})): print('locked', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT,
                             env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert other.stdout.readline() == "locked\n"
    assert finetune.main(words(tmp_path)) == 2
    error = capsys.readouterr().err
    assert f"output.directory: {tmp_path} is taken by process {other.pid} on " in error and error.count("\n") == 1
    os.kill(other.pid, signal.SIGKILL)
    other.communicate()
    with run_directory.locked(tmp_path):
        pass


def test_metrics_after_the_step_that_a_run_goes_on_from_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert run_directory.take_up_metrics(tmp_path, 2) == [{"step": 1}, {"step": 2}]
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(("line", "problem"), [
    (b"\0\0\0", "not readable JSON: Expecting value at character 0"), (b'"\xff"', "not readable JSON: 'utf-8' codec can't decode"),
    (b"5", "5 found"), (b'{"loss": 1}', "{'loss': 1} found")])
def test_a_damaged_line_of_the_metrics_is_named_and_nothing_of_them_is_lost(tmp_path, line, problem):
    (file := tmp_path / "metrics.jsonl").write_bytes(content := b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(DataError, match=f"metrics.jsonl:2: {problem}.* expected the metrics of a step, or the line to be removed"):
        run_directory.take_up_metrics(tmp_path, 2)
    assert file.read_bytes() == content


# --- reports -----------------------------------------------------------------------------------------------------------------------


def small_config(directory, *more):
    return resolve(load_config(words(directory)[0], words(directory, "--run.steps=4", *more)[1:]))


def reported(config, step=0):
    pathlib.Path(config.output.directory).mkdir(parents=True, exist_ok=True)
    reporter = report.Reporter(config, step, flops_per_token=1e6, peak_flops=1e12)
    for number in range(step + 1, 5):
        reporter(number, {"loss": 1 / number, "eval_loss": 2 / number}, np.full((2, 4), 0.25))
    reporter.text(4, "answers", "some text")
    reporter.close(finished=True)


def test_a_terminal_sees_a_bar_and_a_log_plain_lines(tmp_path, capsys, monkeypatch):
    reported(small_config(tmp_path / "log"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[3].startswith("step 4/4  loss 0.25  eval loss 0.5  tokens per second ") and "model flops utilisation" in lines[3]
    assert lines[4] == "some text"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(report.shutil, "get_terminal_size", lambda: os.terminal_size((200, 20)))
    reported(small_config(tmp_path / "bar"))
    bar = capsys.readouterr().err.split("\r\x1b[K")
    assert re.fullmatch(r"\[#{15}\.{5}\] 3/4  loss 0.3333  eval 0.6667  [\d,]+ tok/s  MFU \d+%  \d+ s left", bar[3])


def test_reports_go_to_tensorboard_and_to_a_picture(tmp_path):
    reported(small_config(tmp_path, "--output.tensorboard=true"))
    from tensorboardX.proto.event_pb2 import Event

    content, found = next((tmp_path / "tensorboard").glob("events*")).read_bytes(), {}
    while content:  # length, its checksum, the event, its checksum
        size = int.from_bytes(content[:8], "little")
        event, content = Event.FromString(content[12 : 12 + size]), content[16 + size :]
        found.update({(event.step, value.tag): value.simple_value for value in event.summary.value})
    assert found[2, "loss"] == 0.5 and found[3, "eval_loss"] == np.float32(2 / 3) and (4, "answers/text_summary") in found
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_without_the_libraries_for_reports_a_line_says_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    reported(small_config(tmp_path, "--output.tensorboard=true"))
    error = capsys.readouterr().err
    assert "tensorboardX isn't installed: no metrics for TensorBoard (pip install 'gptoss-jax[train]')" in error
    assert "matplotlib isn't installed: no picture of loss and expert load" in error


def test_reports_go_to_weights_and_biases_under_one_name_when_asked(tmp_path, monkeypatch):
    begun, logged = [], []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values["loss"])),
                                finish=lambda exit_code: logged.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **settings: begun.append(settings) or run))
    for step in (0, 2):
        reported(small_config(tmp_path / "mine", "--output.wandb_project=gptoss"), step)
    assert logged == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25), 0, (3, 1 / 3), (4, 0.25), 0]
    assert begun[0]["id"] == begun[1]["id"] and begun[0]["project"] == "gptoss" and begun[0]["config"]["run"]["steps"] == 4


def test_weights_and_biases_that_is_not_installed_is_one_line_at_the_start(tmp_path, capsys):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    assert finetune.main(words(tmp_path, "--output.wandb_project=gptoss")) == 2
    assert "output.wandb_project: 'gptoss' found, and wandb isn't installed: pip install wandb" in capsys.readouterr().err


def test_model_flops_are_counted_by_what_is_active_and_what_is_trained():
    trains = small_config("/nowhere", "--model.num_hidden_layers=2")
    config = trains.model
    width, layers, vocabulary = 32, 2, 1536
    attention = width * 20 * (2 + 1 + 1) + 20 * 2 * width
    experts = 3 * width * 64 * config.num_experts_per_tok
    forward = layers * (attention + experts + width * 4) + width * vocabulary
    scores = 3 * 4 * 2 * 20 * (64 + 64)  # forward and backward, both layers see half a row of 128
    trained = declare_trained(trains)
    assert speed.flops_per_token(config, trained, 128) == 6 * forward + scores
    assert speed.flops_per_token(config, {}, 128) == 4 * forward + scores
    layers_alone = forward - width * vocabulary
    assert speed.flops_per_token(config, trained, 128, again=True) == 6 * forward + 2 * layers_alone + scores * 4 / 3
    device = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    assert speed.peak_flops(device) == 989e12
    assert speed.peak_flops(types.SimpleNamespace(device_kind="abacus")) is None


# --- runs --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts, on one device."""
    directory = tmp_path_factory.mktemp("whole")
    assert finetune.main(words(directory, f"--run.steps={STEPS}", "--run.save_every_steps=100")) == 0
    return directory


@pytest.mark.parametrize(("init", "said"), [("export", "export: the source itself"), ("tiny", "export: no config.json")])
def test_an_export_that_would_replace_something_else_is_refused_before_training(tmp_path, capsys, init, said):
    """Adapters would have replaced the very model that they are of."""
    shutil.copytree(TINY_VOCABULARY.parent, tmp_path / "export")
    if init == "tiny":
        (tmp_path / "export" / "config.json").unlink()
    before = sorted(file.name for file in (tmp_path / "export").iterdir())
    where = init if init == "tiny" else tmp_path / init
    assert finetune.main([str(ROOT / "configs" / "smoke_cpu.yaml"), f"--init.checkpoint={where}", f"--output.directory={tmp_path}",
                          "--output.adapters=true"]) == 2
    assert said in capsys.readouterr().err and sorted(file.name for file in (tmp_path / "export").iterdir()) == before


def test_a_run_exports_with_its_vocabulary_and_is_not_resumed_as_another(whole, capsys):
    command = words(whole, f"--run.steps={STEPS}")
    config = load_config(command[0], command[1:])
    assert load_tokenizer(whole / "export").vocab_size == config.model.vocab_size == 1536
    assert GptOssConfig.from_file(whole / "export" / "config.json") == config.model
    lines = metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)) and "eval_loss" in lines[-1] and lines[-1]["loss"] < 8.0
    for other, problem in (("--optimizer.beta1=0.5", "optimizer.beta1: 0.5 found, expected 0.9 as in the checkpoints"),
                           ("--run.steps=9", f"run.steps: 9 found, expected at least {STEPS}, the step of the newest checkpoint in {whole} ")):
        assert finetune.main([*command, other]) == 2
        assert problem in capsys.readouterr().err


def test_sigterm_saves_and_ends_with_143_and_the_same_command_goes_on(tmp_path, whole, capsys, monkeypatch):
    command = words(tmp_path, f"--run.steps={STEPS}", "--run.save_every_steps=100")
    with monkeypatch.context() as patch:
        after_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert finetune.main(command) == 143
    assert f"SIGTERM: step 5 of {STEPS} is saved; the same command goes on from there" in capsys.readouterr().err
    assert finetune.main(command) == 0
    assert exported(tmp_path) == exported(whole)
    assert [line["loss"] for line in metrics(tmp_path)] == [line["loss"] for line in metrics(whole)]


def test_a_killed_run_loses_the_steps_since_its_last_checkpoint_and_nothing_else(tmp_path, whole, capsys):
    command = words(tmp_path, f"--run.steps={STEPS}", "--run.save_every_steps=1")
    run = subprocess.Popen([sys.executable, "-m", "gptoss_jax.finetune", *command], cwd=ROOT, stderr=subprocess.DEVNULL,
                           env=os.environ | {"PYTHONPATH": str(ROOT)})
    while run.poll() is None and not any((tmp_path / "checkpoints").glob("[23]*")):
        time.sleep(0.002)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    capsys.readouterr()
    assert finetune.main(command) == 0
    assert int(re.search(r"resumed from step (\d)", capsys.readouterr().err)[1]) >= 1
    assert exported(tmp_path) == exported(whole)


def chats(tmp_path, repeated=1, ending=""):
    file = tmp_path / "chats.jsonl"
    texts = [f"What is {a} + {b}?" for a in range(10) for b in range(10)]
    records = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "It is so."}]} for text in texts]
    file.write_text("".join(json.dumps(record) + "\n" for record in records) * repeated + ending)
    return [f"--data.sources=[{{path: {file}}}]"]


def test_a_run_trains_on_files_says_when_they_end_and_goes_on(tmp_path, capsys):
    command = words(tmp_path / "run", *chats(tmp_path), "--data.epochs=1", "--data.eval_fraction=0.1", "--run.save_every_steps=100",
                    "--run.eval_every_steps=1")
    config = load_config(command[0], [*command[1:], f"--run.steps={STEPS}"])
    with contextlib.closing(data.open_data(config.data, load_tokenizer(TINY_VOCABULARY)).batches()) as rows:
        batches = len(list(rows))
    ended = f"data.epochs: 1 found, and the data ends after {batches} batches.*; step {batches} of {STEPS} is saved: with --run.steps {batches} it is"
    with pytest.raises(loop.TrainingError, match=ended):
        loop.train(config)
    lines = metrics(tmp_path / "run")
    assert len(lines) == batches > 1 and "eval_loss" in lines[0]
    assert finetune.main([*command, f"--run.steps={batches}", "--data.workers=1"]) == 0
    assert f"resumed from step {batches}" in capsys.readouterr().err
    assert (tmp_path / "run" / "export" / "config.json").exists()


def test_a_run_that_a_bad_record_stopped_goes_on_without_it_as_if_it_had_always_been_left_out(tmp_path, capsys):
    more = [*chats(tmp_path, 3, "{\n"), "--data.shuffle=false", "--run.steps=9"]
    command = words(tmp_path / "stopped", *more)
    assert finetune.main(command) == 2
    assert re.search(r"chats.jsonl:301: not readable JSON.*skip leaves such records out\); step 8 of 9 is saved\n", capsys.readouterr().err)
    assert finetune.main([*command, "--data.on_bad_record=skip"]) == 0
    assert "resumed from step 8" in capsys.readouterr().err
    assert finetune.main(words(tmp_path / "skipped", *more, "--data.on_bad_record=skip")) == 0
    assert exported(tmp_path / "stopped") == exported(tmp_path / "skipped")


def poisoned(monkeypatch, number):
    """Make the loss of one step a number that isn't."""
    place, calls = loop.place_batch, []

    def place_batch(batch, mesh):
        calls.append(None)
        return place(batch._replace(loss_weights=batch.loss_weights * np.nan) if len(calls) == number else batch, mesh)

    monkeypatch.setattr(loop, "place_batch", place_batch)


def test_a_loss_that_is_not_a_number_stops_with_step_records_and_checkpoint(tmp_path, capsys, monkeypatch):
    poisoned(monkeypatch, 5)
    command = words(tmp_path / "run", *chats(tmp_path), f"--run.steps={STEPS}", "--run.save_every_steps=2", "--run.log_every_steps=6")
    assert finetune.main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"step 5: loss is nan, gradient norm nan; its batch holds \S+/chats.jsonl:\d+, ", error)
    assert "the last good checkpoint is of step 4" in error
    assert not (tmp_path / "run" / "export").exists()


def test_a_loss_that_is_not_a_number_is_left_out_by_choice(tmp_path, capsys, monkeypatch):
    poisoned(monkeypatch, 2)
    assert finetune.main(words(tmp_path / "run", *chats(tmp_path), "--run.steps=3", "--run.on_nonfinite=skip")) == 0
    assert "left out: step 2: loss is nan" in capsys.readouterr().err
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 3]


def start_together(command, count):
    """Start processes as SLURM would, by what JAX reads of its environment."""
    job = {"SLURM_JOB_ID": str(os.getpid() % 4096), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count), "PYTHONPATH": str(ROOT),
           "JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    return [subprocess.Popen([sys.executable, "-m", "gptoss_jax.finetune", *command, "--distributed"], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env=os.environ | job | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)})
            for number in range(count)]


def test_two_processes_of_four_devices_train_as_one_process_does(tmp_path, whole, capsys):
    """On the MXFP4 grid, too, where a weight that falls to the other side moves a loss by 4e-5: with rates ten times as high one does."""
    command = words(tmp_path, f"--run.steps={STEPS}", "--run.save_every_steps=8")
    spread = ["--mesh.data=2", "--mesh.expert=4", "--run.answer_every_steps=8", "--run.answers=3", "--run.answer_tokens=4"]
    first, second = [(run.communicate(timeout=200), run.returncode) for run in start_together([*command, *spread], 2)]
    assert (first[1], second[1]) == (0, 0), first[0][1] + second[0][1]
    assert f"step {STEPS}/{STEPS}" in first[0][1] and "step" not in second[0][1]  # one of them reports
    assert all(f"step {step}: 0 of 3 held-out questions right\n  wrong: " in first[0][1] for step in (0, 8, STEPS))

    def losses(directory):
        return [line["loss"] for line in metrics(directory) if "loss" in line]

    np.testing.assert_allclose(losses(tmp_path), losses(whole), rtol=1e-5)  # relative; float32 sums in another order
    assert len(exported(tmp_path)) == len(exported(whole))
    shutil.rmtree(tmp_path / "checkpoints" / str(STEPS))
    assert finetune.main(command) == 0  # on another mesh: one device
    assert "resumed from step 8" in capsys.readouterr().err
    np.testing.assert_allclose(losses(tmp_path), losses(whole), rtol=1e-5)


def test_a_start_by_nothing_that_jax_knows_is_one_line():
    run = subprocess.run([sys.executable, "-m", "gptoss_jax.finetune", *words("/nowhere"), "--distributed"], cwd=ROOT, text=True,
                         capture_output=True,
                         env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"})
    assert run.returncode == 2
    assert "--distributed: coordinator_address should be defined" in run.stderr.splitlines()[-1]


# --- configurations and launchers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_configuration_is_known_and_says_what_it_runs(file):
    config = load_config(file, [] if file.stem in ("pretrain_tiny",) else ["--init.checkpoint=tiny"])
    resolve(config)
    head = file.read_text().partition("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"configs/{file.name}" in head and "Hardware: " in head and "Metric: " in head and "Last run" in head
    assert config.output.directory == f"runs/{file.stem}"
    check_rates(config.optimizer, declare_trained(resolve(config)))
    commands = [shlex.split(line.lstrip("# "), comments=True) for line in head.splitlines() if line.startswith("#  ")]
    started = [command[command.index(f"configs/{file.name}") + 1 :] for command in commands if f"configs/{file.name}" in command]
    for overrides in started:  # rows that a mesh doesn't divide would be refused
        command = load_config(file, overrides)
        resolve(command, command.init.checkpoint and resolve(load_config(file, ["--init.checkpoint=tiny"])).model)
    assert started


def test_launchers_start_the_command_and_are_what_their_readers_parse():
    scripts = [LAUNCH / name for name in ("local.sh", "slurm.sbatch", "mpi.sh")]
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
        assert os.access(script, os.X_OK) and "gptoss_jax.finetune" in script.read_text()
    for name, devices in (("jobset_gpu", "nvidia.com/gpu"), ("jobset_tpu", "google.com/tpu")):
        *_, jobset = yaml.safe_load_all((LAUNCH / f"{name}.yaml").read_text())
        job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
        container = job["template"]["spec"]["containers"][0]
        assert jobset["kind"] == "JobSet" and job["completions"] == job["parallelism"] and job["completionMode"] == "Indexed"
        assert container["command"][1:3] == ["-m", "gptoss_jax.finetune"] and container["command"][-1] == "--distributed"
        assert devices_of(*container["command"][3:-1]) == job["completions"] * container["resources"]["limits"][devices]
    sky = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert sky["run"].rstrip().endswith("--distributed")
    assert sky["resources"]["accelerators"] == f"H100:{devices_of(sky['envs']['CONFIG'])}" and sky["num_nodes"] == 1


def devices_of(file, *overrides):
    """How many devices a command's mesh has; its rows divide among them."""
    config = load_config(ROOT / file, [*overrides, "--init.checkpoint=tiny"])
    resolve(config)
    return math.prod(vars(config.mesh).values())


def test_the_mpi_launcher_without_a_file_of_hosts_says_what_it_expects():
    run = subprocess.run([LAUNCH / "mpi.sh"], capture_output=True, text=True)
    assert run.returncode and run.stderr.endswith("1: expected HOSTFILE CONFIG.yaml\n") and run.stderr.count("\n") == 1


def test_a_lesson_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (file := tmp_path / "a-file").touch()
    with pytest.raises(SystemExit, match="2"):
        clock.main([str(file)])
    assert capsys.readouterr().err == f"python -m gptoss_jax.training.synthetic.clock: error: {file}: File exists\n"


def test_the_lesson_is_right_and_its_test_is_not_in_it(tmp_path):
    assert clock.main([str(tmp_path), "--problems", "300"]) == 0
    asked = {}
    for name in ("train", "test"):
        for line in (tmp_path / f"{name}.jsonl").read_text().splitlines():
            user, assistant = json.loads(line)["messages"]
            hour, past = map(int, re.search(r"(\d+):(\d\d)", user["content"]).groups())
            minutes = int(re.search(r"(\d+) minutes", user["content"])[1])
            total = (hour * 60 + past + minutes) % (24 * 60)
            answer = f"{total // 60}:{total % 60:02d}"
            assert assistant["content"] == f"It is {answer}." and assistant["thinking"].endswith(answer)
            asked.setdefault(name, set()).add((hour, past, minutes))
    assert len(asked["train"]) == 300 and len(asked["test"]) == 30 and not asked["train"] & asked["test"]
