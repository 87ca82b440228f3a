# SPDX-License-Identifier: Apache-2.0
"""Grids are resampled as PyTorch does it, on which checkpoints depend."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax.geometry import resample
from spatial_jax.nn.resize import resize


def grid(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("size", [(5, 31), (13, 9), (26, 4), (1, 1)])
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", ["plain", "antialias", "align_corners"])
def test_resampled_grids_equal_those_of_torch(method, kind, size):
  if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed, and it is what is compared with")
  import torch

  x = grid(2, 13, 9, 3)
  more = {} if kind == "plain" else {kind: True}
  want = torch.nn.functional.interpolate(
    torch.tensor(x).permute(0, 3, 1, 2),
    size=size,
    mode=method,
    **{"align_corners": False, **more},
  )
  got = resize(x, size, method, **more)
  np.testing.assert_allclose(got, want.permute(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(37, 27), (37, 16), (16, 37), (7, 5)])
def test_a_given_scale_samples_where_early_dinov2_does(old, new):
  if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed, and it is what is compared with")
  import torch

  x, scale = grid(old, old, 2), (new + 0.1) / old
  want = torch.nn.functional.interpolate(
    torch.tensor(x).permute(2, 0, 1)[None],
    scale_factor=(scale, scale),
    mode="bicubic",
  )[0].permute(1, 2, 0)
  got = resize(x, (new, new), "bicubic", scale=(scale, scale))
  np.testing.assert_allclose(got, want, atol=1e-5)
  other = resize(x, (new, new), "bicubic")
  assert np.max(np.abs(got - other)) > 1e-3  # the quirk is no rounding


def test_halving_takes_means_of_pairs():
  want = [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
  np.testing.assert_allclose(resample.weights(4, 2), want)
  wide = [[3, 3, 1, 0], [0, 1, 3, 3]]
  got = resample.weights(4, 2, antialias=True)
  np.testing.assert_allclose(got, np.array(wide) / 7, atol=1e-6)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [False, True])
def test_constants_stay_and_the_same_size_changes_nothing(method, antialias):
  for new in (3, 8, 20):
    weights = resample.weights(8, new, method, antialias)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
  same = resample.weights(8, 8, method, antialias)
  np.testing.assert_array_equal(same, np.eye(8))
  x = jnp.asarray(grid(8, 8, 2))
  assert resize(x, (8, 8), method, antialias=antialias) is x
  # Not where another scale is asked for.
  assert resize(x, (8, 8), method, scale=(1.1, 1.1)) is not x


def test_a_ramp_stays_a_ramp_away_from_the_border():
  x = np.arange(12, dtype=np.float32)
  # The cubic kernel without antialiasing, a = -0.75, has not this property.
  for weights in (
    resample.weights(12, 24),
    resample.weights(12, 24, antialias=True),
    resample.weights(12, 24, "bicubic", antialias=True),
  ):
    np.testing.assert_allclose(np.diff((weights @ x)[6:-6]), 0.5, atol=1e-5)


def test_the_dtype_stays_but_the_sums_are_float32():
  x = np.asarray(resize(grid(9, 9, 4), (5, 5))).astype("bfloat16")
  got = resize(x, (3, 3))
  want = resize(x.astype(np.float32), (3, 3)).astype("bfloat16")
  assert got.dtype == "bfloat16"
  np.testing.assert_array_equal(got, want)


def test_unknown_ways_are_refused():
  with pytest.raises(ValueError, match="use 'bilinear' or 'bicubic'"):
    resample.weights(4, 2, "nearest")
  with pytest.raises(ValueError, match="antialias without align_corners"):
    resample.weights(4, 2, antialias=True, align_corners=True)
