# SPDX-License-Identifier: Apache-2.0
"""Speed beside the PyTorch reference, on this machine, in one run.

  python launch/benchmark.py cpu
  python launch/benchmark.py gpu --rows=forward,decode --out=FILE

Writes the suite's section of launch/BENCHMARKS.md, and all figures to
runs/benchmark/SUITE.json. With `--rows` these rows join the figures there, and
a table is written if `--out` says where: a suite can be measured in parts. How
times are taken is in launch/speed/harness.py, what is timed in
launch/speed/rows.py. Without a GPU the second suite is listed as not measured;
`--toy` runs its code on any machine, in one process.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from launch.speed import harness, rows, table  # noqa: E402

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")


def versions() -> dict[str, str]:
  known = [p for p in PACKAGES if importlib.util.find_spec(p)]
  return {p: importlib.metadata.version(p) for p in known}


def about(args, device: str) -> list[str]:
  """When, where and how: the lines above a table."""
  names = ", ".join(f"{k} {v}" for k, v in versions().items())
  load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
  return [
    f"{datetime.date.today()}, Python {platform.python_version()}, {names}.",
    f"{device}; load average at the end {load}.",
    f"Command: `python launch/benchmark.py {' '.join(args)}`",
  ]


def device_of(suite: str) -> str | None:
  """The machine in words; None where the suite's device is missing."""
  if suite == "cpu":
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, float32"
  import jax

  found = jax.devices()[0]
  return found.device_kind if found.platform == "gpu" else None


def vendor_peak(device: str) -> float | None:
  from spatial_jax import metrics

  return metrics.peak_flops(device)


def run(suite: str, chosen: list, args, device: str) -> list[dict]:
  """Results of rows, one after the other; a row that fails says why."""
  if suite == "cpu" and not args.toy:  # even where there is a GPU
    os.environ.update(JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
  results, peak = [], vendor_peak(device)
  side = harness.Local if args.toy else harness.Process
  home = args.workdir / suite
  shutil.rmtree(home, ignore_errors=True)
  for number, row in enumerate(chosen):
    print(f"[{number + 1}/{len(chosen)}] {row.name} ...", flush=True)
    folder = home / harness.weights(row)
    for other in home.glob("weights-*"):
      if other != folder:  # those of a model fill a small disk
        shutil.rmtree(other)
    if ".peer:" in row.peer and not importlib.util.find_spec("transformers"):
      row = row._replace(peer="")
    try:
      result = harness.measure(
        row,
        folder,
        rounds=args.rounds,
        threads=args.threads,
        peak=peak,
        side=side,
      )
    except (RuntimeError, ValueError) as error:
      if args.toy:
        raise
      print(error, file=sys.stderr)
      shutil.rmtree(folder, ignore_errors=True)  # perhaps half written
      last = str(error).strip().splitlines()[-1]
      result = {"name": row.name, "status": f"failed: {last[:200]}"}
    if row.name.startswith("product") and peak is None:
      # Of a CPU nobody names a peak.
      sides = [result.get(name, {}) for name in ("ours", "peer")]
      peak = max(s.get("flops_per_second", 0.0) for s in sides) or None
    print(table.line(row, result), flush=True)
    results.append(result)
  shutil.rmtree(home, ignore_errors=True)
  return results


def known(path: pathlib.Path) -> dict[str, dict]:
  """Results of earlier runs with these versions, by the key of their row."""
  if not path.exists():
    return {}
  record = json.loads(path.read_text())
  return record.get("by_row", {}) if record["versions"] == versions() else {}


def main(argv=None) -> list[dict]:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("suite", choices=tuple(rows.SUITES))
  parser.add_argument(
    "--rows", default="", help="parts of their names: forward,decode"
  )
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--threads", type=int, default=os.cpu_count())
  parser.add_argument("--toy", action="store_true")
  parser.add_argument("--out", type=pathlib.Path)
  parser.add_argument(
    "--workdir", type=pathlib.Path, default=ROOT / "runs" / "benchmark"
  )
  given = sys.argv[1:] if argv is None else argv
  args = parser.parse_args(given)
  every = rows.toy(args.suite) if args.toy else rows.SUITES[args.suite]()
  parts = args.rows.split(",")
  chosen = [row for row in every if any(part in row.name for part in parts)]
  if not chosen:
    names = "\n  ".join(dict.fromkeys(row.name for row in every))
    raise SystemExit(f"no row has {args.rows!r} in its name:\n  {names}")
  device = "a toy run" if args.toy else device_of(args.suite)
  results = []
  if device is None:
    print("no GPU here: the suite is listed as not measured")
    chosen = []
  else:
    results = run(args.suite, chosen, args, device)
  args.workdir.mkdir(parents=True, exist_ok=True)
  # A toy's figures are no suite's: some of its rows have the same names.
  path = args.workdir / f"{'toy-' * args.toy}{args.suite}.json"
  by_row = table.by_row(chosen, results)
  if args.rows:
    by_row = known(path) | by_row
  head = ["No GPU was at hand: nothing here is measured."]
  if device is not None:
    head = about(given, device)
  record = {"about": head, "versions": versions(), "by_row": by_row}
  path.write_text(json.dumps(record, indent=2) + "\n")
  out = args.out
  if out is None and not args.toy and not args.rows:
    out = ROOT / "launch" / "BENCHMARKS.md"
  if out is not None:
    empty = {
      name: "\n" + table.section(make(), {}, ["Not measured yet."]) + "\n"
      for name, make in rows.SUITES.items()
    }
    text = table.section(every, by_row, head)
    table.update(out, args.suite, text, empty)
    print(f"wrote {out}")
  return results


if __name__ == "__main__":
  main()
