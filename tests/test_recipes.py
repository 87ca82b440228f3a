# SPDX-License-Identifier: Apache-2.0
"""Every recipe's `:test` as far as its step is traced; one trains two steps.

`--all-recipes` trains two steps of each, which takes some minutes. The demo's
is trained by the test of its command.
"""

import importlib
import pathlib

import jax
import numpy as np
import pytest

from spatial_jax import hf, lora, sharding, train, trees
from spatial_jax import system as systems
from spatial_jax.data import pipeline

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = sorted(
  p.stem
  for p in (ROOT / "configs").glob("*.py")
  # The second is another recipe and sizes of an analysis.
  if p.stem not in ("common", "dual_mechanisms")
)


def pytest_generate_tests(metafunc):
  if "trained" in metafunc.fixturenames:
    every = metafunc.config.getoption("--all-recipes")
    metafunc.parametrize("trained", RECIPES if every else ["qwen2_5_vl_sft"])


def recipe_of(name):
  return importlib.import_module(f"configs.{name}").get_config("test")


def test_a_recipe_trains_two_steps(trained, tmp_path, one_device):
  recipe = recipe_of(trained)
  assert recipe.steps == 2
  done = train.main(recipe.lock(), str(tmp_path))
  assert done.step == 2
  assert np.isfinite(done.metrics["loss"])


@pytest.mark.parametrize("name", RECIPES)
def test_the_step_of_a_recipe_takes_what_its_data_gives(name, one_device):
  recipe, mesh = recipe_of(name), sharding.mesh()
  dataset, example = pipeline.make(recipe, recipe.batch_size)
  with jax.set_mesh(mesh), lora.linear_layers() as layers:
    step = train.prepare(recipe, example, mesh)
    batch = next(iter(dataset))
    state, metrics = jax.eval_shape(step.update, step.state, batch)
  assert metrics["loss"].shape == ()
  assert not trees.diff(state["params"], step.state["params"])
  # Every matrix can have an adapter. Convolutions have four dimensions, or
  # five in a scan.
  kernels = {
    path.removesuffix("/kernel")
    for path, x in trees.flatten(
      systems.drop_auxiliary(state["params"])
    ).items()
    if path.endswith("/kernel") and len(x.shape) <= 3
  }
  assert kernels and kernels <= layers


@pytest.mark.parametrize("name", RECIPES)
def test_the_shapes_of_every_recipe_are_known_without_data(name):
  # `import` and `export` need them.
  shapes, _ = systems.shapes(recipe_of(name))
  assert trees.count(shapes) > 1000


def test_published_weights_start_a_run(tmp_path):
  recipe = recipe_of("qwen2_5_vl_sft")
  system = systems.build(recipe, pipeline.example(recipe), recipe.batch_size)
  shapes = jax.eval_shape(system.init, jax.random.key(0))
  numbers = np.random.default_rng(0)
  published = jax.tree.map(
    lambda x: numbers.standard_normal(x.shape).astype(x.dtype), shapes
  )
  hf.save(system.mod.KEYS, published, tmp_path)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.parameters(shapes, sharding.mesh()),
  )
  recipe.init_from = str(tmp_path)
  params, origin = systems.start(recipe, system, abstract)
  assert origin == f"weights of {tmp_path}"
  jax.tree.map(np.testing.assert_array_equal, params, published)
  placed = jax.tree.map(lambda x: x.sharding, params)
  assert placed == jax.tree.map(lambda x: x.sharding, abstract)
  # A parameter named as new starts fresh although the folder has it.
  recipe.init_new = ("vit/merger/.*",)
  params, _ = systems.start(recipe, system, abstract)
  merger = params["vit"]["merger"]["up"]["kernel"]
  assert not np.allclose(merger, published["vit"]["merger"]["up"]["kernel"])
  np.testing.assert_array_equal(
    params["llm"]["norm"]["scale"], published["llm"]["norm"]["scale"]
  )
