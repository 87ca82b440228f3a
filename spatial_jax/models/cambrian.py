# SPDX-License-Identifier: Apache-2.0
"""Cambrian-1: four vision towers, a Spatial Vision Aggregator, a decoder.

Paper: https://arxiv.org/abs/2406.16860. Weights: nyu-visionx/cambrian-{8b, 13b,
34b}; those of the towers are where `PART_KEYS` says.
images -> SigLIP, CLIP, DINOv2, ConvNeXt, each at its own resolution -> grids of
features -> aggregator -> L rows of L tokens and a newline -> in place of the
image tokens' embeddings -> decoder, between whose first blocks the aggregator's
further layers look at the features again -> text.

Departures from the paper, the first three as in the published code:
1. DINOv2 is the giant one at 378 pixels, not the large one at 518, and the 34B
   model looks again after every seventh block, not every ninth.
2. DINOv2's positions are resampled at (27 + 0.1) / 37, as the library did that
   the weights were trained with.
3. See `sva` for what a layer of the aggregator is.
4. One static path for training and inference: the slots in the padding of a
   non-square image stay in the row, masked. The published inference drops them,
   which gives the same numbers. Its training scrambles the masks of groups with
   fewer queries; here they fit each group's grid.
5. An image may stand anywhere in a row, a row may have several that follow each
   other, or none. The published models have one, at a fixed place.

Letters: B batch, T length, F images of a row, E towers, L side of the tokens'
grid, S a tower's pixels, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from spatial_jax import hf
from spatial_jax.data import images as preparation
from spatial_jax.models import convnext, llm, sva, sva_keys, vit, vit_keys
from spatial_jax.nn import edit as edit_lib
from spatial_jax.nn.resize import resize
from spatial_jax.types import Array, Bool, Float, Int

Out = dict[str, Any]

PARTS = {
  "siglip": vit.Model,
  "clip": vit.Model,
  "dinov2": vit.Model,
  "convnext": convnext.Model,
  "sva": sva.Aggregator,
  "llm": llm.Model,
}


def _published(decoder, layers, stride):
  sizes = llm.VARIANTS[decoder]
  return {
    "siglip": vit.VARIANTS["timm-siglip-so400m-14-384"],
    "clip": vit.VARIANTS["clip-l-14-336"],
    "dinov2": {**vit.VARIANTS["dinov2-g-14"], "resample": "offset"},
    "convnext": convnext.VARIANTS["xxlarge"],
    "sva": {"features": sizes["width"], "layers": layers, "stride": stride},
    "llm": sizes,
  }


_TINY = {"width": 24, "layers": 2, "heads": 2, "mlp": 32, "patch": 8}
VARIANTS = {
  "8b": _published("llama3-8b", 10, 3),
  "13b": _published("vicuna-13b", 10, 4),
  "34b": _published("yi-34b", 9, 7),
  # Two towers, the grid of the first has to be resampled; decoder blocks before
  # and after the layers between them.
  "tiny": {
    "towers": ("siglip", "clip"),
    "pixels": (40, 64),
    "sides": (4, 8),
    "siglip": vit.VARIANTS["timm-siglip-so400m-14-384"] | _TINY | {"image": 40},
    "clip": vit.VARIANTS["clip-l-14-336"] | _TINY | {"image": 64},
    "dinov2": {},
    "convnext": {},
    "sva": {
      "features": 32,
      "side": 4,
      "width": 32,
      "groups": (4, 2),
      "depth": 2,
      "heads": 4,
      "layers": 2,
      "start": 1,
      "stride": 2,
    },
    "llm": {
      **llm.VARIANTS["llama3-8b"],
      "vocab": 128,
      "width": 32,
      "layers": 5,
      "heads": 4,
      "kv_heads": 2,
      "mlp": 48,
    },
  },
}

_TIMM = ("", "visual.trunk.")  # prefixes in timm's files and in open_clip's
# Towers have files of their own: timm/ViT-SO400M-14-SigLIP-384,
# openai/clip-vit-large-patch14-336, facebook/dinov2-giant, and the CLIP that
# `convnext` names.
PART_KEYS = {
  "siglip": hf.nest(vit_keys.TIMM, _TIMM, ""),
  "clip": hf.nest(vit_keys.CLIP, "vision_model.", ""),
  "dinov2": vit_keys.DINOV2_SWIGLU,
  "convnext": hf.nest(convnext.KEYS, _TIMM, ""),
}
# What their files hold besides: heads, and the towers of texts.
PART_IGNORE = (
  *(p + n for p in (*_TIMM, "vision_model.") for n in vit_keys.IGNORE),
  *(p + "norm_pre." for p in _TIMM),
  *("text.", "text_model.", "text_projection.", "logit_"),
  *("visual.head.", "visual_projection."),
)
# A checkpoint that holds the towers as well numbers them; the published ones
# don't hold them.
KEYS = (
  *hf.nest(llm.KEYS, "model.", "llm/"),
  (
    "lm_head.weight",
    "llm/head/kernel",
    hf.Tied("model.embed_tokens.weight"),
  ),
  *hf.nest(sva_keys.KEYS, "model.", "sva/"),
  *(
    row
    for number, (name, table) in enumerate(PART_KEYS.items())
    for row in hf.nest(table, f"towers.{number}.", f"{name}/")
  ),
)
IGNORE = tuple(f"towers.{n}.{x}" for n in range(4) for x in PART_IGNORE)


class Model(nn.Module):
  """Towers, aggregator and decoder; see the module docstring."""

  llm: Mapping[str, Any]
  sva: Mapping[str, Any]
  siglip: Mapping[str, Any] | None = None
  clip: Mapping[str, Any] | None = None
  dinov2: Mapping[str, Any] | None = None
  convnext: Mapping[str, Any] | None = None
  # Which towers, in the order of the aggregator, and of each: the side of its
  # images in pixels and of the grid that its features are resampled to.
  towers: tuple[str, ...] = tuple(PART_KEYS)
  pixels: tuple[int, ...] = (384, 336, 378, 1024)
  sides: tuple[int, ...] = (24, 24, 24, 96)
  image_token: int = -200  # outside of the vocabulary, as published
  dtype: str = "float32"
  remat: str = "none"
  loss_tokens: int = 0  # whose logits a device holds at once; 0: all

  def setup(self) -> None:
    shared = {"dtype": self.dtype, "remat": self.remat}
    self._towers = {
      name: PARTS[name](**{**shared, **sizes}, name=name)
      for name in self.towers
      if (sizes := getattr(self, name, None))
    }
    self._sva = sva.Aggregator(**{**shared, **self.sva}, name="sva")
    self._llm = self._decoder(name="llm")

  def _decoder(self, **kwargs) -> llm.Model:
    shared = {"dtype": self.dtype, "remat": self.remat}
    return llm.Model(**{**shared, **self.llm}, **kwargs)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B 3 T"],
    segments: Int[Array, "B T"],
    shared: Bool[Array, "B T"] | None = None,
    images: Float[Array, "B F height width 3"] | None = None,
    pixels: Mapping[str, Array] | None = None,
    features: Mapping[str, Array] | None = None,
    padding: Int[Array, "B F E 2"] | None = None,
    cache: llm.Cache | None = None,
    *,
    edits: Mapping[str, edit_lib.Edits] | None = None,
    last: Int[Array, " B"] | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "B logits V"], Out]:
    """Logits and named intermediates.

    Args:
      tokens: `image_token` at the L * (L + 1) slots of each image.
      images: square and in 0..1; resized and normalised for each tower here.
      pixels: instead, of each tower [B F S S 3], as `data.images.cambrian`
        prepares them.
      features: instead, of each tower [B F n Dv], as `encode` returns them.
      padding: padded cells at each end of the rows and of the columns of each
        tower's grid, from `data.cambrian.padding`. None: images are square.
      edits: of the residual stream of "llm"; see `nn.edit`.

    `out` holds "NAME/tokens" [B F n Dv] of each tower, what `sva.Aggregator`
    (whose images are B*F) and `llm.Model` return, and "inputs" [B T D].
    """
    del train  # no dropout
    edits = edit_lib.check(edits, ("llm",))
    embeddings, out, inject = self._llm.embed(jnp.maximum(tokens, 0)), {}, None
    if images is not None:
      pixels = prepare(images, self.towers, self.pixels)
    if pixels is not None:
      features = self.encode(pixels)
    if features is not None:
      out |= {f"{name}/tokens": features[name] for name in self.towers}
      visual, seen, more = self._sva(
        [_flat(features[name]) for name in self.towers], _flat(padding)
      )
      out |= more
      is_image = tokens == self.image_token
      visual = visual.reshape(tokens.shape[0], -1, visual.shape[-1])
      embeddings = sva.place(embeddings, visual, is_image)
      inject = self._sva.inject(seen, is_image, self._llm.layers)
    out["inputs"] = embeddings
    logits, more = self._llm(
      tokens,
      positions,
      segments,
      shared,
      cache,
      embeddings=embeddings,
      inject=inject,
      edit=edits.get("llm"),
      last=last,
    )
    return logits, {**out, **more}

  def encode(self, pixels: Mapping[str, Array]) -> dict[str, Array]:
    """Features [B F n Dv] of each tower, on its grid.

    Towers are frozen in both published stages: they may run ahead.
    """
    features = {}
    for name, side in zip(self.towers, self.sides, strict=True):
      x = pixels[name]
      grid, out = self._towers[name](_flat(x))
      if name == "convnext":
        grid = convnext.multi_stage(out, side)
      else:
        old = math.isqrt(grid.shape[1])
        grid = grid.reshape(-1, old, old, grid.shape[-1])
        grid = resize(grid, (side, side)).reshape(-1, side**2, grid.shape[-1])
      features[name] = grid.reshape(*x.shape[:2], *grid.shape[1:])
    return features

  def init_cache(self, batch: int, length: int) -> llm.Cache:
    """Empty decoder cache; callable without parameters."""
    return self._decoder(parent=None).init_cache(batch, length)


def _flat(x):
  """[B F ...] -> [B*F ...]"""
  return x if x is None else x.reshape(-1, *x.shape[2:])


def prepare(
  images: Float[Array, "B F height width 3"],
  towers: tuple[str, ...],
  pixels: tuple[int, ...],
) -> dict[str, Array]:
  """Square images in 0..1 as each tower reads them, on the device."""
  out = {}
  for name, side in zip(towers, pixels, strict=True):
    _, _, mean, std = preparation.CAMBRIAN[name]
    x = resize(images, (side, side), "bicubic", antialias=True)
    mean, std = (
      jnp.expand_dims(jnp.array(value, x.dtype), range(4))
      for value in (mean, std)
    )
    out[name] = (jnp.clip(x, 0, 1) - mean) / std
  return out


def arguments(batch: Mapping[str, Array]) -> dict[str, Any]:
  """What `Model` takes of a batch; keys "pixels/..." become one dict."""
  names = ("tokens", "positions", "segments", "shared", "images", "padding")
  names += ("edits",)
  kwargs = {name: batch[name] for name in names if name in batch}
  for group in ("pixels", "features"):
    prefix = f"{group}/"
    found = {
      key.removeprefix(prefix): value
      for key, value in batch.items()
      if key.startswith(prefix)
    }
    kwargs |= {group: found} if found else {}
  return kwargs


loss = llm.answer_loss(arguments)


def INPUTS(config) -> dict[str, jax.ShapeDtypeStruct]:
  """Static batch: `config.batch_size` rows of `config.data.length` tokens.

  Rooms of the world (`config.data.world`) come as images, conversations as what
  each tower reads.
  """
  from spatial_jax import models

  model, _ = models.build(config)
  B, T = config.batch_size, config.data.length

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct((B, *shape), dtype)

  inputs = {
    "tokens": array(jnp.int32, T),
    "positions": array(jnp.int32, 3, T),
    "segments": array(jnp.int32, T),
    "shared": array(jnp.bool_, T),
    "labels": array(jnp.int32, T),
    "loss_weight": array(jnp.float32, T),
  }
  if world := config.data.get("world"):
    size = world.image_size
    inputs["images"] = array(jnp.float32, world.frames, size, size, 3)
    return inputs
  inputs["padding"] = array(jnp.int32, 1, len(model.towers), 2)
  for name, side in zip(model.towers, model.pixels, strict=True):
    inputs[f"pixels/{name}"] = array(jnp.float32, 1, side, side, 3)
  return inputs
