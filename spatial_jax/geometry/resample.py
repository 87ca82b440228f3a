# SPDX-License-Identifier: Apache-2.0
"""Weights with which a row of samples becomes one of another length.

They are those of `torch.nn.functional.interpolate`, on which published weights
and processors depend. NumPy only: the host resizes pixels with them, and
`nn.resize` grids of features.
"""

from __future__ import annotations

import functools

import numpy as np

from spatial_jax.types import Array, Float


@functools.cache
def weights(
  old: int,
  new: int,
  method: str = "bilinear",
  antialias: bool = False,
  align_corners: bool = False,
  scale: float | None = None,
) -> Float[Array, "new old"]:
  """Share of each of `old` samples in each of `new` ones; see nn.resize."""
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
  matrix = matrix.astype(np.float32)
  matrix.flags.writeable = False  # the cache hands it out again
  return matrix


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
