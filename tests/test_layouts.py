# SPDX-License-Identifier: Apache-2.0
"""Room layouts in VSI-Bench's format become scenes, or one clear error."""

import gzip
import json

import numpy as np
import pytest

from spatial_jax.geometry import boxes, camera
from spatial_jax.world import cameras, layouts, scene, visibility


def box(center, edges, yaw=0.0, order=(0, 1, 2)):
  """A box of the file; `order` permutes its axes, as the real ones are."""
  cos, sin = np.cos(yaw), np.sin(yaw)
  axes = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])[list(order)]
  return {
    "centroid": list(center),
    "axesLengths": [edges[i] for i in order],
    "normalizedAxes": axes.ravel().tolist(),
    "min": [0, 0, 0],
    "max": [0, 0, 0],
  }


def two_rooms():
  bbox = {
    "chair": [box((0, 0, -0.55), (0.5, 0.6, 0.9), 0.3, (2, 0, 1))],
    "tv": [box((2, 1, 0.05), (1.2, 0.1, 0.7), 1.0, (1, 2, 0))],
    "table": [box((2, 1, -0.65), (1.6, 0.8, 0.7), 1.0)],
    "bed": [box((-2, -1, -0.7), (1.4, 2.1, 0.6), 0.5)],
    "pillow": [box((-2, -1, -0.3), (0.5, 0.3, 0.2)), box((0, 2, 0), (1, 1, 1))],
    "window": [box((0, 3, 0.5), (1.5, 0.1, 1.0))],
  }
  small = {"trash can": [box((0, 0, 0), (0.3, 0.3, 0.4))]}
  return {
    "room_a": {"room_size": 14.5, "object_bbox": bbox},
    "room_b": {"room_size": 9.0, "object_bbox": small},
  }


def write(path, rooms):
  path.write_text(json.dumps(rooms))
  return path


def test_plain_and_gzipped_files_give_the_same_scenes(tmp_path):
  text = json.dumps(two_rooms())
  (tmp_path / "a.json").write_text(text)
  with gzip.open(tmp_path / "a.json.gz", "wt") as file:
    file.write(text)
  a, b = (layouts.load(tmp_path / n) for n in ("a.json", "a.json.gz"))
  assert list(a) == list(b) == ["room_a", "room_b"]
  for name, room in a.items():
    for key, value in room.items():
      np.testing.assert_array_equal(value, b[name][key])


def test_scenes_have_the_arrays_of_generated_rooms(tmp_path):
  path = write(tmp_path / "a.json", two_rooms())
  got = layouts.load(path, max_objects=24, max_primitives=160)["room_a"]
  want = scene.sample(0, "train", 0)
  assert got.keys() == want.keys()
  for key, value in want.items():
    assert got[key].shape == value.shape, key
    assert got[key].dtype == value.dtype, key


def test_boxes_keep_their_edges_and_their_place(tmp_path):
  room = layouts.load(write(tmp_path / "a.json", two_rooms()))["room_a"]
  names = [scene.CATEGORIES[c] for c in room["object_category"] if c >= 0]
  assert names == [
    "chair",
    "monitor",
    "table",
    "bed",
    "other",
    "other",
    "window",
  ]
  at = dict(zip(names, range(7), strict=True))
  size = {n: room["object_size"][i].tolist() for n, i in at.items()}
  # The longer side lies along the model's longer side; a bed's is its y.
  np.testing.assert_allclose(size["monitor"], (1.2, 0.1, 0.7), rtol=1e-6)
  np.testing.assert_allclose(size["bed"], (1.4, 2.1, 0.6), rtol=1e-6)
  np.testing.assert_allclose(sorted(size["chair"]), (0.5, 0.6, 0.9), rtol=1e-6)
  center, edges = room["object_center"], room["object_size"]
  bottom = center[:7, 2] - edges[:7, 2] / 2
  assert bottom.min() == pytest.approx(0, abs=1e-6)
  # Everything moved by one vector, none of it was turned.
  away = center[at["table"], :2] - center[at["bed"], :2]
  np.testing.assert_allclose(away, (4, 2), atol=1e-5)
  distance = boxes.upright_distance(
    *(
      np.float64(room[f"object_{k}"][at["chair"]])
      for k in ("center", "size", "yaw")
    ),
    *(
      np.float64(room[f"object_{k}"][at["table"]])
      for k in ("center", "size", "yaw")
    ),
  )
  assert 0.5 < distance < np.hypot(2, 1)
  assert room["object_support"][at["monitor"]] == at["table"]
  assert room["object_support"][at["chair"]] == -1
  assert float(room["room_size"]) == pytest.approx(14.5)


