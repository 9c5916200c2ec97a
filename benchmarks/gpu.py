"""What is worth measuring on one GPU, in under eight minutes, what matters most first: kernels, decode, prefill, training, load, others' programs.

    python benchmarks/gpu.py --out results.jsonl [--seconds 460] [--models gpt-oss-120b gpt-oss-20b]

What found no time is listed at the end. Each section is a process of its own, so that one that fails, or is out of time, costs only what it had left to do. Most of the time is a compiler's:
where the GPU's memory allows, three lanes of sections compile beside each other, each in its share of the memory, and time in turn, while nobody
compiles. Ctrl-C shows what there is so far. A line of JSON is written after each measurement. Weights are random, made on the device; no network and no checkpoint are needed.
Smallest run, also on a CPU:

    python benchmarks/gpu.py --out results.jsonl --models tiny --batches 1 --contexts 128 --prompts 64 --steps 4
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable

from gpu_lanes import GPU_FRACTION, NO_TIME, Turns, alone, gpu_memory, lanes, read, run_lane, write
from gpu_rivals import torch_ceilings, transformers_rival, triton_rival

ROOT = pathlib.Path(__file__).parents[1]
AT_ONCE, POINT = 8, ("what", "batch", "context")
TRAINING = "training"
HOPPER_KERNELS = ("expert_matmul", "decode_attention", "decode_matmul", "decode_block", TRAINING)  # by op, or what takes them; checked first
FIRST = ((1, 128), (1, 8192), (16, 128), (64, 8192), (1, 131_072), (64, 128), (256, 128), (4, 128))  # what matters most is measured first
WRONG = 0.02  # of a result's norm: more than bfloat16 explains
TOO_LARGE = "does not fit"


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
    parser.add_argument("--kernel", help=argparse.SUPPRESS)  # that this section checks
    parser.add_argument("--checked", action="store_true", help=argparse.SUPPRESS)  # the Hopper kernels, by the first sections
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
    with concurrent.futures.ThreadPoolExecutor(8) as pool:

        def run_lanes(planned) -> int:
            """Run lanes (share of the memory, sections, command, seconds) beside each other; returns how many sections failed."""
            return sum(pool.map(lambda lane: run_lane(lane[1], lane[0], lane[2], arguments.out, time.monotonic() + lane[3], turns), planned))

        try:
            first, most, half = arguments.models[0], arguments.seconds / 4, GPU_FRACTION / 2
            checks = [(half / len(HOPPER_KERNELS), [("check", first, 1)], [*command, "--kernel", kernel], most) for kernel in HOPPER_KERNELS]
            failed = run_lanes([(half, [("ceilings", first, 1)], command, 1.5 * most), *checks])  # which waits for all checks
            for kernel in set(HOPPER_KERNELS) - set(hopper_checks(read(arguments.out)[earlier:])):
                write(arguments.out, {"section": "check", "model": first} | checked(kernel, "a check that comes to its end"))
            command.append("--checked")
            failed += run_lanes([(share, sections, command, end - time.monotonic()) for share, sections in lanes(arguments.models, gpu_memory())])
        except KeyboardInterrupt:
            turns.interrupt()
            failed = 1
    show(read(arguments.out)[earlier:])
    return 1 if failed else 0


def checked(kernel: str, missing: str | None) -> dict:
    """Return a row that says what a Hopper kernel lacks, None if it equals the reference."""
    return {"what": "check", "op": "hopper", "kernel": kernel, "missing": missing}


def hopper_checks(rows: list[dict]) -> dict[str, str | None]:
    """Return what each Hopper kernel that was checked lacks."""
    return {row["kernel"]: row["missing"] for row in rows if row.get("op") == "hopper" and row["what"] == "check"}


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
        if getattr(error, "ends_process", False):
            os._exit(1)
        return 1
    return 0


def measured(arguments, record, points: list[tuple[list[dict], Callable]]) -> None:
    """Record measurements, or why there is none of something: what is out of memory, or not possible here, the next may be.

    points: (a row for each measurement, what compiles and returns what makes them, in that order). All are compiled beside each other, then measured one
    by one; the first only, or none, where more would take longer than is left, by what each took so far. Raises GpuLost after one that hangs.
    """
    from gptoss_jax.kernels import hopper

    begun = time.monotonic()
    most = len(points) if not arguments.took else max(0, min(len(points), int((arguments.end - begun) / arguments.took)))
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = [(rows, pool.submit(prepared, prepare) if index < most else None) for index, (rows, prepare) in enumerate(points)]
    with alone() if most else contextlib.nullcontext():
        for rows, future in waiting:
            for index, row in enumerate(rows):
                try:
                    record(**({"skipped": NO_TIME} if future is None or time.monotonic() > arguments.end else future.result()[index]()) | row)
                except Exception as error:
                    record(**row, failed=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])
                    if isinstance(error, TimeoutError) and not hopper.usable():  # all else would wait for the GPU, and other lanes for this one
                        raise hopper.GpuLost(f"the GPU does no more for this section after {row}") from error
    if most:
        arguments.took = max(arguments.took, (time.monotonic() - begun) / max(most, AT_ONCE // 2))  # one alone says little of others


def prepared(prepare: Callable) -> list[Callable]:
    """Return prepare(), called again where a compiler's process couldn't be started beside so many others."""
    try:
        return prepare()
    except Exception as error:
        if "Failed to launch" not in str(error):
            raise
        return prepare()


def begin(arguments, record):
    """Return (configuration, ceilings). The first section of a run measures these, and records them with what all its numbers depend on."""
    import jax

    from gptoss_jax.inference import measure
    from gptoss_jax.kernels import hopper

    rows = read(arguments.out)[arguments.earlier :]
    if arguments.checked:  # none is looked at again: one that hangs would cost each section its time
        found = hopper_checks(rows)
        hopper.wrong_here = lambda op, training: found[TRAINING if training else op]
    known = next((row for row in rows if row.get("what") == "ceilings"), None)
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
    """Check a Hopper kernel against the reference, small and with traps: later sections' models use those that are right."""
    from gptoss_jax.kernels import hopper

    hopper.wrong_here = hopper.disagreement  # that it was right before doesn't count
    training = arguments.kernel == TRAINING
    record(**checked(arguments.kernel, hopper.device_unmet("expert_matmul" if training else arguments.kernel, training=training)))


