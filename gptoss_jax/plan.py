"""Will it fit? `python -m gptoss_jax.plan gpt-oss-120b --device H100`: memory of a device, by compiling the real steps for it, without it.

Exit code 0 when it fits, 1 when it doesn't, 2 for an error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence

from gptoss_jax import command
from gptoss_jax.config import PRESETS, GptOssConfig

AXES = ("data", "fsdp", "expert", "tensor")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if "jax" not in sys.modules:  # nothing runs on an accelerator here, and without one JAX would look for it
        os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "localhost", "TF_CPP_MIN_LOG_LEVEL": "3"}
    parser = argparse.ArgumentParser(prog="python -m gptoss_jax.plan", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("model", metavar="MODEL", help=f"{', '.join(PRESETS)}, tiny, or a checkpoint directory, of which only config.json is read")
    parser.add_argument("--device", default="H100", metavar="KIND", help="A100 (80 GB), H100, H200, B200, v5e, v5p, v6e, 7x or cpu (default: H100)")
    parser.add_argument("--mesh", default="", metavar="AXIS=N,...", help="several devices: data, fsdp, expert, tensor, for example expert=8")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="of prompt and answer (default: the model's maximum)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows at once, a power of two (default: 1)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of computation (default: bfloat16)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="don't look for the longest context and the largest batch: a third of the time")
    how.add_argument("--arithmetic", action="store_true", help="weights and cache only: nothing is compiled, no wheel needed")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    return command.run(run, parser, argv)


def run(args: argparse.Namespace) -> int:
    config, axes = config_named(args.model), mesh_axes(args.mesh)
    context = config.max_position_embeddings if args.context is None else args.context
    from gptoss_jax import devices
    from gptoss_jax.inference import memory_plan
    from gptoss_jax.model import cost

    memory_plan.check_request(config, args.batch, context)
    count = cost.abstract_mesh(**axes).size
    started = time.perf_counter()
    facts = {"model": args.model, "device": args.device, "devices": count, "mesh": axes, "batch": args.batch, "context": context,
             "dtype": args.dtype}
    if args.arithmetic:
        plan = memory_plan.by_arithmetic(config, args.batch, context, dtype=args.dtype, mesh=cost.abstract_mesh(**axes),
                                         memory=devices.kind_named(args.device).memory_bytes)
    else:
        _host_devices(args.device, count)
        planner = memory_plan.Planner(config, args.device, axes, dtype=args.dtype)
        command.Status()(f"compiling {args.model} for {args.device}")
        plan = planner.at(args.batch, context)
        if not args.quick:
            command.Status()("looking for the longest context and the largest batch")
            facts["longest_context"] = planner.longest_context(args.batch, plan, context)
            facts["largest_batch"] = planner.largest_batch(context, plan, args.batch)
        command.Status().clear()
    facts["seconds"] = round(time.perf_counter() - started, 1)
    if args.json:
        sizes = {name: getattr(plan, name) for name in ("memory", "weights", "cache", "padding", "needed", "left")}
        print(json.dumps(facts | {f"{name}_bytes": size for name, size in sizes.items()}
                         | {"temporaries_bytes": dict(plan.temporaries), "collectives": plan.collectives}))
    else:
        print("\n".join(_lines(facts, plan)))
    return 0 if plan.left >= 0 else 1


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


def mesh_axes(text: str) -> dict[str, int]:
    """Read "expert=8,data=2". Raises UsageError."""
    axes: dict[str, int] = {}
    for part in text.split(",") if text else ():
        name, _, size = part.strip().partition("=")
        if name not in AXES or name in axes or not size.isdigit() or int(size) < 1:
            raise command.UsageError(f"--mesh {text!r}: {part!r} found, expected each of {', '.join(AXES)} once at most, as in expert=8,data=2")
        axes[name] = int(size)
    return axes


def _host_devices(kind: str, count: int) -> None:
    """Let the CPU of this host be as many devices as are asked for, unless JAX has looked at them already."""
    import jax

    if kind == "cpu" and count > 1:
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:
            pass  # then there have to be enough


def _lines(facts: dict, plan) -> list[str]:
    from gptoss_jax.inference.memory_plan import amount

    mesh = " x ".join(f"{axis} {size}" for axis, size in facts["mesh"].items() if size > 1)
    several = f"{facts['devices']} x {facts['device']}: {mesh}" if facts["devices"] > 1 else f"one {facts['device']}"
    lines = [f"{facts['model']} on {several}; batch {facts['batch']}, context {facts['context']:,} tokens, {facts['dtype']}", "on each device:",
             *plan.table(), "it fits" if plan.left >= 0 else "it does not fit"]
    if not plan.temporaries:
        lines[-1] = "it does not fit" if plan.left < 0 else "weights and cache fit; whether temporaries do, too, is found by compiling"
    if "longest_context" in facts:
        longest, largest = facts["longest_context"], facts["largest_batch"]
        lines += [f"longest context at batch {facts['batch']}: " + (f"{longest:,} tokens" if longest else "none fits"),
                  f"largest batch at {facts['context']:,} tokens: {largest or 'none fits'}"]
    for step, kinds in plan.collectives.items():
        found = ", ".join(f"{count} {kind} {amount(size)}" for kind, (count, size) in kinds.items())
        if facts["devices"] > 1:
            lines.append(f"collectives of {step}, results on a device: {found or 'none'}")
    return [*lines, f"({'computed' if not plan.temporaries else 'compiled'} in {facts['seconds']} s)"]


if __name__ == "__main__":
    sys.exit(main())
