# SPDX-License-Identifier: Apache-2.0
"""Image transformers equal transformers' on random tiny models."""

import functools
import importlib.util

import numpy as np
import pytest
from safetensors.numpy import load_file

from spatial_jax import hf
from spatial_jax.models import vit, vit_keys
from tests.towers import (
  CLIP,
  DINO,
  TINY,
  TOLERANCE,
  abstract,
  images_of,
  jit,
  run,
  worst,
)


def live():
  for package in ("torch", "transformers"):
    if importlib.util.find_spec(package) is None:
      pytest.skip(f"{package} is not installed: only recordings are compared")
  import torch
  import transformers

  return torch, transformers


_COMMON = {
  "hidden_size": 32,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "patch_size": 4,
  "image_size": 16,
}
_INNER = {**_COMMON, "intermediate_size": 64}
_RATIO = {**_COMMON, "mlp_ratio": 2}
# Family: class and config of transformers, table, our arguments, and whether a
# table for other image sizes has to be asked for.
LIVE = {
  "clip": ("CLIPVision", _INNER, vit_keys.CLIP, CLIP, True),
  "siglip": (
    "SiglipVision",
    _INNER,
    vit_keys.SIGLIP,
    {"activation": "gelu_tanh", "pool": True},
    True,
  ),
  "janus": ("JanusVision", _RATIO, vit_keys.JANUS, {}, True),
  "dinov2": ("Dinov2", _RATIO, vit_keys.DINOV2, DINO, False),
  "dinov2_swiglu": (
    "Dinov2",
    {**_RATIO, "use_swiglu_ffn": True},
    vit_keys.DINOV2_SWIGLU,
    {**DINO, "gated": True, "mlp": 48},
    False,
  ),
  "dinov2_registers": (
    "Dinov2WithRegisters",
    {**_RATIO, "num_register_tokens": 3},
    vit_keys.DINOV2,
    {**DINO, "registers": 3, "resample": "antialias"},
    False,
  ),
  "internvl": (
    "InternVLVision",
    {**_INNER, "attention_bias": True},
    vit_keys.INTERNVL,
    {**DINO, "final_norm": "none"},
    False,
  ),
}


def randomize(torch, model):
  """No parameter is zero or one, so that a wrong place shows."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      is_norm = p.ndim == 1 and "norm" in name and name.endswith("weight")
      p.normal_(0, 0.2, generator=generator)
      p += 1.0 if is_norm else 0.0
  return model.eval()


@functools.cache
def reference(family):
  torch, transformers = live()
  name, config, *_ = LIVE[family]
  config = getattr(transformers, f"{name}Config")(
    **config, attn_implementation="eager"
  )
  return randomize(torch, getattr(transformers, f"{name}Model")(config))


def ours(family, **more):
  return vit.Model(**{**TINY, "image": 16, **LIVE[family][3], **more})


def prefixed(table):
  """transformers writes some towers as parts of a larger model."""
  return hf.nest(table, ("vision_model.", ""), "")


@pytest.fixture(scope="module", params=LIVE)
def published(request, tmp_path_factory):
  """A family, its model in transformers and the folder which that wrote."""
  model = reference(request.param)
  folder = tmp_path_factory.mktemp(request.param)
  model.save_pretrained(folder)
  return request.param, model, folder


def compute(family, model, images):
  torch, _ = live()
  more = {"interpolate_pos_encoding": True} if LIVE[family][4] else {}
  with torch.no_grad():
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    return model(pixels, output_hidden_states=True, **more)


@functools.partial(jit, static_argnums=0)
def embed(model, params, images):
  """What the first block reads; the compiler leaves the blocks out."""
  return model.apply({"params": params}, images)[1]["vit/embedded"]


def parameters(family, folder):
  return hf.load(
    prefixed(LIVE[family][2]),
    folder,
    abstract(ours(family)),
    ignore=("embeddings.mask_token",),
  )


@pytest.mark.filterwarnings("ignore")
def test_outputs_equal_those_of_transformers(published):
  family, theirs, folder = published
  model = ours(family)
  params = parameters(family, folder)
  # Neither square nor of the size that the table of positions has.
  images = images_of(2, 28, 20)
  want = compute(family, theirs, images)
  tokens, out = run(model, params, images)
  hidden = [x.numpy() for x in want.hidden_states]
  report = {
    "tokens": worst(out["vit/tokens"], want.last_hidden_state),
    "embedded": worst(out["vit/embedded"], hidden[0]),
    **{
      f"block {i}": worst(block, hidden[i + 1])
      for i, block in enumerate(out["vit/blocks"])
    },
  }
  if model.pool:
    report["pooled"] = worst(out["vit/pooled"], want.pooler_output)
  np.testing.assert_array_equal(tokens, out["vit/tokens"][:, model.prefix :])
  print(family, {name: f"{value:.1e}" for name, value in report.items()})
  assert all(value <= TOLERANCE for value in report.values()), report


# Janus reads images as SigLIP does, and the giant DINOv2 as the others.
OTHER_SIZES = [name for name in LIVE if name not in ("janus", "dinov2_swiglu")]


# The table's own size, a non-square one of as many patches, and a smaller one
# whose rest of pixels is lost.
@pytest.mark.parametrize("size", [(16, 16), (8, 32), (13, 10)])
@pytest.mark.parametrize("published", OTHER_SIZES, indirect=True)
@pytest.mark.filterwarnings("ignore")
def test_positions_of_other_sizes_equal_those_of_transformers(size, published):
  family, theirs, folder = published
  images = images_of(1, *size)
  want = compute(family, theirs, images).hidden_states[0]
  got = embed(ours(family), parameters(family, folder), images)
  assert worst(got, want) <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_what_we_write(published, tmp_path):
  family, theirs, folder = published
  table = prefixed(LIVE[family][2])
  model = ours(family)
  ignore = ("embeddings.mask_token",)
  params = hf.load(table, folder, abstract(model), ignore=ignore)
  written = load_file(folder / "model.safetensors")
  release = int(not any(name.startswith("vision_model.") for name in written))
  hf.save(table, params, tmp_path, release=release)
  theirs.config.save_pretrained(tmp_path)
  got = load_file(tmp_path / "model.safetensors")
  assert written.keys() - got.keys() <= {"embeddings.mask_token"}
  for name, value in got.items():
    np.testing.assert_array_equal(value, written[name], strict=True)
  again, info = type(theirs).from_pretrained(
    tmp_path, output_loading_info=True, attn_implementation="eager"
  )
  assert set(info["missing_keys"]) <= {"embeddings.mask_token"}
  assert not info["unexpected_keys"] and not info["mismatched_keys"]
  images = images_of(1, 16, 16)
  want = compute(family, theirs, images).last_hidden_state.numpy()
  got = compute(family, again.eval(), images).last_hidden_state.numpy()
  np.testing.assert_array_equal(got, want)
