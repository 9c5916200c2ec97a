"""Everything worth measuring on one GPU, in under eight minutes: kernels checked and timed, decode, prefill, load, and what else is installed there.

    python benchmarks/gpu.py --out results.jsonl [--seconds 460] [--models gpt-oss-120b gpt-oss-20b]

Each section is a process of its own, so that one that fails, or is out of time, costs only what it had left to do. Most of the time is a compiler's:
where the GPU's memory allows, three lanes of sections compile beside each other, each in its share of the memory, and time in turn, while nobody
compiles. A line of JSON is written after each measurement. Weights are random, made on the device; no network and no checkpoint are needed.
Smallest run, also on a CPU:

    python benchmarks/gpu.py --out results.jsonl --models tiny --batches 1 --contexts 128 --prompts 64 --steps 4
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[1]
LANES_FROM, GPU_FRACTION = 120e9, 0.94  # bytes of a GPU's memory that hold three lanes; how much of it they take
AT_ONCE, POINT = 8, ("what", "batch", "context")
FIRST = ((1, 128), (1, 8192), (16, 128), (64, 8192), (1, 131_072), (64, 128), (256, 128), (4, 128))  # what matters most is measured first
WRONG = 0.02  # of a result's norm: more than bfloat16 explains
TOO_LARGE, NO_TIME = "does not fit", "no time left"
READY, TIMED = "ready to time", "timed"  # what a section says to the process that started it, and waits for its answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON lines are appended to it")
    parser.add_argument("--seconds", type=float, default=460, help="for everything (default: 460)")
    parser.add_argument("--models", nargs="+", default=["gpt-oss-120b", "gpt-oss-20b"])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 64, 256])
    parser.add_argument("--contexts", type=int, nargs="*", default=[128, 8192, 32_768, 131_072])
    parser.add_argument("--prompts", type=int, nargs="*", default=[8192, 2048, 32_768, 1024, 4096, 16_384])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--section", help=argparse.SUPPRESS)  # of this process; without it this one starts the others
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--earlier", type=int, help=argparse.SUPPRESS)  # rows in the file that are of another run
    parser.add_argument("--checked", action="store_true", help=argparse.SUPPRESS)  # the Hopper kernels, by the first section
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.section:
        return run_section(arguments)
    try:  # before the time runs
        for name in arguments.models:
            config_of(name)
        with arguments.out.open("a+b") as file:
            file.seek(0)
            if (found := file.read()) and not found.endswith(b"\n"):
                file.write(b"\n")  # after half a line of a run that was cut off
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if arguments.seconds <= 0:
        parser.error(f"--seconds is {arguments.seconds:g}, expected a positive number")
    end, earlier, turns = time.monotonic() + arguments.seconds, len(read(arguments.out)), Turns()
    command = [sys.executable, __file__, "--out", str(arguments.out), "--steps", str(arguments.steps), "--earlier", str(earlier)]
    command += [part for name in ("batches", "contexts", "prompts") for part in (f"--{name}", *map(str, getattr(arguments, name)))]
    failed = run_lane([("check", arguments.models[0], 1)], GPU_FRACTION, command, arguments.out, time.monotonic() + arguments.seconds / 4, turns)
    command += ["--checked"] * hopper_checked(read(arguments.out)[earlier:])
    plan = lanes(arguments.models, gpu_memory())
    with concurrent.futures.ThreadPoolExecutor(len(plan)) as pool:
        failed += sum(pool.map(lambda lane: run_lane(lane[1], lane[0], command, arguments.out, end, turns), plan))
    show(read(arguments.out)[earlier:])
    return 1 if failed else 0


def lanes(models: list[str], memory: int) -> list[tuple[float, list[tuple[str, str, int]]]]:
    """Return each lane's share of the memory and its sections: (section, model, share of the lane's time; what one leaves goes to those after it).

    Points of the smaller model that don't fit beside the larger one are left to the lane that held that, when it is done.
    """
    large, small = models[0], models[-1]
    rivals, kernels = [("load", small, 1), ("torch", small, 1), ("triton", small, 1)], [("kernels", large, 2), ("variants", large, 1)]
    if memory < LANES_FROM or len(models) < 2:
        return [(GPU_FRACTION, [*(("model", model, 6) for model in models), *rivals, ("transformers", small, 1), *kernels])]
    return [(0.63, [("model", large, 8), ("model", small, 1), ("transformers", small, 1)]), (0.21, [("model", small, 8), *rivals]), (0.1, kernels)]


def gpu_memory() -> int:
    """Return the bytes of the first GPU's memory, 0 where there is none to be asked."""
    if not (query := shutil.which("nvidia-smi")):
        return 0
    found = subprocess.run([query, "--query-gpu=memory.total", "--format=csv,noheader,nounits"], capture_output=True, text=True).stdout.split()
    return int(found[0]) << 20 if found and found[0].isdigit() else 0


