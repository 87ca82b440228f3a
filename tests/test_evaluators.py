# SPDX-License-Identifier: Apache-2.0
"""VSI-Bench scores against the references' rules and hand-worked cases."""

import json
import pathlib

import numpy as np
import pytest

from spatial_jax import evaluate
from spatial_jax.evaluators import qa

CASES = json.loads(
  (
    pathlib.Path(__file__).parent / "golden/spatial_mllm/metrics/cases.json"
  ).read_text()
)


@pytest.mark.parametrize(("text", "wanted"), CASES["clean_text"])
def test_clean_text_equals_the_reference(text, wanted):
  assert qa.clean_text(text) == wanted


@pytest.mark.parametrize(
  ("prediction", "truth", "wanted"), CASES["mean_relative_accuracy"]
)
def test_relative_accuracy_equals_the_reference(prediction, truth, wanted):
  got = qa.mean_relative_accuracy(prediction, truth)
  assert got == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
  ("truth", "prediction", "question_type", "wanted"), CASES["vsi_reward"]
)
def test_reward_equals_the_reference(truth, prediction, question_type, wanted):
  got = qa.vsi_reward(truth, prediction, question_type)
  assert got == pytest.approx(wanted, abs=1e-6)


def test_aggregates_equal_the_reference():
  rows = [tuple(row) for row in CASES["aggregate_input"]]
  found = qa.per_type(rows)
  for name, wanted in CASES["per_question_type"].items():
    assert found[name]["score"] == pytest.approx(wanted, abs=1e-6)
  assert sum(entry["count"] for entry in found.values()) == len(rows)
  for group, wanted in CASES["aggregate"].items():
    assert qa.aggregate(rows)[group] == pytest.approx(wanted, abs=1e-6)
  assert set(qa.MULTIPLE_CHOICE) == set(CASES["mca"])
  assert set(qa.NUMERIC) == set(CASES["na"])


@pytest.mark.parametrize(
  ("prediction", "truth", "wanted"),
  [
    (4, 4, 1.0),
    (3, 4, 0.6),  # error .25 passes 1 - theta for .50 to .70 and, by <=, .75
    (2, 4, 0.1),  # .5 <= .5: the border counts in the original
    (8, 4, 0.0),
    (0, 0, 1.0),
    (1, 0, 0.0),
    (float("nan"), 3, 0.0),
  ],
)
def test_original_counts_the_border(prediction, truth, wanted):
  got = qa.mean_relative_accuracy(prediction, truth, "original")
  assert got == pytest.approx(wanted)


def test_spatial_mllm_does_not_count_the_border():
  assert qa.mean_relative_accuracy(2, 4) == 0
  assert qa.mean_relative_accuracy(3, 4) == pytest.approx(0.5)


@pytest.mark.parametrize(
  ("prediction", "original", "spatial_mllm"),
  [
    ("B", 1, 1),
    ("b.", 1, 1),
    ("B. left", 1, 0),
    ("<answer>B</answer>", 0, 1),
    ("A", 0, 0),
    ("", 0, 0),
  ],
)
def test_letters_are_read_by_each_variant_in_its_way(
  prediction, original, spatial_mllm
):
  args = (prediction, "B", True)
  assert qa.score(*args, "original") == original
  assert qa.score(*args, "spatial_mllm") == spatial_mllm


def test_a_number_with_unit_counts_in_the_original_only():
  args = ("3.0 meters", 3.0, False)
  assert qa.score(*args, "original") == 1
  assert qa.score(*args, "spatial_mllm") == 0


@pytest.mark.parametrize("text", ["three", "", "nan", "inf", "-inf", "[1, 2]"])
@pytest.mark.parametrize("variant", qa.VARIANTS)
def test_what_is_no_number_scores_zero(text, variant):
  assert qa.score(text, 3, False, variant) == 0


def test_types_outside_the_benchmark_stay_out_of_the_aggregate():
  records = [
    {"question_type": "camera_nearer", "options": ["A. bed", "B. sofa"]},
    {"question_type": "camera_depth"},
  ]
  records[0] |= {"prediction": "A", "ground_truth": "A"}
  records[1] |= {"prediction": "2.0", "ground_truth": 2.0}
  found = qa.evaluate(records)["original"]
  assert found["per_type"]["camera_nearer"]["score"] == 1
  assert found["per_type"]["camera_depth"]["score"] == 1
  assert found["aggregate"]["all"]["micro"] is None


def test_errors_name_what_came():
  with pytest.raises(ValueError, match=r"'vsi'.*original"):
    qa.score("1", 1, False, "vsi")
  with pytest.raises(ValueError, match="'A' of a numeric question"):
    qa.score("1", "A", False)


def test_macro_averages_the_directions_to_one_task():
  rows = [
    ("object_rel_direction_easy", 1.0),
    ("object_rel_direction_easy", 1.0),
    ("object_rel_direction_hard", 0.0),
    ("route_planning", 0.0),
  ]
  found = qa.aggregate(rows)["all"]
  assert found == {"micro": 0.5, "macro": 0.25}


def test_evaluate_is_ready_for_json():
  records = [
    {"question_type": "object_counting", "prediction": "2", "ground_truth": 2},
    {"question_type": "route_planning", "prediction": "A", "ground_truth": "B"},
  ]
  found = json.loads(json.dumps(qa.evaluate(records)))
  assert found["original"]["aggregate"]["all"] == {"micro": 0.5, "macro": 0.5}
  assert found["spatial_mllm"]["per_type"]["object_counting"] == {
    "score": 1.0,
    "count": 1,
  }


def test_best_number_is_the_one_of_highest_expected_score():
  values = np.array([1.0, 2.0, 3.0, 10.0])
  # The mode is 10, but 2 and 3 support each other: error 1/3 is worth .4.
  probs = np.array([0.05, 0.3, 0.3, 0.35])
  payoff = [
    sum(
      p * qa.mean_relative_accuracy(said, truth, "original")
      for p, truth in zip(probs, values, strict=True)
    )
    for said in values
  ]
  wanted = values[int(np.argmax(payoff))]
  assert wanted != 10
  assert qa.best_number(np.log(probs), values) == wanted
  batch = qa.best_number(np.log(np.stack([probs, probs[::-1]])), values)
  assert batch.shape == (2,)


def test_best_number_of_a_sure_distribution_is_its_value():
  values = np.arange(6.0)
  for index, value in enumerate(values):
    log_probs = np.full(6, -50.0)
    log_probs[index] = 0.0
    assert qa.best_number(log_probs, values) == value


def test_kept_examples_are_no_scores():
  scores = {"vsi": {"macro": 50, "per_type": {"size": {"score": 1.5}}}}
  want = {"eval/vsi/macro": 50.0, "eval/vsi/per_type/size/score": 1.5}
  assert evaluate.scalars(scores) == want
  scores["vsi"]["examples"] = [{"room": 3, "answers": [{"answer": 2.0}]}]
  assert evaluate.scalars(scores) == want
