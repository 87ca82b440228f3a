# SPDX-License-Identifier: Apache-2.0
"""Videos to what Molmo2 reads: frames and the patches that each token pools.

Paper: https://arxiv.org/abs/2601.10611. NumPy only.
"""

from __future__ import annotations

import numpy as np

from spatial_jax.data.images import normalize
from spatial_jax.types import Array, Float, Int, UInt8


def frames(
  video: UInt8[Array, "F height width 3"], side: int = 378
) -> Float[Array, "F side side 3"]:
  """Frames of a video as the vision tower takes them; see `stretch`."""
  return normalize(stretch(video, side))


def stretch(
  video: UInt8[Array, "F height width 3"], side: int = 378
) -> UInt8[Array, "F side side 3"]:
  """Frames stretched to a square, bilinear, no antialiasing."""
  height, width = video.shape[1:3]
  above, below, down = _neighbours(height, side)
  left, right, across = _neighbours(width, side)
  down, across = down[:, None, None], across[:, None]

  def row(index):
    pixels = video[:, index].astype(np.float32)
    return pixels[:, :, left] * (1 - across) + pixels[:, :, right] * across

  pixels = row(above) * (1 - down) + row(below) * down
  return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def _neighbours(old, new):
  """Two old samples around each new one, and the share of the second."""
  center = (np.arange(new, dtype=np.float32) + 0.5) * np.float32(old / new)
  center = np.clip(center - 0.5, 0, old - 1, dtype=np.float32)
  first = center.astype(int)
  return first, np.minimum(first + 1, old - 1), center - first.astype("f")


def pooling(count: int, h: int, w: int, pool: int = 3) -> Int[Array, "Q S"]:
  """Patches that each token pools, -1 where there is none.

  Tokens run frame by frame, row by row; patches are numbered through all
  frames. A grid that `pool` doesn't divide is padded on all sides, the larger
  rest at the end.
  """
  down, right = -h % pool, -w % pool
  grid = np.arange(count * h * w, dtype=np.int32).reshape(count, h, w)
  sides = [(0, 0), *((rest // 2, (rest + 1) // 2) for rest in (down, right))]
  grid = np.pad(grid, sides, constant_values=-1)
  rows, columns = grid.shape[1] // pool, grid.shape[2] // pool
  grid = grid.reshape(count, rows, pool, columns, pool)
  return grid.swapaxes(2, 3).reshape(-1, pool * pool)
