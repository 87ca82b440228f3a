# SPDX-License-Identifier: Apache-2.0
"""Rooms are reproducible, physical and varied; camera paths keep clear."""

import itertools
import time

import numpy as np
import pytest

from spatial_jax.geometry import boxes
from spatial_jax.world import cameras, freespace, furniture, parts, scene

PRESETS = {
  "simple": scene.SIMPLE,
  "full": {},
  "l_stacked": {"l_shaped": 1.0, "stacking": 1.0, "objects": (12, 24)},
}


def rooms(preset, number=40, split="train"):
  kwargs = PRESETS[preset]
  return [scene.sample(7, split, i, **kwargs) for i in range(number)]


def objects(room):
  return np.flatnonzero(room["object_category"] >= 0)


def footprint(room, index):
  keys = ("object_center", "object_size", "object_yaw")
  return boxes.rectangle(*(np.float64(room[k][index]) for k in keys))


def test_a_room_depends_on_its_address_only():
  a = scene.sample(1, "test", 12345)
  scene.sample(1, "train", 0)
  b = scene.sample(1, "test", 12345)
  for key, value in a.items():
    np.testing.assert_array_equal(value, b[key])
    assert value.dtype in (np.float32, np.int32)
  centers = {
    scene.sample(s, split, i)["object_center"].tobytes()
    for s in (0, 1)
    for split in scene.SPLITS
    for i in (0, 1)
  }
  assert len(centers) == 12


def test_shapes_are_those_asked_for():
  for kwargs, o, p in ((scene.SIMPLE, 10, 40), ({}, 24, 160)):
    shapes = {
      k: v.shape for k, v in scene.sample(0, "train", 3, **kwargs).items()
    }
    assert shapes["primitive_half"] == (p, 3)
    assert shapes["object_size"] == (o, 3)
    assert shapes["room_polygon"] == (8, 2)
    assert shapes["room_height"] == ()
    other = scene.sample(0, "test", 8, **kwargs)
    assert shapes == {k: v.shape for k, v in other.items()}


def test_an_unknown_split_is_an_error():
  with pytest.raises(ValueError, match=r"'val'.*train"):
    scene.sample(0, "val", 0)


def test_arrays_too_small_for_the_objects_are_an_error():
  with pytest.raises(ValueError, match="max_primitives=12"):
    scene.sample(0, "train", 0, max_primitives=12)


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_interpenetrates(preset):
  for room in rooms(preset):
    for a, b in itertools.combinations(objects(room), 2):
      za, zb = room["object_center"][[a, b], 2]
      tall = room["object_size"][[a, b], 2].sum() / 2
      if abs(za - zb) >= tall - 1e-5:
        continue  # one above the other
      assert not boxes.rectangles_overlap(
        footprint(room, a), footprint(room, b)
      )


@pytest.mark.parametrize("preset", PRESETS)
def test_furniture_stands_in_the_room_on_floor_or_furniture(preset):
  for room in rooms(preset):
    center, size = room["object_center"], room["object_size"]
    for i in objects(room):
      corners = footprint(room, i)
      inside = freespace.wall_distance(room["room_polygon"], corners)
      bottom = center[i, 2] - size[i, 2] / 2
      assert bottom + size[i, 2] <= room["room_height"] + 1e-5
      if room["object_category"][i] >= scene.FURNITURE:
        assert abs(inside).max() < 0.021  # in the plane of a wall
        continue
      assert inside.min() > 0.02
      support = room["object_support"][i]
      if support < 0:
        assert abs(bottom) < 1e-5
      else:
        top = center[support, 2] + size[support, 2] / 2
        assert abs(bottom - top) < 1e-5
        away = corners - center[support, :2]
        yaw = room["object_yaw"][support]
        cos, sin = np.cos(yaw), np.sin(yaw)
        u = abs(cos * away[:, 0] + sin * away[:, 1])
        v = abs(cos * away[:, 1] - sin * away[:, 0])
        assert (u <= size[support, 0] / 2).all()
        assert (v <= size[support, 1] / 2).all()


def test_the_polygon_is_counter_clockwise_and_its_area_is_the_room_size():
  seen = set()
  for room in rooms("full", 60):
    area = scene.polygon_area(room["room_polygon"])
    assert area == pytest.approx(float(room["room_size"]), rel=1e-4)
    assert 5.9 < area < 60.1
    seen.add(len(np.unique(room["room_polygon"], axis=0)))
  assert seen == {4, 6}


