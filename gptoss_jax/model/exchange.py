"""Rows sent to the devices that hold their experts, and back: the all-to-all transport of expert parallelism, inside `jax.shard_map`.

Each device has room for all rows of all devices, [devices * M], so that none is ever dropped; what is sent are the rows that there are,
where the platform has a ragged all-to-all, and on CPU whole buffers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


class Exchange:
    """Where the rows of this device and of the others go. expert_M: expert of each row, sorted, over the experts of all devices; higher
    numbers are nobody's. local_experts: of what is received, int32 [devices * M], `num_local` where there is no row."""

    def __init__(self, expert_M: jax.Array, num_local: int, axis: str):
        self.axis, self.size, self.rows = axis, jax.lax.axis_size(axis), expert_M.shape[0]
        num_experts = num_local * self.size
        counts = jnp.zeros(num_experts + 1, jnp.int32).at[jnp.minimum(expert_M, num_experts)].add(1)[:num_experts]
        counts_SDE = jax.lax.all_gather(counts.reshape(self.size, num_local), axis)  # from source to destination, of each of its experts
        me = jax.lax.axis_index(axis)
        ends_SE = jnp.cumsum(counts_SDE[:, me], axis=1)
        slots = jnp.arange(self.rows)
        self.local_experts = jax.vmap(lambda ends: jnp.searchsorted(ends, slots, side="right"))(ends_SE).reshape(-1).astype(jnp.int32)
        sizes_SD = counts_SDE.sum(axis=2)
        starts_SD = jnp.cumsum(sizes_SD, axis=1) - sizes_SD  # among the source's sorted rows
        self._sent, self._starts, self._received, self._homes = sizes_SD[me], starts_SD[me], sizes_SD[:, me], starts_SD[:, me]
        self._rooms = jnp.arange(self.size, dtype=jnp.int32) * self.rows  # one for each source
        self._my_room = jnp.broadcast_to(me.astype(jnp.int32) * self.rows, (self.size,))

    def send(self, x_MD: jax.Array) -> jax.Array:
        """Return the rows that this device's experts get, [devices * M, D], a room of M for each source."""

        def padded(x):
            index = self._starts[:, None] + jnp.arange(self.rows)
            rooms = jnp.where((jnp.arange(self.rows) < self._sent[:, None])[..., None], x[jnp.minimum(index, self.rows - 1)], 0)
            return jax.lax.all_to_all(rooms, self.axis, 0, 0).reshape(-1, x.shape[1])

        def ragged(x):
            room = jnp.zeros((self.size * self.rows, x.shape[1]), x.dtype)
            return jax.lax.ragged_all_to_all(x, room, self._starts, self._sent, self._my_room, self._received, axis_name=self.axis)

        return jax.lax.platform_dependent(x_MD, cpu=padded, default=ragged)

    def send_back(self, y_SD: jax.Array) -> jax.Array:
        """Return this device's own rows, [M, D], of what `send` gave to each device; nobody's rows are zero."""

        def padded(y):
            rooms = jax.lax.all_to_all(y.reshape(self.size, self.rows, -1), self.axis, 0, 0)
            slots = jnp.arange(self.rows)
            owner = jnp.minimum(jnp.searchsorted(jnp.cumsum(self._sent), slots, side="right"), self.size - 1)
            return jnp.where((slots < self._sent.sum())[:, None], rooms[owner, slots - self._starts[owner]], 0)

        def ragged(y):
            own = jnp.zeros((self.rows, y.shape[1]), y.dtype)
            return jax.lax.ragged_all_to_all(y, own, self._rooms, self._received, self._homes, self._sent, axis_name=self.axis)

        return jax.lax.platform_dependent(y_SD, cpu=padded, default=ragged)
