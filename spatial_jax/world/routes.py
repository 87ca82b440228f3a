# SPDX-License-Identifier: Apache-2.0
"""Smooth ways through the free space of a room. numpy only."""

from __future__ import annotations

import heapq
import math

import numpy as np

from spatial_jax.world import freespace

CELLS = 26  # along the longer edge of the room: fine enough, and quick
TURN = math.radians(40)  # largest change of heading between frames


def route(scene, rng: np.random.Generator, stops: int, least: float):
  """Corner points of a way along free cells, and the clearance it keeps.

  Args:
    least: metres to walls and objects, less where no place has as much.
  """
  outline = scene["room_polygon"]
  low, high = outline.min(0), outline.max(0)
  edge = float((high - low).max()) / CELLS
  columns, rows = np.maximum(((high - low) / edge).astype(int), 1).tolist()
  x, y = np.meshgrid(
    low[0] + (np.arange(columns) + 0.5) * edge,
    low[1] + (np.arange(rows) + 0.5) * edge,
  )
  points = np.stack([x, y], -1).reshape(-1, 2)
  objects, walls = freespace.clearance(scene, points)
  gap = np.minimum(objects, walls)
  need = min(least, 0.8 * float(gap.max()))
  free = gap >= need
  start = int(rng.choice(np.flatnonzero(free)))
  # The start may lie in a pocket: begin in the largest part of the room.
  part = max(
    (_reach(free, gap, columns, edge, s) for s in (start, int(gap.argmax()))),
    key=lambda found: len(found[0]),
  )
  cells = np.array(list(part[0]))
  here = int(rng.choice(cells))
  way, visited = [here], [here]
  for _ in range(stops):
    far = np.linalg.norm(
      points[cells, None] - points[None, visited], axis=-1
    ).min(1)
    there = int(cells[(far * rng.uniform(0.7, 1.0, len(far))).argmax()])
    _, parent = _reach(free, gap, columns, edge, here)
    back = [there]
    while back[-1] != here:
      back.append(parent[back[-1]])
    way += back[-2::-1]
    visited.append(there)
    here = there
  return points[way], need


def _reach(free, gap, columns: int, edge: float, start: int):
  """Dijkstra over free cells: cost and parent; wide passages are cheaper."""
  rows = len(free) // columns
  cost, parent = {}, {start: start}
  queue, free = [(0.0, start, start)], free.tolist()
  price = (1 + 0.3 / np.maximum(gap, 0.05)).tolist()
  around = [
    (dx, dy, edge * math.hypot(dx, dy))
    for dx in (-1, 0, 1)
    for dy in (-1, 0, 1)
    if dx or dy
  ]
  while queue:
    so_far, cell, origin = heapq.heappop(queue)
    if cell in cost:
      continue
    cost[cell], parent[cell] = so_far, origin
    row, column = divmod(cell, columns)
    for dx, dy, length in around:
      x, y = column + dx, row + dy
      if 0 <= x < columns and 0 <= y < rows:
        other = y * columns + x
        # Not diagonally past a corner.
        if (
          free[other]
          and other not in cost
          and free[row * columns + x]
          and free[y * columns + column]
        ):
          heapq.heappush(queue, (so_far + length * price[other], other, cell))
  return cost, parent


def resample(
  route: np.ndarray, number: int, length: float | None = None
) -> np.ndarray:
  """Points at equal distances along the first `length` metres of a way."""
  step = np.linalg.norm(np.diff(route, axis=0), axis=-1)
  along = np.concatenate([[0.0], np.cumsum(step)])
  at = np.linspace(0, along[-1] if length is None else length, number)
  return np.stack([np.interp(at, along, route[:, k]) for k in (0, 1)], -1)


def smooth(scene, way: np.ndarray, need: float) -> np.ndarray:
  """Cuts corners as far as the clearance allows."""
  for _ in range(40):
    trial = way.copy()
    trial[1:-1] = (way[:-2] + 2 * way[1:-1] + way[2:]) / 4
    objects, walls = freespace.clearance(scene, trial)
    fine = np.minimum(objects, walls) >= 0.95 * need
    way = np.where(fine[:, None], trial, way)
  return way


def heading(route, at, frames: int, rng, length: float) -> np.ndarray:
  """Looks about a metre ahead, and turns no faster than a person would."""
  if length < 1.0:  # no way to go: look around instead
    return rng.uniform(0, 2 * np.pi) - np.arange(frames) * min(
      TURN, 2 * np.pi / frames
    )
  step = length / max(frames - 1, 1)
  total = np.linalg.norm(np.diff(route, axis=0), axis=-1).sum()
  ahead = max(1, round(min(1.0, float(total)) / step)) if step else 1
  more = resample(route, frames + ahead, min(length + ahead * step, total))
  toward = more[np.arange(frames) + ahead] - at
  wanted = np.arctan2(toward[:, 1], toward[:, 0])
  heading = [float(wanted[0])]
  for target, vector in zip(wanted[1:], toward[1:], strict=True):
    turn = (target - heading[-1] + np.pi) % (2 * np.pi) - np.pi
    turn = turn if np.hypot(*vector) > 0.05 else 0.0
    heading.append(heading[-1] + float(np.clip(turn, -TURN, TURN)))
  return np.array(heading)
