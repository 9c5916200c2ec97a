"""Everything worth measuring on one GPU, in under eight minutes: kernels checked and timed, decode, prefill, load, and what else is installed there.

    python benchmarks/gpu.py --out results.jsonl [--seconds 460] [--models gpt-oss-120b gpt-oss-20b]

Each section is a process of its own, so that one that fails, or is out of time, costs only what it had left to do. A line of JSON is written
after each measurement. Weights are random, made on the device; no network and no checkpoint are needed. Smallest run, also on a CPU:

    python benchmarks/gpu.py --out results.jsonl --models tiny --batches 1 --contexts 128 --prompts 64 --steps 4
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).parents[1]
SHARES = {"kernels": 0.2, "variants": 0.1, "model": 0.26, "load": 0.04, "torch": 0.04, "triton": 0.04, "transformers": 0.06}  # at most; a model's for each
AT_ONCE, POINT = 4, ("what", "batch", "context")
FIRST = ((1, 128), (1, 8192), (16, 128), (64, 8192), (1, 131_072), (64, 128), (256, 128), (4, 128))  # what matters most is measured first


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
    parser.add_argument("--checked", action="store_true", help=argparse.SUPPRESS)  # the Hopper kernels, by the first section
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.section:
        return run_section(arguments)
    end, failed = time.monotonic() + arguments.seconds, 0
    earlier = len(read(arguments.out))
    plan = [("kernels", arguments.models[0]), ("variants", arguments.models[0]), *(("model", model) for model in arguments.models),
            *((section, arguments.models[-1]) for section in ("load", "torch", "triton", "transformers"))]
    for section, model in plan:
        seconds = min(max(SHARES[section] * arguments.seconds, 20), end - time.monotonic())
        if seconds < 10:
            write(arguments.out, {"section": section, "model": model, "skipped": "no time left"})
            continue
        checked = ["--checked"] * hopper_checked(arguments.out, earlier)
        flags = [part for name in ("batches", "contexts", "prompts") for part in (f"--{name}", *map(str, getattr(arguments, name)))]
        command = [sys.executable, __file__, "--out", str(arguments.out), "--seconds", str(seconds), "--section", section, "--model", model,
                   "--steps", str(arguments.steps), *flags, *checked]
        try:
            failed += subprocess.run(command, timeout=seconds + 10).returncode != 0  # it watches the time itself
        except subprocess.TimeoutExpired:
            write(arguments.out, {"section": section, "model": model, "skipped": f"stopped after {seconds:.0f} s"})
    show(arguments.out)
    return 1 if failed else 0


def read(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def hopper_checked(path: pathlib.Path, earlier: int) -> bool:
    """Return whether each of the Hopper kernels has been found to equal the reference, in a row after the `earlier` ones."""
    checks = [row for row in read(path)[earlier:] if row.get("op") == "hopper" and row["what"] == "check"]
    return len(checks) == 3 and not any(row["missing"] for row in checks)


def run_section(arguments) -> int:
    """Run one section; what goes wrong is written where results go."""
    def record(**row):
        write(arguments.out, {"section": arguments.section, "model": arguments.model, "xla_flags": os.environ.get("XLA_FLAGS", "")} | row)

    arguments.end = time.monotonic() + arguments.seconds
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


def in_time(arguments, record, row: dict, measure) -> None:
    """Record a measurement, or why there is none; out of memory or not possible here, the next may be."""
    if time.monotonic() > arguments.end:
        return record(**row, skipped="no time left")
    try:
        record(**(row | measure()))
    except Exception as error:
        record(**row, failed=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])


def begin(arguments, record):
    """Return (configuration, ceilings), recorded with what the numbers depend on."""
    import jax

    from gptoss_jax import bench, command
    from gptoss_jax.inference import measure
    from gptoss_jax.kernels import decode_attention, decode_matmul, expert_matmul
    from gptoss_jax.plan import config_named

    command.use_gpu_memory()
    for op in (expert_matmul, decode_attention, decode_matmul) if arguments.checked else ():
        op.mosaic_gpu.wrong_here = lambda: None
    device = jax.devices()[0]
    limits = measure.ceilings()
    git = shutil.which("git")
    commit = git and subprocess.run([git, "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    record(what="ceilings", device=device.device_kind, jax=jax.__version__, commit=commit or None, date=time.strftime("%Y-%m-%d"),
           gb_per_second=limits.bandwidth / 1e9, tflop_per_second=limits.matmul / 1e12)
    return bench.RANDOM.get(arguments.model) or config_named(arguments.model), limits


def kernels(arguments, record) -> None:
    """Check the Hopper kernels, and every implementation of every op, against the reference; then time them."""
    config, limits = begin(arguments, record)
    from gptoss_jax.inference import measure
    from gptoss_jax.kernels import decode_attention, decode_matmul, expert_matmul

    for op in (expert_matmul, decode_attention, decode_matmul):
        record(what="check", op="hopper", kernel=op.__name__, missing=op.mosaic_gpu.device_unmet())
    context = min(8192, config.max_position_embeddings, max(arguments.contexts))
    for case in measure.cases(config, 4, min(context, 1024), experts=min(8, config.num_local_experts)):
        for how in reversed(case.implementations):
            reason = measure.unmet(case, how)
            row = {"what": "check", "op": case.op, "size": case.size, "implementation": how}
            record(**row, not_here=reason) if reason else in_time(arguments, record, row, lambda: {"error": measure.compare(case, how)})
    for batch in arguments.batches:
        for case in measure.cases(config, batch, context if batch <= 16 else min(context, 1024)):
            auto = measure.chosen_implementation(case)
            for how in case.implementations:
                if how not in ("reference", "cpu") and measure.unmet(case, how) is None:
                    row = {"what": "kernel", "op": case.op, "size": case.size, "implementation": how, "auto": auto == how}
                    in_time(arguments, record, row, lambda: measure.kernel(case, how, limits, repetitions=3, seconds=0.05))


def variants(arguments, record) -> None:
    """Time the Hopper kernels by tile, parts of the sum, steps and stages: which plan is best can't be told from the compiled program."""
    config, limits = begin(arguments, record)
    import jax
    import jax.numpy as jnp

    from gptoss_jax.inference import measure
    from gptoss_jax.kernels.expert_matmul import HopperGateUpWeight, HopperWeight, hopper_layout, mosaic_gpu

    if missing := mosaic_gpu.device_unmet():
        return record(skipped=f"needs {missing}")
    from gptoss_jax.kernels.expert_matmul import hopper_kernel

    E, D, F = config.num_local_experts, config.hidden_size, config.intermediate_size
    key = jax.random.key(0, impl="rbg")
    for kind, outputs, inputs in ((HopperGateUpWeight, 2 * F, D), (HopperWeight, D, F)):
        weight, bias = hopper_layout.random(key, E, outputs, inputs, kind), jnp.zeros((E, outputs), jnp.bfloat16)
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
                in_time(arguments, record, row, lambda: measure.kernel(case, "", limits, repetitions=3, seconds=0.02))
    product_variants(arguments, record, config, limits)


