# SPDX-License-Identifier: Apache-2.0
"""Every recipe's `:test`: two steps, and in one the second after a kill."""

import importlib
import pathlib
import shutil

import jax
import numpy as np
import pytest

from spatial_jax import hf, sharding, train, trees
from spatial_jax import system as systems
from spatial_jax.data import pipeline

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = sorted(
  p.stem
  for p in (ROOT / "configs").glob("*.py")
  # The second is another recipe and sizes of an analysis.
  if p.stem not in ("common", "dual_mechanisms")
)


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"demo"}))
def test_every_recipe_trains_two_steps(name, tmp_path, one_device):
  recipe = importlib.import_module(f"configs.{name}").get_config("test")
  assert recipe.steps == 2
  done = train.main(recipe.lock(), str(tmp_path))
  assert done.step == 2
  assert np.isfinite(done.metrics["loss"])


def test_a_recipe_resumes(tmp_path, one_device):
  recipe = importlib.import_module("configs.demo").get_config("test")
  recipe.checkpoint.every = 1
  first = train.main(recipe.lock(), str(tmp_path))
  # As if it had been killed in the second step.
  shutil.rmtree(tmp_path / "checkpoints" / "2")
  again = train.main(recipe, str(tmp_path))
  jax.tree.map(np.testing.assert_array_equal, again.state, first.state)


@pytest.mark.parametrize("name", RECIPES)
def test_the_shapes_of_every_recipe_are_known_without_data(name):
  # `import` and `export` need them.
  recipe = importlib.import_module(f"configs.{name}").get_config("test")
  shapes, _ = systems.shapes(recipe)
  assert trees.count(shapes) > 1000


def test_published_weights_start_a_run(tmp_path):
  recipe = importlib.import_module("configs.qwen2_5_vl_sft").get_config("test")
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
