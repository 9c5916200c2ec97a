"""Portable expert matmul, and a layer's experts as training takes them: loops over tiles of rows of one expert, as many as the routing needs, one
expert decoded at a time.

Experts without rows cost nothing, and no more than one expert's matrix is ever dequantised. `lax.ragged_dot` isn't used: it computes every
expert for every row on CPU and NVIDIA GPUs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax import mxfp4
from gptoss_jax.kernels.expert_matmul import grouping
from gptoss_jax.kernels.expert_matmul.hopper_layout import PACKED, unpack
from gptoss_jax.kernels.expert_matmul.reference import Mxfp4Weight, swiglu

_LARGEST_TILE = 512


def expert_matmul(x_MI, weight, bias_EO, group_sizes_E):
    """Same signature and result as `reference.expert_matmul`; its gradients are `backward`'s."""
    tiles = _Tiles(x_MI.shape[0], group_sizes_E)

    def body(tile, out):
        expert, start, mine = tiles.locate(tile)
        y = _dot(_rows(x_MI, start, tiles.rows), _matrix(weight, expert, x_MI.dtype), transpose=isinstance(weight, PACKED))
        return _put_rows(out, (y + bias_EO[expert].astype(jnp.float32)).astype(x_MI.dtype), start, mine)

    out = _bits(jnp.zeros((x_MI.shape[0], bias_EO.shape[1]), x_MI.dtype))
    return _numbers(tiles.loop(body, out), x_MI.dtype)


def backward(residuals, g_MO):
    """Return the gradients of x, weight, bias and group sizes; residuals: those four arguments, as any implementation got them."""
    x_MI, weight, bias_EO, group_sizes_E = residuals
    packed = isinstance(weight, PACKED)
    tiles = _Tiles(x_MI.shape[0], group_sizes_E)

    def body(tile, carry):
        dx, dweight, dbias = carry
        expert, start, mine = tiles.locate(tile)
        g_tile = jnp.where(mine[:, None], _rows(g_MO, start, tiles.rows), 0)
        dx = _put_rows(dx, _dot(g_tile, _matrix(weight, expert, x_MI.dtype), transpose=not packed).astype(x_MI.dtype), start, mine)
        dbias = dbias.at[expert].add(g_tile.astype(jnp.float32).sum(axis=0))
        if not packed:
            dweight = dweight.at[expert].add(_dot(_rows(x_MI, start, tiles.rows).T, g_tile, transpose=False))
        return dx, dweight, dbias

    dweight = jnp.zeros(() if packed else weight.shape, jnp.float32)
    carry = _bits(jnp.zeros_like(x_MI)), dweight, jnp.zeros(bias_EO.shape, jnp.float32)
    dx, dweight, dbias = tiles.loop(body, carry)
    dweight = no_gradient(weight) if packed else dweight.astype(weight.dtype)
    return _numbers(dx, x_MI.dtype), dweight, dbias.astype(bias_EO.dtype), no_gradient(group_sizes_E)


def lean_mlp(x_TD, expert_TA, weight_TA, gate_up, down, limit: float, alpha: float):
    """Return what `lean_mlp` of this package does. No array of T * A rows is made, here or in `lean_backward`."""
    routed = _Routed(expert_TA, weight_TA, gate_up[1].shape[0])

    def body(index, out_TD):
        tile = routed.locate(index)
        first, second = (_OneExpert(linear, tile.expert, x_TD.dtype) for linear in (gate_up, down))
        h = swiglu(first(x_TD[tile.token]), limit, alpha)
        return routed.add(out_TD, tile, second((h * tile.weight).astype(x_TD.dtype), tile.weight))

    return routed.tiles.loop(body, jnp.zeros(x_TD.shape, jnp.float32))


