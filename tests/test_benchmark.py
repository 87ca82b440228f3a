# SPDX-License-Identifier: Apache-2.0
"""The benchmark's code at toy sizes: both suites run wherever tests do."""

import importlib.util
import pathlib

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


def sides(loss, work, monkeypatch, tmp_path):
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
  )
  return row, harness.measure(row, tmp_path, side=harness.Local)


def test_a_ratio_is_ours_over_theirs(monkeypatch, tmp_path):
  row, result = sides([1.0, 2.0], 100_000, monkeypatch, tmp_path)
  assert result["difference"] == 0
  assert result["ratio/wall"]["median"] < 0.1 and result["met"]
  assert "| yes |" in table.line(row, result)


def test_sides_that_disagree_have_no_times(monkeypatch, tmp_path):
  row, result = sides([1.0, 2.001], 1000, monkeypatch, tmp_path)
  assert result["status"].startswith("refused")
  assert "ours" not in result and "ratio/wall" not in result
  assert "refused" in table.line(row, result)


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
  want += 2 * tokens * 32 * 64
  assert qwen.flops(case, train=False) == want
  assert qwen.flops(case, train=True) == 3 * want
