# SPDX-License-Identifier: Apache-2.0
"""Exact ray casting of rooms in JAX: colour, depth, ids, normals, points.

scene arrays (see `scene.py`) + poses + intrinsics -> nearest primitive per ray
(a scan that carries depth and index) -> everything else once, from the
parameters of the primitive that won.

A ray's direction has length 1 along the optical axis, so its parameter is the
z-depth. Lengths are in metres; only sums and products, no matmul, so float32 is
exact on a TPU too. Rays must start inside the room.

Letters: B scenes, F frames, P primitives, O objects.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from spatial_jax.geometry import camera
from spatial_jax.types import Array, Float
from spatial_jax.world import textures
from spatial_jax.world.parts import BOX, CYLINDER, ELLIPSOID

NEAR = 0.05  # metres; what is closer to the camera plane isn't seen
TINY = 1e-9
LIGHT = (0.35, 0.5, 0.79)  # direction to the light
AMBIENT, DIFFUSE = 0.55, 0.45
SKIRTING = 0.12  # metres, a darker strip at the foot of the walls
WALLS = 8


@functools.partial(jax.jit, static_argnames=("height", "width", "shadows"))
def render(
  scene: dict[str, Array],
  world_from_camera: Float[Array, "F 4 4"],
  intrinsics: Float[Array, "3 3"],
  height: int,
  width: int,
  *,
  shadows: bool = False,
) -> dict[str, Array]:
  """Frames of one room.

  Returns:
    rgb f32[F h w 3] in 0..1, depth f32[F h w] (z-depth, metres), object
    i32[F h w] (-1 = the room itself), normal and point f32[F h w 3] (world).
  """
  local = camera.rays(intrinsics, height, width)[None]
  turn = world_from_camera[:, None, None, :3, :3]
  ray = tuple((turn[..., i, :] * local).sum(-1) for i in range(3))  # [F h w]
  origin = tuple(world_from_camera[:, i, 3, None, None] for i in range(3))
  shell, wall = _shell(scene, origin, ray)
  winner = _nearest(scene, origin, ray, shell)

  def shade(frame):
    return _shade(scene, *frame, shadows)

  # Frame by frame: a loop's results are arrays in memory. Without it XLA fuses
  # all of the shading into each colour channel and computes it three times.
  found = jax.lax.map(shade, (origin, ray, shell, wall, winner))
  palette = jnp.concatenate(
    [
      scene["primitive_color"],
      scene["wall_color"][None],
      scene["floor_color"][None],
      scene["ceiling_color"][None],
    ]
  )
  color = palette[found["paint"]]  # [F h w 3]
  return {
    "rgb": jnp.clip(color * found["brightness"][..., None], 0, 1),
    "depth": found["depth"],
    "object": found["object"],
    "normal": jnp.moveaxis(found["normal"], 1, -1),
    "point": jnp.moveaxis(found["point"], 1, -1),
  }


def _shade(
  scene, origin, ray, shell, wall, winner, shadows
) -> dict[str, Array]:
  """What one frame [h w] shows, given the primitive that each ray hits."""
  seen = winner >= 0
  rows = _rows(scene, winner)
  primitive = (rows["shape"], rows["center"], rows["scale"])
  enter, _ = _interval((*primitive, rows["cos"], rows["sin"]), origin, ray)
  depth = jnp.where(seen, enter, shell)
  point = [o + depth * d for o, d in zip(origin, ray, strict=True)]
  normal, factor = _surface(rows, point)
  room_normal, room_factor = _shell_surface(scene, point, wall)
  normal = [
    jnp.where(seen, n, m) for n, m in zip(normal, room_normal, strict=True)
  ]
  light = sum(n * v for n, v in zip(normal, LIGHT, strict=True))
  light = jnp.maximum(light, 0)
  if shadows:
    light = jnp.where(_shaded(scene, point, normal), 0, light)
  paint = len(scene["primitive_shape"]) + jnp.maximum(wall - WALLS + 1, 0)
  return {
    "brightness": jnp.where(seen, factor, room_factor)
    * (AMBIENT + DIFFUSE * light),
    "paint": jnp.where(seen, winner, paint),
    "depth": depth,
    "object": jnp.where(seen, rows["object"].astype(jnp.int32), -1),
    "normal": jnp.stack(normal),
    "point": jnp.stack(point),
  }


@functools.partial(jax.jit, static_argnames=("height", "width", "shadows"))
def render_batch(
  scene: dict[str, Array],
  world_from_camera: Float[Array, "B F 4 4"],
  intrinsics: Float[Array, "B 3 3"],
  height: int,
  width: int,
  *,
  shadows: bool = False,
) -> dict[str, Array]:
  """`render` with a leading axis of scenes on everything."""

  def one(scene, world_from_camera, intrinsics):
    return render(
      scene, world_from_camera, intrinsics, height, width, shadows=shadows
    )

  return jax.vmap(one)(scene, world_from_camera, intrinsics)


def _slab(q: Array, e: Array) -> tuple[Array, Array]:
  """Parameters between which q + t e lies within [-1, 1]."""
  inverse = 1 / jnp.where(jnp.abs(e) < TINY, TINY, e)
  middle, half = -q * inverse, jnp.abs(inverse)
  return middle - half, middle + half


def _interval(primitive, origin, ray) -> tuple[Array, Array]:
  """Parameters at which rays enter and leave one primitive."""
  shape, center, scale, cos, sin = primitive
  x, y, z = (o - c for o, c in zip(origin, center, strict=True))
  dx, dy, dz = ray
  qx, qy = (cos * x + sin * y) * scale[0], (cos * y - sin * x) * scale[1]
  ex, ey = (cos * dx + sin * dy) * scale[0], (cos * dy - sin * dx) * scale[1]
  qz, ez = z * scale[2], dz * scale[2]
  enter, leave = _slab(qz, ez)
  (x0, x1), (y0, y1) = _slab(qx, ex), _slab(qy, ey)
  # Sphere and cylinder are one formula. The foot of the perpendicular comes
  # first: the textbook discriminant loses all digits of a thin rod far away.
  ball = (shape == ELLIPSOID).astype(ex.dtype)
  a = jnp.maximum(ex * ex + ey * ey + ball * ez * ez, TINY)
  inverse = 1 / a
  middle = -(qx * ex + qy * ey + ball * qz * ez) * inverse
  px, py, pz = qx + middle * ex, qy + middle * ey, qz + middle * ez
  rest = (1 - (px * px + py * py + ball * pz * pz)) * inverse
  half = jnp.where(rest > 0, jnp.sqrt(jnp.maximum(rest, 0)), -jnp.inf)
  flat = shape == BOX
  near = jnp.where(flat, jnp.maximum(x0, y0), middle - half)
  far = jnp.where(flat, jnp.minimum(x1, y1), middle + half)
  return jnp.maximum(enter, near), jnp.minimum(leave, far)


def _primitives(scene) -> tuple:
  """Per-primitive arrays of the scans, leading axis P."""
  return (
    scene["primitive_shape"],
    scene["primitive_center"],
    1 / scene["primitive_half"],
    jnp.cos(scene["primitive_yaw"]),
    jnp.sin(scene["primitive_yaw"]),
  )


def _nearest(scene, origin, ray, shell) -> Array:
  """Index of the primitive seen by each ray, -1 = the room.

  Positive floats are ordered like their bits, so the index takes the place of
  the lowest bits of the depth and one running minimum finds the nearest: half
  the time of carrying both. Surfaces closer to each other than 2^-15 of their
  depth (a tenth of a millimetre at 3 m) may win in either order.
  """
  number = len(scene["primitive_shape"])
  low = (1 << number.bit_length()) - 1  # its all-ones index is the room

  def key(depth, index):
    bits = jax.lax.bitcast_convert_type(depth, jnp.int32)
    return (bits & ~low) | index

  def step(best, item):
    index, primitive = item
    enter, leave = _interval(primitive, origin, ray)
    hit = (enter < leave) & (enter > NEAR) & (primitive[0] > 0)
    # Outside of the interval `enter` may be anything: no key of it is made.
    enter = jnp.where(hit, enter, jnp.inf)
    return jnp.minimum(best, key(enter, index)), None

  # A scan, not a loop: unrolled, XLA fuses the running minimum into every
  # later step and computes it again there.
  index = jnp.arange(number, dtype=jnp.int32)
  best, _ = jax.lax.scan(
    step, key(shell, jnp.int32(low)), (index, _primitives(scene))
  )
  winner = best & low
  return jnp.where(winner == low, -1, winner)


def _shell(scene, origin, ray) -> tuple[Array, Array]:
  """Depth of the room's inside; 0..7 = wall, 8 = floor, 9 = ceiling."""
  dx, dy, dz = ray
  dz = jnp.where(jnp.abs(dz) < TINY, TINY, dz)
  up = dz > 0
  depth = (jnp.where(up, scene["room_height"], 0.0) - origin[2]) / dz
  surface = jnp.where(up, WALLS + 1, WALLS).astype(jnp.int32)
  start = scene["room_polygon"]
  edge = jnp.roll(start, -1, axis=0) - start

  def step(carry, item):
    best, surface = carry
    index, (x, y), (ex, ey) = item
    # Rays that leave through this wall run against its inward normal.
    speed = dx * ey - dy * ex
    out = speed > TINY
    t = ((x - origin[0]) * ey - (y - origin[1]) * ex) / jnp.where(out, speed, 1)
    along = (origin[0] + t * dx - x) * ex + (origin[1] + t * dy - y) * ey
    length2 = ex * ex + ey * ey
    # A little more than the wall, so that no ray slips through a corner.
    on = (along > -1e-5 * length2) & (along < (1 + 1e-5) * length2)
    hit = out & on & (t > 0) & (t < best)
    return (jnp.where(hit, t, best), jnp.where(hit, index, surface)), None

  index = jnp.arange(WALLS, dtype=jnp.int32)
  (depth, surface), _ = jax.lax.scan(
    step, (depth, surface), (index, start, edge)
  )
  return depth, surface


