# SPDX-License-Identifier: Apache-2.0
"""A config turned into pure functions: what training and evaluation share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spatial_jax import checkpoint, lora, models, optim, sharding, trees

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
  if render := config.data.get("render"):
    transform = _module(render.get("module", "world.observe")).make(config)
  inputs = jax.eval_shape(transform, batch)
  _check(inputs, mod.INPUTS(config))
  auxiliary = None
  if config.get("auxiliary"):
    auxiliary = _module("world.auxiliary").make(config, mod)

  def init(key):
    zeros = {k: jnp.zeros(x.shape, x.dtype) for k, x in inputs.items()}
    with lora.linear_layers() as layers:
      params = model.init({"params": key}, **mod.arguments(zeros))["params"]
    if config.init.match_query_key:
      match = _module("models.llm_start").match_query_key
      params = match(params, *config.init.match_query_key)
    if auxiliary is not None:
      key = jax.random.fold_in(key, 1)
      params = {**params, "aux": auxiliary.init(key, model, params, zeros)}
    if config.lora.ranks:
      adapters = lora.init(
        jax.random.fold_in(key, 2),
        params,
        layers,
        ranks=config.lora.ranks,
        scale=config.lora.scale,
        start=config.lora.start,
      )
      params = lora.attach(params, adapters)
    return _to_bfloat16(params) if config.optimizer.master else params

  def loss(params, batch, *, rngs=None, train=True):
    compute = (mod if auxiliary is None else auxiliary).loss
    if train and config.lora.ranks and config.lora.dropout:
      params = lora.dropout(params, rngs["dropout"], config.lora.dropout)
    params = sharding.whole_tables(params, config.model.get("dtype", "float32"))
    return compute(model, params, batch, rngs=rngs, train=train)

  return System(model, mod, batch, inputs, transform, init, loss)


def shapes(config: Any) -> tuple[Any, Any]:
  """Abstract parameters of a config's model, and the model's file.

  Without data, auxiliary heads and adapters: what a published checkpoint holds.
  """
  model, mod = models.build(config)
  inputs = mod.INPUTS(config)

  def init():
    zeros = {k: jnp.zeros(x.shape, x.dtype) for k, x in inputs.items()}
    params = model.init(jax.random.key(0), **mod.arguments(zeros))["params"]
    return _to_bfloat16(params) if config.optimizer.master else params

  return jax.eval_shape(init), mod


def start(
  config: Any, system: System, abstract: Any, source: str = ""
) -> tuple[Any, str]:
  """Parameters of a run without a checkpoint, and where they are from.

  Args:
    abstract: their shapes and shardings; they are born with these.
    source: by default config.init_from.
  """
  parts = {name: path for name, path in config.init_parts.items() if path}
  rest = {name: x for name, x in abstract.items() if name not in parts}
  params, origin = _start(config, system, rest, source or config.init_from)
  for name, path in parts.items():
    params[name] = _module("hf").load(
      system.mod.PART_KEYS[name],
      path,
      abstract[name],
      jax.tree.map(lambda x: x.sharding, abstract[name]),
      ignore=system.mod.PART_IGNORE,
    )
    origin += f", {name} of {path}"
  return params, origin


def _start(
  config: Any, system: System, abstract: Any, source: str
) -> tuple[dict[str, Any], str]:
  """`start` of the parts that have no file of their own."""

  def init(key):
    return {name: x for name, x in system.init(key).items() if name in abstract}

  key = jax.random.key(config.seed)
  placed = jax.tree.map(lambda x: x.sharding, abstract)
  if not source:
    return once(init, placed)(key), "fresh weights"
  fresh = jax.tree.map(lambda _: False, abstract)
  new = tuple(config.init_new)
  is_trained = checkpoint.is_workdir(source) and not checkpoint.is_import(
    source
  )
  if config.lora.ranks and not is_trained:
    new += (lora.LEAVES,)  # published weights have no adapters
  if new:
    rules = (*((r, True) for r in new), (".*", False))
    fresh = trees.match(abstract, rules, "config.init_new")
  old = jax.tree.map(lambda f: not f, fresh)
  wanted = optim.subset(abstract, old)
  if checkpoint.is_workdir(source):
    saves = checkpoint.Checkpointer(source, read_only=True)
    params, _ = saves.params(wanted)
    saves.close()
  else:
    params = _from_hugging_face(source, system, abstract, wanted, new)
  if new:
    # Only the new leaves are computed: the others are dead code in this jit.
    new = once(
      lambda key: optim.subset(init(key), fresh), optim.subset(placed, fresh)
    )(key)
    params = optim.merge(new, params)
  return params, f"weights of {source}"


def once(function: Callable[..., Any], placed: Any = None) -> Any:
  """`jax.jit` of what runs only once, with results placed so.

  On CPU, random numbers for many shapes take a third of the time to compile
  when the code isn't optimized, and running it takes next to none.
  """
  options = None
  if jax.default_backend() == "cpu":
    options = {"xla_backend_optimization_level": 0}
  return jax.jit(function, out_shardings=placed, compiler_options=options)


def _from_hugging_face(
  source: str, system: System, abstract: Any, wanted: Any, new: tuple[str, ...]
) -> Any:
  try:
    loaded = _module("hf").load(
      getattr(system.mod, "KEYS", ()),
      source,
      abstract,
      jax.tree.map(lambda x: x.sharding, abstract),
      ignore=getattr(system.mod, "IGNORE", ()),
      new=new,
    )
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"config.init_from={source!r}: neither a workdir with checkpoints nor "
      f"published weights: {error}"
    ) from error
  flat = trees.flatten(loaded)
  leaves = [flat[name] for name in trees.flatten(wanted)]
  return jax.tree.unflatten(jax.tree.structure(wanted), leaves)


def _to_bfloat16(params: Any) -> Any:
  # All of the model, and of an adapter all but its scale.
  def convert(name, x):
    keep = x.dtype != jnp.float32 or name.endswith("lora_scale")
    return x if keep else x.astype(jnp.bfloat16)

  return trees.map_names(convert, params)


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
