# SPDX-License-Identifier: Apache-2.0
"""Plans a recipe for chips that aren't here: does it fit, how fast at best.

  python -m spatial_jax plan --config=FILE[:ARGS] --topology=v5e:4x4
    [--json] [--search] [--serve]

The training step that `train` runs is compiled for these chips, on any machine:
with libtpu for TPUs; for one GPU ("h100:1") by jax's CUDA plugin, and without
the plugin only traced. `--serve` plans generation instead; see serve.py.

Seconds are a floor, the largest of three: products at the chip's peak, memory
once through, links at their full rate. Programs reach 60 to 70 percent of it.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from spatial_jax import models, sharding, train
from spatial_jax.data import pipeline
from spatial_jax.plan import chips, compiled, cost, summary
from spatial_jax.plan import serve as serving


def main(
  config: Any,
  workdir: str | None = None,
  *,
  topology: str = "v5e:4x4",
  json: bool = False,
  search: bool = False,
  serve: bool = False,
) -> summary.Plan | serving.Serving:
  """The plan command; `workdir` isn't used."""
  del workdir
  compiled.share_memory()
  target = chips.parse(topology)
  if serve and search:
    raise ValueError("--search is for training; give --serve a topology")
  if serve:
    found = serving.make(config, target, *_meshes(config, target))
    write = serving.as_json if json else serving.as_text
    print(write(found), flush=True)
    return found
  plan = find(config, target) if search else make(config, target)
  write = summary.as_json if json else summary.as_text
  print(write(plan), flush=True)
  if not (json or plan.fits) and config.model.get("remat") == "products":
    print("with --config.model.remat=full activations need less", flush=True)
  return plan


def make(config: Any, topology: chips.Topology) -> summary.Plan:
  """Plan of a config's training step on a topology."""
  mesh, plain, example = _meshes(config, topology)
  jaxpr, batch = None, None
  # Once with attention as products, to count them; once for the chip.
  with jax.sharding.use_abstract_mesh(plain):
    prepared = train.prepare(config, example, plain)
    batch = _batch(prepared, plain)
    jaxpr = cost.trace(prepared.update, prepared.state, batch)
  chip = topology.chip
  flops = cost.flops(jaxpr, chip.matrix)
  state = prepared.state
  sizes = {
    "parameters": cost.shard_bytes(state["params"]),
    "optimizer": cost.shard_bytes(state["opt"]),
    "batch": cost.shard_bytes(batch),
  }
  arguments = sum(sizes.values())
  if mesh is plain:
    measured = {
      "compiled": False,
      "peak": cost.peak(jaxpr),
      "collectives": {},
    }
    wire = 0.0
  else:
    measured, wire = _compile(config, example, mesh)
  gathered = cost.gathers(jaxpr)
  moved = sum(size for _, size in measured["collectives"].values())
  state_bytes = sizes["parameters"] + sizes["optimizer"]
  floors = {
    "products": flops.padded / topology.count / chip.peak,
    # The state is read and written, what is gathered written and read.
    "memory": (2 * state_bytes + 2 * moved) / chip.bandwidth,
    "links": wire / topology.wire,
  }
  return summary.Plan(
    config=config.model_name + ":" + str(config.model.get("variant", "")),
    topology=topology.name,
    mesh={k: v for k, v in plain.shape.items() if v > 1},
    batch_size=config.batch_size,
    hbm=chip.hbm,
    **sizes,
    activations=measured["peak"] - arguments,
    model_flops=flops.model / topology.count,
    program_flops=flops.program / topology.count,
    padded_flops=flops.padded / topology.count,
    predicted=dict(gathered),
    floors=floors,
    tokens=config.batch_size * config.data.get("length", 0) / topology.count,
    **measured,
  )


def _meshes(config, topology):
  """Mesh of a topology, the same without its devices, spec of an example.

  Both meshes are one where no compiler for these devices is installed.
  """
  devices = chips.devices(topology)
  if not devices:
    mesh = plain = AbstractMesh(
      (1,) * len(sharding.MESH_AXES),
      sharding.MESH_AXES,
      axis_types=(AxisType.Auto,) * len(sharding.MESH_AXES),
    )
  else:
    axes = {} if topology.is_gpu else config.mesh.to_dict()
    mesh = sharding.mesh(**axes, devices=devices)
    sharding.check_batch(mesh, config.batch_size, config.accumulate)
    plain = _without_platform(mesh)
  return mesh, plain, _example(config)


def _compile(config, example, mesh):
  """Figures of the compiled step, and bytes that a device sends."""
  with jax.set_mesh(mesh):
    prepared = train.prepare(config, example, mesh)
    batch = _batch(prepared, mesh)
    return compiled.measure(prepared.update, prepared.state, batch)[:2]


def find(config: Any, topology: chips.Topology) -> summary.Plan:
  """Plan for the smallest topology of this kind on which the config fits."""
  if topology.is_gpu:
    raise ValueError("--search is for TPU topologies; a GPU is one GPU")
  tried = []
  for sizes in chips.SIZES[topology.kind]:
    candidate = chips.parse(f"{topology.kind}:{sizes}")
    ways = candidate.count
    if (
      config.batch_size % ways or _least(config, candidate) > topology.chip.hbm
    ):
      tried.append(
        f"{candidate.name}: state alone too large, or batch not split"
      )
      continue
    try:
      plan = make(config, candidate)
    except compiled.TooLarge as error:
      tried.append(f"{candidate.name}: {error}")
      continue
    if plan.fits:
      return plan
    tried.append(f"{candidate.name}: {plan.peak / chips.GIB:.1f} GiB")
  raise ValueError(
    f"no {topology.kind} topology fits at config.batch_size="
    f"{config.batch_size}:\n  " + "\n  ".join(tried)
  )


def _least(config, topology):
  """Bytes of the state on each chip, without compiling."""
  sizes = [config.mesh[name] for name in sharding.MESH_AXES]
  fixed = math.prod(size for size in sizes if size != -1)
  sizes = tuple(topology.count // fixed if s == -1 else s for s in sizes)
  mesh = AbstractMesh(
    sizes, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes)
  )
  with jax.sharding.use_abstract_mesh(mesh):
    return cost.shard_bytes(train.prepare(config, _example(config), mesh).state)


def _without_platform(mesh):
  return AbstractMesh(
    tuple(mesh.shape.values()), mesh.axis_names, axis_types=mesh.axis_types
  )


def _example(config):
  """Spec of one example: from rendered data, or what the model asks for."""
  if config.data.get("render"):
    return pipeline.example(config)
  _, mod = models.build(config)
  return {
    name: (x.shape[1:], x.dtype) for name, x in mod.INPUTS(config).items()
  }


def _batch(prepared, mesh):
  rows = sharding.batch_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
    for name, x in prepared.system.batch.items()
  }
