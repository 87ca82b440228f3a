# SPDX-License-Identifier: Apache-2.0
"""Molmo2: frames or crops of images and text in, text out.

Paper: https://arxiv.org/abs/2601.10611. Weights: allenai/Molmo2-4B, -8B.
images -> vision (vit, pooling) -> added to the patch tokens' embeddings -> llm
(Qwen3), where all tokens of images see each other both ways -> logits.

Departures from the paper:
1. The k-th patch token of a row gets the k-th pooled token of the same row, so
   that rows never mix; what pools no patch must stand behind all others.
2. Which tokens see each other comes with the batch (`mutual`): in the published
   models those that stand for patches, columns, and starts and ends of images
   and frames, in all of an example alike.

Letters: B batch, F frames or crops, T length, Q pooled tokens, S patches of a
token, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from spatial_jax import hf
from spatial_jax.models import llm, llm_variants, molmo2_vit
from spatial_jax.nn import edit as edit_lib
from spatial_jax.types import Array, Float, Int

Out = dict[str, Any]

PARTS = {"vision": molmo2_vit.Model, "llm": llm.Model}
VARIANTS = {
  size: {
    "vision": molmo2_vit.VARIANTS[size],
    "llm": llm.VARIANTS[f"molmo2-{size}"],
  }
  for size in ("4b", "8b")
}

_VISION = hf.nest(molmo2_vit.KEYS, "model.", "vision/")
_RELEASED = llm_variants.keys(
  "model.transformer.", table=llm_variants.MOLMO2_RELEASED
)
# Reads both namings, writes that of transformers from 5 on.
KEYS = (
  *_VISION,
  *llm_variants.keys("model.language_model.", table=llm_variants.MOLMO2),
  *_RELEASED[:-1],
)
# With `hf.save(..., release=1)`: the naming of the published files.
RELEASED = (*_VISION, *_RELEASED)
IGNORE = ()


class Model(nn.Module):
  """Vision and decoder; see the module docstring."""

  vision: Mapping[str, Any]
  llm: Mapping[str, Any]
  image_token: int = 151938  # of a patch
  dtype: str = "float32"
  remat: str = "none"
  loss_tokens: int = 0  # whose logits a device holds at once; 0: all

  def setup(self) -> None:
    shared = {"dtype": self.dtype, "remat": self.remat}
    self._vision = molmo2_vit.Model(**{**shared, **self.vision}, name="vision")
    self._llm = self._decoder(name="llm")

  def _decoder(self, **kwargs) -> llm.Model:
    shared = {"dtype": self.dtype, "remat": self.remat}
    return llm.Model(**{**shared, **self.llm}, **kwargs)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    mutual: Int[Array, "B T"] | None = None,
    images: Float[Array, "B F height width 3"] | None = None,
    pooling: Int[Array, "B Q S"] | None = None,
    cache: llm.Cache | None = None,
    *,
    edits: Mapping[str, edit_lib.Edits] | None = None,
    last: Int[Array, " B"] | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "B logits V"], Out]:
    """Logits and named intermediates.

    `out` holds "llm/inputs" [B T D] (embeddings with the images), and what
    `molmo2_vit.Model` and `llm.Model` give.

    Args:
      mutual: tokens of a segment with the same number above 0 see each other
        both ways.
      images: see `data.molmo2.frames`.
      pooling: see `data.molmo2.pooling`.
      edits: of the residual streams of "vit" [B*F P C] and "llm"; see
        `nn.edit`.
    """
    del train  # no dropout
    edits = edit_lib.check(edits, ("vit", "llm"))
    embeddings, out = self._llm.embed(tokens), {}
    if images is not None:
      merged, out = self._vision(images, pooling, edits.get("vit"))
      placed = llm.place(
        jnp.zeros_like(embeddings), merged, tokens == self.image_token
      )
      embeddings = embeddings + placed
    out["llm/inputs"] = embeddings
    logits, more = self._llm(
      tokens,
      positions,
      segments,
      cache=cache,
      mutual=mutual,
      embeddings=embeddings,
      edit=edits.get("llm"),
      last=last,
    )
    return logits, {**out, **more}

  def init_cache(self, batch: int, length: int) -> llm.Cache:
    """Empty decoder cache; callable without parameters."""
    return self._decoder(parent=None).init_cache(batch, length)


def arguments(batch: Mapping[str, Array]) -> dict[str, Any]:
  """What `Model` takes of a batch."""
  names = ("tokens", "positions", "segments", "mutual", "images", "pooling")
  names += ("edits",)
  return {name: batch[name] for name in names if name in batch}


loss = llm.answer_loss(arguments)


def INPUTS(config) -> dict[str, jax.ShapeDtypeStruct]:
  """`config.batch_size` rows of `config.data.length` tokens.

  They have `config.data.frames` frames of the size of the vision tower's table,
  pooled `config.data.pool` x `config.data.pool` patches to a token.
  """
  vit = {**molmo2_vit.VIT, **config.model.get("vision", {}).get("vit", {})}
  B, T = config.batch_size, config.data.length
  F, pool = config.data.frames, config.data.pool
  side = -(-(vit["image"] // vit["patch"]) // pool)
  frame = (vit["image"], vit["image"], 3)
  integers = {
    "tokens": (T,),
    "positions": (T,),
    "segments": (T,),
    "mutual": (T,),
    "pooling": (F * side * side, pool * pool),
    "labels": (T,),
  }
  return {
    **{
      name: jax.ShapeDtypeStruct((B, *shape), jnp.int32)
      for name, shape in integers.items()
    },
    "images": jax.ShapeDtypeStruct((B, F, *frame), jnp.float32),
    "loss_weight": jax.ShapeDtypeStruct((B, T), jnp.float32),
  }
