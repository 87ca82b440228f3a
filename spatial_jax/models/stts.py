# SPDX-License-Identifier: Apache-2.0
"""STTS on Molmo2: tokens of videos are scored inside the ViT, most are dropped.

Paper: https://arxiv.org/abs/2603.18004. Weights: Molmo2-4B-Lite-30% and -50%,
or allenai/Molmo2-4B and -8B with a fresh scorer (config.init_new).
frames -> blocks 0..3 -> scorer: a score for each group of 3 x 3 patches ->
block 4, in which log(score) is added to the attention to each patch -> the
lowest groups of each video go -> frames packed into fewer rows -> other blocks
-> pooling of the groups left -> added to their tokens' embeddings -> decoder
without the tokens of the others -> logits.

Only the bias in block 4 and the auxiliary loss, which wants the score to be
the change since the frame before, train the scorer: the choice itself has no
gradient. Images are never pruned.

Departures from the paper, which its code has as well:
1. Scores are stretched in each row of patches, not in each frame.
2. The scorer and the auxiliary loss compare a video's first frame with the
   frame before it in the row, if there is one.

Departures from the code:
3. Frames of different rows are never packed together. Bins are as many as
   `bins` says; a batch that needs more gets one for each frame.
4. Equal scores go in order, so that a choice is never undefined.
5. Survivors get consecutive positions (the released preprocessing isn't
   known); `keep_positions` leaves those that they had.

Letters: B batch, T length, K length after pruning, F frames, P patches of a
frame, h w their grid, G groups of a frame, Q groups of a row, M of these that
stay, S patches of a group, C channels, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from spatial_jax import hf, losses
from spatial_jax.data.stts import budget
from spatial_jax.models import llm, molmo2, molmo2_vit, stts_vit
from spatial_jax.nn import scorer
from spatial_jax.nn.slots import drop_slots, earlier, restore, take
from spatial_jax.types import Array, Bool, Float, Int

Out = dict[str, Any]

PARTS = {"vision": stts_vit.Model, "llm": llm.Model}
VARIANTS = {
  **molmo2.VARIANTS,
  # Rooms of 4 frames of 64 x 64 pixels on a CPU.
  "tiny": {
    "vision": {
      "vit": {
        **molmo2_vit.VIT,
        "width": 32,
        "layers": 4,
        "heads": 2,
        "mlp": 64,
        "patch": 8,
        "image": 64,
      },
      "read": (3, 2),
      "width": 32,
      "heads": 2,
      "mlp": 96,
      "out_width": 48,
      "after": 1,
      "pool": 2,
    },
    "llm": {
      **molmo2.VARIANTS["4b"]["llm"],
      "vocab": 128,
      "new_vocab": 8,
      "width": 48,
      "layers": 3,
      "heads": 4,
      "kv_heads": 2,
      "head_dim": 12,
      "mlp": 96,
    },
  },
}


SCORER_KEYS = scorer.KEYS
_SCORER = hf.nest(
  SCORER_KEYS,
  "model.vision_backbone.image_vit.transformer.temporal_token_scorer.",
  "vision/scorer/",
)
KEYS = (*molmo2.KEYS, *_SCORER)
RELEASED = (*molmo2.RELEASED, *_SCORER)  # see `molmo2`
IGNORE = molmo2.IGNORE


class Model(nn.Module):
  """Vision and decoder; see the module docstring."""

  vision: Mapping[str, Any]
  llm: Mapping[str, Any]
  image_token: int = 151938  # of a patch
  keep_positions: bool = False
  temporal_weight: float = 0.5  # of the auxiliary loss
  dtype: str = "float32"
  remat: str = "none"
  loss_tokens: int = 0  # whose logits a device holds at once; 0: all

  def setup(self) -> None:
    shared = {"dtype": self.dtype, "remat": self.remat}
    self._vision = stts_vit.Model(**{**shared, **self.vision}, name="vision")
    self._llm = self._decoder(name="llm")

  def _decoder(self, **kwargs) -> llm.Model:
    shared = {"dtype": self.dtype, "remat": self.remat}
    return llm.Model(**{**shared, **self.llm}, **kwargs)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | Int[Array, "B 3 T"],
    segments: Int[Array, "B T"],
    mutual: Int[Array, "B T"] | None = None,
    images: Float[Array, "B F height width 3"] | None = None,
    pooling: Int[Array, "B Q S"] | None = None,
    videos: Int[Array, "B F"] | None = None,
    kept_mask: Bool[Array, "B K"] | None = None,
    shared: Bool[Array, "B T"] | None = None,
    cache: llm.Cache | None = None,
    *,
    last: Int[Array, " B"] | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "B logits V"], Out]:
    """Logits, zeros at dropped tokens, and named intermediates.

    `out` holds what `stts_vit.Model` and `llm.Model` give, of K tokens,
    "llm/inputs" [B K D], "llm/logits" [B K V], and "llm/order" [B K], their
    places in the row.

    Args:
      mutual: see `molmo2.Model`; by default the patch tokens of a segment.
      images: see `data.molmo2.frames`.
      pooling: see `data.molmo2.pooling`, which is the default.
      videos: number of each frame's video, see `nn.pruning`. By default all
        frames of each row are one video.
      kept_mask: see `data.stts.kept_mask`; its length is K. By default K is
        what one video of all frames leaves, or with `videos` T, with padding
        at the end.
    """
    del train  # no dropout
    if mutual is None:
      mutual = (tokens == self.image_token).astype(jnp.int32)
    row = {"positions": positions, "segments": segments, "mutual": mutual}
    row["embeddings"] = self._llm.embed(tokens)
    if shared is not None:
      row["shared"] = shared
    out, dropped, shift = {}, None, None
    if cache is not None:
      cache = dict(cache)
      shift = cache.pop("shift")
      row["positions"] = earlier(positions, shift[:, None])
    if images is not None:
      row, dropped, out = self._prune(
        tokens, row, images, pooling, videos, kept_mask
      )
      before = jnp.cumsum(dropped, axis=1)
      if last is not None:
        last = last - jnp.take_along_axis(before, last[:, None], axis=1)[:, 0]
      shift = 0 * before[:, -1] if self.keep_positions else before[:, -1]
    out["llm/inputs"] = row["embeddings"]
    logits, more = self._llm(None, **row, cache=cache, last=last)
    if cache is not None:
      more["cache"]["shift"] = shift
    out |= {**more, "llm/logits": logits}
    if dropped is not None and last is None:
      logits = restore(logits, dropped)
    return logits, out

  def _prune(self, tokens, row, images, pooling, videos, kept_mask):
    """Arrays of the tokens left, which are dropped [B T], intermediates."""
    (B, T), F = tokens.shape, images.shape[1]
    grid = self._vision.groups(images.shape[2])
    lost = 0 if videos is not None else budget(F, len(grid), self._vision.drop)
    K = T - lost if kept_mask is None else kept_mask.shape[1]
    Q = F * len(grid) if pooling is None else pooling.shape[1]
    if videos is None:
      videos = jnp.ones((B, F), jnp.int32)
    visual, stays, out = self._vision(images, pooling, videos, min(Q - lost, K))
    is_image = tokens == self.image_token
    row, dropped, order = drop_slots(
      row, is_image, stays, K, compact=not self.keep_positions
    )
    if kept_mask is not None:
      row["segments"] = jnp.where(kept_mask, row["segments"], 0)
    here = jnp.take_along_axis(is_image & ~dropped, order, axis=1)
    zeros = jnp.zeros_like(row["embeddings"])
    row["embeddings"] += llm.place(zeros, visual, here)
    return row, dropped, {**out, "llm/order": order, "prune/dropped": dropped}

  def init_cache(self, batch: int, length: int) -> llm.Cache:
    """Empty decoder cache; callable without parameters."""
    cache = self._decoder(parent=None).init_cache(batch, length)
    return {**cache, "shift": jnp.zeros(batch, jnp.int32)}


def arguments(batch: Mapping[str, Array]) -> dict[str, Any]:
  """What `Model` takes of a batch."""
  names = ("tokens", "positions", "segments", "mutual", "images", "pooling")
  names += ("videos", "kept_mask", "shared")
  found = {name: batch[name] for name in names if name in batch}
  if "images" in found and found["images"].dtype == jnp.uint8:
    # As bytes they take a quarter of the way to the device.
    scaled = found["images"].astype(jnp.float32) * np.float32(1 / 255)
    found["images"] = (scaled - 0.5) / 0.5
  return found


def loss(
  model: Model,
  params: Any,
  batch: Mapping[str, Array],
  *,
  rngs: Any = None,
  train: bool = True,
) -> tuple[Float[Array, ""], tuple[losses.Metrics, Out]]:
  """Weighted next-token loss and, in training, that of the scores.

  The metric "labels_cut" must stay 0: it is the weight of labels of rows that
  kept more tokens than the decoder reads.
  """
  _, out = model.apply(
    {"params": params}, **arguments(batch), train=train, rngs=rngs
  )
  left = {name: batch[name] for name in ("labels", "loss_weight")}
  if "llm/order" in out:
    left = {name: take(x, out["llm/order"]) for name, x in left.items()}
  tokens = model.loss_tokens
  value, metrics = llm.next_token(params["llm"], out, left, tokens)
  if "prune/temporal" in out:
    metrics["temporal"] = out["prune/temporal"]
    weight = batch["loss_weight"], left["loss_weight"]
    metrics["labels_cut"] = jnp.sum(weight[0]) - jnp.sum(weight[1])
    if train:
      value = value + model.temporal_weight * metrics["temporal"]
  return value, (metrics, out)


def INPUTS(config) -> dict[str, jax.ShapeDtypeStruct]:
  """`config.batch_size` rows of `config.data.length` tokens.

  They have `config.data.frames` frames of the size of the vision tower's table,
  which are one video; or, with `config.data.kept` tokens left of each row,
  bytes of videos and images as `videos` says.
  """
  from spatial_jax import models

  model, _ = models.build(config)
  B, T, F = config.batch_size, config.data.length, config.data.frames
  side = model.vision["vit"]["image"]

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct((B, *shape), dtype)

  inputs = {
    "tokens": array(jnp.int32, T),
    "positions": array(jnp.int32, 3, T),
    "segments": array(jnp.int32, T),
    "images": array(jnp.float32, F, side, side, 3),
    "labels": array(jnp.int32, T),
    "loss_weight": array(jnp.float32, T),
  }
  if kept := config.data.get("kept"):
    inputs["videos"] = array(jnp.int32, F)
    inputs["kept_mask"] = array(jnp.bool_, kept)
    inputs["mutual"] = array(jnp.int32, T)
    inputs["images"] = array(jnp.uint8, F, side, side, 3)
  return inputs
