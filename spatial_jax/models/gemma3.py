# SPDX-License-Identifier: Apache-2.0
"""Gemma 3: images and text in, text out; most layers see a window of tokens.

Paper: https://arxiv.org/abs/2503.19786. Weights: google/gemma-3-4b-{pt,it}.
images [B F height width 3] -> vit (SigLIP) -> means of 4 x 4 patches -> norm ->
linear -> in place of the image tokens' embeddings -> llm -> logits.

Departures from the paper:
1. A row has a fixed number of images; its k-th image token takes the k-th token
   of its images. They are not cut into crops ("pan and scan").
2. Tokens of one image see each other both ways, and those of other images as
   text does, as transformers 5 has it; its release 4.51 let all images of a
   row see each other. As in both, what lies beyond a layer's window is hidden.

Letters: B batch, F images, T length, M image tokens of a row, D width, V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from spatial_jax import hf
from spatial_jax.models import llm, llm_variants, vit, vit_keys
from spatial_jax.nn import edit as edit_lib
from spatial_jax.nn.layers import Dense, RMSNorm
from spatial_jax.types import Array, Bool, Float, Int

Out = dict[str, Any]

PARTS = {"vit": vit.Model, "llm": llm.Model}
VARIANTS = {
  "4b": {
    "vit": {**vit.VARIANTS["siglip-so400m-14-224"], "image": 896},
    "llm": llm.VARIANTS["gemma3-4b"],
  },
  # Small enough for parity tests: one layer of three sees all.
  "tiny": {
    "vit": {
      **vit.VARIANTS["siglip-so400m-14-224"],
      "width": 24,
      "layers": 2,
      "heads": 3,
      "mlp": 48,
      "patch": 4,
      "image": 24,
    },
    "llm": {
      **llm.VARIANTS["gemma3-4b"],
      "vocab": 96,
      "width": 48,
      "layers": 6,
      "heads": 4,
      "kv_heads": 2,
      "head_dim": 16,
      "mlp": 64,
      "window": 7,
      "full_every": 3,
    },
    "image_tokens": 9,
    "image_token": 3,
  },
}

_FLAT = hf.Custom(lambda x: x, lambda x: x)  # stored as (in, out)
# Prefixes of the published files and of transformers 4.51, of its modules from
# 4.52 on and from 5 on; what 5 writes has the last of the tower.
KEYS = (
  *hf.nest(
    vit_keys.SIGLIP,
    (
      "vision_tower.vision_model.",
      "model.vision_tower.vision_model.",
      "model.vision_tower.",
      "vision_tower.",
    ),
    "vit/",
  ),
  *hf.nest(
    (
      ("mm_soft_emb_norm.weight", "projector/norm/scale"),
      ("mm_input_projection_weight", "projector/out/kernel", _FLAT),
    ),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    "",
  ),
  *llm_variants.keys(
    ("language_model.model.", "model.language_model."),
    ("language_model.", ""),
    table=llm_variants.GEMMA3,
  ),
)
IGNORE = ()


class Projector(nn.Module):
  """Means of square groups of patches, in the decoder's width."""

  count: int  # tokens of an image
  width: int
  eps: float
  dtype: str

  @nn.compact
  def __call__(
    self, x: Float[Array, "B P C"]
  ) -> Float[Array, "B {self.count} D"]:
    B, P, C = x.shape
    h, side = math.isqrt(P), math.isqrt(self.count)
    if h * h != P or side * side != self.count or h % side:
      raise ValueError(
        f"{P} patches of an image can't be pooled to {self.count} tokens: "
        "images are square, and their side in patches is a multiple of that in "
        "tokens (config.model.image_tokens)"
      )
    x = x.reshape(B, side, h // side, side, h // side, C)
    x = jnp.mean(x.astype(jnp.float32), axis=(2, 4)).astype(x.dtype)
    x = x.reshape(B, self.count, C)
    x = RMSNorm(self.eps, self.dtype, 1.0, name="norm")(x)
    return Dense(self.width, use_bias=False, dtype=self.dtype, name="out")(x)


class Model(nn.Module):
  """Vision tower, projector and decoder; see the module docstring."""

  vit: Mapping[str, Any]
  llm: Mapping[str, Any]
  image_tokens: int = 256  # of each image
  image_token: int = 262144
  dtype: str = "float32"
  remat: str = "none"
  loss_tokens: int = 0  # whose logits a device holds at once; 0: all

  def setup(self) -> None:
    shared = {"dtype": self.dtype, "remat": self.remat}
    self._vit = vit.Model(**{**shared, **self.vit}, name="vit")
    self.projector = Projector(
      self.image_tokens, self.llm["width"], self._vit.eps, self.dtype
    )
    self._llm = self._decoder(name="llm")

  def _decoder(self, **kwargs) -> llm.Model:
    shared = {"dtype": self.dtype, "remat": self.remat}
    return llm.Model(**{**shared, **self.llm}, **kwargs)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | Int[Array, "B 3 T"],
    segments: Int[Array, "B T"],
    shared: Bool[Array, "B T"] | None = None,
    images: Float[Array, "B F height width 3"] | None = None,
    cache: llm.Cache | None = None,
    *,
    edits: Mapping[str, edit_lib.Edits] | None = None,
    last: Int[Array, " B"] | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "B logits V"], Out]:
    """Logits and named intermediates.

    `out` holds the tower's ("vit/blocks" [L B*F P Dv] ...), "vit/merged"
    [B M D] and the decoder's; see `vit.Model` and `llm.Model`.

    Args:
      images: from -1 to 1, as `data.images.gemma3` makes them.
      edits: of the residual streams of "vit" [B*F P Dv] and "llm"; see
        `nn.edit`.
    """
    del train  # no dropout
    edits = edit_lib.check(edits, PARTS)
    is_image = tokens == self.image_token
    embeddings, out = self._llm.embed(jnp.where(is_image, 0, tokens)), {}
    if images is not None:
      merged, out = self.encode(images, edits.get("vit"))
      embeddings = llm.place(embeddings, merged, is_image)
    logits, more = self._llm(
      None,
      positions,
      segments,
      shared,
      cache,
      mutual=image_numbers(is_image),
      embeddings=embeddings,
      edit=edits.get("llm"),
      last=last,
    )
    return logits, {**out, **more}

  def encode(
    self,
    images: Float[Array, "B F height width 3"],
    edit: edit_lib.Edits = None,
  ) -> tuple[Float[Array, "B M D"], Out]:
    """Tokens of all images of a row, one image after the other."""
    B, F = images.shape[:2]
    x, out = self._vit(images.reshape(B * F, *images.shape[2:]), edit)
    x = self.projector(x)
    out["vit/merged"] = x = x.reshape(B, -1, x.shape[-1])
    return x, out

  def init_cache(self, batch: int, length: int) -> llm.Cache:
    """Empty decoder cache; callable without parameters."""
    return self._decoder(parent=None).init_cache(batch, length)


