# SPDX-License-Identifier: Apache-2.0
"""The `cache` command: VGGT's tokens of all videos of a recipe, once for all.

config.data.files -> frames -> VGGT -> a file for each choice of frames in
config.data.videos.cache (see `data.geometry_cache`). What is there is skipped,
so the command goes on where it was stopped. One device does the work.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from spatial_jax import hf, models
from spatial_jax.data import geometry_cache, workers


def main(config: Any, workdir: str | None, *, source: str = "") -> int:
  """Writes the cache; returns how many files are new.

  Args:
    workdir: not used.
    source: weights of VGGT, alone or within a Spatial-MLLM; by default
      config.init_parts.vggt or config.init_from.
  """
  del workdir
  folder = config.data.get("videos", {}).get("cache")
  if not folder:
    raise ValueError(
      "config.data.videos.cache names no folder; give the recipe cache=DIR"
    )
  source = source or config.init_parts.get("vggt") or config.init_from
  config = config.copy_and_resolve_references().unlock()
  config.data.videos.cache = ""
  model = _with_vggt(config)
  params = _params(config, model, source)
  look = jax.jit(
    lambda params, frames: model.apply(
      {"params": {"vggt": params}}, frames, method="look"
    )[0]
  )
  rows, new = workers.make(config, config.data.split), 0
  for index in tqdm.tqdm(range(len(rows)), desc="cache", unit="row"):
    row = rows[index]
    pixels = seen = row["images" if "images" in row else "frames"]
    if not pixels.any() or geometry_cache.path(folder, pixels).exists():
      continue
    if "images" in row and not model.image_once:
      seen = np.repeat(pixels, config.data.media.temporal, axis=0)
    tokens = jax.device_get(look(params, seen[None])[0])
    geometry_cache.write(folder, pixels, tokens.astype(config.model.dtype))
    new += 1
  print(f"{new} new files are in {folder}", flush=True)
  return new


def _with_vggt(config):
  """The recipe's model with VGGT, which the recipe itself leaves out."""
  if config.model.get("vggt", 0) is None:
    del config.model.vggt
  return models.build(config)[0]


def _params(config, model, source):
  """VGGT's, in the dtype that training has them in."""
  if not source:
    raise ValueError("no weights of VGGT are named: give --from=DIR")
  media = config.data.media
  frames = jax.ShapeDtypeStruct((1, 2, media.height, media.width, 3), np.uint8)
  shapes = jax.eval_shape(
    lambda x: model.init(jax.random.key(0), x, method="look"), frames
  )["params"]["vggt"]
  if config.optimizer.master:
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes
    )
  table = models.build(config)[1].PART_KEYS["vggt"]
  # Whatever else is there is of no concern.
  return hf.load(table, source, shapes, ignore=("",))