class Turns:
    """Lanes compile beside each other and time one at a time: when all are ready or at an end, and nobody compiles again before all have had their turn."""

    def __init__(self):
        self.changed, self.compiling, self.ready, self.timing = threading.Condition(), 0, 0, False

    def compile(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not self.ready)
            self.compiling += 1

    def time(self) -> None:
        self.end_compiling(ready=1)
        with self.changed:
            self.changed.wait_for(lambda: not self.compiling and not self.timing)
            self.timing = True

    def end_compiling(self, ready: int = 0) -> None:
        with self.changed:
            self.compiling, self.ready = self.compiling - 1, self.ready + ready
            self.changed.notify_all()

    def end_timing(self) -> None:
        with self.changed:
            self.ready, self.timing = self.ready - 1, False
            self.changed.notify_all()

    def compile_again(self) -> None:
        self.end_timing()
        self.compile()


def run_lane(sections, share: float, command: list[str], out: pathlib.Path, end: float, turns: Turns) -> int:
    """Run sections one after another, each a process that says when it is ready to time. Returns how many failed."""
    failed, environment = 0, os.environ | {"XLA_CLIENT_MEM_FRACTION": str(share)}
    environment.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # its older name
    for index, (section, model, weight) in enumerate(sections):
        turns.compile()
        seconds = (end - time.monotonic()) * weight / sum(others for *_, others in sections[index:])
        if seconds < 10:
            write(out, {"section": section, "model": model, "skipped": NO_TIME})
            turns.end_compiling()
            continue
        timing, told = False, {READY: turns.time, TIMED: turns.compile_again}
        with subprocess.Popen([*command, "--seconds", str(seconds), "--section", section, "--model", model], text=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, env=environment) as process:
            watch = threading.Timer(seconds + 10, process.kill)  # it watches the time itself
            watch.start()
            for line in process.stdout:
                if (said := line.strip()) not in told:
                    print(line, end="", flush=True)
                    continue
                told[said]()
                timing = said == READY
                with contextlib.suppress(BrokenPipeError):  # killed meanwhile
                    os.write(process.stdin.fileno(), b"\n")
        turns.end_timing() if timing else turns.end_compiling()
        watch.cancel()
        failed += process.returncode != 0
        if process.returncode < 0:
            write(out, {"section": section, "model": model, "skipped": f"stopped by signal {-process.returncode} after {seconds + 10:.0f} s or less"})
    return failed


@contextlib.contextmanager
def alone():
    """Wait until nothing else runs on the GPU, and see that it stays so."""
    try:
        print(READY, flush=True)
        sys.stdin.readline()
        yield
    finally:
        print(TIMED, flush=True)
        sys.stdin.readline()


