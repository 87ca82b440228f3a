# SPDX-License-Identifier: Apache-2.0
"""Boxes from 3D patches and one token: LLaVA-3D's second grounding decoder.

Paper: https://arxiv.org/abs/2409.18125 (third version, supplement). Neither
code nor weights of it were published.
patch points, features, hidden state of <LOC> -> queries at farthest points ->
L x (attention to the k nearest patches, distance-adaptive attention among
queries and <LOC>, MLP) -> a box and a score for each query.

As the paper says: queries start with zero content and an embedding of their
place; k grows from layer to layer; self-attention subtracts sigma times the
distance of two queries, sigma predicted from the query
(https://arxiv.org/abs/2501.01163), and nothing between queries and <LOC>; a
two-layer MLP gives boxes after every layer, the similarity with <LOC> scores;
DIoU and InfoNCE are the losses.

What it leaves open, and is chosen here:
1. <LOC> is projected to the decoder's width. MLPs have a residual connection
   and a LayerNorm before them, as the attentions have.
2. The embedding of (query - patch) is added to what a patch gives to keys and
   values.
3. A box is an offset from its query and the logarithms of its edges, metres.
4. Similarity is the cosine over a temperature of 0.07.
5. Each true box in turn takes the free query with the least DIoU loss minus
   score. All losses count alike.

Letters: B batch, P patches, Q queries, k neighbours, D width, N heads, H head
dim, G true boxes, L layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from spatial_jax.geometry.fps import farthest_points
from spatial_jax.nn.layers import Dense, LayerNorm, Mlp
from spatial_jax.nn.lift import PointEmbed
from spatial_jax.types import Array, Bool, Float, Int

Out = dict[str, Any]
MASKED = -1e30


class Neighbours(nn.Module):
  """Each query attends to the patches nearest to it."""

  heads: int
  dtype: str

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B Q D"],
    near: Float[Array, "B Q k D"],
    away: Float[Array, "B Q k 3"],
    mask: Bool[Array, "B Q k"],
  ) -> Float[Array, "B Q D"]:
    """Args: `near` features, `away` query minus patch in metres, valid ones."""
    *lead, D = x.shape

    def split(y, name):
      y = Dense(D, dtype=self.dtype, name=name)(y)
      return y.reshape(*y.shape[:-1], self.heads, D // self.heads)

    near = near + PointEmbed(D, self.dtype, name="relative")(away)
    query, key = split(x, "query"), split(near, "key")
    scores = (
      jnp.einsum("bqnh,bqknh->bqnk", query, key) * (D // self.heads) ** -0.5
    )
    scores = jnp.where(mask[:, :, None], scores.astype(jnp.float32), MASKED)
    weights = jax.nn.softmax(scores, axis=-1) * mask[:, :, None]
    weights = weights.astype(self.dtype)
    y = jnp.einsum("bqnk,bqknh->bqnh", weights, split(near, "value"))
    return Dense(D, dtype=self.dtype, name="out")(y.reshape(*lead, D))


class DistanceAttention(nn.Module):
  """Attention that looks less at what is far away, as each token decides."""

  heads: int
  dtype: str

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    distance: Float[Array, "B T T"],
    mask: Bool[Array, "B T"],
  ) -> Float[Array, "B T D"]:
    """softmax(q k / sqrt(H) - sigma(x) distance) v over valid tokens."""
    B, T, D = x.shape

    def split(name):
      y = Dense(D, dtype=self.dtype, name=name)(x)
      return y.reshape(B, T, self.heads, D // self.heads)

    sigma = Dense(self.heads, dtype=self.dtype, name="sigma")(x)
    scores = jnp.einsum("btnh,bsnh->bnts", split("query"), split("key"))
    scores = scores.astype(jnp.float32) * (D // self.heads) ** -0.5
    reach = jnp.moveaxis(sigma, -1, 1).astype(jnp.float32)  # B N T
    scores = scores - reach[..., None] * distance[:, None]
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
    y = jnp.einsum("bnts,bsnh->btnh", weights, split("value"))
    return Dense(D, dtype=self.dtype, name="out")(y.reshape(B, T, D))


class Decoder(nn.Module):
  """Queries to boxes; see the module docstring."""

  queries: int = 512
  width: int = 256
  heads: int = 8
  mlp: int = 1024
  neighbours: tuple[int, ...] = (16, 32, 64, 128)  # of each layer
  temperature: float = 0.07
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self,
    points: Float[Array, "B P 3"],
    valid: Bool[Array, "B P"],
    features: Float[Array, "B P E"],
    token: Float[Array, "B E"],
  ) -> tuple[Float[Array, "L B Q 6"], Float[Array, "L B Q"], Out]:
    """Boxes (centre, edges; metres, world) and scores after every layer.

    Scores of queries without a valid point of their own are very low.
    """
    P = points.shape[1]
    Q, most = min(self.queries, P), min(max(self.neighbours), P)
    points = jax.lax.stop_gradient(points)
    chosen = jax.vmap(lambda x, m: farthest_points(x, Q, m))(points, valid)
    mask = jnp.arange(Q)[None] < valid.sum(-1, keepdims=True)
    place = _take(points, chosen)  # B Q 3
    index = nearest(place, points, valid, most)
    dense = _dense(self)
    features = dense("features")(features)
    near = _take(features, index.reshape(len(index), -1))
    near = near.reshape(*index.shape, self.width)
    there = _take(points, index.reshape(len(index), -1))
    away = place[:, :, None] - there.reshape(*index.shape, 3)
    seen = jnp.take_along_axis(valid[:, None], index, axis=-1)
    distance = jnp.sqrt(
      _squares(place[:, :, None] - place[:, None]) + 1e-12
    )  # its slope at 0 would be infinite
    distance = jnp.pad(distance, ((0, 0), (0, 1), (0, 1)))  # <LOC> is last
    token = dense("token")(token)[:, None]
    where = PointEmbed(self.width, self.dtype, name="place_embed")(place)
    all_mask = jnp.pad(mask, ((0, 0), (0, 1)), constant_values=True)
    x, boxes, scores = jnp.zeros_like(where), [], []
    for i, k in enumerate(min(k, P) for k in self.neighbours):
      y = LayerNorm(dtype=self.dtype, name=f"near_norm_{i}")(x + where)
      x = x + Neighbours(self.heads, self.dtype, name=f"near_{i}")(
        y, near[:, :, :k], away[:, :, :k], seen[:, :, :k]
      )
      both = jnp.concatenate([x + where, token], axis=1)
      y = LayerNorm(dtype=self.dtype, name=f"attention_norm_{i}")(both)
      y = DistanceAttention(self.heads, self.dtype, name=f"attention_{i}")(
        y, distance, all_mask
      )
      x, token = x + y[:, :-1], token + y[:, -1:]
      y = LayerNorm(dtype=self.dtype, name=f"mlp_norm_{i}")(x)
      x = x + Mlp(self.mlp, dtype=self.dtype, name=f"mlp_{i}")(y)
      box = Mlp(
        self.width, "relu", dtype=self.dtype, out_width=6, name=f"box_{i}"
      )(x).astype(jnp.float32)
      center, edges = place + box[..., :3], jnp.exp(box[..., 3:])
      boxes.append(jnp.concatenate([center, edges], axis=-1))
      score = _cosine(x, token) / self.temperature
      scores.append(jnp.where(mask, score, MASKED))
    return jnp.stack(boxes), jnp.stack(scores), {"ground/chosen": chosen}


def _dense(module):
  def dense(name):
    return Dense(module.width, dtype=module.dtype, name=name)

  return dense


def _take(x, index):
  return jnp.take_along_axis(x, index[..., None], axis=1)


def _squares(x):
  return jnp.sum(x * x, axis=-1)


def _cosine(x, token):
  x, token = x.astype(jnp.float32), token.astype(jnp.float32)
  x = x * jax.lax.rsqrt(_squares(x) + 1e-12)[..., None]
  token = token * jax.lax.rsqrt(_squares(token) + 1e-12)[..., None]
  return jnp.sum(x * token, axis=-1)


def nearest(
  queries: Float[Array, "B Q 3"],
  points: Float[Array, "B P 3"],
  valid: Bool[Array, "B P"],
  count: int,
) -> Int[Array, "B Q k"]:
  """The nearest valid points of each query, nearest first."""
  away = sum(
    (queries[:, :, None, i] - points[:, None, :, i]) ** 2 for i in range(3)
  )
  away = jnp.where(valid[:, None], away, jnp.inf)
  return jax.lax.top_k(-away, count)[1]


def diou_loss(
  a: Float[Array, "*#b 6"], b: Float[Array, "*#b 6"]
) -> Float[Array, "*b"]:
  """1 - IoU + (distance of centres / diagonal of the box around both)^2."""
  low_a, high_a = a[..., :3] - a[..., 3:] / 2, a[..., :3] + a[..., 3:] / 2
  low_b, high_b = b[..., :3] - b[..., 3:] / 2, b[..., :3] + b[..., 3:] / 2
  edges = jnp.minimum(high_a, high_b) - jnp.maximum(low_a, low_b)
  both = jnp.prod(jnp.maximum(edges, 0), axis=-1)
  union = jnp.prod(a[..., 3:], axis=-1) + jnp.prod(b[..., 3:], axis=-1) - both
  around = jnp.maximum(high_a, high_b) - jnp.minimum(low_a, low_b)
  apart = _squares(a[..., :3] - b[..., :3]) / (_squares(around) + 1e-9)
  return 1 - both / (union + 1e-9) + apart


def match(
  cost: Float[Array, "G Q"], mask: Bool[Array, " G"]
) -> Int[Array, " G"]:
  """Each true box in turn takes the free query that costs least; Q: none."""
  Q = cost.shape[1]

  def step(free, row):
    costs, is_box = row
    best = jnp.argmin(jnp.where(free, costs, jnp.inf)).astype(jnp.int32)
    free = free & ~(is_box & (jnp.arange(Q) == best))
    return free, jnp.where(is_box, best, Q)

  return jax.lax.scan(step, jnp.ones(Q, bool), (cost, mask))[1]


def loss(
  boxes: Float[Array, "L B Q 6"],
  scores: Float[Array, "L B Q"],
  truth: Float[Array, "B G 6"],
  truth_mask: Bool[Array, "B G"],
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """Mean over layers and true boxes of DIoU and InfoNCE, and both."""
  Q = boxes.shape[2]

  def one(boxes, scores, truth, mask):
    apart = diou_loss(boxes[None], truth[:, None])  # G Q
    cost = apart - jax.nn.softmax(scores)[None]
    cost = jax.lax.stop_gradient(cost) + 1e6 * (scores < MASKED / 2)[None]
    taken = match(cost, mask)
    at = jnp.minimum(taken, Q - 1)
    box = jnp.take_along_axis(apart, at[:, None], axis=1)[:, 0]
    word = jax.nn.logsumexp(scores) - scores[at]
    return jnp.where(mask, box, 0).sum(), jnp.where(mask, word, 0).sum()

  rows = jax.vmap(jax.vmap(one), in_axes=(0, 0, None, None))
  box, word = rows(boxes, scores, truth, truth_mask)
  count = jnp.maximum(truth_mask.sum(), 1) * boxes.shape[0]
  box, word = box.sum() / count, word.sum() / count
  return box + word, {"diou": box, "info_nce": word}
