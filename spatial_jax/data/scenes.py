# SPDX-License-Identifier: Apache-2.0
"""Conversations about scanned scenes and about images, for LLaVA-3D.

A file is a JSON list, or a line for each row:
  {"video": "scannet/scene0000_00" or ["scannet/.../00000.jpg", ...],
   "conversations": [{"from": "human", "value": "<video>\\nWhat is <boxes>?"},
                     {"from": "gpt", "value": "A chair."}],
   "target": {"boxes": [[cx, cy, cz, dx, dy, dz], ...]},
   "boxes_seq": [[0], [1, 2], ...]}
"image" stands for "video" in rows about a picture; rows without either are
plain text. `boxes_seq` says which boxes each `<boxes>` means; in rows without a
target, the numbers of a question may be its point: "What is at [1, 2, 0.5]?".
Scenes are described by an EmbodiedScan-style file (see `rgbd.from_info`).

All rows have the same shapes: `frames` views and `slots` image tokens. A
picture is frame 0; sets of pictures alone are better read with frames=1.

numpy and Pillow only: data workers call this. Row i depends on its entry alone,
so that the point that stands for a box is the same in each epoch.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spatial_jax.data import images as image_lib
from spatial_jax.data import llava_3d, rgbd, sources, text

Row = dict[str, np.ndarray]


class Scenes:
  """Random-access source of rows (see `make` for the arguments)."""

  def __init__(
    self,
    file: str,
    *,
    info: str = "",
    root: str = "",
    images: str = "",
    tokenizer: str = "",
    length: int,
    frames: int,
    side: int,
    clicks: int,
    slots: int,
    image_token: int = -200,
    point_token: int = -300,
    start: str = "<s>",
    stop: str = "</s>",
    seed: int = 0,
  ):
    self.tokenizer = text.Tokenizer.load(tokenizer or None)
    self._file = pathlib.Path(file)
    self._rows = read_rows(self._file)
    self._info = _read_json(info) if info else {}
    self._root = pathlib.Path(root or info or file)
    if not root:
      self._root = self._root.parent
    self._images = pathlib.Path(images) if images else self._root
    self._length, self._clicks, self._seed = length, clicks, seed
    self._frames, self._side = frames, side
    self._encode = {
      "slots": slots,
      "image_token": image_token,
      "point_token": point_token,
      "start": start,
      "stop": stop,
    }

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Row:
    index = int(index)
    entry = self._rows[index]
    try:
      rng = np.random.default_rng([self._seed, index])
      return self._text(entry, rng) | self._views(entry)
    except (ValueError, OSError, KeyError) as error:
      raise ValueError(f"{self._file}, row {index}: {error}") from error

  def _text(self, entry: Mapping[str, Any], rng) -> Row:
    boxes = entry.get("target", {}).get("boxes", [])
    turns, order = dialogue(entry, len(boxes))
    points = [llava_3d.click(boxes[i], rng) for i in order]
    if "target" not in entry:
      asked = [llava_3d.read_click(question) for question, _ in turns]
      points = [point for _, found in asked for point in found]
      turns = [
        (question, answer)
        for (question, _), (_, answer) in zip(asked, turns, strict=True)
      ]
    if len(points) > self._clicks:
      raise ValueError(
        f"{len(points)} boxes in the text, but config.data.scene.clicks is "
        f"{self._clicks}"
      )
    ids, said = llava_3d.encode(self.tokenizer, turns, **self._encode)
    # Cut as the published training does; rows of data have few such.
    ids, said = ids[: self._length], said[: self._length]
    labels, weight = text.next_token(ids, said)
    T, n = self._length, len(ids)
    clicks = np.zeros((self._clicks, 3), np.float32)
    clicks[: len(points)] = np.reshape(points, (-1, 3))
    places = text.pad(np.arange(n, dtype=np.int32), T)
    return {
      "tokens": text.pad(ids, T, self.tokenizer.pad_id),
      "positions": np.broadcast_to(places, (3, T)),
      "segments": text.pad(np.ones(n, np.int32), T),
      "labels": np.maximum(text.pad(labels, T), 0),
      "loss_weight": text.pad(weight, T),
      "clicks": clicks,
    }

  def _views(self, entry: Mapping[str, Any]) -> Row:
    F, side = self._frames, self._side
    row = {
      "images": np.zeros((F, side, side, 3), np.float32),
      "depth": np.zeros((F, side, side), np.float32),
      "intrinsics": np.broadcast_to(np.eye(3, dtype=np.float32), (F, 3, 3)),
      "world_from_camera": np.broadcast_to(
        np.eye(4, dtype=np.float32), (F, 4, 4)
      ),
      "is_scene": np.bool_("video" in entry),
    }
    if "video" in entry:
      frames, options = self._scene(entry["video"])
      return row | rgbd.load(frames, side=side, **options)
    if "image" in entry:
      image = sources.read_image(self._images / entry["image"])
      row["images"][0] = picture(image, side)
    return row

  def _scene(self, video: str | Sequence[str]):
    """The frames that a row names, and how their scene was taken."""
    name = video if isinstance(video, str) else _folder(video[0], self._info)
    if name not in self._info:
      raise ValueError(
        f"scene {name!r} is not in the file of config.data.scenes.info, which "
        f"has {len(self._info)} scenes"
      )
    info = self._info[name]
    known = [part for part in name.split("/") if part in rgbd.DEPTH_SCALES]
    frames, options = rgbd.from_info(
      info, self._root, known[0] if known else "scannet"
    )
    if not isinstance(video, str):
      by_name = {frame.image: frame for frame in frames}
      return [by_name[self._root / one] for one in video], options
    chosen = rgbd.sample(len(frames), self._frames)
    return [frames[i] for i in chosen], options


def make(config: Any, split: str) -> Scenes:
  """Source of config.data: `files` by split, `scene` and `scenes`."""
  data = config.data
  return Scenes(
    sources.file_of(data, split),
    length=data.length,
    **data.scene.to_dict(),
    **data.scenes.to_dict(),
  )


def dialogue(
  entry: Mapping[str, Any], boxes: int
) -> tuple[list[tuple[str, str | None]], list[int]]:
  """Questions and answers, and the box that each `<boxes>` of them means."""
  turns = entry["conversations"]
  roles = [turn["from"] for turn in turns]
  if roles != ["human", "gpt"] * (len(roles) // 2) or not roles:
    raise ValueError(f"turns are from {roles}; expected human, gpt in turn")
  texts = [turn["value"] for turn in turns]
  places = sum(value.count(llava_3d.POINT) for value in texts)
  groups = entry.get("boxes_seq")
  if groups is None:
    # One each, or all of them where the text has one place.
    groups = [[i] for i in range(boxes)]
    groups = [list(range(boxes))] if places == 1 and boxes else groups
    groups = [] if places == 0 else groups
  rest = list(groups)
  for i, value in enumerate(texts):
    count = value.count(llava_3d.POINT)
    here, rest = rest[:count], rest[count:]
    texts[i] = llava_3d.expand(value, [len(group) for group in here])
  if rest:
    raise ValueError(
      f"boxes for {len(groups)} {llava_3d.POINT}, but the text has {places}"
    )
  questions = [llava_3d.to_front(value) for value in texts[::2]]
  order = [i for group in groups for i in group]
  return list(zip(questions, texts[1::2], strict=True)), order


def picture(image: Any, side: int) -> np.ndarray:
  """A 2D image as LLaVA-1.5 prepares it: padded to a square, not cropped."""
  color = [int(255 * value) for value in image_lib.CLIP_MEAN]
  square = image_lib.pad_to_square(image_lib.to_rgb(image), color)
  return image_lib.clip(square, side)


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """Rows of a JSON list or of a file with one on each line."""
  try:
    content = path.read_text(encoding="utf-8")
  except OSError as error:
    raise FileNotFoundError(
      f"config.data.files: {path} cannot be read ({error.strerror})"
    ) from error
  try:
    if content.lstrip().startswith("["):
      rows = json.loads(content)
    else:
      rows = [json.loads(x) for x in content.splitlines() if x.strip()]
  except ValueError as error:
    raise ValueError(f"{path} is no valid JSON ({error})") from error
  if not rows:
    raise ValueError(f"config.data.files: {path} is empty")
  return rows


def _read_json(path: str) -> dict[str, Any]:
  try:
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(
      f"config.data.scenes.info={path!r} cannot be read ({error})"
    ) from error


def _folder(frame: str, known: Mapping[str, Any]) -> str:
  """The scene whose file lists a frame."""
  for name, info in known.items():
    if frame in info:
      return name
  raise ValueError(f"no scene has the frame {frame!r}")
