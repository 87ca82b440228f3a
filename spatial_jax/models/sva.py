# SPDX-License-Identifier: Apache-2.0
"""Spatial Vision Aggregator: a grid of queries looks into several encoders.

Paper: https://arxiv.org/abs/2406.16860, section 3; the connector of Cambrian-1.
features of encoder i [B s_i*s_i D_i] -> projector -> [B s_i*s_i C], their mean
for the first one -> context [B C]; queries [B q*q C] -> layers, in which query
(r, c) sees the m_i x m_i cells of encoder i that lie under it, m_i = s_i / q,
of all encoders in one softmax -> groups of queries joined -> projector ->
L x L tokens, and a newline after each row -> [B L*(L+1) D].

A decoder may look again: between its blocks, the visual tokens of the residual
stream are the queries of further layers over the same windows (`inject`).

Departures from the paper, all as in the published code: the scores have heads,
and layer norms in front of every projection; a layer is wrapped in a projection
into C that reads the context and one back, and adds to its input.

Letters: B images, Q queries, S keys that a query sees, C width inside, D width
of tokens, E encoders, L side of the tokens' grid, T length of a decoder's rows,
q s m sides of the queries' grid, of an encoder's and of a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from spatial_jax.models.llm import remat
from spatial_jax.nn.attention import attention, share
from spatial_jax.nn.layers import (
  Dense,
  Embed,
  LayerNorm,
  activation,
  scan_layers,
  standardized,
)
from spatial_jax.nn.resize import resize
from spatial_jax.types import Array, Bool, Float, Int

EPS = 1e-5
# Uniform within 1 / sqrt(fan in), as published. Wider starts would drown the
# residual stream of a decoder that has been trained without these layers.
_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _dense(features, dtype, name, use_bias=False):
  return Dense(features, use_bias, dtype, _INIT, name=name)


class Seen(NamedTuple):
  """What queries on one grid look at."""

  context: Float[Array, "B C"]
  windows: tuple[Float[Array, "B Q _ C"], ...]  # one for each encoder
  masks: tuple[Bool[Array, "B Q _"], ...] | None  # True: may be looked at


def windows(x: Array, side: int) -> Array:
  """[B s*s ...] -> [B side*side m*m ...]: a grid's cells, by the query above.

  A grid of 4 x 4 cells under 2 x 2 queries:

     0  1 |  2  3
     4  5 |  6  7      query 0: 0 1 4 5      query 1:  2  3  6  7
    -------------
     8  9 | 10 11      query 2: 8 9 12 13    query 3: 10 11 14 15
    12 13 | 14 15
  """
  cells = math.isqrt(x.shape[1])
  if cells**2 != x.shape[1] or cells % side:
    raise ValueError(
      f"{x.shape[1]} features cannot be seen by {side} x {side} queries: they "
      f"must form a square grid whose side is a multiple of {side}"
    )
  m = cells // side
  x = x.reshape(x.shape[0], side, m, side, m, *x.shape[2:])
  return x.swapaxes(2, 3).reshape(x.shape[0], side**2, m * m, *x.shape[5:])


def window_masks(
  padding: Int[Array, "B 2"], cells: int, side: int
) -> Bool[Array, "B Q S"]:
  """True for cells of the image proper, in windows.

  A window wholly in the padding is wholly True: nobody reads its query, and a
  softmax over nothing would not be finite.

  Args:
    padding: rows at the top and at the bottom, columns at the left and at the
      right that are padding, of a grid of cells x cells.
  """
  index = jnp.arange(cells)[None]

  def inside(count):
    return (index >= count[:, None]) & (index < cells - count[:, None])

  valid = inside(padding[:, 0])[:, :, None] & inside(padding[:, 1])[:, None]
  mask = windows(valid.reshape(-1, cells**2), side)
  return mask | ~jnp.any(mask, axis=-1, keepdims=True)


class Project(nn.Module):
  """Two linear layers around a GELU, and perhaps a norm."""

  width: int
  features: int
  use_bias: bool = False
  norm: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
    x = _dense(self.width, self.dtype, "up", self.use_bias)(x)
    x = activation("gelu")(x)
    x = _dense(self.features, self.dtype, "down", self.use_bias)(x)
    return LayerNorm(EPS, self.dtype, name="norm")(x) if self.norm else x


class KeyValue(nn.Module):
  """Keys and values of one encoder, each with a norm of its own."""

  width: int
  dtype: str

  @nn.compact
  def __call__(self, x):
    x = standardized(x, EPS)

    def project(name):
      y = LayerNorm(EPS, self.dtype, name=f"{name}_norm").affine(x)
      return _dense(self.width, self.dtype, name)(y)

    return project("key"), project("value")


class WindowAttention(nn.Module):
  """Queries attend to their windows of all given encoders together."""

  width: int
  heads: int
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B Q C"],
    seen: Sequence[Float[Array, "B Q _ E"]],
    masks: Sequence[Bool[Array, "B Q _"]] | None,
  ) -> Float[Array, "B Q C"]:
    B, Q, _ = x.shape
    y = LayerNorm(EPS, self.dtype, name="query_norm")(x)
    query = _dense(self.width, self.dtype, "query")(y)
    pairs = [
      KeyValue(self.width, self.dtype, name=f"encoder_{i}")(window)
      for i, window in enumerate(seen)
    ]

    def rows(y):
      """Every query is a row of its own: no two see the same keys."""
      return y.reshape(B * Q, -1, self.heads, self.width // self.heads)

    key, value = (rows(jnp.concatenate(y, 2)) for y in zip(*pairs, strict=True))
    mask = None
    if masks is not None:
      mask = jnp.concatenate(masks, axis=2).reshape(B * Q, 1, -1)
    y = attention(rows(query), key, value, mask).reshape(B, Q, self.width)
    return _dense(self.width, self.dtype, "out")(y)


class Layer(nn.Module):
  """x + f(x, what it sees), shaped for a scan: (x, seen) -> (x, x)."""

  width: int  # C
  heads: int = 16
  # Attend to each encoder alone and mix the results; no published model does.
  separate: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, seen):
    context = _dense(self.width, self.dtype, "context")(seen.context)
    context = jnp.broadcast_to(context[:, None], (*x.shape[:2], self.width))
    both = jnp.concatenate([x.astype(self.dtype), context], axis=-1)
    h = _dense(self.width, self.dtype, "enter")(both)
    looked_at = []
    for i, window in enumerate(seen.windows):
      size, width = window.shape[2:]
      if size > 1:
        table = Embed(size, width, 1.0, name=f"position_{i}").embedding
        window = window + table.astype(window.dtype)[None, None]
      looked_at.append(window)
    attend = self._separately if self.separate else self._together
    h = h + attend(h, both, looked_at, seen.masks)
    h = LayerNorm(EPS, self.dtype, name="norm")(h)
    out = Project(self.width, x.shape[-1], dtype=self.dtype, name="mlp")(h)
    x = x + out.astype(x.dtype)
    return x, x

  def _together(self, h, _, looked_at, masks):
    attend = WindowAttention(
      self.width, self.heads, self.dtype, name="attention"
    )
    return attend(h, looked_at, masks)

  def _separately(self, h, both, looked_at, masks):
    count = len(looked_at)
    found = []
    for i, window in enumerate(looked_at):
      name = f"encoder_{i}"
      if window.shape[2] == 1:  # nothing to choose from
        project = Project(self.width, self.width, dtype=self.dtype, name=name)
        found.append(project(window[:, :, 0].astype(self.dtype)))
      else:
        attend = WindowAttention(self.width, self.heads, self.dtype, name=name)
        mask = None if masks is None else masks[i : i + 1]
        found.append(attend(h, [window], mask))
    if count == 1:
      return found[0]
    mix = Project(self.width, count, dtype=self.dtype, name="mix")(both)
    weights = jax.nn.softmax(mix.astype(jnp.float32), axis=-1)
    return jnp.einsum(
      "bqe,bqce->bqc", weights.astype(h.dtype), jnp.stack(found, axis=-1)
    )


class Sampler(nn.Module):
  """Layers one after another: the queries after all and after each."""

  width: int
  depth: int
  heads: int = 16
  separate: bool = False
  dtype: str = "float32"
  remat: str = "none"

  @nn.compact
  def __call__(
    self, x: Float[Array, "B Q D"], seen: Seen
  ) -> tuple[Float[Array, "B Q D"], Float[Array, "depth B Q D"]]:
    layers = scan_layers(
      remat(Layer, self.remat),
      self.depth,
      in_axes=(nn.broadcast,),
    )
    return layers(
      self.width, self.heads, self.separate, self.dtype, name="layers"
    )(x, seen)


class Aggregator(nn.Module):
  """A decoder's visual tokens from the features of several encoders."""

  features: int  # D, the decoder's width
  side: int = 24  # L
  width: int = 1024  # C
  groups: tuple[int, ...] = (24,)  # side of each group's queries
  depth: int = 3
  heads: int = 16
  # Layers in the decoder: after its blocks start, start + stride, ...
  layers: int = 0
  start: int = 0
  stride: int = 1
  dtype: str = "float32"
  remat: str = "none"

  @property
  def count(self) -> int:
    """Tokens of an image, with the newlines."""
    return self.side * (self.side + 1)

  @nn.compact
  def __call__(
    self,
    features: Sequence[Float[Array, "B _ _"]],
    padding: Int[Array, "B encoders 2"] | None = None,
  ) -> tuple[Float[Array, "B tokens D"], Seen, dict[str, Array]]:
    """Tokens row by row, what `inject` needs, and intermediates.

    `out` holds "sva/projected_i" [B n C] of each encoder, "sva/context" [B C],
    "sva/group_g" [B q*q C] of each group, "sva/joined" [B L*L G*C] and
    "sva/projected" [B L*L D].

    Args:
      features: of each encoder, on a square grid row by row.
      padding: padded cells at each end of rows and of columns, of each grid;
        None where images are square.
    """
    shared = {"dtype": self.dtype}
    projected = [
      Project(
        self.width, self.width, True, True, **shared, name=f"project_{i}"
      )(x.astype(self.dtype))
      for i, x in enumerate(features)
    ]
    out = {f"sva/projected_{i}": x for i, x in enumerate(projected)}
    out["sva/context"] = context = jnp.mean(
      projected[0].astype(jnp.float32), axis=1
    ).astype(self.dtype)
    std = self.width**-0.5
    table = Embed(len(self.groups), self.width, std, name="queries").embedding
    joined = []
    for g, side in enumerate(self.groups):
      seen = look(context, projected, padding, side)
      x = jnp.broadcast_to(
        table[g].astype(self.dtype)[None, None],
        (context.shape[0], side**2, self.width),
      )
      x, _ = Sampler(
        self.width,
        self.depth,
        self.heads,
        **shared,
        remat=self.remat,
        name=f"sampler_{g}",
      )(x, seen)
      out[f"sva/group_{g}"] = x
      grid = x.reshape(-1, side, side, self.width)
      grid = resize(grid, (self.side, self.side))
      joined.append(grid.reshape(-1, self.side**2, self.width))
    out["sva/joined"] = x = jnp.concatenate(joined, axis=-1)
    x = Project(self.features, self.features, True, **shared, name="project")(x)
    out["sva/projected"] = x
    seen = look(context, projected, padding, self.side)
    if self.layers and self.is_initializing():
      self._init_layers(x, seen)
    return self._with_newlines(x), seen, out

  def _with_newlines(self, x):
    std = self.features**-0.5
    line = Embed(1, self.features, std, name="newline").embedding
    line = line.astype(x.dtype)[None, None]
    line = jnp.broadcast_to(line, (x.shape[0], self.side, 1, self.features))
    grid = x.reshape(-1, self.side, self.side, self.features)
    grid = jnp.concatenate([grid, line], axis=2)
    return grid.reshape(-1, self.count, self.features)

  def _init_layers(self, x, seen):
    """The decoder's layers exist as a stack; `inject` applies them."""
    stack = nn.vmap(
      Layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=None,
      axis_size=self.layers,
    )
    stack(self.width, self.heads, name="between")(x, seen)

  def inject(
    self,
    seen: Seen,
    is_image: Bool[Array, "B T"],
    blocks: int,
  ) -> jax.tree_util.Partial | None:
    """What a decoder of that many blocks applies between them.

    The images' tokens of a row follow each other, without text between.

    Args:
      seen: of the call; its images are the rows' images in turn.
      is_image: True for the slots of images in the decoder's rows.
    """
    if not self.layers:
      return None
    after = np.arange(blocks) - self.start
    place = after // self.stride
    on = (after % self.stride == 0) & (place >= 0) & (place < self.layers)
    stack = self.variables["params"]["between"]
    # A copy for each block, although most leave it unread, is a few percent of
    # the decoder. Indexing inside the scan would, in the backward pass, add to
    # the gradient of the whole stack at each block.
    each = jax.tree.map(lambda p: p[np.where(on, place, 0)], stack)
    layer = Layer(self.width, self.heads, dtype=self.dtype, parent=None)
    start, some = jnp.argmax(is_image, axis=1), jnp.any(is_image, axis=1)
    count = seen.context.shape[0] // is_image.shape[0] * self.count

    def update(params, x):
      old = _read(x, start, count)
      grid = old.reshape(-1, self.side, self.side + 1, x.shape[-1])
      new, _ = layer.apply(
        {"params": params},
        grid[:, :, :-1].reshape(-1, self.side**2, x.shape[-1]),
        seen,
      )
      new = new.reshape(-1, self.side, self.side, x.shape[-1])
      new = jnp.concatenate([new, grid[:, :, -1:]], axis=2).reshape(old.shape)
      return _write(x, new, start, some)

    update = share(update, int(on.sum()), blocks)

    def act(on, params, x):
      return jax.lax.cond(on, update, lambda params, x: x, params, x)

    return jax.tree_util.Partial(act, jnp.array(on), each)


