# SPDX-License-Identifier: Apache-2.0
"""Training end to end: exact resume, other starts, metrics, what moves."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spatial_jax import checkpoint, metrics, optim, sharding, train, trees
from spatial_jax import system as systems
from spatial_jax.data import pipeline
from tests import toy

ROOT = pathlib.Path(__file__).parents[1]
ENV = {
  **os.environ,
  "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
}


def config(arg="", **changes):
  out = toy.get_config(arg)
  out.update(changes)
  return out.lock()


def command(workdir, *more):
  return [
    sys.executable,
    "-m",
    "spatial_jax",
    "train",
    "--config=tests/toy.py",
    f"--workdir={workdir}",
    *more,
  ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(workdir, result) of one run that several tests look at."""
  workdir = str(tmp_path_factory.mktemp("trained"))
  return workdir, train.main(config("eval_every=3", steps=7), workdir)


def abstract(system):
  """Shapes of the parameters with their shardings."""
  shapes = jax.eval_shape(system.init, jax.random.key(0))
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.parameters(shapes, sharding.mesh()),
  )


def build(c):
  return systems.build(c, pipeline.example(c), c.batch_size)


def saved(workdir, step):
  """Parameters of a checkpoint, and the state of its data iterator."""
  saves = checkpoint.Checkpointer(str(workdir), read_only=True)
  params, _ = saves.params(abstract(build(config())), step)
  saves.close()
  data = pathlib.Path(workdir, "checkpoints", str(step), "data")
  state = json.loads(data.joinpath("process_0-of-1.json").read_text())
  return jax.device_get(params), state


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_resuming_after_kill_9_equals_never_stopping(tmp_path):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  steps = ("--config.steps=20", "--config.checkpoint.every=10")
  want = subprocess.Popen(command(whole, *steps), cwd=ROOT, env=ENV)
  # The second run is killed some steps after its checkpoint of step 10.
  first = subprocess.Popen(
    command(parts, *steps, "--config.data.slow_after=104"), cwd=ROOT, env=ENV
  )
  until = time.time() + 60
  while not (parts / "checkpoints/10/commit_success.txt").exists():
    assert first.poll() is None and time.time() < until
    time.sleep(0.05)
  first.send_signal(signal.SIGKILL)
  first.wait()
  assert not (parts / "checkpoints/20").exists()
  done = subprocess.run(
    command(parts, *steps), cwd=ROOT, env=ENV, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert "from checkpoint 10" in done.stdout
  assert want.wait() == 0
  params, data = saved(parts, 20)
  want_params, want_data = saved(whole, 20)
  assert_equal(params, want_params)
  batches = []
  for state in (data, want_data):
    iterator = iter(pipeline.make(config(), 8)[0])
    iterator.set_state(state)
    batches.append(next(iterator))
  assert_equal(*batches)
  # The losses after the kill are the same, and no row comes twice.
  rows = [metrics.read(str(folder)) for folder in (parts, whole)]
  assert [r["step"] for r in rows[0]] == list(range(1, 21))
  assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]


def test_a_finished_run_changes_nothing(trained):
  workdir, first = trained
  again = train.main(config(steps=7), workdir)
  assert again.step == 7
  assert_equal(first.state, again.state)


def test_the_loss_falls_on_one_batch(tmp_path, one_device):
  c = config(steps=150)
  with c.unlocked():
    c.data.rows.train = 8
    c.optimizer.lr = 0.03
    c.checkpoint.every = 1000
  result = train.main(c, str(tmp_path))
  assert result.metrics["loss"] < 0.05
  rows = metrics.read(str(tmp_path))
  assert rows[0]["loss"] > 2.0
  assert {"grad_norm", "lr", "norm/llm", "data_wait_ms"} <= rows[0].keys()
  assert {"steps_per_second", "tokens_per_second"} <= rows[-1].keys()


