# SPDX-License-Identifier: Apache-2.0
"""Voxels and farthest points equal what numpy finds without limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax.geometry import camera, voxels
from spatial_jax.geometry.fps import farthest_points
from spatial_jax.geometry.patches import patch_points

N = 40
rng = np.random.default_rng(0)
POINTS = rng.uniform(-1, 1, (N, 3)).astype(np.float32)
MASK = rng.random(N) < 0.8
FEATURES = rng.normal(size=(N, 5)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=2)
def run(points, mask, capacity, features, key=None):
  found = voxels.assign(points, 0.5, capacity, mask, key)
  return found, *voxels.pool(features, found.slot, capacity)


def numpy_voxels(points, mask):
  cells = np.round(points[mask] / np.float32(0.5)).astype(int)
  rows, slot = np.unique(cells, axis=0, return_inverse=True)
  return rows, slot.reshape(-1)


def test_voxels_are_numbered_in_the_order_of_their_coordinates():
  found, pooled, seen = run(POINTS, MASK, 48, FEATURES)
  rows, slot = numpy_voxels(POINTS, MASK)
  assert int(found.count) == len(rows) < N
  np.testing.assert_array_equal(found.slot[MASK], slot)
  assert np.all(found.slot[~MASK] == 48)
  for i in range(len(rows)):
    mean = FEATURES[MASK][slot == i].mean(0)
    np.testing.assert_allclose(pooled[i], mean, atol=1e-6)
  np.testing.assert_array_equal(seen, np.arange(48) < len(rows))
  assert not np.any(pooled[len(rows) :])


def test_evenly_spaced_voxels_stay_when_there_are_too_many():
  rows, slot = numpy_voxels(POINTS, MASK)
  found, _, seen = run(POINTS, MASK, 7, FEATURES)
  kept = np.arange(7) * len(rows) // 7
  want = np.full(len(rows), 7)
  want[kept] = np.arange(7)
  np.testing.assert_array_equal(found.slot[MASK], want[slot])
  assert int(found.count) == len(rows) and np.all(seen)


def test_a_key_chooses_voxels_at_random_only_when_there_are_too_many():
  rows, slot = numpy_voxels(POINTS, MASK)
  one, two = (
    run(POINTS, MASK, 7, FEATURES, jax.random.key(i))[0].slot[MASK]
    for i in (0, 1)
  )
  assert not np.array_equal(one, two)
  # Seven different voxels, each with all of its points.
  assert len(set(np.asarray(one))) == 8
  assert len(set(zip(slot, np.asarray(one), strict=True))) == len(rows)
  enough = run(POINTS, MASK, 48, FEATURES, jax.random.key(0))[0].slot
  np.testing.assert_array_equal(enough[MASK], slot)


def test_no_valid_point_gives_no_voxel():
  found, pooled, seen = run(POINTS, np.zeros(N, bool), 48, FEATURES)
  assert int(found.count) == 0 and not np.any(seen) and not np.any(pooled)


def test_points_that_are_no_numbers_are_no_voxels():
  points = POINTS.copy()
  points[~MASK] = [np.nan, np.inf, -np.inf]
  found, _, _ = run(points, MASK, 48, FEATURES)
  np.testing.assert_array_equal(found.slot[MASK], numpy_voxels(points, MASK)[1])


def test_halves_go_to_even_voxels():
  points = np.array([[0.25, 0.75, -0.25], [0.0, 1.0, 0.0]], np.float32)
  assert int(voxels.assign(points, 0.5, 2).count) == 1


def numpy_farthest(points, count, start=0):
  chosen = [start]
  while len(chosen) < count:
    away = points[:, None] - points[None, chosen]
    nearest = (away.astype(np.float64) ** 2).sum(-1).min(1)
    chosen.append(int(nearest.argmax()))
  return chosen


def test_farthest_points_are_those_of_an_exhaustive_search():
  got = jax.jit(farthest_points, static_argnums=1)(POINTS, 12)
  np.testing.assert_array_equal(got, numpy_farthest(POINTS, 12))
  got = farthest_points(POINTS, 5, start=3)
  np.testing.assert_array_equal(got, numpy_farthest(POINTS, 5, 3))


def test_the_first_of_equally_far_points_is_chosen():
  points = np.array([[0, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 1, 0]], np.float32)
  np.testing.assert_array_equal(farthest_points(points, 3), [0, 1, 2])


def test_masked_points_are_never_chosen():
  few = np.arange(N) % 8 == 3
  got = np.asarray(farthest_points(POINTS, 10, few))
  assert set(got) == set(np.flatnonzero(few)) and got[0] == 3
  with pytest.raises(ValueError, match="1 to 40"):
    farthest_points(POINTS, N + 1)


def test_patches_are_at_their_upper_left_pixels():
  depth = rng.uniform(1, 3, (2, 12, 18)).astype(np.float32)
  k = np.tile(camera.intrinsics(12, 18, 70.0), (2, 1, 1))
  poses = camera.look_at(np.ones((2, 3)), np.array([[2.0, 3, 0], [0, 4, 1]]))
  points, valid = patch_points(depth, k, poses, (4, 3))
  want = camera.unproject(depth, k, poses)[:, ::3, ::6]
  np.testing.assert_allclose(points, want, atol=1e-5)
  assert np.all(valid)


def test_patches_without_depth_are_at_the_camera():
  depth = np.ones((2, 4, 4), np.float32)
  depth[0, 0, 0], depth[1, 2, 2] = 0, np.nan
  k = np.tile(camera.intrinsics(4, 4, 90.0), (2, 1, 1))
  poses = np.tile(np.eye(4, dtype=np.float32), (2, 1, 1))
  poses[:, :3, 3] = [[1, 2, 3], [4, 5, 6]]
  points, valid = patch_points(depth, k, poses, (2, 2))
  np.testing.assert_array_equal(points[0, 0, 0], [1, 2, 3])
  np.testing.assert_array_equal(points[1, 1, 1], [4, 5, 6])
  assert not valid[0, 0, 0] and not valid[1, 1, 1] and jnp.sum(valid) == 6
  poses[1] = -np.inf  # a lost camera
  points, valid = patch_points(depth, k, poses, (2, 2))
  assert np.all(np.isfinite(points)) and not np.any(valid[1])
