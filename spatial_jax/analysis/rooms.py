# SPDX-License-Identifier: Apache-2.0
"""Rooms of the world as stimuli: two things in a frame, asked in two orders.

  pair = Pair(room 7, frame 2, "left_right", chair, lamp; the chair is left)
  order 0: "... Options: A. left B. right" -> A
  order 1: "... Options: A. right B. left" -> B

What a paper's drawings give by construction, rooms give by geometry:
- `mirrored`: the same frames in a mirror. All orders flip, contents stay, and
  each token of the mirrored frame has its like at the mirrored place.
- `alone`: one thing of the room and nothing else, the camera turned so that it
  stands in the middle; `empty`: the room without things.

numpy only. Pixels are those of the model's images, origin top left.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from spatial_jax.geometry import boxes
from spatial_jax.types import Array, Float
from spatial_jax.world import questions
from spatial_jax.world.camera_questions import TEXTS
from spatial_jax.world.dataset import Room, World

# axis -> its question's type and the words; the first is class 0
AXES = {
  "left_right": ("camera_left_right", ("left", "right")),
  "front_behind": ("camera_front_behind", ("in front", "behind")),
}
LEAST_DEGREES, LEAST_METRES = 6.0, 0.3  # as the questions in training


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two objects that are the only ones of their kind, seen in one frame."""

  room: int  # row of the source
  frame: int
  axis: str
  objects: tuple[int, int]  # asked about, and in relation to which
  names: tuple[str, str]
  label: int  # of the true word in AXES[axis]
  boxes: Float[np.ndarray, "2 4"]  # x0 y0 x1 y1 in pixels, inside the image

  def question(self, order: int) -> questions.Question:
    """With the words in their order (0) or the other one (1)."""
    kind, words = AXES[self.axis]
    a, b = self.names
    text = TEXTS[kind].format(frame=self.frame + 1, a=a, b=b)
    said = words[::-1] if order else words
    options = tuple(
      f"{letter}. {word}"
      for letter, word in zip(questions.LETTERS, said, strict=False)
    )
    answer = questions.LETTERS[said.index(words[self.label])]
    return questions.Question(kind, text, answer, options, objects=self.objects)


def pixel_box(
  view: questions.View, frame: int, index: int
) -> Float[np.ndarray, 4] | None:
  """Box of an object's corners in a frame; None if it isn't all in front."""
  height, width = view.image_size
  at = boxes.corners(view.center[index], view.size[index], view.yaw[index])
  at = view.in_camera(frame, np.asarray(at))
  if (at[:, 2] < 0.1).any():
    return None
  pixel = (at @ view.intrinsics.T)[:, :2] / at[:, 2:]
  low = np.clip(pixel.min(0), 0, (width - 1, height - 1))
  high = np.clip(pixel.max(0), 1, (width, height))
  if (high - low < 1).any():
    return None
  return np.concatenate([low, high])


def pairs(
  room: Room, number: int, axis: str, rng: np.random.Generator, most: int
) -> list[Pair]:
  """Up to so many pairs of a room, by chance; either word is true as often."""
  view, found = room.view, []
  for frame in range(len(view.visible)):
    shown = view.single[view.visible[frame, view.single]]
    found += [(frame, int(a), int(b)) for a in shown for b in shown if a != b]
  out = []
  for choice in rng.permutation(len(found)):
    frame, a, b = found[choice]
    at = view.in_camera(frame, view.center[[a, b]])
    if axis == "left_right":
      place = np.degrees(np.arctan2(at[:, 0], at[:, 2]))
      least = LEAST_DEGREES
    else:
      place, least = at[:, 2], LEAST_METRES
    both = [pixel_box(view, frame, i) for i in (a, b)]
    if any(box is None for box in both) or (at[:, 2] <= 0.05).any():
      continue
    if abs(place[0] - place[1]) < least:
      continue
    label = int(place[0] > place[1])
    names = view.name(a), view.name(b)
    out.append(Pair(number, frame, axis, (a, b), names, label, np.stack(both)))
    if len(out) == most:
      break
  return out


def collect(
  source: World, axis: str, count: int, *, most: int = 2, seed: int = 0
) -> list[tuple[Room, Pair]]:
  """The first so many pairs of a source's rooms, each with its room.

  Raises:
    ValueError: the source has too few.
  """
  out = []
  for number in range(len(source)):
    room = source.room(number)
    rng = np.random.default_rng([seed, number])
    out += [(room, pair) for pair in pairs(room, number, axis, rng, most)]
    if len(out) >= count:
      return out[:count]
  raise ValueError(
    f"{len(source)} rooms have only {len(out)} pairs to ask {axis} about, not "
    f"{count}: raise config.data.world.rooms"
  )


def row(source: World, room: Room, pair: Pair) -> dict[str, np.ndarray]:
  """The source's row with the pair's question in both orders."""
  asked = [pair.question(0), pair.question(1)]
  return source.row(dataclasses.replace(room, questions=asked))


def mirrored(rows: dict[str, Array]) -> dict[str, Array]:
  """Rows whose frames are rendered as a mirror shows them.

  A negative focal length does it, for a principal point in the middle. What the
  model is told of its camera must be that of `rows`.
  """
  intrinsics = np.array(rows["intrinsics"])
  intrinsics[..., 0, 0] *= -1
  return {**rows, "intrinsics": intrinsics}


def empty(rows: dict[str, Array]) -> dict[str, Array]:
  """Rows of rooms without things; walls, floor and cameras stay."""
  shape = np.zeros_like(rows["scene/primitive_shape"])
  return {**rows, "scene/primitive_shape": shape}


def alone(
  rows: dict[str, Array],
  items: list[Pair],
  which: int,
  token: float,
  columns: int,
) -> tuple[dict[str, Array], np.ndarray]:
  """Rows with one thing of each pair, in the middle of the asked frame.

  The camera turns so that the thing moves by whole tokens.

  Args:
    which: 0 is the object asked about, 1 the other.
    token: side of a token in pixels.
    columns: tokens across a frame.

  Returns:
    rows, and by how many columns each thing has moved.
  """
  shape = np.array(rows["scene/primitive_shape"])
  poses = np.array(rows["world_from_camera"])
  shifts = []
  for i, pair in enumerate(items):
    mine = rows["scene/primitive_object"][i] == pair.objects[which]
    shape[i] = np.where(mine, shape[i], 0)
    x0, _, x1, _ = pair.boxes[which]
    first = int(x0 // token)
    last = max(first, min(int((x1 - 1e-3) // token), columns - 1))
    shift = (columns - (last - first + 1)) // 2 - first
    focal, middle = rows["intrinsics"][i][0, [0, 2]]
    was = (x0 + x1) / 2 - middle
    turn = np.arctan2(was, focal) - np.arctan2(was + shift * token, focal)
    # To the right is clockwise from above, where z is up.
    c, s = np.cos(-turn), np.sin(-turn)
    spin = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], poses.dtype)
    poses[i, pair.frame, :3, :3] = spin @ poses[i, pair.frame, :3, :3]
    shifts.append(shift)
  changed = {"scene/primitive_shape": shape, "world_from_camera": poses}
  return {**rows, **changed}, np.array(shifts)
