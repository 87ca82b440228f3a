# SPDX-License-Identifier: Apache-2.0
"""Cameras as nine numbers, as VGGT and its followers predict them.

An encoding is (t, q, fov): translation t [0:3] and quaternion q = (x, y, z, w)
[3:7] of `camera_from_world`, then the vertical and the horizontal field of view
in radians [7:9], of a camera with the principal point in the image's middle and
no skew. Camera axes are OpenCV's (x right, y down, z forward); the world is the
first camera's frame and has no unit.

Unlike elsewhere in the library, pixel centres are whole numbers here, since the
reference looks through pixel (u, v) along ((u - cx) / fx, (v - cy) / fy, 1).
`to_half_pixel` converts such intrinsics to the library's, whose centres lie at
+0.5. All functions take numpy and jax arrays alike.
"""

from __future__ import annotations

from spatial_jax.geometry import camera
from spatial_jax.types import Array, Float


def quaternion_to_matrix(
  quaternion: Float[Array, "*b 4"],
) -> Float[Array, "*b 3 3"]:
  """Rotation of (x, y, z, w), which need not have unit length."""
  xp = quaternion.__array_namespace__()
  x, y, z, w = (quaternion[..., i] for i in range(4))
  two = 2 / (quaternion * quaternion).sum(-1)
  rows = (
    (1 - two * (y * y + z * z), two * (x * y - z * w), two * (x * z + y * w)),
    (two * (x * y + z * w), 1 - two * (x * x + z * z), two * (y * z - x * w)),
    (two * (x * z - y * w), two * (y * z + x * w), 1 - two * (x * x + y * y)),
  )
  return xp.stack([xp.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_to_quaternion(
  matrix: Float[Array, "*b 3 3"],
) -> Float[Array, "*b 4"]:
  """Unit quaternion (x, y, z, w) of a rotation, with w >= 0.

  Of the four ways to compute it, the one with the largest divisor is taken.
  """
  xp = matrix.__array_namespace__()
  m = [[matrix[..., i, j] for j in range(3)] for i in range(3)]
  # Twice the absolute values of (w, x, y, z).
  signs = ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1))
  squares = xp.stack(
    [1 + a * m[0][0] + b * m[1][1] + c * m[2][2] for a, b, c in signs], axis=-1
  )
  is_positive = squares > 0
  # The root has no gradient at zero.
  size = xp.where(is_positive, xp.where(is_positive, squares, 1.0) ** 0.5, 0.0)
  square = size * size
  p, q, r = m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1]
  s, t, u = m[1][0] + m[0][1], m[0][2] + m[2][0], m[2][1] + m[1][2]
  ways = (
    (square[..., 0], p, q, r),
    (p, square[..., 1], s, t),
    (q, s, square[..., 2], u),
    (r, t, u, square[..., 3]),
  )
  ways = xp.stack([xp.stack(way, axis=-1) for way in ways], axis=-2)
  # 0.1: rows that aren't chosen may not divide by zero.
  ways = ways / (2 * xp.maximum(size, 0.1))[..., None]
  best = xp.argmax(size, axis=-1)[..., None, None]
  wxyz = xp.take_along_axis(ways, best, axis=-2)[..., 0, :]
  wxyz = xp.where(wxyz[..., :1] < 0, -wxyz, wxyz)
  return xp.concatenate([wxyz[..., 1:], wxyz[..., :1]], axis=-1)


def decode(
  encoding: Float[Array, "*b 9"], height: int, width: int
) -> tuple[Float[Array, "*b 4 4"], Float[Array, "*b 3 3"]]:
  """camera_from_world and intrinsics in pixels of an encoding.

  A field of view of zero gives infinite focal lengths, as in the reference.
  """
  xp = encoding.__array_namespace__()
  rotation = quaternion_to_matrix(encoding[..., 3:7])
  top = xp.concatenate([rotation, encoding[..., :3, None]], axis=-1)
  zero = xp.zeros_like(encoding[..., :1])
  one = xp.ones_like(zero)
  last = xp.concatenate([zero, zero, zero, one], axis=-1)[..., None, :]
  fy = height / 2 / xp.tan(encoding[..., 7:8] / 2)
  fx = width / 2 / xp.tan(encoding[..., 8:9] / 2)
  intrinsics = (
    (fx, zero, one * (width / 2)),
    (zero, fy, one * (height / 2)),
    (zero, zero, one),
  )
  rows = [xp.concatenate(row, axis=-1) for row in intrinsics]
  return xp.concatenate([top, last], axis=-2), xp.stack(rows, axis=-2)


def encode(
  camera_from_world: Float[Array, "*b rows 4"],
  intrinsics: Float[Array, "*b 3 3"],
  height: int,
  width: int,
) -> Float[Array, "*b 9"]:
  """Encoding of cameras, 3x4 or 4x4; the principal point is left out."""
  xp = camera_from_world.__array_namespace__()
  fov = [
    2 * xp.arctan(size / 2 / intrinsics[..., axis, axis])
    for axis, size in ((1, height), (0, width))
  ]
  return xp.concatenate(
    [
      camera_from_world[..., :3, 3],
      matrix_to_quaternion(camera_from_world[..., :3, :3]),
      xp.stack(fov, axis=-1),
    ],
    axis=-1,
  )


def to_half_pixel(
  intrinsics: Float[Array, "*b 3 3"],
) -> Float[Array, "*b 3 3"]:
  """Intrinsics for pixel centres at +0.5 from those for whole numbers."""
  xp = intrinsics.__array_namespace__()
  move = [[0.0, 0.0, 0.5], [0.0, 0.0, 0.5], [0.0, 0.0, 0.0]]
  move = xp.asarray(move, dtype=intrinsics.dtype)
  return intrinsics + move.reshape((1,) * (intrinsics.ndim - 2) + (3, 3))


def unproject(
  depth: Float[Array, "*b height width"],
  intrinsics: Float[Array, "*b 3 3"],
  camera_from_world: Float[Array, "*b 4 4"],
) -> Float[Array, "*b height width 3"]:
  """World points of depth images, with pixel centres at whole numbers.

  Depths of 1e-8 and less are no measurement; their points are not either.
  """
  return camera.unproject(
    depth, to_half_pixel(intrinsics), camera.inverse(camera_from_world)
  )
