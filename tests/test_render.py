# SPDX-License-Identifier: Apache-2.0
"""The renderer against a second ray caster: float64, one ray at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax.geometry import camera
from spatial_jax.world import cameras, render, scene, visibility

NEAR = 0.05


def enter_box(o, d, half):
  """First crossing of a face's plane within the face, from outside."""
  best = math.inf
  for axis in range(3):
    for side in (-half[axis], half[axis]):
      if d[axis] == 0:
        continue
      t = (side - o[axis]) / d[axis]
      p = [o[k] + t * d[k] for k in range(3)]
      others = [k for k in range(3) if k != axis]
      if all(abs(p[k]) <= half[k] for k in others):
        best = min(best, t)
  return best


def enter_ellipsoid(o, d, half):
  a = sum((d[k] / half[k]) ** 2 for k in range(3))
  b = sum(o[k] * d[k] / half[k] ** 2 for k in range(3))
  c = sum((o[k] / half[k]) ** 2 for k in range(3)) - 1
  inner = b * b - a * c
  return (-b - math.sqrt(inner)) / a if inner > 0 else math.inf


def enter_cylinder(o, d, half):
  best = math.inf
  a = sum((d[k] / half[k]) ** 2 for k in range(2))
  b = sum(o[k] * d[k] / half[k] ** 2 for k in range(2))
  c = sum((o[k] / half[k]) ** 2 for k in range(2)) - 1
  inner = b * b - a * c
  if a > 0 and inner > 0:
    t = (-b - math.sqrt(inner)) / a
    if abs(o[2] + t * d[2]) <= half[2]:
      best = t
  for cap in (-half[2], half[2]):
    if d[2] != 0:
      t = (cap - o[2]) / d[2]
      x, y = ((o[k] + t * d[k]) / half[k] for k in range(2))
      if x * x + y * y <= 1:
        best = min(best, t)
  return best


def leave_room(o, d, polygon, height):
  best = math.inf
  if d[2]:
    best = ((height if d[2] > 0 else 0) - o[2]) / d[2]
  for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, 0), strict=True):
    # o + t d = a + s (b - a), by Cramer's rule.
    det = d[0] * (y0 - y1) - d[1] * (x0 - x1)
    if abs(det) < 1e-12:
      continue
    t = ((x0 - o[0]) * (y0 - y1) - (y0 - o[1]) * (x0 - x1)) / det
    s = (d[0] * (y0 - o[1]) - d[1] * (x0 - o[0])) / det
    if t > 0 and -1e-9 <= s <= 1 + 1e-9:
      best = min(best, t)
  return best


def cast(room, pose, intrinsics, height, width):
  """Depth and object ids of one frame, pixel by pixel."""
  room = {k: np.asarray(v, np.float64) for k, v in room.items()}
  pose, at = np.asarray(pose, np.float64), np.asarray(intrinsics, np.float64)
  enter = {1: enter_box, 2: enter_cylinder, 3: enter_ellipsoid}
  depth = np.zeros((height, width))
  ids = np.zeros((height, width), int)
  parts = []
  for i in np.flatnonzero(room["primitive_shape"]):
    c, s = np.cos(room["primitive_yaw"][i]), np.sin(room["primitive_yaw"][i])
    local_from_world = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    origin = local_from_world @ (pose[:3, 3] - room["primitive_center"][i])
    parts.append((i, local_from_world, origin.tolist()))
  for row in range(height):
    for column in range(width):
      x = (column + 0.5 - at[0, 2]) / at[0, 0]
      y = (row + 0.5 - at[1, 2]) / at[1, 1]
      ray = pose[:3, :3] @ (x, y, 1)
      best = leave_room(
        pose[:3, 3], ray, room["room_polygon"], room["room_height"]
      )
      owner = -1
      for i, turn, origin in parts:
        f = enter[int(room["primitive_shape"][i])]
        t = f(origin, (turn @ ray).tolist(), room["primitive_half"][i].tolist())
        if NEAR < t < best:
          best, owner = t, int(room["primitive_object"][i])
      depth[row, column], ids[row, column] = best, owner
  return depth, ids


def smooth(depth, ids):
  """Pixels away from silhouettes: like their four neighbours."""
  height, width = ids.shape
  inner = np.zeros((height, width), bool)
  inner[1:-1, 1:-1] = True
  for shift in ((0, 1), (0, -1), (1, 0), (-1, 0)):
    step = np.abs(np.roll(depth, shift, (0, 1)) - depth)
    inner &= np.roll(ids, shift, (0, 1)) == ids
    inner &= step < 0.2 * depth
  return inner


def rooms():
  plain = scene.SIMPLE
  yield "plain", plain, (24, 24), cameras.turntable
  yield "full", {"l_shaped": 0.0}, (18, 30), cameras.turntable
  yield "l", {"l_shaped": 1.0, "stacking": 1.0}, (30, 18), cameras.turntable
  yield "crowded", {"objects": (20, 24), "distinct": (9, 13)}, (20, 28), None


@pytest.mark.parametrize(
  ("kwargs", "size", "path"),
  [pytest.param(*r[1:], id=r[0]) for r in rooms()],
)
def test_depth_and_ids_equal_a_float64_ray_caster(kwargs, size, path):
  checked = 0
  for index in range(3):
    room = scene.sample(3, "test", index, **kwargs)
    rng = np.random.default_rng(index)
    poses = (path or cameras.turntable)(room, rng, 4)[index : index + 1]
    at = camera.intrinsics(*size, 85.0)
    got = render.render(room, poses, at, *size)
    depth, ids = cast(room, poses[0], at, *size)
    inner = smooth(depth, ids)
    checked += inner.sum()
    np.testing.assert_array_equal(
      np.asarray(got["object"][0])[inner], ids[inner]
    )
    wrong = np.abs(np.asarray(got["depth"][0]) - depth)[inner]
    assert wrong.max() <= 1e-4, wrong.max()
  assert checked > 0.4 * 3 * size[0] * size[1]


