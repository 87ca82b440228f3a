# SPDX-License-Identifier: Apache-2.0
"""The vision tower with any weights; positions and patches of images."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax.data import positions, vision
from spatial_jax.models import llm, qwen_vit
from spatial_jax.nn import attention as attentions
from tests import tiny

VIT = {
  "width": 16,
  "layers": 2,
  "heads": 2,
  "mlp": 16,
  "out_width": 8,
  "patch": 2,
  "temporal_patch": 1,
  "window": 8,  # 4 x 4 patches
  "full_layers": (1,),
}


@functools.partial(jax.jit, static_argnames=("model", "grid"))
def run(model, params, patches, grid=None, layout=None):
  return model.apply(params, patches, grid, layout)


def init(model, patches, grid):
  return tiny.random(
    jax.eval_shape(lambda: model.init(jax.random.key(0), patches, grid))
  )


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def patches(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("h,w", [(8, 8), (6, 10), (2, 4)])
def test_windows_as_reshapes_equal_masked_attention(h, w):
  order, windows = qwen_vit.window_order(h, w, 2, 2)
  block = qwen_vit.Block(
    heads=2,
    mlp=8,
    windows=windows,
    full=(0, 1),
    eps=1e-6,
    dtype="float32",
  )
  qkv = patches(3, h * w, 3, 2, 4)
  bias = patches(3, h * w)
  got = jax.jit(block._attend_windows)(jnp.asarray(qkv), jnp.asarray(bias))
  window = qwen_vit.grid_positions(h, w, 2)[order] // 4
  same = np.all(window[:, None] == window[None], axis=-1)
  want = jax.jit(attentions.attention)(
    *np.moveaxis(qkv, 2, 0), same[None], bias[:, None]
  )
  close(got, want)


@pytest.mark.parametrize("window", [0, 8])
def test_a_static_grid_equals_index_arrays(window):
  grid = (2, 6, 10)
  model = qwen_vit.Model(**{**VIT, "window": window})
  x = patches(2, 120, 12)
  params = init(model, x, grid)
  want, out = run(model, params, x, grid=grid)
  arrays = vision.layout([[grid], [grid]], side=window // 4)
  got, ragged = run(model, params, x, layout=arrays)
  close(got, want)
  close(ragged["vit/tokens"], out["vit/tokens"])

  def slope(**places):
    return jax.grad(
      lambda x: jnp.sum(jnp.sin(run(model, params, x, **places)[0]))
    )

  close(slope(layout=arrays)(x), slope(grid=grid)(x))
  # An image's tokens don't depend on what else is in the row, nor on padding.
  other = [(1, 2, 4), grid]
  sizes = vision.bucket(vision.layout_sizes([other], side=window // 4))
  row = np.zeros((1, sizes["patches"], 12), np.float32)
  row[0, :8], row[0, 8:128] = patches(8, 12), x[0]
  arrays = vision.layout([other], sizes, side=window // 4)
  mixed, _ = run(model, params, row, layout=arrays)
  close(mixed[0, 2:32], want[0])


def test_frames_do_not_see_each_other():
  model = qwen_vit.Model(**VIT)
  x = patches(1, 32, 12)
  params = init(model, x, (2, 4, 4))

  def first_frame(x):
    return jnp.sum(run(model, params, x, grid=(2, 4, 4))[0][:, :4] ** 2)

  reach = np.any(np.asarray(jax.jit(jax.grad(first_frame))(x)[0]) != 0, axis=-1)
  np.testing.assert_array_equal(reach, np.arange(32) < 16)


def test_merged_tokens_land_on_image_tokens_in_order():
  tokens = np.array([[1, 39, 39, 2, 39], [39, 3, 4, 39, 5]])
  merged = np.arange(1, 7, dtype=np.float32).reshape(2, 3, 1)
  text = -np.ones((2, 5, 1), np.float32)
  for one_hot in (False, True):
    got = llm.place(text, merged, tokens == 39, one_hot=one_hot)
    np.testing.assert_array_equal(
      got[..., 0], [[-1, 1, 2, -1, 3], [4, -1, -1, 5, -1]]
    )


def test_learned_tables_tell_positions_and_frames_apart():
  tables = {"position_table": (4, 4), "frame_table": 2}
  model = qwen_vit.Model(**{**VIT, "window": 0}, **tables)
  x = np.ones((1, 32, 12), np.float32)
  params = init(model, x, (2, 4, 4))
  merged, _ = run(model, params, x, grid=(2, 4, 4))
  rows = {tuple(np.round(row, 5)) for row in np.asarray(merged[0]).tolist()}
  assert len(rows) == 8
  # In merge-group order the second patch is right of the first, the third is
  # below it.
  order = qwen_vit.grid_positions(4, 4, 2)[:5].tolist()
  assert order == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2]]
  with pytest.raises(ValueError, match="3 frames, but frame_table has 2"):
    run(model, params, np.ones((1, 48, 12), np.float32), grid=(3, 4, 4))


# --- positions --------------------------------------------------------------


def row_with(kind, size):
  return np.array([5, 6, *[kind] * size, 7, 8])


def test_positions_of_a_video_follow_its_seconds():
  tokens = row_with(9, 8)
  for seconds, times in ((0.5, [0, 1]), (1.0, [0, 2])):
    ids, delta = positions.mrope(
      tokens, [(2, 4, 4)], video_token=9, second_per_grid=seconds
    )
    np.testing.assert_array_equal(ids[0, 2:10] - 2, np.repeat(times, 4))
    np.testing.assert_array_equal(ids[1, 2:10] - 2, [0, 0, 1, 1] * 2)
    np.testing.assert_array_equal(ids[2, 2:10] - 2, [0, 1, 0, 1] * 2)
    after = 2 + max(times[-1], 1) + 1
    np.testing.assert_array_equal(ids[:, 10:], [[after, after + 1]] * 3)
    assert delta == after + 2 - len(tokens)


def test_the_end_of_a_long_video_depends_on_the_release():
  tokens = row_with(9, 4)
  for end, after in (("max", 8), ("grid", 3)):
    ids, _ = positions.mrope(
      tokens, [(4, 2, 2)], video_token=9, second_per_grid=0.9, block_end=end
    )
    np.testing.assert_array_equal(ids[0, 2:6], [2, 3, 5, 7])
    assert ids[0, 6] == after


def test_padding_on_either_side_shifts_no_position():
  tokens = row_with(9, 4)
  want, delta = positions.mrope(tokens, [(1, 4, 4)], image_token=9)
  for pad, place in (((3, 0), slice(3, None)), ((0, 3), slice(0, -3))):
    ids, same = positions.mrope(
      np.pad(tokens, pad),
      [(1, 4, 4)],
      image_token=9,
      valid_mask=np.pad(np.ones(len(tokens), bool), pad),
    )
    np.testing.assert_array_equal(ids[:, place], want)
    assert same == delta


def test_grids_and_image_tokens_must_agree():
  tokens = row_with(9, 4)
  with pytest.raises(ValueError, match="needs 6 image tokens"):
    positions.mrope(tokens, [(1, 4, 6)], image_token=9)
  with pytest.raises(ValueError, match="more than its 0 grids"):
    positions.mrope(tokens, [], image_token=9)
  with pytest.raises(ValueError, match="only 1 of them"):
    positions.mrope(tokens, [(1, 4, 4)] * 2, image_token=9)


# --- images -----------------------------------------------------------------


@pytest.mark.parametrize(
  "image,message",
  [
    (np.zeros((0, 5, 3), np.uint8), "neither side empty"),
    (np.zeros((4, 5, 2), np.uint8), r"\(4, 5, 2\)"),
    (np.zeros((4, 5, 3), np.float32), "float32; expected uint8"),
    (np.zeros((2, 500, 3), np.uint8), "250 times as long"),
  ],
)
def test_unusable_images_say_what_was_expected(image, message):
  with pytest.raises(ValueError, match=message):
    vision.preprocess([image])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("height,width", [(50, 75), (200, 31), (28, 56)])
def test_patches_equal_those_of_transformers_processor(height, width):
  for package in ("torch", "transformers"):
    if importlib.util.find_spec(package) is None:
      pytest.skip(f"{package} is not installed, so there is no processor")
  from transformers import Qwen2VLImageProcessorPil

  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
  processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12544)
  want = processor(image, input_data_format="channels_last")
  got, grid, _ = vision.preprocess([image], max_pixels=12544)
  np.testing.assert_array_equal(want["image_grid_thw"], [grid])
  np.testing.assert_array_equal(want["pixel_values"], got)


def test_grey_and_transparent_images_become_rgb():
  from PIL import Image

  grey = np.full((28, 28), 7, np.uint8)
  for image in (grey, grey[..., None], np.full((28, 28, 4), 7, np.uint8)):
    assert np.all(vision.preprocess([image], min_pixels=1)[2] == 7)
  assert vision.to_rgb(Image.fromarray(grey)).shape == (28, 28, 3)


def test_a_row_of_too_many_images_names_the_size_to_raise():
  sizes = vision.layout_sizes([[(1, 8, 8)]])
  with pytest.raises(ValueError, match=r"needs patches=128, but .* 64"):
    vision.layout([[(1, 8, 8)] * 2], sizes)
