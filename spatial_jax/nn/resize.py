# SPDX-License-Identifier: Apache-2.0
"""Resampling of grids of features as the published models do it.

`jax.image.resize` knows neither PyTorch's cubic kernel nor shrinking without a
low-pass filter, and checkpoints depend on both. Sizes are static: every output
is a product with two small constant matrices, one for each axis.

Letters: b any batch, h w input grid, y x output grid, C channels.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from spatial_jax.types import Array, Float


def resize(
  x: Float[Array, "*b h w C"],
  size: tuple[int, int],
  method: str = "bilinear",
  *,
  antialias: bool = False,
  align_corners: bool = False,
  scale: tuple[float, float] | None = None,
) -> Float[Array, "*b y x C"]:
  """Grid of another size, computed in float32, of the input's dtype.

  Follows `torch.nn.functional.interpolate`: values beyond the border repeat it,
  and pixel i covers [i, i + 1] unless `align_corners`.

  Args:
    size: static (y, x).
    method: "bilinear" or "bicubic".
    antialias: widen the kernel when shrinking; the cubic kernel also differs.
    scale: output over input where it isn't the ratio of the sizes, along
      (y, x). Early DINOv2 code samples at (size + 0.1) / input.
  """
  scale = scale or (None, None)
  down, right = (
    weights(old, new, method, antialias, align_corners, ratio)
    for old, new, ratio in zip(x.shape[-3:-1], size, scale, strict=True)
  )
  y = jnp.einsum(
    "yh,...hwc->...ywc", down, x.astype(jnp.float32), precision="highest"
  )
  y = jnp.einsum("xw,...ywc->...yxc", right, y, precision="highest")
  return y.astype(x.dtype)


@functools.cache
def weights(
  old: int,
  new: int,
  method: str = "bilinear",
  antialias: bool = False,
  align_corners: bool = False,
  scale: float | None = None,
) -> np.ndarray:
  """Share of each of `old` samples in each of `new` ones, f32[new old]."""
  if method not in ("bilinear", "bicubic") or (antialias and align_corners):
    raise ValueError(
      f"resize method {method!r} with antialias={antialias} and align_corners="
      f"{align_corners}; use 'bilinear' or 'bicubic', and antialias without "
      "align_corners"
    )
  if align_corners:
    step = (old - 1) / (new - 1) if new > 1 else 0.0
    center = np.arange(new) * step
  else:
    step = old / new if scale is None else 1 / scale
    center = (np.arange(new) + 0.5) * step - 0.5
  if antialias:
    matrix = _wide(center, old, max(step, 1.0), method)
  elif method == "bilinear":
    matrix = _gather(np.maximum(center, 0.0), old, (0, 1), _triangle)
  else:
    # PyTorch's cubic kernel: a = -0.75, but -0.5 with antialiasing.
    cubic = functools.partial(_cubic, a=-0.75)
    matrix = _gather(center, old, (-1, 0, 1, 2), cubic)
  return matrix.astype(np.float32)


def _gather(center, old, taps, kernel):
  """Weights of a few neighbours; those beyond the border are the border."""
  first = np.floor(center)
  rows = np.arange(len(center))
  matrix = np.zeros((len(center), old))
  for tap in taps:
    column = np.clip(first + tap, 0, old - 1).astype(int)
    np.add.at(matrix, (rows, column), kernel(first + tap - center))
  return matrix


def _wide(center, old, step, method):
  """Weights of all samples below a kernel that is `step` times as wide."""
  support = step * (1 if method == "bilinear" else 2)
  column = np.arange(old)
  first = np.maximum((center + 1 - support).astype(int), 0)
  last = np.minimum((center + 1 + support).astype(int), old)
  distance = (column[None] - center[:, None]) / step
  kernel = _triangle if method == "bilinear" else _cubic
  inside = (column >= first[:, None]) & (column < last[:, None])
  matrix = np.where(inside, kernel(distance), 0.0)
  return matrix / matrix.sum(axis=1, keepdims=True)


def _triangle(x):
  return np.maximum(1 - np.abs(x), 0.0)


def _cubic(x, a=-0.5):
  """Keys' cubic convolution kernel."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
