# SPDX-License-Identifier: Apache-2.0
"""Janus-Pro as a reader of images: images and text in, text out.

Paper: https://arxiv.org/abs/2501.17811. Weights: deepseek-ai/Janus-Pro-{1B,7B}
and deepseek-community/Janus-Pro-{1B,7B} (names of transformers).
images -> vit (SigLIP) -> connector -> in place of the image tokens' embeddings
-> llm (causal) -> logits.

Departures from the paper:
1. Only the path that understands images is here; the tensors of the one that
   generates them (the VQ tokenizer with its embeddings and head) are in
   `IGNORE`. What it needs of the decoder is `embeddings` and "llm/hidden".
2. A row may have several images: its tokens have as many image tokens as all
   of them together.

Letters: B batch, F images, T length, P patches of all images, D width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from spatial_jax import hf
from spatial_jax.models import llm, llm_variants, vit, vit_keys
from spatial_jax.nn.layers import Dense, activation
from spatial_jax.types import Array, Float, Int

Out = dict[str, Any]

PARTS = {"vit": vit.Model, "llm": llm.Model}

VARIANTS = {
  "1b": {
    "vit": vit.VARIANTS["janus-siglip-l-16-384"],
    "llm": llm.VARIANTS["deepseek-1.3b"],
    "image_token": 100581,
  },
  # Its tokenizer has other special tokens: look up <image_placeholder>.
  "7b": {
    "vit": vit.VARIANTS["janus-siglip-l-16-384"],
    "llm": llm.VARIANTS["deepseek-7b"],
  },
}


def _connector(first, second):
  return (
    (f"{first}.weight", "connector/up/kernel"),
    (f"{first}.bias", "connector/up/bias"),
    (f"{second}.weight", "connector/down/kernel"),
    (f"{second}.bias", "connector/down/bias"),
  )


TRANSFORMERS = (
  *hf.nest(vit_keys.JANUS, "model.vision_model.", "vit/"),
  *_connector("model.aligner.fc1", "model.aligner.hidden_layers.0"),
  *llm_variants.keys("model.language_model."),
)
DEEPSEEK = (
  *hf.nest(vit_keys.TIMM, "vision_model.vision_tower.", "vit/"),
  *_connector("aligner.layers.0", "aligner.layers.2"),
  *llm_variants.keys("language_model.model.", "language_model."),
)
KEYS = (*TRANSFORMERS, *DEEPSEEK)
IGNORE = (
  "vision_model.vision_tower.attn_pool.",
  # the path that generates images
  "gen_vision_model.",
  "gen_aligner.",
  "gen_head.",
  "gen_embed.",
  "model.vqmodel.",
  "model.generation_",
)


class Connector(nn.Module):
  """Two linear layers from the tower's width to the decoder's."""

  width: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... D"]:
    x = activation("gelu")(Dense(self.width, dtype=self.dtype, name="up")(x))
    return Dense(self.width, dtype=self.dtype, name="down")(x)


class Model(nn.Module):
  """Vision tower, connector and decoder; see the module docstring."""

  vit: Mapping[str, Any]
  llm: Mapping[str, Any]
  image_token: int = -1
  dtype: str = "float32"
  remat: str = "none"
  loss_tokens: int = 0  # whose logits a device holds at once; 0: all

  def setup(self) -> None:
    shared = {"dtype": self.dtype, "remat": self.remat}
    self._vit = vit.Model(**{**shared, **self.vit}, name="vit")
    self.connector = Connector(self.llm["width"], self.dtype)
    self._llm = self._decoder(name="llm")

  def _decoder(self, **kwargs) -> llm.Model:
    shared = {"dtype": self.dtype, "remat": self.remat}
    return llm.Model(**{**shared, **self.llm}, **kwargs)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | Int[Array, "B 3 T"],
    segments: Int[Array, "B T"],
    images: Float[Array, "B F height width 3"] | None = None,
    cache: llm.Cache | None = None,
    *,
    last: Int[Array, " B"] | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "B logits V"], Out]:
    """Logits and named intermediates.

    `out` holds "vit/tokens" [B*F P/F Dv], "vit/connected" [B P D] and the
    decoder's; see `vit.Model` and `llm.Model`.

    Args:
      images: from -1 to 1.
    """
    del train  # no dropout
    embeddings, out = self._llm.embed(tokens), {}
    if images is not None:
      if self.image_token < 0:
        raise ValueError(
          "config.model.image_token is not set: give the id that the "
          "checkpoint's tokenizer has for <image_placeholder>"
        )
      connected, out = self.encode(images)
      is_image = tokens == self.image_token
      embeddings = llm.place(embeddings, connected, is_image)
    logits, more = self._llm(
      tokens,
      positions,
      segments,
      cache=cache,
      embeddings=embeddings,
      last=last,
    )
    return logits, {**out, **more}

  def encode(
    self, images: Float[Array, "B F height width 3"]
  ) -> tuple[Float[Array, "B P D"], Out]:
    """Tokens of all images of a row, one image after the other."""
    B, F = images.shape[:2]
    x, out = self._vit(images.reshape(B * F, *images.shape[2:]))
    x = self.connector(x)
    out["vit/connected"] = x = x.reshape(B, -1, x.shape[-1])
    return x, out

  def init_cache(self, batch: int, length: int) -> llm.Cache:
    """Empty decoder cache; callable without parameters."""
    return self._decoder(parent=None).init_cache(batch, length)


def arguments(batch: Mapping[str, Array]) -> dict[str, Any]:
  """What `Model` takes of a batch."""
  names = ("tokens", "positions", "segments", "images")
  return {name: batch[name] for name in names if name in batch}


loss = llm.answer_loss(arguments)


def INPUTS(config) -> dict[str, jax.ShapeDtypeStruct]:
  """`config.batch_size` rows of `config.data.length` tokens.

  They have `config.data.images` images of the size of the vision tower's table.
  """
  side = config.model.get("vit", {}).get("image")
  side = side or VARIANTS[config.model.variant]["vit"]["image"]
  B, T = config.batch_size, config.data.length
  F = config.data.get("images", 1)
  return {
    "tokens": jax.ShapeDtypeStruct((B, T), jnp.int32),
    "positions": jax.ShapeDtypeStruct((B, T), jnp.int32),
    "segments": jax.ShapeDtypeStruct((B, T), jnp.int32),
    "images": jax.ShapeDtypeStruct((B, F, side, side, 3), jnp.float32),
    "labels": jax.ShapeDtypeStruct((B, T), jnp.int32),
    "loss_weight": jax.ShapeDtypeStruct((B, T), jnp.float32),
  }
