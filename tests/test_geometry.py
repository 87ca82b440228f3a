# SPDX-License-Identifier: Apache-2.0
"""Cameras and boxes against cases worked by hand and brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax.geometry import boxes, camera


def random_boxes(rng, n, spread=1.0):
  center = rng.normal(size=(n, 3)) * spread
  return center, rng.uniform(0.2, 2, (n, 3)), rng.uniform(-4, 4, n)


def test_a_point_ahead_lands_in_the_image_centre():
  at = camera.intrinsics(480, 640, 90.0)
  np.testing.assert_allclose(at[0, 0], 320, rtol=1e-6)
  pose = camera.look_at(np.array([1.0, 2, 3]), np.array([4.0, 6, 3]))
  pixel, depth = camera.project(np.array([[4.0, 6, 3]], np.float32), at, pose)
  np.testing.assert_allclose(pixel, [[320, 240]], atol=1e-3)
  np.testing.assert_allclose(depth, [5], rtol=1e-6)


def test_axes_follow_opencv():
  # Facing +y from the origin: image x is world x, image y is world -z.
  pose = camera.from_heading(np.zeros(3), np.float64(np.pi / 2), np.float64(0))
  want = [[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]]
  np.testing.assert_allclose(pose, want, atol=1e-6)
  down = camera.look_at(np.array([0, 0, 2.0]), np.zeros(3))
  np.testing.assert_allclose(down[:3, 2], [0, 0, -1], atol=1e-6)
  np.testing.assert_allclose(down[:3, 1], [0, -1, 0], atol=1e-6)


@pytest.mark.parametrize("xp", [np, jnp])
def test_unproject_then_project_returns_pixel_centres(xp):
  rng = np.random.default_rng(0)
  at = xp.asarray(np.stack([camera.intrinsics(6, 8, 70.0)] * 2))
  pose = xp.asarray(
    camera.from_heading(
      rng.normal(size=(2, 3)), rng.normal(size=2), rng.normal(size=2) / 3
    )
  )
  depth = xp.asarray(rng.uniform(0.5, 5, (2, 6, 8)).astype(np.float32))
  points = camera.unproject(depth, at, pose)
  pixel, back = camera.project(points.reshape(2, 48, 3), at, pose)
  x, y = np.meshgrid(np.arange(8) + 0.5, np.arange(6) + 0.5)
  want = np.broadcast_to(np.stack([x, y], -1).reshape(48, 2), (2, 48, 2))
  np.testing.assert_allclose(pixel, want, atol=1e-4)
  np.testing.assert_allclose(back.reshape(2, 6, 8), depth, rtol=1e-5)


def test_inverse_and_compose_undo_each_other():
  rng = np.random.default_rng(1)
  pose = camera.from_heading(
    rng.normal(size=(5, 3)), np.arange(5.0), np.ones(5)
  )
  both = camera.compose(camera.inverse(pose), pose)
  np.testing.assert_allclose(both, np.stack([np.eye(4)] * 5), atol=1e-6)


def test_resized_intrinsics_see_the_same_directions():
  at = camera.intrinsics(60, 80, 80.0)
  half = camera.resize_intrinsics(at, (60, 80), (30, 20))
  np.testing.assert_allclose(half[0], at[0] / 4)
  np.testing.assert_allclose(half[1], at[1] / 2)
  np.testing.assert_allclose(half[2], [0, 0, 1])


def test_distance_of_upright_boxes_by_hand():
  unit, zero = np.ones(3), np.float64(0)

  def far(center, size=unit, yaw=zero):
    origin = np.zeros(3)
    got = boxes.upright_distance(
      origin, unit, zero, np.asarray(center, float), size, np.asarray(yaw)
    )
    return float(got)

  assert far([3, 0, 0]) == pytest.approx(2)
  assert far([4, 5, 0]) == pytest.approx(5)  # corner to corner, 3-4-5
  assert far([0, 0, 3]) == pytest.approx(2)
  assert far([4, 0, 5]) == pytest.approx(5)
  assert far([0.5, 0.5, 0.5]) == 0
  # A corner that points at a face: half a diagonal is sqrt(1/2).
  assert far([3, 0, 0], yaw=np.pi / 4) == pytest.approx(2.5 - 0.5**0.5)
  # A cross: no corner is inside the other box.
  assert far([0, 0, 0], np.array([9, 0.1, 1])) == 0


def test_distance_of_upright_boxes_by_brute_force():
  rng = np.random.default_rng(2)
  a, b = random_boxes(rng, 12, 2.0), random_boxes(rng, 12, 2.0)
  got = boxes.upright_distance(*a, *b)
  grid = np.stack(np.meshgrid(*[np.linspace(-0.5, 0.5, 9)] * 3), -1)
  grid = grid.reshape(-1, 3)

  def points(center, size, yaw):
    local = grid * size
    cos, sin = np.cos(yaw), np.sin(yaw)
    x = cos * local[:, 0] - sin * local[:, 1]
    y = sin * local[:, 0] + cos * local[:, 1]
    return np.stack([x, y, local[:, 2]], -1) + center

  for i in range(12):
    pa = points(*(v[i] for v in a))
    pb = points(*(v[i] for v in b))
    gap = np.linalg.norm(pa[:, None] - pb[None], axis=-1).min()
    assert got[i] <= gap + 1e-9
    assert gap <= got[i] + 0.4  # the grid's spacing


def test_overlap_of_aligned_boxes():
  low, high = np.zeros((1, 2)), np.full((1, 2), 2.0)
  got = boxes.iou_aligned(low, high, low + 1, high + 1)
  np.testing.assert_allclose(got, 1 / 7)
  np.testing.assert_allclose(boxes.iou_aligned(low, high, low + 5, high + 5), 0)


@pytest.mark.parametrize("xp", [np, jnp])
def test_overlap_of_turned_boxes_by_hand(xp):
  zero = xp.zeros((1,))
  one = xp.asarray(np.array([[0.0, 0, 0]], np.float32))
  size = xp.asarray(np.array([[2.0, 2, 2]], np.float32))

  def iou(f, center, size_b, yaw):
    center = xp.asarray(np.array([center], np.float32))
    size_b = xp.asarray(np.array([size_b], np.float32))
    yaw = xp.asarray(np.array([yaw], np.float32))
    return float(f(one, size, zero.astype(yaw.dtype), center, size_b, yaw)[0])

  flat, full = boxes.iou_birds_eye, boxes.iou_upright
  assert iou(flat, [0, 0, 0], [2, 2, 2], 0) == pytest.approx(1, abs=1e-5)
  assert iou(flat, [0, 0, 9], [2, 2, 2], np.pi / 2) == pytest.approx(
    1, abs=1e-5
  )
  assert iou(flat, [1, 0, 0], [2, 2, 2], 0) == pytest.approx(1 / 3, abs=1e-5)
  # Turned by 45 degrees the shared part is a regular octagon.
  octagon = 8 * (2**0.5 - 1)
  assert iou(flat, [0, 0, 0], [2, 2, 2], np.pi / 4) == pytest.approx(
    octagon / (8 - octagon), abs=1e-5
  )
  assert iou(flat, [5, 0, 0], [2, 2, 2], 0.3) == 0
  assert iou(flat, [0, 0, 0], [1, 1, 1], 0.7) == pytest.approx(1 / 4, abs=1e-5)
  assert iou(full, [0, 0, 1], [2, 2, 2], 0) == pytest.approx(1 / 3, abs=1e-5)
  assert iou(full, [0, 0, 2], [2, 2, 2], 0.2) == 0


def test_overlap_of_turned_boxes_by_sampling():
  rng = np.random.default_rng(3)
  a, b = random_boxes(rng, 30, 0.4), random_boxes(rng, 30, 0.4)
  got = boxes.iou_birds_eye(*a, *b)
  points = rng.uniform(-3.5, 3.5, (60000, 2))

  def inside(center, size, yaw):
    x, y = (points - center[:2]).T
    u = np.cos(yaw) * x + np.sin(yaw) * y
    v = np.cos(yaw) * y - np.sin(yaw) * x
    return (abs(u) <= size[0] / 2) & (abs(v) <= size[1] / 2)

  for i in range(30):
    ia, ib = inside(*(v[i] for v in a)), inside(*(v[i] for v in b))
    want = (ia & ib).sum() / max((ia | ib).sum(), 1)
    assert got[i] == pytest.approx(want, abs=0.06)


def test_overlap_jits_with_fixed_shapes():
  rng = np.random.default_rng(4)
  a = [v.astype(np.float32) for v in random_boxes(rng, 8)]
  b = [v.astype(np.float32) for v in random_boxes(rng, 8)]
  np.testing.assert_allclose(
    jax.jit(boxes.iou_upright)(*a, *b), boxes.iou_upright(*a, *b), atol=1e-5
  )
