# SPDX-License-Identifier: Apache-2.0
"""DINOv2 with registers as VGGT runs it, and the block that both share.

Papers: https://arxiv.org/abs/2304.07193, https://arxiv.org/abs/2309.16588.
Weights: the `aggregator.patch_embed.*` tensors of facebook/VGGT-1B.
frames [B F height width 3] -> patches -> + class token, position table,
registers -> L x block -> LayerNorm -> patch tokens [B F P D].

Precision: `dtype` is that of products (linear layers, attention), `stream` that
of all between them: residuals, norms, layer scales, rotary embedding.

Letters: B batch, F frames, P tokens of a frame, D width, N heads, H head dim,
L layers, h w patch grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from spatial_jax import hf, sharding
from spatial_jax.models.llm import remat
from spatial_jax.nn import rope
from spatial_jax.nn.attention import unmasked
from spatial_jax.nn.layers import Dense, LayerNorm, Scale, gelu, scan_layers
from spatial_jax.nn.resize import resize
from spatial_jax.types import Array, Float

Out = dict[str, Any]

# PyTorch's initial weights of linear layers: uniform in +-1 / sqrt(inputs).
uniform_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _rows(theirs, ours, *leaves):
  kinds = zip(("weight", "bias"), leaves, strict=True)
  return tuple((f"{theirs}.{kind}", f"{ours}/{leaf}") for kind, leaf in kinds)


def linear_keys(theirs: str, ours: str) -> tuple:
  """Rows of a linear layer or a convolution."""
  return _rows(theirs, ours, "kernel", "bias")


def norm_keys(theirs: str, ours: str) -> tuple:
  """Rows of a layer norm."""
  return _rows(theirs, ours, "scale", "bias")


# The norms of query and key are not in all blocks.
BLOCK_KEYS = (
  *norm_keys("norm1", "attention_norm"),
  *(
    (
      f"attn.qkv.{kind}",
      tuple(f"attention/{part}/{leaf}" for part in ("query", "key", "value")),
    )
    for kind, leaf in (("weight", "kernel"), ("bias", "bias"))
  ),
  *norm_keys("attn.q_norm", "attention/query_norm"),
  *norm_keys("attn.k_norm", "attention/key_norm"),
  *linear_keys("attn.proj", "attention/out"),
  ("ls1.gamma", "attention_scale/scale"),
  *norm_keys("norm2", "mlp_norm"),
  *linear_keys("mlp.fc1", "up"),
  *linear_keys("mlp.fc2", "down"),
  ("ls2.gamma", "mlp_scale/scale"),
)

# Below "patch_embed." of the aggregator; `mask_token` there is never read.
KEYS = (
  ("cls_token", "cls/embedding"),
  ("pos_embed", "position/embedding"),
  ("register_tokens", "registers/embedding"),
  *linear_keys("patch_embed.proj", "patch_embed"),
  *hf.nest(BLOCK_KEYS, "blocks.{i}.", "blocks/"),
  *norm_keys("norm", "norm"),
)


class Attention(nn.Module):
  """Full attention within each frame, or `across` the frames of a row."""

  heads: int
  qk_norm: bool = False
  across: bool = False
  dtype: str = "float32"
  stream: str = "float32"
  kernel_init: Callable = uniform_init

  @nn.compact
  def __call__(
    self, x: Float[Array, "B F P D"], rotary: rope.Rotary | None
  ) -> Float[Array, "B F P D"]:
    B, F, P, D = x.shape

    def project(name):
      y = Dense(D, dtype=self.dtype, kernel_init=self.kernel_init, name=name)(x)
      y = y.reshape(B, F, P, self.heads, D // self.heads)
      if name == "value":
        return y
      if self.qk_norm:
        y = LayerNorm(1e-5, self.stream, name=f"{name}_norm")(y)
      return y if rotary is None else rope.rotate_axial(y, rotary)

    rows = (B, F * P) if self.across else (B * F, P)
    axes = "batch length" if self.across else "rows patches"
    seen = "batch keys" if self.across else axes

    def arrange(y, axes):
      y = y.reshape(*rows, self.heads, D // self.heads).astype(self.dtype)
      return sharding.constrain(y, f"{axes} act_heads head_dim")

    y = unmasked(
      arrange(project("query"), axes),
      arrange(project("key"), seen),
      arrange(project("value"), seen),
    )
    y = y.reshape(B, F, P, D)
    return Dense(D, dtype=self.dtype, kernel_init=self.kernel_init, name="out")(
      y
    )


class Block(nn.Module):
  """Attention and MLP, each with a norm before and a layer scale after."""

  heads: int
  mlp_ratio: float = 4
  qk_norm: bool = False
  across: bool = False
  eps: float = 1e-5
  scale: float = 0.01  # first value of the layer scales
  dtype: str = "float32"
  stream: str = "float32"
  kernel_init: Callable = uniform_init

  @nn.compact
  def __call__(
    self, x: Float[Array, "B F P D"], rotary: rope.Rotary | None = None
  ) -> Float[Array, "B F P D"]:
    def dense(features, name):
      return Dense(
        features, dtype=self.dtype, kernel_init=self.kernel_init, name=name
      )

    def add(x, y, name):
      x = x + Scale(self.scale, self.stream, name=name)(y)
      return sharding.constrain(x, "batch frames patches act_embed")

    y = LayerNorm(self.eps, self.stream, name="attention_norm")(x)
    y = Attention(
      self.heads,
      self.qk_norm,
      self.across,
      self.dtype,
      self.stream,
      self.kernel_init,
      name="attention",
    )(y, rotary)
    x = add(x, y, "attention_scale")
    y = LayerNorm(self.eps, self.stream, name="mlp_norm")(x)
    y = dense(int(x.shape[-1] * self.mlp_ratio), "up")(y)
    return add(x, dense(x.shape[-1], "down")(gelu(y)), "mlp_scale")


def stack(block: nn.Module, length: int, x: Array) -> Array:
  """x after `length` blocks with weights of their own, scanned."""

  def step(block, x, _):
    return block(x), None

  return scan_layers(step, length)(block, x, None)[0]


class Table(nn.Module):
  """Learned vectors, in the shape of the published tensor."""

  shape: tuple[int, ...]
  first: Callable
  dtype: str

  @nn.compact
  def __call__(self) -> Array:
    return self.param("embedding", self.first, self.shape).astype(self.dtype)


class PatchEmbed(nn.Module):
  """Convolution whose stride is its size: a product with flat patches."""

  features: int
  patch: int
  dtype: str

  @nn.compact
  def __call__(
    self, frames: Float[Array, "B F height width C"]
  ) -> Float[Array, "B F P D"]:
    B, F, height, width, C = frames.shape
    p, D = self.patch, self.features
    kernel = self.param("kernel", uniform_init, (p, p, C, D))
    bias = self.param("bias", nn.initializers.zeros, (D,))
    x = frames.reshape(B, F, height // p, p, width // p, p, C)
    x = x.swapaxes(3, 4).reshape(-1, p * p * C).astype(self.dtype)
    x = x @ kernel.reshape(-1, D).astype(self.dtype)
    x = x + bias.astype(self.dtype)[None]
    return x.reshape(B, F, -1, D)


class Model(nn.Module):
  """Patch tokens of normalised frames, each frame by itself."""

  width: int = 1024
  depth: int = 24
  heads: int = 16
  mlp_ratio: float = 4
  patch: int = 14
  image_size: int = 518  # side of the frames that the position table is for
  registers: int = 4
  position_std: float = 0.02  # of the first position table
  dtype: str = "float32"
  stream: str = "float32"
  remat: str = "none"

  @nn.compact
  def __call__(
    self, frames: Float[Array, "B F height width 3"]
  ) -> Float[Array, "B F P D"]:
    B, F, height, width, _ = frames.shape
    grid = height // self.patch, width // self.patch
    x = PatchEmbed(self.width, self.patch, self.dtype, name="patch_embed")(
      frames
    )
    tiny = nn.initializers.normal(1e-6)

    def tokens(name, count, init=tiny):
      return Table((1, count, self.width), init, self.stream, name=name)()

    side = self.image_size // self.patch
    table = tokens(
      "position",
      1 + side**2,
      nn.initializers.truncated_normal(self.position_std),
    )
    table = resize_positions(table, grid)
    cls = tokens("cls", 1) + table[:, :1]
    front = jnp.concatenate([cls, tokens("registers", self.registers)], axis=1)
    front = jnp.broadcast_to(front[None], (B, F, *front.shape[1:]))
    x = jnp.concatenate([front, x.astype(self.stream) + table[None, :, 1:]], 2)
    block = remat(Block, self.remat)(
      self.heads,
      self.mlp_ratio,
      eps=1e-6,
      scale=1.0,
      dtype=self.dtype,
      stream=self.stream,
      kernel_init=nn.initializers.truncated_normal(0.02),
      name="blocks",
    )
    x = stack(block, self.depth, x)
    x = LayerNorm(1e-6, self.stream, name="norm")(x)
    return x[:, :, 1 + self.registers :]


def resize_positions(
  table: Float[Array, "1 rows D"], grid: tuple[int, int]
) -> Float[Array, "1 P D"]:
  """Position table of another patch grid; the class token's row stays first.

  As in the reference, a grid that is no square is interpolated even if it has
  as many patches as the table.
  """
  side = round((table.shape[1] - 1) ** 0.5)
  if grid == (side, side):
    return table
  cls, patches = jax.lax.split(table, (1, side**2), axis=1)
  patches = patches.reshape(1, side, side, -1)
  patches = resize(patches, grid, "bicubic", antialias=True)
  return jnp.concatenate([cls, patches.reshape(1, -1, table.shape[2])], axis=1)
