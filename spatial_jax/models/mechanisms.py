# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL with any of the five spatial mechanisms, each a line of a config.

frames -> vit -> merged tokens -> [+ window attention into vit and vggt] ->
[+ connector of vggt] -> [+ embedding of the tokens' 3D points] -> in place of
the video tokens' embeddings -> [without those that the scorer drops] -> llm ->
logits; [hidden states of image tokens -> loss against a teacher].

  config.model.vggt = {...}            geometric encoder, which these two read:
  config.model.stages = ("fuse",)        connector of a dual encoder (Spatial-
                                         MLLM), the stages of `spatial_mllm`
  config.model.sva = {...}               aggregator (Cambrian-1); `Aggregate`
  config.model.lift = {...}            3D patches (LLaVA-3D); `nn.lift.Lift`
  config.model.vit.prune = {"drop": 0.5}         scorer (STTS)
  config.model.align, .teacher = {...}, {...}    Spatial Forcing; `forcing`

Any of them go together. Without any this is Qwen2.5-VL on a static grid. The
parameters have the names that they have in the systems that they are from.

Departures from those systems:
1. All add to the merged tokens, so that a trained decoder reads what it knows.
   The queries of Cambrian-1's aggregator are the merged tokens, not learned
   ones, and there are no newlines and no layers inside the decoder.
2. 3D patches are the merged tokens, of which none are pooled.
3. Where two frames make one token, the first is what all but the connector see.

Letters: B batch, T length, F frames, P patches of a frame, M merged tokens,
V temporal patches, h w merge grid, E width of VGGT's tokens, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Real

from spatial_jax import hf, losses
from spatial_jax.models import (
  forcing,
  llm,
  qwen2_5_vl,
  qwen_vit,
  spatial_mllm,
  sva,
  vggt,
)
from spatial_jax.models.llava_3d import EMBED_KEYS
from spatial_jax.nn import edit as edit_lib
from spatial_jax.nn.lift import Lift
from spatial_jax.nn.slots import take
from spatial_jax.types import Array, Bool, Float, Int

Out = dict[str, Any]


class Aggregate(nn.Module):
  """Merged tokens look into the windows of several encoders above them."""

  width: int = 1024  # C
  depth: int = 3
  heads: int = 16
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self,
    tokens: Float[Array, "I M D"],
    features: Sequence[Float[Array, "I _ _"]],
  ) -> Float[Array, "I M D"]:
    """Tokens of images on a square grid; so are the features."""
    projected = [
      sva.Project(
        self.width, self.width, True, True, self.dtype, name=f"project_{i}"
      )(x.astype(self.dtype))
      for i, x in enumerate(features)
    ]
    context = jnp.mean(projected[0], axis=1)
    side = round(tokens.shape[1] ** 0.5)
    seen = sva.look(context, projected, None, side)
    sampler = sva.Sampler(
      self.width, self.depth, self.heads, dtype=self.dtype, name="sampler"
    )
    return sampler(tokens, seen)[0]


PARTS = {
  "vit": qwen_vit.Model,
  "llm": llm.Model,
  "vggt": vggt.Aggregator,
  "sva": Aggregate,
  "lift": Lift,
  "align": forcing.Align,
  "teacher": vggt.Aggregator,
}
VARIANTS = {
  size: {**dict.fromkeys(PARTS), **kwargs}
  for size, kwargs in qwen2_5_vl.VARIANTS.items()
}
KEYS = (
  *spatial_mllm.KEYS,
  *hf.nest(EMBED_KEYS, "position_embedding_head.", "lift/embed/"),
  *hf.nest(forcing.KEYS, "align_projector.", "align/"),
)
IGNORE = spatial_mllm.IGNORE
# From files of their own: VGGT-1B, twice.
PART_KEYS = dict.fromkeys(("vggt", "teacher"), forcing.TEACHER_KEYS)
PART_IGNORE = spatial_mllm.PART_IGNORE


