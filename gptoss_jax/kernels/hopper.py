"""What kernels for Hopper GPUs need of jax and of a device, and how they are checked on it.

Pallas' GPU side isn't in every jax and takes its time to import, so modules that need it are imported where they are used.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import logging
import os
import pathlib
import threading
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from gptoss_jax.kernels.cpu_library import CpuLibraryError, cache_directory

log = logging.getLogger("gptoss_jax")

OLDEST_JAX = (0, 11, 2)
SMS = 132  # multiprocessors of an H100 or H200 (SXM)
_NO_RESULT_AFTER = 30.0  # seconds, of kernels that take milliseconds


class GpuLost(ValueError):
    """A kernel that was tried failed or hangs in a way that leaves the GPU unusable for this process; the next one does without it."""

    ends_process = True  # what waits for the GPU would keep it from ending by itself


_lost: list[GpuLost] = []  # this process's first device


def jax_unmet() -> str | None:
    """Return what this jax lacks for the kernels, None if nothing."""
    return None if jax.__version_info__ >= OLDEST_JAX else f"jax {'.'.join(map(str, OLDEST_JAX))} or newer (found {jax.__version__})"


def is_hopper(device: jax.Device) -> bool:
    return device.platform == "gpu" and str(getattr(device, "compute_capability", "")).startswith("9.")


def device_unmet(op: str, device: jax.Device | None = None, *, training: bool = False) -> str | None:
    """Return what a device lacks for an op's kernels, or for those that only training takes; by default this process's first.

    None for a Hopper GPU that computes right, or one that isn't here to be asked. op: its folder in `kernels`.
    """
    device = device or jax.local_devices()[0]
    if not is_hopper(device):
        return f"a Hopper GPU (found {device.device_kind})"
    return wrong_here(op, training) if device in jax.local_devices() else None


def processors() -> int:
    """Return how many blocks that fill a multiprocessor each run at the same time: here, or where there is no GPU on an SXM board."""
    device = jax.local_devices()[0]
    return min(SMS, getattr(device, "core_count", SMS)) if device.platform == "gpu" else SMS


@functools.cache
def wrong_here(op: str, training: bool) -> str | None:
    """Return what an op's kernels get wrong on the first device, None if nothing: what `disagreement` finds, or remembers. Raises GpuLost."""
    if _lost:  # all else would wait for the GPU
        raise _lost[0]
    with contextlib.suppress(CpuLibraryError):  # no home to remember in
        if os.path.isfile(_mark(op, training)):
            return None
        if os.path.isfile(lost := _mark(op, training, "-lost")):
            return f"a kernel that leaves the GPU usable (found one that didn't; without {lost} it is tried again)"
    return disagreement(op, training)


def disagreement(op: str, training: bool) -> str | None:
    """Look whether an op's kernels compute right on the first device; see the `disagreement` of its `hopper_check`. Raises GpuLost.

    That they did is remembered in the user's cache directory, as looking is mostly compiling, which takes longer than to compile a model's programs;
    so is that the GPU was lost.
    """
    kernels, device = f"the {op} kernels{' of training' * training}", f"this {jax.local_devices()[0].device_kind}"
    log.warning("checking %s on %s, a few seconds", kernels, device)
    check = importlib.import_module(f"gptoss_jax.kernels.{op}.hopper_check")
    found = check.disagreement_of_training() if training else check.disagreement()
    lost = found is not None and not usable()
    with contextlib.suppress(CpuLibraryError, OSError):  # looked at again, next time
        for true, mark in ((found is None, _mark(op, training)), (lost, _mark(op, training, "-lost"))):
            if true:
                mark.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                mark.touch()
            else:
                mark.unlink(missing_ok=True)
    if lost:
        error = GpuLost(f"{kernels} left {device} unusable for this process: they need {found}; started again, it does without them")
        _lost.append(error)
        log.error("%s", error)  # now, as other threads may wait for the GPU before one comes to what this raises
        raise error
    return found


def _mark(op: str, training: bool, lost: str = "") -> pathlib.Path:
    """Return the file that is there once these kernels were right, or lost the GPU; its name says what their code, its compiler and the device follow from."""
    device, folder, driver = jax.local_devices()[0], pathlib.Path(__file__).parent, pathlib.Path("/proc/driver/nvidia/version")
    about = [jax.__version__, device.device_kind, device.client.platform_version]
    about += [os.environ.get(name, "") for name in ("XLA_FLAGS", "CUDA_ROOT", "CUDA_HOME", "CUDA_FORCE_PTX_JIT")]
    about += sorted({f"{found.name} {found.version}" for found in importlib.metadata.distributions() if str(found.name).startswith(("jax", "nvidia-"))})
    sources = [path.read_bytes() for path in (*sorted(folder.rglob("*.py")), folder.parent / "mxfp4.py", *([driver] if driver.exists() else []))]
    key = hashlib.blake2b(b"\0".join([*map(str.encode, about), *sources]), digest_size=16).hexdigest()
    return cache_directory() / f"hopper-{op}{'-training' * training}-{key}{lost}"


def first_disagreement(checks: Sequence[Callable[..., str | None]], interpret) -> str | None:
    """Return the first that check(interpret=interpret) finds, or what it raises, of all checks in order; one without a result ends it.

    In threads, as this may be asked while a program is traced in this one: each in its own, as most of it is compiling, but for interpreted kernels,
    which share what stands for a GPU's memory.
    """
    together = [checks] if interpret else [[check] for check in checks]
    concurrent.futures.wait([_in_thread(lambda: jax.block_until_ready(_one()))])  # what the device was asked before has its own time
    answers = [_in_thread(functools.partial(_first_disagreement, part, interpret)) for part in together]
    concurrent.futures.wait(answers, return_when=concurrent.futures.FIRST_EXCEPTION)
    try:
        return next((found for answer in answers if answer.done() and (found := answer.result())), None)
    except TimeoutError as error:
        return f"a kernel that ends here (found {error})"


def _first_disagreement(checks, interpret):
    try:
        return next((found for check in checks if (found := check(interpret=interpret))), None)
    except TimeoutError:  # others may wait for it
        raise
    except Exception as error:  # whatever a compiler, a driver or an older GPU may raise: the model runs without this kernel
        return f"a kernel that runs here (found {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]})"


def _in_thread(function) -> concurrent.futures.Future:
    """Call a function in a thread that the process doesn't wait for at its end, as one that hangs in a driver never ends."""
    answer = concurrent.futures.Future()

    def run():
        try:
            answer.set_result(function())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer


def usable() -> bool:
    """Return whether the first device still does this process's work."""
    try:
        return _in_thread(lambda: arrived(_one())).result(_NO_RESULT_AFTER) == 1
    except Exception as error:
        return "RESOURCE_EXHAUSTED" in str(error)  # full, but not lost


@jax.jit
def _one():
    return jax.numpy.ones(())


def arrived(results):
    """Return arrays when they have been computed; raises TimeoutError where a GPU takes too long for that."""
    end = time.monotonic() + _NO_RESULT_AFTER
    while jax.default_backend() == "gpu" and not all(array.is_ready() for array in jax.tree.leaves(results)):
        if time.monotonic() > end:
            raise TimeoutError(f"no result after {_NO_RESULT_AFTER:g} s")
        time.sleep(1e-3)
    return jax.block_until_ready(results)


def now(function, *arguments):
    """Return what a function gives on the device, as float32 on the host."""
    return jax.tree.map(lambda x: np.asarray(x, np.float32), arrived(jax.jit(function)(*arguments)))
