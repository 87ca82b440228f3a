# SPDX-License-Identifier: Apache-2.0
"""Sines and cosines of a time of diffusion or flow, as exact as of float64.

Letters: B batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.types import Array, Float


def time_embed(
  time: Float[Array, " B"],
  width: int,
  periods: tuple[float, float] = (4e-3, 4.0),
) -> Float[Array, "B width"]:
  """Sines, then cosines, of time over periods from the first to the last.

  Up to 250 turns: float32 products would be wrong by 1e-4, and the published
  code has float64. Whole turns are dropped from products that are exact.
  """
  least, most = periods
  period = least * (most / least) ** np.linspace(0.0, 1.0, width // 2)
  rest, parts = 1 / period, []
  for _ in range(3):  # of 12 bits each, from the largest on
    scale = 2.0 ** (11 - np.floor(np.log2(np.maximum(rest, 1e-30))))
    parts.append(np.floor(rest * scale) / scale)
    rest = rest - parts[-1]
  high = jax.lax.reduce_precision(time, exponent_bits=8, mantissa_bits=11)
  turns = jnp.zeros((len(time), width // 2))
  for part in parts:
    for some in (high, time - high):
      product = some[:, None] * part.astype(np.float32)[None]
      turns = turns + (product - jnp.floor(product))
      turns = turns - jnp.floor(turns)
  angle = 2 * np.pi * turns
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
