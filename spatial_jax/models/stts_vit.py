# SPDX-License-Identifier: Apache-2.0
"""STTS's vision: Molmo2's, in which a scorer leaves part of each video.

Paper: https://arxiv.org/abs/2603.18004. Names of tensors: `stts`.
images [B F height width 3] -> blocks 0..after -> scores of groups -> block
after + 1, biased by them -> the lowest groups of each video go -> the rest in
fewer rows -> later blocks -> back in place, zeros where patches went -> pooling
of the groups left [B M E].

What `nn.pruning` and `nn.packing` compute is in their docstrings. Parameters
are those of `molmo2_vit.Model` and the scorer's.

Letters: B batch, F frames, P patches of a frame, U rows that hold them, G
groups of a frame, Q groups of a row, M of these that stay, S patches of a
group, C channels, D width, E out width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from spatial_jax.data import molmo2 as processing
from spatial_jax.models import llm, molmo2_vit, vit
from spatial_jax.nn import packing as packing_lib
from spatial_jax.nn import pruning, scorer
from spatial_jax.nn.attention import share
from spatial_jax.nn.layers import scan_layers
from spatial_jax.nn.slots import in_front
from spatial_jax.types import Array, Bool, Float, Int

Out = dict[str, Any]
Read = dict[int, Array]  # block -> its output


class Tower(nn.Module):
  """Molmo2's ViT, of which some blocks at a time are run."""

  sizes: Mapping[str, Any]  # of `vit.Model`
  read: tuple[int, ...]  # blocks whose outputs are wanted
  dtype: str = "float32"
  remat: str = "none"

  def setup(self) -> None:
    self.tower = tower = vit.Model(**self.sizes, parent=None)
    if tower.prefix or tower.final_norm != "none" or tower.layer_scale:
      raise ValueError(
        "config.model.vision.vit: expected Molmo2's tower, without a class "
        "token, registers, layer scale and final norm"
      )
    block = llm.remat(vit.Block, self.remat)
    options = tower.heads, tower.mlp, tower.activation
    more = {"eps": tower.eps, "dtype": self.dtype}
    self.block = functools.partial(block, *options, **more, parent=None)
    self.patch_embed = vit.PatchEmbed(
      tower.width, tower.patch, dtype=self.dtype
    )
    self.position_embed = vit.Embedding(tower.side**2, tower.width)
    self.blocks = scan_layers(vit.Block, tower.layers)(*options, **more)

  def embed(
    self, images: Float[Array, "B height width 3"]
  ) -> Float[Array, "B U D"]:
    """What the first block reads, see `vit.on_tiles`."""
    x = self.patch_embed(images)
    table = self.position_embed().astype(self.dtype)
    x = vit.on_tiles(x.reshape(x.shape[0], -1, x.shape[-1]) + table[None])
    if self.is_initializing():
      self.blocks((x, ()), jnp.arange(self.tower.layers))
    return x

  def run(
    self,
    x: Float[Array, "B U D"],
    first: int,
    last: int,
    tokens: int,
    *,
    mask: Bool[Array, "B P P"] | None = None,
    bias: Float[Array, "B 1 P"] | None = None,
  ) -> tuple[Float[Array, "B U D"], Read]:
    """Blocks first..last: the last one's output, and those to be read.

    Args:
      x: see `vit.on_tiles`; the first `tokens` of a frame are its patches.
    """
    if self.is_initializing():  # `embed` makes all parameters
      return x, {i: x for i in self.read if first <= i <= last}
    between = tuple(i for i in self.read if first <= i < last)
    block = self.block(tokens=tokens, read=between)

    def step(carry, layer):
      number, params = layer
      carry, _ = block.apply({"params": params}, carry, number, mask, bias)
      return carry, None

    params = self.blocks.variables["params"]
    params = jax.tree.map(lambda p: p[first : last + 1], params)
    carry = x, (jnp.zeros_like(x),) * len(between)
    (x, kept), _ = jax.lax.scan(
      step,
      carry,
      (jnp.arange(first, last + 1), params),
      unroll=self.tower.unroll,
    )
    read = dict(zip(between, kept, strict=True))
    return x, read | ({last: x} if last in self.read else {})

  def run_packed(
    self,
    x: Float[Array, "B F U D"],
    kept: Bool[Array, "B F P"],
    packing: packing_lib.Packing,
    first: int,
    bins: int,
  ) -> Read:
    """Outputs [B F*U D] to be read from block `first` on.

    They are zeros at what isn't kept.

    Args:
      bins: rows that frames are packed in; as many as there are frames where a
        row of the batch needs more.
    """
    (B, F, P), U = kept.shape, x.shape[2]
    source, target = packing.source, packing.target
    # Refilled patches are computed, but only their frame sees them.
    back = jnp.where(kept, target, -1)
    number = jnp.maximum(source, 0).reshape(B, -1)
    is_kept = jnp.take_along_axis(kept.reshape(B, -1), number, axis=1)
    there = jnp.where(is_kept.reshape(B, F, P), source, -1)

    def wide(patches):
      return on_rows(rows_of(patches, P, U), U)

    def run(bins):
      y = packing_lib.pick(x, wide(source[:, :bins]), wide(target))
      frame = packing.frame[:, :bins].reshape(B * bins, P)
      mask = (frame[:, :, None] == frame[:, None]) & (frame > 0)[:, None]
      y = y.reshape(B * bins, U, -1)
      _, read = self.run(y, first, max(self.read), P, mask=mask)
      read = {i: y.reshape(B, bins, U, -1) for i, y in read.items()}
      numbers = wide(back), wide(there[:, :bins])
      read = {i: packing_lib.pick(y, *numbers) for i, y in read.items()}
      return {i: y.reshape(B, F * U, -1) for i, y in read.items()}

    if max(self.read) < first:
      return {}
    if bins >= F or self.is_initializing():
      return run(F)
    fits = jnp.all(packing.count <= bins)
    # The gradient keeps what either branch needs. So the second, which is rare,
    # computes its own again, or the first would be as large and as slow; and
    # the first keeps products alone, since a branch's border forbids fusion.
    few = functools.partial(run, bins)
    if self.remat == "none":
      products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
      few = jax.checkpoint(few, policy=products)
    few = share(few, 1, 1)
    rest = share(jax.checkpoint(lambda: run(F)), 0, 1)
    return jax.lax.cond(fits, few, rest)


