"""Mixture of experts: a router that takes the top few of all experts, and clamped-SwiGLU experts kept in MXFP4."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from gptoss_jax import sharding
from gptoss_jax.config import GptOssConfig
from gptoss_jax.kernels.expert_matmul import HopperGateUpWeight, HopperWeight, Mxfp4Weight, expert_matmul, expert_swiglu, pack
from gptoss_jax.model.linear import Linear

_FEW_ROWS = 512  # from here on sorting them is cheaper than comparing each with each


class PackedWeight(nnx.Variable):
    """MXFP4 bytes: not a parameter, so that filters for `nnx.Param` (gradients, optimizers) leave it alone."""


class Experts(nnx.Module):
    """The matrices of all experts of a layer, packed or dense, under the checkpoint's names."""

    def __init__(self, config: GptOssConfig, prefix: str, weights: Mapping[str, jax.Array]):
        self.limit, self.alpha = config.swiglu_limit, config.swiglu_alpha
        for name in ("gate_up_proj", "down_proj"):
            if f"{prefix}.{name}" in weights:
                setattr(self, name, nnx.Param(weights[f"{prefix}.{name}"]))
            else:
                setattr(self, f"{name}_blocks", PackedWeight(weights[f"{prefix}.{name}_blocks"]))
                setattr(self, f"{name}_scales", PackedWeight(weights[f"{prefix}.{name}_scales"]))
            setattr(self, f"{name}_bias", nnx.Param(weights[f"{prefix}.{name}_bias"]))

    def matrix(self, name: str):
        """Return `gate_up_proj` or `down_proj` as the kernels take it: Mxfp4Weight, its arrangement for Hopper, or dense [E, in, out]."""
        if hasattr(self, name):
            return getattr(self, name)[...]
        if hasattr(self, f"{name}_words"):
            return _FOR_HOPPER[name](getattr(self, f"{name}_words")[...], getattr(self, f"{name}_scales")[...])
        return Mxfp4Weight(getattr(self, f"{name}_blocks")[...], getattr(self, f"{name}_scales")[...])

    def rearrange_for_hopper(self):
        """Keep packed matrices as the Hopper kernel reads them instead of the checkpoint's arrays: to run on one device, not to save or train.

        Dense ones stay. Raises Mxfp4Error, having changed nothing, where a matrix can't be.
        """
        packed = {name: pack(self.matrix(name), kind) for name, kind in _FOR_HOPPER.items() if hasattr(self, f"{name}_blocks")}
        for name, weight in packed.items():
            delattr(self, f"{name}_blocks")
            setattr(self, f"{name}_words", PackedWeight(weight.words))
            setattr(self, f"{name}_scales", PackedWeight(weight.scales))


_FOR_HOPPER = {"gate_up_proj": HopperGateUpWeight, "down_proj": HopperWeight}


