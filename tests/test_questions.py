# SPDX-License-Identifier: Apache-2.0
"""Answers recomputed from the question's text by other means."""

import collections
import re

import numpy as np
import pytest

from spatial_jax.data import text
from spatial_jax.geometry import camera
from spatial_jax.world import (
  camera_questions,
  cameras,
  questions,
  targets,
  visibility,
  vocabulary,
)
from spatial_jax.world import scene as scene_lib

SIZE = 96
K = camera.intrinsics(SIZE, SIZE, 100.0)
EVERY = dict.fromkeys((*questions.ASK, *camera_questions.ASK), 2)


def view(index: int, split: str = "test", **kwargs) -> questions.View:
  scene = scene_lib.sample(5, split, index, **(scene_lib.SIMPLE | kwargs))
  rng = np.random.default_rng([5, index])
  poses = cameras.turntable(scene, rng, 4)
  counts = visibility.pixel_counts(scene, poses, K)
  return questions.View(
    scene, counts, poses, K, (SIZE, SIZE), visibility.GRID**2
  )


@pytest.fixture(scope="module")
def asked():
  """(view, question) of many rooms, all types."""
  out = []
  for index in range(120):
    v = view(index)
    rng = np.random.default_rng([6, index])
    out += [(v, q) for q in questions.generate(v, rng, EVERY)]
  return out


def of(asked, *kinds):
  found = [(v, q) for v, q in asked if q.type in kinds]
  assert found
  return found


def spot(v: questions.View, name: str) -> complex:
  """Place of a uniquely named object, as a complex number seen from above."""
  index = [
    i
    for i, c in enumerate(v.category)
    if scene_lib.CATEGORIES[c] == name and c >= 0
  ]
  assert len(index) == 1, name
  return complex(*v.center[index[0], :2])


def chosen(q: questions.Question) -> str:
  return q.options["ABCD".index(q.answer)][3:]


NAMES = "|".join(sorted(scene_lib.CATEGORIES, key=len, reverse=True))


def named(q: questions.Question) -> list[str]:
  return re.findall(rf"\b(?:{NAMES})\b", q.text)


def test_directions_follow_the_benchmarks_definitions(asked):
  kinds = tuple(questions.DIRECTIONS)
  for v, q in of(asked, *kinds):
    a, b, c = (spot(v, n) for n in named(q)[:3])
    turn = np.degrees(np.angle((c - a) / (b - a)))
    side = "left" if turn > 0 else "right"
    if q.type.endswith("easy"):
      expected = side
    elif q.type.endswith("medium"):
      expected = "back" if abs(turn) >= 135 else side
    else:
      expected = ("front-" if abs(turn) < 90 else "back-") + side
    assert chosen(q) == expected


def test_route_turns_lead_from_stop_to_stop(asked):
  for v, q in of(asked, "route_planning"):
    steps = re.findall(rf"Go forward until the ({NAMES})", q.text)
    start = re.search(rf"beginning at the ({NAMES}) facing", q.text)[1]
    a, b, c = (spot(v, n) for n in (start, *steps))
    turn = np.degrees(np.angle((c - b) / (b - a)))
    side = "Turn Left" if turn > 0 else "Turn Right"
    assert chosen(q) == ("Turn Back" if abs(turn) > 135 else side)


def test_longer_routes_list_one_turn_per_blank():
  found = 0
  for index in range(60):
    rng = np.random.default_rng(index)
    q = questions.ask_route(view(index), rng, blanks=2)
    if q is None:
      continue
    found += 1
    assert q.text.count("[please fill in]") == 3  # one in the explanation
    assert all(o.count("Turn") == 2 for o in q.options)
    assert len(set(q.options)) == 4
  assert found > 5


def surface(v: questions.View, index: int, n: int = 21) -> np.ndarray:
  """A grid of points filling an object's upright box, edges included."""
  axes = np.linspace(-0.5, 0.5, n)
  grid = np.stack(np.meshgrid(axes, axes, axes), -1).reshape(-1, 3)
  local = grid * v.size[index]
  turn = np.exp(1j * v.yaw[index]) * (local[:, 0] + 1j * local[:, 1])
  return np.stack([turn.real, turn.imag, local[:, 2]], -1) + v.center[index]


def test_distances_are_between_the_closest_points(asked):
  from scipy.spatial import cKDTree

  for v, q in of(asked, "object_abs_distance")[:40]:
    a, b = (surface(v, i) for i in q.objects)
    brute = cKDTree(a).query(b)[0].min()
    # The grid can only be further apart than the boxes, by its spacing.
    spacing = max(np.abs(v.size[i]).max() for i in q.objects) / 20
    assert q.value - 0.051 <= brute <= q.value + 0.051 + spacing
    assert q.answer == f"{q.value:.1f}"


