# SPDX-License-Identifier: Apache-2.0
"""Questions with exact answers about a room seen in a few frames.

The eight VSI-Bench tasks in the benchmark's wording, answer format and
definitions (arXiv 2412.14171, section 3), and questions asked from a camera:
left/right, front/behind, nearer, depth at a point, and grounding.

Rules that hold for every type:

- Nothing is asked that the frames don't show: an object counts as visible in a
  frame when it covers `MIN_COVER` of it, and "not yet seen" means no pixel.
- Objects named in a question are the only one of their category in the room,
  except in counting. Positions are box centres seen from above; distances are
  between the closest points of two upright boxes, in metres.
- A blind reader can't profit: directions and routes are asked only in rooms
  that offer every class, then the class is drawn first; numbers are drawn
  log-uniformly; options are shuffled.
- A question depends on the room, the frames and the generator it is given,
  never on questions asked before.

numpy only: data workers call this.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable

import numpy as np

from spatial_jax.geometry import boxes
from spatial_jax.world import scene as scene_lib

# Share of a frame that an object must cover to count as visible: 16 of 64x64
# pixels, about the size at which a person still names it.
MIN_COVER = 1 / 256
DIRECTIONS = {
  "object_rel_direction_easy": ("left", "right"),
  "object_rel_direction_medium": ("left", "right", "back"),
  "object_rel_direction_hard": (
    "front-left",
    "front-right",
    "back-left",
    "back-right",
  ),
}
TURNS = {"left": "Turn Left", "right": "Turn Right", "back": "Turn Back"}
THETAS = np.linspace(0.5, 0.95, 10)

PREAMBLE = "These are frames of a video.\n"
ASK_NUMBER = "\nPlease answer the question using a single word or phrase."
ASK_LETTER = (
  "\nAnswer with the option's letter from the given choices directly."
)
LETTERS = "ABCDEFGH"


@dataclasses.dataclass(frozen=True)
class Question:
  """One question.

  Attributes:
    type: VSI-Bench's name of the task, or one of `CAMERA_TYPES`.
    text: the question without options and post-prompt.
    answer: a letter when there are options, else the number or box as text.
    options: the choices as "A. left"; empty for open answers.
    value: the exact number of a numeric question, else nan.
    objects: indices of the objects the answer is about, in the order named.
    facts: geometry behind the answer, for auxiliary targets: `angle` (radians,
      counter-clockwise seen from above), `option_distance` (metres).
  """

  type: str
  text: str
  answer: str
  options: tuple[str, ...] = ()
  value: float = float("nan")
  objects: tuple[int, ...] = ()
  facts: dict = dataclasses.field(default_factory=dict)

  @property
  def prompt(self) -> str:
    """Question, options and post-prompt as VSI-Bench's runner joins them."""
    if not self.options:
      return self.text + ASK_NUMBER
    return "\n".join([self.text, "Options:", *self.options]) + ASK_LETTER

  def asdict(self) -> dict:
    """JSON-ready: the columns of VSI-Bench's table."""
    truth = self.answer if np.isnan(self.value) else self.value
    return {
      "question_type": self.type,
      "question": self.text,
      "options": list(self.options) or None,
      "ground_truth": truth,
    }