def lean_backward(residuals, g_TD, limit: float, alpha: float):
    """Return the gradients of `lean_mlp`'s arrays, its first five arguments, which `residuals` are; None of what has none."""
    x_TD, expert_TA, weight_TA, *linears = residuals
    dtype, routed = x_TD.dtype, _Routed(expert_TA, weight_TA, linears[0][1].shape[0])
    g_TD = g_TD.astype(dtype)

    def body(index, carry):
        dx_TD, dweight_M, *sums = carry
        tile = routed.locate(index)
        first, second = (_OneExpert(linear, tile.expert, dtype) for linear in linears)
        x, g = x_TD[tile.token], g_TD[tile.token]
        h, activation_backward = jax.vjp(lambda y: swiglu(y, limit, alpha), first(x))
        dh, dbias_weight, sums[1] = second.backward((h * tile.weight).astype(dtype), g, sums[1], tile.weight)
        dx, _, sums[0] = first.backward(x, activation_backward(dh * tile.weight)[0].astype(dtype), sums[0])
        dweight = jnp.where(tile.mine, (h * dh).sum(axis=1) + dbias_weight, _rows(dweight_M, tile.start, len(tile.mine)))
        return routed.add(dx_TD, tile, dx), jax.lax.dynamic_update_slice(dweight_M, dweight, (tile.start,)), *sums

    sums = (_OneExpert.zeros(linear) for linear in linears)
    carry = jnp.zeros(x_TD.shape, jnp.float32), jnp.zeros(expert_TA.size, jnp.float32), *sums
    dx_TD, dweight_M, *sums = routed.tiles.loop(body, carry)
    dweight_TA = dweight_M[routed.place_M].reshape(weight_TA.shape).astype(weight_TA.dtype)
    return dx_TD.astype(dtype), None, dweight_TA, *map(_OneExpert.gradients, linears, sums)


class _Tile(NamedTuple):
    """Rows of one expert: `start` of them all, which are its own, their tokens, and the tokens' weights [rows, 1], 0 of others' rows."""

    expert: jax.Array
    start: jax.Array
    mine: jax.Array
    token: jax.Array
    weight: jax.Array


class _Routed:
    """A row for each expert of each token, sorted by expert, in tiles."""

    def __init__(self, expert_TA, weight_TA, experts: int):
        order_M, self.place_M, group_sizes_E = grouping.group(expert_TA.reshape(-1), experts)
        self.tiles = _Tiles(expert_TA.size, group_sizes_E)
        self._token_M, self._weight_M = order_M // expert_TA.shape[1], weight_TA.reshape(-1)[order_M].astype(jnp.float32)

    def locate(self, index) -> _Tile:
        expert, start, mine = self.tiles.locate(index)
        token, weight = (_rows(of_rows, start, self.tiles.rows) for of_rows in (self._token_M, self._weight_M))
        return _Tile(expert, start, mine, token, jnp.where(mine, weight, 0)[:, None])

    def add(self, sums_TD, tile: _Tile, values):
        """Add a tile's rows to their tokens'; others' rows to none, each to another, as unique ones need no atomic additions on GPUs."""
        token = jnp.where(tile.mine, tile.token, len(sums_TD) + jnp.arange(len(tile.mine)))
        return sums_TD.at[token].add(values, mode="drop", unique_indices=True)


class _OneExpert:
    """y = x W + scale * bias + (x A) B of one expert, whose matrix is decoded here; sums and results in float32."""

    def __init__(self, linear, expert, dtype):
        weight, bias_EO, *low_rank = linear
        self.expert, self.packed, self.matrix = expert, isinstance(weight, PACKED), _matrix(weight, expert, dtype)
        self.bias = bias_EO[expert].astype(jnp.float32)
        self.low_rank = [part[expert].astype(dtype) for part in low_rank if part is not None]

    def __call__(self, x, scale=1):
        y = _dot(x, self.matrix, transpose=self.packed) + self.bias * scale
        return y + _dot(self._low(x), self.low_rank[1], transpose=False) if self.low_rank else y

    def _low(self, x):
        return _dot(x, self.low_rank[0], transpose=False).astype(x.dtype)

    def backward(self, x, g, sums, scale=1):
        """Return the gradients of x and of scale, and `sums`, those of all experts' parameters, with this tile's added."""
        dweight, dbias, *dlow_rank = sums
        dx = _dot(g, self.matrix, transpose=not self.packed)
        if not self.packed:
            dweight = dweight.at[self.expert].add(_dot(x.T, g, transpose=False))
        if self.low_rank:
            a, b = self.low_rank
            dlow = _dot(g, b, transpose=True).astype(x.dtype)
            dx += _dot(dlow, a, transpose=True)
            shares = _dot(x.T, dlow, transpose=False), _dot(self._low(x).T, g, transpose=False)
            dlow_rank = [total.at[self.expert].add(share) for total, share in zip(dlow_rank, shares)]
        wide = g.astype(jnp.float32)
        return dx, (wide * self.bias).sum(axis=1), (dweight, dbias.at[self.expert].add((wide * scale).sum(axis=0)), *dlow_rank)

    @staticmethod
    def zeros(linear):
        """Return sums to start from: of a packed weight there is none."""
        return tuple(part if part is None else jnp.zeros(() if isinstance(part, PACKED) else part.shape, jnp.float32) for part in linear)

    @staticmethod
    def gradients(linear, sums):
        parts = zip(linear, sums)
        return tuple(None if part is None or isinstance(part, PACKED) else total.astype(part.dtype) for part, total in parts)


