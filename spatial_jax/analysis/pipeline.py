# SPDX-License-Identifier: Apache-2.0
"""Probe, patch, ablate and steer one trained model: numbers, then figures.

`run` gives plain data (what `analysis.json` holds) and the heat maps, which
`plots` turns into files. `summary` is one model's line in a table of several.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from spatial_jax.analysis import ablation, rooms, stages
from spatial_jax.analysis.subject import Subject
from spatial_jax.world import render


class Shown(NamedTuple):
  """Heat maps and the frames under them."""

  items: list[rooms.Pair]
  frames: list[np.ndarray]
  maps: dict[str, np.ndarray]  # slot's name -> [B h w]
  mean: dict[str, np.ndarray]  # slot's name -> [h w]


def run(
  subject: Subject,
  counts: Any,
  say: Callable[[str], None] = print,
  axes: Sequence[str] = tuple(rooms.AXES),
) -> tuple[dict[str, Any], dict[str, Shown]]:
  """All stages on each axis; patches on left and right alone.

  Args:
    counts: `probe`, `patch`, `ablate` and `steer` are numbers of pairs,
      multiples of `batch`; `seed` is that of probes and random directions.
    say: called with a line for each stage that is done.
  """
  result: dict[str, Any] = {"slots": subject.slots, "axes": {}}
  shown, began = {}, time.perf_counter()

  def told(what):
    say(f"{what} ({time.perf_counter() - began:.0f} s)")

  size, seed = counts.batch, counts.seed
  for axis in axes:
    found, trained = stages.probe(subject, axis, counts.probe, size, seed)
    shown[axis] = show(subject, axis, trained, counts.probe, size)
    told(f"{axis}: probes")
    kernel = trained.kernel[0]
    found["ablation"] = ablation.ablate(
      subject, axis, kernel, counts.ablate, size, seed
    )
    told(f"{axis}: ablations")
    found["steering"] = stages.steer(
      subject, axis, kernel, counts.steer, size, seed
    )
    told(f"{axis}: steering")
    if axis == "left_right":
      found["patching"] = stages.patch(subject, counts.patch, size)
      told(f"{axis}: patching")
    result["axes"][axis] = found
  result["seconds"] = time.perf_counter() - began
  result["summary"] = summary(result)
  return result, shown


def show(
  subject: Subject, axis: str, trained: Any, count: int, size: int, few: int = 3
) -> Shown:
  """Maps of three slots: first, middle and last."""
  last = subject.slots - 1
  names = {
    "input of the decoder": 0,
    f"after block {last // 2}": last // 2,
    f"after block {last}": last,
  }
  maps, first = [], None
  for batch in subject.batches("test", axis, min(count, 2 * size), size):
    first = first or batch
    maps.append(stages.heat(subject, batch, trained))
  every = np.concatenate(maps, axis=1)
  # Of different rooms.
  numbers = [pair.room for pair in first.items]
  chosen = [numbers.index(room) for room in dict.fromkeys(numbers)][:few]
  frames = [picture(subject, first.rows, i, first.items[i]) for i in chosen]
  return Shown(
    [first.items[i] for i in chosen],
    frames,
    {name: every[slot][chosen] for name, slot in names.items()},
    {name: every[slot].mean(0) for name, slot in names.items()},
  )


def picture(subject, rows, index: int, pair: rooms.Pair) -> np.ndarray:
  """The asked frame, sharper than the model sees it."""
  scale = max(1, 192 // subject.size)
  scene = {
    key.removeprefix("scene/"): value[index]
    for key, value in rows.items()
    if key.startswith("scene/")
  }
  intrinsics = np.array(rows["intrinsics"][index])
  intrinsics[:2] *= scale
  pose = rows["world_from_camera"][index, pair.frame][None]
  side = scale * subject.size
  view = render.render(scene, pose, intrinsics, side, side)
  return np.asarray(view["rgb"][0])


def summary(result: dict[str, Any]) -> dict[str, float | None]:
  """What tells models apart; None where no item qualified.

  Of left and right, and of depth if that axis is there.
  """
  left, deep = (result["axes"].get(axis) for axis in rooms.AXES)
  flip = left["patching"]["flip"]
  again = left["ablation"]["criss_cross"]["flip"]
  ablated = left["ablation"]["accuracy"]
  honest = left["steering"]["ordering"]["honest"]
  random = left["steering"]["random"]["honest"]
  return {
    "left/right, both orders": left["model"]["strict"],
    "front/behind, both orders": deep and deep["model"]["strict"],
    "probe, decoder's input": left["probe"]["held_out"][0],
    "probe, slot best on these rooms": max(left["probe"]["held_out"]),
    "probe of depth, decoder's input": deep and deep["probe"]["held_out"][0],
    "probe of depth, slot best on these": deep
    and max(deep["probe"]["held_out"]),
    "flip by things": flip["objects"][0] if flip["objects"] else None,
    "flip by background": flip["background"][0] if flip["objects"] else None,
    "accuracy, order ablated": ablated[ablation.CONDITIONS[2]]["strict"],
    "order rebuilt in decoder": max(again) - again[0] if again else None,
    "steering, honest gain": honest["gain"],
    "steering, error": honest["error"],
    "steering, random gain": random["gain"],
  }
