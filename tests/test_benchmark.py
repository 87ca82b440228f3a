# SPDX-License-Identifier: Apache-2.0
"""The benchmark's code at toy sizes: both suites run wherever tests do."""

import importlib.util
import pathlib
from itertools import groupby

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location(
  "benchmark", ROOT / "launch" / "benchmark.py"
)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)
harness, rows, table = benchmark.harness, benchmark.rows, benchmark.table


# The others take longer to compile: run `--toy` by hand.
CHEAP = {"cpu": "product,forward,STTS", "gpu": "product"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suite", ["cpu", "gpu"])
def test_rows_run_at_toy_size(suite, tmp_path):
  out = tmp_path / "table.md"
  args = ["--toy", "--rounds=1", f"--workdir={tmp_path}", f"--out={out}"]
  results = benchmark.main([suite, *args, f"--rows={CHEAP[suite]}"])
  assert {result["status"] for result in results} == {"measured"}
  timed = [r["ours"] for r in results if "STTS" not in r["name"]]
  assert all(side["seconds"]["median"] > 0 for side in timed)
  assert suite != "cpu" or results[-1]["ours"]["notes"]["vit/seconds"] > 0
  text = out.read_text()
  assert all(r["name"] in text for r in results)
  other = {"cpu": "gpu", "gpu": "cpu"}[suite]
  for row in rows.SUITES[other]():
    assert row.name in text


def test_both_toys_run_all_that_the_suites_do():
  ran = {f for s in rows.SUITES for r in rows.toy(s) for f in (r.ours, r.peer)}
  for make in rows.SUITES.values():
    assert {f for row in make() for f in (row.ours, row.peer)} <= ran


def program(folder, case):
  """A side for the tests below: waits, and says what it is told."""
  from launch.speed.program import Program

  del folder
  outputs = {"loss": np.array(case["loss"])}
  return Program(lambda: sum(range(case["work"])), outputs, 0.1)


def sides(loss, work, monkeypatch, tmp_path, **more):
  monkeypatch.setitem(__import__("sys").modules, "sides_of_test", benchmark)
  monkeypatch.setattr(benchmark, "program", program, raising=False)
  make = "sides_of_test:program"
  row = harness.Row(
    "row",
    make,
    {"loss": [1.0, 2.0], "work": 1000},
    make,
    peer_case={"loss": loss, "work": work},
    most=0.5,
    **more,
  )
  return row, harness.measure(row, tmp_path, side=harness.Local)


@pytest.mark.parametrize("alone", [False, True])
def test_a_ratio_is_ours_over_theirs(monkeypatch, tmp_path, alone):
  row, result = sides([1.0, 2.0], 100_000, monkeypatch, tmp_path, alone=alone)
  assert result["difference"] == 0
  assert result["ratio/wall"]["median"] < 0.1 and result["met"]
  assert "| yes |" in table.line(row, result)


@pytest.mark.parametrize("alone", [False, True])
def test_sides_that_disagree_have_no_times(monkeypatch, tmp_path, alone):
  row, result = sides([1.0, 2.001], 1000, monkeypatch, tmp_path, alone=alone)
  assert result["status"].startswith("refused")
  assert "ours" not in result and "ratio/wall" not in result
  assert "refused" in table.line(row, result)


def test_sides_that_are_alone_end_before_the_next_begins(monkeypatch, tmp_path):
  events = []

  class Side(harness.Local):
    def __init__(self, make, case, folder, threads, cache):
      super().__init__(make, case, folder, threads)
      events.append(("start", case["work"], bool(cache)))

    def close(self):
      events.append("close")

  monkeypatch.setattr(harness, "Local", Side)
  sides([1.0, 2.0], 2000, monkeypatch, tmp_path, alone=True)
  ours, peer = ("start", 1000, True), ("start", 2000, True)
  turns = [ours, peer, peer, ours]
  assert events[:8:2] == turns and events[1:8:2] == ["close"] * 4


def test_a_suite_is_measured_in_parts(monkeypatch, tmp_path):
  every = [harness.Row(name, "sides:made", {}) for name in ("one", "two")]
  monkeypatch.setitem(rows.SUITES, "cpu", lambda: every)
  told = iter(("first", "second", "third"))
  monkeypatch.setattr(
    harness, "measure", lambda row, *_, **__: {"status": next(told)}
  )
  out = tmp_path / "table.md"
  for part in ("one", "two", "two"):
    given = [f"--rows={part}", f"--out={out}", f"--workdir={tmp_path}"]
    benchmark.main(["cpu", *given])
  lines = [x for x in out.read_text().splitlines() if x.startswith("| ")]
  assert "first" in lines[1] and "third" in lines[2]


def test_rows_of_one_model_share_its_weights():
  reading = [row for row in rows.gpu() if row.writer]
  order = [(harness.weights(row), row.name) for row in reading]
  # One model after another: only the last one's are kept.
  models = [[name for _, name in g] for _, g in groupby(order, lambda x: x[0])]
  assert [len(names) for names in models] == [6, 5]
  assert all("3b" in name for name in models[0])
  assert all("7b" in name for name in models[1])


def test_the_log_and_other_suites_survive_an_update(tmp_path):
  path = tmp_path / "table.md"
  table.update(path, "cpu", "numbers", {"gpu": "\nnothing\n\n"})
  path.write_text(path.read_text() + "\n* by hand\n\n## More by hand\n")
  table.update(path, "gpu", "others", {})
  text = path.read_text()
  parts = ("## cpu\n\nnumbers", "## gpu\n\nothers", "* by hand", "## More")
  places = [text.index(part) for part in parts]
  assert places == sorted(places) and "nothing" not in text
  table.update(path, "gpu", "others", {})
  assert path.read_text() == text


def test_flops_are_those_of_a_loop_over_the_products():
  from launch.speed import qwen

  case = {**qwen.TOY, "images": 0}
  text, tokens = case["text"], case["rows"] * case["length"]
  want = 0
  for _ in range(text["layers"]):
    for shape in ((32, 32), (32, 16), (32, 16), (32, 32), *[(32, 32)] * 3):
      want += 2 * tokens * shape[0] * shape[1]
    for _ in range(case["rows"]):
      pairs = case["length"] ** 2 / 2
      want += 2 * 2 * pairs * 32
  want += 2 * (tokens - case["rows"]) * 32 * 64  # after the last comes no word
  assert qwen.flops(case, train=False) == want
  assert qwen.flops(case, train=True) == 3 * want
