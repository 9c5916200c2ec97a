"""Compile programs of gpt-oss-120b for an H100 without one and print what they are made of, as JSON.

    JAX_PLATFORMS=cpu python tests/gpu_programs.py [layers ...]

Needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt in JAX's version, nothing else from NVIDIA. With layers, e.g. 36, only the memory of
a decode step and of a prefill chunk with as many layers is printed, at 131,072 tokens of context.
"""

import collections
import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from gptoss_jax.config import PRESETS
from gptoss_jax.inference.engine import Engine
from gptoss_jax.inference.sampling import Sampling, stack
from gptoss_jax.kernels.attention import attention
from gptoss_jax.model import GptOss, make_cache
from gptoss_jax.model.weights import declare

H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 85520809984
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0" }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3" """
CONTEXT = 131_072
NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


def h100():
    return topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices[0]


def abstract(tree, device):
    place = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


class Programs:
    """The engine's programs for `layers` layers of the 120b and one row with a cache of CONTEXT tokens."""

    def __init__(self, layers: int, device):
        self.config = dataclasses.replace(PRESETS["gpt-oss-120b"], num_hidden_layers=layers, layer_types=())
        weights = {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in declare(self.config).items()}
        self.engine = Engine(GptOss(self.config, weights), steps_per_dispatch=8)
        row = jax.ShapeDtypeStruct((1,), jnp.int32)
        cache = jax.eval_shape(lambda: make_cache(self.config, 1, CONTEXT))
        self.cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
        trees = (weights, cache, row, stack([Sampling()])[1], jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.bool))
        self.weights, self.cache, self.row, self.settings, self.scalar, self.open = abstract(trees, device)
        self.device = device

    def decode(self):
        return self.engine._decode.lower(self.weights, self.cache, self.row, self.settings, self.row, kind="plain").compile()

    def decode_many(self):
        arguments = (self.weights, self.cache, (self.row, self.open), self.settings, self.scalar, self.scalar, self.row)
        return self.engine._decode_many.lower(*arguments, kind="plain").compile()

    def prefill(self, tokens: int):
        ids, hidden = jax.ShapeDtypeStruct((1, tokens), jnp.int32), jax.ShapeDtypeStruct((1, self.config.hidden_size), jnp.bfloat16)
        ids, hidden = abstract((ids, hidden), self.device)
        return self.engine._prefill.lower(self.weights, (self.cache, hidden), ids, self.row).compile()


def kernels(text: str) -> collections.Counter:
    """Count the operations of an optimised program that start a kernel, by kind; a loop counts as one, whatever is in it."""
    entry = text[text.index("\nENTRY ") :]
    found = collections.Counter()
    for line in entry[: entry.index("\n}")].splitlines()[2:]:
        operation = re.search(r"[\]})] ([\w-]+)\(", re.sub(r"/\*.*?\*/", "", line))
        target = re.search(r'custom_call_target="([^"]*)"', line)
        if operation and operation.group(1) not in NO_KERNEL:
            found[target.group(1) if target else operation.group(1)] += 1
    return found


def memory(program) -> dict:
    stats = program.memory_analysis()
    return {name: getattr(stats, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")}


def gradient_of_attention(device):
    """Return the compiled gradient of a window layer's attention over a packed row of 8,192 tokens."""
    T, arrays = 8192, ((1, 8192, 64, 64), (1, 8192, 8, 64), (1, 8192, 8, 64), (64,))
    arrays, tag = abstract(([jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in arrays], jax.ShapeDtypeStruct((1, T), jnp.int32)), device)

    def loss(arrays, positions, segments):
        tags = dict(q_positions=positions, k_positions=positions, q_segments=segments, k_segments=segments)
        return attention(*arrays, **tags, window=128, order="aligned").astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss)).lower(arrays, tag, tag).compile()


def main() -> None:
    device, found = h100(), {}
    for layers in map(int, sys.argv[1:]):
        programs = Programs(layers, device)
        found[layers] = {"decode": memory(programs.decode()), "prefill": memory(programs.prefill(2048)), "cache": programs.cache_bytes}
    if not found:
        small, large = Programs(2, device), Programs(4, device)
        decode, many, prefill = small.decode(), small.decode_many(), small.prefill(512)
        more, gradient = large.decode(), gradient_of_attention(device)
        counts = [kernels(program.as_text()) for program in (decode, more)]
        found = {"kernels": counts, "kernels_per_layer": (counts[1].total() - counts[0].total()) / 2, "cache": small.cache_bytes,
                 "decode": memory(decode), "decode_many": memory(many), "prefill": memory(prefill),
                 "prefill_kernels": kernels(prefill.as_text()), "gradient": memory(gradient), "gradient_kernels": kernels(gradient.as_text())}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
