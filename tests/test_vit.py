# SPDX-License-Identifier: Apache-2.0
"""Image transformers equal the systems' own code, and what holds for all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax import hf, sharding, trees
from spatial_jax.models import vit, vit_keys
from spatial_jax.nn.resize import resize
from tests.towers import (
  DINO,
  RECORDED,
  TINY,
  TOLERANCE,
  abstract,
  images_of,
  jit,
  random_params,
  recorded,
  run,
  worst,
  worst_gradient,
)


@pytest.mark.parametrize("name", RECORDED)
def test_outputs_equal_those_recorded_from_each_system(name, tmp_path):
  table, sizes = RECORDED[name]
  inputs, want = recorded(name, tmp_path)
  model = vit.Model(**sizes)
  params = hf.load(table, tmp_path, abstract(model), ignore=vit_keys.IGNORE)
  tokens, out = run(model, params, inputs["pixels"].transpose(0, 2, 3, 1))
  if name in ("cambrian_siglip", "cambrian_dinov2"):
    side = int(tokens.shape[1] ** 0.5)
    tokens = tokens.reshape(len(tokens), side, side, -1)
    tokens = resize(tokens, (4, 4)).reshape(len(tokens), 16, -1)
  if "tokens" in want:
    assert worst(tokens, want["tokens"]) <= TOLERANCE
  else:
    assert worst(out["vit/tokens"], want["all_tokens"]) <= TOLERANCE


def tiny(**more):
  return vit.Model(**{**TINY, "image": 16, **DINO, "registers": 2, **more})


def test_blocks_after_the_output_layer_are_kept_but_not_computed():
  full, cut = tiny(final_norm="kept"), tiny(final_norm="kept", output_layer=-2)
  params, images = random_params(full), images_of(1, 16, 16)
  assert trees.diff(abstract(cut), params) == ""
  _, want = run(full, params, images)
  _, got = run(cut, params, images)
  assert got["vit/blocks"].shape[0] == 2
  np.testing.assert_allclose(
    got["vit/blocks"], want["vit/blocks"][:2], rtol=1e-5, atol=1e-5
  )
  np.testing.assert_array_equal(got["vit/tokens"], got["vit/blocks"][-1])

  def total(params):
    return jnp.sum(cut.apply({"params": params}, images)[0] ** 2)

  grads = jit(jax.grad(total))(params)
  kernel = grads["blocks"]["attention"]["query"]["kernel"]
  assert np.any(kernel[:2]) and not np.any(kernel[2])
  assert not np.any(grads["norm"]["scale"])


def test_read_blocks_equal_those_of_the_stack():
  model = tiny(read=(2, 0))
  params, images = random_params(model), images_of(2, 16, 16)
  _, out = run(model, params, images)
  np.testing.assert_array_equal(out["vit/read"][0], out["vit/blocks"][2])
  np.testing.assert_array_equal(out["vit/read"][1], out["vit/blocks"][0])


def test_rows_that_fill_tiles_change_no_number(monkeypatch):
  """19 tokens are 24 rows on a TPU, for whose matrices that is no copy."""
  model = tiny(read=(0,))
  params, images = random_params(model), images_of(2, 16, 16)

  def total(params):
    tokens, out = model.apply({"params": params}, images)
    read = out["vit/read"], out["vit/blocks"], out["vit/tokens"]
    return jnp.sum(tokens**3), read

  step = jax.value_and_grad(total, has_aux=True)
  want = jax.device_get(jit(step)(params))
  monkeypatch.setattr(sharding, "platform", lambda: "tpu")
  assert vit.on_tiles(jnp.zeros((1, 19, 2))).shape == (1, 24, 2)
  got = jax.device_get(jit(lambda params: step(params))(params))
  for a, b in zip(*map(jax.tree.leaves, (got[0], want[0])), strict=True):
    assert worst(a, b) <= TOLERANCE
  assert worst_gradient(got[1], want[1]) <= TOLERANCE


def test_intermediates_cost_no_memory_where_they_are_not_used():
  def temporaries(layers):
    model = tiny(layers=layers, read=(1,))
    images = np.zeros((4, 64, 64, 3), np.float32)
    params = abstract(model, images)

    def forward(params, images):
      tokens, out = model.apply({"params": params}, images)
      return tokens, out["vit/read"]

    compiled = jax.jit(forward).lower(params, images).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  # The residual stream is [4 259 32] float32: 133 kB a block.
  assert temporaries(24) - temporaries(4) < 1.5 * 4 * 259 * 32 * 4


def test_pixels_beyond_the_last_whole_patch_do_not_matter():
  model = tiny()
  params, images = random_params(model), images_of(1, 19, 18)
  tokens, _ = run(model, params, images)
  cropped, _ = run(model, params, images[:, :16, :16])
  np.testing.assert_array_equal(tokens, cropped)


def test_an_image_does_not_see_the_others_of_its_batch():
  model = tiny()
  params, images = random_params(model), images_of(2, 16, 16)
  before, _ = run(model, params, images)
  # Another array: the first run may still be reading this one.
  other = images + np.float32([0, 1])[:, None, None, None]
  after, _ = run(model, params, other)
  np.testing.assert_array_equal(before[0], after[0])
  assert np.all(np.any(before[1] != after[1], axis=-1))


def test_recomputing_and_bfloat16_keep_the_numbers():
  params, images = random_params(tiny()), images_of(1, 16, 16)
  params = jax.tree.map(lambda x: x * np.float32(0.2), params)

  def gradient(model):
    def total(params):
      tokens, _ = model.apply({"params": params}, images)
      return jnp.mean(tokens.astype(jnp.float32) ** 2)

    return jit(jax.grad(total))(params)

  want = gradient(tiny())
  got = gradient(tiny(remat="full"))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  exact, _ = run(tiny(), params, images)
  tokens, out = run(tiny(dtype="bfloat16"), params, images)
  assert tokens.dtype == out["vit/blocks"].dtype == "bfloat16"
  assert worst(np.asarray(tokens, np.float32), exact) < 0.05


@pytest.mark.parametrize(
  ("more", "size", "message"),
  [
    ({"output_layer": 0}, 16, "output_layer=0 is none of -1 to -3"),
    ({"output_layer": -4}, 16, "output_layer=-4 is none of -1 to -3"),
    ({"read": (3,)}, 16, "asks for blocks that are not computed"),
    ({"resample": "nearest"}, 16, "resample='nearest' is unknown"),
    ({"activation": "swish"}, 16, "activation 'swish' is unknown"),
    ({"final_norm": "maybe"}, 16, "final_norm='maybe' is unknown"),
    ({}, 3, "images of 3 x 3 pixels hold no patch of 4 x 4"),
  ],
)
def test_wrong_arguments_say_what_is_expected(more, size, message):
  with pytest.raises(ValueError, match=message):
    abstract(tiny(**more), images_of(1, size, size))
