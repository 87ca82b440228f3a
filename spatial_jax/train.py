# SPDX-License-Identifier: Apache-2.0
"""The only training loop.

config -> mesh -> data -> model -> shapes -> optimizer -> shardings -> state
(last checkpoint, other weights or fresh) -> loop.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from spatial_jax import (
  checkpoint,
  evaluate,
  hosts,
  metrics,
  optim,
  sharding,
  trees,
)
from spatial_jax import system as systems
from spatial_jax.data import pipeline


class Result(NamedTuple):
  state: Any  # {params, opt, step}
  metrics: dict[str, float]  # of the last step
  step: int
  interrupted: bool  # SIGTERM came; the state was saved


def main(config: Any, workdir: str) -> Result:
  """Trains until config.steps; goes on where an earlier run stopped."""
  # ---------------------------------------------------------------- workdir
  hosts.cache_programs(config.compilation_cache)
  lead = jax.process_index() == 0
  with checkpoint.lock(workdir, active=lead), _sigterm() as stop:
    # ----------------------------------------------------------------- mesh
    mesh = sharding.mesh(**config.mesh.to_dict())
    sharding.check_batch(mesh, config.batch_size, config.accumulate)
    with jax.set_mesh(mesh):
      return _run(config, workdir, mesh, stop)


def _run(config: Any, workdir: str, mesh: Any, stop: threading.Event) -> Result:
  lead = jax.process_index() == 0
  goodput = metrics.Goodput()
  if lead:
    checkpoint.write_config(workdir, config.to_json_best_effort())

  # -------------------------------------------------------------------- data
  dataset, example = pipeline.make(
    config,
    config.batch_size,
    rows=sharding.host_rows(mesh, config.batch_size),
  )
  data = iter(dataset)

  # ------------------------------- model, optimizer, shardings, compiled update
  prepared = prepare(config, example, mesh)
  system, optimizer, abstract = prepared[:3]
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  update = prepared.update

  # ------------------------------------------------------------------- state
  saves = checkpoint.Checkpointer(workdir, keep=config.checkpoint.keep)
  is_import = checkpoint.is_import(workdir)
  if saves.latest() is not None and not is_import:
    state, _, data = saves.restore(abstract, data)
    origin = f"checkpoint {int(state['step'])} of {workdir}"
  else:
    source = workdir if is_import else config.init_from
    params, origin = systems.start(config, system, abstract["params"], source)
    init = jax.jit(
      lambda p: optimizer.tx.init(optim.subset(p, optimizer.trainable)),
      out_shardings=shardings["opt"],
    )
    zero = jax.device_put(np.int32(0), shardings["step"])
    state = {"params": params, "opt": init(params), "step": zero}
  start = int(state["step"])

  # -------------------------------------------------------------------- loop
  rows = sharding.batch_sharding(mesh)
  count = _counter(config, system, abstract["params"], optimizer.trainable)
  peak = metrics.peak_flops(jax.devices()[0].device_kind)
  speed = metrics.Throughput(peak and peak * jax.device_count())
  writer = metrics.Writer(
    workdir,
    total=config.steps,
    start=start,
    tensorboard=config.logging.tensorboard,
    active=lead,
  )
  writer.say(
    _overview(workdir, origin, mesh, abstract["params"], optimizer, lead)
  )
  if writer.repeated:
    writer.say(f"{writer.repeated} steps after the checkpoint are done again")
  meta = {"config": config.to_json_best_effort()}
  last: dict[str, float] = {}
  pending, step = None, start
  interrupted = _told_before(saves, start)
  goodput.lose("start", time.perf_counter() - goodput.began)
  logs = _Logs(saves, writer, speed, goodput, config)
  try:
    while step < config.steps and not interrupted:
      began = time.perf_counter()
      host_batch = next(data)
      waited = time.perf_counter() - began
      goodput.lose("data", waited)
      batch = {
        name: jax.make_array_from_process_local_data(
          rows, np.asarray(x), (config.batch_size, *np.shape(x)[1:])
        )
        for name, x in host_batch.items()
      }
      state, scalars = update(state, batch)
      step += 1
      speed.add(**count(host_batch))
      # The device works on this step while the host looks at the one before.
      if pending is not None:
        last = _fetch(*pending, logs)
      pending = (step, scalars, waited)
      writer.advance()
      interrupted = _told_to_stop(stop, saves, step)
      done = step == config.steps or interrupted
      saving = done or step % config.checkpoint.every == 0
      evaluations = [] if interrupted else evaluate.due(config, step)
      if saving or evaluations or step == start + 1:
        last = _fetch(*pending, logs)
        pending = None
      if step == start + 1:
        goodput.lose("compiling", time.perf_counter() - began - waited)
      if saving:
        with goodput.losing("checkpoints"):
          saves.save(step, state, meta, data)
      if evaluations:
        with goodput.losing("evaluation"):
          scores = evaluate.run(
            config, system, state["params"], mesh, evaluations, writer.say
          )
        writer.write(step, evaluate.scalars(scores))
      if saving or evaluations or step == start + 1:
        speed.restart()
    with goodput.losing("checkpoints"):
      saves.wait()
    writer.say(goodput.line())
  finally:
    writer.close()
    saves.close()
  if interrupted and lead:
    saved = f"saved step {step}" if step > start else f"still at step {step}"
    print(
      f"SIGTERM: {saved} in {workdir}; the same command goes on from there",
      flush=True,
    )
  return Result(state, last, step, interrupted)


class Prepared(NamedTuple):
  """A config's training step for a mesh, before any array exists."""

  system: systems.System
  optimizer: optim.Optimizer
  state: Any  # shapes and shardings of {params, opt, step}
  update: Any  # jitted (state, batch) -> (state, metrics)