def image_numbers(is_image: Bool[Array, "B T"]) -> Int[Array, "B T"]:
  """Image tokens that follow each other get a number: [F T T F T] 0 1 1 0 2."""
  before = jnp.pad(is_image[:, :-1], [(0, 0), (1, 0)])
  return jnp.where(is_image, jnp.cumsum(is_image & ~before, axis=1), 0)


def prompt(
  question: str, system: str = "", images: int = 1, count: int = 256
) -> str:
  """Text of a turn, up to the answer, with a place for each image token.

  Images come before the question. The tokenizer adds nothing to this.
  """
  image = "<start_of_image>" + "<image_soft_token>" * count + "<end_of_image>"
  system = f"{system}\n\n" if system else ""
  return (
    f"<bos><start_of_turn>user\n{system}"
    + f"\n\n{image}\n\n" * images
    + f"{question.strip()}<end_of_turn>\n<start_of_turn>model\n"
  )


def arguments(batch: Mapping[str, Array]) -> dict[str, Any]:
  """What `Model` takes of a batch."""
  names = "tokens", "positions", "segments", "shared", "images", "edits"
  return {name: batch[name] for name in names if name in batch}


loss = llm.answer_loss(arguments)


def INPUTS(config) -> dict[str, jax.ShapeDtypeStruct]:
  """`config.batch_size` rows of `config.data.length` tokens.

  They have `config.data.images` images of the size of the vision tower's table.
  """
  side = config.model.get("vit", {}).get("image")
  side = side or VARIANTS[config.model.variant]["vit"]["image"]
  B, T = config.batch_size, config.data.length

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct((B, *shape), dtype)

  return {
    "tokens": array(jnp.int32, T),
    "positions": array(jnp.int32, T),
    "segments": array(jnp.int32, T),
    "images": array(jnp.float32, config.data.get("images", 1), side, side, 3),
    "labels": array(jnp.int32, T),
    "loss_weight": array(jnp.float32, T),
  }