def _rows(scene, winner) -> dict[str, Array]:
  """Parameters of each pixel's primitive, arrays [.. F h w]."""
  parts = {
    "center": scene["primitive_center"],
    "scale": 1 / scene["primitive_half"],
    "cos": jnp.cos(scene["primitive_yaw"])[:, None],
    "sin": jnp.sin(scene["primitive_yaw"])[:, None],
    "color": scene["primitive_color"],
    "shape": scene["primitive_shape"][:, None].astype(jnp.float32),
    "texture": scene["primitive_texture"][:, None].astype(jnp.float32),
    "object": scene["primitive_object"][:, None].astype(jnp.float32),
  }
  # One gather for all; whole numbers below 2^24 survive as float32.
  table = jnp.concatenate(list(parts.values()), -1).T
  row, rows = table[:, jnp.maximum(winner, 0)], {}
  for name, value in parts.items():
    size = value.shape[-1]
    rows[name], row = (row[:size] if size > 1 else row[0]), row[size:]
  return rows


def _surface(rows, point) -> tuple[list, Array]:
  """Outward normals (world) and texture factors of the primitives seen."""
  cos, sin, scale = rows["cos"], rows["sin"], rows["scale"]
  x, y, z = (p - c for p, c in zip(point, rows["center"], strict=True))
  x, y = cos * x + sin * y, cos * y - sin * x
  ux, uy, uz = x * scale[0], y * scale[1], z * scale[2]
  ax, ay, az = jnp.abs(ux), jnp.abs(uy), jnp.abs(uz)
  box, rod = rows["shape"] == BOX, rows["shape"] == CYLINDER
  # A box shows the face of its largest coordinate, a cylinder cap or side,
  # and the normal of a round surface is its gradient.
  face_x = (ax >= ay) & (ax >= az)
  face_y = (ay > ax) & (ay >= az)
  side = ux * ux + uy * uy >= uz * uz
  nx = jnp.where(box, jnp.where(face_x, jnp.sign(ux), 0), ux * scale[0])
  ny = jnp.where(box, jnp.where(face_y, jnp.sign(uy), 0), uy * scale[1])
  up = jnp.where(face_x | face_y, 0, jnp.sign(uz))
  nz = jnp.where(box, up, uz * scale[2])
  nx, ny = jnp.where(rod & ~side, 0, nx), jnp.where(rod & ~side, 0, ny)
  nz = jnp.where(rod & side, 0, nz)
  inverse = jax.lax.rsqrt(jnp.maximum(nx * nx + ny * ny + nz * nz, 1e-20))
  nx, ny, nz = nx * inverse, ny * inverse, nz * inverse
  normal = [cos * nx - sin * ny, sin * nx + cos * ny, nz]
  factor = textures.object_factor(rows["texture"], (x, y, z), rows["object"])
  return normal, factor


