# SPDX-License-Identifier: Apache-2.0
"""Real room layouts as scenes: oriented boxes by category become furniture.

Reads the meta files of VSI-Bench's data (a JSON object, also gzipped): per room
`room_size` (square metres) and `object_bbox`, category -> boxes with
`centroid`, `axesLengths` and `normalizedAxes` (rows of a 3x3 matrix), in metres
with z up. Each box becomes the upright box with the same edges, filled with
the model of its category; categories we have no model for are drawn as plain
boxes, so that they still hide what is behind them.

Departures from the real room: tilted boxes stand upright; walls are the bounds
of all boxes, widened to `room_size` where that is more; colours are ours.
numpy only.
"""

from __future__ import annotations

import gzip
import json
import pathlib
import zlib

import numpy as np

from spatial_jax.geometry import boxes
from spatial_jax.world import freespace, furniture
from spatial_jax.world import scene as scene_lib

SAME_AS = {
  "tv": "monitor",
  "trash can": "trash bin",
  "table lamp": "lamp",
  "desk": "table",
  "couch": "sofa",
  "armchair": "chair",
  "nightstand": "cabinet",
  "counter": "cabinet",
  "closet": "cabinet",
  "radiator": "heater",
}
MARGIN = 0.1  # metres between boxes and walls
LEAST_HEIGHT = 2.4
LEAST_EDGE = 0.02


def load(
  path: str | pathlib.Path,
  *,
  max_objects: int = 64,
  max_primitives: int = 256,
  detailed: bool = False,
) -> dict[str, dict[str, np.ndarray]]:
  """Scenes by room name, in the order of the file.

  Args:
    max_objects, max_primitives: sizes to pad to. Where a room has more, plain
      boxes of unknown categories are left out, smallest first.

  Raises:
    ValueError: not such a file, or a room whose known furniture doesn't fit.
  """
  path = pathlib.Path(path)
  rooms = _read(path)
  sizes = {"max_objects": max_objects, "max_primitives": max_primitives}
  scenes = {}
  for name, room in rooms.items():
    try:
      scenes[name] = scene_of(name, room, detailed=detailed, **sizes)
    except (KeyError, TypeError, ValueError) as error:
      what = f"no key {error}" if isinstance(error, KeyError) else str(error)
      raise ValueError(f"{path}: room {name!r}: {what}") from error
  return scenes


def _read(path: pathlib.Path) -> dict[str, dict]:
  data = path.read_bytes()
  try:
    if data[:2] == b"\x1f\x8b":
      data = gzip.decompress(data)
    rooms = json.loads(data)
  except (OSError, EOFError, ValueError, zlib.error) as error:
    raise ValueError(
      f"{path}: neither JSON nor gzipped JSON ({error}); expected a meta file "
      "of VSI-Bench, such as scannet_meta_info_val.json"
    ) from error
  if not isinstance(rooms, dict) or not all(
    isinstance(room, dict) for room in rooms.values()
  ):
    raise ValueError(
      f"{path}: expected an object of rooms, each with 'object_bbox' and "
      f"'room_size', and not {type(rooms).__name__}"
    )
  return rooms


def _vector(box: dict, key: str, size: int) -> np.ndarray:
  value = np.asarray(box[key], np.float64).reshape(-1)
  if value.size != size or not np.isfinite(value).all():
    raise ValueError(
      f"box key {key!r}: expected {size} finite numbers, got {box[key]!r}"
    )
  return value


def _upright(box: dict, category: int):
  """Centre, edges and yaw of the upright box nearest to a turned one."""
  center = _vector(box, "centroid", 3)
  edges = np.maximum(_vector(box, "axesLengths", 3), LEAST_EDGE)
  axes = _vector(box, "normalizedAxes", 9).reshape(3, 3)
  up = int(np.abs(axes[:, 2]).argmax())
  flat = [i for i in range(3) if i != up]
  flat.sort(key=lambda i: -edges[i])
  # The model's longer side lies along the box's longer side.
  length, width = furniture.ALL[category].size[:2]
  along, across = flat if length >= width else flat[::-1]
  x, y = axes[along, :2]
  if length < width:  # a bed's length is its y axis; keep the frame that way
    x, y = axes[across, 1], -axes[across, 0]
  return center, edges[[along, across, up]], float(np.arctan2(y, x))


