# SPDX-License-Identifier: Apache-2.0
"""Seeded rooms as fixed-size arrays: primitives, oriented boxes, room polygon.

World: metres, z up, floor at z = 0. `sample` makes room `index` of a split; it
depends only on (seed, split, index) and the options, so rooms are read in any
order and splits share none. The arrays of a scene, P primitives and O objects:

  primitive_shape    i32[P]     0 none, 1 box, 2 cylinder along z, 3 ellipsoid
  primitive_center   f32[P 3]
  primitive_half     f32[P 3]   half extents along the primitive's own axes
  primitive_yaw      f32[P]     counter-clockwise about z
  primitive_color    f32[P 3]   0..1
  primitive_texture  i32[P]     0 plain, 1 checker, 2 stripes, 3 speckle
  primitive_object   i32[P]     -1 none
  object_category    i32[O]     index into CATEGORIES, -1 empty
  object_center      f32[O 3]   centre of the upright box
  object_size        f32[O 3]   full edges along the object's own axes
  object_yaw         f32[O]
  object_support     i32[O]     object it stands on; -1 floor or wall
  room_polygon       f32[8 2]   counter-clockwise, last vertex repeated
  room_height        f32[]
  room_size          f32[]      square metres
  wall_color, floor_color, ceiling_color  f32[3]
  wall_texture, floor_texture             i32[]

numpy only: data workers call this.
"""

from __future__ import annotations

import numpy as np

from spatial_jax.world import furniture, parts, placement

SPLITS = ("train", "validation", "test")
CATEGORIES = tuple(c.name for c in furniture.ALL)
FURNITURE = 16  # the first ones stand in rooms; the rest belong to walls
DOOR, WINDOW, OTHER = (
  CATEGORIES.index(name) for name in ("door", "window", "other")
)
NO_TEXTURE, CHECKER, STRIPES, SPECKLE = range(4)
BASE_COLOR = np.array([c.color for c in furniture.ALL], np.float32)

# The plainest rooms: what a few million parameters learn on two CPU cores.
SIMPLE = {
  "max_objects": 10,
  "max_primitives": 40,
  "objects": (4, 10),
  "distinct": (4, 7),
  "repeated": 0.5,
  "l_shaped": 0.0,
  "doors": (0, 0),
  "windows": (0, 0),
  "stacking": 0.0,
  "detailed": False,
  "textures": False,
  "recolored": 0.0,
}


def _part_table():
  """All parts of all models, plain ones first, and where each model starts."""
  models = [c.plain for c in furniture.ALL]
  models += [c.detailed for c in furniture.ALL]
  flat = [part for model in models for part in model]
  low = np.array([p.low for p in flat], np.float32)
  high = np.array([p.high for p in flat], np.float32)
  count = np.array([len(model) for model in models])
  black = (0.0, 0.0, 0.0)
  materials = [parts.MATERIALS.get(p.material, black) for p in flat]
  return {
    "shape": np.array([p.shape for p in flat], np.int32),
    # Relative to the middle of the box, whose height counts from its bottom.
    "center": (low + high) / 2 - np.float32([0, 0, 0.5]),
    "half": (high - low) / 2,
    "tint": np.array([p.tint for p in flat], np.float32),
    "material": np.array(materials, np.float32),
    "fixed": np.array([p.material != "" for p in flat]),
    "count": count,
    "start": np.cumsum(count) - count,
  }


PARTS = _part_table()


