# SPDX-License-Identifier: Apache-2.0
"""World points of image patches, from depth, intrinsics and pose.

A patch (i, j) of an h x w grid on a height x width image is where its upper
left pixel (floor(i height / h), floor(j width / w)) is: nearest down-sampling
of the map of all pixels' points, of which only these are computed.

Letters: h w patch grid. Sums of products, no matmul: exact float32 everywhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.types import Array, Bool, Float


def patch_points(
  depth: Float[Array, "*b height width"],
  intrinsics: Float[Array, "*b 3 3"],
  world_from_camera: Float[Array, "*b 4 4"],
  grid: tuple[int, int],
  *,
  bfloat16: bool = False,
) -> tuple[Float[Array, "*b h w 3"], Bool[Array, "*b h w"]]:
  """Points in metres, world frame, and where there is one.

  Without depth (0, or no finite number) the point is the camera's centre and
  the mask False; with a pose that isn't finite it is the origin.

  Args:
    depth: z-depth in metres.
    intrinsics: of the depth image, pixel centres at +0.5.
    grid: (h, w).
    bfloat16: round the inputs and each step to it, as LLaVA-3D's scripts do.
      That moves points by centimetres.
  """
  height, width = depth.shape[-2:]
  h, w = grid
  rows, columns = np.arange(h) * height // h, np.arange(w) * width // w

  def near(x):
    x = jnp.asarray(x, jnp.float32)
    return jax.lax.reduce_precision(x, 8, 7) if bfloat16 else x

  z = depth[..., rows[:, None], columns[None, :]]  # [*b h w]
  valid = jnp.isfinite(z) & (z > 0)
  z = near(jnp.where(valid, z, 0))
  ones = (1,) * (depth.ndim - 2)
  u = near(columns).reshape(*ones, 1, w)
  v = near(rows).reshape(*ones, h, 1)
  at = jnp.asarray(intrinsics, jnp.float32)[..., None, None, :, :]
  # Pixels count from 0 here, so the principal point moves instead.
  x, y = (
    near(
      near(near(pixel - near(at[..., i, 2] - 0.5)) * z) / near(at[..., i, i])
    )
    for i, pixel in enumerate((u, v))
  )
  pose = near(world_from_camera)[..., None, None, :, :]
  points = [
    near(row[..., 0] * x + row[..., 1] * y + row[..., 2] * z + row[..., 3])
    for row in (pose[..., i, :] for i in range(3))
  ]
  points = jnp.stack(points, axis=-1)
  finite = jnp.all(jnp.isfinite(points), axis=-1)
  return jnp.where(finite[..., None], points, 0), valid & finite
