# SPDX-License-Identifier: Apache-2.0
"""Rows of slots: orders that are counted, gradients that are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax.models import llm
from spatial_jax.nn import slots
from tests.towers import jit


@pytest.mark.parametrize("length", [3, 9, 20])
def test_the_order_that_is_counted_is_the_sorted_one(length):
  rng = np.random.default_rng(length)
  mask = rng.random((4, 20)) < np.array([[0.5], [0.2], [0], [1]])
  x, weight = rng.normal(size=(2, 4, 20, 3)).astype("f")
  order, place = jit(slots.in_front, static_argnums=1)(mask, length)
  want = np.argsort(~mask, axis=1, kind="stable")
  np.testing.assert_array_equal(order, want[:, :length])
  there = np.take_along_axis(np.asarray(place), want, axis=1)
  np.testing.assert_array_equal(there, [range(20)] * 4)

  def total(take, x):
    return jnp.sum(weight[:, :length] * take(x))

  got = jax.grad(lambda x: total(lambda x: slots.pick(x, order, place), x))(x)
  by_sum = jax.grad(lambda x: total(lambda x: slots.take(x, order), x))(x)
  np.testing.assert_array_equal(got, by_sum)


def test_image_tokens_give_each_feature_the_gradient_of_its_own():
  """The first row has fewer image tokens than features, the last none."""
  rng = np.random.default_rng(0)
  is_image = rng.random((3, 12)) < np.array([[0.3], [0.6], [0]])
  text, weight = rng.normal(size=(2, 3, 12, 4)).astype("f")
  merged = rng.normal(size=(3, 12, 4)).astype("f")

  def total(merged, text, one_hot):
    row = llm.place(text, merged, is_image, one_hot=one_hot)
    return jnp.sum(weight * row**2)

  step = jit(jax.value_and_grad(total, argnums=(0, 1)), static_argnums=2)
  got = jax.device_get(step(merged, text, False))
  want = jax.device_get(step(merged, text, True))
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
