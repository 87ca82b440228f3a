# SPDX-License-Identifier: Apache-2.0
"""Results as a Markdown file: a section for each suite, and a log by hand."""

from __future__ import annotations

import pathlib
import re
from typing import Any

from launch.speed.harness import Row

HEAD = """# Benchmarks

Written by `launch/benchmark.py`; only the last section is by hand. Both sides
of a row run on one machine in one session, in turn, with the same weights,
shapes, dtype and threads, after their numbers were compared. A ratio is ours /
theirs of the medians of a round: its median, and in brackets the least and the
largest of all rounds. "used" is the share of the FLOP/s that a large matrix
product reaches (CPU) or that the vendor names (GPU); causal attention counts
half, recomputing not at all. First calls, with compiling, count apart.
"""
COLUMNS = (
  "row",
  "peer",
  "bar",
  "ours, s",
  "peer, s",
  "ratio",
  "met",
  "difference",
  "first call, s",
  "used",
  "peak GB",
  "more",
)
SUITES = ("cpu", "gpu")
LOG = "## What was tried\n"


def number(value: float | None) -> str:
  return "" if value is None else f"{value:.3g}"


def pair(result: dict, key: str, *inner: str) -> str:
  """A figure of ours and of the peer's."""
  parts = []
  for side in ("ours", "peer"):
    value = result.get(side, {}).get(key)
    for name in inner:
      value = value and value.get(name)
    if value is not None:
      parts.append(number(value))
  return " / ".join(parts)


def line(row: Row, result: dict[str, Any] | None) -> str:
  """A row of the table; without a result it says so."""
  result = result or {"status": "not measured"}
  cells = dict.fromkeys(COLUMNS, "")
  cells |= {"row": row.name, "peer": row.peer_name, "bar": row.bar}
  if result["status"] != "measured":
    cells["ours, s"] = result["status"]
  for side in ("ours", "peer"):
    if seconds := result.get(side, {}).get("seconds"):
      cells[f"{side}, s"] = number(seconds["median"])
  if ratio := result.get("ratio/wall"):
    middle, low, high = (ratio[k] for k in ("median", "min", "max"))
    cells["ratio"] = f"{middle:.3f} ({low:.3f} to {high:.3f})"
    if row.faster or row.unit:
      cells["ratio"] += f", {1 / middle:.3g}x as fast"
  cells["met"] = {True: "yes", False: "no", None: ""}[result.get("met")]
  if "difference" in result:
    cells["difference"] = f"{result['difference']:.1e}"
  cells["first call, s"] = pair(result, "first")
  cells["used"] = pair(result, "mfu")
  cells["peak GB"] = pair(result, "peak_gb")
  more = []
  if row.unit and "ours" in result and "seconds" in result["ours"]:
    more.append(f"{pair(result, 'units_per_second')} {row.unit}/s")
  notes = result.get("ours", {}).get("notes", {})
  more += [f"{name} {number(value)}" for name, value in notes.items()]
  cells["more"] = "; ".join(more)
  return "| " + " | ".join(cells.values()) + " |"


def section(rows: list[Row], results: dict, about: list[str]) -> str:
  """Markdown of a suite below its title."""
  head = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
  body = [line(row, results.get(key(row))) for row in rows]
  return "\n".join([*about, "", *head, *body]) + "\n"


def key(row: Row) -> str:
  return f"{row.name} | {row.peer_name}"


def by_row(rows: list[Row], results: list[dict]) -> dict[str, dict]:
  """Results by the key of their row."""
  named = zip(rows, results, strict=True)
  return {key(row): result for row, result in named}


def update(path: pathlib.Path, suite: str, text: str, empty: dict) -> None:
  """Writes a suite's section; other suites and the log stay as they are.

  Args:
    empty: sections of suites that the file doesn't have yet.
  """
  old = path.read_text() if path.exists() else ""
  found = dict(re.findall(r"^## (cpu|gpu)\n(.*?)(?=^## |\Z)", old, re.M | re.S))
  log = old[old.index(LOG) :] if LOG in old else LOG
  found = {**empty, **found, suite: f"\n{text.strip()}\n\n"}
  parts = [f"## {name}\n{found[name]}" for name in SUITES if name in found]
  path.write_text(HEAD + "\n" + "".join(parts) + log)
