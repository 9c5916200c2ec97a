"""Compile the Hopper kernels for an H100 and an H200 without either, and print what the compiler made of them, one JSON object a line.

    JAX_PLATFORMS=cpu python3 tests/hopper_compile.py [FOLDER for the dumps]

Needs what `pip install -e .[test-gpu]` adds (about 1.2 GB): the CUDA plugin of the installed jax's version, with none of the libraries that a
program would need to run, the newest ptxas (triton's own is older than the PTX), and triton for its cuobjdump. No driver, no GPU.
"""

import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

WEIGHTS_PER_PRODUCT = 8  # of a thread: 64 outputs by 16 inputs for a warpgroup (HGMMA), 16 by 16 for a warp (HMMA)
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
    ("NVIDIA H200", 32, 128, 2880, 2880, False), ("NVIDIA H200", 128, 128, 5760, 2880, True),  # decode
    ("NVIDIA H100 80GB HBM3", 65536, 128, 5760, 2880, True), ("NVIDIA H100 80GB HBM3", 65536, 128, 2880, 2880, False),  # prefill, 16k tokens
]
# device, experts, width, hidden, processors: a single token's four
LONE_CASES = [("NVIDIA H200", 128, 2880, 2880, 132), ("NVIDIA H100 80GB HBM3", 32, 2880, 2880, 114), ("NVIDIA H100 80GB HBM3", 32, 576, 448, 132)]
# device, rows, experts, outputs, inputs, transposed, adapter: training
STORED_CASES = [("NVIDIA H200", 16640, 32, 5760, 2880, False, True), ("NVIDIA H100 80GB HBM3", 16640, 32, 5760, 2880, True, True),
                ("NVIDIA H100 80GB HBM3", 4096, 128, 2880, 2880, True, False), ("NVIDIA H200", 512, 16, 320, 448, False, False)]
# device, rows, slots, ring; for each 8 key-value heads of 8 queries
DECODE_CASES = [("NVIDIA H200", 1, 131_072, False), ("NVIDIA H200", 1, 128, True), ("NVIDIA H100 80GB HBM3", 64, 8192, False)]
# device, tokens, experts, parts of scores: routing of four experts a token; the experts of a single one
ROUTINGS = [("NVIDIA H200", 1, 128, 120), ("NVIDIA H200", 1, 32, 1), ("NVIDIA H100 80GB HBM3", 4, 32, 0), ("NVIDIA H200", 17, 32, 0),
            ("NVIDIA H100 80GB HBM3", 128, 256, 0), ("NVIDIA H200", 256, 128, 0)]
# device, rows, outputs, inputs, whether they are summed and normed, whether only normed: q, k and v; the attention's output; both routers; the
# output and, of as many experts, the router
PRODUCTS = [("NVIDIA H200", 1, 5120, 2880, False, True, 0), ("NVIDIA H100 80GB HBM3", 8, 2880, 4096, False, False, 0),
            ("NVIDIA H200", 8, 128, 2880, True, True, 0), ("NVIDIA H100 80GB HBM3", 2, 32, 2880, True, True, 0),
            ("NVIDIA H200", 1, 2880, 4096, False, False, 128), ("NVIDIA H100 80GB HBM3", 1, 2880, 4096, False, False, 32),
            ("NVIDIA H100 80GB HBM3", 1, 4096, 2048, False, False, 32)]  # blocks of 32 outputs, for which jax 0.12 finds most layouts to try

# device, width, slots, experts: a lone row's attention, of 8 key-value heads of 8 queries, and its output
BLOCKS = [("NVIDIA H200", 2880, 128, 128), ("NVIDIA H100 80GB HBM3", 2880, 504, 32)]


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
    kinds = (compile_experts, CASES), (compile_lone, LONE_CASES), (compile_stored, STORED_CASES), (compile_decode, DECODE_CASES), \
        (compile_routing, ROUTINGS), (compile_product, PRODUCTS), (compile_block, BLOCKS)
    cases = [(compile_, case) for compile_, cases in kinds for case in cases]
    for number, (compile_, case) in enumerate(cases):
        dump = pathlib.Path(folder) / str(number)
        dump.mkdir(parents=True)
        os.environ.update(MOSAIC_GPU_DUMP_TO=str(dump), MOSAIC_GPU_DUMP_PTX="1")
        facts = compile_(described(case[0]), *case[1:])
        print(json.dumps({"device": case[0], **facts, **report(dump)}), flush=True)


def described(device):
    """Return what makes an array's description on a device that isn't here."""
    import jax
    from jax.experimental import topologies

    bandwidth, memory = DEVICES[device]
    target = DEVICE.format(name=device, bandwidth=bandwidth, memory=memory)
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    return functools.partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(topology.devices[0]))


