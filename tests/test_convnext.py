# SPDX-License-Identifier: Apache-2.0
"""ConvNeXt equals its paper's block and Cambrian-1's recorded features."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spatial_jax import hf, sharding, trees
from spatial_jax.models import convnext
from tests import manifests

GOLDEN = pathlib.Path(__file__).parent / "golden" / "cambrian" / "full_infer"
TOLERANCE = 1e-4
RECORDED = {"widths": (8, 12, 16, 24), "depths": (1, 1, 2, 1), "eps": 1e-5}


def worst(got, want):
  got, want = np.asarray(got), np.asarray(want)
  assert got.shape == want.shape, (got.shape, want.shape)
  return np.max(np.abs(got - want)) / np.max(np.abs(want))


def abstract(model):
  images = np.zeros((1, 32, 32, 3), np.float32)
  return jax.eval_shape(lambda: model.init(jax.random.key(0), images))["params"]


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, images):
  return model.apply({"params": params}, images)


def recorded(folder):
  """Pixels and features of Cambrian-1's case; weights go to a folder."""
  weights = load_file(GOLDEN / "weights.safetensors")
  weights = manifests.below(weights, "towers.3.")
  save_file(weights, folder / "model.safetensors")
  pixels = load_file(GOLDEN / "inputs.safetensors")["pixels_3"]
  return pixels, load_file(GOLDEN / "outputs.safetensors")["tower_3_tokens"]


def test_features_of_all_stages_equal_those_recorded_from_cambrian(tmp_path):
  pixels, want = recorded(tmp_path)
  model = convnext.Model(**RECORDED)
  params = hf.load(convnext.KEYS, tmp_path, abstract(model))
  _, out = run(model, params, pixels.transpose(0, 2, 3, 1))
  side = int(want.shape[1] ** 0.5)
  got = jax.jit(convnext.multi_stage, static_argnums=1)(out, side)
  assert worst(got, want) <= TOLERANCE


def test_loading_and_saving_the_recorded_checkpoint_keeps_every_bit(tmp_path):
  recorded(tmp_path)
  params = hf.load(
    convnext.KEYS, tmp_path, abstract(convnext.Model(**RECORDED))
  )
  hf.save(convnext.KEYS, params, tmp_path / "again")
  want = load_file(tmp_path / "model.safetensors")
  got = load_file(tmp_path / "again" / "model.safetensors")
  assert got.keys() == want.keys()
  for key, value in want.items():
    np.testing.assert_array_equal(got[key], value, strict=True)


def test_bfloat16_parameters_come_back_bit_by_bit(tmp_path):
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(ml_dtypes.bfloat16),
    abstract(convnext.Model(**RECORDED)),
  )
  hf.save(convnext.KEYS, params, tmp_path)
  loaded = hf.load(convnext.KEYS, tmp_path, params)
  for a, b in zip(
    jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True
  ):
    np.testing.assert_array_equal(
      np.asarray(a).view(np.uint8), b.view(np.uint8)
    )


def paper(torch, weights, x, eps):
  """The network as the paper writes it, for weights under timm's names."""
  F = torch.nn.functional
  w = {name: torch.tensor(value) for name, value in weights.items()}

  def norm(x, name):  # of [B h w C]
    scale, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    return F.layer_norm(x, scale.shape, scale, bias, eps)

  def conv(x, name, **more):
    y = x.permute(0, 3, 1, 2)
    y = F.conv2d(y, w[f"{name}.weight"], w[f"{name}.bias"], **more)
    return y.permute(0, 2, 3, 1)

  def linear(x, name):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

  x = norm(conv(x, "stem.0", stride=4), "stem.1")
  stages, stage = [], 0
  while f"stages.{stage}.blocks.0.gamma" in w:
    if stage:
      x = norm(x, f"stages.{stage}.downsample.0")
      x = conv(x, f"stages.{stage}.downsample.1", stride=2)
    block = 0
    while (name := f"stages.{stage}.blocks.{block}") + ".gamma" in w:
      y = conv(x, f"{name}.conv_dw", padding=3, groups=x.shape[-1])
      y = linear(norm(y, f"{name}.norm"), f"{name}.mlp.fc1")
      y = linear(F.gelu(y), f"{name}.mlp.fc2")
      x = x + w[f"{name}.gamma"] * y
      block += 1
    stages.append(x)
    stage += 1
  return stages, norm(x.mean(dim=(1, 2)), "head.norm")


@pytest.mark.parametrize("size", [(64, 64), (75, 41)])
def test_stages_equal_the_papers_network_in_torch(size, tmp_path):
  if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed: only the recording is compared")
  import torch

  model = convnext.Model(widths=(6, 8, 10, 12), depths=(2, 1, 3, 1))
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: 0.3 * rng.normal(size=x.shape).astype("f"), abstract(model)
  )
  hf.save(convnext.KEYS, params, tmp_path)
  images = rng.normal(size=(2, *size, 3)).astype("f")
  weights = load_file(tmp_path / "model.safetensors")
  with torch.no_grad():
    want, pooled = paper(torch, weights, torch.tensor(images), 1e-6)
  last, out = run(model, params, images)
  for i, stage in enumerate(want):
    assert worst(out[f"convnext/stage{i}"], stage) <= TOLERANCE
  assert worst(out["convnext/pooled"], pooled) <= TOLERANCE
  np.testing.assert_array_equal(last, out["convnext/stage3"])


def test_the_table_fits_cambrians_tower():
  shapes = abstract(convnext.Model(**convnext.VARIANTS["xxlarge"]))
  tensors = next(
    tensors
    for name, tensors in manifests.read("cambrian").items()
    if name.startswith("tower.convnext")
  )
  entries = hf.plan(convnext.KEYS, tensors, shapes)
  assert {entry.path for entry in entries} == set(trees.flatten(shapes))
  assert trees.count(shapes) == 843_398_016
  sharding.parameters(shapes, sharding.mesh(fsdp=4, tensor=2))


def test_an_image_that_would_vanish_is_refused():
  model = convnext.Model(widths=(4, 4, 4, 4), depths=(1, 1, 1, 1))
  with pytest.raises(ValueError, match="their sides must be at least 32"):
    jax.eval_shape(
      lambda: model.init(jax.random.key(0), jnp.zeros((1, 31, 64, 3)))
    )
