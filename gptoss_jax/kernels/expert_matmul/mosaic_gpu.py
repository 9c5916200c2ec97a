"""Experts on NVIDIA Hopper GPUs: what `hopper_kernel` needs, and the ops by its means."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from gptoss_jax.kernels import hopper
from gptoss_jax.kernels.expert_matmul import grouping, hopper_layout
from gptoss_jax.kernels.expert_matmul.hopper_layout import ALIGNMENT, HopperGateUpWeight
from gptoss_jax.kernels.expert_matmul.reference import Mxfp4Weight

_COUNTED = 256  # choices of a block


def unmet(x, weight, bias_EO) -> str | None:
    """Return the requirement that these arguments or this jax don't meet, None if they meet all; of the device, see `hopper.device_unmet`."""
    if requirement := hopper.jax_unmet():
        return requirement
    if not isinstance(weight, hopper_layout.PACKED):
        return f"a packed weight (found a dense one, {weight.dtype})"
    if x.dtype != jnp.bfloat16:
        return f"rows in bfloat16 (found {x.dtype})"
    if bias_EO.dtype not in (jnp.bfloat16, jnp.float32):
        return f"a bias in bfloat16 or float32 (found {bias_EO.dtype})"
    return hopper_layout.unmet(weight) if isinstance(weight, Mxfp4Weight) else None


def expert_matmul(x_MI, weight, bias_EO, group_sizes_E, *, interpret=None):
    """Same signature and result as `reference.expert_matmul`, for bfloat16 rows and a HopperWeight, not differentiable.

    An Mxfp4Weight is rearranged in the program, at every call: right, and slow. interpret: plgpu.InterpretGPUParams.
    """
    if isinstance(weight, HopperGateUpWeight):
        raise ValueError("expert_matmul implementation 'mosaic_gpu' needs a HopperWeight (a HopperGateUpWeight is for expert_mlp)")
    require("expert_matmul", x_MI, weight, bias_EO, interpret)
    return run(x_MI, hopper_layout.pack(weight) if isinstance(weight, Mxfp4Weight) else weight, bias_EO, group_sizes_E, interpret=interpret)


def require(name, x, weight, bias_EO, interpret=None) -> None:
    """Raise ValueError naming what isn't met."""
    if requirement := unmet(x, weight, bias_EO) or (None if interpret else hopper.device_unmet("expert_matmul")):
        raise ValueError(f"{name} implementation 'mosaic_gpu' needs {requirement}")


