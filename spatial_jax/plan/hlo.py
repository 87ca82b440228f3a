# SPDX-License-Identifier: Apache-2.0
"""Collectives of a compiled program, read from its text.

A collective counts as often as the loops around it run. TPU programs have most
of them asynchronously, as up to three computations that show the same
instruction; its copies have one `chain_id`.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import NamedTuple

from spatial_jax.nn import attention

_BYTES = {
  "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
  "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(
  r"%?([\w.\-]+) = (\(?.*?\)?) (all-gather|all-reduce|reduce-scatter|"
  r"all-to-all|ragged-all-to-all|collective-permute)(-start)?\("
)
_CALLED = re.compile(r"(?:body|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(
  r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)"
)


class Collective(NamedTuple):
  kind: str
  ways: int  # devices that take part
  count: int  # in one step
  bytes: float  # of each; of the larger side: gathered, or before the reduction

  @property
  def total(self) -> float:
    return self.count * self.bytes

  @property
  def wire(self) -> float:
    """Bytes that a device sends in one step."""
    if self.kind == "collective-permute":
      return self.total
    factor = 2 if self.kind == "all-reduce" else 1
    return factor * self.total * (self.ways - 1) / max(self.ways, 1)


def collectives(text: str) -> list[Collective]:
  """All collectives of `compiled.as_text()` that cross devices."""
  computations, entry = _computations(text)
  times = _times(computations, entry)
  found: dict[tuple, tuple[tuple, Collective]] = {}
  for name, lines in computations.items():
    for line in lines if times[name] else ():
      if not (match := _COLLECTIVE.search(line)):
        continue
      own, shape, kind, started = match.groups()
      size, ways = _size(shape, kind, bool(started)), _ways(line)
      if "all-reduce-scatter" in name and kind == "all-reduce":
        kind = "reduce-scatter"  # a fusion that keeps its own part
      elif kind == "collective-permute" and (
        ring := re.search(r"windowed_dot_general_body_(ag|rs)", name)
      ):
        # Parts go around while they are multiplied: all of them, the whole.
        kind = "all-gather" if ring[1] == "ag" else "reduce-scatter"
      elif kind == "reduce-scatter":
        size *= ways
      if ways < 2:
        continue
      chain = re.search(r'chain_id="(\d+)"', line)
      # Steps of one in between may be spread over a loop that hides them.
      is_between = name.startswith("async_collective_fusion")
      key = (chain[1], kind, shape.partition("{")[0]) if chain else (own,)
      one = Collective(kind, ways, round(times[name]), size)
      rank = not (chain and is_between), one.count
      if key not in found or found[key][0] < rank:
        found[key] = rank, one
  return [one for _, one in found.values()]


def by_kind(
  found: list[Collective],
) -> dict[tuple[str, int], tuple[int, float]]:
  """(kind, ways) -> (how many in a step, bytes together)."""
  sums = defaultdict(lambda: (0, 0.0))
  for one in found:
    count, size = sums[one.kind, one.ways]
    sums[one.kind, one.ways] = count + one.count, size + one.total
  return dict(sorted(sums.items()))


def _computations(text):
  computations, entry, current = {}, "", None
  for line in text.splitlines():
    if line and not line[0].isspace() and (match := _HEADER.match(line)):
      current = computations[match[2]] = []
      entry = match[2] if match[1] else entry
    elif current is not None:
      current.append(line)
  return computations, entry


def _times(computations, entry):
  """How often each computation runs."""
  calls = {}
  for name, lines in computations.items():
    calls[name] = []
    for line in lines:
      trips = _trips(line, computations) if " while(" in line else 1
      inner = _CALLED.findall(line)
      calls[name] += [(i, trips) for i in inner if i in computations]
      branches = " ".join(map(" ".join, _BRANCHES.findall(line)))
      branches = re.findall(r"[\w.\-]+", branches)
      calls[name] += [
        (branch, _share(computations[branch], len(branches)))
        for branch in branches
      ]
  times = defaultdict(int)

  def walk(name, count):
    times[name] += count
    for inner, trips in calls[name]:
      walk(inner, count * trips)

  walk(entry, 1)
  return times


def _share(branch, branches):
  """How often of all times a branch is taken, as `cost.equations` counts it."""
  shares = map(attention.share_in, branch)
  return next((x for x in shares if x is not None), 1 / branches)


def _trips(line, computations):
  """Trips of a loop that counts from 0 to a number in its condition."""
  if known := re.search(r"known_trip_count[^\d]*(\d+)", line):
    return int(known[1])
  condition, body = (
    computations.get(re.search(rf"{part}=%?([\w.\-]+)", line)[1], ())
    for part in ("condition", "body")
  )
  last = max(_constants(condition).values(), default=1)
  return max(last // _step(condition, body), 1)


def _constants(lines):
  """Integers of a computation by the names of their instructions."""
  found = (
    re.search(r"%?([\w.\-]+) = [su]32\[\][^=]*? constant\((\d+)\)", line)
    for line in lines
  )
  return {match[1]: int(match[2]) for match in found if match}


def _step(condition, body):
  """What a loop adds to its counter: more than 1 where it was unrolled."""
  get = re.compile(r"get-tuple-element\(.*?index=(\d+)")
  counter = next(filter(None, map(get.search, condition)), None)
  root = "".join(line for line in body if "ROOT" in line)
  results = re.findall(r"%([\w.\-]+)", root.partition(" tuple(")[2])
  if not counter or int(counter[1]) >= len(results):
    return 1
  own = re.compile(
    rf"%{re.escape(results[int(counter[1])])} = .*? add\(%[\w.\-]+, "
    r"%([\w.\-]+)\)"
  )
  added = next((m[1] for m in map(own.search, body) if m), None)
  return _constants(body).get(added) or 1


def _size(shape, kind, started):
  """Bytes of a result; tuples are summed."""
  sizes = [
    _BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n)
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
  ]
  if not started:
    return float(sum(sizes))
  # (operands, results, ...): results are the larger ones or as large.
  return float(sizes[0] if kind == "collective-permute" else max(sizes))


def _ways(line):
  """Devices in a group of a collective."""
  if "source_target_pairs" in line:
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    return pairs[1].count("{") if pairs else 2
  if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*? \{('.*?)\}", line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    return math.prod(int(sizes[a]) for a in re.findall(r"'(\w+)'", mesh[2]))
  if tiles := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
    return int(tiles[2])
  if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
    return groups[1].count(",") + 1
  return 0
