"""The optimizer: AdamW, Muon or Adafactor behind gradient clipping, on a warmup-stable-decay schedule; rates and decay by weight name."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from gptoss_jax.training.config import OptimizerConfig, TrainingConfigError

_MUON_RMS = 0.2  # makes Muon's updates as large as AdamW's, so that they share rate and decay (Liu et al. 2025, "Muon is scalable", 2.2)


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the rate by step: linear warmup, constant, then decay to `final_fraction` of it over the last `decay_fraction` of `steps`.

    Source: Hu et al. 2024, "MiniCPM", section 4. Runs of different lengths are equal up to where the shorter one decays; a
    `decay_fraction` of 1 decays from the start, right after the warmup.
    """
    decay_start = max(steps - max(round(steps * config.decay_fraction), 1), config.warmup_steps)
    decay_steps = max(steps - decay_start, 1)
    if config.decay_shape == "cosine":
        decay = optax.cosine_decay_schedule(config.learning_rate, decay_steps, config.final_fraction)
    else:
        decay = optax.linear_schedule(config.learning_rate, config.learning_rate * config.final_fraction, decay_steps)
    return optax.join_schedules(
        [optax.linear_schedule(0.0, config.learning_rate, max(config.warmup_steps, 1)), optax.constant_schedule(config.learning_rate), decay],
        [config.warmup_steps, decay_start])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return clipping by global norm, then the update rule of `config.kind`, then the factors of `config.rates`, over weights by name.

    Muon (Jordan et al. 2024) orthogonalises the momentum of the layers' matrices, each expert's by itself; embedding, unembedding,
    router and vectors have AdamW at the same rate, with Nesterov momentum as Muon, without decay. Adafactor (Shazeer and Stern 2018) keeps, of
    matrices, means of squares by row and by column only, and no momentum; its updates are as large as AdamW's, so that they share rate and decay. A step
    whose gradients aren't finite changes nothing.
    """
    rate, decays = schedule(config, steps), _by_name(lambda name: not _matches(name, config.no_decay))
    if config.kind == "muon":
        rule = optax.contrib.muon(
            rate, weight_decay=config.weight_decay, adam_b1=config.beta1, adam_b2=config.beta2, eps=config.epsilon,
            weight_decay_mask=decays, muon_weight_dimension_numbers=_muon_dims, consistent_rms=_MUON_RMS)
    elif config.kind == "adafactor":
        rule = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.add_decayed_weights(config.weight_decay, decays),
                           optax.scale_by_learning_rate(rate))
    else:
        rule = optax.adamw(rate, b1=config.beta1, b2=config.beta2, eps=config.epsilon, weight_decay=config.weight_decay, mask=decays)
    parts = [rule] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm), rule]
    if config.rates:
        factors = _by_name(lambda name: next((group.factor for group in config.rates if _matches(name, [group.weights])), 1.0))
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors(updates))))
    return _finite_only(optax.chain(*parts))


def check_rates(config: OptimizerConfig, names: Iterable[str]) -> None:
    """Raise TrainingConfigError when the weights of a rate are none of those that are trained."""
    names = list(names)
    for number, group in enumerate(config.rates):
        if not any(_matches(name, [group.weights]) for name in names):
            raise TrainingConfigError(f"optimizer.rates[{number}].weights: {group.weights!r} found, expected a pattern of trained weights, "
                                      f"such as {names[0]}")


def _finite_only(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Update nothing, moments and counts included, where a gradient isn't finite. Selects, where optax.apply_if_finite branches: a
    branch would hold the state twice."""

    def update(gradients, state, weights=None):
        updates, new_state = inner.update(gradients, state, weights)
        finite = jnp.isfinite(optax.tree.norm(gradients))
        return (jax.tree.map(lambda value: jnp.where(finite, value, jnp.zeros_like(value)), updates),
                jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, state))

    return optax.GradientTransformation(inner.init, update)


def _by_name(value: Callable[[str], Any]) -> Callable[[Any], Any]:
    """Return a function from a tree of weights by name, in which optax may have masked some, to the tree of their values."""
    return lambda weights: jax.tree.map_with_path(lambda path, _: value(path[-1].key), weights)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _muon_dims(weights: Any) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
    """Return which dims are input and output of each matrix that Muon updates, None for what AdamW does."""

    def dims(name: str):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return optax.contrib.MuonDimensionNumbers((1,), (2,))
        return optax.contrib.MuonDimensionNumbers((1,), (0,)) if name.endswith("_proj.weight") else None

    return {name: dims(name) for name in weights}
