# SPDX-License-Identifier: Apache-2.0
"""Photos of any sizes to a batch of frames, as VGGT's published code does.

NumPy and Pillow only. Sides become multiples of the patch size, the longer one
518 as in training: larger frames make the cameras worse, not better.

Letters: F frames.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from spatial_jax.types import Array, Float

SIDE = 518
PATCH = 14
MODES = ("crop", "pad")


def frames(
  images: Sequence[Any],
  mode: str = "crop",
  *,
  side: int = SIDE,
  patch: int = PATCH,
) -> Float[Array, "F height width 3"]:
  """RGB in [0, 1] of paths, Pillow images or uint8 arrays [height width C].

  "crop" makes all frames `side` wide and cuts what is higher than that, "pad"
  makes the longer side `side` long and fills up to a square with white. Frames
  of different heights are filled up to the highest with white, in the middle.
  What is transparent becomes white.
  """
  if mode not in MODES:
    raise ValueError(f"mode={mode!r} is unknown; use one of {MODES}")
  if not len(images):
    raise ValueError("no images were given; at least one is needed")
  made = [_resize(opened(image), mode, side, patch) for image in images]
  if mode == "pad":
    return np.stack([_fill(frame, side, side) for frame in made])
  height = max(frame.shape[0] for frame in made)
  return np.stack([_fill(frame, height, side) for frame in made])


def squares(
  images: Sequence[Any], side: int = 1024
) -> tuple[Float[Array, "F side side 3"], Float[Array, "F 6"]]:
  """RGB in [0, 1] of images made square with black, then resized.

  Also returns (x1, y1, x2, y2, width, height): where the image lies in its
  frame, in pixels, and its size before.
  """
  from PIL import Image

  if not len(images):
    raise ValueError("no images were given; at least one is needed")
  made, where = [], []
  for image in images:
    image = opened(image)
    width, height = image.size
    longest = max(width, height)
    left, top = (longest - width) // 2, (longest - height) // 2
    scale = side / longest
    corners = left, top, left + width, top + height
    where.append([*(scale * corner for corner in corners), width, height])
    square = Image.new("RGB", (longest, longest), (0, 0, 0))
    square.paste(image, (left, top))
    made.append(_pixels(square.resize((side, side), Image.BICUBIC)))
  return np.stack(made), np.array(where, np.float32)


def opened(image: Any):
  """A Pillow image in RGB; transparent parts are laid on white."""
  from PIL import Image

  if isinstance(image, str | os.PathLike):
    image = Image.open(image)
  elif isinstance(image, np.ndarray):
    is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
    if image.dtype != np.uint8 or not is_image or not image.size:
      raise ValueError(
        f"an image is {image.dtype}{list(image.shape)}; expected uint8 "
        "[height, width, 3], with neither side empty (or 4 channels with "
        "alpha, or [height, width] in grey)"
      )
    image = Image.fromarray(image)
  if image.has_transparency_data:
    ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(ground, image.convert("RGBA"))
  return image.convert("RGB")


def _resize(image, mode, side, patch):
  """[height width 3] in [0, 1], neither side above `side`."""
  from PIL import Image

  width, height = image.size

  def fit(size, other):
    # Halves are rounded to even multiples, in these very float steps.
    return round(size * (side / other) / patch) * patch

  if mode == "crop" or width >= height:
    size = side, fit(height, width)
  else:
    size = fit(width, height), side
  if min(size) < patch:
    raise ValueError(
      f"an image of {width} x {height} pixels would become {size[0]} x "
      f"{size[1]}: it is too long and narrow for patches of {patch} pixels; "
      "crop it first"
    )
  pixels = _pixels(image.resize(size, Image.BICUBIC))
  if size[1] > side:
    top = (size[1] - side) // 2
    pixels = pixels[top : top + side]
  return pixels


def _pixels(image) -> np.ndarray:
  return np.asarray(image, np.float32) / np.float32(255)


def _fill(frame, height, width):
  """White on all sides; an odd row or column goes below or to the right."""
  down, right = height - frame.shape[0], width - frame.shape[1]
  around = [(down // 2, down - down // 2), (right // 2, right - right // 2)]
  return np.pad(frame, [*around, (0, 0)], constant_values=1.0)
