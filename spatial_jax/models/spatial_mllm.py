# SPDX-License-Identifier: Apache-2.0
"""Spatial-MLLM: a video language model that also looks through VGGT.

Paper: https://arxiv.org/abs/2505.23747. Weights: Diankun/Spatial-MLLM-
{subset-sft (v1.0), v1.1-Instruct-135K, v1.1-Instruct-820K}.
frames -> vit -> merged tokens; frames -> vggt -> the 2 x 2 x 2 patches of each
merged token side by side -> connector; their sum -> in place of the video
tokens' embeddings -> llm with (t, h, w) positions -> logits.

Departures from the paper, all but the last as the published code has it:
1. The 2D tokens go through no MLP of their own, only Qwen2.5-VL's merger.
2. v1.1 has one stage of connector, v1.0 two. What stands side by side has one
   order here, (frame, y, x, channel); the rows of v1.1's first layer, whose
   weights count frames fastest, are put in this order when they are loaded.
3. Images are two equal frames each; those of a row are one sequence for VGGT.
   v1.0 shows VGGT each image once. The published code can't take one image.
4. The batch holds frames, as many and of one shape for all rows; rows of text
   alone don't mention them. The device embeds Qwen's patches of them.

VGGT is frozen as published, so its tokens may come with the batch (`geometry`);
a model with `vggt=None` has no such weights at all.

Letters: B batch, T length, F frames, N images, P patches of a frame, M merged
tokens, E width of VGGT's tokens, J = 8 E, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Real

from spatial_jax import hf, sharding
from spatial_jax.models import llm, qwen2_5_vl, qwen_vit, vggt
from spatial_jax.nn import edit as edit_lib
from spatial_jax.nn.layers import Dense, RMSNorm, gelu
from spatial_jax.types import Array, Bool, Float, Int

Out = dict[str, Any]

# How it was trained, and therefore must be run; see `vggt`.
_VGGT = {"precision": "pure_bf16"}
_TINY = qwen2_5_vl.VARIANTS["tiny"]

PARTS = {"vit": qwen_vit.Model, "llm": llm.Model, "vggt": vggt.Aggregator}
VARIANTS = {
  "v1_0": {
    **qwen2_5_vl.VARIANTS["3b"],
    "vggt": _VGGT,
    "stages": ("merge", "language"),
    "image_once": True,
  },
  "v1_1": {**qwen2_5_vl.VARIANTS["3b"], "vggt": _VGGT},
  # Rooms of 4 frames of 64 x 64 pixels on a CPU.
  "tiny": {
    **_TINY,
    "vit": {**_TINY["vit"], "layers": 2, "patch": 8, "window": 32},
    "vggt": {
      "width": 32,
      "depth": 2,
      "heads": 2,
      "patch": 8,
      "image_size": 64,
      "vit_depth": 1,
      "vit_heads": 2,
      "layer_scale": 1.0,
      "token_std": 0.02,
    },
  },
}


class Stage(nn.Module):
  """Norm and MLP as wide as its input."""

  out_width: int
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "B M J"]) -> Float[Array, "B M D"]:
    def dense(width, name):
      init = nn.initializers.normal(0.02)
      return Dense(width, dtype=self.dtype, kernel_init=init, name=name)

    width = x.shape[-1]
    x = RMSNorm(1e-6, self.dtype, name="norm")(x)
    x = gelu(dense(width, "up")(x))
    x = sharding.constrain(x, "batch patches act_mlp")
    return dense(self.out_width, "down")(x)


class Connector(nn.Module):
  """Stages one after the other; those of a generation have its names."""

  stages: tuple[str, ...]
  out_width: int
  dtype: str = "float32"
  remat: str = "none"

  @nn.compact
  def __call__(self, x: Float[Array, "B M J"]) -> Float[Array, "B M D"]:
    # Kept for the backward pass, those of three videos would take 2.3 GiB.
    stage = llm.remat(Stage, self.remat, scanned=False)
    for name in self.stages:
      x = stage(self.out_width, self.dtype, name=name)(x)
    return x


def side_by_side(
  x: Float[Array, "B F h w E"], temporal: int = 2, merge: int = 2
) -> Float[Array, "B M J"]:
  """Patches of each merged token, in the order (frame, y, x, channel).

  Merged tokens are in Qwen's order: temporal patch, row, column.
  """
  B, F, h, w, E = x.shape
  shape = (B, F // temporal, temporal, h // merge, merge, w // merge, merge, E)
  x = x.reshape(shape).transpose(0, 1, 3, 5, 2, 4, 6, 7)
  return x.reshape(B, -1, temporal * merge * merge * E)


def _frames_first(x):
  """v1.1's last axis, in which frames count fastest, with them slowest."""
  return x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)


