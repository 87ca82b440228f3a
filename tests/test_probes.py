# SPDX-License-Identifier: Apache-2.0
"""Probes, steering and patches on numbers; rooms as stimuli."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import demo
from spatial_jax.analysis import patching, probes, rooms, steering
from spatial_jax.nn import edit
from spatial_jax.world import dataset, visibility


def test_a_probe_finds_a_direction_that_its_controls_do_not():
  rng = np.random.default_rng(0)
  width, count = 64, 192
  direction = rng.standard_normal(width).astype(np.float32)
  x = rng.standard_normal((2 * count, width)).astype(np.float32)
  y = np.arange(2 * count) % 2
  # Far from the origin, as residual streams are.
  x = 40 + 5 * (x + np.where(y[:, None] > 0, 0.25, -0.25) * direction)
  parts = x[:count], y[:count], x[count:], y[count:]
  probe, scores = jax.jit(
    lambda key: probes.fit_with_controls(key, *parts, classes=2)
  )(jax.random.key(0))
  assert scores["held_out"] > 0.9 > 0.7 > scores["shuffled"]
  assert scores["held_out"] > scores["random"] + 0.15
  # It reads features as they are.
  again = probes.accuracy(probe, jnp.asarray(x[count:]), y[count:])
  np.testing.assert_allclose(again, scores["held_out"])
  learned = np.asarray(probe.kernel[:, 1] - probe.kernel[:, 0])
  cosine = learned @ direction
  cosine /= np.linalg.norm(learned) * np.linalg.norm(direction)
  assert cosine > 0.7


def test_steering_amplifies_what_is_there_and_removing_leaves_nothing():
  rng = np.random.default_rng(1)
  hidden = rng.standard_normal((2, 5, 16)).astype(np.float32)
  kernel = rng.standard_normal((16, 2)).astype(np.float32)
  mask = np.zeros((2, 5), bool)
  mask[:, 1:4] = True
  same = np.asarray(steering.steer(hidden, mask, kernel, 0.0))
  np.testing.assert_array_equal(same.view(np.int32), hidden.view(np.int32))
  one = kernel[:, :1]
  more = np.asarray(steering.steer(hidden, mask, one, 2.0))
  np.testing.assert_array_equal(more[~mask], hidden[~mask])
  np.testing.assert_allclose(
    more[mask] @ one, 3 * (hidden[mask] @ one), rtol=1e-4
  )
  less = np.asarray(steering.remove(hidden, mask, kernel))
  np.testing.assert_allclose(less[mask] @ kernel, 0, atol=1e-4)
  np.testing.assert_array_equal(less[~mask], hidden[~mask])


def test_a_sweep_patches_one_slot_at_a_time_from_the_right_places():
  slots = np.arange(3 * 2 * 4, dtype=np.float32).reshape(3, 2, 4, 1)
  where = patching.swap(4, np.array([1, -1]), np.array([3, -1]))
  start = jnp.full((2, 4, 1), -1.0)

  def run(edits):
    return jnp.stack([edit.apply(edits, start, n)[..., 0] for n in range(3)])

  got = np.asarray(patching.sweep(run, slots, *where))  # slot, number, B, T
  for slot in range(3):
    want = np.full((3, 2, 4), -1.0)
    want[slot, :, 1], want[slot, :, 3] = (
      slots[slot, :, 3, 0],
      slots[slot, :, 1, 0],
    )
    np.testing.assert_array_equal(got[slot], want)
  mask, index = patching.last_token(np.array([2, 0]), 4)
  np.testing.assert_array_equal(mask.argmax(1), [2, 0])
  assert mask.sum() == 2 and (index[0] == np.arange(4)).all()


@pytest.fixture(scope="module")
def source():
  return dataset.make(demo.get_config("test"), "test")


def cast(source, row, frame):
  """Object ids of a frame, 64 x 64, by the host's ray caster."""
  scene = {
    key.removeprefix("scene/"): value[0]
    for key, value in row.items()
    if key.startswith("scene/")
  }
  pose = row["world_from_camera"][0, frame][None]
  intrinsics = row["intrinsics"][0]
  return visibility._cast_grid(scene, pose, intrinsics, source.image_size)[
    0
  ].reshape(source.image_size, -1)


def test_rooms_are_asked_in_two_orders_mirrored_and_with_one_thing(source):
  for axis in rooms.AXES:
    (room, pair), *more = rooms.collect(source, axis, 24, most=3)
    labels = [p.label for _, p in [(room, pair), *more]]
    assert 4 < sum(labels) < 20  # either word is true about as often
    words = rooms.AXES[axis][1]
    for order in (0, 1):
      question = pair.question(order)
      said = question.options["AB".index(question.answer)]
      assert said == f"{question.answer}. {words[pair.label]}"
    assert pair.question(0).answer != pair.question(1).answer
  found = rooms.collect(source, "left_right", 6, most=1)
  for room, pair in found:
    row = {k: v[None] for k, v in rooms.row(source, room, pair).items()}
    ids = cast(source, row, pair.frame)
    place = [np.flatnonzero((ids == i).any(0)).mean() for i in pair.objects]
    assert int(place[0] > place[1]) == pair.label
    mirror = cast(source, rooms.mirrored(row), pair.frame)
    np.testing.assert_array_equal(mirror, ids[:, ::-1])
    assert (cast(source, rooms.empty(row), pair.frame) == -1).all()
    token = source.image_size // 4
    for which in (0, 1):
      lone, shift = rooms.alone(row, [pair], which, token, 4)
      seen = cast(source, lone, pair.frame)
      assert set(np.unique(seen)) == {-1, pair.objects[which]}
      box = pair.boxes[which]
      if box[0] == 0 or box[2] == source.image_size:
        continue  # the frame cuts it
      there = np.flatnonzero((seen >= 0).any(0)).mean()
      # Perspective makes things wider at the sides, so not to the pixel.
      assert abs(there - (box[0] + box[2]) / 2 - shift[0] * token) < token / 2


def test_too_few_rooms_say_so(source):
  with pytest.raises(ValueError, match=r"raise config\.data\.world\.rooms"):
    rooms.collect(source, "left_right", 10_000)
