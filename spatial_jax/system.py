# SPDX-License-Identifier: Apache-2.0
"""A config turned into pure functions: what training and evaluation share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spatial_jax import models

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


def _identity(batch: Any) -> Any:
  return batch


def _module(name: str) -> Any:
  """Imported only when the config asks for it."""
  return importlib.import_module(f"spatial_jax.{name}")


def drop_auxiliary(params: Mapping[str, Any]) -> dict[str, Any]:
  """The model's own parameters: heads that only training uses are left out."""
  return {name: value for name, value in params.items() if name != "aux"}
