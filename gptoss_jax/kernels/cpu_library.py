"""The CPU kernels' C++ (`cpp/cpu.cc`): built on first use for this very processor, kept in the user's cache directory, called through XLA.

The name of the built file holds a hash of the source, the compiler's version, the interface's version and the processor's features, so a
file never runs where it wasn't built for. It ends with a hash of its own bytes: one that is truncated or foreign is built again. Where there is no
compiler, or it fails, `available` says so once in the log and the XLA implementations serve.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
import threading

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

SOURCE = pathlib.Path(__file__).parent / "cpp" / "cpu.cc"
_PREFIX = "gptoss_jax"  # of the names XLA knows the functions by
_SYMBOLS = {"matmul": "GptossMatmul", "attention": "GptossAttention", "write": "GptossWrite"}
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-DNDEBUG", "-shared", "-fPIC", "-pthread")
_COMPILERS = ("c++", "g++", "clang++")
_DIGEST = 32  # bytes of the hash at the end of a built file
_LOADING = threading.Lock()

log = logging.getLogger("gptoss_jax")


class CpuLibraryError(RuntimeError):
    """The CPU kernels can't be built or loaded here; says why, in the compiler's own words where it has any."""


def available() -> bool:
    """Return whether JAX runs on the CPU and the kernels can be used, building them if need be; if they can't, log the reason once."""
    return jax.default_backend() == "cpu" and _loads()


@functools.cache
def _loads() -> bool:
    try:
        load()
    except CpuLibraryError as error:
        log.warning("CPU kernels not available, using XLA's, which are slower: %s", str(error).splitlines()[0])
        return False
    return True


def load() -> None:
    """Build, load and register the kernels with XLA, once, also where several threads ask. Raises CpuLibraryError."""
    with _LOADING:
        _load()


@functools.cache
def _load() -> None:
    register(_PREFIX, build(cache_directory()))


