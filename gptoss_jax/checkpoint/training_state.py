"""The whole state of a training run, through Orbax: arrays, the input pipeline's position, what else a resumed run needs to know."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from gptoss_jax.checkpoint.errors import CheckpointError, read_json, reason

_KEPT = ocp.training.preservation_policies
_UNFINISHED = "*.orbax-checkpoint-tmp"


class StateStore:
    """Numbered checkpoints in a directory; each appears complete or not at all.

    keep: so many of the newest stay, and with keep_best so many of those with the lowest `metric`; the others go. Saving runs in the
    background (arrays are copied first); `check` looks after it and `close` waits for it. The directory belongs to one job at a time: what
    an interrupted save left there is removed. Raises CheckpointError when the metrics of one can't be read.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 2, keep_best: int = 0, metric: str = "eval_loss"):
        self._directory, self._metric = Path(os.path.abspath(directory)), metric
        if jax.process_index() == 0:
            self._remove_unfinished()
        kept: list = [_KEPT.LatestN(keep)]
        if keep_best:
            kept.append(_KEPT.BestN(get_metric_fn=lambda metrics: metrics[metric], reverse=True, n=keep_best,
                                    keep_checkpoints_without_metrics=False))
        for file in self._directory.glob("*/metrics/metrics"):  # Orbax reads those of all steps, and wouldn't say which is damaged
            if file.parts[-3].isdigit():
                read_json(file)
        self._checkpointer = ocp.training.Checkpointer(
            self._directory, preservation_policy=_KEPT.AnyPreservationPolicy(kept))
        self._saving = False  # or nobody has looked yet how it went
        for name in ("absl", "asyncio"):  # Orbax logs the tracebacks of failures that it raises as well, and leaves others unawaited
            logging.getLogger(name).setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", "coroutine 'Store._get_array_metadatas' was never awaited", RuntimeWarning)

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, None when there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def best_step(self) -> int | None:
        """Return the step of the checkpoint with the lowest metric, None when none has it."""
        measured = [checkpoint for checkpoint in self._checkpointer.checkpoints if checkpoint.metrics]
        return min(measured, key=lambda checkpoint: checkpoint.metrics[self._metric]).step if measured else None

    def check_room(self, state: Any) -> None:
        """Raise CheckpointError when there is no room for a checkpoint of `state`, arrays or ShapeDtypeStructs."""
        needed = sum(value.size * value.dtype.itemsize for value in jax.tree.leaves(state))
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise CheckpointError(f"{self._directory}: {free / 1e9:.3f} GB free there, {needed / 1e9:.3f} GB needed for a checkpoint")

    def save(self, step: int, state: Any, record: dict[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Save a pytree of arrays and a JSON object; a step that is there already is left as it is.

        Raises CheckpointError when this save can't start or the one before it failed.
        """
        if self.latest_step() == step:
            return
        with self._failing():  # forced: otherwise a save that comes while another is being written is left out
            self._checkpointer.save_checkpointables_async(step, {"state": state, "record": record}, metrics=metrics, force=True)
        self._saving = True

    def check(self) -> None:
        """Raise CheckpointError when a save has failed in the background. Waits for nothing: to be called after every step."""
        if self._saving and not self._checkpointer.is_saving_in_progress():
            self._saving = False
            with self._failing():
                self._checkpointer.wait()

    def record(self, step: int) -> dict[str, Any]:
        """Return the JSON object of a step. Raises CheckpointError when it can't be read."""
        return self._load(step, {"record": None})["record"]

    def restore(self, step: int, like: Any) -> Any:
        """Return the state of a step. like: a pytree of arrays or ShapeDtypeStructs with the shapes, dtypes and shardings to give it.

        Raises CheckpointError when it can't be read or is the state of another model.
        """
        return self._load(step, {"state": jax.tree.map(_abstract, like)})["state"]

    def _load(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._checkpointer.load_checkpointables(step, wanted)
        except Exception as error:
            others = [checkpoint.step for checkpoint in self._checkpointer.checkpoints if checkpoint.step != step]
            other = f"go on from step {others[-1]}" if others else "start anew"
            raise CheckpointError(f"{self._directory}: step {step} can't be restored: {reason(error)}; move {self._directory / str(step)} away "
                                  f"to {other}") from error

    def close(self) -> None:
        """Wait until everything is on disk. Raises CheckpointError when the last save failed."""
        with self._failing():
            self._checkpointer.close()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Turn what Orbax raises, from this save or the one before in the background, into one line, and free what that took."""
        try:
            yield
        except Exception as error:
            complete = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
            self._remove_unfinished()
            kept = f"step {complete[-1]} is the newest complete one" if complete else "none is complete"
            raise CheckpointError(f"{self._directory}: a checkpoint can't be saved: {reason(error)}; {kept}") from error

    def _remove_unfinished(self) -> None:
        for unfinished in self._directory.glob(_UNFINISHED):
            shutil.rmtree(unfinished, ignore_errors=True)


def _abstract(value):
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=getattr(value, "sharding", None))
