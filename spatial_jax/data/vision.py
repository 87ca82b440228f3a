# SPDX-License-Identifier: Apache-2.0
"""Images to patches as Qwen2.5-VL reads them. NumPy and Pillow only.

Patches of a frame are rows in merge-group order (frame, Y, X, then the merge x
merge patches of a group) and columns (channel, temporal, y, x).

`layout` makes the index arrays with which the vision tower attends within
windows and frames of images of any sizes.

Letters: B batch, P patches, F frames, S patches in a frame or window, C values
of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from spatial_jax.types import Array, Float, Int, UInt8

Grid = tuple[int, int, int]  # frames, h, w in patches

# Means and standard deviations that CLIP was trained with.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def smart_resize(
  height: int,
  width: int,
  factor: int = 28,
  min_pixels: int = 56 * 56,
  max_pixels: int = 28 * 28 * 1280,
) -> tuple[int, int]:
  """Size near (height, width), in multiples of factor, within a pixel budget.

  Halves are rounded to even multiples, as the published processors do.
  """
  if min(height, width) < 1:
    raise ValueError(
      f"an image of {height} x {width} pixels is empty; expected at least 1 x 1"
    )
  ratio = max(height, width) / min(height, width)
  if ratio > 200:
    raise ValueError(
      f"an image of {height} x {width} pixels is {ratio:.0f} times as long as "
      "wide; at most 200 is supported, crop it first"
    )
  new_height = round(height / factor) * factor
  new_width = round(width / factor) * factor
  if new_height * new_width > max_pixels:
    beta = math.sqrt(height * width / max_pixels)
    new_height = max(factor, math.floor(height / beta / factor) * factor)
    new_width = max(factor, math.floor(width / beta / factor) * factor)
  elif new_height * new_width < min_pixels:
    beta = math.sqrt(min_pixels / (height * width))
    new_height = math.ceil(height * beta / factor) * factor
    new_width = math.ceil(width * beta / factor) * factor
  return new_height, new_width


def to_rgb(image) -> UInt8[Array, "height width 3"]:
  """uint8 RGB pixels of a Pillow image or of an array [height width (C)]."""
  if hasattr(image, "convert"):
    return np.asarray(image.convert("RGB"))
  image = np.asarray(image)
  if image.ndim == 2:
    image = image[..., None]
  if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or not image.size:
    raise ValueError(
      f"an image has the shape {image.shape}; expected [height, width, 3] with "
      "neither side empty (or 1 channel for grey, 4 with alpha)"
    )
  if image.dtype != np.uint8:
    raise ValueError(
      f"an image has the dtype {image.dtype}; expected uint8 in 0..255"
    )
  if image.shape[-1] == 1:
    return np.repeat(image, 3, axis=-1)
  return image[..., :3]


def resize(
  image: UInt8[Array, "height width 3"], height: int, width: int
) -> UInt8[Array, "y x 3"]:
  """Bicubic with antialiasing, as Pillow does it."""
  from PIL import Image

  if image.shape[:2] == (height, width):
    return image
  size = (width, height)
  return np.asarray(Image.fromarray(image).resize(size, Image.BICUBIC))


def patchify(
  frames: Float[Array, "F height width C"],
  *,
  patch: int = 14,
  temporal_patch: int = 2,
  merge: int = 2,
) -> Float[Array, "P D"]:
  """Rows of patches; the last frame is repeated to fill a temporal patch."""
  frames = np.asarray(frames)
  if short := -len(frames) % temporal_patch:
    frames = np.concatenate([frames, np.repeat(frames[-1:], short, axis=0)])
  F, height, width, C = frames.shape
  size = patch * merge
  if height % size or width % size:
    raise ValueError(
      f"frames of {height} x {width} pixels cannot be cut in groups of "
      f"{merge} x {merge} patches of {patch} pixels; resize them to multiples "
      f"of {size} (see smart_resize)"
    )
  shape = (
    F // temporal_patch,
    temporal_patch,
    height // size,
    merge,
    patch,
    width // size,
    merge,
    patch,
    C,
  )
  #             frame  Y  X  dy dx C  dt y  x
  order = (0, 2, 5, 3, 6, 8, 1, 4, 7)
  patches = frames.reshape(shape).transpose(order)
  return patches.reshape(-1, C * temporal_patch * patch * patch)


def preprocess(
  frames: Iterable,
  *,
  min_pixels: int = 56 * 56,
  max_pixels: int = 28 * 28 * 1280,
  patch: int = 14,
  temporal_patch: int = 2,
  merge: int = 2,
  mean: Sequence[float] = MEAN,
  std: Sequence[float] = STD,
) -> tuple[Float[Array, "P C"], Grid, UInt8[Array, "F y x 3"]]:
  """An image ([one frame]) or a video to normalised patches.

  Returns:
    patches, their grid (frames, h, w), and the resized frames; both have the
    last frame repeated where a temporal patch is not full.
  """
  images = [to_rgb(frame) for frame in frames]
  if not images or len({image.shape for image in images}) > 1:
    raise ValueError(
      "a video needs at least one frame and frames of one size, got "
      f"{[image.shape for image in images]}"
    )
  height, width = smart_resize(
    *images[0].shape[:2], patch * merge, min_pixels, max_pixels
  )
  pixels = np.stack([resize(image, height, width) for image in images])
  if short := -len(pixels) % temporal_patch:
    pixels = np.concatenate([pixels, np.repeat(pixels[-1:], short, axis=0)])
  # The published order of operations, rounding included.
  scaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
  scaled = (scaled - np.float32(mean)) / np.float32(std)
  patches = patchify(
    scaled, patch=patch, temporal_patch=temporal_patch, merge=merge
  )
  grid = (len(pixels) // temporal_patch, height // patch, width // patch)
  return patches, grid, pixels


def layout_sizes(
  rows: Sequence[Sequence[Grid]], *, merge: int = 2, side: int = 4
) -> dict[str, int]:
  """Smallest sizes that hold every row; see `layout`."""
  frames = [[(h, w) for t, h, w in row for _ in range(t)] for row in rows]

  def windows(h, w):
    return -(-h // merge // side) * -(-w // merge // side) if side else 0

  def most(numbers):
    return max(numbers, default=1) or 1

  return {
    "patches": most(sum(h * w for h, w in row) for row in frames),
    "frames": most(len(row) for row in frames),
    "frame_patches": most(h * w for row in frames for h, w in row),
    "windows": most(sum(windows(h, w) for h, w in row) for row in frames),
  }


def bucket(sizes: Mapping[str, int]) -> dict[str, int]:
  """Sizes rounded up to powers of two, so that few programs are compiled."""
  return {name: 1 << (size - 1).bit_length() for name, size in sizes.items()}


def layout_shapes(
  sizes: Mapping[str, int], *, merge: int = 2, side: int = 4
) -> dict[str, tuple[int, ...]]:
  """Shapes of the arrays of one row of `layout`, all int32."""
  shapes = {
    "patch_positions": (sizes["patches"], 2),
    "frame_index": (sizes["frames"], sizes["frame_patches"]),
    "frame_inverse": (sizes["patches"],),
  }
  if side:
    shapes["window_index"] = (sizes["windows"], (side * merge) ** 2)
    shapes["window_inverse"] = (sizes["patches"],)
  return shapes


def layout(
  rows: Sequence[Sequence[Grid]],
  sizes: Mapping[str, int] | None = None,
  *,
  merge: int = 2,
  side: int = 4,
) -> dict[str, Int[Array, "B ..."]]:
  """Index arrays of rows of images of any sizes.

  Args:
    rows: for each row, the grids of its images and videos in order.
    sizes: `patches`, `frames`, `frame_patches` and `windows` that the arrays
      have room for; the smallest ones by default.
    merge: patches of a merge group are merge x merge.
    side: of a window, in merge groups (112 pixels / 14 / 2); 0 for none.

  Returns:
    patch_positions [B P 2]: row and column of each patch in its frame.
    frame_index [B F S], window_index [B windows S]: the patches of each set;
      P where there is none.
    frame_inverse, window_inverse [B P]: where each patch is in the flattened
      sets.
  """
  need = layout_sizes(rows, merge=merge, side=side)
  sizes = dict(need if sizes is None else sizes)
  for name, size in need.items():
    if size > sizes[name]:
      raise ValueError(
        f"a row of images needs {name}={size}, but the batch has room for "
        f"{sizes[name]}; raise the size or lower max_pixels"
      )
  shapes = layout_shapes(sizes, merge=merge, side=side)
  none = {"frame_index": sizes["patches"], "window_index": sizes["patches"]}
  arrays = {
    name: np.full((len(rows), *shape), none.get(name, 0), np.int32)
    for name, shape in shapes.items()
  }
  for b, row in enumerate(rows):
    sets = {"frame": 0, "window": 0}
    start = 0
    for frames, h, w in row:
      where, windows = _frame_layout(h, w, merge, side)
      for _ in range(frames):
        stop = start + h * w
        arrays["patch_positions"][b, start:stop] = where
        groups = {"frame": [np.arange(h * w)], "window": windows}
        for kind in ("frame", "window") if side else ("frame",):
          index, inverse = (arrays[f"{kind}_{n}"] for n in ("index", "inverse"))
          for members in groups[kind]:
            row_index = index[b, sets[kind]]
            row_index[: len(members)] = members + start
            inverse[b, members + start] = sets[kind] * len(
              row_index
            ) + np.arange(len(members))
            sets[kind] += 1
        start = stop
  return arrays


def _frame_layout(h, w, merge, side):
  """(row, column) of the patches of a frame, and the patches of its windows."""
  rows, columns = np.mgrid[:h, :w]
  where = np.stack([rows, columns], axis=-1)
  where = where.reshape(h // merge, merge, w // merge, merge, 2)
  where = where.transpose(0, 2, 1, 3, 4).reshape(h * w, 2)
  if not side:
    return where, []
  window = where // (merge * side)
  number = window[:, 0] * (-(-w // (merge * side))) + window[:, 1]
  return where, [np.flatnonzero(number == n) for n in range(number.max() + 1)]
