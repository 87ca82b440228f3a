# SPDX-License-Identifier: Apache-2.0
"""Attention over masks. The one place where a kernel is chosen.

Letters: B batch, T queries, S keys, N query heads, K kv heads, G = N / K,
H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from spatial_jax.types import Array, Bool, Float, Int

# Finite, so that a fully masked row has a finite gradient.
_MASKED = -1e30


def attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K H"],
  mask: Bool[Array, "#B #T S"] | None = None,
) -> Float[Array, "B T N H"]:
  """Softmax attention with grouped heads; scores and softmax in float32.

  Args:
    mask: True where a query may see a key. Queries that see no key give zeros.
  """
  B, T, N, H = query.shape
  K = key.shape[2]
  query = query.reshape(B, T, K, N // K, H)
  scores = jnp.einsum(
    "btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32
  )
  scores = scores * H**-0.5
  if mask is None:
    weights = jax.nn.softmax(scores, axis=-1)
  else:
    mask = mask[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, _MASKED), axis=-1)
    weights = jnp.where(mask, weights, 0.0)
  out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(value.dtype), value)
  return out.reshape(B, T, N, H)


def packed_mask(
  q_segments: Int[Array, "B T"],
  k_segments: Int[Array, "B S"],
  k_shared: Bool[Array, "B S"] | None = None,
  offset: Int[Array, ""] | int = 0,
) -> Bool[Array, "B T S"]:
  """Causal mask of packed rows.

  A query at slot `offset + t` sees the keys at slots up to its own, of its own
  segment or shared; segment 0 is padding. With segments [1 1 2 2 0] and shared
  [T F F F F]:

        keys 0 1 2 3 4
    q 0      T . . . .
    q 1      T T . . .
    q 2      T . T . .
    q 3      T . T T .
    q 4      T . . . .   (padding: its output is never used)
  """
  T, S = q_segments.shape[1], k_segments.shape[1]
  same = q_segments[:, :, None] == k_segments[:, None, :]
  if k_shared is not None:
    same = same | k_shared[:, None, :]
  causal = (jnp.arange(T) + offset)[:, None] >= jnp.arange(S)[None, :]
  return same & (k_segments > 0)[:, None, :] & causal[None]
