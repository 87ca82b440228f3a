# SPDX-License-Identifier: Apache-2.0
"""Resampling of grids of features as the published models do it.

`jax.image.resize` knows neither PyTorch's cubic kernel nor shrinking without a
low-pass filter, and checkpoints depend on both. Sizes are static: every output
is a product with two small constant matrices, one for each axis.

Letters: b any batch, h w input grid, y x output grid, C channels.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from spatial_jax.geometry.resample import weights
from spatial_jax.types import Array, Float


def resize(
  x: Float[Array, "*b h w C"],
  size: tuple[int, int],
  method: str = "bilinear",
  *,
  antialias: bool = False,
  align_corners: bool = False,
  scale: tuple[float, float] | None = None,
) -> Float[Array, "*b y x C"]:
  """Grid of another size, computed in float32, of the input's dtype.

  Follows `torch.nn.functional.interpolate`: values beyond the border repeat it,
  and pixel i covers [i, i + 1] unless `align_corners`.

  Args:
    size: static (y, x).
    method: "bilinear" or "bicubic".
    antialias: widen the kernel when shrinking; the cubic kernel also differs.
    scale: output over input where it isn't the ratio of the sizes, along
      (y, x). Early DINOv2 code samples at (size + 0.1) / input.
  """
  if x.shape[-3:-1] == tuple(size) and scale is None:
    return x
  scale = scale or (None, None)
  down, right = (
    weights(old, new, method, antialias, align_corners, ratio)
    for old, new, ratio in zip(x.shape[-3:-1], size, scale, strict=True)
  )
  # An accelerator multiplies in half as many parts what is rounded to 8 bits.
  precision = "highest" if x.dtype == jnp.float32 else "high"
  product = functools.partial(jnp.einsum, precision=precision)
  y = product("yh,...hwc->...ywc", down, x.astype(jnp.float32))
  y = product("xw,...ywc->...yxc", right, y)
  return y.astype(x.dtype)
