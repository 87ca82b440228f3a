# SPDX-License-Identifier: Apache-2.0
"""What is written of rooms is what is read back, also through grain."""

import json
import sys

import grain
import numpy as np
import pytest

from spatial_jax.geometry import camera
from spatial_jax.world import cameras, render, scene, writer

AT = camera.intrinsics(12, 16, 90.0)


def room(index):
  one = scene.sample(0, "test", index, **scene.SIMPLE)
  poses = cameras.turntable(one, np.random.default_rng(index), 2)
  out = render.render(one, poses, AT, 12, 16)
  return one, poses, np.asarray(out["rgb"]), np.asarray(out["depth"])


def record(index, **more):
  one, poses, rgb, depth = room(index)
  asked = [{"question": f"How many? {index}", "ground_truth": 3.0}]
  more = {"depth": depth, "questions": asked, **more}
  return writer.encode(f"room_{index}", one, rgb, poses, AT, **more)


def test_a_record_holds_images_geometry_and_questions():
  one, poses, rgb, depth = room(0)
  got = writer.decode(record(0))
  assert got["name"] == "room_0"
  assert got["rgb"].dtype == np.uint8
  np.testing.assert_array_equal(got["rgb"], np.round(rgb * 255))
  np.testing.assert_allclose(got["depth"], depth, atol=5.1e-4)
  np.testing.assert_array_equal(got["world_from_camera"], poses)
  np.testing.assert_array_equal(got["intrinsics"], AT)
  assert got["questions"][0]["ground_truth"] == 3
  assert len(got["objects"]) == (one["object_category"] >= 0).sum()
  assert got["objects"][0]["category"] in scene.CATEGORIES
  assert got["room_polygon"].shape == (4, 2)
  for key, value in one.items():
    np.testing.assert_array_equal(got["scene"][key], value)
    assert got["scene"][key].dtype == value.dtype


def test_the_same_room_gives_the_same_bytes():
  assert record(1) == record(1)


def test_a_split_reads_back_in_order_and_through_grain(tmp_path):
  index = writer.write(
    tmp_path, "train", (record(i) for i in range(5)), per_file=2
  )
  assert json.loads(index.read_text())["records"] == 5
  assert not list(tmp_path.glob("*.tmp"))
  names = [r["name"] for r in writer.read(tmp_path, "train")]
  assert names == [f"room_{i}" for i in range(5)]
  source = grain.sources.ArrayRecordDataSource(writer.paths(tmp_path, "train"))
  data = grain.MapDataset.source(source).map(writer.decode)
  assert len(data) == 5
  assert data[3]["name"] == "room_3"


def test_a_split_is_replaced_only_by_a_complete_one(tmp_path):
  writer.write(tmp_path, "train", [record(0)])

  def broken():
    yield record(1)
    raise RuntimeError("stop")

  with pytest.raises(RuntimeError, match="stop"):
    writer.write(tmp_path, "train", broken())
  assert [r["name"] for r in writer.read(tmp_path, "train")] == ["room_0"]
  writer.write(tmp_path, "train", [record(2)])
  assert [r["name"] for r in writer.read(tmp_path, "train")] == ["room_2"]
  assert len(list(tmp_path.iterdir())) == 2


def test_depth_may_be_left_out():
  assert "depth" not in writer.decode(record(0, depth=None))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"depth": np.full((2, 12, 16), np.nan)}, r"depth must be a number"),
    ({"depth": np.full((2, 12, 16), 70.0)}, r"0\.\.65\.535"),
    ({"depth": np.ones((2, 12, 15))}, r"depth is \[2, 12, 15\]"),
    ({"rgb": np.zeros((2, 0, 16, 3), np.uint8)}, r"none of them zero"),
    (
      {"rgb": np.zeros((2, 12, 16, 4), np.uint8)},
      r"rgb is uint8\[2, 12, 16, 4\]",
    ),
    ({"rgb": np.zeros((3, 12, 16, 3), np.uint8)}, r"one pose per frame"),
  ],
)
def test_wrong_images_are_one_clear_error(change, message):
  one, poses, rgb, depth = room(0)
  rgb = change.get("rgb", rgb)
  depth = change.get("depth", depth)
  with pytest.raises(ValueError, match=message):
    writer.encode("room_0", one, rgb, poses, AT, depth=depth)


def test_missing_truncated_and_foreign_files_are_clear_errors(tmp_path):
  with pytest.raises(FileNotFoundError, match="no complete split 'train'"):
    writer.paths(tmp_path, "train")
  with pytest.raises(ValueError, match="no records"):
    writer.write(tmp_path, "train", [])
  writer.write(tmp_path, "train", [record(0)])
  with pytest.raises(FileNotFoundError, match=r"there are \['train'\]"):
    writer.paths(tmp_path, "test")
  [path] = tmp_path.glob("*.array_record")
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match="truncated or changed"):
    writer.paths(tmp_path, "train")
  path.unlink()
  with pytest.raises(FileNotFoundError, match="missing"):
    writer.paths(tmp_path, "train")
  with pytest.raises(ValueError, match="not a record of a room"):
    writer.decode(b"something else")


def test_tfds_reads_a_split_without_tensorflow(tmp_path):
  tfds = pytest.importorskip("tensorflow_datasets")
  from spatial_jax.world import tfds_rooms

  writer.write(tmp_path / "rooms", "train", [record(0), record(1)])
  tfds_rooms.prepare(tmp_path / "rooms", tmp_path / "tfds")
  source = tfds.data_source("rooms", split="train", data_dir=tmp_path / "tfds")
  assert len(source) == 2
  assert np.asarray(source[0]["rgb"]).shape == (2, 12, 16, 3)
  assert "tensorflow" not in sys.modules
