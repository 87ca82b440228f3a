# SPDX-License-Identifier: Apache-2.0
"""LLaVA-3D's text and rows: what is said, where points and images stand."""

import json

import numpy as np
import pytest
import tokenizers
from PIL import Image
from tokenizers import models as tokenizer_models
from tokenizers import pre_tokenizers

from spatial_jax.data import llava_3d, scenes, text
from spatial_jax.evaluators import answers
from tests.test_rgbd import scan

WORDS = ["USER", "ASSISTANT", "Two", "What", "is", "at", "A", "Red", "and"]
WORDS += [*".,:?"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  words = ["<unk>", "<s>", "</s>", *WORDS]
  backend = tokenizers.Tokenizer(
    tokenizer_models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>")
  )
  backend.pre_tokenizer = pre_tokenizers.Whitespace()
  backend.add_special_tokens(["<s>", "</s>"])
  backend.save(str(folder / "tokenizer.json"))
  config = {"pad_token": "<unk>", "eos_token": "</s>"}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


def names(tokenizer, ids):
  vocabulary = {i: w for w, i in tokenizer.backend.get_vocab().items()}
  return [vocabulary.get(int(i), int(i)) for i in ids]


def test_only_answers_and_their_ends_are_said(tokenizer):
  tokenizer = text.Tokenizer.load(tokenizer)
  turns = [("<image>\nWhat is at <boxes>?", "Two."), ("A", "Red.")]
  ids, said = llava_3d.encode(tokenizer, turns, slots=3)
  assert ids[0] == tokenizer.token_id("<s>") and not said[0]
  assert list(ids).count(-200) == 3 and list(ids).count(-300) == 1
  first = list(ids).index(-200)
  assert names(tokenizer, ids[first - 2 : first]) == ["USER", ":"]
  spoken = names(tokenizer, ids[said])
  assert spoken == ["Two", ".", "</s>", "Red", ".", "</s>"]
  # The reference masks what comes before an answer, its role included.
  before = names(tokenizer, ids[np.flatnonzero(said)[0] - 2 :][:2])
  assert before == ["ASSISTANT", ":"]


def test_an_open_question_ends_with_the_assistants_role():
  assert llava_3d.prompt([("Hello", None)]).endswith("USER: Hello ASSISTANT:")


def test_the_scene_comes_first_whatever_it_is_called():
  assert llava_3d.to_front("What is\n<video> there?") == (
    "<image>\nWhat is\n there?"
  )
  assert llava_3d.to_front("Hello") == "Hello"


def test_a_point_in_a_question_becomes_a_token():
  question, points = llava_3d.read_click("See [1.00049, -2, 0.5, 1, 1, 1]?")
  assert question == "See <boxes>?"
  np.testing.assert_allclose(points, [[1.0, -2, 0.5]])
  assert llava_3d.read_click("Is [it] there?")[1].shape == (0, 3)


def test_points_stand_for_boxes():
  rng = np.random.default_rng(0)
  box = [1, 2, 3, 0.5, 1, 2]
  many = np.stack([llava_3d.click(box, rng) for _ in range(200)])
  away = np.abs(many - box[:3])
  assert np.all(away <= np.array(box[3:]) / 2 + 1e-3)
  assert np.all(away.max(0) > 0.45 * np.array(box[3:]))
  nine = [*box, 0.1, 0.2, 0.3]
  np.testing.assert_array_equal(llava_3d.click(nine, rng), [1, 2, 3])
  np.testing.assert_array_equal(llava_3d.click(box[:3], rng), [1, 2, 3])
  with pytest.raises(ValueError, match="expected 3 numbers"):
    llava_3d.click([1, 2], rng)


def test_boxes_in_answers_are_read_as_they_are_written():
  box = np.array([1.5, -2, 0.25, 1, 1, 0.5], np.float32)
  said = llava_3d.format_box(box)
  assert said == "[1.500, -2.000, 0.250, 1.000, 1.000, 0.500]"
  np.testing.assert_array_equal(llava_3d.read_boxes(f"It is {said}."), [box])
  moved = box + np.array([0.5, 0, 0, 0, 0, 0])
  got = answers.grounding_accuracy([said, said, "no"], [box, moved, box])
  assert got == pytest.approx({0.25: 200 / 3, 0.5: 100 / 3})  # IoU 1, 1/3, 0


def test_exact_match_is_counted_by_type():
  records = [
    {"answer": "The 2 chairs.", "truths": ["two chairs"], "type": "what"},
    {"answer": "dark brown", "truths": ["brown"], "type": "what"},
    {"answer": "left", "truths": ["right"], "type": "where"},
  ]
  got = answers.exact_match(records)
  assert got["what"] == {"em": 50.0, "em_refined": 100.0, "count": 2}
  assert got["where"]["em_refined"] == 0 and got["all"]["count"] == 3


def entry(question, answer, **more):
  turns = [
    {"from": "human", "value": question},
    {"from": "gpt", "value": answer},
  ]
  return {"conversations": turns, **more}


def test_each_place_in_the_text_gets_its_boxes():
  one = entry("<video>\nWhat is at <boxes>?", "A")
  assert scenes.dialogue(one, 1)[1] == [0]
  turns, order = scenes.dialogue(one, 3)  # all at the one place
  assert turns[0][0].count("<boxes>, <boxes>, <boxes>") == 1
  assert order == [0, 1, 2]
  two = entry("<boxes> and <boxes>?", "A", boxes_seq=[[2], [0, 1]])
  turns, order = scenes.dialogue(two, 3)
  assert turns[0][0] == "<boxes> and <boxes>, <boxes>?" and order == [2, 0, 1]
  with pytest.raises(ValueError, match="<boxes>"):
    scenes.dialogue(entry("<boxes> and <boxes>?", "A"), 3)
  with pytest.raises(ValueError, match="1 <boxes> for 0 groups"):
    scenes.dialogue(one, 0)
  with pytest.raises(ValueError, match="human, gpt in turn"):
    scenes.dialogue({"conversations": one["conversations"][:1]}, 0)


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer):
  root = tmp_path_factory.mktemp("scans")
  name = "scannet/scene0000_00"
  poses = scan(root / name)
  align = np.diag([-1.0, -1, 1, 1])
  k = np.eye(4)
  k[:2, :3] = [[30, 0, 15.5], [0, 31, 11.5]]
  info = {
    "axis_align_matrix": align.tolist(),
    "intrinsic": np.eye(4).tolist(),
    "depth_intrinsic": k.tolist(),
  }
  for i, pose in enumerate(poses):
    info[f"{name}/color/{9 + i}.png"] = {
      "pose": pose.tolist(),
      "depth": f"{name}/depth/{9 + i}.png",
    }
  (root / "info.json").write_text(json.dumps({name: info}))
  Image.new("RGB", (20, 10), (255, 0, 0)).save(root / "red.png")
  question = "<video>\nWhat is at <boxes>?"
  boxes = {"target": {"boxes": [[1, 2, 3, 0, 0, 0]]}}
  rows = [
    entry(question, "A", video=name, **boxes),
    entry("<image>\nWhat is?", "Red.", image="red.png"),
    entry("What is?", "Two."),
    entry("<video>\nA", "A", video=[f"{name}/color/{i}.png" for i in (11, 9)]),
    entry("<video>\nA", "A", video="scannet/none"),
    entry("<video>\nWhat is at [1, 2, 0.5]?", "A", video=name),
  ]
  (root / "train.json").write_text(json.dumps(rows))
  made = scenes.Scenes(
    str(root / "train.json"),
    info=str(root / "info.json"),
    tokenizer=str(tokenizer),
    length=64,
    frames=2,
    side=28,
    clicks=2,
    slots=8,
  )
  return made, poses, align


