# SPDX-License-Identifier: Apache-2.0
"""Rows of whole systems against themselves, of compiling, and of growth."""

from __future__ import annotations

import importlib
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from configs import common
from launch import prune_bench
from launch.speed import ours, qwen
from launch.speed.program import Program
from spatial_jax import models, optim
from spatial_jax.data import stts as stts_rows
from spatial_jax.plan import cost


def timed(run, calls: int = 1) -> float:
  """Least seconds of some calls, after one that isn't counted."""
  jax.block_until_ready(run())
  seconds = []
  for _ in range(calls):
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - start)
  return min(seconds)


def matmul(folder: pathlib.Path, case: dict) -> Program:
  """The most that this machine multiplies: a large product."""
  del folder
  size, dtype = case["size"], case["dtype"]
  rng = np.random.default_rng(0)
  a, b = (rng.standard_normal((size, size), np.float32) for _ in range(2))
  a, b = (jnp.asarray(x, dtype) for x in (a, b))
  product = jax.jit(jnp.matmul)
  start = time.perf_counter()
  out = np.asarray(product(a, b), np.float32)
  first = time.perf_counter() - start

  def run():
    return product(a, b).block_until_ready()

  return Program(run, {"product": out}, first, flops=2.0 * size**3)


def vggt(folder: pathlib.Path, case: dict) -> Program:
  """Aggregator and heads on some frames."""
  del folder
  options = {"variant": case["variant"], **case.get("model", {})}
  options["head_names"] = case.get("heads", ("camera", "depth", "points"))
  config = ConfigDict({"model_name": "vggt", "model": options})
  model, _ = models.build(config)
  height = case.get("height", case["side"])
  shape = 1, case["frames"], height, case["side"], 3
  images = jax.random.uniform(jax.random.key(0), shape)
  params = jax.jit(model.init)(jax.random.key(1), images[:, :1])

  @jax.jit
  def predict(params, images):
    return model.apply(params, images)[0]

  def run():
    return jax.block_until_ready(predict(params, images))

  start = time.perf_counter()
  outputs = {"pose": np.asarray(run()["pose_encoding"])}
  first = time.perf_counter() - start
  return Program(run, outputs, first, units=case["frames"])


def fill(inputs: dict, tokens: np.ndarray) -> dict[str, np.ndarray]:
  """Random numbers for the arrays of `INPUTS`, with given tokens."""
  rng = np.random.default_rng(0)
  out = {}
  for name, x in inputs.items():
    if jnp.issubdtype(x.dtype, jnp.floating):
      out[name] = rng.random(x.shape, np.float32).astype(x.dtype)
    elif name in ("frames", "images"):
      out[name] = rng.integers(256, size=x.shape).astype(x.dtype)
    else:
      out[name] = np.zeros(x.shape, x.dtype)
  steps = np.arange(tokens.shape[1], dtype=np.int32)
  out["positions"] = np.broadcast_to(steps, inputs["positions"].shape)
  out |= {"tokens": tokens, "labels": tokens}
  return out | {"segments": np.ones_like(tokens)}


def shapes(c: ConfigDict, model, mod, batch):
  """A training step, and the shapes of its state."""
  params = jax.eval_shape(
    lambda b: model.init(jax.random.key(0), **mod.arguments(b))["params"],
    batch,
  )
  optimizer = optim.make(c.optimizer, 1000, params)
  trained = optim.subset(params, optimizer.trainable)
  state = {
    "params": params,
    "opt": jax.eval_shape(optimizer.tx.init, trained),
    "step": jax.ShapeDtypeStruct((), jnp.int32),
  }
  return ours.make_update(c, model, mod, optimizer), state


def flops(c: ConfigDict, model, mod, batch) -> float:
  """Of a training step: causal attention counts half, recomputing not."""
  # Without a platform attention is products.
  mesh = jax.sharding.get_abstract_mesh()
  plain = AbstractMesh(
    mesh.axis_sizes, mesh.axis_names, axis_types=mesh.axis_types
  )
  with jax.sharding.use_abstract_mesh(plain):
    update, state = shapes(c, model, mod, batch)
    jaxpr = cost.trace(jax.jit(update), state, batch)
  return cost.flops(jaxpr, 1).model


def init(c: ConfigDict, model, mod, batch):
  """Random parameters, in bfloat16 beside a master."""

  @jax.jit
  def make(batch):
    params = model.init(jax.random.key(0), **mod.arguments(batch))["params"]
    if c.optimizer.master:
      params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return params

  return make(batch)


def started(run, flops: float = 0.0) -> Program:
  """Program of a function that returns its loss among others."""
  start = time.perf_counter()
  outputs = {"loss": np.array([float(run()["loss"])])}
  first = time.perf_counter() - start
  return Program(run, outputs, first, flops=flops)


def training(c: ConfigDict, model, mod, params, batch) -> Program:
  run = ours.updates(c, model, mod, params, batch)
  return started(run, flops(c, model, mod, batch))


