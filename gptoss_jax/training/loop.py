"""The training run: set up or resume, step, report, evaluate, save, export."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptoss_jax.checkpoint.destination import check_destination
from gptoss_jax.checkpoint.loading import resolve as resolve_path
from gptoss_jax.checkpoint.training_state import StateStore
from gptoss_jax.model import GptOss
from gptoss_jax.training import data, memory_plan, report, run_directory, speed
from gptoss_jax.training.config import TrainingConfig, TrainingConfigError
from gptoss_jax.training.examples import Question
from gptoss_jax.training.export import export
from gptoss_jax.training.optimizer import check_rates, make_optimizer, schedule
from gptoss_jax.training.state import TrainState, abstract_state, data_part, initial_state, load_frozen, place_batch, resolve, training_mesh
from gptoss_jax.training.step import make_eval_step, make_train_step, model_weights

_SAME_SECTIONS = ("model", "init", "train", "data", "optimizer")  # a resumed run has them in common with its checkpoint, but for
_MAY_CHANGE = ("workers", "on_bad_record", "remat", "loss_chunk_tokens", "expert_transport", "microbatches")
_ANSWERS_SHOWN = 3
Answer = Callable[[GptOss, Sequence[Question]], list[tuple[str, bool]]]  # -> what was asked and said, and whether that is right


class TrainingError(ValueError):
    """A run that can't start or go on; says why, and from where it can be resumed."""


class Terminated(Exception):
    """SIGTERM came, and the state was saved."""


def train(config: TrainingConfig, *, answer_with: Callable[..., Answer] | None = None) -> Path:
    """Run a training to its end, from its newest checkpoint if there is one, and return the exported Hugging Face directory.

    answer_with: called with the tokenizer and `run.answer_tokens`, gives the function that answers held-out questions. Every process of a
    job calls this. Raises Terminated after SIGTERM, otherwise one of our errors; what can be checked is before anything is allocated.
    """
    config = resolve(config)
    report.check_reports(config)
    mesh = training_mesh(config)
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(run_directory.locked(Path(config.output.directory)))
        tokenizer = run_directory.load_vocabulary(config)
        source = data.open_data(config.data, tokenizer)
        return _Run(config, mesh, source, tokenizer, answer_with, stack).to_the_end()


