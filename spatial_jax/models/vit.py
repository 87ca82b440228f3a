# SPDX-License-Identifier: Apache-2.0
"""Image transformers: CLIP, SigLIP 1 and 2, DINOv2, InternViT, by variant.

Papers: https://arxiv.org/abs/2103.00020 (CLIP), 2303.15343 and 2502.14786
(SigLIP), 2304.07193 and 2309.16588 (DINOv2, registers), 2312.14238 (InternViT).
images [B height width 3] -> patches [B h*w D] + positions, class token and
registers in front -> L x (LayerNorm, attention, LayerNorm, MLP) -> LayerNorm
-> patch tokens [B h*w D].

Images are normalised by `data.images`. Sides that are no multiple of the patch
lose the rest at the right and at the bottom, as in the published convolutions.
Blocks are one scanned module: every block parameter has a leading layer axis.

Departures from the papers:
1. Blocks after `output_layer` are not computed; their parameters stay, so that
   what was loaded can be saved.
2. SigLIP's pooling head is only there with `pool`; `vit_keys.IGNORE` has its
   tensors otherwise, and DINOv2's token for masked training.

Letters: B batch, T tokens, U rows that hold them, D width, L layers, R layers
that are read, h w patch grid, C channels.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from spatial_jax import sharding
from spatial_jax.models import vit_variants
from spatial_jax.models.llm import remat
from spatial_jax.nn import edit as edits
from spatial_jax.nn.attention import attention
from spatial_jax.nn.layers import (
  Dense,
  GatedMlp,
  LayerNorm,
  Mlp,
  Scale,
  fan_in_init,
  scan_layers,
)
from spatial_jax.nn.resize import resize
from spatial_jax.types import Array, Bool, Float

Out = dict[str, Any]


VARIANTS = vit_variants.VARIANTS


class Attention(nn.Module):
  """Bidirectional self-attention with biases.

  The first `tokens` attend to each other; what `on_tiles` put behind them gets
  zeros.
  """

  heads: int
  dtype: str = "float32"
  tokens: int = 0  # 0: all

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B U D"],
    mask: Bool[Array, "B T T"] | None = None,
    bias: Float[Array, "B 1 T"] | None = None,
  ) -> Float[Array, "B U D"]:
    B, U, D = x.shape
    T = self.tokens or U

    def project(name):
      y = Dense(D, dtype=self.dtype, name=name)(x)
      y = y.reshape(B, U, self.heads, D // self.heads)[:, :T]
      return sharding.constrain(y, "batch patches act_heads head_dim")

    heads = project("query"), project("key"), project("value")
    y = attention(*heads, mask, bias).reshape(B, T, D)
    y = jnp.pad(y, [(0, 0), (0, U - T), (0, 0)])
    return Dense(D, dtype=self.dtype, name="out")(y)


class Block(nn.Module):
  """One layer, shaped for a scan: ((x, kept), index) -> ((x, kept), x).

  `kept` has, for each number in `read`, the output of the block of this index.
  `mask` and `bias` are those of `nn.attention.attention`, `tokens` is that of
  `Attention`.
  """

  heads: int
  mlp: int
  activation: str = "gelu"
  gated: bool = False
  layer_scale: bool = False
  eps: float = 1e-6
  dtype: str = "float32"
  read: tuple[int, ...] = ()
  tokens: int = 0

  @nn.compact
  def __call__(self, carry, index, mask=None, bias=None, edit=None):
    x, kept = carry
    y = LayerNorm(self.eps, self.dtype, name="attention_norm")(x)
    attend = Attention(self.heads, self.dtype, self.tokens, name="attention")
    y = attend(y, mask, bias)
    x = self._add(x, y, "attention_scale")
    y = LayerNorm(self.eps, self.dtype, name="mlp_norm")(x)
    if self.gated:
      y = GatedMlp(self.mlp, True, self.dtype, name="mlp")(y)
    else:
      y = Mlp(self.mlp, self.activation, dtype=self.dtype, name="mlp")(y)
    x = self._add(x, y, "mlp_scale")
    if edit is not None:
      x = edits.apply(edit, x, index + 1)
    kept = tuple(
      jnp.where(index == number, x, old)
      for number, old in zip(self.read, kept, strict=True)
    )
    return (x, kept), x

  def _add(self, x, y, name):
    if self.layer_scale:
      y = Scale(dtype=self.dtype, name=name)(y)
    return sharding.constrain(x + y, "batch patches act_embed")


def on_tiles(x: Float[Array, "B T D"]) -> Float[Array, "B U D"]:
  """The tokens, on a TPU with zeros behind them up to a whole tile of rows.

  Layers multiply the tokens of all images as one matrix. Where T is no multiple
  of 8, that would be a copy, there and back, in every layer.
  """
  rows = -x.shape[1] % 8 if sharding.platform() == "tpu" else 0
  return jnp.pad(x, [(0, 0), (0, rows), (0, 0)])


class Embedding(nn.Module):
  """A learned table that is read as a whole."""

  rows: int
  width: int

  @nn.compact
  def __call__(self) -> Float[Array, "rows D"]:
    init = nn.initializers.normal(0.02)
    return self.param("embedding", init, (self.rows, self.width))


class PatchEmbed(nn.Module):
  """Convolution whose stride is its size, as a matrix product."""

  features: int
  patch: int
  use_bias: bool = True
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, images: Float[Array, "B height width C"]
  ) -> Float[Array, "B h w D"]:
    B, height, width, C = images.shape
    p, h, w = self.patch, height // self.patch, width // self.patch
    x = images[:, : h * p, : w * p].reshape(B, h, p, w, p * C)
    x = x.transpose(0, 1, 3, 2, 4).reshape(B, h * w, p * p * C)
    x = on_tiles(x)
    U = x.shape[1]
    # Stored as a convolution, so that the published tensor maps onto it.
    kernel = self.param("kernel", fan_in_init, (p, p, C, self.features))
    kernel = kernel.reshape(-1, self.features).astype(self.dtype)
    y = x.reshape(B * U, -1).astype(self.dtype) @ kernel
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
      y = y + bias.astype(self.dtype)[None]
    y = y.reshape(B, U, self.features)[:, : h * w]
    return y.reshape(B, h, w, self.features)


class Pool(nn.Module):
  """SigLIP's pooling head: a learned query attends to all tokens."""

  heads: int
  mlp: int
  activation: str
  eps: float
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
    B, _, D = x.shape
    latent = Embedding(1, D, name="latent")().astype(self.dtype)

    def project(y, name):
      y = Dense(D, dtype=self.dtype, name=name)(y)
      return y.reshape(*y.shape[:-1], self.heads, D // self.heads)

    query = jnp.broadcast_to(latent[None], (B, 1, D))
    y = attention(
      project(query, "query"), project(x, "key"), project(x, "value")
    )
    y = Dense(D, dtype=self.dtype, name="out")(y.reshape(B, D))
    z = LayerNorm(self.eps, self.dtype, name="norm")(y)
    return y + Mlp(self.mlp, self.activation, dtype=self.dtype, name="mlp")(z)


class Model(nn.Module):
  """Vision tower; `VARIANTS` has the arguments of the published ones."""

  width: int
  layers: int
  heads: int
  mlp: int
  patch: int
  image: int  # side in pixels that the table of positions was trained for
  class_token: bool = False
  registers: int = 0
  class_position: bool = False  # the table's first row is the class token's
  patch_bias: bool = True
  pre_norm: bool = False
  activation: str = "gelu"
  gated: bool = False  # SwiGLU instead of the plain MLP
  layer_scale: bool = False
  eps: float = 1e-6
  output_layer: int = -1  # the last block to compute; -2 is the one before
  # Blocks, from 0 on, whose outputs are wanted as "vit/read": at inference they
  # need less memory than the outputs of all.
  read: tuple[int, ...] = ()
  final_norm: str = "applied"  # or "kept", but not applied, or "none"
  pool: bool = False
  # How other image sizes get their positions. All are cubic: "bicubic" and
  # "antialias" to the new size, "offset" at (size + 0.1) / old size, which is
  # what DINOv2 without registers was trained and first published with.
  resample: str = "bicubic"
  dtype: str = "float32"
  remat: str = "none"
  unroll: int = 1

  @property
  def prefix(self) -> int:
    """Tokens in front of the patches: the class token and registers."""
    return int(self.class_token) + self.registers

  @property
  def side(self) -> int:
    """Side of the table of positions, in patches."""
    return self.image // self.patch

  @nn.compact
  def __call__(
    self,
    images: Float[Array, "B height width 3"],
    edit: edits.Edits = None,
  ) -> tuple[Float[Array, "B patches D"], Out]:
    """Patch tokens, row by row, and intermediates; `edit` is of `nn.edit`.

    `out` holds "vit/embedded" [B T D] (what the first block reads),
    "vit/blocks" [L B T D] (the residual stream after each block that is
    computed) and "vit/tokens" [B T D]; with `read` also "vit/read" [R B T D],
    its blocks alone; with `pool` "vit/pooled" [B D]. T counts the class token,
    the registers and the patches, in this order.
    """
    self._check(images)
    x, out = edits.apply(edit, self._embed(images), 0), {}
    out["vit/embedded"] = x
    (x, kept), out["vit/blocks"] = self._blocks(x, edit)
    if self.read:
      out["vit/read"] = jnp.stack(kept)
    if self.final_norm != "none":
      # Computed only where it is used, but its parameters are always there.
      normed = LayerNorm(self.eps, self.dtype, name="norm")(x)
      x = normed if self.final_norm == "applied" else x
    out["vit/tokens"] = x
    if self.pool:
      head = Pool(
        self.heads, self.mlp, self.activation, self.eps, self.dtype, name="pool"
      )
      out["vit/pooled"] = head(x)
    return x[:, self.prefix :], out

  def _check(self, images):
    height, width = images.shape[1:3]
    if min(height, width) < self.patch:
      raise ValueError(
        f"images of {height} x {width} pixels hold no patch of {self.patch} x "
        f"{self.patch}; resize them (see data.images)"
      )
    for name, known in (
      ("resample", ("bicubic", "antialias", "offset")),
      ("final_norm", ("applied", "kept", "none")),
    ):
      if getattr(self, name) not in known:
        raise ValueError(
          f"{name}={getattr(self, name)!r} is unknown; use one of "
          + ", ".join(known)
        )
    if not -self.layers <= self.output_layer < 0:
      raise ValueError(
        f"output_layer={self.output_layer} is none of -1 to -{self.layers}, "
        f"counted from the last of {self.layers} blocks"
      )
    last = self.layers + self.output_layer
    if any(not 0 <= number <= last for number in self.read):
      raise ValueError(
        f"read={self.read} asks for blocks that are not computed; they are 0 "
        f"to {last}"
      )

  def _embed(self, images):
    """Patches with their positions, behind the class token and registers."""
    B = images.shape[0]
    x = PatchEmbed(
      self.width, self.patch, self.patch_bias, self.dtype, name="patch_embed"
    )(images)
    rows = self.side**2 + self.class_position
    table = Embedding(rows, self.width, name="position_embed")()
    grid = table[self.class_position :].reshape(self.side, self.side, -1)
    grid = self._resample(grid, *x.shape[1:3]).astype(self.dtype)
    x = (x + grid[None]).reshape(B, -1, self.width)
    prefix = []
    if self.class_token:
      token = Embedding(1, self.width, name="class_token")()
      if self.class_position:
        token = token + table[:1]
      prefix.append(token)
    if self.registers:
      prefix.append(Embedding(self.registers, self.width, name="registers")())
    if prefix:
      prefix = jnp.concatenate(prefix).astype(self.dtype)
      prefix = jnp.broadcast_to(prefix[None], (B, *prefix.shape))
      x = jnp.concatenate([prefix, x], axis=1)
    if self.pre_norm:
      x = LayerNorm(self.eps, self.dtype, name="pre_norm")(x)
    return sharding.constrain(x, "batch patches act_embed")

  def _resample(self, grid, h, w):
    if (h, w) == grid.shape[:2]:
      return grid
    scale = None
    if self.resample == "offset":
      scale = ((h + 0.1) / self.side, (w + 0.1) / self.side)
    antialias = self.resample == "antialias"
    return resize(grid, (h, w), "bicubic", antialias=antialias, scale=scale)

  def _blocks(self, x, edit):
    count = self.layers + 1 + self.output_layer
    if self.is_initializing():
      count = self.layers
    blocks = scan_layers(
      remat(Block, self.remat),
      count,
      in_axes=(0, *[nn.broadcast] * 3),
      unroll=self.unroll,
    )
    if count < self.layers:
      blocks = nn.map_variables(
        blocks, "params", lambda tree: jax.tree.map(lambda p: p[:count], tree)
      )
    T = x.shape[1]
    # An edit may be of any tokens, so it gets no others.
    x = x if edit is not None else on_tiles(x)
    (x, kept), each = blocks(
      self.heads,
      self.mlp,
      self.activation,
      self.gated,
      self.layer_scale,
      self.eps,
      self.dtype,
      self.read,
      T,
      name="blocks",
    )(
      (x, (jnp.zeros_like(x),) * len(self.read)),
      jnp.arange(count),
      None,
      None,
      edit,
    )
    return (x[:, :T], tuple(y[:, :T] for y in kept)), each[:, :, :T]
