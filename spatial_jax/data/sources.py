# SPDX-License-Identifier: Apache-2.0
"""Conversations about images from JSONL files, LLaVA style.

A line is
  {"image": "a.png" or ["a.png", "b.png"],
   "conversations": [{"from": "human", "value": "<image>\\nWhat is left?"},
                     {"from": "gpt", "value": "The chair."}]}
or has "messages" with "role" and "content" instead of "conversations". Each
`<image>` stands for the next image; lines without images are fine. Images may
have any size: the batch carries the index arrays of `vision.layout`.

numpy and Pillow only: data workers call this. Example i depends on line i.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spatial_jax.data import positions, text, vision

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}
# Modes whose conversion to RGB keeps what is seen. Depth maps ("I;16", "F")
# would come out clipped.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


class Conversations:
  """Random-access source of rows (see `make` for the arguments)."""

  def __init__(
    self,
    file: str,
    *,
    images: str = "",
    tokenizer: str = "",
    length: int,
    layout: Mapping[str, int],
    vision: Mapping[str, int],
    image_token: str = "<|image_pad|>",
    wrap: Sequence[str] = ("<|vision_start|>", "<|vision_end|>"),
    block_end: str = "max",
  ):
    self._file = pathlib.Path(file)
    self._images = pathlib.Path(images) if images else self._file.parent
    self.tokenizer = text.Tokenizer.load(tokenizer or None)
    self._length, self._layout = length, dict(layout)
    self._image_token, self._wrap = image_token, tuple(wrap)
    self._image_id = self.tokenizer.token_id(image_token)
    self._block_end = block_end
    self._side = vision["side"]
    self._patching = {k: v for k, v in vision.items() if k != "side"}
    self._starts = line_starts(self._file)

  def __len__(self) -> int:
    return len(self._starts)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    number, start = self._starts[index]
    with self._file.open("rb") as handle:
      handle.seek(start)
      line = handle.readline()
    try:
      return self._row(line)
    except (ValueError, OSError) as error:
      raise ValueError(f"{self._file}, line {number}: {error}") from error

  def _row(self, line: bytes) -> dict[str, np.ndarray]:
    names, messages = parse(line)
    media = [self._preprocess(name) for name in names]
    grids = [grid for _, grid, _ in media]
    merge = self._patching["merge"]
    counts = [t * h * w // merge**2 for t, h, w in grids]
    messages = self._place(messages, counts)
    ids, said = self.tokenizer.chat_ids(messages)
    text.bucket(len(ids), [self._length], "the conversation")
    labels, weight = text.next_token(ids, said)
    if not weight.any():
      raise ValueError("the assistant says nothing, so there is no answer")
    place, _ = positions.mrope(
      ids,
      grids,
      image_token=self._image_id,
      video_token=-1,
      merge=merge,
      block_end=self._block_end,
    )
    row = {
      "tokens": text.pad(ids, self._length, self.tokenizer.pad_id),
      "positions": text.pad(place, self._length),
      "segments": text.pad(np.ones(len(ids), np.int32), self._length),
      "shared": np.zeros(self._length, bool),
      "labels": text.pad(labels, self._length),
      "loss_weight": text.pad(weight, self._length),
    }
    return row | self._patches([patches for patches, _, _ in media], grids)

  def _preprocess(self, name: str):
    path = self._images / name
    try:
      return vision.preprocess([read_image(path)], **self._patching)
    except ValueError as error:
      raise ValueError(f"image {path}: {error}") from error

  def _place(self, messages, counts):
    """Messages whose placeholders are as many tokens as the image has."""
    before, after = self._wrap
    out, used = [], 0
    for message in messages:
      content = message["content"]
      here = content.count(PLACEHOLDER)
      content = content.replace(
        PLACEHOLDER, f"{before}{self._image_token}{after}"
      )
      numbers = counts[used : used + here]
      used += here
      if used > len(counts):
        break
      content = text.expand(content, self._image_token, numbers)
      out.append({**message, "content": content})
    if used != len(counts):
      raise ValueError(
        f"{len(counts)} image(s) but {used} or more {PLACEHOLDER} in the text; "
        "write one for each"
      )
    return out

  def _patches(self, patches, grids) -> dict[str, np.ndarray]:
    p = self._patching
    width = 3 * p["temporal_patch"] * p["patch"] ** 2
    padded = np.zeros((self._layout["patches"], width), np.float32)
    arrays = vision.layout(
      [grids], self._layout, merge=p["merge"], side=self._side
    )
    if patches:
      joined = np.concatenate(patches)
      padded[: len(joined)] = joined
    return {
      "patches": padded,
      **{f"layout/{name}": x[0] for name, x in arrays.items()},
    }


def file_of(data: Any, split: str) -> str:
  """The file of a split in config.data; a ValueError names those there are."""
  if split not in data.files:
    raise ValueError(
      f"config.data.files has no {split!r}; it has {sorted(data.files)}"
    )
  return data.files[split]


def make(config: Any, split: str) -> Conversations:
  """Source of config.data: `files` by split, the rest are the arguments."""
  data = config.data
  return Conversations(
    file_of(data, split),
    length=data.length,
    layout=data.layout.to_dict(),
    vision=data.vision.to_dict(),
    **data.conversations.to_dict(),
  )


def parse(line: bytes) -> tuple[list[str], list[dict[str, str]]]:
  """Image names and messages (role, content) of a line."""
  try:
    row = json.loads(line)
  except ValueError as error:
    raise ValueError(f"no valid JSON ({error})") from error
  if not isinstance(row, dict):
    raise ValueError(f"expected an object, got {type(row).__name__}")
  names = row.get("image", row.get("images", []))
  names = [names] if isinstance(names, str) else list(names or [])
  turns = row.get("conversations", row.get("messages"))
  if not turns:
    raise ValueError(
      f"expected 'conversations' or 'messages', got {sorted(row)}"
    )
  messages = []
  for turn in turns:
    role = turn.get("from", turn.get("role"))
    content = turn.get("value", turn.get("content"))
    role = ROLES.get(role, role)
    if role not in ("system", "user", "assistant") or not isinstance(
      content, str
    ):
      raise ValueError(
        "a turn needs from: human|gpt (or role: system|user|assistant) and a "
        f"text, got {turn}"
      )
    messages.append({"role": role, "content": content})
  return names, messages


def read_image(path: pathlib.Path):
  """A decoded Pillow image; one clear error for whatever is wrong with it."""
  from PIL import Image

  try:
    image = Image.open(path)
    image.load()
  except FileNotFoundError:
    raise ValueError("the file does not exist") from None
  except (OSError, SyntaxError, ValueError) as error:
    raise ValueError(
      f"cannot be decoded, it is truncated or no image ({error})"
    ) from error
  if 0 in image.size:
    raise ValueError(f"has the size {image.size}; expected at least 1 x 1")
  if image.mode not in MODES:
    raise ValueError(
      f"has the mode {image.mode!r}; expected one of {', '.join(MODES)}. A "
      "depth map is no picture"
    )
  return image


def line_starts(path: pathlib.Path) -> list[tuple[int, int]]:
  """(line number, byte offset) of each line that isn't blank."""
  try:
    with path.open("rb") as handle:
      starts, at = [], 0
      for number, line in enumerate(handle, 1):
        if line.strip():
          starts.append((number, at))
        at += len(line)
  except OSError as error:
    raise FileNotFoundError(
      f"config.data.files: {path} cannot be read ({error.strerror})"
    ) from error
  if not starts:
    raise ValueError(f"config.data.files: {path} is empty")
  return starts
