# SPDX-License-Identifier: Apache-2.0
"""Published safetensors checkpoints to parameters and back, by key tables.

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
convolutions of any rank; then, as everything else, it is reshaped.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spatial_jax import trees

INDEX = "model.safetensors.index.json"
Table = Iterable[tuple]
Shapes = Mapping[str, tuple[int, ...]]


class Custom(NamedTuple):
  """Functions tensor -> array of one layer, and back."""

  load: Callable[[np.ndarray], np.ndarray]
  save: Callable[[np.ndarray], np.ndarray]


class Tied(NamedTuple):
  """A tensor that may be left out, since it then equals `source`."""

  source: str | tuple[str, ...]


class Entry(NamedTuple):
  """One parameter and the tensors that fill it."""

  path: str
  names: tuple[str, ...]
  stacked: bool
  custom: Custom | None
  start: int | None = None  # first row in a tensor that several share


def nest(table: Table, name: str | tuple[str, ...], path: str) -> tuple:
  """Table whose names and paths get a prefix; several names are aliases."""
  prefixes = (name,) if isinstance(name, str) else name
  return tuple(
    (
      tuple(p + alias for p in prefixes for alias in _aliases(row[0])),
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
) -> list[Entry]:
  """Pairs tensors and parameters by name and shape, touching no data.

  Raises one ValueError that lists everything missing, unused or of the wrong
  shape.

  Args:
    tensors: name -> shape of what the checkpoint holds.
    params: tree of arrays or abstract shapes.
    ignore: prefixes of tensors that are known and unwanted.
    new: regexes of parameters that the checkpoint doesn't have.
  """
  leaves = trees.flatten(params)
  entries, used, wrong, filled = [], set(), [], set()
  for names, path, *special in _rows(table, tensors):
    special = special[0] if special else None
    alias = _choose(names, tensors)
    if not isinstance(path, str):
      if any(part in leaves for part in path):
        shared, problems = _share(alias, path, leaves, tensors)
        entries += shared
        wrong += problems
        filled.update(path)
        used.update(name for entry in shared for name in entry.names)
      continue
    if path not in leaves:
      if isinstance(special, Tied) and alias in tensors:
        used.add(alias)  # the same numbers as its source
      continue
    stacked = "{i}" in alias
    shape = tuple(leaves[path].shape)
    if isinstance(special, Tied) and alias not in tensors:
      alias = _choose(special.source, tensors)
    count = shape[0] if stacked else 1
    entry = Entry(
      path,
      tuple(alias.replace("{i}", str(i)) for i in range(count)),
      stacked,
      special if isinstance(special, Custom) else None,
    )
    filled.add(path)
    layer = shape[1:] if stacked else shape
    for name in entry.names:
      used.add(name)
      if name not in tensors:
        wrong.append(f"missing: {name} (for {path})")
      elif not _fits(tuple(tensors[name]), path, layer, entry.custom):
        wrong.append(
          f"shape: {name} is {list(tensors[name])}, which does not fill "
          f"{path} {list(layer)}"
        )
    entries.append(entry)
  is_new = [re.compile(pattern) for pattern in new]
  wrong += [
    f"no tensor is known for parameter {path}"
    for path in leaves
    if path not in filled and not any(r.fullmatch(path) for r in is_new)
  ]
  wrong += [
    f"unused: {name} {list(shape)}"
    for name, shape in tensors.items()
    if name not in used and not name.startswith(tuple(ignore))
  ]
  if wrong:
    raise ValueError(
      f"checkpoint and model do not fit ({len(wrong)} problems); check the "
      "variant and its overrides:\n  " + "\n  ".join(wrong)
    )
  return entries


def load(
  table: Table,
  source: str | os.PathLike,
  params: Any,
  shardings: Any = None,
  *,
  ignore: Sequence[str] = (),
  new: Sequence[str] = (),
) -> dict[str, Any]:
  """Parameters of a safetensors file or of a folder with one or many.

  Reads one parameter at a time and of it only what this host's devices need.

  Args:
    params: abstract shapes and dtypes that are wanted.
    shardings: tree like params; by default all goes to the default device.
    ignore, new: see `plan`. New parameters are not in the result.
  """
  reader = Reader(source)
  leaves = trees.flatten(params)
  places = {} if shardings is None else trees.flatten(shardings)
  loaded = {}
  for entry in plan(table, reader.shapes, params, ignore=ignore, new=new):
    leaf = leaves[entry.path]
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)

    def read(index, entry=entry, shape=shape, dtype=dtype):
      return _read(reader, entry, index, shape).astype(dtype, copy=False)

    if entry.path in places:
      loaded[entry.path] = jax.make_array_from_callback(
        shape, places[entry.path], read
      )
    else:
      loaded[entry.path] = jax.device_put(read((slice(None),) * len(shape)))
  return trees.unflatten(loaded)


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

  Args:
    drop: regexes of parameters that stay behind (auxiliary heads).
    release: which of a row's alternative names to write.
    dtype: of the tensors; by default that of each parameter.
    shard_bytes: largest size of one file.
  """
  leaves = trees.flatten(params)
  rows = [row for row in _rows(table) if _paths(row[1])[0] in leaves]
  known = {path for row in rows for path in _paths(row[1])}
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
  shards, size = [[]], 0
  for name, path, *special in rows:
    aliases = _aliases(name)
    name = aliases[min(release, len(aliases) - 1)]
    parts = [leaves[part] for part in _paths(path)]
    layers = range(parts[0].shape[0]) if "{i}" in name else [None]
    width = np.dtype(dtype or parts[0].dtype).itemsize
    item = sum(math.prod(x.shape) for x in parts) * width
    item //= max(len(layers), 1)
    custom = special[0] if special and isinstance(special[0], Custom) else None
    for i in layers:
      if size + item > shard_bytes and shards[-1]:
        shards.append([])
        size = 0
      shards[-1].append((name.replace("{i}", str(i)), path, i, custom))
      size += item
  os.makedirs(folder, exist_ok=True)
  where, total = {}, 0
  for number, shard in enumerate(shards, 1):
    file = "model.safetensors"
    if len(shards) > 1:
      file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    tensors = {}
    for name, path, i, custom in shard:
      parts = []
      for part in _paths(path):
        array = leaves[part] if i is None else leaves[part][i]
        parts.append(_to_tensor(np.asarray(array), part, custom, dtype))
      tensors[name] = np.concatenate(parts) if len(parts) > 1 else parts[0]
      total += tensors[name].nbytes
      where[name] = file
    # Readers never see half a file.
    partial = os.path.join(folder, file + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, os.path.join(folder, file))
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": where}
    with open(os.path.join(folder, INDEX), "w") as stream:
      json.dump(index, stream, indent=1)


