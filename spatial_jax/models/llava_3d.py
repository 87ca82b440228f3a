# SPDX-License-Identifier: Apache-2.0
"""LLaVA-3D: image patches with a place in the room, pooled by voxel, for a LLM.

Paper: https://arxiv.org/abs/2409.18125. Weights: ChaimZhu/LLaVA-3D-7B.
images -> CLIP -> patches + embedding of (depth, intrinsics, pose -> world
point) -> mean in voxels, or farthest points -> projector -> in place of the
image tokens; clicked points -> their embedding -> in place of the point tokens;
-> Vicuna -> text, in which boxes are numbers. 2D images: as in LLaVA-1.5.

Departures from the released code (first version of the paper):
1. Rows have a fixed number of image tokens. Slots without a voxel are padding,
   and what comes after moves up, so that the sequence is the reference's.
2. More voxels than slots: evenly spaced ones stay. The reference keeps random
   ones in random order, at inference too (`lift.overflow="random"`).
3. Patches without depth, or a finite pose, are dropped. "7b" has the former at
   the camera's centre, as it was trained (`lift.keep_invalid`).
4. Geometry is float32; the released scripts round it to bfloat16, which moves
   points by centimetres (`lift.bfloat16`).
5. Intrinsics have pixel centres at +0.5; see `data.llava_3d.to_centres`.

Of the ICCV version (third of the paper; no code, no weights) variant "iccv-7b"
has the embedding behind the projector, no pooling, and boxes from a `<LOC>`
token's state (see `grounding`). How its base pools within a frame is left out.

Letters: B batch, T length, F frames, h w patch grid, P = F*h*w patches, M image
tokens, C clicked points, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import FrozenConfigDict

from spatial_jax import hf, losses
from spatial_jax.models import grounding, llm, vit, vit_keys
from spatial_jax.models.llm import place
from spatial_jax.nn import edit as edit_lib
from spatial_jax.nn.layers import Mlp
from spatial_jax.nn.lift import Lift, PointEmbed
from spatial_jax.nn.slots import close_gaps
from spatial_jax.types import Array, Bool, Float, Int

Out = dict[str, Any]

PARTS = {"vit": vit.Model, "llm": llm.Model, "lift": Lift}
VARIANTS = {
  "7b": {
    "vit": vit.VARIANTS["clip-l-14-336"],
    "llm": llm.VARIANTS["vicuna-7b"],
    "lift": {"keep_invalid": True},
  },
  "iccv-7b": {
    "vit": {**vit.VARIANTS["siglip-so400m-14-384"], "output_layer": -2},
    "llm": llm.VARIANTS["qwen2-7b"],
    "lift": {"pool": "none"},
    "lift_after_projector": True,
    "grounding": {},
  },
  # Rooms of 4 frames of 64 x 64 pixels on a CPU.
  "tiny": {
    "vit": {
      **vit.VARIANTS["clip-l-14-336"],
      "width": 32,
      "layers": 3,
      "heads": 2,
      "mlp": 64,
      "patch": 8,
      "image": 64,
    },
    "llm": {
      **llm.VARIANTS["vicuna-7b"],
      "vocab": 128,
      "width": 48,
      "layers": 3,
      "heads": 4,
      "kv_heads": 4,
      "mlp": 96,
    },
    "lift": {"capacity": 128},
  },
}


def _linear(theirs, ours):
  return (
    (f"{theirs}.weight", f"{ours}/kernel"),
    (f"{theirs}.bias", f"{ours}/bias"),
  )


EMBED_KEYS = (
  *_linear("0", "up"),
  ("1.weight", "norm/scale"),
  ("1.bias", "norm/bias"),
  *_linear("3", "down"),
)
_VIDEO, _HEAD = "model.video_tower.", ".position_embedding_head."
# LLaVA-1.5 leaves CLIP out. With openai/clip-vit-large-patch14-336, which has
# the second prefix, in the same folder it loads, but for the two embeddings.
_CLIP = ("model.vision_tower.vision_tower.vision_model.", "vision_model.")
KEYS = (
  *hf.nest(vit_keys.CLIP, _CLIP, "vit/"),
  *hf.nest(llm.KEYS, "model.", "llm/"),
  ("lm_head.weight", "llm/head/kernel"),
  *_linear("model.mm_projector.0", "projector/up"),
  *_linear("model.mm_projector.2", "projector/down"),
  *hf.nest(
    EMBED_KEYS,
    f"{_VIDEO}video_tower.positional_embedding{_HEAD}",
    "lift/embed/",
  ),
  *hf.nest(
    EMBED_KEYS, f"{_VIDEO}prompt_encoder.pos_emb3d{_HEAD}", "click_embed/"
  ),
)
IGNORE = (
  *(prefix + name for prefix in _CLIP for name in vit_keys.IGNORE),
  "text_model.",
  "text_projection.",
  "visual_projection.",
  "logit_scale",
)


class Model(nn.Module):
  """Vision tower, lifting to 3D, decoder; see the module docstring."""

  vit: Mapping[str, Any]
  llm: Mapping[str, Any]
  lift: Mapping[str, Any] = FrozenConfigDict()
  lift_after_projector: bool = False
  grounding: Mapping[str, Any] | None = None  # `grounding.Decoder`, if any
  image_token: int = -200  # outside of the vocabulary, as published
  point_token: int = -300
  loc_token: int = -400
  dtype: str = "float32"
  remat: str = "none"
  loss_tokens: int = 0  # whose logits a device holds at once; 0: all

  def setup(self) -> None:
    shared = {"dtype": self.dtype, "remat": self.remat}
    self._vit = vit.Model(**{**shared, **self.vit}, name="vit")
    self._llm = self._decoder(name="llm")
    self._lift = Lift(**self.lift, name="lift")
    width = self.llm["width"]
    self.projector = Mlp(width, dtype=self.dtype, out_width=width)
    self.click_embed = PointEmbed(width, self.dtype)
    if self.grounding is not None:
      self._grounding = grounding.Decoder(
        **{"dtype": self.dtype, **self.grounding}, name="grounding"
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
    images: Float[Array, "B F height width 3"] | None = None,
    depth: Float[Array, "B F height width"] | None = None,
    intrinsics: Float[Array, "B F 3 3"] | None = None,
    world_from_camera: Float[Array, "B F 4 4"] | None = None,
    is_scene: Bool[Array, " B"] | None = None,
    clicks: Float[Array, "B C 3"] | None = None,
    cache: llm.Cache | None = None,
    *,
    edits: Mapping[str, edit_lib.Edits] | None = None,
    last: Int[Array, " B"] | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "B logits V"], Out]:
    """Logits and named intermediates.

    Args:
      tokens: `image_token` for every slot that a voxel or patch may take,
        `point_token` for every clicked point.
      positions: as if every slot were taken; three equal rows.
      images: normalised as `data.images.clip` does.
      depth: see `Lift`. Without it all patches of all frames are tokens.
      clicks: metres, world; the k-th for the k-th point token of a row.
      edits: of the residual streams of "vit" [B*F h*w+1 Dv] and "llm"; see
        `nn.edit`.

    `out` holds "vit/tokens" [B P Dv], what `Lift` returns, "visual/tokens"
    [B M D], "visual/mask" [B M], "clicks" [B C D], "inputs" [B T D],
    "segments" [B T], what `llm.Model` returns, and boxes and scores as
    "ground/boxes" [L B Q 6] and "ground/scores" [L B Q] if there are any.
    """
    del train  # no dropout
    edits = edit_lib.check(edits, ("vit", "llm"))
    out, shift = {}, None
    embeddings = self._llm.embed(jnp.maximum(tokens, 0))
    if clicks is None and self.is_initializing():
      self.click_embed(jnp.zeros((1, 1, 3)))
    if clicks is not None:
      out["clicks"] = self.click_embed(clicks)
      embeddings = place(embeddings, out["clicks"], tokens == self.point_token)
    if cache is not None:
      cache = dict(cache)
      shift = cache.pop("shift")
    if images is not None:
      visual, mask, out_visual = self.see(
        images,
        depth,
        intrinsics,
        world_from_camera,
        is_scene,
        edits.get("vit"),
      )
      out |= out_visual
      is_image = tokens == self.image_token
      embeddings = place(embeddings, visual, is_image)
      positions, segments, shift = close_gaps(
        positions, segments, is_image, mask
      )
    elif shift is not None:
      positions = positions - shift[:, None, None]
    out["inputs"], out["segments"] = embeddings, segments
    logits, more = self._llm(
      jnp.maximum(tokens, 0),
      positions,
      segments,
      shared,
      cache,
      embeddings=embeddings,
      edit=edits.get("llm"),
      last=last,
    )
    if cache is not None:
      more["cache"]["shift"] = shift
    if self.grounding is not None and "lift/points" in out:
      more |= self._ground(tokens, out, more["llm/hidden"])
    return logits, {**out, **more}

  def see(
    self,
    images,
    depth,
    intrinsics,
    world_from_camera,
    is_scene=None,
    edit=None,
  ):
    """Image tokens [B M D], which there are [B M], and intermediates."""
    B, F = images.shape[:2]
    features, out = self._vit(images.reshape(B * F, *images.shape[2:]), edit)
    h, w = (side // self._vit.patch for side in images.shape[2:4])
    out["vit/tokens"] = features.reshape(B, F * h * w, -1)
    if self.lift_after_projector:
      features = self.projector(features)
    features = features.reshape(B, F, h, w, -1)
    if depth is None:
      visual = features.reshape(B, F * h * w, -1)
      mask = jnp.ones(visual.shape[:2], bool)
      if self.is_initializing():  # all parameters, whatever the batch holds
        eyes = (jnp.eye(n)[None, None] for n in (3, 4))
        self._lift(features[:1, :1], jnp.zeros((1, 1, h, w)), *eyes)
    else:
      visual, mask, more = self._lift(
        features, depth, intrinsics, world_from_camera, is_scene
      )
      out |= more
    visual = visual.astype(self.dtype)
    if not self.lift_after_projector:
      visual = self.projector(visual)
    return visual, mask, {**out, "visual/tokens": visual, "visual/mask": mask}

  def _ground(self, tokens, out, hidden):
    """Boxes for the first `<LOC>` of each row; without one they say nothing."""
    at = jnp.argmax(tokens == self.loc_token, axis=1)
    token = jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
    points = out["lift/points"].reshape(len(tokens), -1, 3)
    valid = out["lift/valid"].reshape(len(tokens), -1)
    boxes, scores, more = self._grounding(
      points, valid, out["lift/patches"], token
    )
    return {"ground/boxes": boxes, "ground/scores": scores, **more}

  def init_cache(self, batch: int, length: int) -> llm.Cache:
    """Empty decoder cache; callable without parameters."""
    cache = self._decoder(parent=None).init_cache(batch, length)
    return {**cache, "shift": jnp.zeros(batch, jnp.int32)}


def arguments(batch: Mapping[str, Array]) -> dict[str, Any]:
  """What `Model` takes of a batch; one camera for all frames is repeated."""
  names = ("tokens", "positions", "segments", "shared", "images", "depth")
  names += ("intrinsics", "world_from_camera", "is_scene", "clicks", "edits")
  kwargs = {name: batch[name] for name in names if name in batch}
  camera = kwargs.get("intrinsics")
  if camera is not None and camera.ndim == 3:
    shape = (*kwargs["images"].shape[:2], 3, 3)
    kwargs["intrinsics"] = jnp.broadcast_to(camera[:, None], shape)
  return kwargs


def loss(
  model: Model,
  params: Any,
  batch: Mapping[str, Array],
  *,
  rngs: Any = None,
  train: bool = True,
) -> tuple[Float[Array, ""], tuple[losses.Metrics, Out]]:
  """Weighted next-token loss and that of boxes, (metrics, intermediates)."""
  answer = llm.answer_loss(arguments)
  value, (metrics, out) = answer(model, params, batch, rngs=rngs, train=train)
  if "ground/boxes" in out and "boxes" in batch:
    found = out["ground/boxes"], out["ground/scores"]
    more, parts = grounding.loss(*found, batch["boxes"], batch["boxes_mask"])
    value, metrics = value + more, metrics | parts
  if "lift/count" in out:
    metrics["voxels"] = jnp.mean(out["lift/count"].astype(jnp.float32))
  return value, (metrics, out)


def INPUTS(config) -> dict[str, jax.ShapeDtypeStruct]:
  """Static batch: `config.batch_size` rows of `config.data.length` tokens.

  `config.data.scene` has the number of `frames`, their `side` in pixels and,
  if rows have clicked points, how many `clicks`.
  """
  B, T, scene = config.batch_size, config.data.length, config.data.scene
  F, side = scene.frames, scene.side

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct((B, *shape), dtype)

  inputs = {
    "tokens": array(jnp.int32, T),
    "positions": array(jnp.int32, 3, T),
    "segments": array(jnp.int32, T),
    "labels": array(jnp.int32, T),
    "loss_weight": array(jnp.float32, T),
    "images": array(jnp.float32, F, side, side, 3),
    "depth": array(jnp.float32, F, side, side),
    "intrinsics": array(jnp.float32, F, 3, 3),
    "world_from_camera": array(jnp.float32, F, 4, 4),
  }
  if scene.get("clicks"):
    inputs["clicks"] = array(jnp.float32, scene.clicks, 3)
  return inputs