def test_counts_and_sizes_and_areas_are_the_scenes(asked):
  for v, q in of(asked, "object_counting"):
    name = re.search(r"How many (.*)\(s\)", q.text)[1]
    index = scene_lib.CATEGORIES.index(name)
    assert q.answer == str(int((v.category == index).sum()))
  for v, q in of(asked, "object_size_estimation"):
    assert float(q.answer) == round(100 * v.size[q.objects[0]].max())
  for v, q in of(asked, "room_size_estimation"):
    low, high = v.scene["room_polygon"].min(0), v.scene["room_polygon"].max(0)
    assert abs(q.value - np.prod(high - low)) < 0.06  # these rooms are boxes


def test_the_closest_choice_is_clearly_closest(asked):
  for v, q in of(asked, "object_rel_distance"):
    target = named(q)[-1]
    centre = {n: i for i in v.single for n in [v.name(i)]}
    far = {
      o[3:]: v.distance(np.array([centre[o[3:]]]), np.array([centre[target]]))[
        0
      ]
      for o in q.options
    }
    order = sorted(far, key=far.get)
    assert chosen(q) == order[0]
    assert far[order[1]] - far[order[0]] >= 0.3


def ids_of(v: questions.View) -> np.ndarray:
  import jax

  from spatial_jax.world import render

  draw = jax.jit(render.render, static_argnums=(3, 4))
  got = draw(v.scene, v.world_from_camera.astype(np.float32), K, SIZE, SIZE)
  return np.asarray(got["object"])


def test_nothing_is_asked_that_the_rendered_frames_do_not_show(asked):
  rendered = {}
  for v, q in asked[:400]:
    ids = rendered.setdefault(id(v), None)
    if ids is None:
      ids = rendered[id(v)] = ids_of(v)
    shown = set(np.unique(ids)) - {-1}
    for index in q.objects:
      assert int(index) in shown, (q.text, index)
    if q.type == "obj_appearance_order":
      first = {
        name: min(
          f for f in range(4) if (v.category[ids[f][ids[f] >= 0]] == c).any()
        )
        for name, c in ((n, scene_lib.CATEGORIES.index(n)) for n in named(q))
      }
      order = [first[n] for n in chosen(q).split(", ")]
      assert order == sorted(set(order)), q.text


def test_camera_answers_agree_with_the_projection(asked):
  for v, q in of(asked, "camera_left_right", "camera_front_behind"):
    frame = int(re.search(r"frame (\d)", q.text)[1]) - 1
    at = v.in_camera(frame, v.center[list(q.objects)])
    pixel = at @ K.T.astype(float)
    x, depth = pixel[:, 0] / pixel[:, 2], at[:, 2]
    if q.type == "camera_left_right":
      assert chosen(q) == ("left" if x[0] < x[1] else "right")
    else:
      assert chosen(q) == ("in front" if depth[0] < depth[1] else "behind")
  for v, q in of(asked, "camera_nearer"):
    frame = int(re.search(r"frame (\d)", q.text)[1]) - 1
    here = v.world_from_camera[frame, :3, 3]
    far = np.linalg.norm(v.center[list(q.objects)] - here, axis=-1)
    assert chosen(q) == v.name(q.objects[int(far.argmin())])


def test_depth_at_a_point_is_the_renderers(asked):
  import jax

  from spatial_jax.world import render

  draw = jax.jit(render.render, static_argnums=(3, 4))
  for v, q in of(asked, "camera_depth")[:12]:
    frame, x, y = (
      int(n)
      for n in re.search(r"frame (\d).*\((\d+), (\d+)\)", q.text).groups()
    )
    got = draw(v.scene, v.world_from_camera.astype(np.float32), K, SIZE, SIZE)
    assert abs(float(got["depth"][frame - 1, y, x]) - q.value) <= 0.0501


def test_grounding_boxes_hold_the_objects_pixels(asked):
  for v, q in of(asked, "grounding_image")[:12]:
    frame = int(re.search(r"frame (\d)", q.text)[1]) - 1
    x1, y1, x2, y2 = (int(n) for n in re.findall(r"-?\d+", q.answer))
    ys, xs = np.nonzero(ids_of(v)[frame] == q.objects[0])
    assert xs.min() >= x1 - 1 and xs.max() <= x2 + 1
    assert ys.min() >= y1 - 1 and ys.max() <= y2 + 1
  for v, q in of(asked, "grounding_room")[:12]:
    x, y, z, length, width, height, _ = (
      float(n) for n in re.findall(r"-?\d+\.\d+", q.answer)
    )
    local = targets.RoomFacts(v).local[q.objects[0]]
    np.testing.assert_allclose([x, y, z], local, atol=0.006)
    np.testing.assert_allclose(
      [length, width, height], v.size[q.objects[0]], atol=0.006
    )


