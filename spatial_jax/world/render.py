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
from spatial_jax.world.furniture import BOX, CYLINDER, ELLIPSOID

NEAR = 0.05  # metres; what is closer to the camera plane isn't seen
TINY = 1e-9
LIGHT = (0.35, 0.5, 0.79)  # direction to the light
AMBIENT, DIFFUSE, SHADED = 0.55, 0.45, 0.35
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
  depth, winner = _nearest(scene, origin, ray, shell)
  point = tuple(o + depth * d for o, d in zip(origin, ray, strict=True))
  found = _surface(scene, point, winner, wall)
  light = jnp.maximum(
    sum(n * v for n, v in zip(found["normal"], LIGHT, strict=True)), 0
  )
  if shadows:
    light = jnp.where(_shaded(scene, point, found["normal"]), 0, light)
  shade = AMBIENT + DIFFUSE * light
  return {
    "rgb": jnp.clip(found["color"] * shade[..., None], 0, 1),
    "depth": depth,
    "object": found["object"],
    "normal": jnp.stack(found["normal"], -1),
    "point": jnp.stack(point, -1),
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


def _nearest(scene, origin, ray, shell) -> tuple[Array, Array]:
  """Depth, and index of the primitive seen (-1 = the room)."""

  def step(carry, item):
    best, winner = carry
    index, primitive = item
    enter, leave = _interval(primitive, origin, ray)
    hit = (enter < leave) & (enter > NEAR) & (enter < best)
    hit &= primitive[0] > 0
    return (jnp.where(hit, enter, best), jnp.where(hit, index, winner)), None

  index = jnp.arange(len(scene["primitive_shape"]), dtype=jnp.int32)
  start = (shell, jnp.full(shell.shape, -1, jnp.int32))
  # A scan, not a loop: unrolled, XLA fuses the running minimum into every
  # later step and computes it again there.
  (depth, winner), _ = jax.lax.scan(step, start, (index, _primitives(scene)))
  return depth, winner


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


def _surface(scene, point, winner, wall) -> dict:
  """Normal, colour and object at the points that are seen."""
  at = jnp.maximum(winner, 0)
  cos, sin = jnp.cos(scene["primitive_yaw"]), jnp.sin(scene["primitive_yaw"])
  # One gather of a row per pixel instead of one per parameter.
  table = jnp.concatenate(
    [
      scene["primitive_center"],
      1 / scene["primitive_half"],
      jnp.stack([cos, sin], -1),
      scene["primitive_color"],
      jnp.stack(
        [
          scene["primitive_shape"],
          scene["primitive_texture"],
          scene["primitive_object"],
        ],
        -1,
      ).astype(jnp.float32),
    ],
    -1,
  )
  row = jnp.moveaxis(table[at], -1, 0)
  center, scale, (cos, sin) = row[:3], row[3:6], row[6:8]
  color, (shape, texture, owner) = row[8:11], row[11:14]
  away = [p - c for p, c in zip(point, center, strict=True)]
  lx, ly, lz = (
    cos * away[0] + sin * away[1],
    cos * away[1] - sin * away[0],
    away[2],
  )
  ux, uy, uz = lx * scale[0], ly * scale[1], lz * scale[2]
  ax, ay, az = jnp.abs(ux), jnp.abs(uy), jnp.abs(uz)
  box = shape == BOX
  # A box shows the face of its largest coordinate, a cylinder cap or side.
  face_x = (ax >= ay) & (ax >= az)
  face_y = (ay > ax) & (ay >= az)
  side = ux * ux + uy * uy >= uz * uz
  nx = jnp.where(box, jnp.where(face_x, jnp.sign(ux), 0), ux * scale[0])
  ny = jnp.where(box, jnp.where(face_y, jnp.sign(uy), 0), uy * scale[1])
  nz = jnp.where(
    box, jnp.where(face_x | face_y, 0, jnp.sign(uz)), uz * scale[2]
  )
  cap = (shape == CYLINDER) & ~side
  nx, ny = jnp.where(cap, 0, nx), jnp.where(cap, 0, ny)
  nz = jnp.where((shape == CYLINDER) & side, 0, nz)
  length = jnp.sqrt(jnp.maximum(nx * nx + ny * ny + nz * nz, 1e-20))
  nx, ny, nz = nx / length, ny / length, nz / length
  normal = [cos * nx - sin * ny, sin * nx + cos * ny, nz]
  factor = textures.object_factor(texture, (lx, ly, lz), at)
  shell_normal, shell_color = _shell_surface(scene, point, wall)
  seen = winner >= 0
  color = jnp.stack(
    [
      jnp.where(seen, c * factor, s)
      for c, s in zip(color, shell_color, strict=True)
    ],
    -1,
  )
  return {
    "normal": [
      jnp.where(seen, n, s) for n, s in zip(normal, shell_normal, strict=True)
    ],
    "color": color,
    "object": jnp.where(seen, owner.astype(jnp.int32), -1),
  }


def _shell_surface(scene, point, wall) -> tuple[list, list]:
  """Inward normals and colours of walls, floor and ceiling."""
  start = scene["room_polygon"]
  edge = jnp.roll(start, -1, axis=0) - start
  length = jnp.sqrt(jnp.maximum((edge**2).sum(-1, keepdims=True), 1e-12))
  edge = edge / length
  table = jnp.concatenate([edge, start], -1)  # [8 4]
  ex, ey, x, y = jnp.moveaxis(table[jnp.minimum(wall, WALLS - 1)], -1, 0)
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
  color = [
    jnp.where(
      floor,
      scene["floor_color"][i] * on_floor,
      jnp.where(
        ceiling, scene["ceiling_color"][i], scene["wall_color"][i] * on_wall
      ),
    )
    for i in range(3)
  ]
  return normal, color


def _shaded(scene, point, normal) -> Array:
  """Where something stands between a point and the light."""
  # Off the surface, or it would shade itself.
  start = tuple(p + 2e-3 * n for p, n in zip(point, normal, strict=True))
  ray = tuple(jnp.full((1, 1, 1), v) for v in LIGHT)

  def step(dark, primitive):
    enter, leave = _interval(primitive, start, ray)
    hit = (enter < leave) & (leave > 0) & (primitive[0] > 0)
    return dark | hit, None

  dark = jnp.zeros(point[0].shape, bool)
  return jax.lax.scan(step, dark, _primitives(scene))[0]