def compile_experts(shape, rows, experts, outputs, inputs, gated):
    import jax
    import jax.numpy as jnp

    from gptoss_jax.kernels.expert_matmul import HopperGateUpWeight, HopperWeight, hopper_kernel

    own = weight(shape, HopperGateUpWeight if gated else HopperWeight, experts, outputs, inputs)
    plan = hopper_kernel.plan(rows, own, hopper_kernel.heights(rows, experts))

    def run(x, own, bias, sizes):
        return hopper_kernel.matmul(x, own, bias, hopper_kernel.tiles(sizes, rows, plan.rows), plan, limit=7.0, alpha=1.702)

    jax.jit(run).lower(shape((rows, inputs), jnp.bfloat16), own, shape((experts, outputs), jnp.bfloat16), shape((experts,), jnp.int32)).compile()
    return {"op": "experts", "all_rows": rows, "gated": gated, **plan._asdict()}


def compile_lone(shape, experts, width, hidden, processors):
    import jax.numpy as jnp

    from gptoss_jax.kernels.expert_matmul import HopperGateUpWeight, HopperWeight, hopper_one_token

    gate_up, down = weight(shape, HopperGateUpWeight, experts, 2 * hidden, width), weight(shape, HopperWeight, experts, width, hidden)
    plan = hopper_one_token.plan(gate_up, down, 4, processors)
    biases = [shape((experts, outputs), jnp.bfloat16) for outputs in (2 * hidden, width)]
    program = hopper_one_token.mlp.lower(
        shape((1, width), jnp.bfloat16), shape((4,), jnp.int32), shape((1,), jnp.float32), shape((5,), jnp.int32), gate_up, biases[0], down, biases[1], plan,
        limit=7.0, alpha=1.702).compile()
    return {"op": "lone", "experts": experts, "temp": program.memory_analysis().temp_size_in_bytes, **plan._asdict()}


