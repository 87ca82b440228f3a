# SPDX-License-Identifier: Apache-2.0
"""Molmo2's vision: SigLIP 2 without its last blocks, and a pooling connector.

Paper: https://arxiv.org/abs/2601.10611. Weights: `model.vision_backbone.*` of
allenai/Molmo2-4B and -8B.
images [B F height width 3] -> vit -> two blocks' outputs side by side
[B P C] -> the patches of each token [B Q S C] -> attention of their mean to
them -> SwiGLU -> [B Q out_width].

Departures from the paper:
1. Pixels come as images, not as rows of patches; `data.molmo2.frames`
   makes them, `data.molmo2.pooling` the numbers of each token's patches.
2. Tokens without patches are zeros and stay where they are, so that shapes are
   static; `out["vit/valid_mask"]` tells them.

Letters: B batch, F frames or crops, P patches of all frames, Q tokens,
S patches of a token, C channels, D width, E out width, T tokens of a frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from spatial_jax.models import molmo2_keys, vit
from spatial_jax.nn import edit as edit_lib
from spatial_jax.nn import slots
from spatial_jax.nn.attention import attention
from spatial_jax.nn.layers import Dense, GatedMlp
from spatial_jax.types import Array, Bool, Float, Int

Out = dict[str, Any]

VIT = {
  "width": 1152,
  "layers": 25,  # of 27: no later one is read
  "heads": 16,
  "mlp": 4304,
  "patch": 14,
  "image": 378,
  "activation": "gelu_tanh",
  "final_norm": "none",
}


def _variant(mlp, out_width):
  return {
    "vit": VIT,
    "read": (24, 18),
    "width": 1152,
    "heads": 16,
    "mlp": mlp,
    "out_width": out_width,
  }


VARIANTS = {"4b": _variant(9728, 2560), "8b": _variant(12288, 4096)}

KEYS = molmo2_keys.KEYS


class Connector(nn.Module):
  """Pools the patches of each token by attention and projects the result."""

  width: int
  heads: int
  mlp: int
  out_width: int
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self,
    features: Float[Array, "B P C"],
    pooling: Int[Array, "B Q S"],
    read_by: Int[Array, "B P"] | None = None,
  ) -> tuple[Float[Array, "B Q E"], Bool[Array, "B Q"]]:
    """Tokens, and which of them have patches.

    Args:
      pooling: numbers of each token's patches; -1 is none.
      read_by: where each patch has only one token, s * Q + q for slot s of
        token q, or -1; gradients are found by it, not added up.
    """
    B, Q, S = pooling.shape
    # A token's patches lie far apart, those of all tokens side by side: on a
    # TPU, S few numbers in a row would be moved into whole tiles and back.
    numbers = pooling.swapaxes(1, 2)
    valid = numbers >= 0
    index = jnp.maximum(numbers, 0).reshape(B, S * Q)
    if read_by is None:
      patches = slots.take(features, index)
    else:
      patches = slots.pick(features, index, read_by)
    patches = patches.reshape(B, S, Q, -1)
    patches = jnp.where(valid[..., None], patches, 0)
    count = jnp.maximum(jnp.sum(valid, axis=1), 1)[..., None]
    mean = jnp.sum(patches, axis=1) / count.astype(patches.dtype)

    def project(x, name):
      y = Dense(self.width, dtype=self.dtype, name=name)(x)
      return y.reshape(*y.shape[:-1], self.heads, self.width // self.heads)

    def rows(x):  # [B S Q ...] -> [B*Q S ...]
      return x.swapaxes(1, 2).reshape(B * Q, -1, *x.shape[3:])

    y = attention(
      rows(project(mean[:, None], "query")),
      rows(project(patches, "key")),
      rows(project(patches, "value")),
      rows(valid)[:, None],
    )
    y = Dense(self.width, dtype=self.dtype, name="out")(y.reshape(B, Q, -1))
    y = GatedMlp(
      self.mlp, dtype=self.dtype, out_width=self.out_width, name="mlp"
    )(y)
    has_any = jnp.any(valid, axis=1)
    return jnp.where(has_any[..., None], y, 0), has_any


class Model(nn.Module):
  """Tower and connector; see the module docstring."""

  vit: Mapping[str, Any]
  read: tuple[int, ...]  # blocks whose outputs are read, in this order
  width: int
  heads: int
  mlp: int
  out_width: int
  dtype: str = "float32"
  remat: str = "none"

  @nn.compact
  def __call__(
    self,
    images: Float[Array, "B F height width 3"],
    pooling: Int[Array, "B Q S"],
    edit: edit_lib.Edits = None,
  ) -> tuple[Float[Array, "B Q E"], Out]:
    """Tokens for the decoder and intermediates.

    `out` holds what the tower's does ("vit/blocks" [L B*F T D] ...),
    "vit/features" [B P C], "vit/merged" [B Q E] and "vit/valid_mask" [B Q].
    """
    B, F = images.shape[:2]
    shared = {"dtype": self.dtype, "remat": self.remat}
    tower = vit.Model(**{**shared, **self.vit}, read=self.read, name="vit")
    _, out = tower(images.reshape(B * F, *images.shape[2:]), edit)
    features = jnp.concatenate([*out["vit/read"]], axis=-1)
    features = features.reshape(B, -1, features.shape[-1])
    out["vit/features"] = features
    out["vit/merged"], out["vit/valid_mask"] = Connector(
      self.width,
      self.heads,
      self.mlp,
      self.out_width,
      self.dtype,
      name="connector",
    )(features, pooling)
    return out["vit/merged"], out
