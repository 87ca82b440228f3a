# SPDX-License-Identifier: Apache-2.0
"""What the device sees of a world row: rendered patches and dense geometry.

Runs inside the jitted step, so no image is ever stored or sent to the device.
scene arrays + poses -> render -> patches, and per patch: the category it shows,
the mean point of that object in the frame's axes and in the first camera's. Or
whole images with depth, for models that lift patches to 3D.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from spatial_jax.geometry import camera
from spatial_jax.types import Array, Batch
from spatial_jax.world import render

# CLIP's per-channel statistics, as Qwen2.5-VL's processor uses them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# A patch shows an object that covers this share of it: 6 of 8x8 pixels.
COVER = 6 / 64


def patchify(
  images: Shaped[Array, "B F height width C"], patch: int, merge: int
) -> Shaped[Array, "B N q"]:
  """Qwen order: rows (frame, Y, X, dy, dx), columns (c, py, px)."""
  b, f, height, width, c = images.shape
  h, w = height // (patch * merge), width // (patch * merge)
  x = images.reshape(b, f, h, merge, patch, w, merge, patch, c)
  x = x.transpose(0, 1, 2, 5, 3, 6, 8, 4, 7)  # B F Y X dy dx c py px
  return x.reshape(b, f * h * w * merge * merge, c * patch * patch)


def dense_targets(
  batch: Batch, view: dict[str, Array], patch: int, merge: int
) -> Batch:
  """Per patch, in Qwen order: category (0 = none, else 1 + index) and points.

  Returns:
    `dense/category` i32[B N]; `dense/point` f32[B N 3], metres, level axes of
    the patch's own frame; `dense/room_point` f32[B N 3], those of frame 0.
  """
  category = batch["scene/object_category"]  # B O
  number = category.shape[-1]
  ids = patchify(view["object"][..., None], patch, merge)  # B N q
  points = patchify(view["point"], patch, merge)
  b, n, q = ids.shape
  points = points.reshape(b, n, 3, q)
  hits = jax.nn.one_hot(ids, number, dtype=jnp.float32)  # B N q O; -1 -> none
  count = hits.sum(2)
  most = count.argmax(-1)
  shown = count.max(-1) >= COVER * q
  member = jnp.where(shown[..., None], ids == most[..., None], True)
  weight = member / member.sum(-1, keepdims=True)
  mean = jnp.einsum("bnq,bncq->bnc", weight, points)  # world
  kind = jnp.take_along_axis(category, most, 1)
  pose = batch["world_from_camera"]  # B F 4 4
  level = camera.level_from_world(pose)
  frame = jnp.arange(n) // (n // pose.shape[1])
  own = camera.transform(level[:, frame], mean[:, :, None])[:, :, 0]
  room = camera.transform(level[:, 0], mean)
  return {
    "dense/category": jnp.where(shown, 1 + kind, 0),
    "dense/point": own,
    "dense/room_point": room,
  }


def make(config) -> Callable[[Batch], Batch]:
  """Pure function batch -> batch; uses `config.data.world` and `.render`.

  Adds patches f32[B N C], or with `render.depth` images f32[B F h w 3], depth
  f32[B F h w] in metres, and intrinsics of every frame f32[B F 3 3]; with
  `render.frames` frames f32[B F h w 3] in [0, 1] instead of patches or images.
  """
  world = config.data.world
  size, patch, merge = world.image_size, world.patch_size, world.merge_size
  dense = bool(config.data.render.get("dense", False))
  shadows = bool(config.data.render.get("shadows", False))
  with_depth = bool(config.data.render.get("depth", False))
  with_frames = bool(config.data.render.get("frames", False))

  def observe(batch: Batch) -> Batch:
    scene = {
      key.removeprefix("scene/"): value
      for key, value in batch.items()
      if key.startswith("scene/")
    }
    view = render.render_batch(
      scene,
      batch["world_from_camera"],
      batch["intrinsics"],
      size,
      size,
      shadows=shadows,
    )
    view = jax.lax.stop_gradient(view)
    image = (view["rgb"] - jnp.array(MEAN).reshape(1, 1, 1, 1, 3)) / jnp.array(
      STD
    ).reshape(1, 1, 1, 1, 3)
    out = {k: v for k, v in batch.items() if not k.startswith("scene/")}
    if with_depth:
      shape = (*image.shape[:2], 3, 3)
      each = batch["intrinsics"][:, None]
      out["intrinsics"] = jnp.broadcast_to(each, shape)
      out["depth"] = view["depth"]
    if with_frames:
      out["frames"] = view["rgb"]
    elif with_depth:
      out["images"] = image
    else:
      out["patches"] = patchify(image, patch, merge)
    if dense:
      out |= dense_targets(batch, view, patch, merge)
    return out

  return observe
