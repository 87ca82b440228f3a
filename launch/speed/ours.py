# SPDX-License-Identifier: Apache-2.0
"""The library's side of the rows of Qwen2.5-VL."""

from __future__ import annotations

import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import common
from launch.speed import qwen
from launch.speed.program import Program
from spatial_jax import generate, hf, models, optim, sharding, system, train


def config(case: dict) -> ConfigDict:
  """The config of a run on a case's batch."""
  c = common.defaults()
  c.model_name = "qwen2_5_vl"
  c.model = ConfigDict(qwen.model_options(case))
  c.batch_size = case["rows"]
  c.data.length = case["length"]
  if not case["images"]:
    # A tower without work: its parameters are there, as in the published model.
    c.model.grid = (1, 8, 8)
  constant = {"warmup": 0.0, "constant": 1.0, "decay": "none"}
  c.optimizer.update({"lr": 1e-4, "weight_decay": 0.1, "b2": 0.999})
  c.optimizer.decay = ((".*", True),)
  c.optimizer.schedule.update(constant)
  return c


def write(folder: pathlib.Path, case: dict) -> Program:
  """Random weights of a case, for both sides."""
  shapes, mod = system.shapes(config(case))
  qwen.write(folder, hf.tensors(mod.KEYS, shapes), case)
  return Program(lambda: None, {}, 0.0)


def load(folder: pathlib.Path, case: dict):
  """The model, its parameters, and a batch on the device."""
  c = config(case)
  shapes, mod = system.shapes(c)
  dtype = jnp.dtype(case["dtype"])
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
  params = hf.load(mod.KEYS, folder, shapes)
  model, _ = models.build(c)
  return model, mod, params, jax.device_put(qwen.batch(case))


def forward(folder: pathlib.Path, case: dict) -> Program:
  """Loss of a batch, without gradients."""
  model, mod, params, batch = load(folder, case)

  def loss(params, batch):
    return mod.loss(model, params, batch, train=False)[0]

  loss = jax.jit(loss, compiler_options=sharding.compiler_options())
  start = time.perf_counter()
  value = float(loss(params, batch))
  first = time.perf_counter() - start
  return Program(
    lambda: loss(params, batch).block_until_ready(),
    {"loss": np.array([value])},
    first,
    flops=qwen.flops(case, train=False),
  )


def forward_of_init(folder: pathlib.Path, case: dict) -> Program:
  """`forward` of a model that was just initialised; needs no file."""
  del folder
  c = config(case)
  model, mod = models.build(c)
  batch = jax.device_put(qwen.batch(case))

  @jax.jit
  def init(batch):
    return model.init(jax.random.key(0), **mod.arguments(batch))["params"]

  @jax.jit
  def loss(params, batch):
    return mod.loss(model, params, batch, train=False)[0]

  params = init(batch)
  return Program(lambda: loss(params, batch).block_until_ready(), {}, 0.0)


def make_update(c: ConfigDict, model, mod, optimizer):
  """The trainer's (state, batch) -> (state, metrics) without a data source."""

  def loss(params, batch, *, rngs=None, train=True):
    return mod.loss(model, params, batch, rngs=rngs, train=train)

  built = system.System(model, mod, {}, {}, lambda b: b, None, loss)
  return train.make_update(built, optimizer, c.seed)


def updates(c: ConfigDict, model, mod, params, batch):
  """Function that takes one training step, and returns its metrics."""
  optimizer = optim.make(c.optimizer, 1000, params)
  update = jax.jit(
    make_update(c, model, mod, optimizer),
    donate_argnums=0,
    compiler_options=sharding.compiler_options(),
  )
  init = jax.jit(
    lambda p: optimizer.tx.init(optim.subset(p, optimizer.trainable))
  )
  state = {"params": params, "opt": init(params), "step": jnp.int32(0)}

  def run():
    nonlocal state
    state, scalars = update(state, batch)
    return jax.block_until_ready(scalars)

  return run


def step(folder: pathlib.Path, case: dict) -> Program:
  """The trainer's own update, with AdamW, clipping and its metrics.

  Parameters of half precision are stepped as they are, like the peer's.
  """
  model, mod, params, batch = load(folder, case)
  run = updates(config(case), model, mod, params, batch)
  start = time.perf_counter()
  losses = [float(run()["loss"])]
  first = time.perf_counter() - start
  losses += [float(run()["loss"]) for _ in range(2)]
  outputs = {"loss": np.array(losses)}
  return Program(run, outputs, first, flops=qwen.flops(case, train=True))


def decode(folder: pathlib.Path, case: dict) -> Program:
  """Greedy tokens after a prompt; time includes the prompt's pass."""
  model, mod, params, batch = load(folder, case)

  def run():
    tokens, _ = generate.generate(
      model,
      params,
      mod.arguments(batch),
      max_new_tokens=case["new"],
      stop_ids=(),
    )
    return tokens.block_until_ready()

  start = time.perf_counter()
  tokens = np.asarray(run())
  first = time.perf_counter() - start
  units = tokens.size
  return Program(run, {"tokens": tokens}, first, units=units)
