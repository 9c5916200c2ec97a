"""A layer's experts as training takes them on NVIDIA Hopper GPUs: sorted rows in parts by `hopper_stored`'s products, hidden ones computed again backward.

Low-rank adapters have so few columns that x A of all experts at once costs less than each row's own by itself: a row takes its expert's. Their
second factor is a step of the packed product.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptoss_jax.kernels.expert_matmul import grouping, mosaic_gpu
from gptoss_jax.kernels.expert_matmul.hopper_layout import GROUP
from gptoss_jax.kernels.expert_matmul.reference import swiglu

ROWS = 32768  # of a part, at most: what is in memory at once of the rows between a layer's products
_MULTIPLE = 256  # of rows: XLA takes sums over others in parts, for which it copies all that is summed


def unmet(x_TD, weight, bias_EO, a_EIR=None, _=None) -> str | None:
    """Return the requirement that a linear map's arrays don't meet, None if they meet all."""
    if a_EIR is not None and a_EIR.shape[2] > GROUP:
        return f"adapters of a rank of at most {GROUP} (found {a_EIR.shape[2]})"
    return mosaic_gpu.unmet(x_TD, weight, bias_EO)


def forward(x_TD, expert_TA, weight_TA, gate_up, down, limit: float, alpha: float, interpret=None):
    """Same arguments and result as `lean_mlp`, for bfloat16 rows, weights as the checkpoint stores them and adapters of a rank of at most 64."""
    layer = _Layer(x_TD, expert_TA, weight_TA, gate_up, down, limit, alpha, interpret)

    def add(part, out_TD):
        h_SF = layer.hidden(part)[1].astype(x_TD.dtype)
        y_SD = layer.down(h_SF, part.tiles, part.own(_times(h_SF, layer.down.a)))
        return out_TD + part.to_tokens(y_SD, layer.weight_TA)

    return layer.over_parts(add, jnp.zeros(x_TD.shape, jnp.float32))


def backward(residuals, g_TD, limit: float, alpha: float, interpret=None):
    """Return the gradients of `lean_mlp`'s arrays, its first five arguments, which `residuals` are; None of what has none."""
    x_TD, expert_TA, weight_TA, *linears = residuals
    layer, dtype, T = _Layer(*residuals, limit, alpha, interpret), x_TD.dtype, len(x_TD)
    first, second, E = layer.gate_up, layer.down, layer.experts
    g_TD = g_TD.astype(dtype)
    g_low_TER = _times(g_TD, jnp.swapaxes(second.b, 1, 2))
    g_bias_TE = _sum("td,ed->te", g_TD, second.bias.astype(dtype))

    def add(part, sums):
        dx_TD, dweight_TA, to_first_TER, to_second_TER, dbias, db, da = sums
        low_SR, h_SF, swiglu_backward = layer.hidden(part)
        g_low_SR = part.chosen(g_low_TER)
        dh_SF = second.transposed(g_TD[part.token_S], part.tiles, g_low_SR).astype(jnp.float32)  # of y without its row's weight
        dweight_S = (h_SF * dh_SF).sum(axis=1) + part.chosen(g_bias_TE)
        dz_SO = swiglu_backward(dh_SF * part.weight_S[:, None])[0].astype(dtype)
        dlow_SR = part.own(_times(dz_SO, jnp.swapaxes(first.b, 1, 2)))
        h_SF, weight_S1 = h_SF.astype(dtype), part.weight_S[:, None].astype(dtype)
        return (dx_TD + part.to_tokens(first.transposed(dz_SO, part.tiles, dlow_SR), jnp.ones_like(weight_TA)),
                dweight_TA + part.to_choices(dweight_S),
                part.put(to_first_TER, dlow_SR),
                part.put(to_second_TER, part.own(_times(h_SF, second.a)) * weight_S1),
                dbias + _sum("se,so->eo", part.mine_SE.astype(dtype), dz_SO),
                db + _sum("ser,so->ero", part.spread(low_SR), dz_SO),
                da + _sum("sf,ser->efr", h_SF, part.spread(g_low_SR * weight_S1)))

    to_experts = (jnp.zeros((T, E, linear.a.shape[2]), dtype) for linear in (first, second))
    of_rows = (jnp.zeros(array.shape, jnp.float32) for array in (x_TD, weight_TA))
    of_experts = (jnp.zeros(array.shape, jnp.float32) for array in (first.bias, first.b, second.a))
    dx_TD, dweight_TA, to_first_TER, to_second_TER, dbias, db, da = layer.over_parts(add, (*of_rows, *to_experts, *of_experts))
    weight_TE = jnp.where(expert_TA[..., None] == jnp.arange(E), layer.weight_TA[..., None], 0).sum(axis=1).astype(dtype)
    gradients = ((dbias, _sum("td,ter->edr", x_TD, to_first_TER), db),
                 (_sum("te,td->ed", weight_TE, g_TD), da, _sum("ter,td->erd", to_second_TER, g_TD)))
    return dx_TD.astype(dtype), None, dweight_TA.astype(weight_TA.dtype), *(
        (None, *(None if part is None else gradient.astype(part.dtype) for part, gradient in zip(parts, of_parts)))
        for (_, *parts), of_parts in zip(linears, gradients))


