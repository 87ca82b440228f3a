# SPDX-License-Identifier: Apache-2.0
"""Functions that all models share, against their definitions in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax.nn.layers import gelu

X = np.linspace(-9, 9, 1001, dtype=np.float32)


def exact(x):
  """The GELU and its slope."""
  x = np.asarray(x, np.float64)
  below = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
  density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
  return x * below, below + x * density


@pytest.mark.parametrize(
  ("dtype", "atol", "rtol"), [("float32", 2e-6, 0), ("bfloat16", 2e-6, 2**-8)]
)
def test_gelu_and_its_slope_are_exact_but_for_the_last_rounding(
  dtype, atol, rtol
):
  x = jnp.asarray(X, dtype)
  value, slope = exact(x)
  got = jax.jit(gelu)(x)
  assert got.dtype == dtype
  np.testing.assert_allclose(got.astype(np.float32), value, rtol, atol)
  got = jax.jit(jax.grad(lambda x: jnp.sum(gelu(x).astype(jnp.float32))))(x)
  assert got.dtype == dtype
  np.testing.assert_allclose(got.astype(np.float32), slope, rtol, atol)


def test_a_gradient_of_gelu_keeps_one_array():
  kept = jax.tree.leaves(jax.vjp(gelu, jnp.asarray(X, "bfloat16"))[1])
  assert [(x.shape, x.dtype) for x in kept] == [(X.shape, jnp.bfloat16)]
  # Tangents as well: nothing here is for one direction alone.
  tangent = functools.partial(jax.jvp, gelu, (jnp.float32(0.5),))
  np.testing.assert_allclose(
    tangent((jnp.float32(2.0),))[1], 2 * exact([0.5])[1][0], rtol=1e-6
  )
