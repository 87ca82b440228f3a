# SPDX-License-Identifier: Apache-2.0
"""VGGT's heads: cameras by iteration, dense maps by DPT.

Papers: https://arxiv.org/abs/2503.11651, DPT https://arxiv.org/abs/2103.13413.
camera tokens [B F D] -> 4 x (adaptive norm by the last guess -> blocks over
frames -> correction) -> encodings [4 B F 9], see `geometry.pose`.
patch tokens of four layers -> four resolutions -> fused from coarse to fine ->
maps [B F height width C].

Both compute in float32: exponentials make depths and confidences of logits.

Letters: B batch, F frames, D width, C channels, h w grid of features, I
iterations.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from spatial_jax import hf
from spatial_jax.models import dino
from spatial_jax.nn.layers import Dense, LayerNorm, gelu, silu, standardized
from spatial_jax.nn.resize import resize
from spatial_jax.types import Array, Float

# A transposed convolution's tensor is (in, out, y, x), ours is (y, x, in, out).
_TRANSPOSED = hf.Custom(
  load=lambda tensor: tensor.transpose(2, 3, 0, 1),
  save=lambda array: array.transpose(2, 3, 0, 1),
)

CAMERA_KEYS = (
  ("empty_pose_tokens", "refine/empty/embedding"),
  *dino.norm_keys("token_norm", "token_norm"),
  *dino.norm_keys("trunk_norm", "refine/trunk_norm"),
  *dino.linear_keys("embed_pose", "refine/embed_pose"),
  *dino.linear_keys("poseLN_modulation.1", "refine/modulation"),
  *dino.linear_keys("pose_branch.fc1", "refine/up"),
  *dino.linear_keys("pose_branch.fc2", "refine/down"),
  *hf.nest(dino.BLOCK_KEYS, "trunk.{i}.", "refine/trunk/"),
)

DPT_KEYS = (
  *dino.norm_keys("norm", "norm"),
  *(
    row
    for i in range(4)
    for row in dino.linear_keys(f"projects.{i}", f"project_{i}")
  ),
  *(
    row
    for i in range(2)
    for row in (
      (f"resize_layers.{i}.weight", f"grow_{i}/kernel", _TRANSPOSED),
      (f"resize_layers.{i}.bias", f"grow_{i}/bias"),
    )
  ),
  *dino.linear_keys("resize_layers.3", "shrink_3"),
  *((f"scratch.layer{i + 1}_rn.weight", f"adapt_{i}/kernel") for i in range(4)),
  *(
    row
    for i in range(4)
    for theirs, ours in (
      ("resConfUnit1.conv1", "skip/first"),
      ("resConfUnit1.conv2", "skip/second"),
      ("resConfUnit2.conv1", "refine/first"),
      ("resConfUnit2.conv2", "refine/second"),
      ("out_conv", "mix"),
    )
    for row in dino.linear_keys(
      f"scratch.refinenet{i + 1}.{theirs}", f"fuse_{i}/{ours}"
    )
  ),
  *dino.linear_keys("scratch.output_conv1", "features"),
  *dino.linear_keys("scratch.output_conv2.0", "narrow"),
  *dino.linear_keys("scratch.output_conv2.2", "maps"),
)

Conv = functools.partial(nn.Conv, kernel_init=dino.uniform_init)


class Refine(nn.Module):
  """One iteration of the camera head, shaped for a scan over iterations."""

  heads: int
  depth: int
  mlp_ratio: float
  scale: float

  @nn.compact
  def __call__(
    self, guess: Float[Array, "B F 9"], is_first: Array, tokens: Array
  ):
    D = tokens.shape[-1]

    def dense(features, name):
      return Dense(features, kernel_init=dino.uniform_init, name=name)

    # No gradient flows from one iteration to those before.
    guess = jax.lax.stop_gradient(guess)
    zeros = nn.initializers.zeros
    empty = dino.Table((1, 1, 9), zeros, "float32", name="empty")()
    y = dense(D, "embed_pose")(jnp.where(is_first, empty, guess))
    y = dense(3 * D, "modulation")(silu(y))
    shift, scale, gate = jnp.split(y, 3, axis=-1)
    y = standardized(tokens, 1e-6)
    y = gate * (y * (1 + scale) + shift) + tokens
    block = dino.Block(
      self.heads, self.mlp_ratio, scale=self.scale, name="trunk"
    )
    y = dino.stack(block, self.depth, y[:, None])[:, 0]
    y = dense(D // 2, "up")(LayerNorm(1e-5, name="trunk_norm")(y))
    guess = guess + dense(9, "down")(gelu(y))
    fov = nn.relu(guess[..., 7:])
    return guess, jnp.concatenate([guess[..., :7], fov], axis=-1)


class Camera(nn.Module):
  """Pose encodings after each iteration."""

  heads: int = 16
  depth: int = 4
  iterations: int = 4
  mlp_ratio: float = 4
  scale: float = 0.01

  @nn.compact
  def __call__(self, tokens: Float[Array, "B F D"]) -> Float[Array, "I B F 9"]:
    tokens = LayerNorm(1e-5, name="token_norm")(tokens)
    refine = nn.scan(
      Refine,
      variable_broadcast="params",
      split_rngs={"params": False},
      in_axes=(0, nn.broadcast),
      length=self.iterations,
    )(self.heads, self.depth, self.mlp_ratio, self.scale, name="refine")
    guess = jnp.zeros((*tokens.shape[:2], 9), jnp.float32)
    is_first = jnp.arange(self.iterations) == 0
    return refine(guess, is_first, tokens)[1]


class Grow(nn.Module):
  """Transposed convolution whose stride is its size: disjoint squares."""

  size: int

  @nn.compact
  def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B y x C"]:
    B, h, w, C = x.shape
    k = self.size
    kernel = self.param("kernel", dino.uniform_init, (k, k, C, C))
    bias = self.param("bias", nn.initializers.zeros, (C,))
    y = jnp.einsum("bhwc,yxcd->bhywxd", x, kernel)
    return y.reshape(B, h * k, w * k, C) + bias[None, None, None]


class Residual(nn.Module):
  """Two convolutions; the skip carries the rectified input, not the input."""

  @nn.compact
  def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    x = nn.relu(x)
    y = nn.relu(Conv(x.shape[-1], (3, 3), name="first")(x))
    return Conv(x.shape[-1], (3, 3), name="second")(y) + x


class Fuse(nn.Module):
  """Coarse features, joined by finer ones, at the size of the next level."""

  size: tuple[int, int]

  @nn.compact
  def __call__(self, x: Array, finer: Array | None = None) -> Array:
    if finer is not None:
      x = x + Residual(name="skip")(finer)
    x = Residual(name="refine")(x)
    x = resize(x, self.size, align_corners=True)
    return Conv(x.shape[-1], (1, 1), name="mix")(x)


class Dpt(nn.Module):
  """Dense maps of a grid of tokens from four layers.

  The maps are `patch / down` times as fine as the grid. Without `outputs` they
  are the features before the last two convolutions.
  """

  features: int = 256
  channels: tuple[int, ...] = (256, 512, 1024, 1024)
  outputs: int = 0
  patch: int = 14
  down: int = 1
  positions: bool = True

  @nn.compact
  def __call__(
    self, layers: Float[Array, "4 B h w D"]
  ) -> Float[Array, "B y x C"]:
    h, w = layers.shape[2:4]
    aspect = w / h
    norm = LayerNorm(1e-5, name="norm")
    levels = []
    for i, channels in enumerate(self.channels):
      x = Conv(channels, (1, 1), name=f"project_{i}")(norm(layers[i]))
      x = self._add_positions(x, aspect)
      if i < 2:
        x = Grow((4, 2)[i], name=f"grow_{i}")(x)
      elif i == 3:
        x = Conv(channels, (3, 3), 2, padding=1, name="shrink_3")(x)
      adapt = Conv(self.features, (3, 3), use_bias=False, name=f"adapt_{i}")
      levels.append(adapt(x))
    x = levels.pop()
    for i in (3, 2, 1, 0):
      finer = None if i == 3 else levels.pop()
      size = levels[-1].shape[1:3] if levels else (8 * h, 8 * w)
      x = Fuse(size, name=f"fuse_{i}")(x, finer)
    wide = self.features // (2 if self.outputs else 1)
    x = Conv(wide, (3, 3), name="features")(x)
    size = h * self.patch // self.down, w * self.patch // self.down
    x = resize(x, size, align_corners=True)
    x = self._add_positions(x, aspect)
    if not self.outputs:
      return x
    x = nn.relu(Conv(32, (3, 3), name="narrow")(x))
    return Conv(self.outputs, (1, 1), name="maps")(x)

  def _add_positions(self, x, aspect):
    if not self.positions:
      return x
    return x + 0.1 * uv_embed(*x.shape[1:], aspect)[None]


def uv_axes(height: int, width: int, aspect: float) -> tuple[Array, Array]:
  """y [height] and x [width] of cell centres.

  The corners of the grid's border lie on the unit circle.
  """
  diagonal = (aspect**2 + 1) ** 0.5
  y, x = (
    np.linspace(
      -span * (size - 1) / size,
      span * (size - 1) / size,
      size,
      dtype=np.float32,
    )
    for size, span in ((height, 1 / diagonal), (width, aspect / diagonal))
  )
  return y, x


def uv_embed(
  height: int, width: int, channels: int, aspect: float
) -> Float[Array, "height width channels"]:
  """Sines and cosines of x in the first, of y in the second half."""
  quarter = channels // 4
  omega = 100.0 ** (-np.arange(quarter) / quarter)
  tables = []
  for at in uv_axes(height, width, aspect):
    angle = at[:, None].astype(np.float64) * omega
    table = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    tables.append(table.astype(np.float32))
  down, right = tables
  # Tables of each axis are small constants of the program; their product isn't.
  shape = height, width, channels // 2
  return jnp.concatenate(
    [
      jnp.broadcast_to(right[None], shape),
      jnp.broadcast_to(down[:, None], shape),
    ],
    axis=-1,
  )
