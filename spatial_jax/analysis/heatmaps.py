# SPDX-License-Identifier: Apache-2.0
"""What a probe says at every visual token, drawn over the image.

Blue where it says the first word of its axis, red where the second; pale where
it can't tell. Boxes are the two things that are asked about.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from spatial_jax.analysis.rooms import Pair
from spatial_jax.drawing import INK, MUTED, enlarge, to_uint8
from spatial_jax.types import Array, Float, UInt8

COLD, HOT = np.array([33, 102, 172.0]), np.array([178, 24, 43.0])
SIDE, GAP, LEFT = 190, 10, 120  # pixels


def colors(p: Float[Array, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
  """Probability of the second class: 0 blue, 0.5 white, 1 red."""
  p = np.clip(np.asarray(p, float), 0, 1)[..., None]
  cold = COLD + (255 - COLD) * np.minimum(2 * p, 1)
  hot = HOT + (255 - HOT) * np.minimum(2 - 2 * p, 1)
  return np.where(p < 0.5, cold, hot).astype(np.uint8)


def overlay(
  image: Array, p: Float[Array, "h w"], opacity: float = 0.55
) -> Image.Image:
  """A frame under a map of its tokens."""
  frame = Image.fromarray(enlarge(to_uint8(image), SIDE)).resize((SIDE, SIDE))
  tint = Image.fromarray(colors(p)).resize((SIDE, SIDE), Image.NEAREST)
  return Image.blend(frame.convert("L").convert("RGB"), tint, opacity)


def sheet(
  frames: Sequence[Array],
  items: Sequence[Pair],
  maps: dict[str, Float[Array, "B h w"]],
  mean: dict[str, Float[Array, "h w"]],
  words: tuple[str, str],
  pixels: int,
) -> Image.Image:
  """Frames side by side, a row for each slot, the mean over rooms at the end.

  Args:
    frames: of the items, colours in 0..1.
    maps: name of a slot -> probabilities of the second word.
    mean: likewise, over all held-out items.
    words: what blue and red stand for.
    pixels: side of a frame in which the items' boxes are given.
  """
  rows, columns = 1 + len(maps), len(frames) + 1
  width = LEFT + columns * (SIDE + GAP)
  size = (width, 84 + rows * (SIDE + GAP) + 40)
  canvas = Image.new("RGB", size, "white")
  pen = ImageDraw.Draw(canvas)
  large, small = (ImageFont.load_default(size=s) for s in (20, 15))
  title = f"Where does a probe read “{words[0]}” and “{words[1]}”?"
  pen.text((10, 10), title, fill=INK, font=large)
  for i, (word, color) in enumerate(zip(words, (COLD, HOT), strict=True)):
    x = 10 + 230 * i
    box = (x, 46, x + 18, 64)
    pen.rectangle(box, fill=tuple(int(v) for v in color))
    pen.text((x + 26, 46), f"probe says {word}", fill=INK, font=small)
  top = 84

  def place(image, row, column):
    at = (LEFT + column * (SIDE + GAP), top + row * (SIDE + GAP))
    canvas.paste(image, at)
    return at

  def label(text, row):
    y = top + row * (SIDE + GAP) + SIDE // 3
    for i, line in enumerate(textwrap.wrap(text, 14)):
      pen.text((10, y + 19 * i), line, fill=INK, font=small)

  label("what the model sees", 0)
  for column, (frame, pair) in enumerate(zip(frames, items, strict=True)):
    image = Image.fromarray(enlarge(to_uint8(frame), SIDE))
    x, y = place(image.resize((SIDE, SIDE)), 0, column)
    for box, name, color in zip(
      pair.boxes, pair.names, ("#f2b134", "#7ee0d0"), strict=True
    ):
      x0, y0, x1, y1 = np.asarray(box) * SIDE / pixels
      pen.rectangle((x + x0, y + y0, x + x1 - 1, y + y1 - 1), outline=color)
      wide = pen.textlength(name, font=small)
      at = x + max(min(x0, SIDE - wide - 4), 0), y + max(y0 - 18, 0)
      pen.rectangle((*at, at[0] + wide + 4, at[1] + 17), fill=color)
      pen.text((at[0] + 2, at[1]), name, fill=INK, font=small)
  x, y = place(Image.new("RGB", (SIDE, SIDE), "white"), 0, len(frames))
  for i, line in enumerate(("mean over all", "held-out frames", "(below)")):
    pen.text((x + 30, y + 60 + 20 * i), line, fill=MUTED, font=small)
  for row, name in enumerate(maps, 1):
    label(name, row)
    for column, frame in enumerate(frames):
      place(overlay(frame, maps[name][column]), row, column)
    tint = Image.fromarray(colors(mean[name]))
    place(tint.resize((SIDE, SIDE), Image.NEAREST), row, len(frames))
  note = (
    "Each square is a visual token. The probe was trained on tokens inside the "
    "boxes of other rooms; between them lies background."
  )
  pen.text((10, size[1] - 30), note, fill=MUTED, font=small)
  return canvas
