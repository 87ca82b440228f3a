# SPDX-License-Identifier: Apache-2.0
"""The report needs nothing beside itself, and its pictures are right."""

import html.parser
import re
import sys
import types

import numpy as np
import pytest

from spatial_jax import drawing, report
from spatial_jax.world import scene as scene_lib


def square_room(**changes):
  """A room of 4 m by 4 m with one object at its centre."""
  scene = {
    "object_category": np.array([0, -1], np.int32),
    "object_center": np.array([[2, 2, 0.5], [0, 0, 0]], np.float32),
    "object_size": np.array([[1, 1, 1], [0, 0, 0]], np.float32),
    "object_yaw": np.zeros(2, np.float32),
    "room_polygon": np.array([[0, 0], [4, 0], [4, 4]] + [[0, 4]] * 5, "f4"),
  }
  return scene | changes


def camera_at(x, y, z):
  """Looks along +y of the world: x right, z up."""
  pose = np.eye(4, dtype=np.float32)
  pose[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
  pose[:3, 3] = x, y, z
  return pose


INTRINSICS = np.array([[32, 0, 32], [0, 32, 32], [0, 0, 1]], np.float32)


def example_data():
  scene, pose = square_room(), camera_at(2, 0.2, 0.5)
  ids = np.full((1, 64, 64), -1, np.int32)
  ids[:, 20:40, 20:40] = 0
  question = {
    "question_type": "object_rel_direction_easy",
    "question": "Left or right?",
    "options": ["A. left", "B. right"],
    "ground_truth": "A",
    "answer": "A",
    "blind": "B",
  }
  number = {
    "question_type": "object_abs_distance",
    "question": "How far is <it>?",
    "options": None,
    "ground_truth": 2.0,
    "answer": "2.0",
    "blind": "many",
  }
  room = {
    "scene": scene,
    "world_from_camera": pose[None],
    "intrinsics": INTRINSICS,
    "rgb": np.full((1, 64, 64, 3), 0.5, np.float32),
    "depth": np.linspace(1, 3, 64 * 64, dtype="f4").reshape(1, 64, 64),
    "object": ids,
    "questions": [question, number],
  }
  return {
    "title": "A report",
    "headline": [{"value": "61.2", "label": "VSI macro"}],
    "table": [
      {
        "type": "object_counting",
        "seeing": 60.0,
        "blind": 40.0,
        "chance": 30.0,
      },
      {"type": "VSI macro", "seeing": 60.0, "blind": None, "chance": np.nan},
    ],
    "runs": {"seeing": [{"step": i, "loss": 1 / (i + 1)} for i in range(9)]},
    "rooms": [room],
    "settings": {"seed": 0},
  }


class Checker(html.parser.HTMLParser):
  """Every tag is closed, and nothing is fetched."""

  VOID = ("meta", "img", "br", "path", "circle", "polygon", "i")

  def __init__(self):
    super().__init__()
    self.open, self.images = [], []

  def handle_starttag(self, tag, attrs):
    for key, value in attrs:
      if key in ("src", "href"):
        assert value.startswith("data:image/png;base64,"), value[:60]
        self.images.append(value)
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    if tag not in self.VOID:
      assert self.open.pop() == tag


def test_the_page_is_well_formed_and_self_contained(tmp_path):
  path = report.write(tmp_path / "deep" / "report.html", example_data())
  text = path.read_text(encoding="utf-8")
  checker = Checker()
  checker.feed(text)
  assert not checker.open
  assert len(checker.images) == 4  # frame, boxes, depth, ids
  assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
  assert "How far is &lt;it&gt;?" in text
  assert "nan" not in text


def test_answers_are_marked_right_and_wrong():
  text = report.page(example_data())
  assert re.search(r'class="said right"[^>]*>✓ A. left', text)
  assert re.search(r'class="said wrong"[^>]*>✗ B. right', text)
  assert re.search(r'class="said right"[^>]*>✓ 2.0 <small>\(1.0\)', text)
  assert re.search(r'class="said wrong"[^>]*>✗ many <small>\(0.0\)', text)


def test_a_title_is_enough():
  assert "<h1>Bare</h1>" in report.page({"title": "Bare"})


def test_an_unknown_entry_is_named():
  with pytest.raises(ValueError, match="'romos'"):
    report.page({"title": "x", "romos": []})


def test_depth_is_bright_near_and_grey_where_missing():
  depth = np.array([[1.0, 3.0], [np.nan, np.inf]])
  image = drawing.draw_depth(depth)
  assert image[0, 0].tolist() == drawing.DEPTH_COLORS[0].tolist()
  assert image[0, 1].tolist() == drawing.DEPTH_COLORS[-1].tolist()
  assert (image[1] == 200).all()


def test_depth_without_a_finite_value_is_all_grey():
  assert (drawing.draw_depth(np.full((2, 2), np.nan)) == 200).all()


def test_boxes_lie_where_the_pinhole_puts_them():
  black = np.zeros((64, 64, 3), np.uint8)
  image = drawing.draw_boxes(
    black, square_room(), camera_at(2, 0, 0.5), INTRINSICS, least=256
  )
  drawn = np.argwhere((image > 0).any(-1)) / image.shape[0] * 64
  # The near face is 1.5 m away: half a metre is 32 / 3 pixels there.
  wanted = [32 - 32 / 3, 32 + 32 / 3]
  assert drawn.min(0) == pytest.approx([wanted[0]] * 2, abs=0.5)
  assert drawn.max(0) == pytest.approx([wanted[1]] * 2, abs=0.5)


def test_boxes_behind_the_camera_are_not_drawn():
  black = np.zeros((64, 64, 3), np.uint8)
  image = drawing.draw_boxes(
    black, square_room(), camera_at(2, 3, 0.5), INTRINSICS
  )
  assert not image.any()


def test_a_box_around_the_camera_is_cut_not_mirrored():
  black = np.zeros((64, 64, 3), np.uint8)
  image = drawing.draw_boxes(
    black, square_room(), camera_at(2, 2, 0.5), INTRINSICS
  )
  assert image.any()


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 4), (4, 4, 4)])
def test_an_image_of_wrong_shape_is_refused(shape):
  with pytest.raises(ValueError, match="expected \\(height, width, 3\\)"):
    drawing.to_uint8(np.zeros(shape))


