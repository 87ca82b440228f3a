# SPDX-License-Identifier: Apache-2.0
"""LLaVA-3D's text: prompts, points in questions, boxes in answers. numpy only.

Where a question names a place, `<boxes>` stands in the text and a point in the
row's clicks. Boxes in answers are numbers: "[cx, cy, cz, dx, dy, dz]", metres,
three decimals, axis-aligned, in the scan's frame with z up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from spatial_jax.types import Float

SYSTEM = (
  "A chat between a curious human and an artificial intelligence assistant. "
  "The assistant gives helpful, detailed, and polite answers to the human's "
  "questions."
)
IMAGE, POINT = "<image>", "<boxes>"
Turns = Sequence[Sequence[str | None]]  # (question, answer or None)

_LIST = re.compile(r"\[[^\[\]]*\]")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def pieces(turns: Turns, stop: str = "</s>") -> list[tuple[str, bool]]:
  """Texts that follow each other, and whether the assistant says them."""
  out, opening = [], f"{SYSTEM} "
  for question, answer in turns:
    out.append((f"{opening}USER: {question} ASSISTANT:", False))
    if answer is not None:
      out.append((f" {answer}{stop}", True))
    opening = ""
  return out


def prompt(turns: Turns, stop: str = "</s>") -> str:
  """A dialogue in the template "llava_v1"; an answer of None is to be given."""
  return "".join(text for text, _ in pieces(turns, stop))


def to_front(question: str) -> str:
  """The image first, whatever it is called and wherever it stood."""
  question = question.replace("<video>", IMAGE)
  if IMAGE not in question:
    return question
  return f"{IMAGE}\n{question.replace(IMAGE, '').strip()}"


def encode(
  tokenizer: Any,
  turns: Turns,
  *,
  slots: int,
  image_token: int = -200,
  point_token: int = -300,
  start: str = "<s>",
  stop: str = "</s>",
) -> tuple[np.ndarray, np.ndarray]:
  """Ids i32[T] and a mask that is True on what the assistant says.

  Args:
    tokenizer: a `data.text.Tokenizer`.
    slots: image tokens for each `<image>`.
  """
  ids, said = [tokenizer.token_id(start)], [False]
  text, spans = "", []
  for piece, flag in pieces(turns, stop):
    if flag:
      spans.append((len(text), len(text) + len(piece)))
    text += piece
  at = 0
  for part in re.split(f"({IMAGE}|{POINT})", text):
    if part in (IMAGE, POINT):
      new = [image_token] * slots if part == IMAGE else [point_token]
      ids += new
      said += [False] * len(new)
    elif part:
      encoded = tokenizer.backend.encode(part, add_special_tokens=False)
      ids += encoded.ids
      ends = (at + end for _, end in encoded.offsets)
      said += [any(a < end <= b for a, b in spans) for end in ends]
    at += len(part)
  return np.array(ids, np.int32), np.array(said, bool)


# --- points and boxes -------------------------------------------------------


def expand(sentence: str, counts: Sequence[int]) -> str:
  """The k-th `<boxes>` becomes `counts[k]` of them, joined by ", "."""
  parts = sentence.split(POINT)
  if len(parts) != len(counts) + 1:
    raise ValueError(
      f"the text has {len(parts) - 1} {POINT} for {len(counts)} groups of boxes"
    )
  out = parts[0]
  for count, part in zip(counts, parts[1:], strict=True):
    out += ", ".join([POINT] * count) + part
  return out


def click(box: Sequence[float], rng: np.random.Generator) -> np.ndarray:
  """The point f32[3] that stands for a box in training, to 3 decimals.

  Of 6 numbers (centre, edges) a random point inside, of 9 (centre, edges,
  angles) the centre, of 3 the point itself, which the reference can't read.
  """
  box = np.asarray(box, np.float64)
  if box.shape not in ((3,), (6,), (9,)):
    raise ValueError(
      f"a box has the shape {box.shape}, expected 3 numbers (a point), 6 "
      "(centre, edges) or 9 (centre, edges, angles)"
    )
  point = box[:3]
  if len(box) == 6:
    point = point + rng.uniform(-0.5, 0.5, 3) * box[3:]
  return np.round(point, 3).astype(np.float32)


def read_click(question: str) -> tuple[str, Float[np.ndarray, "n 3"]]:
  """A question whose first [x, y, z, ...] became `<boxes>`, and that point.

  "What is at [1.0, 2, 0.5]?" -> ("What is at <boxes>?", [[1, 2, 0.5]])
  """
  for found in _LIST.finditer(question):
    numbers = [float(x) for x in _NUMBER.findall(found[0])]
    if len(numbers) >= 3:
      text = question[: found.start()] + POINT + question[found.end() :]
      return text, np.round([numbers[:3]], 3).astype(np.float32)
  return question, np.zeros((0, 3), np.float32)


def format_box(box: Float[np.ndarray, " 6"]) -> str:
  """A box as answers have it."""
  return "[" + ", ".join(f"{float(x):.3f}" for x in box) + "]"


def read_boxes(answer: str) -> Float[np.ndarray, "n 6"]:
  """All boxes of six numbers in an answer."""
  rows = ([float(x) for x in _NUMBER.findall(m)] for m in _LIST.findall(answer))
  boxes = [row for row in rows if len(row) == 6]
  return np.array(boxes, np.float32).reshape(-1, 6)