def test_micro_batches_give_the_gradient_of_the_whole_batch():
  c = config()
  dataset, example = pipeline.make(c, 8)
  system = systems.build(c, example, 8)
  batch = jax.tree.map(jnp.asarray, next(iter(dataset)))
  params = jax.jit(system.init)(jax.random.key(0))
  # Plain descent: the step is the gradient.
  plain = optim.Optimizer(
    optax.sgd(1.0), lambda step: 1.0, jax.tree.map(lambda _: True, params)
  )
  state = {
    "params": params,
    "opt": plain.tx.init(params),
    "step": jnp.int32(0),
  }
  got = [
    jax.jit(train.make_update(system, plain, 0, n))(state, batch)
    for n in (1, 4)
  ]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    got[0][0]["params"],
    got[1][0]["params"],
  )
  assert float(got[0][1]["loss"]) == pytest.approx(float(got[1][1]["loss"]))


@pytest.mark.usefixtures("kept_programs")
def test_bfloat16_parameters_resume_with_the_same_bits(tmp_path):
  c = config(steps=4)
  c.optimizer.master = True
  first = train.main(c, str(tmp_path))
  assert first.state["params"]["llm"]["head"]["kernel"].dtype == jnp.bfloat16
  master = first.state["opt"].master["llm"]["head"]["kernel"]
  assert master.dtype == jnp.float32
  shutil.rmtree(tmp_path / "checkpoints" / "4")
  again = train.main(c, str(tmp_path))
  assert_equal(again.state, first.state)


def test_another_run_gives_the_start_and_frozen_leaves_keep_it(
  trained, tmp_path
):
  workdir, first = trained
  c = config(steps=2)
  c.init_from = workdir
  c.optimizer.freeze = (("llm/head/.*", False), (".*", True))
  end = train.main(c, str(tmp_path))
  assert end.step == 2
  old, new = first.state["params"]["llm"], end.state["params"]["llm"]
  for name in ("embed", "blocks"):
    assert_equal(new[name], old[name])
  assert np.abs(new["head"]["kernel"] - old["head"]["kernel"]).min() > 0


def test_parameters_named_as_new_start_fresh(trained):
  workdir, first = trained
  c = config()
  c.init_from, c.init_new = workdir, ("llm/head/.*",)
  system = build(c)
  params, origin = systems.start(c, system, abstract(system))
  fresh = systems.once(system.init)(jax.random.key(c.seed))
  assert origin.endswith(workdir)
  assert_equal(params["llm"]["head"], fresh["llm"]["head"])
  assert_equal(params["llm"]["embed"], first.state["params"]["llm"]["embed"])


def test_evaluators_run_every_so_often_while_training(trained):
  rows = metrics.read(trained[0])
  scored = [r["step"] for r in rows if "eval/copy/accuracy" in r]
  assert scored == [3, 6, 7]


def test_only_the_newest_checkpoints_are_kept(trained):
  kept = pathlib.Path(trained[0], "checkpoints").iterdir()
  assert sorted(p.name for p in kept) == ["6", "7"]


def test_sigterm_saves_and_ends_well(tmp_path):
  run = subprocess.Popen(
    command(tmp_path, "--config.steps=100000", "--config.checkpoint.every=10"),
    cwd=ROOT,
    env=ENV,
    stdout=subprocess.PIPE,
    text=True,
  )
  until = time.time() + 60
  while not (tmp_path / "checkpoints/10/commit_success.txt").exists():
    assert run.poll() is None and time.time() < until
    time.sleep(0.05)
  os.kill(run.pid, signal.SIGTERM)
  out, _ = run.communicate(timeout=60)
  assert run.returncode == 0
  saves = checkpoint.Checkpointer(str(tmp_path), read_only=True)
  step = saves.latest()
  saves.close()
  assert step >= 10
  assert f"SIGTERM: saved step {step}" in out


def test_flops_count_each_matrix_for_the_tokens_that_pass_it():
  shapes = trees.flatten(
    {
      "vit": {"kernel": jnp.zeros((2, 3))},
      "llm": {"kernel": jnp.zeros((4, 5)), "bias": jnp.zeros(5)},
    }
  )
  got = metrics.model_flops(shapes, {"": 10, "vit": 100})
  assert got == 6 * (6 * 100 + 20 * 10)


def test_peaks_are_found_by_the_longest_name():
  assert metrics.peak_flops("TPU v5 lite") == 197e12
  assert metrics.peak_flops("TPU v5p slice") == 459e12
  assert metrics.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
  assert metrics.peak_flops("cpu") is None
