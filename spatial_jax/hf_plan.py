# SPDX-License-Identifier: Apache-2.0
"""Which tensor fills which parameter: key tables against names and shapes.

What a table is stands in `hf`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from spatial_jax import hf_arrays, hf_files, trees
from spatial_jax.hf_arrays import Custom, Entry

Table = Iterable[tuple]
Shapes = Mapping[str, tuple[int, ...]]

_SHOWN = 50  # lines of each kind in an error


class Tied(NamedTuple):
  """A tensor that may be left out, since it then equals `source`."""

  source: str | tuple[str, ...]


def nest(table: Table, name: str | tuple[str, ...], path: str) -> tuple:
  """Table whose names and paths get a prefix; several names are aliases."""
  prefixes = (name,) if isinstance(name, str) else name
  return tuple(
    (
      tuple(p + alias for p in prefixes for alias in names_of(row[0])),
      path + row[1]
      if isinstance(row[1], str)
      else tuple(path + part for part in row[1]),
      *row[2:],
    )
    for row in table
  )


def plan(
  table: Table,
  tensors: Shapes,
  params: Any,
  *,
  ignore: Sequence[str] = (),
  new: Sequence[str] = (),
  prefix: str | None = None,
  dtypes: Mapping[str, np.dtype] | None = None,
  where: str = "the checkpoint",
) -> list[Entry]:
  """Pairs tensors and parameters by name and shape, touching no data.

  Raises one ValueError that lists everything missing, unused, of the wrong
  shape or dtype.

  Args:
    tensors: name -> shape of what the checkpoint holds.
    params: tree of arrays or abstract shapes.
    ignore: prefixes of tensors that are known and unwanted.
    new: regexes of parameters that are not to be loaded: those that the
      checkpoint doesn't have, or that shall start fresh.
    prefix: what precedes the table's names in the checkpoint. By default it is
      found, when all of them are there below one and only one prefix.
    dtypes: name -> dtype of the tensors, to be checked too.
    where: what an error calls the checkpoint.
  """
  table, leaves = tuple(table), trees.flatten(params)
  fresh = {
    path for path in leaves if any(re.fullmatch(one, path) for one in new)
  }
  wrong = [
    f"the regex {regex!r} of new parameters matches none"
    for regex in new
    if not any(re.fullmatch(regex, path) for path in leaves)
  ]
  if prefix is None:
    prefix = find_prefix(table, tensors, leaves, new)
  inside = {
    name[len(prefix) :]: shape
    for name, shape in tensors.items()
    if name.startswith(prefix)
  }
  entries, used, filled = [], set(), set()
  for names, path, *special in rows(table, inside):
    special = special[0] if special else None
    alias, paths = choose(names, inside), paths_of(path)
    if isinstance(special, Tied):
      if not any(path in leaves for path in paths):
        used.add(alias)  # the same numbers as its source
      elif alias not in inside:
        alias = choose(special.source, inside)
    found, problems = _match(alias, paths, leaves, inside, special, prefix)
    used.update(name for entry in found for name in entry.names)
    filled.update(paths)
    if not fresh.intersection(paths):
      wrong += problems
    entries += [entry for entry in found if entry.path not in fresh]
  entries = [
    e._replace(names=tuple(prefix + name for name in e.names)) for e in entries
  ]
  wrong += [
    f"no tensor is known for parameter {path} {list(leaf.shape)}, so it would "
    "stay random"
    for path, leaf in leaves.items()
    if path not in filled and path not in fresh
  ]
  used = {prefix + name for name in used}
  ignored = (*ignore, *(prefix + one for one in ignore))
  wrong += [
    f"unused: {hf_files.show(name)} {list(shape)}"
    for name, shape in tensors.items()
    if name not in used and not name.startswith(ignored)
  ]
  wrong += _dtype_problems(entries, leaves, dtypes or {})
  if wrong:
    raise ValueError(_misfit(wrong, where))
  return entries


def find_prefix(table, tensors, leaves, new):
  """What precedes a table's names in a checkpoint; "" unless it is certain."""
  wanted: dict[str, set[str]] = {}  # parameter -> names it may have
  for names, path, *special in table:
    if special and isinstance(special[0], Tied):
      continue
    for one in paths_of(path):
      if one in leaves and not any(re.fullmatch(r, one) for r in new):
        aliases = (name.replace("{i}", "0") for name in names_of(names))
        wanted.setdefault(one, set()).update(aliases)

  def found(prefix):
    return sum(
      any(prefix + name in tensors for name in names)
      for names in wanted.values()
    )

  if not wanted or found("") == len(wanted):
    return ""
  anchor = next(iter(wanted.values()))
  known = {
    tensor[: -len(name)]
    for tensor in tensors
    for name in anchor
    if tensor.endswith((f".{name}", f"/{name}"))
  }
  scores = {prefix: found(prefix) for prefix in sorted(known)}
  whole = [prefix for prefix, n in scores.items() if n == len(wanted)]
  if len(whole) > 1:
    raise ValueError(
      "the checkpoint holds this model several times, below "
      f"{', '.join(map(hf_files.show, whole))}; say which with prefix="
    )
  if whole:
    return whole[0]
  # Incomplete below all of them. The error is shorter for the likeliest one.
  best = max(scores, key=scores.get, default="")
  return best if not found("") and 2 * scores.get(best, 0) > len(wanted) else ""


