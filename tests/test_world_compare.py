# SPDX-License-Identifier: Apache-2.0
"""The comparison of mechanisms: its rows, its points, what it writes."""

import functools
import json
import re

import jax
import numpy as np
import pytest

from configs import world_compare
from launch import world_compare as command
from spatial_jax import optim, trees
from spatial_jax import system as systems
from spatial_jax.data import pipeline
from spatial_jax.geometry import camera
from spatial_jax.nn.lift import Lift


@functools.cache
def lifted(**options):
  lift = Lift(pool="none", **options)
  rng = np.random.default_rng(1)
  features = np.zeros((1, 2, 2, 2, 8), np.float32)
  depth = rng.uniform(1, 3, (1, 2, 16, 16)).astype("f")
  depth[:, :, :8, :8] = 0
  depth[0, 1, 3, 3] = 2
  poses = camera.from_heading(np.ones((2, 3)), np.arange(2), np.zeros(2))[None]
  eye = np.broadcast_to(camera.intrinsics(16, 16, 90), (1, 2, 3, 3))
  params = jax.jit(lift.init)(jax.random.key(0), features, depth, eye, poses)
  run = jax.jit(lambda poses: lift.apply(params, features, depth, eye, poses))
  return run, poses


def test_level_points_do_not_know_where_the_world_begins():
  run, poses = lifted(level=True, samples=8, waves=2)
  moved = camera.from_heading(np.array([3.0, -2, 0.5]), 1.3, 0.0)
  # Turned about the vertical axis, and moved.
  turn = np.eye(4, dtype="f")
  turn[:3, :3] = camera.level_from_world(moved)[:3, :3]
  turn[:3, 3] = 3, -2, 0.5
  before, _, out = run(poses)
  after, *_ = run((turn @ poses).astype("f"))
  np.testing.assert_allclose(after, before, atol=1e-4)
  assert np.abs(before).max() > 0.1
  # The first camera is level, so its axes are those of the points.
  x, y, z = out["lift/points"][0, 0, 1, 1]
  assert 1 < x < 3 and y < 0 and z < 0


def test_a_patch_is_where_its_valid_points_are():
  run, poses = lifted(level=True, samples=8, waves=2)
  _, mask, out = run(poses)
  # No depth in the first frame's upper left; one pixel in the second's.
  assert not mask[0, 0] and mask[0, 1:].all()
  turned = camera.level_from_world(poses[0])[1] @ np.linalg.inv(
    camera.level_from_world(poses[0])[0]
  )
  point = camera.transform(turned, out["lift/points"][0, 1, 0, 0][None])[0]
  # Column 3 and row 3 of 16: left of the axis and above it, 2 m away.
  np.testing.assert_allclose(point, [2, 9 / 8, 9 / 8], atol=1e-5)


def test_the_rows_of_the_comparison_share_what_the_plain_model_has_trained():
  def shapes(arg):
    c = world_compare.get_config(arg)
    system = systems.build(c, pipeline.example(c), c.batch_size)
    return c, jax.eval_shape(system.init, jax.random.key(0))

  _, start = shapes("stage=base,test")
  start = trees.flatten(start)
  for row in ("sva", "patches_3d", "pruned_70"):
    c, params = shapes(f"row={row},test")
    rules = (*((rule, True) for rule in c.init_new), (".*", False))
    new = trees.flatten(trees.match(params, rules, "config.init_new"))
    for name, x in trees.flatten(params).items():
      if not new[name]:
        assert start[name].shape == x.shape, (row, name)
    optim.make(c.optimizer, c.steps, params)
  assert c.model.llm.packing[0] == 67 - 44


def result(row, seed, macro):
  kinds = [kind for group in command.GROUPS.values() for kind in group]
  kinds = {kind: macro + i for i, kind in enumerate(kinds)}
  return {
    "row": row,
    "seed": seed,
    "scores": {"macro": macro, **command.groups(kinds), **kinds},
    "step_ms": 100.0,
    "tokens": 355,
    "rooms": 2400,
  }