def look(
  context: Float[Array, "B C"],
  projected: Sequence[Float[Array, "B _ C"]],
  padding: Int[Array, "B encoders 2"] | None,
  side: int,
) -> Seen:
  """What queries on a grid of this side see."""
  masks = None
  if padding is not None:
    masks = tuple(
      window_masks(padding[:, i], math.isqrt(x.shape[1]), side)
      for i, x in enumerate(projected)
    )
  return Seen(context, tuple(windows(x, side) for x in projected), masks)


def place(
  x: Float[Array, "B T D"],
  visual: Float[Array, "B count D"],
  is_image: Bool[Array, "B T"],
) -> Float[Array, "B T D"]:
  """Rows with `visual` from the first slot of their images on, if any."""
  start, some = jnp.argmax(is_image, axis=1), jnp.any(is_image, axis=1)
  return _write(x, visual, start, some)


def _read(x, start, count):
  """The `count` tokens of each row from its start on."""
  if count > x.shape[1]:
    raise ValueError(
      f"{count} visual tokens do not fit in rows of {x.shape[1]}; make "
      "config.data.length longer"
    )
  cut = jax.vmap(
    lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, count, axis=0)
  )
  return cut(x, start)


def _write(x, new, start, some):
  """The inverse of `_read`, in the rows where `some`."""
  old = _read(x, start, new.shape[1])
  new = jnp.where(some[:, None, None], new.astype(x.dtype), old)
  put = jax.vmap(
    lambda row, value, at: jax.lax.dynamic_update_slice_in_dim(
      row, value, at, axis=0
    )
  )
  return put(x, new, start)
