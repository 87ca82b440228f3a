# SPDX-License-Identifier: Apache-2.0
"""Which groups of a video's patches stay, given their scores.

Paper: https://arxiv.org/abs/2603.18004 (STTS). Frames of a row are told apart
by their number in `videos`: above 0 that of a video; 0 an image, of which all
stays; -1 padding, of which nothing does. Two videos that follow each other have
different numbers.

Letters: B batch, F frames, P patches of a frame, h w their grid, G groups of a
frame, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from spatial_jax.data.stts import budget
from spatial_jax.nn.scorer import Groups, gather
from spatial_jax.types import Array, Bool, Float, Int


class Videos(NamedTuple):
  """What follows from `videos` alone, for each frame [B F]."""

  budget: Int[Array, "B F"]  # groups that its video loses
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
    (videos > 0) & (videos != last),
    lost > 0,
    videos < 0,
  )


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
  # How many of its video go before it: counted, since a TPU's program for a
  # sort is among the longest.
  flat, video = scores.reshape(B, F * G), jnp.repeat(videos, G, axis=1)
  mine, other = flat[:, :, None], flat[:, None]
  number = jnp.arange(F * G)
  earlier = (number[None] < number[:, None])[None]
  before = (other < mine) | ((other == mine) & earlier)
  before = before & (video[:, :, None] == video[:, None])
  rank = jnp.sum(before, axis=-1).reshape(B, F, G)
  goes = (rank < info.budget[..., None]) & ~jnp.isnan(scores)
  return ~goes & ~info.padding_mask[..., None]


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
