# SPDX-License-Identifier: Apache-2.0
"""The generate command on a recipe's data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import demo
from spatial_jax import answer, checkpoint, evaluate, sharding
from spatial_jax import system as systems
from spatial_jax.data import pipeline
from spatial_jax.evaluators import vsi
from spatial_jax.world import dataset
from tests import tiny


def test_the_command_gives_the_answers_that_the_evaluator_reads(
  tmp_path, one_device
):
  config = demo.get_config("test")
  config.evals = {}
  config.generate.rows = 1
  config.generate.max_new_tokens = 4
  system = systems.build(config, pipeline.example(config), config.batch_size)
  saves = checkpoint.Checkpointer(str(tmp_path))
  params = tiny.random(jax.eval_shape(system.init, jax.random.key(0)))
  saves.save_params(1, params, {})
  saves.close()
  got = answer.main(config, str(tmp_path))

  source = dataset.make(config, "test")
  room = source.room(0)
  asked = [q for q, *_ in source.place(room.questions)]
  assert len(got) == len(asked)
  mesh = sharding.mesh(**config.mesh.to_dict())
  with jax.set_mesh(mesh):
    params, _ = evaluate.load(str(tmp_path), system, mesh)
    forward = vsi.answer_distributions(system.model, system.mod, config)
    rows = [source.row(room)] * config.batch_size
    batch = {k: jnp.stack([r[k] for r in rows]) for k in rows[0]}
    log_p = np.asarray(forward(params, batch))[0]
  for number, (question, (prompt, text, truth)) in enumerate(
    zip(asked, got, strict=True)
  ):
    assert prompt.endswith(question.prompt)
    if question.options:
      assert truth == question.answer
    # Cached decoding of one question against the packed pass over all.
    first = source.tokenizer.decode([int(log_p[number].argmax())]).strip()
    assert text.startswith(first)


def test_a_workdir_without_a_checkpoint_is_one_clear_error(tmp_path):
  with pytest.raises(FileNotFoundError, match="train first"):
    answer.main(demo.get_config("test"), str(tmp_path))


def test_masked_slots_of_an_image_stay_where_they_are_in_a_prompt():
  row = {
    "tokens": np.array([7, -200, -200, -200, 8, 9, 4, 0, 0]),
    "segments": np.array([1, 0, 1, 0, 1, 1, 1, 0, 0]),
    "loss_weight": np.array([0, 0, 0, 0, 0, 1, 0, 0, 0]),
    "labels": np.array([0, 0, 0, 0, 0, 4, 0, 0, 0]),
  }
  row["shared"] = row["segments"] > 0
  ((alone, truth),) = answer.prompts(row)
  np.testing.assert_array_equal(truth, [4])
  np.testing.assert_array_equal(alone["tokens"][:6], row["tokens"][:6])
  np.testing.assert_array_equal(alone["segments"], [1, 0, 1, 0, 1, 1, 0, 0, 0])
