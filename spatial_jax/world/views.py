# SPDX-License-Identifier: Apache-2.0
"""Rooms seen from a few places, for models that learn geometry from images.

Row `i` of a split depends only on (seed, split, i). It carries the scene's
arrays and the cameras; `photograph.py` renders it on the device. There are no
questions and no tokens. numpy only: data workers call this.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from spatial_jax.geometry import camera
from spatial_jax.types import Float
from spatial_jax.world import freespace
from spatial_jax.world import scene as scene_lib

SPLITS = ("train", "validation", "test")
CLEARANCE = 0.45  # metres from an eye to walls and objects
SWAY = 0.15  # how uneven a turn is, as a part of the largest


@dataclasses.dataclass(frozen=True)
class Room:
  """A room and its frames."""

  scene: dict[str, np.ndarray]
  world_from_camera: np.ndarray  # f32[F 4 4]
  questions: tuple = ()


class Views:
  """Random-access source of rooms with their cameras.

  Args:
    split: "train", "validation" or "test"; they never share a room.
    seed: of rooms and cameras.
    rooms: how many rooms the split has.
    frames: views of a room.
    image_size: pixels of a square frame.
    fov_degrees: field of view.
    turn_degrees, reach: see `stroll`.
    scene: keyword arguments of `scene.sample`; `scene.SIMPLE` if None.

  Raises:
    ValueError: an unknown split.
  """

  def __init__(
    self,
    split: str,
    *,
    seed: int,
    rooms: int,
    frames: int,
    image_size: int,
    fov_degrees: float = 100.0,
    turn_degrees: float = 30.0,
    reach: float = 0.7,
    scene: dict | None = None,
  ):
    if split not in SPLITS:
      raise ValueError(f"split {split!r}: expected one of {SPLITS}")
    self.split, self.seed, self.rooms = split, seed, rooms
    self.frames, self.image_size = frames, image_size
    self.turn_degrees, self.reach = turn_degrees, reach
    self.scene_kwargs = dict(scene if scene is not None else scene_lib.SIMPLE)
    self.intrinsics = camera.intrinsics(image_size, image_size, fov_degrees)

  def __len__(self) -> int:
    return self.rooms

  def room(self, index: int) -> Room:
    scene = scene_lib.sample(self.seed, self.split, index, **self.scene_kwargs)
    number = SPLITS.index(self.split)
    rng = np.random.default_rng([self.seed, number, index, 3])
    poses = stroll(
      scene,
      rng,
      self.frames,
      turn_degrees=self.turn_degrees,
      reach=self.reach,
    )
    return Room(scene, poses)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    room = self.room(int(index))
    every = np.broadcast_to(self.intrinsics, (self.frames, 3, 3))
    return {
      "world_from_camera": room.world_from_camera.astype(np.float32),
      "intrinsics": every.astype(np.float32),
      **{f"scene/{key}": value for key, value in room.scene.items()},
    }


def stroll(
  scene: dict[str, np.ndarray],
  rng: np.random.Generator,
  frames: int,
  *,
  turn_degrees: float = 30.0,
  reach: float = 0.7,
  height: tuple[float, float] = (1.1, 1.8),
  pitch_degrees: tuple[float, float] = (-30.0, 0.0),
) -> Float[np.ndarray, "F 4 4"]:
  """Views that overlap: the head turns on, a few steps to the side between.

  The first looks across the room; each other one is near the first and turned
  on from the one before, to the same side, so that neighbours share most of
  what they see.

  Args:
    turn_degrees: largest turn from one view to the next, to either side.
    reach: metres between the first eye and the others, at most.
    height: of the eyes; each frame has its own.
    pitch_degrees: of the views; positive looks up.
  """
  outline = scene["room_polygon"]
  low, high = outline.min(0), outline.max(0)
  points = low + rng.random((48, 2)) * (high - low)
  gap = _gap(scene, points)
  least = min(CLEARANCE, 0.9 * float(gap.max()))  # less in crowded rooms
  at = points[int((gap >= least).argmax())]
  around = rng.uniform(-1, 1, (48, 2)) * reach
  near = at + around[np.hypot(*around.T) <= reach]
  free = near[_gap(scene, near) >= least]
  picks = rng.permutation(len(free))[: frames - 1]
  others = np.concatenate([free[picks], np.repeat(at[None], frames, 0)])
  eyes = np.concatenate([at[None], others[: frames - 1]])

  middle = (low + high) / 2
  ahead = np.arctan2(*(middle - at)[::-1]) + rng.uniform(-0.6, 0.6)
  rate = rng.uniform(-1, 1)
  sway = rng.uniform(-SWAY, SWAY, frames)
  turn = np.radians(turn_degrees) * (rate * np.arange(frames) + sway)
  turn -= turn[0]
  top = float(scene["room_height"]) - 0.2
  level = np.minimum(rng.uniform(*height, frames), top)
  pitch = np.radians(rng.uniform(*pitch_degrees, frames))
  return camera.from_heading(
    np.concatenate([eyes, level[:, None]], -1), ahead + turn, pitch
  )


def _gap(scene, points: np.ndarray) -> np.ndarray:
  objects, walls = freespace.clearance(scene, points)
  return np.minimum(objects, walls)


def make(config, split: str) -> Views:
  """Source of `config.data.views` (keys: the arguments of `Views`)."""
  return Views(split, **config.data.views.to_dict())
