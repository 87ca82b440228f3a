# SPDX-License-Identifier: Apache-2.0
"""A config turned into pure functions: what training and evaluation share."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spatial_jax import checkpoint, models, optim, trees

Shapes = dict[str, jax.ShapeDtypeStruct]


class System(NamedTuple):
  model: Any
  mod: Any  # the model's file
  batch: Shapes  # what the data pipeline yields
  inputs: Shapes  # what the model sees, after `transform`
  transform: Callable[[Any], Any]  # batch -> batch, pure, on the device
  init: Callable[[jax.Array], Any]  # key -> params
  loss: Callable[..., Any]  # (params, batch, *, rngs, train)


def build(
  config: Any,
  example: Mapping[str, tuple[tuple[int, ...], Any]],
  batch_size: int,
) -> System:
  """The system of a config for batches of such examples."""
  model, mod = models.build(config)
  batch = {
    name: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
    for name, (shape, dtype) in example.items()
  }
  transform = _identity
  if config.data.get("render"):
    transform = _module("world.observe").make(config)
  inputs = jax.eval_shape(transform, batch)
  _check(inputs, mod.INPUTS(config))
  auxiliary = None
  if config.get("auxiliary"):
    auxiliary = _module("world.auxiliary").make(config, mod)

  def init(key):
    zeros = {k: jnp.zeros(x.shape, x.dtype) for k, x in inputs.items()}
    params = model.init({"params": key}, **mod.arguments(zeros))["params"]
    if config.init.match_query_key:
      match = _module("models.llm").match_query_key
      params = match(params, *config.init.match_query_key)
    if auxiliary is not None:
      key = jax.random.fold_in(key, 1)
      params = {**params, "aux": auxiliary.init(key, model, params, zeros)}
    return params

  def loss(params, batch, *, rngs=None, train=True):
    compute = (mod if auxiliary is None else auxiliary).loss
    return compute(model, params, batch, rngs=rngs, train=train)

  return System(model, mod, batch, inputs, transform, init, loss)


def start(config: Any, system: System, abstract: Any) -> tuple[Any, str]:
  """Parameters of a run without a checkpoint, and where they are from.

  Args:
    abstract: their shapes and shardings; they are born with these.
  """
  key = jax.random.key(config.seed)
  placed = jax.tree.map(lambda x: x.sharding, abstract)
  if not config.init_from:
    return jax.jit(system.init, out_shardings=placed)(key), "fresh weights"
  fresh = jax.tree.map(lambda _: False, abstract)
  if config.init_new:
    rules = (*((r, True) for r in config.init_new), (".*", False))
    fresh = trees.match(abstract, rules, "config.init_new")
  old = jax.tree.map(lambda f: not f, fresh)
  wanted = optim.subset(abstract, old)
  if checkpoint.is_workdir(config.init_from):
    source = checkpoint.Checkpointer(config.init_from, read_only=True)
    params, _ = source.params(wanted)
    source.close()
  else:
    params = _from_hugging_face(config, system, abstract, wanted)
  if config.init_new:
    # Only the new leaves are computed: the others are dead code in this jit.
    new = jax.jit(
      lambda key: optim.subset(system.init(key), fresh),
      out_shardings=optim.subset(placed, fresh),
    )(key)
    params = optim.merge(new, params)
  return params, f"weights of {config.init_from}"


def _from_hugging_face(
  config: Any, system: System, abstract: Any, wanted: Any
) -> Any:
  source = pathlib.Path(config.init_from)
  if source.suffix != ".safetensors" and not any(source.glob("*.safetensors")):
    raise FileNotFoundError(
      f"config.init_from={config.init_from!r}: neither a workdir with "
      "checkpoints nor a folder with *.safetensors"
    )
  loaded = _module("hf").load(
    system.mod.KEYS,
    source,
    abstract,
    jax.tree.map(lambda x: x.sharding, abstract),
    ignore=getattr(system.mod, "IGNORE", ()),
    new=config.init_new,
  )
  flat = trees.flatten(loaded)
  leaves = [flat[name] for name in trees.flatten(wanted)]
  return jax.tree.unflatten(jax.tree.structure(wanted), leaves)


def _check(inputs: Shapes, want: Shapes) -> None:
  """The data must have the shapes that the model's INPUTS promises."""
  wrong = trees.diff(
    {k: v for k, v in inputs.items() if k in want},
    {k: v for k, v in want.items() if k in inputs},
  )
  if wrong:
    raise ValueError(
      "config.data gives arrays of other shapes than the model's INPUTS; make "
      f"config.data and config.model agree:\n  {wrong}"
    )


def _identity(batch: Any) -> Any:
  return batch


def _module(name: str) -> Any:
  """Imported only when the config asks for it."""
  return importlib.import_module(f"spatial_jax.{name}")


def drop_auxiliary(params: Mapping[str, Any]) -> dict[str, Any]:
  """The model's own parameters: heads that only training uses are left out."""
  return {name: value for name, value in params.items() if name != "aux"}
