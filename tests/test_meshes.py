# SPDX-License-Identifier: Apache-2.0
"""Every model on a mesh: losses and gradients of one device.

By default two of them; `--all-meshes` compares every model on every mesh, which
takes some minutes.
"""

import functools

import jax
import numpy as np
import pytest

from spatial_jax import sharding, trees
from spatial_jax.models import llm
from tests import tiny

# Sizes of data, fsdp, tensor, context.
MESHES = ((8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2))
NAMES = sorted(tiny.SYSTEMS)


def pytest_generate_tests(metafunc):
  if "sizes" not in metafunc.fixturenames:
    return
  # All axes together, and frames over the context axis.
  pairs = [("spatial_mllm", MESHES[3]), ("pi0", MESHES[2])]
  if metafunc.config.getoption("--all-meshes"):
    pairs = [(n, m) for n in NAMES for m in MESHES]
  metafunc.parametrize(
    ("name", "sizes"),
    pairs,
    ids=["-".join(map(str, (n, *m))) for n, m in pairs],
  )


def mesh_of(sizes):
  devices = jax.devices()[: np.prod(sizes)]
  axes = dict(zip(sharding.MESH_AXES, sizes, strict=True))
  return sharding.mesh(**axes, devices=devices)


@functools.cache
def setup(name):
  model, mod, batch = tiny.build(name)
  return model, mod, batch, tiny.random(tiny.shapes_of(model, mod, batch))


def gradients(name, sizes):
  """Loss, and gradients by name."""
  model, mod, batch, params = setup(name)
  mesh = mesh_of(sizes)

  def loss(params, batch):
    rngs = {k: jax.random.key(0) for k in ("sample", "dropout")}
    return mod.loss(model, params, batch, rngs=rngs, train=True)[0]

  with jax.set_mesh(mesh):
    placed = sharding.parameters(params, mesh)
    split = [not x.is_fully_replicated for x in jax.tree.leaves(placed)]
    assert any(split) == (mesh.shape["fsdp"] * mesh.shape["tensor"] > 1)
    run = jax.jit(
      jax.value_and_grad(loss),
      out_shardings=(sharding.replicated(mesh), placed),
    )
    value, grads = jax.device_get(
      run(
        jax.device_put(params, placed),
        jax.device_put(batch, sharding.batch_sharding(mesh)),
      )
    )
  return float(value), trees.flatten(grads)


@functools.cache
def alone(name):
  return gradients(name, (1, 1, 1, 1))


def test_a_model_on_a_mesh_gives_the_numbers_of_one_device(name, sizes):
  want, want_grads = alone(name)
  got, grads = gradients(name, sizes)
  assert np.isfinite(want) and got == pytest.approx(want, rel=1e-5)
  # Where a gradient is zero but for rounding, the model's largest counts.
  least = 1e-3 * max(np.abs(x).max() for x in want_grads.values())
  errors = {
    key: np.abs(grads[key] - x).max() / max(np.abs(x).max(), least)
    for key, x in want_grads.items()
  }
  worst = max(errors, key=errors.get)
  print(
    f"{name} {sizes}: loss {abs(got / want - 1):.1e}, gradients "
    f"{errors[worst]:.1e} ({worst})"
  )
  assert errors[worst] <= 1e-4, worst


def test_decoding_on_a_mesh_with_a_sharded_cache_gives_the_same_logits():
  model = llm.Model(
    vocab=32, width=16, layers=1, heads=2, kv_heads=2, mlp=16, sections=None
  )
  tokens = np.random.default_rng(0).integers(0, 32, (8, 8)).astype(np.int32)
  ones, places = np.ones_like(tokens), np.arange(8, dtype=np.int32)
  places = np.tile(places, (8, 1))
  params = jax.jit(model.init)(jax.random.key(0), tokens, places, ones)

  def run(params, tokens):
    cache = model.init_cache(8, 8)
    for part in (slice(0, 6), slice(6, 7)):
      logits, out = model.apply(
        params, tokens[:, part], places[:, part], ones[:, part], cache=cache
      )
      cache = out["cache"]
    return logits, cache["key"]

  want, _ = jax.jit(run)(params, tokens)
  mesh = mesh_of((1, 2, 2, 2))
  with jax.set_mesh(mesh):
    rows = jax.device_put(tokens, sharding.batch_sharding(mesh))
    got, keys = jax.jit(run)(
      jax.device_put(params, sharding.replicated(mesh)), rows
    )
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  # Layers, rows, heads, their numbers, slots.
  assert keys.sharding.shard_shape(keys.shape) == (1, 4, 1, 8, 4)


def test_a_batch_crosses_slices_by_the_data_axis_only():
  devices = jax.devices()
  mesh = sharding.mesh(data=4, fsdp=2, slices=2)
  halves = mesh.devices.reshape(2, 4)
  assert [set(half) for half in halves.tolist()] == [
    set(devices[:4]),
    set(devices[4:]),
  ]
  with pytest.raises(ValueError, match="no multiple of the 2 slices"):
    sharding.mesh(data=1, fsdp=8, slices=2)


def test_this_host_has_all_rows_when_it_is_alone():
  assert sharding.host_rows(sharding.mesh(data=2), 16) == tuple(range(16))
