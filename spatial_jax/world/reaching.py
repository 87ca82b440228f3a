# SPDX-License-Identifier: Apache-2.0
"""Demonstrations for action models: a hand that reaches for things in rooms.

One row is one room and one thing of it: views, the instruction, where the hand
is, and the straight way to the thing in a chunk of equal steps. All lengths are
metres in the axes of the first view's camera. numpy only: data workers call
this; `reaching_view` renders.
"""

from __future__ import annotations

import numpy as np

from spatial_jax.data import text
from spatial_jax.world import dataset


class Reaching:
  """Random-access source; row `i` depends only on the seed, the split and i.

  An action has 7 numbers: x, y, z, three of rotation, which stay 0, and the
  hand, open (1) until the last step, which closes it (-1). A state has 8: where
  the hand is, three of rotation, and its two fingers.

  Args:
    rooms: source of rooms.
    length: tokens of a row.
    chunk: steps of a way.
    actions, state: numbers of an action and of a state; zeros fill up.
    has_slots: one empty token for each number of the actions, after the text,
      and an end token.
  """

  def __init__(
    self,
    rooms: dataset.World,
    *,
    length: int,
    chunk: int,
    actions: int = 7,
    state: int = 8,
    has_slots: bool = False,
  ):
    self.rooms, self.length, self.chunk = rooms, length, chunk
    self.actions, self.state, self.has_slots = actions, state, has_slots
    self.tokenizer = text.Tokenizer.load()

  def __len__(self) -> int:
    return len(self.rooms)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    room = self.rooms.room(int(index))
    rng = np.random.default_rng([self.rooms.seed, int(index), 3])
    view = room.view
    # Things that one word tells apart, or else any.
    known = view.single if len(view.single) else np.flatnonzero(view.real)
    thing = int(rng.choice(known if len(known) else [0]))
    hand = rng.uniform(-0.5, 0.5, 3)
    way = view.in_camera(0, view.center[[thing]])[0] - hand
    actions = np.zeros((self.chunk, self.actions), np.float32)
    actions[:, :3] = way / self.chunk
    actions[:, 6] = np.where(np.arange(self.chunk) < self.chunk - 1, 1, -1)
    state = np.zeros(self.state, np.float32)
    state[:3], state[6:8] = hand, 1
    return {
      **self._text(f"Reach for the {view.name(thing)}."),
      "actions": actions,
      "state": state,
      "images_mask": np.ones(self.rooms.frames, bool),
      "world_from_camera": room.world_from_camera.astype(np.float32),
      "intrinsics": self.rooms.intrinsics.astype(np.float32),
      **{f"scene/{key}": value for key, value in room.scene.items()},
    }

  def _text(self, instruction):
    tok = self.tokenizer
    begin, end = tok.token_id("<|im_start|>"), tok.token_id("<|im_end|>")
    ids = [begin, *tok.encode(instruction)]
    first, count = len(ids), self.chunk * self.actions * self.has_slots
    if self.has_slots:
      ids += [tok.pad_id] * count + [end]
    if len(ids) > self.length:
      raise ValueError(
        f"config.data.length={self.length} is too short for {len(ids)} tokens "
        f"of {instruction!r} and its actions"
      )
    places = np.arange(self.length)
    tokens = np.full(self.length, tok.pad_id, np.int32)
    tokens[: len(ids)] = ids
    return {
      "tokens": tokens,
      "tokens_mask": places < len(ids),
      "slots": (places >= first) & (places < first + count),
    }


def make(config, split: str) -> Reaching:
  """Source of `config.data`; `data.world` has the arguments of its rooms."""
  rooms = dataset.World(split, **config.data.world.to_dict())
  return Reaching(
    rooms, length=config.data.length, **config.data.reaching.to_dict()
  )
