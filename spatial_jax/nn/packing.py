# SPDX-License-Identifier: Apache-2.0
"""What is left of frames, packed into fewer rows of the same length.

Frames go whole, largest first, into the first bin with room ("first-fit
decreasing"). Bins have as many slots as a frame has patches. All shapes are
static, and rows of the batch never mix.

Letters: B batch, F frames, P patches of a frame and slots of a bin, D width; in
`pick` G rows of Q slots.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spatial_jax.types import Array, Bool, Float, Int


class Packing(NamedTuple):
  """Where patches lie in bins, as numbers of a row's patches and slots."""

  source: Int[Array, "B F P"]  # patch of each slot; -1: none
  target: Int[Array, "B F P"]  # slot of each patch; -1: it lies nowhere
  frame: Int[Array, "B F P"]  # of each slot of each bin, from 1; 0: none
  refilled_mask: Bool[Array, "B F P"]  # dropped, but computed again
  count: Int[Array, " B"]  # bins in use


def first_fit(
  counts: Int[Array, " F"], size: int
) -> tuple[Int[Array, " F"], Int[Array, " F"], Int[Array, " F"]]:
  """Bin and first slot of each frame, and how full each bin gets.

  Frames of equal size go in their order. Empty ones are said to be in bin 0.

  counts [3 4 2 0], size 5: bins [1 0 1 0], starts [0 0 3 0], usage [4 5 0 0].
  """

  def put(usage, frame):
    count = counts[frame]
    into = jnp.argmax(usage + count <= size)
    into = jnp.where(count > 0, into, 0)
    start = jnp.where(count > 0, usage[into], 0)
    return usage.at[into].add(count), (into, start)

  number = jnp.arange(len(counts))[None]
  mine, other = counts[:, None], counts[None]
  earlier = (other > mine) | ((other == mine) & (number < number.T))
  rank = jnp.sum(earlier, axis=1)
  order = jnp.argmax(rank[None] == number.T, axis=1)
  usage, (into, start) = jax.lax.scan(put, jnp.zeros_like(counts), order)
  return into[rank], start[rank], usage


def pack(kept: Bool[Array, "B F P"], *, refill: bool = True) -> Packing:
  """First-fit decreasing of the kept patches, in their order.

  Args:
    refill: a frame alone in its bin gets its dropped patches back, since the
      room is there.
  """
  B, F, P = kept.shape
  counts = jnp.sum(kept, axis=-1)
  into, start, usage = jax.vmap(lambda c: first_fit(c, P))(counts)
  alone = (counts > 0) & (counts == jnp.take_along_axis(usage, into, axis=1))
  alone = alone & refill
  there = kept | alone[..., None]
  slot = jnp.cumsum(there, axis=-1) - 1 + start[..., None]
  target = jnp.where(there, into[..., None] * P + slot, -1).reshape(B, F * P)
  number = jnp.broadcast_to(jnp.arange(F * P)[None], (B, F * P))
  source = (
    jnp.full((B, F * P), -1)
    .at[jnp.arange(B)[:, None], jnp.where(target < 0, F * P, target)]
    .set(number, mode="drop")
  )
  source = source.reshape(B, F, P)
  return Packing(
    source,
    target.reshape(B, F, P),
    jnp.where(source < 0, -P, source) // P + 1,
    there & ~kept,
    jnp.sum(usage > 0, axis=-1),
  )


@jax.custom_vjp
def pick(
  x: Float[Array, "B F P D"],
  source: Int[Array, "B G Q"],
  target: Int[Array, "B F P"],
) -> Float[Array, "B G Q D"]:
  """x of the patches of a row that `source` numbers, zeros where that is -1.

  `target` is the inverse of `source`, so that the gradient is no scatter.
  Patches are found by frame and place: where their number is no multiple of 8,
  a TPU would copy what lies frame by frame into one long row.
  """
  frame, place = jnp.divmod(jnp.maximum(source, 0), x.shape[2])
  y = jax.vmap(lambda x, *at: x.at[at].get(mode="promise_in_bounds"))(
    x, frame, place
  )
  return jnp.where((source >= 0)[..., None], y, 0)


def _forward(x, source, target):
  return pick(x, source, target), (source, target)


def _backward(indices, gradient):
  source, target = indices
  return pick(gradient, target, source), None, None


pick.defvjp(_forward, _backward)
