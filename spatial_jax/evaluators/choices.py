# SPDX-License-Identifier: Apache-2.0
"""Letters in answers to multiple-choice questions; CV-Bench and MMVP.

CV-Bench: https://arxiv.org/abs/2406.16860, 2638 questions.
MMVP: https://arxiv.org/abs/2401.06209, 300 questions in pairs.
Outputs are read as Cambrian-1's evaluation does, quirks included: "answer is:"
is cut after "is", so that "The answer is: c" yields ":".

numpy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

# Sources of CV-Bench's questions, and MMVP -> what is cut from an answer's end.
ENDS = {"ADE": ".", "COCO": ".", "Omni3D": ".:,", "MMVP": ".:,"}
REQUEST = "Answer with the option's letter from the given choices directly."


def extract(text: str, source: str) -> str:
  """What an output answers, in lower case: "The answer is (B)." -> "b".

  One letter for CV-Bench, perhaps more for MMVP, whose options may be named.

  Args:
    text: what the model wrote.
    source: a name in `ENDS`.
  """
  if source not in ENDS:
    raise ValueError(f"source {source!r} is unknown; use one of {list(ENDS)}")
  text = text.lower().strip()
  for announced in ("answer is", "answer is:", "answer:"):
    text = text.split(announced)[-1]
  text = text.strip().rstrip(ENDS[source]).lstrip("(").rstrip(")")
  return text if source == "MMVP" else text[:1]


def is_right(text: str, truth: str, source: str, options=()) -> bool:
  """Whether an output chooses the truth, which looks like "(a)".

  Args:
    options: texts of MMVP's options, which may stand for their letters.
  """
  letter = _letter(truth)
  accepted = {letter}
  if options:
    accepted.add(options[ord(letter) - ord("a")].lower())
  return extract(text, source) in accepted


def cv_bench(records: Iterable[Mapping]) -> dict[str, float]:
  """Accuracies in 0..1 of answered questions, ready for JSON.

  A question of each source counts the same; 2D is the mean of ADE and COCO,
  3D is Omni3D, and overall is the mean of 2D and 3D.

  Args:
    records: dicts with `source`, `prediction` and `answer`, and `task` for
      accuracies by task.
  """
  right: dict[str, list[bool]] = {}
  for record in records:
    source = record["source"]
    hit = is_right(record["prediction"], record["answer"], source)
    for name in (source, record.get("task")):
      if name:
        right.setdefault(name, []).append(hit)
  scores = {name: float(np.mean(hits)) for name, hits in right.items()}
  missing = {"ADE", "COCO", "Omni3D"} - scores.keys()
  if missing:
    raise ValueError(
      f"no question is from {sorted(missing)}; CV-Bench's averages need all of "
      f"its sources, got {sorted(scores)}"
    )
  scores["2D"] = (scores["ADE"] + scores["COCO"]) / 2
  scores["3D"] = scores["Omni3D"]
  return scores | {"overall": (scores["2D"] + scores["3D"]) / 2}


def mmvp(records: Sequence[Mapping]) -> float:
  """Percentage of questions in pairs of which both answers are right.

  Args:
    records: dicts with `prediction`, `answer` and `options` (their texts), the
      two of a pair one after the other.
  """
  if not records or len(records) % 2:
    raise ValueError(f"MMVP has pairs of questions, got {len(records)}")
  right = [
    is_right(r["prediction"], r["answer"], "MMVP", r["options"])
    for r in records
  ]
  pairs = np.reshape(right, (-1, 2)).all(axis=1)
  return 100 * float(np.mean(pairs))


def _letter(truth: str) -> str:
  letter = truth.lower()[1:2]
  if not letter.isalpha():
    raise ValueError(f'truth {truth!r} is no letter in brackets, such as "(a)"')
  return letter
