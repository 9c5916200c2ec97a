"""What a training run leaves behind: a Hugging Face directory with MXFP4 experts, or the adapters alone."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptoss_jax.checkpoint import save_huggingface
from gptoss_jax.checkpoint.huggingface import save_retrained
from gptoss_jax.checkpoint.loading import resolve as resolve_path
from gptoss_jax.checkpoint.peft import save_peft
from gptoss_jax.model import lora
from gptoss_jax.model.weights import declare
from gptoss_jax.training.config import TrainingConfig


def export(config: TrainingConfig, trained: Mapping[str, jax.Array], path: str | os.PathLike, *, adapters: bool = False,
           overwrite: bool = True) -> None:
    """Write what was trained as a Hugging Face directory that generate, transformers and other engines load.

    Adapters are added to the weights of `init.checkpoint`, whose other files (tokenizer, ...) are copied; experts are encoded as MXFP4
    where they were trained, and keep their bytes where they weren't. adapters: write a PEFT adapter directory instead.
    Every process has to call it, the first one writes. Raises CheckpointError, or Mxfp4Error for numbers MXFP4 can't hold.
    """
    trained = {name: _whole(value) for name, value in trained.items()}
    if jax.process_index() > 0:
        return
    source = config.init.checkpoint and resolve_path(config.init.checkpoint)
    if adapters:
        save_peft(path, trained, rank=config.train.rank, alpha=config.train.alpha, base_model=os.fspath(source), overwrite=overwrite)
    elif config.train.mode == "lora":
        changes = {name: _added(name, trained, config.train.alpha / config.train.rank)
                   for name in declare(config.model, packed=False) if lora.names_of(name)[0] in trained}
        save_retrained(path, source, changes, overwrite=overwrite)
    elif source and config.model.quantized:
        save_retrained(path, source, {name: functools.partial(_replaced, value) for name, value in trained.items()}, overwrite=overwrite)
    else:
        save_huggingface(path, config.model, trained, sidecars_from=source or None, format="mxfp4", overwrite=overwrite)


def _whole(value: jax.Array) -> jax.Array | np.ndarray | None:
    if value.is_fully_addressable:
        return value
    whole = multihost_utils.process_allgather(value, tiled=True)
    return whole if jax.process_index() == 0 else None


def _added(name: str, trained: Mapping[str, np.ndarray], scale: float) -> Callable:
    def add(base: np.ndarray, expert: int | None = None) -> np.ndarray:
        return base + np.asarray(lora.delta(name, trained, scale, expert))

    return add


def _replaced(value: jax.Array, base: np.ndarray, expert: int | None = None) -> np.ndarray:
    return np.asarray(value if expert is None else value[expert])
