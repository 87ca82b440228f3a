# SPDX-License-Identifier: Apache-2.0
"""Rows of the room renderer and of the data pipeline."""

from __future__ import annotations

import importlib
import pathlib
import tempfile
import time

import numpy as np

from launch.speed.program import Program
from spatial_jax.geometry import camera
from spatial_jax.world import cameras, scene, visibility


def count(room: dict) -> int:
  return int(np.count_nonzero(room["primitive_shape"]))


def view(case: dict):
  """The fullest of some rooms with its first primitives; poses, intrinsics."""
  most = case["primitives"]
  rooms = [scene.sample(0, "train", i) for i in range(case["rooms"])]
  room = max(rooms, key=count)
  kept = np.argsort(room["primitive_shape"] == 0, kind="stable")[:most]
  room = {k: v[kept] if "primitive" in k else v for k, v in room.items()}
  rng = np.random.default_rng(0)
  poses = cameras.turntable(room, rng, case["frames"])
  side = case["side"]
  return room, poses, camera.intrinsics(side, side, 100.0)


def rendered(folder: pathlib.Path, case: dict) -> Program:
  """Colour, depth, ids, normals and points on the device."""
  import jax

  from spatial_jax.world import render

  del folder
  room, poses, at = view(case)
  room, poses = jax.device_put((room, poses))
  side = case["side"]

  def run():
    return jax.block_until_ready(render.render(room, poses, at, side, side))

  start = time.perf_counter()
  depth = np.asarray(run()["depth"])
  first = time.perf_counter() - start
  notes = {"primitives": count(room)}
  outputs = {"depth": depth}
  return Program(run, outputs, first, units=case["frames"], notes=notes)


def cast(folder: pathlib.Path, case: dict) -> Program:
  """Depth alone, by NumPy on whole arrays: each ray meets each primitive."""
  del folder
  room, poses, at = view(case)
  centres = np.arange(case["side"]) + 0.5
  pixels = np.stack(np.meshgrid(centres, centres), -1).reshape(-1, 2)

  def run():
    depth = [visibility.depth_at(room, pose, at, pixels) for pose in poses]
    return np.stack(depth).reshape(-1, case["side"], case["side"])

  start = time.perf_counter()
  depth = run()
  first = time.perf_counter() - start
  return Program(run, {"depth": depth}, first, units=case["frames"])


def culled(folder: pathlib.Path, case: dict) -> Program:
  """Pixels of each object by the host's caster, which skips most rays."""
  del folder
  room, poses, at = view(case)

  def run():
    return visibility.pixel_counts(room, poses, at, case["side"])

  start = time.perf_counter()
  counts = run()
  first = time.perf_counter() - start
  return Program(run, {"counts": counts}, first, units=case["frames"])


def waiting(folder: pathlib.Path, case: dict) -> Program:
  """Share of a training's time in which the device waits for data."""
  from spatial_jax import metrics, train

  start, notes = time.perf_counter(), {}
  for name, arg in case["recipes"]:
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    config.steps, config.evals = case["steps"], {}
    config.logging.every = case["steps"]
    config.logging.tensorboard = False
    config.checkpoint.every = config.steps + 1
    config.data.world.rooms = max(config.data.world.rooms, 64)
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
      train.main(config, workdir)
      rows = metrics.read(workdir)
    rows = rows[1:]  # the first one compiles; the rate leaves it out, too
    seconds = len(rows) / rows[-1]["steps_per_second"]
    waited = sum(row["data_wait_ms"] for row in rows) / 1e3
    label = f"{name}:{arg}" if arg else name
    notes[f"wait, {label}"] = waited / seconds
    notes[f"steps/s, {label}"] = rows[-1]["steps_per_second"]
  first = time.perf_counter() - start
  return Program(lambda: None, {}, first, notes=notes)
