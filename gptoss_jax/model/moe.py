"""Mixture of experts: a router that takes the top few of all experts, and clamped-SwiGLU experts kept in MXFP4."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec as P

from gptoss_jax import sharding
from gptoss_jax.config import GptOssConfig
from gptoss_jax.kernels.expert_matmul import (
    HopperGateUpWeight, HopperWeight, Mxfp4Weight, Router, expert_matmul, expert_mlp, grouping, lean_mlp)
from gptoss_jax.kernels.expert_matmul.reference import swiglu
from gptoss_jax.model.exchange import Exchange
from gptoss_jax.model.linear import Linear


class PackedWeight(nnx.Variable):
    """MXFP4 bytes: not a parameter, so that filters for `nnx.Param` (gradients, optimizers) leave it alone."""


class ExpertLinear(NamedTuple):
    """x [M, in] -> [M, out] by each row's expert: matrix (Mxfp4Weight or [E, in, out]), bias [E, out] and, where there is a low-rank
    adapter, lora_A [E, in, r] and lora_B [E, r, out]; or a PartitionSpec of each."""

    matrix: Mxfp4Weight | jax.Array | P
    bias: jax.Array | P
    lora_A: jax.Array | P | None
    lora_B: jax.Array | P | None

    def __call__(self, x_MI, group_sizes_E):
        y = expert_matmul(x_MI, self.matrix, self.bias, group_sizes_E)
        if self.lora_A is None:
            return y
        none_ER, none_EO = (jnp.zeros(part.shape[::2], part.dtype) for part in (self.lora_A, self.lora_B))
        return y + expert_matmul(expert_matmul(x_MI, self.lora_A, none_ER, group_sizes_E), self.lora_B, none_EO, group_sizes_E)


class Experts(nnx.Module):
    """The matrices of all experts of a layer, packed or dense, under the checkpoint's names, and their adapters if there are some."""

    def __init__(self, config: GptOssConfig, prefix: str, weights: Mapping[str, jax.Array]):
        self.limit, self.alpha = config.swiglu_limit, config.swiglu_alpha
        for name in ("gate_up_proj", "down_proj"):
            if f"{prefix}.{name}" in weights:
                setattr(self, name, nnx.Param(weights[f"{prefix}.{name}"]))
            else:
                for part in ARRANGED if f"{prefix}.{name}_{ARRANGED[0]}" in weights else STORED:
                    setattr(self, f"{name}_{part}", PackedWeight(weights[f"{prefix}.{name}_{part}"]))
            setattr(self, f"{name}_bias", nnx.Param(weights[f"{prefix}.{name}_bias"]))
            for part in ("lora_A", "lora_B"):
                full = f"{prefix}.{name}_{part}"
                setattr(self, f"{name}_{part}", nnx.Param(weights[full]) if full in weights else None)

    def matrix(self, name: str):
        """Return `gate_up_proj` or `down_proj` as the kernels take it: Mxfp4Weight, its arrangement for Hopper, or dense [E, in, out]."""
        if hasattr(self, name):
            return getattr(self, name).get_raw_value()  # abstract weights have no [...]
        kind, parts = (FOR_HOPPER[name], ARRANGED) if hasattr(self, f"{name}_{ARRANGED[0]}") else (Mxfp4Weight, STORED)
        return kind(*(getattr(self, f"{name}_{part}").get_raw_value() for part in parts))

    def linear(self, name: str) -> ExpertLinear:
        """Return `gate_up_proj` or `down_proj` as it is applied."""
        low_rank = (getattr(self, f"{name}_{part}") for part in ("lora_A", "lora_B"))
        return ExpertLinear(self.matrix(name), getattr(self, f"{name}_bias")[...], *(None if part is None else part[...] for part in low_rank))

    def keep(self, name: str, weight) -> None:
        """Keep a packed matrix arranged for Hopper in place of the one as stored."""
        for stored, arranged, array in zip(STORED, ARRANGED, weight, strict=True):
            delattr(self, f"{name}_{stored}")
            setattr(self, f"{name}_{arranged}", PackedWeight(array))


FOR_HOPPER = {"gate_up_proj": HopperGateUpWeight, "down_proj": HopperWeight}
STORED, ARRANGED = ("blocks", "scales"), ("hopper_words", "hopper_scales")


