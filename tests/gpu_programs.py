"""Compile programs of gpt-oss for an H100 without one and print what they are made of, as JSON.

    JAX_PLATFORMS=cpu python tests/gpu_programs.py [MODEL [LAYERS [BATCH]]]

Needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt in JAX's version, nothing else from NVIDIA. With MODEL, e.g. gpt-oss-120b 36 1, only a decode
step and a prefill chunk of as many layers at 131,072 tokens of context are compiled: what starts kernels, and memory.
"""

import collections
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax import devices
from gptoss_jax.config import PRESETS
from gptoss_jax.inference.engine import Engine
from gptoss_jax.inference.sampling import Sampling, sample, stack
from gptoss_jax.kernels.attention import attention
from gptoss_jax.kernels.expert_matmul import Mxfp4Weight, lean_mlp
from gptoss_jax.model import GptOss, cost

CONTEXT = 131_072
NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


def compiled_steps(model: str, layers: int, batch: int = 1, names=("decode", "prefill"), context: int = CONTEXT) -> dict:
    """Return the engine's programs, arranged as for a Hopper GPU, for some layers of a model and a cache of `context` tokens."""
    config = PRESETS[model].replace(num_hidden_layers=layers, layer_types=())
    weights = cost.abstract_weights(config, device=devices.described("H100")[0])
    lowered = Engine(GptOss(config, weights)).lower(batch, context)
    return {name: lowered[name].compile() for name in names}


def step(text: str) -> str:
    """Return the computation that decodes a token: the body of the one loop, of a dispatch's steps, whose number XLA knows."""
    (name,) = re.findall(r' while\(.*body=%?([\w.-]+).*"known_trip_count":{"n":"4"}', text)
    return text[re.search(rf"^%?{re.escape(name)} .*{{$", text, re.MULTILINE).start() :]


def kernels(text: str) -> collections.Counter:
    """Count the operations of an optimised computation that start a kernel, by kind; a loop counts as one, whatever is in it."""
    found = collections.Counter()
    for line in text[: text.index("\n}")].splitlines()[1:]:
        operation = re.search(r"[\]})] ([\w-]+)\(", re.sub(r"/\*.*?\*/", "", line))
        target = re.search(r'custom_call_target="([^"]*)"', line)
        if operation and operation.group(1) not in NO_KERNEL:
            found[target.group(1) if target else operation.group(1)] += 1
    return found


def memory(program) -> dict:
    stats = program.memory_analysis()
    return {name: getattr(stats, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")}


def gradient_of_attention():
    """Return the compiled gradient of a window layer's attention over a packed row of 8,192 tokens."""
    T, place = 8192, jax.sharding.SingleDeviceSharding(devices.described("H100")[0])
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in ((1, T, 64, 64), (1, T, 8, 64), (1, T, 8, 64), (64,))]
    tag = jax.ShapeDtypeStruct((1, T), jnp.int32, sharding=place)

    def loss(arrays, positions, segments):
        tags = dict(q_positions=positions, k_positions=positions, q_segments=segments, k_segments=segments)
        return attention(*arrays, **tags, window=128, order="aligned").astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss)).lower(arrays, tag, tag).compile()


def trained_experts(tokens=4096):
    """Return the compiled experts of a layer of 20b with adapters of rank 8, forward and backward."""
    config, device = PRESETS["gpt-oss-20b"], devices.described("H100")[0]
    E, A, D, F = config.num_local_experts, config.num_experts_per_tok, config.hidden_size, config.intermediate_size

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))

    def linear(inputs, outputs):
        packed = Mxfp4Weight(array(E, outputs, inputs // 32, 16, dtype=jnp.uint8), array(E, outputs, inputs // 32, dtype=jnp.uint8))
        return packed, array(E, outputs), (array(E, inputs, 8), array(E, 8, outputs))

    def run(x_TD, expert_TA, weight_TA, gate_up, down, g_TD):
        def layer(x_TD, weight_TA, *low_rank):
            return lean_mlp(x_TD, expert_TA, weight_TA, *((*of[:2], *low) for of, low in zip((gate_up, down), low_rank)), 7.0, 1.702, device)

        out, backward = jax.vjp(layer, x_TD, weight_TA, gate_up[2], down[2])
        return out, backward(g_TD)

    return jax.jit(run).lower(array(tokens, D), array(tokens, A, dtype=jnp.int32), array(tokens, A, dtype=jnp.float32), linear(D, 2 * F), linear(F, D),
                              array(tokens, D, dtype=jnp.float32)).compile()


def sampler(settings: Sampling, batch: int):
    """Return the compiled sampler of what serves these settings."""
    config, place = PRESETS["gpt-oss-120b"], jax.sharding.SingleDeviceSharding(devices.described("H100")[0])
    kind, arrays = stack([settings] * batch)
    logits = jax.ShapeDtypeStruct((batch, config.vocab_size), jnp.float32, sharding=place)
    jitted = jax.jit(sample, static_argnames=("kind", "sampleable"))
    return jitted.lower(logits, arrays, np.zeros(batch, np.int32), kind=kind, sampleable=config.vocab_size).compile()


def entry(program) -> collections.Counter:
    text = program.as_text()
    return kernels(text[text.index("\nENTRY ") + 1 :])


def main() -> None:
    if len(sys.argv) > 1:
        model, *numbers = sys.argv[1:]
        programs = compiled_steps(model, *map(int, numbers))
        found = {name: memory(program) for name, program in programs.items()} | {"kernels": kernels(step(programs["decode"].as_text()))}
    else:
        small, deeper = (compiled_steps("gpt-oss-120b", layers) for layers in (2, 4))
        others = (compiled_steps("gpt-oss-120b", layers, 4, ["decode"]) for layers in (2, 4))
        many = (compiled_steps("gpt-oss-20b", layers, 256, ["decode"], 1024) for layers in (2, 4))
        texts = [steps["decode"].as_text() for steps in (small, deeper, *others, *many)]
        counts = [kernels(step(text)) for text in texts]
        one_chunk = compiled_steps("gpt-oss-120b", 2, 1, ["prefill"], 8192)["prefill"]
        gradient, experts = gradient_of_attention(), trained_experts()
        samplers = [sampler(Sampling(temperature=0), 1), sampler(Sampling(), 1), sampler(Sampling(top_p=0.9), 1),
                    *(sampler(Sampling(top_k=1), batch) for batch in (1, 8, 256))]
        found = {"kernels": counts, "sorts": [re.findall(r"\b(?:sort|scatter)\(", text) for text in texts],
                 "kernels_per_layer": (counts[1].total() - counts[0].total()) / 2,
                 "kernels_per_layer_of_4_rows": (counts[3].total() - counts[2].total()) / 2,
                 "kernels_per_layer_of_256_rows": (counts[5].total() - counts[4].total()) / 2,
                 "cache": cost.cache_bytes(PRESETS["gpt-oss-120b"].replace(num_hidden_layers=2, layer_types=()), 1, CONTEXT),
                 "decode": memory(small["decode"]), "prefill": memory(small["prefill"]), "prefill_of_4_layers": memory(deeper["prefill"]),
                 "prefill_kernels": entry(small["prefill"]), "one_chunk": memory(one_chunk), "one_chunk_kernels": entry(one_chunk),
                 "sampler_kernels": [entry(program) for program in samplers], "sampler_of_256_rows": memory(samplers[-1]),
                 "gradient": memory(gradient), "gradient_kernels": entry(gradient),
                 "trained_experts": memory(experts), "trained_experts_kernels": entry(experts)}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
