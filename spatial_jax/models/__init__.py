# SPDX-License-Identifier: Apache-2.0
"""Models by name: each file of this package is one model."""

from __future__ import annotations

import dataclasses
import importlib
import types
from typing import Any

from flax import linen as nn
from ml_collections import ConfigDict, FrozenConfigDict


def build(config: ConfigDict) -> tuple[nn.Module, types.ModuleType]:
  """The model that a config describes, and the file it is from.

  `config.model_name` names the file, `config.model.variant` one of its sizes;
  every other key of `config.model` overrides that size.
  """
  name = f"{__name__}.{config.model_name}"
  try:
    mod = importlib.import_module(name)
  except ModuleNotFoundError as error:
    if error.name != name:
      raise
    raise ValueError(
      f"config.model_name={config.model_name!r}: there is no {name}"
    ) from None
  overrides = ConfigDict(config.model).to_dict()
  variant = overrides.pop("variant")
  if variant not in mod.VARIANTS:
    raise ValueError(
      f"config.model.variant={variant!r} is unknown; {config.model_name} has "
      + ", ".join(mod.VARIANTS)
    )
  kwargs = _merge(mod.VARIANTS[variant], overrides)
  parts = {"config.model": (mod.Model, kwargs)}
  for part, module in getattr(mod, "PARTS", {}).items():
    if kwargs[part] is not None:  # a part that this model does without
      parts[f"config.model.{part}"] = (module, kwargs[part])
  for where, (module, given) in parts.items():
    _check(where, module, given)
  # Frozen: a Linen module that holds a plain dict cannot be hashed by jit.
  return mod.Model(**FrozenConfigDict(kwargs)), mod


def _merge(base: dict, overrides: dict) -> dict[str, Any]:
  merged = dict(base)
  for key, value in overrides.items():
    if isinstance(merged.get(key), dict) and isinstance(value, dict):
      value = _merge(merged[key], value)
    merged[key] = value
  return merged


def _check(where: str, module: type, given: dict) -> None:
  known = {f.name for f in dataclasses.fields(module)} - {"parent", "name"}
  if unknown := sorted(given.keys() - known):
    raise ValueError(
      f"{where} has unknown keys {unknown}; known are {sorted(known)}"
    )
