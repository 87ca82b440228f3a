# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 equals that of transformers, and its table fits the published one."""

import functools

import jax
import live
import numpy as np
import pytest
from ml_collections import ConfigDict

from spatial_jax import generate, hf, models
from spatial_jax.nn.edit import residuals

torch, transformers = live.packages()
pytestmark = pytest.mark.filterwarnings("ignore")

IMAGE = 3
NEW_TOKENS = 8
LENGTH = 40
# Text tokens of the two rows before, between and after their two images.
ROWS = ((4, 5, 6), (3, 3, 9))


def build(side=6, pooled=3, variant="tiny"):
  """Sides of images in patches of 4 pixels, and of what they are pooled to."""
  config = {"model_name": "gemma3", "batch_size": 2, "data": {"length": 16}}
  config["model"] = {"variant": variant}
  if variant == "tiny":
    config["model"] |= {"vit": {"image": 4 * side}, "image_tokens": pooled**2}
  return models.build(ConfigDict(config))


def configuration(model):
  """Our arguments as transformers names them."""
  llm, vit = model.llm, model.vit
  return transformers.Gemma3Config(
    text_config={
      "vocab_size": llm["vocab"],
      "hidden_size": llm["width"],
      "intermediate_size": llm["mlp"],
      "num_hidden_layers": llm["layers"],
      "num_attention_heads": llm["heads"],
      "num_key_value_heads": llm["kv_heads"],
      "head_dim": llm["head_dim"],
      "query_pre_attn_scalar": llm["head_dim"],
      "sliding_window": llm["window"],
      "sliding_window_pattern": llm.get("full_every", 6),
      "rope_scaling": {"rope_type": "linear", "factor": 8.0},
      "bos_token_id": None,
      "eos_token_id": None,
      "pad_token_id": 0,
    },
    vision_config={
      "model_type": "siglip_vision_model",
      "hidden_size": vit["width"],
      "intermediate_size": vit["mlp"],
      "num_hidden_layers": vit["layers"],
      "num_attention_heads": vit["heads"],
      "image_size": vit["image"],
      "patch_size": vit["patch"],
      "vision_use_head": False,
    },
    mm_tokens_per_image=model.image_tokens,
    image_token_index=model.image_token,
  )


def published(model):
  config = configuration(model)
  config._attn_implementation = "eager"
  return transformers.Gemma3ForConditionalGeneration(config)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """transformers' model, and the same numbers as our parameters."""
  theirs = live.randomize(published(build()[0]))
  folder = tmp_path_factory.mktemp("gemma3")
  return theirs, live.load(*build(), theirs, folder, make()[0])


def make(side=6, pooled=3):
  """Our batch, and what transformers gets of it."""
  rng = np.random.default_rng(0)
  B = len(ROWS)
  tokens, valid = np.zeros((B, LENGTH), np.int32), np.zeros((B, LENGTH), bool)
  for b, parts in enumerate(ROWS):
    line = []
    for i, count in enumerate(parts):
      line += [IMAGE] * (pooled**2 if i else 0)
      line += rng.integers(4, 96, count).tolist()
    tokens[b, -len(line) :], valid[b, -len(line) :] = line, True
  images = rng.uniform(-1, 1, (B, 2, 4 * side, 4 * side, 3))
  ours = {
    "tokens": tokens,
    "positions": np.maximum(np.cumsum(valid, axis=1) - 1, 0).astype(np.int32),
    "segments": valid.astype(np.int32),
    "images": images.astype(np.float32),
  }
  pixels = ours["images"].reshape(-1, *images.shape[2:]).transpose(0, 3, 1, 2)
  theirs = {
    "input_ids": torch.tensor(tokens).long(),
    "attention_mask": torch.tensor(valid).long(),
    "token_type_ids": torch.tensor(tokens == IMAGE).long(),
    "pixel_values": torch.tensor(pixels),
  }
  return ours, theirs


@functools.partial(jax.jit, static_argnums=0, compiler_options=live.OPTIONS)
def evaluate(model, params, batch):
  logits, out = model.apply({"params": params}, **batch)
  return logits, residuals(out)


@functools.partial(jax.jit, static_argnums=0, compiler_options=live.OPTIONS)
def greedy(model, params, batch):
  return generate.generate(
    model, params, batch, max_new_tokens=NEW_TOKENS, stop_ids=()
  )[0]