class _Run:
    """One process's part of a run."""

    def __init__(self, config: TrainingConfig, mesh, source, tokenizer, answer_with, stack: contextlib.ExitStack):
        self.config, self.mesh, self.source, self.tokenizer = config, mesh, source, tokenizer
        self.directory = Path(config.output.directory)
        self.destination = self.directory / "export"
        check_destination(self.destination, overwrite=True, source=resolve_path(config.init.checkpoint) if config.init.checkpoint else None)
        index, count = data_part(mesh)
        part = {"process_index": index, "process_count": count}
        self.batches = source.batches(**part)
        stack.callback(self.batches.close)
        self.held_out = source.held_out(config.run.eval_batches, **part)
        run, self.optimizer = config.run, make_optimizer(config.optimizer, config.run.steps)
        self.store = StateStore(self.directory / "checkpoints", keep=run.keep_checkpoints, keep_best=run.keep_best)
        stack.callback(self.store.close)
        self.like, _ = abstract_state(config, self.optimizer, mesh)
        check_rates(config.optimizer, self.like.trained)
        memory_plan.announce(config, mesh, _tell)
        self.state, self.frozen = self._start()
        self.step = int(self.state.step)
        self.reporter, self.learning_rate = self._reporter(), schedule(config.optimizer, run.steps)
        self.train_step, self.eval_step = make_train_step(config, self.optimizer, mesh), make_eval_step(config, mesh)
        self.pending: list[tuple[int, dict, Any]] = []  # (step, metrics, rows) of steps that haven't been looked at
        self.recent: list[dict] = []  # metrics of those that have, since the last report
        self.questions, self.answer = [], None
        if run.answer_every_steps and answer_with is not None:  # all processes answer, each what its devices compute
            self.questions, self.answer = source.questions(run.answers), answer_with(tokenizer, run.answer_tokens)

    def _start(self) -> tuple[TrainState, dict]:
        step = self.store.latest_step()
        if step is None:
            self.store.check_room(self.like)
            return initial_state(self.config, self.optimizer, self.mesh)
        record = self.store.record(step)
        _check_same_run(record["config"], self.config)
        if step > self.config.run.steps:
            raise TrainingConfigError(f"run.steps: {self.config.run.steps} found, expected at least {step}, the step of the newest checkpoint in "
                                      f"{self.config.output.directory} (or another output.directory)")
        self.batches.set_state(record["data"])
        state, frozen = self.store.restore(step, self.like), load_frozen(self.config, self.mesh)
        _tell(f"resumed from step {step}")
        return state, frozen

    def _reporter(self) -> report.Reporter | report.Silent:
        if jax.process_index() != 0:
            return report.Silent()
        peak = speed.peak_flops(jax.devices()[0])
        reporter = report.Reporter(
            self.config, self.step,
            flops_per_token=speed.flops_per_token(self.config.model, self.like.trained, self.config.data.row_tokens),
            peak_flops=peak and peak * (1 if self.mesh is None else self.mesh.size))
        if peak is None:
            reporter.say(f"no peak known of {jax.devices()[0].device_kind!r}: model FLOPs utilisation isn't reported")
        return reporter

    def to_the_end(self) -> Path:
        """Train, report, save and export."""
        finished = False
        try:
            with _sigterm() as asked_to_stop:
                if self.step == 0:
                    self._report_answers()
                while self.step < self.config.run.steps:
                    self._one_step()
                    if asked_to_stop(self.step):
                        raise Terminated(f"SIGTERM: {self._save_and_end()}; the same command goes on from there")
            finished = True
        finally:
            self.reporter.close(finished=finished)
        self.store.close()  # a failed save is told before an export that hides it
        return self._export()

    def _one_step(self) -> None:
        run = self.config.run
        try:
            rows = next(self.batches, None)
        except data.DataError as error:
            raise data.DataError(f"{error}; {self._save_and_end()}") from None
        if rows is None:
            raise TrainingError(f"data.epochs: {self.config.data.epochs} found, and the data ends after {self.step} batches; expected "
                                f"enough for run.steps, {run.steps}; {self._save_and_end()}: with --run.steps {self.step} it is exported")
        self.state, metrics = self.train_step(self.state, self.frozen, place_batch(data.to_batch(rows), self.mesh))
        self.step += 1
        self.store.check()
        self.pending.append((self.step, metrics, rows))

        def due(every: int | None) -> bool:
            return every is not None and (self.step % every == 0 or self.step == run.steps)

        measured = {}
        if self.held_out and (due(run.eval_every_steps) or run.keep_best and due(run.save_every_steps)):
            self._look_back()  # waits for the steps so far: they belong to training
            with self.reporter.pause():
                measured["eval_loss"] = self._evaluate()
        if measured or due(run.log_every_steps):
            self._report(measured)
        if due(run.answer_every_steps):
            self._report_answers()
        if due(run.save_every_steps):
            self._save(measured)

    def _evaluate(self) -> float:
        """Return the loss of a token held aside."""
        metrics = [self.eval_step(self.state.trained, self.frozen, place_batch(batch, self.mesh)) for batch in self.held_out]
        losses, tokens = (np.array([values[name] for values in jax.device_get(metrics)]) for name in ("loss", "tokens"))
        return float((losses * tokens).sum() / max(tokens.sum(), 1))

    def _look_back(self) -> None:
        """Take up the metrics of the steps since the last look. One that isn't finite is left out, or raises TrainingError."""
        steps = [(step, jax.device_get(metrics), rows) for step, metrics, rows in self.pending]
        self.pending.clear()
        for step, metrics, rows in steps:
            if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
                self.recent.append(metrics)
                continue
            places = self.source.places(rows)
            shown = ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
            problem = f"step {step}: loss is {metrics['loss']}, gradient norm {metrics['grad_norm']}; its batch holds {shown}"
            if self.config.run.on_nonfinite == "stop":
                last = self.store.latest_step()
                raise TrainingError(f"{problem}; expected finite numbers (run.on_nonfinite: skip leaves such steps out); "
                                    + ("no checkpoint was saved before" if last is None else f"the last good checkpoint is of step {last}"))
            self.reporter.say(f"left out: {problem}")

    def _report(self, measured: dict[str, float]) -> None:
        self._look_back()
        values, load = dict(measured), None
        if self.recent:
            means = jax.tree.map(lambda *values: np.mean(values, axis=0), *self.recent)
            load = means["expert_load"]
            values = {"loss": means["loss"], "grad_norm": means["grad_norm"], "learning_rate": self.learning_rate(self.step),
                      "balance_loss": means["balance_loss"], "z_loss": means["z_loss"],
                      "largest_expert_share": load.max(), "smallest_expert_share": load.min(), **measured}
            self.recent.clear()
        self.reporter(self.step, {name: float(value) for name, value in values.items()}, load)

    def _report_answers(self) -> None:
        """Answer the held-out questions, show some, and report how many answers are right."""
        if not self.questions:
            return
        self._look_back()
        with self.reporter.pause():
            weights = model_weights(self.config, self.state.trained, self.frozen)
            answers = self.answer(GptOss(self.config.model, weights, mesh=self.mesh), self.questions)
        right = sum(is_right for _, is_right in answers)
        shown = "\n".join(f"  {'right' if is_right else 'wrong'}: {text}" for text, is_right in answers[:_ANSWERS_SHOWN])
        self.reporter.text(self.step, "answers", f"step {self.step}: {right} of {len(answers)} held-out questions right\n{shown}")
        self.reporter(self.step, {"answers_right": right / len(answers)})

    def _save(self, measured: dict[str, float] | None = None) -> None:
        self._look_back()  # nothing is saved after a step that stops the run
        self.store.save(self.step, self.state, {"config": self.config.to_dict(), "data": self.batches.get_state()}, measured)

    def _save_and_end(self) -> str:
        """Save what the run has come to, if it has begun, and wait until it is on disk. All processes do so at the same step."""
        if self.step == 0:
            return "no step was done"
        self._save()
        self.store.close()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("saved")  # a launcher may end all when the first has ended
        return f"step {self.step} of {self.config.run.steps} is saved"

    def _export(self) -> Path:
        """Write the Hugging Face or adapter directory, and beside weights that started at random what their checkpoint would have had."""
        config, state = self.config, self.state
        if config.output.export == "best":
            state = self.store.restore(self.store.best_step(), self.like)
        export(config, state.trained, self.destination, adapters=config.output.adapters)
        if not config.init.checkpoint and jax.process_index() == 0:
            run_directory.write_vocabulary(config, self.destination, self.tokenizer)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("exported")  # the others wait for the first, whose work this is
        return self.destination


def _tell(line: str) -> None:
    if jax.process_index() == 0:
        print(line, file=sys.stderr)


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[int], bool]]:
    """Yield a function that says after a step whether SIGTERM has come: to any process of a job, at the same step in all."""
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    came = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield lambda step: came.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_same_run(saved: dict[str, Any], config: TrainingConfig) -> None:
    """A run may be prolonged, reported differently or computed elsewhere, not resumed as another one."""
    saved, current = (json.loads(json.dumps(content)) for content in (saved, config.to_dict()))  # tuples as lists
    for section in _SAME_SECTIONS:
        for name, value in current[section].items():
            if saved.get(section, {}).get(name) != value and name not in _MAY_CHANGE:
                raise TrainingConfigError(f"{section}.{name}: {value!r} found, expected {saved.get(section, {}).get(name)!r} as in the "
                                          f"checkpoints of {config.output.directory} (or another output.directory)")
