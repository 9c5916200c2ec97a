"""What a run says of itself: a line or a bar on stderr, JSON lines, TensorBoard, Weights & Biases, and a picture at the end."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.training.config import TrainingConfig, TrainingConfigError
from gptoss_jax.training.run_directory import METRICS_FILE, take_up_metrics

PICTURE_FILE = "training.png"
_CLEAR = "\r\x1b[K"  # the line on a terminal
_BAR_WIDTH = 20
_INSTALL = "pip install 'gptoss-jax[train]'"
_SHOWN = {"loss": "loss {:.4f}", "eval_loss": "eval {:.4f}", "answers_right": "{:.0%} right", "tokens_per_second": "{:,.0f} tok/s",
          "model_flops_utilisation": "MFU {:.0%}"}  # on the bar


class Reporter:
    """Reports of a run that goes on from `step`. flops_per_token, peak_flops (of all devices, None: unknown) are for the utilisation."""

    def __init__(self, config: TrainingConfig, step: int, *, flops_per_token: float, peak_flops: float | None):
        self._directory, self._steps = Path(config.output.directory), config.run.steps
        self._tokens_per_step = config.data.batch_size * config.data.row_tokens
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self.history = take_up_metrics(self._directory, step)
        self._wandb = _wandb(config, self._directory) if config.output.wandb_project else None
        self._tensorboard = _tensorboard(self._directory, step) if config.output.tensorboard else None
        self._file = open(self._directory / METRICS_FILE, "a", encoding="utf-8")
        self._expert_load: np.ndarray | None = None
        self._time, self._step = time.monotonic(), None
        self._bar = sys.stderr.isatty()

    def __call__(self, step: int, values: Mapping[str, float], expert_load: np.ndarray | None = None) -> None:
        """Report what was measured up to a step. expert_load: [layers, experts], shares of each layer's tokens."""
        if trained := "loss" in values:
            values = {**values, **self._speed(step)}
        self._expert_load = self._expert_load if expert_load is None else expert_load
        self.history.append({"step": step} | values)
        self._file.write(json.dumps(self.history[-1]) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        if trained:
            self._show(step, values)

    def say(self, text: str) -> None:
        """Print lines, above the bar where there is one."""
        print(_CLEAR * self._bar + text, file=sys.stderr, flush=True)

    def text(self, step: int, name: str, text: str) -> None:
        """Report a text, such as generated samples."""
        self.say(text)
        if self._tensorboard is not None:
            self._tensorboard.add_text(name, f"```\n{text}\n```", step)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave what is done inside out of the speed of training."""
        start = time.monotonic()
        yield
        self._time += time.monotonic() - start

    def close(self, *, finished: bool) -> None:
        """End the reports; with the picture of a run that is finished."""
        if self._bar and self.history:
            print(file=sys.stderr)
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if finished else 1)
        if finished:
            draw(self.history, self._expert_load, self._directory / PICTURE_FILE)

    def _speed(self, step: int) -> dict[str, float]:
        now, values = time.monotonic(), {}
        if self._step is not None and step > self._step:
            seconds_per_step = max(now - self._time, 1e-9) / (step - self._step)
            rate = self._tokens_per_step / seconds_per_step
            values = {"tokens_per_second": rate, "model_teraflops_per_second": rate * self._flops_per_token / 1e12,
                      "minutes_left": (self._steps - step) * seconds_per_step / 60}
            if self._peak_flops:
                values["model_flops_utilisation"] = rate * self._flops_per_token / self._peak_flops
        self._time, self._step = now, step
        return values

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        if not self._bar:
            shown = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
            print(f"step {step}/{self._steps}  {shown}", file=sys.stderr, flush=True)
            return
        full = step * _BAR_WIDTH // self._steps
        parts = [f"[{'#' * full}{'.' * (_BAR_WIDTH - full)}] {step}/{self._steps}"]
        parts += [form.format(values[name]) for name, form in _SHOWN.items() if name in values]
        if "minutes_left" in values:
            parts.append(_time_left(values["minutes_left"]))
        print(_CLEAR + "  ".join(parts)[: shutil.get_terminal_size().columns - 1], end="", file=sys.stderr, flush=True)


class Silent:
    """What the processes but the first report to: nothing."""

    def __call__(self, step, values, expert_load=None) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def text(self, step: int, name: str, text: str) -> None:
        pass

    def pause(self):
        return contextlib.nullcontext()

    def close(self, *, finished: bool) -> None:
        pass


def check_reports(config: TrainingConfig) -> None:
    """Raise TrainingConfigError when what is asked to be reported to isn't installed."""
    if config.output.wandb_project and importlib.util.find_spec("wandb") is None:
        raise TrainingConfigError(f"output.wandb_project: {config.output.wandb_project!r} found, and wandb isn't installed: pip install "
                                  "wandb")


def draw(history: list[dict[str, Any]], expert_load: np.ndarray | None, file: Path) -> None:
    """Draw the loss by step and, where it is known, the load of every expert in every layer. Needs matplotlib: says so without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib isn't installed: no picture of loss and expert load ({_INSTALL})", file=sys.stderr)
        return
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    losses, loads = figure.subplots(1, 2)
    for name, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(line["step"], line[name]) for line in history if name in line]
        if points:
            losses.plot(*zip(*points), label=label, marker="o" if name == "eval_loss" else None, markersize=3)
    losses.xaxis.get_major_locator().set_params(integer=True)
    losses.set(xlabel="step", ylabel="loss", title="loss of a token")
    losses.legend()
    if expert_load is None:
        loads.set_axis_off()
    else:
        image = loads.imshow(expert_load * expert_load.shape[1], aspect="auto", interpolation="nearest", vmin=0, cmap="viridis")
        loads.set(xlabel="expert", ylabel="layer", title="load of experts (1: an even share)")
        for axis in (loads.xaxis, loads.yaxis):
            axis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=loads)
    temporary = file.with_suffix(".part.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(file)


def _tensorboard(directory: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        print(f"tensorboardX isn't installed: no metrics for TensorBoard ({_INSTALL})", file=sys.stderr)
        return None
    return SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1, max_queue=1000, flush_secs=60)


def _wandb(config: TrainingConfig, directory: Path) -> Any:
    import wandb

    same_run = hashlib.blake2b(os.path.abspath(directory).encode(), digest_size=8).hexdigest()  # a resumed run goes on with its own
    return wandb.init(project=config.output.wandb_project, name=directory.name, id=same_run, resume="allow", dir=str(directory),
                      config=config.to_dict())


def _time_left(minutes: float) -> str:
    return f"{minutes * 60:.0f} s left" if minutes < 2 else f"{minutes:.0f} min left" if minutes < 120 else f"{minutes / 60:.1f} h left"
