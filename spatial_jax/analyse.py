# SPDX-License-Identifier: Apache-2.0
"""The `analyse` command: where a trained model keeps left, right and depth.

Reads the newest checkpoint of the workdir and writes to `WORKDIR/analysis`:
analysis.json, figures (SVG, PNG) and index.html, a page of all figures.
"""

from __future__ import annotations

import html
import json
import pathlib
from typing import Any

import jax

from spatial_jax import checkpoint, evaluate, sharding
from spatial_jax import system as systems
from spatial_jax.analysis import pipeline, plots
from spatial_jax.analysis.subject import Subject
from spatial_jax.data import pipeline as data


def load(config: Any, workdir: str) -> tuple[Subject, int]:
  """The workdir's trained model as a subject, and its step.

  Raises:
    FileNotFoundError: no checkpoint there.
  """
  if not checkpoint.is_workdir(workdir):
    raise FileNotFoundError(
      f"no checkpoint in {workdir}; train first, or give the --workdir of a "
      "trained model"
    )
  mesh = sharding.mesh(**config.mesh.to_dict())
  with jax.set_mesh(mesh):
    system = systems.build(config, data.example(config), config.batch_size)
    params, step = evaluate.load(workdir, system, mesh)
  rooms = config.analyse.rooms
  return Subject(config, system.model, system.mod, params, rooms), step


def main(config: Any, workdir: str) -> dict[str, Any]:
  """Analyses the newest checkpoint, prints the summary, writes files."""
  if not config.get("analyse"):
    raise ValueError(
      "the config has no `analyse`: give configs/dual_mechanisms.py:model=NAME "
      "with the name of the recipe that the workdir was trained with"
    )
  subject, step = load(config, workdir)
  print(f"checkpoint {step} of {workdir}", flush=True)
  with jax.set_mesh(sharding.mesh(**config.mesh.to_dict())):
    result, shown = pipeline.run(
      subject, config.analyse, lambda line: print(line, flush=True)
    )
  result["step"] = step
  folder = pathlib.Path(workdir, "analysis")
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(result, indent=1, default=float)
  (folder / "analysis.json").write_text(text + "\n", encoding="utf-8")
  names = write(folder, plots.draw(result, shown, subject.size))
  (folder / "index.html").write_text(page(result, names), encoding="utf-8")
  for name, value in result["summary"].items():
    print(f"{name:<34}{'-' if value is None else format(value, '8.3f'):>8}")
  print(f"written to {folder}", flush=True)
  return result


def write(folder: pathlib.Path, drawn: dict[str, Any]) -> list[str]:
  """Files of the figures; their names."""
  for name, figure in drawn.items():
    if isinstance(figure, str):
      (folder / name).write_text(figure, encoding="utf-8")
    else:
      figure.save(folder / name)
  return list(drawn)


def page(result: dict[str, Any], names: list[str]) -> str:
  """All figures on one page, the summary above them."""
  rows = "".join(
    f"<tr><td>{html.escape(name)}</td>"
    f"<td>{'-' if value is None else format(value, '.3f')}</td></tr>"
    for name, value in result["summary"].items()
  )
  order = sorted(names, key=lambda name: ("front_behind" in name, name))
  shown = "".join(f'<p><img src="{name}" alt="{name}"></p>' for name in order)
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    "<title>Where is space in this model?</title><style>"
    "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;"
    "padding:0 1rem}img{max-width:100%}td{padding:.1rem 1rem .1rem 0}</style>"
    "<h1>Where is space in this model?</h1><p>Questions about two things in a "
    "frame of a room never seen, each asked with the options in both orders; "
    "an answer counts when both are right (chance 0.25).</p>"
    f"<table>{rows}</table>{shown}</html>\n"
  )
