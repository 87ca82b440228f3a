# SPDX-License-Identifier: Apache-2.0
"""Conversations about videos: prompts, shared videos, frames, cached tokens."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from spatial_jax.data import geometry_cache, spatial_mllm, text, videos
from spatial_jax.geometry import coverage

MEDIA = {
  "frames": 4,
  "images": 0,
  "height": 16,
  "width": 32,
  "patch": 4,
  "merge": 2,
  "temporal": 2,
}
VISUAL = 2 * 2 * 4  # tokens


def talk(question, answer, **media):
  turns = [
    {"from": "human", "value": question},
    {"from": "gpt", "value": answer},
  ]
  return {**media, "conversations": turns}


def video(folder, name, count):
  """A folder of plain frames, frame i of brightness 10 i."""
  (folder / name).mkdir()
  for i in range(count):
    image = Image.new("RGB", (40, 20), (10 * i,) * 3)
    image.save(folder / name / f"{i:03}.png")


def source(folder, entries, **options):
  file = folder / "train.json"
  file.write_text(json.dumps(entries))
  media = {**MEDIA, **options.pop("media", {})}
  c = {"length": 288, "files": {"train": str(file)}, "media": media}
  return videos.make(ConfigDict({"data": {**c, "videos": options}}), "train")


def spoken(row, tokenizer):
  """What each segment is trained to say."""
  out = []
  for segment in range(2, row["segments"].max() + 1):
    here = (row["segments"] == segment) & (row["loss_weight"] > 0)
    out.append(tokenizer.decode(row["labels"][here], skip_special=False))
  return out


# --- prompts ----------------------------------------------------------------


def test_prompts_are_those_of_the_published_models():
  assert spatial_mllm.prompt("How many?", 2) == (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|video_pad|><|video_pad|>"
    "<|vision_end|>How many?<|im_end|>\n<|im_start|>assistant\n"
  )
  ask, options = spatial_mllm.vsi_question, ["A. left", "B. right"]
  assert ask("Where?", options) == (
    "Where?\nOptions:\nA. left\nB. right\n"
    "Answer with the option's letter from the given choices directly."
  )
  assert ask("How far?") == (
    "How far?\nPlease answer the question using a single word or phrase."
  )
  assert ask("Where?", options, "v1_0") == (
    "Where?Options:\nA. left\nB. right\n Please answer with the option's "
    "letter from the given choices (e.g., A, B, etc.) within the <answer> "
    "</answer> tags."
  )
  assert ask("How far?", (), "v1_0") == (
    "How far? Please answer with the only numerical value (e.g., 42, 3.14, "
    "etc.) within the <answer> </answer> tags."
  )
  with pytest.raises(ValueError, match="'v2' is unknown"):
    ask("How far?", (), "v2")


def test_a_dialogue_is_trained_on_what_the_assistant_says():
  tokenizer = text.Tokenizer.load()
  turns = [("\nhow many?", "four"), ("and now?", "five")]
  ids, said = spatial_mllm.dialogue(tokenizer, turns)
  assert tokenizer.decode(ids, skip_special=False) == (
    "\nhow many?<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>\n"
    "<|im_start|>user\nand now?<|im_end|>\n"
    "<|im_start|>assistant\nfive<|im_end|>\n"
  )
  trained = tokenizer.decode(ids[said], skip_special=False)
  assert trained == "four<|im_end|>\nfive<|im_end|>\n"


# --- rows -------------------------------------------------------------------


def test_questions_about_a_video_share_a_row(tmp_path):
  video(tmp_path, "a", 4)
  video(tmp_path, "b", 4)
  entries = [
    talk("<video>\nhow?", "1", video="a"),
    talk("<video>\nwhat?", "2", video="b"),
    talk("<video>\nwhy?", "3", video="a"),
    talk("<video>who?", "4", video="a"),
  ]
  alone = source(tmp_path, entries)
  assert len(alone) == 4
  together = source(tmp_path, entries, questions=8)
  assert len(together) == 2
  row = together[0]
  words = spoken(row, together.tokenizer)
  assert words == [f"{n}<|im_end|>\n" for n in (1, 3, 4)]
  assert set(row) == set(alone[0])
  pad = together.tokenizer.token_id("<|video_pad|>")
  assert np.count_nonzero(row["tokens"] == pad) == VISUAL
  # Each question stands where it would stand alone.
  first = alone[2]
  for name in ("tokens", "labels", "loss_weight"):
    np.testing.assert_array_equal(
      row[name][row["segments"] == 3], first[name][first["segments"] == 2]
    )
  np.testing.assert_array_equal(
    row["positions"][:, row["segments"] == 3],
    first["positions"][:, first["segments"] == 2],
  )
  np.testing.assert_array_equal(row["shared"], row["segments"] == 1)
  # No more than asked for.
  assert len(source(tmp_path, entries, questions=2)) == 3


def test_time_advances_by_one_in_training_and_by_two_in_evaluation(tmp_path):
  video(tmp_path, "a", 4)
  entries = [talk("<video>how?", "1", video="a")]
  for seconds, step in ((0.5, 1), (1.0, 2)):
    data = source(tmp_path, entries, second_per_grid=seconds)
    row = data[0]
    pad = data.tokenizer.token_id("<|video_pad|>")
    times = row["positions"][0, row["tokens"] == pad]
    assert times.max() - times.min() == step


def test_frames_are_spread_and_the_last_is_repeated(tmp_path):
  video(tmp_path, "long", 10)
  video(tmp_path, "short", 3)
  names = [f"long/{i:03}.png" for i in (1, 5, 6, 9)]
  entries = [
    talk("<video>how?", "1", video="long"),
    talk("<video>how?", "1", video="short"),
    talk("<video>how?", "1", video=names),
  ]
  data = source(tmp_path, entries)
  seen = [(data[i]["frames"][:, 0, 0, 0] // 10).tolist() for i in range(3)]
  # Cut to integers, as in the published training.
  assert seen == [[0, 3, 6, 9], [0, 1, 2, 2], [1, 5, 6, 9]]
  assert data[0]["frames"].shape == (4, 16, 32, 3)


def test_images_are_rows_of_their_own_kind(tmp_path):
  video(tmp_path, "a", 2)
  names = ["a/000.png", "a/001.png"]
  entries = [talk("<image> or <image>?", "1", images=names)]
  data = source(tmp_path, entries, media={"images": 2})
  row = data[0]
  assert row["images"].shape == (2, 16, 32, 3) and "frames" not in row
  pad = data.tokenizer.token_id("<|image_pad|>")
  assert np.count_nonzero(row["tokens"] == pad) == VISUAL
  data = source(tmp_path, entries, media={"images": 1})
  with pytest.raises(ValueError, match="row 0: the text has 2"):
    data[0]


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    (talk("how?", "1", video="a"), "expected one placeholder"),
    (talk("<video>how?", "1", video="none"), "none"),
    ({"video": "a", "conversations": []}, "expected human, gpt in turn"),
  ],
)
def test_a_bad_row_is_named(entry, message, tmp_path):
  video(tmp_path, "a", 2)
  with pytest.raises(ValueError, match=rf"train.json, row 0: .*{message}"):
    source(tmp_path, [entry])[0]


def test_cached_tokens_come_with_the_frames_they_were_made_of(tmp_path):
  video(tmp_path, "a", 4)
  entries = [talk("<video>how?", "1", video="a")]
  folder = str(tmp_path / "cache")
  frames = source(tmp_path, entries)[0]["frames"]
  tokens = np.random.default_rng(0).normal(size=(4, 32, 6))
  file = geometry_cache.write(folder, frames, tokens.astype(np.float32))
  row = source(tmp_path, entries, cache=folder)[0]
  np.testing.assert_array_equal(row["geometry"], tokens.astype(np.float32))
  # Other frames have none.
  other = source(tmp_path, entries, cache=folder, media={"width": 24})
  with pytest.raises(ValueError, match="run the cache command"):
    other[0]
  damaged = bytearray(file.read_bytes())
  damaged[-1] ^= 1
  file.write_bytes(damaged)
  with pytest.raises(ValueError, match="its hash differs"):
    source(tmp_path, entries, cache=folder)[0]
  file.write_bytes(damaged[:-8])
  with pytest.raises(ValueError, match="is damaged"):
    source(tmp_path, entries, cache=folder)[0]


# --- which frames -----------------------------------------------------------


def test_greedy_coverage_prefers_what_is_new_and_the_first_of_equals():
  seen = np.array(
    [[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]], bool
  )
  order, gains = coverage.greedy(seen, 4)
  assert order.tolist() == [2, 0] and gains.tolist() == [3, 2]
  order, _ = coverage.greedy(seen, 1)
  assert order.tolist() == [2]


def test_frames_without_voxels_are_refused():
  points = np.zeros((2, 3, 3, 3), np.float32)
  ones = np.ones((2, 3, 3), np.float32)
  with pytest.raises(ValueError, match="lie in a plane"):
    coverage.choose(points, ones)
  with pytest.raises(ValueError, match=r"confidence above 0\.1"):
    coverage.choose(points, 0.05 * ones)


def test_candidates_are_spread_over_the_video():
  assert coverage.candidates(5).tolist() == [0, 1, 2, 3, 4]
  chosen = coverage.candidates(300)
  assert len(chosen) == 128 and chosen[[0, -1]].tolist() == [0, 299]