class Model(nn.Module):
  """Qwen2.5-VL and what the config adds; see the module docstring."""

  vit: Mapping[str, Any]
  llm: Mapping[str, Any]
  grid: tuple[int, int, int]  # temporal patches, h, w in patches, per row
  vggt: Mapping[str, Any] | None = None
  stages: tuple[str, ...] = ()  # of the connector; see `spatial_mllm`
  sva: Mapping[str, Any] | None = None
  lift: Mapping[str, Any] | None = None
  align: Mapping[str, Any] | None = None
  teacher: Mapping[str, Any] | None = None
  image_token: int = 151655
  video_token: int = 151656
  dtype: str = "float32"
  remat: str = "none"
  loss_tokens: int = 0
  vision_gradient: float = 1.0  # see `qwen2_5_vl.Model`
  temporal_weight: float = 0.5

  def setup(self) -> None:
    self._check()
    names = ("vit", "llm", "grid", "image_token", "video_token", "dtype")
    names += ("remat", "loss_tokens", "vision_gradient", "temporal_weight")
    self._base = qwen2_5_vl.Model(**{n: getattr(self, n) for n in names})
    # Its parameters keep the names that they have without mechanisms.
    nn.share_scope(self, self._base)
    shared = {"dtype": self.dtype, "remat": self.remat}
    if self.vggt is not None:
      depth = self.vggt.get("depth", vggt.Aggregator.depth)
      last = {"keep": (depth - 1,)}
      options = {**shared, **last, **self.vggt}
      self._vggt = vggt.Aggregator(**options, name="vggt")
    if self.stages:
      self._connector = spatial_mllm.Connector(
        tuple(self.stages), self.llm["width"], self.dtype, name="connector"
      )
    if self.sva is not None:
      self._sva = Aggregate(**{"dtype": self.dtype, **self.sva}, name="sva")
    if self.lift is not None:
      self._lift = Lift(**{"pool": "none", **self.lift}, name="lift")
    self._align, self._teacher = forcing.parts(self.align, self.teacher)

  def _check(self):
    reads = bool(self.stages) or self.sva is not None
    if reads != (self.vggt is not None):
      raise ValueError(
        "config.model.vggt is what stages and sva read: set it exactly if one "
        f"of them is set (stages={tuple(self.stages)}, sva={self.sva})"
      )
    if self.lift is not None and self.lift.get("pool", "none") != "none":
      raise ValueError(
        f"config.model.lift.pool={self.lift['pool']!r}: tokens are not pooled "
        "here, take config.model.vit.prune; expected none"
      )
    if self.align is None and self.teacher is not None:
      raise ValueError("config.model.teacher needs config.model.align")

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B 3 T"],
    segments: Int[Array, "B T"],
    shared: Bool[Array, "B T"] | None = None,
    frames: Real[Array, "B F height width 3"] | None = None,
    depth: Float[Array, "B F height width"] | None = None,
    intrinsics: Float[Array, "B F 3 3"] | None = None,
    world_from_camera: Float[Array, "B F 4 4"] | None = None,
    geometry: Float[Array, "B F P E"] | None = None,
    cache: llm.Cache | None = None,
    *,
    edits: Mapping[str, edit_lib.Edits] | None = None,
    last: Int[Array, " B"] | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "B logits V"], Out]:
    """Logits and named intermediates.

    Args:
      frames: RGB in [0, 1], or uint8.
      depth, intrinsics, world_from_camera: for `lift` alone; see `Lift`.
      geometry: VGGT's patch tokens of these frames, instead of running it.
      edits: of the residual streams of "vit" and "llm"; see `nn.edit`.

    `out` holds what `qwen2_5_vl.Model` returns, "visual/tokens" [B M D] which
    the decoder reads, "geometry/tokens" [B F P E], "connector/tokens",
    "sva/tokens" [B M D] and what `Lift` returns.
    """
    patches, see = None, None
    if frames is not None:
      pixels = spatial_mllm.unit(frames)
      patches = qwen_vit.normalise(pixels)  # whole frames
      cameras = depth, intrinsics, world_from_camera
      see = functools.partial(self.see, pixels, cameras, geometry)
    if self.is_initializing():
      forcing.initialize(self._align, self._teacher, self.llm["width"])
    row = tokens, positions, segments, shared, patches
    options = {"cache": cache, "edits": edits, "last": last, "train": train}
    return self._base(*row, see=see, **options)

  @property
  def _vit(self) -> qwen_vit.Model:
    return qwen_vit.Model(**self.vit, parent=None)

  @property
  def merged_grid(self) -> tuple[int, int, int]:
    """Temporal patches, h and w of the merged tokens."""
    count, rows, columns = self.grid
    merge = self._vit.merge
    return count, rows // merge, columns // merge

  def see(
    self,
    frames: Float[Array, "B F height width 3"],
    cameras: tuple[Array | None, ...],
    geometry: Float[Array, "B F P E"] | None,
    merged: Float[Array, "B M D"],
    out: Out,
  ) -> tuple[Float[Array, "B M D"], Out]:
    """What the decoder reads of frames, and intermediates."""
    B, M, D = merged.shape
    V, h, w = self.merged_grid
    rows, columns, every = *self.grid[1:], self._vit.temporal_patch
    more, total = {}, merged
    if self.vggt is not None:
      if geometry is None:
        geometry = self._vggt(frames)[0][:, :, 1 + self._vggt.registers :]
      more["geometry/tokens"] = geometry = geometry.astype(self.dtype)
      geometry = geometry.reshape(B, -1, rows, columns, geometry.shape[-1])
    if self.sva is not None:
      merge = self._vit.merge
      own = out["vit/tokens"].reshape(B * V, h, w, merge, merge, -1)
      own = own.swapaxes(2, 3).reshape(B * V, rows * columns, -1)
      other = geometry[:, ::every].reshape(*own.shape[:2], -1)
      x = self._sva(merged.reshape(B * V, h * w, D), (own, other))
      more["sva/tokens"] = x.reshape(B, M, D)
      total = more["sva/tokens"]
    if self.stages:
      x = spatial_mllm.side_by_side(geometry, every, self._vit.merge)
      more["connector/tokens"] = self._connector(x)
      total = total + more["connector/tokens"]
    if self.lift is not None:
      if any(x is None for x in cameras):
        raise ValueError(
          "config.model.lift needs depth, intrinsics and world_from_camera in "
          "the batch; set config.data.render.depth"
        )
      cameras = (x[:, ::every] for x in cameras)
      total, _, lifted = self._lift(total.reshape(B, V, h, w, D), *cameras)
      total, more = total.astype(self.dtype), {**more, **lifted}
    return total, more

  def force(
    self,
    tokens: Int[Array, "B T"],
    frames: Real[Array, "B F height width 3"],
    out: Out,
    features: Float[Array, "B V y x E"] | None = None,
  ) -> tuple[Float[Array, ""], Out]:
    """Loss of the image tokens' hidden states against the teacher.

    Args:
      features: the teacher's, computed before.
    """
    shape = len(tokens), *self.merged_grid
    frames = spatial_mllm.unit(frames)[:, :: self._vit.temporal_patch]
    features = forcing.teach(self._teacher, frames, features)
    x = forcing.select(out, self._align.layer, self.llm["layers"])
    is_image = (tokens == self.image_token) | (tokens == self.video_token)
    order = jnp.argsort(~is_image, axis=1, stable=True)
    x = take(x, order[:, : out["vit/merged"].shape[1]])
    mask = out.get("prune/stays")
    mask = None if mask is None else mask.reshape(shape)
    return self._align(x.reshape(*shape, -1), features, mask)

  def init_cache(self, batch: int, length: int) -> llm.Cache:
    """Empty decoder cache; callable without parameters."""
    decoder = {"dtype": self.dtype, **self.llm}
    return llm.Model(**decoder, parent=None).init_cache(batch, length)


