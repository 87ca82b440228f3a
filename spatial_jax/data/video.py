# SPDX-License-Identifier: Apache-2.0
"""Frames of a video, by whichever library is there: PyAV, OpenCV or imageio.

None of the three is needed unless a video is read; an animated GIF takes Pillow
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Pick = Callable[[int], Sequence[int]]
SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".gif")


def spread(count: int, frames: int) -> list[int]:
  """`frames` indices spread evenly over `count`, or all of them if 0."""
  if not frames or frames >= count:
    return list(range(count))
  return np.linspace(0, count - 1, frames).round().astype(int).tolist()


def read(
  path: str,
  frames: int,
  pick: Callable[[int, int], Sequence[int]] = spread,
) -> list[tuple[int, np.ndarray]]:
  """Number and pixels u8[height width 3] of evenly spread frames.

  Decodes the video twice, to count its frames and to take those wanted: the
  count in a file's header is often wrong, and so never are all in memory.

  Args:
    pick: indices of (frames that there are, frames wanted), ascending.

  Raises:
    ValueError: nothing is installed that reads videos, or this isn't one.
  """
  readers = (_with_av, _with_opencv, _with_imageio)
  if path.lower().endswith(".gif"):
    readers = (_with_pillow,)
  for reader in readers:
    try:
      images = reader(path, lambda count: pick(count, frames))
    except ImportError:
      continue
    break
  else:
    raise ValueError(
      f"reading the video {path} needs PyAV, OpenCV or imageio: pip install "
      "av (or take the frames out with another program and give their folder)"
    )
  if not images:
    raise ValueError(f"{path} is no readable video: it has no frame")
  return images


def _with_av(path: str, pick: Pick) -> list[tuple[int, np.ndarray]]:
  import av

  try:
    with av.open(path) as video:
      count = sum(1 for _ in video.decode(video=0))
    wanted = set(pick(count))
    with av.open(path) as video:
      return [
        (i, frame.to_ndarray(format="rgb24"))
        for i, frame in enumerate(video.decode(video=0))
        if i in wanted
      ]
  except av.error.FFmpegError as error:
    raise ValueError(f"{path} is no readable video ({error})") from error


def _with_opencv(path: str, pick: Pick) -> list[tuple[int, np.ndarray]]:
  import cv2

  def run(wanted):
    video, index, found = cv2.VideoCapture(path), 0, []
    while video.grab():
      if index in wanted:
        found.append((index, video.retrieve()[1][..., ::-1].copy()))
      index += 1
    video.release()
    return index, found

  count, _ = run(())
  return run(set(pick(count)))[1]


def _with_imageio(path: str, pick: Pick) -> list[tuple[int, np.ndarray]]:
  import imageio.v3 as imageio

  try:
    count = sum(1 for _ in imageio.imiter(path))
    wanted = set(pick(count))
    return [
      (i, np.asarray(image)[..., :3])
      for i, image in enumerate(imageio.imiter(path))
      if i in wanted
    ]
  except OSError as error:
    raise ValueError(f"{path} is no readable video ({error})") from error


def _with_pillow(path: str, pick: Pick) -> list[tuple[int, np.ndarray]]:
  from PIL import Image, UnidentifiedImageError

  try:
    with Image.open(path) as images:
      out = []
      for i in pick(images.n_frames):
        images.seek(i)
        out.append((i, np.asarray(images.convert("RGB"))))
      return out
  except (OSError, UnidentifiedImageError) as error:
    raise ValueError(f"{path} is no readable GIF ({error})") from error
