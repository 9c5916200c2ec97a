"""Time a checkpoint on the CPU: load, prefill of 512 tokens, decode at 128 and 1,024 tokens of context, batch 8, peak memory.

    taskset -c 0,1 python benchmarks/cpu.py CHECKPOINT [--json FILE] [--repetitions 5] [--brief]

Every rate is the median over repetitions, beside the worst and best; decode times 16 greedy steps after 2 untimed ones. The memory's read
bandwidth is probed right before and after each rate, since it changes on shared machines. --json appends a line with all of it.

    python benchmarks/cpu.py CHECKPOINT --peer COMMAND ... [--repetitions 12]

times decode at both contexts in turn with another engine, so that both see the same machine: COMMAND prints "ready" when it holds its model, then
reads lines, 128 or 1024, decodes likewise and prints tokens/s. While one runs the other is stopped, so that no thread of its waits by spinning.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import signal
import statistics
import subprocess
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

import gptoss_jax
from gptoss_jax import Engine, Sampling
from gptoss_jax.kernels import cpu_library
from gptoss_jax.model.cost import decode_bytes

PREFILL, CONTEXTS, BATCH = 512, (128, 1024), 8
WARM_STEPS, STEPS = 2, 16
GREEDY = Sampling(temperature=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--peer", nargs=argparse.REMAINDER, metavar="COMMAND", help="another engine, see above; the last argument")
    parser.add_argument("--brief", action="store_true", help="load, first token, decode at 128 and peak memory only: for the full-size 20b")
    arguments = parser.parse_args()
    for path in arguments.checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:  # into the page cache
            while file.read(1 << 24):
                pass
    jax.devices()
    start = time.perf_counter()
    model = gptoss_jax.load(arguments.checkpoint)
    jax.block_until_ready(model.weights())
    result = {"load_s": round(time.perf_counter() - start, 2), "peer": "gptoss_jax", "version": gptoss_jax.__version__, "jax": jax.__version__,
              "kernels": "cpu" if cpu_library.available() else "xla", "threads": len(os.sched_getaffinity(0))}
    print(f"load {result['load_s']} s")
    engine = Engine(model, max_context=2048)
    vocabulary, config = model.config.vocab_size, model.config
    start = time.perf_counter()
    first_token(engine, [prompt(16, vocabulary)])
    result["first_token_s"] = round(time.perf_counter() - start + result["load_s"], 2)

    if arguments.peer:
        compare(engine, arguments)
        return

    def rate(name, tokens, seconds, needed=None):
        seconds()
        bandwidth = [read_bandwidth()]
        rates = sorted(tokens / seconds() for _ in range(arguments.repetitions))
        bandwidth.append(read_bandwidth())
        result[name] = {"median": statistics.median(rates), "worst": rates[0], "best": rates[-1], "read_gbs": bandwidth}
        share = f", {needed * result[name]['median'] / 1e9 / statistics.mean(bandwidth):.0%} of the read bandwidth" if needed else ""
        print(f"{name}: {result[name]['median']:.1f} tokens/s ({rates[0]:.1f} to {rates[-1]:.1f}){share}", flush=True)

    if not arguments.brief:
        rate("prefill", PREFILL, lambda: first_token(engine, [prompt(PREFILL, vocabulary)]))
    for context in CONTEXTS[:1] if arguments.brief else CONTEXTS:
        rate(f"decode@{context}", STEPS, lambda: decode(engine, [prompt(context, vocabulary)]), decode_bytes(config, 1, context))
    if not arguments.brief:
        rate(f"batch-{BATCH} decode@{CONTEXTS[0]}", BATCH * STEPS,
             lambda: decode(engine, [prompt(CONTEXTS[0], vocabulary, seed) for seed in range(BATCH)]))
    result["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(f"peak memory {result['peak_rss_mb']} MiB")
    if arguments.json:
        with arguments.json.open("a") as file:
            file.write(json.dumps(result) + "\n")


def compare(engine: Engine, arguments) -> None:
    """Print the rates of decode, ours and the peer's, and the ratios of pairs that ran one right after the other."""
    peer = subprocess.Popen(arguments.peer, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while peer.stdout.readline().strip() != "ready":
        if peer.poll() is not None:
            sys.exit(f"{' '.join(arguments.peer)}: exit code {peer.returncode} before it was ready")

    def other(context: int) -> float:
        peer.send_signal(signal.SIGCONT)
        print(context, file=peer.stdin, flush=True)
        rate = float(peer.stdout.readline())
        peer.send_signal(signal.SIGSTOP)
        return rate

    def ours(context: int) -> float:
        return STEPS / decode(engine, [prompt(context, engine.config.vocab_size)])

    for context in CONTEXTS:
        pairs = []
        for repetition in range(arguments.repetitions + 1):  # the first isn't counted
            order = (ours, other) if repetition % 2 else (other, ours)
            found = {run: run(context) for run in order}
            pairs += [(found[ours], found[other])] * (repetition > 0)
        ratios = sorted(a / b for a, b in pairs)
        print(f"decode@{context}: {statistics.median(a for a, _ in pairs):.1f} tokens/s, the other {statistics.median(b for _, b in pairs):.1f}; "
              f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)
    peer.kill()


def prompt(count: int, vocabulary: int, seed: int = 11) -> list[int]:
    """Return token ids of a linear congruential generator, which other programs can repeat."""
    state, ids = seed, []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        ids.append((state >> 33) % vocabulary)
    return ids


def first_token(engine: Engine, prompts) -> float:
    start = time.perf_counter()
    for _ in engine.stream(prompts, GREEDY, max_new_tokens=1):
        pass
    return time.perf_counter() - start


def decode(engine: Engine, prompts) -> float:
    """Return the seconds of STEPS decode steps. Stop tokens don't stop them."""
    engine.stop_ids = frozenset()
    times = []
    for token in engine.stream(prompts, GREEDY, max_new_tokens=WARM_STEPS + STEPS + 1):
        if token.row == len(prompts) - 1:
            times.append(time.perf_counter())
    return times[-1] - times[WARM_STEPS]


def read_bandwidth() -> float:
    """Return GB/s of reading 1 GiB with a thread a core, the best of 3, probed by a process of its own: its memory isn't ours."""
    return float(subprocess.check_output([sys.executable, "-c", _PROBE]))


_PROBE = """
import concurrent.futures, os, time
import numpy as np
data, threads, seconds = np.ones(1 << 27), len(os.sched_getaffinity(0)), []
with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for _ in range(3):
        start = time.perf_counter()
        list(pool.map(np.max, np.array_split(data, threads)))
        seconds.append(time.perf_counter() - start)
print(data.nbytes / min(seconds) / 1e9)
"""

if __name__ == "__main__":
    main()