def kernels(arguments, record) -> None:
    """Check every implementation of every op against the reference, at the model's widths with 8 experts; then time them with all, at every other batch."""
    config, limits = begin(arguments, record)
    import jax

    from gptoss_jax.inference import measure_ops

    def points(cases, what, measure):
        return [([{"what": what, "op": case.op, "size": case.size, "implementation": how}], functools.partial(measure, case, how))
                for case in cases for how in reversed(case.implementations) if how != "reference" and (how != "cpu" or jax.default_backend() == "cpu")]

    def error(case, how):
        found = measure_ops.compare(case, how)
        return [lambda: {"error": found}]

    def timed(case, how):
        return [measure_ops.kernel(case, how, limits, repetitions=3, seconds=0.05)]

    context = min(8192, config.max_position_embeddings, max(arguments.contexts))
    measured(arguments, record, points(measure_ops.cases(config, 4, min(context, 1024), experts=min(8, config.num_local_experts)), "check", error))
    for batch in arguments.batches[::2]:  # of all at once, the weights would find no room
        measured(arguments, record, points(measure_ops.cases(config, batch, context if batch <= 16 else min(context, 1024)), "kernel", timed))


def variants(arguments, record) -> None:
    """Time the Hopper kernels by tile, parts of the sum, steps and stages: which plan is best can't be told from the compiled program."""
    config, limits = begin(arguments, record)
    from gptoss_jax.kernels import hopper

    if missing := hopper.device_unmet("expert_matmul"):
        return record(skipped=f"needs {missing}")
    import gpu_variants

    for points in gpu_variants.groups(config, limits):
        measured(arguments, record, points)


def train(arguments, record) -> None:
    """Time a layer's experts as training takes them, by the kernels and by XLA, checked first; then a step of `sft_lora_20b` with four layers."""
    config, limits = begin(arguments, record)
    import gpu_variants
    from gptoss_jax import bench
    from gptoss_jax.inference import measure

    tokens = min(4096, max(arguments.prompts))
    for points in gpu_variants.trained(config, limits, tokens):
        measured(arguments, record, points)
    measure.ceilings, timed = lambda *_: limits, measure.timed

    def timed_alone(*of, **named):
        with alone():
            return timed(*of, **named)

    measure.timed = timed_alone  # the step is compiled beside what other lanes compile
    name = arguments.model if config.hidden_size < 2880 else "four-layer-20b"
    with tempfile.TemporaryDirectory() as folder:
        rows = pathlib.Path(folder) / "rows.jsonl"
        if bench.main(["train", str(ROOT / "configs" / "sft_lora_20b.yaml"), "--random-weights", name, "--json", str(rows), "--steps", "3", "--repetitions", "3",
                       "--data.row_tokens", str(tokens), "--data.batch_size", "1", "--train.microbatches", "1"]):
            return record(what="train", failed="bench train ended with an error, which is above")
        for row in read(rows):
            record(**row)


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
    from gptoss_jax.inference.engine import cache_length
    from gptoss_jax.inference.sampling import Sampling
    from gptoss_jax.kernels import hopper
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
    arranged = any(name.endswith("hopper_words") for name in model.arrays())
    record(what="weights", seconds=time.monotonic() - start, experts="mosaic_gpu" if arranged else "xla")

    def cache(batch, context):
        """Of Hopper's kernel only what it was planned as: it reads no slot that isn't filled."""
        slots = cache_length(context, context)
        if hopper.jax_unmet() or hopper.device_unmet("decode_attention"):
            return slots
        from gptoss_jax.kernels.decode_attention import hopper_kernel

        return hopper_kernel.plan(batch, slots, config.num_key_value_heads)

    def ready(what, batch, *contexts):
        if what == "prefill":
            return [measure.prefill(model, batch, *contexts, limits, repetitions=3)]
        sampling = Sampling(top_p=0.95) if what == "decode sampled" else measure.GREEDY  # of the sampler's three kinds the one that does most
        decode = functools.partial(measure.decode, model, batch, contexts, limits, steps=arguments.steps, repetitions=3, sampling=sampling)
        return traced_as_well(decode, record) if (what, batch, contexts[0]) == traced else decode()

    traced = None if before else next(iter(needs))
    programs = [([dict(zip(POINT, point)) for point in points], functools.partial(ready, *points[0], *(context for *_, context in points[1:])))
                for points in by_program(needs, cache)]
    for start in range(0, len(programs), AT_ONCE):
        measured(arguments, record, programs[start : start + AT_ONCE])
    record(what="memory", **{name: size for name, size in (jax.devices()[0].memory_stats() or {}).items() if "bytes" in name})


