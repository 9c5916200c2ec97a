"""Accelerators by name: how much memory they have, compiling for them without having one, and what a compiled program takes of it.

For any jitted function, of arguments that are `jax.ShapeDtypeStruct`s with shardings:

    mesh = sharding.make_mesh(expert=8, devices=devices.described("H100", 8))
    step = devices.compile_step(jitted, *abstract_arguments)     # step.memory.peak_bytes, step.collectives
    print(devices.KINDS["H100"].memory_bytes - step.memory.peak_bytes)

NVIDIA GPUs need the wheels jax-cuda13-plugin and jax-cuda13-pjrt, TPUs libtpu; no device and no driver, but where there is none JAX_PLATFORMS=cpu
in the environment before JAX is imported.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

GIB = 1 << 30
GPU_FRACTION = 0.95  # of a GPU's memory that JAX may take, by XLA_CLIENT_MEM_FRACTION: the rest is CUDA's own


class DeviceError(ValueError):
    """A device kind or number that there isn't, or that can't be compiled for here; says what is missing."""


class PlanError(ValueError):
    """A memory plan that can't be made, or that doesn't fit; names what, the value and what was expected."""


class OutOfMemory(ValueError):
    """A program that its compiler refuses because it needs more memory than the device has. needed_bytes: None where it doesn't say."""

    def __init__(self, message: str, needed_bytes: int | None):
        super().__init__(message)
        self.needed_bytes = needed_bytes

    def temporaries(self, plan: Plan) -> int:
        """Return the bytes, at least, that the program takes beside what the plan keeps: more than is left, as compilers round what they say."""
        return max(self.needed_bytes or 0, plan.memory + 1, plan.kept) - plan.kept


@dataclasses.dataclass(frozen=True)
class DeviceKind:
    """memory_bytes: what programs can use of one device. target: what XLA has to know of a GPU, or the name of a TPU generation."""

    platform: str
    memory_bytes: int
    target: str = ""
    grids: tuple[str, ...] = ()  # of TPU chips, ascending
    devices_per_chip: int = 1

    def devices_in(self, grid: str) -> int:
        return math.prod(map(int, grid.split("x"))) * self.devices_per_chip


def _gpu(name: str, capability: str, memory_bytes: int, *, cores: int, shared: int, fpus: int, l2: int, clock: float, bandwidth: float) -> DeviceKind:
    """Describe a GPU: memory as its driver reports it; the rest steers XLA's choices (openxla/xla `xla/backends/gpu/target_config/specs`)."""
    major, minor = capability.split(".")
    feature = "ACCELERATED_FEATURES" if int(major) >= 9 else "NONE"
    target = f"""gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024}
      core_count: {cores} fpus_per_core: {fpus} registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      memory_bandwidth: {bandwidth:.0f} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory_bytes}
      cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
      device_vendor: "NVIDIA Corporation" name: "{name}"
      driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0" }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}" """
    return DeviceKind("cuda", int(GPU_FRACTION * memory_bytes), target)


_GRIDS_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_GRIDS_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

KINDS: dict[str, DeviceKind] = {
    "A100": _gpu("NVIDIA A100-SXM4-80GB", "8.0", 85_100_068_864, cores=108, shared=167_936, fpus=64, l2=41_943_040, clock=1.41, bandwidth=2.04e12),
    "H100": _gpu("NVIDIA H100 80GB HBM3", "9.0", 84_942_979_072, cores=132, shared=233_472, fpus=128, l2=52_428_800, clock=1.98, bandwidth=3.35e12),
    "H200": _gpu("NVIDIA H200", "9.0", 150_754_820_096, cores=132, shared=233_472, fpus=128, l2=52_428_800, clock=1.98, bandwidth=4.8e12),
    "B200": _gpu("NVIDIA B200", "10.0", 191_514_411_008, cores=148, shared=233_472, fpus=128, l2=132_644_864, clock=1.965, bandwidth=7.67e12),
    # TPUs: the capacity that the compiler itself states when a program is too large.
    "v5e": DeviceKind("tpu", int(15.75 * GIB), "v5e", _GRIDS_2D),
    "v5p": DeviceKind("tpu", int(95.73 * GIB), "v5p", _GRIDS_3D),
    "v6e": DeviceKind("tpu", int(31.24 * GIB), "v6e", _GRIDS_2D),
    "7x": DeviceKind("tpu", int(94.74 * GIB), "tpu7x", _GRIDS_3D, devices_per_chip=2),
    "cpu": DeviceKind("cpu", 0),  # the memory of this host
}
_GPUS_PER_HOST = 8


