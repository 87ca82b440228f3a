# SPDX-License-Identifier: Apache-2.0
"""Stores rendered rooms with their questions, and reads them back.

A split is an index, `SPLIT.json`, beside ArrayRecord files that
`grain.sources.ArrayRecordDataSource` opens. A record is one room: a zip archive
that any tool can unpack, of

  room.json       name, poses, intrinsics, objects, outline, questions
  rgb/000.png     one image per frame
  depth/000.png   16 bits, millimetres, z-depth; absent if not stored
  scene.npz       all arrays of the scene, to render it again

The index is written last: a split without one is not complete.
numpy and Pillow only.
"""

from __future__ import annotations

import io
import json
import pathlib
import zipfile
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from spatial_jax.world import scene as scene_lib

VERSION = 1
DEPTH_SCALE = 1000  # millimetres
DEEPEST = 65.535  # metres that fit into 16 bits


def encode(
  name: str,
  scene: dict[str, np.ndarray],
  rgb: np.ndarray,
  world_from_camera: np.ndarray,
  intrinsics: np.ndarray,
  *,
  depth: np.ndarray | None = None,
  questions: Iterable[dict] = (),
) -> bytes:
  """One record.

  Args:
    rgb: u8[F h w 3], or f32 in 0..1 as `render.render` gives it.
    depth: f32[F h w] in metres.
    questions: JSON-ready dicts, such as `questions.Question.asdict` gives.

  Raises:
    ValueError: an image of the wrong mode or of no size, or depth that isn't a
      number that 16 bits of millimetres can hold.
  """
  rgb = np.asarray(rgb)
  if rgb.dtype.kind == "f":
    rgb = np.round(np.clip(rgb, 0, 1) * 255).astype(np.uint8)
  if (
    rgb.dtype != np.uint8 or rgb.ndim != 4 or rgb.shape[-1] != 3 or not rgb.size
  ):
    raise ValueError(
      f"room {name!r}: rgb is {rgb.dtype}{list(rgb.shape)}; expected uint8 or "
      "float [frames, height, width, 3], none of them zero"
    )
  poses = np.asarray(world_from_camera, np.float32)
  if poses.shape != (len(rgb), 4, 4):
    raise ValueError(
      f"room {name!r}: world_from_camera is {list(poses.shape)}; expected "
      f"{[len(rgb), 4, 4]}, one pose per frame"
    )
  room = {
    "name": name,
    "world_from_camera": poses.tolist(),
    "intrinsics": np.asarray(intrinsics, np.float32).tolist(),
    "objects": list(_objects(scene)),
    "room_polygon": _outline(scene),
    "room_height": float(scene["room_height"]),
    "room_size": float(scene["room_size"]),
    "questions": list(questions),
  }
  arrays = io.BytesIO()
  np.savez(arrays, **{k: np.asarray(v) for k, v in scene.items()})
  members = {
    "room.json": json.dumps(room).encode(),
    "scene.npz": arrays.getvalue(),
  }
  members |= {f"rgb/{i:03}.png": _png(frame) for i, frame in enumerate(rgb)}
  if depth is not None:
    depth = _millimetres(name, np.asarray(depth), rgb.shape[:3])
    members |= {
      f"depth/{i:03}.png": _png(frame) for i, frame in enumerate(depth)
    }
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
    for key, value in members.items():
      # Without a date, so that the same room gives the same bytes.
      archive.writestr(zipfile.ZipInfo(key), value)
  return out.getvalue()


def decode(record: bytes) -> dict:
  """A record as arrays and plain values; the inverse of `encode`.

  Returns:
    The keys of `room.json`, and `rgb` u8[F h w 3], `depth` f32[F h w] in metres
    (if stored), `scene` (arrays).
  """
  try:
    with zipfile.ZipFile(io.BytesIO(record)) as archive:
      names = sorted(archive.namelist())
      room = json.loads(archive.read("room.json"))
      with np.load(io.BytesIO(archive.read("scene.npz"))) as arrays:
        scene = dict(arrays)
      images = {
        kind: [
          np.asarray(Image.open(io.BytesIO(archive.read(n))))
          for n in names
          if n.startswith(f"{kind}/")
        ]
        for kind in ("rgb", "depth")
      }
  except (zipfile.BadZipFile, KeyError, OSError, ValueError) as error:
    raise ValueError(
      f"not a record of a room ({error}): the file is damaged or of another "
      "kind; write the split again"
    ) from error
  for key in ("world_from_camera", "intrinsics", "room_polygon"):
    room[key] = np.array(room[key], np.float32)
  room["scene"] = scene
  room["rgb"] = np.stack(images["rgb"])
  if images["depth"]:
    deep = np.stack(images["depth"]).astype(np.float32)
    room["depth"] = deep / DEPTH_SCALE
  return room


