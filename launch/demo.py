# SPDX-License-Identifier: Apache-2.0
"""`make demo`: train on rendered rooms, score on unseen ones, write a report.

  python launch/demo.py --workdir=runs/demo
  python launch/demo.py --workdir=runs/demo --layouts=scannet_meta_info.json.gz

The first trains a seeing model in two stages and a blind one on the same
questions without images, then scores both on rooms never seen; what is already
trained in the workdir is reused. The second scores the trained pair on real
room layouts in the VSI-Bench meta format. Both print a table and write a page.
Step counts and seeds are fixed: a slower machine gives the same numbers later.
A processor with other vectors sums in another order, which moves scores by a
point.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

CURVES = (
  ("loss", "training loss"),
  ("aux/category", "what each patch shows (cross-entropy)"),
  ("aux/ground", "where a named object is"),
  ("aux/angle", "the asked angle"),
)

SHOWN = 4  # rooms in the report
SCORES = "scores.json"  # of the blind model, on rooms never seen
# What is trained, in this order, with which arguments of configs/demo.py.
RUNS = {"vision": "stage=vision", "seeing": "", "blind": "blind"}


def train(folder: pathlib.Path, test: bool) -> dict | None:
  """The three runs; finished ones are left as they are.

  Returns the blind model's scores, if it has been scored already.
  """
  import jax

  if jax.default_backend() != "cpu":
    for name in RUNS:
      run(folder, name, test)
    return None
  # The blind model needs nothing of the others: a process trains and scores it
  # with what they leave of two cores, above all while they compile.
  log = folder / "blind.log"
  command = [sys.executable, __file__, f"--workdir={folder}", "--blind"]
  folder.mkdir(parents=True, exist_ok=True)
  with log.open("w") as out:
    blind = subprocess.Popen(
      command + ["--test"] * test, stdout=out, stderr=subprocess.STDOUT
    )
  try:
    run(folder, "vision", test)
    run(folder, "seeing", test)
    print("\n=== blind ===", flush=True)
    if blind.wait():
      sys.exit(f"error: {log} ends with\n{log.read_text()[-2000:]}")
    print(*re.findall("goodput .*;.*", log.read_text())[-1:])
  finally:
    if blind.poll() is None:
      blind.terminate()  # it saves
      blind.wait()
  return json.loads((folder / "blind" / SCORES).read_text())


def run(
  folder: pathlib.Path, name: str, test: bool, interrupted: int = 0
) -> None:
  """One of `RUNS`; the process ends with `interrupted` if it is stopped."""
  from configs import demo
  from spatial_jax import train as trainer

  config = demo.get_config(RUNS[name] + ",test" * test)
  if name == "seeing":
    config.init_from = str(folder / "vision")
  print(f"\n=== {name} ===", flush=True)
  if trainer.main(config, str(folder / name)).interrupted:
    sys.exit(interrupted)


def evaluate(folder: pathlib.Path, name: str, layouts: str, test: bool):
  """Scores of a model, with the answers in some rooms, and its config."""
  from configs import demo
  from spatial_jax import evaluate as evaluator

  parts = [RUNS[name], "test" * test, f"layouts={layouts}" * bool(layouts)]
  config = demo.get_config(",".join(p for p in parts if p))
  config.evals.vsi.keep = SHOWN
  print(f"\n=== {name} ===", flush=True)
  return evaluator.main(config, str(folder / name))["vsi"], config


def table(scores: dict) -> list[dict]:
  """Rows of the report: the macro average, then each type."""
  rows = []
  for kind, got in scores["seeing"]["per_type"].items():
    blind = scores["blind"]["per_type"].get(kind, {})
    rows.append(
      {
        "type": kind,
        "seeing": got["score"],
        "blind": blind.get("score"),
        "chance": got["chance"],
        "count": got["questions"],
      }
    )
  return [
    {
      "type": "VSI macro",
      "seeing": scores["seeing"]["macro"],
      "blind": scores["blind"]["macro"],
    },
    *rows,
  ]


def clear(rows: list[dict], margin: float = 10.0) -> list[str]:
  """Types at least `margin` points above both the blind model and chance."""
  return [
    r["type"]
    for r in rows[1:]
    if r["blind"] is not None
    and r["seeing"] - max(r["blind"], r["chance"]) >= margin
  ]


def show(rows: list[dict]) -> None:
  print(f"\n{'type':<30}{'seeing':>8}{'blind':>8}{'chance':>8}{'rooms':>8}")
  for row in rows:
    cells = "".join(
      f"{row[k]:>8.1f}" if row.get(k) is not None else " " * 8
      for k in ("seeing", "blind", "chance")
    )
    print(f"{row['type']:<30}{cells}{row.get('count', ''):>8}")


def pictures(config, scores: dict, count: int) -> list[dict]:
  """Frames, depth and answers of the first evaluated rooms."""
  import jax
  import numpy as np

  from spatial_jax.world import dataset, render

  config = config.copy_and_resolve_references()
  config.data.world.rooms = max(count, config.evals.vsi.get("rooms", count))
  source = dataset.make(config, "test")
  draw = jax.jit(render.render, static_argnums=(3, 4))
  blind = {e["room"]: e["answers"] for e in scores["blind"]["examples"]}
  rooms = []
  for example in scores["seeing"]["examples"][:count]:
    room = source.room(example["room"])
    size = 2 * source.image_size  # for people; the model sees half of it
    scale = np.array([[2.0], [2.0], [1.0]], np.float32)
    intrinsics = source.intrinsics * scale
    view = draw(room.scene, room.world_from_camera, intrinsics, size, size)
    answers = [
      q | {"blind": b["answer"]}
      for q, b in zip(example["answers"], blind[example["room"]], strict=True)
    ]
    rooms.append(
      {
        "name": source.name(example["room"]),
        "scene": room.scene,
        "world_from_camera": room.world_from_camera,
        "intrinsics": intrinsics,
        "rgb": np.asarray(view["rgb"]),
        "depth": np.asarray(view["depth"]),
        "object": np.asarray(view["object"]),
        "questions": answers,
      }
    )
  return rooms


def curves(folder: pathlib.Path) -> dict[str, list[dict]]:
  runs = {}
  for name in ("vision", "seeing", "blind"):
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    runs[name] = [r for r in rows if "loss" in r]
  return runs


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--workdir", default="runs/demo", type=pathlib.Path)
  parser.add_argument("--layouts", default="", help="real rooms to score on")
  parser.add_argument("--test", action="store_true", help="two steps of each")
  parser.add_argument("--blind", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  gc.set_threshold(100_000, 50, 100)  # as the command line's
  folder, began = args.workdir.resolve(), time.perf_counter()
  if args.blind:
    os.nice(10)
    # Stopped alone, it must not count as trained.
    run(folder, "blind", args.test, interrupted=1)
    scores, _ = evaluate(folder, "blind", "", args.test)
    (folder / "blind" / SCORES).write_text(json.dumps(scores, default=float))
    return
  if args.layouts and not (folder / "seeing" / "checkpoints").exists():
    sys.exit(f"error: no trained model in {folder}; run make demo first")
  blind = None if args.layouts else train(folder, args.test)
  if blind is None:
    blind, _ = evaluate(folder, "blind", args.layouts, args.test)
  seeing, config = evaluate(folder, "seeing", args.layouts, args.test)
  scores = {"blind": blind, "seeing": seeing}

  from spatial_jax import report

  rows = table(scores)
  good = clear(rows)
  macro, blind = rows[0]["seeing"], rows[0]["blind"]
  where = "real room layouts" if args.layouts else "rooms never seen"
  path = folder / ("layouts.html" if args.layouts else "report.html")
  report.write(
    path,
    {
      "title": "A spatial VLM from random weights",
      "lead": (
        "A small Qwen2.5-VL-shaped model learned from procedurally generated "
        "rooms, rendered on the fly, and is scored here on "
        f"{where}. The blind model was trained on the same questions without "
        "images: what it knows is in the words, not in the pictures."
      ),
      "headline": [
        {
          "value": f"{macro:.1f}",
          "label": "VSI macro, seeing",
          "note": f"blind {blind:.1f}",
        },
        {
          "value": f"{macro - blind:+.1f}",
          "label": "points over blind",
          "note": where,
        },
        {
          "value": str(len(good)),
          "label": "question types",
          "note": "10 points above blind and chance",
        },
      ],
      "table": rows,
      "runs": curves(folder),
      "curves": list(CURVES),
      "rooms": pictures(config, scores, SHOWN),
      "settings": {
        "minutes": f"{(time.perf_counter() - began) / 60:.1f}",
        "steps": "vision {}, seeing {}, blind {}".format(
          *(rows[-1]["step"] for rows in curves(folder).values())
        ),
      },
    },
  )
  show(rows)
  print(
    f"\nVSI macro {macro:.1f} seeing, {blind:.1f} blind: {macro - blind:+.1f}; "
    f"{len(good)} types at least 10 points above blind and chance\n"
    f"report: {path}"
  )


if __name__ == "__main__":
  main()
