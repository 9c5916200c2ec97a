"""The whole state of a training run, through Orbax: arrays, the input pipeline's position, what else a resumed run needs to know."""

from __future__ import annotations

import os
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from gptoss_jax.checkpoint.errors import CheckpointError


class StateStore:
    """Numbered checkpoints in a directory; each appears complete or not at all, and the oldest go beyond `keep`.

    Saving runs in the background (arrays are copied first); `close` waits for it.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 2):
        self._directory = os.path.abspath(directory)
        self._checkpointer = ocp.training.Checkpointer(
            self._directory, preservation_policy=ocp.training.preservation_policies.LatestN(keep))

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, None when there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Save a pytree of arrays and a JSON object; a step that is there already is left as it is."""
        if self.latest_step() != step:  # forced: otherwise a save that comes while another is being written is left out
            self._checkpointer.save_checkpointables_async(step, {"state": state, "record": record}, force=True)

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Return (state, record) of a step. like: a pytree of arrays or ShapeDtypeStructs with the shapes, dtypes and shardings to give it.

        Raises CheckpointError when it can't be read or is the state of another model.
        """
        try:
            loaded = self._checkpointer.load_checkpointables(step, {"state": jax.tree.map(_abstract, like), "record": None})
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{self._directory}: step {step} can't be restored: {reason}") from error
        return loaded["state"], loaded["record"]

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._checkpointer.close()


def _abstract(value):
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=getattr(value, "sharding", None))
