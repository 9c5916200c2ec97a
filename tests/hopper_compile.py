"""Compile the expert matmul for an H100 and an H200 without either, and print what the compiler made of it, one JSON object a line.

    JAX_PLATFORMS=cpu python3 tests/hopper_compile.py [FOLDER for the dumps]

Needs what `pip install -e .[test-gpu]` adds (about 1.2 GB): the CUDA plugin of the installed jax's version, with none of the libraries that a
program would need to run, the newest ptxas (triton's own is older than the PTX), and triton for its cuobjdump. No driver, no GPU.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

WEIGHTS_PER_HGMMA = 64 * 16 / 128  # of a thread: an instruction multiplies 64 outputs by 16 inputs, and a warpgroup has 128 threads
DEVICE = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 device_vendor: "NVIDIA Corporation" name: "{name}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0" }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}" """
DEVICES = {"NVIDIA H100 80GB HBM3": (3350000000000, 85520809984), "NVIDIA H200": (4800000000000, 151397597184)}
# device, rows (at multiples of 8), experts, outputs, inputs, gate and up
CASES = [
    ("NVIDIA H200", 32, 128, 5760, 2880, True), ("NVIDIA H200", 32, 128, 2880, 2880, False),  # decode, batch 1
    ("NVIDIA H100 80GB HBM3", 65536, 128, 5760, 2880, True), ("NVIDIA H100 80GB HBM3", 65536, 128, 2880, 2880, False),  # prefill, 16k tokens
]


def tool(package, pattern):
    """Return a program that a wheel carries, None if it isn't there."""
    spec = importlib.util.find_spec(package)
    folders = [pathlib.Path(folder) for folder in spec.submodule_search_locations] if spec else []
    return next((path for folder in folders for path in sorted(folder.rglob(pattern))), None)


def missing():
    """Return which of the wheels aren't installed."""
    found = {"jax-cuda13-plugin": importlib.util.find_spec("jax_cuda13_plugin"), "nvidia-cuda-nvcc": tool("nvidia", "bin/ptxas"),
             "triton": tool("triton", "bin/cuobjdump")}
    return [name for name, where in found.items() if where is None]


def main(folder):
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from gptoss_jax.kernels.expert_matmul import HopperGateUpWeight, HopperWeight, hopper_kernel

    for number, (device, rows, experts, outputs, inputs, gated) in enumerate(CASES):
        dump = pathlib.Path(folder) / str(number)
        dump.mkdir(parents=True)
        os.environ.update(MOSAIC_GPU_DUMP_TO=str(dump), MOSAIC_GPU_DUMP_PTX="1")
        bandwidth, memory = DEVICES[device]
        target = DEVICE.format(name=device, bandwidth=bandwidth, memory=memory)
        topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
        mesh = Mesh(np.array(topology.devices), ("x",))
        sharding = NamedSharding(mesh, PartitionSpec())

        def shape(dims, dtype):
            return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

        kind = HopperGateUpWeight if gated else HopperWeight
        groups = (experts, outputs // 64, inputs // 64)
        weight = kind(shape((*groups, 4, 128), jnp.uint32), shape((*groups, 32), jnp.uint32))
        plan = hopper_kernel.plan(rows, weight)
        with jax.set_mesh(mesh):
            jax.jit(lambda x, weight, bias, sizes: hopper_kernel.matmul(
                x, weight, bias, hopper_kernel.tiles(sizes, rows, plan.rows), plan, limit=7.0, alpha=1.702)).lower(
                shape((rows, inputs), jnp.bfloat16), weight, shape((experts, outputs), jnp.bfloat16), shape((experts,), jnp.int32)).compile()
        print(json.dumps({"device": device, "all_rows": rows, "gated": gated, **plan._asdict(), **report(dump)}), flush=True)


def report(dump):
    """Return what ptxas says of the kernel's PTX, and the instructions of its inner loop, the smallest that holds every HGMMA."""
    (ptx,), cubin = dump.glob("*.ptx"), dump / "kernel.cubin"
    said = subprocess.run([tool("nvidia", "bin/ptxas"), "-arch=sm_90a", "-v", ptx, "-o", cubin], capture_output=True, text=True, check=True).stderr
    sass = subprocess.run([tool("triton", "bin/cuobjdump"), "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*?);", sass, re.MULTILINE)
    index = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    multiplies = [i for i, (_, name, _) in enumerate(lines) if name.startswith("HGMMA")]
    jumps = [(index[int(target.group(), 16)], i) for i, (_, name, rest) in enumerate(lines)
             if name.startswith("BRA") and (target := re.search("0x[0-9a-f]+", rest)) and int(target.group(), 16) in index]
    loops = [end - start + 1 for start, end in jumps if multiplies and start <= multiplies[0] and multiplies[-1] <= end]
    return {"registers_each": int(re.search(r"Used (\d+) registers", said).group(1)),
            "spilled_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
            "warned": "warning" in said or "wgmma" in said,  # serialized wgmma, setmaxnreg ignored
             "hgmma": len(multiplies), "loop": min(loops),
            "shared_bytes": max(int(n) for n in re.findall(r"smem_scratch_bytes=(\d+)", "".join(p.read_text() for p in dump.glob("*resources*"))) or [0]),
            "instructions_per_weight": round(min(loops) / (len(multiplies) * WEIGHTS_PER_HGMMA), 2)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1] if len(sys.argv) > 1 else folder)