class _Part(NamedTuple):
    """Slots of sorted rows, some of them spare, with a row of anybody's: their tokens, experts, weights and tiles.

    slot: of each choice of each token, or past the last where it isn't in this part. mine: which slots are each expert's.
    """

    token_S: jax.Array
    expert_S: jax.Array
    weight_S: jax.Array
    slot_TA: jax.Array
    mine_SE: jax.Array
    tiles: object

    def own(self, y_SER):
        """Return of what was computed for all experts each row's own."""
        return jnp.take_along_axis(y_SER, self.expert_S[:, None, None], axis=1)[:, 0]

    def chosen(self, y_TE):
        """Return each row's own of what was computed for all tokens and experts, [T, E, ...]."""
        return y_TE[self.token_S, self.expert_S]

    def spread(self, y_SR):
        """Return each row in its own expert's place, [S, E, R], zeros in the others'."""
        return jnp.where(self.mine_SE[..., None], y_SR[:, None], 0)

    def put(self, sums_TER, y_SR):
        """Put rows in their tokens' and experts' places."""
        token_S = jnp.where(self.mine_SE.any(axis=1), self.token_S, len(sums_TER))
        return sums_TER.at[token_S, self.expert_S].set(y_SR, mode="drop")

    def to_choices(self, y_S):
        """Return [T, A], zeros where a choice isn't in this part, or somebody else's."""
        return jnp.where(self.mine_SE.any(axis=1), y_S, 0).at[self.slot_TA].get(mode="fill", fill_value=0)

    def to_tokens(self, y_SD, weight_TA):
        """Return the weighted sum over each token's choices, float32 [T, D]."""
        rows = (y_SD.at[slot_T].get(mode="fill", fill_value=0).astype(jnp.float32) for slot_T in self.slot_TA.T)
        return functools.reduce(jnp.add, (row_TD * weight_T[:, None] for row_TD, weight_T in zip(rows, weight_TA.T)))


class _Linear:
    """x W + bias + (x A) B of rows by their experts, of which the caller has x A, and g W^T + (g B^T) A^T, of which it has g B^T."""

    def __init__(self, linear, rows: int, interpret):
        from gptoss_jax.kernels.expert_matmul import hopper_stored

        weight, self.bias, *low_rank = linear
        E, outs, ins = weight.scales.shape
        self._weight = hopper_stored.stored(weight)
        self.a, self.b = (part.astype(jnp.bfloat16) for part in low_rank) if low_rank and low_rank[0] is not None else (
            jnp.zeros((E, ins * 32, 0), jnp.bfloat16), jnp.zeros((E, 0, outs), jnp.bfloat16))

        self._run = hopper_stored.matmul
        self.plans = [mosaic_gpu.interpreted(hopper_stored.plan(rows, self._weight, transposed=transposed), interpret) for transposed in (False, True)]

    def __call__(self, x_SI, tiles, low_SR):
        return self._run(x_SI, self._weight, tiles, self.plans[0], self.bias, _low_rank(low_SR, self.b, 1))

    def transposed(self, g_SO, tiles, low_SR):
        return self._run(g_SO, self._weight, tiles, self.plans[1], None, _low_rank(low_SR, self.a, 2), transposed=True)


