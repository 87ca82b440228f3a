# SPDX-License-Identifier: Apache-2.0
"""Farthest point sampling: a subset that covers the points evenly.

Each step adds the point that is farthest (squared Euclidean distance) from
those chosen so far; the first of equals wins. Distances are sums of products,
no matmul, so that they are exact float32 on every backend.

Letters: N points, K chosen points.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from spatial_jax.types import Array, Bool, Float, Int


def farthest_points(
  points: Float[Array, "N 3"],
  count: int,
  mask: Bool[Array, " N"] | None = None,
  start: int | None = None,
) -> Int[Array, " K"]:
  """Indices of `count` points in the order in which they are chosen.

  When fewer points than `count` are valid, the last indices repeat valid ones.
  Use `jax.vmap` for several sets.

  Args:
    points: in any unit.
    mask: True for points that may be chosen; all by default.
    start: the first choice; by default the first valid point.

  Raises:
    ValueError: `count` is larger than the number of points.
  """
  N = points.shape[0]
  if not 0 < count <= N:
    raise ValueError(
      f"{count} of {N} points cannot be chosen; count must be 1 to {N}"
    )
  if mask is None:
    mask = jnp.ones(N, bool)
  first = jnp.argmax(mask) if start is None else jnp.asarray(start)
  # Below every distance, so that an invalid point is never the farthest.
  nearest = jnp.where(mask, jnp.inf, -1.0).astype(jnp.float32)
  points = jax.lax.stop_gradient(jnp.asarray(points, jnp.float32))

  def step(state, _):
    nearest, last = state
    away = points - points[last][None]
    x, y, z = away[:, 0], away[:, 1], away[:, 2]
    nearest = jnp.minimum(nearest, x * x + y * y + z * z)
    return (nearest, jnp.argmax(nearest).astype(jnp.int32)), last

  _, chosen = jax.lax.scan(
    step, (nearest, first.astype(jnp.int32)), None, length=count
  )
  return chosen