def test_intervals_are_students_over_seeds_and_gains_those_of_equal_seeds():
  table = command.summarize(
    [
      *(result("plain", seed, x) for seed, x in enumerate((40.0, 50.0, 60.0))),
      *(
        result("patches_3d", seed, x)
        for seed, x in enumerate((45.0, 56.0, 64.0))
      ),
      result("sva", 0, 39.0),
    ]
  )
  macro = table["plain"]["scores"]["macro"]
  # Spread 10 over 3 seeds, two degrees of freedom.
  assert macro["mean"] == 50 and abs(macro["half"] - 24.84) < 0.01
  gain = table["patches_3d"]["gains"]["distance"]
  assert gain["mean"] == 5 and abs(gain["half"] - 2.484) < 0.01
  assert table["sva"]["gains"]["macro"] == {"mean": -1, "half": None, "n": 1}
  said = command.verdict(table)
  assert "distance +5.0 ± 2.5, beyond the interval" in said
  del table["plain"]
  assert "not beyond" in command.verdict(table, "sva")


def test_what_is_finished_is_not_repeated_and_everything_is_written(
  tmp_path, monkeypatch
):
  def never(*_):
    raise AssertionError("it was finished")

  monkeypatch.setattr(command.subprocess, "Popen", never)
  asked = command.runs(["plain", "sva"], 0)
  assert asked == [("plain", 0), ("sva", 0), ("plain", 1), ("plain", 2)]
  for row, seed in asked:
    folder = tmp_path / f"{row}-{seed}"
    folder.mkdir()
    got = result(row, seed, 50.0 + seed)
    (folder / "result.json").write_text(json.dumps(got))
    far = 0.2 if row == "sva" else 0.3 + 0.1 * seed
    lines = [
      json.dumps({"step": i, "loss": 3.0 - i, "aux/ground": far * (3 - i)})
      for i in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
  options = ["--rows=plain,sva", "--vggt=unread", "--config=test"]
  command.main([f"--workdir={tmp_path}", *options])
  text = (tmp_path / "table.md").read_text()
  assert "| plain | 51.0 ± 2.5 |" in text and "| sva | +0.0 |" in text
  # Of the last step alone; to the plain model of the same seed.
  assert "| plain | 0.400 ± 0.248 |  |" in text
  assert "| sva | 0.200 | -0.100 |" in text
  page = (tmp_path / "report.html").read_text()
  assert not re.search(r"(src|href)=\"(?!data:|#)", page)
  for name in ("macro", "distance", "direction", "loss"):
    assert (tmp_path / f"{name}.svg").read_text().startswith("<svg")
  assert json.loads((tmp_path / "table.json").read_text())["sva"]["rooms"]


def test_a_run_that_fails_stops_the_others_which_save(tmp_path, monkeypatch):
  script = tmp_path / "part.py"
  script.write_text(
    "import pathlib, signal, sys, time\n"
    "here = pathlib.Path(__file__).parent\n"
    "def stop(*_):\n"
    "  (here / 'saved').touch()\n"
    "  sys.exit(1)\n"
    "signal.signal(signal.SIGTERM, stop)\n"
    "if '--part=slow' in sys.argv:\n"
    "  (here / 'ready').touch()\n"
    "  time.sleep(60)\n"
    "while not (here / 'ready').exists():\n"
    "  time.sleep(0.05)\n"
    "sys.exit('no weights')\n"
  )
  monkeypatch.setattr(command, "__file__", str(script))
  monkeypatch.setattr(command.os, "sched_getaffinity", lambda _: {0, 1})
  with pytest.raises(RuntimeError, match=r"bad: exit status 1, see .*bad.log"):
    command.run_all(tmp_path, ["slow", "bad", "never"], 0, [])
  assert (tmp_path / "saved").exists()
  assert (tmp_path / "bad.log").read_text() == "no weights\n"
  assert not (tmp_path / "never.log").exists()
