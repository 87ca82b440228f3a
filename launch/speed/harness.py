# SPDX-License-Identifier: Apache-2.0
"""Two programs in turn on one machine: numbers first, then time.

Each side is a process that waits while the other one runs, or, where a device
doesn't hold both, ends before it. Rounds alternate, each side being first in
every second round; a ratio is that of the medians of a round, so that a machine
which others use slows both.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import zlib
from typing import Any, NamedTuple

import numpy as np

from launch.speed import child

ROOT = pathlib.Path(__file__).parents[2]


class Row(NamedTuple):
  """A line of the table; functions are "module:function"."""

  name: str
  ours: str
  case: dict[str, Any]
  peer: str = ""  # "": nothing to compare with
  peer_name: str = ""
  peer_case: dict[str, Any] | None = None  # by default ours
  writer: str = ""  # makes the weights that both read
  bar: str = ""  # in words
  # Bound of the ratio ours / peer; `faster` is of peer / ours, from below.
  most: float | None = None
  faster: float | None = None
  tolerance: float | None = 1e-4  # relative; None: both compute other things
  quantile: float = 1.0  # of the differences, that must be within
  unit: str = ""  # what `units` of a program count
  calls: int = 3  # per round; 0: the notes are the result
  alone: bool = False  # both at once don't fit on the device


def weights(row: Row) -> str:
  """Name of a folder that rows share if both sides read the same weights."""
  case = {k: row.case.get(k) for k in ("text", "vision", "dtype")}
  text = json.dumps([row.writer, case], sort_keys=True)
  return f"weights-{zlib.crc32(text.encode()):08x}"


class Process:
  """A side in a process of its own."""

  def __init__(
    self,
    make: str,
    case: dict,
    folder: pathlib.Path,
    threads: int,
    cache: str = "",
  ):
    self.path = folder / f"{make.replace(':', '.')}.npz"
    self._log = self.path.with_suffix(".log")
    spec = {
      "root": str(ROOT),
      "make": make,
      "case": case,
      "folder": str(folder),
      "outputs": str(self.path),
      "threads": threads,
      "cache": cache,
    }
    self._process = subprocess.Popen(
      [sys.executable, child.__file__, json.dumps(spec)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._log.open("w"),
      text=True,
    )

  def ready(self) -> dict:
    return self._read()

  def outputs(self) -> dict[str, np.ndarray]:
    with np.load(self.path) as file:
      return dict(file)

  def time(self, calls: int) -> dict:
    self._process.stdin.write(f"{calls}\n")
    self._process.stdin.flush()
    return self._read()

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()

  def _read(self):
    line = self._process.stdout.readline()
    if not line:
      self._process.wait()
      raise RuntimeError(f"a side ended: {self._log.read_text()[-2000:]}")
    return json.loads(line)


class Local:
  """A side in this process, for tests."""

  def __init__(self, make: str, case: dict, folder: pathlib.Path, *_: Any):
    self._program = child.build(make, case, str(folder))

  def ready(self) -> dict:
    return child.describe(self._program)

  def outputs(self) -> dict[str, np.ndarray]:
    return self._program.outputs

  def time(self, calls: int) -> dict:
    return child.measure(self._program, calls) | {"peak": child.peak_memory()}

  def close(self) -> None:
    pass


def difference(got: dict, want: dict, quantile: float = 1.0) -> float:
  """Largest relative difference; any of two rows of tokens is infinite."""
  if got.keys() != want.keys():
    raise ValueError(f"sides compute {sorted(got)} and {sorted(want)}")
  worst = 0.0
  for name, value in want.items():
    mine = got[name]
    if mine.shape != value.shape:
      return float("inf")
    if np.issubdtype(value.dtype, np.integer):
      worst = max(worst, 0.0 if np.array_equal(mine, value) else float("inf"))
      continue
    gap = np.quantile(np.abs(mine - value), quantile)
    gap /= max(np.max(np.abs(value)), 1e-30)
    worst = max(worst, float(gap) if np.isfinite(gap) else float("inf"))
  return worst


def spread(values: list[float]) -> dict[str, float]:
  return {
    "median": statistics.median(values),
    "min": min(values),
    "max": max(values),
  }


def measure(
  row: Row,
  folder: pathlib.Path,
  *,
  rounds: int = 5,
  threads: int = 0,
  peak: float | None = None,
  side: type = Process,
) -> dict[str, Any]:
  """Result of a row; without times when the sides' numbers disagree.

  Args:
    folder: for weights and outputs.
    peak: FLOP/s of the machine, for the share of it that is used.
  """
  folder.mkdir(parents=True, exist_ok=True)
  if row.writer and not list(folder.glob("*.safetensors")):
    writer = side(row.writer, row.case, folder, threads)
    writer.ready()
    writer.close()
  makes = {"ours": (row.ours, row.case)}
  if row.peer:
    makes["peer"] = row.peer, row.peer_case or row.case
  result: dict[str, Any] = {"name": row.name, "status": "measured"}
  run = _in_turns if row.alone else _beside

  def agree(sides):
    if not row.peer or row.tolerance is None:
      return True
    gap = difference(*(sides[name] for name in makes), row.quantile)
    result["difference"] = gap
    return gap <= row.tolerance

  # Where sides start anew for each turn, they compile once all the same.
  cache = folder / "compiled"
  shutil.rmtree(cache, ignore_errors=True)  # of a row before

  def start(name):
    kept = str(cache) if row.alone else ""
    return side(*makes[name], folder, threads, kept)

  found = run(list(makes), start, agree, row.calls, rounds)
  if found is None:
    return result | {"status": "refused: the sides' numbers disagree"}
  told, times = found
  for name, info in told.items():
    result[name] = _summary(info, times.get(name), peak)
  if row.peer and times:
    for kind in ("wall", "cpu"):
      result[f"ratio/{kind}"] = _ratio(times, kind)
    result["met"] = _met(row, result["ratio/wall"]["median"])
  return result


def _beside(names, start, agree, calls, rounds):
  """(what sides told, their times); both wait for their turns."""
  sides, told = {}, {}
  try:
    for name in names:
      # One after the other: both would compile at once.
      sides[name] = start(name)
      told[name] = sides[name].ready()
    if not agree({name: one.outputs() for name, one in sides.items()}):
      return None
    times = {name: [] for name in names}
    for one in sides.values():
      if calls:
        one.time(1)  # warm
    for number in range(rounds if calls else 0):
      for name in names if number % 2 == 0 else names[::-1]:
        times[name].append(sides[name].time(calls))
  finally:
    for one in sides.values():
      one.close()
  return told, times if calls else {}


def _in_turns(names, start, agree, calls, rounds):
  """The same, each turn in a process that ends with it."""
  told, outputs, times = {}, {}, {name: [] for name in names}
  for number in range(rounds):
    for name in names if number % 2 == 0 else names[::-1]:
      one = start(name)
      try:
        info = one.ready()
        told.setdefault(name, info)
        outputs.setdefault(name, one.outputs())
        times[name].append(one.time(calls))
      finally:
        one.close()
    if number == 0 and not agree(outputs):
      return None
  return told, times


def _ratio(times, kind):
  pairs = zip(times["ours"], times["peer"], strict=True)
  median = statistics.median
  return spread([median(a[kind]) / median(b[kind]) for a, b in pairs])


def _summary(info, rounds, peak):
  out = {"first": info["first"], "notes": info["notes"]}
  if not rounds:
    return out
  wall = [second for r in rounds for second in r["wall"]]
  out |= {"seconds": spread(wall), "peak_gb": max(r["peak"] for r in rounds)}
  out["cpu"] = spread([second for r in rounds for second in r["cpu"]])
  out["units_per_second"] = info["units"] / out["seconds"]["median"]
  if info["flops"]:
    out["flops_per_second"] = info["flops"] / out["seconds"]["median"]
    if peak:
      out["mfu"] = out["flops_per_second"] / peak
  return out


def _met(row, ratio):
  if row.most is not None:
    return ratio <= row.most
  if row.faster is not None:
    return 1 / ratio >= row.faster
  return None