def compare(model, params, reference, ours, theirs):
  positions = torch.tensor(ours["positions"]).long()
  with torch.no_grad():
    want = reference(
      **theirs, position_ids=positions, output_hidden_states=True
    )
  logits, slots = evaluate(model, params, ours)
  valid = ours["segments"] > 0
  report = {"logits": live.worst(logits[valid], want.logits.numpy()[valid])}
  # The last one of transformers is after the norm.
  for i, hidden in enumerate(want.hidden_states[:-1]):
    report[f"slot {i}"] = live.worst(slots[i][valid], hidden.numpy()[valid])
  print({key: f"{value:.1e}" for key, value in report.items()})
  assert not {k: v for k, v in report.items() if not v <= 1e-4}


def test_images_text_and_answers_equal_those_of_transformers(pair):
  reference, params = pair
  (model, mod), (ours, theirs) = build(), make()
  compare(model, params, reference, ours, theirs)
  # Longer than the window of 7, and with images of 9 tokens.
  tokens = greedy(model, params, ours)
  answer = reference.generate(
    **theirs, max_new_tokens=NEW_TOKENS, do_sample=False
  )
  np.testing.assert_array_equal(tokens, answer[:, LENGTH:].numpy())
  assert min(len(np.unique(row)) for row in tokens) > 2
  text = {
    **ours,
    "tokens": np.where(ours["tokens"] == IMAGE, 5, ours["tokens"]),
  }
  del text["images"]
  theirs = {
    "input_ids": torch.tensor(text["tokens"]).long(),
    "attention_mask": theirs["attention_mask"],
  }
  compare(model, params, reference, text, theirs)
  assert mod.arguments({**ours, "labels": 0}).keys() == ours.keys()


def test_images_of_another_size_equal_those_of_transformers(tmp_path):
  model, mod = build(8, 2)
  ours, theirs = make(8, 2)
  reference = live.randomize(published(model), 1)
  params = live.load(model, mod, reference, tmp_path, ours)
  compare(model, params, reference, ours, theirs)


def test_transformers_reads_what_we_write(pair, tmp_path):
  reference, params = pair
  for release in (0, 1, 2):
    folder = tmp_path / str(release)
    hf.save(build()[1].KEYS, params, folder, release=release)
    reference.config.save_pretrained(folder)
    again, info = type(reference).from_pretrained(
      folder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in reference.named_parameters():
      assert torch.equal(again.get_parameter(name), value), name


def test_the_table_fits_the_tensors_that_transformers_makes():
  model, mod = build(variant="4b")
  with torch.device("meta"):
    theirs = transformers.Gemma3ForConditionalGeneration(configuration(model))
  new = {name: tuple(x.shape) for name, x in theirs.named_parameters()}
  middle = live.renamed(new, ("vision_tower.", "vision_tower.vision_model."))
  old = live.renamed(
    middle,
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower", "vision_tower"),
    ("model.multi", "multi"),
  )
  written = live.renamed(old, (".vision_model", ""))
  row = np.zeros((1, 4), np.int32)
  batch = {"tokens": row, "segments": row, "positions": row}
  batch["images"] = np.zeros((1, 1, 896, 896, 3), np.float32)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **batch))
  for tensors in (old, middle, new, written):
    hf.plan(mod.KEYS, tensors, shapes["params"])
  # Of the published files.
  assert sum(np.prod(x) for x in new.values()) == 4_300_079_472


def test_images_that_do_not_fit_the_tokens_are_an_error():
  model = build()[0].clone(image_tokens=16)
  with pytest.raises(ValueError, match=r"36 patches .* pooled to 16 tokens"):
    jax.eval_shape(lambda: model.init(jax.random.key(0), **make()[0]))


def test_a_prompt_has_a_place_for_each_image_token():
  text = build()[1].prompt("Where is it? ", "One token.", images=1, count=2)
  assert text == (
    "<bos><start_of_turn>user\nOne token.\n\n\n\n<start_of_image>"
    "<image_soft_token><image_soft_token><end_of_image>\n\nWhere is it?"
    "<end_of_turn>\n<start_of_turn>model\n"
  )
