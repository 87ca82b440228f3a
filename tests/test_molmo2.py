# SPDX-License-Identifier: Apache-2.0
"""Molmo2 from frames to logits equals transformers', and is read by it."""

import importlib.util

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from spatial_jax import hf
from spatial_jax.data import molmo2 as processing
from spatial_jax.models import molmo2, molmo2_vit
from tests.adapters import stts
from tests.towers import TOLERANCE, abstract, images_of, run, worst

SIDE, PATCH, POOL, FRAMES = 14, 2, 3, 2
PER_FRAME = 9  # 7 x 7 patches in squares of 3 x 3, cut at the border
START, IMAGE, END = 24, 25, 26  # tokens of the second table


def config(transformers):
  attention = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
  }
  return transformers.Molmo2Config(
    vision_config={
      **attention,
      "intermediate_size": 24,
      "num_hidden_layers": 5,
      "image_size": [SIDE, SIDE],
      "patch_size": PATCH,
    },
    adapter_config={
      **attention,
      "vision_feature_layer": [4, 2],
      "intermediate_size": 28,
      "text_hidden_size": 20,
    },
    text_config={
      "hidden_size": 20,
      "num_hidden_layers": 2,
      "num_attention_heads": 2,
      "num_key_value_heads": 1,
      "head_dim": 10,
      "vocab_size": START,
      # As large as the first table: transformers cuts them apart in the middle.
      "additional_vocab_size": START,
      "intermediate_size": 16,
      "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    image_patch_id=IMAGE,
    tie_word_embeddings=False,
    attn_implementation="eager",
  )


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """transformers' model of random weights, and the folder that it wrote."""
  for package in ("torch", "transformers"):
    if importlib.util.find_spec(package) is None:
      pytest.skip(f"{package} is not installed: only a recording is compared")
  import torch
  import transformers

  model = transformers.Molmo2ForConditionalGeneration(config(transformers))
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      p.normal_(0, 0.2, generator=generator)
      p += 1.0 if "norm" in name and name.endswith("weight") else 0.0
  folder = tmp_path_factory.mktemp("molmo2")
  model.eval().save_pretrained(folder)
  return model, folder


def batch():
  """A question about two frames."""
  frame = [START, *[IMAGE] * PER_FRAME, END]
  tokens = np.array([[1, 2, *frame, 3, *frame, 4, 5, 6, 7]], np.int32)
  valid = np.ones_like(tokens)
  pooling = processing.pooling(FRAMES, SIDE // PATCH, SIDE // PATCH, POOL)
  return {
    "tokens": tokens,
    "positions": np.arange(tokens.shape[1], dtype=np.int32)[None],
    "segments": valid,
    "mutual": (tokens >= START).astype(np.int32),
    "images": images_of(1, FRAMES, SIDE, SIDE),
    "pooling": pooling[None],
  }


def patches_of(images):
  """[F height width 3] to rows of flattened (y, x, channel) patches."""
  F, h = len(images), SIDE // PATCH
  x = images.reshape(F, h, PATCH, h, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(F, h * h, -1)


def compute(theirs, rows):
  import torch

  with torch.no_grad():
    return theirs(
      input_ids=torch.tensor(rows["tokens"]).long(),
      attention_mask=torch.tensor(rows["segments"]).long(),
      mm_token_type_ids=torch.tensor(rows["mutual"]).long(),
      pixel_values_videos=torch.tensor(patches_of(rows["images"][0])),
      video_token_pooling=torch.tensor(rows["pooling"][0]).long(),
      video_grids=torch.tensor([[FRAMES, POOL, POOL]]),
      output_hidden_states=True,
    )


def ours(theirs, folder):
  """The library's model and parameters of what transformers wrote."""
  model = stts.model(theirs.config.to_dict())
  shapes = abstract(model, *batch().values())
  return model, hf.load(molmo2.KEYS, folder, shapes), shapes


@pytest.mark.filterwarnings("ignore")
def test_logits_equal_those_of_transformers(published):
  theirs, folder = published
  model, params, _ = ours(theirs, folder)
  rows = batch()
  want = compute(theirs, rows)
  logits, out = run(model, params, *rows.values())
  assert np.all(out["vit/valid_mask"])
  hidden = [x.numpy() for x in want.hidden_states]
  assert worst(out["llm/inputs"], hidden[0]) <= TOLERANCE
  assert worst(out["llm/blocks"][0], hidden[1]) <= TOLERANCE
  assert worst(out["llm/hidden"], hidden[-1]) <= TOLERANCE
  assert worst(logits, want.logits) <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("naming", ["transformers", "released"])
def test_transformers_reads_what_we_write(naming, published, tmp_path):
  theirs, folder = published
  _, params, shapes = ours(theirs, folder)
  if naming == "released":
    hf.save(molmo2.RELEASED, params, tmp_path, release=1)
    want = load_file(folder / "model.safetensors")
    got = load_file(tmp_path / "model.safetensors")
    assert got.keys() == want.keys()
    for name, value in want.items():
      np.testing.assert_array_equal(got[name], value, strict=True)
  else:
    hf.save(molmo2.KEYS, params, tmp_path)
  theirs.config.save_pretrained(tmp_path)
  again, info = type(theirs).from_pretrained(
    tmp_path, output_loading_info=True, attn_implementation="eager"
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  for name, value in theirs.named_parameters():
    assert (again.get_parameter(name) == value).all(), name
  reloaded = hf.load(molmo2.KEYS, tmp_path, shapes)
  jax.tree.map(np.testing.assert_array_equal, reloaded, params)


@pytest.mark.filterwarnings("ignore")
def test_any_patches_may_be_pooled_and_a_token_may_have_none(published):
  import torch

  theirs, folder = published
  _, params, _ = ours(theirs, folder)
  rng = np.random.default_rng(2)
  pooling = rng.integers(0, FRAMES * 49, (11, 5)).astype(np.int32)
  pooling[rng.random(pooling.shape) < 0.3] = -1
  pooling[4] = -1
  connector = molmo2_vit.Connector(16, 2, 28, 20)
  features = rng.normal(size=(1, FRAMES * 49, 32)).astype("f")
  tokens, valid = run(
    connector, params["vision"]["connector"], features, pooling[None]
  )
  with torch.no_grad():
    want = theirs.model.multi_modal_projector(
      torch.tensor(features), torch.tensor(pooling).long()
    ).last_hidden_state
  valid = np.asarray(valid[0])
  assert list(np.flatnonzero(~valid)) == [4]
  assert worst(np.asarray(tokens[0])[valid], want) <= TOLERANCE
  assert not np.any(tokens[0, 4])
