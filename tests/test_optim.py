# SPDX-License-Identifier: Apache-2.0
"""Schedules, rules by regex, and Muon on scanned matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from spatial_jax import optim, trees


def params():
  key = jax.random.split(jax.random.key(0), 3)
  return {
    "llm": {
      "blocks": {
        "up": {
          "kernel": jax.random.normal(key[0], (3, 4, 6)),
          "bias": jnp.ones((3, 6)),
        }
      },
      "head": {"kernel": jax.random.normal(key[1], (4, 5))},
    },
    "vit": {"norm": {"scale": jnp.ones(4)}},
  }


def config(**changes):
  out = common.defaults().optimizer
  out.schedule.warmup, out.schedule.decay = 0.0, "none"
  out.clip = 0.0
  out.update(changes)
  return out


def one_step(config, params, grads, steps=10):
  made = optim.make(config, steps, params)
  trained = optim.subset(params, made.trainable)
  grads = optim.subset(grads, made.trainable)

  @jax.jit
  def step(grads, trained):
    updates, _ = made.tx.update(grads, made.tx.init(trained), trained)
    return optax.apply_updates(trained, updates)

  return optim.merge(step(grads, trained), params)


def ones(tree):
  return jax.tree.map(jnp.ones_like, tree)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 30.0])
def test_gradients_are_clipped_by_their_common_norm(size):
  tree = params()
  grads = jax.tree.map(lambda x: size * x, tree)
  clip = optim._clip(1.5)
  got, _ = clip.update(grads, clip.init(tree))
  other = optax.clip_by_global_norm(1.5)
  want, _ = other.update(grads, other.init(tree))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want
  )
  assert optax.tree.norm(got) <= 1.5 * (1 + 1e-6)


def test_the_schedule_rises_holds_and_falls_to_its_final_fraction():
  lr = optim.make_schedule(
    2.0, 100, warmup=0.1, constant=0.4, decay="linear", final=0.02
  )
  assert float(lr(0)) == pytest.approx(0.2)
  assert float(lr(9)) == pytest.approx(2.0)
  assert float(lr(40)) == pytest.approx(2.0)
  assert float(lr(70)) == pytest.approx(2.0 * (0.02 + 0.98 * 0.5))
  assert float(lr(100)) == pytest.approx(0.04)
  cosine = optim.make_schedule(
    1.0, 100, warmup=0.0, constant=0.0, decay="cosine", final=0.0
  )
  assert float(cosine(50)) == pytest.approx(0.5, abs=0.02)


def test_an_unknown_decay_is_named():
  with pytest.raises(ValueError, match=r"schedule.decay='exp'"):
    optim.make_schedule(
      1.0, 10, warmup=0.0, constant=0.0, decay="exp", final=0.0
    )


def test_frozen_leaves_do_not_move_and_have_no_moments():
  start = params()
  c = config(freeze=(("vit/.*", True), (".*", False)))
  end = one_step(c, start, ones(start))
  np.testing.assert_array_equal(
    end["vit"]["norm"]["scale"], start["vit"]["norm"]["scale"]
  )
  assert not np.allclose(
    end["llm"]["head"]["kernel"], start["llm"]["head"]["kernel"]
  )
  made = optim.make(c, 10, start)
  state = made.tx.init(optim.subset(start, made.trainable))
  names = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]
  ]
  assert not any("vit" in name for name in names)


def test_learning_rate_factors_follow_the_first_rule_that_matches():
  start = params()
  c = config(lr_mult=((".*/head/.*", 0.1), ("llm/.*", 1.0), (".*", 0.0)))
  end = one_step(c, start, ones(start))
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), start, end)
  assert moved["llm"]["head"]["kernel"] == pytest.approx(1e-4, rel=1e-2)
  assert moved["llm"]["blocks"]["up"]["kernel"] == pytest.approx(1e-3, rel=1e-2)
  assert moved["vit"]["norm"]["scale"] == 0


def test_weight_decay_touches_only_what_its_rules_pick():
  start = params()
  zero = jax.tree.map(jnp.zeros_like, start)
  end = one_step(config(weight_decay=0.5, lr=0.1), start, zero)
  np.testing.assert_allclose(
    end["llm"]["head"]["kernel"], 0.95 * start["llm"]["head"]["kernel"], 1e-6
  )
  np.testing.assert_array_equal(
    end["llm"]["blocks"]["up"]["bias"], start["llm"]["blocks"]["up"]["bias"]
  )


def test_a_rule_that_matches_nothing_is_an_error():
  with pytest.raises(ValueError, match=r"optimizer.freeze[\s\S]*'lm/"):
    optim.make(config(freeze=(("lm/.*", True), (".*", False))), 10, params())


def test_a_parameter_without_a_rule_is_an_error():
  with pytest.raises(ValueError, match=r"lr_mult[\s\S]*vit/norm/scale"):
    optim.make(config(lr_mult=(("llm/.*", 1.0),)), 10, params())


def test_freezing_everything_is_an_error():
  with pytest.raises(ValueError, match="no parameter to train"):
    optim.make(config(freeze=((".*", True),)), 10, params())


def test_an_unknown_optimizer_is_named():
  with pytest.raises(ValueError, match="'sgd'; expected 'adamw' or 'muon'"):
    optim.make(config(name="sgd"), 10, params())


def test_muon_treats_each_scanned_layer_as_its_own_matrix():
  start = params()
  rng = np.random.default_rng(1)
  grads = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), start
  )
  kernel = start["llm"]["blocks"]["up"]["kernel"]
  c = config(name="muon", lr=0.02)
  step = one_step(c, start, grads)["llm"]["blocks"]["up"]["kernel"] - kernel
  # The layers alone, as plain matrices through optax's own Muon.
  for layer in range(3):
    alone = optax.contrib.muon(0.02)
    grad = {"w": grads["llm"]["blocks"]["up"]["kernel"][layer]}
    weight = {"w": np.asarray(kernel)[layer]}
    want, _ = jax.jit(alone.update)(grad, alone.init(weight), weight)
    np.testing.assert_allclose(step[layer], want["w"], rtol=1e-4, atol=1e-6)
  # Orthogonal: all singular values are near lr * sqrt(out / in).
  values = np.linalg.svd(step, compute_uv=False) / (0.02 * np.sqrt(6 / 4))
  assert values.min() > 0.6 and values.max() < 1.3


def test_muon_leaves_the_rest_to_adam_at_its_own_rate():
  start = params()
  end = one_step(config(name="muon", lr=0.02), start, ones(start))
  moved = jnp.abs(end["llm"]["head"]["kernel"] - start["llm"]["head"]["kernel"])
  assert float(moved.max()) == pytest.approx(0.02 * 0.15, rel=1e-3)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_master_moves_where_bfloat16_stands_still(name):
  # Near 1 bfloat16 has steps of 1/128, far more than an update of 3e-5.
  low = jax.tree.map(lambda x: (1 + x / 8).astype(jnp.bfloat16), params())
  high = jax.tree.map(lambda x: x.astype(jnp.float32), low)

  def run(start, master):
    c = config(name=name, lr=3e-5, weight_decay=0.1, master=master)
    made = optim.make(c, 200, start)

    def step(state, key):
      values, opt = state
      grads = jax.tree.map(
        lambda x: 1 + jax.random.normal(key, x.shape), values
      )
      if not master:
        grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, values)
      updates, opt = made.tx.update(grads, opt, values)
      return (optim.apply(values, updates, opt), opt), None

    keys = jax.random.split(jax.random.key(1), 200)
    state = (start, made.tx.init(start))
    return jax.jit(lambda s: jax.lax.scan(step, s, keys)[0])(state)

  want, _ = run(high, master=False)
  got, state = run(low, master=True)
  assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("bfloat16")}
  for master, value, x, first in zip(
    *(jax.tree.leaves(t) for t in (state.master, want, got, high)), strict=True
  ):
    assert np.max(np.abs(value - first)) > 2e-4
    np.testing.assert_allclose(master, value, rtol=1e-6)
    np.testing.assert_array_equal(x, master.astype(jnp.bfloat16))
  still, _ = run(low, master=False)
  jax.tree.map(np.testing.assert_array_equal, still, low)
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), got, low)
  assert moved["llm"]["blocks"]["up"]["kernel"]


def test_a_master_has_moments_of_what_is_trained_only():
  start = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
  c = config(master=True, freeze=(("llm/head/.*", False), (".*", True)))
  made = optim.make(c, 10, start)
  state = made.tx.init(optim.subset(start, made.trainable))
  names = trees.flatten(state)
  assert {n for n in names if "/" in n and "count" not in n} == {
    f"{part}/llm/head/kernel" for part in ("master", "inner/0/mu", "inner/0/nu")
  }
  assert {x.dtype.name for x in names.values()} == {"float32", "int32"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("master", [False, True])
def test_a_step_keeps_the_types_of_its_state(name, master):
  # Another type would be another program in the second step.
  start = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
  made = optim.make(config(name=name, master=master), 10, start)
  state = made.tx.init(start)
  grads = jax.tree.map(lambda x: x.astype(jnp.float32), start)
  updates, after = jax.eval_shape(made.tx.update, grads, state, start)
  values = jax.eval_shape(optim.apply, start, updates, after)
  for one, two in ((state, after), (start, values)):
    assert jax.tree.map(lambda x: x.dtype, one) == jax.tree.map(
      lambda x: x.dtype, two
    )


def test_muon_refuses_vectors():
  c = config(name="muon")
  c.muon.matrices = ((".*", True),)
  with pytest.raises(ValueError, match=r"picks vit/norm/scale"):
    optim.make(c, 10, params())
