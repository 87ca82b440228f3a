# SPDX-License-Identifier: Apache-2.0
"""Which object covers how many pixels, exactly, on the host.

A small exact ray caster in numpy, so that questions about what is seen need no
accelerator. It gives the same ids as `render.py` at the same resolution. Only
the rays inside a primitive's projected bounds are tested against it.
"""

from __future__ import annotations

import numpy as np

from spatial_jax.geometry import camera
from spatial_jax.types import Float, Int
from spatial_jax.world import parts

GRID = 32
NEAR = 0.05  # metres; what is closer to the camera plane isn't seen
_TINY = np.float32(1e-9)
_SIGNS = np.array(
  [[x, y, z] for z in (-1, 1) for y in (-1, 1) for x in (-1, 1)], np.float32
)
# Pairs of corners that differ in one sign.
_EDGES = np.array(
  [[i, i | bit] for i in range(8) for bit in (1, 2, 4) if not i & bit]
)


def pixel_counts(
  scene: dict[str, np.ndarray],
  world_from_camera: Float[np.ndarray, "F 4 4"],
  intrinsics: Float[np.ndarray, "3 3"],
  grid: int = GRID,
) -> Int[np.ndarray, "F O"]:
  """Pixels of each object in each frame, rendered with grid x grid pixels.

  Args:
    intrinsics: of any image size, with the principal point in the middle, from
      which the size is read.
  """
  height, width = (
    round(2 * float(intrinsics[1, 2])),
    round(2 * float(intrinsics[0, 2])),
  )
  small = camera.resize_intrinsics(
    np.asarray(intrinsics, np.float32), (height, width), (grid, grid)
  )
  ids, _ = _cast_grid(scene, world_from_camera, small, grid)
  frames, objects = len(world_from_camera), len(scene["object_category"])
  flat = (
    ids.reshape(frames, -1) + 1 + np.arange(frames)[:, None] * (objects + 1)
  )
  counts = np.bincount(flat.ravel(), minlength=frames * (objects + 1))
  return counts.reshape(frames, objects + 1)[:, 1:].astype(np.int32)


def depth_at(
  scene: dict[str, np.ndarray],
  world_from_camera: Float[np.ndarray, "4 4"],
  intrinsics: Float[np.ndarray, "3 3"],
  points: Float[np.ndarray, "n 2"],
) -> Float[np.ndarray, " n"]:
  """z-depth in metres at image points (x, y); pixel centres at +0.5."""
  points = np.asarray(points, np.float32)
  at = np.asarray(intrinsics, np.float32)
  local = np.stack(
    [
      (points[:, 0] - at[0, 2]) / at[0, 0],
      (points[:, 1] - at[1, 2]) / at[1, 1],
      np.ones(len(points), np.float32),
    ],
    -1,
  )
  pose = np.asarray(world_from_camera, np.float32)
  direction = local @ pose[:3, :3].T
  origin = np.broadcast_to(pose[:3, 3], direction.shape)
  depth = shell_depth(scene, origin, direction)
  real = np.flatnonzero(scene["primitive_shape"])
  ray = np.repeat(np.arange(len(points)), len(real))
  t = _hit(scene, np.tile(real, len(points)), origin[ray], direction[ray])
  nearest = t.reshape(len(points), len(real)).min(1, initial=np.inf)
  return np.minimum(depth, nearest)