def register(prefix: str, path: pathlib.Path) -> None:
    """Load a built file and make its functions known to XLA as `prefix`_matmul, `prefix`_attention and `prefix`_write. Raises CpuLibraryError."""
    try:
        library = ctypes.CDLL(str(path))
        for name, symbol in _SYMBOLS.items():
            jax.ffi.register_ffi_target(f"{prefix}_{name}", jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    except (OSError, AttributeError) as error:
        raise CpuLibraryError(f"{path}: {error}") from error


def cache_directory() -> pathlib.Path:
    """Return the folder built files are kept in: `gptoss_jax` in XDG_CACHE_HOME or ~/.cache. Raises CpuLibraryError where there is no home."""
    try:
        return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "gptoss_jax"
    except RuntimeError as error:
        raise CpuLibraryError(f"no place to keep built files: {error} Set HOME or XDG_CACHE_HOME") from error


def build(directory: pathlib.Path, architecture: str | None = None) -> pathlib.Path:
    """Return the built file for this processor in `directory`, compiling it if it isn't there whole.

    architecture: a value of the compiler's -march instead of this processor's own. Raises CpuLibraryError.
    """
    compiler, version = _compiler()
    native = ["-march=native"] if platform.machine() in ("x86_64", "AMD64") else ["-mcpu=native"]
    flags = [*_FLAGS, *([f"-march={architecture}"] if architecture else native)]
    parts = (SOURCE.read_bytes(), version, " ".join(flags), jaxlib.__version__, _processor())
    key = hashlib.blake2b(b"\0".join(part if isinstance(part, bytes) else part.encode() for part in parts), digest_size=16).hexdigest()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / f"cpu-{key}.so"
        if _is_whole(path):
            return path
        handle, name = tempfile.mkstemp(prefix=".building-", suffix=".so", dir=directory)
    except OSError as error:
        raise CpuLibraryError(f"{directory}: no place to keep the built kernels ({error.strerror})") from error
    os.close(handle)
    building = pathlib.Path(name)
    try:
        log.warning("building the CPU kernels with %s, once, a few seconds: %s", compiler, path)
        command = [compiler, *flags, f"-isystem{jax.ffi.include_dir()}", str(SOURCE), "-o", name]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise CpuLibraryError(f"{compiler} failed with exit status {done.returncode} on {SOURCE.name}\n{done.stderr}")
        content = building.read_bytes()
        with building.open("ab") as file:  # after the last section, where the loader doesn't look
            file.write(_digest(content))
        building.chmod(0o700)
        os.replace(name, path)  # whole or not at all: another process may be doing the same
    except OSError as error:
        raise CpuLibraryError(f"{building}: {error}") from error
    finally:
        building.unlink(missing_ok=True)
    return path


def matmul(x_MI, weight, scales, bias_EO, group_sizes_E, dtype):
    """Multiply rows sorted by expert with each expert's weight: the kernels' one call, for CPU arrays, not differentiable.

    x: [M, in] float32 or bfloat16; weight: uint8 [E, out, in / 32, 16] with scales uint8 [E, out, in / 32], or bfloat16 [E, out, in] with
    scales None; bias: [E, out] float32 or bfloat16, or None; group_sizes: int32 [E]. Sums in float32. Returns [M, out] in `dtype`
    (float32 or bfloat16); rows past the groups' sum give zeros. `load` comes first. Raises ValueError for shapes that don't fit together.
    """
    experts, outs, inputs = group_sizes_E.shape[0], weight.shape[1], x_MI.shape[1]
    fits = weight.shape == ((experts, outs, inputs) if scales is None else (experts, outs, inputs // 32, 16)) and (
        scales is None or inputs % 32 == 0 and scales.shape == weight.shape[:3]) and (bias_EO is None or bias_EO.shape == (experts, outs))
    if not fits:
        shapes = [None if part is None else part.shape for part in (x_MI, weight, scales, bias_EO, group_sizes_E)]
        raise ValueError("x {}, weight {}, scales {}, bias {} and group sizes {} don't fit together".format(*shapes))
    scales = jnp.zeros(0, jnp.uint8) if scales is None else scales
    bias_EO = jnp.zeros(0, jnp.float32) if bias_EO is None else bias_EO
    call = _call("matmul", (x_MI.shape[0], weight.shape[1]), dtype)
    return call(x_MI, weight, scales, bias_EO, group_sizes_E, max_threads=_max_threads())


def attention(q_BNH, k_BSKH, v_BSKH, sinks_N, q_positions_B, k_positions_BS, window: int | None):
    """Attend with one query a row: `kernels.attention.reference` for T = 1, for CPU arrays, not differentiable.

    q: [B, N, H]; k, v: [B, S, K, H]; all three float32, or all bfloat16; sinks: float32 [N]; positions: int32 [B] and [B, S]. Scores,
    weights and sums are float32. Returns [B, N, H]. `load` comes first. Raises ValueError for shapes that don't fit together.
    """
    B, N, H = q_BNH.shape
    S, K = k_BSKH.shape[1:3]
    expected = [(B, S, K, H), (B, S, K, H), (N,), (B,), (B, S)]
    shapes = [part.shape for part in (k_BSKH, v_BSKH, sinks_N, q_positions_B, k_positions_BS)]
    if shapes != expected or N % K:
        raise ValueError("q {}: k {}, v {}, sinks {} and positions {}, {} don't fit it".format(q_BNH.shape, *shapes))
    call = _call("attention", q_BNH.shape, q_BNH.dtype)
    return call(q_BNH, k_BSKH, v_BSKH, sinks_N, q_positions_B, k_positions_BS, max_threads=_max_threads(), window=np.int64(window or 0))


def write(old_BSKH, new_BTKH, slots_BT):
    """Return `old` with row t of `new` in slot slots[b, t]; slots out of bounds are left out. In place where `old` isn't needed any more.

    For CPU arrays, not differentiable; slots int32. `load` comes first. Raises ValueError for shapes or dtypes that don't fit together.
    """
    B, S, *rest = old_BSKH.shape
    if new_BTKH.dtype != old_BSKH.dtype or slots_BT.shape[:1] != (B,) or new_BTKH.shape != (*slots_BT.shape, *rest):
        raise ValueError(f"{old_BSKH.dtype} {old_BSKH.shape}: rows {new_BTKH.dtype} {new_BTKH.shape} and slots {slots_BT.shape} don't fit it")
    return _call("write", old_BSKH.shape, old_BSKH.dtype, input_output_aliases={0: 0})(old_BSKH, new_BTKH, slots_BT)


def _call(name: str, shape, dtype, **options):
    return jax.ffi.ffi_call(f"{_PREFIX}_{name}", jax.ShapeDtypeStruct(shape, dtype), vmap_method="sequential", **options)


def _max_threads() -> np.int64:
    """Return the limit that OMP_NUM_THREADS sets, 0 for none: XLA's pool has a thread for each core this process may use."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return np.int64(first) if first.isdigit() else np.int64(0)


def _compiler() -> tuple[str, str]:
    """Return the C++ compiler and what it says of its version. CXX names another than the usual."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else _COMPILERS
    for name in names:
        found = shutil.which(name)
        if found:
            try:
                return found, subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
            except (OSError, subprocess.CalledProcessError) as error:
                raise CpuLibraryError(f"{found} --version: {error}") from error
    raise CpuLibraryError(f"no C++ compiler found (tried {', '.join(names)})")


def _processor() -> str:
    """Return what tells processors with different instructions apart."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.platform()}"
    telling = ("flags", "Features", "vendor_id", "cpu family", "model\t", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(telling)}))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()


def _is_whole(path: pathlib.Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return len(content) > _DIGEST and _digest(content[:-_DIGEST]) == content[-_DIGEST:]
