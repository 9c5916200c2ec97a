"""The configuration of a training run: YAML, decoded strictly into frozen dataclasses.

A key that isn't known, a value of the wrong type or out of range is a TrainingConfigError: one line with the key, the value and what was
expected. Imports no JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.config import ConfigError, GptOssConfig


class TrainingConfigError(ValueError):
    """A training configuration that can't be used; names the key, the value and the expectation."""


CHANNELS = ("analysis", "commentary", "final")
LORA_TARGETS = ("attention", "experts", "router", "unembedding")


def _field(default: Any, *, low: float | None = None, high: float | None = None, choices: tuple = ()) -> Any:
    """A dataclass field with its range, ends included."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "choices": choices})


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Files of records. path: a file or a glob; weight: the source's share of the examples, where sources are mixed by weight."""

    path: str
    weight: float | None = _field(None, low=1e-6)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on: the records of `sources`, or synthetic conversations where none are named.

    Sources with weights are mixed endlessly; those without are one set, gone through `epochs` times or, where null, endlessly.
    Held aside for evaluation: the files of `eval_sources`, or `eval_fraction` of the records. The tokenizer is trained, with
    `vocab_size` of the model, where `tokenizer` names no file (tokenizer.json, .tiktoken or a SentencePiece .model).
    """

    tokenizer: str = ""
    seed: int = _field(0, low=0)
    row_tokens: int = _field(256, low=16)
    batch_size: int = _field(16, low=1)  # rows, of all processes together
    sources: tuple[SourceConfig, ...] = ()
    epochs: int | None = _field(None, low=1)
    shuffle: bool = True
    eval_sources: tuple[SourceConfig, ...] = ()
    eval_fraction: float = _field(0.0, low=0, high=0.5)
    reasoning_effort: str = _field("medium", choices=("low", "medium", "high"))  # of conversations that don't say
    learn_turns: str = _field("all", choices=("all", "last"))  # last: the past is rendered as in inference, without its analysis
    learn_channels: tuple[str, ...] = _field(CHANNELS, choices=CHANNELS)
    too_long: str = _field("drop", choices=("drop", "truncate"))  # examples of more than row_tokens
    on_bad_record: str = _field("stop", choices=("stop", "skip"))
    workers: int = _field(0, low=0)  # processes that read and encode; 0: threads of this one

    def __post_init__(self):
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise TrainingConfigError(f"data.sources[{weighted.index(False)}].weight: missing, expected one as other sources have")
        if any(weighted) and self.epochs is not None:
            raise TrainingConfigError(f"data.epochs: {self.epochs} found with weighted sources, expected null: their mixture has no end")
        if not self.sources and (self.epochs is not None or self.eval_sources or self.eval_fraction):
            raise TrainingConfigError("data.sources: none found, expected some with data.epochs, data.eval_sources or data.eval_fraction")
        if self.eval_sources and self.eval_fraction:
            raise TrainingConfigError(f"data.eval_fraction: {self.eval_fraction} found with data.eval_sources, expected one of them")
        if not self.learn_channels:
            raise TrainingConfigError(f"data.learn_channels: none found, expected some of {', '.join(CHANNELS)}")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where the weights come from: a checkpoint of any layout ("tiny" is the embedded one), or random where none is named."""

    checkpoint: str = ""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What is trained, and how a step is computed.

    mode: full trains every weight, float32 masters of what is computed in `compute_dtype`; qat does so on the grid that the export holds
    (experts MXFP4, all else bfloat16); lora trains low-rank adapters of `targets` above the frozen checkpoint, experts packed.
    The adapters' product counts alpha / rank times.
    """

    mode: str = _field("full", choices=("full", "qat", "lora"))
    rank: int = _field(8, low=1)
    alpha: float = _field(16.0, low=0)
    targets: tuple[str, ...] = _field(("attention", "experts"), choices=LORA_TARGETS)
    compute_dtype: str = _field("float32", choices=("float32", "bfloat16"))
    remat: str = _field("layer", choices=("none", "dots", "layer"))  # kept for the backward pass: all, matrix products, layers' inputs
    microbatches: int = _field(1, low=1)  # a batch is computed in so many parts, one after the other
    loss_chunk_tokens: int | None = _field(None, low=1)  # whose logits exist at a time; null: as many as take 256 MiB of a device
    balance_coefficient: float = _field(0.0, low=0)  # of the router's load-balancing loss
    z_coefficient: float = _field(0.0, low=0)  # of the router's z-loss
    expert_transport: str = _field("gather", choices=("gather", "all_to_all"))  # of tokens to experts on other devices


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices along each mesh axis; see `sharding`. All one: the first device."""

    data: int = _field(1, low=1)
    fsdp: int = _field(1, low=1)
    expert: int = _field(1, low=1)
    tensor: int = _field(1, low=1)
    context: int = _field(1, low=1)


