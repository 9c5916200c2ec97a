"""The optimizer: AdamW behind gradient clipping, on a warmup-stable-decay schedule."""

from __future__ import annotations

import optax

from gptoss_jax.training.config import OptimizerConfig


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
    """Return clipping by global norm, then AdamW. Weight decay is for matrices only: not for biases, norms and sinks."""

    def decayed(weights):
        return {name: not name.endswith(("norm.weight", "bias", "sinks")) for name in weights}

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule(config, steps), b1=config.beta1, b2=config.beta2, eps=config.epsilon, weight_decay=config.weight_decay,
                    mask=decayed))
