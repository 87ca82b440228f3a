# SPDX-License-Identifier: Apache-2.0
"""Pictures of point clouds: choose a viewpoint, splat, shade, add cameras.

numpy and Pillow only, no window and no GPU. A cloud is what frames with depth
and cameras give: points with colours, and for each the direction it was seen
from, so that walls seen from inside don't hide a room from a viewer outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from spatial_jax import drawing
from spatial_jax.geometry import camera
from spatial_jax.types import Array, Bool, Float, UInt8

BACKGROUND = (255, 255, 255)
EDGE = 0.12  # change of slope of 1 / depth, as a share, that marks an edge
LARGEST_SPLAT = 10  # pixels of radius in the doubled picture
MOST_POINTS = 600_000  # drawn; a larger cloud is thinned
FOV_DEGREES = 40.0
ELEVATION_DEGREES = 32.0
AZIMUTH_DEGREES = 18.0


class Cloud(NamedTuple):
  """Points with what drawing needs; n points."""

  points: Array  # f32[n 3], world
  colors: Array  # u8[n 3]
  normals: Array  # f32[n 3], towards the camera that saw the point
  size: Array  # f32[n], how far neighbouring points lie apart


def edges(depth: Float[Array, "*b h w"]) -> Bool[np.ndarray, "*b h w"]:
  """Where depth jumps between neighbours, so that a point hangs in the air.

  1 / depth is linear across a plane however slanted, so its second difference
  tells a jump from a slope.
  """
  inverse = 1 / np.maximum(np.asarray(depth, np.float64), 1e-9)
  found = np.zeros(inverse.shape, bool)
  for axis in (-1, -2):
    line = np.moveaxis(inverse, axis, -1)
    bend = np.abs(line[..., 2:] - 2 * line[..., 1:-1] + line[..., :-2])
    # The nearer side of a jump is what is seen, the farther one is kept too.
    jump = bend > EDGE * np.maximum(line[..., 2:], line[..., :-2])
    np.moveaxis(found, axis, -1)[..., 1:-1] |= jump
  return found


def fuse(
  points: Float[Array, "F h w 3"],
  images: Array,
  world_from_camera: Float[Array, "F 4 4"],
  mask: Bool[Array, "F h w"] | None = None,
) -> Cloud:
  """One cloud of all frames.

  Args:
    points: world, on the pixel grid.
    images: [F h w 3], 0..1 or bytes.
    mask: True = belongs to the cloud; all if None.
  """
  points = np.asarray(points, np.float64)
  across = np.gradient(points, axis=2)
  down = np.gradient(points, axis=1)
  normal = np.cross(across, down)
  length = np.linalg.norm(normal, axis=-1, keepdims=True)
  normal = normal / np.maximum(length, 1e-12)
  eye = np.asarray(world_from_camera, np.float64)[:, None, None, :3, 3]
  facing = ((eye - points) * normal).sum(-1, keepdims=True)
  normal = np.where(facing < 0, -normal, normal)
  # The shorter of the two: a slanted surface has one long step.
  size = np.minimum(
    np.linalg.norm(across, axis=-1), np.linalg.norm(down, axis=-1)
  )
  keep = np.isfinite(points).all(-1)
  keep = keep if mask is None else keep & np.asarray(mask)
  colors = np.stack([drawing.to_uint8(image) for image in images])
  return Cloud(
    points[keep].astype(np.float32),
    colors[keep],
    normal[keep].astype(np.float32),
    size[keep].astype(np.float32),
  )


def thin(cloud: Cloud, most: int, seed: int = 0) -> Cloud:
  """At most so many of its points, drawn without order."""
  count = len(cloud.points)
  if count <= most:
    return cloud
  keep = np.sort(np.random.default_rng(seed).permutation(count)[:most])
  grown = cloud._replace(size=cloud.size * math.sqrt(count / most))
  return Cloud(*(x[keep] for x in grown))


def viewpoint(
  points: Float[Array, "n 3"],
  world_from_camera: Float[Array, "F 4 4"],
  height: int,
  width: int,
) -> tuple[Float[np.ndarray, "4 4"], Float[np.ndarray, "3 3"]]:
  """World_from_camera and intrinsics of a view from behind and above.

  Looks along the mean direction of the cameras, turned a little to the side,
  from as near as shows nearly all points and all cameras.
  """
  poses = np.asarray(world_from_camera, np.float64)
  up = _unit(-poses[:, :3, 1].mean(0), -poses[0, :3, 1])
  ahead = poses[:, :3, 2].mean(0)
  if np.linalg.norm(ahead) < 0.3:  # looking all around
    ahead = poses[0, :3, 2]
  flat = _unit(ahead - up * (ahead @ up), poses[0, :3, 0])
  side = np.cross(flat, up)
  azimuth, elevation = map(math.radians, (AZIMUTH_DEGREES, ELEVATION_DEGREES))
  flat = math.cos(azimuth) * flat + math.sin(azimuth) * side
  forward = math.cos(elevation) * flat - math.sin(elevation) * up
  right = _unit(np.cross(forward, up), side)
  turn = np.stack([right, np.cross(forward, right), forward], -1)

  k = camera.intrinsics(height, width, FOV_DEGREES)
  points = np.asarray(points, np.float64)
  points = points[:: max(1, len(points) // 50_000)]
  local = points @ turn
  low, high = np.percentile(local, [1, 99], axis=0)
  eyes = poses[:, :3, 3] @ turn
  low, high = np.minimum(low, eyes.min(0)), np.maximum(high, eyes.max(0))
  local = np.concatenate([np.clip(local, low, high), eyes])
  # All points lie in the frustum from (x0, y0, z0) if for each axis and tangent
  # t: x - t z <= x0 - t z0 and -x - t z <= -x0 - t z0. The nearest such place:
  tangent = 0.9 * np.array([width, height]) / 2 / k[0, 0]
  plus = (local[:, :2] - tangent * local[:, 2:]).max(0)
  minus = (-local[:, :2] - tangent * local[:, 2:]).max(0)
  back = (-(plus + minus) / (2 * tangent)).min()
  pose = np.eye(4)
  pose[:3, :3], pose[:3, 3] = turn, turn @ [*((plus - minus) / 2), back]
  return pose, np.asarray(k, np.float64)


def _unit(vector: np.ndarray, other: np.ndarray) -> np.ndarray:
  """A vector of length 1, of another one where the first has no direction."""
  vector = vector if np.linalg.norm(vector) > 1e-6 else other
  return vector / max(np.linalg.norm(vector), 1e-12)


def draw(
  cloud: Cloud,
  world_from_camera: Float[Array, "4 4"],
  intrinsics: Float[Array, "3 3"],
  height: int,
  width: int,
  cameras: Float[Array, "F 4 4"] | None = None,
  frustum: float = 0.0,
) -> UInt8[np.ndarray, "height width 3"]:
  """The cloud from a viewpoint, with the cameras that saw it.

  Args:
    cloud: points seen from behind aren't drawn.
    world_from_camera: the viewpoint.
    intrinsics: in pixels of the picture.
    cameras: drawn as small pyramids, numbered from 1.
    frustum: length of these; 3 % of the distance if 0.
  """
  cloud = thin(cloud, MOST_POINTS)
  view = np.asarray(world_from_camera, np.float64)
  eye = view[:3, 3]
  front = ((eye - cloud.points) * cloud.normals).sum(-1) > 0
  cloud = Cloud(*(x[front] for x in cloud))
  k = np.asarray(intrinsics, np.float64)
  k = np.diag([2.0, 2.0, 1.0]) @ k  # twice as large, halved at the end
  shape = (2 * height, 2 * width)
  color, depth = _splat(cloud, view, k, shape)
  shade = _shade(depth)
  image = np.where(
    np.isfinite(depth)[..., None], color * shade[..., None], BACKGROUND
  )
  canvas = Image.fromarray(image.astype(np.uint8))
  if cameras is not None:
    _draw_cameras(canvas, np.asarray(cameras, np.float64), view, k, frustum)
  return np.asarray(canvas.reduce(2))


def _splat(cloud, view, k, shape) -> tuple[np.ndarray, np.ndarray]:
  """Colour [H W 3] and depth [H W], infinite where nothing is."""
  height, width = shape
  pixel, z = camera.project(cloud.points.astype(np.float64), k, view)
  seen = (z > 1e-6) & (np.abs(pixel) < 1e5).all(-1)
  pixel, z, colors = pixel[seen], z[seen], cloud.colors[seen]
  radius = np.ceil(0.75 * cloud.size[seen] * k[0, 0] / z - 0.5)
  radius = np.clip(radius, 1, LARGEST_SPLAT).astype(int)
  # Far before near: the last one written to a pixel stays.
  order = np.argsort(-z, kind="stable")
  image = np.zeros((height * width, 3), np.float32)
  depth = np.full(height * width, np.inf)
  corner = np.floor(pixel).astype(int)
  # In slices of depth, so that a disc in front covers those behind.
  for part in np.array_split(order, 64):
    for r in np.unique(radius[part])[::-1]:
      some = part[radius[part] == r]
      span = np.arange(-r, r + 1)
      dy, dx = np.meshgrid(span, span, indexing="ij")
      disc = dx**2 + dy**2 <= (r + 0.3) ** 2
      for x, y in zip(dx[disc], dy[disc], strict=True):
        column, row = corner[some, 0] + x, corner[some, 1] + y
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        at = row[inside] * width + column[inside]
        hit = some[inside]
        nearer = z[hit] <= depth[at]
        at, hit = at[nearer], hit[nearer]
        image[at], depth[at] = colors[hit], z[hit]
  return image.reshape(height, width, 3), depth.reshape(height, width)


def _shade(depth: np.ndarray, reach: int = 3, strength: float = 6.0):
  """Eye-dome lighting: darker where neighbours stand nearer, 0..1."""
  log = np.log(np.where(np.isfinite(depth), depth, np.nan))
  padded = np.pad(log, reach, constant_values=np.nan)
  height, width = depth.shape
  total = np.zeros(depth.shape)
  for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
    y, x = reach * (1 + dy), reach * (1 + dx)
    drop = log - padded[y : y + height, x : x + width]
    total += np.clip(np.nan_to_num(drop), 0, 0.1)
  return np.clip(np.exp(-strength * total / 4), 0.45, 1)


def _draw_cameras(canvas, cameras, view, k, frustum) -> None:
  """Pyramids of the cameras' views, and their numbers."""
  pen = ImageDraw.Draw(canvas)
  size = max(canvas.size)
  font = ImageFont.load_default(size=size // 60)
  back = np.linalg.inv(view)
  away = np.linalg.norm(cameras[:, :3, 3] - view[:3, 3], axis=-1)
  length = frustum or 0.028 * float(away.mean())
  rim = np.array([[-1, -0.75, 1], [1, -0.75, 1], [1, 0.75, 1], [-1, 0.75, 1]])
  rim = length * np.vstack([[0, 0, 0], rim * [0.7, 0.7, 1]])
  ends = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (2, 3), (3, 4), (4, 1)]
  for index in np.argsort(-away):
    corners = camera.transform(back @ cameras[index], rim)
    color = drawing.object_color(int(index))
    for a, b in ends:
      line = drawing.cut(corners[a], corners[b])
      if line is not None:
        pixel = line @ k.T
        pixel = pixel[:, :2] / pixel[:, 2:]
        pen.line([tuple(p) for p in pixel], fill=color, width=size // 500)
    if len(cameras) <= 16 and corners[0, 2] > drawing.NEAR_PLANE:
      at = k @ corners[0]
      pen.text(
        tuple(at[:2] / at[2] + size // 200),
        str(index + 1),
        fill=color,
        font=font,
        stroke_width=2,
        stroke_fill="white",
      )


def tiles(
  images: Sequence[Array] | Array, width: int, gap: int = 6
) -> UInt8[np.ndarray, "H W 3"]:
  """Images of one shape side by side, together `width` pixels wide."""
  count = len(images)
  each = (width - gap * (count - 1)) / count
  height, wide = images[0].shape[:2]
  tall = max(1, round(height * each / wide))
  sheet = Image.new("RGB", (width, tall), BACKGROUND)
  # Small pictures show their pixels, large ones are smoothed.
  method = Image.Resampling.NEAREST if each > wide else Image.Resampling.LANCZOS
  for i, image in enumerate(images):
    left, right = round(i * (each + gap)), round(i * (each + gap) + each)
    tile = Image.fromarray(drawing.to_uint8(image))
    sheet.paste(tile.resize((right - left, tall), method), (left, 0))
  return np.asarray(sheet)


def stack(
  rows: Sequence[tuple[str, Array]], margin: int = 16
) -> UInt8[np.ndarray, "H W 3"]:
  """Pictures of one width below each other, each under its caption."""
  width = rows[0][1].shape[1]
  line = max(18, width // 60)
  font = ImageFont.load_default(size=round(0.8 * line))
  tall = sum(image.shape[0] + line + margin for _, image in rows)
  sheet = Image.new("RGB", (width + 2 * margin, tall + margin), BACKGROUND)
  pen = ImageDraw.Draw(sheet)
  y = margin // 2
  for caption, image in rows:
    pen.text((margin, y), caption, fill=drawing.INK, font=font)
    y += line
    sheet.paste(Image.fromarray(drawing.to_uint8(image)), (margin, y))
    y += image.shape[0] + margin
  return np.asarray(sheet)
