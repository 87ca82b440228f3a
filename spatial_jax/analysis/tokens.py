# SPDX-License-Identifier: Apache-2.0
"""Grid of visual tokens <-> places in the sequence <-> boxes in the image.

A map knows where in a row the tokens of each frame stand. Index sets are flat
over all frames: `(frame * rows + row) * columns + column`.

    map = tokens.qwen(ids, (1, 24, 24))     # from the prompt's ids
    map = tokens.gemma3(ids)
    map.at(map.box((x0, y0, x1, y1), (width, height)))  # places in the sequence

numpy only.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from spatial_jax.types import Array, Bool, Int

EDGE = 1e-3  # pixels: a box that ends at a token's border isn't in the next one


@dataclasses.dataclass(frozen=True)
class TokenMap:
  """Places of a grid of visual tokens in a row.

  Attributes:
    positions: of each token in the row.
    merge: side of the group of patches that became one token. Boxes are taken
      to patches first, as the processors of Qwen's family cut images.
  """

  positions: Int[np.ndarray, "F h w"]
  merge: int = 1

  @property
  def grid(self) -> tuple[int, int, int]:
    """Frames, rows and columns, in tokens."""
    return self.positions.shape

  def at(self, index: Int[Array, "*n"]) -> Int[np.ndarray, "*n"]:
    """Places in the row of flat grid indices."""
    return self.positions.reshape(-1)[np.asarray(index)]

  def mask(
    self, index: Int[Array, " n"], length: int
  ) -> Bool[np.ndarray, " T"]:
    """True at these tokens' places, in a row of so many."""
    out = np.zeros(length, bool)
    out[self.at(index)] = True
    return out

  def flat(
    self, frame: int, rows: Iterable[int], columns: Iterable[int]
  ) -> Int[np.ndarray, " n"]:
    """Indices of all crossings of these rows and columns of a frame."""
    _, height, width = self.grid
    rows = np.asarray(list(rows), int)[:, None] + frame * height
    return (rows * width + np.asarray(list(columns), int)[None]).ravel()

  def box(
    self,
    box: Sequence[float],
    size: tuple[float, float],
    frame: int = 0,
  ) -> Int[np.ndarray, " n"]:
    """Tokens that a box touches.

    Args:
      box: (x0, y0, x1, y1) in pixels of the image as it was before resizing.
      size: its (width, height).
    """
    _, height, width = self.grid
    x = _span(box[0], box[2], size[0], width, self.merge)
    y = _span(box[1], box[3], size[1], height, self.merge)
    return self.flat(frame, y, x)

  def strips(
    self, widths: Sequence[int], horizontal: bool = True, frame: int = 0
  ) -> list[Int[np.ndarray, " n"]]:
    """Bands of columns (of rows if not horizontal) that tile a frame."""
    _, height, width = self.grid
    side = width if horizontal else height
    if sum(widths) != side:
      raise ValueError(
        f"strips of {list(widths)} tokens add up to {sum(widths)}, not to "
        f"{side}, the frame's side"
      )
    ends = np.cumsum([0, *widths])
    bands = [range(a, b) for a, b in itertools.pairwise(ends)]
    if horizontal:
      return [self.flat(frame, range(height), band) for band in bands]
    return [self.flat(frame, band, range(width)) for band in bands]

  def background(
    self, *taken: Int[Array, " n"], frame: int | None = None
  ) -> Int[np.ndarray, " n"]:
    """Tokens of a frame (of all if None) that are in none of these sets."""
    frames, height, width = self.grid
    every = np.arange(frames * height * width).reshape(frames, -1)
    every = every.ravel() if frame is None else every[frame]
    return np.setdiff1d(every, np.concatenate([np.zeros(0, int), *taken]))

  def mirror(self, frame: int | None = None) -> Int[np.ndarray, " n"]:
    """Index of each token's image in a mirror, of one frame or of all."""
    frames, height, width = self.grid
    every = np.arange(frames * height * width).reshape(self.grid)[..., ::-1]
    return every.ravel() if frame is None else every[frame].ravel()


def _span(low, high, pixels, tokens, merge) -> range:
  """Tokens of one axis from a box's edges, by way of patches."""
  patches = tokens * merge
  first = int(low * patches / pixels)
  last = int((high - EDGE) * patches / pixels)
  first, last = (min(max(x, 0), patches - 1) // merge for x in (first, last))
  return range(first, max(first, last) + 1)


def contiguous(
  start: int, grid: tuple[int, int, int], merge: int = 1, breaks: int = 0
) -> TokenMap:
  """Tokens in a line from `start`, with `breaks` others after each row."""
  frames, height, width = grid
  line = np.arange(frames * height)[:, None] * (width + breaks)
  places = start + line + np.arange(width)[None]
  return TokenMap(places.reshape(grid), merge)


def of_ids(
  ids: Int[Array, " T"],
  token: int | Sequence[int],
  grid: tuple[int, int, int],
  merge: int = 1,
  breaks: int = 0,
) -> TokenMap:
  """Map of the first image or video of a row.

  Args:
    ids: the row's tokens, with one image token for each visual token.
    token: id, or ids, of image tokens.
    grid: frames, rows and columns, in tokens.

  Raises:
    ValueError: the row has no such token, or another number of them.
  """
  is_image = np.isin(np.asarray(ids), token)
  if not is_image.any():
    raise ValueError(f"no image token ({token}) in a row of {len(ids)} tokens")
  out = contiguous(int(is_image.argmax()), grid, merge, breaks)
  last = int(out.positions.max())
  if last >= len(is_image) or not is_image[out.positions].all():
    raise ValueError(
      f"a grid of {grid} tokens from place {out.positions.min()} on meets "
      "tokens that stand for no image; is the grid that of the processor?"
    )
  return out


def qwen(
  ids: Int[Array, " T"],
  grid_thw: tuple[int, int, int],
  merge: int = 2,
  token: int | Sequence[int] = (151655, 151656),
) -> TokenMap:
  """Qwen2-VL, Qwen2.5-VL and Spatial-MLLM; the grid counts patches."""
  frames, height, width = grid_thw
  return of_ids(ids, token, (frames, height // merge, width // merge), merge)


def gemma3(ids: Int[Array, " T"], side: int = 16, token: int = 262144):
  """Gemma-3: always a square of tokens, whatever the image's shape."""
  return of_ids(ids, token, (1, side, side))


def llava_3d(
  ids: Int[Array, " T"], frames: int, side: int = 24, token: int = -200
) -> TokenMap:
  """LLaVA-3D where each patch is a token: 2D images, and `lift.pool="none"`.

  Where patches are pooled by voxel no token belongs to one frame: see `voxels`.
  """
  return of_ids(ids, token, (frames, side, side))


def voxels(
  slots: Int[Array, " P"], wanted: Int[Array, " n"]
) -> Int[np.ndarray, " m"]:
  """Voxel tokens that hold any of these patches, each once.

  Args:
    slots: token of each patch; -1: none.
    wanted: indices of patches, flat over frames.
  """
  found = np.asarray(slots)[np.asarray(wanted)]
  return np.unique(found[found >= 0])
