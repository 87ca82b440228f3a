# SPDX-License-Identifier: Apache-2.0
"""Edits of residual streams: what they change, and that nothing else does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from spatial_jax import models
from spatial_jax.models import llm, qwen_vit, vit
from spatial_jax.nn.edit import Edit, along, residuals

B, T, D = 2, 7, 16
DECODER = llm.Model(32, D, 28, 2, 1, 24, sections=None)
TOKENS = np.arange(B * T, dtype=np.int32).reshape(B, T)
ROWS = {
  "tokens": TOKENS,
  "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
  "segments": np.ones((B, T), np.int32),
}
IMAGES = np.random.default_rng(0).normal(size=(B, 8, 12, 3)).astype(np.float32)
TOWER = vit.Model(D, 3, 2, 24, 4, 8, class_token=True)
QWEN = qwen_vit.Model(D, 3, 2, 24, 8, patch=2, window=8, full_layers=(1,))
PATCHES = np.random.default_rng(1).normal(size=(B, 32, 24)).astype(np.float32)
# Model, what it is called with, part of `out`, tokens
CASES = {
  "llm": (DECODER, ROWS, T),
  "vit": (TOWER, {"images": IMAGES}, 7),
  "qwen": (QWEN, {"patches": PATCHES, "grid": (2, 4, 4)}, 32),
}


@functools.cache
def params_of(name):
  model, kwargs, _ = CASES[name]
  return random(lambda: model.init(jax.random.key(0), **kwargs)["params"])


def random(init):
  """Numbers instead of the initial ones, which would have to be compiled."""
  rng = np.random.default_rng(3)

  def draw(leaf):
    x = 0.3 * rng.normal(size=leaf.shape) + (leaf.ndim < 3)
    return jnp.asarray(x.astype(np.float32))

  return jax.tree.map(draw, jax.eval_shape(init))


@functools.cache
def program(name):
  """Output and slots [L+1 B T D], compiled once per structure of edits."""
  model, kwargs, _ = CASES[name]

  @jax.jit
  def run(params, edit=None):
    y, out = model.apply({"params": params}, **kwargs, edit=edit)
    return y, residuals(out, "llm" if name == "llm" else "vit")

  return run


def equal_bits(got, want):
  got, want = np.asarray(got), np.asarray(want)
  np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))


@pytest.mark.parametrize("name", CASES)
def test_a_slot_is_replaced_and_all_before_it_stays(name):
  run, params, tokens = program(name), params_of(name), CASES[name][2]
  plain, slots = run(params)
  mask = np.zeros((B, tokens), bool)
  mask[:, [1, 4]] = True
  new = np.asarray(slots[1]) + np.float32(1)
  for slot in (0, 2, len(slots) - 1):
    y, edited = run(params, Edit(slot, mask, new))
    equal_bits(edited[:slot], slots[:slot])
    want = np.where(mask[..., None], new, slots[slot])
    equal_bits(edited[slot], want)
    assert np.max(np.abs(y - plain)) > 1e-3
  assert run._cache_size() == 2  # with and without


@pytest.mark.parametrize("name", CASES)
def test_what_changes_nothing_leaves_every_bit(name):
  run, params, tokens = program(name), params_of(name), CASES[name][2]
  plain, slots = run(params)
  every, none = np.ones((B, tokens), bool), np.zeros((B, tokens), bool)
  ones = np.ones_like(slots[0])
  for edit in (
    Edit(1, none, ones),
    Edit(-1, every, ones),
    Edit(len(slots), every, ones),
    Edit(1, every, slots[1]),
  ):
    for got, want in zip(run(params, edit), (plain, slots), strict=True):
      equal_bits(got, want)


def test_steering_by_nothing_leaves_every_bit_even_of_zeros():
  params = params_of("llm")
  # Words that are minus zero, which a sum with zero would turn into zero.
  table = params["embed"]["embedding"].at[:4].set(-0.0)
  params = {**params, "embed": {"embedding": table}}
  run, every = program("llm"), np.ones((B, T), bool)
  directions = np.ones((2, D), np.float32)
  for edit in (
    Edit(0, every, add=np.ones((1, 1, D), np.float32), alpha=0.0),
    Edit(0, every, amplify=directions, alpha=0.0),
  ):
    for got, want in zip(run(params, edit), run(params), strict=True):
      equal_bits(got, want)


def test_edits_apply_in_their_order_and_slots_may_be_several():
  run, params = program("llm"), params_of("llm")
  rng = np.random.default_rng(2)
  new, add = rng.normal(size=(2, B, T, D)).astype(np.float32)
  directions = rng.normal(size=(2, D)).astype(np.float32)
  every = np.ones((B, T), bool)
  edits = (
    Edit(np.array([0, 3]), every, new),
    Edit(0, every, add=add[:, :1], alpha=2.0),
    Edit(3, every, amplify=directions, alpha=-3.0),
  )
  _, slots = run(params, edits)
  np.testing.assert_allclose(slots[0], new + 2 * add[:, :1], rtol=1e-6)
  share = new @ directions.T / np.sum(directions**2, axis=1)[None, None]
  want = new - 3 * share @ directions
  np.testing.assert_allclose(slots[3], want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(along(new, directions), share @ directions, 1e-4)


def test_one_program_serves_all_slots():
  calls = []

  @jax.jit
  def run(params, slots, values):
    calls.append(1)

    def step(slot):
      edit = Edit(slot, jnp.ones((B, T), bool), values[slot])
      return DECODER.apply({"params": params}, **ROWS, edit=edit)[0]

    return jax.lax.map(step, slots)

  params = params_of("llm")
  plain, slots = program("llm")(params)
  got = run(params, jnp.arange(29), slots)
  np.testing.assert_allclose(got, np.stack([plain] * 29), rtol=1e-6)
  run(params, jnp.arange(29)[::-1], 0 * slots)
  assert len(calls) == run._cache_size() == 1  # traced and compiled once


@pytest.mark.parametrize("name", CASES)
def test_a_program_without_edits_has_no_trace_of_them(name):
  """Nor of slots that nobody reads: they are no output of the loop."""
  model, kwargs, tokens = CASES[name]

  def lower(**more):
    def run(params, **more):
      return model.apply({"params": params}, **kwargs, **more)[0]

    return jax.jit(run).lower(params_of(name), **more)

  plain, mask = lower(), np.ones((B, tokens), bool)
  assert lower(edit=None).as_text() == plain.as_text()
  edited = lower(edit=Edit(0, mask, add=np.ones((1, 1, D))))
  source = "nn/edit.py"  # the file that an operation is from
  assert source in edited.as_text(debug_info=True)
  assert source not in plain.as_text(debug_info=True)
  stack = {"llm": "28,2,7,16", "vit": "3,2,7,16", "qwen": "3,4,16,16"}[name]
  assert f"f32[{stack}]" not in plain.compile().as_text()
  read = program(name).lower(params_of(name)).compile().as_text()
  assert f"f32[{stack}]" in read


def test_systems_pass_edits_to_their_parts():
  config = ConfigDict({"model_name": "qwen2_5_vl"})
  config.model = {"variant": "tiny", "grid": (1, 4, 4)}
  model, mod = models.build(config)
  tokens = np.where(np.arange(8) < 4, 120, 1).astype(np.int32)[None]
  batch = {
    "tokens": tokens,
    "positions": np.broadcast_to(np.arange(8, dtype=np.int32), (1, 3, 8)),
    "segments": np.ones((1, 8), np.int32),
    "patches": np.ones((1, 16, 96), np.float32),
  }
  params = random(lambda: model.init(jax.random.key(0), **batch)["params"])

  @jax.jit
  def run(edits=None):
    batch_ = {**batch, "edits": edits}
    return model.apply({"params": params}, **mod.arguments(batch_))[1]

  plain = run()
  add = {
    "vit": Edit(1, np.ones((1, 16), bool), add=np.ones((1, 1, 32))),
    "llm": Edit(0, tokens == 120, add=np.ones((1, 1, 64))),
  }
  out = run(add)
  np.testing.assert_allclose(
    out["vit/blocks"][0], plain["vit/blocks"][0] + 1, rtol=1e-5, atol=1e-5
  )
  change = out["llm/embedded"] - plain["llm/embedded"]
  moved = out["vit/merged"] - plain["vit/merged"]
  np.testing.assert_allclose(change[:, :4], moved + 1, rtol=1e-4, atol=1e-5)
  assert not np.any(change[:, 4:])
  with pytest.raises(ValueError, match=r"edits of \['lmm'\].*\['llm', 'vit'\]"):
    run({"lmm": add["llm"]})
