# SPDX-License-Identifier: Apache-2.0
"""Questions as tokens, and the geometry a model should hold at each token.

A relational answer is a product of differences behind two attention hops, a
plateau that answers alone hardly leave. The targets below are stepping stones:
where the named object is, at its name; where all objects of the question are,
at its end; the asked angle; whether an option is right, at the option. They
cost no tokens and no inference time, and their heads are dropped at export.

Axes: the first camera's, gravity-aligned: x forward, y left, z up, metres.
numpy only.
"""

from __future__ import annotations

import numpy as np

from spatial_jax.data import text
from spatial_jax.world import questions, vocabulary
from spatial_jax.world import scene as scene_lib

# Channels of the target array. Positions are divided by SCALE to be about one.
SCALE = 2.0
GROUPS = {
  "ground": slice(
    0, 5
  ),  # x, y, z, log longest edge, range; at an object's name
  "gather": slice(5, 11),  # x, y of up to three objects; at the question's end
  "angle": slice(11, 13),  # cos, sin of the asked angle; at the question's end
  "number": slice(13, 14),  # log of the numeric answer; before the answer
  "verify": slice(14, 15),  # is this option right? 0 or 1; at an option's end
  "distance": slice(
    15, 16
  ),  # metres from a choice to the target; at the choice
  "count": slice(16, 17),  # instances of a category; at its name
  "first": slice(17, 18),  # frame in which it first appears; at its name
  "bearing": slice(18, 20),  # forward, left in the asked frame; at its name
}
WIDTH = 20


class RoomFacts:
  """Object positions in the first camera's gravity-aligned axes."""

  def __init__(self, view: questions.View):
    self.view = view
    self.local = to_heading(view.world_from_camera[0], view.center)
    self.single = {int(view.category[i]): int(i) for i in view.single}
    visible = view.visible.any(0)
    self.first = np.where(visible, view.visible.argmax(0), 10**6)

  def ground(self, index: int) -> np.ndarray:
    x, y, z = self.local[index] / SCALE
    longest = np.log(self.view.size[index].max())
    return np.array([x, y, z, longest, np.hypot(x, y)])


def to_heading(pose: np.ndarray, points: np.ndarray) -> np.ndarray:
  """World points [N 3] -> x forward, y left, z up at a camera, level."""
  heading = np.arctan2(pose[1, 2], pose[0, 2])
  cos, sin = np.cos(heading), np.sin(heading)
  x, y, z = (points - pose[:3, 3]).T
  return np.stack([cos * x + sin * y, cos * y - sin * x, z], -1)


class Encoder:
  """Turns a `Question` into ids and per-token targets."""

  def __init__(self, tokenizer: text.Tokenizer):
    self.tokenizer = tokenizer
    self.answer_id = tokenizer.token_id("<|im_start|>")
    self.category = {
      tokenizer.token_id(name): index
      for index, name in enumerate(scene_lib.CATEGORIES)
    }
    lettered = [
      (f"\n{letter}. {word}", word)
      for letter in questions.LETTERS[:4]
      for word in ("", *vocabulary.LETTERED, *vocabulary.CLASHING)
    ]
    self.option_start = {tokenizer.token_id(atom) for atom, _ in lettered}
    self.category |= {
      tokenizer.token_id(atom): scene_lib.CATEGORIES.index(word)
      for atom, word in lettered
      if word in vocabulary.CLASHING
    }
    self.option_stop = tokenizer.token_id(questions.ASK_LETTER)
    self.number_stop = tokenizer.token_id(questions.ASK_NUMBER)
    self.frame = tokenizer.token_id("In frame ")
    self.frame_number = {tokenizer.token_id(str(i)): i for i in range(1, 100)}

  def encode(
    self, question: questions.Question, answer: str | None = None
  ) -> tuple[np.ndarray, int]:
    """Ids i32[n] with the answer, and the position that predicts it."""
    if answer is None:
      answer = question.answer
      if not np.isnan(question.value):
        answer = vocabulary.answer_number(question.type, question.value)
    turns = [
      {"role": "user", "content": question.prompt},
      {"role": "assistant", "content": answer},
    ]
    ids = np.array(self.tokenizer.encode(self.tokenizer.chat(turns)), np.int32)
    return ids, int(np.flatnonzero(ids == self.answer_id)[-1])

  def targets(
    self,
    question: questions.Question,
    ids: np.ndarray,
    answer: int,
    facts: RoomFacts,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Values f32[n WIDTH] and mask bool[n WIDTH]."""
    value = np.zeros((len(ids), WIDTH), np.float32)
    mask = np.zeros((len(ids), WIDTH), bool)

    def put(at, group, numbers):
      numbers = np.atleast_1d(numbers)
      first = GROUPS[group].start
      value[at, first : first + len(numbers)] = numbers
      mask[at, first : first + len(numbers)] = True

    view = facts.view
    starts = [i for i, t in enumerate(ids) if int(t) in self.option_start]
    stop = next(
      i
      for i, t in enumerate(ids)
      if int(t) in (self.option_stop, self.number_stop)
    )
    ends = [*(i - 1 for i in starts[1:]), stop - 1] if starts else []
    # The last token of the question proper, and the one before the answer.
    close = starts[0] - 1 if starts else stop
    kind = question.type
    frame = None
    if int(ids[0]) == self.frame:
      frame = self.frame_number[int(ids[1])] - 1
    for at, token in enumerate(ids[:answer]):
      category = self.category.get(int(token))
      if category is None:
        continue
      if kind == "object_counting":
        put(at, "count", view.number[category] / SCALE)
        continue
      index = facts.single.get(category)
      if index is not None:
        put(at, "ground", facts.ground(index))
        if frame is not None:
          x, _, z = view.in_camera(frame, view.center[[index]])[0]
          put(at, "bearing", np.array([z, -x]) / SCALE)
      if kind == "obj_appearance_order":
        first = facts.first[view.category == category].min()
        put(at, "first", first / SCALE)
    letter = questions.LETTERS.find(question.answer)
    for number, at in enumerate(ends):
      put(at, "verify", float(number == letter))
      if kind == "object_rel_distance":
        name = scene_lib.CATEGORIES[self.category[int(ids[at])]]
        put(at, "distance", question.facts["option_distance"][name] / SCALE)
    for at in (close, answer):
      if question.objects:
        put(
          at,
          "gather",
          facts.local[list(question.objects), :2].ravel()[:6] / SCALE,
        )
      if "angle" in question.facts:
        angle = question.facts["angle"]
        put(at, "angle", [np.cos(angle), np.sin(angle)])
    if not np.isnan(question.value):
      put(stop, "number", np.log(max(question.value, 0.1)))
      put(answer, "number", np.log(max(question.value, 0.1)))
    return value, mask
