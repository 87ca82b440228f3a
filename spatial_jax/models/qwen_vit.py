# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL's vision transformer: patches -> blocks -> 2x2 merge -> tokens.

Paper: https://arxiv.org/abs/2502.13923. Weights: the `visual.*` tensors of
Qwen/Qwen2.5-VL-*, and with `plain` of Qwen/Qwen2-VL-* (2409.12191).
patches [B P C] -> linear -> L x (RMSNorm, attention, RMSNorm, SwiGLU) ->
merger: RMSNorm, four patches side by side, MLP -> [B P/4 out_width].

Patches come in the processor's order: frame, merge row Y, merge column X, then
the 2x2 patches of the merge group. Attention is full within a frame in a few
layers and within square windows of a frame elsewhere, always by rearranging
the patches into (windows, patches), never by a mask over all of them.

Two ways to say what the patches are:
* `grid=(frames, h, w)`, static, the same for all rows: reshapes and constants.
  Between the blocks, the patches of a window lie together.
* `layout`, arrays that `data.vision.layout` made: images of any sizes, padded.

Departures from the paper, all off in the published sizes: a learned table of
patch positions (rotary embedding alone tells no token where it is) and learned
frame embeddings, added to the patches and to the merged tokens.

Letters: B batch, P patches, R rows of attention, S patches in such a row,
D width, N heads, H head dim, h w patch grid, Y X merge grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from spatial_jax import hf, sharding
from spatial_jax.data import vision
from spatial_jax.models.llm import remat
from spatial_jax.nn import edit as edits
from spatial_jax.nn import pruning, rope, scorer, slots
from spatial_jax.nn.attention import READ, attention, share
from spatial_jax.nn.layers import (
  Dense,
  GatedMlp,
  LayerNorm,
  Mlp,
  RMSNorm,
  fan_in_init,
  gelu,
  scan_layers,
)
from spatial_jax.types import Array, Float

Grid = tuple[int, int, int]
Windows = tuple[tuple[int, int], ...]  # (windows, patches in each)
Out = dict[str, Any]
# Rows of patches, or whole frames.
Patches = Float[Array, "B P C"] | Float[Array, "B F height width channels"]


def _linear(theirs, ours):
  return (
    (f"{theirs}.weight", f"{ours}/kernel"),
    (f"{theirs}.bias", f"{ours}/bias"),
  )


KEYS = (
  ("patch_embed.proj.weight", "patch_embed/kernel"),
  *hf.nest(
    (
      ("norm1.weight", "attention_norm/scale"),
      *_linear("attn.qkv", "qkv"),
      *_linear("attn.proj", "out"),
      ("norm2.weight", "mlp_norm/scale"),
      *_linear("mlp.gate_proj", "mlp/gate"),
      *_linear("mlp.up_proj", "mlp/up"),
      *_linear("mlp.down_proj", "mlp/down"),
    ),
    "blocks.{i}.",
    "blocks/",
  ),
  *hf.nest(scorer.KEYS, "temporal_token_scorer.", "scorer/"),
  ("merger.ln_q.weight", "merger/norm/scale"),
  *_linear("merger.mlp.0", "merger/up"),
  *_linear("merger.mlp.2", "merger/down"),
)
PLAIN_KEYS = (
  *(row for row in KEYS if not row[1].startswith("blocks/mlp/")),
  ("blocks.{i}.norm1.bias", "blocks/attention_norm/bias"),
  ("blocks.{i}.norm2.bias", "blocks/mlp_norm/bias"),
  *_linear("blocks.{i}.mlp.fc1", "blocks/mlp/up"),
  *_linear("blocks.{i}.mlp.fc2", "blocks/mlp/down"),
  ("merger.ln_q.bias", "merger/norm/bias"),
)


class PatchEmbed(nn.Module):
  """Convolution whose stride is its size: a product with flattened patches.

  Of whole frames, patches are made with their channels last: the processor's
  order, channels first, would move every single number.
  """

  features: int
  size: tuple[int, int, int, int]  # temporal, y, x, channels
  merge: int
  dtype: str

  @nn.compact
  def __call__(self, x: Patches) -> Float[Array, "B P D"]:
    # Stored as a convolution, so that the published tensor maps onto it.
    kernel = self.param("kernel", fan_in_init, (*self.size, self.features))
    if x.ndim == 3:
      kernel = kernel.transpose(3, 0, 1, 2, 4)
    else:
      (B, F, height, width, C), m = x.shape, self.merge
      temporal, down, right, _ = self.size
      Y, X = height // (m * down), width // (m * right)
      shape = B, F // temporal, temporal, Y, m, down, X, m, right * C
      #                                      T  Y  X dy dx dt  y  xC
      x = x.reshape(shape).transpose(0, 1, 3, 6, 4, 7, 2, 5, 8)
    kernel = kernel.reshape(-1, self.features).astype(self.dtype)
    y = x.reshape(-1, kernel.shape[0]).astype(self.dtype) @ kernel
    return y.reshape(x.shape[0], -1, self.features)


