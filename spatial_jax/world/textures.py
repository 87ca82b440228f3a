# SPDX-License-Identifier: Apache-2.0
"""Procedural surfaces: brightness factors as functions of a point in metres.

Patterns are made from integers, so they are the same on every backend.
"""

from __future__ import annotations

import jax.numpy as jnp

from spatial_jax.types import Array
from spatial_jax.world.scene import CHECKER, SPECKLE, STRIPES


def _checker(*cells: Array) -> Array:
  total = sum(jnp.floor(c).astype(jnp.int32) for c in cells)
  return (total & 1).astype(jnp.float32)


def _hash(*cells: Array) -> Array:
  """Pseudo-random value in [0, 1) of integer cells."""
  mixed = jnp.uint32(0x9E3779B9)
  for cell in cells:
    part = jnp.floor(cell).astype(jnp.int32).astype(jnp.uint32)
    mixed = (mixed ^ part) * jnp.uint32(0x85EBCA6B)
    mixed = mixed ^ (mixed >> 13)
  return (mixed >> 8).astype(jnp.float32) / 2**24


def _pick(kind: Array, checker, stripes, speckle) -> Array:
  pattern = jnp.where(kind == CHECKER, checker, 1.0)
  pattern = jnp.where(kind == STRIPES, stripes, pattern)
  return jnp.where(kind == SPECKLE, speckle, pattern)


def object_factor(kind: Array, local: tuple, index: Array) -> Array:
  """Pattern in an object's own axes; `index` makes its grain its own."""
  x, y, z = (c + 1e-3 for c in local)
  grain = _hash(50 * x, 50 * y, 50 * z, index)
  return _pick(
    kind,
    1 - 0.3 * _checker(10 * x, 10 * y, 10 * z),
    1 - 0.3 * _checker(8 * (x + y) + 100),
    0.8 + 0.3 * grain,
  )


def floor_factor(kind: Array, x: Array, y: Array) -> Array:
  """Half-metre tiles, planks, or carpet."""
  plank = jnp.floor(x / 0.18)
  shift = 1.3 * _hash(plank)
  wood = 0.85 + 0.25 * _hash(plank, (y + shift) / 1.3)
  return _pick(
    kind,
    1 - 0.22 * _checker(2 * x, 2 * y),
    wood,
    0.85 + 0.2 * _hash(40 * x, 40 * y),
  )


def wall_factor(kind: Array, along: Array, z: Array) -> Array:
  """Tiles, striped wallpaper, or plaster."""
  return _pick(
    kind,
    1 - 0.1 * _checker(4 * along, 4 * z),
    1 - 0.1 * _checker(5 * along),
    0.92 + 0.1 * _hash(30 * along, 30 * z),
  )
