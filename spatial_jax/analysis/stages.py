# SPDX-License-Identifier: Apache-2.0
"""The pipeline's stages on rooms: probe, patch, steer. Each returns plain data.

Everything is shown beside what it must be compared with: probes with shuffled
labels and with random directions, steering with random directions, and the
paper's way to count steering beside an honest one.

Letters: S slots of the decoder's residual stream, N items, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.analysis import answers, patching, probes, steering
from spatial_jax.analysis.subject import Batch, Subject, right
from spatial_jax.types import Array, Float, Int


@jax.jit
def pool(slots, positions, mask):
  """Means over the tokens of each thing: [S B T D] -> [S B 2 D]."""
  seen = slots[:, :, positions]  # S B M D
  weight = mask / jnp.maximum(mask.sum(-1, keepdims=True), 1)
  return jnp.einsum("sbmd,bkm->sbkd", seen, weight)


@jax.jit
def fit(keys, x, y, held_x, held_y):
  """A probe for each slot, with its controls."""

  def one(key, x, held_x):
    return probes.fit_with_controls(key, x, y, held_x, held_y, classes=2)

  return jax.vmap(one)(keys, x, held_x)


def features(
  subject: Subject, split: str, axis: str, count: int, size: int
) -> tuple[Float[np.ndarray, "S N D"], Int[np.ndarray, " N"], np.ndarray]:
  """Of both things of each pair, their classes, and which answers are right."""
  x, y, ok = [], [], []
  for batch in subject.batches(split, axis, count, size):
    p, slots = subject.ask(batch.inputs)
    mask = subject.object_mask(batch.items)
    got = pool(slots, subject.map.positions.ravel(), mask)
    x.append(np.asarray(got).reshape(len(got), -1, got.shape[-1]))
    y.append(np.stack([batch.label, 1 - batch.label], axis=1).ravel())
    ok.append(right(p, batch.label))
  return np.concatenate(x, 1), np.concatenate(y), np.concatenate(ok)


def probe(
  subject: Subject, axis: str, count: int, size: int, seed: int
) -> tuple[dict, probes.Probe]:
  """Probes of every slot, from rooms of one split, tried on another's.

  Returns:
    Accuracies by slot (`train`, `held_out`, `shuffled`, `random`), the model's
    own accuracy on the held-out pairs, and the probes [S D 2].
  """
  x, y, _ = features(subject, "validation", axis, count, size)
  held_x, held_y, ok = features(subject, "test", axis, count, size)
  keys = jax.random.split(jax.random.key(seed), len(x))
  trained, scores = fit(keys, x, y, held_x, held_y)
  return {
    "probe": {k: np.asarray(v).tolist() for k, v in scores.items()},
    "things": {"train": len(y), "held_out": len(held_y)},
    "model": answers.two_order_accuracy(ok),
  }, trained


def heat(
  subject: Subject, batch: Batch, trained: probes.Probe
) -> Float[np.ndarray, "S B h w"]:
  """Probability of the second word at each token of the asked frame."""
  _, slots = subject.ask(batch.inputs)
  _, height, width = subject.map.grid
  places = np.stack(
    [subject.map.at(subject.frame_tokens(pair)) for pair in batch.items]
  )
  seen = jnp.take_along_axis(slots, places[None, :, :, None], axis=2)
  p = jax.vmap(probes.probabilities)(trained, seen)[..., 1]
  return np.asarray(p).reshape(len(p), len(places), height, width)


def patch_places(subject: Subject, batch: Batch) -> dict[str, patching.Where]:
  """What is taken from the mirrored run, by name.

  `objects`, `background`, `frame`: visual tokens of the asked frame from their
  mirrored places, so that contents stay and the order flips. `same question`
  and `other order`: the token before the answer, from the one before the answer
  to the same question, or to the one with the options in the other order.
  """
  mirror = subject.map.mirror()
  size = subject.map.grid[1] * subject.map.grid[2]
  sets = {"objects": [], "background": [], "frame": []}
  for pair in batch.items:
    things = [subject.object_tokens(pair, which) for which in (0, 1)]
    things = np.unique(np.concatenate(things))
    frame = subject.frame_tokens(pair)
    rest = np.setdiff1d(frame, things)
    for name, index in zip(sets, (things, rest, frame), strict=True):
      padded = np.full(size, -1)
      padded[: len(index)] = index
      sets[name].append(padded)
  out = {}
  for name, index in sets.items():
    index = np.stack(index)
    into = np.where(index < 0, -1, subject.map.at(index))
    out[name] = patching.moves(
      subject.length, into, subject.map.at(mirror[index])
    )
  at = batch.rows["answer_at"][:, :2]
  out["same question"] = patching.moves(subject.length, at, at)
  out["other order"] = patching.moves(subject.length, at, at[:, ::-1])
  return out


def flips(
  p: Float[Array, "S B order word"], label: Int[Array, " B"]
) -> Float[np.ndarray, "S B"]:
  """Probability of the wrong word among the two, mean over both orders."""
  p = np.asarray(p)
  wrong = np.where(label[:, None] == 0, p[..., 1], p[..., 0])
  return (wrong / np.maximum(p.sum(-1), 1e-9)).mean(-1)


def patch(subject: Subject, count: int, size: int) -> dict:
  """Left and right flipped by patches from the mirrored image, by slot.

  Only items count whose four answers, in both images and orders, are right.
  """
  curves, kept = {}, 0
  for batch in subject.batches("test", "left_right", count, size):
    p, _ = subject.ask(batch.inputs)
    other, slots = subject.ask(subject.mirrored(batch))
    keep = right(p, batch.label).all(-1)
    keep &= right(other, 1 - batch.label).all(-1)
    kept += int(keep.sum())
    for name, where in patch_places(subject, batch).items():
      got = flips(subject.sweep(batch.inputs, slots, where), batch.label)
      curves.setdefault(name, []).append(got[:, keep])
  means = {
    name: np.concatenate(rows, 1).mean(1).tolist() if kept else []
    for name, rows in curves.items()
  }
  return {"items": count, "kept": kept, "flip": means}


def steer(
  subject: Subject,
  axis: str,
  kernel: Float[Array, "D 2"],
  count: int,
  size: int,
  seed: int,
  alphas: tuple[float, ...] = steering.ALPHAS,
) -> Mapping[str, dict]:
  """The ordering amplified in all visual tokens, and random directions too.

  Every second item of each label chooses alpha, the others are scored.
  """
  random = probes.random_like(
    jax.random.key(seed), probes.Probe(kernel, jnp.zeros(kernel.shape[1]))
  ).kernel
  got, labels = {"ordering": [], "random": []}, []
  for batch in subject.batches("test", axis, count, size):
    labels.append(batch.label)
    for name, direction in (("ordering", kernel), ("random", random)):
      p = subject.steer(batch.inputs, direction, alphas)
      got[name].append(right(p, batch.label))
  labels = np.concatenate(labels)
  held_out = np.zeros(len(labels), bool)
  for label in np.unique(labels):
    held_out[np.flatnonzero(labels == label)[1::2]] = True
  out = {"alphas": list(alphas), "items": len(labels)}
  for name, parts in got.items():
    ok = np.concatenate(parts, axis=1)
    paper = steering.paper_protocol(ok)
    honest = steering.honest_protocol(ok, held_out)
    paper["best_alpha"] = alphas[paper["best_alpha"]]
    honest["alpha"] = alphas[honest["alpha"]]
    out[name] = {"paper": paper, "honest": honest}
  return out