def traced_as_well(decode, record) -> list[Callable[[], dict]]:
    """Get measurements ready, the first of which when it is made is made once more with a trace, whose GPU's part is recorded."""
    import jax

    options, traces = jax.profiler.ProfileOptions(), []
    options.python_tracer_level = 0  # which would slow the host
    run, *others = decode(trace=lambda: traces.pop() if traces else contextlib.nullcontext())

    def measured() -> dict:
        found = run()
        try:
            with tempfile.TemporaryDirectory() as folder:
                traces.append(jax.profiler.trace(folder, profiler_options=options))
                run()
                record(what="trace", **gpu_events(folder))
        except Exception as error:  # a profiler that can't run here costs its trace alone
            record(what="trace", failed=f"{type(error).__name__}: {error}"[:300])
        return found

    return [measured, *others]


def gpu_events(folder: str) -> dict:
    """Return the kernels of a trace in the order in which they began: their names, and [name's index, start, duration] of each in us, the last 4,000."""
    import jax

    traces = (jax.profiler.ProfileData.from_file(str(path)) for path in pathlib.Path(folder).rglob("*.xplane.pb"))
    found = sorted((event.start_ns, event.duration_ns, event.name) for trace in traces for plane in trace.planes if plane.name.startswith("/device:GPU")
                   for line in plane.lines if line.name.startswith("Stream") for event in line.events)[-4000:]
    names = sorted({name for *_, name in found})
    return {"names": names, "events": [[names.index(name), round((start - found[0][0]) / 1e3, 2), round(duration / 1e3, 2)] for start, duration, name in found]}


def model_points(arguments, config) -> list[tuple[str, int, int]]:
    """Return (what, batch, context) of all that a model is to be measured at, what matters most first."""
    grid = [(batch, context) for batch in arguments.batches for context in arguments.contexts if context <= config.max_position_embeddings]
    decode = [("decode", *point) for point in sorted(grid, key=lambda point: FIRST.index(point) if point in FIRST else len(FIRST))]
    prefill = [("prefill", 1, min(tokens, config.max_position_embeddings - 1)) for tokens in arguments.prompts]
    return [*decode[:3], *prefill[:2], *(("decode sampled", *point[1:]) for point in decode[:1]), *decode[3:], *prefill[2:]]


def by_program(points: Iterable[tuple[str, int, int]], cache: Callable) -> list[list]:
    """Return points (what, batch, context) in groups that one program measures. cache(batch, context): what decode steps have in common that take as
    long in each other's cache."""
    programs: dict[tuple, list] = {}
    for what, batch, context in points:
        programs.setdefault((what, batch, context if what == "prefill" else cache(batch, context)), []).append((what, batch, context))
    return list(programs.values())


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


SECTIONS = {"ceilings": begin, "check": check, "kernels": kernels, "variants": variants, "train": train, "model": model, "load": load, "torch": torch_ceilings,
            "triton": triton_rival, "transformers": transformers_rival}


def show(rows: list[dict]) -> None:
    """Print what was measured, short, last: the end of an output is what is kept of it."""
    missing, found = collections.Counter(), set()
    for row in rows:
        if row.get("what") in ("decode", "decode sampled", "prefill") and "tokens_per_second" in row:
            found.add((row["model"], *(row[name] for name in POINT)))
            print(f"{row['model']} {row['what']:14} batch {row['batch']:4} context {row['context']:7,}: {row['tokens_per_second']:12,.1f} tokens/s, "
                  f"{row['floor_fraction']:6.1%} of the floor {row['xla_flags']}".rstrip())
        elif row.get("what") == "train" and "seconds" in row:
            print(f"{row['model']} training step of {row['config']}: {row['seconds'] * 1e3:,.1f} ms, {row['floor_fraction']:6.1%} of the floor")
        elif row.get("what") == "trace" and row.get("events"):
            for index, count in collections.Counter(index for index, *_ in row["events"]).most_common(12):
                times = sorted(time for other, _, time in row["events"] if other == index)
                print(f"{row['model']} {row['names'][index][:60]}: {count} x {times[len(times) // 2]:,.1f} us")
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.exit(main())