def test_the_top_view_shows_up_the_page_what_has_larger_y():
  def y_of_name(y):
    scene = square_room()
    scene["object_center"] = np.array([[2, y, 0.5], [0, 0, 0]], np.float32)
    name = scene_lib.CATEGORIES[0]
    text = drawing.draw_top_view(scene, camera_at(1, 1, 1)[None])
    return float(re.search(rf'y="([\d.]+)"[^>]*>{name}</text>', text).group(1))

  assert y_of_name(3) < y_of_name(1)


def test_curves_leave_out_runs_without_the_scalar():
  runs = {
    "seeing": [{"step": i, "loss": float(i)} for i in range(5)],
    "blind": [{"step": i, "other": 1.0} for i in range(5)],
  }
  assert "seeing" in drawing.draw_curves(runs)
  assert "blind" not in drawing.draw_curves(runs)
  assert drawing.draw_curves(runs, "none of these") == ""


def test_curves_pass_over_what_is_not_finite():
  rows = [{"step": i, "loss": v} for i, v in enumerate([1.0, np.nan, 3.0])]
  assert "nan" not in drawing.draw_curves({"run": rows})


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.02), (5, 12000)])
def test_ticks_are_few_and_inside(low, high):
  found = drawing.ticks(low, high)
  assert 2 <= len(found) <= 5
  assert low <= found[0] and found[-1] <= high


def test_view_shows_rooms_of_a_recipe(tmp_path):
  from configs import demo

  path = report.main(demo.get_config("test"), str(tmp_path), rooms=1)
  text = path.read_text(encoding="utf-8")
  assert path == tmp_path / "view.html"
  assert text.count("<section") == 1
  assert "In this room" in text or "in this room" in text
  assert "(in meters)" in text or "square meters" in text


def test_view_needs_rooms(tmp_path, monkeypatch):
  from configs import demo

  without = types.ModuleType("without_rooms")
  without.make = lambda config, split: [config, split]
  monkeypatch.setitem(sys.modules, "without_rooms", without)
  config = demo.get_config("test")
  config.data.source = "without_rooms"
  with pytest.raises(ValueError, match=r"rooms of the world.*without_rooms"):
    report.main(config, str(tmp_path))