def _cast_grid(scene, world_from_camera, intrinsics, grid: int):
  """Object ids i32[F grid grid] (-1 = room) and primitive depths f32."""
  pose = np.asarray(world_from_camera, np.float32)
  frames = len(pose)
  real = np.flatnonzero(scene["primitive_shape"])
  local = camera.rays(intrinsics, grid, grid).reshape(-1, 3)
  direction = local @ pose[:, :3, :3].transpose(0, 2, 1)  # [F grid*grid 3]
  direction = direction.reshape(-1, 3)
  ids = np.full(frames * grid * grid, -1, np.int32)
  best = np.full(frames * grid * grid, np.inf, np.float32)
  if _reflex(scene["room_polygon"]):  # an inner corner hides objects
    origin = np.repeat(pose[:, :3, 3], grid * grid, 0)
    best = shell_depth(scene, origin, direction)
  frame, primitive, ray = _candidates(scene, real, pose, intrinsics, grid)
  t = _hit(scene, primitive, pose[frame, :3, 3], direction[ray])
  hit = t < best[ray]
  primitive, ray, t = primitive[hit], ray[hit], t[hit]
  np.minimum.at(best, ray, t)
  first = t <= best[ray]
  # Of two primitives at one depth the earlier wins, as in the renderer.
  order = np.argsort(-primitive[first], kind="stable")
  ids[ray[first][order]] = scene["primitive_object"][primitive[first][order]]
  return ids.reshape(frames, grid, grid), best.reshape(frames, grid, grid)


def _reflex(polygon: np.ndarray) -> bool:
  edge = np.roll(polygon, -1, 0) - polygon
  edge = edge[np.abs(edge).sum(1) > 0]
  after = np.roll(edge, -1, 0)
  return bool((edge[:, 0] * after[:, 1] < edge[:, 1] * after[:, 0]).any())


def _candidates(scene, real, pose, intrinsics, grid: int):
  """(frame, primitive, ray) triples where a primitive's bounds are seen."""
  yaw = scene["primitive_yaw"][real]
  half = scene["primitive_half"][real, None] * _SIGNS  # [P 8 3]
  cos, sin = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
  corner = np.stack(
    [
      cos * half[..., 0] - sin * half[..., 1],
      sin * half[..., 0] + cos * half[..., 1],
      half[..., 2],
    ],
    -1,
  )
  corner += scene["primitive_center"][real, None]
  away = corner.reshape(1, -1, 3) - pose[:, None, :3, 3]
  seen = (away @ pose[:, :3, :3]).reshape(len(pose), len(real), 8, 3)
  # Where a box reaches behind the camera, its edges are cut at the near plane.
  a, b = seen[:, :, _EDGES[:, 0]], seen[:, :, _EDGES[:, 1]]
  za, zb = a[..., 2:] - NEAR, b[..., 2:] - NEAR
  crosses = (za < 0) != (zb < 0)
  share = za / np.where(crosses, za - zb, 1)
  cut = a + share * (b - a)
  points = np.concatenate([seen, cut], 2)  # [F P 20 3]
  valid = np.concatenate([seen[..., 2] >= NEAR, crosses[..., 0]], 2)
  depth = np.maximum(points[..., 2], NEAR)
  bounds = []
  for axis in (0, 1):
    at = intrinsics[axis, axis] * points[..., axis] / depth
    at += intrinsics[axis, 2] - 0.5  # in pixel centres
    low = np.where(valid, at, np.inf).min(2) - 1e-2
    high = np.where(valid, at, -np.inf).max(2) + 1e-2
    first = np.clip(np.ceil(low), 0, grid).astype(np.int32)
    last = np.clip(np.floor(high), -1, grid - 1).astype(np.int32)
    bounds.append((first, np.maximum(last - first + 1, 0)))
  (x0, nx), (y0, ny) = bounds
  frame, which = np.nonzero(nx * ny)
  x0, nx, y0, ny = (v[frame, which] for v in (x0, nx, y0, ny))
  number = nx * ny
  ends = np.cumsum(number)
  total = int(ends[-1]) if len(ends) else 0
  pair = np.repeat(np.arange(len(number)), number)
  inner = np.arange(total, dtype=np.int32) - (ends - number)[pair]
  row = inner // nx[pair]
  column = inner - row * nx[pair]
  pixel = (y0[pair] + row) * grid + x0[pair] + column
  return frame[pair], real[which[pair]], frame[pair] * grid * grid + pixel


