# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of {params, opt, step}, the data iterator and the config.

<workdir>/checkpoints/<step>/ holds the items `params`, `opt`, `meta` and
`data`. `meta` carries the shape, dtype and checksum of every array, so that a
checkpoint of another model is told from a damaged one: the first is an error,
the second falls back to the checkpoint before it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from spatial_jax import hosts, trees

State = dict[str, Any]
_FOLDER = "checkpoints"
_SMALL = 2**20  # bytes


class Mismatch(ValueError):
  """The checkpoint is sound but belongs to another model or shape."""


class Corrupt(ValueError):
  """The checkpoint's content is damaged."""


@functools.cache
def _save_small_arrays_whole() -> None:
  """Copies of an array on several devices are saved in parts, one by each.

  To cut up a small one costs a compilation and gains nothing.
  """
  handler = ocp.type_handlers.ArrayHandler(
    min_slice_bytes_for_replica_parallel=_SMALL
  )
  noise = logging.getLogger("absl")
  level = noise.level
  noise.setLevel(logging.ERROR)  # it warns of every replacement
  ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
  noise.setLevel(level)


@contextlib.contextmanager
def lock(workdir: str, *, active: bool = True) -> Iterator[None]:
  """Creates the workdir and holds it against a second writer.

  Args:
    active: False on all hosts of a run but one.
  """
  if not active or "://" in workdir:  # object stores have no locks
    yield
    return
  path = pathlib.Path(workdir)
  try:
    path.mkdir(parents=True, exist_ok=True)
    handle = (path / ".lock").open("a+")
  except OSError as error:
    raise OSError(
      f"workdir {workdir} is not writable ({error.strerror}); choose another "
      "--workdir or change its permissions"
    ) from error
  with handle:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      handle.seek(0)
      raise OSError(
        f"workdir {workdir} is in use by {handle.read().strip()}; stop that "
        "process or choose another --workdir"
      ) from None
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on host {socket.gethostname()}")
    handle.flush()
    yield
    # The lock ends with the file handle, so kill -9 frees the workdir too.


def _checksums(tree: Any) -> list[int]:
  """Sum of the bits of each array modulo 2^32, whatever its sharding."""
  leaves = jax.tree.leaves(tree)
  if all(trees.is_on_host(x) for x in leaves):
    # A program would take longer to compile than these sums take.
    bits = (np.asarray(x).view(f"u{x.dtype.itemsize}") for x in leaves)
    return [int(np.sum(x, dtype=np.uint32)) for x in bits]
  return [int(x) for x in jax.device_get(_checksums_on_device(leaves))]


@jax.jit
def _checksums_on_device(leaves: list[jax.Array]) -> list[jax.Array]:
  def checksum(x):
    if x.dtype == jnp.bool_:
      x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, f"uint{x.dtype.itemsize * 8}")
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

  return [checksum(x) for x in leaves]


def _manifest(tree: Any) -> dict[str, list[Any]]:
  """name -> [shape, dtype, checksum]."""
  leaves = trees.flatten(tree).items()
  return {
    name: [list(x.shape), str(x.dtype), total]
    for (name, x), total in zip(leaves, _checksums(tree), strict=True)
  }


