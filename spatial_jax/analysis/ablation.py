# SPDX-License-Identifier: Apache-2.0
"""Rooms whose tokens know what is there, but not in which order.

The ordering ablation of arXiv 2603.22278, for rooms: a thing's tokens come from
an image in which it stands alone in the middle of the frame, all other visual
tokens from the empty room. What a model still answers it has from elsewhere:
from the decoder, which can rebuild the order from where tokens stand in the
row. Under this ablation the criss-cross shows at which slots.

Left out: frames other than the asked one are empty as well.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.analysis import answers, rooms, steering
from spatial_jax.analysis.stages import flips, patch_places
from spatial_jax.analysis.subject import Batch, Subject, right
from spatial_jax.nn.edit import Edit
from spatial_jax.types import Array, Float

# What is left of the image, from everything to nothing.
CONDITIONS = (
  "as it is",
  "things in place, room empty",
  "things from the middle, room empty",
  "room empty",
  "ordering directions removed",
  "random directions removed",
)


def values(
  subject: Subject, batch: Batch, mirrored: bool = False
) -> dict[str, Float[np.ndarray, "B T D"]]:
  """Embeddings of three conditions, for the images or their mirror images."""
  rows, told = batch.rows, batch.inputs
  inputs = subject.mirrored(batch) if mirrored else batch.inputs
  plain = np.asarray(subject.embedded(inputs))

  def embed(rows):
    rows = rooms.mirrored(rows) if mirrored else rows
    return np.asarray(subject.embedded(subject.see(rows, told)))

  empty = embed(rooms.empty(rows))
  kept, middle = np.array(empty), np.array(empty)
  mirror = subject.map.mirror()
  for which in (0, 1):
    changed, shift = rooms.alone(
      rows, batch.items, which, subject.token, subject.map.grid[2]
    )
    lone = embed(changed)
    for i, pair in enumerate(batch.items):
      into = subject.object_tokens(pair, which)
      source = into + shift[i]
      if mirrored:
        into, source = mirror[into], mirror[source]
      into, source = subject.map.at(into), subject.map.at(source)
      kept[i, into] = plain[i, into]
      middle[i, into] = lone[i, source]
  names = CONDITIONS[1:4]
  return dict(zip(names, (kept, middle, empty), strict=True))


def ablate(
  subject: Subject,
  axis: str,
  kernel: Float[Array, "D 2"],
  count: int,
  size: int,
  seed: int,
) -> dict:
  """Accuracies in both orders under each condition, and the criss-cross.

  Args:
    kernel: a probe's directions at slot 0, which one condition removes.
  """
  random = jax.random.normal(jax.random.key(seed), kernel.shape)
  ok, curve, kept = {name: [] for name in CONDITIONS}, [], 0
  for batch in subject.batches("test", axis, count, size):
    mask = np.broadcast_to(subject.image_mask, batch.inputs["tokens"].shape)
    plain = subject.embedded(batch.inputs)
    made = {CONDITIONS[0]: plain, **values(subject, batch)}
    for name, directions in zip(CONDITIONS[4:], (kernel, random), strict=True):
      made[name] = steering.remove(plain, mask, directions)
    for name, x in made.items():
      edit = Edit(0, mask, replace=jnp.asarray(x))
      p, _ = subject.ask(batch.inputs, edit)
      ok[name].append(right(p, batch.label))
    if axis == "left_right":
      rows, keep = _criss_cross(subject, batch, made[CONDITIONS[2]], mask)
      curve.append(rows[:, keep])
      kept += int(keep.sum())
  out = {
    "items": count,
    "accuracy": {
      name: answers.two_order_accuracy(np.concatenate(rows))
      for name, rows in ok.items()
    },
  }
  if axis == "left_right":
    flip = np.concatenate(curve, 1).mean(1).tolist() if kept else []
    out["criss_cross"] = {"kept": kept, "flip": flip}
  return out


def _criss_cross(subject, batch, ablated, mask):
  """Things' tokens swapped at each slot, both runs ablated at slot 0.

  At slot 0 the swap comes after the ablation. Items count that are right under
  ablation, in both images and orders.
  """
  before = Edit(0, mask, replace=jnp.asarray(ablated))
  theirs = values(subject, batch, mirrored=True)[CONDITIONS[2]]
  other, slots = subject.ask(
    subject.mirrored(batch), Edit(0, mask, replace=jnp.asarray(theirs))
  )
  p, _ = subject.ask(batch.inputs, before)
  keep = right(p, batch.label).all(-1)
  keep &= right(other, 1 - batch.label).all(-1)
  where = patch_places(subject, batch)["objects"]
  swapped = subject.sweep(batch.inputs, slots, where, before)
  return flips(swapped, batch.label), keep
