# SPDX-License-Identifier: Apache-2.0
"""The `import` and `export` commands: published weights and workdirs.

import: folder, file or hub id -> key table -> devices -> checkpoint 0 of a
workdir, which training starts from and evaluate, generate and export read.
export: newest checkpoint -> adapters merged -> key table -> folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from spatial_jax import (
  checkpoint,
  hf,
  hf_files,
  hf_hub,
  hf_write,
  lora,
  sharding,
  trees,
)
from spatial_jax import system as systems

_DTYPES = ("bfloat16", "float16", "float32")


def load(
  config: Any, workdir: str | None, *, source: str, dry_run: bool = False
) -> None:
  """Published weights into a workdir without a checkpoint.

  Args:
    source: file, folder or hub id.
    dry_run: print what would be read, from the headers alone.
  """
  if not source:
    raise ValueError(
      "--from is missing: give a folder or file of weights, or a hub id"
    )
  if not (workdir or dry_run):
    raise ValueError(
      "--workdir is missing: give a folder, --workdir=runs/NAME, or --dry-run"
    )
  shapes, mod = systems.shapes(config)
  keys, ignore = getattr(mod, "KEYS", ()), getattr(mod, "IGNORE", ())
  # Auxiliary heads and adapters are no part of a published model.
  names = trees.flatten(shapes)
  new = [r for r in config.init_new if any(re.fullmatch(r, n) for n in names)]
  if dry_run:
    print(_describe(keys, source, shapes, ignore, new), flush=True)
    return
  mesh = sharding.mesh(**config.mesh.to_dict())
  lead = jax.process_index() == 0
  with checkpoint.lock(workdir, active=lead), jax.set_mesh(mesh):
    if checkpoint.is_workdir(workdir):
      raise FileExistsError(
        f"{workdir} already has checkpoints; choose another --workdir"
      )
    params = hf.load(
      keys,
      source,
      shapes,
      sharding.parameters(shapes, mesh),
      ignore=ignore,
      new=new,
    )
    if lead:
      os.makedirs(workdir, exist_ok=True)
      checkpoint.write_config(workdir, config.to_json_best_effort())
    saves = checkpoint.Checkpointer(workdir)
    try:
      meta = {"config": config.to_json_best_effort(), "imported": source}
      saves.save_params(0, params, meta)
      saves.wait()
    finally:
      saves.close()
  print(f"{_amount(params)} of {source} are in {workdir}", flush=True)


def save(
  config: Any,
  workdir: str | None,
  *,
  source: str,
  to: str,
  dtype: str = "",
  like: str = "",
) -> None:
  """A workdir's newest parameters as a folder that their reference loads.

  Args:
    source: the workdir; by default `workdir`.
    to: folder for the files.
    dtype: of all numbers; by default that of each parameter.
    like: folder whose config.json, tokenizer and so on are copied.
  """
  source = source or workdir
  if not source or not to:
    missing = "to" if source else "from"
    raise ValueError(f"--{missing} is missing: give a folder")
  if dtype not in ("", *_DTYPES):
    raise ValueError(f"--dtype={dtype}: expected {', '.join(_DTYPES)}")
  if like and not os.path.isdir(like):
    raise FileNotFoundError(f"--like={like}: there is no such folder")
  if not checkpoint.is_workdir(source):
    raise FileNotFoundError(
      f"no checkpoint in {source}; give the workdir of a trained or imported "
      "model"
    )
  shapes, mod = systems.shapes(config)
  mesh = sharding.mesh(**config.mesh.to_dict())
  saves = checkpoint.Checkpointer(source, read_only=True)
  try:
    stored = systems.drop_auxiliary(trees.unflatten(saves.shapes()))
    abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      stored,
      sharding.parameters(stored, mesh),
    )
    params, meta = saves.params(abstract)
  finally:
    saves.close()
  params = lora.merge(params)
  if wrong := _differences(params, shapes):
    raise ValueError(
      f"checkpoint of {source} is of another model than the config:\n  {wrong}"
      "\nuse the config it was trained with"
    )
  hf.save(getattr(mod, "KEYS", ()), params, to, dtype=dtype or None)
  copied = hf_write.copy_companions(like, to, dtype) if like else []
  print(
    f"{_amount(params)} of step {meta['step']} are in {to}"
    + (f", with {', '.join(copied)}" if copied else ""),
    flush=True,
  )


def _differences(params: Any, shapes: Any) -> str:
  """In names and shapes; dtypes may differ."""
  got, want = (
    {k: jax.ShapeDtypeStruct(x.shape, np.float32) for k, x in flat.items()}
    for flat in (trees.flatten(params), trees.flatten(shapes))
  )
  return trees.diff(got, want)


def _amount(params: Any) -> str:
  size = _size(jax.tree.leaves(params))
  return f"{trees.count(params):,} parameters ({size})"


def _size(arrays: Iterable[Any]) -> str:
  total = sum(x.size * x.dtype.itemsize for x in arrays)
  return f"{total / 1e9:.2f} GB" if total >= 1e8 else f"{total / 1e6:.2f} MB"


def _tensors(source: str) -> dict[str, jax.ShapeDtypeStruct]:
  """What a source holds, from its headers alone."""
  if found := hf_hub.headers(source):
    if odd := sorted({x for x, _ in found.values()} - hf_files.DTYPES.keys()):
      raise ValueError(f"{source} holds {', '.join(odd)}, which are not read")
    return {
      name: jax.ShapeDtypeStruct(shape, hf_files.DTYPES[dtype])
      for name, (dtype, shape) in found.items()
    }
  reader = hf.Reader(source)
  reader.close()
  return {
    name: jax.ShapeDtypeStruct(shape, reader.dtypes[name])
    for name, shape in reader.shapes.items()
  }


def _describe(
  table: hf.Table,
  source: str,
  shapes: Any,
  ignore: Sequence[str],
  new: Sequence[str],
) -> str:
  """Every parameter with its tensors, and what is left on either side."""
  leaves = trees.flatten(shapes)
  tensors = _tensors(source)
  dtypes = {name: x.dtype for name, x in tensors.items()}
  entries = hf.plan(
    table,
    {name: x.shape for name, x in tensors.items()},
    shapes,
    ignore=ignore,
    new=new,
    dtypes=dtypes,
    where=source,
  )

  rows = [("parameter", "shape", "dtype", "tensors")]
  for entry in entries:
    leaf, name = leaves[entry.path], entry.names[0]
    count = f"{len(entry.names)} x " if entry.stacked else ""
    part = "" if entry.start is None else f", rows from {entry.start}"
    tensor = f"{list(tensors[name].shape)} {dtypes[name]}{part}"
    shape = str(list(leaf.shape))
    rows.append((entry.path, shape, str(leaf.dtype), f"{count}{name} {tensor}"))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip()
    for row in rows
  ]
  read = {name for entry in entries for name in entry.names}
  left = [name for name in tensors if name not in read]
  loaded = [leaves[entry.path] for entry in entries]
  fresh = sorted(leaves.keys() - {entry.path for entry in entries})
  lines += [
    "",
    f"read: {len(read)} tensors, {_size(tensors[name] for name in read)}",
    f"loaded: {_amount(loaded)}",
    f"new, start fresh: {', '.join(fresh) or 'none'}",
    f"ignored: {len(left)} tensors, {_size(tensors[name] for name in left)}"
    + (f" ({', '.join(left[:8])}{', ...' * (len(left) > 8)})" if left else ""),
  ]
  return "\n".join(lines)
