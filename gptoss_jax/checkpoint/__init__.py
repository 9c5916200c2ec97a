"""Checkpoints in and out: safetensors (Hugging Face's layout, OpenAI's `original/`) and Orbax.

    opening.py       which layout a directory holds; everything that can be wrong with it, found before anything is allocated
    safetensors.py   the file format: headers, the bytes of one shard, a streaming writer
    original.py      OpenAI's tensor names
    store.py         Orbax
    loading.py       load, load_weights, load_tokenizer
    huggingface.py   save_huggingface; a checkpoint with what was trained since
    peft.py          adapters alone
    conversion.py    any layout to Orbax
    destination.py   a directory that appears complete or not at all
    errors.py        CheckpointError and the list of what doesn't fit

Experts stay packed uint8 throughout, names are Hugging Face's throughout.
"""

from gptoss_jax.checkpoint.errors import CheckpointError
from gptoss_jax.checkpoint.loading import load, load_tokenizer, load_weights, resolve

__all__ = ["CheckpointError", "convert", "load", "load_tokenizer", "load_weights", "resolve", "save_huggingface"]


def __getattr__(name):  # what only writers need isn't imported to load
    if name == "convert":
        from gptoss_jax.checkpoint.conversion import convert
        return convert
    if name == "save_huggingface":
        from gptoss_jax.checkpoint.huggingface import save_huggingface
        return save_huggingface
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
