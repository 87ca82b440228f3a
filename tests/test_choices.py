# SPDX-License-Identifier: Apache-2.0
"""Multiple-choice answers and the averages of CV-Bench and MMVP, by hand."""

import pytest

from spatial_jax.evaluators import choices


@pytest.mark.parametrize(
  ("text", "letter"),
  [
    ("(B)", "b"),
    ("B. The answer is (C).", "c"),
    ("Answer: D", "d"),
    ("a, since it is near", "a"),
    ("", ""),
  ],
)
def test_the_letter_of_an_answer_is_found(text, letter):
  assert {choices.extract(text, s) for s in ("ADE", "COCO")} == {letter}


def test_the_published_quirk_stays():
  assert choices.extract("The answer is: c", "Omni3D") == ":"


def test_mmvp_also_accepts_the_text_of_an_option():
  options = ["Open", "Closed"]
  assert choices.is_right("closed.", "(b)", "MMVP", options)
  assert choices.is_right("(B)", "(b)", "MMVP", options)
  assert not choices.is_right("Open", "(b)", "MMVP", options)


def test_cv_bench_weighs_sources_as_the_paper_does():
  rows = [
    ("ADE", "A", "Count"),  # right
    ("ADE", "B", "Count"),
    ("COCO", "(a)", "Relation"),  # right
    ("Omni3D", "b", "Depth"),
    ("Omni3D", "A.", "Depth"),  # right
    ("Omni3D", "b", "Distance"),
    ("Omni3D", "b", "Distance"),
  ]
  names = ("source", "prediction", "task")
  records = [
    {**dict(zip(names, row, strict=True)), "answer": "(A)"} for row in rows
  ]
  scores = choices.cv_bench(records)
  assert (scores["2D"], scores["3D"]) == (0.75, 0.25)
  assert scores["overall"] == 0.5
  assert (scores["Count"], scores["Depth"]) == (0.5, 0.5)
  with pytest.raises(ValueError, match="no question is from"):
    choices.cv_bench(records[:3])


def test_a_pair_of_mmvp_counts_only_if_both_are_right():
  def record(said):
    return {"prediction": said, "answer": "(a)", "options": ["yes", "no"]}

  pairs = [record(said) for said in ("a", "yes", "a", "b")]
  assert choices.mmvp(pairs) == 50
  with pytest.raises(ValueError, match="pairs"):
    choices.mmvp(pairs[:3])