def kind_named(name: str) -> DeviceKind:
    """Return the device kind. Raises DeviceError naming the nearest for a name that there isn't."""
    if name not in KINDS:
        near = difflib.get_close_matches(name.lower(), [kind.lower() for kind in KINDS], 1)
        hint = next((f"; did you mean {kind}?" for kind in KINDS if [kind.lower()] == near), "")
        raise DeviceError(f"device {name!r}: no such kind, expected one of {', '.join(KINDS)}{hint}")
    kind = KINDS[name]
    return dataclasses.replace(kind, memory_bytes=host_memory_bytes()) if kind.platform == "cpu" else kind


def memory_of_each(name: str, count: int = 1) -> int:
    """Return the memory of each of `count` devices of a kind; those of a CPU share the host's. Raises DeviceError for a number that doesn't come."""
    kind = kind_named(name)
    if kind.platform == "cuda" and count > _GPUS_PER_HOST and count % _GPUS_PER_HOST:
        raise DeviceError(f"{count} x {name}: expected at most {_GPUS_PER_HOST}, or a multiple of the {_GPUS_PER_HOST} of a host")
    if kind.platform == "tpu" and count & (count - 1):
        raise DeviceError(f"{count} x {name}: expected a power of two, as slices have")
    if kind.platform == "tpu" and count > (most := kind.devices_in(kind.grids[-1])):
        raise DeviceError(f"{count} x {name}: expected at most {most}")
    return kind.memory_bytes // (count if kind.platform == "cpu" else 1)


def described(name: str, count: int = 1) -> list[jax.Device]:
    """Return `count` devices of a kind for shardings to name; nothing can be put on them, only compiled for them.

    Raises DeviceError when the compiler's wheels are missing, or for a number of devices that doesn't come.
    """
    from jax.experimental import topologies  # which commands that compile for what is here don't need

    kind = kind_named(name)
    memory_of_each(name, count)
    if kind.platform == "cpu":
        if len(jax.devices("cpu")) < count:
            raise DeviceError(f"device cpu: {len(jax.devices('cpu'))} here, expected {count}; set jax_num_cpu_devices")
        return jax.devices("cpu")[:count]
    if kind.platform == "cuda":
        _require({"jax-cuda13-plugin": "jax_cuda13_plugin", "jax-cuda13-pjrt": "jax_plugins.xla_cuda13"}, name, jax.__version__)
        shape = f"1x{max(count // _GPUS_PER_HOST, 1)}x{min(count, _GPUS_PER_HOST)}"
        topology = topologies.get_topology_desc(platform="cuda", target_config=kind.target, topology=shape)
        return list(topology.devices)
    _require({"libtpu": "libtpu"}, name, None)
    # Asking the network what TPU this machine is, and a lock that keeps a second process from the TPU, aren't needed to compile.
    for setting in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        os.environ.setdefault(setting, "1")
    grid = next(grid for grid in kind.grids if kind.devices_in(grid) >= count)
    return list(topologies.get_topology_desc(f"{kind.target}:{grid}", "tpu").devices)[:count]


def _require(wheels: Mapping[str, str], name: str, version: str | None) -> None:
    absent = [wheel for wheel, module in wheels.items() if not _importable(module)]
    if absent:
        stated = " ".join(f"{wheel}=={version}" if version else wheel for wheel in wheels)
        raise DeviceError(f"device {name}: compiling for it needs {' and '.join(wheels)}, no device and no driver: pip install --no-deps {stated}")


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


class StepMemory(NamedTuple):
    """Bytes of one device while a program runs. outputs: those of their own memory, not in that of donated arguments."""

    arguments_bytes: int
    outputs_bytes: int
    temporaries_bytes: int

    @property
    def peak_bytes(self) -> int:
        return sum(self)


class CompiledStep(NamedTuple):
    """collectives: {kind: (how many instructions, bytes of their results on a device)}; a loop's body counts once."""

    memory: StepMemory
    collectives: dict[str, tuple[int, int]]
    compiled: jax.stages.Compiled


def compile_step(jitted, *arguments, **static) -> CompiledStep:
    """Compile a jitted function for the devices in its abstract arguments' shardings. Raises OutOfMemory where the compiler does (TPU)."""
    return finish(jitted.lower(*arguments, **static))


