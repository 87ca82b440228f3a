# SPDX-License-Identifier: Apache-2.0
"""Camera paths that keep clear of walls and objects. numpy only.

All return world_from_camera f32[F 4 4] in OpenCV axes. Clearance is the
horizontal distance to the nearest wall or footprint.
"""

from __future__ import annotations

import numpy as np

from spatial_jax.geometry import camera
from spatial_jax.types import Float
from spatial_jax.world import freespace, routes

WALL_CLEARANCE = 0.5
CLEARANCE = 0.35


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
  objects, walls = freespace.clearance(scene, points)
  free = (objects >= CLEARANCE) & (walls >= WALL_CLEARANCE)
  if free.any():
    at = points[int(free.argmax())]
  else:  # crowded or narrow: the freest point of the whole room
    points = np.concatenate([points, low + uniform * (high - low)])
    objects, walls = freespace.clearance(scene, points)
    at = points[int(np.minimum(objects, walls).argmax())]
  heading = rng.uniform(0, 2 * np.pi) - np.arange(frames) * 2 * np.pi / frames
  top = float(scene["room_height"]) - 0.2
  eye = np.array([*at, min(rng.uniform(*height), top)])
  position = np.broadcast_to(eye, (frames, 3))
  pitch = np.full(frames, np.radians(pitch_degrees))
  return camera.from_heading(position, heading, pitch)


def walkthrough(
  scene: dict[str, np.ndarray],
  rng: np.random.Generator,
  frames: int,
  *,
  height: tuple[float, float] = (1.4, 1.65),
  pitch_degrees: float = -12.0,
  stride: float = 0.45,
  stops: int = 4,
) -> Float[np.ndarray, "F 4 4"]:
  """From stop to stop through the room, looking where one goes.

  Args:
    stride: most metres between frames; a longer way is cut off.
    stops: places to walk to, each far from those before.
  """
  way, need = routes.route(scene, rng, stops, CLEARANCE)
  way = routes.smooth(scene, routes.resample(way, 160), need)
  step = np.linalg.norm(np.diff(way, axis=0), axis=-1)
  length = min(float(step.sum()), stride * (frames - 1))
  at = routes.resample(way, frames, length)
  heading = routes.heading(way, at, frames, rng, length)
  eye = min(rng.uniform(*height), float(scene["room_height"]) - 0.2)
  position = np.concatenate([at, np.full((frames, 1), eye)], -1)
  pitch = np.full(frames, np.radians(pitch_degrees))
  return camera.from_heading(position, heading, pitch)


def orbit(
  scene: dict[str, np.ndarray],
  rng: np.random.Generator,
  frames: int,
  *,
  height: float = 1.9,
  turns: float = 1.0,
) -> Float[np.ndarray, "F 4 4"]:
  """Circles in the room, as near to the walls as things allow, looking in.

  The camera may pass over low furniture.
  """
  outline = scene["room_polygon"]
  middle = _middle(outline)
  eye = min(height, float(scene["room_height"]) - 0.3)
  side = rng.choice([-1, 1])
  angle = rng.uniform(0, 2 * np.pi) + side * np.linspace(
    0, 2 * np.pi * turns, frames, endpoint=False
  )
  out = np.stack([np.cos(angle), np.sin(angle)], -1)
  far = np.linalg.norm(np.ptp(outline, axis=0)) * np.linspace(1, 0.02, 64)
  points = middle + far[:, None, None] * out  # [64 F 2], outermost first
  objects, walls = freespace.clearance(scene, points.reshape(-1, 2), eye)
  gap = np.minimum(objects, walls - 0.15).reshape(64, frames)
  # Beyond a wall's inner corner there may be room again: stay on this side.
  hidden = np.flip(
    np.logical_or.accumulate(np.flip(walls.reshape(64, frames) < 0, 0), 0), 0
  )
  gap = np.where(hidden, -1, gap)
  place = (gap >= min(CLEARANCE, 0.8 * gap.max())).argmax(0)
  blocked = gap.max(0) < min(CLEARANCE, 0.8 * gap.max())
  at = points[place, np.arange(frames)]
  if blocked.any():  # a tall thing in the way: stay where the last view was
    clear = np.flatnonzero(~blocked)
    at = at[clear[np.abs(clear[:, None] - np.arange(frames)).argmin(0)]]
  position = np.concatenate([at, np.full((frames, 1), eye)], -1)
  target = np.broadcast_to([*middle, 0.5], (frames, 3))
  return camera.look_at(position, target)


def _middle(outline: np.ndarray) -> np.ndarray:
  """Middle of the bounds, or the deepest point of a room that leaves it out."""
  low, high = outline.min(0), outline.max(0)
  middle = (low + high) / 2
  if freespace.wall_distance(outline, middle[None])[0] > 0.8:
    return middle
  share = np.linspace(0.05, 0.95, 19)
  grid = np.stack(np.meshgrid(share, share), -1).reshape(-1, 2)
  points = low + grid * (high - low)
  return points[freespace.wall_distance(outline, points).argmax()]
