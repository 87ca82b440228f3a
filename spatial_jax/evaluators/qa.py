# SPDX-License-Identifier: Apache-2.0
"""Scores of answers to spatial questions, as VSI-Bench defines them.

Two variants, which differ on borderline answers and on wordy ones:

- `original` (arXiv 2412.14171): the first word of the output without its dot;
  relative error <= 1 - theta in float64.
- `spatial_mllm` (arXiv 2505.23747): the text of the last `<answer>` block, or
  all of it; relative error < 1 - theta in float32.

Multiple choice is exact match of the letter, case aside. Numbers get the mean
relative accuracy: the share of theta in 0.50, 0.55, ..., 0.95 at which the
relative error is small enough. What isn't a number scores 0.

numpy only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from spatial_jax.types import Array, Float

VARIANTS = ("original", "spatial_mllm")
DIRECTIONS = (
  "object_rel_direction_easy",
  "object_rel_direction_medium",
  "object_rel_direction_hard",
)
MULTIPLE_CHOICE = (
  *DIRECTIONS,
  "object_rel_distance",
  "route_planning",
  "obj_appearance_order",
)
NUMERIC = (
  "object_counting",
  "object_abs_distance",
  "object_size_estimation",
  "room_size_estimation",
)
THETAS = np.linspace(0.5, 0.95, 10)

# --- from the text of an output to an answer -------------------------------


def clean_text(text: str) -> str:
  """Answer in an output, by Spatial-MLLM's rules.

  "so <answer>\\nB.\\n</answer>" -> "b"; "Two\\nlines." -> "two lines".
  """
  blocks = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
  text = blocks[-1] if blocks else text
  return re.sub(r"\s+", " ", text).strip().rstrip(".").lower()


def first_word(text: str) -> str:
  """Answer in an output, by the original's rules: "B. left" -> "b"."""
  return text.split(" ")[0].rstrip(".").strip().lower()


def number(text: str) -> float:
  """Number that a text is, or nan."""
  try:
    return float(text)
  except ValueError:
    return float("nan")


# --- scores of one answer --------------------------------------------------


def mean_relative_accuracy(
  prediction: float, truth: float, variant: str = "spatial_mllm"
) -> float:
  """Share of thetas at which |prediction - truth| / |truth| passes 1 - theta.

  The original divides by zero where the truth is 0; here only 0 is right then.
  """
  if variant == "spatial_mllm":
    one = np.float32
    # Not divided in float64 and rounded: borderline answers would change sides.
    error = np.abs(one(prediction) - one(truth)) / (
      np.abs(one(truth)) + one(1e-8)
    )
    return float(np.mean(error < one(1) - THETAS.astype(one), dtype=one))
  if variant != "original":
    raise ValueError(f"variant {variant!r}: expected one of {VARIANTS}")
  if truth == 0:
    return float(prediction == 0)
  return float(np.mean(abs(prediction - truth) / truth <= 1 - THETAS))


def score(
  prediction: str, truth: str | float, choice: bool, variant: str = "original"
) -> float:
  """Score in 0..1 of one output.

  Args:
    prediction: what the model wrote.
    truth: a letter, or a number or its text.
    choice: whether the question offers options; else a number is asked.
    variant: one of `VARIANTS`.
  """
  truth = str(truth)
  if variant == "original":
    said, wanted = first_word(prediction), truth.strip().lower()
    value = number(said)
  elif variant == "spatial_mllm":
    said, wanted = clean_text(prediction), clean_text(truth)
    value = number(said.replace(",", ""))
  else:
    raise ValueError(f"variant {variant!r}: expected one of {VARIANTS}")
  if choice:
    return float(said == wanted)
  goal = number(wanted.replace(",", ""))
  if np.isnan(goal):
    raise ValueError(f"truth {truth!r} of a numeric question is no number")
  if not np.isfinite(value):
    return 0.0
  return mean_relative_accuracy(value, goal, variant)