class View:
  """What the questions need to know of one room and its frames.

  Args:
    scene: arrays of `scene.sample`.
    pixel_counts: int[F O], pixels of each object in each frame.
    world_from_camera: float[F 4 4], OpenCV axes.
    intrinsics: float[3 3], in pixels of an image of `image_size`.
    image_size: (height, width) that the camera questions speak of.
    frame_pixels: pixels per frame behind `pixel_counts`.
    every_class: directions and turns are asked only where the room offers every
      class, which balances the answers exactly. Real rooms have few objects
      that are the only one of their kind: without it the class is drawn first
      and the question skipped where the room lacks it.
  """

  def __init__(
    self,
    scene: dict[str, np.ndarray],
    pixel_counts: np.ndarray,
    world_from_camera: np.ndarray,
    intrinsics: np.ndarray,
    image_size: tuple[int, int],
    frame_pixels: int,
    every_class: bool = True,
  ):
    self.scene = scene
    self.every_class = every_class
    self.category = np.asarray(scene["object_category"])
    self.center = np.asarray(scene["object_center"], np.float64)
    self.size = np.asarray(scene["object_size"], np.float64)
    self.yaw = np.asarray(scene["object_yaw"], np.float64)
    self.world_from_camera = np.asarray(world_from_camera, np.float64)
    self.intrinsics = np.asarray(intrinsics, np.float64)
    self.image_size = image_size
    self.seen = pixel_counts > 0  # [F O]
    self.visible = pixel_counts >= MIN_COVER * frame_pixels
    real = self.category >= 0
    # Doors and windows have no floor footprint to stand by or walk to.
    real &= self.category < scene_lib.FURNITURE
    found, number = np.unique(self.category[real], return_counts=True)
    self.number = dict(zip(found.tolist(), number.tolist(), strict=True))
    once = np.array([self.number.get(int(c), 0) == 1 for c in self.category])
    self.single = np.flatnonzero(real & once & self.visible.any(0))
    self.real = real

  def name(self, index) -> str:
    return scene_lib.CATEGORIES[int(self.category[index])]

  def distance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Closest-point distance in metres of objects `a` and `b` (indices)."""
    return boxes.upright_distance(
      self.center[a],
      self.size[a],
      self.yaw[a],
      self.center[b],
      self.size[b],
      self.yaw[b],
    )

  def in_camera(self, frame: int, points: np.ndarray) -> np.ndarray:
    """World points [N 3] -> camera axes of `frame` (OpenCV, metres)."""
    pose = self.world_from_camera[frame]
    return (points - pose[:3, 3]) @ pose[:3, :3]


def choice(
  rng: np.random.Generator, kind: str, text: str, right: str, wrong, **more
) -> Question:
  """Question with shuffled lettered options, of which `right` is correct."""
  words = [right, *wrong]
  words = [words[i] for i in rng.permutation(len(words))]
  options = tuple(f"{LETTERS[i]}. {w}" for i, w in enumerate(words))
  answer = LETTERS[words.index(right)]
  return Question(kind, text, answer, options, **more)


def ask_count(view: View, rng: np.random.Generator):
  # Rooms hold far more categories once than often; these weights make the
  # answers 1..5 about equally frequent in `scene.SIMPLE` rooms.
  weight = {1: 0.05, 2: 0.8, 3: 1.0, 4: 1.8, 5: 2.2}
  found = [
    (c, n)
    for c, n in view.number.items()
    if view.visible[:, view.category == c].any(0).all()
  ]
  if not found:
    return None
  p = np.array([weight.get(n, 2.2) for _, n in found])
  if rng.random() > min(1.0, p.sum()):
    return None
  category, number = found[rng.choice(len(found), p=p / p.sum())]
  text = f"How many {scene_lib.CATEGORIES[category]}(s) are in this room?"
  return Question("object_counting", text, str(number), value=float(number))


def log_uniform_pick(
  rng: np.random.Generator, values: np.ndarray, low: float, high: float
) -> int:
  """Index of the value nearest to a log-uniform draw between the bounds."""
  target = rng.uniform(np.log(low), np.log(high))
  return int(np.argmin(np.abs(np.log(np.maximum(values, 1e-3)) - target)))


def ask_distance(view: View, rng: np.random.Generator):
  pairs = np.array(list(itertools.permutations(view.single, 2)), int)
  if not len(pairs):
    return None
  pairs = pairs[rng.permutation(len(pairs))[:24]]
  far = view.distance(pairs[:, 0], pairs[:, 1])
  pairs, far = pairs[far >= 0.25], far[far >= 0.25]
  if not len(pairs):
    return None
  best = log_uniform_pick(rng, far, 0.3, 6.0)
  a, b = pairs[best].tolist()
  text = (
    "Measuring from the closest point of each object, what is the distance "
    f"between the {view.name(a)} and the {view.name(b)} (in meters)?"
  )
  value = round(float(far[best]), 1)
  return Question(
    "object_abs_distance", text, f"{value:.1f}", value=value, objects=(a, b)
  )


def ask_size(view: View, rng: np.random.Generator):
  if not len(view.single):
    return None
  longest = view.size[view.single].max(-1)
  best = log_uniform_pick(rng, longest, 0.2, 3.0)
  a = int(view.single[best])
  value = float(np.round(100 * longest[best]))
  text = (
    "What is the length of the longest dimension (length, width, or height) "
    f"of the {view.name(a)}, measured in centimeters?"
  )
  return Question(
    "object_size_estimation", text, f"{value:.0f}", value=value, objects=(a,)
  )


def ask_room(view: View, rng: np.random.Generator):
  del rng
  value = round(float(view.scene["room_size"]), 1)
  text = (
    "What is the size of this room (in square meters)? If multiple rooms are "
    "shown, estimate the size of the combined space."
  )
  return Question("room_size_estimation", text, f"{value:.1f}", value=value)


def ask_relative_distance(view: View, rng: np.random.Generator):
  # Four choices as in the benchmark; three where the room offers no more.
  order = rng.permutation(view.single)
  choices = min(4, len(order) - 1)
  if choices < 3:
    return None
  for target in order:
    rest = order[order != target]
    far = view.distance(rest, np.full(len(rest), target))
    picks = rng.permutation(len(rest))[:choices]
    picks = picks[np.argsort(far[picks])]
    if far[picks[1]] - far[picks[0]] < 0.3:
      continue
    names = [view.name(rest[i]) for i in picks]
    listed = ", ".join(names[i] for i in rng.permutation(len(names)))
    text = (
      "Measuring from the closest point of each object, which of these "
      f"objects ({listed}) is the closest to the {view.name(target)}?"
    )
    far_by_name = dict(zip(names, far[picks].tolist(), strict=True))
    return choice(
      rng,
      "object_rel_distance",
      text,
      names[0],
      names[1:],
      objects=(int(target),),
      facts={"option_distance": far_by_name},
    )
  return None


def turn_angle(to_first, to_second) -> np.ndarray:
  """Signed angle (radians, left positive) from `to_first` to `to_second`."""
  cross = to_first[..., 0] * to_second[..., 1]
  cross -= to_first[..., 1] * to_second[..., 0]
  return np.arctan2(cross, (to_first * to_second).sum(-1))


def direction_class(kind: str, degrees: np.ndarray) -> np.ndarray:
  """Class index of `DIRECTIONS[kind]` by signed angle; -1 = too close to call.

  Margins: easy 20..160 degrees, medium at least 30 and 10 away from 135, hard
  12 away from every quadrant border.
  """
  left, size = degrees > 0, np.abs(degrees)
  if kind == "object_rel_direction_easy":
    return np.where((size > 20) & (size < 160), np.where(left, 0, 1), -1)
  if kind == "object_rel_direction_medium":
    side = np.where((size >= 30) & (size < 125), np.where(left, 0, 1), -1)
    return np.where(size > 145, 2, side)
  sharp = np.abs((size + 45) % 90 - 45) >= 12
  index = np.where(size < 90, 0, 2) + np.where(left, 0, 1)
  return np.where(sharp, index, -1)


def triples(view: View, rng: np.random.Generator, least: float = 0.8):
  """Triples (A, B, C) of single objects, legs >= `least` m, shuffled."""
  got = np.array(list(itertools.permutations(view.single, 3)), int)
  if not len(got):
    return got.reshape(0, 3)
  got = got[rng.permutation(len(got))[:512]]
  xy = view.center[:, :2]
  ab = np.linalg.norm(xy[got[:, 1]] - xy[got[:, 0]], axis=-1)
  ac = np.linalg.norm(xy[got[:, 2]] - xy[got[:, 0]], axis=-1)
  bc = np.linalg.norm(xy[got[:, 2]] - xy[got[:, 1]], axis=-1)
  return got[(ab >= least) & (ac >= least) & (bc >= 0.4)]


def balanced(
  view: View, rng: np.random.Generator, classes: np.ndarray, number: int
) -> int | None:
  """Index of an item of a class drawn uniformly, or None; see `View`."""
  there = [(classes == c).any() for c in range(number)]
  drawn = rng.integers(number)
  if not (all(there) if view.every_class else there[drawn]):
    return None
  return int(rng.choice(np.flatnonzero(classes == drawn)))


def ask_direction(kind: str) -> Callable:
  words = DIRECTIONS[kind]
  tails = {
    "object_rel_direction_easy": " to the left or the right of the {b}?",
    "object_rel_direction_medium": (
      " to my left, right, or back?\nAn object is to my back if I would have "
      "to turn at least 135 degrees in order to face it."
    ),
    "object_rel_direction_hard": (
      " to my front-left, front-right, back-left, or back-right?\nThe "
      "directions refer to the quadrants of a Cartesian plane (if I am "
      "standing at the origin and facing along the positive y-axis)."
    ),
  }

  def ask(view: View, rng: np.random.Generator):
    abc = triples(view, rng)
    xy = view.center[:, :2]
    a, b, c = abc.T
    angle = turn_angle(xy[b] - xy[a], xy[c] - xy[a])
    classes = direction_class(kind, np.degrees(angle))
    best = balanced(view, rng, classes, len(words))
    if best is None:
      return None
    a, b, c = abc[best].tolist()
    text = (
      f"If I am standing by the {view.name(a)} and facing the {view.name(b)}, "
      f"is the {view.name(c)}" + tails[kind].format(b=view.name(b))
    )
    right = words[classes[best]]
    wrong = [w for w in words if w != right]
    facts = {"angle": float(angle[best])}
    return choice(rng, kind, text, right, wrong, objects=(a, b, c), facts=facts)

  return ask


def turn_class(degrees: np.ndarray) -> np.ndarray:
  """0 left, 1 right, 2 back, -1 unclear, by heading change in degrees."""
  size = np.abs(degrees)
  side = np.where((size >= 55) & (size < 125), np.where(degrees > 0, 0, 1), -1)
  return np.where(size > 145, 2, side)


def ask_route(view: View, rng: np.random.Generator, blanks: int = 1):
  """A walk A -> B -> C ...: which turn fills each blank?"""
  words = ("left", "right", "back")
  abc = triples(view, rng)
  xy = view.center[:, :2]
  a, b, c = abc.T
  angle = turn_angle(xy[b] - xy[a], xy[c] - xy[b])
  classes = turn_class(np.degrees(angle))
  best = balanced(view, rng, classes, 3)
  if best is None:
    return None
  stops, turns = abc[best].tolist(), [words[classes[best]]]
  while len(turns) < blanks:  # lengthen the walk by one clear turn
    rest = [i for i in view.single if i not in stops]
    last = xy[stops[-1]]
    further = np.array([xy[i] - last for i in rest]).reshape(-1, 2)
    heading = np.broadcast_to(last - xy[stops[-2]], further.shape)
    kinds = turn_class(np.degrees(turn_angle(heading, further)))
    kinds = np.where(np.linalg.norm(further, axis=-1) >= 0.8, kinds, -1)
    if not (kinds >= 0).any():
      return None
    pick = int(rng.choice(np.flatnonzero(kinds >= 0)))
    stops.append(int(rest[pick]))
    turns.append(words[kinds[pick]])
  steps = [f"Go forward until the {view.name(stops[1])}"]
  for stop in stops[2:]:
    steps += ["[please fill in]", f"Go forward until the {view.name(stop)}"]
  listed = " ".join(f"{i}. {s}" for i, s in enumerate(steps, 1))
  text = (
    f"You are a robot beginning at the {view.name(stops[0])} facing the "
    f"{view.name(stops[1])}. You want to navigate to the "
    f"{view.name(stops[-1])}. You will perform the following actions (Note: "
    "for each [please fill in], choose either 'turn back,' 'turn left,' or "
    f"'turn right.'): {listed}. You have reached the final destination."
  )
  right = ", ".join(TURNS[t] for t in turns)
  every = itertools.product(TURNS.values(), repeat=len(turns))
  wrong = [w for w in (", ".join(t) for t in every) if w != right]
  wrong = [wrong[i] for i in rng.permutation(len(wrong))[:3]]
  facts = {"angle": float(angle[best])} if len(turns) == 1 else {}
  return choice(
    rng,
    "route_planning",
    text,
    right,
    wrong,
    objects=tuple(stops[:3]),
    facts=facts,
  )


def ask_order(view: View, rng: np.random.Generator):
  """Order of first appearance of three or four categories."""
  first_visible = np.where(view.visible.any(0), view.visible.argmax(0), 10**6)
  first_seen = np.where(view.seen.any(0), view.seen.argmax(0), -1)
  start: dict[int, int] = {}
  for c in view.number:
    member = view.category == c
    frame = int(first_visible[member].min())
    # A few pixels in an earlier frame would make the order a matter of taste.
    glimpses = first_seen[member]
    if frame < 10**6 and (glimpses[glimpses >= 0] >= frame).all():
      start[c] = frame
  by_frame: dict[int, list[int]] = {}
  for c, frame in start.items():
    by_frame.setdefault(frame, []).append(c)
  if len(by_frame) < 3:
    return None
  frames = sorted(rng.permutation(sorted(by_frame))[:4].tolist())
  names = [
    scene_lib.CATEGORIES[int(rng.choice(sorted(by_frame[f])))] for f in frames
  ]
  listed = ", ".join(names[i] for i in rng.permutation(len(names)))
  text = (
    "What will be the first-time appearance order of the following categories "
    f"in the video: {listed}?"
  )
  every = [", ".join(p) for p in itertools.permutations(names)]
  wrong = [every[i] for i in 1 + rng.permutation(len(every) - 1)[:3]]
  return choice(rng, "obj_appearance_order", text, every[0], wrong)


ASK: dict[str, Callable[[View, np.random.Generator], Question | None]] = {
  "object_counting": ask_count,
  "object_abs_distance": ask_distance,
  "object_size_estimation": ask_size,
  "room_size_estimation": ask_room,
  "object_rel_distance": ask_relative_distance,
  **{kind: ask_direction(kind) for kind in DIRECTIONS},
  "route_planning": ask_route,
  "obj_appearance_order": ask_order,
}
VSI_TYPES = tuple(ASK)


def generate(
  view: View, rng: np.random.Generator, number: dict[str, int]
) -> list[Question]:
  """Up to `number[type]` different questions of each type, in random order."""
  from spatial_jax.world import camera_questions

  ask = {**ASK, **camera_questions.ASK}
  unknown = set(number) - set(ask)
  if unknown:
    raise ValueError(
      f"unknown question types {sorted(unknown)}; known: {sorted(ask)}"
    )
  questions: dict[str, Question] = {}
  for kind, wanted in number.items():
    for _ in range(wanted):
      question = ask[kind](view, rng)
      if question is not None:
        questions.setdefault(question.text, question)
  found = list(questions.values())
  return [found[i] for i in rng.permutation(len(found))]


def chance(questions: Iterable[Question]) -> dict[str, float]:
  """Chance level (0..1) by type: what needs no look at the question's room.

  With options: one over their number. Numbers: the mean relative accuracy of
  the best constant answer. Grounding: 0.
  """
  groups: dict[str, list[Question]] = {}
  for question in questions:
    groups.setdefault(question.type, []).append(question)
  level = {}
  for kind, group in groups.items():
    if group[0].options:
      level[kind] = float(np.mean([1 / len(q.options) for q in group]))
      continue
    gold = np.array([q.value for q in group])
    if np.isnan(gold).any():
      level[kind] = 0.0
      continue
    error = np.abs(np.unique(gold)[:, None] - gold) / gold
    hits = error[..., None] <= 1 - THETAS + 1e-9
    level[kind] = float(hits.mean((-1, -2)).max())
  return level