def assemble(
  category: np.ndarray,
  center: np.ndarray,
  size: np.ndarray,
  yaw: np.ndarray,
  support: np.ndarray,
  color: np.ndarray,
  texture: np.ndarray,
  *,
  detailed: bool,
  max_objects: int,
  max_primitives: int,
) -> dict[str, np.ndarray]:
  """Object and primitive arrays of `n` objects, padded.

  Objects get their detailed model as long as all others can still have their
  plain one.

  Raises:
    ValueError: not even the plain models fit.
  """
  n = len(category)
  plain, rich = np.split(PARTS["count"], 2)
  number = plain[category]
  spare = max_primitives - int(number.sum())
  if n > max_objects or spare < 0:
    raise ValueError(
      f"{n} objects of {number.sum()} primitives don't fit into max_objects="
      f"{max_objects}, max_primitives={max_primitives}; make these larger"
    )
  model = category
  if detailed:
    extra = rich[category] - number
    enriched = np.cumsum(extra) <= spare
    model = category + enriched * len(plain)
    number = PARTS["count"][model]
  owner = np.repeat(np.arange(n, dtype=np.int32), number)
  ends = np.cumsum(number)
  part = np.arange(len(owner)) + (PARTS["start"][model] - ends + number)[owner]

  cos, sin = np.cos(yaw)[owner], np.sin(yaw)[owner]
  local = PARTS["center"][part] * size[owner]
  turned = np.empty_like(local)
  turned[:, 0] = cos * local[:, 0] - sin * local[:, 1]
  turned[:, 1] = sin * local[:, 0] + cos * local[:, 1]
  turned[:, 2] = local[:, 2]
  fixed = PARTS["fixed"][part]
  tinted = np.minimum(color[owner] * PARTS["tint"][part][:, None], 1)

  def pad(rows, total, fill, dtype):
    rows = np.asarray(rows)
    out = np.full((total, *rows.shape[1:]), fill, dtype)
    out[: len(rows)] = rows
    return out

  f, i, p, o = np.float32, np.int32, max_primitives, max_objects
  return {
    "primitive_shape": pad(PARTS["shape"][part], p, 0, i),
    "primitive_center": pad(center[owner] + turned, p, 0, f),
    "primitive_half": pad(PARTS["half"][part] * size[owner], p, 1, f),
    "primitive_yaw": pad(yaw[owner], p, 0, f),
    "primitive_color": pad(
      np.where(fixed[:, None], PARTS["material"][part], tinted), p, 0, f
    ),
    "primitive_texture": pad(np.where(fixed, 0, texture[owner]), p, 0, i),
    "primitive_object": pad(owner, p, -1, i),
    "object_category": pad(category, o, -1, i),
    "object_center": pad(center, o, 0, f),
    "object_size": pad(size, o, 0, f),
    "object_yaw": pad(yaw, o, 0, f),
    "object_support": pad(support, o, -1, i),
  }


def polygon(vertices) -> np.ndarray:
  """Vertices [n 2] padded to f32[8 2] by repeating the last one."""
  out = np.empty((8, 2), np.float32)
  out[: len(vertices)] = vertices
  out[len(vertices) :] = vertices[-1]
  return out


def polygon_area(vertices) -> float:
  x, y = np.asarray(vertices, np.float64).T
  return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def sample(
  seed: int,
  split: str,
  index: int,
  *,
  max_objects: int = 24,
  max_primitives: int = 160,
  objects: tuple[int, int] = (3, 24),
  distinct: tuple[int, int] = (3, 13),
  repeated: float = 0.4,
  area: tuple[float, float] = (6.0, 60.0),
  size_spread: float = 0.8,
  l_shaped: float = 0.35,
  doors: tuple[int, int] = (1, 2),
  windows: tuple[int, int] = (0, 3),
  stacking: float = 0.35,
  detailed: bool = True,
  textures: bool = True,
  recolored: float = 0.5,
) -> dict[str, np.ndarray]:
  """Room `index` of `split`.

  Args:
    max_objects, max_primitives: O and P.
    objects: least and most objects aimed at (crowded rooms may drop some), not
      counting doors and windows, which take places in `max_objects` first.
    distinct: least and most categories. The first comes in 1..5 copies, equally
      often; each further one is repeated with probability `repeated`.
    area: square metres, drawn log-uniformly.
    size_spread: objects are exp(U(-s, s)) times their usual size.
    l_shaped, stacking: probability of such a room; of a small object being put
      on a piece of furniture.
    recolored: probability that an object has a colour other than its
      category's, so that colour doesn't give the category away.
  """
  if split not in SPLITS:
    raise ValueError(f"split {split!r}: expected one of {SPLITS}")
  rng = np.random.default_rng([seed, SPLITS.index(split), index])
  room = placement.room(rng, area, l_shaped)
  outline = np.array(room.polygon)
  openings = placement.openings(rng, room, doors, windows)
  wanted = _categories(
    rng, objects, distinct, repeated, max_objects - len(openings)
  )
  placed = placement.furnish(rng, room, openings, wanted, size_spread, stacking)
  placed = [*placed, *openings]
  n = len(placed)
  category = np.array([p.category for p in placed], np.int32)
  uniform = rng.random((n, 5), np.float32)
  tone = BASE_COLOR[category] * (0.85 + 0.3 * uniform[:, :3])
  if recolored:
    other = uniform[:, 3:4] < recolored * (category < FURNITURE)[:, None]
    tone = np.where(other, _palette(rng, n), tone)
  texture = np.zeros(n, np.int32)
  if textures:
    drawn = np.floor(uniform[:, 4] * 8).astype(np.int32)
    texture = np.where((drawn > 3) | (category >= FURNITURE), 0, drawn)
  scene = assemble(
    category,
    np.array([p.center for p in placed], np.float32).reshape(n, 3),
    np.array([p.size for p in placed], np.float32).reshape(n, 3),
    np.array([p.yaw for p in placed], np.float32),
    np.array([p.support for p in placed], np.int32),
    np.clip(tone, 0, 1),
    texture,
    detailed=detailed,
    max_objects=max_objects,
    max_primitives=max_primitives,
  )
  scene["room_polygon"] = polygon(outline)
  scene["room_height"] = np.asarray(room.height, np.float32)
  scene["room_size"] = np.asarray(polygon_area(outline), np.float32)
  return scene | surfaces(rng, textures)


