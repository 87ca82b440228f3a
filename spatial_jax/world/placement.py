# SPDX-License-Identifier: Apache-2.0
"""Where things stand in a room: outline, doors, windows, furniture.

Plain Python on a handful of rectangles: for this few numbers it is faster than
arrays. Footprints are kept apart by their axis-aligned bounds, which contain
the turned ones, so nothing interpenetrates. numpy only.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from spatial_jax.world import furniture

WALL_GAP = 0.03  # metres between furniture and wall; openings stand out 0.02
GAP = 0.1  # metres between the bounds of two pieces of furniture
STAND = 0.4  # half edge of the square left free for a person with a camera
TRIES = 12
SHRINK = (1.0, 0.8, 0.6, 0.45)  # what finds no place is tried in smaller sizes
HIGHEST = 2.3
WIDEST = 2.8
DOOR = [c.name for c in furniture.ALL].index("door")
WINDOW = DOOR + 1


@dataclasses.dataclass
class Room:
  """Outline, counter-clockwise; `notch` is the rectangle an L leaves out."""

  polygon: list[tuple[float, float]]
  width: float
  depth: float
  height: float
  notch: tuple[float, float, float, float] | None

  def walls(self):
    """(start x, y, unit direction x, y, length) of each wall."""
    ends = zip(self.polygon, self.polygon[1:] + self.polygon[:1], strict=True)
    for (x0, y0), (x1, y1) in ends:
      length = math.hypot(x1 - x0, y1 - y0)
      yield x0, y0, (x1 - x0) / length, (y1 - y0) / length, length


@dataclasses.dataclass
class Placed:
  category: int
  center: tuple[float, float, float]
  size: tuple[float, float, float]
  yaw: float
  support: int = -1

  def reach(self) -> tuple[float, float]:
    """Half edges of the footprint's axis-aligned bound."""
    return reach(self.size, self.yaw)


def reach(size, yaw: float) -> tuple[float, float]:
  cos, sin = abs(math.cos(yaw)), abs(math.sin(yaw))
  length, width = size[0] / 2, size[1] / 2
  return cos * length + sin * width, sin * length + cos * width


def room(rng: np.random.Generator, area, l_shaped: float) -> Room:
  """Rectangle, or an L with one corner left out, of log-uniform area."""
  u = rng.random(7).tolist()
  size = area[0] * (area[1] / area[0]) ** u[0]
  aspect = math.exp(0.7 * u[1] - 0.35)
  height = 2.4 + 0.6 * u[2]
  cut = u[3] < l_shaped
  share = (0.3 + 0.25 * u[4], 0.3 + 0.25 * u[5]) if cut else (0.0, 0.0)
  # The L has the wanted area: its bounding rectangle is larger.
  bound = size / (1 - share[0] * share[1])
  w, d = math.sqrt(bound * aspect), math.sqrt(bound / aspect)
  if not cut:
    return Room([(0.0, 0.0), (w, 0.0), (w, d), (0.0, d)], w, d, height, None)
  a, b = w - w * share[0], d - d * share[1]
  polygon = [(0.0, 0.0), (w, 0.0), (w, b), (a, b), (a, d), (0.0, d)]
  x0, y0, x1, y1 = a, b, w, d
  if u[6] < 0.5:  # mirrored, and back to counter-clockwise
    polygon = [(w - x, y) for x, y in reversed(polygon)]
    x0, x1 = w - x1, w - x0
  if u[6] * 2 % 1 < 0.5:
    polygon = [(x, d - y) for x, y in reversed(polygon)]
    y0, y1 = d - y1, d - y0
  return Room(polygon, w, d, height, (x0, y0, x1, y1))


def openings(rng: np.random.Generator, room: Room, doors, windows):
  """Doors and windows, centred in the plane of their walls."""
  if not (doors[1] or windows[1]):
    return []
  walls = list(room.walls())
  taken = [[] for _ in walls]
  found = []
  for category, number in (
    (DOOR, rng.integers(doors[0], doors[1] + 1)),
    (WINDOW, rng.integers(windows[0], windows[1] + 1)),
  ):
    for _ in range(int(number)):
      which = int(rng.integers(len(walls)))
      x, y, dx, dy, length = walls[which]
      at, wide, tall = rng.random(3).tolist()
      if category == DOOR:
        size = (0.8 + 0.2 * wide, 0.04, min(1.95 + 0.2 * tall, room.height))
        bottom = 0.0
      else:
        size = (0.7 + 0.9 * wide, 0.04, 0.8 + 0.5 * tall)
        bottom = 0.85
      half = size[0] / 2 + 0.1
      if length < 2 * half:
        continue
      at = half + at * (length - 2 * half)
      if any(abs(at - other) < half + more for other, more in taken[which]):
        continue
      taken[which].append((at, half))
      center = (x + dx * at, y + dy * at, bottom + size[2] / 2)
      # Local x along the wall, the front (-y) into the room: the outline is
      # counter-clockwise, so the room is to the left of (dx, dy).
      yaw = math.atan2(-dy, -dx)
      found.append(Placed(category, center, size, yaw))
  return found


def _obstacles(room: Room, found) -> list[tuple]:
  """(x0, y0, x1, y1, lowest z) of what furniture has to keep away from."""
  taken = [] if room.notch is None else [(*room.notch, 0.0)]
  for opening in found:
    x, y, z = opening.center
    rx, ry = opening.reach()
    # A door needs room to open; nothing tall stands in front of a window.
    deep = 0.8 if opening.category == DOOR else 0.3
    low = 0.0 if opening.category == DOOR else z - opening.size[2] / 2
    along_x = rx > ry
    rx, ry = (rx, deep) if along_x else (deep, ry)
    taken.append((x - rx, y - ry, x + rx, y + ry, low))
  return taken


