# SPDX-License-Identifier: Apache-2.0
"""What one run's residual stream does in another run, slot by slot.

  residuals = edit.residuals(out)        # of a counterfactual run, all slots
  where = last_token(last, T)            # or `swap(T, left, right)`
  curve = sweep(run, residuals, *where)  # run(edits) -> anything, per slot

`run` is compiled once for all slots, and the counterfactual runs once. Slots
are those of `nn.edit`: 0 is what the first block reads.

Letters: B batch, T length, D width, S slots, E entities, n tokens of an entity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.nn.edit import Edit
from spatial_jax.types import Array, Bool, Float, Int

Where = tuple[Bool[Array, "B T"], Int[Array, "B T"]]


def last_token(last: Int[Array, " B"], length: int) -> Where:
  """Each row's token that predicts the answer, from the same place."""
  place = np.arange(length)[None]
  mask = place == np.asarray(last)[:, None]
  return mask, np.broadcast_to(place, mask.shape).astype(np.int32)


def moves(
  length: int,
  into: Int[Array, "B n"] | Int[Array, " n"],
  source: Int[Array, "B n"] | Int[Array, " n"],
) -> Where:
  """Places `into` read from places `source` of the counterfactual run.

  A place below 0 is none, which pads rows to the same number.

  Length 4, into [1 2], source [3 1]: mask [F T T F], index [0 3 1 3].
  """
  into, source = np.atleast_2d(into), np.atleast_2d(source)
  mask = np.zeros((len(into), length), bool)
  index = np.tile(np.arange(length, dtype=np.int32), (len(into), 1))
  for row, (a, b) in enumerate(zip(into, source, strict=True)):
    keep = a >= 0
    mask[row, a[keep]] = True
    index[row, a[keep]] = b[keep]
  return mask, index


def swap(
  length: int,
  first: Int[Array, "B n"] | Int[Array, " n"],
  second: Int[Array, "B n"] | Int[Array, " n"],
) -> Where:
  """The criss-cross: places of one set read from the other's, and back."""
  first, second = np.atleast_2d(first), np.atleast_2d(second)
  into = np.concatenate([first, second], axis=1)
  source = np.concatenate([second, first], axis=1)
  return moves(length, into, source)


def sweep(
  run: Callable[[Sequence[Edit]], Any],
  residuals: Float[Array, "S B T D"],
  mask: Bool[Array, "#B T"],
  index: Int[Array, "#B T"],
  before: Sequence[Edit] = (),
) -> Any:
  """What `run` returns with the patch at each slot, stacked over the slots.

  Args:
    run: the clean run under edits of the decoder.
    residuals: of the counterfactual run.
    mask: where the clean run is patched.
    index: the place in the counterfactual run that each place reads.
    before: edits that come first, such as an ablation.
  """
  mask = jnp.broadcast_to(jnp.asarray(mask), residuals.shape[1:3])
  index = jnp.broadcast_to(jnp.asarray(index), mask.shape)

  def one(slot):
    number, values = slot
    values = jnp.take_along_axis(values, index[..., None], axis=1)
    return run((*before, Edit(number, mask, replace=values)))

  return jax.lax.map(one, (jnp.arange(len(residuals)), residuals))


def ablate_ordering(
  embeddings: Float[Array, "B T D"],
  image: Int[Array, " M"],
  entities: Int[Array, "E n"],
  isolated: Float[Array, "E B n D"],
  empty: Float[Array, "B T D"],
) -> Float[Array, "B T D"]:
  """Image tokens that know what is there, but not in which order.

  Args:
    embeddings: what the first block reads.
    image: places of all image tokens.
    entities: places of the tokens of each entity.
    isolated: tokens of each entity where it stands alone in the middle.
    empty: embeddings with an image that shows nothing.
  """
  image, places = jnp.asarray(image), jnp.asarray(entities).ravel()
  embeddings, empty = jnp.asarray(embeddings), jnp.asarray(empty)
  out = embeddings.at[:, image].set(empty[:, image])
  values = jnp.moveaxis(isolated, 0, 1)  # B E n D
  return out.at[:, places].set(values.reshape(len(out), -1, out.shape[-1]))


def interchange_accuracy(
  probabilities: Float[Array, "... K"], predicted: Int[Array, ...]
) -> Float[np.ndarray, ...]:
  """Whether the likeliest label is the one that a hypothesis predicts."""
  return (np.asarray(probabilities).argmax(-1) == predicted).astype(np.float64)