def scene_of(
  name: str,
  room: dict,
  *,
  max_objects: int,
  max_primitives: int,
  detailed: bool,
) -> dict[str, np.ndarray]:
  """One room of the file as the arrays of `scene.sample`."""
  found = []
  for label, many in room["object_bbox"].items():
    known = SAME_AS.get(label, label)
    category = scene_lib.OTHER
    if known in scene_lib.CATEGORIES:
      category = scene_lib.CATEGORIES.index(known)
    found += [(category, *_upright(box, category)) for box in many]
  size = float(room["room_size"])
  if not found or not np.isfinite(size) or size <= 0:
    raise ValueError(
      f"expected at least one box and a positive 'room_size', got "
      f"{len(found)} boxes and {room['room_size']!r}"
    )
  found = _fitting(found, max_objects, max_primitives)
  category = np.array([f[0] for f in found], np.int32)
  center, edges = (np.array([f[i] for f in found]) for i in (1, 2))
  yaw = np.array([f[3] for f in found])
  # The file's origin is the middle of the room: floor to 0, corner to 0, 0.
  center[:, 2] -= (center[:, 2] - edges[:, 2] / 2).min()
  corners = boxes.rectangle(center, edges, yaw).reshape(-1, 2)
  low, high = corners.min(0) - MARGIN, corners.max(0) + MARGIN
  short = size / np.prod(high - low)
  if short > 1:
    grow = (np.sqrt(short) - 1) * (high - low) / 2
    low, high = low - grow, high + grow
  center[:, :2] -= low
  w, d = high - low
  outline = np.array([[0, 0], [w, 0], [w, d], [0, d]])
  yaw = _backs_to_walls(center, edges, yaw, outline)
  top = (center[:, 2] + edges[:, 2] / 2).max()
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  tone = scene_lib.BASE_COLOR[category]
  tone = np.clip(tone * rng.uniform(0.85, 1.15, tone.shape), 0, 1)
  scene = scene_lib.assemble(
    category,
    center,
    edges,
    yaw,
    _supports(center, edges, yaw),
    tone,
    np.zeros(len(category), np.int32),
    detailed=detailed,
    max_objects=max_objects,
    max_primitives=max_primitives,
  )
  scene["room_polygon"] = scene_lib.polygon(outline)
  scene["room_height"] = np.asarray(max(LEAST_HEIGHT, top + MARGIN), np.float32)
  scene["room_size"] = np.asarray(size, np.float32)
  return scene | scene_lib.surfaces(rng, textures=False)


def _fitting(found: list, max_objects: int, max_primitives: int) -> list:
  """Without the smallest plain boxes that don't fit, in the same order."""
  parts = [len(furniture.ALL[f[0]].plain) for f in found]
  extra = [i for i, f in enumerate(found) if f[0] == scene_lib.OTHER]
  extra.sort(key=lambda i: np.prod(found[i][2]))
  over = max(len(found) - max_objects, sum(parts) - max_primitives, 0)
  if over > len(extra):
    raise ValueError(
      f"{len(found)} boxes ({len(extra)} of unknown categories) of "
      f"{sum(parts)} primitives don't fit into max_objects={max_objects}, "
      f"max_primitives={max_primitives}; make these larger"
    )
  left_out = set(extra[:over])
  return [f for i, f in enumerate(found) if i not in left_out]


def _backs_to_walls(center, edges, yaw, outline) -> np.ndarray:
  """Turns objects by half a turn where their back is nearer to a wall then."""
  back = np.stack([-np.sin(yaw), np.cos(yaw)], -1) * edges[:, 1:2] / 2
  ahead, behind = (
    freespace.wall_distance(outline, center[:, :2] + sign * back)
    for sign in (-1, 1)
  )
  return np.where(behind <= ahead, yaw, yaw + np.pi)


def _supports(center, edges, yaw) -> np.ndarray:
  """Index of the object that each one stands on, -1 for the floor."""
  bottom, top = (center[:, 2] + s * edges[:, 2] / 2 for s in (-1, 1))
  away = center[:, None, :2] - center[None, :, :2]  # [object, candidate]
  cos, sin = np.cos(yaw), np.sin(yaw)
  x = np.abs(cos * away[..., 0] + sin * away[..., 1])
  y = np.abs(cos * away[..., 1] - sin * away[..., 0])
  over = (x <= edges[:, 0] / 2) & (y <= edges[:, 1] / 2)
  gap = np.abs(bottom[:, None] - top[None])
  gap = np.where(over & (bottom[:, None] > 0.2), gap, np.inf)
  np.fill_diagonal(gap, np.inf)
  return np.where(gap.min(1) < 0.15, gap.argmin(1), -1).astype(np.int32)
