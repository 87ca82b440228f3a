# SPDX-License-Identifier: Apache-2.0
"""Images to what each vision tower reads, as its reference prepares them.

image (Pillow, or uint8 [height width (C)]) -> resize, crop or pad -> [0, 1] ->
minus mean, over std -> f32 [side side 3]. NumPy and Pillow only.

Qwen's images keep their shape: see `data.vision`; Molmo2's videos are prepared
in `data.molmo2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spatial_jax.data.vision import MEAN as CLIP_MEAN
from spatial_jax.data.vision import STD as CLIP_STD
from spatial_jax.data.vision import resize, to_rgb
from spatial_jax.types import Array, Float, UInt8

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

Color = Sequence[float]


def normalize(
  image: UInt8[Array, "*b y x 3"], mean: Color = HALF, std: Color = HALF
) -> Float[Array, "*b y x 3"]:
  """(image / 255 - mean) / std in float32, with the published rounding."""
  scaled = (image.astype(np.float64) * (1 / 255)).astype(np.float32)
  return (scaled - np.float32(mean)) / np.float32(std)


def resize_short(
  image: UInt8[Array, "height width 3"], side: int
) -> UInt8[Array, "y x 3"]:
  """The shorter side becomes `side`, the other keeps the aspect, cut to int."""
  height, width = image.shape[:2]
  short = min(height, width)
  return resize(image, int(side * height / short), int(side * width / short))


def center_crop(
  image: UInt8[Array, "height width 3"], side: int
) -> UInt8[Array, "side side 3"]:
  """Square from the middle; an odd rest is larger at the right and bottom."""
  height, width = image.shape[:2]
  if min(height, width) < side:
    raise ValueError(
      f"cannot crop {side} x {side} pixels from {height} x {width}; resize the "
      "image first"
    )
  top, left = (height - side) // 2, (width - side) // 2
  return image[top : top + side, left : left + side]


def pad_to_square(
  image: UInt8[Array, "height width 3"], color: Sequence[int]
) -> UInt8[Array, "side side 3"]:
  """The image in the middle of a square; an odd rest is larger at its end."""
  height, width = image.shape[:2]
  side = max(height, width)
  square = np.empty((side, side, 3), np.uint8)
  square[:] = color
  top, left = (side - height) // 2, (side - width) // 2
  square[top : top + height, left : left + width] = image
  return square


def clip(image: Any, side: int = 336) -> Float[Array, "side side 3"]:
  """CLIP and LLaVA: shorter side to `side`, middle square."""
  image = center_crop(resize_short(to_rgb(image), side), side)
  return normalize(image, CLIP_MEAN, CLIP_STD)


def siglip(image: Any, side: int = 384) -> Float[Array, "side side 3"]:
  """SigLIP, PaliGemma, LLaVA-Video: stretched to a square."""
  return normalize(resize(to_rgb(image), side, side))


def gemma3(image: Any, side: int = 896) -> Float[Array, "side side 3"]:
  """Gemma 3: stretched to a square, bilinearly."""
  from PIL import Image

  image = Image.fromarray(to_rgb(image)).resize((side, side), Image.BILINEAR)
  return normalize(np.asarray(image))


def dinov2(
  image: Any, side: int = 224, short: int = 256
) -> Float[Array, "side side 3"]:
  """DINOv2: shorter side to `short`, middle square."""
  image = center_crop(resize_short(to_rgb(image), short), side)
  return normalize(image, IMAGENET_MEAN, IMAGENET_STD)


def openvla(
  image: Any,
  side: int = 224,
  mean: Color = IMAGENET_MEAN,
  std: Color = IMAGENET_STD,
) -> Float[Array, "side side 6"]:
  """OpenVLA: stretched to a square, normalised for DINOv2, then for SigLIP.

  Its preprocessor file has `mean` and `std` rounded to bfloat16.
  """
  image = resize(to_rgb(image), side, side)
  return np.concatenate([normalize(image, mean, std), normalize(image)], -1)


# Side, mean of the padding's colour, mean and std. SigLIP's padding has CLIP's
# mean in the published code.
CAMBRIAN = {
  "siglip": (384, CLIP_MEAN, HALF, HALF),
  "clip": (336, CLIP_MEAN, CLIP_MEAN, CLIP_STD),
  "dinov2": (378, IMAGENET_MEAN, IMAGENET_MEAN, IMAGENET_STD),
  "convnext": (1024, CLIP_MEAN, CLIP_MEAN, CLIP_STD),
}


def cambrian(
  image: Any, tower: str, side: int | None = None
) -> Float[Array, "side side 3"]:
  """Cambrian-1: padded to a square for one of the towers in `CAMBRIAN`."""
  if tower not in CAMBRIAN:
    known = ", ".join(CAMBRIAN)
    raise ValueError(f"Cambrian has no tower {tower!r}; use one of {known}")
  published, padding, *statistics = CAMBRIAN[tower]
  image = pad_to_square(to_rgb(image), [int(255 * value) for value in padding])
  return normalize(resize(image, *[side or published] * 2), *statistics)


def janus(
  image: Any, side: int = 384, shortest: int = 14
) -> Float[Array, "side side 3"]:
  """Janus: longer side to `side`, cut to int, then padded to a grey square."""
  image = to_rgb(image)
  height, width = image.shape[:2]
  long = max(height, width)
  height, width = (
    max(int(length / long * side), shortest) for length in (height, width)
  )
  image = resize(image, height, width)
  return normalize(pad_to_square(image, [int(255 * 0.5)] * 3))


def internvl(
  image: Any, side: int = 448, tiles: int = 1
) -> Float[Array, "tiles side side 3"]:
  """InternVL: at most `tiles` squares, then the whole image if there are more.

  The grid of squares is the one whose aspect is nearest to the image's.
  """
  image = to_rgb(image)
  rows, columns = tile_grid(*image.shape[:2], side, tiles)
  canvas = resize(image, rows * side, columns * side)
  squares = canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
  squares = squares.reshape(-1, side, side, 3)
  if rows * columns > 1:
    whole = resize(image, side, side)
    squares = np.concatenate([squares, whole[None]])
  return normalize(squares, IMAGENET_MEAN, IMAGENET_STD)


def tile_grid(
  height: int, width: int, side: int, tiles: int
) -> tuple[int, int]:
  """(rows, columns) of InternVL's squares.

  Of grids with the same aspect the larger one wins if the image has more than
  half of its pixels.
  """
  grids = [
    (rows, columns)
    for columns in range(1, tiles + 1)
    for rows in range(1, tiles // columns + 1)
  ]
  best, least = (1, 1), float("inf")
  for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
    difference = abs(width / height - columns / rows)
    is_large = height * width > 0.5 * side * side * rows * columns
    if difference < least or (difference == least and is_large):
      best, least = (rows, columns), difference
  return best
