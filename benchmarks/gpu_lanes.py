"""Sections of `gpu.py`, each a process of its own, in lanes that compile beside each other and time in turn; and the file that they write to."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

LANES_FROM, GPU_FRACTION = 120e9, 0.94  # bytes of a GPU's memory that hold three lanes; how much of it they take
NO_TIME, INTERRUPTED = "no time left", "interrupted"
READY, TIMED = "ready to time", "timed"  # what a section says to the process that started it, and waits for its answer
LONGEST = 90  # seconds that a section may time without a word: more than any measurement takes


def lanes(models: list[str], memory: int) -> list[tuple[float, list[tuple[str, str, int]]]]:
    """Return each lane's share of the memory and its sections: (section, model, share of the lane's time; what one leaves goes to those after it).

    Points of the smaller model that don't fit beside the larger one are left to the lane that held that, when it is done.
    """
    large, small = models[0], models[-1]
    rivals, kernels = [("train", small, 3), ("load", small, 1), ("torch", small, 1), ("triton", small, 1)], [("kernels", large, 2), ("variants", large, 1)]
    if memory < LANES_FROM or len(models) < 2:
        return [(GPU_FRACTION, [*(("model", model, 6) for model in models), *rivals, ("transformers", small, 1), *kernels])]
    return [(0.63, [("model", large, 8), ("model", small, 1), ("transformers", small, 1)]), (0.21, [("model", small, 9), *rivals]), (0.1, kernels)]


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
        self.processes, self.interrupted = [], False

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

    def began(self, process: subprocess.Popen) -> None:
        with self.changed:
            self.processes.append(process)
            if self.interrupted:
                process.kill()

    def interrupt(self) -> None:
        """Stop all sections, now and later."""
        with self.changed:
            self.interrupted = True
            for process in self.processes:
                process.kill()


def run_lane(sections, share: float, command: list[str], out: pathlib.Path, end: float, turns: Turns) -> int:
    """Run sections one after another, each a process that says when it is ready to time. Returns how many failed."""
    failed, environment = 0, os.environ | {"XLA_CLIENT_MEM_FRACTION": str(share)}
    environment.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # its older name
    for index, (section, model, weight) in enumerate(sections):
        turns.compile()
        seconds = (end - time.monotonic()) * weight / sum(others for *_, others in sections[index:])
        if seconds < 10 or turns.interrupted:
            write(out, {"section": section, "model": model, "skipped": INTERRUPTED if turns.interrupted else NO_TIME})
            turns.end_compiling()
            continue
        timing, told = False, {READY: turns.time, TIMED: turns.compile_again}
        with subprocess.Popen([*command, "--seconds", str(seconds), "--section", section, "--model", model], text=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, env=environment, start_new_session=True) as process:  # Ctrl-C is for who started it
            turns.began(process)
            watch = threading.Timer(seconds + 10, process.kill)  # it watches the time itself
            watch.start()
            silence = threading.Timer(LONGEST, process.kill)
            for line in process.stdout:
                silence.cancel()
                if (said := line.strip()) in told:
                    told[said]()
                    timing = said == READY
                    with contextlib.suppress(BrokenPipeError):  # killed meanwhile
                        os.write(process.stdin.fileno(), b"\n")
                else:
                    print(line, end="", flush=True)
                if timing:  # a kernel that hangs would cost all lanes this one's time
                    silence = threading.Timer(LONGEST, process.kill)
                    silence.start()
            silence.cancel()
        turns.end_timing() if timing else turns.end_compiling()
        watch.cancel()
        failed += process.returncode != 0
        if process.returncode < 0:
            why = INTERRUPTED if turns.interrupted else f"stopped by signal {-process.returncode} after {seconds + 10:.0f} s or less"
            write(out, {"section": section, "model": model, "skipped": why})
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
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def write(path: pathlib.Path, row: dict) -> None:
    """Append a row to a file of results, and print it, as far as one can read it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row)[:2000], flush=True)
