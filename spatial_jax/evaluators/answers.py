# SPDX-License-Identifier: Apache-2.0
"""Answers about 3D scenes: ScanQA's and SQA3D's exact match, ScanRefer's boxes.

Exact match compares answers after the cleaning that LEO introduced and its
successors score with (https://arxiv.org/abs/2311.12871). "Refined" exact match
also accepts an answer that contains the truth or is contained in it, blanks
removed; so an empty answer counts as right there, as in the published scores.
LLaVA-3D's on ScanQA are for questions that end with "Answer the question using
one word or one phrase."
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from spatial_jax.data import llava_3d
from spatial_jax.geometry import boxes
from spatial_jax.types import Float

# Whole words that annotators mistyped, or that are spelt in several ways.
WORDS = {
  "letf": "left",
  "let": "left",
  "tehre": "there",
  "rigth": "right",
  "rght": "right",
  "behine": "behind",
  "tv": "TV",
  "chai": "chair",
  "wasing": "washing",
  "waslked": "walked",
  "oclock": "o'clock",
}
NUMBERS = (
  *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight"),
  *("nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen"),
  *("sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
DIGITS = {str(i): word for i, word in enumerate(NUMBERS)}
DIGITS |= {"none": "zero", "23": "twenty-three"}
# In this order; each is (pattern, replacement) on the lower-case text.
RULES = (
  (r"^ +| +$", ""),
  (r" {2,}", " "),
  (r"[^a-zA-Z0-9,'\s\-:]+", ""),
  *((rf"\b{wrong}\b", right) for wrong, right in WORDS.items()),
  (r"\bo' +clock\b", "o'clock"),
  *((rf"\b{digits}\b", word) for digits, word in DIGITS.items()),
  (r"\b([a-zA-Z]+)[0-9]\b", r"\1"),
  *((rf"\b{article}\b ([a-zA-Z]+)", r"\1") for article in ("a", "an", "the")),
  (r"\bbackwards\b", "backward"),
)
_RULES = tuple((re.compile(pattern), to) for pattern, to in RULES)


def clean(answer: str) -> str:
  """An answer in the form in which it is compared.

  "The 2 chairs." -> "two chairs"
  """
  answer = answer.lower()
  for pattern, to in _RULES:
    answer = pattern.sub(to, answer)
  return answer


def match(answer: str, truths: Sequence[str]) -> tuple[int, int]:
  """(exact, refined) match, 0 or 1, of cleaned texts."""
  if answer in truths:
    return 1, 1
  said = "".join(answer.split())
  for truth in truths:
    truth = "".join(truth.split())
    if said in truth or truth in said:
      return 0, 1
  return 0, 0


def exact_match(
  records: Iterable[Mapping[str, object]],
) -> dict[str, dict[str, float]]:
  """Percentages over all answers and by type.

  Args:
    records: dicts with `answer`, `truths` and, if there is any, `type`.

  Returns:
    {"all" or a type: {"em", "em_refined", "count"}}.
  """
  groups: dict[str, list[tuple[int, int]]] = {"all": []}
  for record in records:
    truths = [clean(truth) for truth in record["truths"]]
    pair = match(clean(str(record["answer"])), truths)
    groups["all"].append(pair)
    if "type" in record:
      groups.setdefault(str(record["type"]), []).append(pair)
  return {
    name: {
      "em": 100 * float(np.mean([exact for exact, _ in pairs])),
      "em_refined": 100 * float(np.mean([refined for _, refined in pairs])),
      "count": len(pairs),
    }
    for name, pairs in groups.items()
    if pairs
  }


def grounding_accuracy(
  answers: Iterable[str],
  truths: Iterable[Float[np.ndarray, " 6"]],
  thresholds: Sequence[float] = (0.25, 0.5),
) -> dict[float, float]:
  """ScanRefer's percentage of answers whose first box overlaps the true one.

  Args:
    truths: centre and edges of each true box.
    thresholds: of intersection over union; more than it is right.
  """
  overlaps = []
  for answer, truth in zip(answers, truths, strict=True):
    found = llava_3d.read_boxes(answer)
    pair = np.stack([found[0], truth]) if len(found) else np.zeros((2, 6))
    low, high = pair[:, :3] - pair[:, 3:] / 2, pair[:, :3] + pair[:, 3:] / 2
    overlaps.append(float(boxes.iou_aligned(low[0], high[0], low[1], high[1])))
  return {t: 100 * float(np.mean(np.array(overlaps) > t)) for t in thresholds}