def read(path: pathlib.Path) -> list[dict]:
    """Return the rows of a file of results; half a line, where a run was cut off, is none."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def hopper_checked(rows: list[dict]) -> bool:
    """Return whether each of the Hopper kernels has been found to equal the reference."""
    checks = [row for row in rows if row.get("op") == "hopper" and row["what"] == "check"]
    return len(checks) == 3 and not any(row["missing"] for row in checks)


def run_section(arguments) -> int:
    """Run one section; what goes wrong is written where results go."""
    def record(**row):
        write(arguments.out, {"section": arguments.section, "model": arguments.model, "xla_flags": os.environ.get("XLA_FLAGS", "")} | row)

    arguments.end, arguments.took = time.monotonic() + arguments.seconds, 0.0
    try:
        SECTIONS[arguments.section](arguments, record)
    except ImportError as error:
        record(skipped=f"not installed: {error.name}")
    except Exception as error:  # the sections after this one are still worth their time
        traceback.print_exc()
        record(failed=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])
        return 1
    return 0


def write(path: pathlib.Path, row: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def measured(arguments, record, points: list[tuple[dict, Callable]]) -> None:
    """Record a measurement of each point, or why there is none: what is out of memory, or not possible here, the next may be.

    points: (its row, what gets it ready and returns what measures it). All are got ready beside each other, then measured one by one; of the first
    only, or of none, where more would take longer than is left, by what a point took so far.
    """
    begun = time.monotonic()
    most = len(points) if not arguments.took else max(0, int((arguments.end - begun) / arguments.took))
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = [(row, pool.submit(prepare) if index < most else None) for index, (row, prepare) in enumerate(points)]
    with alone() if most else contextlib.nullcontext():
        for row, future in waiting:
            try:
                record(**({"skipped": NO_TIME} if future is None or time.monotonic() > arguments.end else future.result()()) | row)
            except Exception as error:
                record(**row, failed=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])
    if most:
        arguments.took = max(arguments.took, (time.monotonic() - begun) / max(len(points[:most]), AT_ONCE // 2))  # one alone says little of others


def begin(arguments, record):
    """Return (configuration, ceilings). The first section of a run measures these, and records them with what all its numbers depend on."""
    import jax

    from gptoss_jax.inference import measure
    from gptoss_jax.kernels import hopper

    if arguments.checked:
        hopper.wrong_here = lambda op: None
    known = next((row for row in read(arguments.out)[arguments.earlier :] if row.get("what") == "ceilings"), None)
    if known is None:
        with alone():
            limits = measure.ceilings()
        known = {"what": "ceilings", "device": jax.devices()[0].device_kind, "jax": jax.__version__, "package": package(), "date": time.strftime("%Y-%m-%d"),
                 "gb_per_second": limits.bandwidth / 1e9, "tflop_per_second": limits.matmul / 1e12}
        record(**known)
    return config_of(arguments.model), measure.Ceilings(known["gb_per_second"] * 1e9, known["tflop_per_second"] * 1e12)


def package() -> str | None:
    """Return the object name that git gives the package's folder as it is here, which `git rev-parse COMMIT:gptoss_jax` tells of a commit."""
    if not (git := shutil.which("git")):
        return None
    with tempfile.TemporaryDirectory() as folder:
        for command in (["init", "--quiet"], ["add", "gptoss_jax"], ["write-tree", "--prefix=gptoss_jax/"]):
            done = subprocess.run([git, f"--git-dir={folder}", f"--work-tree={ROOT}", *command], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


def config_of(name: str):
    from gptoss_jax import bench, plan

    return bench.RANDOM.get(name) or plan.config_named(name)


def check(arguments, record) -> None:
    """Check the Hopper kernels against the reference, small and with traps: a model uses those that are right."""
    begin(arguments, record)
    from gptoss_jax.kernels import hopper

    ops = "expert_matmul", "decode_attention", "decode_matmul"
    with concurrent.futures.ThreadPoolExecutor(len(ops)) as pool:
        for op, missing in zip(ops, pool.map(hopper.device_unmet, ops)):
            record(what="check", op="hopper", kernel=op, missing=missing)


def kernels(arguments, record) -> None:
    """Check every implementation of every op against the reference, at the model's widths with 8 experts; then time them with all."""
    config, limits = begin(arguments, record)
    import jax

    from gptoss_jax.inference import measure

    def points(cases, what, measure):
        return [({"what": what, "op": case.op, "size": case.size, "implementation": how}, functools.partial(measure, case, how))
                for case in cases for how in reversed(case.implementations) if how != "reference" and (how != "cpu" or jax.default_backend() == "cpu")]

    def error(case, how):
        found = measure.compare(case, how)
        return lambda: {"error": found}

    context = min(8192, config.max_position_embeddings, max(arguments.contexts))
    measured(arguments, record, points(measure.cases(config, 4, min(context, 1024), experts=min(8, config.num_local_experts)), "check", error))
    for index in range(0, len(arguments.batches), 2):  # of more at once, the weights would find no room
        cases = [case for batch in arguments.batches[index : index + 2] for case in measure.cases(config, batch, context if batch <= 16 else min(context, 1024))]
        measured(arguments, record, points(cases, "kernel", functools.partial(measure.kernel, limits=limits, repetitions=3, seconds=0.05)))


def variants(arguments, record) -> None:
    """Time the Hopper kernels by tile, parts of the sum, steps and stages: which plan is best can't be told from the compiled program."""
    config, limits = begin(arguments, record)
    import jax
    import jax.numpy as jnp

    from gptoss_jax.inference import measure
    from gptoss_jax.kernels import hopper
    from gptoss_jax.kernels.expert_matmul import HopperGateUpWeight, HopperWeight, hopper_layout

    if missing := hopper.device_unmet("expert_matmul"):
        return record(skipped=f"needs {missing}")
    from gptoss_jax.kernels.expert_matmul import hopper_kernel

    E, D, F = config.num_local_experts, config.hidden_size, config.intermediate_size
    key = jax.random.key(0, impl="rbg")
    for kind, outputs, inputs in ((HopperGateUpWeight, 2 * F, D), (HopperWeight, D, F)):
        weight, bias, points = hopper_layout.random(key, E, outputs, inputs, kind), jnp.zeros((E, outputs), jnp.bfloat16), []
        for active, rows in [(config.num_experts_per_tok, 8), *((E // 2, rows) for rows in (8, 16, 32, 64, 128))]:
            x = jax.random.normal(key, (active * rows, inputs), jnp.bfloat16)
            planned = hopper_kernel.plan(len(x), weight, rows)
            plans = {planned} if rows > 8 else {planned, planned._replace(stages=max(planned.stages // 2, 2))}
            if kind is HopperWeight and active == config.num_experts_per_tok:
                plans |= {planned._replace(splits=splits) for splits in (1, 2, 3)}
            for plan in plans:

                def run(how, x, first, weight, bias, plan=plan, active=active, rows=rows):
                    index, height = jnp.arange(active, dtype=jnp.int32), rows // 8
                    tiles = hopper_kernel.Tiles((first + index) % E, index * height, jnp.full(active, height), jnp.full(1, active))
                    return hopper_kernel.matmul(x, weight, bias, tiles, plan, limit=config.swiglu_limit, alpha=config.swiglu_alpha)

                case = measure.Case("hopper", f"{kind.__name__} {active} x {rows} rows", (), run, x, (jnp.int32(0), weight, bias),
                                    active * outputs * inputs * 17 // 32, 2 * len(x) * outputs * inputs)
                row = {"what": "variant", "size": case.size, "splits": plan.splits, "stages": plan.stages, "planned": plan == planned}
                points.append((row, functools.partial(measure.kernel, case, "", limits, repetitions=3, seconds=0.02)))
        measured(arguments, record, points)
    product_variants(arguments, record, config, limits)


def product_variants(arguments, record, config, limits) -> None:
    """The same for a decode step's dense products of one row."""
    import jax.numpy as jnp

    from gptoss_jax.inference import measure
    from gptoss_jax.kernels.decode_matmul import hopper_kernel

    points = []
    for case in measure.cases(config, 1, 128):
        if case.op != "decode_matmul":
            continue
        added, *_, weight = case.arrays
        planned, of_eight = (hopper_kernel.plan(rows, *weight.shape, added is not None) for rows in (1, 8))
        plans = {planned, planned._replace(stages=4), of_eight, of_eight._replace(groups=1, stages=12)}
        for plan in plans:

            def multiply(*arrays, plan=plan):
                return hopper_kernel.matmul(*arrays, plan, epsilon=config.rms_norm_eps, dtype=jnp.dtype(jnp.float32))

            run = case._replace(run=lambda _, *arrays, multiply=multiply: measure.products(multiply, *arrays))
            row = {"what": "variant", "size": case.size, "rows": plan.rows, "groups": plan.groups, "stages": plan.stages, "planned": plan == planned}
            points.append((row, functools.partial(measure.kernel, run, "", limits, repetitions=3, seconds=0.02)))
    measured(arguments, record, points)


def model(arguments, record) -> None:
    """Decode and prefill with random weights, what matters most first; points that can't fit are left out, or to a later section with more memory."""
    before = [row for row in read(arguments.out)[arguments.earlier :] if row["section"] == "model" and row["model"] == arguments.model]
    left = {tuple(row[name] for name in POINT) for row in before if row.get("skipped") == TOO_LARGE}
    if before and not left:
        return
    config, limits = begin(arguments, record)
    import jax

    from gptoss_jax import devices
    from gptoss_jax.inference import measure, memory_plan
    from gptoss_jax.inference.sampling import Sampling
    from gptoss_jax.model import GptOss

    memory = devices.usable_bytes()
    plans = {point: memory_plan.by_arithmetic(config, *point[1:], memory=memory) for point in model_points(arguments, config)}
    needs = {point: plan.parts["cache"] + (3e9 if point[0] == "prefill" else 1e9) for point, plan in plans.items() if not before or point in left}
    free = memory - next(iter(plans.values())).parts["weights"]
    for point in [point for point in needs if needs[point] > free]:
        record(**dict(zip(POINT, point)), skipped=TOO_LARGE)
        del needs[point]
    if not needs:
        return
    start = time.monotonic()
    model = GptOss(config, jax.block_until_ready(measure.random_weights(config)))
    model.arrange()
    by_kernel = any(name.endswith("hopper_words") for name in model.arrays())
    record(what="weights", seconds=time.monotonic() - start, experts="mosaic_gpu" if by_kernel else "xla")

    def ready(what, batch, context):
        if what == "prefill":
            return measure.prefill(model, batch, context, limits, repetitions=3)
        sampling = Sampling(top_p=0.95) if what == "decode sampled" else measure.GREEDY  # of the sampler's three kinds the one that does most
        return measure.decode(model, batch, context, limits, steps=arguments.steps, repetitions=3, sampling=sampling)

    for group in together(needs, free):
        measured(arguments, record, [(dict(zip(POINT, point)), functools.partial(ready, *point)) for point in group])
    record(what="memory", **{name: size for name, size in (jax.devices()[0].memory_stats() or {}).items() if "bytes" in name})


def model_points(arguments, config) -> list[tuple[str, int, int]]:
    """Return (what, batch, context) of all that a model is to be measured at, what matters most first."""
    grid = [(batch, context) for batch in arguments.batches for context in arguments.contexts if context <= config.max_position_embeddings]
    decode = [("decode", *point) for point in sorted(grid, key=lambda point: FIRST.index(point) if point in FIRST else len(FIRST))]
    prefill = [("prefill", 1, min(tokens, config.max_position_embeddings - 1)) for tokens in arguments.prompts]
    return [*decode[:3], *prefill[:2], *(("decode sampled", *point[1:]) for point in decode[:1]), *decode[3:], *prefill[2:]]


def together(needs: dict, free: float) -> list[list]:
    """Return the points in groups whose caches and temporaries fit at once, each in the first that has room."""
    groups: list[list] = []
    for point, need in needs.items():
        group = next((group for group in groups if len(group) < AT_ONCE and need + sum(needs[other] for other in group) <= free), None)
        if group is None:
            groups.append(group := [])
        group.append(point)
    return groups


def load(arguments, record) -> None:
    """Time the loading of a checkpoint of four layers, written here first."""
    config, _ = begin(arguments, record)
    import jax

    import gptoss_jax
    from gptoss_jax.checkpoint import save_huggingface
    from gptoss_jax.inference import measure
    from gptoss_jax.model import cost

    config = config.replace(num_hidden_layers=4)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "checkpoint"
        save_huggingface(path, config, measure.random_weights(config))
        with alone():
            for cache in ("written a moment ago", "page cache", "page cache"):
                start = time.perf_counter()
                jax.block_until_ready(gptoss_jax.load(path).weights())
                seconds = time.perf_counter() - start
                record(what="load", read_from=cache, seconds=seconds, gb_per_second=cost.weight_bytes(config) / seconds / 1e9)


def torch_ceilings(arguments, record) -> None:
    """What the same device gives PyTorch: a copy, and a bfloat16 matrix product."""
    import torch

    if not torch.cuda.is_available():
        return record(skipped="PyTorch finds no GPU")
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    data, copy = (torch.empty(1 << 32, dtype=torch.uint8, device="cuda") for _ in range(2))
    with alone():
        record(what="torch copy", gb_per_second=2 * data.numel() / gpu_seconds(torch, lambda: copy.copy_(data)) / 1e9)
        record(what="torch matmul", tflop_per_second=2 * 8192**3 / gpu_seconds(torch, lambda: a @ b) / 1e12)


def gpu_seconds(torch, run, repetitions: int = 10) -> float:
    """Return the median seconds of a call, by events."""
    run()
    times = []
    for _ in range(repetitions):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def triton_rival(arguments, record) -> None:
    """The experts' first product through Triton's tl.dot_scaled, for kernels.expert_matmul to be held against: 4 experts, few rows each."""
    import torch
    import triton  # noqa: F401

    if not torch.cuda.is_available():
        return record(skipped="PyTorch finds no GPU")
    from triton_dot_scaled import mxfp4_matmul  # beside this file: Triton reads its kernels' source

    experts, out, inputs, rows = 128, 5760, 2880, 16
    blocks = torch.randint(0, 256, (experts, out, inputs // 2), dtype=torch.uint8, device="cuda")
    scales = torch.randint(118, 121, (experts, out, inputs // 32), dtype=torch.uint8, device="cuda")
    x = torch.randn(4, rows, inputs, dtype=torch.bfloat16, device="cuda")
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], device="cuda")
    chosen = torch.randperm(experts, device="cuda")[:4]
    picked = blocks[chosen]
    codes = torch.stack([picked & 15, picked >> 4], -1).flatten(-2).long()
    dense = values[codes] * torch.exp2(scales[chosen].float() - 127).repeat_interleave(32, -1)
    expected = torch.einsum("eri,eoi->ero", x.float(), dense)
    error = ((mxfp4_matmul(x, blocks, scales, chosen).float() - expected).norm() / expected.norm()).item()
    choices = [torch.randperm(experts, device="cuda")[:4] for _ in range(8)]  # others each time: the cache holds four
    with alone():
        seconds = gpu_seconds(torch, lambda: [mxfp4_matmul(x, blocks, scales, chosen) for chosen in choices]) / len(choices)
    record(what="triton dot_scaled", rows=rows, experts=4, error=error, seconds=seconds, gb_per_second=4 * out * inputs * 17 / 32 / seconds / 1e9)


def transformers_rival(arguments, record) -> None:
    """Batch-1 decode of the smaller model by transformers, bfloat16 experts, random weights, as large as the time allows."""
    import torch
    import transformers

    if not torch.cuda.is_available():
        return record(skipped="PyTorch finds no GPU")
    config = transformers.GptOssConfig(num_hidden_layers=24, num_local_experts=32, torch_dtype="bfloat16")
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cuda").eval()
    with torch.no_grad(), alone():
        for weight in model.parameters():
            weight.normal_(0, 0.02)
        model.model.rotary_emb = type(model.model.rotary_emb)(config, device="cuda")
        ids = torch.randint(0, config.vocab_size, (1, 112), device="cuda")
        for count in (4, 16):  # the first to warm up
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=count + 1, min_new_tokens=count + 1, do_sample=False)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        first = time.perf_counter()
        model.generate(ids, max_new_tokens=1, do_sample=False)
        torch.cuda.synchronize()
        seconds -= time.perf_counter() - first
    record(what="transformers decode", version=transformers.__version__, batch=1, context=128, dtype="bfloat16", tokens_per_second=16 / seconds)


SECTIONS = {"check": check, "kernels": kernels, "variants": variants, "model": model, "load": load, "torch": torch_ceilings, "triton": triton_rival,
            "transformers": transformers_rival}


def show(rows: list[dict]) -> None:
    """Print what was measured, short, last: the end of an output is what is kept of it."""
    missing, found = collections.Counter(), set()
    for row in rows:
        if row.get("what") in ("decode", "decode sampled", "prefill") and "tokens_per_second" in row:
            found.add((row["model"], *(row[name] for name in POINT)))
            print(f"{row['model']} {row['what']:14} batch {row['batch']:4} context {row['context']:7,}: {row['tokens_per_second']:12,.1f} tokens/s, "
                  f"{row['floor_fraction']:6.1%} of the floor {row['xla_flags']}".rstrip())
        elif row.get("op") == "hopper" and row["what"] == "check":
            print(f"Hopper kernel of {row['kernel']}: {row['missing'] and 'needs ' + row['missing'] or 'equals the reference'}")
        elif "error" in row and not row["error"] <= WRONG:  # NaN is wrong
            print(f"WRONG: {row['model']} {row['op']} {row['size']} by {row['implementation']}: {row['error']:.1e}")
        elif "floor_fraction" in row and (row.get("planned") or row.get("implementation") == "mosaic_gpu"):
            print(f"{row['model']} {row['op']} {row['size']}: {row['seconds'] * 1e6:,.1f} us, {row['floor_fraction']:6.1%} of the floor")
    for row in rows:
        if ("skipped" in row or "failed" in row) and (row["model"], *(row.get(name) for name in POINT)) not in found:  # elsewhere
            missing[row["model"], row["section"], row.get("skipped") or row["failed"]] += 1
    for (model, section, why), count in missing.items():
        print(f"{model} {section}: {count} x {why}")


if __name__ == "__main__":
    sys.exit(main())
