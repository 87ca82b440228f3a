# SPDX-License-Identifier: Apache-2.0
"""Stores rendered rooms with their questions, for readers that want files.

  python launch/write_world.py --config=configs/demo.py --split=validation \
    --rooms=100 --size=224 --out=DIR

One record is one room: PNG frames, 16-bit depth, poses, objects, questions and
the scene itself; see `spatial_jax/world/writer.py` for the layout and for how
grain and TFDS read it. Training needs none of this: it renders on the device.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def rooms(config, split: str, count: int, size: int):
  """Encoded records of the first rooms of a split, size x size pixels."""
  import jax
  import numpy as np
  import tqdm

  from spatial_jax.geometry import camera
  from spatial_jax.world import dataset, render, writer

  source = dataset.make(config, split)
  count = min(count, len(source))
  draw = jax.jit(render.render, static_argnums=(3, 4))
  own = (source.image_size, source.image_size)
  intrinsics = camera.resize_intrinsics(source.intrinsics, own, (size, size))
  for index in tqdm.trange(count, unit="room"):
    room = source.room(index)
    view = draw(room.scene, room.world_from_camera, intrinsics, size, size)
    yield writer.encode(
      source.name(index),
      room.scene,
      np.asarray(view["rgb"]),
      room.world_from_camera,
      intrinsics,
      depth=np.asarray(view["depth"]),
      questions=[question.asdict() for question in room.questions],
    )


def main(argv=None) -> pathlib.Path:
  from spatial_jax.world import writer

  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--config", default="configs/demo.py", help="FILE[:ARGS]")
  parser.add_argument("--split", default="validation")
  parser.add_argument("--rooms", type=int, default=100)
  parser.add_argument("--size", type=int, default=224, help="pixels")
  parser.add_argument("--out", required=True, help="folder")
  args = parser.parse_args(argv)
  file, _, arg = args.config.partition(":")
  recipe = importlib.import_module(f"configs.{pathlib.Path(file).stem}")
  config = recipe.get_config(arg)
  path = writer.write(
    args.out, args.split, rooms(config, args.split, args.rooms, args.size)
  )
  print(f"written: {path}")
  return path


if __name__ == "__main__":
  main()
