# SPDX-License-Identifier: Apache-2.0
"""Pictures of rooms and runs: arrays for images, SVG text for line drawings.

Numpy and Pillow only, no window and no plotting library: the same functions
serve the report, a notebook and a machine without a screen.
"""

from __future__ import annotations

import colorsys
import html
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from spatial_jax.types import Array, Float, Int, UInt8
from spatial_jax.world import scene as scene_lib

NEAR_PLANE = 0.05  # metres; edges are cut there before projection
INK, MUTED, RULE = "#1d2430", "#6b7480", "#dfe3e8"
# Near is bright. Anchors of viridis (Smith and van der Walt, CC0), reversed.
DEPTH_COLORS = np.array(
  [
    [253, 231, 37],
    [159, 218, 58],
    [74, 193, 109],
    [31, 161, 135],
    [39, 127, 142],
    [54, 92, 141],
    [70, 50, 126],
    [68, 1, 84],
  ],
  np.float64,
)
LINE_COLORS = (
  *("#1f5fa8", "#c4692a", "#3d8a5f", "#8a4a9e"),
  *("#7a6a2c", "#b0405a", "#2a8c96", "#6b7480"),
)


def object_color(index: int) -> tuple[int, int, int]:
  """The colour of an object in every picture of its room."""
  # Steps of the golden ratio keep neighbours in the list far apart in hue.
  hue = (0.58 + index * 0.61803398875) % 1.0
  light = (0.44, 0.54, 0.38)[index % 3]
  return tuple(round(255 * v) for v in colorsys.hls_to_rgb(hue, light, 0.55))


# --- images -----------------------------------------------------------------


def to_uint8(image: Array) -> UInt8[Array, "h w 3"]:
  """Colours in 0..1, or bytes already, as bytes."""
  image = np.asarray(image)
  if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
    raise ValueError(
      f"image of shape {image.shape}: expected (height, width, 3), not empty"
    )
  if image.dtype == np.uint8:
    return image
  return (np.clip(np.nan_to_num(image), 0, 1) * 255 + 0.5).astype(np.uint8)


def enlarge(image: UInt8[Array, "h w 3"], least: int) -> UInt8[Array, "H W 3"]:
  """Repeats pixels until the longer side has at least `least` of them."""
  factor = max(1, math.ceil(least / max(image.shape[:2])))
  return image.repeat(factor, 0).repeat(factor, 1)


def depth_range(depth: Array) -> tuple[float, float]:
  """Nearest and farthest finite depth, in metres."""
  good = np.asarray(depth)[np.isfinite(depth)]
  return (float(good.min()), float(good.max())) if good.size else (0.0, 1.0)


def draw_depth(
  depth: Float[Array, "h w"],
  near: float | None = None,
  far: float | None = None,
) -> UInt8[Array, "h w 3"]:
  """Depth in metres as colour: near is bright, no depth (nan, inf) is grey."""
  depth = np.asarray(depth, np.float64)
  low, high = depth_range(depth)
  low = low if near is None else near
  high = high if far is None else far
  good = np.isfinite(depth)
  place = np.where(good, depth - low, 0) / max(high - low, 1e-6)
  place = np.clip(place, 0, 1) * (len(DEPTH_COLORS) - 1)
  knots = np.arange(len(DEPTH_COLORS))
  color = [np.interp(place, knots, channel) for channel in DEPTH_COLORS.T]
  color = np.where(good[..., None], np.stack(color, -1), 200)
  return color.astype(np.uint8)


def draw_ids(ids: Int[Array, "h w"]) -> UInt8[Array, "h w 3"]:
  """Instance ids as colours; the shell of the room (-1) is light grey."""
  ids = np.asarray(ids)
  count = max(int(ids.max()) + 1, 1)
  table = np.array([object_color(i) for i in range(count)] + [(226, 228, 231)])
  return table[np.where(ids < 0, count, ids)].astype(np.uint8)


