# SPDX-License-Identifier: Apache-2.0
"""Token maps, stimuli, photos, answers and what is counted as a fix."""

import itertools
import json

import numpy as np
import pytest

from spatial_jax.analysis import (
  answers,
  layouts,
  photos,
  steering,
  stimuli,
  tokens,
)

QWEN = layouts.LAYOUTS["qwen2vl"]


def test_strips_tile_the_canvas_and_background_is_the_rest():
  for layout in layouts.LAYOUTS.values():
    every = np.arange(layout.tokens**2)
    for horizontal in (True, False):
      bands = layout.bands(horizontal)
      first, _, last = bands.values()
      assert len(first) == len(last)
      joined = np.concatenate(list(bands.values()))
      np.testing.assert_array_equal(np.sort(joined), every)
      names = layouts.HORIZONTAL if horizontal else layouts.VERTICAL
      taken = np.concatenate([layout.slots()[name] for name in names])
      rest = layout.background(horizontal)
      np.testing.assert_array_equal(np.sort([*taken, *rest]), every)
  with pytest.raises(ValueError, match="add up to 11"):
    layouts.Layout(12, 28, 2, 2, (4, 4, 3)).bands(True)


def test_a_map_finds_the_tokens_of_a_video_and_of_each_frame():
  ids = np.full(60, 5)
  ids[3 : 3 + 2 * 3 * 4] = 151656
  place = tokens.qwen(ids, (2, 6, 8))
  assert place.grid == (2, 3, 4)
  np.testing.assert_array_equal(place.at(np.array([0, 12, 23])), [3, 15, 26])
  # Half of the image's width and all of its height, in the second frame.
  box = place.box((320, 0, 640, 480), (640, 480), frame=1)
  np.testing.assert_array_equal(box, [14, 15, 18, 19, 22, 23])
  left, right = place.strips((2, 2), frame=1)
  np.testing.assert_array_equal(right, box)
  np.testing.assert_array_equal(
    place.mirror()[left].reshape(3, 2)[:, ::-1].ravel(), box
  )
  np.testing.assert_array_equal(place.background(box, frame=1), left)
  assert place.mask(box, 60).sum() == 6 and place.mask(box, 60)[3 + 14]
  with pytest.raises(ValueError, match="stand for no image"):
    tokens.qwen(ids, (3, 6, 8))
  with pytest.raises(ValueError, match="no image token"):
    tokens.gemma3(ids)


def test_patches_of_llava_3d_are_tokens_or_share_voxels():
  ids = np.full(40, 1)
  ids[4:22] = -200
  place = tokens.llava_3d(ids, frames=2, side=3)
  assert place.positions[1, 0, 0] == 13
  slots = np.array([4, 4, -1, 2, 0, 2])  # of six patches; the third has none
  np.testing.assert_array_equal(
    tokens.voxels(slots, np.array([1, 2, 3, 5])), [2, 4]
  )


def test_there_are_480_squares_and_the_answer_stands_where_it_is_asked():
  few = list(itertools.islice(stimuli.squares(QWEN), 4))
  assert sum(1 for _ in itertools.permutations(stimuli.SIX, 3)) * 4 == 480
  for item in few:
    place = stimuli.ANSWERS[item.direction][0]
    y, x = divmod(int(QWEN.slots()[place][0]), QWEN.tokens)
    pixel = item.image[y * QWEN.pixels + 9, x * QWEN.pixels + 9]
    assert tuple(pixel) == stimuli.COLORS[item.answer.capitalize()]
    assert item.entities[1][1].lower() in item.prompt
  assert few[0].prompt == (
    "The color of the square to the left of the green square is "
  )
  shape = next(stimuli.shapes(QWEN))
  assert "green circle" in shape.prompt and shape.answer == "red"


