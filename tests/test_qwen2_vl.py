# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL equals that of transformers, and its table fits all sizes."""

import functools

import jax
import live
import numpy as np
import pytest
from ml_collections import ConfigDict

from spatial_jax import generate, hf, models
from spatial_jax.data import positions, vision
from spatial_jax.nn.edit import residuals

torch, transformers = live.packages()
pytestmark = pytest.mark.filterwarnings("ignore")

IMAGE, VIDEO, START, END = 120, 121, 122, 123
NEW_TOKENS = 8
# Text tokens and (frames, h, w) in patches, row by row.
ROWS = (
  ([3, (1, 8, 6), 2, (1, 2, 4), 5], [4, (1, 6, 10), 2]),
  ([2, (3, 4, 6), 6], [7, (1, 4, 4), 1]),
)
TEXT = {
  "vocab_size": 128,
  "hidden_size": 64,
  "intermediate_size": 96,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-6,
  "rope_parameters": {
    "rope_type": "default",
    "rope_theta": 1e6,
    "mrope_section": [2, 3, 3],
  },
  "bos_token_id": None,
  "eos_token_id": None,
  "pad_token_id": 0,
}
VISION = {
  "depth": 4,
  "embed_dim": 32,
  "hidden_size": 64,
  "num_heads": 2,
  "patch_size": 4,
}
SIZES = {"patches": 80, "frames": 3, "frame_patches": 60, "windows": 1}
LENGTH = 40


def build(variant="tiny"):
  config = {"model_name": "qwen2_vl", "batch_size": 2, "data": {"length": 16}}
  config["model"] = {"variant": variant}
  return models.build(ConfigDict(config))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """transformers' model, and the same numbers as our parameters."""
  config = transformers.Qwen2VLConfig(
    text_config=TEXT,
    vision_config=VISION,
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=START,
    vision_end_token_id=END,
    tie_word_embeddings=False,
  )
  config._attn_implementation = "eager"
  model = transformers.Qwen2VLForConditionalGeneration(config)
  theirs = live.randomize(model)
  folder = tmp_path_factory.mktemp("qwen2_vl")
  return theirs, live.load(*build(), theirs, folder, make(ROWS[0])[0])


