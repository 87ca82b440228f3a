# SPDX-License-Identifier: Apache-2.0
"""Where parameters and activations lie, and that it changes no number."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from spatial_jax import models, optim, sharding, train, trees
from spatial_jax import system as systems
from spatial_jax.data import pipeline
from spatial_jax.models import qwen2_5_vl
from tests import toy


@functools.cache
def state_after_one_step(**sizes):
  """(loss, parameters) of the toy on a mesh of these sizes."""
  config = toy.get_config()
  devices = jax.devices()[: np.prod(list(sizes.values()))]
  mesh = sharding.mesh(**{"fsdp": 1, **sizes}, devices=devices)
  dataset, example = pipeline.make(config, config.batch_size)
  system = systems.build(config, example, config.batch_size)
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    optimizer = optim.make(config.optimizer, config.steps, shapes)
    placed = sharding.parameters(shapes, mesh)
    params = jax.jit(system.init, out_shardings=placed)(jax.random.key(0))
    state = {
      "params": params,
      "opt": jax.jit(optimizer.tx.init)(params),
      "step": jnp.int32(0),
    }
    batch = next(iter(dataset))
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    state, scalars = jax.jit(train.make_update(system, optimizer, 0))(
      state, batch
    )
  return float(scalars["loss"]), jax.device_get(state["params"])


@pytest.mark.parametrize(
  "sizes", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_a_sharded_step_equals_the_step_of_one_device(sizes):
  loss, params = state_after_one_step(**sizes)
  want_loss, want = state_after_one_step(data=1)
  assert loss == pytest.approx(want_loss, rel=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    params,
    want,
  )


@pytest.mark.parametrize("variant", qwen2_5_vl.VARIANTS)
def test_every_parameter_of_every_variant_has_a_rule(variant):
  config = toy.get_config()
  config.model_name, config.batch_size = "qwen2_5_vl", 1
  config.model = {"variant": variant, "grid": (1, 8, 8)}
  if variant == "demo":
    config.model.grid = (4, 8, 8)
  config.data.length = 96
  model, mod = models.build(config)
  inputs = mod.INPUTS(config)
  shapes = jax.eval_shape(
    lambda key, batch: model.init(key, **mod.arguments(batch))["params"],
    jax.random.key(0),
    inputs,
  )
  mesh = sharding.mesh(fsdp=4, tensor=2)
  specs = trees.flatten(sharding.parameters(shapes, mesh))
  query = "llm/blocks/attention/query/kernel"
  assert specs[query].spec == P(None, "fsdp", "tensor")
  # Nearly all weights of a published size are split eight ways.
  flat = trees.flatten(shapes)
  held = sum(
    np.prod(specs[name].shard_shape(x.shape)) for name, x in flat.items()
  )
  if variant in ("3b", "7b", "32b", "72b"):
    assert held < trees.count(shapes) / 8 * 1.5


def test_a_parameter_without_a_rule_is_an_error():
  mesh = sharding.mesh()
  shapes = {"llm": {"strange": jax.ShapeDtypeStruct((2,), jnp.float32)}}
  with pytest.raises(ValueError, match=r"sharding.PARAMETERS[\s\S]*llm/str"):
    sharding.parameters(shapes, mesh)


def test_a_dimension_that_does_not_divide_is_replicated_and_logged(caplog):
  mesh = sharding.mesh()
  shapes = {"up": {"kernel": jax.ShapeDtypeStruct((12, 5), jnp.float32)}}
  with caplog.at_level(logging.INFO):
    specs = sharding.parameters({"llm": shapes}, mesh)
  assert specs["llm"]["up"]["kernel"].spec == P()
  assert "llm/up/kernel" in caplog.text and "embed=12" in caplog.text


def test_the_scanned_axis_is_never_sharded():
  mesh = sharding.mesh(tensor=2)
  shapes = {"x": {"down": {"kernel": jax.ShapeDtypeStruct((8, 4, 8), "f4")}}}
  specs = sharding.parameters(shapes, mesh)
  assert specs["x"]["down"]["kernel"].spec == P(None, "tensor", "fsdp")


def test_moments_lie_where_their_parameters_do():
  mesh = sharding.mesh(tensor=2)
  shapes = {"llm": {"blocks": {"up": {}}}}
  shapes["llm"]["blocks"]["up"]["kernel"] = jax.ShapeDtypeStruct(
    (2, 8, 8), jnp.float32
  )
  config = toy.get_config().optimizer
  for name in ("adamw", "muon"):
    config.name = name
    config.muon.matrices = ((".*", True),)
    config.decay = ((".*", True),)
    made = optim.make(config, 10, shapes)
    state = {
      "params": shapes,
      "opt": jax.eval_shape(made.tx.init, shapes),
      "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    placed = sharding.infer(state, mesh)
    for leaf, where in zip(
      jax.tree.leaves(state["opt"]), jax.tree.leaves(placed["opt"]), strict=True
    ):
      want = P(None, "fsdp", "tensor") if leaf.shape == (2, 8, 8) else P()
      assert where.spec == want


def test_constrain_refuses_unknown_axes_everywhere():
  with pytest.raises(ValueError, match="unknown logical axis 'lenght'"):
    sharding.constrain(jnp.ones((2, 3)), "batch lenght")
  with pytest.raises(ValueError, match="names 3 axes of a 2-D array"):
    sharding.constrain(jnp.ones((2, 3)), "batch length act_embed")


def test_constrain_shards_inside_jit_under_a_mesh_only():
  x = jnp.ones((8, 4))
  assert sharding.constrain(x, "batch length") is x
  with jax.set_mesh(sharding.mesh()):
    got = jax.jit(lambda x: sharding.constrain(2 * x, "batch length"))(x)
  assert got.sharding.shard_shape(got.shape) == (1, 4)


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1}, {"tensor": 16}])
def test_a_mesh_that_does_not_fit_the_devices_says_so(sizes):
  with pytest.raises(ValueError, match=r"config.mesh .* 8 device"):
    sharding.mesh(**sizes)


def test_an_indivisible_batch_names_a_size_that_fits():
  with pytest.raises(ValueError, match=r"--config.batch_size=8"):
    sharding.check_batch(sharding.mesh(), 9)
  with pytest.raises(ValueError, match="multiple of 16"):
    sharding.check_batch(sharding.mesh(), 8, accumulate=2)


@pytest.mark.parametrize(
  ("flags", "narrow"),
  [("fma avx2 bmi1", True), ("avx2 avx512f", False), ("sse2", False)],
)
def test_options_for_few_rows_go_by_the_width_of_vectors(
  flags, narrow, tmp_path, monkeypatch
):
  file = tmp_path / "cpuinfo"
  file.write_text(f"processor : 0\nflags\t\t: fpu {flags}\n")
  found = sharding._has_narrow_vectors.__wrapped__
  monkeypatch.setattr(sharding, "_CPUINFO", tmp_path / "none")
  assert not found()
  monkeypatch.setattr(sharding, "_CPUINFO", file)
  assert found() == narrow
  monkeypatch.setattr(sharding, "_has_narrow_vectors", found)
  assert sharding.compiler_options(few_rows=True) == {}  # no mesh, no platform
  with jax.set_mesh(sharding.mesh(devices=jax.devices()[:1])):
    many = sharding.compiler_options()
    assert many
    assert sharding.compiler_options(few_rows=True) == (many if narrow else {})
