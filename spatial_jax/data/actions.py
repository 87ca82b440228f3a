# SPDX-License-Identifier: Apache-2.0
"""Actions and states of robots: their statistics, and normalisation by them.

Statistics are those of OpenVLA's dataset_statistics.json: for "action" and
"proprio" lists of mean, std, min, max, q01, q99 and mask, one number a
dimension. numpy only.

Letters: N steps, A numbers of an action.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spatial_jax.types import Array, Float

_EPS = 1e-8


def statistics(
  values: Float[Array, "N A"], mask: Sequence[bool] | None = None
) -> dict[str, list]:
  """Statistics of all steps of a data set.

  Args:
    mask: False for dimensions that are never normalised (an open or closed
      hand); by default all are.
  """
  values = np.asarray(values, np.float64)
  mask = [True] * values.shape[1] if mask is None else list(mask)
  return {
    "mean": values.mean(0).tolist(),
    "std": values.std(0).tolist(),
    "min": values.min(0).tolist(),
    "max": values.max(0).tolist(),
    "q01": np.quantile(values, 0.01, axis=0).tolist(),
    "q99": np.quantile(values, 0.99, axis=0).tolist(),
    "mask": mask,
  }


def normalize(
  values: Float[Array, "*b A"], known: Mapping[str, Any]
) -> Float[Array, "*b A"]:
  """The 1st and 99th percentile become -1 and 1, what is beyond them as well.

  Dimensions that never change become 0.
  """
  low, high, mask = _bounds(known)
  scaled = np.clip(2 * (values - low) / (high - low + _EPS) - 1, -1, 1)
  out = np.where(mask, scaled, values)
  still = np.asarray(known["min"]) == np.asarray(known["max"])
  return np.where(still, 0.0, out).astype(np.float32)


def restore(
  values: Float[Array, "*b A"], known: Mapping[str, Any]
) -> Float[Array, "*b A"]:
  """The inverse of `normalize` between the percentiles."""
  low, high, mask = _bounds(known)
  full = 0.5 * (values + 1) * (high - low + _EPS) + low
  return np.where(mask, full, values).astype(np.float32)


def _bounds(known):
  low, high = np.asarray(known["q01"]), np.asarray(known["q99"])
  mask = np.asarray(known.get("mask", [True] * len(low)), bool)
  return low, high, mask


def load(file: str | pathlib.Path, name: str = "") -> dict[str, Any]:
  """Statistics of a data set; its name may be left out if it is the only one.

  Raises:
    ValueError: the file has not this name, or several and none was asked for.
  """
  known = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
  if not name and len(known) == 1:
    return next(iter(known.values()))
  if name not in known:
    raise ValueError(
      f"{file} has statistics of {sorted(known)}, not of {name!r}; say which"
    )
  return known[name]
