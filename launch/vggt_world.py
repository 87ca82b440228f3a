# SPDX-License-Identifier: Apache-2.0
"""A small VGGT from random weights: train, score, draw, store its weights.

  python launch/vggt_world.py --workdir=runs/vggt

Trains configs/vggt_world.py:cpu on rendered rooms, scores depth, cameras and
points on rooms never seen, draws fused clouds beside the truth (rooms.png) and
writes the weights with VGGT's published names (weights/), which `python -m
spatial_jax reconstruct --checkpoint=runs/vggt/weights` and
`--config.init_from=` read. What is already trained is reused.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

SHOWN = (
  ("absrel", "depth AbsRel"),
  ("absrel_aligned", "depth AbsRel, medians equal"),
  ("rotation_degrees", "relative rotation, degrees"),
  ("center", "camera centre, distance"),
  ("points", "points, distance"),
  ("fused", "points from depth and cameras"),
)


def show(scores: dict) -> None:
  names = ("model", "untrained", "constant", "ratio")
  print("\n" + " " * 32 + "".join(f"{n:>11}" for n in names))
  for key, text in SHOWN:
    cells = (scores[n].get(key) for n in names)
    row = "".join(" " * 11 if c is None else f"{c:>11.3f}" for c in cells)
    print(f"{text:<32}{row}")
  print("(distances: 1 is the mean distance of a room's points)\n")


def pictures(config, params, rooms: int, width: int = 1280):
  """For each room its frames, depth and cloud; truth left, model right."""
  import numpy as np

  from spatial_jax import clouds, drawing
  from spatial_jax import system as systems
  from spatial_jax.data import pipeline
  from spatial_jax.evaluators import geometry
  from spatial_jax.models import vggt_loss

  config = config.copy_and_resolve_references()
  config.batch_size = rooms
  system = systems.build(config, pipeline.example(config), rooms)

  @systems.once
  def see(batch):
    batch = system.transform(batch)
    got = system.model.apply({"params": params}, **system.mod.arguments(batch))
    return batch["images"], vggt_loss.truth(batch), got[0]

  def both(batch):
    images, want, got = see(batch)
    want = geometry.answer(want, truth=True)
    return np.asarray(images), want, geometry.answer(got)

  images, want, got = geometry.look(config, "test", rooms, rooms, both)
  half, tall = (width - 8) // 2, 400
  rows = []
  for i in range(rooms):
    near, far = np.percentile(want["depth"][i], [1, 99])
    view, sides = None, []
    for answer in (want, got):
      poses = answer["world_from_camera"][i]
      mask = ~clouds.edges(answer["depth"][i])
      cloud = clouds.fuse(answer["fused"][i], images[i], poses, mask)
      view = view or clouds.viewpoint(cloud.points, poses, tall, half)
      depths = [drawing.draw_depth(d, near, far) for d in answer["depth"][i]]
      drawn = clouds.draw(cloud, *view, tall, half, cameras=poses)
      sides.append(
        (clouds.tiles(images[i], half), clouds.tiles(depths, half), drawn)
      )
    gap = np.full((sides[0][2].shape[0], width - 2 * half, 3), 255, np.uint8)
    texts = (
      f"room {i}: frames",
      "depth: truth left, model right",
      "fused clouds from one viewpoint: truth left, model right",
    )
    for text, left, right in zip(texts, *sides, strict=True):
      between = gap[: left.shape[0]]
      rows.append((text, np.concatenate([left, between, right], 1)))
  return clouds.stack(rows)


def main(argv=None) -> dict:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--workdir", default="runs/vggt", type=pathlib.Path)
  parser.add_argument("--config", default="cpu", help="arguments of the recipe")
  parser.add_argument("--rooms", type=int, default=2, help="drawn")
  args = parser.parse_args(argv)
  folder = args.workdir.resolve()

  from PIL import Image

  from configs import vggt_world
  from spatial_jax import evaluate, reconstruct, train

  config = vggt_world.get_config(args.config)
  done = train.main(config, str(folder))
  if done.interrupted:
    sys.exit(0)
  scores = evaluate.main(config, str(folder))["geometry"]
  drawn = pictures(config, done.state["params"], args.rooms)
  Image.fromarray(drawn).save(folder / "rooms.png", optimize=True)
  reconstruct.save(config, done.state["params"], folder / "weights")
  show(scores)
  print(f"picture: {folder / 'rooms.png'}\nweights: {folder / 'weights'}")
  return scores


if __name__ == "__main__":
  main()