def no_gradient(tree):
    """Return the gradients of what has none."""
    return jax.tree.map(lambda part: np.zeros(part.shape, jax.dtypes.float0), tree)


class _Tiles:
    """Cut each expert's rows into tiles of `rows` rows, about one or two tiles an expert when rows are spread evenly."""

    def __init__(self, num_rows: int, group_sizes_E):
        mean = -(-num_rows // group_sizes_E.shape[0])
        self.rows = min(_LARGEST_TILE, 1 << (mean - 1).bit_length(), max(num_rows, 1))
        tiles_E = -(-group_sizes_E // self.rows)
        self._last_tile_E, self._last_row_E = jnp.cumsum(tiles_E), jnp.cumsum(group_sizes_E)
        self._tiles_E, self._sizes_E = tiles_E, group_sizes_E
        self._latest_start, self.count = num_rows - self.rows, self._last_tile_E[-1]

    def loop(self, body, carry):
        """Return what body(tile, carry) makes of carry, tile by tile; of no rows there is no tile, nor can a loop be made of what would take one."""
        return carry if self._latest_start < 0 else jax.lax.fori_loop(0, self.count, body, carry)

    def locate(self, tile):
        """Return (expert, first row, which of the tile's rows are its own: others' are before it where the array would end, or after it)."""
        expert = jnp.searchsorted(self._last_tile_E, tile, side="right").astype(jnp.int32)
        first = self._last_row_E[expert] - self._sizes_E[expert]
        start = first + (tile - self._last_tile_E[expert] + self._tiles_E[expert]) * self.rows
        row = jnp.minimum(start, self._latest_start) + jnp.arange(self.rows)
        return expert, row[0], (row >= start) & (row < self._last_row_E[expert])


def _matrix(weight, expert, dtype):
    """Return one expert's matrix: [out, in] of a packed weight, [in, out] of a dense one."""
    if not isinstance(weight, PACKED):
        return weight[expert].astype(dtype)
    if not isinstance(weight, Mxfp4Weight):
        weight, expert = unpack(type(weight)(*(part[expert][None] for part in weight))), 0
    return mxfp4.decode(weight.blocks[expert], weight.scales[expert], dtype=dtype)


def _dot(a, b, *, transpose: bool):
    dims = (((1,), (1 if transpose else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32, precision="highest" if a.dtype == jnp.float32 else None)


def _rows(x, start, count):
    return jax.lax.dynamic_slice_in_dim(x, start, count, axis=0)


def _put_rows(out, values, start, mine):
    """Write the rows that are `mine` to `out`, `_bits`: copies of whole arrays, to pad them or to cut them, would be the largest of a training step."""
    values = jnp.where(mine[:, None], _bits(values), _rows(out, start, len(mine)))
    return jax.lax.dynamic_update_slice_in_dim(out, values, start, axis=0)


def _bits(x):
    """Return bfloat16 as integers: on CPUs XLA updates a part of it as float32, and to that end converts all of it, there and back."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _numbers(x, dtype):
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype != dtype else x