class MoE(nnx.Module):
    """Router and experts of one layer."""

    def __init__(self, config: GptOssConfig, layer: int, weights: Mapping[str, jax.Array]):
        self.config = config
        self.router = Linear(weights, f"model.layers.{layer}.mlp.router")
        self.experts = Experts(config, f"model.layers.{layer}.mlp.experts", weights)

    def route(self, scores_BTE):
        """Take the router's product, float32 without the bias. Return (logits float32 [B, T, E]; chosen experts int32 [B, T, A] by descending logit;
        their weights float32 [B, T, A]). One softmax, over the chosen logits only."""
        logits = scores_BTE + self.router.bias[...].astype(jnp.float32)
        count = self.config.num_experts_per_tok
        by_rank, by_sorting = (functools.partial(f, count=count) for f in (_top_by_rank, _top_by_sorting))
        if math.prod(logits.shape[:-1]) * count > grouping.FEW_ROWS:
            return logits, *by_sorting(logits)
        return logits, *jax.lax.platform_dependent(logits, cuda=by_rank, default=by_sorting)

    def __call__(self, x_BTD, scores_BTE, indices_BTA, weights_BTA, real_BT, mesh, transport="gather", lean=False, early=None):
        """Return the weighted sum of the chosen experts' outputs, [B, T, D], of what `route` took and returned. Tokens that aren't real go to no expert.

        transport: how tokens get to experts on other devices, "gather" or "all_to_all". lean: keep nothing for the backward pass.
        early: what x and scores of a single token are made of, on one device.
        """
        experts = (self.experts.linear("gate_up_proj"), self.experts.linear("down_proj"))
        if real_BT is not None:
            indices_BTA = jnp.where(real_BT[..., None], indices_BTA, self.config.num_local_experts)
        if mesh is None or mesh.size == 1:
            router = Router(scores_BTE, self.router.bias[...], real_BT, np.zeros(1, np.int32), early)
            return self._local(x_BTD, indices_BTA, weights_BTA, *experts, lean, mesh, router).astype(x_BTD.dtype)
        return self._sharded(x_BTD, indices_BTA, weights_BTA, scores_BTE, real_BT, *experts, mesh=mesh, transport=transport, lean=lean)

    def _local(self, x_BTD, indices_BTA, weights_BTA, gate_up: ExpertLinear, down: ExpertLinear, lean: bool, mesh, router: Router | None = None):
        """Compute the experts whose matrices are here, float32 [B, T, D]; an index of E or more is somebody else's and adds nothing.

        router: what the indices come from, with scores [B, T, experts] and real [B, T]; None where they aren't a token's own.
        """
        B, T, D = x_BTD.shape
        rows = x_BTD.reshape(B * T, D), indices_BTA.reshape(B * T, -1), weights_BTA.reshape(B * T, -1)
        limit, alpha = self.experts.limit, self.experts.alpha
        device, adapted = _device(mesh), gate_up.lora_A is not None
        if lean or adapted and device.platform == "gpu":  # where few kernels count for more than what a backward pass computes again
            out_TD = lean_mlp(*rows, tuple(gate_up), tuple(down), limit, alpha, device)
        elif not adapted:
            router = router and router._replace(scores=router.scores.reshape(B * T, -1), real=None if router.real is None else router.real.reshape(B * T))
            out_TD = expert_mlp(*rows, gate_up.matrix, gate_up.bias, down.matrix, down.bias, limit=limit, alpha=alpha, router=router)
        else:
            out_TD = grouping.by_expert(*rows, gate_up.bias.shape[0],
                                        lambda x_MD, group_sizes_E: down(swiglu(gate_up(x_MD, group_sizes_E), limit, alpha), group_sizes_E))
        return out_TD.reshape(B, T, D)

    def _sharded(self, x_BTD, indices_BTA, weights_BTA, scores_BTE, real_BT, gate_up: ExpertLinear, down: ExpertLinear, *, mesh, transport, lean):
        """Expert and tensor parallelism: tokens travel to the devices that hold their experts, and the results back to the tokens.

        With "gather" the devices that share the experts gather all their tokens, and each adds its experts' share to the sum: best where
        there are about as many active experts as devices, or more. With "all_to_all" a token goes only to its experts.
        No token is ever dropped: each device loops over as many rows as the routing gives it.
        """
        rows = sharding.compute_spec(x_BTD.shape, ("batch", "tokens", None), mesh)
        expert, hidden = sharding.partition_spec(("expert", "expert_hidden"), sharding.COMPUTE_RULES, mesh)
        split_rows = expert is not None and expert in ((rows[0],) if isinstance(rows[0], str) else rows[0] or ())

        def compute(x, indices, weights, gate_up, down, router=None):
            if hidden is not None:  # each shard holds part of the sum: the bias belongs to one of them
                down = down._replace(bias=jnp.where(jax.lax.axis_index(hidden) == 0, down.bias, 0))
            out = self._local(x, indices, weights, gate_up, down, lean, mesh, router)
            return out if hidden is None else jax.lax.psum(out, hidden)

        def gather(x, indices, weights, scores, real, bias, gate_up, down):
            first = 0
            if split_rows:
                together = functools.partial(jax.lax.all_gather, axis_name=expert, axis=0, tiled=True)
                x, indices, weights, scores, real = jax.tree.map(together, (x, indices, weights, scores, real))
            if expert is not None:
                local = gate_up.bias.shape[0]
                first = jax.lax.axis_index(expert) * local
                mine = indices - first
                indices = jnp.where((mine >= 0) & (mine < local), mine, local)
            out = compute(x, indices, weights, gate_up, down, Router(scores, bias, real, jnp.full(1, first, jnp.int32)))
            if split_rows:
                out = jax.lax.psum_scatter(out, expert, scatter_dimension=0, tiled=True)
            elif expert is not None:
                out = jax.lax.psum(out, expert)
            return out.astype(x.dtype)

        def all_to_all(x, indices, weights, _, __, ___, gate_up, down):
            A, D = indices.shape[-1], x.shape[-1]
            order_M = jnp.argsort(indices.reshape(-1), stable=True)
            exchange = Exchange(indices.reshape(-1)[order_M], gate_up.bias.shape[0], expert)
            received = exchange.send(x.reshape(-1, D)[order_M // A])
            out = compute(received[None], exchange.local_experts[None, :, None], jnp.ones((1, len(received), 1)), gate_up, down)
            y_MD = exchange.send_back(out[0].astype(x.dtype))[jnp.argsort(order_M, stable=True)]
            return (y_MD.reshape(*indices.shape, D).astype(jnp.float32) * weights[..., None]).sum(axis=2).astype(x.dtype)

        run = jax.shard_map(all_to_all if transport == "all_to_all" and split_rows else gather, mesh=mesh, out_specs=rows, check_vma=False,
                            in_specs=(rows, rows, rows, rows, P(*rows[:2]), P(), _spec(gate_up, expert, None, hidden),
                                      _spec(down, expert, hidden, None)))
        return run(x_BTD, indices_BTA, weights_BTA, scores_BTE, real_BT, self.router.bias[...], gate_up, down)


def _device(mesh) -> jax.Device:
    """Return a mesh's device, this process's if it has any of it, or this process's first."""
    devices = mesh.devices.flat if isinstance(mesh, Mesh) else jax.local_devices()
    return min(devices, key=lambda device: device.process_index != jax.process_index())


def _spec(linear: ExpertLinear, expert, in_axis, out_axis) -> ExpertLinear:
    """Return how a linear map of all experts lies on the mesh."""
    packed = isinstance(linear.matrix, tuple)  # as stored, or arranged for Hopper
    matrix = type(linear.matrix)(*(P(expert, out_axis, in_axis),) * 2) if packed else P(expert, in_axis, out_axis)
    low_rank = (None, None) if linear.lora_A is None else (P(expert, in_axis), P(expert, None, out_axis))
    return ExpertLinear(matrix, P(expert, out_axis), *low_rank)


def _top_by_sorting(logits, *, count: int):
    """Return (experts int32 [..., count] by descending logit, the lower of equals first; their softmax)."""
    chosen, indices = jax.lax.top_k(logits, count)
    return indices, jax.nn.softmax(chosen, axis=-1)


def _top_by_rank(logits, *, count: int):
    """The same in sums and comparisons, which a GPU's compiler fuses into two kernels; a sort is several."""
    expert = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    other, own = logits[..., None, :], logits[..., :, None]
    rank = ((other > own) | (other == own) & (expert[None, :] < expert[:, None])).sum(axis=-1, dtype=jnp.int32)
    place = rank[..., None, :] == jnp.arange(count)[:, None]
    chosen, indices = jnp.where(place, logits[..., None, :], 0).sum(axis=-1), jnp.where(place, expert, 0).sum(axis=-1, dtype=jnp.int32)
    weights = [jnp.exp(chosen[..., i] - chosen[..., 0]) for i in range(count)]
    return indices, jnp.stack(weights, axis=-1) / sum(weights[1:], weights[0])[..., None]