def corners(scene: Mapping[str, Array], index: int) -> Float[np.ndarray, "8 3"]:
  """Corners of an object's upright box, in the world."""
  signs = np.array(
    [[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]
  )
  local = signs * np.asarray(scene["object_size"][index], np.float64) / 2
  c, s = (f(float(scene["object_yaw"][index])) for f in (math.cos, math.sin))
  turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
  return local @ turn.T + np.asarray(scene["object_center"][index])


# Pairs of corners that differ in one coordinate.
EDGES = [(a, b) for a in range(8) for b in range(a) if (a ^ b) in (1, 2, 4)]


def named_objects(scene: Mapping[str, Array]) -> list[int]:
  return np.flatnonzero(np.asarray(scene["object_category"]) >= 0).tolist()


def category(scene: Mapping[str, Array], index: int) -> str:
  return scene_lib.CATEGORIES[int(scene["object_category"][index])]


def draw_boxes(
  image: Array,
  scene: Mapping[str, Array],
  world_from_camera: Float[Array, "4 4"],
  intrinsics: Float[Array, "3 3"],
  objects: Iterable[int] | None = None,
  least: int = 256,
) -> UInt8[Array, "H W 3"]:
  """Oriented boxes with category names over an image.

  Args:
    image: colours in 0..1 or bytes, of the size that `intrinsics` speak of.
    scene: arrays of a room.
    world_from_camera: OpenCV axes.
    intrinsics: in pixels, centres at +0.5.
    objects: the objects to draw; all named ones if None.
    least: pixels of the longer side of the result, at least.
  """
  image = to_uint8(image)
  # Drawn at twice the size and halved: smooth lines over sharp pixels.
  big = enlarge(image, 2 * least)
  if big.shape[0] % 2 or big.shape[1] % 2:
    big = big.repeat(2, 0).repeat(2, 1)
  scale = big.shape[0] / image.shape[0]
  canvas = Image.fromarray(big)
  pen = ImageDraw.Draw(canvas)
  font = ImageFont.load_default(size=max(big.shape) // 24)
  from_world = np.linalg.inv(np.asarray(world_from_camera, np.float64))
  labels = []
  for index in named_objects(scene) if objects is None else objects:
    at = corners(scene, index) @ from_world[:3, :3].T + from_world[:3, 3]
    color = object_color(index)
    ends = []
    for a, b in EDGES:
      line = cut(at[a], at[b])
      if line is not None:
        pixel = line @ np.asarray(intrinsics, np.float64).T
        pixel = scale * pixel[:, :2] / pixel[:, 2:]
        pen.line(
          [tuple(p) for p in pixel], fill=color, width=max(big.shape) // 150
        )
        ends.extend(pixel)
    if ends:
      labels.append((np.array(ends), category(scene, index), color))
  taken = []
  for ends, name, color in labels:
    inside = ends[((ends > 0) & (ends < big.shape[1::-1])).all(-1)]
    if len(inside):
      wide, high = pen.textbbox((0, 0), name, font=font)[2:]
      room = np.maximum(np.subtract(big.shape[1::-1], (wide + 6, high + 6)), 2)
      x, y = np.clip(inside.mean(0) - (wide / 2, high / 2), 2, room)
      y = free(x, y, wide + 8, high + 8, taken)
      pen.rectangle((x - 4, y - 1, x + wide + 4, y + high + 4), fill=color)
      pen.text((x, y), name, fill="white", font=font)
  return np.asarray(canvas.reduce(2))


def free(
  x: float, y: float, wide: float, high: float, taken: list[tuple]
) -> float:
  """The y nearest to the one wanted at which a label covers no other."""
  for shift in (0, 1, -1, 2, -2, 3, -3):
    at = y + shift * high
    if not any(
      x < left + other and left < x + wide and abs(at - top) < high
      for left, top, other in taken
    ):
      break
  taken.append((x, at, wide))
  return at


def cut(a: Array, b: Array) -> np.ndarray | None:
  """The part of a line in front of the near plane, or None."""
  if max(a[2], b[2]) <= NEAR_PLANE:
    return None
  if a[2] > b[2]:
    a, b = b, a
  if a[2] < NEAR_PLANE:
    a = a + (b - a) * (NEAR_PLANE - a[2]) / (b[2] - a[2])
  return np.stack([a, b])


# --- drawings as SVG --------------------------------------------------------


def draw_top_view(
  scene: Mapping[str, Array],
  cameras: Float[Array, "F 4 4"] | None = None,
  fov_degrees: float = 100.0,
) -> str:
  """The room from above (y up the page): walls, named boxes, cameras.

  Args:
    scene: arrays of a room.
    cameras: world_from_camera of each frame, numbered from 1 in the drawing.
    fov_degrees: width of the cameras' view.
  """
  polygon = np.asarray(scene["room_polygon"], np.float64)
  low, high = polygon.min(0) - 0.35, polygon.max(0) + 0.35
  width, height = high - low
  unit = max(width, height) / 100  # 1 % of the drawing, in metres

  def at(points) -> str:
    points = np.atleast_2d(points)
    return " ".join(f"{x - low[0]:.3f},{high[1] - y:.3f}" for x, y in points)

  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" class="topview" role="img" '
    f'viewBox="0 0 {width:.3f} {height + 4 * unit:.3f}" '
    f'font-family="system-ui, sans-serif">',
    f'<polygon points="{at(polygon)}" fill="#f6f4ef" stroke="{INK}" '
    f'stroke-width="{unit:.3f}" stroke-linejoin="round"/>',
  ]
  top = np.asarray(scene["object_center"])[:, 2]
  order = sorted(named_objects(scene), key=lambda i: float(top[i]))
  for index in order:
    color = "rgb({}, {}, {})".format(*object_color(index))
    base = corners(scene, index)[[0, 2, 6, 4], :2]
    parts.append(
      f'<polygon points="{at(base)}" fill="{color}" fill-opacity="0.4" '
      f'stroke="{color}" stroke-width="{unit * 0.5:.3f}">'
      f"<title>{html.escape(describe(scene, index))}</title></polygon>"
    )
  if cameras is not None:
    parts += draw_cameras(np.asarray(cameras), at, unit, fov_degrees)
  parts += label_objects(scene, order, low, high, unit)
  parts.append(
    f'<path d="M{0.35:.3f} {height + unit:.3f}h1" stroke="{INK}" '
    f'stroke-width="{unit * 0.6:.3f}"/><text x="1.45" '
    f'y="{height + 2 * unit:.3f}" font-size="{unit * 3.2:.3f}" '
    f'fill="{MUTED}">1 m</text></svg>'
  )
  return "".join(parts)


def describe(scene: Mapping[str, Array], index: int) -> str:
  size = " x ".join(f"{v:.2f}" for v in np.asarray(scene["object_size"][index]))
  return f"{category(scene, index)}, {size} m"


def draw_cameras(poses: np.ndarray, at, unit: float, fov: float) -> list[str]:
  """A wedge and a number for each frame, and a dot for each place."""
  parts = []
  for frame, pose in enumerate(poses):
    eye, ahead = pose[:2, 3], pose[:2, 2]
    yaw = math.atan2(ahead[1], ahead[0])
    half = math.radians(fov) / 2
    arms = np.array(
      [
        eye + 13 * unit * np.array([math.cos(a), math.sin(a)])
        for a in np.linspace(yaw - half, yaw + half, 9)
      ]
    )
    number = eye + 10 * unit * np.array([math.cos(yaw), math.sin(yaw)])
    x, y = at(number).split(",")
    parts.append(
      f'<polygon points="{at(np.vstack([eye, arms]))}" fill="{INK}" '
      f'fill-opacity="0.07" stroke="{INK}" stroke-opacity="0.35" '
      f'stroke-width="{unit * 0.25:.3f}"/>'
      f'<text x="{x}" y="{float(y) + unit * 1.2:.3f}" text-anchor="middle" '
      f'font-size="{unit * 3.4:.3f}" fill="{INK}">{frame + 1}</text>'
    )
  for eye in np.unique(poses[:, :2, 3].round(3), axis=0):
    x, y = at(eye).split(",")
    parts.append(
      f'<circle cx="{x}" cy="{y}" r="{unit * 1.2:.3f}" fill="{INK}"/>'
    )
  return parts


def label_objects(scene, order, low, high, unit) -> list[str]:
  """Names at the boxes' centres, moved apart where they would overlap."""
  size = unit * 3.3
  taken, parts = [], []
  for index in order:
    name = category(scene, index)
    x, y = np.asarray(scene["object_center"][index], np.float64)[:2]
    half = 0.29 * size * len(name)
    x = float(np.clip(x - low[0], half, high[0] - low[0] - half))
    y = float(high[1] - y)
    y = free(x - half, y, 2 * half, size * 1.02, taken)
    parts.append(
      f'<text x="{x:.3f}" y="{y + size * 0.35:.3f}" '
      f'text-anchor="middle" font-size="{size:.3f}" fill="{INK}" '
      f'stroke="#fff" stroke-opacity="0.8" stroke-width="{size * 0.2:.3f}" '
      f'paint-order="stroke">{html.escape(name)}</text>'
    )
  return parts


def ticks(low: float, high: float, count: int = 4) -> list[float]:
  """Round numbers inside a range."""
  span = max(high - low, 1e-9)
  step = 10.0 ** math.floor(math.log10(span / count))
  step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= count)
  first = math.ceil(low / step - 1e-9)
  last = math.floor(high / step + 1e-9)
  return [round(step * i, 10) for i in range(first, last + 1)]


