# SPDX-License-Identifier: Apache-2.0
"""Rendered views of the rows of `reaching`, normalised for action models."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from spatial_jax.types import Batch
from spatial_jax.world import observe


def make(config) -> Callable[[Batch], Batch]:
  """Pure function batch -> batch that adds images f32[B F height width C].

  `config.data.render.statistics` has a (mean, standard deviation) for each
  normalisation of RGB in [0, 1]; all stand side by side in the channels.
  """
  see = observe.make(config)
  statistics = [
    tuple(np.float32(x).reshape(1, 1, 1, 1, 3) for x in pair)
    for pair in config.data.render.statistics
  ]
  seen = tuple(
    np.float32(x).reshape(1, 1, 1, 1, 3) for x in (observe.MEAN, observe.STD)
  )

  def view(batch: Batch) -> Batch:
    batch = see(batch)
    colors = batch["images"] * seen[1] + seen[0]
    images = [(colors - mean) / std for mean, std in statistics]
    return {**batch, "images": jnp.concatenate(images, axis=-1)}

  return view
