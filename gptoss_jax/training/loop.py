"""The training run: set up or resume, step, report, evaluate, save, export."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptoss_jax.checkpoint import save_huggingface
from gptoss_jax.checkpoint.training_state import StateStore
from gptoss_jax.text.tokenizer import Tokenizer, load_tokenizer
from gptoss_jax.training import data, vocabulary
from gptoss_jax.training.config import TrainingConfig, TrainingConfigError
from gptoss_jax.training.optimizer import make_optimizer, schedule
from gptoss_jax.training.state import TrainState, abstract_state, initial_state, load_frozen, place_batch, resolve, training_mesh
from gptoss_jax.training.step import make_eval_step, make_train_step

TOKENIZER_FILE = "tokenizer.model"
_MAY_CHANGE = ("workers",)  # of the sections that a resumed run has to have in common with its checkpoint


class TrainingError(ValueError):
    """A run that can't start or go on; says why, and from where it can be resumed."""


def train(config: TrainingConfig) -> Path:
    """Run a training to its end, from its newest checkpoint if there is one, and return the exported Hugging Face directory."""
    config = resolve(config)
    directory = Path(config.output.directory)
    tokenizer = load_vocabulary(config, directory)
    source = data.open_data(config.data, tokenizer)  # before anything is allocated: it finds out what can't be trained on
    batches, held_out = source.batches(), source.held_out(config.run.eval_batches)
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    mesh = training_mesh(config)
    store = StateStore(directory / "checkpoints", keep=config.run.keep_checkpoints)
    try:
        step = store.latest_step()
        if step is None:
            state, frozen = initial_state(config, optimizer, mesh)
        else:
            state, record = store.restore(step, abstract_state(config, optimizer, mesh)[0])
            frozen = load_frozen(config, mesh)
            _check_same_run(record["config"], config)
            batches.set_state(record["data"])
            print(f"resumed from step {step}", file=sys.stderr)
        state = _run(config, state, frozen, batches, held_out, optimizer, mesh, store, directory)
    finally:
        batches.close()
        store.close()
    return export(config, state, directory)


def export(config: TrainingConfig, state: TrainState, directory: Path) -> Path:
    """Write the weights as a Hugging Face directory with MXFP4 experts and the tokenizer; return its path."""
    destination = directory / "export"
    save_huggingface(destination, config.model, state.trained, overwrite=True)
    (destination / TOKENIZER_FILE).write_bytes((directory / TOKENIZER_FILE).read_bytes())
    generation = {"bos_token_id": config.model.bos_token_id, "pad_token_id": config.model.pad_token_id, "do_sample": False,
                  "eos_token_id": [config.model.eos_token_id, vocabulary.token_id("<|call|>"), vocabulary.token_id("<|endoftext|>")]}
    (destination / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    return destination


def _run(config, state, frozen, batches, held_out, optimizer, mesh, store, directory) -> TrainState:
    run = config.run
    train_step, evaluate = make_train_step(config, optimizer, mesh), make_eval_step(config, mesh)
    learning_rate = schedule(config.optimizer, run.steps)
    reporter = _Reporter(run.steps, config.data.batch_size * config.data.row_tokens, directory / "metrics.jsonl")
    recent = []
    for step in range(int(state.step) + 1, run.steps + 1):
        rows = next(batches, None)
        if rows is None:
            raise TrainingError(f"data.epochs: {config.data.epochs} found, and the data ends after {step - 1} batches; expected enough for "
                                f"run.steps, {run.steps}")
        state, metrics = train_step(state, frozen, place_batch(data.to_batch(rows), mesh))
        recent.append(metrics)
        if step % run.log_every_steps == 0 or step == run.steps:
            values = jax.tree.map(lambda *steps: np.mean(steps, axis=0), *jax.device_get(recent))
            recent.clear()
            if not np.isfinite(values["loss"]) or not np.isfinite(values["grad_norm"]):
                raise TrainingError(f"up to step {step}: loss is {values['loss']}, gradient norm {values['grad_norm']}; expected finite "
                                    f"numbers; the last good checkpoint is of step {store.latest_step()}")
            report = {"loss": values["loss"], "grad_norm": values["grad_norm"], "learning_rate": learning_rate(step),
                      "balance_loss": values["balance_loss"], "largest_expert_share": values["expert_load"].max(),
                      "smallest_expert_share": values["expert_load"].min()}
            if held_out and (step % run.eval_every_steps == 0 or step == run.steps):
                report["eval_loss"] = np.mean([evaluate(state.trained, frozen, place_batch(batch, mesh))["loss"] for batch in held_out])
            reporter(step, {name: float(value) for name, value in report.items()})
        if step % run.save_every_steps == 0 or step == run.steps:
            store.save(step, state, {"config": config.to_dict(), "data": batches.get_state()})
    return state


class _Reporter:
    """A line per report on stderr, with speed and time left, and the same as JSON in a file."""

    def __init__(self, steps: int, tokens_per_step: int, file: Path):
        self._steps, self._tokens_per_step, self._file = steps, tokens_per_step, file
        self._time, self._step = time.monotonic(), None

    def __call__(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        if self._step is not None:
            seconds_per_step = (now - self._time) / (step - self._step)
            values = values | {"tokens_per_second": self._tokens_per_step / seconds_per_step,
                               "minutes_left": (self._steps - step) * seconds_per_step / 60}
        self._time, self._step = now, step
        shown = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
        print(f"step {step}/{self._steps}  {shown}", file=sys.stderr, flush=True)
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | values) + "\n")


def load_vocabulary(config: TrainingConfig, directory: Path) -> Tokenizer:
    """Put the vocabulary into the run's directory, if it isn't there, and load it."""
    file = directory / TOKENIZER_FILE
    directory.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        content = (Path(config.data.tokenizer).read_bytes() if config.data.tokenizer
                   else vocabulary.train(config.model.vocab_size, seed=config.data.seed))
        temporary = file.with_suffix(".part")
        temporary.write_bytes(content)
        temporary.replace(file)
    tokenizer = load_tokenizer(file)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise TrainingConfigError(f"model.vocab_size: {config.model.vocab_size} found, expected {tokenizer.vocab_size}, the size of {file}")
    return tokenizer


def _check_same_run(saved: dict[str, Any], config: TrainingConfig) -> None:
    """A run may be prolonged or reported differently, not resumed as another one."""
    saved, current = (json.loads(json.dumps(content)) for content in (saved, config.to_dict()))  # tuples as lists
    for section in ("model", "data", "optimizer"):
        for name, value in current[section].items():
            if saved[section].get(name) != value and name not in _MAY_CHANGE:
                raise TrainingConfigError(f"{section}.{name}: {value!r} found, expected {saved[section].get(name)!r} as in the checkpoints "
                                          f"of {config.output.directory} (or another output.directory)")
