"""gpt-oss-120b and gpt-oss-20b in JAX. Names load when first used, so that importing the package costs nothing."""

from __future__ import annotations

import importlib
import typing

__version__ = "0.1.0"

_HOMES = {
    "GptOss": "gptoss_jax.model",
    "make_cache": "gptoss_jax.model",
    "GptOssConfig": "gptoss_jax.config",
    "PRESETS": "gptoss_jax.config",
    "Engine": "gptoss_jax.inference.engine",
    "Sampling": "gptoss_jax.inference.sampling",
    "make_mesh": "gptoss_jax.sharding",
    "load": "gptoss_jax.checkpoint",
    "load_tokenizer": "gptoss_jax.checkpoint",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> typing.Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    try:
        return importlib.import_module(f"gptoss_jax.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"gptoss_jax.{name}":
            raise
        raise AttributeError(f"module 'gptoss_jax' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted(__all__)
