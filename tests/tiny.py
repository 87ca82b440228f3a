# SPDX-License-Identifier: Apache-2.0
"""Tiny versions of all models that have a loss, and batches for them."""

import jax
import numpy as np
from ml_collections import ConfigDict

from spatial_jax import models
from spatial_jax.data import molmo2
from spatial_jax.geometry import camera

ROWS, LENGTH = 8, 40
IMAGE = 120  # tokens of images, 5 to 5 + their count
_LLM = {"layers": 2, "heads": 2, "width": 32, "mlp": 64, "vocab": 128}
_LLM |= {"kv_heads": 2, "head_dim": 16}
_VIT = {"width": 32, "layers": 2, "heads": 2, "mlp": 64, "patch": 8}
_VIT |= {"image": 16}
_VGGT = {"width": 32, "heads": 2, "depth": 1, "vit_depth": 1, "vit_heads": 2}
_VGGT |= {"patch": 8, "image_size": 16, "layer_scale": 1.0, "token_std": 0.02}
_TEACHER = {**_VGGT, "patch": 14, "image_size": 28, "keep": (0,)}
_FORCED = {"align": {"layer": 1, "width": 64}, "teacher": _TEACHER}
_QWEN = {"width": 32, "mlp": 64, "out_width": 32, "layers": 2}
_MOLMO2 = {
  "vit": _VIT,
  "read": (1, 0),
  "width": 32,
  "heads": 2,
  "mlp": 64,
  "out_width": 32,
}
_VIDEO = {"length": LENGTH, "frames": 2, "pool": 2}

# name -> (model, its options, config.data, visual tokens of a row)
SYSTEMS = {
  "cambrian": (
    "cambrian",
    {
      "variant": "tiny",
      "image_token": IMAGE,
      "siglip": {"width": 16, "heads": 2},
      "clip": {"width": 16, "heads": 2},
      "llm": {**_LLM, "layers": 3},
      "sva": {"layers": 1, "depth": 1},
    },
    {"length": LENGTH},
    20,
  ),
  "janus": (
    "janus",
    {"variant": "1b", "vit": _VIT, "llm": _LLM, "image_token": IMAGE},
    {"length": LENGTH, "images": 2},
    8,
  ),
  "llava_3d": (
    "llava_3d",
    {
      "variant": "tiny",
      "image_token": IMAGE,
      "vit": _VIT,
      "llm": _LLM,
      "lift": {"capacity": 8, "voxel_size": 0.5},
      "grounding": {},
    },
    {"length": LENGTH, "scene": {"frames": 2, "side": 16, "clicks": 2}},
    8,
  ),
  "molmo2": (
    "molmo2",
    {
      "variant": "4b",
      "image_token": IMAGE,
      "vision": _MOLMO2,
      "llm": {**_LLM, "new_vocab": 0},
    },
    _VIDEO,
    2,
  ),
  "openvla_oft": (
    "openvla_oft",
    {
      "variant": "tiny",
      "dino": {"width": 16, "mlp": 32, "image": 16},
      "siglip": {"image": 16},
      "llm": _LLM,
      "chunk": 2,
      **_FORCED,
    },
    {"length": LENGTH, "views": 2},
    0,
  ),
  "paligemma": (
    "paligemma",
    {"variant": "3b-224", "vit": _VIT, "llm": _LLM, "image_token": IMAGE},
    {"length": LENGTH, "images": 2},
    8,
  ),
  **{
    name: (
      "pi0",
      {
        "variant": f"{name}-tiny",
        "vit": {"width": 16, "mlp": 32, "image": 16},
        "chunk": 4,
        **(_FORCED if name == "pi05" else {}),
      },
      {"length": LENGTH, "views": 2},
      0,
    )
    for name in ("pi0", "pi05")
  },
  "qwen2_5_vl": (
    "qwen2_5_vl",
    {
      "variant": "tiny",
      "grid": (1, 4, 4),
      "vit": {**_QWEN, "full_layers": (1,)},
      "llm": _LLM,
    },
    {"length": LENGTH},
    4,
  ),
  "spatial_mllm": (
    "spatial_mllm",
    {
      "variant": "tiny",
      "vit": {**_QWEN, "full_layers": (1,)},
      "llm": {**_LLM, "tied": True},
      "vggt": {**_VGGT, "image_size": 32},
    },
    {"length": LENGTH, "media": {"frames": 2, "height": 32, "width": 32}},
    4,
  ),
  "stts": (
    "stts",
    {
      "variant": "tiny",
      "image_token": IMAGE,
      "vision": {
        "vit": {**_VIT, "image": 32, "layers": 4},
        "drop": 0.5,
        "out_width": 32,
      },
      "llm": _LLM,
    },
    {**_VIDEO, "frames": 4},
    16,
  ),
  "vggt": (
    "vggt",
    {
      "variant": "demo",
      **_VGGT,
      "camera_heads": 2,
      "camera_depth": 1,
      "dpt_layers": (0, 0, 0, 0),
      "dpt_features": 8,
      "dpt_channels": (8, 8, 8, 8),
    },
    {"views": {"frames": 2, "image_size": 16}},
    0,
  ),
}