def run(x_MI, weight, bias_EO, group_sizes_E, *, interpret=None, **constants):
    """Do what `expert_matmul` does, and clamped SwiGLU after it of a HopperGateUpWeight, which is rounded once, without a look at the device.

    constants: SwiGLU's limit and alpha.
    """
    from gptoss_jax.kernels.expert_matmul import hopper_kernel

    if not x_MI.shape[0]:
        return jnp.zeros((0, bias_EO.shape[1] // (2 if isinstance(weight, HopperGateUpWeight) else 1)), x_MI.dtype)
    heights = hopper_kernel.heights(x_MI.shape[0], len(group_sizes_E))
    row_S, slot_M, group_sizes_E = align(group_sizes_E, x_MI.shape[0])
    x_MI = x_MI[row_S]
    plan = interpreted(hopper_kernel.plan(x_MI.shape[0], weight, heights), interpret)
    tiles = hopper_kernel.tiles(group_sizes_E, x_MI.shape[0], plan.rows)
    out = hopper_kernel.matmul(x_MI, weight, bias_EO, tiles, plan, **constants)
    if plan.splits > 1:
        out = out.sum(axis=0).astype(x_MI.dtype)
    return out[slot_M]


def expert_mlp(x_TD, expert_TA, weight_TA, gate_up, gate_up_bias, down, down_bias, router, limit, alpha, interpret=None):
    """Same result as `expert_mlp` of this package, for bfloat16 rows, a HopperGateUpWeight and a HopperWeight; no look at the device.

    Few tokens are routed here, by one kernel, if `router` says from what; the rows of others are put in the order of their experts.
    """
    from gptoss_jax.kernels.expert_matmul import hopper_choosing, hopper_kernel, hopper_one_token, hopper_routing

    (T, A), E = expert_TA.shape, gate_up_bias.shape[0]
    if not T:
        return jnp.zeros(x_TD.shape, jnp.float32)
    all_experts = router.scores.shape[1] if router else E  # of which a mesh has some here
    routed = router is not None and hopper_routing.takes(*router.scores.shape, A)
    lone = routed and T == 1 and router.real is None and router.scores.shape[1] % 8 == 0
    if lone and (plan := hopper_one_token.plan(gate_up, down, A, hopper.processors())):
        x_1D, scores = router.early or (x_TD, router.scores)
        expert_A, weight_A, *begun = hopper_choosing.choose_for_one(scores, router.bias, router.first, count=A, experts=E, interpret=interpret)
        plan = plan._replace(interpret=interpret, blocks=1) if interpret else plan
        y_PAD = hopper_one_token.mlp(x_1D, expert_A, *begun, gate_up, gate_up_bias, down, down_bias, plan, limit=limit, alpha=alpha)
        y_AD = jnp.where(expert_A[:, None] < E, y_PAD.sum(axis=0), 0)
        return functools.reduce(jnp.add, (y_AD[place : place + 1] * weight_A[place] for place in range(A)))
    if routed:
        heights = hopper_routing.heights(T, A, E, all_experts)
        _, weight_AT, slot_AT, token_S, tiles = hopper_routing.route(*router[:4], count=A, experts=E, rows=heights[-1], interpret=interpret)
        _, slots = hopper_routing.most_tiles(T, A, E, heights[-1])
    else:
        slot_TA, slots, group_sizes_E = place(expert_TA, E)
        token_S, weight_AT, slot_AT = at_slots(slot_TA, slots) // A, weight_TA.T, slot_TA.T
        heights = hopper_kernel.heights(-(-T * A * E // all_experts), E)
        tiles = hopper_kernel.tiles(group_sizes_E, slots, heights[-1], nobodys=False)
    if token_S is not None:
        x_SD = x_TD.at[token_S].get(mode="clip")
    else:  # fewer rows than a TMA copy's tile need no padding, as what is past the end is read as zeros
        x_SD = x_TD if T <= ALIGNMENT else jnp.pad(x_TD, ((0, -T % ALIGNMENT), (0, 0)))
    expected = max(ALIGNMENT, slots * E // all_experts)  # of these rows, if tokens choose evenly
    first, second = (interpreted(hopper_kernel.plan(expected, weight, heights), interpret) for weight in (gate_up, down))
    h_SF = hopper_kernel.matmul(x_SD, gate_up, gate_up_bias, tiles, first, slots=slots if token_S is None else None, limit=limit, alpha=alpha)
    y = hopper_kernel.matmul(h_SF, down, down_bias, tiles, second).reshape(second.splits, slots, -1)

    # As one array, which XLA sums while it gathers; of several it writes some first.
    y_ATD = y.at[:, slot_AT].get(mode="clip").astype(jnp.float32).sum(axis=0)
    return jnp.where((slot_AT < slots)[..., None], y_ATD * weight_AT[..., None], 0).sum(axis=0)


def interpreted(plan, interpret):
    """Return a kernel's plan, of a grid of three blocks if it is interpreted."""
    return plan._replace(interpret=interpret, blocks=3) if interpret else plan


def place(expert_TA, experts: int):
    """Give each of the tokens' choices a slot: those of an expert in their order, from a multiple of ALIGNMENT on.

    How many of an expert come before is counted in blocks of choices and over blocks, by sums that XLA fuses; sorting takes it a dozen kernels.
    Returns (slots int32 [T, A], past all others for an expert of `experts` or more, which is somebody else's; how many slots there are; each expert's [E]).
    """
    M, B = expert_TA.size, _COUNTED
    expert_NB = jnp.pad(expert_TA.reshape(-1), (0, -M % B), constant_values=experts).reshape(-1, B)
    count_NE = (expert_NB[:, :, None] == jnp.arange(experts)).sum(axis=1, dtype=jnp.int32)
    room_E = -(-count_NE.sum(axis=0) // ALIGNMENT) * ALIGNMENT
    first_NE = grouping.ends(count_NE) - count_NE + grouping.ends(room_E) - room_E  # of a block, and an expert
    rank_NB = ((expert_NB[:, None] == expert_NB[:, :, None]) & jnp.tri(B, k=-1, dtype=bool)).sum(axis=2, dtype=jnp.int32)
    slot_NB = rank_NB + jnp.take_along_axis(first_NE, expert_NB, axis=1, mode="clip")
    slots = most_slots(M, experts)
    return jnp.where(expert_NB < experts, slot_NB, slots).reshape(-1)[:M].reshape(expert_TA.shape), slots, room_E


def at_slots(slot_TA, slots: int):
    """Return which choice is at each slot, int32 [S]; any at a spare one."""
    choice_M = jnp.arange(slot_TA.size, dtype=jnp.int32)
    return jnp.zeros(slots, jnp.int32).at[slot_TA.reshape(-1)].set(choice_M, mode="drop")


def most_slots(num_rows: int, groups: int) -> int:
    """Return how many slots so many rows can need, where each group's begin at a multiple of ALIGNMENT."""
    return -(-(num_rows + (ALIGNMENT - 1) * min(groups, num_rows)) // ALIGNMENT) * ALIGNMENT


def align(group_sizes_E, num_rows: int):
    """Give every group of rows sorted by expert slots from a multiple of ALIGNMENT on, rows past the groups' sum some of their own.

    Returns (a row for each slot, int32 [S], any where the slot is spare; the slot of each row, int32 [M]; slots of each group).
    """
    E = group_sizes_E.shape[0]
    sizes = jnp.append(group_sizes_E, num_rows - group_sizes_E.sum()).astype(jnp.int32)
    room = -(-sizes // ALIGNMENT) * ALIGNMENT
    row_ends, slot_ends = grouping.ends(sizes), grouping.ends(room)
    shift = slot_ends - room - row_ends + sizes  # of each group

    def group_of(index, ends):
        return jnp.minimum((ends <= index[:, None]).sum(axis=1, dtype=jnp.int32), E)

    row = jnp.arange(num_rows, dtype=jnp.int32)
    slot = jnp.arange(most_slots(num_rows, E + 1), dtype=jnp.int32)
    return jnp.clip(slot - shift[group_of(slot, slot_ends)], 0, num_rows - 1), row + shift[group_of(row, row_ends)], room[:E]
