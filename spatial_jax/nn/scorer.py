# SPDX-License-Identifier: Apache-2.0
"""A score for each group of patches: how much it is worth keeping.

Paper: https://arxiv.org/abs/2603.18004 (STTS). A group is what becomes one
token. What follows from scores is in `nn.pruning`.

Letters: B batch, F frames, P patches of a frame, G groups of a frame, S patches
of a group, D width.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from spatial_jax.nn.attention import attention
from spatial_jax.nn.layers import Dense, silu
from spatial_jax.types import Array, Float, Int

Groups = Int[np.ndarray, "G S"]  # patches of each group; -1: none


def _linear(theirs, ours):
  return (
    (f"{theirs}.weight", f"{ours}/kernel"),
    (f"{theirs}.bias", f"{ours}/bias"),
  )


# Names in the released training code.
KEYS = (
  *_linear("patch_token_pooler.wq", "query"),
  *_linear("patch_token_pooler.wk", "key"),
  *_linear("patch_token_pooler.wv", "value"),
  *_linear("patch_token_pooler.wo", "out"),
  *_linear("mlp.w1", "up"),
  *_linear("mlp.w2", "middle"),
  *_linear("mlp.w3", "down"),
)


class Scorer(nn.Module):
  """A score in (0, 1) for each group, from its patches and those before it."""

  heads: int
  mlp: int
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "B F P D"], groups: Groups
  ) -> tuple[Float[Array, "B F G"], Float[Array, "B F G D"]]:
    """Scores in float32, and each group as one vector.

    The frame before is the one before in the row, whatever its video, as
    published; the first frame has zeros.
    """
    B, F, _, D = x.shape
    G, S = groups.shape
    patches = gather(x, groups).reshape(B * F * G, S, D)
    there = np.tile(groups >= 0, (B * F, 1))[..., None]
    patches = jnp.where(there, patches, 0)

    def dense(y, width, name, **kwargs):
      return Dense(width, dtype=self.dtype, name=name, **kwargs)(y)

    def project(y, name):
      y = dense(y, D, name, kernel_init=_SMALL)
      return y.reshape(*y.shape[:-1], self.heads, D // self.heads)

    # The mean counts the slots without a patch, and attention sees them.
    query = jnp.mean(patches, axis=1, keepdims=True)
    y = attention(
      project(query, "query"),
      project(patches, "key"),
      project(patches, "value"),
    )
    y = dense(y.reshape(B, F, G, D), D, "out", kernel_init=_SMALL)
    before = jnp.pad(y[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0)])
    z = jnp.concatenate([before, y], axis=-1)
    z = silu(dense(z, self.mlp, "up"))
    z = silu(dense(z, self.mlp, "middle"))
    z = dense(z, 1, "down")[..., 0].astype(jnp.float32)
    return nn.sigmoid(z), y


_SMALL = nn.initializers.normal(0.02)


def gather(
  x: Float[Array, "B F P D"], groups: Groups
) -> Float[Array, "B F G S D"]:
  """Patches by group; patch 0 where a group has none."""
  return jnp.take(x, np.maximum(groups, 0), axis=2)


def group_of(groups: Groups, patches: int) -> Int[np.ndarray, " P"]:
  """Number of each patch's group."""
  number = np.zeros(patches, np.int32)
  for i, row in enumerate(groups):
    number[row[row >= 0]] = i
  return number
