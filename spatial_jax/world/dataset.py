# SPDX-License-Identifier: Apache-2.0
"""Rows of questions about procedural rooms, for training and evaluation.

One row is one room: `<vision> preamble` once, then as many questions as fit,
each a packed segment that sees the images and itself. Supervision per rendered
room grows by the number of questions, and each answer is exactly what the
question alone would get. numpy only: data workers call this.

Row `i` of a split depends only on (seed, split, i). Images are not in the row:
it carries the scene's arrays, and `observe.py` renders them on the device.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from spatial_jax.data import positions, text
from spatial_jax.geometry import camera
from spatial_jax.world import (
  cameras,
  questions,
  targets,
  visibility,
)
from spatial_jax.world import scene as scene_lib

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Room:
  """A room, its frames and its questions."""

  scene: dict[str, np.ndarray]
  world_from_camera: np.ndarray  # f32[F 4 4]
  view: questions.View
  questions: list[questions.Question]


class World:
  """Random-access source of rows.

  Args:
    split: "train", "validation" or "test"; they never share a room.
    seed: of rooms, cameras and questions.
    rooms: how many rooms the split has.
    frames: views of a room, from one point, clockwise.
    image_size: pixels of a square frame.
    patch_size, merge_size: of the vision tower, in pixels and patches.
    visual_tokens: how many tokens the frames are together, in a line, for
      models that pool patches by where they are; 0: one for each merged patch.
    text_length: tokens for questions, a multiple of `chunk`.
    chunk: tokens that no question's text crosses; see `place`.
    questions_per_room: question type -> how many to try to ask.
    scene: keyword arguments of `scene.sample`; `scene.SIMPLE` if None.
    fov_degrees: horizontal field of view.
    blind: rows without images.
    draws: rows of each room, with other cameras and questions.
    layouts: name -> scene, instead of sampled rooms.

  Raises:
    ValueError: an unknown split, or sizes that don't divide.
  """

  def __init__(
    self,
    split: str,
    *,
    seed: int,
    rooms: int,
    frames: int,
    image_size: int,
    patch_size: int,
    merge_size: int,
    text_length: int,
    chunk: int,
    questions_per_room: dict[str, int],
    visual_tokens: int = 0,
    scene: dict | None = None,
    fov_degrees: float = 100.0,
    blind: bool = False,
    draws: int = 1,
    layouts: dict[str, dict[str, np.ndarray]] | None = None,
  ):
    if split not in SPLITS:
      raise ValueError(f"split {split!r}: expected one of {SPLITS}")
    grid = image_size // (patch_size * merge_size)
    if grid * patch_size * merge_size != image_size:
      raise ValueError(
        f"data.world.image_size {image_size} is no multiple of patch_size * "
        f"merge_size = {patch_size * merge_size}"
      )
    self.split, self.seed, self.rooms, self.draws = split, seed, rooms, draws
    self.frames, self.image_size = frames, image_size
    self.grid = (frames, grid, grid)
    self.visual_tokens = visual_tokens or frames * grid * grid
    self.has_grid = not visual_tokens
    if text_length % chunk:
      raise ValueError(
        f"data.world.text_length {text_length} is no multiple of "
        f"data.world.chunk {chunk}"
      )
    self.text_length, self.chunk = text_length, chunk
    self.questions_per_room = dict(questions_per_room)
    self.scene_kwargs = dict(scene if scene is not None else scene_lib.SIMPLE)
    self.intrinsics = camera.intrinsics(image_size, image_size, fov_degrees)
    self.blind = blind
    self.layouts = list(layouts.values()) if layouts else None
    self.names = list(layouts) if layouts else None
    if self.layouts:
      self.rooms = len(self.layouts)
    self.tokenizer = text.Tokenizer.load()
    self.encoder = targets.Encoder(self.tokenizer)
    self.prefix = self._prefix()
    self.length = len(self.prefix[0]) + text_length

  def __len__(self) -> int:
    return self.rooms * self.draws

  def name(self, index: int) -> str:
    if self.names:
      return self.names[index % self.rooms]
    return f"room {index % self.rooms} of the {self.split} split"

  def room(self, index: int) -> Room:
    """Scene, frames and questions of one row, before tokenisation."""
    number = SPLITS.index(self.split)
    room = index % self.rooms
    if self.layouts:
      scene = self.layouts[room]
    else:
      scene = scene_lib.sample(self.seed, self.split, room, **self.scene_kwargs)
    rng = np.random.default_rng([self.seed, number, index, 1])
    poses = cameras.turntable(scene, rng, self.frames)
    counts = visibility.pixel_counts(scene, poses, self.intrinsics)
    view = questions.View(
      scene,
      counts,
      poses,
      self.intrinsics,
      (self.image_size, self.image_size),
      visibility.GRID**2,
      every_class=not self.layouts,
    )
    rng = np.random.default_rng([self.seed, number, index, 2])
    asked = questions.generate(view, rng, self.questions_per_room)
    return Room(scene, poses, view, asked)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return self.row(self.room(int(index)))

  def _prefix(self):
    """Ids and M-RoPE positions [3 n] of `<vision> preamble`."""
    tok = self.tokenizer
    after = tok.encode(questions.PREAMBLE)
    if self.blind:
      place = np.broadcast_to(np.arange(len(after)), (3, len(after)))
      return np.array(after), place
    ids = [
      tok.token_id("<|vision_start|>"),
      *[tok.token_id("<|video_pad|>")] * self.visual_tokens,
      tok.token_id("<|vision_end|>"),
      *after,
    ]
    ids = np.array(ids, np.int32)
    if not self.has_grid:
      return ids, np.broadcast_to(np.arange(len(ids)), (3, len(ids)))
    frames, height, width = self.grid
    place, _ = positions.mrope(
      ids,
      [(frames, height, width)],
      video_token=int(tok.token_id("<|video_pad|>")),
      merge=1,  # the grid is in merged tokens already
      second_per_grid=0.5,  # one position a frame
    )
    return ids, place

  def place(
    self, asked: list[questions.Question]
  ) -> list[tuple[questions.Question, np.ndarray, int, int]]:
    """(question, ids, answer position, start) of the questions that fit.

    The text is cut into chunks and no question crosses a border, so that
    attention may be computed chunk by chunk (`nn.attention.chunked`).

    Raises:
      ValueError: a question is longer than a chunk.
    """
    room = [self.chunk] * (self.text_length // self.chunk)
    placed = []
    for question in asked:
      ids, answer = self.encoder.encode(question)
      if len(ids) > self.chunk:
        raise ValueError(
          f"data.world.chunk is {self.chunk} tokens, too short for a question "
          f"of {len(ids)} ({question.text[:60]!r}...); make it longer"
        )
      for index, left in enumerate(room):
        if len(ids) <= left and len(placed) < MAX_QUESTIONS:
          start = (index + 1) * self.chunk - left
          placed.append((question, ids, answer, start))
          room[index] -= len(ids)
          break
    return placed

  def row(self, room: Room) -> dict[str, np.ndarray]:
    """Packs as many of the room's questions as fit; the rest are dropped."""
    ids0, place0 = self.prefix
    size, start = self.length, len(ids0)
    row = {
      "tokens": np.full(size, self.tokenizer.pad_id, np.int32),
      "positions": np.zeros((3, size), np.int32),
      "segments": np.zeros(size, np.int32),
      "shared": np.zeros(size, bool),
      "labels": np.zeros(size, np.int32),
      "loss_weight": np.zeros(size, np.float32),
      "targets": np.zeros((size, targets.WIDTH), np.float32),
      "targets_mask": np.zeros((size, targets.WIDTH), bool),
      "answer_at": np.full(MAX_QUESTIONS, -1, np.int32),
    }
    row["tokens"][:start] = ids0
    row["positions"][:, :start] = place0
    row["segments"][:start] = 1
    row["shared"][:start] = True
    origin = int(place0.max()) + 1
    facts = targets.RoomFacts(room.view)
    for number, (question, ids, answer, at) in enumerate(
      self.place(room.questions)
    ):
      here = slice(start + at, start + at + len(ids))
      said = np.arange(len(ids)) > answer
      row["tokens"][here] = ids
      row["positions"][:, here] = origin + np.arange(len(ids))
      row["segments"][here] = 2 + number
      row["labels"][here], row["loss_weight"][here] = text.next_token(ids, said)
      row["targets"][here], row["targets_mask"][here] = self.encoder.targets(
        question, ids, answer, facts
      )
      row["answer_at"][number] = start + at + answer
    if not self.blind:
      row["world_from_camera"] = room.world_from_camera.astype(np.float32)
      row["intrinsics"] = self.intrinsics.astype(np.float32)
      row |= {f"scene/{key}": value for key, value in room.scene.items()}
    return row


MAX_QUESTIONS = 48


def make(config, split: str) -> World:
  """Source of `config.data` (keys: the keyword arguments of `World`)."""
  data = config.data
  kwargs = dict(data.world.to_dict())
  path = kwargs.pop("layouts_path", "")
  if path:
    from spatial_jax.world import layouts

    kwargs["layouts"] = layouts.load(path, **kwargs.pop("layouts_size", {}))
  return World(split, **kwargs)
