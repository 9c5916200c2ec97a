"""The optimizer: AdamW or Muon behind gradient clipping, on a warmup-stable-decay schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax
import optax.contrib

from gptoss_jax.training.config import OptimizerConfig

_MUON_RMS = 0.2  # makes Muon's updates as large as AdamW's, so that they share rate and decay (Liu et al. 2025, "Muon is scalable", 2.2)


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate by step: linear warmup, constant, then linear decay to zero over the last `decay_fraction` of `steps`.

    Source: Hu et al. 2024, "MiniCPM", section 4. Runs of different lengths are equal up to where the shorter one decays.
    """
    decay_steps = max(round(steps * config.decay_fraction), 1)
    return optax.join_schedules(
        [optax.linear_schedule(0.0, config.learning_rate, max(config.warmup_steps, 1)), optax.constant_schedule(config.learning_rate),
         optax.linear_schedule(config.learning_rate, 0.0, decay_steps)],
        [config.warmup_steps, steps - decay_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return clipping by global norm, then the update rule of `config.kind`.

    Weight decay is for matrices only: not for biases, norms and sinks. Muon (Jordan et al. 2024) orthogonalises the momentum of the
    layers' matrices, each expert's by itself; embedding, unembedding, router and vectors have AdamW at the same rate.
    """
    rate = schedule(config, steps)
    if config.kind == "muon":
        rule = optax.contrib.muon(
            rate, weight_decay=config.weight_decay, adam_b1=config.beta1, adam_b2=config.beta2, eps=config.epsilon,
            muon_weight_dimension_numbers=_muon_dims, consistent_rms=_MUON_RMS)
    else:
        rule = optax.adamw(rate, b1=config.beta1, b2=config.beta2, eps=config.epsilon, weight_decay=config.weight_decay, mask=_decayed)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def _decayed(weights: Mapping[str, Any]) -> dict[str, bool]:
    return {name: not name.endswith(("norm.weight", "bias", "sinks")) for name in weights}


def _muon_dims(weights: Mapping[str, Any]) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
    """Return which dims are input and output of each matrix that Muon updates, None for what AdamW does."""

    def dims(name: str):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return optax.contrib.MuonDimensionNumbers((1,), (2,))
        return optax.contrib.MuonDimensionNumbers((1,), (0,)) if name.endswith("_proj.weight") else None

    return {name: dims(name) for name in weights}
