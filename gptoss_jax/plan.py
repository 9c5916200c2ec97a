"""Will it fit? Memory of a device, by compiling the real steps for it, without it:

    python -m gptoss_jax.plan gpt-oss-120b --device H100                          # the steps of inference
    python -m gptoss_jax.plan configs/sft_lora_120b.yaml --device H200            # a training step; --section.field overrides, as in finetune

Exit code 0 when it fits, 1 when it doesn't, 2 for an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Sequence

from gptoss_jax import command
from gptoss_jax.config import PRESETS, GptOssConfig

AXES = ("data", "fsdp", "expert", "tensor", "context")
_MOST_DEVICES = 65_536


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if "jax" not in sys.modules:  # nothing runs on an accelerator here, and without one JAX would look for it
        os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "localhost", "TF_CPP_MIN_LOG_LEVEL": "3"}
    parser = argparse.ArgumentParser(prog="python -m gptoss_jax.plan", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("model", metavar="MODEL|CONFIG.yaml",
                        help=f"{', '.join(PRESETS)}, tiny, or a checkpoint directory, of which only config.json is read; or what to train: "
                             "where its init.checkpoint isn't here, one that is called like a published model is taken for it")
    parser.add_argument("--device", default="H100", metavar="KIND", help="A100 (80 GB), H100, H200, B200, v5e, v5p, v6e, 7x or cpu (default: H100)")
    parser.add_argument("--mesh", metavar="AXIS=N,...",
                        help=f"several devices: {', '.join(AXES)}, for example expert=8; instead of the configuration's")
    parser.add_argument("--context", type=int, metavar="TOKENS",
                        help="max_context of an engine; generate has a power of two of prompt and answer (default: the model's maximum)")
    parser.add_argument("--batch", type=int, metavar="N", help="rows at once, a power of two (default: 1)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of computation (default: bfloat16)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="don't look for the longest context and the largest batch: a third of the time; "
                     "of a training step: compile 4 and 6 layers and extend in a straight line")
    how.add_argument("--arithmetic", action="store_true", help="without temporaries: nothing is compiled, no wheel needed")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    return command.run(run, parser, argv, overrides=True)


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    trains = args.model.endswith((".yaml", ".yml"))
    facts, plan = (_training if trains else _inference)(args)
    command.Status().clear()
    facts["seconds"] = round(time.perf_counter() - started, 1)
    if args.json:
        sizes = dict(plan.parts) | {name: getattr(plan, name) for name in ("memory", "padding", "needed", "left")}
        print(json.dumps(facts | {f"{name.replace(' ', '_')}_bytes": size for name, size in sizes.items()}
                         | {"temporaries_bytes": dict(plan.temporaries), "collectives": plan.collectives}))
    else:
        print("\n".join(_lines(facts, plan)))
    return 0 if plan.left >= 0 else 1


def _inference(args: argparse.Namespace):
    """Return (facts to print, plan) of the engine's steps."""
    if args.overrides:
        raise command.UsageError(f"{args.overrides[0]}: of a training configuration, found with model {args.model!r}")
    config, axes, dtype = config_named(args.model), mesh_axes(args.mesh or "", AXES[:-1]), args.dtype or "bfloat16"
    batch = 1 if args.batch is None else args.batch
    context = config.max_position_embeddings if args.context is None else args.context
    from gptoss_jax import devices
    from gptoss_jax.inference import memory_plan
    from gptoss_jax.model import cost

    memory_plan.check_request(config, batch, context)
    count = cost.abstract_mesh(**axes).size
    facts = {"model": args.model, "what": f"batch {batch:,}, context {context:,} tokens, {dtype}", "device": args.device, "devices": count,
             "mesh": axes, "batch": batch, "context": context, "dtype": dtype}
    if args.arithmetic:
        return facts, memory_plan.by_arithmetic(config, batch, context, dtype=dtype, mesh=cost.abstract_mesh(**axes),
                                                memory=devices.memory_of_each(args.device, count))
    _host_devices(args.device, count)
    planner = memory_plan.Planner(config, args.device, axes, dtype=dtype)
    command.Status()(f"compiling {args.model} for {args.device}")
    plan = planner.at(batch, context)
    facts["prefill_chunk"] = planner.chunk_tokens(batch, context)
    if not args.quick:
        command.Status()("looking for the longest context and the largest batch")
        facts["longest_context"] = planner.longest_context(batch, plan, context)
        facts["largest_batch"] = planner.largest_batch(context, plan, batch)
    return facts, plan


