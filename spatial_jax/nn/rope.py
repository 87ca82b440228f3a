# SPDX-License-Identifier: Apache-2.0
"""Rotary tables: 1-D and multimodal (t, h, w) for the decoder, 2-D for the ViT.

Pairs are (i, i + H/2) as in the published checkpoints ("rotate half").
All angles are float32: bfloat16 cannot tell position 256 from 257.

Letters: B batch, T length, N heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.types import Array, Float, Int

Rotary = tuple[Array, Array]


def frequencies(
  dim: int, theta: float, scaling: Sequence[float] | None = None
) -> np.ndarray:
  """theta^(-2i/dim), in float32 steps as the published code computes them.

  `scaling` is (factor, low, high, length) of `stretch`, or (factor,) for all
  waves to become that much longer.
  """
  exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
  freqs = np.float32(1) / np.power(np.float32(theta), exponent)
  if scaling is None:
    return freqs
  if len(scaling) == 1:
    return freqs / np.float32(scaling[0])
  return stretch(freqs, *scaling)


def stretch(
  freqs: np.ndarray, factor: float, low: float, high: float, length: float
) -> np.ndarray:
  """Frequencies for more context than pre-training had, as of Llama 3.1.

  Waves that turn fewer than `low` times within the `length` of pre-training
  become `factor` times longer, those that turn more than `high` times stay as
  they are, and between the two lies a linear mix.
  """
  turns = np.float32(length) * freqs / np.float32(2 * np.pi)
  kept = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
  return kept * freqs + (1 - kept) * freqs / np.float32(factor)


def linear(
  positions: Int[Array, "B T"],
  head_dim: int,
  theta: float,
  scaling: Sequence[float] | None = None,
) -> Rotary:
  """cos and sin [B T H/2] for positions along the text."""
  freqs = frequencies(head_dim, theta, scaling)[None, None]
  angle = jnp.asarray(positions, jnp.float32)[..., None] * freqs
  return jnp.cos(angle), jnp.sin(angle)


def multimodal(
  positions: Int[Array, "B 3 T"],
  head_dim: int,
  theta: float,
  sections: Sequence[int],
  scaling: Sequence[float] | None = None,
) -> Rotary:
  """cos and sin [B T H/2] for positions along (time, height, width).

  `sections` divides the H/2 frequencies; sections take their position from
  axis 0, 1, 2, 0, 1, 2 ... in turn. (16, 24, 24) is the published layout,
  (1,) * 16 interleaves the axes.
  """
  if sum(sections) * 2 != head_dim:
    raise ValueError(
      f"M-RoPE sections {tuple(sections)} sum to {sum(sections)}, expected "
      f"half of the head dim {head_dim}"
    )
  axis = np.repeat(np.arange(len(sections)) % 3, sections)
  # A product with a constant 0/1 matrix would round on a TPU; a static index
  # is exact, and positions need no gradient.
  ids = jnp.asarray(positions, jnp.float32)[:, axis]  # [B H/2 T]
  freqs = frequencies(head_dim, theta, scaling)[None, None]
  angle = jnp.swapaxes(ids, 1, 2) * freqs
  return jnp.cos(angle), jnp.sin(angle)


def grid(positions: Int[Array, "*b 2"], head_dim: int, theta: float) -> Rotary:
  """cos and sin [*b H/2] for (row, column): half of the pairs for each."""
  freqs = frequencies(head_dim // 2, theta)  # [H/4]
  freqs = jnp.expand_dims(freqs, range(positions.ndim))
  angle = jnp.asarray(positions, jnp.float32)[..., None] * freqs
  angle = angle.reshape(*positions.shape[:-1], head_dim // 2)
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "*b T N H"], rotary: Rotary) -> Array:
  """Rotates all heads; the tables are [*b T H/2] or broadcast to that."""
  cos, sin = (table[..., None, :] for table in rotary)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return y.astype(x.dtype)


def axial(
  positions: Int[Array, "*b 2"],
  head_dim: int,
  theta: float,
  dtype: str = "float32",
) -> Rotary:
  """cos and sin [*b 2 H/4]: each half of a head turns along its own axis.

  Unlike with `grid`, pairs are (i, i + H/4) within a half. `dtype` is what the
  angles and the tables are rounded to: models that were trained with angles in
  bfloat16 know no others.
  """
  if head_dim % 4:
    raise ValueError(
      f"rotation along two axes needs a head dim that 4 divides, got {head_dim}"
    )
  freqs = frequencies(head_dim // 2, theta)  # [H/4]
  freqs = jnp.expand_dims(freqs, range(positions.ndim))
  angle = jnp.asarray(positions, jnp.float32)[..., None] * freqs
  angle = _round(angle, dtype)
  return _round(jnp.cos(angle), dtype), _round(jnp.sin(angle), dtype)


def rotate_axial(x: Float[Array, "*b T N H"], rotary: Rotary) -> Array:
  """Rotates all heads; tables are those of `axial` for the T positions.

  Products and sums are rounded to the dtype of x, as the published code does.
  """
  T, _, H = x.shape[-3:]
  ones = (1,) * (x.ndim - 3)
  cos, sin = (table.reshape(*ones, T, 1, 2, H // 4) for table in rotary)
  halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, 2, H // 4)
  a, b = halves[..., 0, :], halves[..., 1, :]

  def product(u, v):
    return _round(u * v, x.dtype)

  y = jnp.stack(
    [product(a, cos) - product(b, sin), product(b, cos) + product(a, sin)],
    axis=-2,
  )
  return y.reshape(x.shape).astype(x.dtype)


def _round(x: Array, dtype: Any) -> Array:
  """float32 numbers that `dtype` has; a pair of casts might be left out."""
  info = jnp.finfo(dtype)
  if info.bits >= 32:
    return x
  return jax.lax.reduce_precision(x, info.nexp, info.nmant)
