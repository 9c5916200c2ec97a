"""How weights lie on a GPU while a model runs there: q, k and v as one matrix; for Hopper kernels, packed experts in the order they are read, and
sinks under a name that tells of decode's.

Lossless, both ways: `published` gives every weight as the checkpoint has it, by its name there, so that nothing else has to know.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp

from gptoss_jax.config import GptOssConfig
from gptoss_jax.kernels import hopper
from gptoss_jax.kernels.decode_attention import mosaic_gpu as decode_kernel
from gptoss_jax.kernels.expert_matmul import Mxfp4Weight, mosaic_gpu, pack, say, unpack
from gptoss_jax.model.attention import HOPPER_SINKS, PROJECTIONS, QKV, SINKS, Attention
from gptoss_jax.model.linear import Linear
from gptoss_jax.model.moe import ARRANGED, FOR_HOPPER, STORED, Experts


def arrange(model) -> None:
    """Rearrange a GptOss in place, layer by layer, so that it takes a layer's memory more; does nothing where no GPU holds it.

    Projections become one on a single GPU only. Experts stay as they are, and a line in the log says why, where the Hopper kernel can't run,
    or doesn't compute right on this GPU. Adapters of either keep it as it is. The model may hold jax.ShapeDtypeStructs with shardings.
    """
    gpus = _gpus_of(model.embed_tokens.weight.get_raw_value())
    for layer in model.layers if gpus else ():
        if len(gpus) == 1:
            _arrange_attention(layer.self_attn, gpus[0])
        _arrange_experts(layer.mlp.experts, gpus[0])


def _gpus_of(array) -> list[jax.Device]:
    """Return the GPUs that hold an array, this process's first; none where it lies elsewhere."""
    held = () if array.sharding is None else array.sharding.device_set
    return sorted((device for device in held if device.platform == "gpu"), key=lambda device: device.process_index != jax.process_index())


def _arrange_attention(attention: Attention, device: jax.Device) -> None:
    parts = [getattr(attention, name, None) for name in PROJECTIONS]
    if not any(part is None or part.lora_A is not None for part in parts):
        joined = {}
        for name in ("weight", "bias"):
            arrays = [getattr(part, name).get_raw_value() for part in parts]
            joined[f"{QKV}.{name}"] = _computed(_concatenate, arrays[0].sharding, *arrays)
        setattr(attention, QKV, Linear(joined, QKV))
        for name in PROJECTIONS:
            delattr(attention, name)
    c = attention.config
    heads = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads, c.head_dim
    if (hasattr(attention, QKV) and hasattr(attention, SINKS)
            and not (decode_kernel.unmet_heads(*heads) or hopper.device_unmet("decode_attention", device))):
        setattr(attention, HOPPER_SINKS, getattr(attention, SINKS))
        delattr(attention, SINKS)


def _arrange_experts(experts: Experts, device: jax.Device) -> None:
    if any(getattr(experts, f"{name}_lora_A") is not None for name in FOR_HOPPER):
        return
    matrices = {name: experts.matrix(name) for name in FOR_HOPPER}
    if any(type(weight) is kind for weight, kind in zip(matrices.values(), FOR_HOPPER.values())):
        return
    requirement = next(filter(None, (_unmet(weight, getattr(experts, f"{name}_bias").get_raw_value()) for name, weight in matrices.items())), None)
    requirement = requirement or hopper.device_unmet("expert_matmul", device)
    say(requirement)
    if requirement is None:
        for name in FOR_HOPPER:
            experts.keep(name, _computed(_PACK[name], matrices[name].scales.sharding, matrices.pop(name)))


def _unmet(weight, bias) -> str | None:
    """Return what the kernel lacks for a weight, or for a device's share of it; activations have the bias's dtype."""
    if isinstance(weight, Mxfp4Weight):
        share = Mxfp4Weight(*(jax.ShapeDtypeStruct(part.sharding.shard_shape(part.shape), part.dtype) for part in weight))
        return mosaic_gpu.unmet(bias, share, bias) or mosaic_gpu.unmet(bias, weight, bias)
    return mosaic_gpu.unmet(bias, weight, bias)


def _computed(function: Callable, sharding, *arrays):
    """Return function(*arrays) when it is there; of abstract arrays abstractly."""
    if isinstance(jax.tree.leaves(arrays)[0], jax.ShapeDtypeStruct):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(function, *arrays))
    return jax.block_until_ready(_jitted(function, sharding)(*arrays))  # what it is made of can go, before the next is made


@functools.cache
def _jitted(function: Callable, sharding):
    return jax.jit(function, out_shardings=sharding)


def _concatenate(*arrays):
    return jnp.concatenate(arrays)


_PACK = {name: functools.partial(pack, kind=kind) for name, kind in FOR_HOPPER.items()}


def published(config: GptOssConfig, arrays: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
    """Return the weights by Hugging Face name of a model's arrays: those arrays, or where some are rearranged a mapping that puts back what is
    looked up."""
    words, scales = ARRANGED
    ends = [heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)]
    found: dict[str, Callable] = {}
    for name, array in arrays.items():
        stem = name.removesuffix(f"_{words}")
        if stem != name:
            weight = FOR_HOPPER[stem.rpartition(".")[2]](array, arrays[f"{stem}_{scales}"])
            found |= {f"{stem}_{part}": functools.partial(_stored, weight, index) for index, part in enumerate(STORED)}
        elif f".{QKV}." in name:
            for index, part in enumerate(PROJECTIONS):
                found[name.replace(QKV, part)] = functools.partial(_rows, array, sum(ends[:index]), sum(ends[: index + 1]))
        elif not name.endswith(f"_{scales}"):
            found[name.replace(f".{HOPPER_SINKS}", f".{SINKS}")] = functools.partial(_itself, array)
    return arrays if found.keys() == arrays.keys() else _Published(found)


def exchanged(config: GptOssConfig, arrays: Mapping[str, jax.Array], weights: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return a model's arrays with some weights exchanged by Hugging Face name. Only what is rearranged together with one of them is put back."""
    names, changed = published(config, arrays), {_together(name) for name in weights}
    kept = {name: array for name, array in arrays.items() if _together(name) not in changed}
    return kept | {name: names[name] for name in names if _together(name) in changed and name not in weights} | dict(weights)


def _together(name: str) -> str:
    """Return what a weight shares with those it is rearranged with, before and after."""
    name = re.sub(rf"[.]({'|'.join(PROJECTIONS)})[.].*|[.]{QKV}[.].*", f".{QKV}", name).replace(f".{HOPPER_SINKS}", f".{SINKS}")
    return re.sub(rf"_({'|'.join(ARRANGED + STORED)})$", "", name)


def _stored(weight, index: int):
    return _jitted(unpack, weight.scales.sharding)(weight)[index]


def _rows(array, start: int, stop: int):
    return array[start:stop]


def _itself(array):
    return array


class _Published(Mapping):
    """Weights that are made when they are looked up."""

    def __init__(self, made: Mapping[str, Callable]):
        self._made = made

    def __getitem__(self, name: str) -> jax.Array:
        return self._made[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def __contains__(self, name) -> bool:  # Mapping's own would make the weight
        return name in self._made