def test_a_row_of_a_scan_holds_its_frames_and_its_point(source):
  rows, poses, align = source
  row = rows[0]
  assert row["is_scene"] and row["images"].shape == (2, 28, 28, 3)
  np.testing.assert_array_equal(row["clicks"], [[1, 2, 3], [0, 0, 0]])
  assert list(row["tokens"]).count(-200) == 8
  np.testing.assert_allclose(
    row["world_from_camera"], (align @ poses)[:2], atol=1e-6
  )
  at = np.flatnonzero(row["loss_weight"])
  assert names(rows.tokenizer, row["labels"][at]) == ["A", "</s>"]
  np.testing.assert_array_equal(row["positions"][0], row["positions"][2])


def test_all_rows_have_the_same_shapes(source):
  rows, *_ = source
  first = {k: (v.shape, v.dtype) for k, v in rows[0].items()}
  for i in (1, 2):
    row = rows[i]
    assert {k: (v.shape, v.dtype) for k, v in row.items()} == first
    assert not row["is_scene"] and not row["depth"].any()
  picture = rows[1]["images"]
  assert not picture[1].any() and picture[0, 14, 14, 0] > picture[0, 0, 0, 0]
  assert -200 not in rows[2]["tokens"] and not rows[2]["images"].any()


def test_a_list_of_frames_is_used_as_it_is(source):
  rows, poses, align = source
  got = rows[3]["world_from_camera"]
  np.testing.assert_allclose(got, (align @ poses)[[2, 0]], atol=1e-6)


def test_the_numbers_of_a_question_are_its_point(source):
  row = source[0][5]
  np.testing.assert_array_equal(row["clicks"], [[1, 2, 0.5], [0, 0, 0]])
  assert list(row["tokens"]).count(-300) == 1


def test_errors_name_the_row(source):
  rows, *_ = source
  with pytest.raises(ValueError, match=r"row 4: scene 'scannet/none' is not"):
    rows[4]
