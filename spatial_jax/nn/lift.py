# SPDX-License-Identifier: Apache-2.0
"""Patch features lifted to 3D: an embedding of their points, then pooling.

features [B F h w D] + depth, intrinsics, poses -> + embedding of the patch's
world point -> mean in voxels, farthest points, or all -> tokens [B M D].

Paper: https://arxiv.org/abs/2409.18125 (LLaVA-3D). Features of any tower do.

Letters: B batch, F frames, h w patch grid, P = F*h*w patches, M tokens,
D width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from spatial_jax import sharding
from spatial_jax.geometry import camera, voxels
from spatial_jax.geometry.fps import farthest_points
from spatial_jax.geometry.patches import patch_points
from spatial_jax.nn.layers import Dense, LayerNorm
from spatial_jax.types import Array, Bool, Float

Out = dict[str, Any]


class PointEmbed(nn.Module):
  """Points in metres to vectors: linear, LayerNorm, ReLU, linear."""

  features: int
  dtype: str = "float32"
  waves: int = 0  # sines and cosines of 16, 8, ... metres beside the points

  @nn.compact
  def __call__(self, points: Float[Array, "... 3"]) -> Float[Array, "... D"]:
    def dense(name, dtype):
      init = nn.initializers.xavier_uniform()
      return Dense(self.features, dtype=dtype, kernel_init=init, name=name)

    if self.waves:
      turns = [points * (2**i / 16) for i in range(self.waves)]
      angles = 2 * jnp.pi * jnp.concatenate(turns, axis=-1)
      points = jnp.concatenate(
        [points, jnp.sin(angles), jnp.cos(angles)], axis=-1
      )
    # Coordinates in bfloat16 would lose centimetres.
    y = dense("up", "float32")(points)
    y = LayerNorm(1e-5, self.dtype, name="norm")(y)
    return dense("down", self.dtype)(nn.relu(y))


class Lift(nn.Module):
  """Adds to each patch where it is in the world, and pools the patches."""

  pool: str = "voxel"  # or "fps", or "none"
  capacity: int = 2560  # tokens of a scene
  voxel_size: float = 0.2  # metres
  overflow: str = "even"  # or "random"
  keep_invalid: bool = False
  bfloat16: bool = False
  # None of these three is published.
  level: bool = False  # in the first camera's level axes, not the world's
  samples: int = 1  # squared: points of a patch, whose mean embedding it gets
  waves: int = 0  # see `PointEmbed`

  @nn.compact
  def __call__(
    self,
    features: Float[Array, "B F h w D"],
    depth: Float[Array, "B F height width"],
    intrinsics: Float[Array, "B F 3 3"],
    world_from_camera: Float[Array, "B F 4 4"],
    is_scene: Bool[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M D"], Bool[Array, "B M"], Out]:
    """Tokens, which of them there are, and intermediates.

    Args:
      depth: z-depth in metres; 0 where it was not measured.
      intrinsics: of the depth, pixel centres at +0.5.
      is_scene: False for rows that hold a 2D image in frame 0; their tokens are
        that frame's features. All are scenes by default.
    """
    B, F, h, w, D = features.shape
    if self.level:
      level = camera.level_from_world(world_from_camera[:, :1])
      level = jnp.broadcast_to(level, world_from_camera.shape)
      world_from_camera = camera.compose(level, world_from_camera)
    n = self.samples
    points, valid = patch_points(
      depth,
      intrinsics,
      world_from_camera,
      (h * n, w * n),
      bfloat16=self.bfloat16,
    )
    points = jax.lax.stop_gradient(points)
    if self.keep_invalid:
      finite = jnp.isfinite(world_from_camera).all((-1, -2))
      valid = jnp.broadcast_to(finite[..., None, None], valid.shape)
    embed = PointEmbed(D, waves=self.waves, name="embed")(points)
    if n > 1:
      embed, points, valid = _mean(embed, points, valid, n)
    patches = features.astype(jnp.float32) + embed
    patches = patches.reshape(B, F * h * w, D)
    patches = sharding.constrain(patches, "batch patches act_embed")
    out = {
      "lift/points": points,
      "lift/valid": valid,
      "lift/embed": embed,
      "lift/patches": patches,
    }
    flat = points.reshape(B, -1, 3), valid.reshape(B, -1)
    tokens, mask, more = self._pool(patches, *flat)
    if is_scene is not None:
      N, M = h * w, tokens.shape[1]
      if N > M:
        raise ValueError(
          f"a 2D image has {N} patches, but there are only {M} image tokens: "
          f"raise model.lift.capacity={self.capacity}"
        )
      image = features[:, 0].reshape(B, N, D).astype(jnp.float32)
      image = jnp.pad(image, ((0, 0), (0, M - N), (0, 0)))
      tokens = jnp.where(is_scene[:, None, None], tokens, image)
      mask = jnp.where(is_scene[:, None], mask, (jnp.arange(M) < N)[None])
    return tokens, mask, {**out, **more, "lift/tokens": tokens}

  def _pool(self, patches, points, valid):
    P = patches.shape[1]
    M = min(self.capacity, P)
    if self.pool == "none":
      return patches, valid, {}
    if self.pool == "fps":
      chosen = jax.vmap(lambda x, m: farthest_points(x, M, m))(points, valid)
      tokens = jnp.take_along_axis(patches, chosen[..., None], axis=1)
      count = valid.sum(-1, keepdims=True)
      mask = jnp.arange(M)[None] < count
      return tokens, mask, {"lift/chosen": chosen}
    if self.pool != "voxel" or self.overflow not in ("even", "random"):
      raise ValueError(
        f"model.lift has pool={self.pool!r}, overflow={self.overflow!r}; "
        "expected pool voxel, fps or none and overflow even or random"
      )
    keys = None
    if self.overflow == "random":
      has_key = self.has_rng("sample")
      key = self.make_rng("sample") if has_key else jax.random.key(0)
      keys = jax.random.split(key, len(patches))
    if self.bfloat16:
      points = points.astype(jnp.bfloat16)
    found = jax.vmap(
      lambda x, m, k: voxels.assign(x, self.voxel_size, M, m, k)
    )(points, valid, keys)
    tokens, mask = jax.vmap(lambda x, s: voxels.pool(x, s, M))(
      patches, found.slot
    )
    return tokens, mask, {"lift/slot": found.slot, "lift/count": found.count}


def _mean(embed, points, valid, n):
  """Means over the valid ones of n x n points; valid where there is one."""
  B, F, rows, columns = valid.shape
  shape = B, F, rows // n, n, columns // n, n

  def mean(x):
    x = jnp.where(valid[..., None], x, 0).reshape(*shape, -1)
    return x.sum((3, 5)) / jnp.maximum(count, 1)[..., None]

  count = valid.reshape(shape).sum((3, 5))
  return mean(embed), mean(points), count > 0