class Reader:
  """Tensors of one safetensors file, or of a folder's, read when asked for."""

  def __init__(self, source: str | os.PathLike):
    self.files = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    for path, wanted in _files(os.fspath(source)).items():
      try:
        file = safe_open(path, framework="numpy")
        names = list(file.keys())
        shapes = {n: tuple(file.get_slice(n).get_shape()) for n in names}
      except (SafetensorError, OSError) as error:
        raise ValueError(
          f"{path} is no readable safetensors file ({error}); it may be cut "
          "short: fetch it again"
        ) from error
      for name in names if wanted is None else wanted:
        if name not in shapes or name in self.files:
          state = "twice" if name in self.files else "not"
          raise ValueError(f"tensor {name} is {state} in {source} ({path})")
        self.files[name], self.shapes[name] = file, shapes[name]

  def slice(self, name: str, index: tuple = ()) -> np.ndarray:
    """Part of a tensor; only that part is read."""
    if not index:
      return self.files[name].get_tensor(name)
    return self.files[name].get_slice(name)[index]


def _files(source: str) -> dict[str, list[str] | None]:
  """Files to read and the tensors wanted of each; None means all."""
  if os.path.isfile(source):
    folder, names = os.path.dirname(source), [os.path.basename(source)]
  elif os.path.isdir(source):
    folder, names = source, sorted(os.listdir(source))
  else:
    raise FileNotFoundError(
      f"checkpoint {source} does not exist; give a .safetensors file or a "
      "folder that holds some"
    )
  if INDEX in names:
    return _indexed(folder, names)
  files = [name for name in names if name.endswith(".safetensors")]
  if files:
    return {os.path.join(folder, name): None for name in files}
  pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
  if pickles:
    raise ValueError(
      f"{source} holds pickled PyTorch weights ({pickles[0]}), which can run "
      'code when read. Convert them where you trust them:\n  python -c "import '
      "torch, safetensors.torch as s; s.save_file(torch.load('"
      f"{pickles[0]}', weights_only=True), 'model.safetensors')\""
    )
  raise ValueError(f"{source} holds no .safetensors file")


def _indexed(folder, names):
  path = os.path.join(folder, INDEX)
  try:
    with open(path) as stream:
      where = json.load(stream)["weight_map"]
    files: dict[str, list[str]] = {}
    for name, file in where.items():
      files.setdefault(file, []).append(name)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{path} is no checkpoint index with a weight_map ({error!r})"
    ) from error
  absent = sorted(set(files) - set(names))
  if absent:
    # A name that points out of the folder is absent from its listing too.
    raise ValueError(
      f"{path} names files that are not in {folder}: {absent}; fetch them"
    )
  return {os.path.join(folder, file): names for file, names in files.items()}