def _size(base, room: Room, u, spread: float):
  """Common log-uniform factor, small per-axis jitter, kept inside the room."""
  factor = math.exp(spread * (2 * u[0] - 1))
  length, width, height = (
    edge * factor * math.exp(0.24 * r - 0.12)
    for edge, r in zip(base, u[1:4], strict=True)
  )
  widest = min(WIDEST, 0.55 * min(room.width, room.depth))
  tallest = min(HIGHEST, room.height - 0.15)
  # One factor for all edges: a model keeps its proportions.
  shrink = min(1.0, widest / max(length, width), tallest / height)
  return length * shrink, width * shrink, height * shrink


def furnish(
  rng: np.random.Generator,
  room: Room,
  found: list[Placed],
  wanted: list[int],
  spread: float,
  stacking: float,
) -> list[Placed]:
  """Places `wanted` categories in turn; what fits nowhere is left out."""
  n = len(wanted)
  sizes = rng.random((n, 5)).tolist()
  poses = rng.random((n, TRIES, 6)).tolist()
  u = rng.random(2).tolist()
  taken = _obstacles(room, found)
  stand = _standing_place(room, u)
  taken.append((*stand, 0.0))
  placed: list[Placed] = []
  tops: dict[int, list] = {}
  for category, draw, tries in zip(wanted, sizes, poses, strict=True):
    model = furniture.ALL[category]
    size = _size(model.size, room, draw, spread)
    if model.stacks and draw[4] < stacking:
      item = _stack(category, size, room, placed, tops, tries)
      if item is not None:
        placed.append(item)
        continue
    for shrink in SHRINK:
      less = tuple(edge * shrink for edge in size)
      item = _stand(category, less, room, taken, tries)
      if item is not None:
        placed.append(item)
        rx, ry = item.reach()
        x, y, _ = item.center
        taken.append((x - rx, y - ry, x + rx, y + ry, 0.0))
        break
  return placed


def _standing_place(room: Room, u) -> tuple[float, float, float, float]:
  """A free square near the middle of the room (of its larger part, in an L)."""
  x, y = (0.35 + 0.3 * u[0]) * room.width, (0.35 + 0.3 * u[1]) * room.depth
  if room.notch is not None:
    x0, y0, x1, y1 = room.notch
    margin = STAND + 0.1
    if x0 - margin < x < x1 + margin and y0 - margin < y < y1 + margin:
      x = x1 + margin if x0 == 0 else x0 - margin
  return x - STAND, y - STAND, x + STAND, y + STAND


def _stand(category, size, room: Room, taken, tries) -> Placed | None:
  """On the floor: half of the furniture has its back to a wall."""
  height = size[2]
  for a, b, side, jitter, walled, turned in tries:
    quarter = int(side * 4)
    yaw = quarter * math.pi / 2
    if turned < 0.5:
      yaw += 0.4 * jitter - 0.2
    rx, ry = reach(size, yaw)
    left, right = rx + WALL_GAP, room.width - rx - WALL_GAP
    near, far = ry + WALL_GAP, room.depth - ry - WALL_GAP
    if left > right or near > far:
      continue
    x, y = left + a * (right - left), near + b * (far - near)
    if walled < 0.5:  # the back (+y) turned by `yaw` points to this wall
      x, y = ((x, far), (left, y), (x, near), (right, y))[quarter]
      if walled < 0.15:  # in a corner
        other = a if quarter % 2 == 0 else b
        if quarter % 2 == 0:
          x = left if other < 0.5 else right
        else:
          y = near if other < 0.5 else far
    x0, y0, x1, y1 = x - rx - GAP, y - ry - GAP, x + rx + GAP, y + ry + GAP
    for bx0, by0, bx1, by1, low in taken:
      if bx0 < x1 and x0 < bx1 and by0 < y1 and y0 < by1 and height > low:
        break
    else:
      return Placed(category, (x, y, height / 2), size, yaw)
  return None


def _stack(category, size, room, placed, tops, tries) -> Placed | None:
  """On a flat top, or None where none has space."""
  bases = [
    i
    for i, p in enumerate(placed)
    if furniture.ALL[p.category].supports and p.size[2] < 1.4
  ]
  if not bases:
    return None
  for a, b, side, which, _, _ in tries:
    base = bases[int(which * len(bases))]
    under = placed[base]
    local = int(side * 4) * math.pi / 2
    rx, ry = reach(size, local)
    # A thing too large for this top comes in a smaller size, within reason.
    fit = min(
      0.9 * under.size[0] / (2 * rx),
      0.9 * under.size[1] / (2 * ry),
      (min(HIGHEST, room.height - 0.15) - under.size[2]) / size[2],
    )
    if fit < 0.4:
      continue
    edges = tuple(edge * min(fit, 1.0) for edge in size)
    rx, ry = reach(edges, local)
    x = (2 * a - 1) * (under.size[0] / 2 - rx)
    y = (2 * b - 1) * (under.size[1] / 2 - ry)
    others = tops.setdefault(base, [])
    if any(
      abs(x - ox) < rx + orx + 0.03 and abs(y - oy) < ry + ory + 0.03
      for ox, oy, orx, ory in others
    ):
      continue
    others.append((x, y, rx, ry))
    cos, sin = math.cos(under.yaw), math.sin(under.yaw)
    center = (
      under.center[0] + cos * x - sin * y,
      under.center[1] + sin * x + cos * y,
      under.size[2] + edges[2] / 2,
    )
    return Placed(category, center, edges, under.yaw + local, base)
  return None
