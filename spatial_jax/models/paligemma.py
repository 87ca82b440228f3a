# SPDX-License-Identifier: Apache-2.0
"""PaliGemma: images and a prompt in, text out; also the trunk of pi0 and pi0.5.

Paper: https://arxiv.org/abs/2407.07726. Weights: google/paligemma-3b-*; those
within openpi's pi0 and pi0.5 are loaded by the same table.
images -> vit (SigLIP) -> connector -> in place of the image tokens' embeddings
-> llm (Gemma), where images and prompt see each other both ways -> logits.

Departures from the paper:
1. A row may have several images, as pi0 has cameras: its tokens have as many
   image tokens as all of them together. A camera that is missing keeps its
   place; its tokens have segment 0, so that nobody sees them.
2. Positions come with the batch. The published ones of PaliGemma start at 1,
   pi0's at 0; the model sees their differences only.

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
from spatial_jax.nn import edit as edit_lib
from spatial_jax.nn.layers import Dense
from spatial_jax.types import Array, Bool, Float, Int

Out = dict[str, Any]

PARTS = {"vit": vit.Model, "llm": llm.Model}


def _published(vocab, image=224):
  return {
    "vit": {**vit.VARIANTS["siglip-so400m-14-224"], "image": image},
    "llm": {**llm.VARIANTS["gemma-2b"], "vocab": vocab},
  }


VARIANTS = {
  "3b-224": _published(257216),
  "3b-448": _published(257216, 448),
  "3b-896": _published(257216, 896),
  # The vocabulary without the rows that pad it.
  "pi0": _published(257152),
}

# Prefixes of the vision tower, the connector and the decoder: transformers 5,
# the published files, and openpi's PyTorch checkpoints.
_PI0 = "paligemma_with_expert.paligemma."
KEYS = (
  *hf.nest(
    vit_keys.SIGLIP,
    (
      "model.vision_tower.",
      "vision_tower.vision_model.",
      f"{_PI0}model.vision_tower.vision_model.",
      "vision_tower.",  # what transformers 5 writes
    ),
    "vit/",
  ),
  *hf.nest(
    (("weight", "connector/kernel"), ("bias", "connector/bias")),
    (
      "model.multi_modal_projector.linear.",
      "multi_modal_projector.linear.",
      f"{_PI0}model.multi_modal_projector.linear.",
    ),
    "",
  ),
  *llm_variants.keys(
    (
      "model.language_model.",
      "language_model.model.",
      f"{_PI0}model.language_model.",
    ),
    ("", "language_model.", _PI0),
  ),
)
# Within pi0: the action expert and what surrounds it.
IGNORE = (
  "paligemma_with_expert.gemma_expert.",
  "action_in_proj.",
  "action_out_proj.",
  "action_time_mlp_",
  "state_proj.",
  "time_mlp_",
)


class Model(nn.Module):
  """Vision tower, linear connector and decoder; see the module docstring."""

  vit: Mapping[str, Any]
  llm: Mapping[str, Any]
  image_token: int = 257152
  dtype: str = "float32"
  remat: str = "none"
  loss_tokens: int = 0  # whose logits a device holds at once; 0: all

  def setup(self) -> None:
    shared = {"dtype": self.dtype, "remat": self.remat}
    self._vit = vit.Model(**{**shared, **self.vit}, name="vit")
    self.connector = Dense(self.llm["width"], dtype=self.dtype)
    self._llm = self._decoder(name="llm")

  def _decoder(self, **kwargs) -> llm.Model:
    shared = {"dtype": self.dtype, "remat": self.remat}
    return llm.Model(**{**shared, **self.llm}, **kwargs)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | Int[Array, "B 3 T"],
    segments: Int[Array, "B T"],
    prefix: Bool[Array, "B T"] | None = None,
    images: Float[Array, "B F height width 3"] | None = None,
    cache: llm.Cache | None = None,
    *,
    edits: Mapping[str, edit_lib.Edits] | None = None,
    last: Int[Array, " B"] | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "B logits V"], Out]:
    """Logits and named intermediates.

    `out` holds "vit/tokens" [B*F P/F Dv], "vit/connected" [B P D] and the
    decoder's; see `vit.Model` and `llm.Model`.

    Args:
      prefix: True for images and prompt, which see each other both ways. Later
        tokens see what is before them.
      images: from -1 to 1.
      edits: of the residual streams of "vit" [B*F P/F Dv] and "llm"; see
        `nn.edit`.
    """
    del train  # no dropout
    edits = edit_lib.check(edits, PARTS)
    is_image = tokens == self.image_token
    # Their id may lie outside of the table.
    embeddings, out = self._llm.embed(jnp.where(is_image, 0, tokens)), {}
    if images is not None:
      connected, out = self.encode(images, edits.get("vit"))
      embeddings = llm.place(embeddings, connected, is_image)
    logits, more = self._llm(
      tokens,
      positions,
      segments,
      cache=cache,
      mutual=None if prefix is None else prefix.astype(jnp.int32),
      embeddings=embeddings,
      edit=edits.get("llm"),
      last=last,
    )
    return logits, {**out, **more}

  def encode(
    self,
    images: Float[Array, "B F height width 3"],
    edit: edit_lib.Edits = None,
  ) -> tuple[Float[Array, "B P D"], Out]:
    """Tokens of all images of a row, one image after the other."""
    B, F = images.shape[:2]
    x, out = self._vit(images.reshape(B * F, *images.shape[2:]), edit)
    x = self.connector(x)
    out["vit/connected"] = x = x.reshape(B, -1, x.shape[-1])
    return x, out

  def init_cache(self, batch: int, length: int) -> llm.Cache:
    """Empty decoder cache; callable without parameters."""
    return self._decoder(parent=None).init_cache(batch, length)


def arguments(batch: Mapping[str, Array]) -> dict[str, Any]:
  """What `Model` takes of a batch."""
  names = ("tokens", "positions", "segments", "prefix", "images")
  names += ("edits",)
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
    "prefix": jax.ShapeDtypeStruct((B, T), jnp.bool_),
    "images": jax.ShapeDtypeStruct((B, F, side, side, 3), jnp.float32),
    "labels": jax.ShapeDtypeStruct((B, T), jnp.int32),
    "loss_weight": jax.ShapeDtypeStruct((B, T), jnp.float32),
  }
