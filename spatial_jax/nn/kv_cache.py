# SPDX-License-Identifier: Apache-2.0
"""Keys and values of the tokens that a decoder has read.

A cache is a dict of "key" [L B K H S] and "value" [L B K S H], "segments",
"shared" and "mutual" [B S], and "index", the slot that comes next. Every row
writes the same slots; "segments" tells which are padding (0).

Letters: B batch, T new tokens, S slots, K kv heads, H head dim, L layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from spatial_jax import sharding
from spatial_jax.types import Array, Bool, Float, Int

Cache = dict[str, Array]

_KEY = "batch act_heads head_dim length"
_VALUE = "batch act_heads length head_dim"


def empty(
  layers: int, batch: int, length: int, heads: int, head_dim: int, dtype: str
) -> Cache:
  """Cache of `length` slots.

  Its "index" is a number while it is known, and spares the first tokens a look
  at empty slots; an array works as well.
  """
  keys = jnp.zeros((layers, batch, heads, head_dim, length), dtype)
  values = jnp.zeros((layers, batch, heads, length, head_dim), dtype)
  return {
    "key": sharding.constrain(keys, f"layers {_KEY}"),
    "value": sharding.constrain(values, f"layers {_VALUE}"),
    "segments": jnp.zeros((batch, length), jnp.int32),
    "shared": jnp.zeros((batch, length), bool),
    "mutual": jnp.zeros((batch, length), jnp.int32),
    "index": 0,
  }


def append(
  cache: Cache,
  segments: Int[Array, "B T"],
  shared: Bool[Array, "B T"] | None,
  mutual: Int[Array, "B T"] | None,
) -> Cache:
  """Cache whose next slots belong to the given segments and groups."""
  if shared is None:
    shared = jnp.zeros(segments.shape, bool)
  if mutual is None:
    mutual = jnp.zeros(segments.shape, jnp.int32)

  def write(old, new):
    new = new.astype(old.dtype)
    return jax.lax.dynamic_update_slice_in_dim(old, new, cache["index"], axis=1)

  return {
    **cache,
    "segments": write(cache["segments"], segments),
    "shared": write(cache["shared"], shared),
    "mutual": write(cache["mutual"], mutual),
    "index": cache["index"] + segments.shape[1],
  }


def store(
  pair: tuple[Float[Array, "B K H S"], Float[Array, "B K S H"]],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  index: Int[Array, ""] | int,
) -> tuple[Float[Array, "B K H S"], Float[Array, "B K S H"]]:
  """A layer's keys and values with new ones in the slots from `index` on.

  They lie as attention multiplies: else every token turns all of them.
  """
  keys, values = pair
  key = key.transpose(0, 2, 3, 1).astype(keys.dtype)
  value = value.swapaxes(1, 2).astype(values.dtype)
  write = jax.lax.dynamic_update_slice_in_dim
  # Few heads are whole on every device: else a step would gather all slots.
  return (
    sharding.constrain(write(keys, key, index, axis=3), _KEY),
    sharding.constrain(write(values, value, index, axis=2), _VALUE),
  )