class MoE(nnx.Module):
    """Router and experts of one layer."""

    def __init__(self, config: GptOssConfig, layer: int, weights: Mapping[str, jax.Array]):
        self.config = config
        self.router = Linear(weights, f"model.layers.{layer}.mlp.router")
        self.experts = Experts(config, f"model.layers.{layer}.mlp.experts", weights)

    def route(self, x_BTD, mesh=None):
        """Return (logits float32 [B, T, E], chosen experts int32 [B, T, A] by descending logit, their weights float32 [B, T, A]).

        One softmax, over the chosen logits only.
        """
        logits = self.router(x_BTD, jnp.float32, mesh=mesh)
        count = self.config.num_experts_per_tok
        by_rank, by_sorting = (functools.partial(f, count=count) for f in (_top_by_rank, _top_by_sorting))
        return logits, *jax.lax.platform_dependent(logits, cuda=by_rank, default=by_sorting)

    def __call__(self, x_BTD, indices_BTA, weights_BTA, real_BT, mesh):
        """Return the weighted sum of the chosen experts' outputs, [B, T, D]. Tokens that aren't real go to no expert."""
        experts = self.experts
        matrices = (experts.matrix("gate_up_proj"), experts.gate_up_proj_bias[...], experts.matrix("down_proj"), experts.down_proj_bias[...])
        if real_BT is not None:
            indices_BTA = jnp.where(real_BT[..., None], indices_BTA, self.config.num_local_experts)
        if mesh is None or mesh.size == 1:
            return self._local(x_BTD, indices_BTA, weights_BTA, *matrices)
        return self._sharded(x_BTD, indices_BTA, weights_BTA, *matrices, mesh=mesh)

    def _local(self, x_BTD, indices_BTA, weights_BTA, gate_up, gate_up_bias, down, down_bias):
        """Compute the experts whose matrices are here; an index of E or more is somebody else's and adds nothing."""
        B, T, D = x_BTD.shape
        E, A = gate_up_bias.shape[0], indices_BTA.shape[-1]
        expert_M = indices_BTA.reshape(-1)
        by_sorting = functools.partial(_group_by_sorting, experts=E)
        if B * T * A <= _FEW_ROWS:
            by_comparing = functools.partial(_group_by_comparing, experts=E)
            order_M, back_M, group_sizes = jax.lax.platform_dependent(expert_M, cuda=by_comparing, default=by_sorting)
        else:
            order_M, back_M, group_sizes = by_sorting(expert_M)
        x_MD = jnp.broadcast_to(x_BTD[0], (A, D)) if B * T == 1 else x_BTD.reshape(-1, D)[order_M // A]
        h_MF = expert_swiglu(x_MD, gate_up, gate_up_bias, group_sizes, limit=self.experts.limit, alpha=self.experts.alpha)
        y_MD = expert_matmul(h_MF, down, down_bias, group_sizes)
        y_BTAD = y_MD[back_M].reshape(B, T, A, D).astype(jnp.float32)
        return (y_BTAD * weights_BTA[..., None]).sum(axis=2).astype(x_BTD.dtype)

    def _sharded(self, x_BTD, indices_BTA, weights_BTA, gate_up, gate_up_bias, down, down_bias, *, mesh):
        """Expert and tensor parallelism: every device computes its experts' share for its rows of the batch, then all are summed.

        No token is ever dropped: each device loops over as many rows as the routing gives it.
        """
        spec = sharding.partition_spec(("batch", None, None), sharding.COMPUTE_RULES, mesh)
        if x_BTD.shape[0] % sharding.split_of(spec[0], mesh):
            spec = P(None, None, None)  # a batch that doesn't divide is computed by every device
        weight = sharding.partition_spec(("expert", "expert_hidden"), sharding.COMPUTE_RULES, mesh)
        expert, hidden = weight
        packed = isinstance(gate_up, Mxfp4Weight)
        gate_up_spec = Mxfp4Weight(P(expert, hidden), P(expert, hidden)) if packed else P(expert, None, hidden)
        down_spec = Mxfp4Weight(P(expert, None, hidden), P(expert, None, hidden)) if packed else P(expert, hidden)
        reduced = tuple(axis for axis in (expert, hidden) if axis is not None)

        def body(x, indices, weights, gate_up, gate_up_bias, down, down_bias):
            local = gate_up_bias.shape[0]
            if expert is not None:
                mine = indices - jax.lax.axis_index(expert) * local
                indices = jnp.where((mine >= 0) & (mine < local), mine, local)
            if hidden is not None:  # each shard holds part of the sum: the bias belongs to one of them
                down_bias = jnp.where(jax.lax.axis_index(hidden) == 0, down_bias, 0)
            out = self._local(x, indices, weights, gate_up, gate_up_bias, down, down_bias)
            return jax.lax.psum(out.astype(jnp.float32), reduced).astype(out.dtype) if reduced else out

        run = jax.shard_map(body, mesh=mesh, in_specs=(spec, spec, spec, gate_up_spec, weight, down_spec, P(expert, None)),
                            out_specs=spec, check_vma=False)
        return run(x_BTD, indices_BTA, weights_BTA, gate_up, gate_up_bias, down, down_bias)


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
    chosen, indices = jnp.where(place, logits[..., None, :], 0).sum(axis=-1), jnp.where(place, expert, 0).sum(axis=-1)
    weights = [jnp.exp(chosen[..., i] - chosen[..., 0]) for i in range(count)]
    return indices, jnp.stack(weights, axis=-1) / sum(weights[1:], weights[0])[..., None]


def _group_by_sorting(expert_M, *, experts: int):
    """Return (which row comes where when sorted by expert, where each row comes, rows of each expert)."""
    order_M = jnp.argsort(expert_M, stable=True)
    group_sizes_E = jnp.zeros(experts + 1, jnp.int32).at[jnp.minimum(expert_M, experts)].add(1)[:experts]
    return order_M, jnp.argsort(order_M, stable=True), group_sizes_E


def _group_by_comparing(expert_M, *, experts: int):
    """The same for few rows, by comparing each with each: no sort and no scatter to launch."""
    row_M = jnp.arange(expert_M.shape[0], dtype=jnp.int32)
    earlier = (expert_M[None, :] < expert_M[:, None]) | (expert_M[None, :] == expert_M[:, None]) & (row_M[None, :] < row_M[:, None])
    place_M = earlier.sum(axis=1, dtype=jnp.int32)
    order_M = jnp.where(place_M[None, :] == row_M[:, None], row_M, 0).sum(axis=1, dtype=jnp.int32)
    return order_M, place_M, (expert_M[None, :] == jnp.arange(experts)[:, None]).sum(axis=1, dtype=jnp.int32)
