# SPDX-License-Identifier: Apache-2.0
"""What the tests of image transformers share: tiny towers and recordings."""

import functools
import pathlib

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from spatial_jax import hf, trees
from spatial_jax.models import vit_keys
from tests import manifests

GOLDEN = pathlib.Path(__file__).parent / "golden" / "vision"
TOLERANCE = 1e-4
TINY = {"width": 32, "layers": 3, "heads": 4, "mlp": 64, "patch": 4}
CLIP = {
  "class_token": True,
  "class_position": True,
  "patch_bias": False,
  "pre_norm": True,
  "activation": "quick_gelu",
  "eps": 1e-5,
  "final_norm": "kept",
}
DINO = {"class_token": True, "class_position": True, "layer_scale": True}


def worst(got, want):
  """Largest difference relative to the largest number that is wanted."""
  got, want = np.asarray(got), np.asarray(want)
  assert got.shape == want.shape, (got.shape, want.shape)
  return np.max(np.abs(got - want)) / np.max(np.abs(want))


def worst_gradient(got, want):
  """`worst` of all leaves of a tree of parameters; both may be zero.

  A key's bias moves all scores of a query alike, which changes nothing: its
  gradient must be zero but for rounding, of which there is nothing to compare.
  """
  got, want = trees.flatten(got), trees.flatten(want)
  assert list(got) == list(want)
  found = [0.0]
  for name, a in got.items():
    b = want[name]
    if name.endswith("key/bias"):
      size = np.max(np.abs(want[name.removesuffix("bias") + "kernel"]))
      assert max(np.max(np.abs(a)), np.max(np.abs(b))) <= 1e-6 * size, name
    elif np.any(a) or np.any(b):
      found.append(worst(a, b))
  return max(found)


def abstract(model, *inputs):
  if not inputs:
    return shapes_of(model)
  init = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs))
  return init["params"]


@functools.cache
def shapes_of(model):
  return abstract(model, np.zeros((1, model.image, model.image, 3), "f"))


# These programs run once: compiling them quickly counts.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@functools.partial(jit, static_argnums=0)
def run(model, params, *inputs):
  return model.apply({"params": params}, *inputs)


def images_of(*shape):
  return np.random.default_rng(3).normal(size=(*shape, 3)).astype("f")


def random_params(model, *inputs, dtype=np.float32):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(dtype), abstract(model, *inputs)
  )


SIGLIP_TINY = {"width": 32, "layers": 2, "heads": 2, "mlp": 119, "patch": 8}
RECORDED = {
  # 43 pixels are five patches and a rest, resampled to 4 x 4 afterwards.
  "cambrian_siglip": (vit_keys.TIMM, {**SIGLIP_TINY, "image": 43}),
  "cambrian_clip": (
    hf.nest(vit_keys.CLIP, "vision_model.", ""),
    {
      **CLIP,
      "width": 24,
      "layers": 3,
      "heads": 3,
      "mlp": 48,
      "patch": 8,
      "image": 32,
      "output_layer": -2,
    },
  ),
  "cambrian_dinov2": (
    vit_keys.DINOV2_SWIGLU,
    {
      **DINO,
      "width": 32,
      "layers": 2,
      "heads": 2,
      "mlp": 88,
      "patch": 8,
      "image": 56,
      "gated": True,
      "resample": "offset",
    },
  ),
  "openvla_dinov2": (
    vit_keys.TIMM,
    {
      "width": 16,
      "layers": 4,
      "heads": 2,
      "mlp": 64,
      "patch": 14,
      "image": 56,
      "class_token": True,
      "registers": 4,
      "layer_scale": True,
      "final_norm": "kept",
      "output_layer": -2,
    },
  ),
  "openvla_siglip": (
    vit_keys.TIMM,
    {
      "width": 12,
      "layers": 5,
      "heads": 2,
      "mlp": 44,
      "patch": 14,
      "image": 56,
      "final_norm": "kept",
      "output_layer": -2,
    },
  ),
  "internvit": (
    vit_keys.INTERNVIT,
    {
      **DINO,
      "width": 32,
      "layers": 2,
      "heads": 2,
      "mlp": 64,
      "patch": 14,
      "image": 56,
      "final_norm": "none",
    },
  ),
}


def recorded(name, folder):
  """Inputs and outputs of a recording; its weights go to a folder."""
  if name.startswith("cambrian"):
    return of_cambrian(("siglip", "clip", "dinov2").index(name[9:]), folder)
  groups = {"weights": {}, "inputs": {}, "outputs": {}}
  for key, value in load_file(GOLDEN / f"{name}.safetensors").items():
    group, key = key.split("/", 1)
    groups[group][key] = value
  save_file(groups["weights"], folder / "model.safetensors")
  return groups["inputs"], groups["outputs"]


def of_cambrian(number, folder):
  """One of the towers in the case of the whole model."""
  case = GOLDEN.parent / "cambrian" / "full_infer"
  weights = load_file(case / "weights.safetensors")
  weights = manifests.below(weights, f"towers.{number}.")
  save_file(weights, folder / "model.safetensors")
  inputs = load_file(case / "inputs.safetensors")
  outputs = load_file(case / "outputs.safetensors")
  return (
    {"pixels": inputs[f"pixels_{number}"]},
    {"tokens": outputs[f"tower_{number}_tokens"]},
  )