def _match(alias, paths, leaves, tensors, special, prefix):
  """Entries of a row, and what is wrong with them."""
  absent = [path for path in paths if path not in leaves]
  if absent:
    part = len(absent) < len(paths)
    return [], [
      f"no parameter {path} for its part of {alias}" for path in absent if part
    ]
  custom = special if isinstance(special, Custom) else None
  stacked, shared = "{i}" in alias, len(paths) > 1
  count = leaves[paths[0]].shape[0] if stacked else 1
  names = tuple(alias.replace("{i}", str(i)) for i in range(count))
  entries, start, layer = [], 0, ()
  for path in paths:
    first = start if shared else None
    entries.append(Entry(path, names, stacked, custom, first))
    layer = tuple(leaves[path].shape[1 if stacked else 0 :])
    if shared:
      if hf_arrays.is_moved(prefix + alias, path):
        layer = (layer[-1], *layer[:-1])
      start += layer[0]
  problems, target = [], ", ".join(paths)
  for name in names:
    shape = tensors.get(name)
    if shape is None:
      problems.append(f"missing: {name} (for {target})")
    elif shared and tuple(shape) != (start, *layer[1:]):
      problems.append(
        f"shape: {name} is {list(shape)}, but {target} together fill "
        f"{[start, *layer[1:]]}"
      )
    elif not shared and not hf_arrays.fits(
      shape, prefix + alias, paths[0], layer, custom
    ):
      problems.append(
        f"shape: {name} is {list(shape)}, which does not fill {target} "
        f"{list(layer)}"
      )
  return entries, problems


def _dtype_problems(entries, leaves, dtypes):
  problems = []
  for entry in entries:
    wanted = leaves[entry.path].dtype
    is_float = jnp.issubdtype(wanted, jnp.floating)
    for name in entry.names:
      dtype = dtypes.get(name)
      if dtype is None:
        continue
      kind = jnp.floating if is_float else jnp.integer
      fits = jnp.issubdtype(dtype, kind) or dtype == wanted
      if is_float and dtype.itemsize < 2:
        fits = False  # 8-bit floats mean nothing without their scales
      if not fits:
        problems.append(
          f"dtype: {name} is {dtype}, but {entry.path} takes "
          + (
            "float64, float32, float16 or bfloat16" if is_float else f"{wanted}"
          )
          + "; convert it (quantised weights: with their scales)"
        )
  return problems


def _misfit(wrong, where):
  """The error's text: at most so many lines of each kind."""
  kinds, lines = Counter(), []
  for line in wrong:
    kind = line.partition(" ")[0]
    kinds[kind] += 1
    if kinds[kind] <= _SHOWN:
      lines.append(line)
  lines += [
    f"... and {count - _SHOWN} more lines like {kind!r}"
    for kind, count in kinds.items()
    if count > _SHOWN
  ]
  return (
    f"{where} and the model do not fit ({len(wrong)} problems); check the "
    "variant and its overrides, name new parameters in config.init_new:\n  "
    + "\n  ".join(lines)
  )


def rows(table, tensors=None):
  """One row for each parameter: the first that has a tensor.

  If none has, a tensor is missing. It is the one beside rows that have theirs,
  so that the error names it as the checkpoint would.
  """
  rows = tuple(table)

  def is_there(row):
    names = names_of(row[0])
    if len(row) > 2 and isinstance(row[2], Tied):
      names = (*names, *names_of(row[2].source))
    return any(has(name, tensors) for name in names)

  there = [tensors is None or is_there(row) for row in rows]
  beside = [any(there[max(i - 1, 0) : i + 2]) for i in range(len(rows))]
  taken, kept = set(), set()
  for wanted in (there, beside, [True] * len(rows)):
    for number, row in enumerate(rows):
      paths = paths_of(row[1])
      if wanted[number] and taken.isdisjoint(paths):
        taken.update(paths)
        kept.add(number)
  return [row for number, row in enumerate(rows) if number in kept]


def paths_of(path: str | tuple[str, ...]) -> tuple[str, ...]:
  return (path,) if isinstance(path, str) else path


def names_of(name: str | tuple[str, ...]) -> tuple[str, ...]:
  return (name,) if isinstance(name, str) else tuple(name)


def choose(names, tensors):
  """The alias that the checkpoint uses; the first one if it has none."""
  names = names_of(names)
  return next((name for name in names if has(name, tensors)), names[0])


def has(name, tensors):
  """Whether a checkpoint has the tensor, or that of one of the first layers."""
  layers = ("0", "1", "2") if "{i}" in name else ("",)
  return any(name.replace("{i}", layer) in tensors for layer in layers)
