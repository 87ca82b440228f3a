# SPDX-License-Identifier: Apache-2.0
"""The demo's command at its smallest: three runs, two evaluations, a page."""

import gzip
import json
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def demo(*args):
  # One device: the fake ones of the other tests only cost time here.
  env = {**os.environ, "XLA_FLAGS": os.environ["ONE_DEVICE"]}
  command = [sys.executable, str(ROOT / "launch" / "demo.py"), "--test", *args]
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
  return done.stdout


def box(center, size):
  return {
    "centroid": center,
    "axesLengths": size,
    "normalizedAxes": [1, 0, 0, 0, 1, 0, 0, 0, 1],
    "min": [c - s / 2 for c, s in zip(center, size, strict=True)],
    "max": [c + s / 2 for c, s in zip(center, size, strict=True)],
  }


def layouts(path):
  """Two rooms in the VSI-Bench meta format."""
  boxes = {
    "chair": [box([1.0, 0.0, 0.5], [0.5, 0.5, 1.0])],
    "table": [box([-1.0, 1.5, 0.4], [1.2, 0.8, 0.8])],
    "sofa": [box([-1.5, -1.5, 0.4], [1.8, 0.9, 0.8])],
    "bed": [box([2.5, 2.0, 0.3], [2.0, 1.5, 0.6])],
    "trash bin": [box([2.0, -2.0, 0.2], [0.3, 0.3, 0.4])],
  }
  room = {
    "room_size": 30.0,
    "object_counts": {name: len(found) for name, found in boxes.items()},
    "object_bbox": boxes,
  }
  with gzip.open(path, "wt") as file:
    json.dump({"room_a": room, "room_b": room}, file)


def test_the_demo_writes_a_self_contained_report_and_scores_real_rooms(
  tmp_path,
):
  out = demo(f"--workdir={tmp_path}")
  assert re.search(r"VSI macro \d+\.\d seeing, \d+\.\d blind", out)
  page = (tmp_path / "report.html").read_text()
  assert str(tmp_path / "report.html") in out
  assert "<img" in page and "<svg" in page
  assert not re.search(r"(src|href)=\"(?!data:|#)", page)
  for run, steps in (("vision", 2), ("seeing", 2), ("blind", 2)):
    assert (tmp_path / run / "checkpoints" / str(steps)).is_dir()

  layouts(tmp_path / "rooms.json.gz")
  out = demo(f"--workdir={tmp_path}", f"--layouts={tmp_path}/rooms.json.gz")
  assert "object_rel_direction_easy" in out
  assert (tmp_path / "layouts.html").exists()
  # What was trained is reused.
  assert "=== vision ===" not in out


def test_stored_rooms_hold_what_the_data_set_shows(tmp_path):
  import numpy as np

  from configs import demo as recipe
  from launch import write_world
  from spatial_jax.world import dataset, writer

  sizes = ["--rooms=2", "--size=32", "--split=test"]
  write_world.main(
    ["--config=configs/demo.py:test", *sizes, f"--out={tmp_path}"]
  )
  source = dataset.make(recipe.get_config("test"), "test")
  stored = list(writer.read(tmp_path, "test"))
  assert len(stored) == 2
  for index, record in enumerate(stored):
    room = source.room(index)
    assert record["rgb"].shape == (4, 32, 32, 3)
    assert record["depth"].shape == (4, 32, 32)
    assert record["questions"] == [q.asdict() for q in room.questions]
    for key, value in room.scene.items():
      np.testing.assert_array_equal(record["scene"][key], value)
