# SPDX-License-Identifier: Apache-2.0
"""Conversations about videos, several in a row where they share the video.

A file is a JSON list, or a line for each conversation:
  {"video": "scene.mp4", or a folder of frames, or a list of frames' files,
   "conversations": [{"from": "human", "value": "<video>\\nHow many chairs?"},
                     {"from": "gpt", "value": "4"}]}
"image" or "images" stand for "video" in sets of pictures.

All rows have frames of one size, as many as `media` says, or as many images. A
set should have videos of about one shape: what differs is stretched. A video
that has fewer frames repeats its last one.

numpy and Pillow only, but for what reads videos: data workers call this.
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spatial_jax.data import (
  geometry_cache,
  positions,
  scenes,
  sources,
  spatial_mllm,
  text,
  video,
  vision,
)
from spatial_jax.types import Array, UInt8

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Row = dict[str, np.ndarray]


class Videos:
  """Random-access source of rows (see `make`).

  Args:
    file: of conversations.
    length: tokens of a row.
    media: frames or images of a row, their height and width in pixels, and the
      patch, merge and temporal sizes of the vision tower.
    root: where the media are; by default beside the file.
    tokenizer: folder; the world's own by default.
    questions: conversations about one video that a row may hold.
    second_per_grid: seconds between two temporal patches, for positions. The
      published models were trained with 0.5 and are evaluated with 1.0.
    cache: folder of VGGT's tokens, see `geometry_cache`.
  """

  def __init__(
    self,
    file: str,
    *,
    length: int,
    media: Mapping[str, Any],
    root: str = "",
    tokenizer: str = "",
    questions: int = 1,
    second_per_grid: float = 0.5,
    cache: str = "",
  ):
    self.tokenizer = text.Tokenizer.load(tokenizer or None)
    self._file = pathlib.Path(file)
    self._root = pathlib.Path(root) if root else self._file.parent
    self._length, self._media, self._cache = length, dict(media), cache
    self._seconds = second_per_grid
    self._pads = {
      name: self.tokenizer.token_id(f"<|{name}_pad|>")
      for name in ("video", "image")
    }
    self._rows = scenes.read_rows(self._file)
    self._groups = self._group(questions)

  def __len__(self) -> int:
    return len(self._groups)

  def __getitem__(self, index: int) -> Row:
    members = self._groups[int(index)]
    try:
      return self._row([self._rows[i] for i in members])
    except (ValueError, OSError, KeyError) as error:
      raise ValueError(f"{self._file}, row {members[0]}: {error}") from error

  def _group(self, questions: int) -> list[list[int]]:
    """Numbers of the conversations of each row."""
    if questions == 1:
      return [[i] for i in range(len(self._rows))]
    together = collections.defaultdict(list)
    for i, entry in enumerate(self._rows):
      together[str(names_of(entry)), turns(entry)[0]].append(i)
    groups = []
    for members in together.values():
      room = self._length - len(self._opening(self._rows[members[0]])[0])
      lengths = [len(self._dialogue(self._rows[i])[0]) for i in members]
      for one in text.pack([min(n, room) for n in lengths], room):
        parts = [members[i] for i in one]
        groups += [
          parts[i : i + questions] for i in range(0, len(parts), questions)
        ]
    return groups

  def _opening(self, entry) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Ids that all questions share, and the grids of the media in them."""
    m = self._media
    h, w = m["height"] // m["patch"], m["width"] // m["patch"]
    names = names_of(entry)
    grids = []
    if names and m.get("images"):
      grids = [(1, h, w)] * m["images"]
    elif names:
      grids = [(m["frames"] // m["temporal"], h, w)]
    counts = [t * h * w // m["merge"] ** 2 for t, h, w in grids]
    head = spatial_mllm.opening(turns(entry)[0], counts)
    return self.tokenizer.encode(head), grids

  def _dialogue(self, entry):
    return spatial_mllm.dialogue(self.tokenizer, turns(entry)[1])

  def _row(self, entries: Sequence[Mapping[str, Any]]) -> Row:
    ids, grids = self._opening(entries[0])
    place, _ = positions.mrope(
      np.array(ids),
      grids,
      image_token=self._pads["image"],
      video_token=self._pads["video"],
      merge=self._media["merge"],
      second_per_grid=self._seconds,
    )
    T, at = self._length, len(ids)
    text.bucket(at + 1, [T], "what precedes the question")
    row = {
      "tokens": np.full(T, self.tokenizer.pad_id, np.int32),
      "positions": np.zeros((3, T), np.int32),
      "segments": np.zeros(T, np.int32),
      "shared": np.arange(T) < at,
      "labels": np.zeros(T, np.int32),
      "loss_weight": np.zeros(T, np.float32),
    }
    row["tokens"][:at], row["positions"][:, :at] = ids, place
    row["segments"][:at] = 1
    origin = int(place.max()) + 1
    for number, entry in enumerate(entries):
      # Longer ones are cut, as the published training does.
      said = [x[: T - at] for x in self._dialogue(entry)]
      here = slice(at, at + len(said[0]))
      row["tokens"][here] = said[0]
      row["positions"][:, here] = origin + np.arange(len(said[0]))
      row["segments"][here] = 2 + number
      row["labels"][here], row["loss_weight"][here] = text.next_token(*said)
      at = here.stop
    return row | self._pixels(names_of(entries[0]))

  def _pixels(self, names: str | Sequence[str]) -> Row:
    m = self._media
    kind = "images" if m.get("images") else "frames"
    pixels = np.zeros((m[kind], m["height"], m["width"], 3), np.uint8)
    if names:
      made = read(self._root, names, m[kind])
      if kind == "images" and len(made) != m[kind]:
        raise ValueError(
          f"{len(made)} image(s), but config.data.media.images is {m[kind]}"
        )
      for i in range(m[kind]):
        image = made[min(i, len(made) - 1)]
        pixels[i] = vision.resize(vision.to_rgb(image), m["height"], m["width"])
    row = {kind: pixels}
    if self._cache and not names:
      raise ValueError("a row without a video can't be in a set with a cache")
    if self._cache:
      row["geometry"] = geometry_cache.read(self._cache, pixels)
    return row


def make(config: Any, split: str) -> Videos:
  """Source of config.data: `files` by split, `media`, and `videos`."""
  data = config.data
  return Videos(
    sources.file_of(data, split),
    length=data.length,
    media=data.media.to_dict(),
    **data.videos.to_dict(),
  )


def names_of(entry: Mapping[str, Any]) -> str | list[str]:
  """A video or folder, or the files of frames or images; empty for text."""
  names = entry.get("video", entry.get("images", entry.get("image", "")))
  is_picture = isinstance(names, str) and names.lower().endswith(PICTURES)
  return [names] if is_picture else names


def indices(count: int, frames: int) -> list[int]:
  """Evenly spread frames, cut to integers and each one once."""
  chosen = np.linspace(0, count - 1, min(frames, count), dtype=int)
  return np.unique(chosen).tolist()


def read(
  root: pathlib.Path, names: str | Sequence[str], frames: int
) -> list[UInt8[Array, "height width 3"]]:
  """Evenly spread frames of a video or folder, or the files named."""
  if isinstance(names, str) and not (root / names).is_dir():
    return [
      image for _, image in video.read(str(root / names), frames, indices)
    ]
  if isinstance(names, str):
    files = sorted(
      path
      for path in (root / names).iterdir()
      if path.suffix.lower() in PICTURES
    )
    if not files:
      raise ValueError(f"the folder {names} has no frame")
    files = [files[i] for i in indices(len(files), frames)]
  else:
    files = [root / name for name in names]
    if len(files) > frames:
      raise ValueError(
        f"{len(files)} files are named, but a row has room for {frames}"
      )
  return [vision.to_rgb(sources.read_image(path)) for path in files]


def turns(entry: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
  """What precedes the first question, then questions and answers."""
  said = entry["conversations"]
  roles = [turn["from"] for turn in said]
  if roles != ["human", "gpt"] * (len(roles) // 2) or not roles:
    raise ValueError(f"turns are from {roles}; expected human, gpt in turn")
  values = [turn["value"] for turn in said]
  head, values[0] = spatial_mllm.split(values[0])
  return head, list(zip(values[::2], values[1::2], strict=True))
