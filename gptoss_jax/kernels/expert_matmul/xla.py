"""Portable expert matmul: a loop over tiles of rows of one expert, as many as the routing needs, one expert decoded at a time.

Experts without rows cost nothing, and no more than one expert's matrix is ever dequantised. `lax.ragged_dot` isn't used: it computes every
expert for every row on CPU and NVIDIA GPUs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax import mxfp4
from gptoss_jax.kernels.expert_matmul.reference import Mxfp4Weight

_LARGEST_TILE = 512


@jax.custom_vjp
def expert_matmul(x_MI, weight, bias_EO, group_sizes_E):
    """Same signature and result as `reference.expert_matmul`; differentiable in x, bias and a dense weight. Packed weights are constants."""
    tiles = _Tiles(x_MI.shape[0], group_sizes_E)

    def body(tile, out):
        expert, start, mine = tiles.locate(tile)
        y = _dot(_rows(x_MI, start, tiles.rows), _matrix(weight, expert, x_MI.dtype), transpose=isinstance(weight, Mxfp4Weight))
        return _put_rows(out, (y + bias_EO[expert].astype(jnp.float32)).astype(x_MI.dtype), start, mine)

    out = _bits(jnp.zeros((x_MI.shape[0], bias_EO.shape[1]), x_MI.dtype))
    return _numbers(jax.lax.fori_loop(0, tiles.count, body, out) if len(out) else out, x_MI.dtype)


def _forward_rule(x_MI, weight, bias_EO, group_sizes_E):
    return expert_matmul(x_MI, weight, bias_EO, group_sizes_E), (x_MI, weight, bias_EO, group_sizes_E)


def backward(residuals, g_MO):
    """Return the gradients of x, weight, bias and group sizes; residuals: those four arguments, as any implementation got them."""
    x_MI, weight, bias_EO, group_sizes_E = residuals
    packed = isinstance(weight, Mxfp4Weight)
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
    dx, dweight, dbias = jax.lax.fori_loop(0, tiles.count, body, carry)
    dx = _numbers(dx, x_MI.dtype)
    if packed:
        dweight = Mxfp4Weight(*(np.zeros(part.shape, jax.dtypes.float0) for part in weight))
    else:
        dweight = dweight.astype(weight.dtype)
    return dx, dweight, dbias.astype(bias_EO.dtype), np.zeros(group_sizes_E.shape, jax.dtypes.float0)


expert_matmul.defvjp(_forward_rule, backward)


class _Tiles:
    """Cut each expert's rows into tiles of `rows` rows, about one or two tiles an expert when rows are spread evenly."""

    def __init__(self, num_rows: int, group_sizes_E):
        mean = -(-num_rows // group_sizes_E.shape[0])
        self.rows = min(_LARGEST_TILE, 1 << (mean - 1).bit_length(), max(num_rows, 1))
        tiles_E = -(-group_sizes_E // self.rows)
        self._last_tile_E, self._last_row_E = jnp.cumsum(tiles_E), jnp.cumsum(group_sizes_E)
        self._tiles_E, self._sizes_E = tiles_E, group_sizes_E
        self._latest_start, self.count = num_rows - self.rows, self._last_tile_E[-1]

    def locate(self, tile):
        """Return (expert, first row, which of the tile's rows are its own: others' are before it where the array would end, or after it)."""
        expert = jnp.searchsorted(self._last_tile_E, tile, side="right").astype(jnp.int32)
        first = self._last_row_E[expert] - self._sizes_E[expert]
        start = first + (tile - self._last_tile_E[expert] + self._tiles_E[expert]) * self.rows
        row = jnp.minimum(start, self._latest_start) + jnp.arange(self.rows)
        return expert, row[0], (row >= start) & (row < self._last_row_E[expert])


def _matrix(weight, expert, dtype):
    """Return one expert's matrix: [out, in] of a packed weight, [in, out] of a dense one."""
    if isinstance(weight, Mxfp4Weight):
        return mxfp4.decode(weight.blocks[expert], weight.scales[expert], dtype=dtype)
    return weight[expert].astype(dtype)


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