def make(rows):
  """Our batch, and what transformers gets of it."""
  rng = np.random.default_rng(0)
  B = len(rows)
  tokens, valid = np.zeros((B, LENGTH), np.int32), np.zeros((B, LENGTH), bool)
  patches = np.zeros((B, SIZES["patches"], 96), np.float32)
  ids, grids = [], [[p for p in row if isinstance(p, tuple)] for row in rows]
  pixels = {IMAGE: ([], []), VIDEO: ([], [])}
  for b, row in enumerate(rows):
    line, used = [], 0
    for part in row:
      if isinstance(part, int):
        line += rng.integers(1, 120, part).tolist()
        continue
      count = np.prod(part)
      kind = VIDEO if part[0] > 1 else IMAGE
      line += [START, *[kind] * (count // 4), END]
      patches[b, used : used + count] = rng.normal(size=(count, 96))
      pixels[kind][0].append(patches[b, used : used + count])
      pixels[kind][1].append(part)
      used += count
    tokens[b, -len(line) :], valid[b, -len(line) :] = line, True
    where, _ = positions.mrope(
      tokens[b],
      grids[b],
      image_token=IMAGE,
      video_token=VIDEO,
      tokens_per_second=1.0,
      valid_mask=valid[b],
    )
    ids.append(where)
  arrays = vision.layout(grids, SIZES, side=0)
  ours = {
    "tokens": tokens,
    "positions": np.stack(ids),
    "segments": valid.astype(np.int32),
    "patches": patches,
    **{f"layout/{name}": array for name, array in arrays.items()},
  }
  long = torch.tensor(tokens).long()
  theirs = {
    "input_ids": long,
    "attention_mask": torch.tensor(valid).long(),
    "mm_token_type_ids": (long == IMAGE).int() + 2 * (long == VIDEO).int(),
  }
  for kind, names in (
    (IMAGE, ("pixel_values", "image_grid_thw")),
    (VIDEO, ("pixel_values_videos", "video_grid_thw")),
  ):
    if pixels[kind][0]:
      theirs[names[0]] = torch.tensor(np.concatenate(pixels[kind][0]))
      theirs[names[1]] = torch.tensor(pixels[kind][1])
  return ours, theirs


@functools.partial(jax.jit, static_argnums=0, compiler_options=live.OPTIONS)
def evaluate(model, params, batch):
  _, mod = build()
  logits, out = model.apply({"params": params}, **mod.arguments(batch))
  return logits, residuals(out), out.get("vit/merged", 0)


@functools.partial(jax.jit, static_argnums=0, compiler_options=live.OPTIONS)
def greedy(model, params, batch):
  return generate.generate(
    model, params, batch, max_new_tokens=NEW_TOKENS, stop_ids=()
  )[0]


def compare(pair, ours, theirs):
  reference, params = pair
  reference.model.rope_deltas = None
  with torch.no_grad():
    want = reference(**theirs, output_hidden_states=True)
  logits, slots, _ = evaluate(build()[0], params, ours)
  valid = ours["segments"] > 0
  report = {"logits": live.worst(logits[valid], want.logits.numpy()[valid])}
  # The last one of transformers is after the norm.
  for i, hidden in enumerate(want.hidden_states[:-1]):
    report[f"slot {i}"] = live.worst(slots[i][valid], hidden.numpy()[valid])
  print({key: f"{value:.1e}" for key, value in report.items()})
  assert not {k: v for k, v in report.items() if not v <= 1e-4}


@pytest.mark.parametrize("rows", ROWS)
def test_images_of_any_size_and_videos_equal_those_of_transformers(pair, rows):
  compare(pair, *make(rows))


def test_text_and_greedy_answers_equal_those_of_transformers(pair):
  ours, theirs = make(ROWS[0])
  reference, params = pair
  model, mod = build()
  tokens = greedy(model, params, mod.arguments(ours))
  reference.model.rope_deltas = None
  answer = reference.generate(
    **theirs, max_new_tokens=NEW_TOKENS, do_sample=False
  )
  np.testing.assert_array_equal(tokens, answer[:, LENGTH:].numpy())
  text = {"input_ids": theirs["input_ids"] % 120}
  text["attention_mask"] = theirs["attention_mask"]
  count = np.cumsum(ours["segments"], axis=1) - 1
  batch = {
    "tokens": ours["tokens"] % 120,
    "segments": ours["segments"],
    "positions": np.stack([np.maximum(count, 0)] * 3, axis=1).astype(np.int32),
  }
  compare(pair, batch, text)


def test_transformers_reads_what_we_write(pair, tmp_path):
  reference, params = pair
  for release in (0, 1):
    folder = tmp_path / str(release)
    hf.save(build()[1].KEYS, params, folder, release=release)
    reference.config.save_pretrained(folder)
    again, info = type(reference).from_pretrained(
      folder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in reference.named_parameters():
      assert torch.equal(again.get_parameter(name), value), name


# Of the published files; the 2B's head is tied.
@pytest.mark.parametrize(
  ("variant", "count"), [("2b", 2_208_985_600), ("7b", 8_291_375_616)]
)
def test_the_table_fits_the_tensors_that_transformers_makes(variant, count):
  model, mod = build(variant)
  llm, vit = model.llm, model.vit
  config = transformers.Qwen2VLConfig(
    text_config={
      "vocab_size": llm["vocab"],
      "hidden_size": llm["width"],
      "intermediate_size": llm["mlp"],
      "num_hidden_layers": llm["layers"],
      "num_attention_heads": llm["heads"],
      "num_key_value_heads": llm["kv_heads"],
    },
    vision_config={"hidden_size": vit["out_width"]},
    tie_word_embeddings=llm["tied"],
  )
  with torch.device("meta"):
    theirs = transformers.Qwen2VLForConditionalGeneration(config)
  new = {name: tuple(x.shape) for name, x in theirs.named_parameters()}
  old = live.renamed(new, ("model.visual.", "visual."), ("language_model.", ""))
  assert old.keys() != new.keys()
  batch = {
    "tokens": np.zeros((1, 4), np.int32),
    "segments": np.ones((1, 4), np.int32),
    "positions": np.zeros((1, 3, 4), np.int32),
    "patches": np.zeros((1, 80, 1176), np.float32),
    **{
      f"layout/{name}": array
      for name, array in vision.layout([[(1, 4, 4)]], SIZES, side=0).items()
    },
  }
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), **mod.arguments(batch))
  )["params"]
  for tensors in (old, new):
    hf.plan(mod.KEYS, tensors, shapes)
  assert sum(np.prod(x) for x in new.values()) == count