def finish(lowered: jax.stages.Lowered) -> CompiledStep:
    """Compile what is lowered and return what it takes. Raises OutOfMemory."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = _TOO_LARGE.search(str(error))
        needed = int(float(used[1]) * 1024 ** " KMGT".index(used[2] or " ")) if used else None
        raise OutOfMemory(str(error).splitlines()[0], needed) from None
    found = compiled.memory_analysis()
    memory = StepMemory(found.argument_size_in_bytes, found.output_size_in_bytes - found.alias_size_in_bytes, found.temp_size_in_bytes)
    return CompiledStep(memory, collectives(compiled.as_text()), compiled)


_TOO_LARGE = re.compile(r"(?:Used |\()([\d.]+)([KMGT]?)\)? (?:of|exceeds available HBM)")
_COLLECTIVE = re.compile(r"= (\(.*?\)|\S+) (all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute)(-start)?\((.*)")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


def collectives(optimized_hlo: str) -> dict[str, tuple[int, int]]:
    """Return {kind: (instructions, bytes of their results)} of a compiled program's text."""
    totals, seen = collections.defaultdict(lambda: (0, 0)), set()
    for shape, kind, start, rest in _COLLECTIVE.findall(optimized_hlo):
        if start:  # an asynchronous one holds operands, too: in a tuple of their own, or
            shape = re.sub(r"^\(\(.*?\), ", "", nested := shape)
        sizes = [_itemsize(dtype) * math.prod(int(dim) for dim in dims.split(",") if dim) for dtype, dims in _ARRAY.findall(shape)]
        if start and shape == nested and kind in ("all-gather", "collective-permute"):  # before the results, after which come, maybe, two counters
            sizes = sizes[1:2] if kind == "collective-permute" else sizes[len(sizes) // 2 :]
        if chain := _CHAIN.search(rest):  # a TPU's compiler writes it where it begins, beside what runs meanwhile and where it ends
            if (same := (chain[1], kind, *sizes)) in seen:
                continue
            seen.add(same)
        count, total = totals[kind]
        totals[kind] = (count + 1, total + sum(sizes))
    return dict(totals)


def _itemsize(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return max(int(bits[0]) // 8, 1) if bits else 1  # pred


def usable_bytes(device: jax.Device | None = None) -> int:
    """Return how much memory a device of this process has left for arrays: on CPUs, what the host can spare."""
    device = device or jax.local_devices()[0]
    stats = device.memory_stats()
    if device.platform == "cpu" or not stats or "bytes_limit" not in stats:
        return host_memory_bytes()
    return stats["bytes_limit"] - stats["bytes_in_use"]


def host_memory_bytes() -> int:
    """Return the host memory that is free or can be freed."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of one device. parts: what stays there, by name. temporaries: of each compiled step; empty where nothing was compiled. padding: what
    the device's layouts add to the parts, and small inputs. collectives: of each step, as `collectives`."""

    memory: int
    parts: Mapping[str, int]
    padding: int = 0
    temporaries: Mapping[str, int] = dataclasses.field(default_factory=dict)
    collectives: Mapping[str, Mapping[str, tuple[int, int]]] = dataclasses.field(default_factory=dict)

    @property
    def kept(self) -> int:
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        return self.kept + self.padding + max(self.temporaries.values(), default=0)

    @property
    def left(self) -> int:
        return self.memory - self.needed

    def table(self) -> list[str]:
        """Return the lines to print: bytes of one device."""
        rows = [*self.parts.items()]
        rows += [("padding, small inputs", self.padding)] * (self.padding > 1e6)
        rows += [(f"temporaries of {step}", size) for step, size in self.temporaries.items()] or [("temporaries", None)]
        rows += [("sum, with the largest" if len(self.temporaries) > 1 else "sum", self.needed), ("of", self.memory), ("left", self.left)]
        return [f"  {name:<28}" + (f"{amount(size):>12}" if size is not None else "     unknown: not compiled") for name, size in rows]

    def announce(self, where: str, write: Callable[[str], None]) -> None:
        """Write a line of what the parts will take. Raises PlanError, the table written, where there is less memory."""
        if self.left < 0:
            for line in self.table():
                write(line)
            takes = f"{' and '.join(self.parts)} take{'s' * (len(self.parts) == 1)}"
            raise PlanError(f"{takes} {amount(self.needed)}, more than the {amount(self.memory)} free on {where}")
        parts = ", ".join(f"{name} {amount(size)}" for name, size in self.parts.items())
        write(f"[memory: {parts}, of {amount(self.memory)} free on {where}]")


def amount(size: int) -> str:
    """Spell a number of bytes."""
    unit, name = (1e9, "GB") if abs(size) >= 1e8 else (1e6, "MB")
    return f"{size / unit:,.2f} {name}"


def free_here(sharing: int = 1) -> tuple[int, str]:
    """Return (bytes left for arrays, where): of this process's first device, or of the part of this host that each of `sharing` CPU devices has."""
    device = jax.local_devices()[0]
    return usable_bytes(device) // (sharing if device.platform == "cpu" else 1), "this host" if device.platform == "cpu" else device.device_kind
