# SPDX-License-Identifier: Apache-2.0
"""Boxes: upright ones turned about z, and axis-aligned ones.

An upright box is a centre [3], full edges along its own axes [3] and a yaw
(radians, counter-clockwise seen from above). Works on numpy and jax arrays of
any equal leading shape; all sizes are fixed, so everything jits. jax isn't
imported here.
"""

from __future__ import annotations

import numpy as np

from spatial_jax.types import Array, Bool, Float

Angle = Array | float | np.floating  # radians, [*b]
_CORNERS = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) / 2


def rectangle(
  center: Float[Array, "*b 3"], size: Float[Array, "*b 3"], yaw: Angle
) -> Float[Array, "*b 4 2"]:
  """Footprint corners, counter-clockwise."""
  xp = center.__array_namespace__()
  unit = xp.asarray(_CORNERS, dtype=center.dtype)
  unit = unit.reshape((1,) * (center.ndim - 1) + (4, 2))
  local = unit * size[..., None, :2]
  cos, sin = xp.cos(yaw)[..., None], xp.sin(yaw)[..., None]
  x = cos * local[..., 0] - sin * local[..., 1]
  y = sin * local[..., 0] + cos * local[..., 1]
  return xp.stack([x, y], axis=-1) + center[..., None, :2]


def corners(
  center: Float[Array, "*b 3"], size: Float[Array, "*b 3"], yaw: Angle
) -> Float[Array, "*b 8 3"]:
  """The four lower corners counter-clockwise, then the four upper ones."""
  xp = center.__array_namespace__()
  flat = rectangle(center, size, yaw)
  z = xp.broadcast_to(center[..., 2:3], flat.shape[:-1])
  half = xp.broadcast_to(size[..., 2:3] / 2, flat.shape[:-1])
  low = xp.concatenate([flat, (z - half)[..., None]], axis=-1)
  high = xp.concatenate([flat, (z + half)[..., None]], axis=-1)
  return xp.concatenate([low, high], axis=-2)


def _point_segment(points: Array, start: Array, stop: Array) -> Array:
  """Distances of points [*b n 2] to segments [*b m 2] -> [*b n m]."""
  xp = points.__array_namespace__()
  edge = (stop - start)[..., None, :, :]
  away = points[..., :, None, :] - start[..., None, :, :]
  length2 = xp.maximum((edge * edge).sum(-1), 1e-12)
  along = xp.clip((away * edge).sum(-1) / length2, 0, 1)
  rest = away - along[..., None] * edge
  return xp.sqrt((rest * rest).sum(-1))


def rectangles_overlap(
  a: Float[Array, "*b 4 2"], b: Float[Array, "*b 4 2"]
) -> Bool[Array, "*b"]:
  """Separating axes: True where footprints share inner points."""
  xp = a.__array_namespace__()
  apart = None
  for one in (a, b):
    for k in (0, 1):
      axis = one[..., k + 1, :] - one[..., k, :]
      pa = (a * axis[..., None, :]).sum(-1)
      pb = (b * axis[..., None, :]).sum(-1)
      gap = (pa.max(-1) <= pb.min(-1)) | (pb.max(-1) <= pa.min(-1))
      apart = gap if apart is None else apart | gap
  return xp.asarray(xp.logical_not(apart))


def rectangle_distance(
  a: Float[Array, "*b 4 2"], b: Float[Array, "*b 4 2"]
) -> Float[Array, "*b"]:
  """Closest distance of two footprints; 0 where they overlap."""
  xp = a.__array_namespace__()
  ab = _point_segment(a, b, xp.roll(b, -1, axis=-2)).min((-1, -2))
  ba = _point_segment(b, a, xp.roll(a, -1, axis=-2)).min((-1, -2))
  touching = rectangles_overlap(a, b)
  return xp.asarray(xp.where(touching, 0.0, xp.minimum(ab, ba)))


def upright_distance(
  center_a: Float[Array, "*b 3"],
  size_a: Float[Array, "*b 3"],
  yaw_a: Angle,
  center_b: Float[Array, "*b 3"],
  size_b: Float[Array, "*b 3"],
  yaw_b: Angle,
) -> Float[Array, "*b"]:
  """Closest-point distance of upright boxes; 0 where they touch or overlap.

  Both are prisms along z, so it is the hypotenuse of footprint distance and
  vertical gap, exactly.
  """
  xp = center_a.__array_namespace__()
  flat = rectangle_distance(
    rectangle(center_a, size_a, yaw_a), rectangle(center_b, size_b, yaw_b)
  )
  apart = xp.abs(center_a[..., 2] - center_b[..., 2])
  gap = xp.maximum(apart - (size_a[..., 2] + size_b[..., 2]) / 2, 0)
  return xp.asarray(xp.hypot(flat, gap))


def iou_aligned(
  low_a: Float[Array, "*b d"],
  high_a: Float[Array, "*b d"],
  low_b: Float[Array, "*b d"],
  high_b: Float[Array, "*b d"],
) -> Float[Array, "*b"]:
  """Intersection over union of axis-aligned boxes in any dimension."""
  xp = low_a.__array_namespace__()
  edges = xp.minimum(high_a, high_b) - xp.maximum(low_a, low_b)
  both = xp.prod(xp.maximum(edges, 0), axis=-1)
  total = xp.prod(high_a - low_a, axis=-1) + xp.prod(high_b - low_b, axis=-1)
  return xp.asarray(both / xp.maximum(total - both, 1e-12))