def rows_of(patches: Array, P: int, U: int) -> Array:
  """Rows of patches in frames of U rows each, by number; -1 stays -1."""
  frame, place = jnp.divmod(patches, P)
  return jnp.where(patches < 0, -1, frame * U + place)


def on_rows(numbers: Int[Array, "B F P"], U: int) -> Int[Array, "B F U"]:
  """Numbers of a frame's patches, with -1 for the rows behind them."""
  gap = [(0, 0), (0, 0), (0, U - numbers.shape[2])]
  return jnp.pad(numbers, gap, constant_values=-1)


def readers(
  pooling: Int[np.ndarray, "Q S"], patches: int
) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"]]:
  """Token and slot that read each of so many patches; -1 where none does."""
  token, slot = np.full((2, patches), -1)
  there = np.nonzero(pooling >= 0)
  token[pooling[there]], slot[pooling[there]] = there
  return token, slot


class Model(nn.Module):
  """Tower, scorer and connector; see the module docstring."""

  vit: Mapping[str, Any]
  read: tuple[int, ...]  # blocks whose outputs are pooled, in this order
  width: int
  heads: int
  mlp: int
  out_width: int
  drop: float = 0.5  # share of a video's groups
  after: int = 3  # the scorer reads this block's output
  pool: int = 3  # side of a group in patches
  least: float = math.exp(-2)  # smallest stretched score
  refill: bool = True  # frames alone in their bin are whole in later blocks
  bins: float = 1.0  # rows of patches in later blocks, as a share of frames
  dtype: str = "float32"
  remat: str = "none"

  def groups(self, side: int) -> scorer.Groups:
    """Patches of each group of a frame of so many pixels."""
    h = side // self.vit["patch"]
    return processing.pooling(1, h, h, self.pool)

  @nn.compact
  def __call__(
    self,
    images: Float[Array, "B F height width 3"],
    pooling: Int[Array, "B Q S"] | None,
    videos: Int[Array, "B F"],
    slots: int,
  ) -> tuple[Float[Array, "B M E"], Bool[Array, "B Q"], Out]:
    """Tokens of the first `slots` groups left, which are left, intermediates.

    Without `pooling` the tokens are all frames' groups.

    `out` holds "vit/scored" and "vit/biased" [B F P D] (the residual stream at
    the scorer, and after the block that it biases), "vit/features" [B F*P C],
    "vit/merged" [B M E], and as "prune/...": `scores` [B F G], `pooled`
    [B F G D], `bias` and `kept` [B F P], `packing` (see `nn.packing.Packing`),
    `temporal`, the auxiliary loss, and `stays` [B Q].
    """
    B, F = images.shape[:2]
    tower = Tower(self.vit, self.read, self.dtype, self.remat, name="vit")
    groups = self.groups(images.shape[2])
    after = self.after
    P = (images.shape[2] // self.vit["patch"]) ** 2
    x = tower.embed(images.reshape(B * F, *images.shape[2:]))
    U = x.shape[1]

    def frames(x):
      return x.reshape(B, F, U, -1)[:, :, :P]

    x, read = tower.run(x, 0, after, P)
    bias, kept, out = self._score(frames(x), groups, videos)
    bias = bias.reshape(B * F, 1, P)
    x, more = tower.run(x, after + 1, after + 1, P, bias=bias)
    out["vit/biased"] = frames(x)
    out["prune/packing"] = packing = packing_lib.pack(kept, refill=self.refill)
    read = {i: y.reshape(B, F * U, -1) for i, y in (read | more).items()}
    bins = math.ceil(F * self.bins)
    x = x.reshape(B, F, U, -1)
    read |= tower.run_packed(x, kept, packing, after + 2, bins)
    features = jnp.concatenate([read[i] for i in self.read], axis=-1)
    merged, stays = self._pool(features, pooling, kept, slots)
    out["vit/features"] = frames(features).reshape(B, F * P, -1)
    return merged, stays, {**out, "vit/merged": merged, "prune/stays": stays}

  def _score(self, x, groups, videos):
    """Bias of the next block [B F P], patches left [B F P], intermediates."""
    scores, pooled = scorer.Scorer(
      self.vit["heads"], self.vit["mlp"], self.dtype, name="scorer"
    )(x, groups)
    number = scorer.group_of(groups, x.shape[2])
    side = math.isqrt(x.shape[2])
    bias = pruning.key_bias(
      scores, videos, number.reshape(side, side), self.drop, self.least
    ).reshape(x.shape[:3])
    kept = pruning.keep(jax.lax.stop_gradient(scores), videos, self.drop)
    kept = kept[..., number]
    temporal = pruning.temporal_loss(x, scores, videos, groups, self.drop)
    out = {"scores": scores, "pooled": pooled, "bias": bias, "kept": kept}
    out = {f"prune/{name}": y for name, y in out.items()}
    return bias, kept, {**out, "prune/temporal": temporal, "vit/scored": x}

  def _pool(self, features, pooling, kept, slots):
    """Tokens of the first groups with a patch left, and which have [B Q]."""
    B, F, P = kept.shape
    U = features.shape[1] // F  # rows of a frame, as in `embed`
    side, given = math.isqrt(P), pooling is not None
    if not given:
      groups = processing.pooling(F, side, side, self.pool)
      pooling = jnp.broadcast_to(groups[None], (B, *groups.shape))
    pooling = pooling.swapaxes(1, 2)  # see the connector
    index = jnp.maximum(pooling, 0).reshape(B, -1)
    stays = jnp.take_along_axis(kept.reshape(B, -1), index, axis=1)
    stays = jnp.any(stays.reshape(pooling.shape) & (pooling >= 0), axis=1)
    order, place = in_front(stays, slots)
    there = jnp.take_along_axis(stays, order, axis=1)
    left = jnp.take_along_axis(pooling, order[:, None], axis=2)
    left = jnp.where(there[:, None], rows_of(left, P, U), -1).swapaxes(1, 2)
    read_by = None
    if not given:
      token, slot = readers(groups, F * P)
      place = place[:, np.maximum(token, 0)]
      read = kept.reshape(B, -1) & (token >= 0)[None] & (place < slots)
      read_by = jnp.where(read, slot[None] * slots + place, -1)
      read_by = on_rows(read_by.reshape(kept.shape), U).reshape(B, F * U)
    connector = molmo2_vit.Connector(
      self.width,
      self.heads,
      self.mlp,
      self.out_width,
      self.dtype,
      name="connector",
    )
    return connector(features, left, read_by)[0], stays
