# SPDX-License-Identifier: Apache-2.0
"""Depth, cameras and points of rooms never seen, beside what knows nothing.

Each room is its own unit of length: truth is divided by the mean distance of
its points from the first camera. The same numbers are given for the model with
untrained weights and for a constant: the mean depth and point maps of training
rooms, and the better of the mean rotation and none at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from spatial_jax import system as systems
from spatial_jax.data import pipeline, workers
from spatial_jax.geometry import camera, pose
from spatial_jax.models import vggt_loss
from spatial_jax.types import Array, Float

Arrays = dict[str, np.ndarray]


def angle_degrees(
  a: Float[Array, "*b 3 3"], b: Float[Array, "*b 3 3"]
) -> Float[np.ndarray, "*b"]:
  """Angle of the rotation that takes one to the other."""
  # From the distance of the matrices: an arc cosine has no digits near zero.
  chord = np.linalg.norm(np.asarray(a, np.float64) - b, axis=(-2, -1))
  return np.degrees(2 * np.arcsin(np.clip(chord / np.sqrt(8), 0, 1)))


def relative(
  world_from_camera: Float[Array, "*b F 4 4"],
) -> Float[np.ndarray, "*b P 3 3"]:
  """Rotations between all pairs of views, the later from the earlier."""
  turn = np.asarray(world_from_camera, np.float64)[..., :3, :3]
  pairs = np.array(list(itertools.combinations(range(turn.shape[-3]), 2)))
  first, second = turn[..., pairs[:, 0], :, :], turn[..., pairs[:, 1], :, :]
  return np.swapaxes(second, -1, -2) @ first


def nearest_rotation(
  matrix: Float[Array, "*b 3 3"],
) -> Float[np.ndarray, "*b 3 3"]:
  """The rotation nearest to a matrix; of a mean, the mean rotation."""
  left, _, right = np.linalg.svd(np.asarray(matrix, np.float64))
  sign = np.ones(left.shape[:-1])
  sign[..., 2] = np.linalg.det(left @ right)
  return (left * sign[..., None, :]) @ right


def depth_errors(
  got: Float[Array, "n F h w"],
  want: Float[Array, "n F h w"],
  mask: Array,
) -> dict[str, np.ndarray]:
  """Mean |got - want| / want of each row, as it is and with medians equal."""
  out: dict[str, list] = {"absrel": [], "absrel_aligned": []}
  for a, b, valid in zip(got, want, mask, strict=True):
    a, b = (np.asarray(x, np.float64)[valid] for x in (a, b))
    scale = np.median(b) / max(np.median(a), 1e-9)
    out["absrel"].append(np.mean(np.abs(a - b) / b))
    out["absrel_aligned"].append(np.mean(np.abs(scale * a - b) / b))
  return {k: np.array(v) for k, v in out.items()}


def errors(got: Mapping[str, Array], want: Mapping[str, Array]) -> Arrays:
  """Per row: depth, rotation (degrees), centre and points (mean distances).

  Args:
    got, want: depth [n F h w], points [n F h w 3], world_from_camera
      [n F 4 4], all in the first camera's axes; `want` also has mask.
  """
  mask = want["mask"]
  far = np.linalg.norm(got["points"] - want["points"], axis=-1)
  center = (
    got["world_from_camera"][..., :3, 3] - want["world_from_camera"][..., :3, 3]
  )
  turn = angle_degrees(
    relative(got["world_from_camera"]), relative(want["world_from_camera"])
  )
  return {
    **depth_errors(got["depth"], want["depth"], mask),
    "rotation_degrees": turn.mean(-1),
    "center": np.linalg.norm(center[:, 1:], axis=-1).mean(-1),
    "points": (far * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)),
  }


def constants(truths: Arrays) -> Arrays:
  """What to say without looking: means over the rows of a training split."""
  mask = truths["mask"][..., None]
  count = np.maximum(mask.sum(0), 1)
  points = (truths["points"] * mask).sum(0) / count
  depth = (truths["depth"][..., None] * mask).sum(0) / count
  turns = relative(truths["world_from_camera"])
  return {
    "depth": depth[..., 0],
    "points": points,
    "turns": nearest_rotation(turns.mean(0)),
    "center": truths["world_from_camera"][..., :3, 3].mean(0),
  }


def constant_errors(constant: Arrays, want: Arrays) -> Arrays:
  """`errors` of the same answer for every row."""
  rows = len(want["depth"])
  poses = np.tile(np.eye(4), (rows, want["depth"].shape[1], 1, 1))
  poses[..., :3, 3] = constant["center"]
  every = {
    k: np.broadcast_to(constant[k], (rows, *constant[k].shape))
    for k in ("depth", "points")
  }
  out = errors({**every, "world_from_camera": poses}, want)
  # No rotation is what these poses say; the mean one may be better.
  turns = relative(want["world_from_camera"])
  mean = angle_degrees(np.broadcast_to(constant["turns"], turns.shape), turns)
  if mean.mean() < out["rotation_degrees"].mean():
    out["rotation_degrees"] = mean.mean(-1)
  return out


def answer(predictions: Mapping[str, Array], truth: bool = False) -> Arrays:
  """Predictions (or `vggt_loss.truth`) as `errors` takes them, on the host."""
  height, width = predictions["depth"].shape[-2:]
  camera_from_world, intrinsics = pose.decode(
    predictions["pose_encoding"], height, width
  )
  back = camera.inverse(camera_from_world)
  out = {
    "depth": predictions["depth"],
    "points": predictions["points"],
    "world_from_camera": back,
    "intrinsics": intrinsics,
    "fused": camera.unproject(predictions["depth"], intrinsics, back),
  }
  names = (
    ("mask", "scale")
    if truth
    else (
      "depth_confidence",
      "points_confidence",
    )
  )
  return {k: np.asarray(v) for k, v in out.items()} | {
    k: np.asarray(predictions[k]) for k in names
  }


def look(
  config: Any, split: str, rooms: int, batch_size: int, see: Any
) -> tuple[Arrays, ...]:
  """`see(batch)` of the first rooms of a split: trees of arrays, joined."""
  source = workers.make(config, split)
  found = []
  for first in range(0, rooms, batch_size):
    last = min(first + batch_size, rooms)
    rows = [source[i] for i in range(first, last)]
    rows += [rows[-1]] * (batch_size - len(rows))  # static shape
    batch = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
    got = see(batch)
    found.append(jax.tree.map(lambda x, n=last - first: x[:n], got))
  return jax.tree.map(lambda *x: np.concatenate(x), *found)


def evaluate(
  config: Any,
  model: Any,
  mod: Any,
  params: Any,
  mesh: Any,
  *,
  split: str = "test",
  rooms: int = 128,
  batch_size: int = 16,
  constant_rooms: int = 512,
) -> dict[str, Any]:
  """Mean errors of the model, of untrained weights and of a constant.

  `ratio` is the model's error over the smaller of the other two.
  """
  del mesh
  config = config.copy_and_resolve_references()
  config.batch_size = batch_size
  # `model` and `mod` again, with untrained weights and the renderer.
  system = systems.build(config, pipeline.example(config), batch_size)
  observe = jax.jit(system.transform)
  truth = jax.jit(vggt_loss.truth)
  forward = jax.jit(
    lambda p, x: model.apply({"params": p}, **mod.arguments(x))[0]
  )
  fresh = systems.once(system.init)(jax.random.key(config.seed))
  weights = {"model": params, "untrained": systems.drop_auxiliary(fresh)}

  def see(batch):
    batch = observe(batch)
    got = {k: answer(forward(p, batch)) for k, p in weights.items()}
    return {**got, "truth": answer(truth(batch), truth=True)}

  seen = look(config, split, rooms, batch_size, see)
  want = seen.pop("truth")
  known = look(
    config,
    "train",
    constant_rooms,
    batch_size,
    lambda batch: answer(truth(observe(batch)), truth=True),
  )
  scores = {
    name: errors(got, want)
    | {"fused": errors({**got, "points": got["fused"]}, want)["points"]}
    for name, got in seen.items()
  }
  scores["constant"] = constant_errors(constants(known), want)
  table = {
    name: {k: float(v.mean()) for k, v in row.items()}
    for name, row in scores.items()
  }
  table["ratio"] = {
    k: v / min(table[n][k] for n in ("untrained", "constant") if k in table[n])
    for k, v in table["model"].items()
  }
  return table
