# SPDX-License-Identifier: Apache-2.0
"""Pinhole cameras and rigid motions, for numpy and jax arrays alike.

Conventions of the whole library: metres; world z up; camera axes as in OpenCV
(x right, y down, z forward); poses are `dst_from_src`, 4x4; pixel centres lie
at +0.5, so column i covers [i, i+1); depth is z-depth, along the optical axis.

Products with 3x3 matrices are written as sums: exact float32 on every backend,
where a matmul would be rounded to bfloat16 on a TPU. jax isn't imported here.
"""

from __future__ import annotations

import numpy as np

from spatial_jax.types import Array, Float


def intrinsics(
  height: int, width: int, fov_degrees: float
) -> Float[np.ndarray, "3 3"]:
  """Square pixels, centred; `fov_degrees` is the horizontal field of view."""
  focal = width / 2 / np.tan(np.radians(fov_degrees) / 2)
  return np.array(
    [[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float32
  )


def resize_intrinsics(
  intrinsics: Float[Array, "*b 3 3"],
  old: tuple[int, int],
  new: tuple[int, int],
) -> Float[Array, "*b 3 3"]:
  """Intrinsics after resizing images from `old` to `new` (height, width)."""
  xp = intrinsics.__array_namespace__()
  row = [new[1] / old[1], new[0] / old[0], 1.0]
  scale = xp.asarray(row, dtype=intrinsics.dtype)[:, None]
  return intrinsics * scale.reshape((1,) * (intrinsics.ndim - 2) + (3, 1))


def _apply(matrix: Array, points: Array) -> Array:
  """[*b 3 3] on [*b n 3] -> [*b n 3]."""
  return (matrix[..., None, :, :] * points[..., None, :]).sum(-1)


def transform(
  dst_from_src: Float[Array, "*b 4 4"], points: Float[Array, "*b n 3"]
) -> Float[Array, "*b n 3"]:
  """Points of the source frame in the destination frame."""
  turned = _apply(dst_from_src[..., :3, :3], points)
  return turned + dst_from_src[..., None, :3, 3]


def inverse(dst_from_src: Float[Array, "*b 4 4"]) -> Float[Array, "*b 4 4"]:
  """src_from_dst of a rigid motion."""
  xp = dst_from_src.__array_namespace__()
  back = xp.swapaxes(dst_from_src[..., :3, :3], -1, -2)
  move = -(back * dst_from_src[..., None, :3, 3]).sum(-1)
  top = xp.concatenate([back, move[..., None]], axis=-1)
  return xp.concatenate([top, dst_from_src[..., 3:, :]], axis=-2)


def compose(
  c_from_b: Float[Array, "*b 4 4"], b_from_a: Float[Array, "*b 4 4"]
) -> Float[Array, "*b 4 4"]:
  """c_from_a."""
  return (c_from_b[..., :, :, None] * b_from_a[..., None, :, :]).sum(-2)


def level_from_world(
  world_from_camera: Float[Array, "*b 4 4"],
) -> Float[Array, "*b 4 4"]:
  """A frame at the camera: x forward and y left, both level, z up.

  Not a number for a camera that looks straight up or down.
  """
  xp = world_from_camera.__array_namespace__()
  x, y = world_from_camera[..., 0, 2], world_from_camera[..., 1, 2]
  length = xp.sqrt(x * x + y * y)
  x, y = x / length, y / length
  zero, one = xp.zeros_like(x), xp.ones_like(x)
  rows = [x, y, zero, -y, x, zero, zero, zero, one]
  axes = xp.stack(rows, axis=-1).reshape(*x.shape, 3, 3)
  move = -(axes * world_from_camera[..., None, :3, 3]).sum(-1)
  top = xp.concatenate([axes, move[..., None]], axis=-1)
  return xp.concatenate([top, world_from_camera[..., 3:, :]], axis=-2)


def rays(
  intrinsics: Float[Array, "*b 3 3"], height: int, width: int
) -> Float[Array, "*b height width 3"]:
  """Directions in camera axes through all pixel centres, with z = 1.

  A point on a ray is depth * direction: the ray parameter is the z-depth.
  """
  xp = intrinsics.__array_namespace__()
  ones = (1,) * (intrinsics.ndim - 2)
  column = xp.arange(width, dtype=intrinsics.dtype).reshape(*ones, 1, width)
  row = xp.arange(height, dtype=intrinsics.dtype).reshape(*ones, height, 1)
  at = intrinsics[..., None, None, :, :]
  x = (column + 0.5 - at[..., 0, 2]) / at[..., 0, 0]
  y = (row + 0.5 - at[..., 1, 2]) / at[..., 1, 1]
  x, y = xp.broadcast_arrays(x, y)
  return xp.stack([x, y, xp.ones_like(x)], axis=-1)


def unproject(
  depth: Float[Array, "*b height width"],
  intrinsics: Float[Array, "*b 3 3"],
  world_from_camera: Float[Array, "*b 4 4"],
) -> Float[Array, "*b height width 3"]:
  """World points of a depth image."""
  height, width = depth.shape[-2:]
  local = rays(intrinsics, height, width) * depth[..., None]
  flat = local.reshape(*depth.shape[:-2], height * width, 3)
  return transform(world_from_camera, flat).reshape(local.shape)


def project(
  points: Float[Array, "*b n 3"],
  intrinsics: Float[Array, "*b 3 3"],
  world_from_camera: Float[Array, "*b 4 4"],
) -> tuple[Float[Array, "*b n 2"], Float[Array, "*b n"]]:
  """Pixel coordinates (x, y) and z-depth of world points.

  Pixels are meaningful only where the depth is positive.
  """
  xp = points.__array_namespace__()
  local = transform(inverse(world_from_camera), points)
  depth = local[..., 2]
  pixel = _apply(intrinsics, local)[..., :2]
  safe = xp.where(xp.abs(depth) < 1e-9, 1e-9, depth)
  return pixel / safe[..., None], depth


def from_heading(
  position: Float[np.ndarray, "*b 3"],
  heading: np.ndarray | float,
  pitch: np.ndarray | float,
) -> Float[np.ndarray, "*b 4 4"]:
  """world_from_camera of a level camera.

  Args:
    heading: radians [*b], counter-clockwise from +x seen from above.
    pitch: radians [*b], positive looks up.
  """
  cos, sin = np.cos(heading), np.sin(heading)
  up, flat = np.sin(pitch), np.cos(pitch)
  zero = np.zeros_like(cos * flat)
  right = np.stack([sin + zero, -cos + zero, zero], -1)
  forward = np.stack([cos * flat, sin * flat, up + zero], -1)
  return _pose(position, right, forward)


def look_at(
  eye: Float[np.ndarray, "*b 3"], target: Float[np.ndarray, "*b 3"]
) -> Float[np.ndarray, "*b 4 4"]:
  """world_from_camera at `eye`, looking at `target`, level.

  Looking straight up or down, the image's top points to +y or -y.
  """
  ahead = np.asarray(target, np.float64) - eye
  flat = np.hypot(ahead[..., 0], ahead[..., 1])
  heading = np.where(
    flat > 1e-9, np.arctan2(ahead[..., 1], ahead[..., 0]), np.pi / 2
  )
  return from_heading(eye, heading, np.arctan2(ahead[..., 2], flat))


def _pose(position, right, forward) -> np.ndarray:
  rows = np.stack([right, np.cross(forward, right), forward, position], -1)
  last = np.broadcast_to(np.array([0, 0, 0, 1.0]), (*rows.shape[:-2], 1, 4))
  return np.concatenate([rows, last], -2).astype(np.float32)
