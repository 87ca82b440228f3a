# SPDX-License-Identifier: Apache-2.0
"""Where a run's parameters are from."""

import jax
import numpy as np

from spatial_jax import hf, sharding
from spatial_jax import system as systems
from spatial_jax.data import pipeline
from tests import toy

TABLE = (
  ("embed.weight", "embed/embedding"),
  ("up.{i}.weight", "blocks/up/kernel"),
  ("up.{i}.bias", "blocks/up/bias"),
  ("down.{i}.weight", "blocks/down/kernel"),
  ("down.{i}.bias", "blocks/down/bias"),
  ("norm.{i}.weight", "blocks/norm/scale"),
  ("norm.{i}.bias", "blocks/norm/bias"),
  ("head.weight", "head/kernel"),
)


def test_a_part_starts_from_a_file_of_its_own(tmp_path, monkeypatch):
  monkeypatch.setattr(toy, "PART_KEYS", {"llm": TABLE}, raising=False)
  monkeypatch.setattr(toy, "PART_IGNORE", (), raising=False)
  config = toy.get_config()
  system = systems.build(config, pipeline.example(config), config.batch_size)
  shapes = jax.eval_shape(system.init, jax.random.key(0))
  rng = np.random.default_rng(0)
  wanted = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes
  )
  hf.save(TABLE, wanted["llm"], tmp_path)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.parameters(shapes, sharding.mesh()),
  )
  config.init_parts.llm = str(tmp_path)
  got, origin = systems.start(config, system, abstract)
  assert origin == f"fresh weights, llm of {tmp_path}"
  jax.tree.map(np.testing.assert_array_equal, got, wanted)
