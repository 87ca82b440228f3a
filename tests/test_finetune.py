# SPDX-License-Identifier: Apache-2.0
"""From published weights through training to weights that others load."""

import collections
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import qwen2_5_vl_sft
from spatial_jax import (
  checkpoint,
  convert,
  evaluate,
  hf,
  lora,
  optim,
  peft,
  sharding,
  train,
  trees,
)
from spatial_jax import system as systems
from spatial_jax.data import pipeline
from tests import published, toy

Tuned = collections.namedtuple(
  "Tuned", "base workdir config system result logits"
)


def recipe(folder, arg="lora"):
  config = qwen2_5_vl_sft.get_config(f"test,{arg},init={folder}")
  # As transformers computes, to compare.
  config.optimizer.update({"master": False, "lr": 1e-2})
  config.steps, config.accumulate = 4, 1
  return config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("published")
  published.write(folder)
  return folder


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
  config = recipe(base)
  workdir = tmp_path_factory.mktemp("tuned")
  # Compiling takes most of the time here.
  jax.config.update("jax_disable_most_optimizations", True)
  result = train.main(config.lock(), str(workdir))
  jax.config.update("jax_disable_most_optimizations", False)
  system = systems.build(config, pipeline.example(config), config.batch_size)

  @functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
  )
  def logits(params, batch):
    arguments = system.mod.arguments(batch)
    return system.model.apply({"params": params}, **arguments)[0]

  return Tuned(base, workdir, config, system, result, logits)


def rows(config):
  return next(iter(pipeline.make(config, config.batch_size)[0]))


def test_adapters_alone_are_trained(tuned):
  params = tuned.result.state["params"]
  plain = lora.base(params)
  start = hf.load(tuned.system.mod.KEYS, tuned.base, plain)
  jax.tree.map(np.testing.assert_array_equal, plain, start)
  moved = trees.flatten(lora.adapters(params))
  assert {name.split("/lora_")[0] for name in moved} == {
    f"llm/blocks/{part}"
    for part in (
      *(f"attention/{n}" for n in ("query", "key", "value", "out")),
      *(f"mlp/{n}" for n in ("gate", "up", "down")),
    )
  }
  assert all(
    np.any(np.asarray(x)) for name, x in moved.items() if name.endswith("_b")
  )
  state = trees.flatten(tuned.result.state["opt"])
  state = [name for name in state if "llm" in name or "vit" in name]
  assert state and all("lora_" in name for name in state)
  assert not any(name.endswith("scale") for name in state)


def test_merged_weights_go_out_and_come_in(tuned, tmp_path):
  params, mod = tuned.result.state["params"], tuned.system.mod
  hf.save(mod.KEYS, lora.merge(params), tmp_path)
  loaded = hf.load(mod.KEYS, tmp_path, lora.base(params))
  batch = rows(tuned.config)
  want = tuned.logits(params, batch)
  got = tuned.logits(loaded, batch)
  assert np.max(np.abs(got - want)) <= 1e-5 * np.max(np.abs(want))
  before = tuned.logits(lora.base(params), batch)
  assert np.max(np.abs(before - want)) > 0.1 * np.max(np.abs(want))


def torch_logits(folder, batch, row, adapter=None):
  """Logits of transformers for one row of a batch."""
  import torch
  from transformers import Qwen2_5_VLForConditionalGeneration

  model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  if adapter is not None:
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, adapter)
  valid = batch["segments"][row] > 0
  ids = torch.tensor(batch["tokens"][row][valid].astype(np.int64))[None]
  is_image = ids == published.sizes()["image_token_id"]
  count = 4 * int(is_image.sum())
  where = batch["layout/patch_positions"][row][:count]
  with torch.no_grad():
    return model(
      input_ids=ids,
      attention_mask=torch.ones_like(ids),
      mm_token_type_ids=is_image.int(),
      pixel_values=torch.tensor(batch["patches"][row][:count]),
      image_grid_thw=torch.tensor([[1, *(where.max(0) + 1)]]),
    ).logits.numpy()[0]


@pytest.mark.filterwarnings("ignore")
def test_transformers_answers_as_the_tuned_model_does(tuned, tmp_path):
  for package in ("torch", "transformers"):
    pytest.importorskip(package, reason=published.ONLY_TORCH)
  params, batch = tuned.result.state["params"], rows(tuned.config)
  got = np.asarray(tuned.logits(params, batch))
  convert.save(
    tuned.config,
    str(tuned.workdir),
    source="",
    to=str(tmp_path),
    like=str(tuned.base),
  )
  for row in (0, 5):
    want = torch_logits(tmp_path, batch, row)
    mine = got[row][: len(want)]
    assert np.max(np.abs(mine - want)) <= 1e-4 * np.max(np.abs(want))


@pytest.mark.filterwarnings("ignore")
def test_peft_answers_as_the_tuned_model_does(tuned, tmp_path):
  for package in ("torch", "transformers"):
    pytest.importorskip(package, reason=published.ONLY_TORCH)
  pytest.importorskip("peft", reason="peft is not installed")
  params, batch = tuned.result.state["params"], rows(tuned.config)
  peft.save(tuned.system.mod.KEYS, params, tmp_path, release=1)
  got = np.asarray(tuned.logits(params, batch))[0]
  want = torch_logits(tuned.base, batch, 0, adapter=tmp_path)
  assert np.max(np.abs(got[: len(want)] - want)) <= 1e-4 * np.max(np.abs(want))