def product_variants(arguments, record, config, limits) -> None:
    """The same for a decode step's dense products of one row."""
    import jax.numpy as jnp

    from gptoss_jax.inference import measure
    from gptoss_jax.kernels.decode_matmul import hopper_kernel

    for case in measure.cases(config, 1, 128):
        if case.op != "decode_matmul":
            continue
        added, *_, weight = case.arrays
        planned, of_eight = (hopper_kernel.plan(rows, *weight.shape, added is not None) for rows in (1, 8))
        plans = {planned, planned._replace(stages=4), of_eight, of_eight._replace(groups=1, stages=12)}
        for plan, ahead in [(planned, False), *((plan, True) for plan in plans)]:

            def multiply(*arrays, plan=plan, ahead=ahead):
                return hopper_kernel.matmul(*arrays[:-1], arrays[-1] if ahead else None, plan, epsilon=config.rms_norm_eps, dtype=jnp.dtype(jnp.float32))

            run = case._replace(run=lambda _, *arrays, multiply=multiply: measure.products(multiply, *arrays))
            row = {"what": "variant", "size": case.size, "rows": plan.rows, "groups": plan.groups, "stages": plan.stages, "ahead": ahead,
                   "planned": plan == planned}
            in_time(arguments, record, row, lambda: measure.kernel(run, "", limits, repetitions=3, seconds=0.02))