def _read(reader, entry, index, shape):
  """Part of a parameter, of the tensors' dtype."""
  if not entry.stacked:
    return _layer(reader, entry, entry.names[0], index, shape)
  layers = range(*index[0].indices(shape[0]))
  parts = (
    _layer(reader, entry, entry.names[i], index[1:], shape[1:]) for i in layers
  )
  first = next(parts)
  array = np.empty((len(layers), *first.shape), first.dtype)
  array[0] = first
  for i, part in enumerate(parts, 1):
    array[i] = part
  return array


def _layer(reader, entry, name, index, shape):
  if entry.custom is not None:
    return entry.custom.load(reader.slice(name)).reshape(shape)[index]
  stored = reader.shapes[name]
  is_kernel = _is_kernel(entry.path)
  if entry.start is not None:
    # The tensor's first axis is the last one of a kernel, else the first one.
    axis = len(shape) - 1 if is_kernel else 0
    rows = range(entry.start, entry.start + shape[axis])[index[axis]]
    rows = slice(rows.start, rows.stop)
    index = (*index[:axis], rows, *index[axis + 1 :])
    stored = (shape[axis], *stored[1:])
  if is_kernel and len(stored) == len(shape) == 2:
    return reader.slice(name, index[::-1]).T
  if not is_kernel and stored == shape and shape:
    return reader.slice(name, index)
  tensor = reader.slice(name)
  if is_kernel:
    tensor = np.moveaxis(tensor, (1, 0), (-2, -1))
  return tensor.reshape(shape)[index]


def _to_tensor(array, path, custom, dtype):
  if custom is not None:
    array = custom.save(array)
  elif _is_kernel(path):
    array = np.moveaxis(array, (-2, -1), (1, 0))
  return np.ascontiguousarray(array.astype(dtype or array.dtype, copy=False))


def _fits(stored, path, layer, custom):
  if custom is not None:
    return math.prod(stored) == math.prod(layer)
  if _is_kernel(path) and len(stored) >= 2:
    stored = (*stored[2:], stored[1], stored[0])
  if len(stored) == len(layer):
    return stored == layer
  return math.prod(stored) == math.prod(layer)


def _share(alias, paths, leaves, tensors):
  """Entries of the parameters that follow each other in one tensor."""
  absent = [path for path in paths if path not in leaves]
  if absent:
    return [], [
      f"no parameter {path} for its part of {alias}" for path in absent
    ]
  stacked, entries, problems, start = "{i}" in alias, [], [], 0
  count = leaves[paths[0]].shape[0] if stacked else 1
  names = tuple(alias.replace("{i}", str(i)) for i in range(count))
  for path in paths:
    entries.append(Entry(path, names, stacked, None, start))
    layer = tuple(leaves[path].shape[1 if stacked else 0 :])
    if _is_kernel(path):
      layer = (layer[-1], *layer[:-1])
    start += layer[0]
  want = (start, *layer[1:])
  for name in names:
    if name not in tensors:
      problems.append(f"missing: {name} (for {', '.join(paths)})")
    elif tuple(tensors[name]) != want:
      problems.append(
        f"shape: {name} is {list(tensors[name])}, but {', '.join(paths)} "
        f"together fill {list(want)}"
      )
  return entries, problems


def _rows(table, tensors=None):
  """One row for each parameter: the first that has a tensor, or the first."""
  rows = tuple(table)

  def is_there(row):
    names = _aliases(row[0])
    if len(row) > 2 and isinstance(row[2], Tied):
      names = (*names, *_aliases(row[2].source))
    return any(name.replace("{i}", "0") in tensors for name in names)

  there = [tensors is None or is_there(row) for row in rows]
  taken, kept = set(), set()
  for wanted in (True, False):
    for number, row in enumerate(rows):
      paths = _paths(row[1])
      if there[number] == wanted and taken.isdisjoint(paths):
        taken.update(paths)
        kept.add(number)
  return [row for number, row in enumerate(rows) if number in kept]


def _paths(path):
  return (path,) if isinstance(path, str) else path


def _is_kernel(path):
  return path.rsplit("/", 1)[-1] == "kernel"


def _aliases(name):
  return (name,) if isinstance(name, str) else tuple(name)


def _choose(names, tensors):
  """The alias that the checkpoint uses; the first one if it has none."""
  names = _aliases(names)
  first = (name.replace("{i}", "0") for name in names)
  return next(
    (n for n, f in zip(names, first, strict=True) if f in tensors), names[0]
  )
