# SPDX-License-Identifier: Apache-2.0
"""What a traced program computes, moves and keeps: from its jaxpr, uncompiled.

A loop's body counts as often as it runs; what nothing reads doesn't count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from spatial_jax import sharding
from spatial_jax.nn import attention

# Of a register: fewer queries than these take as long.
_ROWS = 8


class Flops(NamedTuple):
  """Of products alone; scores that a causal mask hides count half.

  Attention under any square mask counts as causal.
  """

  model: float  # forward and backward once
  program: float  # with what is computed again
  padded: (
    float  # the same, on a matrix unit that sides below its own don't fill
  )
  attention: float  # part of `program`


def trace(function: Any, *arguments: Any) -> Any:
  """Jaxpr of a jitted function, without what nothing reads."""
  jaxpr = function.trace(*arguments).jaxpr
  wanted = [True] * len(jaxpr.jaxpr.outvars)
  return partial_eval.dce_jaxpr(jaxpr.jaxpr, wanted, instantiate=True)[0]


def flops(jaxpr: Any, side: int) -> Flops:
  """Of all devices together.

  Args:
    side: rows and columns of the matrix unit.
  """
  model = program = padded = scores = 0.0
  for eqn, times, names in equations(jaxpr):
    if eqn.primitive.name not in ("dot_general", "conv_general_dilated"):
      continue
    m, n, k, batch = _sides(eqn)
    if attention.CAUSAL in names:
      times = times / 2
    count = 2.0 * times * batch * m * n * k
    program += count
    is_scores = attention.SCORES in names
    # Small heads leave much of the unit empty; weights are never that small.
    least = _least(names, m, n, k) if is_scores else side
    padded += count * max(side / least, 1)
    if attention.AGAIN not in names:
      model += count
    if is_scores:
      scores += count
  return Flops(model, program, padded, scores)


def _least(names, *sides):
  """The smallest side of scores, as a kernel has it: with all queries."""
  if turn := attention.TURN.search(names):
    some, whole = map(int, turn.groups())
    sides = [whole if side == some else side for side in sides]
  return max(min(sides), _ROWS)


def gathers(jaxpr: Any) -> Counter:
  """Bytes of weights gathered and of gradients summed, as `sharding` asks.

  By the kinds of `hlo.collectives`, for each device and step.
  """
  found = Counter()
  for eqn, times, names in equations(jaxpr):
    if eqn.primitive.name != "sharding_constraint":
      continue
    out = eqn.outvars[0].aval
    size = times * out.size * out.dtype.itemsize
    if sharding.GATHER in names:
      found["all-gather"] += size
    elif sharding.REDUCE in names:
      found["reduce-scatter"] += size
      placed = eqn.params["sharding"]
      if placed.mesh.shape["data"] > 1:  # then of parts, over the data axis
        part = math.prod(placed.shard_shape(out.shape)) / out.size
        found["all-reduce"] += part * size
  return found


def equations(
  jaxpr: Any, times: float = 1, names: str = ""
) -> Iterator[tuple[Any, float, str]]:
  """(equation, how often it runs, its name stack) of a jaxpr and those in it.

  On all devices together. Of a conditional the branches count by the share that
  their scope names (see `attention.share`), or else all as often.
  """
  for eqn in jaxpr.eqns:
    here = f"{names}/{eqn.source_info.name_stack}"
    yield eqn, times, here
    inner = list(core.jaxprs_in_params(eqn.params))
    repeat = 1
    if eqn.primitive.name == "scan":
      repeat = eqn.params["length"]
    elif eqn.primitive.name == "shard_map":
      repeat = eqn.params["mesh"].size  # each device, on its own part
    if eqn.primitive.name == "pallas_call":
      continue
    for body in inner:
      share = _share(body, len(inner)) if eqn.primitive.name == "cond" else 1
      yield from equations(body, times * repeat * share, here)


def _share(body, branches):
  names = (str(eqn.source_info.name_stack) for eqn in body.eqns)
  shares = (attention.share_in(name) for name in names)
  return next((x for x in shares if x is not None), 1 / branches)


def _sides(eqn):
  """(m, n, k, batch) of a product."""
  left, right = (v.aval.shape for v in eqn.invars[:2])
  if eqn.primitive.name == "conv_general_dilated":
    kernel = eqn.params["dimension_numbers"].rhs_spec
    out = eqn.outvars[0].aval.shape
    n = right[kernel[0]]
    return math.prod(out) // n, n, math.prod(right) // n, 1
  (k_left, _), (b_left, _) = eqn.params["dimension_numbers"]
  k = math.prod(left[i] for i in k_left)
  batch = math.prod(left[i] for i in b_left)
  m = math.prod(left) // (k * batch)
  return m, math.prod(right) // (k * batch), k, batch


def peak(jaxpr: Any) -> float:
  """Bytes that live at once, arguments included, if nothing were fused.

  An upper bound where elementwise chains are long: each link counts, two at a
  time.
  """

  def size(v):
    aval = v.aval
    if not hasattr(aval, "shape"):
      return 0
    width = getattr(aval.dtype, "itemsize", 4)
    return math.prod(aval.shape) * width

  def walk(jaxpr):
    last = {}
    for i, eqn in enumerate(jaxpr.eqns):
      last |= {v: i for v in eqn.invars if not _is_literal(v)}
    last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not _is_literal(v)}
    live = most = 0
    held = {}
    for i, eqn in enumerate(jaxpr.eqns):
      inner = 0
      if eqn.primitive.name != "pallas_call":
        bodies = list(core.jaxprs_in_params(eqn.params))
        inner = max((walk(body) for body in bodies), default=0)
      for v in eqn.outvars:
        if v in last:
          held[v] = size(v)
          live += held[v]
      most = max(most, live + inner)
      for v in {v for v in eqn.invars if not _is_literal(v)}:
        if last.get(v) == i and v in held:
          live -= held.pop(v)
    return most

  return walk(jaxpr) + sum(size(v) for v in jaxpr.invars)


def _is_literal(v):
  return hasattr(v, "val")


def shard_bytes(tree: Any) -> float:
  """Bytes of arrays (or their shapes) on one device."""

  def size(x):
    shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return math.prod(shape) * np.dtype(x.dtype).itemsize

  return float(sum(map(size, jax.tree.leaves(tree))))
