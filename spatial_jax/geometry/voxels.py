# SPDX-License-Identifier: Apache-2.0
"""Points pooled by cubic voxels, in a fixed number of slots.

A voxel's number is round(coordinate / size) along each axis, halves to even.
Occupied voxels take slots in ascending order of (x, y, z). There are
`capacity` slots whatever the points are; unused ones are masked.

Letters: N points, M slots, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spatial_jax.types import Array, Bool, Float, Int


class Voxels(NamedTuple):
  """Where each point goes: `assign` makes it, `pool` reads it."""

  slot: Int[Array, " N"]  # M for points without one
  count: Int[Array, ""]  # occupied voxels, before any had to be left out


def assign(
  points: Float[Array, "N 3"],
  size: float,
  capacity: int,
  mask: Bool[Array, " N"] | None = None,
  key: Array | None = None,
) -> Voxels:
  """Slots of the voxels that points lie in. Use `jax.vmap` for several sets.

  When more voxels are occupied than there are slots, evenly spaced ones (in
  ascending order) are kept, the same ones each time. With a `key` it is a
  random choice in random order instead.

  Args:
    points: finite where valid. Quotients of bfloat16 ones are rounded to it.
    size: edge of a voxel, in the points' unit.
    mask: True for points that count; all by default.
    key: of `jax.random`.
  """
  N, M = points.shape[0], capacity
  if N * M >= 2**31:
    raise ValueError(f"{N} points and {M} slots exceed 32-bit products")
  points = jax.lax.stop_gradient(points)
  if mask is None:
    mask = jnp.ones(N, bool)
  cell = points.astype(jnp.float32) / size
  if points.dtype == jnp.bfloat16:
    cell = jax.lax.reduce_precision(cell, 8, 7)
  cell = jnp.round(cell).astype(jnp.int32)
  keys = (~mask, cell[:, 0], cell[:, 1], cell[:, 2])
  # Three keys rather than one product of them: no extent can overflow.
  *ordered, order = jax.lax.sort((*keys, jnp.arange(N)), num_keys=4)
  differs = sum((x[1:] != x[:-1]).astype(jnp.int32) for x in ordered) > 0
  is_first = jnp.concatenate([jnp.ones(1, bool), differs]) & ~ordered[0]
  rank = jnp.zeros(N, jnp.int32).at[order].set(jnp.cumsum(is_first) - 1)
  count = jnp.sum(is_first)
  table = _slots(count, N, M, key)
  slot = jnp.where(mask, table[jnp.clip(rank, 0, N - 1)], M)
  return Voxels(slot.astype(jnp.int32), count.astype(jnp.int32))


def _slots(count, N, M, key):
  """Slot of the voxel of each rank [N]; M where it has none."""
  slots = jnp.arange(M)
  kept = slots * count // M
  if key is not None:
    order = jax.random.uniform(key, (N,)) + jnp.arange(N) // jnp.maximum(
      count, 1
    )
    kept = jnp.argsort(order)[jnp.minimum(slots, N - 1)]
  rank = jnp.where(count > M, kept, slots)
  rank = jnp.where(slots < count, rank, N)  # out of the table: not written
  return jnp.full(N, M).at[rank].set(slots, mode="drop")


def pool(
  features: Float[Array, "N D"], slot: Int[Array, " N"], capacity: int
) -> tuple[Float[Array, "M D"], Bool[Array, " M"]]:
  """Mean of the features in each slot, in float32, and which have any."""
  features = features.astype(jnp.float32)
  ones = jnp.ones(features.shape[0], jnp.float32)
  total = jax.ops.segment_sum(features, slot, capacity)
  number = jax.ops.segment_sum(ones, slot, capacity)
  return total / jnp.maximum(number, 1)[:, None], number > 0