def prepare(config: Any, example: Any, mesh: Any) -> Prepared:
  """Step of a config for batches of such examples; run within `set_mesh`.

  Args:
    example: name -> (shape, dtype) of one example, as `pipeline.make` gives.
    mesh: of devices that needn't be there.
  """
  system = systems.build(config, example, config.batch_size)
  params = jax.eval_shape(lambda: system.init(jax.random.key(0)))
  optimizer = optim.make(config.optimizer, config.steps, params)
  trained = optim.subset(params, optimizer.trainable)
  shapes = {
    "params": params,
    "opt": jax.eval_shape(optimizer.tx.init, trained),
    "step": jax.ShapeDtypeStruct((), jnp.int32),
  }
  shardings = sharding.infer(shapes, mesh)
  state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )
  update = jax.jit(
    make_update(system, optimizer, config.seed, config.accumulate),
    donate_argnums=0,
    out_shardings=(shardings, None),
    compiler_options=sharding.compiler_options(),
  )
  return Prepared(system, optimizer, state, update)


def make_update(
  system: systems.System,
  optimizer: optim.Optimizer,
  seed: int,
  accumulate: int = 1,
):
  """(state, batch) -> (state, metrics): one step, pure."""

  def update(state, batch):
    key = jax.random.fold_in(jax.random.key(seed), state["step"])
    trained = optim.subset(state["params"], optimizer.trainable)

    def loss(trained, batch, key):
      dropout, sample = jax.random.split(key)
      value, (scalars, _) = system.loss(
        optim.merge(trained, state["params"]),
        system.transform(batch),
        rngs={"dropout": dropout, "sample": sample},
        train=True,
      )
      return value, {**scalars, "loss": value}

    grads, scalars = _gradients(loss, trained, batch, key, accumulate)
    updates, opt = optimizer.tx.update(grads, state["opt"], trained)
    trained = optim.apply(trained, updates, opt)
    params = optim.merge(trained, state["params"])
    scalars["grad_norm"] = optax.tree.norm(grads)
    scalars["lr"] = optimizer.schedule(state["step"])
    for name, group in trained.items():
      if jax.tree.leaves(group):
        scalars[f"norm/{name}"] = optax.tree.norm(_float32(group))
    return {"params": params, "opt": opt, "step": state["step"] + 1}, scalars

  return update


