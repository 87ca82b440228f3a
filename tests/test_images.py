# SPDX-License-Identifier: Apache-2.0
"""Images are prepared as each tower's reference does it."""

import importlib.util

import numpy as np
import pytest

from spatial_jax.data import images, molmo2


def photo(height, width, seed=0):
  """Smooth colours with noise, so that filters and borders matter."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:height, :width]
  waves = [np.sin(x / (3 + c)) + np.cos(y / (4 + c)) for c in range(3)]
  pixels = 128 + 50 * np.stack(waves, axis=-1)
  pixels += rng.normal(scale=20, size=(height, width, 3))
  return pixels.clip(0, 255).astype(np.uint8)


# Module of transformers, its class, arguments, and ours.
LIVE = {
  "clip": (
    "clip",
    "CLIPImageProcessorPil",
    {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
    lambda image: images.clip(image, 56),
  ),
  "siglip": (
    "siglip",
    "SiglipImageProcessorPil",
    {"size": {"height": 42, "width": 42}},
    lambda image: images.siglip(image, 42),
  ),
  "dinov2": (
    "bit",
    "BitImageProcessorPil",
    {
      "size": {"shortest_edge": 51},
      "crop_size": {"height": 42, "width": 42},
      "image_mean": images.IMAGENET_MEAN,
      "image_std": images.IMAGENET_STD,
    },
    lambda image: images.dinov2(image, 42, 51),
  ),
  "internvl": (
    "got_ocr2",
    "GotOcr2ImageProcessorPil",
    {
      "size": {"height": 28, "width": 28},
      "crop_to_patches": True,
      "max_patches": 6,
      "image_mean": images.IMAGENET_MEAN,
      "image_std": images.IMAGENET_STD,
    },
    lambda image: images.internvl(image, 28, 6),
  ),
  "janus": (
    "janus",
    "JanusImageProcessorPil",
    {
      "size": {"height": 48, "width": 48},
      "image_mean": images.HALF,
      "image_std": images.HALF,
    },
    lambda image: images.janus(image, 48),
  ),
}


@pytest.mark.parametrize(
  "size", [(60, 80), (96, 33), (50, 50), (29, 31), (224, 60)]
)
@pytest.mark.parametrize("family", LIVE)
@pytest.mark.filterwarnings("ignore")
def test_pixels_equal_those_of_transformers(family, size):
  for package in ("torch", "transformers"):
    if importlib.util.find_spec(package) is None:
      pytest.skip(f"{package} is not installed, and it is what is compared")
  module, name, arguments, ours = LIVE[family]
  module = importlib.import_module(
    f"transformers.models.{module}.image_processing_pil_{module}"
  )
  image = photo(*size)
  if family == "janus" and any(
    int(48 * side / max(size)) != round(48 * side / max(size)) for side in size
  ):
    pytest.skip("transformers rounds this side, the published code cuts it")
  want = getattr(module, name)(**arguments)(image, return_tensors="np")
  want = want["pixel_values"].transpose(0, 2, 3, 1)
  got = ours(image)
  got = got if got.ndim == 4 else got[None]
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("size", [(50, 70), (20, 30), (17, 90)])
def test_molmo2_frames_are_resized_without_antialiasing(size):
  if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed, and it is what is compared")
  import torch

  frames = np.stack([photo(*size, seed) for seed in range(2)])
  want = torch.nn.functional.interpolate(
    torch.tensor(frames).permute(0, 3, 1, 2).float(),
    size=(28, 28),
    mode="bilinear",
    align_corners=False,
  )
  want = want.permute(0, 2, 3, 1).numpy()
  got = (molmo2.frames(frames, 28) * 0.5 + 0.5) * 255
  np.testing.assert_allclose(got, np.round(got), atol=1e-4)
  # What ends at one half in exact arithmetic may be rounded either way.
  is_tie = np.abs(want - np.floor(want) - 0.5) < 1e-4
  assert np.mean(is_tie) < 0.03
  np.testing.assert_allclose(got[~is_tie], np.round(want[~is_tie]), atol=1e-4)
  np.testing.assert_allclose(got[is_tie], want[is_tie], atol=0.501)


def test_pooling_numbers_the_patches_of_each_token():
  got = molmo2.pooling(2, 3, 4, pool=2)
  first = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, -1, -1], [10, 11, -1, -1]]
  np.testing.assert_array_equal(got[:4], first)
  np.testing.assert_array_equal(
    got[4:], np.where(np.array(first) < 0, -1, np.array(first) + 12)
  )
  # One row short of a multiple of three: the missing one is above.
  got = molmo2.pooling(1, 4, 3, pool=3)
  want = [[-1, -1, -1, 0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11, -1, -1, -1]]
  np.testing.assert_array_equal(got, want)
  full = molmo2.pooling(3, 27, 27)
  assert full.shape == (3 * 81, 9)
  np.testing.assert_array_equal(np.sort(full, axis=None), np.arange(3 * 729))


def test_squares_are_padded_in_the_middle():
  image = photo(3, 6)
  square = images.pad_to_square(image, (1, 2, 3))
  assert square.shape == (6, 6, 3)
  np.testing.assert_array_equal(square[1:4], image)
  np.testing.assert_array_equal(square[0], np.tile([1, 2, 3], (6, 1)))
  np.testing.assert_array_equal(square[4:], np.tile([1, 2, 3], (2, 6, 1)))


def test_janus_cuts_sides_and_pads_with_grey():
  # 48 * 31 / 50 = 29.76: the published code makes 29 rows of it.
  got = images.janus(photo(31, 50), 48)
  grey = (127 / 255 - 0.5) / 0.5
  is_grey = np.all(np.isclose(got, grey, atol=1e-6), axis=(1, 2))
  assert list(np.flatnonzero(~is_grey)) == list(range(9, 38))
  thin = images.janus(photo(2, 100), 48)
  assert np.sum(~np.all(np.isclose(thin, grey, atol=1e-6), axis=(1, 2))) == 14


@pytest.mark.parametrize(
  ("size", "tiles", "grid"),
  [
    ((100, 100), 12, (1, 1)),
    ((1000, 1000), 12, (3, 3)),
    ((448, 896), 12, (1, 2)),
    ((900, 448), 6, (2, 1)),
    ((400, 1300), 4, (1, 3)),
    ((400, 1300), 1, (1, 1)),
  ],
)
def test_tiles_follow_the_aspect_of_the_image(size, tiles, grid):
  assert images.tile_grid(*size, 448, tiles) == grid


def test_openvla_stacks_both_normalisations():
  image = photo(30, 50)
  got = images.openvla(image, 28)
  np.testing.assert_array_equal(got[..., 3:], images.siglip(image, 28))
  back = got[..., :3] * np.float32(images.IMAGENET_STD) + np.float32(
    images.IMAGENET_MEAN
  )
  np.testing.assert_allclose(back, got[..., 3:] * 0.5 + 0.5, atol=1e-6)


def test_wrong_images_and_towers_are_refused():
  with pytest.raises(ValueError, match="cannot crop 8 x 8 pixels from 6 x 9"):
    images.center_crop(photo(6, 9), 8)
  with pytest.raises(ValueError, match="Cambrian has no tower 'sam'"):
    images.cambrian(photo(6, 9), "sam")
  with pytest.raises(ValueError, match="expected uint8"):
    images.siglip(np.zeros((4, 4, 3), np.float32))
