# SPDX-License-Identifier: Apache-2.0
"""Attention in parts, and what a block keeps for its gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax import sharding
from spatial_jax.models import llm
from spatial_jax.nn import attention
from spatial_jax.plan import cost
from tests.test_kernels import arrays, packed


def equations(function, *arguments):
  return [e for e, _, _ in cost.equations(jax.make_jaxpr(function)(*arguments))]


def largest(function, *arguments):
  """Numbers of the largest array that a program computes."""
  found = equations(function, *arguments)
  return max(math.prod(v.aval.shape) for e in found for v in e.outvars)


# The last part is shorter than the others.
@pytest.mark.parametrize("T, N, K, parts", [(149, 4, 2, 3), (97, 2, 2, 2)])
def test_a_causal_mask_is_computed_in_parts(T, N, K, parts):
  inputs, mask = arrays(0, 2, T, T, N, K, 8), packed(T)

  def total(inputs):
    out = attention.attention(*inputs, mask, causal=True)
    return jnp.sum(jnp.sin(out)), out

  both = jax.grad(total, has_aux=True)
  want = jax.jit(both)(inputs)  # without a mesh: all at once
  assert largest(total, inputs) == 2 * N * T * T
  with jax.set_mesh(sharding.mesh(devices=jax.devices()[:1])):
    # A function of its own: jit keeps programs by function and arguments.
    got = jax.jit(lambda x: both(x))(inputs)
    most = largest(lambda x: total(x), inputs)
  size = -(-T // parts)
  assert most == 2 * N * T * (T - size * (parts - 1))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    got,
    want,
  )


def test_parts_are_few_and_not_short():
  shape = {
    T: jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
    for T in (1, 47, 96, 200, 5000)
  }
  with jax.set_mesh(sharding.mesh(devices=jax.devices()[:1])):
    found = {T: attention._parts(x, x) for T, x in shape.items()}
    assert found == {1: 1, 47: 1, 96: 2, 200: 4, 5000: 8}
    # Keys of a cache are more than the queries: no square.
    assert attention._parts(shape[200], shape[5000]) == 1
  assert attention._parts(shape[200], shape[200]) == 1


def test_remat_of_products_computes_none_of_them_again():
  def primitives(remat):
    model = llm.Model(
      vocab=16,
      width=16,
      layers=2,
      heads=2,
      kv_heads=1,
      mlp=16,
      sections=None,
      remat=remat,
    )
    ids = np.zeros((1, 8), np.int32)
    ones = np.ones_like(ids)
    params = jax.eval_shape(model.init, jax.random.key(0), ids, ids, ones)

    def loss(params):
      return jnp.sum(model.apply(params, ids, ids, ones)[0])

    return [e.primitive.name for e in equations(jax.grad(loss), params)]

  def products(remat):
    return primitives(remat).count("dot_general")

  kept = products("none")
  assert products("products") == kept
  assert products("attention") > kept
  # All but the last of a layer's seven weights, and attention's two products.
  assert products("full") == kept + 8
  # What attention reads is kept as it was turned: halves beside each other.
  turns = [primitives(x).count("concatenate") for x in ("none", "products")]
  assert turns[0] == turns[1] > 0
  assert primitives("attention").count("concatenate") > turns[0]