def write(
  folder: str | pathlib.Path,
  split: str,
  records: Iterable[bytes],
  *,
  per_file: int = 1000,
) -> pathlib.Path:
  """Writes records of `encode` as one split; returns the index's path.

  An earlier split of this name is replaced once the new one is complete.
  """
  from array_record.python import array_record_module

  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  files, writer, part = [], None, None
  try:
    for number, record in enumerate(records):
      if number % per_file == 0:
        if writer:
          writer.close()
        part = folder / f"{split}-{len(files):05}.array_record.tmp"
        writer = array_record_module.ArrayRecordWriter(
          str(part), "group_size:1"
        )
        files.append({"name": part.name.removesuffix(".tmp"), "records": 0})
      writer.write(record)
      files[-1]["records"] += 1
  finally:
    if writer:
      writer.close()
  if not files:
    raise ValueError(f"split {split!r} of {folder}: there are no records")
  index = folder / f"{split}.json"
  index.unlink(missing_ok=True)
  for file in files:
    path = folder / file["name"]
    path.with_name(path.name + ".tmp").replace(path)
    file["bytes"] = path.stat().st_size
  content = {
    "version": VERSION,
    "split": split,
    "records": sum(file["records"] for file in files),
    "categories": list(scene_lib.CATEGORIES),
    "files": files,
  }
  part = index.with_name(index.name + ".tmp")
  part.write_text(json.dumps(content, indent=1))
  part.replace(index)
  current = {file["name"] for file in files}
  for path in folder.glob(f"{split}-*.array_record*"):
    if path.name not in current:  # of an earlier, longer or broken write
      path.unlink()
  return index


def paths(folder: str | pathlib.Path, split: str) -> list[str]:
  """ArrayRecord files of a split, checked against its index.

  Raises:
    FileNotFoundError: no such split, or a file is missing.
    ValueError: a file isn't as long as it was when written.
  """
  folder = pathlib.Path(folder)
  index = folder / f"{split}.json"
  if not index.exists():
    there = sorted(p.stem for p in folder.glob("*.json"))
    raise FileNotFoundError(
      f"{index}: no complete split {split!r}; there are {there or 'none'}"
    )
  content = json.loads(index.read_text())
  if content.get("version") != VERSION:
    raise ValueError(
      f"{index}: version {content.get('version')!r}, expected {VERSION}"
    )
  found = []
  for file in content["files"]:
    path = folder / file["name"]
    if not path.exists():
      raise FileNotFoundError(f"{path}: named in {index} and missing")
    if path.stat().st_size != file["bytes"]:
      raise ValueError(
        f"{path}: {path.stat().st_size} bytes, and {file['bytes']} when "
        "written: truncated or changed; write the split again"
      )
    found.append(str(path))
  return found


def records(folder: str | pathlib.Path, split: str) -> Iterator[bytes]:
  """Records of a split, as they were written, in order."""
  from array_record.python import array_record_module

  for path in paths(folder, split):
    reader = array_record_module.ArrayRecordReader(path)
    try:
      for number in range(reader.num_records()):
        yield reader.read([number])[0]
    finally:
      reader.close()


def read(folder: str | pathlib.Path, split: str) -> Iterator[dict]:
  """Decoded rooms in order. For random access give `paths` to grain:

  `grain.MapDataset.source(grain.sources.ArrayRecordDataSource(paths(...)))
  .map(decode)`.
  """
  yield from map(decode, records(folder, split))


def _objects(scene: dict[str, np.ndarray]) -> Iterator[dict]:
  for index in np.flatnonzero(scene["object_category"] >= 0):
    yield {
      "category": scene_lib.CATEGORIES[int(scene["object_category"][index])],
      "center": scene["object_center"][index].tolist(),
      "size": scene["object_size"][index].tolist(),
      "yaw": float(scene["object_yaw"][index]),
      "support": int(scene["object_support"][index]),
    }


def _outline(scene: dict[str, np.ndarray]) -> list:
  """Vertices without the padding."""
  polygon = scene["room_polygon"]
  real = np.any(polygon != np.roll(polygon, 1, 0), -1)
  return polygon[real].tolist()


def _millimetres(name: str, depth: np.ndarray, shape: tuple) -> np.ndarray:
  if depth.shape != shape:
    raise ValueError(
      f"room {name!r}: depth is {list(depth.shape)}, rgb {list(shape)}"
    )
  if not np.isfinite(depth).all() or depth.min() < 0 or depth.max() > DEEPEST:
    raise ValueError(
      f"room {name!r}: depth must be a number in 0..{DEEPEST} metres, got "
      f"{depth.min()}..{depth.max()}"
    )
  return np.round(depth * DEPTH_SCALE).astype(np.uint16)


def _png(image: np.ndarray) -> bytes:
  out = io.BytesIO()
  Image.fromarray(image).save(out, "PNG", compress_level=6)
  return out.getvalue()