def _frames_last(x):
  return x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)


def _stage(ours, norm, mlp, scale=(), kernel=()):
  """Rows of a stage; `scale` and `kernel` reorder what is merged."""
  return (
    (f"{norm}.weight", f"connector/{ours}/norm/scale", *scale),
    (f"{mlp}.0.weight", f"connector/{ours}/up/kernel", *kernel),
    (f"{mlp}.0.bias", f"connector/{ours}/up/bias"),
    (f"{mlp}.2.weight", f"connector/{ours}/down/kernel"),
    (f"{mlp}.2.bias", f"connector/{ours}/down/bias"),
  )


_V1_0 = "vggt_embedding_merger."
_SCALE = hf.Custom(_frames_first, _frames_last)
_KERNEL = hf.Custom(  # (out, in) <-> (in, out)
  lambda x: _frames_first(x).T, lambda x: _frames_last(x.T)
)
KEYS = (
  *qwen2_5_vl.KEYS,
  *hf.nest(
    vggt.AGGREGATOR_KEYS,
    ("spatial_encoder.vggt_model.aggregator.", "vggt.aggregator."),
    "vggt/",
  ),
  *_stage("fuse", "connector.ln_q", "connector.mlp", (_SCALE,), (_KERNEL,)),
  *_stage("merge", f"{_V1_0}token_merge_ln_q", f"{_V1_0}token_merge_mlp"),
  *_stage(
    "language", f"{_V1_0}vgg_to_language_ln_q", f"{_V1_0}vgg_to_language_mlp"
  ),
)
# VGGT's heads, which are there but never run; or all of it for `vggt=None`.
IGNORE = ("spatial_encoder.vggt_model.", "vggt.")
# VGGT from a file of its own.
PART_KEYS = {"vggt": hf.nest(vggt.AGGREGATOR_KEYS, "aggregator.", "")}
PART_IGNORE = (*vggt.IGNORE, *(f"{h}_head." for h in (*vggt.HEADS, "point")))


