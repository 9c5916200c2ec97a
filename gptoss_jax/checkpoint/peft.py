"""Adapters as a directory that PEFT loads above the model they were trained on, in its own names and shapes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptoss_jax.checkpoint import safetensors
from gptoss_jax.checkpoint.conversion import write_json
from gptoss_jax.checkpoint.destination import appearing, check_destination
from gptoss_jax.model.weights import Weight

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# PEFT wraps the second parameter of a module around the first; the first is then its "base layer".
_EXPERTS = {"gate_up_proj": "base_layer.", "down_proj": ""}


def save_peft(path: str | os.PathLike, adapters: Mapping[str, jax.Array | np.ndarray], *, rank: int, alpha: float, base_model: str,
              overwrite: bool = False) -> None:
    """Write adapters, named and shaped as in `model.lora`, as a PEFT adapter directory; it appears when it is complete.

    base_model: name or path of the model they belong to, for PEFT to write down. Those of experts and router belong to bare parameters,
    `target_parameters` in PEFT 0.17 and newer. Raises CheckpointError.
    """
    tensors = dict(sorted(_as_peft(name, np.asarray(value, np.float32)) for name, value in adapters.items()))
    declared = {name: Weight(value.shape, "float32", ()) for name, value in tensors.items()}
    path = Path(path)
    check_destination(path, overwrite=overwrite, num_bytes=sum(map(safetensors.num_bytes, declared.values())))
    with appearing(path, overwrite=overwrite) as folder:
        folder.mkdir()
        safetensors.write_file(folder / WEIGHTS, declared, ((name, [value]) for name, value in tensors.items()))
        write_json(folder / CONFIG, _config(adapters, rank, alpha, base_model))


def _as_peft(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """Return PEFT's name and array: of experts lora_A [E * r, in] and lora_B [out, r * E], in which the expert varies fastest."""
    stem, part = name[: -len("_lora_A")], name[-len("lora_A") :]
    if value.ndim == 3:
        module, matrix = stem.rsplit(".", 1)
        stem = f"{module}.{_EXPERTS[matrix]}".removesuffix(".")
        value = value.transpose(0, 2, 1).reshape(-1, value.shape[1]) if part == "lora_A" else value.transpose(2, 1, 0).reshape(value.shape[2], -1)
    return f"base_model.model.{stem}.{part}.weight", np.ascontiguousarray(value)


def _config(adapters: Mapping[str, Any], rank: int, alpha: float, base_model: str) -> dict[str, Any]:
    stems = [name[: -len("_lora_A")] for name in adapters]
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if any("experts" in stem for stem in stems) else []
    if any(stem.endswith("router") for stem in stems):
        parameters.append("mlp.router.weight")
    modules = sorted({stem.rsplit(".", 1)[-1] for stem in stems if "mlp" not in stem})
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "r": rank, "lora_alpha": alpha,
            "lora_dropout": 0.0, "bias": "none", "target_modules": modules, "target_parameters": parameters, "inference_mode": True}
