# SPDX-License-Identifier: Apache-2.0
"""Spatial Forcing, OpenVLA-OFT and pi0: names, masks, and no cost to act."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from spatial_jax import hf, models, sharding, trees
from spatial_jax.models import forcing, openvla_oft, pi0, vggt
from spatial_jax.nn.time_embed import time_embed
from tests import manifests

SIDE, V, T = 64, 2, 12
TEACHER = {
  name: vggt.VARIANTS["tiny"][name]
  for name in ("width", "depth", "heads", "vit_depth", "vit_heads")
}
TEACHER |= {"image_size": 28, "depth": 1, "vit_depth": 1, "keep": (0,)}
FORCED = {"align": {"layer": 2, "width": 64}, "teacher": TEACHER}
# Tensors of one part that are published on their own, and their shapes here.
PARTS = {
  "action_head": "action_head--latest",
  "proprio": "proprio_projector--latest",
  "align": "align_projector--latest",
}


def build(name, variant, **overrides):
  config = {"model_name": name, "model": {"variant": variant, **overrides}}
  return models.build(ConfigDict(config))


def rows(name, chunk=8):
  """A batch for a tiny model; the last two tokens of row 1 are padding."""
  rng = np.random.default_rng(0)
  B, count = 2, chunk * 7
  batch = {
    "tokens": rng.integers(3, 100, (B, T)).astype(np.int32),
    "tokens_mask": np.ones((B, T), bool),
  }
  if name == "pi0":
    batch["tokens_mask"][1, -2:] = False
    return batch | {
      "images": rng.uniform(-1, 1, (B, V, SIDE, SIDE, 3)).astype(np.float32),
      "images_mask": np.array([[True, True], [True, False]]),
      "state": rng.normal(size=(B, 32)).astype(np.float32),
      "actions": rng.normal(size=(B, chunk, 32)).astype(np.float32),
    }
  wide = [(0, 0), (0, count)]
  batch["tokens"] = np.pad(batch["tokens"], wide)
  batch["tokens_mask"] = np.pad(
    batch["tokens_mask"], wide, constant_values=True
  )
  places = np.arange(T + count)[None]
  ends = np.array([[T - 2], [T - 4]])  # slots, end token, padding
  batch["slots"] = (places >= ends) & (places < ends + count)
  batch["tokens_mask"] = places <= ends + count
  return batch | {
    "images": rng.normal(size=(B, V, SIDE, SIDE, 6)).astype(np.float32),
    "state": rng.normal(size=(B, 8)).astype(np.float32),
    "actions": rng.normal(size=(B, chunk, 7)).astype(np.float32),
  }


def shapes_of(model, mod, batch):
  init = functools.partial(model.init, jax.random.key(0))
  return jax.eval_shape(lambda x: init(**mod.arguments(x)), batch)["params"]


def random(shapes):
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes
  )


SYSTEMS = {
  "openvla_oft": ("openvla_oft", "tiny", {}),
  "pi0": ("pi0", "pi0-tiny", {"chunk": 8}),
  "pi05": ("pi0", "pi05-tiny", {"chunk": 8}),
}


@functools.cache
def setup(system):
  """A model with forcing, its file, parameters and a batch."""
  name, variant, more = SYSTEMS[system]
  model, mod = build(name, variant, **more, **FORCED)
  batch = rows(name)
  return model, mod, random(shapes_of(model, mod, batch)), batch


@functools.partial(jax.jit, static_argnums=0)
def predict(model, params, batch):
  mod = pi0 if isinstance(model, pi0.Model) else openvla_oft
  return model.apply({"params": params}, **mod.arguments(batch))


# --- published names --------------------------------------------------------


def planned(table, tensors, shapes, **kwargs):
  """Every tensor and every parameter has its place, found in a second."""
  start = time.process_time()
  entries = hf.plan(table, tensors, shapes, **kwargs)
  assert time.process_time() - start < 1
  return {entry.path for entry in entries}


def checkpoint(part, system="spatial_forcing"):
  found = [v for k, v in manifests.read(system).items() if part in k]
  assert len(found) == 1, part
  return found[0]


def full(name, variant, **more):
  """Shapes of a published model, and its file."""
  model, mod = build(name, variant, **more)
  config = {"model": {"variant": variant}, "batch_size": 1}
  config["data"] = {"length": 80, "views": 2}
  return shapes_of(model, mod, mod.INPUTS(ConfigDict(config))), mod


@pytest.fixture(scope="module")
def oft_7b():
  return full("openvla_oft", "7b", align={"layer": 24}, teacher={})


def test_openvla_fits_and_all_but_the_new_parts_come_from_it(oft_7b):
  shapes, mod = oft_7b
  new = ("(action_head|proprio|align|teacher)/.*",)
  paths = planned(
    mod.KEYS, checkpoint("openvla-7b"), shapes, ignore=mod.IGNORE, new=new
  )
  fresh = ("action_head", "proprio", "align", "teacher")
  rest = {k: v for k, v in shapes.items() if k not in fresh}
  assert paths == set(trees.flatten(rest))
  assert 7.5e9 < trees.count(rest) < 7.55e9
  sharding.parameters(shapes, sharding.mesh(fsdp=4, tensor=2))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("part", PARTS)
def test_parts_in_files_of_their_own_fit(part, prefix, oft_7b):
  shapes, mod = oft_7b
  tensors = checkpoint(PARTS[part])
  tensors = {f"{prefix}{name}": shape for name, shape in tensors.items()}
  paths = planned(mod.PART_KEYS[part], tensors, shapes[part])
  assert paths == set(trees.flatten(shapes[part]))


def test_the_teacher_is_a_part_of_vggt(oft_7b):
  shapes, mod = oft_7b
  tensors = next(iter(manifests.read("vggt").values()))
  paths = planned(
    mod.PART_KEYS["teacher"], tensors, shapes["teacher"], ignore=mod.PART_IGNORE
  )
  assert paths == set(trees.flatten(shapes["teacher"]))


@pytest.mark.parametrize("variant", ["pi0", "pi05"])
def test_openpis_checkpoints_fit(variant):
  shapes, mod = full("pi0", variant)
  tensors = checkpoint(f"{variant}_base")
  paths = planned(mod.KEYS, tensors, shapes, ignore=mod.IGNORE)
  assert paths == set(trees.flatten(shapes))
  sharding.parameters(shapes, sharding.mesh(fsdp=4, tensor=2))


def test_the_aligned_projector_of_pi0_fits():
  model = forcing.Align(layer=12)
  hidden = jax.ShapeDtypeStruct((1, 3, 16, 16, 2048), jnp.float32)
  features = jax.ShapeDtypeStruct((1, 3, 37, 37, 2048), jnp.float32)
  init = functools.partial(model.init, jax.random.key(0))
  shapes = jax.eval_shape(init, hidden, features)["params"]
  tensors = checkpoint("align projector for pi0")
  assert planned(forcing.KEYS, tensors, shapes) == set(trees.flatten(shapes))


# --- alignment --------------------------------------------------------------


@pytest.fixture
def without_source_lines():
  """A compiled program's text then doesn't say who traced it first."""
  name = "jax_traceback_in_locations_limit"
  before = getattr(jax.config, name)
  jax.config.update(name, 0)
  yield
  jax.config.update(name, before)


@pytest.mark.parametrize("system", ["openvla_oft", "pi0"])
@pytest.mark.usefixtures("without_source_lines")
def test_the_compiled_program_to_act_is_the_same_with_and_without(system):
  forced, mod, params, batch = setup(system)
  name, variant, more = SYSTEMS[system]
  plain, _ = build(name, variant, **more)
  bare = {k: v for k, v in params.items() if k not in ("align", "teacher")}
  assert len(bare) == len(params) - 2

  def program(model, params):
    def act(params, batch):
      given = {"params": params}
      if system == "openvla_oft":
        return model.apply(given, **mod.arguments(batch))[0]
      kwargs = mod.arguments(batch)
      noise = kwargs.pop("noisy")
      del kwargs["time"]
      return model.apply(given, **kwargs, noise=noise, steps=1, method="sample")

    return jax.jit(act).lower(params, batch).compile()

  act = program(forced, params)
  assert act.as_text() == program(plain, bare).as_text()
  answer, _ = predict(forced, params, batch)
  if system == "pi0":  # the velocity of time 1, and one step from there
    answer = batch["actions"] - answer
  np.testing.assert_allclose(act(params, batch), answer, atol=1e-5)


def test_alignment_trains_what_is_below_its_layer_and_the_teacher_never():
  model, mod, params, batch = setup("openvla_oft")

  @jax.jit
  def grads(params, features):
    def align(params):
      more = {} if features is None else {"teacher_features": features}
      _, (metrics, out) = mod.loss(model, params, {**batch, **more})
      return metrics["align"], out["align/target"]

    return jax.grad(align, has_aux=True)(params)

  found, target = jax.device_get(grads(params, None))
  flat = trees.flatten(found)
  for name, grad in flat.items():
    assert np.all(np.isfinite(grad)), name
    if name.startswith(("teacher/", "action_head/")):
      assert not np.any(grad), name
  for name in ("align/up/kernel", "projector/up/kernel", "llm/embed/embedding"):
    assert np.any(flat[name]), name
  blocks = flat["llm/blocks/mlp/up/kernel"]
  assert np.any(blocks[1]) and not np.any(blocks[2])  # the aligned one is 2
  # Features that were computed before are as good as the teacher itself.
  images = openvla_oft.colors(batch["images"])
  teacher = vggt.Aggregator(**TEACHER)
  kept = jax.jit(
    lambda p: teacher.apply({"params": p}, forcing.teacher_images(images, 28))[
      -1
    ]
  )(params["teacher"])
  features = np.asarray(kept)[:, :, 5:].reshape(2, V, 2, 2, 64)
  np.testing.assert_allclose(
    forcing.targets(features, (8, 8)).reshape(target.shape), target, atol=1e-4
  )


def test_alignment_without_a_teacher_says_what_is_missing():
  model, mod = build("openvla_oft", "tiny", align={"layer": 2, "width": 64})
  batch = rows("openvla_oft")
  shapes = shapes_of(model, mod, batch)
  with pytest.raises(ValueError, match=r"set config.model.teacher, or give"):
    jax.eval_shape(functools.partial(mod.loss, model), shapes, batch)
  batch["teacher_features"] = np.zeros((2, V, 4, 4, 8), np.float32)
  with pytest.raises(ValueError, match="have 8 channels, expected 64"):
    jax.eval_shape(functools.partial(mod.loss, model), shapes, batch)
  # Evaluation needs neither.
  jax.eval_shape(functools.partial(mod.loss, model, train=False), shapes, batch)
  with pytest.raises(ValueError, match="none of the decoder's layers, 1 to 3"):
    forcing.select({}, 0, 3)


def test_masked_tokens_and_rows_do_not_count():
  rng = np.random.default_rng(2)
  x, y = rng.normal(size=(2, 2, 6, 4)).astype(np.float32)
  mask = np.array([[True] * 3 + [False] * 3, [False] * 6])
  cosine = jax.jit(jax.value_and_grad(forcing.cosine))
  value, _ = cosine(x, y, mask)
  other = np.where(mask[..., None], x, np.float32(7))
  assert cosine(other, y, mask)[0] == value
  one, _ = cosine(x, y, np.tile(mask[:1], (2, 1)))
  two, _ = cosine(x[:1], y[:1], mask[:1])
  np.testing.assert_allclose(value, (two + 1) / 2, rtol=1e-6)
  assert one != value
  _, grad = cosine(np.zeros_like(x), y, mask)
  assert np.all(np.isfinite(grad))


def test_a_token_is_valid_if_its_first_pixel_is():
  mask = np.zeros((1, 1, 4, 6), bool)
  mask[..., 2:, :3] = True
  got = forcing.token_mask(mask, (2, 3))
  np.testing.assert_array_equal(
    got[0, 0], [[False, False, False], [True, True, False]]
  )


def test_tall_views_lose_their_top_and_bottom():
  rows = np.arange(60, dtype=np.float32)[None, None, :, None, None]
  images = np.broadcast_to(rows, (1, 1, 60, 20, 3))
  got = np.asarray(forcing.teacher_images(images, 28))[0, 0, :, 0, 0]
  assert got.shape == (28,)
  np.testing.assert_allclose(got, 29.5 + (np.arange(28) - 13.5) / 1.4, atol=0.1)
  wide = forcing.teacher_images(np.zeros((1, 2, 30, 60, 3), np.float32), 28)
  assert wide.shape == (1, 2, 14, 28, 3)


# --- policies ---------------------------------------------------------------


def test_openvla_sees_both_ways_and_no_padding():
  model, _, params, batch = setup("openvla_oft")
  actions, out = predict(model, params, batch)
  assert actions.shape == (2, 8, 7)
  changed = {**batch, "tokens": batch["tokens"].copy()}
  changed["tokens"][:, -1] = 5  # padding
  changed["tokens"][batch["slots"]] = 9  # replaced by nothing
  again, _ = predict(model, params, changed)
  np.testing.assert_array_equal(again, actions)
  changed["tokens"][:, 3] = 77
  again, more = predict(model, params, changed)
  assert np.all(np.abs(again - actions).max((1, 2)) > 1e-6)
  # A word after the images has changed what the images' tokens say.
  first = [np.asarray(o["llm/blocks"])[0, :, 1] for o in (out, more)]
  assert np.all(np.abs(first[0] - first[1]).max(1) > 1e-6)


def test_colors_undo_the_normalisation_of_the_first_tower():
  images = np.random.default_rng(3).random((1, 2, 2, 3)).astype(np.float32)
  mean, std = (np.float32(x) for x in openvla_oft.DINO)
  both = np.concatenate([(images - mean) / std, 2 * images - 1], axis=-1)
  np.testing.assert_allclose(openvla_oft.colors(both), images, atol=1e-6)


@pytest.mark.parametrize("system", ["pi0", "pi05"])
def test_images_and_prompt_do_not_see_actions_nor_what_is_missing(system):
  model, _, params, batch = setup(system)
  if system == "pi05":  # norms that start at zero would hide everything
    assert np.any(params["expert"]["norm"]["modulation"]["kernel"])
  velocity, out = predict(model, params, batch)
  noise = np.random.default_rng(4).normal(size=batch["images"].shape)
  changed = {k: v.copy() for k, v in batch.items()}
  changed["images"][1, 1] = noise[1, 1]  # a camera that isn't there
  changed["tokens"][1, -1] = 3  # padding
  again, _ = predict(model, params, changed)
  np.testing.assert_array_equal(again, velocity)
  changed["actions"][:, -1] += 1  # the last step, seen by the first
  again, more = predict(model, params, changed)
  assert np.all(np.abs(again - velocity)[:, 0].max(-1) > 1e-6)
  # The second row has tokens that are not there.
  blocks = [np.asarray(o["llm/blocks"])[:, 0] for o in (out, more)]
  np.testing.assert_array_equal(*blocks)
  changed["state"] = changed["state"] + 1
  third, _ = predict(model, params, changed)
  assert np.array_equal(third, again) == (system == "pi05")


def test_times_and_noise_are_drawn_where_the_batch_has_none():
  drawn = jax.jit(pi0.draw, static_argnums=1)(jax.random.key(0), (4000, 2, 3))
  time = np.sort(drawn["time"])
  assert time[0] >= 0.001 and time[-1] <= 1
  share = ((time - 0.001) / 0.999) ** 1.5  # Beta(1.5, 1)
  np.testing.assert_allclose(share, np.linspace(0, 1, 4000), atol=0.03)
  assert abs(np.std(drawn["noise"]) - 1) < 0.02
  model, mod, params, batch = setup("pi0")
  loss = functools.partial(mod.loss, model)
  value, (metrics, out) = jax.eval_shape(loss, params, batch)
  assert {"loss", "flow", "align"} == metrics.keys() and value.shape == ()
  assert out["align/target"].shape == (2, V * 64, 64)


def test_sines_of_time_are_those_of_float64():
  times = np.random.default_rng(5).random(64).astype(np.float32)
  period = 4e-3 * 1000 ** np.linspace(0, 1, 512)
  angle = 2 * np.pi * times.astype(np.float64)[:, None] / period
  want = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
  np.testing.assert_allclose(
    jax.jit(time_embed, static_argnums=1)(times, 1024), want, atol=2e-6
  )
