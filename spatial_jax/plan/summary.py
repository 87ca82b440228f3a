# SPDX-License-Identifier: Apache-2.0
"""A plan, and how it reads."""

from __future__ import annotations

import dataclasses
import json

from spatial_jax.plan import chips

# Of the memory, what a program should leave free.
SPARE = 0.1
# How far compiled collectives may be from the formula before the plan says so.
_TOLERANCE = 0.02


@dataclasses.dataclass
class Plan:
  """What `plan` prints; bytes and FLOPs by device and step."""

  config: str
  topology: str
  mesh: dict[str, int]
  batch_size: int
  compiled: bool
  hbm: float  # that a program may use
  parameters: float
  optimizer: float
  batch: float
  activations: float  # and all else that lives while the step runs
  peak: float
  model_flops: float
  program_flops: float
  padded_flops: float
  collectives: dict[str, tuple[int, float]]  # kind -> how many, bytes
  predicted: dict[str, float]  # kind -> bytes, by formula
  floors: dict[str, float]  # what -> seconds
  tokens: float  # of text and images; 0: rows are none of tokens
  compile_seconds: float = 0.0
  compile_cpu_seconds: float = 0.0
  compile_memory: float = 0.0

  @property
  def fits(self) -> bool:
    return self.peak <= (1 - SPARE) * self.hbm

  @property
  def seconds(self) -> float:
    return max(self.floors.values())

  @property
  def bound(self) -> str:
    return max(self.floors, key=self.floors.get)

  @property
  def tokens_per_second(self) -> float:
    return self.tokens / self.seconds

  @property
  def difference(self) -> float:
    """Compiled over predicted bytes of gathers and reductions, minus 1."""
    kinds = ("all-gather", "reduce-scatter", "all-reduce")
    got = sum(self.collectives.get(kind, (0, 0.0))[1] for kind in kinds)
    want = sum(self.predicted.values())
    return got / want - 1 if want else 0.0


def as_json(plan: Plan) -> str:
  extra = {
    name: getattr(plan, name)
    for name in ("fits", "seconds", "bound", "tokens_per_second", "difference")
  }
  return json.dumps({**dataclasses.asdict(plan), **extra}, indent=2)


def as_text(plan: Plan) -> str:
  """The plan in a dozen lines."""

  def gib(size):
    return f"{size / chips.GIB:.2f}"

  room = (1 - SPARE) * plan.hbm - plan.peak
  held = plan.parameters + plan.optimizer + plan.batch
  surely = plan.compiled or held > (1 - SPARE) * plan.hbm
  verdict = "does NOT fit" if surely else "may not fit"
  verdict = "fits" if plan.fits else verdict
  mesh = ", ".join(f"{k} {v}" for k, v in plan.mesh.items()) or "one device"
  lines = [
    f"{plan.config} on {plan.topology} ({mesh}), batch {plan.batch_size}",
    f"{verdict}: {gib(plan.peak)} of {gib(plan.hbm)} GiB a device, "
    f"{gib(abs(room))} {'left' if room >= 0 else 'too much'} "
    f"({SPARE:.0%} spared)",
    f"  parameters {gib(plan.parameters)}, optimizer {gib(plan.optimizer)}, "
    f"batch {gib(plan.batch)}, activations {gib(plan.activations)} GiB",
  ]
  if plan.compiled:
    lines.append(
      f"compiled in {plan.compile_seconds:.0f} s "
      f"({plan.compile_cpu_seconds:.0f} CPU-s, {gib(plan.compile_memory)} GiB)"
    )
    lines += [
      f"  {kind}: {count} a step, {gib(size)} GiB"
      for kind, (count, size) in plan.collectives.items()
    ]
    want = ", ".join(f"{k} {gib(v)} GiB" for k, v in plan.predicted.items())
    close = (
      "" if abs(plan.difference) <= _TOLERANCE else "  <- not as predicted"
    )
    lines.append(
      f"  by formula: {want or 'none'}; compiled {plan.difference:+.1%}{close}"
    )
  else:
    lines.append(
      "not compiled: memory is an upper bound, which counts what a compiler "
      "fuses and the scores that a kernel never stores"
    )
  lines += [
    f"TFLOP a device and step: model {plan.model_flops / 1e12:.1f}, with "
    f"recomputation {plan.program_flops / 1e12:.1f}, padded "
    f"{plan.padded_flops / 1e12:.1f}",
    "floor of a step: "
    + ", ".join(f"{k} {v:.3f} s" for k, v in plan.floors.items())
    + f"; bound by {plan.bound}",
    f"at the floor {plan.tokens_per_second:,.0f} tokens a second and device"
    if plan.tokens
    else f"at the floor {1 / plan.seconds:,.1f} steps a second",
  ]
  return "\n".join(lines)
