# SPDX-License-Identifier: Apache-2.0
"""Conversations about videos as Molmo2 reads them, several videos in a row.

The file is that of `data.videos`. Each conversation is a segment of its row:

<|im_start|>user
0.0 FRAME 0.5 FRAME ... QUESTION<|im_end|>
<|im_start|>assistant
ANSWER<|im_end|>

where a number is the frame's second, and FRAME a start token, a token for each
group of patches, and an end token; these see each other in both directions.
Rows come before any pruning, with what `data.stts.kept_mask` says of it.

Videos should be of one length: each has as many frames as `media` says, and one
that has fewer repeats its last frame. numpy and Pillow only, but for what reads
videos: data workers call this.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from spatial_jax.data import (
  molmo2,
  scenes,
  sources,
  spatial_mllm,
  stts,
  text,
  videos,
)

Row = dict[str, np.ndarray]


class Videos:
  """Random-access source of rows (see `make`).

  Args:
    file: of conversations, each with one video.
    length: tokens of a row, before pruning.
    kept: and after it.
    drop: share of its tokens that a video loses.
    frames: of a row.
    frames_per_video: so that a row has `frames // frames_per_video` videos.
    side: pixels of a square frame.
    groups: tokens of a frame.
    root: where the videos are; by default beside the file.
    tokenizer: folder; the world's own by default.
    seconds: from one frame to the next, for what the text says of each.
    image_token: of a group of patches.
    frame_tokens: before and after those of a frame.
  """

  def __init__(
    self,
    file: str,
    *,
    length: int,
    kept: int,
    drop: float,
    frames: int,
    frames_per_video: int,
    side: int,
    groups: int,
    root: str = "",
    tokenizer: str = "",
    seconds: float = 0.5,
    image_token: int = 151938,
    frame_tokens: Sequence[int] = (151943, 151944),
  ):
    if frames % frames_per_video:
      raise ValueError(
        f"config.data.frames={frames} is no multiple of "
        f"config.data.videos.frames_per_video={frames_per_video}"
      )
    self.tokenizer = text.Tokenizer.load(tokenizer or None)
    self._file = pathlib.Path(file)
    self._root = pathlib.Path(root) if root else self._file.parent
    self._length, self._kept, self._drop = length, kept, drop
    self._count = frames // frames_per_video
    self._frames, self._side, self._groups = frames_per_video, side, groups
    self._visual = (image_token, *frame_tokens)
    self._rows = scenes.read_rows(self._file)
    self._head = self._opening(seconds)

  def __len__(self) -> int:
    return -(-len(self._rows) // self._count)

  def __getitem__(self, index: int) -> Row:
    first = int(index) * self._count
    # The last row goes on with the first conversations.
    members = [(first + i) % len(self._rows) for i in range(self._count)]
    parts = []
    for number in members:
      try:
        parts.append(self._part(self._rows[number]))
      except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{self._file}, row {number}: {error}") from error
    return self._row(parts)

  def _opening(self, seconds: float) -> list[int]:
    """Ids of all frames and the seconds they are from."""
    image, start, end = self._visual
    ids = self.tokenizer.encode("<|im_start|>user\n")
    for i in range(self._frames):
      ids += self.tokenizer.encode(f"{' ' * bool(i)}{i * seconds:.1f} ")
      ids += [start, *[image] * self._groups, end]
    return ids

  def _part(self, entry):
    """Ids, what the assistant says of them, and frames of a conversation."""
    names, (head, turns) = videos.names_of(entry), videos.turns(entry)
    if head != "<video>" or not names:
      raise ValueError(f"it begins {head!r}; expected one <video>")
    turns[0] = turns[0][0].lstrip("\n"), turns[0][1]
    ids, said = spatial_mllm.dialogue(self.tokenizer, turns)
    made = videos.read(self._root, names, self._frames)
    made += [made[-1]] * (self._frames - len(made))
    pixels = [molmo2.stretch(x[None], self._side)[0] for x in made]
    ids = np.concatenate([self._head, ids])
    said = np.concatenate([np.zeros(len(self._head), bool), said])
    return ids, said, np.stack(pixels)

  def _row(self, parts) -> Row:
    T = self._length
    row = {
      "tokens": np.full(T, self.tokenizer.pad_id, np.int32),
      "positions": np.zeros((3, T), np.int32),
      "segments": np.zeros(T, np.int32),
      "labels": np.zeros(T, np.int32),
      "loss_weight": np.zeros(T, np.float32),
    }
    at = 0
    # Longer answers are cut, each to an equal share of the row.
    share = T // len(parts)
    if share <= len(self._head):
      raise ValueError(
        f"config.data.length={T} has {share} tokens for each of {len(parts)} "
        f"videos, whose frames alone take {len(self._head)}"
      )
    for number, (ids, said, _) in enumerate(parts):
      ids, said = ids[:share], said[:share]
      here = slice(at, at + len(ids))
      row["tokens"][here], row["segments"][here] = ids, 1 + number
      row["positions"][:, here] = np.arange(len(ids))
      row["labels"][here], row["loss_weight"][here] = text.next_token(ids, said)
      at = here.stop
    seen = np.isin(row["tokens"], self._visual) & (row["segments"] > 0)
    row["mutual"] = seen.astype(np.int32)
    row["images"] = np.concatenate([pixels for *_, pixels in parts])
    row["videos"] = np.repeat(
      np.arange(1, 1 + len(parts), dtype=np.int32), self._frames
    )
    row["kept_mask"] = stts.kept_mask(
      row["segments"],
      row["videos"],
      groups=self._groups,
      drop=self._drop,
      length=self._kept,
    )
    return row


def make(config: Any, split: str) -> Videos:
  """Source of config.data: `files` by split, and `videos`."""
  data = config.data
  return Videos(
    sources.file_of(data, split),
    length=data.length,
    kept=data.kept,
    frames=data.frames,
    drop=config.model.vision.drop,
    **data.videos.to_dict(),
  )