def _shell_surface(scene, point, wall) -> tuple[list, Array]:
  """Inward normals and texture factors of walls, floor and ceiling."""
  start = scene["room_polygon"]
  edge = jnp.roll(start, -1, axis=0) - start
  length = jnp.sqrt(jnp.maximum((edge**2).sum(-1, keepdims=True), 1e-12))
  edge = edge / length
  table = jnp.concatenate([edge, start], -1)  # [8 4]
  ex, ey, x, y = table.T[:, jnp.minimum(wall, WALLS - 1)]
  floor, ceiling = wall == WALLS, wall == WALLS + 1
  is_wall = wall < WALLS
  normal = [
    jnp.where(is_wall, -ey, 0),
    jnp.where(is_wall, ex, 0),
    jnp.where(floor, 1.0, jnp.where(ceiling, -1.0, 0.0)),
  ]
  along = (point[0] - x) * ex + (point[1] - y) * ey
  on_floor = textures.floor_factor(scene["floor_texture"], point[0], point[1])
  on_wall = textures.wall_factor(scene["wall_texture"], along, point[2])
  on_wall = on_wall * jnp.where(point[2] < SKIRTING, 0.5, 1.0)
  return normal, jnp.where(floor, on_floor, jnp.where(ceiling, 1.0, on_wall))


def _shaded(scene, point, normal) -> Array:
  """Where something stands between a point and the light."""
  # Off the surface, or it would shade itself.
  start = tuple(p + 2e-3 * n for p, n in zip(point, normal, strict=True))
  ray = tuple(jnp.full((1, 1), v) for v in LIGHT)

  def step(dark, primitive):
    enter, leave = _interval(primitive, start, ray)
    hit = (enter < leave) & (leave > 0) & (primitive[0] > 0)
    return dark | hit, None

  dark = jnp.zeros(point[0].shape, bool)
  return jax.lax.scan(step, dark, _primitives(scene))[0]
