"""Text in, tokens out: tokenizers (`tokenizer`) and the harmony format (`harmony`). Imports nothing heavy."""

from gptoss_jax.text import harmony, tokenizer

__all__ = ["harmony", "tokenizer"]
