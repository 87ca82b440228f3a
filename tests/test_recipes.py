# SPDX-License-Identifier: Apache-2.0
"""Every recipe's `:test`: two steps, and the second again after a kill."""

import importlib
import pathlib
import shutil

import jax
import numpy as np
import pytest

from spatial_jax import train

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = sorted(
  p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "common"
)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_two_steps_and_resumes(name, tmp_path):
  recipe = importlib.import_module(f"configs.{name}").get_config("test")
  assert recipe.steps == 2
  recipe.checkpoint.every = 1
  first = train.main(recipe.lock(), str(tmp_path))
  # As if it had been killed in the second step.
  shutil.rmtree(tmp_path / "checkpoints" / "2")
  again = train.main(recipe, str(tmp_path))
  jax.tree.map(np.testing.assert_array_equal, again.state, first.state)
