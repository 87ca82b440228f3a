# SPDX-License-Identifier: Apache-2.0
"""Rows with a fixed number of slots, of which some stay empty.

Letters: B batch, T length, M slots, Q slots before some are dropped, K length
after it, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from spatial_jax.types import Array, Bool, Float, Int


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


def drop_slots(
  row: Mapping[str, Array],
  is_slot: Bool[Array, "B T"],
  stays: Bool[Array, "B Q"],
  length: int,
  *,
  compact: bool = True,
) -> tuple[dict[str, Array], Bool[Array, "B T"], Int[Array, "B K"]]:
  """Rows without some of their slots, of K = `length` tokens.

  The k-th slot of a row is dropped unless its `stays` has a k-th True. Rows
  that keep fewer than K tokens end with dropped ones, which become padding
  (segment 0). Also returns which tokens are dropped, and the places in the row
  of those that are left.

  Args:
    row: arrays [B T], [B T D] or, positions, [B 3 T]; needs positions and
      segments.
    compact: positions count one less for each dropped token before them.
  """
  Q = stays.shape[1]
  index = jnp.clip(jnp.cumsum(is_slot, axis=1) - 1, 0, Q - 1)
  dropped = is_slot & ~jnp.take_along_axis(stays, index, axis=1)
  order, place = in_front(~dropped, length)
  row = dict(row, segments=jnp.where(dropped, 0, row["segments"]))
  if compact:
    before = jnp.cumsum(dropped, axis=1)
    row["positions"] = earlier(row["positions"], before)
  left = {
    name: pick(x, order, place)
    if x.ndim == 3 and name != "positions"
    else take(x, order, name)
    for name, x in row.items()
  }
  return left, dropped, order


def earlier(
  positions: Int[Array, "B T"] | Int[Array, "B 3 T"], shift: Int[Array, "B S"]
) -> Int[Array, "B T"] | Int[Array, "B 3 T"]:
  """Positions minus a shift of each token, or of each row (S = 1)."""
  return positions - (shift[:, None] if positions.ndim == 3 else shift)


def take(x: Array, order: Int[Array, "B K"], name: str = "") -> Array:
  """The tokens `order` of an array [B T], [B T D] or, "positions", [B 3 T]."""
  if x.ndim == 2:
    return jnp.take_along_axis(x, order, axis=1)
  if name == "positions":
    return jnp.take_along_axis(x, order[:, None], axis=2)
  return jnp.take_along_axis(x, order[..., None], axis=1)


def in_front(
  mask: Bool[Array, "B T"], length: int
) -> tuple[Int[Array, "B K"], Int[Array, "B T"]]:
  """Order with the True ones in front, and the place that it gives to each.

  order[place[t]] is t, for the first K = `length` places. Found by comparing,
  since a TPU's program for a sort is among the longest.
  """
  count = jnp.cumsum(mask, axis=1)
  others = jnp.cumsum(~mask, axis=1) + count[:, -1:]
  place = jnp.where(mask, count, others) - 1
  numbers = jnp.arange(mask.shape[1])[None, None]
  here = place[:, None] == jnp.arange(length)[None, :, None]
  return jnp.sum(jnp.where(here, numbers, 0), axis=-1), place


@jax.custom_vjp
def pick(
  x: Float[Array, "B T D"],
  order: Int[Array, "B K"],
  place: Int[Array, "B T"],
) -> Float[Array, "B K D"]:
  """The tokens `order`, whose inverse is `place`: no gradient is a scatter.

  Tokens whose place isn't below K get no gradient.
  """
  del place
  return take(x, order)


def _pick_forward(x, order, place):
  return take(x, order), place


def _pick_backward(place, gradient):
  K = gradient.shape[1]
  y = take(gradient, jnp.clip(place, 0, K - 1))
  return jnp.where(((place >= 0) & (place < K))[..., None], y, 0), None, None


pick.defvjp(_pick_forward, _pick_backward)


def restore(
  x: Float[Array, "B K D"], dropped: Bool[Array, "B T"]
) -> Float[Array, "B T D"]:
  """What belongs to the tokens left, at their places; zeros elsewhere."""
  K = x.shape[1]
  place = jnp.cumsum(~dropped, axis=1) - 1
  there = ~dropped & (place < K)
  y = jnp.take_along_axis(x, place[..., None], axis=1, mode="clip")
  return jnp.where(there[..., None], y, 0)
