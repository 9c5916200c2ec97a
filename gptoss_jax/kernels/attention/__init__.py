"""Grouped-query attention with sinks over keys tagged by position: one signature for training, prefill and decode."""

from gptoss_jax.kernels.attention.xla import attention

__all__ = ["attention"]
