# SPDX-License-Identifier: Apache-2.0
"""Where three things stand on a canvas of visual tokens, for each model.

Stimuli and index sets of arXiv 2603.22278: a square canvas of tokens, on it
three entities in a centred row or column. An index is `row * tokens + column`.
numpy only.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from spatial_jax.types import Int

HORIZONTAL = ("left", "middle", "right")
VERTICAL = ("top", "middle", "bottom")


@dataclasses.dataclass(frozen=True)
class Layout:
  """Sizes are in tokens, but for `pixels`.

  Attributes:
    tokens: side of the canvas.
    pixels: side of a token.
    entity: side of an entity.
    gap: between two entities.
    strips: widths of the bands that tile the canvas; the outer two are equal,
      so that their tokens swap one to one.
    breaks: tokens that end a row in the model's sequence.
  """

  tokens: int
  pixels: int
  entity: int
  gap: int
  strips: tuple[int, int, int]
  breaks: int = 0

  def corners(self, horizontal: bool) -> list[tuple[int, int]]:
    """(row, column) of the first token of each of the three entities."""
    length = 3 * self.entity + 2 * self.gap
    across = (self.tokens - self.entity) // 2
    along = (self.tokens - length) // 2
    along = [along + i * (self.entity + self.gap) for i in range(3)]
    return [(across, x) if horizontal else (x, across) for x in along]

  def slots(self) -> dict[str, Int[np.ndarray, " n"]]:
    """Tokens of each place; both middles are the same."""
    places = dict(zip(VERTICAL, self.corners(False), strict=True))
    places |= dict(zip(HORIZONTAL, self.corners(True), strict=True))
    size = self.entity
    return {
      name: block(self.tokens, row, column, size, size)
      for name, (row, column) in places.items()
    }

  def bands(self, horizontal: bool) -> dict[str, Int[np.ndarray, " n"]]:
    """Strips of columns (left, middle, right), or of rows."""
    names = HORIZONTAL if horizontal else VERTICAL
    starts = np.cumsum((0, *self.strips)).tolist()
    if starts[-1] != self.tokens:
      raise ValueError(
        f"strips {self.strips} add up to {starts[-1]} tokens, not to "
        f"{self.tokens}, the side of the canvas"
      )
    out = {}
    for name, start, width in zip(names, starts[:-1], self.strips, strict=True):
      if horizontal:
        out[name] = block(self.tokens, 0, start, self.tokens, width)
      else:
        out[name] = block(self.tokens, start, 0, width, self.tokens)
    return out

  def background(self, horizontal: bool) -> Int[np.ndarray, " n"]:
    """Tokens of no entity."""
    names = HORIZONTAL if horizontal else VERTICAL
    slots = self.slots()
    taken = np.concatenate([slots[name] for name in names])
    return np.setdiff1d(np.arange(self.tokens**2), taken)


def block(
  columns: int, row: int, column: int, height: int, width: int
) -> Int[np.ndarray, " n"]:
  """Indices of a rectangle of a grid with so many columns, row by row."""
  rows = np.arange(row, row + height)[:, None]
  return (rows * columns + np.arange(column, column + width)[None]).ravel()


# Of the published experiments. Qwen2.5-VL has Qwen2-VL's tokens.
LAYOUTS = {
  "qwen2vl": Layout(12, 28, 2, 2, (4, 4, 4)),
  "gemma3": Layout(16, 56, 3, 3, (5, 6, 5)),
  "pixtral": Layout(15, 16, 2, 2, (5, 5, 5), breaks=1),
}
