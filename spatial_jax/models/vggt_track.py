# SPDX-License-Identifier: Apache-2.0
"""VGGT's point tracker: where points of the first frame are in the others.

Papers: https://arxiv.org/abs/2503.11651, CoTracker
https://arxiv.org/abs/2307.07635.
features [B F h w C], queries [B N 2] -> guess: the same place in all frames ->
4 x (correlation with the features around the guess, motion, features ->
transformer over frames and points -> correction) -> tracks, visibility.

Coordinates are (x, y) in pixels of the features, with pixel centres at whole
numbers.

Departures from the reference, which change no number beyond rounding:
1. Correlations are computed where they are read, in a window around each point,
   not over the whole map.
2. The two halves of the position table are interpolated along one axis each.

The flow embedding turns by up to 1000 radians a pixel: what one iteration
rounds off, the next one sees.

Letters: B batch, F frames, N points, C channels, D width, R rows, T tokens of
a row, S keys, K side of a window, h w grid of features, I iterations.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from spatial_jax import hf
from spatial_jax.models import dino
from spatial_jax.nn.attention import attention
from spatial_jax.nn.layers import Dense, LayerNorm, gelu, scan_layers
from spatial_jax.types import Array, Float

_LONGEST = 518.0  # pixels that motion is divided by, at any image size
_FASTEST = 1000.0  # radians per pixel in the flow embedding


def _block_keys(attention):
  parts = [f"attention/{part}" for part in ("query", "key", "value")]
  return (
    *dino.norm_keys("norm1", "attention_norm"),
    *dino.norm_keys("norm_context", "context_norm"),
    (f"{attention}.in_proj_weight", tuple(f"{part}/kernel" for part in parts)),
    (f"{attention}.in_proj_bias", tuple(f"{part}/bias" for part in parts)),
    *dino.linear_keys(f"{attention}.out_proj", "attention/out"),
    *dino.norm_keys("norm2", "mlp_norm"),
    *dino.linear_keys("mlp.fc1", "up"),
    *dino.linear_keys("mlp.fc2", "down"),
  )


_UPDATE_KEYS = (
  ("virual_tracks", "virtual/embedding"),  # spelt like this
  *dino.norm_keys("input_norm", "input_norm"),
  *dino.linear_keys("input_transform", "input"),
  *dino.norm_keys("output_norm", "output_norm"),
  *dino.linear_keys("flow_head", "change"),
  *(
    row
    for theirs, attention, ours in (
      ("time_blocks", "attn", "time"),
      ("space_virtual2point_blocks", "cross_attn", "collect"),
      ("space_virtual_blocks", "attn", "mix"),
      ("space_point2virtual_blocks", "cross_attn", "spread"),
    )
    for row in hf.nest(
      _block_keys(attention), f"{theirs}.{{i}}.", f"layers/{ours}/"
    )
  ),
)
# Below "tracker." of the track head.
KEYS = (
  *dino.norm_keys("fmap_norm", "map_norm"),
  ("query_ref_token", "refine/frame/embedding"),
  *dino.linear_keys("corr_mlp.fc1", "refine/correlation_up"),
  *dino.linear_keys("corr_mlp.fc2", "refine/correlation_down"),
  *hf.nest(_UPDATE_KEYS, "updateformer.", "refine/"),
  *dino.norm_keys("ffeat_norm", "refine/feature_norm"),
  *dino.linear_keys("ffeat_updater.0", "refine/feature_update"),
  *dino.linear_keys("vis_predictor.0", "visibility"),
  *dino.linear_keys("conf_predictor.0", "confidence"),
)


def _dense(features, name):
  return Dense(features, kernel_init=dino.uniform_init, name=name)


class Attention(nn.Module):
  """Tokens of a row look at those of a context."""

  heads: int

  @nn.compact
  def __call__(
    self, x: Float[Array, "R T D"], context: Float[Array, "R S D"]
  ) -> Float[Array, "R T D"]:
    D = x.shape[-1]

    def project(y, name):
      y = _dense(D, name)(y)
      return y.reshape(*y.shape[:2], self.heads, D // self.heads)

    y = attention(
      project(x, "query"), project(context, "key"), project(context, "value")
    )
    return _dense(D, "out")(y.reshape(x.shape))


class Block(nn.Module):
  """Attention and MLP; the normalised input itself goes on."""

  heads: int

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "R T D"],
    context: Float[Array, "R S D"] | None = None,
  ) -> Float[Array, "R T D"]:
    D = x.shape[-1]
    x = LayerNorm(1e-5, name="attention_norm")(x)
    if context is None:
      context = x
    else:
      context = LayerNorm(1e-5, name="context_norm")(context)
    x = x + Attention(self.heads, name="attention")(x, context)
    y = _dense(4 * D, "up")(LayerNorm(1e-5, name="mlp_norm")(x))
    return x + _dense(D, "down")(gelu(y))


class Layer(nn.Module):
  """Along time, then within frames through virtual points, the last rows."""

  heads: int
  virtual: int

  @nn.compact
  def __call__(self, tokens: Float[Array, "B N F D"], _):
    B, N, F, D = tokens.shape

    def block(name):
      return Block(self.heads, name=name)

    x = block("time")(tokens.reshape(B * N, F, D)).reshape(B, N, F, D)
    x = x.swapaxes(1, 2).reshape(B * F, N, D)
    points, virtual = jnp.split(x, [N - self.virtual], axis=1)
    virtual = block("collect")(virtual, points)
    virtual = block("mix")(virtual)
    points = block("spread")(points, virtual)
    x = jnp.concatenate([points, virtual], axis=1).reshape(B, F, N, D)
    return x.swapaxes(1, 2), None


class Refine(nn.Module):
  """One iteration, shaped for a scan over iterations."""

  hidden: int
  depth: int
  heads: int
  virtual: int
  radius: int

  @nn.compact
  def __call__(self, carry, _, grids, queries, positions):
    guess, features = carry  # [B F N 2], [B F N C]
    C = features.shape[-1]
    # No gradient flows from one iteration to those before.
    guess = jax.lax.stop_gradient(guess)
    near = jnp.concatenate(
      [
        correlate(features, grid, guess / 2**level, self.radius)
        for level, grid in enumerate(grids)
      ],
      axis=-1,
    )
    near = gelu(_dense(self.hidden, "correlation_up")(near))
    near = _dense(C, "correlation_down")(near)
    flow = guess - guess[:, :1]
    slow = flow / _LONGEST
    x = [embed_flow(flow, C // 2), slow, slow, near, features]
    x = jnp.concatenate(x, axis=-1) + positions[:, None]
    init = nn.initializers.normal(1.0)
    frame = dino.Table((1, 2, x.shape[-1]), init, "float32", name="frame")()
    is_first = (jnp.arange(x.shape[1]) == 0)[None, :, None, None]
    x = x + jnp.where(is_first, frame[:, :1, None], frame[:, 1:, None])
    change = self._transform(x, 2 + C)
    new = LayerNorm(1e-5, name="feature_norm")(change[..., 2:])
    new = gelu(_dense(C, "feature_update")(new))
    guess = jnp.where(is_first, queries[:, None], guess + change[..., :2])
    return (guess, features + new), guess

  def _transform(self, x, outputs):
    """Corrections [B F N outputs] of inputs [B F N D]."""
    N = x.shape[2]
    x = _dense(self.hidden, "input")(LayerNorm(1e-5, name="input_norm")(x))
    x = x.swapaxes(1, 2)  # [B N F D]
    shape = 1, self.virtual, 1, self.hidden
    init = nn.initializers.normal(1.0)
    virtual = dino.Table(shape, init, "float32", name="virtual")()
    virtual = jnp.broadcast_to(
      virtual, (x.shape[0], self.virtual, *x.shape[2:])
    )
    layers = scan_layers(Layer, self.depth)(
      self.heads, self.virtual, name="layers"
    )
    y = layers(jnp.concatenate([x, virtual], axis=1), None)[0][:, :N]
    y = LayerNorm(1e-5, name="output_norm")(y + x)
    return _dense(outputs, "change")(y).swapaxes(1, 2)


class Tracker(nn.Module):
  """Tracks after each iteration, visibility and confidence after the last."""

  hidden: int = 384
  depth: int = 6
  levels: int = 7
  radius: int = 4
  iterations: int = 4
  heads: int = 8
  virtual: int = 64

  @nn.compact
  def __call__(
    self,
    features: Float[Array, "B F h w C"],
    queries: Float[Array, "B N 2"],
  ) -> tuple[
    Float[Array, "I B F N 2"], Float[Array, "B F N"], Float[Array, "B F N"]
  ]:
    F, h, w, C = features.shape[1:]
    grid = LayerNorm(1e-5, name="map_norm")(features)
    at = jnp.broadcast_to(
      queries[:, None], (len(queries), F, *queries.shape[1:])
    )
    seen = sample(grid[:, 0], queries)
    seen = jnp.broadcast_to(seen[:, None], (*at.shape[:-1], C))
    # The first frame's points never move, and neither do their positions.
    positions = sample_positions(queries, (h, w), 3 * C + 4)
    refine = nn.scan(
      Refine,
      variable_broadcast="params",
      split_rngs={"params": False},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=self.iterations,
    )(
      self.hidden,
      self.depth,
      self.heads,
      self.virtual,
      self.radius,
      name="refine",
    )
    grids = pyramid(grid, self.levels)
    (_, seen), tracks = refine((at, seen), None, grids, queries, positions)

    def chance(name):
      return nn.sigmoid(_dense(1, name)(seen)[..., 0])

    return tracks, chance("visibility"), chance("confidence")


def pyramid(grid: Float[Array, "B F h w C"], levels: int) -> list[Array]:
  """The grid, and means of four of each level for the next.

  An odd last row or column is left out.
  """
  made = [grid]
  for _ in range(levels - 1):
    B, F, h, w, C = made[-1].shape
    if min(h, w) < 2:
      raise ValueError(
        f"features of {grid.shape[2]} x {grid.shape[3]} cannot be halved "
        f"{levels - 1} times; use larger frames or fewer track_levels"
      )
    even = made[-1][:, :, : h // 2 * 2, : w // 2 * 2]
    even = even.reshape(B, F, h // 2, 2, w // 2, 2, C)
    made.append(even.mean((3, 5)))
  return made


def correlate(
  features: Float[Array, "B F N C"],
  grid: Float[Array, "B F h w C"],
  at: Float[Array, "B F N 2"],
  radius: int,
) -> Float[Array, "B F N KK"]:
  """Scaled products of points' features with the grid around them.

  The window's places follow each other column by column. Beyond the grid all is
  zero; but along an axis with a single place, everything is at that place.
  """
  B, F, N, C = features.shape
  h, w = grid.shape[2:4]
  corner = jnp.floor(at)
  is_wide = jnp.array([w > 1, h > 1], jnp.float32)[None, None, None]
  share = (at - corner) * is_wide
  reach = jnp.arange(-radius, radius + 2.0)
  place = corner[..., None] + reach[None, None, None, None]
  place = place * is_wide[..., None]  # [B F N 2 K+1]
  last = jnp.array([w - 1.0, h - 1.0])[None, None, None, :, None]
  inside = (place >= 0) & (place <= last)
  place = jnp.clip(place, 0, last).astype(jnp.int32)
  index = place[..., 1, None, :] * w + place[..., 0, :, None]
  is_inside = inside[..., 0, :, None] & inside[..., 1, None, :]
  picked = jnp.take_along_axis(
    grid.reshape(B, F, h * w, C), index.reshape(B, F, -1, 1), axis=2
  )
  product = jnp.einsum(
    "bfnkc,bfnc->bfnk", picked.reshape(B, F, N, -1, C), features
  )
  product = product.reshape(index.shape) * C**-0.5
  product = jnp.where(is_inside, product, 0.0)
  x, y = share[..., 0, None, None], share[..., 1, None, None]
  product = product[..., :-1, :] * (1 - x) + product[..., 1:, :] * x
  product = product[..., :-1] * (1 - y) + product[..., 1:] * y
  return product.reshape(B, F, N, -1)


def embed_flow(
  flow: Float[Array, "*b 2"], channels: int
) -> Float[Array, "*b C"]:
  """`channels` alternating sines and cosines for x, then as many for y."""
  omega = np.arange(0, channels, 2, np.float32) * np.float32(
    _FASTEST / channels
  )
  angle = flow[..., None] * jnp.expand_dims(omega, range(flow.ndim))
  waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
  return waves.reshape(*flow.shape[:-1], 2 * channels)


def sample(
  grid: Float[Array, "B h w C"], at: Float[Array, "B N 2"]
) -> Float[Array, "B N C"]:
  """Bilinear interpolation; beyond the border the border goes on."""
  B, h, w, C = grid.shape
  flat = grid.reshape(B, h * w, C)
  (x, right, dx), (y, below, dy) = (
    _neighbours(at[..., axis], size) for axis, size in ((0, w), (1, h))
  )

  def pick(row, column):
    return jnp.take_along_axis(flat, (row * w + column)[..., None], axis=1)

  top = pick(y, x) * (1 - dx) + pick(y, right) * dx
  bottom = pick(below, x) * (1 - dx) + pick(below, right) * dx
  return top * (1 - dy) + bottom * dy


def sample_positions(
  at: Float[Array, "B N 2"], size: Sequence[int], channels: int
) -> Float[Array, "B N C"]:
  """Sines and cosines of x, then of y, linear between whole pixels."""
  quarter = channels // 4
  omega = 10000.0 ** (-np.arange(quarter) / quarter)
  parts = []
  for axis, count in ((0, size[1]), (1, size[0])):
    angle = np.arange(count)[:, None] * omega
    table = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    table = jnp.asarray(table, jnp.float32)
    low, high, share = _neighbours(at[..., axis], count)
    parts.append(table[low] * (1 - share) + table[high] * share)
  return jnp.concatenate(parts, axis=-1)


def _neighbours(at: Array, count: int):
  """Whole numbers around places on an axis, and the share of the second."""
  at = jnp.clip(at, 0, count - 1)
  low = jnp.floor(at)
  share = (at - low)[..., None]
  low = low.astype(jnp.int32)
  return low, jnp.minimum(low + 1, count - 1), share
