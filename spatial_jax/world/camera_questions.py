# SPDX-License-Identifier: Apache-2.0
"""Questions asked from a camera, and grounding.

Left/right, front/behind, nearer, depth at a point, boxes in the image and in
the room. Frames are numbered from 1 in the text. numpy only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from spatial_jax.world.questions import Question, View, choice

TEXTS = {
  "camera_left_right": (
    "In frame {frame}, is the {a} to the left or the right of the {b}?"
  ),
  "camera_front_behind": (
    "Seen from the camera of frame {frame}, is the {a} in front of or behind "
    "the {b}?"
  ),
}


def pair_in_frame(view: View, rng: np.random.Generator):
  """A frame and two single objects visible in it, or None."""
  for frame in rng.permutation(len(view.visible)):
    shown = view.single[view.visible[frame, view.single]]
    if len(shown) >= 2:
      a, b = rng.permutation(shown)[:2].tolist()
      return int(frame), a, b
  return None


def ask_left_right(view: View, rng: np.random.Generator):
  got = pair_in_frame(view, rng)
  if got is None:
    return None
  frame, a, b = got
  at = view.in_camera(frame, view.center[[a, b]])
  bearing = np.degrees(np.arctan2(at[:, 0], at[:, 2]))  # right of the axis
  if (at[:, 2] <= 0.05).any() or abs(bearing[0] - bearing[1]) < 6:
    return None
  words = ("left", "right") if bearing[0] < bearing[1] else ("right", "left")
  text = TEXTS["camera_left_right"].format(
    frame=frame + 1, a=view.name(a), b=view.name(b)
  )
  return choice(
    rng, "camera_left_right", text, words[0], words[1:], objects=(a, b)
  )


def ask_front_behind(view: View, rng: np.random.Generator):
  got = pair_in_frame(view, rng)
  if got is None:
    return None
  frame, a, b = got
  depth = view.in_camera(frame, view.center[[a, b]])[:, 2]
  if abs(depth[0] - depth[1]) < 0.3:
    return None
  front = depth[0] < depth[1]
  words = ("in front", "behind") if front else ("behind", "in front")
  text = TEXTS["camera_front_behind"].format(
    frame=frame + 1, a=view.name(a), b=view.name(b)
  )
  return choice(
    rng, "camera_front_behind", text, words[0], words[1:], objects=(a, b)
  )


def ask_nearer(view: View, rng: np.random.Generator):
  got = pair_in_frame(view, rng)
  if got is None:
    return None
  frame, a, b = got
  away = view.center[[a, b]] - view.world_from_camera[frame, :3, 3]
  far = np.linalg.norm(away, axis=-1)
  if abs(far[0] - far[1]) < 0.3:
    return None
  near, other = (a, b) if far[0] < far[1] else (b, a)
  text = (
    f"In frame {frame + 1}, which is nearer to the camera, the {view.name(a)} "
    f"or the {view.name(b)}?"
  )
  return choice(
    rng,
    "camera_nearer",
    text,
    view.name(near),
    [view.name(other)],
    objects=(a, b),
  )


def ask_depth(view: View, rng: np.random.Generator):
  """Depth of the centre of an object's front face, where it is unoccluded."""
  from spatial_jax.world import visibility

  height, width = view.image_size
  frame = int(rng.integers(len(view.visible)))
  x, y = rng.uniform(0.1, 0.9, 2) * (width, height)
  x, y = int(x), int(y)
  depth = visibility.depth_at(
    view.scene,
    view.world_from_camera[frame],
    view.intrinsics,
    np.array([[x + 0.5, y + 0.5]]),
  )[0]
  value = round(float(depth), 1)
  text = (
    f"In frame {frame + 1}, what is the depth of the point at pixel ({x}, {y}) "
    "(in meters)?"
  )
  return Question("camera_depth", text, f"{value:.1f}", value=value)


def ask_box_image(view: View, rng: np.random.Generator):
  """Pixel box around the projected corners of an object fully in frame."""
  from spatial_jax.geometry import boxes

  height, width = view.image_size
  for frame in rng.permutation(len(view.visible)):
    for a in rng.permutation(view.single[view.visible[frame, view.single]]):
      corners = boxes.corners(view.center[a], view.size[a], view.yaw[a])
      at = view.in_camera(int(frame), np.asarray(corners).reshape(8, 3))
      if (at[:, 2] < 0.1).any():
        continue
      pixel = (at @ view.intrinsics.T)[:, :2] / at[:, 2:]
      low, high = pixel.min(0), pixel.max(0)
      if (low < 0).any() or (high > (width, height)).any():
        continue
      box = ", ".join(f"{v:.0f}" for v in (*low, *high))
      text = (
        f"Where is the {view.name(a)} in frame {frame + 1}? Give its box as "
        "[x1, y1, x2, y2] in pixels."
      )
      return Question("grounding_image", text, f"[{box}]", objects=(int(a),))
  return None


def ask_box_room(view: View, rng: np.random.Generator):
  """Upright box of an object in the axes of the first camera (z up)."""
  if not len(view.single):
    return None
  a = int(rng.choice(view.single))
  pose = view.world_from_camera[0]
  heading = np.arctan2(pose[1, 2], pose[0, 2])
  cos, sin = np.cos(-heading), np.sin(-heading)
  away = view.center[a] - pose[:3, 3]
  x, y = cos * away[0] - sin * away[1], sin * away[0] + cos * away[1]
  yaw = (view.yaw[a] - heading + np.pi / 2) % np.pi - np.pi / 2
  numbers = (x, y, away[2], *view.size[a], yaw)
  text = (
    f"Where is the {view.name(a)} in the room? Give its box as [x, y, z, "
    "length, width, height, yaw] in meters and radians, seen from the first "
    "camera: x forward, y left, z up."
  )
  answer = ", ".join(f"{v:.2f}" for v in numbers)
  return Question("grounding_room", text, f"[{answer}]", objects=(a,))


ASK: dict[str, Callable[[View, np.random.Generator], Question | None]] = {
  "camera_left_right": ask_left_right,
  "camera_front_behind": ask_front_behind,
  "camera_nearer": ask_nearer,
  "camera_depth": ask_depth,
  "grounding_image": ask_box_image,
  "grounding_room": ask_box_room,
}