def _training(args: argparse.Namespace):
    """Return (facts to print, plan) of a training step."""
    for flag, field in (("context", "data.row_tokens"), ("batch", "data.batch_size"), ("dtype", "train.compute_dtype")):
        if (value := getattr(args, flag)) is not None:
            raise command.UsageError(f"--{flag} {value}: of inference, found with a training configuration, expected --{field} {value}")
    from gptoss_jax.training.config import MeshConfig, load_config

    config = load_config(args.model, args.overrides)
    if args.mesh is not None:
        config = dataclasses.replace(config, mesh=MeshConfig(**mesh_axes(args.mesh, AXES)))
    axes = dataclasses.asdict(config.mesh)
    _host_devices(args.device, math.prod(axes.values()))
    from gptoss_jax import devices
    from gptoss_jax.training import memory_plan
    from gptoss_jax.training.state import resolve

    path = pathlib.Path(config.init.checkpoint)
    stand_in = PRESETS.get(path.name) if config.init.checkpoint and not path.exists() else None
    config = resolve(config, stand_in)
    what = memory_plan.describe(config)
    facts = {"model": args.model, "what": f"{what}, {path.name}'s shapes" if stand_in else what, "device": args.device,
             "devices": math.prod(axes.values()), "mesh": axes, "overrides": args.overrides}
    if args.arithmetic:
        return facts, memory_plan.by_arithmetic(config, devices.memory_of_each(args.device, facts["devices"]))
    command.Status()(f"compiling {args.model} for {args.device}")
    facts["extended"] = args.quick and config.model.num_hidden_layers > memory_plan.DEPTHS[1]
    return facts, memory_plan.compiled(config, args.device, all_layers=not args.quick)


def config_named(name: str) -> GptOssConfig:
    """Return the configuration of a preset, of the embedded model or of a checkpoint directory. Raises UsageError or ConfigError."""
    if name in PRESETS:
        return PRESETS[name]
    from gptoss_jax import checkpoint

    path = checkpoint.resolve(name)
    folders = [folder for folder in (path, path / "original") if (folder / "config.json").exists()]
    if not folders:
        raise command.UsageError(f"model {name!r}: no such checkpoint directory or preset, expected one with a config.json, or "
                                 f"{', '.join(PRESETS)}, tiny")
    return GptOssConfig.from_file(folders[0] / "config.json")


def mesh_axes(text: str, known: Sequence[str]) -> dict[str, int]:
    """Read "expert=8,data=2". Raises UsageError."""
    axes: dict[str, int] = {}
    for part in text.split(",") if text else ():
        name, _, size = part.strip().partition("=")
        if name not in known or name in axes or not size.isdecimal() or int(size) < 1:
            raise command.UsageError(f"--mesh {text!r}: {part!r} found, expected each of {', '.join(known)} once at most, as in expert=8,data=2")
        axes[name] = int(size)
    if (count := math.prod(axes.values())) > _MOST_DEVICES:
        raise command.UsageError(f"--mesh {text!r}: {count:,} devices, expected at most {_MOST_DEVICES:,}")
    return axes


def _host_devices(kind: str, count: int) -> None:
    """Let the CPU of this host be as many devices as are asked for, unless JAX has looked at them already."""
    import jax

    if kind == "cpu" and count > max(jax.config.jax_num_cpu_devices, 1):
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:
            pass  # then there have to be enough


def _lines(facts: dict, plan) -> list[str]:
    from gptoss_jax.devices import amount
    from gptoss_jax.inference.memory_plan import CONTEXT_STEP, MOST_ROWS

    mesh = " x ".join(f"{axis} {size:,}" for axis, size in facts["mesh"].items() if size > 1)
    several = f"{facts['devices']:,} x {facts['device']}: {mesh}" if facts["devices"] > 1 else f"one {facts['device']}"
    lines = [f"{facts['model']} on {several}; {facts['what']}", "on each device:", *plan.table(),
             "it fits" if plan.left >= 0 else "it does not fit"]
    if not plan.temporaries and plan.left >= 0:
        lines[-1] = f"{' and '.join(plan.parts)} fit; whether temporaries do, too, is found by compiling"
    if "longest_context" in facts:
        longest, largest = facts["longest_context"], facts["largest_batch"]
        steps = f"steps of {CONTEXT_STEP:,}" if longest and longest >= CONTEXT_STEP else "powers of two"
        lines += [f"longest context at batch {facts['batch']:,}: " + (f"{longest:,} tokens, in {steps}" if longest else "none fits"),
                  f"largest batch at {facts['context']:,} tokens: "
                  + (f"{largest:,}{' or more' if largest >= MOST_ROWS else ''}" if largest else "none fits")]
    for step, kinds in plan.collectives.items():
        found = ", ".join(f"{count:,} {kind} {amount(size)}" for kind, (count, size) in kinds.items())
        if facts["devices"] > 1:
            chunk = f", a chunk of {facts['prefill_chunk']:,} tokens" if step == "prefill" else ""
            lines.append(f"collectives of {step}{chunk}, results on a device: {found or 'none'}")
    how = "computed" if not plan.temporaries else "extended from programs of 4 and 6 layers, compiled" if facts.get("extended") else "compiled"
    return [*lines, f"({how} in {facts['seconds']} s)"]


if __name__ == "__main__":
    sys.exit(main())
