# SPDX-License-Identifier: Apache-2.0
"""Adapters: the arithmetic, what is trained and kept, and the mesh."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from spatial_jax import lora, optim, sharding, train, trees
from spatial_jax import system as systems
from spatial_jax.data import pipeline
from spatial_jax.losses import token_losses
from spatial_jax.models import llm
from spatial_jax.nn.layers import Dense

# Compiling takes most of the time here.
quick = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
QUERY = "llm/blocks/attention/query"
EVERYWHERE = ((".*", 4),)


def recipe(**changes):
  config = importlib.import_module("configs.qwen2_5_vl_sft")
  config = config.get_config("test,lora")
  config.optimizer.master = False
  config.lora.update(changes)
  return config


@functools.cache
def tiny():
  """(system, parameters with random adapters on every layer, batch)."""
  config = recipe(ranks=EVERYWHERE)
  dataset, example = pipeline.make(config, config.batch_size)
  system = systems.build(config, example, config.batch_size)
  params = draw(jax.eval_shape(system.init, jax.random.key(0)))
  return system, params, jax.tree.map(jnp.asarray, next(iter(dataset)))


def draw(shapes):
  """Random parameters and adapters of these shapes; b is not zero."""
  rng = np.random.default_rng(0)

  def one(name, x):
    if name.endswith(("scale", "bias")):
      return np.full(x.shape, 0.5 if "lora" in name else 1.0, np.float32)
    size = 0.2 if "lora" in name else np.prod(x.shape[-2:-1]) ** -0.5
    return rng.normal(0, size, x.shape).astype(np.float32)

  return trees.map_names(one, shapes)


@functools.cache
def program():
  """params, batch -> logits, and the loss that never holds all of them."""
  system = tiny()[0]
  chunked = system.model.clone(loss_tokens=8)

  @quick
  def run(params, batch):
    arguments = system.mod.arguments(batch)
    logits, _ = system.model.apply({"params": params}, **arguments)
    return logits, system.mod.loss(chunked, params, batch)[0]

  return run


def test_an_adapter_whose_b_is_zero_changes_no_bit():
  _, params, batch = tiny()
  fresh = trees.map_names(
    lambda name, x: 0 * x if name.endswith("lora_b") else x, params
  )
  got = program()(fresh, batch)
  want = program()(lora.merge(fresh), batch)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  moved = program()(params, batch)
  assert np.abs(moved[0] - want[0]).max() > 0.1
  assert abs(moved[1] - want[1]) > 0.01


def test_merged_weights_answer_as_adapters_do():
  _, params, batch = tiny()
  merged = lora.merge(params)
  assert not trees.flatten(lora.adapters(merged))
  got, want = program()(merged, batch), program()(params, batch)
  for a, b in zip(got, want, strict=True):
    assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(b))


def test_a_layer_adds_scale_times_the_product_of_two_small_ones():
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(5, 6)), rng.normal(size=(6, 3))
  a, b = rng.normal(size=(6, 2)), rng.normal(size=(2, 3))
  params = {"kernel": kernel, "lora_a": a, "lora_b": b, "lora_scale": 0.5}
  params = jax.tree.map(jnp.float32, params)
  got = Dense(3, use_bias=False).apply({"params": params}, jnp.float32(x))
  np.testing.assert_allclose(got, x @ kernel + 0.5 * x @ a @ b, rtol=1e-5)


def test_merging_rounds_once_to_the_dtype_of_the_kernel():
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

  layer = {"kernel": draw(3, 32, 16), "lora_a": draw(3, 32, 4)}
  layer |= {"lora_b": draw(3, 4, 16), "lora_scale": jnp.full(3, 2.0)}
  got = lora.merge({"up": layer})["up"]["kernel"]
  w, a, b = (np.asarray(layer[k], np.float64) for k in list(layer)[:3])
  want = (w + 2 * a @ b).astype(np.float32).astype(ml_dtypes.bfloat16)
  # Equal but for ties between float64 and float32.
  assert got.dtype == jnp.bfloat16
  assert np.mean(np.asarray(got) == want) > 0.999


def test_rules_choose_layers_by_name_and_their_ranks():
  config = recipe(
    ranks=((QUERY, 2), (r"vit/blocks/.*", 3), (".*", 0)), scale=0.25
  )
  system = systems.build(config, pipeline.example(config), 8)
  shapes = jax.eval_shape(system.init, jax.random.key(0))
  found = trees.flatten(lora.adapters(shapes))
  assert {n.rsplit("/", 1)[0] for n in found} == {
    QUERY,
    *(f"vit/blocks/{n}" for n in ("qkv", "out", "mlp/gate", "mlp/up")),
    "vit/blocks/mlp/down",
  }
  assert found[f"{QUERY}/lora_a"].shape == (3, 64, 2)
  assert found[f"{QUERY}/lora_b"].shape == (3, 2, 64)
  assert found[f"{QUERY}/lora_scale"].shape == (3,)
  assert found["vit/blocks/qkv/lora_b"].shape == (4, 3, 96)


@pytest.mark.parametrize(
  ("ranks", "message"),
  [
    ((("llm/blocks/.*", 4),), "no rule matches 'vit/merger/up'"),
    ((("lm/.*", 4), (".*", 0)), "'lm/.*' matches no parameter"),
    # Tables and convolutions are no linear layers: nobody would read these.
    (((".*embed.*", 4), (".*", 0)), "'.*embed.*' matches no parameter"),
    (((".*", 0),), "gives no layer an adapter"),
    (((".*", 33),), "the rank 33; expected 1 to 32"),
  ],
)
def test_rules_that_do_not_fit_are_errors(ranks, message):
  config = recipe(ranks=ranks)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      systems.build(config, pipeline.example(config), 8).init,
      jax.random.key(0),
    )


@pytest.mark.parametrize("start", ["kaiming", "gaussian"])
def test_a_is_drawn_as_peft_draws_it(start):
  params = {"up": {"kernel": jnp.zeros((4, 400, 50))}}
  made = lora.init(
    jax.random.key(0), params, ["up"], ranks=EVERYWHERE, start=start
  )
  a = np.asarray(made["up"]["lora_a"])
  if start == "kaiming":
    assert 0.98 / 20 < np.abs(a).max() <= 1 / 20
    assert a.std() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
  else:
    assert a.std() == pytest.approx(1 / 4, rel=0.02)
  assert not np.any(made["up"]["lora_b"])
  with pytest.raises(ValueError, match="expected 'kaiming' or 'gaussian'"):
    lora.init(jax.random.key(0), params, ["up"], ranks=EVERYWHERE, start="x")


def test_dropout_masks_the_input_of_adapters_alone_anew_in_each_layer():
  _, params, _ = tiny()
  dropped = lora.dropout(params, jax.random.key(1), 0.25)
  masks = dropped["llm"]["blocks"]["attention"]["query"]["lora_dropout"]
  assert masks["key"].shape == (3, 2) and masks["rate"].shape == (3,)
  assert len(np.unique(masks["key"], axis=0)) == 3
  assert "lora_dropout" not in params["llm"]["blocks"]["attention"]["query"]
  x = jnp.ones((400, 64))
  layer = jax.tree.map(
    lambda p: p[1], dropped["llm"]["blocks"]["attention"]["query"]
  )
  # With a and b as identities, the output is the mask.
  eye = {"lora_a": jnp.eye(64), "lora_b": jnp.eye(64), "lora_scale": 1.0}
  layer |= eye | {"kernel": jnp.zeros((64, 64)), "bias": jnp.zeros(64)}
  layer = {**layer, "lora_scale": jnp.float32(1.0)}
  got = np.asarray(Dense(64).apply({"params": layer}, x))
  assert set(np.unique(got).tolist()) == {0.0, float(np.float32(1) / 0.75)}
  assert np.mean(got == 0) == pytest.approx(0.25, abs=0.01)
  assert np.std(np.mean(got == 0, axis=0)) < 0.05  # rows are independent


def test_only_training_drops():
  config = recipe(dropout=0.5)
  system = systems.build(config, pipeline.example(config), 8)
  _, params, batch = tiny()

  def bits(train):
    def loss(key):
      return system.loss(params, batch, rngs={"dropout": key}, train=train)[0]

    return str(jax.make_jaxpr(loss)(jax.random.key(0))).count("random_bits")

  assert bits(train=True) > 0
  assert bits(train=False) == 0


def decoder(**sizes):
  """(init, loss of params and tokens) of a scanned decoder with adapters."""
  sizes = {"width": 256, "layers": 32, "heads": 4, "mlp": 512} | sizes
  H = sizes["width"] // 8
  model = llm.Model(
    vocab=64,
    kv_heads=4,
    sections=(H // 4, H // 4, H // 2),
    remat="full",
    **sizes,
  )

  def call(apply, params, tokens):
    positions = jnp.zeros((8, 3, 16), jnp.int32)
    return apply(params, tokens, positions, jnp.ones_like(tokens))

  def init(key):
    with lora.linear_layers() as layers:
      params = call(model.init, key, jnp.zeros((8, 16), jnp.int32))["params"]
    added = lora.init(key, params, layers, ranks=EVERYWHERE)
    return {"llm": lora.attach(params, added)}

  def loss(params, tokens):
    logits, _ = call(model.apply, {"params": params["llm"]}, tokens)
    losses, _ = token_losses(logits, jnp.roll(tokens, -1, axis=1))
    return jnp.mean(losses)

  return init, loss


def compiled(freeze, before=lambda params: params):
  """The compiled step, its optimizer state's shapes and the base's bytes."""
  init, loss = decoder()
  shapes = jax.eval_shape(init, jax.random.key(0))
  config = importlib.import_module("configs.common").defaults().optimizer
  config.freeze = freeze
  made = optim.make(config, 10, shapes)
  trained = optim.subset(shapes, made.trainable)
  state = jax.eval_shape(made.tx.init, trained)

  def step(params, opt, tokens):
    def of(trained):
      return loss(before(optim.merge(trained, params)), tokens)

    grads = jax.grad(of)(optim.subset(params, made.trainable))
    updates, opt = made.tx.update(
      grads, opt, optim.subset(params, made.trainable)
    )
    return updates, opt

  tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32)
  done = jax.jit(step).lower(shapes, state, tokens).compile()
  base = 4 * trees.count(
    {k: x for k, x in trees.flatten(shapes).items() if "lora" not in k}
  )
  return done, trees.flatten(state), base


def products(step):
  """Shapes of the matrix products of a compiled step, each sorted."""
  found = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", step.as_text())
  return {tuple(sorted(map(int, x.split(",")))) for x in found}


def test_a_frozen_base_has_no_gradient_no_state_and_no_second_copy():
  """Bytes that the compiler plans, of 32 blocks with 0.7 M weights each."""
  adapters = ((".*/lora_[ab]", False), (".*", True))
  step, state, base = compiled(adapters)
  names = [name for name in state if "llm" in name]
  assert names and all("lora_" in name for name in names)
  memory = step.memory_analysis()
  # Outputs: updates and moments of adapters, of rank 4 in layers 256 wide.
  assert memory.output_size_in_bytes < 0.25 * base
  assert memory.temp_size_in_bytes < 0.25 * base
  # Merged before the step instead: a copy of all kernels, and their gradients.
  merged, _, _ = compiled(adapters, lora.merge)
  more = merged.memory_analysis().temp_size_in_bytes
  assert more > 0.9 * base
  # No product has the shape of a kernel, as the gradient of one has.
  full, full_state, _ = compiled(((".*", False),))
  kernels = {(256, 256), (256, 512)}
  assert products(full) & kernels == kernels
  assert products(step) and not products(step) & kernels
  print(
    f"base {base / 2**20:.1f} MiB; temporaries beside it: adapters in the "
    f"layers {memory.temp_size_in_bytes / 2**20:.1f}, merged "
    f"{more / 2**20:.1f}; optimizer state "
    f"{trees.count(state) / trees.count(full_state):.3f} of full training's"
  )


def test_adapters_lie_as_their_kernels_do():
  shapes = jax.eval_shape(decoder()[0], jax.random.key(0))
  mesh = sharding.mesh(fsdp=4, tensor=2)
  placed = sharding.parameters(shapes, mesh)["llm"]["blocks"]
  P = jax.sharding.PartitionSpec
  query, down = placed["attention"]["query"], placed["mlp"]["down"]
  assert query["kernel"].spec == P(None, "fsdp", "tensor")
  assert query["lora_a"].spec == P(None, "fsdp")
  assert query["lora_b"].spec == P(None, None, "tensor")
  assert query["lora_scale"].spec == P()
  assert down["lora_a"].spec == P(None, "tensor")
  assert down["lora_b"].spec == P(None, None, "fsdp")


def after_a_step(**sizes):
  """(a query's parameters, loss, gradients' moments) on a mesh."""
  init, loss = decoder(width=32, layers=2, mlp=32)
  shapes = jax.eval_shape(init, jax.random.key(0))
  config = importlib.import_module("configs.common").defaults().optimizer
  config.freeze = ((".*/lora_[ab]", False), (".*", True))

  def dropping(params, batch, *, rngs, train):
    params = lora.dropout(params, rngs["dropout"], 0.1)
    return loss(params, batch["tokens"]), ({}, {})

  system = systems.System(None, None, {}, {}, lambda x: x, init, dropping)
  devices = jax.devices()[: np.prod(list(sizes.values()))]
  mesh = sharding.mesh(**{"fsdp": 1, **sizes}, devices=devices)
  with jax.set_mesh(mesh):
    optimizer = optim.make(config, 10, shapes)
    params = draw(shapes)
    opt = optimizer.tx.init(optim.subset(params, optimizer.trainable))
    state = {"params": params, "opt": opt, "step": jnp.int32(0)}
    placed = sharding.infer(state, mesh)
    state = jax.device_put(state, placed)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 16), np.int32)
    batch = {"tokens": tokens}
    update = quick(
      train.make_update(system, optimizer, 0), out_shardings=(placed, None)
    )
    state, scalars = update(
      state, jax.device_put(batch, sharding.batch_sharding(mesh))
    )
  query = state["params"]["llm"]["blocks"]["attention"]["query"]
  # A step moves by a gradient's sign, the first moment by the gradient.
  moments = state["opt"][1].mu
  return query, float(scalars["loss"]), jax.device_get(trees.flatten(moments))


def test_a_sharded_step_equals_the_step_of_one_device():
  query, loss, got = after_a_step(data=2, fsdp=2, tensor=2)
  assert not query["lora_a"].sharding.is_fully_replicated
  assert not query["kernel"].sharding.is_fully_replicated
  _, want_loss, want = after_a_step(data=1)
  assert loss == pytest.approx(want_loss, rel=1e-5)
  assert got.keys() == want.keys() and all("lora_" in name for name in got)
  for name, value in want.items():
    assert np.any(value), name
    assert np.max(np.abs(got[name] - value)) <= 1e-4 * np.max(np.abs(value))