@dataclasses.dataclass(frozen=True)
class RateConfig:
    """A learning rate of their own for some weights. weights: a pattern of names, `*` for anything; factor: of the common rate."""

    weights: str
    factor: float = _field(1.0, low=0)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule, and a learning rate that warms up, stays, and decays to `final_fraction` of it over the last `decay_fraction` of
    the steps. no_decay: patterns of the names of weights without weight decay; rates: the first that matches a name counts."""

    kind: str = _field("adamw", choices=("adamw", "muon", "adafactor"))  # muon: for the matrices of the layers, AdamW for all else
    learning_rate: float = _field(1e-3, low=0)
    rates: tuple[RateConfig, ...] = ()
    warmup_steps: int = _field(100, low=0)
    decay_fraction: float = _field(0.2, low=0, high=1)
    decay_shape: str = _field("linear", choices=("linear", "cosine"))
    final_fraction: float = _field(0.0, low=0, high=1)
    beta1: float = _field(0.9, low=0, high=0.999999)  # 1, or what float32 rounds to 1, would divide by 1 - beta = 0
    beta2: float = _field(0.95, low=0, high=0.999999)
    epsilon: float = _field(1e-8, low=1e-20)  # 0 would divide by the root of a square that float32 rounds to 0
    weight_decay: float = _field(0.1, low=0)
    no_decay: tuple[str, ...] = ("*norm.weight", "*bias", "*sinks")
    clip_norm: float | None = _field(1.0, low=1e-9)  # null: no clipping


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long, and what is written when. Steps count optimizer updates."""

    steps: int = _field(1000, low=1)
    seed: int = 0  # of the initial weights
    on_nonfinite: str = _field("stop", choices=("stop", "skip"))  # a step whose loss or gradients aren't finite numbers
    log_every_steps: int = _field(20, low=1)
    eval_every_steps: int = _field(200, low=1)
    eval_batches: int = _field(4, low=1)
    answer_every_steps: int | None = _field(None, low=1)  # held-out questions are answered, before the first step and after the last too
    answers: int = _field(16, low=1)
    answer_tokens: int = _field(256, low=1)
    save_every_steps: int = _field(200, low=1)
    keep_checkpoints: int = _field(2, low=1)  # the newest ones
    keep_best: int = _field(0, low=0)  # and those with the lowest evaluation loss


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """directory: of checkpoints, metrics and, at the end, the Hugging Face directory `export` of the last or the best checkpoint."""

    directory: str = "runs/pretrain"
    export: str = _field("last", choices=("last", "best"))
    adapters: bool = False  # with train.mode lora: export them in PEFT's format instead of merged into the checkpoint
    tensorboard: bool = True  # where tensorboardX is installed
    wandb_project: str = ""  # empty: nothing is sent


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """One training run. model: only without `init.checkpoint`, which has its own; `state.resolve` fills it in."""

    model: GptOssConfig | None = None
    init: InitConfig = InitConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig = RunConfig()
    output: OutputConfig = OutputConfig()

    def __post_init__(self):
        if self.output.export == "best" and not self.run.keep_best:
            raise TrainingConfigError("run.keep_best: 0 found with output.export best, expected at least 1")
        held_aside = not self.data.sources or self.data.eval_sources or self.data.eval_fraction
        for name in ("keep_best", "answer_every_steps"):
            if getattr(self.run, name) and not held_aside:
                raise TrainingConfigError(f"run.{name}: {getattr(self.run, name)} found without data.eval_fraction or data.eval_sources, "
                                          "expected one of them")
        if self.output.adapters and self.train.mode != "lora":
            raise TrainingConfigError(f"output.adapters: true found with train.mode {self.train.mode}, expected lora")

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved configuration, as it is saved with every checkpoint."""
        return dataclasses.asdict(self)


def load_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a YAML file; overrides are command line words: `--section.field value` or `--section.field=value`.

    Raises TrainingConfigError naming the file and what is wrong.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is there twice, of which YAML's own takes the last."""

        def construct_mapping(self, node, deep=False):
            keys = [key.value for key, _ in node.value]
            for index, (key, _) in enumerate(node.value):
                if key.value in keys[:index]:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} found a second time", key.start_mark)
            return super().construct_mapping(node, deep)

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, Loader)
    except OSError as error:
        raise TrainingConfigError(f"{os.fspath(path)}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TrainingConfigError(f"{os.fspath(path)}: not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        raise TrainingConfigError(f"{os.fspath(path)}: {type(content).__name__} found, expected sections with fields")
    try:
        return _decode(TrainingConfig, _overridden(content, overrides), "")
    except ConfigError as error:
        raise TrainingConfigError(f"{os.fspath(path)}: model: {error}") from None
    except TrainingConfigError as error:
        raise TrainingConfigError(f"{os.fspath(path)}: {error}") from None


def _overridden(content: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    import yaml

    merged = {name: dict(section) if isinstance(section, Mapping) else section for name, section in content.items()}
    words = list(words)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in key:
            raise TrainingConfigError(f"{word!r} found, expected --section.field value")
        if not equals:
            if not words or words[0].startswith("--"):
                raise TrainingConfigError(f"{word} without a value, expected --{key} value")
            value = words.pop(0)
        *sections, field = key.split(".")
        target = merged
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise TrainingConfigError(f"--{key}: {section} is {target!r}, expected a section")
        try:
            target[field] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise TrainingConfigError(f"--{key} {value}: not readable YAML: {getattr(error, 'problem', error)}") from None
    return merged


def _decode(cls: type, content: Any, where: str) -> Any:
    """Build a dataclass from a mapping, checking every key, type and range."""
    if not isinstance(content, Mapping):
        raise TrainingConfigError(f"{where or 'config'}: {content!r} found, expected a section with fields")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for key, value in content.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in fields:
            near = difflib.get_close_matches(str(key), list(fields), 1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(fields)}"
            raise TrainingConfigError(f"{name}: no such key; {hint}")
        values[key] = _convert(hints[key], value, name)
        _check_range(fields[key].metadata, values[key], name)
    for field in fields.values():
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise TrainingConfigError(f"{where + '.' if where else ''}{field.name}: missing")
    return cls(**values)


def _convert(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _decode(hint, value, name)
    if isinstance(hint, types.UnionType):
        options = typing.get_args(hint)
        section = next(filter(dataclasses.is_dataclass, options), None)
        if section is not None and value is not None:
            return _decode(section, value, name)
        for option in options:
            with contextlib.suppress(TrainingConfigError):
                return _convert(option, value, name)
        raise TrainingConfigError(f"{name}: {value!r} found, expected {' or '.join(map(_expected, options))}")
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise TrainingConfigError(f"{name}: {value!r} found, expected {_expected(hint)}")
        return tuple(_convert(typing.get_args(hint)[0], item, f"{name}[{index}]") for index, item in enumerate(value))
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise TrainingConfigError(f"{name}: {value!r} found, expected {_expected(hint)}")
    return value


def _expected(hint: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", types.NoneType: "null"}
    return "a list" if typing.get_origin(hint) is tuple else names[hint]


def _check_range(metadata: Mapping[str, Any], value: Any, name: str) -> None:
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            _check_range(metadata, item, f"{name}[{index}]")
        return
    if value is None:
        return
    if metadata.get("choices") and value not in metadata["choices"]:
        near = difflib.get_close_matches(str(value), metadata["choices"], 1)
        raise TrainingConfigError(f"{name}: {value!r} found, expected one of {', '.join(metadata['choices'])}"
                                  + (f"; did you mean {near[0]}?" if near else ""))
    if isinstance(value, float) and not math.isfinite(value):
        raise TrainingConfigError(f"{name}: {value!r} found, expected a finite number")
    low, high = metadata.get("low"), metadata.get("high")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        span = f"at least {low}" if high is None else f"{low} to {high}"
        raise TrainingConfigError(f"{name}: {value!r} found, expected {span}")