def compile_stored(shape, rows, experts, outputs, inputs, transposed, adapter):
    import jax
    import jax.numpy as jnp

    from gptoss_jax.kernels.expert_matmul import Mxfp4Weight, hopper_kernel, hopper_stored

    own = Mxfp4Weight(shape((experts, outputs, inputs // 32, 16), jnp.uint8), shape((experts, outputs, inputs // 32), jnp.uint8))
    plan = hopper_stored.plan(rows, jax.eval_shape(hopper_stored.stored, own), transposed=transposed)
    width, columns = (outputs, inputs) if transposed else (inputs, outputs)
    low = (shape((rows, 64), jnp.bfloat16), shape((experts, *((columns, 64) if transposed else (64, columns))), jnp.bfloat16)) if adapter else None

    def run(x, own, bias, sizes, low):
        tiles = hopper_kernel.tiles(sizes, rows, plan.rows)
        return hopper_stored.matmul(x, hopper_stored.stored(own), tiles, plan, None if transposed else bias, low, transposed=transposed)

    jax.jit(run).lower(shape((rows, width), jnp.bfloat16), own, shape((experts, outputs), jnp.bfloat16), shape((experts,), jnp.int32), low).compile()
    return {"op": "stored", "all_rows": rows, "transposed": transposed, "adapter": adapter, **plan._asdict()}


def weight(shape, kind, experts, outputs, inputs):
    import jax.numpy as jnp

    groups = (experts, outputs // 64, inputs // 64)
    return kind(shape((*groups, 4, 128), jnp.uint32), shape((*groups, 32), jnp.uint32))


def compile_decode(shape, rows, slots, ring):
    import jax
    import jax.numpy as jnp

    from gptoss_jax.kernels.decode_attention import hopper_kernel

    kv_heads, heads, width = 8, 64, 64
    plan, inputs = hopper_kernel.plan(rows, slots, kv_heads), (heads + 2 * kv_heads) * width
    cache, angles = shape((rows, slots, kv_heads, width), jnp.bfloat16), shape((rows, width // 2), jnp.float32)
    program = jax.jit(lambda *arrays: hopper_kernel.attend(*arrays, plan, ring=ring), donate_argnums=(4, 5)).lower(
        shape((rows, inputs), jnp.float32), shape((inputs,), jnp.bfloat16), angles, angles, cache, cache, shape((kv_heads, 8), jnp.bfloat16),
        shape((rows,), jnp.int32)).compile()
    memory = program.memory_analysis()
    return {"op": "decode_attention", "rows": rows, "slots": slots, "ring": ring, **plan._asdict(), "cache": 4 * rows * slots * kv_heads * width,
            "alias": memory.alias_size_in_bytes, "temp": memory.temp_size_in_bytes}


def compile_routing(shape, tokens, experts, parts):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gptoss_jax.kernels.expert_matmul import hopper_choosing, hopper_routing
    from gptoss_jax.kernels.expert_matmul.reference import FACTORS

    def run(scores, bias):
        first = np.zeros(1, np.int32)
        if parts:
            return hopper_choosing.choose_for_one(scores, bias, first, count=4, experts=experts)
        (*_, rows) = hopper_routing.heights(tokens, 4, experts, experts)
        return hopper_routing.route(scores, bias, None, first, count=4, experts=experts, rows=rows)

    scores = (parts, experts + FACTORS) if parts > 1 else (tokens, experts)
    jax.jit(run).lower(shape(scores, jnp.float32), shape((experts,), jnp.bfloat16)).compile()
    return {"op": "routing", "tokens": tokens, "experts": experts, "parts": parts}


def compile_product(shape, rows, outputs, inputs, summed, normed, experts):
    import jax
    import jax.numpy as jnp

    from gptoss_jax.kernels.decode_matmul import hopper_kernel

    plan, x = hopper_kernel.plan(rows, outputs, inputs, summed, experts), shape((rows, inputs), jnp.bfloat16)
    after = tuple(shape(dims, jnp.bfloat16) for dims in ((1, outputs), (outputs,), (experts, outputs))) if experts else None
    scale, bias = shape((inputs,), jnp.bfloat16) if normed else None, None if normed else shape((outputs,), jnp.bfloat16)
    jax.jit(lambda after, *arrays: hopper_kernel.matmul(*arrays, plan, epsilon=1e-5, dtype=jnp.float32 if normed else jnp.bfloat16, after=after)).lower(
        after, x, x if summed else None, scale, shape((outputs, inputs), jnp.bfloat16), bias).compile()
    return {"op": "product", "normed": normed, "blocks": outputs // plan.outputs, **plan._asdict()}


def compile_block(shape, width, slots, experts):
    import jax.numpy as jnp

    from gptoss_jax.kernels.decode_block import hopper_kernel

    kv_heads, queries, each = 8, 8, 64
    plans, inputs = hopper_kernel.plans(slots, kv_heads, width, kv_heads * queries * each, experts), (queries + 2) * kv_heads * each
    cache, angles, row = (shape(dims, dtype) for dims, dtype in (((1, slots, kv_heads, each), jnp.bfloat16), ((1, each // 2), jnp.float32),
                                                                  ((1, width), jnp.bfloat16)))
    hopper_kernel.attend_and_multiply.lower(
        shape((1, inputs), jnp.float32), shape((inputs,), jnp.bfloat16), angles, angles, cache, cache, shape((kv_heads, queries), jnp.bfloat16),
        shape((1,), jnp.int32), shape((width, kv_heads * queries * each), jnp.bfloat16), shape((width,), jnp.bfloat16), row,
        shape((width,), jnp.bfloat16), shape((experts, width), jnp.bfloat16), shape((1,), jnp.int32), plans=plans, ring=slots == 128, epsilon=1e-5).compile()
    return {"op": "block", "slots": slots, "experts": experts, **{name: plan._asdict() for name, plan in zip(("attention", "output"), plans)}}


def report(dump):
    """Return what ptxas says of the kernel's PTX, and the instructions of its inner loops that multiply: of the longest, and of the costliest."""
    (ptx,), cubin = dump.glob("*.ptx"), dump / "kernel.cubin"
    said = subprocess.run([tool("nvidia", "bin/ptxas"), "-arch=sm_90a", "-v", ptx, "-o", cubin], capture_output=True, text=True, check=True).stderr
    sass = subprocess.run([tool("triton", "bin/cuobjdump"), "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*?);", sass, re.MULTILINE)
    index = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    multiplies = [i for i, (_, name, _) in enumerate(lines) if name.startswith(("HGMMA", "HMMA"))]
    jumps = [(index[int(target.group(), 16)], i) for i, (_, name, rest) in enumerate(lines)
             if name.startswith("BRA") and (target := re.search("0x[0-9a-f]+", rest)) and int(target.group(), 16) in index]
    exits = [i for i, (_, name, _) in enumerate(lines) if name.startswith("EXIT")]  # what is behind them are other waits' repetitions
    loops = {(start, end): sum(start <= i <= end for i in multiplies) for start, end in jumps if not any(start <= i <= end for i in exits)}
    loops = {loop: count for loop, count in loops.items() if count}
    inner = [(end - start + 1, count) for (start, end), count in loops.items()
             if not any(start <= first and last <= end for first, last in loops if (first, last) != (start, end))]
    found = {"registers_each": int(re.search(r"Used (\d+) registers", said).group(1)),
             "spilled_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
             "warned": "warning" in said or "wgmma" in said,  # serialized wgmma, setmaxnreg ignored
             "instructions": len(lines),
             "shared_bytes": max(int(n) for n in re.findall(r"smem_scratch_bytes=(\d+)", "".join(p.read_text() for p in dump.glob("*resources*"))) or [0])}
    if not multiplies:
        return found
    return found | {"products": len(multiplies), "loops": len(inner), "loop": max((length for length, _ in inner), default=0),  # of one tile there is none
                    "instructions_per_weight": round(max((length / (count * WEIGHTS_PER_PRODUCT) for length, count in inner), default=0), 2)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1] if len(sys.argv) > 1 else folder)