def spatial_mllm(folder: pathlib.Path, case: dict) -> Program:
  """A training step as published; `cached` has VGGT's tokens in the batch."""
  del folder
  recipe = importlib.import_module("configs.spatial_mllm_sft")
  c = common.defaults()
  c.model_name, c.batch_size = "spatial_mllm", case["rows"]
  c.model = ConfigDict({"variant": case["variant"], **case.get("model", {})})
  c.data.length, c.data.media = case["length"], ConfigDict(case["media"])
  c.optimizer.freeze = (*recipe.FROZEN, ("vggt/.*", True), (".*", False))
  c.optimizer.master = case.get("dtype") == "bfloat16"
  if case.get("cached"):
    c.model.vggt = None
    c.data.media.geometry = case["geometry"]
    c.optimizer.freeze = (*recipe.FROZEN, (".*", False))
  model, mod = models.build(c)
  tokens = np.full((case["rows"], case["length"]), 9, np.int32)
  tokens[:, : case["visual"]] = model.video_token
  batch = jax.device_put(fill(mod.INPUTS(c), tokens))
  return training(c, model, mod, init(c, model, mod, batch), batch)


def pruned(folder: pathlib.Path, case: dict) -> Program:
  """Training step or loss of STTS's recipe, pruned unless `drop` is 0."""
  del folder
  recipe = importlib.import_module("configs.stts_sft")
  options = {k: case[k] for k in ("variant", "drop", "videos") if k in case}
  text = ",".join(f"{name}={value}" for name, value in options.items())
  c = recipe.get_config(text)
  c.batch_size, B = case["rows"], case["rows"]
  model, mod = models.build(c)
  inputs, T = mod.INPUTS(c), c.data.length
  count = case.get("videos", 1)
  row = np.full((count, T // count), 9, np.int32)
  row[:, : case["visual"]] = model.image_token
  tokens = np.full(T, 9, np.int32)
  tokens[: row.size] = row.reshape(-1)
  batch = fill(inputs, np.repeat(tokens[None], B, axis=0))
  if "videos" in inputs:
    share = np.minimum(np.arange(T) // row.shape[1], count - 1)
    frames = np.repeat(np.arange(1, count + 1), c.data.frames // count)
    kept = stts_rows.kept_mask(
      share + 1,
      frames,
      groups=c.data.videos.groups,
      drop=case["drop"],
      length=c.data.kept,
    )
    given = {"segments": share + 1, "videos": frames, "kept_mask": kept}
    given["mutual"] = tokens == model.image_token
    for name, x in given.items():
      batch[name] = np.repeat(x[None], B, axis=0).astype(batch[name].dtype)
  batch = jax.device_put(batch)
  params = init(c, model, mod, batch)
  if case["train"]:
    return training(c, model, mod, params, batch)
  loss = jax.jit(lambda p, b: mod.loss(model, p, b, train=False)[0])
  return started(lambda: {"loss": loss(params, batch).block_until_ready()})


def stts(folder: pathlib.Path, case: dict) -> Program:
  """What `launch/prune_bench.py` finds."""
  del folder
  start = time.perf_counter()
  notes = prune_bench.main([f"--{k}={v}" for k, v in case.items()])
  first = time.perf_counter() - start
  return Program(lambda: None, {}, first, notes=notes)


def compiling(folder: pathlib.Path, case: dict) -> Program:
  """Seconds of tracing and compiling a step, without and with a cache."""
  c = ours.config(case)
  model, mod = models.build(c)
  batch = {
    k: jax.ShapeDtypeStruct(x.shape, x.dtype)
    for k, x in qwen.batch(case).items()
  }

  def seconds():
    jax.clear_caches()
    start = time.perf_counter()
    update, state = shapes(c, model, mod, batch)
    jax.jit(update, donate_argnums=0).lower(state, batch).compile()
    return time.perf_counter() - start

  names = "jax_compilation_cache_dir", "jax_enable_compilation_cache"
  before = [getattr(jax.config, name) for name in names]
  with tempfile.TemporaryDirectory(dir=folder) as cache:
    try:
      jax.config.update("jax_compilation_cache_dir", cache)
      compilation_cache.reset_cache()
      cold, warm = seconds(), seconds()
    finally:
      for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
      compilation_cache.reset_cache()
  notes = {"cold, s": cold, "with the cache, s": warm}
  return Program(lambda: None, {}, cold, notes=notes)


def growth(folder: pathlib.Path, case: dict) -> Program:
  """Time against frames and against sequence: the fitted exponents."""
  start, notes = time.perf_counter(), {}
  for name in ("frames", "length"):
    seconds = []
    for count in case[name]:
      sizes = {**case[f"of {name}"], name: count}
      make = {"frames": vggt, "length": ours.forward_of_init}[name]
      seconds.append(timed(make(folder, sizes).run, case["calls"]))
      jax.clear_caches()
    slope = np.polyfit(np.log(case[name]), np.log(seconds), 1)[0]
    last = np.diff(np.log(seconds))[-1] / np.diff(np.log(case[name]))[-1]
    for count, second in zip(case[name], seconds, strict=True):
      notes[f"s, {name} {count}"] = second
    notes[f"exponent, {name}"] = float(slope)
    notes[f"exponent at the end, {name}"] = float(last)
  first = time.perf_counter() - start
  return Program(lambda: None, {}, first, notes=notes)