def model(arguments, record) -> None:
    """Decode and prefill with random weights, what matters most first; points that can't fit are left out."""
    config, limits = begin(arguments, record)
    import jax

    from gptoss_jax import devices
    from gptoss_jax.inference import measure, memory_plan
    from gptoss_jax.inference.sampling import Sampling
    from gptoss_jax.model import GptOss

    memory = devices.usable_bytes()
    start = time.monotonic()
    model = GptOss(config, jax.block_until_ready(measure.random_weights(config)))
    model.arrange()
    by_kernel = any(name.endswith("hopper_words") for name in model.arrays())
    record(what="weights", seconds=time.monotonic() - start, experts="mosaic_gpu" if by_kernel else "xla")
    grid = [(batch, context) for batch in arguments.batches for context in arguments.contexts if context <= config.max_position_embeddings]
    sampled = Sampling(top_p=0.95)  # of the sampler's three kinds the one that does most
    points = [("decode", *point) for point in sorted(grid, key=lambda point: FIRST.index(point) if point in FIRST else len(FIRST))]
    prompts = [("prefill", 1, min(tokens, config.max_position_embeddings - 1)) for tokens in arguments.prompts]
    points = [*points[:3], *prompts[:2], *(("decode sampled", *point[1:]) for point in points[:1]), *points[3:], *prompts[2:]]

    def ready(what, batch, context):
        if what == "prefill":
            return measure.prefill(model, batch, context, limits, repetitions=3)
        return measure.decode(model, batch, context, limits, steps=arguments.steps, repetitions=3,
                              sampling=sampled if what == "decode sampled" else measure.GREEDY)

    took = 0.0
    for start in range(0, len(points), AT_ONCE):  # most of the time is a compiler's: a few are compiled beside each other, then timed one by one
        begun, fitting = time.monotonic(), []
        for point in points[start : start + AT_ONCE]:
            if memory_plan.by_arithmetic(config, *point[1:], memory=memory).left < 0.02 * memory:  # temporaries
                record(**dict(zip(POINT, point)), skipped="does not fit")
            else:
                fitting.append(point)
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            waiting = [(point, pool.submit(ready, *point)) for point in fitting if begun + took < arguments.end]
            concurrent.futures.wait([future for _, future in waiting])
        for point in fitting[len(waiting) :]:
            record(**dict(zip(POINT, point)), skipped="no time left")
        for point, future in waiting:  # one that ran out of memory beside the others may have enough alone
            row = dict(zip(POINT, point))
            in_time(arguments, record, row, lambda: (ready(*point) if future.exception() else future.result())() | row)
        took = time.monotonic() - begun
    record(what="memory", **{name: size for name, size in (jax.devices()[0].memory_stats() or {}).items() if "bytes" in name})


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
    with torch.no_grad():
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


SECTIONS = {"kernels": kernels, "variants": variants, "model": model, "load": load, "torch": torch_ceilings, "triton": triton_rival,
            "transformers": transformers_rival}


def show(path: pathlib.Path) -> None:
    """Print what was measured, short, last: the end of an output is what is kept of it."""
    missing = collections.Counter()
    for row in read(path):
        if row.get("what") in ("decode", "decode sampled", "prefill") and "tokens_per_second" in row:
            print(f"{row['model']} {row['what']:14} batch {row['batch']:4} context {row['context']:7,}: {row['tokens_per_second']:12,.1f} tokens/s, "
                  f"{row['floor_fraction']:6.1%} of the floor {row['xla_flags']}".rstrip())
        elif row.get("op") == "hopper" and row["what"] == "check":
            print(f"Hopper kernel of {row['kernel']}: {row['missing'] and 'needs ' + row['missing'] or 'equals the reference'}")
        elif "floor_fraction" in row and (row.get("planned") or row.get("auto") and row["op"] == "expert_mlp"):
            print(f"{row['model']} {row['op']} {row['size']}: {row['seconds'] * 1e6:,.1f} us, {row['floor_fraction']:6.1%} of the floor")
        elif "skipped" in row or "failed" in row:
            missing[row["model"], row["section"], row.get("skipped") or row["failed"]] += 1
    for (model, section, why), count in missing.items():
        print(f"{model} {section}: {count} x {why}")


if __name__ == "__main__":
    sys.exit(main())
