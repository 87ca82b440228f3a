# SPDX-License-Identifier: Apache-2.0
"""VGGT's losses against cases worked by hand, and the scores of geometry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax.evaluators import geometry
from spatial_jax.geometry import camera, pose
from spatial_jax.models import vggt_loss

SIDE = 12  # 144 pixels: enough that a sample counts

# One program each, where operations one by one are as many.
truth = jax.jit(vggt_loss.truth)
camera_loss = jax.jit(vggt_loss.camera_loss)
regression_loss = jax.jit(vggt_loss.regression_loss, static_argnums=4)
gradient_loss = jax.jit(vggt_loss.gradient_loss)
compute = jax.jit(vggt_loss.compute, static_argnames="depth")


def batch(rows=2, frames=3, seed=0):
  rng = np.random.default_rng(seed)
  poses = camera.from_heading(
    rng.normal(size=(rows, frames, 3)),
    rng.uniform(-1, 1, (rows, frames)),
    rng.uniform(-0.5, 0.5, (rows, frames)),
  )
  k = camera.intrinsics(SIDE, SIDE, 80.0)
  return {
    "depth": rng.uniform(1, 3, (rows, frames, SIDE, SIDE)).astype(np.float32),
    "depth_mask": np.ones((rows, frames, SIDE, SIDE), bool),
    "world_from_camera": poses,
    "intrinsics": np.broadcast_to(k, (rows, frames, 3, 3)),
  }


def maps(value, channels=1):
  shape = (1, 1, SIDE, SIDE, channels)
  return jnp.broadcast_to(jnp.float32(value), shape)


def regress(got, want=0.0, confidence=1.0, mask=None, quantile=0.0):
  got = jnp.asarray(got, jnp.float32)
  want = jnp.broadcast_to(jnp.float32(want), got.shape)
  sure = jnp.broadcast_to(jnp.float32(confidence), got.shape[:-1])
  if mask is None:
    mask = jnp.ones(got.shape[:-1], bool)
  out = regression_loss(got, sure, want, mask, quantile)
  return {k: float(v) for k, v in out.items()}


def test_truth_of_two_cameras_is_in_the_first_ones_axes_with_mean_distance_1():
  # Both look along x; the second stands 2 m ahead. All depths are 4 m.
  poses = camera.from_heading(
    np.array([[[1.0, 5, 1], [3, 5, 1]]]), np.zeros((1, 2)), np.zeros((1, 2))
  )
  given = batch(1, 2) | {
    "depth": np.full((1, 2, SIDE, SIDE), 4, np.float32),
    "world_from_camera": poses,
  }
  want = truth(given)
  scale = float(want["scale"][0])
  np.testing.assert_allclose(want["depth"], 4 / scale, rtol=1e-6)
  np.testing.assert_allclose(want["points"][0, 0, ..., 2], 4 / scale, rtol=1e-6)
  np.testing.assert_allclose(want["points"][0, 1, ..., 2], 6 / scale, rtol=1e-6)
  distance = np.linalg.norm(want["points"], axis=-1).mean()
  np.testing.assert_allclose(distance, 1, rtol=1e-6)
  encoding = np.asarray(want["pose_encoding"][0])
  fov = np.radians(80)
  first = [0, 0, 0, 0, 0, 0, 1, fov, fov]
  np.testing.assert_allclose(encoding[0], first, atol=1e-6)
  # camera_from_world: the origin lies 2 m behind the second camera.
  second = [0, 0, -2 / scale, 0, 0, 0, 1, fov, fov]
  np.testing.assert_allclose(encoding[1], second, atol=1e-6)


def test_moving_and_scaling_the_world_changes_no_truth():
  given = batch()
  want = truth(given)
  angle = 0.7
  move = np.eye(4, dtype=np.float32)
  move[:2, :2] = [
    [np.cos(angle), -np.sin(angle)],
    [np.sin(angle), np.cos(angle)],
  ]
  move[:3, 3] = [3, -2, 1]
  moved = camera.compose(
    np.broadcast_to(move, given["world_from_camera"].shape),
    given["world_from_camera"],
  )
  moved = moved.astype(np.float32)
  moved[..., :3, 3] *= 2.5
  other = given | {"depth": 2.5 * given["depth"], "world_from_camera": moved}
  got = truth(other)
  np.testing.assert_allclose(got["scale"], 2.5 * want["scale"], rtol=1e-5)
  for name in ("pose_encoding", "depth", "points"):
    np.testing.assert_allclose(got[name], want[name], atol=1e-5)


def test_invalid_pixels_leave_the_scale_alone():
  given = batch()
  mask = given["depth_mask"].copy()
  mask[:, :, :6] = False
  want = truth(given | {"depth_mask": mask})
  wild = given["depth"].copy()
  wild[:, :, :6] = 1e6
  got = truth({**given, "depth": wild, "depth_mask": mask})
  np.testing.assert_allclose(got["scale"], want["scale"])


def test_camera_loss_weighs_later_stages_more():
  want = jnp.zeros((1, 2, 9))
  stages = jnp.stack([want + 1, want + 2])
  got = camera_loss(stages, want, jnp.array([True]))
  # (0.6 * 1 + 1 * 2) / 2 for each part, and half of it for the field of view.
  assert float(got["translation"]) == pytest.approx(1.3)
  assert float(got["rotation"]) == pytest.approx(1.3)
  assert float(got["camera"]) == pytest.approx(1.3 * 2.5)


def test_a_wild_translation_is_cut_off_at_100():
  want = jnp.zeros((1, 1, 9))
  got = camera_loss((want + 1e4)[None], want, jnp.array([True]))
  assert float(got["translation"]) == 100
  assert float(got["rotation"]) == pytest.approx(1e4)


def test_samples_whose_first_frame_is_empty_do_not_count():
  want = jnp.zeros((2, 1, 9))
  stages = jnp.stack([want.at[0].set(1).at[1].set(50)])
  got = camera_loss(stages, want, jnp.array([True, False]))
  assert float(got["camera"]) == pytest.approx(2.5)
  none = camera_loss(stages, want, jnp.array([False, False]))
  assert float(none["camera"]) == 0


def test_regression_is_the_distance_and_its_share_of_confidence():
  got = regress(maps([3.0, 0.0, 4.0], 3), confidence=2.0)
  assert got["error"] == pytest.approx(5)
  assert got["sure"] == pytest.approx(5 * 2 - 0.2 * np.log(2))
  assert got["gradient"] == 0  # the same error everywhere


def test_the_best_confidence_is_a_fifth_over_the_error():
  def sure(confidence):
    return regress(maps(0.05), confidence=confidence)["sure"]

  assert sure(4.0) < min(sure(3.8), sure(4.2))


def test_fewer_than_100_valid_pixels_give_no_loss_and_no_gradient():
  mask = jnp.zeros((1, 1, SIDE, SIDE), bool).at[0, 0, 0].set(True)
  assert not any(regress(maps(3.0), mask=mask).values())

  def total(x):
    ones = jnp.ones((1, 1, SIDE, SIDE))
    return sum(regression_loss(x, ones, maps(1.0), mask, 0.5).values())

  assert not np.any(jax.jit(jax.grad(total))(maps(3.0)))


def test_invalid_pixels_and_exact_ones_have_finite_gradients():
  mask = jnp.ones((1, 1, SIDE, SIDE), bool).at[0, 0, :3].set(False)

  def total(x):
    ones = jnp.ones((1, 1, SIDE, SIDE))
    want = maps(1.0)
    return sum(regression_loss(x, ones, want, mask, 0.9).values())

  slope = jax.jit(jax.grad(total))(maps(1.0).at[0, 0, :3].set(jnp.inf))
  assert np.isfinite(slope).all()


def test_the_gradient_term_of_a_ramp():
  # An error that grows by 1 a column: differences of 1, 2, 4 and 8 at the four
  # strides, none down the rows.
  ramp = jnp.broadcast_to(jnp.arange(16.0), (1, 1, 16, 16))[..., None]
  got = float(gradient_loss(ramp, jnp.ones((1, 1, 16, 16), bool)))
  want = 1 * 15 / 16 + 2 * 7 / 8 + 4 * 3 / 4 + 8 * 1 / 2
  assert got == pytest.approx(want / 4)


def test_the_gradient_term_skips_pairs_with_an_invalid_pixel():
  step = jnp.zeros((1, 1, 16, 16, 1)).at[:, :, :, 7].set(1000.0)
  mask = jnp.ones((1, 1, 16, 16), bool).at[:, :, :, 7].set(False)
  assert float(gradient_loss(step, mask)) == 0


def test_the_quantile_leaves_out_the_largest_errors():
  # 2304 pixels, 46 of them wrong by 50, the others by about 1.
  about = 1 + 1e-4 * jnp.arange(2304.0).reshape(1, 4, 24, 24, 1) / 2304
  error = about.at[0, 0, :2, :23].set(50.0)
  kept = regress(error, quantile=0.98)
  assert kept["error"] == pytest.approx(1, abs=1e-3)
  every = regress(error)
  assert every["error"] == pytest.approx(1 + 49 * 46 / 2304, abs=1e-3)
  # Too few would be left: all count.
  few = regress(error[:, :1], quantile=0.98)
  assert few["error"] == pytest.approx(1 + 49 * 46 / 576, abs=1e-3)


def test_perfect_predictions_leave_only_the_reward_of_confidence():
  given = batch()
  want = truth(given)
  ones = jnp.full(want["depth"].shape, 1.0)
  predictions = {
    "pose_encodings": jnp.stack([want["pose_encoding"]] * 4),
    "depth": want["depth"],
    "depth_confidence": ones,
    "points": want["points"],
    "points_confidence": ones,
  }
  loss, terms = compute(predictions, want)
  assert float(loss) == pytest.approx(0, abs=1e-5)
  sure = predictions | {"depth_confidence": 2 * ones}
  loss, _ = compute(sure, want, depth=3.0)
  assert float(loss) == pytest.approx(-3 * 0.2 * np.log(2), abs=1e-5)
  assert {"camera", "rotation", "depth/error", "points/sure"} <= set(terms)


# --- scores -----------------------------------------------------------------


def turned(degrees):
  heading = np.radians(np.asarray(degrees, np.float64))
  return camera.from_heading(
    np.zeros((*heading.shape, 3)), heading, 0 * heading
  )


def test_angles_between_rotations_in_degrees():
  a, b = turned([0.0, 10.0, 0.0]), turned([0.001, 40.0, 180.0])
  got = geometry.angle_degrees(a[:, :3, :3], b[:, :3, :3])
  np.testing.assert_allclose(got, [0.001, 30, 180], rtol=1e-3)


def test_depth_errors_with_and_without_equal_medians():
  want = np.array([1.0, 2, 4, 8] * 4).reshape(1, 1, 4, 4)
  got = geometry.depth_errors(1.5 * want, want, np.ones(want.shape, bool))
  np.testing.assert_allclose(got["absrel"], 0.5)
  np.testing.assert_allclose(got["absrel_aligned"], 0, atol=1e-12)
  bad = want.copy()
  bad[..., 0, :] = 1e9
  valid = np.ones(want.shape, bool)
  valid[..., 0, :] = False
  got = geometry.depth_errors(bad, want, valid)
  np.testing.assert_allclose(got["absrel"], 0)


def test_relative_rotations_do_not_depend_on_the_world():
  poses = turned([0.0, 20.0, 50.0])
  got = geometry.relative(poses)
  np.testing.assert_allclose(
    geometry.angle_degrees(got, np.broadcast_to(np.eye(3), got.shape)),
    [20, 50, 30],
    atol=1e-4,
  )
  moved = turned([33.0])[0] @ poses
  np.testing.assert_allclose(geometry.relative(moved), got, atol=1e-6)


def test_the_constant_answer_turns_as_the_mean_does_where_that_is_better():
  rows = [turned([0.0, 30.0 + more]) for more in (-10, 10)]
  truths = {
    "world_from_camera": np.stack(rows),
    "depth": np.stack([np.full((2, 4, 4), d) for d in (1.0, 3.0)]),
    "points": np.zeros((2, 2, 4, 4, 3)),
    "mask": np.ones((2, 2, 4, 4), bool),
  }
  constant = geometry.constants(truths)
  np.testing.assert_allclose(constant["depth"], 2)
  got = geometry.constant_errors(constant, truths)
  np.testing.assert_allclose(got["rotation_degrees"], 10, atol=1e-4)
  np.testing.assert_allclose(got["absrel"], [1, 1 / 3], rtol=1e-6)


def test_truth_given_as_an_answer_has_no_error():
  want = geometry.answer(truth(batch()), truth=True)
  got = geometry.errors(want, want)
  for name, value in got.items():
    np.testing.assert_allclose(value, 0, atol=1e-4, err_msg=name)
  # Depth and cameras give the same points.
  np.testing.assert_allclose(want["fused"], want["points"], atol=1e-5)
  assert pose.decode(np.ones(9), 4, 4)[0].shape == (4, 4)
