# SPDX-License-Identifier: Apache-2.0
"""Frames of a video that show most of a scene: greedy maximum coverage.

points of all frames -> those of good confidence -> cubic voxels -> the frame
with the most voxels that no chosen frame has seen, again and again. How
Spatial-MLLM picks 16 of 128 candidates (https://arxiv.org/abs/2505.23747), with
the points that VGGT predicts; any points in one frame of reference will do.

numpy only. Letters: F frames, N voxels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from spatial_jax.types import Array, Bool, Float, Int


class Voxels(NamedTuple):
  """Which points count and which voxel each of them is in."""

  mask: Bool[Array, "F height width"]  # True for points that count
  threshold: float  # of the confidence
  origin: Float[Array, " 3"]  # corner of voxel (0, 0, 0), in the points' unit
  size: float  # edge of a voxel
  seen: Bool[Array, "F N"]  # voxels that each frame shows


def voxels(
  points: Float[Array, "F height width 3"],
  confidence: Float[Array, "F height width"],
  *,
  percentile: float = 50.0,
  least: float = 0.1,
  divisions: int = 20,
) -> Voxels:
  """Voxels seen by each frame.

  Args:
    points: in one frame of reference, any unit.
    percentile: of the confidence of all points; less than that doesn't count.
    least: confidence that is always asked for, exceeded.
    divisions: voxels along the shortest side of the points' bounding box.

  Raises:
    ValueError: no point counts, or they all lie in a plane.
  """
  points = np.asarray(points, np.float32)
  confidence = np.asarray(confidence, np.float32)
  threshold = np.percentile(confidence, percentile)
  mask = (confidence >= threshold) & (confidence > least)
  if not mask.any():
    raise ValueError(
      f"no point has a confidence above {least}: the highest is "
      f"{confidence.max()}"
    )
  kept = points[mask]
  origin = kept.min(axis=0)
  size = (kept.max(axis=0) - origin).min() / np.float32(divisions)
  if not size > 0:  # nan included
    raise ValueError(
      "the points that count lie in a plane along an axis or are not finite, "
      "so they have no voxels"
    )
  index = np.floor((kept - origin[None]) / size).astype(np.int64)
  # Numbered in three steps rather than by one product: no extent overflows.
  _, number = np.unique(index, axis=0, return_inverse=True)
  number = number.reshape(-1)
  seen = np.zeros((len(points), number.max() + 1), bool)
  seen[np.nonzero(mask)[0], number] = True
  return Voxels(mask, float(threshold), origin, float(size), seen)


def greedy(
  seen: Bool[Array, "F N"], count: int
) -> tuple[Int[Array, " K"], Int[Array, " K"]]:
  """Up to `count` frames in the order they are chosen, and what each adds.

  Of frames that add equally many voxels the first is taken. Frames that add
  none are not chosen, so that there may be fewer than `count`.

  Args:
    seen: voxels that each frame shows.
  """
  left = np.array(seen, bool)
  chosen, gains = [], []
  for _ in range(min(count, len(left))):
    gain = left.sum(axis=1)
    best = int(np.argmax(gain))
    if gain[best] == 0:
      break
    chosen.append(best)
    gains.append(int(gain[best]))
    left &= ~left[best][None]
  return np.array(chosen, np.int64), np.array(gains, np.int64)


def choose(
  points: Float[Array, "F height width 3"],
  confidence: Float[Array, "F height width"],
  count: int = 16,
) -> Int[Array, " K"]:
  """Indices of up to `count` frames that together show most, ascending."""
  return np.sort(greedy(voxels(points, confidence).seen, count)[0])


def candidates(frames: int, count: int = 128) -> Int[Array, " K"]:
  """Indices of evenly spread frames among which to choose, cut to integers."""
  return np.linspace(0, frames - 1, min(count, frames), dtype=np.int64)
