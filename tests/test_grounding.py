# SPDX-License-Identifier: Apache-2.0
"""The grounding decoder: neighbours, distances, boxes, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spatial_jax.geometry import boxes as box_lib
from spatial_jax.models import grounding
from spatial_jax.models.grounding import DistanceAttention

rng = np.random.default_rng(0)


def test_neighbours_are_the_nearest_valid_points():
  points = rng.normal(size=(2, 30, 3)).astype(np.float32)
  valid = rng.random((2, 30)) < 0.7
  queries = rng.normal(size=(2, 4, 3)).astype(np.float32)
  got = np.asarray(grounding.nearest(queries, points, valid, 5))
  for b in range(2):
    away = np.linalg.norm(queries[b][:, None] - points[b][None], axis=-1)
    away[:, ~valid[b]] = np.inf
    np.testing.assert_array_equal(got[b], np.argsort(away, axis=1)[:, :5])


def test_distance_takes_from_attention_what_sigma_says():
  x = rng.normal(size=(1, 4, 3)).astype(np.float32)
  distance = np.abs(rng.normal(size=(1, 4, 4))).astype(np.float32)
  mask = np.array([[True, True, True, False]])
  zero = {"kernel": np.zeros((3, 3), "f4"), "bias": np.zeros(3, "f4")}
  same = {**zero, "kernel": np.eye(3, dtype="f4")}
  sigma = {"kernel": np.ones((3, 1), "f4"), "bias": np.full(1, 0.5, "f4")}
  params = {"query": zero, "key": zero, "value": same, "out": same}
  got = DistanceAttention(1, "float32").apply(
    {"params": {**params, "sigma": sigma}}, x, distance, mask
  )
  scores = -(x[0].sum(-1) + 0.5)[:, None] * distance[0]
  weights = np.exp(scores[:, :3])
  want = weights / weights.sum(1, keepdims=True) @ x[0, :3]
  np.testing.assert_allclose(got[0], want, atol=1e-5)


def test_diou_is_overlap_and_distance_of_centres():
  box = np.array([0, 0, 0, 2, 2, 2], np.float32)
  moved = box + np.array([1, 0, 0, 0, 0, 0], np.float32)
  got = grounding.diou_loss(np.stack([box, moved]), np.stack([box, box]))
  low, high = box[:3] - 1, box[:3] + 1
  move = np.array([1, 0, 0], np.float32)
  iou = box_lib.iou_aligned(low, high, low + move, high + move)
  np.testing.assert_allclose(got, [0, 1 - iou + 1 / (9 + 4 + 4)], atol=1e-6)


def test_true_boxes_take_different_queries():
  cost = jnp.array([[0.0, 1, 2], [0.1, 0.2, 3], [0, 0, 0]])
  mask = jnp.array([True, True, False])
  np.testing.assert_array_equal(grounding.match(cost, mask), [0, 1, 3])


def test_padding_boxes_change_no_loss():
  found = rng.uniform(0.5, 1, (2, 1, 6, 6)).astype(np.float32)
  scores = rng.normal(size=(2, 1, 6)).astype(np.float32)
  truth = rng.uniform(0.5, 1, (1, 2, 6)).astype(np.float32)
  loss = jax.jit(grounding.loss)
  one, _ = loss(found, scores, truth, np.ones((1, 2), bool))
  padded = np.concatenate([truth, np.zeros((1, 3, 6), np.float32)], axis=1)
  mask = np.array([[True, True, False, False, False]])
  two, _ = loss(found, scores, padded, mask)
  assert float(one) == pytest.approx(float(two), rel=1e-6)


def rooms(count, seed):
  """Three clusters of points a room, of one kind each; the token names one."""
  rng = np.random.default_rng(seed)
  centers = rng.uniform(-2, 2, (count, 3, 3))
  centers[..., 0] += np.array([-4, 0, 4])  # apart
  kind = np.stack([rng.permutation(3) for _ in range(count)])
  edges = np.array([[0.6, 0.6, 0.6], [1, 1, 1.0], [1.4, 1, 0.6]])[kind]
  inside = rng.uniform(-0.5, 0.5, (count, 3, 8, 3)) * edges[:, :, None]
  points = (centers[:, :, None] + inside).reshape(count, 24, 3)
  features = np.eye(3)[np.repeat(kind, 8, axis=1)]
  asked = rng.integers(0, 3, count)
  at = np.argmax(kind == asked[:, None], axis=1)
  rows = np.arange(count)
  truth = np.concatenate([centers[rows, at], edges[rows, at]], axis=-1)
  return tuple(
    x.astype(np.float32)
    for x in (points, features, np.eye(3)[asked], truth[:, None])
  )


def test_the_decoder_learns_to_find_what_the_token_names():
  model = grounding.Decoder(
    queries=12, width=24, heads=2, mlp=48, neighbours=(4, 8)
  )
  points, features, token, truth = rooms(32, 0)
  valid = np.ones(points.shape[:2], bool)
  tx = optax.adam(4e-3)

  def compute(params, points, features, token, truth):
    boxes, scores, _ = model.apply(params, points, valid, features, token)
    mask = jnp.ones(truth.shape[:2], bool)
    return grounding.loss(boxes, scores, truth, mask)[0], (boxes, scores)

  rows = (points, features, token, truth)

  @jax.jit
  def train(key):
    params = model.init(key, points, valid, features, token)

    def step(state, _):
      params, opt = state
      compute_grad = jax.value_and_grad(compute, has_aux=True)
      (value, found), grads = compute_grad(params, *rows)
      updates, opt = tx.update(grads, opt)
      return (optax.apply_updates(params, updates), opt), (value, found)

    state = (params, tx.init(params))
    _, (values, found) = jax.lax.scan(step, state, None, length=120)
    return values, *jax.tree.map(lambda x: x[-1], found)

  values, boxes, scores = train(jax.random.key(0))
  best = np.asarray(scores[-1]).argmax(-1)
  found = np.asarray(boxes[-1])[np.arange(len(best)), best]
  iou = 1 - np.asarray(grounding.diou_loss(found, truth[:, 0]))
  print(values[0], values[-1], np.mean(iou > 0.25))
  assert values[-1] < 0.5 * values[0]
  assert np.mean(iou > 0.25) > 0.8