def build(name):
  """(model, its file, batch of random numbers)."""
  model_name, options, data, count = SYSTEMS[name]
  config = ConfigDict({"model_name": model_name, "batch_size": ROWS})
  config.model, config.data = options, data
  model, mod = models.build(config)
  rng = np.random.default_rng(0)
  inputs = dict(mod.INPUTS(config))
  batch = {k: draw(k, x.shape, x.dtype, rng) for k, x in inputs.items()}
  if count:
    batch["tokens"][:, 5 : 5 + count] = IMAGE
  if "pooling" in batch:
    side = batch["images"].shape[2] // 8
    pooling = molmo2.pooling(batch["images"].shape[1], side, side, 2)
    batch["pooling"] = np.tile(pooling, (ROWS, 1, 1))
  if "depth" in batch:
    batch["intrinsics"] = np.broadcast_to(
      camera.intrinsics(16, 16, 80.0), (ROWS, 2, 3, 3)
    )
  if "slots" in batch:
    batch["slots"][:, 20 : 20 + batch["actions"][0].size] = True
  return model, mod, batch


def draw(name, shape, dtype, rng):
  """One array of a batch."""
  last = np.arange(shape[-1])
  fixed = {
    "positions": last,
    "segments": np.where(last < LENGTH - 3, 1, 0),
    "mutual": 0,
    "padding": 0,
    "shared": False,
    "slots": False,
    "prefix": last < LENGTH // 2,
  }
  if name in fixed:
    return np.broadcast_to(np.asarray(fixed[name], dtype), shape).copy()
  if name == "world_from_camera":
    eye = rng.normal(size=(*shape[:2], 3))
    return camera.look_at(eye, eye + np.array([1.0, 0.5, -0.2]))
  if np.dtype(dtype).kind == "b":
    return np.ones(shape, bool)
  if name == "depth":
    return rng.uniform(0.5, 2, shape).astype(dtype)
  if name == "loss_weight":  # each row has another number of labels
    return (rng.random(shape) < rng.random((shape[0], 1))).astype(dtype)
  if np.issubdtype(dtype, np.integer):
    return rng.integers(3, 100, shape).astype(dtype)
  return rng.normal(size=shape).astype(dtype)


def shapes_of(model, mod, batch):
  return jax.eval_shape(
    lambda: model.init(jax.random.key(0), **mod.arguments(batch))["params"]
  )


def random(shapes):
  """Parameters of about the size that training gives them."""
  rng = np.random.default_rng(1)

  def one(x):
    # Of a convolution, all that it sums.
    summed = x.shape[-4:-1] if len(x.shape) > 3 else x.shape[-2:-1]
    width = np.prod(summed) if summed else 100
    return rng.normal(0, width**-0.5, x.shape).astype(x.dtype)

  return jax.tree.map(one, shapes)
