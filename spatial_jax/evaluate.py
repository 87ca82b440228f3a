# SPDX-License-Identifier: Apache-2.0
"""Runs the evaluators of config.evals on the parameters of a checkpoint.

An evaluator is a module with
  evaluate(config, model, mod, params, mesh, **kwargs) -> dict
where kwargs are its entry in config.evals without `name` and `every`.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from spatial_jax import checkpoint, sharding
from spatial_jax import system as systems
from spatial_jax.data import pipeline


def main(config: Any, workdir: str) -> dict[str, Any]:
  """Scores the newest checkpoint of the workdir, prints and writes them."""
  if not config.evals:
    raise ValueError(
      "config.evals is empty: name an evaluator, for instance "
      "config.evals.vsi = dict(name='spatial_jax.evaluators.vsi')"
    )
  if not checkpoint.is_workdir(workdir):
    raise FileNotFoundError(
      f"no checkpoint in {workdir}; train first, or give the --workdir of a "
      "trained model"
    )
  mesh = sharding.mesh(**config.mesh.to_dict())
  with jax.set_mesh(mesh):
    example = pipeline.example(config)
    system = systems.build(config, example, config.batch_size)
    params, step = load(workdir, system, mesh)
    print(f"checkpoint {step} of {workdir}", flush=True)
    scores = run(config, system, params, mesh, list(config.evals))
  if jax.process_index():
    return scores
  folder = epath.Path(workdir, "evaluations")
  folder.mkdir(exist_ok=True)
  path = folder / f"{step}.json"
  path.write_text(
    json.dumps({"step": step, **scores}, indent=2, default=float) + "\n"
  )
  print(f"written to {path}", flush=True)
  return scores


def load(workdir: str, system: systems.System, mesh: Any) -> tuple[Any, int]:
  """The model's own parameters on the mesh, and their step."""
  shapes = jax.eval_shape(system.init, jax.random.key(0))
  shapes = systems.drop_auxiliary(shapes)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.parameters(shapes, mesh),
  )
  saves = checkpoint.Checkpointer(workdir, read_only=True)
  try:
    params, meta = saves.params(abstract)
  finally:
    saves.close()
  return params, meta["step"]


def due(config: Any, step: int) -> list[str]:
  """Labels of the evaluators that run after this training step."""
  return [
    label
    for label, entry in config.evals.items()
    if (every := entry.get("every", 0))
    and (step % every == 0 or step == config.steps)
  ]


def run(
  config: Any,
  system: systems.System,
  params: Any,
  mesh: Any,
  labels: Sequence[str],
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """label -> what its evaluator returned."""
  params = systems.drop_auxiliary(params)
  out = {}
  for label in labels:
    kwargs = config.evals[label].to_dict()
    kwargs.pop("every", None)
    name = kwargs.pop("name", None)
    try:
      module = importlib.import_module(name or "")
    except (ImportError, ValueError) as error:
      raise ValueError(
        f"config.evals.{label}.name={name!r} cannot be imported ({error}); "
        "expected the import path of a module with evaluate()"
      ) from error
    began = time.perf_counter()
    out[label] = module.evaluate(
      config, system.model, system.mod, params, mesh, **kwargs
    )
    say(table(label, out[label], time.perf_counter() - began))
  return out


def scalars(
  scores: Mapping[str, Any], prefix: str = "eval"
) -> dict[str, float]:
  """The numbers in nested scores by path, without those of lists (examples)."""
  found = {}
  for name, x in scores.items():
    if isinstance(x, Mapping):
      found |= scalars(x, f"{prefix}/{name}")
    elif isinstance(x, (int, float)) and not isinstance(x, bool):
      found[f"{prefix}/{name}"] = float(x)
  return found


def table(label: str, scores: Mapping[str, Any], seconds: float) -> str:
  """Scores as aligned lines."""
  rows = scalars({label: scores})
  width = max((len(name) for name in rows), default=0)
  lines = [f"{name:<{width}}  {value:10.4f}" for name, value in rows.items()]
  return "\n".join([f"{label} ({seconds:.1f} s)", *lines])
