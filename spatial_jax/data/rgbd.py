# SPDX-License-Identifier: Apache-2.0
"""Posed RGB-D frames: folders of them, and what LLaVA-3D makes of them.

A frame is an image, a depth map, the camera's intrinsics and its pose.
`prepare` resizes and crops all four to squares that agree, as the reference's
processor does: bicubic images, nearest depth. NumPy and Pillow only.

`read` knows folders of these kinds:

  color/NAME.*, depth/NAME.png, pose.txt ("tx ty tz qx qy qz qw" a line), or
    pose/NAME.txt (4 x 4), intrinsic/intrinsic_depth.txt (ScanNet, exported)
  NAME.color.*, NAME.depth.png, NAME.pose.txt, camera-intrinsics.txt (7-Scenes)

Intrinsics here count whole pixels, as those files do, until `to_centres`.

Letters: F frames.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spatial_jax.data import images as image_lib
from spatial_jax.types import Array, Float

NO_DEPTH = 65535  # of 16 bits: what 7-Scenes writes where nothing was measured


class Frame(NamedTuple):
  """Where a frame is and how it was taken."""

  image: pathlib.Path
  depth: pathlib.Path
  world_from_camera: np.ndarray  # f64[4 4]
  intrinsics: np.ndarray  # f64[3 3], of the depth map


def sample(count: int, wanted: int) -> list[int]:
  """Frames of a video of `count` that LLaVA-3D takes.

  Every (count // wanted)-th from the first on, so that the end of a long video
  is never seen; all of them again and again when there are too few.
  """
  if count < 1:
    raise ValueError("a scene needs at least one frame, got none")
  if count <= wanted:
    return [i % count for i in range(wanted)]
  return [i * (count // wanted) for i in range(wanted)]


def _fit(size: tuple[int, int], side: int) -> tuple[int, int]:
  """(height, width) once the shorter side is `side`, cut to int."""
  height, width = size
  if height <= width:
    return side, int(width * side / height)
  return int(height * side / width), side


def fit_depth(
  raw: Any, side: int, scale: float
) -> Float[np.ndarray, "side side"]:
  """Metres of the middle square of a depth map of whole numbers.

  Args:
    raw: [height width], within 16 bits.
    scale: of it per metre.
  """
  from PIL import Image

  # Pillow rounds places in wider integers otherwise, and other pixels come out.
  image = Image.fromarray(np.asarray(raw).astype(np.uint16))
  height, width = _fit(np.shape(raw), side)
  image = image.resize((width, height), Image.NEAREST)
  left, top = round((width - side) / 2), round((height - side) / 2)
  image = image.crop((left, top, left + side, top + side))
  return np.asarray(image).astype(np.float32) / np.float32(scale)


def fit_intrinsics(
  intrinsics: Float[Array, "n m"], size: tuple[int, int], side: int
) -> Float[np.ndarray, "n m"]:
  """Intrinsics (3 x 3 or 4 x 4) of that square.

  Args:
    size: (height, width) that they were for.
  """
  out = np.array(intrinsics, np.float64)
  height, width = _fit(size, side)
  out[0] /= size[1] / width
  out[1] /= size[0] / height
  out[0, 2] -= (width - side) / 2
  out[1, 2] -= (height - side) / 2
  return out.astype(np.float32)


def prepare(
  images: Iterable[Any],
  depths: Iterable[Any],
  world_from_camera: Iterable[Any],
  intrinsics: Iterable[Any],
  *,
  side: int = 336,
  depth_scale: float = 1000.0,
  camera_size: tuple[int, int] | None = None,
  axis_align: Any = None,
) -> dict[str, np.ndarray]:
  """Frames as the model takes them, but for `to_centres`.

  Args:
    images: Pillow images or uint8 arrays.
    depths: arrays of whole numbers.
    world_from_camera: 4 x 4 of each frame; metres.
    intrinsics: 3 x 3 or 4 x 4 of each frame.
    camera_size: (height, width) that they are for; each depth map's by default.
    axis_align: 4 x 4, turns the scan's frame to one with z up.

  Returns:
    images f32[F side side 3] (normalised), depth f32[F side side] (metres),
    world_from_camera f32[F 4 4], intrinsics f32[F 3 3] or [F 4 4].
  """
  align = np.eye(4) if axis_align is None else np.asarray(axis_align)
  with np.errstate(invalid="ignore"):  # lost cameras have infinite poses
    poses = [align @ np.asarray(pose, np.float64) for pose in world_from_camera]
  cameras = [
    fit_intrinsics(k, camera_size or np.shape(d)[:2], side)
    for k, d in zip(intrinsics, depths, strict=True)
  ]
  return {
    "images": np.stack([image_lib.clip(image, side) for image in images]),
    "depth": np.stack([fit_depth(d, side, depth_scale) for d in depths]),
    "world_from_camera": np.stack(poses).astype(np.float32),
    "intrinsics": np.stack(cameras),
  }


def to_centres(
  intrinsics: Float[np.ndarray, "*b n m"],
) -> Float[np.ndarray, "*b 3 3"]:
  """Intrinsics with pixel centres at +0.5, from such with whole ones."""
  out = np.array(intrinsics[..., :3, :3], np.float32)
  out[..., :2, 2] += 0.5
  return out


def open_depth(path: pathlib.Path) -> np.ndarray:
  """A depth map of whole numbers i32[height width]; 0 is no measurement."""
  from PIL import Image

  try:
    with Image.open(path) as image:
      raw = np.asarray(image).astype(np.int32)
  except (OSError, SyntaxError) as error:
    raise ValueError(f"{path} is no readable depth map ({error})") from error
  if raw.ndim != 2:
    raise ValueError(
      f"{path} has the shape {raw.shape}; a depth map has one channel"
    )
  return np.where(raw == NO_DEPTH, 0, raw)


def load(
  frames: Sequence[Frame], *, camera: str = "depth", **options: Any
) -> dict[str, np.ndarray]:
  """Reads and prepares frames; intrinsics f32[F 3 3] with centres at +0.5.

  Args:
    camera: whether the intrinsics are those of the "depth" map or the "image".
    **options: of `prepare`.
  """
  from spatial_jax.data.sources import read_image

  images = [read_image(frame.image) for frame in frames]
  if camera == "image":
    options["camera_size"] = images[0].size[::-1]
  out = prepare(
    images,
    [open_depth(frame.depth) for frame in frames],
    [frame.world_from_camera for frame in frames],
    [frame.intrinsics for frame in frames],
    **options,
  )
  return out | {"intrinsics": to_centres(out["intrinsics"])}


def read(
  folder: str | pathlib.Path, intrinsics: Sequence[float] = ()
) -> list[Frame]:
  """Frames of a folder in order of their names.

  Args:
    intrinsics: (fx, fy, cx, cy) where the folder has no such file.

  Raises:
    ValueError: what is missing, or of no known form.
  """
  folder = pathlib.Path(folder)
  if (folder / "color").is_dir():
    images = {p.stem: p for p in (folder / "color").iterdir()}
    depths = {p.stem: p for p in (folder / "depth").glob("*.png")}
    poses = {p.stem: p for p in (folder / "pose").glob("*.txt")}
  else:
    images, depths, poses = (
      {p.name.split(".")[0]: p for p in folder.glob(f"*.{kind}.*")}
      for kind in ("color", "depth", "pose")
    )
  names = sorted(images.keys() & depths.keys(), key=_by_number)
  if not names:
    raise ValueError(
      f"{folder} holds no frames: expected color/NAME.png and depth/NAME.png, "
      "or NAME.color.jpg and NAME.depth.png"
    )
  if (folder / "pose.txt").exists():
    rows = _numbers(folder / "pose.txt", 7)
    turns = dict(zip(names, map(_from_quaternion, rows), strict=False))
  else:
    turns = {
      n: _numbers(p, 4).reshape(4, 4) for n, p in poses.items() if n in names
    }
  absent = [name for name in names if name not in turns]
  if absent:
    raise ValueError(f"{folder} has no pose for the frames {absent}")
  camera = _intrinsics(folder, intrinsics)
  return [Frame(images[n], depths[n], turns[n], camera) for n in names]


def _by_number(name: str):
  digits = "".join(c for c in name if c.isdigit())
  return int(digits or 0), name


def _numbers(path: pathlib.Path, columns: int) -> np.ndarray:
  rows = np.atleast_2d(np.loadtxt(path))
  if rows.shape[1] != columns:
    raise ValueError(
      f"{path} has {rows.shape[1]} numbers a line, expected {columns}"
    )
  return rows


def _intrinsics(folder: pathlib.Path, given: Sequence[float]) -> np.ndarray:
  if given:
    if len(given) != 4:
      raise ValueError(f"intrinsics are (fx, fy, cx, cy), got {tuple(given)}")
    fx, fy, cx, cy = given
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], np.float64)
  for name in ("intrinsic/intrinsic_depth.txt", "camera-intrinsics.txt"):
    if (folder / name).exists():
      return np.loadtxt(folder / name)[:3, :3]
  raise ValueError(
    f"{folder} has no intrinsics; give them, for instance "
    '--config.data.rgbd.intrinsics="(518.0, 519.0, 325.5, 253.5)" (fx, fy, cx, '
    "cy of the depth map)"
  )


def _from_quaternion(row: Array) -> np.ndarray:
  """4 x 4 of tx ty tz qx qy qz qw."""
  x, y, z, w = row[3:] / np.linalg.norm(row[3:])
  out = np.eye(4)
  out[:3, :3] = [
    [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
    [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
    [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
  ]
  out[:3, 3] = row[:3]
  return out


def from_info(
  info: Mapping[str, Any], root: pathlib.Path, dataset: str
) -> tuple[list[Frame], dict[str, Any]]:
  """Frames of a scene of an EmbodiedScan-style file, and options of `load`.

  Args:
    info: axis_align_matrix, intrinsic, depth_intrinsic, and for each frame the
      image's path -> {pose, depth, intrinsic (where each has its own)}.
    root: what paths are relative to.
    dataset: scannet, 3rscan or matterport3d: ScanNet's intrinsics are those of
      the depth maps, the others' those of the images.
  """
  if dataset not in DEPTH_SCALES:
    raise ValueError(
      f"data set {dataset!r} is unknown; known are {', '.join(DEPTH_SCALES)}"
    )
  is_depth = dataset == "scannet"
  shared = info.get("depth_intrinsic" if is_depth else "intrinsic")
  frames = []
  for name, entry in info.items():
    if not isinstance(entry, Mapping) or "pose" not in entry:
      continue
    camera = np.asarray(entry.get("intrinsic", shared), np.float64)
    pose = np.asarray(entry["pose"], np.float64)
    frames.append(
      Frame(root / name, root / entry["depth"], pose, camera[:3, :3])
    )
  options = {
    "camera": "depth" if is_depth else "image",
    "depth_scale": DEPTH_SCALES[dataset],
    "axis_align": info.get("axis_align_matrix"),
  }
  return frames, options


DEPTH_SCALES = {"scannet": 1000.0, "3rscan": 1000.0, "matterport3d": 4000.0}