def test_points_depth_and_normals_are_consistent():
  room = scene.sample(0, "train", 5)
  poses = cameras.turntable(room, np.random.default_rng(0), 3)
  at = camera.intrinsics(40, 56, 90.0)
  got = render.render(room, poses, at, 40, 56)
  many = np.broadcast_to(at, (3, 3, 3))
  points = camera.unproject(np.asarray(got["depth"]), many, poses)
  np.testing.assert_allclose(got["point"], points, atol=2e-5)
  normal = np.asarray(got["normal"])
  np.testing.assert_allclose(np.linalg.norm(normal, axis=-1), 1, atol=1e-4)
  away = points - poses[:, None, None, :3, 3]
  assert ((away * normal).sum(-1) < 1e-4).all()  # surfaces face the camera
  # Normals of flat pixels are those of the points around them.
  right = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
  down = points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
  cross = np.cross(down, right)
  cross /= np.linalg.norm(cross, axis=-1, keepdims=True)
  agree = (cross * normal[:, 1:-1, 1:-1]).sum(-1)
  assert np.median(agree) > 0.999


def test_ids_equal_those_seen_on_the_host():
  at = camera.intrinsics(64, 64, 100.0)
  small = camera.resize_intrinsics(at, (64, 64), (32, 32))
  for kwargs in (scene.SIMPLE, {"l_shaped": 1.0}):
    differ = 0
    for index in range(12):
      room = scene.sample(1, "validation", index, **kwargs)
      poses = cameras.turntable(room, np.random.default_rng(index), 4)
      ids = np.asarray(render.render(room, poses, small, 32, 32)["object"])
      counts = visibility.pixel_counts(room, poses, at)
      want = [
        [(frame == o).sum() for o in range(counts.shape[1])] for frame in ids
      ]
      differ += np.abs(counts - want).sum()
    assert differ <= 12  # of 49,152 pixels, on edges, where float32 rounds


def test_depth_at_a_point_equals_the_rendered_depth():
  for index in range(4):
    room = scene.sample(2, "test", index)
    poses = cameras.turntable(room, np.random.default_rng(index), 1)
    at = camera.intrinsics(24, 32, 90.0)
    depth = np.asarray(render.render(room, poses, at, 24, 32)["depth"][0])
    x, y = np.meshgrid(np.arange(32) + 0.5, np.arange(24) + 0.5)
    points = np.stack([x, y], -1).reshape(-1, 2)
    got = visibility.depth_at(room, poses[0], at, points).reshape(24, 32)
    assert (np.abs(got - depth) < 1e-4).mean() > 0.999


def test_rendering_a_batch_equals_rendering_each_room():
  rooms = [scene.sample(0, "train", i, **scene.SIMPLE) for i in range(3)]
  poses = np.stack(
    [cameras.turntable(r, np.random.default_rng(0), 2) for r in rooms]
  )
  at = np.stack([camera.intrinsics(16, 20, 90.0)] * 3)
  many = {k: np.stack([r[k] for r in rooms]) for k in rooms[0]}
  batch = render.render_batch(many, poses, at, 16, 20)
  for i, room in enumerate(rooms):
    one = render.render(room, poses[i], at[i], 16, 20)
    for key, value in one.items():
      np.testing.assert_allclose(batch[key][i], value, atol=1e-5)


def test_something_over_a_floor_darkens_it():
  room = scene.sample(0, "train", 0, **scene.SIMPLE)
  for key in ("primitive_shape", "primitive_object"):
    room[key] = np.zeros_like(room[key])
  room["primitive_shape"][0] = 1
  room["primitive_center"][0] = (*room["room_polygon"].mean(0), 0.5)
  room["primitive_half"][0] = (0.3, 0.3, 0.5)
  room["primitive_yaw"][0] = 0
  eye = np.array([*room["room_polygon"].mean(0), 2.0])
  pose = camera.look_at(eye, eye - [0, 0, 1.0])[None]
  at = camera.intrinsics(48, 48, 100.0)
  bright = render.render(room, pose, at, 48, 48)
  dark = render.render(room, pose, at, 48, 48, shadows=True)
  changed = np.abs(bright["rgb"] - dark["rgb"]).max(-1)[0] > 1e-3
  assert 0.01 < changed.mean() < 0.5
  # The shadow lies opposite of the light, which comes from +x and +y.
  place = np.asarray(bright["point"][0])[changed & (bright["object"][0] < 0)]
  assert (place[:, :2].mean(0) < eye[:2]).all()


def test_padding_with_empty_primitives_changes_nothing():
  room = scene.sample(0, "test", 1, **scene.SIMPLE)
  more = scene.sample(0, "test", 1, **{**scene.SIMPLE, "max_primitives": 64})
  poses = cameras.turntable(room, np.random.default_rng(0), 1)
  at = camera.intrinsics(16, 16, 90.0)
  a = render.render(room, poses, at, 16, 16)
  b = render.render(more, poses, at, 16, 16)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_colours_are_finite_and_in_range():
  room = scene.sample(0, "train", 9)
  poses = cameras.turntable(room, np.random.default_rng(0), 4)
  at = camera.intrinsics(33, 47, 90.0)
  got = render.render(room, poses, at, 33, 47, shadows=True)
  assert got["rgb"].shape == (4, 33, 47, 3)
  for value in got.values():
    assert bool(jnp.isfinite(value).all())
  assert float(got["rgb"].min()) >= 0
  assert float(got["rgb"].max()) <= 1
