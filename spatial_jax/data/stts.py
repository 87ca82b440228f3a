# SPDX-License-Identifier: Apache-2.0
"""What pruning leaves of a row, as far as it is known before any score.

How many tokens each video loses follows from its length alone, so that rows of
the decoder have known lengths. NumPy only.

Letters: F frames, T length, K length after pruning.
"""

from __future__ import annotations

import numpy as np

from spatial_jax.types import Array, Bool, Int


def budget(frames: int, groups: int, drop: float) -> int:
  """How many tokens a video loses.

  Args:
    groups: tokens of a frame.
    drop: share to lose. The first frame counts, although it stays.
  """
  # In this order, as published: the product is rounded each time.
  return int(groups * drop * frames)


def kept_mask(
  segments: Int[Array, " T"],
  videos: Int[Array, " F"],
  *,
  groups: int,
  drop: float,
  length: int,
) -> Bool[Array, " K"]:
  """True for the slots that a row takes of `length` after pruning.

  Args:
    segments: of the row before it; 0 is padding, at the end.
    videos: number of each frame's video, see `nn.pruning`.

  Raises:
    ValueError: the row doesn't fit.
  """
  numbers, frames = np.unique(
    videos[np.asarray(videos) > 0], return_counts=True
  )
  lost = sum(budget(int(count), groups, drop) for count in frames)
  left = int(np.count_nonzero(segments)) - lost
  if left > length:
    raise ValueError(
      f"a row has {left} tokens after its {len(numbers)} videos have lost "
      f"{lost}, more than the {length} of config.data.kept; take a longer "
      "bucket"
    )
  return np.arange(length) < left
