# SPDX-License-Identifier: Apache-2.0
"""The mechanisms side by side: trains every row, one table, plots.

  python launch/world_compare.py --workdir=runs/compare

trains on two CPU cores, first what the rows of configs/world_compare.py start
from (a vision tower for each seed, one VGGT), then all rows, scores them on the
same rooms, never seen, and writes table.md, table.json, scores.svg, loss.svg
and report.html. Runs that are finished in the workdir are not repeated: the
same command goes on after an interruption, `--rows` and `--seeds` add to it.
`--config=gpu` is larger; `--vggt=DIR` takes the weights that
launch/vggt_world.py has written, instead of training a VGGT here.

Intervals are Student's, 95 %, over seeds; differences to the plain model are of
equal seeds, which share vision tower and order of rooms.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
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
  """Trains what isn't trained yet, and says where."""
  import jax

  from spatial_jax import train as trainer

  print(f"\n=== {folder.name} ===", flush=True)
  done = trainer.main(config, str(folder))
  if done.interrupted:
    sys.exit(0)
  jax.clear_caches()
  return done


def geometry(folder: pathlib.Path, size: str) -> str:
  """Weights of a VGGT that was trained on rooms."""
  from configs import world_compare
  from spatial_jax import reconstruct

  weights = folder / "vggt" / "weights"
  if not (weights / "config.json").exists():
    config = world_compare.get_config(f"stage=vggt,{size}")
    done = train(config, folder / "vggt")
    reconstruct.save(config, done.state["params"], weights)
  return str(weights)


def run(folder: pathlib.Path, row: str, seed: int, size: str, vggt: str):
  """Result of one row and seed, from its file if it was finished before."""
  from configs import world_compare
  from spatial_jax import evaluate, metrics

  here = folder / f"{row}-{seed}"
  path = here / "result.json"
  if path.exists():
    return json.loads(path.read_text())
  vision = folder / f"vision-{seed}"
  if not (vision / "done").exists():
    train(world_compare.get_config(f"stage=vision,seed={seed},{size}"), vision)
    (vision / "done").touch()
  arg = f"row={row},seed={seed},vggt={vggt},{size}"
  config = world_compare.get_config(arg)
  config.init_from = str(vision)
  train(config, here)
  scores = evaluate.main(config, str(here))["vsi"]
  speeds = [r.get("steps_per_second") for r in metrics.read(str(here))]
  kinds = {k: v["score"] for k, v in scores["per_type"].items()}
  result = {
    "row": row,
    "seed": seed,
    "scores": {"macro": scores["macro"], **groups(kinds), **kinds},
    "step_ms": 1e3 / statistics.median(s for s in speeds if s),
    "tokens": config.model.llm.packing[0] + config.data.world.text_length,
    "steps": config.steps,
    "rooms": config.steps * config.batch_size,
  }
  path.write_text(json.dumps(result, indent=2) + "\n")
  return result


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


def show(x: dict, sign: str = "") -> str:
  half = "" if x["half"] is None else f" ± {x['half']:.1f}"
  return f"{x['mean']:{sign}.1f}{half}"


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


def write(folder: pathlib.Path, table: dict[str, dict], minutes: float):
  """All files of the comparison."""
  from spatial_jax import drawing, metrics, report

  said = verdict(table)
  shown = tables(table)
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
        "rooms seen": next(iter(table.values()))["rooms"],
      },
    },
  )


def main(argv=None) -> dict[str, dict]:
  from configs import world_compare as recipe

  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--workdir", default="runs/compare", type=pathlib.Path)
  parser.add_argument("--config", default="cpu", help="cpu, gpu or test")
  parser.add_argument("--vggt", default="", help="weights; trained if empty")
  parser.add_argument("--rows", default=",".join(recipe.rows()))
  parser.add_argument("--seeds", default=0, type=int, help="of every row")
  args = parser.parse_args(argv)
  began = time.perf_counter()
  folder = args.workdir.resolve()
  folder.mkdir(parents=True, exist_ok=True)

  from spatial_jax import hosts

  # Further seeds of a row are the same program.
  hosts.cache_programs(str(folder / "compiled"))
  rows, known = args.rows.split(","), recipe.rows()
  vggt = args.vggt
  if not vggt and any({"vggt", "teacher"} & known[row].keys() for row in rows):
    vggt = geometry(folder, args.config)
  results = [
    run(folder, row, seed, args.config, vggt)
    for row, seed in runs(rows, args.seeds)
  ]
  table = summarize(results)
  write(folder, table, (time.perf_counter() - began) / 60)
  print(f"report: {folder / 'report.html'}")
  return table


if __name__ == "__main__":
  main()