def _float32(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _gradients(loss, trained, batch, key, accumulate):
  """Float32 gradients and metrics.

  Micro-batches count by their loss weight, so that the sum is the gradient of
  the mean over all tokens of the batch.
  """

  def grad(trained, batch, key):
    run = jax.value_and_grad(loss, has_aux=True)
    (_, scalars), grads = run(trained, batch, key)
    return _float32(grads), scalars

  if accumulate == 1:
    return grad(trained, batch, key)

  # Strided rows: each device keeps its own share of every micro-batch.
  micro = jax.tree.map(
    lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
  )
  weights = jnp.ones(accumulate)
  if "loss_weight" in batch:
    weights = micro["loss_weight"].reshape(accumulate, -1).sum(-1)
  weights = weights / jnp.maximum(weights.sum(), 1e-9)

  def step(total, inputs):
    index, weight, part = inputs
    part = grad(trained, part, jax.random.fold_in(key, index))
    return jax.tree.map(lambda t, p: t + weight * p, total, part), None

  first = jax.tree.map(lambda x: x[0], micro)
  shapes = jax.eval_shape(grad, trained, first, key)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  inputs = (jnp.arange(accumulate), weights, micro)
  (grads, scalars), _ = jax.lax.scan(step, zeros, inputs)
  return grads, scalars


class _Logs(NamedTuple):
  saves: checkpoint.Checkpointer
  writer: metrics.Writer
  speed: metrics.Throughput
  goodput: metrics.Goodput
  config: Any


def _fetch(step, scalars, waited, logs):
  """Metrics of a finished step on the host, written; stops on NaN."""
  row = {name: float(x) for name, x in jax.device_get(scalars).items()}
  bad = [k for k in ("loss", "grad_norm") if not math.isfinite(row[k])]
  if bad:
    latest = logs.saves.latest()
    kept = "no checkpoint was saved before it"
    if latest is not None:
      kept = f"the checkpoint of step {latest} is good and the last"
    raise FloatingPointError(
      f"{bad[0]} is {row[bad[0]]} at step {step}; {kept}. Lower "
      "config.optimizer.lr, or look at the data of this step"
    )
  row["data_wait_ms"] = 1e3 * waited
  if step % logs.config.logging.every == 0 or step == logs.config.steps:
    row |= logs.speed.report()
    row["goodput"] = logs.goodput.share()
    if jax.process_count() > 1:  # a step takes as long as the last one's data
      row["slowest_host"], slowest = hosts.slowest(waited)
      row["slowest_wait_ms"] = 1e3 * slowest
    shown = ("loss", "grad_norm", "lr", "steps_per_second", "mfu", "goodput")
    shown += ("slowest_host", "slowest_wait_ms")
    logs.writer.show(step, {k: row[k] for k in shown if k in row})
  logs.writer.write(step, row)
  return row


def _counter(config: Any, system: systems.System, params: Any, trainable: Any):
  """host batch -> what a step does: tokens, frames, FLOPs."""
  inputs = system.inputs
  rows, length = config.batch_size, 1
  if "tokens" in inputs:
    length = inputs["tokens"].shape[1]
  passes = {"": rows * length}
  if "patches" in inputs:
    passes["vit"] = rows * inputs["patches"].shape[1]
  flops = metrics.model_flops(
    trees.flatten(params), passes, trees.flatten(trainable)
  )
  frames = 0
  if "world_from_camera" in system.batch:
    frames = rows * system.batch["world_from_camera"].shape[1]
  elif "patches" in inputs:
    frames = rows * config.data.get("frames", 0)

  def count(batch):
    tokens = rows * length
    if "segments" in batch:
      here = int(np.count_nonzero(batch["segments"]))
      tokens = here * rows // len(batch["segments"])
    return {"steps": 1, "tokens": tokens, "frames": frames, "flops": flops}

  return count


def _overview(workdir, origin, mesh, params, optimizer, lead) -> str:
  """One line on the run; the table of parameters goes to a file."""
  placed = trees.flatten(sharding.parameters(params, mesh))
  trainable = trees.flatten(optimizer.trainable)
  flat = trees.flatten(params)
  if lead:
    lines = [
      f"{name}  {list(x.shape)}  {x.dtype}  {placed[name].spec}  "
      f"{'trained' if trainable[name] else 'frozen'}\n"
      for name, x in flat.items()
    ]
    epath.Path(workdir, "parameters.txt").write_text("".join(lines))
  total = trees.count(params)
  trained = trees.count(optim.subset(params, optimizer.trainable))
  sizes = ", ".join(f"{k} {v}" for k, v in mesh.shape.items() if v > 1)
  device = jax.devices()[0].device_kind
  return (
    f"{total:,} parameters, {trained:,} trained, from {origin}; compiling for "
    f"{jax.device_count()} x {device}" + (f" ({sizes})" if sizes else "")
  )


def _told_to_stop(stop, saves, step) -> bool:
  if jax.process_count() > 1:  # all hosts must leave at the same step
    return saves.reached_preemption(step)
  return stop.is_set()


def _told_before(saves, start) -> bool:
  """Whether a host was told to stop while it started; announces the step.

  Hosts agree on the step after the largest that one of them has announced, once
  and for all. Told before any, they agree on 1: which never comes if a run goes
  on from a later one.
  """
  if jax.process_count() == 1:
    return False  # the event of `_sigterm` stays set
  told = saves.reached_preemption(1)
  saves.reached_preemption(start)
  return bool(hosts.gather(np.int32(told)).any())


class _sigterm:
  """An event that SIGTERM sets, instead of ending the process."""

  def __enter__(self) -> threading.Event:
    self._event = threading.Event()
    self._main = threading.current_thread() is threading.main_thread()
    # Several hosts agree through jax's own handler.
    self._main = self._main and jax.process_count() == 1
    if self._main:
      self._old = signal.signal(signal.SIGTERM, lambda *_: self._event.set())
    return self._event

  def __exit__(self, *_):
    if self._main:
      signal.signal(signal.SIGTERM, self._old)