def test_a_turned_box_covers_the_same_ground(tmp_path):
  room = layouts.load(write(tmp_path / "a.json", two_rooms()))["room_a"]
  got = boxes.rectangle(
    *(np.float64(room[f"object_{k}"][3]) for k in ("center", "size", "yaw"))
  )
  got -= got.mean(0)
  c, s = np.cos(0.5), np.sin(0.5)
  want = np.array([[1.4, 2.1], [-1.4, 2.1], [-1.4, -2.1], [1.4, -2.1]]) / 2
  want = want @ np.array([[c, s], [-s, c]])
  gaps = np.linalg.norm(got[:, None] - want[None], axis=-1).min(1)
  np.testing.assert_allclose(gaps, 0, atol=1e-5)


def test_the_room_holds_its_boxes_and_is_as_large_as_said(tmp_path):
  rooms = layouts.load(write(tmp_path / "a.json", two_rooms()))
  for room in rooms.values():
    real = room["object_category"] >= 0
    corners = boxes.corners(
      *(
        np.float64(room[f"object_{k}"][real]) for k in ("center", "size", "yaw")
      )
    ).reshape(-1, 3)
    low, high = room["room_polygon"].min(0), room["room_polygon"].max(0)
    assert (corners[:, :2] >= low).all()
    assert (corners[:, :2] <= high).all()
    assert corners[:, 2].max() <= room["room_height"]
    assert np.prod(high - low) >= room["room_size"] - 1e-4


def test_layouts_can_be_looked_at(tmp_path):
  rooms = layouts.load(write(tmp_path / "a.json", two_rooms()))
  for room in rooms.values():
    poses = cameras.turntable(room, np.random.default_rng(0), 4)
    at = camera.intrinsics(64, 64, 100.0)
    counts = visibility.pixel_counts(room, poses, at)
    assert counts.sum() > 0


def test_plain_boxes_make_room_for_known_furniture(tmp_path):
  path = write(tmp_path / "a.json", two_rooms())
  room = layouts.load(path, max_objects=6)["room_a"]
  kinds = room["object_category"].tolist()
  assert kinds.count(scene.OTHER) == 1
  assert room["object_size"][kinds.index(scene.OTHER)].max() == 1  # the larger
  with pytest.raises(ValueError, match=r"room 'room_a'.*max_objects=3"):
    layouts.load(path, max_objects=3)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"not json", "neither JSON nor gzipped JSON"),
    (b"\x1f\x8b broken", "neither JSON nor gzipped JSON"),
    (b"[1, 2]", "expected an object of rooms"),
    (b'{"a": {"room_size": 3}}', "room 'a': no key 'object_bbox'"),
    (b'{"a": {"room_size": 3, "object_bbox": {}}}', "at least one box"),
    (
      b'{"a": {"room_size": 3, "object_bbox": {"chair": [{"centroid": [1]}]}}}',
      "'centroid': expected 3 finite numbers",
    ),
  ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path, content, message):
  path = tmp_path / "wrong.json"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    layouts.load(path)
  assert "wrong.json" in str(error.value)


def test_not_a_number_in_a_box_is_an_error(tmp_path):
  rooms = two_rooms()
  rooms["room_b"]["object_bbox"]["trash can"][0]["axesLengths"][1] = float(
    "nan"
  )
  with pytest.raises(ValueError, match=r"room 'room_b'.*axesLengths"):
    layouts.load(write(tmp_path / "a.json", rooms))
