# SPDX-License-Identifier: Apache-2.0
"""Scores for groups of patches, and which groups of a video stay.

Paper: https://arxiv.org/abs/2603.18004 (STTS). A group is what becomes one
token. Frames of a row are told apart by their number in `videos`: above 0 that
of a video; 0 an image, of which all stays; -1 padding, of which nothing does.
Two videos that follow each other have different numbers.

Letters: B batch, F frames, P patches of a frame, h w their grid, G groups of a
frame, S patches of a group, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from spatial_jax.data.stts import budget
from spatial_jax.nn.attention import attention
from spatial_jax.nn.layers import Dense
from spatial_jax.types import Array, Bool, Float, Int

Groups = Int[np.ndarray, "G S"]  # patches of each group; -1: none


class Videos(NamedTuple):
  """What follows from `videos` alone, for each frame [B F]."""

  budget: Int[Array, "B F"]  # groups that its video loses
  before: Int[Array, "B F"]  # groups of the row in videos of lower numbers
  first_mask: Bool[Array, "B F"]  # first frame of its video
  prunable_mask: Bool[Array, "B F"]  # its video loses groups
  padding_mask: Bool[Array, "B F"]


def describe(videos: Int[Array, "B F"], groups: int, drop: float) -> Videos:
  """See `Videos`."""
  F = videos.shape[1]
  # On the host, in float64: a budget is rounded down.
  table = jnp.array([budget(count, groups, drop) for count in range(F + 1)])
  mine, other = videos[:, :, None], videos[:, None, :]
  lost = jnp.where(videos > 0, table[jnp.sum(mine == other, axis=-1)], 0)
  last = jnp.pad(videos[:, :-1], [(0, 0), (1, 0)], constant_values=-1)
  return Videos(
    lost,
    jnp.sum(other < mine, axis=-1) * groups,
    (videos > 0) & (videos != last),
    lost > 0,
    videos < 0,
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
    z = nn.silu(dense(z, self.mlp, "up"))
    z = nn.silu(dense(z, self.mlp, "middle"))
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


def keep(
  scores: Float[Array, "B F G"], videos: Int[Array, "B F"], drop: float
) -> Bool[Array, "B F G"]:
  """True for groups that stay.

  Of each video those with the lowest scores go, all frames together. What the
  first frame shows stays as long as others can go. Equal scores go in order.
  """
  B, F, G = scores.shape
  info = describe(videos, G, drop)
  scores = jnp.where(info.first_mask[..., None], 100.0, scores)
  video = jnp.repeat(videos, G, axis=1)
  number = jnp.broadcast_to(jnp.arange(F * G)[None], (B, F * G))
  *_, order = jax.lax.sort(
    (video, scores.reshape(B, F * G), number), num_keys=2, is_stable=True
  )
  place = jnp.argsort(order, axis=-1).reshape(B, F, G)
  rank = place - info.before[..., None]
  stays = rank >= info.budget[..., None]
  return stays & ~info.padding_mask[..., None]


def key_bias(
  scores: Float[Array, "B F G"],
  videos: Int[Array, "B F"],
  patch_groups: Int[np.ndarray, "h w"],
  drop: float,
  least: float,
) -> Float[Array, "B F h w"]:
  """What attention adds for each patch as a key: the logarithm of its score.

  Scores are stretched to `least`..1 in each row of patches, as published. First
  frames and frames that lose nothing add 0.
  """
  info = describe(videos, scores.shape[-1], drop)
  s = scores[..., patch_groups]
  low, high = (f(s, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
  s = least + (s - low) * (1 - least) / (high - low + 1e-6)
  free = info.first_mask | ~info.prunable_mask
  return jnp.log(jnp.where(free[..., None, None], 1.0, s))


def temporal_loss(
  x: Float[Array, "B F P D"],
  scores: Float[Array, "B F G"],
  videos: Int[Array, "B F"],
  groups: Groups,
  drop: float,
) -> Float[Array, ""]:
  """Mean square of score - (1 - cosine with the same group a frame before).

  Over frames of pruned videos except for a row's first. That of a later video
  is compared with the frame before it, as published. The gradient reaches the
  features too.
  """
  B, F, G = scores.shape
  info = describe(videos, G, drop)
  y = gather(x, groups).reshape(B, F, G, -1).astype(jnp.float32)
  size = jnp.sqrt(jnp.maximum(jnp.sum(y * y, axis=-1, keepdims=True), 1e-24))
  y = y / size
  cosine = jnp.sum(y[:, 1:] * y[:, :-1], axis=-1)
  counted = info.prunable_mask[:, 1:]
  error = jnp.square(scores[:, 1:] - (1 - cosine))
  total = jnp.sum(jnp.where(counted[..., None], error, 0.0))
  return total / jnp.maximum(jnp.sum(counted) * G, 1)