def test_grids_and_empty_canvases():
  layout = layouts.LAYOUTS["gemma3"]
  entity = ("Heart", "Blue")
  drawn = stimuli.grid(layout, [[entity, None], [None, entity]])
  ink = (drawn != 255).any(-1)
  half = ink.shape[0] // 2
  assert ink[:half, :half].any() and ink[half:, half:].any()
  assert not ink[:half, half:].any() and not ink[half:, :half].any()
  assert (stimuli.empty(layout) == 255).all()
  with pytest.raises(ValueError, match="wider than the canvas"):
    stimuli.grid(layout, [[None] * 4] * 4)


def test_photos_with_boxes_become_items_with_two_orders(tmp_path):
  captions = [
    [7, "A photo of a cat to the left of a dog", "A photo of a dog ..."],
    [7, "A photo of a bird above of the dog", ""],
    [7, "A photo of a cat in front of a dog", ""],
  ]
  boxes = [(1, [10, 0, 20, 20]), (1, [0, 0, 5, 5]), (2, [50, 60, 30, 30])]
  instances = {
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    "images": [{"id": 7, "width": 100, "height": 90}],
    "annotations": [
      {"image_id": 7, "category_id": c, "bbox": box} for c, box in boxes
    ],
  }
  files = tmp_path / "captions.json", tmp_path / "instances.json"
  for file, content in zip(files, (captions, instances), strict=True):
    file.write_text(json.dumps(content))
  cat, bird = photos.load(*files)
  assert (cat.subject, cat.truth, cat.object) == ("cat", "left", "dog")
  assert cat.subject_box == (10, 0, 30, 20)  # the larger one
  assert cat.order == cat.label == 0 and cat.size == (100, 90)
  assert cat.prompt().endswith(
    "is the cat on? Answer with one word: left or right."
  )
  assert cat.prompt(flipped=True).endswith("right or left.")
  assert bird.axis == "vertical" and bird.order is None  # no box of a bird
  assert bird.prompt(flipped=True, direct=True) == (
    "Is the bird below or above the dog? Answer with one word."
  )
  with pytest.raises(ValueError, match="no annotations"):
    files[1].write_text(json.dumps({"images": [], "categories": []}))
    photos.load(*files)
  with pytest.raises(ValueError, match="coco_qa_two_obj"):
    files[0].write_text("{}")
    photos.load(files[0])


def test_a_label_is_as_likely_as_all_its_spellings_together():
  known = {" Red": 0, "red": 1, "Red": 2, " red": 3, "blue": 4}
  ids = answers.spelling_ids(lambda text: [known[text]], ["red"])
  p = answers.label_probabilities(np.log(np.arange(1.0, 7)), ids)
  np.testing.assert_allclose(p, [10 / 21], rtol=1e-6)
  with pytest.raises(ValueError, match="several tokens"):
    answers.spelling_ids(list, ["red"])
  assert answers.normal(" Left.\n") == "left"
  scores = answers.two_order_accuracy(
    np.array([[1, 1], [1, 0], [1, 0], [0, 0]], bool)
  )
  assert scores == {"strict": 0.25, "any": 0.75, "first": 0.75, "second": 0.25}


def test_the_papers_count_misses_what_steering_breaks():
  # Four items, two orders. Alpha 1 fixes the third and breaks the first two;
  # alpha 2 fixes the fourth, one order of which was right and is broken now.
  right = np.array(
    [
      [[1, 1], [1, 1], [0, 0], [1, 0]],
      [[0, 0], [1, 0], [1, 1], [1, 0]],
      [[1, 1], [1, 1], [0, 1], [0, 1]],
    ],
    bool,
  )
  paper = steering.paper_protocol(right)
  assert paper["fix_rate"] == [0, 0.5, 0.5] and paper["before"] == 0.5
  assert paper["after"] == 0.75 and paper["oracle"] == 1.0
  honest = steering.honest_protocol(right, np.array([0, 1, 0, 1], bool))
  assert honest["alpha"] == 0 and honest["gain"] == 0
  assert honest["strict"] == [0.5, 0, 0.5]
  other = steering.honest_protocol(right, np.array([1, 1, 0, 0], bool))
  assert (other["alpha"], other["gain"], other["broken"]) == (1, -1, 1)
  with pytest.raises(ValueError, match="scored on others"):
    steering.honest_protocol(right, np.ones(4, bool))
