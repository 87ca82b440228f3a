# SPDX-License-Identifier: Apache-2.0
"""Positions (t, h, w) of the tokens of a row, for M-RoPE. NumPy only.

Text tokens have three equal positions that count up. A block of image or video
tokens starts where the text stopped: t counts frames (times their distance),
h and w the merge grid. The text after it starts behind the block's end.

Two published conventions for where the end is:
* "max": after the largest position of the block on any axis (transformers
  4.51, with which the published models were trained);
* "grid": after the larger side of the merge grid (transformers 5.x), so that
  the times of a long video overlap the text after it.

Two for the distance of frames in a video: `second_per_grid *
tokens_per_second`, rounded down. Spatial-MLLM trains with 0.5 s (step 1) and is
evaluated with 1.0 s (step 2).

Letters: T length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spatial_jax.types import Array, Bool, Int

Grid = Sequence[int]  # frames, h, w in patches


def block(
  grid: Grid, *, merge: int = 2, step: float = 0.0
) -> Int[Array, "3 M"]:
  """Positions of one image or video, starting at 0.

  Args:
    step: distance of two temporal patches; t is rounded down.
  """
  frames, h, w = grid[0], grid[1] // merge, grid[2] // merge
  t = np.floor(np.arange(frames, dtype=np.float32) * np.float32(step))
  ids = np.stack(np.meshgrid(t, np.arange(h), np.arange(w), indexing="ij"))
  return ids.reshape(3, -1).astype(np.int32)


def mrope(
  tokens: Int[Array, " T"],
  grids: Sequence[Grid] = (),
  *,
  image_token: int = 151655,
  video_token: int = 151656,
  merge: int = 2,
  second_per_grid: Sequence[float] | float = 1.0,
  tokens_per_second: float = 2.0,
  valid_mask: Bool[Array, " T"] | None = None,
  segments: Int[Array, " T"] | None = None,
  shared: Bool[Array, " T"] | None = None,
  block_end: str = "max",
  pad_position: int = 1,
) -> tuple[Int[Array, "3 T"], int]:
  """Positions of a row, and how far its next position is from its length.

  Args:
    grids: of all images and videos of the row, in order.
    second_per_grid: seconds between temporal patches, for each video or all.
    valid_mask: True for tokens, False for padding on either side.
    segments: each segment of a packed row starts at 0 again; 0 is padding.
    shared: tokens that all segments see; segments continue behind them.
    block_end: "max" or "grid"; see the module docstring.
    pad_position: of padding.

  Returns:
    positions, and `max + 1 - number of tokens`: a decoder's next position is
    the number of tokens so far plus this.
  """
  tokens = np.asarray(tokens)
  T = tokens.shape[0]
  if segments is None:
    segments = np.ones(T) if valid_mask is None else np.asarray(valid_mask)
  segments = np.asarray(segments, np.int32)
  positions = np.full((3, T), pad_position, np.int32)
  media = _Media(
    tokens,
    grids,
    (image_token, video_token),
    merge,
    second_per_grid,
    tokens_per_second,
    block_end,
  )
  start = 0
  if shared is not None and np.any(shared):
    index = np.flatnonzero(np.asarray(shared) & (segments > 0))
    positions[:, index], start = media.walk(index, 0)
  else:
    shared = np.zeros(T, bool)
  end = start
  # Segments in the order in which they appear, as the grids are.
  own = np.where(shared, 0, segments)
  for segment in dict.fromkeys(own[own > 0].tolist()):
    index = np.flatnonzero(own == segment)
    positions[:, index], end = media.walk(index, start)
  media.finish()
  return positions, int(end - np.count_nonzero(segments))


class _Media:
  """Hands out the grids of a row in order."""

  def __init__(
    self, tokens, grids, ids, merge, second_per_grid, tokens_per_second, end
  ):
    if end not in ("max", "grid"):
      raise ValueError(f"block_end={end!r}; expected 'max' or 'grid'")
    self.tokens = tokens
    self.grids = [tuple(int(n) for n in grid) for grid in grids]
    self.image, self.video = ids
    self.merge = merge
    self.seconds = second_per_grid
    self.per_second = tokens_per_second
    self.end = end
    self.used = self.videos = 0

  def walk(self, index, start):
    """Positions of the tokens at `index`, and the first one after them."""
    parts, i = [], 0
    tokens = self.tokens[index]
    is_media = (tokens == self.image) | (tokens == self.video)
    while i < len(tokens):
      if not is_media[i]:
        stop = i + 1
        while stop < len(tokens) and not is_media[stop]:
          stop += 1
        text = np.arange(start, start + stop - i, dtype=np.int32)
        parts.append(np.broadcast_to(text, (3, stop - i)))
        start, i = start + stop - i, stop
        continue
      ids, size = self._next(tokens[i] == self.video)
      stop = i + ids.shape[1]
      if stop > len(tokens) or not np.all(tokens[i:stop] == tokens[i]):
        raise ValueError(
          f"grid {self.grids[self.used - 1]} needs {ids.shape[1]} image tokens "
          f"in a row, but there are fewer from token {int(index[i])} on"
        )
      parts.append(ids + start)
      start, i = start + size, stop
    return np.concatenate(parts, axis=1), start

  def _next(self, is_video):
    if self.used == len(self.grids):
      raise ValueError(
        f"the row has image tokens for more than its {len(self.grids)} grids"
      )
    grid = self.grids[self.used]
    self.used += 1
    step = 0.0
    if is_video:
      seconds = self.seconds
      if not np.isscalar(seconds):
        seconds = seconds[self.videos]
      self.videos += 1
      step = float(np.float32(seconds) * np.float32(self.per_second))
    ids = block(grid, merge=self.merge, step=step)
    sides = max(grid[1], grid[2]) // self.merge
    return ids, int(ids.max()) + 1 if self.end == "max" else sides

  def finish(self):
    if self.used != len(self.grids):
      raise ValueError(
        f"the row has {len(self.grids)} grids, but image tokens for only "
        f"{self.used} of them"
      )
