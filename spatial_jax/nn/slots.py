# SPDX-License-Identifier: Apache-2.0
"""Rows with a fixed number of slots, of which some stay empty.

Letters: B batch, T length, M slots.
"""

from __future__ import annotations

import jax.numpy as jnp

from spatial_jax.types import Array, Bool, Int


def close_gaps(
  positions: Int[Array, "B 3 T"],
  segments: Int[Array, "B T"],
  is_slot: Bool[Array, "B T"],
  mask: Bool[Array, "B M"],
) -> tuple[Int[Array, "B 3 T"], Int[Array, "B T"], Int[Array, " B"]]:
  """Positions and segments of rows of which some slots are empty.

  The k-th slot of a row is empty unless the row's `mask` has a k-th True. It
  becomes padding (segment 0), and later positions count one less for it. Also
  returns the empty slots of each row.

  mask [T T F F], tokens      a s s s s b c
  positions                   0 1 2 3 4 5 6
  become                      0 1 2 - - 3 4
  """
  M = mask.shape[1]
  index = jnp.cumsum(is_slot, axis=1) - 1
  taken = jnp.take_along_axis(mask, jnp.clip(index, 0, M - 1), axis=1)
  empty = is_slot & ~(taken & (index < M))
  before = jnp.cumsum(empty, axis=1)
  positions = positions - before[:, None]
  return positions, jnp.where(empty, 0, segments), before[:, -1]