def vsi_reward(truth: str, prediction: str, question_type: str) -> float:
  """`score` of a VSI-Bench row in Spatial-MLLM's variant."""
  choice = question_type in MULTIPLE_CHOICE
  return score(prediction, truth, choice, "spatial_mllm")


# --- aggregates -------------------------------------------------------------


def task(question_type: str) -> str:
  """VSI-Bench's task of a type: the three directions are one."""
  return (
    "object_rel_direction" if question_type in DIRECTIONS else question_type
  )


def per_type(rows: Iterable[tuple[str, float]]) -> dict[str, dict]:
  """Mean score and number of rows of each question type."""
  scores = defaultdict(list)
  for question_type, value in rows:
    scores[question_type].append(float(value))
  return {
    name: {"score": float(np.mean(values)), "count": len(values)}
    for name, values in sorted(scores.items())
  }


def aggregate(
  rows: Iterable[tuple[str, float]],
) -> dict[str, dict[str, float | None]]:
  """Micro and macro averages over VSI-Bench's types; others don't count.

  Micro: mean over rows. Macro: types are averaged first, the directions to one
  task, then the tasks.

  Args:
    rows: (question type, score) of each question.

  Returns:
    {"acc": multiple choice, "mra": numeric, "all": both}, each with "micro" and
    "macro"; None where there is no row.
  """
  rows = list(rows)

  def both(types: tuple[str, ...]) -> dict[str, float | None]:
    chosen = [(name, value) for name, value in rows if name in types]
    if not chosen:
      return {"micro": None, "macro": None}
    tasks = defaultdict(list)
    for name, found in per_type(chosen).items():
      tasks[task(name)].append(found["score"])
    return {
      "micro": float(np.mean([value for _, value in chosen])),
      "macro": float(np.mean([np.mean(values) for values in tasks.values()])),
    }

  return {
    "acc": both(MULTIPLE_CHOICE),
    "mra": both(NUMERIC),
    "all": both(MULTIPLE_CHOICE + NUMERIC),
  }


def evaluate(records: Iterable[Mapping]) -> dict[str, dict]:
  """Both variants' scores of answered questions, ready for JSON.

  Args:
    records: dicts with `question_type`, `prediction`, `ground_truth` and, for
      types that VSI-Bench doesn't have, `options`.

  Returns:
    For each variant: `per_type` (score and count) and `aggregate`.
  """
  records = list(records)
  result = {}
  for variant in VARIANTS:
    rows = []
    for record in records:
      name = record["question_type"]
      choice = name in MULTIPLE_CHOICE or bool(record.get("options"))
      said, truth = str(record["prediction"]), record["ground_truth"]
      rows.append((name, score(said, truth, choice, variant)))
    result[variant] = {
      "per_type": per_type(rows),
      "aggregate": aggregate(rows),
    }
  return result


# --- from a distribution to a number ----------------------------------------


def best_number(
  log_probs: Float[Array, "*batch V"],
  values: Float[Array, " V"],
  thetas: Float[Array, " R"] = THETAS,
) -> Float[Array, "*batch"]:
  """Value with the highest expected mean relative accuracy.

  The mean of a distribution is a poor answer under a relative score, its mode a
  noisy one. The best of `values` takes one matrix product.

  Args:
    log_probs: of each value being the truth; needn't be normalised.
    values: the numbers that can be said, in the order of the last axis.
    thetas: thresholds of the score.
  """
  values = np.asarray(values, np.float64)
  # payoff[truth, said]; where the truth is 0 only 0 is right.
  gap = np.abs(values[None, :] - values[:, None])
  error = np.where(gap == 0, 0.0, np.inf)
  np.divide(gap, np.abs(values)[:, None], out=error, where=values[:, None] != 0)
  passed = error[..., None] <= 1 - np.asarray(thetas, np.float64)
  log_probs = np.asarray(log_probs, np.float64)
  probs = np.exp(log_probs - log_probs.max(-1, keepdims=True))
  return np.asarray(values[np.argmax(probs @ passed.mean(-1), axis=-1)])
