# SPDX-License-Identifier: Apache-2.0
"""Plans generation: the pass over the prompts, and a step of one token a row.

Parameters are in config.model.dtype, placed as the mesh says. `fsdp` gathers
them for every token: for single answers give the devices to
config.mesh.tensor, for many at once to config.mesh.data.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp

from spatial_jax import sharding
from spatial_jax import system as systems
from spatial_jax.plan import chips, compiled, cost, summary


@dataclasses.dataclass
class Phase:
  """Of a device; bytes, FLOPs and seconds of one call."""

  compiled: bool
  peak: float
  cache: float
  flops: float  # of what is computed
  padded_flops: float  # and with what the matrix unit leaves empty
  collectives: dict[str, tuple[int, float]]  # kind -> how many, bytes
  floors: dict[str, float]  # what -> seconds

  @property
  def seconds(self) -> float:
    return max(self.floors.values())

  @property
  def bound(self) -> str:
    return max(self.floors, key=self.floors.get)


@dataclasses.dataclass
class Serving:
  """What `plan --serve` prints."""

  config: str
  topology: str
  batch_size: int
  prompt: int  # tokens of a row
  new: int  # tokens that may follow
  hbm: float
  parameters: float  # bytes on a device
  phases: dict[str, Phase]  # "prefill" and "decode"

  @property
  def fits(self) -> bool:
    return all(
      p.peak <= (1 - summary.SPARE) * self.hbm for p in self.phases.values()
    )

  @property
  def tokens_per_second(self) -> float:
    """Of all devices, at the floor of decoding."""
    return self.batch_size / self.phases["decode"].seconds


def make(
  config: Any, topology: chips.Topology, mesh: Any, plain: Any, example: Any
) -> Serving:
  """Plan of config.batch_size rows of config.data.length tokens.

  Args:
    mesh: of the topology.
    plain: the same without devices; where both are one, nothing is compiled.
  """
  system = systems.build(config, example, config.batch_size)
  if not hasattr(system.model, "init_cache"):
    raise ValueError(
      f"config.model_name={config.model_name!r} has no `init_cache`: it "
      "generates no text; plan its training instead, without --serve"
    )
  new, chip = config.generate.max_new_tokens, topology.chip
  shapes = jax.eval_shape(lambda: system.init(jax.random.key(0)))
  shapes = systems.drop_auxiliary(shapes)
  half = jnp.dtype(config.model.get("dtype", "float32"))
  shapes = jax.tree.map(
    lambda x: x.update(dtype=half) if x.dtype == jnp.float32 else x, shapes
  )
  calls = {"prefill": _prefill(system, new), "decode": _decode(system)}

  def arguments(mesh, cache):
    params = _placed(shapes, sharding.parameters(shapes, mesh))
    rows = sharding.batch_sharding(mesh)
    inputs = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
      for name, x in system.inputs.items()
    }
    step = {
      name: x.update(shape=(*x.shape[:-1], 1))
      for name, x in inputs.items()
      if name in ("tokens", "positions", "segments")
    }
    return {"prefill": (params, inputs), "decode": (params, cache, step)}

  with jax.sharding.use_abstract_mesh(plain):
    given = arguments(plain, None)
    cache = jax.eval_shape(calls["prefill"], *given["prefill"])[1]
    given = arguments(plain, cache)
    traced = {
      name: cost.trace(call, *given[name]) for name, call in calls.items()
    }
    held = cost.shard_bytes(given["prefill"][0])
  phases, kept = {}, cost.shard_bytes(cache)
  for name, call in calls.items():
    flops = cost.flops(traced[name], chip.matrix)
    wire = 0.0
    if mesh is plain:
      peak = cost.peak(traced[name])
      measured = {"compiled": False, "peak": peak, "collectives": {}}
    else:
      with jax.set_mesh(mesh):
        given = arguments(mesh, cache)[name]
        measured, wire, program = compiled.measure(call, *given)
      if name == "prefill":
        cache = _placed(cache, program.output_shardings[1])
        kept = cost.shard_bytes(cache)
    if topology.is_gpu and name == "decode":
      # There `generate` has layers and cache once more, out of their stacks.
      stacks = shapes.get("llm", shapes)["blocks"]
      measured["peak"] += cost.shard_bytes(stacks) + kept
    moved = sum(size for _, size in measured["collectives"].values())
    padded = flops.padded / topology.count
    phases[name] = Phase(
      compiled=measured["compiled"],
      peak=measured["peak"],
      cache=kept,
      flops=flops.program / topology.count,
      padded_flops=padded,
      collectives=measured["collectives"],
      floors={
        "products": padded / chip.peak,
        "memory": (held + kept + 2 * moved) / chip.bandwidth,
        "links": wire / topology.wire,
      },
    )
  return Serving(
    config=config.model_name + ":" + str(config.model.get("variant", "")),
    topology=topology.name,
    batch_size=config.batch_size,
    prompt=config.data.length,
    new=new,
    hbm=chip.hbm,
    parameters=held,
    phases=phases,
  )


def _placed(tree, shardings):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )


def _prefill(system, new):
  @jax.jit
  def prefill(params, batch):
    B, T = batch["tokens"].shape
    logits, out = system.model.apply(
      {"params": params},
      **system.mod.arguments(batch),
      cache=system.model.init_cache(B, T + new),
      last=jnp.full(B, T - 1, jnp.int32),
    )
    return jnp.argmax(logits[:, 0], axis=-1), out["cache"]

  return prefill


def _decode(system):
  def decode(params, cache, batch):
    logits, out = system.model.apply(
      {"params": params},
      **batch,
      cache=cache,
      last=jnp.zeros(batch["tokens"].shape[0], jnp.int32),
    )
    return jnp.argmax(logits[:, 0], axis=-1), out["cache"]

  return jax.jit(decode, donate_argnums=1)


def as_json(found: Serving) -> str:
  extra = {
    "fits": found.fits,
    "tokens_per_second": found.tokens_per_second,
    "seconds": {name: p.seconds for name, p in found.phases.items()},
  }
  return json.dumps({**dataclasses.asdict(found), **extra}, indent=2)


def as_text(found: Serving) -> str:
  """The plan in a dozen lines."""
  gib = chips.GIB
  lines = [
    f"{found.config} on {found.topology}, {found.batch_size} prompts of "
    f"{found.prompt} tokens and {found.new} more each: "
    + ("fits" if found.fits else "may not fit"),
    f"  parameters {found.parameters / gib:.2f} of {found.hbm / gib:.2f} GiB a "
    "device",
  ]
  for name, phase in found.phases.items():
    lines.append(
      f"{name}: peak {phase.peak / gib:.2f} GiB"
      f"{'' if phase.compiled else ' at most, not compiled'}, cache "
      f"{phase.cache / gib:.2f}; {phase.flops / 1e12:.3f} TFLOP, padded "
      f"{phase.padded_flops / 1e12:.3f}"
    )
    lines += [
      f"  {kind}: {count}, {size / gib:.3f} GiB"
      for kind, (count, size) in phase.collectives.items()
    ]
    lines.append(
      "  floor: "
      + ", ".join(f"{k} {1e3 * v:.2f} ms" for k, v in phase.floors.items())
      + f"; bound by {phase.bound}"
    )
  lines.append(
    f"at the floor {found.tokens_per_second:,.0f} new tokens a second together"
  )
  return "\n".join(lines)
