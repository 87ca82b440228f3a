# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints to parameters and back, by key tables.

A table is a tuple of rows `(name, path)` or `(name, path, special)`:

* `name`: tensor in the checkpoint; `{i}` stands for the number of a layer. A
  tuple holds the names that different releases give the same tensor.
* `path`: parameter. Rows with `{i}` stack the layers along its first axis. A
  tuple of paths shares a tensor: the parameters follow each other along its
  first axis (a fused query, key and value).
* `special`: a `Tied` head, or a `Custom` pair of functions.

Several rows for one parameter are namings that no alias can express, such as
three linear layers or a fused one: the checkpoint decides which is read, the
first is written.

There is no column for transposes. The leading (out, in) axes of a tensor that
becomes a `kernel` move to its end as (in, out), which covers linear layers and
convolutions of any rank; then, as everything else, it is reshaped. Only names
with "/", of checkpoints that JAX code wrote, keep their axes.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import jax
import numpy as np

from spatial_jax import hf_arrays, hf_plan, hf_write, trees
from spatial_jax.hf_arrays import Custom, Entry
from spatial_jax.hf_files import INDEX, Reader
from spatial_jax.hf_plan import Shapes, Table, Tied, nest, plan

__all__ = [
  "INDEX",
  "Custom",
  "Entry",
  "Reader",
  "Shapes",
  "Table",
  "Tied",
  "load",
  "merge",
  "nest",
  "plan",
  "save",
  "tensors",
]


def load(
  table: Table,
  source: str | os.PathLike,
  params: Any,
  shardings: Any = None,
  *,
  ignore: Sequence[str] = (),
  new: Sequence[str] = (),
  prefix: str | None = None,
) -> dict[str, Any]:
  """Parameters of a published checkpoint, on their devices.

  Reads one parameter at a time and of it only what this host's devices need.

  Args:
    source: see `Reader`.
    params: abstract shapes and dtypes that are wanted.
    shardings: tree like params; by default all goes to the default device.
    ignore, new, prefix: see `plan`. New parameters are not in the result.
  """
  table, leaves = tuple(table), trees.flatten(params)
  places = {} if shardings is None else trees.flatten(shardings)
  loaded = {}
  workers = min(max(os.cpu_count() or 1, 2), 16)
  with closing(Reader(source)) as reader, ThreadPoolExecutor(workers) as pool:
    if prefix is None:
      prefix = hf_plan.find_prefix(table, reader.shapes, leaves, new)
    entries = plan(
      table,
      reader.shapes,
      params,
      ignore=ignore,
      new=new,
      prefix=prefix,
      dtypes=reader.dtypes,
      where=reader.source,
    )
    _check_tied(table, reader, leaves, {e.path for e in entries}, prefix)
    # Largest first: what a parameter takes on its way is small beside what is
    # still to come.
    for entry in sorted(
      entries, key=lambda e: -math.prod(leaves[e.path].shape)
    ):
      loaded[entry.path] = _load(
        reader, entry, leaves[entry.path], places.get(entry.path), pool, workers
      )
  return trees.unflatten({e.path: loaded[e.path] for e in entries})


def merge(
  loaded: Mapping[str, Any],
  init: Callable[[jax.Array], Any],
  key: jax.Array,
  shardings: Any = None,
) -> Any:
  """All parameters: those loaded, and for the rest what `init(key)` gives.

  Only the rest is computed, and born with its shardings.

  Args:
    loaded: what `load` returned.
    init: makes all parameters.
    shardings: tree like that of init.
  """
  have = trees.flatten(loaded)
  shapes = jax.eval_shape(init, key)
  wrong = trees.diff(
    have, {k: x for k, x in trees.flatten(shapes).items() if k in have}
  )
  if wrong:
    raise ValueError(f"these parameters are of another model:\n{wrong}")
  names = [name for name in trees.flatten(shapes) if name not in have]
  if shardings is not None:
    places = trees.flatten(shardings)
    shardings = {name: places[name] for name in names}
  fresh = jax.jit(
    lambda key: {
      k: x for k, x in trees.flatten(init(key)).items() if k in names
    },
    out_shardings=shardings,
  )(key)
  return trees.map_names(
    lambda name, _: have[name] if name in have else fresh[name], shapes
  )


