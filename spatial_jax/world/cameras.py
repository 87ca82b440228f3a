# SPDX-License-Identifier: Apache-2.0
"""Camera paths that keep clear of walls and objects. numpy only.

All return world_from_camera f32[F 4 4] in OpenCV axes. Clearance is the
horizontal distance to the nearest wall or footprint.
"""

from __future__ import annotations

import numpy as np

from spatial_jax.geometry import camera
from spatial_jax.types import Float

WALL_CLEARANCE = 0.5
CLEARANCE = 0.35


def clearance(
  scene: dict[str, np.ndarray],
  points: Float[np.ndarray, "n 2"],
  lowest: float = 10.0,
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
  """Distance of points to objects and to walls; negative outside the room.

  Args:
    lowest: objects whose bottom is above this height are ignored.
  """
  points = np.asarray(points, np.float64)
  bottom = scene["object_center"][:, 2] - scene["object_size"][:, 2] / 2
  # Things on furniture stay within its footprint.
  use = (scene["object_category"] >= 0) & (scene["object_support"] < 0)
  use &= bottom < lowest
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


def turntable(
  scene: dict[str, np.ndarray],
  rng: np.random.Generator,
  frames: int,
  *,
  pitch_degrees: float = -15.0,
  height: tuple[float, float] = (1.3, 1.6),
) -> Float[np.ndarray, "F 4 4"]:
  """Looks around from one free point near the middle, clockwise, one turn.

  With four frames of 100 degrees neighbours overlap by ten, and the frame's
  number tells its heading.
  """
  outline = scene["room_polygon"]
  low, high = outline.min(0), outline.max(0)
  uniform = rng.random((96, 2))
  points = low + (0.3 + 0.4 * uniform) * (high - low)
  objects, walls = clearance(scene, points)
  free = (objects >= CLEARANCE) & (walls >= WALL_CLEARANCE)
  if free.any():
    at = points[int(free.argmax())]
  else:  # crowded or narrow: the freest point of the whole room
    points = np.concatenate([points, low + uniform * (high - low)])
    objects, walls = clearance(scene, points)
    at = points[int(np.minimum(objects, walls).argmax())]
  heading = rng.uniform(0, 2 * np.pi) - np.arange(frames) * 2 * np.pi / frames
  top = float(scene["room_height"]) - 0.2
  eye = np.array([*at, min(rng.uniform(*height), top)])
  position = np.broadcast_to(eye, (frames, 3))
  pitch = np.full(frames, np.radians(pitch_degrees))
  return camera.from_heading(position, heading, pitch)