def test_models_fill_their_unit_box():
  for category in furniture.ALL:
    for model, most in (
      (category.plain, parts.PLAIN),
      (category.detailed, parts.DETAILED),
    ):
      assert len(model) <= most, category.name
      low = np.min([p.low for p in model], 0)
      high = np.max([p.high for p in model], 0)
      np.testing.assert_allclose(low, (-0.5, -0.5, 0), atol=1e-6)
      np.testing.assert_allclose(high, (0.5, 0.5, 1), atol=1e-6)
      assert (low >= (-0.5 - 1e-9, -0.5 - 1e-9, 0)).all(), category.name
      assert (high <= (0.5 + 1e-9, 0.5 + 1e-9, 1)).all(), category.name
      assert all(np.less(p.low, p.high).all() for p in model), category.name


@pytest.mark.parametrize("preset", PRESETS)
def test_primitives_stay_in_the_box_of_their_object(preset):
  for room in rooms(preset, 10):
    real = np.flatnonzero(room["primitive_shape"])
    owner = room["primitive_object"][real]
    away = room["primitive_center"][real] - room["object_center"][owner]
    yaw = room["object_yaw"][owner]
    np.testing.assert_array_equal(room["primitive_yaw"][real], yaw)
    cos, sin = np.cos(yaw), np.sin(yaw)
    x = cos * away[:, 0] + sin * away[:, 1]
    y = cos * away[:, 1] - sin * away[:, 0]
    reach = abs(np.stack([x, y, away[:, 2]], -1)) + room["primitive_half"][real]
    assert (reach <= room["object_size"][owner] / 2 + 1e-4).all()


def test_copies_sizes_and_room_areas_are_spread():
  found = rooms("simple", 300)
  number, longest, area = [], [], []
  for room in found:
    kinds = room["object_category"][objects(room)]
    number += [np.bincount(kinds).max()]
    chair = room["object_category"] == 0
    longest += room["object_size"][chair].max(-1).tolist()
    area.append(room["room_size"])
  share = np.bincount(number, minlength=6)[1:6] / len(found)
  assert share.min() > 0.08, share
  assert len(np.unique(kinds)) >= 4
  assert np.quantile(longest, 0.95) / np.quantile(longest, 0.05) > 3
  assert np.quantile(area, 0.95) / np.quantile(area, 0.05) > 6


def test_colour_does_not_give_the_category_away():
  chairs = [
    room["primitive_color"][
      (room["primitive_object"] == i) & (room["primitive_shape"] > 0)
    ][0]
    for room in rooms("full", 120)
    for i in objects(room)
    if room["object_category"][i] == 0
  ]
  assert np.std(chairs, 0).min() > 0.1


def test_a_simple_room_takes_little_time():
  start = time.process_time()
  for index in range(200):
    scene.sample(0, "train", index, **scene.SIMPLE)
  # 0.4 ms here; the bound is wide since test machines are shared.
  assert (time.process_time() - start) / 200 < 5e-3


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("path", ["turntable", "walkthrough", "orbit"])
def test_camera_paths_keep_clear_and_level(preset, path):
  for index, room in enumerate(rooms(preset, 20)):
    rng = np.random.default_rng(index)
    poses = getattr(cameras, path)(room, rng, 8)
    assert poses.shape == (8, 4, 4)
    assert poses.dtype == np.float32
    turn = poses[:, :3, :3]
    np.testing.assert_allclose(
      turn @ turn.transpose(0, 2, 1), np.stack([np.eye(3)] * 8), atol=1e-5
    )
    np.testing.assert_allclose(turn[:, 2, 0], 0, atol=1e-6)  # no roll
    assert (turn[:, 2, 1] < 0).all()  # the image's y axis points down
    eye = poses[:, :3, 3]
    assert (eye[:, 2] < room["room_height"]).all()
    inside, walls = freespace.clearance(
      room, eye[:, :2], float(eye[0, 2]) if path == "orbit" else None
    )
    assert walls.min() > 0.1
    assert inside.min() > 0.1


def test_a_walk_is_smooth_and_goes_somewhere():
  lengths = []
  for index, room in enumerate(rooms("full", 20)):
    poses = cameras.walkthrough(room, np.random.default_rng(index), 32)
    eye, ahead = poses[:, :3, 3], poses[:, :3, 2]
    steps = np.linalg.norm(np.diff(eye, axis=0), axis=-1)
    assert steps.max() < 0.8
    assert (ahead[1:] * ahead[:-1]).sum(-1).min() > 0.5
    lengths.append(steps.sum())
  assert np.median(lengths) > 2


def test_an_orbit_looks_at_the_middle():
  room = rooms("simple", 1)[0]
  poses = cameras.orbit(room, np.random.default_rng(0), 12)
  low, high = room["room_polygon"].min(0), room["room_polygon"].max(0)
  to_middle = (low + high) / 2 - poses[:, :2, 3]
  to_middle /= np.linalg.norm(to_middle, axis=-1, keepdims=True)
  ahead = poses[:, :2, 2]
  ahead /= np.linalg.norm(ahead, axis=-1, keepdims=True)
  assert ((ahead * to_middle).sum(-1) > 0.8).all()