def test_a_run_without_the_adapters_of_its_weights_is_an_error(tuned):
  config = recipe(tuned.base, "tune=llm")
  config.init_from = str(tuned.workdir)
  system = systems.build(config, pipeline.example(config), 8)
  mesh = sharding.mesh()
  with pytest.raises(checkpoint.Mismatch, match="adapters, which would be"):
    evaluate.load(str(tuned.workdir), system, mesh)
  params, step = evaluate.load(str(tuned.workdir), tuned.system, mesh)
  assert step == 4
  for name, x in trees.flatten(tuned.result.state["params"]).items():
    np.testing.assert_array_equal(trees.flatten(params)[name], x)


def test_a_second_run_goes_on_with_the_adapters_of_the_first(tuned):
  config = recipe(tuned.base)
  config.init_from = str(tuned.workdir)
  shapes = jax.eval_shape(tuned.system.init, jax.random.key(0))
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.parameters(shapes, sharding.mesh()),
  )
  params, _ = systems.start(config, tuned.system, abstract)
  jax.tree.map(
    np.testing.assert_array_equal, params, tuned.result.state["params"]
  )


def plain_descent(params):
  """The step of this optimizer is the gradient."""
  return optim.Optimizer(
    optax.sgd(1.0), lambda step: 1.0, jax.tree.map(lambda _: True, params)
  )


@functools.cache
def one_step(accumulate, devices):
  """(gradients, metrics, compiled step, calls compiled) of the toy."""
  config = toy.get_config()
  config.batch_size = 16
  dataset, example = pipeline.make(config, 16)
  system = systems.build(config, example, 16)
  mesh = sharding.mesh(data=devices, fsdp=1, devices=jax.devices()[:devices])
  sharding.check_batch(mesh, 16, accumulate)
  with jax.set_mesh(mesh):
    params = jax.jit(system.init)(jax.random.key(0))
    optimizer = plain_descent(params)
    state = {"params": params, "opt": optimizer.tx.init(params)}
    state = jax.device_put(
      {**state, "step": jnp.int32(0)}, sharding.replicated(mesh)
    )
    update = jax.jit(train.make_update(system, optimizer, 0, accumulate))
    data = iter(dataset)
    placed = sharding.batch_sharding(mesh)
    after, scalars = update(state, jax.device_put(next(data), placed))
    text = update.lower(state, jax.device_put(next(data), placed)).compile()
    later = after
    for _ in range(2):
      later = jax.device_put(later, sharding.replicated(mesh))
      later, _ = update(later, jax.device_put(next(data), placed))
  grads = jax.tree.map(
    lambda a, b: np.asarray(a - b, np.float64),
    *jax.device_get((params, after["params"])),
  )
  return grads, scalars, text.as_text(), update._cache_size()


@pytest.mark.parametrize(("accumulate", "devices"), [(4, 1), (2, 4), (4, 4)])
def test_micro_batches_weigh_tokens_not_rows(accumulate, devices):
  want, want_scalars, _, _ = one_step(1, 1)
  got, scalars, _, compiled = one_step(accumulate, devices)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.max(np.abs(a - b)) <= 1e-6 * max(np.max(np.abs(b)), 0.1)
  assert scalars["loss"] == pytest.approx(float(want_scalars["loss"]), rel=1e-6)
  assert compiled == 1
  # A mean of the micro-batches' own means would not be it.
  config = toy.get_config()
  batch = next(iter(pipeline.make(config, 16)[0]))
  weights = batch["loss_weight"].reshape(-1, accumulate, toy.toy_data.LENGTH)
  assert len(set(weights.sum((0, 2)).tolist())) > 1


def test_micro_batches_move_no_row_to_another_device():
  _, _, text, _ = one_step(4, 4)
  moves = re.findall(
    r"\b(all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(",
    text,
  )
  assert set(moves) == {"all-reduce"}


def test_low_precision_gradients_are_summed_in_float32():
  """Micro-batches of bfloat16 weights: 64 gradients of 1/64 make 1."""
  params = {"w": jnp.zeros((), jnp.bfloat16)}

  def loss(params, batch, key):
    return (params["w"] * batch["x"]).sum(), {}

  batch = {"x": jnp.full((64,), 1 + 1 / 64), "loss_weight": jnp.ones((64, 1))}
  grads, _ = train._gradients(loss, params, batch, jax.random.key(0), 64)
  assert grads["w"].dtype == jnp.float32
  # Summed in bfloat16 the small parts would have been lost.
  assert float(grads["w"]) == pytest.approx(1 + 1 / 64, rel=1e-5)


def test_the_config_that_peft_reads_is_json(tuned, tmp_path):
  peft.save(tuned.system.mod.KEYS, tuned.result.state["params"], tmp_path)
  settings = json.loads((tmp_path / "adapter_config.json").read_text())
  assert (settings["r"], settings["lora_alpha"]) == (16, 32)
  pattern = re.compile(settings["target_modules"])
  assert pattern.fullmatch("model.layers.2.self_attn.q_proj")
  assert not pattern.fullmatch("visual.blocks.2.mlp.gate_proj")
