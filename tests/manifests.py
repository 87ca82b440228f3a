# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of every tensor of the published checkpoints."""

import functools
import gzip
import json
import pathlib

FOLDER = pathlib.Path(__file__).parent / "golden" / "manifests"


@functools.cache
def read(system: str) -> dict[str, dict[str, tuple[int, ...]]]:
  """Checkpoint -> tensor -> shape; what isn't a list of tensors is left out."""
  with gzip.open(FOLDER / f"{system}.json.gz", "rt") as stream:
    checkpoints = json.load(stream)
  return {
    checkpoint: {
      name: _shape(value)
      for name, value in tensors.items()
      if isinstance(value, list)
    }
    for checkpoint, tensors in checkpoints.items()
    if not checkpoint.startswith("_") and isinstance(tensors, dict)
  }


def below(tensors: dict, prefix: str) -> dict[str, tuple[int, ...]]:
  """The tensors of one part, with the prefix cut off."""
  return {
    name[len(prefix) :]: shape
    for name, shape in tensors.items()
    if name.startswith(prefix)
  }


def _shape(value):
  """Of [shape, dtype], or of the shape alone."""
  return tuple(value[0] if isinstance(value[0], list) else value)