class Block(nn.Module):
  """One layer, shaped for a scan: (x, is_full) -> (x, x)."""

  heads: int
  mlp: int
  windows: Windows | None  # of a frame, one after the other; None: a layout
  full: tuple[int, int]  # so many layers of so many have no windows
  eps: float
  dtype: str
  plain: bool = False

  @nn.compact
  def __call__(
    self, x, is_full, rotary, layout, bias=None, number=None, edit=None
  ):
    R, S, D = x.shape
    norm = LayerNorm if self.plain else RMSNorm
    y = norm(self.eps, self.dtype, name="attention_norm")(x)
    qkv = Dense(3 * D, dtype=self.dtype, name="qkv")(y)
    qkv = qkv.reshape(R, S, 3, self.heads, D // self.heads)
    qkv = checkpoint_name(rope.rotate(qkv, rotary), READ)
    y = self._attend(qkv, is_full, layout, bias).reshape(R, S, D)
    y = Dense(D, dtype=self.dtype, name="out")(y)
    x = sharding.constrain(x + y, "batch patches act_embed")
    y = norm(self.eps, self.dtype, name="mlp_norm")(x)
    if self.plain:
      y = Mlp(self.mlp, "quick_gelu", True, self.dtype, name="mlp")(y)
    else:
      y = GatedMlp(self.mlp, True, self.dtype, name="mlp")(y)
    x = sharding.constrain(x + y, "batch patches act_embed")
    if edit is not None:
      x = edits.apply(edit, x, number + 1)
    return x, x

  def _attend(self, qkv, is_full, layout, bias):
    if self.windows is not None:
      full = _attend_rows
      windows = self._attend_windows
    else:

      def full(qkv, _):
        return _attend_gathered(
          qkv, layout["frame_index"], layout["frame_inverse"]
        )

      def windows(qkv, _):
        return _attend_gathered(
          qkv, layout["window_index"], layout["window_inverse"]
        )

    taken, count = self.full
    if taken == count:
      return full(qkv, bias)
    if not taken:
      return windows(qkv, bias)
    full = share(full, taken, count)
    windows = share(windows, count - taken, count)
    return jax.lax.cond(is_full, full, windows, qkv, bias)

  def _attend_windows(self, qkv, bias):
    """Windows that lie one after the other: those of a size are reshapes."""
    R, _, _, N, H = qkv.shape
    ends = np.cumsum([count * size for count, size in self.windows])[:-1]
    # Heads come before time, as attention reads them: a TPU would otherwise lay
    # out anew what a part of the time is cut from, and then each part.
    parts = jnp.split(qkv.swapaxes(1, 3), ends, axis=3)
    biases = [None] * len(parts)
    if bias is not None:
      biases = jnp.split(bias, ends, axis=1)
    found = []
    for x, bias, (count, size) in zip(parts, biases, self.windows, strict=True):
      x = x.reshape(R, N, 3, count, size, H).transpose(0, 3, 4, 2, 1, 5)
      bias = None if bias is None else bias.reshape(-1, size)
      y = _attend_rows(x.reshape(-1, size, 3, N, H), bias)
      found.append(y.reshape(R, count * size, N, H))
    return jnp.concatenate(found, axis=1)


class Merger(nn.Module):
  """Four neighbouring patches to one token of the decoder's width."""

  features: int
  group: int
  eps: float
  dtype: str
  plain: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B M E"]:
    B, P, D = x.shape
    norm = LayerNorm if self.plain else RMSNorm
    x = norm(self.eps, self.dtype, name="norm")(x)
    x = x.reshape(B, P // self.group, D * self.group)
    x = Dense(x.shape[-1], dtype=self.dtype, name="up")(x)
    x = gelu(x)
    return Dense(self.features, dtype=self.dtype, name="down")(x)


class Model(nn.Module):
  """Vision tower and merger."""

  width: int = 1280
  layers: int = 32
  heads: int = 16
  mlp: int = 3420
  out_width: int = 2048
  patch: int = 14
  temporal_patch: int = 2
  channels: int = 3
  merge: int = 2
  window: int = 112  # side in pixels; 0: full attention in every layer
  full_layers: tuple[int, ...] = (7, 15, 23, 31)
  plain: bool = False  # LayerNorm, and an MLP with quick GELU and no gate
  theta: float = 1e4
  eps: float = 1e-6
  dtype: str = "float32"
  remat: str = "none"
  unroll: int = 1
  position_table: tuple[int, int] | None = None  # (h, w) of the patch grid
  frame_table: int = 0  # number of frames with a learned embedding
  # STTS's scorer (see `stts`): `drop` and, by default as published, `after` and
  # `least` of `stts_vit.Model`. Later blocks don't see what is dropped.
  prune: Mapping[str, Any] | None = None

  @property
  def patch_dim(self) -> int:
    return self.channels * self.temporal_patch * self.patch**2

  @property
  def side(self) -> int:
    """Side of an attention window in merged tokens."""
    return self.window // (self.patch * self.merge)

  @nn.compact
  def __call__(
    self,
    patches: Patches,
    grid: Grid | None = None,
    layout: dict[str, Array] | None = None,
    edit: edits.Edits = None,
  ) -> tuple[Float[Array, "B M E"], Out]:
    """Merged tokens and intermediates; exactly one of grid and layout.

    With a grid, whole frames (see `normalise`) may come in place of patches.

    `out` holds "vit/embedded" [B P D] (what the first block reads),
    "vit/blocks" [L B P D] (the residual stream after each block, not there with
    `prune`), "vit/tokens" [B P D] (the last one) and "vit/merged" [B M E].

    Args:
      edit: what changes in the residual stream; see `nn.edit`.
    """
    self._check(patches, grid, layout, edit)
    x = PatchEmbed(
      self.width,
      (self.temporal_patch, self.patch, self.patch, self.channels),
      self.merge,
      self.dtype,
      name="patch_embed",
    )(patches)
    B, P, _ = x.shape
    x = edits.apply(edit, self._add_tables(x, grid), 0)
    out = {"vit/embedded": x}
    head_dim = self.width // self.heads
    order = inverse = windows = None
    if grid is not None:
      side = self.side or max(grid)  # of a window, or of the whole frame
      order, windows = window_order(*grid[1:], self.merge, side)
      inverse = np.argsort(order)
      x = x.reshape(B * grid[0], -1, self.width)
      edit = edits.split_rows(edit, grid[0], order)
      rows = grid_positions(*grid[1:], self.merge)[None, order]
    else:
      rows = layout["patch_positions"]
    cos, sin = rope.grid(rows, head_dim, self.theta)
    # [... S 3 H/2] for query, key and value, which turns by nothing: gradients
    # of three parts would each be written between zeros.
    rotary = (
      jnp.stack([cos, cos, jnp.ones_like(cos)], axis=-2),
      jnp.stack([sin, sin, jnp.zeros_like(sin)], axis=-2),
    )
    is_full = [
      not self.window or i in self.full_layers for i in range(self.layers)
    ]
    options = (
      self.heads,
      self.mlp,
      windows,
      (sum(is_full), self.layers),
      self.eps,
      self.dtype,
      self.plain,
    )
    block, is_full = remat(Block, self.remat), jnp.array(is_full)
    blocks = scan_layers(
      block,
      self.layers,
      in_axes=(0, *[nn.broadcast] * 3, 0, nn.broadcast),
      unroll=self.unroll,
    )(*options, name="blocks")
    pruned = {}
    if self.prune is None or self.is_initializing():
      number = None if edit is None else jnp.arange(self.layers)
      x = _reordered(x, order, inverse)
      x, xs = blocks(x, is_full, rotary, layout, None, number, edit)
      x = _reordered(x, inverse, order)
      xs = _reordered(xs.reshape(-1, *x.shape[1:]), inverse, order)
      out["vit/blocks"] = xs.reshape(self.layers, B, P, self.width)
    if self.prune is not None:

      def run(x, first, last, bias=None):
        bias = None if bias is None else bias[:, order]

        def step(x, layer):
          params, is_full = layer
          x, _ = block(*options, parent=None).apply(
            {"params": params}, x, is_full, rotary, None, bias
          )
          return x, None

        if self.is_initializing():
          return x
        layers = blocks.variables["params"], is_full
        layers = jax.tree.map(lambda p: p[first : last + 1], layers)
        x, _ = jax.lax.scan(step, _reordered(x, order, inverse), layers)
        return _reordered(x, inverse, order)

      x, pruned = self._score(
        x.reshape(B, *grid[:1], -1, self.width), grid, run
      )
    out["vit/tokens"] = x.reshape(B, P, self.width)
    merger = Merger(
      self.out_width,
      self.merge**2,
      self.eps,
      self.dtype,
      self.plain,
      name="merger",
    )
    merged = merger(out["vit/tokens"])
    if self.frame_table:
      table = self._table(
        "merged_frame_embed", self.frame_table, self.out_width
      )
      size = merged.shape[1] // grid[0]
      merged = merged + jnp.repeat(table[: grid[0]], size, axis=0)[None]
    out["vit/merged"] = merged
    return merged, {**out, **pruned}

  def _score(self, x, grid, run):
    """Blocks with STTS between them: their output, and what stays."""
    (B, F, P, _), (_, h, w) = x.shape, grid
    options = {"after": 3, "least": math.exp(-2), **self.prune}
    after, least, drop = (options.pop(k) for k in ("after", "least", "drop"))
    if options or not 0 <= after < self.layers - 1:
      raise ValueError(
        f"config.model.vit.prune={dict(self.prune)}: expected drop, after and "
        f"least, with `after` from 0 to {self.layers - 2}"
      )
    groups = np.arange(P).reshape(-1, self.merge**2)
    number = scorer.group_of(groups, P)
    rows, columns = grid_positions(h, w, self.merge).T
    shown = np.zeros((h, w), int)
    shown[rows, columns] = number
    videos = jnp.ones((B, F), jnp.int32)
    x = run(x.reshape(B * F, P, -1), 0, after).reshape(x.shape)
    scores, _ = scorer.Scorer(self.heads, self.mlp, self.dtype, name="scorer")(
      x, groups
    )
    bias = pruning.key_bias(scores, videos, shown, drop, least)
    bias = bias[:, :, rows, columns].reshape(B * F, P)
    stays = pruning.keep(jax.lax.stop_gradient(scores), videos, drop)
    out = {
      "prune/scores": scores,
      "prune/stays": stays.reshape(B, -1),
      "prune/temporal": pruning.temporal_loss(x, scores, videos, groups, drop),
    }
    x = run(x.reshape(B * F, P, -1), after + 1, after + 1, bias)
    hidden = jnp.where(stays[..., number], 0.0, -1e9).reshape(B * F, P)
    return run(x, after + 2, self.layers - 1, hidden), out

  def _table(self, name, rows, width):
    init = nn.initializers.normal(0.02)
    table = _Table(rows, width, init, name=name)()
    return table.astype(self.dtype)

  def _add_tables(self, x, grid):
    if self.position_table:
      h, w = self.position_table
      table = self._table("position_embed", h * w, self.width)
      m = self.merge
      table = table.reshape(h // m, m, w // m, m, self.width)
      table = table.transpose(0, 2, 1, 3, 4).reshape(h * w, self.width)
      x = x.reshape(x.shape[0], grid[0], h * w, self.width) + table[None, None]
    if self.frame_table:
      table = self._table("frame_embed", self.frame_table, self.width)
      x = x.reshape(x.shape[0], grid[0], -1, self.width)
      x = x + table[None, : grid[0], None]
    return x.reshape(x.shape[0], -1, self.width)

  def _check(self, patches, grid, layout, edit):
    if self.prune is not None and edit is not None:
      raise ValueError(
        "a vision tower with config.model.vit.prune takes no edit"
      )
    if self.prune is not None and grid is None:
      raise ValueError(
        "config.model.vit.prune needs a static grid (config.model.grid): how "
        "many tokens stay must be known"
      )
    if (grid is None) == (layout is None):
      raise ValueError(
        "the vision tower needs either a static grid (frames, h, w) or a "
        f"layout of arrays, got grid={grid} and "
        f"layout={None if layout is None else sorted(layout)}"
      )
    whole = patches.ndim == 5
    if whole and grid is None:
      raise ValueError("whole frames need a grid: layouts are of patches")
    if not whole and patches.shape[-1] != self.patch_dim:
      raise ValueError(
        f"patches have {patches.shape[-1]} values, expected {self.patch_dim} "
        f"= {self.channels} channels x {self.temporal_patch} frames x "
        f"{self.patch} x {self.patch} pixels"
      )
    tables = self.position_table or self.frame_table
    if grid is None:
      if tables:
        raise ValueError("learned position tables need a static grid")
      return
    frames, h, w = grid
    merges = not (h % self.merge or w % self.merge)
    temporal, side = self.temporal_patch, self.patch * self.merge
    size = frames * temporal, h * self.patch, w * self.patch
    if whole and not (merges and patches.shape[1:4] == size):
      raise ValueError(
        "{} frames of {} x {} pixels".format(*patches.shape[1:4])
        + f" do not fit: expected a multiple of {temporal} frames and sides "
        f"that are multiples of {side}, for grid {grid} "
        "{} of {} x {}".format(*size)
      )
    if not whole and not (merges and patches.shape[1] == frames * h * w):
      raise ValueError(
        f"grid {grid} does not fit {patches.shape[1]} patches per row, or its "
        f"sides are no multiples of the merge size {self.merge}"
      )
    if self.position_table and tuple(self.position_table) != (h, w):
      raise ValueError(
        f"position_table is {tuple(self.position_table)}, the grid {(h, w)}"
      )
    if self.frame_table and frames > self.frame_table:
      raise ValueError(
        f"{frames} frames, but frame_table has {self.frame_table} entries"
      )


class _Table(nn.Module):
  rows: int
  width: int
  init: Any

  @nn.compact
  def __call__(self):
    return self.param("embedding", self.init, (self.rows, self.width))


def _attend_rows(qkv, bias=None, mask=None):
  """Attention of [R S 3 N H] within each row; bias [R S] is the keys'."""
  bias = None if bias is None else bias[:, None]
  # A split's gradient is one piece, those of slices are zeros for the others.
  heads = (jnp.squeeze(x, 2) for x in jnp.split(qkv, 3, axis=2))
  return attention(*heads, mask, bias)


def _attend_gathered(qkv, index, inverse):
  """Attention within the sets of patches that `index` names.

  Args:
    qkv: [B P 3 N H].
    index: i32[B sets S], patch numbers; P or more is padding.
    inverse: i32[B P], where each patch is in the flattened sets.
  """
  B, P, _, N, H = qkv.shape
  _, sets, S = index.shape
  flat = qkv.reshape(B, P, -1)
  picked = jnp.take_along_axis(
    flat, index.reshape(B, -1, 1), axis=1, mode="clip"
  )
  mask = (index < P).reshape(B * sets, 1, S)
  y = _attend_rows(picked.reshape(B * sets, S, 3, N, H), mask=mask)
  y = y.reshape(B, sets * S, N * H)
  y = jnp.take_along_axis(y, inverse[..., None], axis=1, mode="clip")
  return y.reshape(B, P, N, H)


def normalise(
  frames: Float[Array, "B F height width 3"],
) -> Float[Array, "B F height width 3"]:
  """RGB in [0, 1] as the tower reads it, with CLIP's mean and deviation."""
  mean, std = (
    jnp.asarray(x, jnp.float32)[None, None, None, None]
    for x in (vision.MEAN, vision.STD)
  )
  return (frames - mean) / std


def grid_positions(h: int, w: int, merge: int) -> np.ndarray:
  """(row, column) of the patches of a frame [h*w 2], in merge-group order."""
  rows, columns = np.mgrid[:h, :w]
  grid = np.stack([rows, columns], axis=-1)
  grid = grid.reshape(h // merge, merge, w // merge, merge, 2)
  return grid.transpose(0, 2, 1, 3, 4).reshape(h * w, 2)


def window_order(
  h: int, w: int, merge: int, side: int
) -> tuple[np.ndarray, Windows]:
  """Patches of a frame, window by window; how many windows have how many.

  Args:
    side: of a window in merged tokens; the right and lower ones are cut there.

  Returns:
    i64[h*w], numbers of patches in merge-group order, and (windows, patches in
    each) from the largest to the smallest.
  """
  row, column = np.divmod(np.arange(h * w // merge**2), w // merge)
  _, window, count = np.unique(
    row // side * w + column // side, return_inverse=True, return_counts=True
  )
  groups = np.lexsort((window, -count[window]))
  order = groups[:, None] * merge**2 + np.arange(merge**2)
  sizes, windows = np.unique(count * merge**2, return_counts=True)
  kinds = zip(windows[::-1].tolist(), sizes[::-1].tolist(), strict=True)
  return order.reshape(-1), tuple(kinds)


def _reordered(x, order, inverse):
  """[R S D] with S in another order, of which None is the one it has."""
  if order is None or np.all(np.diff(order) == 1):
    return x
  rows = (np.broadcast_to(i, (x.shape[0], i.size)) for i in (order, inverse))
  return slots.pick(x, *rows)