def _abstract(manifest: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
  return {
    name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    for name, (shape, dtype, _) in manifest.items()
  }


def _compare(manifest: Mapping[str, Any], want: Any, where: str) -> None:
  """Raises Mismatch with every leaf that differs."""
  lines = trees.diff(_abstract(manifest), trees.flatten(want)).splitlines()
  if lines:
    shown = lines[:20] + [f"... {len(lines) - 20} more"] * (len(lines) > 20)
    raise Mismatch(
      f"checkpoint {where} belongs to another model, shape or optimizer:\n  "
      + "\n  ".join(shown)
      + "\nuse the config it was trained with, or another --workdir"
    )


def _verify(manifest: Mapping[str, Any], got: Any, where: str) -> None:
  for name, total in zip(trees.flatten(got), _checksums(got), strict=True):
    if total != manifest[name][2]:
      raise Corrupt(f"checkpoint {where}: the bytes of {name} have changed")


class Checkpointer:
  """Asynchronous saves and exact restores in <workdir>/checkpoints."""

  def __init__(self, workdir: str, *, keep: int = 2, read_only: bool = False):
    self._workdir = workdir
    folder = os.path.join(workdir, _FOLDER)
    if "://" not in folder:
      folder = os.path.abspath(folder)
    self.folder = folder
    self._read_only = read_only
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if read_only else keep,
      save_interval_steps=0 if read_only else 1,
      create=not read_only,
      read_only=read_only,
      # What a kill in mid-save left behind; the workdir lock makes us the only
      # writer.
      cleanup_tmp_directories=not read_only,
    )
    _save_small_arrays_whole()
    self._manager = ocp.CheckpointManager(folder, options=options)

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def latest(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: State, meta: Mapping[str, Any], data: Any):
    """Starts a save; the arrays are copied before it returns."""
    if step in self._manager.all_steps():
      return
    leaves = {
      "params": _manifest(state["params"]),
      "opt": _manifest(state["opt"]),
    }
    args = ocp.args.Composite(
      # The one kind that can be read in part; orbax ties an item to a kind.
      params=ocp.args.PyTreeSave(state["params"]),
      opt=ocp.args.StandardSave(state["opt"]),
      meta=ocp.args.JsonSave({**meta, "step": step, "leaves": leaves}),
      data=grain.checkpoint.CheckpointSave(data),
    )
    with self._writing():
      self._manager.save(step, args=args)

  def save_params(self, step: int, params: Any, meta: Mapping[str, Any]):
    """Saves parameters alone: what training may start from, see `is_import`."""
    meta = {**meta, "step": step, "leaves": {"params": _manifest(params)}}
    args = ocp.args.Composite(
      params=ocp.args.PyTreeSave(params), meta=ocp.args.JsonSave(meta)
    )
    with self._writing():
      self._manager.save(step, args=args)

  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Parameters of the newest checkpoint by name."""
    steps = self.steps()
    if not steps:
      raise FileNotFoundError(f"no checkpoint in {self.folder}")
    return _abstract(self._meta(steps[-1])["leaves"]["params"])

  def restore(self, abstract: State, data: Any) -> tuple[State, Any, Any]:
    """State, meta and data iterator of the newest sound checkpoint.

    Args:
      abstract: {params, opt, step} of ShapeDtypeStructs with shardings.
      data: a fresh iterator of the same pipeline; it is moved on.
    """
    for step in reversed(self.steps()):
      if _has_params_only(self.folder, step):
        continue
      failure = None
      try:
        meta = self._meta(step)
        for item in ("params", "opt"):
          _compare(meta["leaves"][item], abstract[item], self._where(step))
        state = {
          item: self._arrays(step, item, abstract[item], meta)
          for item in ("params", "opt")
        }
        place = self._place(step)
      except Mismatch:
        raise
      except Exception as error:
        failure = error
      # What one host cannot read, none goes on from.
      if not hosts.all_agree(failure is None):
        self._set_aside(step, failure or Corrupt("another host failed"))
        continue
      data.set_state(place)
      step_shape = abstract["step"]
      state["step"] = jax.device_put(
        np.asarray(step, step_shape.dtype), step_shape.sharding
      )
      return state, meta, data
    raise Corrupt(
      f"no checkpoint in {self.folder} can be read; the damaged ones were "
      f"moved to {self._workdir}/corrupt. Start in another --workdir, or "
      "restore a copy"
    )

  def params(self, abstract: Any, step: int | None = None) -> tuple[Any, Any]:
    """Parameters alone, and meta; falls back as `restore` does.

    Parameters that the checkpoint has beyond `abstract` (auxiliary heads) are
    not read.
    """
    steps = self.steps()
    if not steps or (step is not None and step not in steps):
      raise FileNotFoundError(
        f"no checkpoint {'' if step is None else f'of step {step} '}in "
        f"{self.folder}"
        + (f"; there are {steps}" if steps else "")
        + "; train first, or give the --workdir of a trained model"
      )
    for one in reversed(steps) if step is None else [step]:
      try:
        meta = self._meta(one)
        manifest = meta["leaves"]["params"]
        names = trees.flatten(abstract)
        kept = {k: v for k, v in manifest.items() if k in names}
        if any("/lora_" in name for name in manifest.keys() - kept.keys()):
          raise Mismatch(
            f"checkpoint {self._where(one)} has adapters, which would be lost: "
            "set config.lora as it was in training, or start from its merged "
            "export"
          )
        _compare(kept, abstract, self._where(one))
        return self._arrays(one, "params", abstract, meta), meta
      except Mismatch:
        raise
      except Exception as error:
        logging.warning(
          "checkpoint %s is damaged (%s)", self._where(one), _short(error)
        )
    raise Corrupt(f"no checkpoint in {self.folder} can be read")

  def reached_preemption(self, step: int) -> bool:
    """All hosts agree that one of them was told to stop."""
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    with self._writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    # An error of the last save was raised by what waited for it.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
      self._manager.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """One error for whatever a full or lost disk breaks."""
    try:
      yield
    except (OSError, ValueError, RuntimeError) as error:
      kept = self.latest()
      good = "none was saved before" if kept is None else f"step {kept} is kept"
      raise OSError(
        f"a checkpoint in {self.folder} could not be written: {good}. Look for "
        "space and quota, and start the same command again "
        f"({_short(error)})"
      ) from error

  def _where(self, step: int) -> str:
    return os.path.join(self.folder, str(step))

  def _meta(self, step: int) -> Any:
    out = self._manager.restore(
      step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
    )
    return out["meta"]

  def _place(self, step: int) -> Any:
    """State of the data iterator.

    Every host has written the same one, so that their number may change.
    """
    files = sorted(epath.Path(self._where(step), "data").glob("process_*.json"))
    states = [json.loads(file.read_text()) for file in files]
    if not states or any(state != states[0] for state in states):
      raise Corrupt(f"{len(states)} hosts left no common state of the data")
    return states[0]

  def _arrays(self, step: int, item: str, abstract: Any, meta: Any) -> Any:
    """One item; leaves of the checkpoint that `abstract` lacks are skipped."""
    manifest = meta["leaves"][item]
    names = trees.flatten(abstract)
    wanted = trees.unflatten(names)
    args = ocp.args.PyTreeRestore(
      wanted,
      restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
      partial_restore=True,
    )
    if item != "params":
      # The optimizer's named tuples come back as what they are.
      args = ocp.args.StandardRestore(abstract)
    out = self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[
      item
    ]
    flat = trees.flatten(out)
    # The caller's own structure, with the subtrees it left out.
    out = jax.tree.unflatten(
      jax.tree.structure(abstract), [flat[name] for name in names]
    )
    _verify(manifest, out, self._where(step))
    return out

  def _set_aside(self, step: int, error: Exception) -> None:
    """Moves a damaged checkpoint away: its step will be saved again."""
    target = pathlib.Path(self._workdir) / "corrupt" / str(step)
    logging.error(
      "checkpoint %s is damaged (%s); falling back to the one before it",
      self._where(step),
      _short(error),
    )
    if jax.process_index() == 0 and "://" not in self.folder:
      shutil.rmtree(target, ignore_errors=True)
      target.parent.mkdir(exist_ok=True)
      shutil.move(self._where(step), target)
    hosts.barrier(f"set_aside_{step}")
    self._manager.reload()


def _short(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:200]


def is_workdir(path: str) -> bool:
  """Whether `path` holds checkpoints written here."""
  return epath.Path(path, _FOLDER).is_dir()


def is_import(path: str) -> bool:
  """Whether the newest checkpoint is of parameters alone, as imports are."""
  if not is_workdir(path):
    return False
  folder = epath.Path(path, _FOLDER)
  steps = [int(one.name) for one in folder.iterdir() if one.name.isdigit()]
  return bool(steps) and _has_params_only(folder, max(steps))


def _has_params_only(folder: Any, step: int) -> bool:
  return not epath.Path(folder, str(step), "opt").exists()


def write_config(workdir: str, config_json: str) -> None:
  """<workdir>/config.json, for people and for reports."""
  text = json.dumps(json.loads(config_json), indent=2, default=str)
  epath.Path(workdir, "config.json").write_text(text + "\n")