def test_letters_and_classes_are_balanced():
  """A blind reader gains nothing: 400 rooms, 4 sigma."""
  letters = collections.defaultdict(collections.Counter)
  classes = collections.defaultdict(collections.Counter)
  kinds = [*questions.DIRECTIONS, "route_planning", "camera_left_right"]
  for index in range(400):
    rng = np.random.default_rng([9, index])
    for q in questions.generate(
      view(index), rng, dict.fromkeys([*kinds, "object_rel_distance"], 1)
    ):
      letters[q.type, len(q.options)][q.answer] += 1
      if q.type in kinds:
        classes[q.type][chosen(q)] += 1
  for counter in (*letters.values(), *classes.values()):
    n, k = sum(counter.values()), max(len(counter), 2)
    for count in counter.values():
      assert abs(count - n / k) < 4 * np.sqrt(n * (k - 1)) / k, counter


def test_questions_depend_on_the_room_and_the_generator_only():
  first = questions.generate(view(3), np.random.default_rng(1), EVERY)
  again = questions.generate(view(3), np.random.default_rng(1), EVERY)
  assert [q.prompt for q in first] == [q.prompt for q in again]


def test_chance_is_one_over_options_or_the_best_constant():
  items = [
    questions.Question("x", "", "A", ("A. left", "B. right")),
    questions.Question("x", "", "A", ("A. a", "B. b", "C. c", "D. d")),
    questions.Question("y", "", "2", value=2.0),
    questions.Question("y", "", "4", value=4.0),
  ]
  got = questions.chance(items)
  assert got["x"] == pytest.approx((1 / 2 + 1 / 4) / 2)
  # Answering 2: all right for 2 (1.0); for 4 the error is 0.5: 1 threshold.
  assert got["y"] == pytest.approx((1.0 + 0.1) / 2)


def test_unknown_types_are_named():
  with pytest.raises(ValueError, match="object_countin"):
    questions.generate(view(0), np.random.default_rng(0), {"object_countin": 1})


def test_the_shipped_tokenizer_is_the_one_the_templates_make():
  shipped = text.Tokenizer.load()
  assert shipped.backend.to_str() == vocabulary.build().to_str()


def test_answers_are_one_token_and_text_round_trips(asked):
  tokenizer = text.Tokenizer.load()
  encoder = targets.Encoder(tokenizer)
  for _, q in asked[:300]:
    ids, answer = encoder.encode(q)
    assert q.prompt in tokenizer.decode(ids)
    if q.type in questions.VSI_TYPES:
      assert len(ids) == answer + 3  # the answer and the end of turn


def test_targets_stand_at_the_tokens_they_are_about(asked):
  tokenizer = text.Tokenizer.load()
  encoder = targets.Encoder(tokenizer)
  for v, q in asked[:400]:
    ids, answer = encoder.encode(q)
    value, mask = encoder.targets(q, ids, answer, targets.RoomFacts(v))
    if q.options:
      verify = mask[:, targets.GROUPS["verify"]][:, 0]
      right = value[verify][:, targets.GROUPS["verify"].start]
      assert len(right) == len(q.options)
      assert right.argmax() == "ABCD".index(q.answer) and right.sum() == 1
    if "angle" in q.facts:
      angle = value[answer, targets.GROUPS["angle"]]
      np.testing.assert_allclose(
        np.arctan2(angle[1], angle[0]), q.facts["angle"], atol=1e-5
      )
    for at in np.flatnonzero(mask[:, targets.GROUPS["ground"].start]):
      word = tokenizer.decode([ids[at]]).split(". ")[-1]
      index = next(i for i in v.single if v.name(i) == word)
      place = 2 * value[at, :2]  # forward, left of the first camera
      pose = v.world_from_camera[0]
      heading = pose[:2, 2] / np.linalg.norm(pose[:2, 2])
      away = v.center[index, :2] - pose[:2, 3]
      np.testing.assert_allclose(place[0], away @ heading, atol=1e-4)
      left = np.array([-heading[1], heading[0]])
      np.testing.assert_allclose(place[1], away @ left, atol=1e-4)
