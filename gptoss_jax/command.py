"""What every command shares: one clear line and exit code 2 for a user's error, 130 for Ctrl-C, and a progress line on stderr."""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence

GPU_FRACTION = "0.95"  # JAX's own 0.75 would refuse what fits; the rest is for CUDA. As in `devices`


class UsageError(ValueError):
    """A flag or an input of a command that can't be used: names it, the value found and what was expected."""


def run(body: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser,
        argv: Sequence[str] | None = None, *, overrides: bool = False) -> int:
    """Parse `argv`, call `body(arguments)` and return the exit code; adds `--debug` to the parser.

    overrides: `--section.field value` and `--section.field=value` are left to a configuration file's reader, as `arguments.overrides`.
    Our errors are subclasses of ValueError, so these and OSError become one line on stderr and exit code 2, with `--debug` the traceback
    first. A bare ValueError is a bug of ours or of a library: it keeps its traceback. Standard streams that are closed are empty ones.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started this; in this order each gets its own descriptor
            setattr(sys, name, open(os.devnull, mode))
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags = "--help lists the flags" + ", and --section.field value sets a field of a configuration" * overrides
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}; {flags}\n")  # without the usage
    use_gpu_memory()
    words = sys.argv[1:] if argv is None else list(argv)
    if overrides:
        words, found = _split_overrides(words)
        parser.set_defaults(overrides=found)
    try:
        arguments = parser.parse_args(words)
    except SystemExit as stop:  # argparse has printed its help, or the error
        return stop.code or 0
    try:
        return body(arguments) or 0
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has gone: end quietly, at interpreter exit too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        if type(error) is ValueError:
            raise
        if arguments.debug:
            traceback.print_exc()
        print(f"{parser.prog}: error: {_one_line(error)}", file=sys.stderr, flush=True)
        if getattr(error, "ends_process", False):
            os._exit(2)
        return 2


def tell(line: str) -> None:
    """Print a line that is not the result: to stderr."""
    print(line, file=sys.stderr)


def use_gpu_memory() -> None:
    """Let JAX take GPU_FRACTION of a GPU's memory, unless the environment says another; before JAX has looked at it."""
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its older name
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", GPU_FRACTION)


def enable_compilation_cache() -> None:
    """Keep compiled programs in the user's cache directory, so that the next start doesn't compile; JAX's own settings win.

    JAX warns of a damaged one at every start and never writes it again: in our directory all are removed instead, which one line says, as one does
    where there is no room for them.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        directory = pathlib.Path(caches, "gptoss_jax", "xla")
        jax.config.update("jax_compilation_cache_dir", str(directory))
        warnings.showwarning = functools.partial(_show_or_remove, warnings.showwarning, directory)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _show_or_remove(show, directory: pathlib.Path, message, *others, **named) -> None:
    """Show a warning, or where it is of a damaged program in `directory` remove all programs there; once, where they can't be, or none written."""
    if str(message).startswith(writing := "Error writing persistent compilation cache entry"):
        warnings.filterwarnings("ignore", writing)
        print(f"compiled programs in {directory} can't be kept: {str(message).partition(': ')[2]}", file=sys.stderr)
    elif not str(message).startswith("Error reading persistent compilation cache entry"):
        show(message, *others, **named)
    elif programs := list(directory.glob("*-cache")):
        try:
            for path in programs:
                path.unlink(missing_ok=True)
            print(f"compiled programs in {directory} are damaged: removed, to be compiled again", file=sys.stderr)
        except OSError as error:
            print(f"compiled programs in {directory} are damaged, and can't be removed: {error.strerror}", file=sys.stderr)
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")


class Status:
    """One line on stderr that says what is going on: replaced by the next on a terminal, and only there."""

    def __call__(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text} ...", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class Progress:
    """Show bytes and rate on stderr: call it with (done_bytes, total_bytes). A terminal sees it move, a log gets the last line only."""

    def __init__(self, verb: str):
        self._verb, self._start, self._shown = verb, time.monotonic(), 0.0

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        now, last = time.monotonic(), done_bytes >= total_bytes
        if not last and (not sys.stderr.isatty() or now - self._shown < 0.1):
            return
        self._shown = now
        seconds = max(now - self._start, 1e-6)
        unit, size = ("GB", 1e9) if total_bytes >= 1e9 else ("MB", 1e6)
        line = (f"{self._verb} {done_bytes / size:.2f} of {total_bytes / size:.2f} {unit}, {done_bytes / seconds / size:.2f} {unit}/s, "
                f"{seconds:.1f} s")
        start = "\r" if sys.stderr.isatty() else ""
        print(f"{start}{line}", end="\n" if last else "", file=sys.stderr, flush=True)


def _split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (all other words, those of overrides)."""
    others, overrides, lacks_value = [], [], False
    for word in words:
        name, equals, _ = word.partition("=")
        opens = name.startswith("--") and "." in name
        (overrides if opens or lacks_value and not name.startswith("--") else others).append(word)
        lacks_value = opens and not equals
    return others, overrides


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
