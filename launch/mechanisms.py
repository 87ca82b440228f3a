# SPDX-License-Identifier: Apache-2.0
"""Which of the two mechanisms does each architecture use? One table.

  python launch/mechanisms.py --workdir=runs/mechanisms --compare=runs/compare

trains the demo's model with three seeds, then analyses these and all rows that
launch/world_compare.py has trained in runs/compare (see `analyse` and
configs/dual_mechanisms.py), and writes table.md and table.json. What is trained
or analysed already is not repeated, so that the same command goes on after an
interruption. `--seeds=0` trains nothing. On two CPU cores the demo's model
takes about 9 minutes a seed, and each analysis a few.

Rows with token pruning are left out: their decoders take no edits.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import statistics
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def train_demo(folder: pathlib.Path, seed: int, test: bool) -> pathlib.Path:
  """The demo's model with a seed, in its two stages; its workdir."""
  from configs import demo
  from spatial_jax import train

  for name, arg in (("vision", "stage=vision"), ("seeing", "")):
    here = folder / f"{name}-{seed}"
    if (here / "done").exists():
      continue
    config = demo.get_config(",".join([arg] * bool(arg) + ["test"] * test))
    config.seed = config.data.seed = seed
    if name == "seeing":
      config.init_from = str(folder / f"vision-{seed}")
    print(f"\n=== {here.name} ===", flush=True)
    if train.main(config, str(here)).interrupted:
      sys.exit(0)
    (here / "done").touch()
  return here


def trained_rows(folder: pathlib.Path) -> list[tuple[str, int, pathlib.Path]]:
  """Row, seed and workdir of what world_compare.py has finished."""
  from configs import world_compare

  out = []
  for path in sorted(folder.glob("*-*/result.json")):
    row, seed = re.fullmatch(r"(.+)-(\d+)", path.parent.name).groups()
    if row in world_compare.rows() and not row.startswith("pruned"):
      out.append((row, int(seed), path.parent))
  return out


def analyse(workdir: pathlib.Path, arg: str) -> dict:
  """The summary of a workdir, from its file if there is one."""
  from configs import dual_mechanisms
  from spatial_jax import analyse

  path = workdir / "analysis" / "analysis.json"
  if not path.exists():
    import jax

    print(f"\n=== analysis of {workdir.name} ===", flush=True)
    analyse.main(dual_mechanisms.get_config(arg), str(workdir))
    jax.clear_caches()
  return json.loads(path.read_text())["summary"]


def summarize(found: list[tuple[str, int, dict]]) -> dict[str, dict]:
  """Row -> number -> mean and deviation over its seeds."""
  table = {}
  for row in dict.fromkeys(name for name, *_ in found):
    mine = [summary for name, _, summary in found if name == row]
    table[row] = {"seeds": len(mine)}
    for key in mine[0]:
      values = [s[key] for s in mine if s[key] is not None]
      table[row][key] = {
        "mean": statistics.mean(values) if values else None,
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
      }
  return table


def markdown(table: dict[str, dict]) -> str:
  """A column for each row of the comparison, a line for each number."""
  names = list(table)
  keys = [key for key in table[names[0]] if key != "seeds"]
  heads = [f"{name} ({table[name]['seeds']})" for name in names]
  lines = [
    "| | " + " | ".join(heads) + " |",
    "|---" * (len(names) + 1) + "|",
  ]
  for key in keys:
    cells = []
    for name in names:
      got = table[name].get(key, {"mean": None})
      text = "-" if got["mean"] is None else f"{got['mean']:.3f}"
      if got.get("deviation") is not None:
        text += f" ± {got['deviation']:.3f}"
      cells.append(text)
    lines.append(f"| {key} | " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> dict:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", default="runs/mechanisms")
  parser.add_argument(
    "--seeds", type=int, default=3, help="of the demo's model"
  )
  parser.add_argument(
    "--compare", default="", help="a world_compare.py workdir"
  )
  parser.add_argument("--config", default="", help="as there: cpu, gpu or test")
  args = parser.parse_args(argv)
  folder = pathlib.Path(args.workdir)
  folder.mkdir(parents=True, exist_ok=True)
  size = args.config
  found = []
  for seed in range(args.seeds):
    workdir = train_demo(folder, seed, size == "test")
    arg = "model=demo" + ",test" * (size == "test")
    found.append(("demo", seed, analyse(workdir, arg)))
  if args.compare:
    for row, seed, workdir in trained_rows(pathlib.Path(args.compare)):
      arg = f"model=world_compare,row={row},seed={seed}"
      arg += f",{size}" * bool(size)
      found.append((row, seed, analyse(workdir, arg)))
  if not found:
    parser.error("nothing to analyse: raise --seeds, or give --compare")
  table = summarize(found)
  (folder / "table.json").write_text(json.dumps(table, indent=1) + "\n")
  text = markdown(table)
  (folder / "table.md").write_text(text, encoding="utf-8")
  print(f"\nmean ± deviation over seeds\n\n{text}\nwritten to {folder}")
  return table


if __name__ == "__main__":
  main()
