# SPDX-License-Identifier: Apache-2.0
"""The mechanisms side by side: trains every row, one table, plots.

  python launch/world_compare.py --workdir=runs/compare

trains on two CPU cores, first what the rows of configs/world_compare.py start
from (a plain model for each seed, one VGGT), then all rows, scores them on the
same rooms, never seen, and writes table.md, table.json, plots and report.html.
Each run is a process with a log beside its folder; `--jobs` of them run at
once, on CPUs with one core each: small models gain little from a second core.
Runs that are finished in the workdir are not repeated: the same command goes on
after an interruption, `--rows` and `--seeds` add to it. `--config=gpu` is
larger; `--vggt=DIR` takes the weights that launch/vggt_world.py has written,
instead of training a VGGT here.

Intervals are Student's, 95 %, over seeds; differences to the plain model are of
equal seeds, which share first values and order of rooms.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# Trained with three seeds, others with one, unless --seeds says how many.
SEVERAL = ("plain", "dual", "patches_3d")
QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447}
KINDS = ("easy", "medium", "hard")
GROUPS = {
  "distance": ("object_abs_distance", "object_rel_distance"),
  "direction": tuple(f"object_rel_direction_{kind}" for kind in KINDS),
}


CURVES = [
  ("loss", "training loss"),
  ("aux/room_point", "where each patch is"),
  ("aux/ground", "where a named object is"),
  ("aux/angle", "the asked angle"),
]


def runs(rows: list[str], seeds: int) -> list[tuple[str, int]]:
  """Rows and seeds in order: all rows once, then the further seeds."""
  count = {row: seeds or (3 if row in SEVERAL else 1) for row in rows}
  return [
    (row, seed)
    for seed in range(max(count.values()))
    for row in rows
    if seed < count[row]
  ]


def train(config, folder: pathlib.Path):
  """Trains to the end; an interrupted process ends here."""
  from spatial_jax import train as trainer

  done = trainer.main(config, str(folder))
  if done.interrupted:
    sys.exit(1)
  return done


def finished(folder: pathlib.Path, part: str) -> bool:
  return (folder / part / "result.json").exists()


def run(folder: pathlib.Path, part: str, size: str, vggt: str) -> None:
  """Trains and scores a part: vggt, base-SEED or ROW-SEED."""
  from configs import world_compare
  from spatial_jax import evaluate, metrics, reconstruct

  here = folder / part
  name, _, seed = part.partition("-")
  if name == "vggt":
    config = world_compare.get_config(f"stage=vggt,{size}")
    done = train(config, here)
    reconstruct.save(config, done.state["params"], here / "weights")
    result = {}
  elif name == "base":
    config = world_compare.get_config(f"stage=vision,seed={seed},{size}")
    train(config, folder / f"vision-{seed}")
    config = world_compare.get_config(f"stage=base,seed={seed},{size}")
    config.init_from = str(folder / f"vision-{seed}")
    train(config, here)
    result = {}
  else:
    arg = f"row={name},seed={seed},vggt={vggt},{size}"
    config = world_compare.get_config(arg)
    config.init_from = str(folder / f"base-{seed}")
    train(config, here)
    scores = evaluate.main(config, str(here))["vsi"]
    speeds = [r.get("steps_per_second") for r in metrics.read(str(here))]
    kinds = {k: v["score"] for k, v in scores["per_type"].items()}
    result = {
      "row": name,
      "seed": int(seed),
      "scores": {"macro": scores["macro"], **groups(kinds), **kinds},
      "step_ms": 1e3 / statistics.median(s for s in speeds if s),
      "tokens": config.model.llm.packing[0] + config.data.world.text_length,
      "steps": config.steps,
      "rooms": config.steps * config.batch_size,
    }
  (here / "result.json").write_text(json.dumps(result, indent=2) + "\n")


def run_all(folder, parts: list[str], jobs: int, options: list[str]) -> None:
  """Runs what isn't finished, `jobs` processes at once.

  A failure of one, SIGTERM and Ctrl-C stop all, which save what they have.
  """
  waiting = [part for part in parts if not finished(folder, part)]
  if not waiting:
    return
  cores = sorted(os.sched_getaffinity(0))
  jobs = min(jobs or len(cores), len(cores))
  free = [cores[i::jobs] for i in range(jobs)]
  running = {}
  before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
  try:
    while waiting or running:
      while waiting and free:
        part, place = waiting.pop(0), free.pop(0)
        command = [sys.executable, __file__, f"--workdir={folder}", *options]
        command += [f"--part={part}", f"--cores={','.join(map(str, place))}"]
        with (folder / f"{part}.log").open("w") as log:
          child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT
          )
        running[child] = part, place, time.perf_counter()
      for child in [c for c in running if c.poll() is not None]:
        part, place, began = running.pop(child)
        if child.returncode:
          raise RuntimeError(
            f"{part}: exit status {child.returncode}, see {folder}/{part}.log"
          )
        free.append(place)
        print(f"{part:14} {(time.perf_counter() - began) / 60:5.1f} min")
        sys.stdout.flush()
      time.sleep(0.2)
  finally:
    for child in running:
      child.terminate()
    for child in running:
      child.wait()
    signal.signal(signal.SIGTERM, before)


def groups(kinds: dict[str, float]) -> dict[str, float]:
  """Mean score of the question types of each group, where there are any."""
  found = {
    name: [kinds[kind] for kind in members if kind in kinds]
    for name, members in GROUPS.items()
  }
  return {name: statistics.mean(x) for name, x in found.items() if x}


def interval(values: list[float]) -> dict[str, float | None]:
  """Mean and half of the interval; None for less than two values."""
  half = None
  if len(values) > 1:
    n = len(values)
    half = QUANTILE[min(n - 1, 6)] * statistics.stdev(values) / n**0.5
  return {"mean": statistics.mean(values), "half": half, "n": len(values)}


def summarize(results: list[dict]) -> dict[str, dict]:
  """Row -> scores, differences to plain, step time and tokens."""
  plain = {r["seed"]: r["scores"] for r in results if r["row"] == "plain"}
  table = {}
  for row in dict.fromkeys(r["row"] for r in results):
    mine = [r for r in results if r["row"] == row]
    pairs = [
      (r["scores"], plain[r["seed"]]) for r in mine if r["seed"] in plain
    ]
    kinds = mine[0]["scores"]
    table[row] = {
      "scores": {k: interval([r["scores"][k] for r in mine]) for k in kinds},
      "gains": {k: interval([a[k] - b[k] for a, b in pairs]) for k in kinds}
      if pairs
      else {},
      "step_ms": statistics.median(r["step_ms"] for r in mine),
      "tokens": mine[0]["tokens"],
      "rooms": mine[0]["rooms"],
    }
  return table


def geometry(folder: pathlib.Path, parts: list[str]) -> tuple:
  """Table of the geometric losses: what a model knows before it answers."""
  from spatial_jax import metrics

  ends: dict[str, dict[str, dict]] = {}
  for part in parts:
    row, _, seed = part.rpartition("-")
    read = metrics.read(str(folder / part))
    # The last quarter of the training: single batches differ much.
    last = [r for r in read if r["step"] > 0.75 * read[-1]["step"]]
    ends.setdefault(row, {})[seed] = {
      key: statistics.mean(r[key] for r in last if key in r)
      for key, _ in CURVES[1:]
      if any(key in r for r in last)
    }
  keys = list(next(iter(next(iter(ends.values())).values()), {}))
  lines = []
  for row, seeds in ends.items():
    cells = [row]
    for key in keys:
      cells.append(show(interval([x[key] for x in seeds.values()]), "", 3))
      pairs = [
        x[key] - ends["plain"][seed][key]
        for seed, x in seeds.items()
        if row != "plain" and seed in ends.get("plain", {})
      ]
      cells.append(show(interval(pairs), "+", 3) if pairs else "")
    lines.append(cells)
  heads = [x for key in keys for x in (key.removeprefix("aux/"), "to plain")]
  return (
    "Geometric losses at the end (less is better)",
    ["model", *heads],
    lines,
  )


def show(x: dict, sign: str = "", digits: int = 1) -> str:
  half = "" if x["half"] is None else f" ± {x['half']:.{digits}f}"
  return f"{x['mean']:{sign}.{digits}f}{half}"


def tables(table: dict[str, dict]) -> list[tuple]:
  """(title, head, rows): scores, and differences to the plain model."""
  kinds = list(next(iter(table.values()))["scores"])
  names = [kind.removeprefix("object_") for kind in kinds]
  scores = [
    [
      row,
      *(show(x["scores"][k]) for k in kinds),
      f"{x['step_ms']:.0f}",
      str(x["tokens"]),
    ]
    for row, x in table.items()
  ]
  gains = [
    [row, *(show(x["gains"][k], "+") for k in kinds)]
    for row, x in table.items()
    if row != "plain" and x["gains"]
  ]
  return [
    ("Scores", ["model", *names, "step, ms", "tokens"], scores),
    ("Differences to plain, same seeds", ["model", *names], gains),
  ]


def markdown(title: str, head: list[str], rows: list[list[str]]) -> str:
  lines = [head, ["---"] * len(head), *rows]
  body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
  return f"## {title}\n\n{body}\n"


def verdict(table: dict[str, dict], row: str = "patches_3d") -> str:
  """Whether a row beats the plain one on distance and direction."""
  parts = []
  for name in GROUPS:
    gain = table.get(row, {}).get("gains", {}).get(name)
    if gain is None:
      return ""
    beats = gain["half"] is not None and gain["mean"] > gain["half"]
    side = "beyond" if beats else "not beyond"
    parts.append(f"{name} {show(gain, '+')}, {side} the interval")
  return f"{row} against plain: {'; '.join(parts)}."


def write(
  folder: pathlib.Path, table: dict[str, dict], parts: list[str], minutes: float
) -> None:
  """All files of the comparison."""
  from spatial_jax import drawing, metrics, report

  said = verdict(table)
  shown = [*tables(table), geometry(folder, parts)]
  text = "\n".join([*(markdown(*t) for t in shown), said])
  print("\n" + text, flush=True)
  (folder / "table.md").write_text(text + "\n")
  (folder / "table.json").write_text(json.dumps(table, indent=2) + "\n")
  drawings = {}
  for name in ("macro", *GROUPS):
    values = {
      row: (x["scores"][name]["mean"], x["scores"][name]["half"])
      for row, x in table.items()
      if name in x["scores"]
    }
    if values:
      title = "VSI macro" if name == "macro" else f"{name} questions"
      drawings[name] = drawing.draw_intervals(values, title)
  curves = {row: metrics.read(str(folder / f"{row}-0")) for row in table}
  drawings["loss"] = drawing.draw_curves(curves, "loss", "loss", width=720)
  for name, svg in drawings.items():
    (folder / f"{name}.svg").write_text(svg)
  few = {row: x for row, x in curves.items() if not row.startswith("pruned")}
  report.write(
    folder / "report.html",
    {
      "title": "Five spatial mechanisms on one backbone",
      "lead": (
        "The same small vision language model, rooms, questions, steps and "
        "optimizer; only the mechanism differs. Scored on rooms never seen. "
        "Whiskers are 95 % intervals over seeds, where there are several."
      ),
      "drawings": [svg for name, svg in drawings.items() if name != "loss"],
      "tables": shown,
      "notes": [said] * bool(said),
      "runs": few,
      "curves": CURVES,
      "settings": {
        "minutes of this call": f"{minutes:.1f}",
        "rooms seen after the plain model's": next(iter(table.values()))[
          "rooms"
        ],
      },
    },
  )


def main(argv=None) -> dict[str, dict] | None:
  from configs import world_compare as recipe

  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--workdir", default="runs/compare", type=pathlib.Path)
  parser.add_argument("--config", default="cpu", help="cpu, gpu or test")
  parser.add_argument("--vggt", default="", help="weights; trained if empty")
  parser.add_argument("--rows", default=",".join(recipe.rows()))
  parser.add_argument("--seeds", default=0, type=int, help="of every row")
  parser.add_argument(
    "--jobs",
    default=0,
    type=int,
    help="runs at once; by default one a core, one on a GPU",
  )
  parser.add_argument("--part", default="", help=argparse.SUPPRESS)
  parser.add_argument("--cores", default="", help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  began = time.perf_counter()
  folder = args.workdir.resolve()
  folder.mkdir(parents=True, exist_ok=True)
  weights = args.vggt or str(folder / "vggt" / "weights")
  if args.part:
    # Before jax counts cores for its threads.
    os.sched_setaffinity(0, set(map(int, args.cores.split(","))))
    from spatial_jax import hosts

    # Further seeds of a row are the same program. No two write one file.
    hosts.cache_programs(str(folder / f"compiled-{args.cores.split(',')[0]}"))
    run(folder, args.part, args.config, weights)
    return None

  rows, known = args.rows.split(","), recipe.rows()
  asked = runs(rows, args.seeds)
  stages = [f"base-{seed}" for seed in sorted({seed for _, seed in asked})]
  if not args.vggt and any({"vggt", "teacher"} & set(known[r]) for r in rows):
    stages.insert(0, "vggt")
  jobs = args.jobs or int(args.config == "gpu")
  options = [f"--config={args.config}", f"--vggt={args.vggt}"]
  parts = [f"{row}-{seed}" for row, seed in asked]
  if not all(finished(folder, part) for part in parts):
    run_all(folder, stages, jobs, options)
  run_all(folder, parts, jobs, options)
  table = summarize(
    [json.loads((folder / p / "result.json").read_text()) for p in parts]
  )
  write(folder, table, parts, (time.perf_counter() - began) / 60)
  print(f"report: {folder / 'report.html'}")
  return table


if __name__ == "__main__":
  main()