def save(
  table: Table,
  params: Any,
  folder: str | os.PathLike,
  *,
  drop: Sequence[str] = (),
  release: int = 0,
  dtype: Any = None,
  shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes parameters as a published checkpoint; the inverse of `load`.

  One tensor at a time is on the host.

  Args:
    drop: regexes of parameters that stay behind (auxiliary heads).
    release: which of a row's alternative names to write.
    dtype: of the tensors; by default that of each parameter.
    shard_bytes: largest size of one file.
  """
  outputs = tensors(table, params, drop=drop, release=release, dtype=dtype)
  hf_write.write(os.fspath(folder), outputs, shard_bytes)


def tensors(
  table: Table,
  params: Any,
  *,
  drop: Sequence[str] = (),
  release: int = 0,
  dtype: Any = None,
) -> list[hf_write.Output]:
  """What `save` writes, before any number is made.

  Args:
    params: arrays, or abstract shapes if no `Output.make` is called.
  """
  leaves = trees.flatten(params)
  rows = [
    row for row in hf_plan.rows(table) if hf_plan.paths_of(row[1])[0] in leaves
  ]
  known = {path for row in rows for path in hf_plan.paths_of(row[1])}
  lost = [
    path
    for path in leaves
    if path not in known and not any(re.fullmatch(d, path) for d in drop)
  ]
  if lost:
    raise ValueError(
      "no tensor name is known for these parameters; drop them or add rows: "
      + ", ".join(lost)
    )
  return [out for row in rows for out in _outputs(row, leaves, release, dtype)]


def _check_tied(table, reader, leaves, wanted, prefix):
  """A tied head and the table it repeats must be the same numbers."""
  inside = {n[len(prefix) :] for n in reader.shapes if n.startswith(prefix)}
  rows = [
    (hf_plan.choose(names, inside), path, special[0].source)
    for names, path, *special in table
    if special and isinstance(special[0], hf_plan.Tied)
  ]
  # A table of several namings has a row for each.
  there = {path for alias, path, _ in rows if alias in inside}
  for alias, path, sources in rows:
    source = hf_plan.choose(sources, inside)
    name, other = prefix + alias, prefix + source
    if path in wanted and alias not in inside:
      if path in there:
        continue
      if reader.config("tie_word_embeddings") is False:
        raise ValueError(
          f"{reader.source}: missing: {name} (for {path}); config.json says "
          "that it is not tied to the embeddings. Fetch the missing file"
        )
      continue
    if path in leaves or not inside.issuperset((alias, source)):
      continue
    # The first rows tell: an untied head differs in all of them.
    few = (slice(0, 8),)
    if not np.array_equal(reader.slice(name, few), reader.slice(other, few)):
      raise ValueError(
        f"{reader.source}: {name} differs from {other}, but this variant ties "
        f"them; override it so that the model has {path} (tied=False)"
      )


def _load(reader, entry, leaf, place, pool, workers):
  """One parameter on its devices."""
  shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
  indices = {None: (slice(None),) * len(shape)}
  if place is not None:
    indices = place.addressable_devices_indices_map(shape)
  boxes = {d: hf_arrays.box(index, shape) for d, index in indices.items()}
  unique = list(dict.fromkeys(boxes.values()))
  parts = hf_arrays.fill(reader, entry, shape, dtype, unique, pool, workers)
  parts = dict(zip(unique, parts, strict=True))
  arrays = [jax.device_put(parts[box], d) for d, box in boxes.items()]
  # Else the host's copies of several parameters would pile up.
  jax.block_until_ready(arrays)
  if place is None:
    return arrays[0]
  return jax.make_array_from_single_device_arrays(shape, place, arrays)


def _on_host(part, layer):
  """A layer of a stack; None: all of it. Accelerators send that layer only."""
  if layer is None:
    return np.asarray(part)
  if trees.is_on_host(part):
    return np.asarray(part)[layer]
  return np.asarray(part[layer])


def _outputs(row, leaves, release, dtype):
  """The tensors that a row writes."""
  names, path, *special = row
  aliases, paths = hf_plan.names_of(names), hf_plan.paths_of(path)
  alias = aliases[min(release, len(aliases) - 1)]
  custom = special[0] if special and isinstance(special[0], Custom) else None
  parts = [leaves[one] for one in paths]
  stacked = "{i}" in alias
  wanted = np.dtype(dtype or parts[0].dtype)
  layer = parts[0].shape[1:] if stacked else parts[0].shape
  if custom is not None:
    shape = custom.save(np.zeros(layer, parts[0].dtype)).shape
  elif hf_arrays.is_moved(alias, paths[0]):
    shape = (layer[-1], layer[-2], *layer[:-2])
  else:
    shape = tuple(layer)
  if len(parts) > 1:
    axis = -1 if hf_arrays.is_moved(alias, paths[0]) else int(stacked)
    shape = (sum(part.shape[axis] for part in parts), *shape[1:])

  def make(i):
    tensors = [
      hf_arrays.to_tensor(_on_host(part, i), alias, one, custom, wanted)
      for part, one in zip(parts, paths, strict=True)
    ]
    return np.concatenate(tensors) if len(tensors) > 1 else tensors[0]

  for i in range(parts[0].shape[0]) if stacked else (None,):
    name = alias.replace("{i}", str(i))
    yield hf_write.Output(name, wanted, shape, functools.partial(make, i))
