# SPDX-License-Identifier: Apache-2.0
"""Spatial Forcing: hidden states of image tokens learn what VGGT sees there.

Paper: https://arxiv.org/abs/2510.12276.
Weights: haofuly/spatial-forcing-7b-finetuned-libero-*.
hidden states of one decoder layer -> LayerNorm -> MLP; the same pixels ->
frozen VGGT -> + positions -> the tokens' grid; loss = 1 - mean cosine of both.

Any model can have this loss: see `Align`. Nothing of it is part of inference:
a model calls neither `Align` nor its teacher to predict, and predicts the same
without their parameters.

Departures from the paper:
1. LayerNorm before the MLP, where the paper has batch normalisation: the code
   and the weights have it so.
2. A row without a valid token counts as 1, which is not a number in the code.

Letters: B batch, V views, h w grid of the tokens, y x grid of the teacher,
N = V*h*w tokens, D width of the hidden states, E that of the features.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from spatial_jax import hf
from spatial_jax.models import vggt
from spatial_jax.models.vggt_heads import uv_embed
from spatial_jax.nn.layers import Dense, LayerNorm, gelu
from spatial_jax.nn.resize import resize
from spatial_jax.types import Array, Bool, Float

Out = dict[str, Any]

KEYS = (
  ("vlm_norm.weight", "norm/scale"),
  ("vlm_norm.bias", "norm/bias"),
  ("fc1.weight", "up/kernel"),
  ("fc1.bias", "up/bias"),
  ("fc2.weight", "down/kernel"),
  ("fc2.bias", "down/bias"),
)
# The teacher's part of VGGT-1B, and what its heads are called.
TEACHER_KEYS = hf.nest(vggt.AGGREGATOR_KEYS, "aggregator.", "")
TEACHER_IGNORE = (
  *vggt.IGNORE,
  "camera_head.",
  "depth_head.",
  "point_head.",
  "track_head.",
)


class Align(nn.Module):
  """Loss of hidden states against a teacher's features of the same views."""

  layer: int  # whose output is aligned; see `select`
  width: int = 2048  # of the teacher's features
  weight: float = 0.5  # of this loss beside that of the actions
  norm: bool = True
  positions: float = 0.1  # of the positions that the features get; 0: none
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self,
    hidden: Float[Array, "B V h w D"],
    features: Float[Array, "B V y x E"],
    mask: Bool[Array, "B V h w"] | None = None,
  ) -> tuple[Float[Array, ""], Out]:
    """Mean over rows of 1 - mean cosine of their tokens, from 0 to 2.

    `out` holds "align/projected" and "align/target" [B N E].

    Args:
      features: without special tokens; they get no gradient.
      mask: tokens that count.
    """
    B, _, h, w, D = hidden.shape
    if features.shape[-1] != self.width:
      raise ValueError(
        f"the teacher's features have {features.shape[-1]} channels, expected "
        f"{self.width}; set config.model.align.width"
      )
    target = targets(features, (h, w), self.positions).reshape(
      B, -1, self.width
    )
    x = hidden.reshape(B, -1, D)
    if self.norm:
      x = LayerNorm(1e-5, self.dtype, name="norm")(x)
    x = self._dense("up")(x)
    x = self._dense("down")(gelu(x))
    mask = None if mask is None else mask.reshape(B, -1)
    out = {"align/projected": x, "align/target": target}
    return cosine(x, target, mask), out

  def _dense(self, name):
    init = nn.initializers.xavier_uniform()
    return Dense(self.width, dtype=self.dtype, kernel_init=init, name=name)


def select(out: Out, layer: int, layers: int) -> Float[Array, "B T D"]:
  """Hidden states as publications count them, of what `llm.Model` returned.

  Layer i is the residual stream after i blocks; the last one is normed.
  """
  if not 1 <= layer <= layers:
    raise ValueError(
      f"align.layer={layer} is none of the decoder's layers, 1 to {layers}"
    )
  return out["llm/hidden"] if layer == layers else out["llm/blocks"][layer - 1]