def _low_rank(low_SR, factor, dim: int):
    """Return rows and a factor with as many columns, of which `dim` of the factor has R, as the kernel takes; None if there are none."""
    missing = GROUP - low_SR.shape[1]
    return (jnp.pad(low_SR, ((0, 0), (0, missing))), jnp.pad(factor, [(0, missing * (at == dim)) for at in range(3)])) if missing < GROUP else None


class _Layer:
    def __init__(self, x_TD, expert_TA, weight_TA, gate_up, down, limit, alpha, interpret):
        A, self.experts = expert_TA.shape[1], gate_up[1].shape[0]
        self.weight_TA = jnp.where(expert_TA < self.experts, weight_TA, 0)
        slot_TA, slots, self._sizes_E = mosaic_gpu.place(expert_TA, self.experts)
        self._parts = -(-slots // ROWS)
        self._rows = -(-slots // (self._parts * _MULTIPLE)) * _MULTIPLE
        self._slot_TA = jnp.where(expert_TA < self.experts, slot_TA, self._parts * self._rows)
        choice_S = mosaic_gpu.at_slots(self._slot_TA, self._parts * self._rows)
        self._token_S, self._expert_S = choice_S // A, expert_TA.reshape(-1)[choice_S]
        self._is_real_S = self._slot_TA.reshape(-1)[choice_S] == jnp.arange(len(choice_S))
        self._weight_S = self.weight_TA.reshape(-1)[choice_S].astype(jnp.float32)
        self._x_TD, self._swiglu = x_TD, functools.partial(swiglu, limit=limit, alpha=alpha)
        self.gate_up, self.down = (_Linear(linear, self._rows, interpret) for linear in (gate_up, down))
        self._low_TER = _times(x_TD, self.gate_up.a)

    def over_parts(self, add, sums):
        """Return what add(part, sums) makes of sums, part by part, as many as have rows of these experts."""
        if self._parts == 1:
            return add(self._part(0), sums)
        count = -(-self._sizes_E.sum() // self._rows)
        return jax.lax.fori_loop(0, count, lambda index, sums: add(self._part(index), sums), sums)

    def hidden(self, part):
        """Return a part's x A, its h float32 [S, F] and what makes of a gradient of h that of gate and up."""
        low_SR = part.chosen(self._low_TER)
        z_SO = self.gate_up(self._x_TD[part.token_S], part.tiles, low_SR)
        return low_SR, *jax.vjp(self._swiglu, z_SO.astype(jnp.float32))

    def _part(self, index) -> _Part:
        from gptoss_jax.kernels.expert_matmul import hopper_kernel

        start = index * self._rows
        token_S, expert_S, is_real_S, weight_S = (jax.lax.dynamic_slice_in_dim(array, start, self._rows)
                                                  for array in (self._token_S, self._expert_S, self._is_real_S, self._weight_S))
        mine_SE = (expert_S[:, None] == jnp.arange(self.experts)) & is_real_S[:, None]
        ends_E = grouping.ends(self._sizes_E) - start
        sizes_E = jnp.clip(ends_E, 0, self._rows) - jnp.clip(ends_E - self._sizes_E, 0, self._rows)
        slot_TA = self._slot_TA - start
        return _Part(token_S, jnp.minimum(expert_S, self.experts - 1), weight_S,
                     jnp.where(slot_TA < 0, self._rows, slot_TA), mine_SE, hopper_kernel.tiles(sizes_E, self._rows, self.gate_up.plans[0].rows))


def _times(x_SI, a_EIR):
    """Return x A of all experts, [S, E, R] in x's dtype."""
    return _sum("si,eir->ser", x_SI, a_EIR).astype(x_SI.dtype)


def _sum(subscripts, *arrays):
    return jnp.einsum(subscripts, *arrays, preferred_element_type=jnp.float32)
