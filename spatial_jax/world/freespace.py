# SPDX-License-Identifier: Apache-2.0
"""How far points of a room are from its walls and objects. numpy only."""

from __future__ import annotations

import numpy as np

from spatial_jax.types import Float


def clearance(
  scene: dict[str, np.ndarray],
  points: Float[np.ndarray, "n 2"],
  eye: float | None = None,
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
  """Distance of points to objects and to walls; negative inside and outside.

  Args:
    eye: height of a camera that may pass over what ends well below it.
  """
  points = np.asarray(points, np.float64)
  use = scene["object_category"] >= 0
  if eye is None:
    # Things on furniture stay within its footprint.
    use &= scene["object_support"] < 0
  else:
    top = scene["object_center"][:, 2] + scene["object_size"][:, 2] / 2
    use &= top > eye - 0.25
  center, yaw = scene["object_center"][use], scene["object_yaw"][use]
  away = points[:, None] - center[:, :2]
  cos, sin = np.cos(yaw), np.sin(yaw)
  x = np.abs(cos * away[..., 0] + sin * away[..., 1])
  y = np.abs(cos * away[..., 1] - sin * away[..., 0])
  half = scene["object_size"][use, :2] / 2
  x, y = x - half[:, 0], y - half[:, 1]
  outside = np.hypot(np.maximum(x, 0), np.maximum(y, 0))
  gap = outside + np.minimum(np.maximum(x, y), 0)
  objects = gap.min(1, initial=np.inf)
  return objects, wall_distance(scene["room_polygon"], points)


def wall_distance(
  polygon: np.ndarray, points: np.ndarray
) -> Float[np.ndarray, " n"]:
  """Distance to the outline, negative outside of it."""
  start = np.asarray(polygon, np.float64)
  edge = np.roll(start, -1, 0) - start
  away = points[:, None] - start
  length2 = np.maximum((edge**2).sum(-1), 1e-12)
  along = np.clip((away * edge).sum(-1) / length2, 0, 1)
  gap = np.hypot(*np.moveaxis(away - along[..., None] * edge, -1, 0))
  # Even-odd rule; edges of no length are crossed by nothing.
  y0, y1 = start[:, 1], start[:, 1] + edge[:, 1]
  rising = (y0 > points[:, None, 1]) != (y1 > points[:, None, 1])
  slope = edge[:, 0] / np.where(edge[:, 1] == 0, 1, edge[:, 1])
  cross = start[:, 0] + slope * away[..., 1] > points[:, None, 0]
  inside = (rising & cross).sum(1) % 2 == 1
  return np.where(inside, gap.min(1), -gap.min(1))
