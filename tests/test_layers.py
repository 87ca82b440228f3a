# SPDX-License-Identifier: Apache-2.0
"""Functions that all models share, against their definitions in float64."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax.nn.layers import LayerNorm, activation, gelu

X = np.linspace(-9, 9, 1001, dtype=np.float32)
LOGISTIC = 2 * math.sqrt(2 / math.pi)  # tanh's GELU is x logistic(LOGISTIC u)


def normal(x):
  below = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
  density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
  return x * below, below + x * density


def swish(x):
  share = 1 / (1 + np.exp(-x))
  return x * share, share + x * share * (1 - share)


def tanh(x):
  share = 1 / (1 + np.exp(-LOGISTIC * (x + 0.044715 * x**3)))
  inner = LOGISTIC * (1 + 3 * 0.044715 * x**2)
  return x * share, share + x * share * (1 - share) * inner


@pytest.mark.parametrize(
  ("dtype", "rtol"), [("float32", 0), ("bfloat16", 2**-8)]
)
# A slope of tanh is 1 - tanh^2, which leaves fewer digits.
@pytest.mark.parametrize(
  ("name", "exact", "atol"),
  [("gelu", normal, 2e-6), ("gelu_tanh", tanh, 1e-5), ("silu", swish, 2e-6)],
)
def test_only_the_last_step_is_rounded(name, exact, atol, dtype, rtol):
  function, x = activation(name), jnp.asarray(X, dtype)
  value, slope = exact(np.asarray(x, np.float64))

  def total(x):
    return jnp.sum(function(x).astype(jnp.float32))

  for got, want in ((function, value), (jax.grad(total), slope)):
    y = jax.jit(got)(x)
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(np.float32), want, rtol, atol)


def test_values_in_bfloat16_are_those_of_torch():
  if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed, and it is what is compared with")
  import torch

  want = torch.nn.functional.silu(torch.tensor(X).bfloat16()).float()
  got = jax.jit(activation("silu"))(jnp.asarray(X, "bfloat16"))
  np.testing.assert_array_equal(got.astype(np.float32), want)


def test_a_gradient_keeps_one_array():
  kept = jax.tree.leaves(jax.vjp(gelu, jnp.asarray(X, "bfloat16"))[1])
  assert [(x.shape, x.dtype) for x in kept] == [(X.shape, jnp.bfloat16)]
  # Tangents as well: nothing here is for one direction alone.
  x = jnp.bfloat16(0.5)
  tangent = jax.jvp(gelu, (x,), (jnp.bfloat16(2),))[1]
  want = 2 * normal(np.array([0.5]))[1][0]
  np.testing.assert_allclose(float(tangent), want, rtol=2**-8)


def test_gradient_of_a_norm_is_that_of_its_definition():
  rng = np.random.default_rng(0)
  x = rng.normal(3, [[0.01], [1], [30]], (3, 4096)).astype(np.float32)
  weights = rng.normal(size=x.shape).astype(np.float32)
  norm = LayerNorm(1e-5)
  params = {
    "scale": rng.normal(size=4096).astype(np.float32),
    "bias": rng.normal(size=4096).astype(np.float32),
  }

  def total(params, x):
    return jnp.sum(norm.apply({"params": params}, x) * weights)

  found = jax.jit(jax.grad(total, (0, 1)))(params, x)
  rows, x64 = weights * params["scale"].astype(np.float64), x.astype(np.float64)
  y = x64 - x64.mean(1, keepdims=True)
  deviation = np.sqrt((y**2).mean(1, keepdims=True) + 1e-5)
  y /= deviation
  along = (rows * y).mean(1, keepdims=True)
  want_x = (rows - rows.mean(1, keepdims=True) - y * along) / deviation
  # Row by row: their gradients differ by three orders of magnitude.
  for got, exact in (
    (found[0]["scale"], (weights * y).sum(0)),
    (found[0]["bias"], weights.sum(0)),
    *zip(found[1], want_x, strict=True),
  ):
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-5 * abs(exact).max())