def _hit(scene, primitive, origin, direction) -> np.ndarray:
  """Depth at which each ray enters its primitive; inf where it doesn't."""
  yaw = scene["primitive_yaw"]
  cos, sin = np.cos(yaw)[primitive], np.sin(yaw)[primitive]
  scale = (1 / scene["primitive_half"])[primitive]
  away = origin - scene["primitive_center"][primitive]
  qx = (cos * away[:, 0] + sin * away[:, 1]) * scale[:, 0]
  qy = (cos * away[:, 1] - sin * away[:, 0]) * scale[:, 1]
  qz = away[:, 2] * scale[:, 2]
  ex = (cos * direction[:, 0] + sin * direction[:, 1]) * scale[:, 0]
  ey = (cos * direction[:, 1] - sin * direction[:, 0]) * scale[:, 1]
  ez = direction[:, 2] * scale[:, 2]
  enter, leave = _slab(qz, ez)
  shape = scene["primitive_shape"][primitive]
  flat = np.flatnonzero(shape == parts.BOX)
  for q, e in ((qx, ex), (qy, ey)):
    near, far = _slab(q[flat], e[flat])
    enter[flat] = np.maximum(enter[flat], near)
    leave[flat] = np.minimum(leave[flat], far)
  turn = np.flatnonzero(shape != parts.BOX)
  ball = (shape[turn] == parts.ELLIPSOID).astype(np.float32)
  near, far = _round(*(v[turn] for v in (qx, qy, qz, ex, ey, ez)), ball)
  enter[turn] = np.maximum(enter[turn], near)
  leave[turn] = np.minimum(leave[turn], far)
  return np.where((enter < leave) & (enter > NEAR), enter, np.inf)


def _slab(q, e):
  """Parameters between which q + t e lies within [-1, 1]."""
  inverse = 1 / np.where(np.abs(e) < _TINY, _TINY, e)
  middle, half = -q * inverse, np.abs(inverse)
  return middle - half, middle + half


def _round(qx, qy, qz, ex, ey, ez, ball):
  """Same within the unit sphere (`ball` 1) or cylinder (0).

  The foot of the perpendicular comes first: the textbook discriminant loses
  all digits of a thin rod far away.
  """
  a = np.maximum(ex * ex + ey * ey + ball * ez * ez, _TINY)
  middle = -(qx * ex + qy * ey + ball * qz * ez) / a
  px, py, pz = qx + middle * ex, qy + middle * ey, qz + middle * ez
  rest = (1 - (px * px + py * py + ball * pz * pz)) / a
  half = np.sqrt(np.maximum(rest, 0))
  near = np.where(rest > 0, middle - half, np.inf)
  return near, np.where(rest > 0, middle + half, -np.inf)


def shell_depth(
  scene: dict[str, np.ndarray],
  origin: Float[np.ndarray, "n 3"],
  direction: Float[np.ndarray, "n 3"],
) -> Float[np.ndarray, " n"]:
  """Depth of floor, ceiling and walls along rays that start in the room."""
  dz = direction[:, 2]
  dz = np.where(np.abs(dz) < _TINY, _TINY, dz)
  top = np.where(dz > 0, scene["room_height"], np.float32(0))
  nearest = (top - origin[:, 2]) / dz
  start = scene["room_polygon"]
  edge = np.roll(start, -1, 0) - start
  for (x, y), (ex, ey) in zip(start, edge, strict=True):
    if ex == 0 and ey == 0:
      continue
    # Rays that leave through this wall run against its inward normal.
    speed = direction[:, 0] * ey - direction[:, 1] * ex
    away = (x - origin[:, 0]) * ey - (y - origin[:, 1]) * ex
    t = away / np.where(speed > _TINY, speed, 1)
    along = (origin[:, 0] + t * direction[:, 0] - x) * ex
    along += (origin[:, 1] + t * direction[:, 1] - y) * ey
    along /= ex * ex + ey * ey
    # A little more than the wall, so that no ray slips through a corner.
    on = (speed > _TINY) & (t > 0) & (along > -1e-5) & (along < 1 + 1e-5)
    nearest = np.where(on, np.minimum(nearest, t), nearest)
  return nearest
