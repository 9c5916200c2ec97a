"""Measure on this machine: `python -m gptoss_jax.bench decode --random-weights gpt-oss-20b --batch 1 16 --context 128 8192`."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence

from gptoss_jax import command
from gptoss_jax.config import PRESETS, GptOssConfig
from gptoss_jax.plan import config_named

RANDOM = PRESETS | {"four-layer-20b": PRESETS["gpt-oss-20b"].replace(num_hidden_layers=4)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command.run(_run, parser(), argv, overrides=True)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m gptoss_jax.bench", description=__doc__)
    modes = options.add_subparsers(required=True, metavar="decode|prefill|load|kernels|train")
    for name, body, about in (("decode", _steps, "decode steps as the engine runs them, contexts filled with random keys and values"),
                              ("prefill", _steps, "prompts, from the call to the first token"), ("load", _load, "loading a checkpoint"),
                              ("kernels", _kernels, "the ops of a decode step by each implementation that runs here, checked first"),
                              ("train", _train, "training steps of a configuration, on random tokens; --section.field overrides, as in finetune")):
        mode = modes.add_parser(name, help=about, description=about)
        mode.error = lambda message: options.error(message)  # as `command.run` shows it
        mode.set_defaults(body=body, mode=name)
        if name == "train":
            mode.add_argument("config", metavar="CONFIG.yaml")
            mode.add_argument("--random-weights", metavar="NAME", help=f"in place of init.checkpoint: {', '.join(RANDOM)} or tiny")
        else:
            source = mode.add_mutually_exclusive_group(required=True)
            source.add_argument("--checkpoint", metavar="DIR", help="a checkpoint directory, or tiny")
            if name != "load":
                source.add_argument("--random-weights", metavar="NAME", help=f"made on the device: {', '.join(RANDOM)} or tiny")
            mode.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
        if name in ("decode", "prefill", "kernels"):
            mode.add_argument("--batch", type=int, nargs="+", default=[1], metavar="N")
            mode.add_argument("--context", type=int, nargs="+", default=[512 if name == "prefill" else 128], metavar="TOKENS",
                              help={"prefill": "of each prompt", "decode": "where the measured steps end", "kernels": "that a step attends to"}[name])
        if name in ("decode", "train"):
            mode.add_argument("--steps", type=int, default=32 if name == "decode" else 5, metavar="N", help="in a repetition")
        mode.add_argument("--repetitions", type=int, default=5, metavar="N")
        mode.add_argument("--json", metavar="FILE", help="append a line for each measurement")
        mode.add_argument("--profile", metavar="DIR", help="write a trace of the timed repetitions, for TensorBoard or Perfetto")
    return options


def _run(args: argparse.Namespace) -> None:
    for flag in ("repetitions", "steps"):
        if getattr(args, flag, 1) < 1:
            raise command.UsageError(f"--{flag} is {getattr(args, flag)}, expected at least 1")
    if args.json is not None and not _writable(args.json):  # told before anything is measured
        raise command.UsageError(f"--json {args.json}: can't be written, expected a file in a directory that is there")
    if args.overrides and args.mode != "train":
        raise command.UsageError(f"{args.overrides[0]}: of a training configuration, found with {args.mode}")
    if args.profile is not None:
        if not args.profile or os.path.exists(args.profile) and not os.path.isdir(args.profile):
            found = "a file" if args.profile else "no name"
            raise command.UsageError(f"--profile {args.profile}: {found}, expected a directory or the name of a new one")
        os.makedirs(args.profile, exist_ok=True)  # JAX does so when all has run
    args.body(args)


def _writable(file: str) -> bool:
    """Return whether lines can be appended to a file, or a new one be made."""
    folder = os.path.dirname(file) or "."
    return os.access(file, os.W_OK) and not os.path.isdir(file) if os.path.exists(file) else bool(file) and os.access(folder, os.W_OK | os.X_OK)


def _steps(args: argparse.Namespace) -> None:
    """Measure decode or prefill for each batch and context, the largest of which has to fit."""
    config, out = _opened(args)
    import jax

    from gptoss_jax.inference import measure, measure_ops, memory_plan

    if args.mode == "decode" and min(args.context) <= (before := measure.decoded_tokens(args.steps)):
        raise command.UsageError(f"--context is {min(args.context)}, expected more than the {before} tokens that --steps {args.steps} decodes until then")
    memory_plan.announce(config, max(args.batch), min(max(args.context) + 1, config.max_position_embeddings), dtype=args.dtype, write=command.tell)
    limits = _limits(out, args.dtype)
    prompts = args.mode == "prefill"
    # No op of a decode step is chosen by the context, nor of a prompt by more tokens than these.
    looked_at = {context: min(context, measure_ops.MOST_PREFILLED) if prompts else min(args.context) for context in args.context}
    ran_at = {(batch, context): measure_ops.what_runs(config, batch, context, args.dtype, prompts=prompts)
              for batch in args.batch for context in dict.fromkeys(looked_at.values())}  # before there is a model in memory
    model = _model(args, config)
    try:
        for batch in args.batch:
            said = None
            for context in args.context:
                ran = ran_at[batch, looked_at[context]]
                if ran != said:
                    out.note_ran(ran, f" at batch {batch}" * (len(args.batch) > 1) + f", {context:,} tokens" * (said is not None))
                said = ran
                options = {"repetitions": args.repetitions, "trace": _trace(args, batch, context)}
                if args.mode == "decode":
                    (run,) = measure.decode(model, batch, [context], limits, steps=args.steps, **options)
                else:
                    run = measure.prefill(model, batch, context, limits, **options)
                out.add(run() | {"implementations": ran} | _peak(jax))
    finally:  # what there is after an interrupt, too
        out.show(("batch", "batch", str), ("context", "context", "{:,}".format), *_TIMES, ("tokens/s", "tokens_per_second", "{:,.1f}".format),
                 ("GB read", "read_bytes", lambda size: f"{size / 1e9:.3f}"), ("GB/s", "gb_per_second", "{:,.1f}".format), _FLOOR,
                 ("compile s", "compile_seconds", "{:.1f}".format))


def _load(args: argparse.Namespace) -> None:
    import jax

    from gptoss_jax import checkpoint
    from gptoss_jax.checkpoint.opening import open_checkpoint
    from gptoss_jax.inference import measure, memory_plan
    from gptoss_jax.model import cost

    out = _Output(args)
    seconds, facts = [], {}
    try:
        for repetition in range(args.repetitions):
            with _trace(args, repetition)() if args.profile else contextlib.nullcontext():
                start = time.perf_counter()
                model = checkpoint.load(args.checkpoint, dtype=args.dtype, admit=None if repetition else lambda config: memory_plan.announce(
                    config, 1, 256, dtype=args.dtype, write=command.tell))
                jax.block_until_ready(model.weights())
                took = time.perf_counter() - start
            size = cost.weight_bytes(model.config, args.dtype)
            seconds.append(took)
            del model
        floor = measure.read_seconds(open_checkpoint(checkpoint.resolve(args.checkpoint)).files)
        out.note(f"floor: {_milli(floor)} ms, a plain read of the same files, from the page cache where they fit, into memory used again")
        facts = {"floor_seconds": floor, "floor_fraction": floor / statistics.median(seconds[1:] or seconds)}
    finally:  # what there is after an interrupt, too
        if seconds:
            later = seconds[1:] or seconds  # the first, which may have read the disk, apart
            median = statistics.median(later)
            row = {"what": "load", "seconds": median, "lowest": min(later), "highest": max(later), "first_run_seconds": seconds[0], "weights_bytes": size,
                   "gb_per_second": size / median / 1e9}
            try:
                out.add(row | facts | _peak(jax))
            finally:  # a full disk
                out.show(*_TIMES, ("first s", "first_run_seconds", "{:.2f}".format), ("GB/s", "gb_per_second", "{:.2f}".format), _FLOOR,
                         ("host peak MB", "host_peak_bytes", lambda size: f"{size / 1e6:,.0f}"))


def _kernels(args: argparse.Namespace) -> None:
    """Check and time the ops for each batch and context, the largest of which have to fit."""
    config, out = _opened(args)
    from gptoss_jax import devices
    from gptoss_jax.inference import measure_ops

    few = min(max(8, config.num_experts_per_tok), config.num_local_experts)  # of what is compared: the reference decodes all
    batch, context = max(args.batch), max(args.context)
    memory, where = devices.free_here()
    whole, small = (measure_ops.case_bytes(config, *size) for size in ((batch, context, args.dtype), (min(batch, 4), context, args.dtype, few)))
    devices.Plan(memory, {f"arrays of {batch} x {context:,} tokens": whole, "small ones to compare": small}).announce(where, command.tell)
    limits = _limits(out, args.dtype)

    def rows(batch: int, context: int):  # whose arrays are gone when it ends
        compared = measure_ops.cases(config, min(batch, 4), context, args.dtype, experts=few)
        for case, small in zip(measure_ops.cases(config, batch, context, args.dtype), compared):
            auto = measure_ops.chosen_implementation(case)
            for implementation in case.implementations:
                facts = {"what": "kernel", "op": case.op, "size": case.size, "implementation": implementation, "auto": auto == implementation}
                if reason := measure_ops.unmet(small, implementation):
                    yield facts | {"not_here": reason}
                    continue
                facts["error"] = measure_ops.compare(small, implementation)
                if implementation != "reference":
                    trace = _trace(args, batch, context, case.op, case.size, implementation)
                    facts |= measure_ops.kernel(case, implementation, limits, repetitions=args.repetitions, trace=trace)()
                yield facts

    try:
        for batch in args.batch:
            for context in args.context:
                for row in rows(batch, context):
                    out.add(row)
    finally:
        reasons = list(dict.fromkeys(row["not_here"] for row in out.rows if "not_here" in row))
        out.show(("op", "op", str), ("size", "size", str), ("by", "implementation", str), ("auto", "auto", lambda is_auto: "*" if is_auto else ""),
                 ("error", "error", "{:.1e}".format), ("us", "seconds", _micro), ("lowest", "lowest", _micro), ("highest", "highest", _micro),
                 ("GB/s", "gb_per_second", "{:,.1f}".format), _FLOOR, ("not here", "not_here", lambda reason: f"[{reasons.index(reason) + 1}]"))
        for number, reason in enumerate(reasons, 1):
            out.note(f"[{number}] {reason}")


def _train(args: argparse.Namespace) -> None:
    """Time the step that finetune would run: its compiled memory beside what the device says it reached."""
    import jax

    from gptoss_jax import devices
    from gptoss_jax.inference import measure, measure_ops
    from gptoss_jax.training import memory_plan, speed, state as training
    from gptoss_jax.training.config import load_config
    from gptoss_jax.training.optimizer import make_optimizer
    from gptoss_jax.training.step import make_train_step

    config = load_config(args.config, args.overrides)
    if args.random_weights and not config.init.checkpoint:
        raise command.UsageError(f"--random-weights {args.random_weights}: {args.config} starts from random weights, expected one with init.checkpoint")
    config = training.resolve(config, _named(args) if args.random_weights else None)
    optimizer, mesh = make_optimizer(config.optimizer, config.run.steps), training.training_mesh(config)
    out = _Output(args)
    out.note(f"{args.config}: {memory_plan.describe(config)}")
    memory_plan.announce(config, mesh, command.tell)
    state, frozen = training.initial_state(config, optimizer, mesh, _random_weights(config, mesh) if args.random_weights else None)
    batch = training.place_batch(_random_batch(config), mesh)
    start = time.perf_counter()
    compiled = devices.compile_step(make_train_step(config, optimizer, mesh), state, frozen, batch)
    compile_seconds = time.perf_counter() - start
    found = measure_ops.called(compiled.compiled.as_text())
    ran = {op: how if how in found else "xla" for op, how in (("attention", "cudnn"), ("expert_mlp", "mosaic_gpu"))}
    out.note_ran(ran)

    def once() -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(args.steps):
            state, metrics = compiled.compiled(state, frozen, batch)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - start) / args.steps

    tokens, again, train = batch.tokens.size, config.train.remat == "layer", config.train
    model_flops, step_flops = (tokens * speed.flops_per_token(config.model, state.trained, config.data.row_tokens, again=twice) for twice in (False, again))
    row = measure.timed(once, args.repetitions, _trace(args), tokens=tokens)
    count = 1 if mesh is None or jax.default_backend() == "cpu" else mesh.size  # devices of a CPU share what it reaches
    if peak := speed.peak_flops(jax.devices()[0]):
        row["model_flops_utilisation"] = model_flops / row["seconds"] / peak / count
    row |= {"what": "train", "config": args.config, "mode": train.mode, "overrides": args.overrides, "compile_seconds": compile_seconds,
            "compiled_peak_bytes": compiled.memory.peak_bytes, "implementations": ran} | _peak(jax)
    state = frozen = batch = None  # ceilings take memory, too: after the peak has been read, in place of what is trained
    floor = step_flops / (_limits(out, train.compute_dtype).matmul * count)
    out.add(row | {"flops": step_flops, "floor_seconds": floor, "floor_fraction": floor / row["seconds"]})
    reached = "device" if "device_peak_bytes" in row else "host"
    out.show(*_TIMES, ("tokens/s", "tokens_per_second", "{:,.1f}".format), _FLOOR, *[("MFU", "model_flops_utilisation", "{:.1%}".format)] * bool(peak),
             ("compile s", "compile_seconds", "{:.1f}".format), ("compiled peak GB", "compiled_peak_bytes", _giga),
             (f"{reached} peak GB", f"{reached}_peak_bytes", _giga))
    out.note(f"floor: {_milli(floor)} ms, {step_flops / 1e12:.3g} TFLOP a step at the rate above{f' times {count}' * (count > 1)}: forward, backward to "
             f"activations and what is trained{', and the layers forward again (remat layer)' * again}; of experts, those that tokens are routed to")


def _random_batch(config):
    """Return full rows of random tokens, all of them learnt."""
    import numpy as np

    from gptoss_jax.training.state import Batch

    shape = (config.data.batch_size, config.data.row_tokens)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return Batch(tokens, np.roll(tokens, -1, axis=1), np.ones(shape, np.float32), np.ones(shape, np.int32), positions)


def _random_weights(config, mesh):
    """Return what `initial_state` takes: packed in the dtype of computation with adapters, float32 otherwise."""
    from gptoss_jax.inference import measure

    packed = config.train.mode == "lora"
    return measure.random_weights(config.model.replace(quantized=packed), config.train.compute_dtype if packed else "float32", mesh=mesh)


def _giga(size: int) -> str:
    return f"{size / 1e9:.2f}"


def _milli(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}"


_TIMES = (("ms", "seconds", _milli), ("lowest", "lowest", _milli), ("highest", "highest", _milli))
_FLOOR = ("of the floor", "floor_fraction", "{:.1%}".format)


class _Output:
    """Measurements: each appended to --json as soon as it is there, all of them as a table at the end, whatever ends it."""

    def __init__(self, args: argparse.Namespace):
        import jax

        import gptoss_jax

        command.enable_compilation_cache()
        self.rows: list[dict] = []
        self._file, self._bar = args.json, command.Status()
        device = jax.local_devices()[0]
        source = {name: value for name in ("checkpoint", "random_weights", "dtype") if (value := getattr(args, name, None))}
        self._facts = {"date": datetime.date.today().isoformat(), "version": gptoss_jax.__version__, "jax": jax.__version__,
                       "device": device.device_kind} | source
        self.note(", ".join(f"{name} {value}" for name, value in self._facts.items()))

    def note(self, line: str) -> None:
        self._bar.clear()
        print(line, flush=True)

    def note_ran(self, implementations: dict[str, str], where: str = "") -> None:
        self.note("ran " + ", ".join(f"{op} {how}" for op, how in implementations.items()) + where)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        if self._file:
            try:
                with open(self._file, "a", encoding="utf-8") as file:
                    file.write(json.dumps(self._facts | row) + "\n")
            except OSError as error:
                error.filename = self._file  # a full disk's names no file
                raise
        self._bar(" ".join(str(row[key]) for key in ("what", "op", "size", "implementation", "batch", "context") if key in row))

    def show(self, *columns) -> None:
        """Print a table. columns: (heading, key, how to show the value); what a row lacks is left blank."""
        cells = [[heading for heading, _, _ in columns]]
        cells += [[show(row[key]) if key in row else "" for _, key, show in columns] for row in self.rows]
        widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
        if self.rows:
            self.note("\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)).rstrip() for line in cells))


def _opened(args: argparse.Namespace) -> tuple[GptOssConfig, _Output]:
    from gptoss_jax.inference import memory_plan

    config = _named(args) if args.checkpoint is None else config_named(args.checkpoint)
    for batch in args.batch:
        for context in args.context:
            memory_plan.check_request(config, batch, context)
    return config, _Output(args)


def _named(args: argparse.Namespace) -> GptOssConfig:
    """Return the configuration of --random-weights."""
    name = args.random_weights
    if name not in (*RANDOM, "tiny"):
        raise command.UsageError(f"--random-weights {name!r}: no such model, expected one of {', '.join(RANDOM)}, tiny")
    return RANDOM.get(name) or config_named(name)


def _limits(out: _Output, dtype: str):
    from gptoss_jax.inference import measure

    limits = measure.ceilings(dtype)
    out.add({"what": "ceilings", "gb_per_second": limits.bandwidth / 1e9, "tflop_per_second": limits.matmul / 1e12})
    out.rows.clear()
    out.note(f"this device reaches {limits.bandwidth / 1e9:,.1f} GB/s and {limits.matmul / 1e12:,.2f} TFLOP/s in {dtype}")
    return limits


def _model(args: argparse.Namespace, config: GptOssConfig):
    from gptoss_jax import checkpoint
    from gptoss_jax.inference import measure
    from gptoss_jax.model import GptOss

    if args.checkpoint:
        return checkpoint.load(args.checkpoint, dtype=args.dtype)
    return GptOss(config, measure.random_weights(config, args.dtype))


def _trace(args: argparse.Namespace, *point):
    """Return what opens the trace of one measurement. Each has a folder of its own: JAX calls them by the second, in which there may be several."""
    import jax

    folder = "-".join(str(part).replace(" ", "_") for part in (args.mode, *point))
    return functools.partial(jax.profiler.trace, os.path.join(args.profile, folder)) if args.profile else None


def _peak(jax) -> dict:
    """Return the largest memory use of the process so far, and of its device where that counts."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    device = {"device_peak_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}
    return {"host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit} | device


if __name__ == "__main__":
    sys.exit(main())
