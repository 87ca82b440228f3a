# SPDX-License-Identifier: Apache-2.0
"""Images and depth of rooms, rendered inside the jitted step.

scene arrays + cameras -> render -> what an RGB-D camera with known poses would
give: the batch of models that learn geometry. No image is stored anywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from spatial_jax.types import Batch
from spatial_jax.world import render


def make(config) -> Callable[[Batch], Batch]:
  """Pure function batch -> batch; uses `config.data.views` and `.render`.

  Adds images f32[B F h w 3] in 0..1, depth f32[B F h w] in metres and
  depth_mask bool[B F h w]; drops the scene's arrays.
  """
  size = config.data.views.image_size
  shadows = bool(config.data.render.get("shadows", False))

  def photograph(batch: Batch) -> Batch:
    scene = {
      key.removeprefix("scene/"): value
      for key, value in batch.items()
      if key.startswith("scene/")
    }
    view = render.render_batch(
      scene,
      batch["world_from_camera"],
      batch["intrinsics"][:, 0],  # one camera: all frames have the same
      size,
      size,
      shadows=shadows,
    )
    view = jax.lax.stop_gradient(view)
    out = {k: v for k, v in batch.items() if not k.startswith("scene/")}
    depth = view["depth"]
    mask = jnp.isfinite(depth) & (depth > 0)
    return out | {
      "images": view["rgb"],
      "depth": jnp.where(mask, depth, 0.0),
      "depth_mask": mask,
    }

  return photograph
