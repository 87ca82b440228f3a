# SPDX-License-Identifier: Apache-2.0
"""ConvNeXt, as the trunk of CLIP: an image pyramid of convolutions.

Paper: https://arxiv.org/abs/2201.03545. Weights: the `visual.trunk.*` tensors
of laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup.
images [B height width 3] -> 4x4 patches, LayerNorm -> four stages (halve,
blocks of 7x7 depthwise convolution, LayerNorm, MLP) -> grid [B h w D].

The blocks of a stage are one scanned module: their parameters have a leading
layer axis. Grids are channel-last.

Letters: B batch, D channels of a stage, h w grid of a stage.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from spatial_jax import hf, sharding
from spatial_jax.models.llm import remat
from spatial_jax.nn.layers import (
  LayerNorm,
  Mlp,
  Scale,
  fan_in_init,
  scan_layers,
)
from spatial_jax.nn.resize import resize
from spatial_jax.types import Array, Float

Out = dict[str, Any]

VARIANTS = {
  "xxlarge": {
    "widths": (384, 768, 1536, 3072),
    "depths": (3, 4, 30, 3),
    "eps": 1e-5,
  },
}


def _both(theirs, ours, leaf="kernel"):
  pairs = (("weight", leaf), ("bias", "bias"))
  return tuple((f"{theirs}.{a}", f"{ours}/{b}") for a, b in pairs)


# timm's names.
KEYS = (
  *_both("stem.0", "stem"),
  *_both("stem.1", "stem_norm", "scale"),
  *(
    row
    for stage in range(4)
    for row in hf.nest(
      (
        *_both("downsample.0", "downsample_norm", "scale"),
        *_both("downsample.1", "downsample"),
        ("blocks.{i}.gamma", "blocks/mlp_scale/scale"),
        *_both("blocks.{i}.conv_dw", "blocks/depthwise"),
        *_both("blocks.{i}.norm", "blocks/norm", "scale"),
        *_both("blocks.{i}.mlp.fc1", "blocks/mlp/up"),
        *_both("blocks.{i}.mlp.fc2", "blocks/mlp/down"),
      ),
      f"stages.{stage}.",
      f"stage{stage}/",
    )
  ),
  *_both("head.norm", "norm", "scale"),
)


class Convolution(nn.Module):
  """2-D convolution of channel-last grids."""

  features: int
  size: int
  stride: int = 1
  padding: int = 0
  groups: int = 1
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B y x D"]:
    shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
    kernel = self.param("kernel", fan_in_init, shape)
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    y = jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      (self.stride, self.stride),
      [(self.padding, self.padding)] * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=self.groups,
    )
    return y + bias.astype(self.dtype)[None, None, None]


class Block(nn.Module):
  """One layer, shaped for a scan: (x, None) -> (x, None)."""

  eps: float
  dtype: str

  @nn.compact
  def __call__(self, x, _=None):
    D = x.shape[-1]
    wide = {"padding": 3, "groups": D, "dtype": self.dtype}
    y = Convolution(D, 7, **wide, name="depthwise")(x)
    y = LayerNorm(self.eps, self.dtype, name="norm")(y)
    y = Mlp(4 * D, dtype=self.dtype, name="mlp")(y)
    y = Scale(1e-6, self.dtype, name="mlp_scale")(y)
    return sharding.constrain(x + y, "batch patches patches act_embed"), None


class Stage(nn.Module):
  """Blocks of one width, behind a halving of the grid except in the first."""

  width: int
  depth: int
  is_first: bool
  eps: float
  dtype: str
  remat: str

  @nn.compact
  def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B y x D"]:
    if not self.is_first:
      x = LayerNorm(self.eps, self.dtype, name="downsample_norm")(x)
      x = Convolution(self.width, 2, 2, dtype=self.dtype, name="downsample")(x)
    blocks = scan_layers(remat(Block, self.remat), self.depth)
    return blocks(self.eps, self.dtype, name="blocks")(x, None)[0]


class Model(nn.Module):
  """The four stages; `VARIANTS` has the published sizes."""

  widths: tuple[int, ...]
  depths: tuple[int, ...]
  eps: float = 1e-6
  dtype: str = "float32"
  remat: str = "none"

  @nn.compact
  def __call__(
    self, images: Float[Array, "B height width 3"]
  ) -> tuple[Float[Array, "B h w D"], Out]:
    """Grid of the last stage and intermediates.

    `out` holds the grids "convnext/stage0" to "convnext/stage3" (1/4 to 1/32 of
    the image) and "convnext/pooled" [B D], the normed mean of the last one.
    """
    smallest, sides = 4 * 2 ** (len(self.depths) - 1), images.shape[1:3]
    if min(sides) < smallest:
      raise ValueError(
        f"images of {sides[0]} x {sides[1]} pixels vanish in the stages; their "
        f"sides must be at least {smallest}"
      )
    out = {}
    x = Convolution(self.widths[0], 4, 4, dtype=self.dtype, name="stem")(images)
    x = LayerNorm(self.eps, self.dtype, name="stem_norm")(x)
    for i, size in enumerate(zip(self.widths, self.depths, strict=True)):
      same = (i == 0, self.eps, self.dtype, self.remat)
      x = out[f"convnext/stage{i}"] = Stage(*size, *same, name=f"stage{i}")(x)
    norm = LayerNorm(self.eps, self.dtype, name="norm")
    out["convnext/pooled"] = norm(jnp.mean(x, axis=(1, 2)))
    return x, out


def multi_stage(out: Out, side: int) -> Float[Array, "B tokens channels"]:
  """All stages as one grid of side x side tokens, as Cambrian-1 reads them.

  Bilinear without a low-pass filter, also when shrinking; the channels of the
  first stage come first.
  """
  names = sorted(name for name in out if "/stage" in name)
  grids = [resize(out[name], (side, side)) for name in names]
  return jnp.concatenate(grids, -1).reshape(len(grids[0]), side * side, -1)
