# SPDX-License-Identifier: Apache-2.0
"""Rows of several videos for Molmo2: text, masks, bytes, and a step on them."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from configs import stts_sft
from spatial_jax import sharding, train
from spatial_jax.data import molmo2, molmo2_videos, pipeline, text
from spatial_jax.models import stts
from tests import tiny

FRAMES, GROUPS, SIDE = 4, 16, 64
IMAGE, START, END = "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"


@pytest.fixture
def recipe(tmp_path):
  """The tiny model on three folders of frames, two videos a row."""
  for v in range(3):
    (tmp_path / f"v{v}").mkdir()
    for i in range(FRAMES - (v == 1)):
      image = Image.new("RGB", (30, 20), (20 * i, 40 * v, 9))
      image.save(tmp_path / f"v{v}" / f"{i}.png")
  rows = [
    {
      "video": f"v{v}",
      "conversations": [
        {"from": "human", "value": f"<video>\nHow many {v}?"},
        {"from": "gpt", "value": f"{v}{v}"},
      ],
    }
    for v in range(3)
  ]
  (tmp_path / "train.json").write_text(json.dumps(rows))
  c = stts_sft.get_config("test")
  token = text.Tokenizer.load().token_id
  c.data.source = "spatial_jax.data.molmo2_videos"
  c.data.render = None
  c.data.files = {"train": str(tmp_path / "train.json")}
  c.data.length, c.data.kept, c.data.frames = 280, 216, 2 * FRAMES
  c.data.videos = {
    "frames_per_video": FRAMES,
    "side": SIDE,
    "groups": GROUPS,
    "image_token": token(IMAGE),
    "frame_tokens": (token(START), token(END)),
  }
  return c


def test_a_row_has_two_videos_as_segments_of_their_own(recipe):
  source = molmo2_videos.make(recipe, "train")
  assert len(source) == 2
  row, encode = source[0], source.tokenizer.encode
  frame = START + IMAGE * GROUPS + END
  for v in range(2):
    here = row["segments"] == 1 + v
    want = "<|im_start|>user\n" + "".join(
      f"{' ' * (i > 0)}{i / 2:.1f} {frame}" for i in range(FRAMES)
    )
    head = encode(want)
    ids = row["tokens"][here]
    np.testing.assert_array_equal(ids[: len(head)], head)
    rest = source.tokenizer.decode(ids[len(head) :], skip_special=False)
    assert rest.startswith(f"How many {v}?<|im_end|>\n<|im_start|>assistant\n")
    said = row["labels"][here][row["loss_weight"][here] > 0]
    assert source.tokenizer.decode(said).strip() == f"{v}{v}"
    np.testing.assert_array_equal(
      row["positions"][0, here], np.arange(here.sum())
    )
  # Whole frames see each other, what the text says of them doesn't.
  assert row["mutual"].sum() == 2 * FRAMES * (GROUPS + 2)
  np.testing.assert_array_equal(row["videos"], [1] * FRAMES + [2] * FRAMES)
  lost = 2 * GROUPS * FRAMES // 2
  assert row["kept_mask"].sum() == (row["segments"] > 0).sum() - lost


def test_frames_are_bytes_of_the_published_resizing(recipe):
  row = molmo2_videos.make(recipe, "train")[0]
  assert row["images"].dtype == np.uint8
  assert row["images"].shape == (2 * FRAMES, SIDE, SIDE, 3)
  # A video of fewer frames repeats its last one.
  np.testing.assert_array_equal(row["images"][-1], row["images"][-2])
  whole = np.full((1, 20, 30, 3), (20, 0, 9), np.uint8)
  seen = stts.arguments({"images": row["images"][1:2]})["images"]
  np.testing.assert_allclose(seen, molmo2.frames(whole, SIDE), atol=1e-6)


def test_the_last_row_goes_on_with_the_first_conversations(recipe):
  source = molmo2_videos.make(recipe, "train")
  first, last = source[0], source[1]
  np.testing.assert_array_equal(
    last["images"][FRAMES:], first["images"][:FRAMES]
  )


def test_a_step_trains_on_such_rows(recipe, one_device):
  recipe.steps, recipe.batch_size, recipe.evals = 2, 2, {}
  mesh = sharding.mesh()
  dataset, example = pipeline.make(recipe, 2)
  batch = next(iter(dataset))
  with jax.set_mesh(mesh):
    step = train.prepare(recipe, example, mesh)
    shapes = jax.eval_shape(step.update, step.state, batch)[1]
    params = tiny.random(jax.eval_shape(step.system.init, jax.random.key(0)))
    value, (metrics, out) = jax.jit(step.system.loss)(
      params, batch, rngs={"sample": jax.random.key(0)}
    )
  assert shapes["loss"].shape == ()
  assert np.isfinite(value)
  assert metrics["labels_cut"] == 0
  assert out["llm/inputs"].shape[1] == recipe.data.kept


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"length": 100}, "whose frames alone take"),
    ({"kept": 100}, "more than the 100 of config.data.kept"),
    ({"frames": 6}, "is no multiple of"),
  ],
)
def test_sizes_that_do_not_fit_are_errors(recipe, changes, message):
  recipe.data.update(changes)
  with pytest.raises(ValueError, match=message):
    _ = molmo2_videos.make(recipe, "train")[0]


def test_a_conversation_without_a_video_is_named(recipe, tmp_path):
  rows = json.loads((tmp_path / "train.json").read_text())
  rows[1]["conversations"][0]["value"] = "How many?"
  (tmp_path / "train.json").write_text(json.dumps(rows))
  with pytest.raises(ValueError, match="row 1: it begins ''"):
    _ = molmo2_videos.make(recipe, "train")[0]


def test_the_published_sizes_give_the_published_length():
  recipe = stts_sft.get_config("variant=4b")
  assert recipe.data.kept == 9728  # 9686 in whole blocks
  assert recipe.data.length == 14976