def targets(
  features: Float[Array, "B V y x E"],
  grid: tuple[int, int],
  positions: float = 0.1,
) -> Float[Array, "B V h w E"]:
  """A teacher's features on the grid of the tokens, in float32."""
  y, x, E = features.shape[2:]
  features = jax.lax.stop_gradient(features).astype(jnp.float32)
  if positions:
    table = uv_embed(y, x, E, x / y)
    features = features + positions * table[None, None]
  return resize(features, grid, align_corners=True)


def cosine(
  projected: Float[Array, "B N E"],
  target: Float[Array, "B N E"],
  mask: Bool[Array, "B N"] | None = None,
) -> Float[Array, ""]:
  """Mean over rows of 1 - mean cosine of their tokens, in float32."""
  same = jnp.sum(_unit(projected) * _unit(target), axis=-1)
  if mask is None:
    return 1 - jnp.mean(same)
  count = jnp.maximum(jnp.sum(mask, axis=1), 1)
  return 1 - jnp.mean(jnp.sum(jnp.where(mask, same, 0.0), axis=1) / count)


def _unit(x):
  x = x.astype(jnp.float32)
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  # The root has no gradient at zero.
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def token_mask(
  pixels_mask: Bool[Array, "B V height width"], grid: tuple[int, int]
) -> Bool[Array, "B V h w"]:
  """Tokens whose first pixel is valid."""
  for axis, size in zip((2, 3), grid, strict=True):
    at = jnp.arange(size) * pixels_mask.shape[axis] // size
    pixels_mask = jnp.take(pixels_mask, at, axis=axis)
  return pixels_mask


def teacher_images(
  images: Float[Array, "B V height width 3"], side: int = 518, patch: int = 14
) -> Float[Array, "B V tall side 3"]:
  """Views as VGGT was trained with: `side` wide, at most as high.

  Not clipped: bicubic values may leave [0, 1] a little.

  Args:
    images: RGB in [0, 1].
  """
  height, width = images.shape[2:4]
  tall = round(height * side / width / patch) * patch
  images = resize(images, (tall, side), "bicubic")
  top = max(tall - side, 0) // 2
  return images[:, :, top : top + side]


def parts(
  align: Any, teacher: Any
) -> tuple[Align | None, vggt.Aggregator | None]:
  """Submodules of a model with these options, for its `setup`."""
  return (
    None if align is None else Align(**align, name="align"),
    None if teacher is None else vggt.Aggregator(**teacher, name="teacher"),
  )


def initialize(
  align: Align | None, teacher: vggt.Aggregator | None, width: int
) -> None:
  """Makes the parameters of `parts`, which a forward pass doesn't call.

  Args:
    width: of the hidden states.
  """
  if align is not None:
    states = jnp.zeros((1, 1, 1, 1, width))
    align(states, jnp.zeros((*states.shape[:4], align.width)))
  if teacher is not None:
    teacher(jnp.zeros((1, 1, teacher.patch, teacher.patch, 3)))


def teach(
  teacher: vggt.Aggregator | None,
  images: Float[Array, "B V height width 3"],
  features: Float[Array, "B V y x E"] | None = None,
) -> Float[Array, "B V y x E"]:
  """The teacher's features of views in [0, 1]; the first is its reference.

  Args:
    features: those computed before, if they were.
  """
  if features is not None:
    return features
  if teacher is None:
    raise ValueError(
      "config.model.align needs what to align with: set config.model.teacher, "
      "or give `teacher_features` in the batch"
    )
  images = teacher_images(images, teacher.image_size, teacher.patch)
  y, x = (side // teacher.patch for side in images.shape[2:4])
  tokens = teacher(images)[-1][:, :, 1 + teacher.registers :]
  tokens = tokens.reshape(*tokens.shape[:2], y, x, tokens.shape[-1])
  return jax.lax.stop_gradient(tokens)
