# SPDX-License-Identifier: Apache-2.0
"""What VGGT learns from: cameras, depth and points, each with confidence.

Paper: https://arxiv.org/abs/2503.11651, with the terms of its published
fine-tuning code. Any RGB-D frames with known cameras serve:
depth, cameras -> truth in the first camera's axes, mean distance 1 -> terms.

Departures from the paper:
1. Means over valid pixels are sums with weights, so that shapes are static.
2. There is no tracking loss: its data isn't published.

Letters: B batch, F frames, S stages (iterations of the camera head).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from spatial_jax.geometry import camera as cameras
from spatial_jax.geometry import pose
from spatial_jax.types import Array, Batch, Bool, Float

STAGE_DISCOUNT = 0.6  # of each stage of the camera head before the last
LARGEST = 100.0  # errors are cut off there: a wild sample moves little
LEAST_PIXELS = 100  # a sample with fewer valid ones teaches nothing
CONFIDENCE_REWARD = 0.2  # alpha: how much a high confidence is worth
SCALES = 4  # of the gradient term: strides 1, 2, 4, 8
FOV_WEIGHT = 0.5


def truth(batch: Batch) -> dict[str, Array]:
  """What the model should say about a batch of frames.

  Args:
    batch: depth f32[B F h w], depth_mask bool[B F h w] (True = valid),
      world_from_camera f32[B F 4 4], intrinsics f32[B F 3 3]; any unit.

  Returns:
    pose_encoding [B F 9], depth [B F h w] and points [B F h w 3] in the first
    camera's axes, divided by `scale` [B], the mean distance of the valid points
    from the first camera; mask bool[B F h w].
  """
  depth, mask = batch["depth"], batch["depth_mask"]
  height, width = depth.shape[-2:]
  world = batch["world_from_camera"]
  first = cameras.inverse(world[:, :1])
  first_from_camera = cameras.compose(
    jnp.broadcast_to(first, world.shape), world
  )
  points = cameras.unproject(
    jnp.where(mask, depth, 0.0), batch["intrinsics"], first_from_camera
  )
  far = jnp.sqrt(jnp.maximum((points**2).sum(-1), 1e-12))
  scale = _mean(far, mask, (1, 2, 3))
  scale = jnp.where(scale > 0, scale, 1.0)
  over = 1 / scale[:, None, None, None]
  camera_from_first = cameras.inverse(first_from_camera)
  move = camera_from_first[..., :3, 3:] * over
  camera_from_first = jnp.concatenate(
    [camera_from_first[..., :3, :3], move], -1
  )
  return {
    "pose_encoding": pose.encode(
      camera_from_first, batch["intrinsics"], height, width
    ),
    "depth": depth * over,
    "points": points * over[..., None],
    "mask": mask,
    "scale": scale,
  }


def camera_loss(
  encodings: Float[Array, "S B F 9"],
  want: Float[Array, "B F 9"],
  used: Bool[Array, " B"],
) -> dict[str, Float[Array, ""]]:
  """L1 of translation, quaternion and field of view, later stages count more.

  Args:
    used: samples that count.
  """
  stages = encodings.shape[0]
  error = jnp.abs(encodings - want[None])
  error = error * used[None, :, None, None]
  share = jnp.maximum(used.sum(), 1) / used.shape[0]
  discount = STAGE_DISCOUNT ** jnp.arange(stages - 1, -1, -1.0) / stages

  def term(part):
    each = part.mean((1, 2, 3)) / share
    return (discount * each).sum()

  terms = {
    "translation": term(jnp.minimum(error[..., :3], LARGEST)),
    "rotation": term(error[..., 3:7]),
    "fov": term(error[..., 7:]),
  }
  terms["camera"] = (
    terms["translation"] + terms["rotation"] + FOV_WEIGHT * terms["fov"]
  )
  return terms


def regression_loss(
  got: Float[Array, "B F h w C"],
  confidence: Float[Array, "B F h w"],
  want: Float[Array, "B F h w C"],
  mask: Bool[Array, "B F h w"],
  quantile: float = 0.0,
) -> dict[str, Float[Array, ""]]:
  """Distance, the same weighted by confidence, and differences of neighbours.

  All are zero when fewer than `LEAST_PIXELS` pixels of the batch are valid.

  Args:
    confidence: at least 1.
    quantile: if not 0, pixels whose error is above it are left out.
  """
  enough = mask.sum() >= LEAST_PIXELS
  away = jnp.where(mask[..., None], got - want, 0.0)
  # The root has no gradient at zero, where invalid pixels are.
  square = (away**2).sum(-1)
  error = jnp.sqrt(jnp.where(square > 0, square, 1.0)) * (square > 0)
  sure = error * confidence - CONFIDENCE_REWARD * jnp.log(confidence)
  terms = {
    "error": _filtered_mean(error, mask, quantile),
    "sure": _filtered_mean(sure, mask, quantile),
    "gradient": gradient_loss(away, mask),
  }
  return {k: jnp.where(enough, v, 0.0) for k, v in terms.items()}


def gradient_loss(
  away: Float[Array, "B F h w C"], mask: Bool[Array, "B F h w"]
) -> Float[Array, ""]:
  """How much the error differs between neighbours, over four strides."""
  total = jnp.float32(0)
  for scale in range(SCALES):
    step = 2**scale
    part, valid = away[:, :, ::step, ::step], mask[:, :, ::step, ::step]
    count = jnp.maximum(valid.sum() * away.shape[-1], 1)
    for axis in (2, 3):
      size = valid.shape[axis]
      here, there = (
        jax.lax.slice_in_dim(valid, a, a + size - 1, axis=axis) for a in (0, 1)
      )
      change = jnp.minimum(jnp.abs(jnp.diff(part, axis=axis)), LARGEST)
      total += (change * (here & there)[..., None]).sum() / count
  return total / SCALES


def _mean(value: Array, mask: Array, axis=None) -> Array:
  return (value * mask).sum(axis) / jnp.maximum(mask.sum(axis), 1)


def _filtered_mean(value: Array, mask: Array, quantile: float) -> Array:
  """Mean over valid values, without the largest if that leaves over 1000."""
  if not quantile:
    return _mean(value, mask)
  value = jnp.minimum(value, LARGEST)
  # Invalid values sort last; the quantile is one of the first `count`.
  order = jnp.sort(jnp.where(mask, jax.lax.stop_gradient(value), jnp.inf), None)
  place = quantile * jnp.maximum(mask.sum() - 1, 0)
  limit = jnp.minimum(order[jnp.round(place).astype(jnp.int32)], LARGEST)
  kept = mask & (value < limit)
  return _mean(value, jnp.where(kept.sum() > 1000, kept, mask))


def compute(
  predictions: Mapping[str, Array],
  want: Mapping[str, Array],
  *,
  camera: float = 1.0,
  depth: float = 1.0,
  points: float = 1.0,
  quantile: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """The weighted sum and its terms, of `Model`'s predictions and `truth`.

  Heads that the model doesn't have are left out.

  Args:
    camera, depth, points: weights of the three parts.
    quantile: see `regression_loss`; the published fine-tuning has 0.98.
  """
  total, terms = jnp.float32(0), {}
  if "pose_encodings" in predictions:
    used = want["mask"][:, 0].sum((1, 2)) > LEAST_PIXELS
    terms = camera_loss(
      predictions["pose_encodings"], want["pose_encoding"], used
    )
    total = camera * terms["camera"]
  for name, weight in (("depth", depth), ("points", points)):
    if name not in predictions:
      continue
    got, goal = predictions[name], want[name]
    if name == "depth":
      got, goal = got[..., None], goal[..., None]
    parts = regression_loss(
      got, predictions[f"{name}_confidence"], goal, want["mask"], quantile
    )
    terms |= {f"{name}/{k}": v for k, v in parts.items()}
    total += weight * sum(parts.values())
  return total, {**terms, "loss": total}


def arguments(batch: Batch) -> dict[str, Array]:
  """What `Model` takes of a batch."""
  return {"images": batch["images"]}


def loss(
  model: Any,
  params: Any,
  batch: Batch,
  *,
  rngs: Any = None,
  train: bool = True,
) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict[str, Any]]]:
  """Weighted loss of a batch of RGB-D frames, (terms, intermediates)."""
  del rngs, train  # nothing is random
  predictions, out = model.apply({"params": params}, **arguments(batch))
  want = jax.lax.stop_gradient(truth(batch))
  value, terms = compute(predictions, want, **dict(model.loss_weights or {}))
  return value, (terms, {**out, **predictions})


def INPUTS(config) -> dict[str, jax.ShapeDtypeStruct]:
  """Static batch: rows of `frames` square RGB-D images."""
  views = config.data.views
  B, F, size = config.batch_size, views.frames, views.image_size

  def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((B, F, *shape), dtype)

  return {
    "images": array(size, size, 3),
    "depth": array(size, size),
    "depth_mask": array(size, size, dtype=jnp.bool_),
    "world_from_camera": array(4, 4),
    "intrinsics": array(3, 3),
  }