class Model(nn.Module):
  """Both towers, connector and decoder; see the module docstring."""

  vit: Mapping[str, Any]
  llm: Mapping[str, Any]
  vggt: Mapping[str, Any] | None  # None: its tokens come with the batch
  stages: tuple[str, ...] = ("fuse",)  # of the connector
  image_once: bool = False  # VGGT sees images as they are, not doubled
  geometry_layer: int = -1  # of VGGT, whose tokens are read
  image_token: int = 151655
  video_token: int = 151656
  dtype: str = "float32"
  remat: str = "none"
  loss_tokens: int = 0  # whose logits a device holds at once; 0: all

  def setup(self) -> None:
    shared = {"dtype": self.dtype, "remat": self.remat}
    self._vit = qwen_vit.Model(**{**shared, **self.vit}, name="vit")
    self._llm = self._decoder(name="llm")
    self._connector = Connector(
      tuple(self.stages), self.llm["width"], **shared, name="connector"
    )
    if self.vggt is not None:
      depth = self.vggt.get("depth", vggt.Aggregator.depth)
      keep = (self.geometry_layer % depth,)
      self._vggt = vggt.Aggregator(
        **{**shared, **self.vggt, "keep": keep}, name="vggt"
      )

  def _decoder(self, **kwargs) -> llm.Model:
    shared = {"dtype": self.dtype, "remat": self.remat}
    return llm.Model(**{**shared, **self.llm}, **kwargs)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B 3 T"],
    segments: Int[Array, "B T"],
    shared: Bool[Array, "B T"] | None = None,
    frames: Real[Array, "B F height width 3"] | None = None,
    images: Real[Array, "B N height width 3"] | None = None,
    geometry: Float[Array, "B _ P E"] | None = None,
    cache: llm.Cache | None = None,
    *,
    edits: Mapping[str, edit_lib.Edits] | None = None,
    last: Int[Array, " B"] | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "B logits V"], Out]:
    """Logits and named intermediates.

    Args:
      frames: RGB of a video in [0, 1], or uint8; F is a multiple of the vision
        tower's temporal patch, sides are of the patches that are merged.
      images: instead of frames; each becomes as many equal frames as fill a
        temporal patch.
      geometry: VGGT's patch tokens of these frames, instead of running it.
      edits: of the residual streams of "vit" and "llm"; see `nn.edit`.

    `out` holds "vit/tokens" [B Pall Dv], "vit/merged" [B M D],
    "geometry/tokens" [B F 5+P E], "connector/merged" [B M J],
    "connector/tokens" [B M D], "visual/tokens" [B M D], "inputs" [B T D], and
    what `llm.Model` returns.
    """
    del train  # no dropout
    edits = edit_lib.check(edits, ("vit", "llm"))
    embeddings, out = self._llm.embed(tokens), {}
    if frames is not None or images is not None:
      fused, out = self.see(frames, images, geometry, edits.get("vit"))
      is_visual = (tokens == self.image_token) | (tokens == self.video_token)
      embeddings = llm.place(
        embeddings, fused, is_visual, one_hot=self._llm.one_hot
      )
      out["inputs"] = embeddings
    logits, more = self._llm(
      tokens,
      positions,
      segments,
      shared,
      cache,
      embeddings=embeddings,
      edit=edits.get("llm"),
      last=last,
    )
    return logits, {**out, **more}

  def see(
    self,
    frames: Any,
    images: Any = None,
    geometry: Any = None,
    edit: edit_lib.Edits = None,
  ) -> tuple[Float[Array, "B M D"], Out]:
    """Visual tokens of frames or of images, and intermediates."""
    if (frames is None) == (images is None):
      raise ValueError("expected frames of a video or images, one of the two")
    vit, repeats = self._vit, 1
    temporal, merge = vit.temporal_patch, vit.merge
    seen = pixels = unit(frames if images is None else images)
    if images is not None:
      pixels = jnp.repeat(pixels, temporal, axis=1)
      seen, repeats = (seen, temporal) if self.image_once else (pixels, 1)
    B, F, height, width, _ = pixels.shape
    h, w = height // vit.patch, width // vit.patch
    grid = F // temporal, h, w
    merged, out = vit(qwen_vit.normalise(pixels), grid, edit=edit)
    if geometry is None:
      geometry, out["geometry/tokens"] = self.look(seen)
    geometry = jnp.repeat(geometry, repeats, axis=1).astype(self.dtype)
    if geometry.shape[:3] != (B, F, h * w):
      raise ValueError(
        f"VGGT's tokens are {list(geometry.shape)}, but {F} frames of {h} x "
        f"{w} patches need {[B, F, h * w]}: both towers have the same patches"
      )
    geometry = geometry.reshape(B, F, h, w, -1)
    out["connector/merged"] = side_by_side(geometry, temporal, merge)
    out["connector/tokens"] = self._connector(out["connector/merged"])
    out["visual/tokens"] = merged + out["connector/tokens"]
    return out["visual/tokens"], out

  def look(
    self, frames: Real[Array, "B F height width 3"]
  ) -> tuple[Float[Array, "B F P E"], Float[Array, "B F _ E"]]:
    """VGGT's tokens of patches, which a cache may keep, and all of them."""
    if self.vggt is None:
      raise ValueError(
        "config.model.vggt=None, so the batch must hold its tokens: 'geometry'"
      )
    tokens = self._vggt(unit(frames))[0]
    return tokens[:, :, 1 + self._vggt.registers :], tokens

  def init_cache(self, batch: int, length: int) -> llm.Cache:
    """Empty decoder cache; callable without parameters."""
    return self._decoder(parent=None).init_cache(batch, length)


def unit(pixels):
  """RGB in [0, 1]."""
  scale = 255 if pixels.dtype == jnp.uint8 else 1
  return jnp.asarray(pixels, jnp.float32) / scale


def arguments(batch: Mapping[str, Array]) -> dict[str, Any]:
  """What `Model` takes of a batch."""
  names = ("tokens", "positions", "segments", "shared")
  names += ("frames", "images", "geometry", "edits")
  return {name: batch[name] for name in names if name in batch}


loss = llm.answer_loss(arguments)


def INPUTS(config) -> dict[str, jax.ShapeDtypeStruct]:
  """Static batch: `config.batch_size` rows of `config.data.length` tokens.

  `config.data.media` has how many `frames` or `images` a row has, their
  `height` and `width` and, if they come with VGGT's tokens, their `geometry`.
  """
  B, T, media = config.batch_size, config.data.length, config.data.media

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
  kind = "images" if media.get("images") else "frames"
  shape = media[kind], media.height, media.width, 3
  # What is rendered isn't bytes.
  dtype = jnp.float32 if config.data.get("render") else jnp.uint8
  if media.get("geometry"):
    floats = config.model.get("dtype", "float32")
    inputs["geometry"] = array(floats, *media.geometry)
  return {**inputs, kind: array(dtype, *shape)}
