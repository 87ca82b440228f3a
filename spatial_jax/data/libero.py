# SPDX-License-Identifier: Apache-2.0
"""LIBERO's demonstrations in RLDS form, as OpenVLA-OFT is trained on them.

  python -m spatial_jax.data.libero FOLDER > statistics.json

FOLDER is a version of a TFDS data set such as openvla/modified_libero_rlds's
libero_spatial_no_noops/1.0.0. The command prints the statistics of its actions
and states, which the source needs.

A row is one step of an episode: images of the cameras, "In: What action should
the robot take to ...?", the state and the actions from this step on; after the
last one it is repeated. numpy and Pillow only: data workers call this.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence

import numpy as np

from spatial_jax.data import actions as normal
from spatial_jax.data import images, text
from spatial_jax.data.tfrecord import Records

CAMERAS = ("image", "wrist_image")
PROMPT = "In: What action should the robot take to {}?\nOut: "
# DINOv2's and SigLIP's normalisation, side by side in the channels.
_MEAN = np.float32((*images.IMAGENET_MEAN, *images.HALF))
_STD = np.float32((*images.IMAGENET_STD, *images.HALF))


def moves(episode: dict, width: int = 7) -> np.ndarray:
  """Actions [N A] of an episode; the last number is 1 for an open hand."""
  values = np.array(episode["steps/action"]).reshape(-1, width)
  values[:, -1] = 1 - np.clip(values[:, -1], 0, 1)
  return values


def states(episode: dict, count: int) -> np.ndarray:
  """States [N S] of an episode of `count` steps."""
  return episode["steps/observation/state"].reshape(count, -1)


def statistics(records: Records) -> dict[str, dict]:
  """What `Libero` normalises with, of all episodes."""
  taken, seen = [], []
  for index in range(len(records)):
    episode = records[index]
    taken.append(moves(episode))
    seen.append(states(episode, len(taken[-1])))
  taken, seen = np.concatenate(taken), np.concatenate(seen)
  hand = [True] * (taken.shape[1] - 1) + [False]
  return {
    "action": normal.statistics(taken, hand),
    "proprio": normal.statistics(seen),
    "num_transitions": len(taken),
    "num_trajectories": len(records),
  }


class Libero:
  """Random-access source; row `i` depends only on the seed and i.

  Args:
    records: episodes.
    known: statistics; see `statistics`.
    tokenizer: folder with Llama's tokenizer.json.
    length: tokens of a row.
    chunk: actions of a row.
    cameras: which images, in this order.
    side: of an image, in pixels.
    augment: random crops and colours.
    draws: rows for each episode, each of one of its steps.
  """

  def __init__(
    self,
    records: Records,
    known: dict,
    *,
    tokenizer: str,
    length: int,
    chunk: int = 8,
    cameras: Sequence[str] = CAMERAS,
    side: int = 224,
    augment: bool = True,
    draws: int = 1000,
    seed: int = 0,
  ):
    self._records, self._known = records, known
    self.tokenizer = text.Tokenizer.load(tokenizer or None)
    self._length, self._chunk, self._side = length, chunk, side
    self._cameras, self._augment = tuple(cameras), augment
    self._draws, self._seed = draws, seed

  def __len__(self) -> int:
    return len(self._records) * self._draws

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([self._seed, int(index)])
    episode = self._records[int(index) % len(self._records)]
    taken = moves(episode)
    step = int(rng.integers(len(taken)))
    here = np.minimum(step + np.arange(self._chunk), len(taken) - 1)
    chunk = normal.normalize(taken[here], self._known["action"])
    state = states(episode, len(taken))[step]
    instruction = episode["steps/language_instruction"][step].decode()
    return {
      **self._text(instruction.lower(), chunk.size),
      "images": np.stack(
        [self._see(episode, c, step, rng) for c in self._cameras]
      ),
      "state": normal.normalize(state, self._known["proprio"]),
      "actions": chunk,
    }

  def _text(self, instruction: str, count: int) -> dict[str, np.ndarray]:
    tok = self.tokenizer
    words = tok.encode(PROMPT.format(instruction))
    # The published tokenizer begins each text by itself.
    ids = [self._begin, *words] if self._begin is not None else words
    used = len(ids) + count + 1
    if used > self._length:
      raise ValueError(
        f"config.data.length={self._length} is too short for the {used} tokens "
        f"of {instruction!r} and its actions"
      )
    places = np.arange(self._length)
    tokens = np.full(self._length, tok.pad_id, np.int32)
    tokens[: len(ids)] = ids
    tokens[used - 1] = tok.end_id
    return {
      "tokens": tokens,
      "tokens_mask": places < used,
      "slots": (places >= len(ids)) & (places < used - 1),
    }

  @property
  def _begin(self) -> int | None:
    return self.tokenizer.backend.token_to_id("<s>")

  def _see(self, episode, camera, step, rng) -> np.ndarray:
    from PIL import Image

    image = Image.open(
      io.BytesIO(episode[f"steps/observation/{camera}"][step])
    ).convert("RGB")
    image = image.resize((self._side, self._side), Image.LANCZOS)
    if self._augment:
      image = _vary(image, rng)
    colors = np.asarray(image, np.float32) / 255
    return (np.concatenate([colors, colors], axis=-1) - _MEAN) / _STD


def _vary(image, rng):
  """A crop of 90 % of the area, and other colours, as in the published run."""
  from PIL import Image

  side = image.width
  inner = side * 0.9**0.5
  left, top = rng.uniform(0, side - inner, 2)
  box = (left, top, left + inner, top + inner)
  image = image.resize((side, side), Image.BILINEAR, box=box)
  x = np.asarray(image, np.float32) / 255 + rng.uniform(-0.2, 0.2)
  mean = x.mean((0, 1), keepdims=True)
  x = (x - mean) * rng.uniform(0.8, 1.2) + mean
  grey = x @ np.float32([[0.2989], [0.587], [0.114]])
  x = np.clip(grey + (x - grey) * rng.uniform(0.8, 1.2), 0, 1)
  h, s, v = Image.fromarray(np.uint8(255 * x + 0.5)).convert("HSV").split()
  turn = round(255 * rng.uniform(-0.05, 0.05))
  h = Image.fromarray(np.asarray(h) + np.uint8(turn % 256))
  return Image.merge("HSV", (h, s, v)).convert("RGB")


def make(config, split: str) -> Libero:
  """Source of `config.data`.

  `data.libero` has `folder`, `statistics` (a file, and `name` in it), and
  `Libero`'s arguments. Validation sees the images as they are.
  """
  kwargs = config.data.libero.to_dict()
  records = Records(kwargs.pop("folder"), split)
  known = normal.load(kwargs.pop("statistics"), kwargs.pop("name", ""))
  if split != "train":
    kwargs["augment"] = False
  return Libero(records, known, length=config.data.length, **kwargs)


if __name__ == "__main__":
  print(json.dumps({"libero": statistics(Records(sys.argv[1], "train"))}))