def _inside(points: Array, rect: Array) -> Array:
  """Which points [*b n 2] lie in rectangles [*b 4 2] (border included)."""
  start = rect[..., None, :, :]
  xp = points.__array_namespace__()
  edge = (xp.roll(rect, -1, axis=-2) - rect)[..., None, :, :]
  away = points[..., :, None, :] - start
  cross = edge[..., 0] * away[..., 1] - edge[..., 1] * away[..., 0]
  slack = 1e-6 * (xp.abs(edge).sum(-1) + 1e-6)
  return (cross >= -slack).all(-1)


def intersection_area(
  a: Float[Array, "*b 4 2"], b: Float[Array, "*b 4 2"]
) -> Float[Array, "*b"]:
  """Area shared by two footprints.

  The corners of the shared polygon are corners of one inside the other, or
  crossings of edges: 24 candidates, sorted by angle about their mean.
  """
  xp = a.__array_namespace__()
  middle = a.mean(-2, keepdims=True)  # near the origin float32 keeps digits
  a, b = a - middle, b - middle
  da, db = xp.roll(a, -1, axis=-2) - a, xp.roll(b, -1, axis=-2) - b
  ea, eb = da[..., :, None, :], db[..., None, :, :]
  gap = b[..., None, :, :] - a[..., :, None, :]
  cross = ea[..., 0] * eb[..., 1] - ea[..., 1] * eb[..., 0]
  parallel = xp.abs(cross) < 1e-9
  safe = xp.where(parallel, 1.0, cross)
  s = (gap[..., 0] * eb[..., 1] - gap[..., 1] * eb[..., 0]) / safe
  t = (gap[..., 0] * ea[..., 1] - gap[..., 1] * ea[..., 0]) / safe
  meets = (s >= 0) & (s <= 1) & (t >= 0) & (t <= 1) & ~parallel
  crossings = a[..., :, None, :] + s[..., None] * ea
  lead = a.shape[:-2]
  points = xp.concatenate([a, b, crossings.reshape(*lead, 16, 2)], axis=-2)
  valid = xp.concatenate(
    [_inside(a, b), _inside(b, a), meets.reshape(*lead, 16)], axis=-1
  )
  count = xp.maximum(valid.sum(-1), 1)[..., None, None]
  mean = (points * valid[..., None]).sum(-2, keepdims=True) / count
  # Invalid candidates collapse into the first valid one: no area.
  first = xp.take_along_axis(points, valid.argmax(-1)[..., None, None], axis=-2)
  points = xp.where(valid[..., None], points, first) - mean
  order = xp.argsort(xp.arctan2(points[..., 1], points[..., 0]), axis=-1)
  points = xp.take_along_axis(points, order[..., None], axis=-2)
  x, y = points[..., 0], points[..., 1]
  area = (x * xp.roll(y, -1, axis=-1) - y * xp.roll(x, -1, axis=-1)).sum(-1)
  return xp.asarray(xp.where(valid.any(-1), xp.maximum(area / 2, 0), 0.0))


def iou_birds_eye(
  center_a: Float[Array, "*b 3"],
  size_a: Float[Array, "*b 3"],
  yaw_a: Angle,
  center_b: Float[Array, "*b 3"],
  size_b: Float[Array, "*b 3"],
  yaw_b: Angle,
) -> Float[Array, "*b"]:
  """Intersection over union of the footprints of upright boxes."""
  xp = center_a.__array_namespace__()
  both = intersection_area(
    rectangle(center_a, size_a, yaw_a), rectangle(center_b, size_b, yaw_b)
  )
  total = size_a[..., 0] * size_a[..., 1] + size_b[..., 0] * size_b[..., 1]
  return xp.asarray(both / xp.maximum(total - both, 1e-12))


def iou_upright(
  center_a: Float[Array, "*b 3"],
  size_a: Float[Array, "*b 3"],
  yaw_a: Angle,
  center_b: Float[Array, "*b 3"],
  size_b: Float[Array, "*b 3"],
  yaw_b: Angle,
) -> Float[Array, "*b"]:
  """Intersection over union of upright boxes, in space."""
  xp = center_a.__array_namespace__()
  flat = intersection_area(
    rectangle(center_a, size_a, yaw_a), rectangle(center_b, size_b, yaw_b)
  )
  a0, a1 = (center_a[..., 2] + s * size_a[..., 2] / 2 for s in (-1, 1))
  b0, b1 = (center_b[..., 2] + s * size_b[..., 2] / 2 for s in (-1, 1))
  tall = xp.maximum(xp.minimum(a1, b1) - xp.maximum(a0, b0), 0)
  both = flat * tall
  total = xp.prod(size_a, axis=-1) + xp.prod(size_b, axis=-1)
  return xp.asarray(both / xp.maximum(total - both, 1e-12))
