# SPDX-License-Identifier: Apache-2.0
"""Interventions on the residual stream of scanned blocks, without hooks.

Slot 0 is what the first block reads (in a decoder: the merged embeddings), slot
i > 0 the output of block i - 1: a stack of L blocks has L + 1 slots, of which
the last one is what the final norm reads. Slots are traced, so that one
compiled program serves a sweep over all of them; a model that is called without
edits compiles to the program that it would be if there were none.

  patch = Edit(slot, mask, replace=clean)
  shift = Edit(0, mask, add=vector)
  steer = Edit(0, mask, amplify=directions, alpha=4.0)
  logits, out = model.apply(..., edits={"llm": (patch, steer)})

Letters: B batch, T tokens, D width, K directions or slots, L layers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from spatial_jax.types import Array, Bool, Float, Int


class Edit(NamedTuple):
  """What happens to the tokens of a mask at a slot.

  First they are replaced, then the rest is added. What adds nothing (zeros, or
  `alpha` 0) and what no token is under leave every bit as it is.
  """

  slot: Array | int  # [], or [K] for several; -1 is none
  mask: Array  # bool[B T], True where tokens are edited
  replace: Array | None = None  # [B T D], or 1 for B or T
  add: Array | None = None  # likewise
  # [K D]: alpha * sum_k <h, w_k> w_k / |w_k|^2 is added, h as it was before.
  amplify: Array | None = None
  alpha: Array | float = 1.0  # of `amplify` and of `add`


Edits = Edit | Sequence[Edit] | None


def apply(
  edits: Edits,
  x: Float[Array, "B T D"],
  number: Int[Array, ""] | int,
) -> Float[Array, "B T D"]:
  """The residual stream of slot `number`, edited; edits in their order."""
  if edits is None:
    return x
  for edit in (edits,) if isinstance(edits, Edit) else edits:
    hit = jnp.any(jnp.asarray(edit.slot) == number)
    x = _edit(x, edit, hit & edit.mask)
  return x


def _edit(
  x: Float[Array, "B T D"], edit: Edit, mask: Bool[Array, "B T"]
) -> Float[Array, "B T D"]:
  y = x
  if edit.replace is not None:
    y = jnp.broadcast_to(edit.replace.astype(x.dtype), x.shape)
  if edit.add is not None:
    y = _plus(y, edit.alpha * jnp.asarray(edit.add, jnp.float32))
  if edit.amplify is not None:
    y = _plus(y, edit.alpha * along(x, edit.amplify))
  return jnp.where(mask[..., None], y, x)


def _plus(x, y):
  y = jnp.broadcast_to(y.astype(x.dtype), x.shape)
  return jnp.where(y == 0, x, x + y)  # -0.0 + 0.0 would be 0.0


def along(
  x: Float[Array, "B T D"], directions: Float[Array, "K D"]
) -> Float[Array, "B T D"]:
  """Sum of the components of x along each direction; they may be oblique."""
  x, w = x.astype(jnp.float32), directions.astype(jnp.float32)
  size = jnp.sum(w**2, axis=-1) + 1e-8
  share = jnp.einsum("btd,kd->btk", x, w, precision="highest")
  share = share / size[None, None]
  return jnp.einsum("btk,kd->btd", share, w, precision="highest")


def split_rows(edits: Edits, parts: int, order: Array) -> Edits:
  """Edits of [B T D] for a stack that reads it as [B*parts T/parts D].

  Args:
    order: i64[T/parts], in which it reads the tokens of each part.
  """
  if edits is None or not isinstance(edits, Edit):
    return edits and tuple(split_rows(edit, parts, order) for edit in edits)
  B, T = edits.mask.shape

  def rows(x):
    if x is None:
      return None
    x = jnp.broadcast_to(x, (B, T, x.shape[-1]))
    return x.reshape(B * parts, T // parts, -1)[:, order]

  return edits._replace(
    mask=edits.mask.reshape(B * parts, -1)[:, order],
    replace=rows(edits.replace),
    add=rows(edits.add),
  )


def residuals(out: Mapping[str, Any], part: str = "llm") -> Array:
  """All slots [L+1 B T D] of a part of a model, as they are after edits."""
  first = out[f"{part}/embedded"][None]
  return jnp.concatenate([first, out[f"{part}/blocks"]])


def check(edits: Mapping[str, Edits] | None, parts: Collection[str]) -> dict:
  """Edits by part of a model; a part that it doesn't have is an error."""
  edits = dict(edits or {})
  if unknown := sorted(edits.keys() - set(parts)):
    raise ValueError(
      f"edits of {unknown}: this model takes edits of {sorted(parts)}"
    )
  return edits