def arguments(batch: Mapping[str, Array]) -> dict[str, Any]:
  """What `Model` takes of a batch."""
  names = ("tokens", "positions", "segments", "shared", "frames", "depth")
  names += ("intrinsics", "world_from_camera", "geometry", "edits")
  kwargs = {name: batch[name] for name in names if name in batch}
  if "depth" not in kwargs:  # cameras alone say nothing here
    kwargs.pop("intrinsics", None)
    kwargs.pop("world_from_camera", None)
  return kwargs


def loss(
  model: Model,
  params: Any,
  batch: Mapping[str, Array],
  *,
  rngs: Any = None,
  train: bool = True,
) -> tuple[Float[Array, ""], tuple[losses.Metrics, Out]]:
  """Loss of Qwen2.5-VL, in training plus `align.weight` times `Model.force`."""
  value, (metrics, out) = qwen2_5_vl.loss(
    model, params, batch, rngs=rngs, train=train, arguments=arguments
  )
  if train and model.align is not None:
    features = batch.get("teacher_features")
    seen = batch["tokens"], batch["frames"], out, features
    align, more = model.apply({"params": params}, *seen, method=model.force)
    value += model.align.get("weight", forcing.Align.weight) * align
    metrics, out = {**metrics, "align": align}, {**out, **more}
  return value, (metrics, out)


def INPUTS(config) -> dict[str, jax.ShapeDtypeStruct]:
  """Qwen2.5-VL's with frames, not patches; for `lift` depth and cameras."""
  from spatial_jax import models

  model, _ = models.build(config)
  inputs = qwen2_5_vl.INPUTS(config)
  del inputs["patches"]
  vit, (count, *sides) = qwen_vit.Model(**model.vit), model.grid
  shape = config.batch_size, count * vit.temporal_patch
  shape += tuple(vit.patch * side for side in sides)

  def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

  # What is rendered isn't bytes.
  dtype = jnp.float32 if config.data.get("render") else jnp.uint8
  inputs["frames"] = array(*shape, 3, dtype=dtype)
  if model.lift is not None:
    inputs["depth"] = array(*shape)
    inputs["intrinsics"] = array(*shape[:2], 3, 3)
    inputs["world_from_camera"] = array(*shape[:2], 4, 4)
  return inputs
