# SPDX-License-Identifier: Apache-2.0
"""The `view` command on real RGB-D frames: what lifting patches to 3D sees.

  python -m spatial_jax view --config=configs/llava_3d_sft.py:frames=FOLDER \
    --workdir=OUT

frames with depth and poses -> OUT/cloud.ply (all pixels, each in the colour of
its patch), OUT/voxels.ply (the tokens that LLaVA-3D would make) and
OUT/view.png. Prints how well consecutive views agree: the median distance from
a point of one to the nearest point of the other, over those points that fall on
measured pixels of the other. Hidden ones count too: nothing is thresholded.

Letters: F frames, h w patch grid.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from spatial_jax import clouds
from spatial_jax.data import images as image_lib
from spatial_jax.data import rgbd
from spatial_jax.geometry import camera, ply
from spatial_jax.types import Array, Float

WIDTH = 1600  # pixels of view.png
# A window of 5 x 5 of 112 pixels, in which the nearest point is looked for.
WINDOW = 2 / 112


def main(config: Any, workdir: str) -> dict[str, Any]:
  """Writes the three files; returns the figures that it prints."""
  from spatial_jax.geometry.patches import patch_points

  options = config.data.rgbd
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  frames = rgbd.read(options.folder, tuple(options.intrinsics))
  chosen = rgbd.sample(len(frames), min(options.frames, len(frames)))
  frames = [frames[i] for i in chosen]
  side, patch = config.data.scene.side, options.patch
  view = rgbd.load(frames, side=side, depth_scale=options.depth_scale)
  cameras = (view["depth"], view["intrinsics"], view["world_from_camera"])
  points = camera.unproject(*cameras)
  means = patch_means(colors(view["images"]), patch)
  cloud = clouds.fuse(
    points,
    np.repeat(np.repeat(means, patch, 1), patch, 2),
    view["world_from_camera"],
    (view["depth"] > 0) & ~clouds.edges(view["depth"]),
  )
  ply.write(folder / "cloud.ply", cloud.points, cloud.colors, comments=NOTES)

  grid = (side // patch,) * 2
  places, valid = map(np.asarray, patch_points(*cameras, grid))
  tokens = voxels(places[valid], means[valid], options.voxel_size)
  ply.write(folder / "voxels.ply", *tokens, comments=NOTES)

  pairs = [
    agreement(points, *cameras, i, i + 1) for i in range(len(frames) - 1)
  ]
  for first, second, (median, share) in zip(
    chosen[:-1], chosen[1:], pairs, strict=True
  ):
    print(
      f"views {first:>4} and {second:>4}: median {100 * median:4.1f} cm over "
      f"the {share:4.0%} of points where they overlap"
    )
  figures = {
    "frames": len(frames),
    "points": len(cloud.points),
    "patches": int(valid.size),
    "with_depth": int(valid.sum()),
    "voxels": len(tokens[0]),
    "agreement": [median for median, _ in pairs],
  }
  if pairs:
    medians = 100 * np.array(figures["agreement"])
    print(
      f"median of the {len(pairs)} pairs {np.median(medians):.1f} cm, worst "
      f"{medians.max():.1f} cm"
    )
  print(
    f"{len(cloud.points):,} points in cloud.ply; {valid.size} patches, "
    f"{valid.sum()} with depth, in {len(tokens[0])} voxels of "
    f"{options.voxel_size} m in voxels.ply"
  )
  picture(folder / "view.png", view, means, cloud)
  print(f"written to {folder}: cloud.ply, voxels.ply, view.png")
  return figures


NOTES = ("metres; the frame of the poses", "colour: mean of a patch")


def colors(images: Float[Array, "*b 3"]) -> Float[np.ndarray, "*b 3"]:
  """0..1 of images that were normalised for CLIP."""
  mean, std = np.float32(image_lib.CLIP_MEAN), np.float32(image_lib.CLIP_STD)
  return np.clip(images * std + mean, 0, 1)


def patch_means(
  images: Float[Array, "F height width 3"], patch: int
) -> Float[np.ndarray, "F h w 3"]:
  """Mean colour of each patch."""
  F, height, width, _ = images.shape
  shape = (F, height // patch, patch, width // patch, patch, 3)
  return images.reshape(shape).mean((2, 4))


def voxels(
  points: Float[Array, "n 3"], colors: Float[Array, "n 3"], size: float
) -> tuple[np.ndarray, np.ndarray]:
  """Mean place f32[m 3] and colour u8[m 3] of each occupied voxel."""
  cells = np.round(points / size).astype(np.int64)
  _, slot, count = np.unique(
    cells, axis=0, return_inverse=True, return_counts=True
  )
  both = np.zeros((len(count), 6))
  np.add.at(both, slot.reshape(-1), np.concatenate([points, colors], axis=1))
  both /= count[:, None]
  shades = np.round(255 * both[:, 3:]).astype(np.uint8)
  return both[:, :3].astype(np.float32), shades


def agreement(
  points: Float[Array, "F height width 3"],
  depth: Float[Array, "F height width"],
  intrinsics: Float[Array, "F 3 3"],
  world_from_camera: Float[Array, "F 4 4"],
  one: int,
  other: int,
) -> tuple[float, float]:
  """Median distance of two views in metres, and the share that overlaps.

  Both ways: from points of one view, every third pixel, to the nearest point of
  the other within a window around the pixel on which they fall.
  """
  height, width = depth.shape[1:]
  reach = max(1, round(WINDOW * width))
  found, asked = [], 0
  for a, b in ((one, other), (other, one)):
    some = points[a, ::3, ::3][depth[a, ::3, ::3] > 0]
    asked += len(some)
    pixel, z = camera.project(some, intrinsics[b], world_from_camera[b])
    ahead = z > 0.05
    x, y = np.floor(np.where(ahead[:, None], pixel, -1e6)).astype(int).T
    inside = (x >= reach) & (x < width - reach)
    inside &= (y >= reach) & (y < height - reach)
    x, y, some = x[inside], y[inside], some[inside]
    seen = depth[b, y, x] > 0
    x, y, some = x[seen], y[seen], some[seen]
    best = np.full(len(some), np.inf)
    for dy in range(-reach, reach + 1):
      for dx in range(-reach, reach + 1):
        away = ((points[b, y + dy, x + dx] - some) ** 2).sum(-1)
        away[depth[b, y + dy, x + dx] <= 0] = np.inf
        np.minimum(best, away, out=best)
    found.append(np.sqrt(best))
  found = np.concatenate(found)
  median = float(np.median(found)) if len(found) else float("nan")
  return median, len(found) / max(asked, 1)


def picture(
  path: pathlib.Path,
  view: dict[str, np.ndarray],
  means: Float[Array, "F h w 3"],
  cloud: clouds.Cloud,
) -> None:
  """Frames, their patches, and the cloud from behind and from above."""
  from PIL import Image

  poses = view["world_from_camera"]
  few = np.unique(np.linspace(0, len(poses) - 1, 8).astype(int))
  height = WIDTH * 9 // 16
  behind = clouds.viewpoint(cloud.points, poses, height, WIDTH)
  rows = [
    ("frames", clouds.tiles([colors(view["images"][i]) for i in few], WIDTH)),
    ("patches", clouds.tiles([means[i] for i in few], WIDTH)),
    (
      "all frames in one world, each pixel in the colour of its patch",
      clouds.draw(cloud, *behind, height, WIDTH, poses),
    ),
    ("from above", from_above(cloud, poses, height)),
  ]
  Image.fromarray(clouds.stack(rows)).save(path)


def from_above(
  cloud: clouds.Cloud, poses: Float[Array, "F 4 4"], height: int
) -> np.ndarray:
  """The ground plan: darker where more points lie above each other."""
  up = upward(cloud.normals, -poses[:, :3, 1].mean(0))
  ahead = poses[0, :3, 2] - up * (poses[0, :3, 2] @ up)
  ahead = ahead / np.linalg.norm(ahead)
  # Straight down: x right, y against `ahead`, depth against `up`.
  turn = np.stack([np.cross(ahead, up), -ahead, -up])
  local = cloud.points @ turn.T
  low, high = np.percentile(local[:, :2], [1, 99], axis=0)
  scale = 0.9 * min(WIDTH / (high - low)[0], height / (high - low)[1])
  at = (local[:, :2] - (low + high) / 2) * scale + [WIDTH / 2, height / 2]
  x, y = np.floor(at).astype(int).T
  inside = (x >= 0) & (x < WIDTH) & (y >= 0) & (y < height)
  count = np.zeros((height, WIDTH))
  np.add.at(count, (y[inside], x[inside]), 1)
  level = np.percentile(count[count > 0], 99)
  shade = 255 * (1 - np.clip(count / level, 0, 1) ** 0.5)
  return np.repeat(shade[..., None], 3, -1).astype(np.uint8)


def upward(
  normals: Float[Array, "n 3"], guess: Float[Array, " 3"]
) -> Float[np.ndarray, " 3"]:
  """The direction near the guess to which most of the surfaces face.

  Cameras look down on average; floors and tables tell better where up is.
  """
  up = guess / np.linalg.norm(guess)
  for degrees in (40, 30, 20, 15, 10, 10):
    near = normals[normals @ up > np.cos(np.radians(degrees))]
    if len(near) < 100:
      break
    up = near.mean(0) / np.linalg.norm(near.mean(0))
  return up