def smooth(values: np.ndarray, share: float = 0.03) -> np.ndarray:
  """Running mean over a share of the run."""
  radius = int(len(values) * share)
  total = np.cumsum(np.concatenate([[0.0], values]))
  index = np.arange(len(values))
  low = np.maximum(index - radius, 0)
  high = np.minimum(index + radius + 1, len(values))
  return (total[high] - total[low]) / (high - low)


def draw_curves(
  runs: Mapping[str, Sequence[Mapping]],
  key: str = "loss",
  title: str = "",
  width: int = 520,
  height: int = 250,
) -> str:
  """One scalar over the steps of several runs; "" if no run has it.

  Args:
    runs: name -> rows of its metrics file, each with "step".
    key: the scalar.
    title: what stands above the drawing; the key if empty.
    width: of the drawing, in points.
    height: of the drawing, in points.
  """
  lines = {}
  for name, rows in runs.items():
    pairs = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
    pairs = np.array([p for p in pairs if np.isfinite(p[1])], np.float64)
    if len(pairs) > 1:
      lines[name] = (pairs[:, 0], pairs[:, 1], smooth(pairs[:, 1]))
  if not lines:
    return ""
  every = np.concatenate([soft for *_, soft in lines.values()])
  low, high = float(every.min()), float(every.max())
  low, high = (
    low - 0.06 * (high - low + 1e-9),
    high + 0.06 * (high - low + 1e-9),
  )
  last = max(float(steps.max()) for steps, *_ in lines.values())
  left, right, top, bottom = 46, width - 12, 46, height - 32

  def x(step):
    return left + (right - left) * step / max(last, 1)

  def y(value):
    return bottom - (bottom - top) * (np.clip(value, low, high) - low) / (
      high - low
    )

  def path(steps, values):
    step = max(1, len(steps) // 400)
    points = zip(steps[::step], values[::step], strict=True)
    return "M" + "L".join(f"{x(s):.1f} {y(v):.1f}" for s, v in points)

  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" class="curves" role="img" '
    f'viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" '
    f'font-size="11"><text x="0" y="13" font-size="13" font-weight="600" '
    f'fill="{INK}">{html.escape(title or key)}</text>'
  ]
  parts += [
    f'<path d="M{left} {y(value):.1f}H{right}" stroke="{RULE}"/>'
    f'<text x="{left - 7}" y="{y(value) + 4:.1f}" text-anchor="end" '
    f'fill="{MUTED}">{value:g}</text>'
    for value in ticks(low, high)
  ]
  parts += [
    f'<text x="{x(step):.1f}" y="{bottom + 16}" text-anchor="middle" '
    f'fill="{MUTED}">{step:g}</text>'
    for step in ticks(0, last, 5)
  ]
  parts.append(
    f'<text x="{right}" y="{bottom + 29}" text-anchor="end" '
    f'fill="{MUTED}">step</text>'
  )
  legend = 0
  for (name, (steps, raw, soft)), color in zip(
    lines.items(), LINE_COLORS * len(lines), strict=False
  ):
    parts.append(
      f'<path d="{path(steps, raw)}" fill="none" stroke="{color}" '
      f'stroke-opacity="0.22"/><path d="{path(steps, soft)}" fill="none" '
      f'stroke="{color}" stroke-width="2" stroke-linejoin="round"/>'
      f'<path d="M{legend} 28h16" stroke="{color}" stroke-width="2.5"/>'
      f'<text x="{legend + 21}" y="32" fill="{INK}">{html.escape(name)}</text>'
    )
    legend += 36 + 6.2 * len(name)
  return "".join([*parts, "</svg>"])