def surfaces(rng: np.random.Generator, textures: bool) -> dict:
  """Pale walls, a floor in wood or stone colours, a white ceiling."""
  tone = rng.random((3, 3)).astype(np.float32)
  floor = np.float32([0.62, 0.5, 0.38]) + 0.25 * tone[1, :1] * np.float32(
    [0.8, 0.9, 1.0]
  )
  # A half-metre checkerboard is a cue of absolute scale.
  floor_texture, wall_texture = CHECKER, NO_TEXTURE
  if textures:
    floor_texture = int(rng.choice([CHECKER, CHECKER, STRIPES, SPECKLE]))
    wall_texture = int(rng.choice([NO_TEXTURE, NO_TEXTURE, STRIPES, SPECKLE]))
  return {
    "wall_color": 0.72 + 0.24 * tone[0],
    "floor_color": floor + 0.08 * (tone[2] - 0.5),
    "ceiling_color": np.float32([0.95, 0.95, 0.95]),
    "floor_texture": np.asarray(floor_texture, np.int32),
    "wall_texture": np.asarray(wall_texture, np.int32),
  }


def _palette(rng: np.random.Generator, n: int) -> np.ndarray:
  """Colours f32[n 3] of furniture: a hue, mostly muted, not too dark."""
  hue, grey, value = rng.random((3, n, 1)).astype(np.float32)
  wave = np.abs((hue * 6 + np.float32([0, 4, 2])) % 6 - 3) - 1
  full = np.clip(wave, 0, 1)
  return (1 + (0.2 + 0.7 * grey) * (full - 1)) * (0.35 + 0.6 * value)


def _categories(rng, objects, distinct, repeated, limit: int) -> list[int]:
  """Categories to place, copies of the first one in front."""
  low, high = objects[0], min(objects[1], limit)
  uniform = rng.random(FURNITURE + 2).tolist()
  order = rng.permutation(FURNITURE).tolist()
  first = 1 + int(uniform[0] * 5)
  kinds = distinct[0] + int(uniform[1] * (distinct[1] - distinct[0] + 1))
  # All copies of the first category and every kind get a place before repeats.
  first = max(min(first, high - distinct[0] + 1), 1)
  kinds = min(kinds, high - first + 1)
  wanted = [order[0]] * first + order[1:kinds]
  # SIMPLE repeats the second category only; larger rooms repeat several.
  for rank, kind in enumerate(order[1:kinds], 2):
    if distinct[1] <= 7 and rank > 2:
      break
    draw = uniform[rank]
    if draw < repeated:
      extra = int(draw / repeated * 3)
      wanted += [kind] * min(extra, high - len(wanted))
  rank = kinds
  while len(wanted) < low and rank < FURNITURE:
    wanted.append(order[rank])
    rank += 1
  return wanted