def draw_intervals(
  values: Mapping[str, tuple[float, float | None]],
  title: str,
  width: int = 520,
) -> str:
  """A dot for each name, with a whisker where there is an interval.

  Args:
    values: name -> mean, half of its interval.
    title: what stands above the drawing.
    width: of the drawing, in points.
  """
  ends = [m + s * (h or 0) for m, h in values.values() for s in (-1, 1)]
  low, high = min(ends), max(ends)
  low, high = low - 0.05 * (high - low + 1), high + 0.05 * (high - low + 1)
  left, right, top, line = 100, width - 60, 30, 22
  bottom = top + line * len(values)

  def x(value):
    return left + (right - left) * (value - low) / (high - low)

  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" class="curves" role="img" '
    f'viewBox="0 0 {width} {bottom + 24}" font-size="11" '
    f'font-family="system-ui, sans-serif"><text x="0" y="13" font-size="13" '
    f'font-weight="600" fill="{INK}">{html.escape(title)}</text>'
  ]
  parts += [
    f'<path d="M{x(value):.1f} {top}V{bottom}" stroke="{RULE}"/>'
    f'<text x="{x(value):.1f}" y="{bottom + 16}" text-anchor="middle" '
    f'fill="{MUTED}">{value:g}</text>'
    for value in ticks(low, high)
  ]
  for index, (name, (mean, half)) in enumerate(values.items()):
    y, color = top + line * (index + 0.5), LINE_COLORS[0]
    if half is not None:
      parts.append(
        f'<path d="M{x(mean - half):.1f} {y}H{x(mean + half):.1f}" '
        f'stroke="{color}" stroke-width="2"/>'
      )
    parts.append(
      f'<text x="0" y="{y + 4}" fill="{INK}">{html.escape(name)}</text>'
      f'<circle cx="{x(mean):.1f}" cy="{y}" r="4" fill="{color}"/>'
      f'<text x="{width}" y="{y + 4}" text-anchor="end" fill="{INK}">'
      f"{mean:.1f}</text>"
    )
  return "".join([*parts, "</svg>"])
