# SPDX-License-Identifier: Apache-2.0
"""LLaVA-3D: static slots change nothing, published names fit, 2D rows too."""

import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from spatial_jax import generate, hf, models, sharding, trees
from spatial_jax.data import rgbd
from spatial_jax.geometry import camera, voxels
from spatial_jax.geometry.patches import patch_points
from spatial_jax.models import llava_3d
from spatial_jax.nn import slots
from spatial_jax.nn.lift import Lift
from tests import manifests

GOLDEN = pathlib.Path(__file__).parent / "golden" / "llava_3d"
SIDE, F, P = 16, 3, 12  # 2 x 2 patches of 8 pixels a frame
IMAGE, POINT = -200, -300
SMALL = {
  "vit": {"image": SIDE, "width": 16, "mlp": 32, "layers": 2},
  "llm": {"width": 32, "layers": 2, "mlp": 48},
}


def build(variant="tiny", **overrides):
  config = {"model_name": "llava_3d", "model": {"variant": variant}}
  config["model"] |= overrides
  return models.build(ConfigDict(config))[0]


def tiny(**lift):
  return build(**SMALL, lift={"capacity": P, "voxel_size": 0.5, **lift})


def make_batch(seed, count, *, frames=F, kinds=("scene", "image", "text")):
  """Rows [text, image slots, text with points, answer, padding]."""
  rng = np.random.default_rng(seed)
  B, T = len(kinds), count + 12
  batch = {
    "tokens": rng.integers(3, 100, (B, T)).astype(np.int32),
    "positions": np.tile(np.arange(T, dtype=np.int32), (B, 3, 1)),
    "segments": np.ones((B, T), np.int32),
    "labels": rng.integers(3, 100, (B, T)).astype(np.int32),
    "loss_weight": np.zeros((B, T), np.float32),
    "clicks": rng.normal(size=(B, 2, 3)).astype(np.float32),
    "is_scene": np.array([kind == "scene" for kind in kinds]),
    "images": rng.normal(size=(B, frames, SIDE, SIDE, 3)).astype(np.float32),
    "depth": rng.uniform(0.5, 2, (B, frames, SIDE, SIDE)).astype(np.float32),
  }
  batch["depth"][rng.random(batch["depth"].shape) < 0.2] = 0
  k = camera.intrinsics(SIDE, SIDE, 80.0)
  batch["intrinsics"] = np.tile(k, (B, frames, 1, 1))
  eye = rng.normal(size=(B, frames, 3))
  batch["world_from_camera"] = camera.look_at(
    eye, eye + np.array([1.0, 0.5, -0.2])
  )
  batch["loss_weight"][:, -4:-1] = 1
  batch["segments"][:, -1] = 0
  for b, kind in enumerate(kinds):
    if kind != "text":
      batch["tokens"][b, 3 : 3 + count] = IMAGE
    if kind == "scene":
      batch["tokens"][b, -8] = batch["tokens"][b, -6] = POINT
  return batch


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, batch):
  return model.apply({"params": params}, **llava_3d.arguments(batch))


def random(shapes, seed=0):
  """Parameters of these shapes; drawing them in JAX would be compiled."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes
  )


@functools.cache
def setup():
  model = tiny()
  batch = make_batch(0, P)
  init = jax.eval_shape(
    lambda: model.init(jax.random.key(0), **llava_3d.arguments(batch))
  )
  return model, random(init["params"]), batch


@functools.partial(jax.jit, static_argnums=0)
def pool(lift, params, features, views):
  return lift.apply(params, features, **views)


def shapes(variant):
  model = build(variant)
  side = model.vit["image"]

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct((1, *shape), dtype)

  batch = {
    "tokens": array(jnp.int32, 8),
    "positions": array(jnp.int32, 3, 8),
    "segments": array(jnp.int32, 8),
    "images": array(jnp.float32, 1, side, side, 3),  # and no depth
  }
  init = functools.partial(model.init, jax.random.key(0))
  return jax.eval_shape(lambda x: init(**x), batch)["params"]


def test_the_published_checkpoint_fits_exactly_in_under_a_second():
  params = shapes("7b")
  tensors = manifests.read("llava_3d")["ChaimZhu/LLaVA-3D-7B"]
  before = time.process_time()
  hf.plan(llava_3d.KEYS, tensors, params, ignore=llava_3d.IGNORE)
  assert time.process_time() - before < 1
  assert trees.count(params) == 7_080_764_416
  sharding.parameters(params, sharding.mesh())


def test_llava_1_5_and_clip_start_all_but_the_embeddings_of_points():
  params = shapes("7b")
  tensors = manifests.read("llava_3d")["ChaimZhu/LLaVA-3D-7B"]
  tower = "model.vision_tower.vision_tower."
  tensors = {
    name.removeprefix(tower): shape
    for name, shape in tensors.items()
    if "video_tower" not in name
  }
  tensors["text_model.embeddings.token_embedding.weight"] = (49408, 768)
  with pytest.raises(ValueError, match=r"click_embed/down/bias"):
    hf.plan(llava_3d.KEYS, tensors, params, ignore=llava_3d.IGNORE)
  hf.plan(
    llava_3d.KEYS,
    tensors,
    params,
    ignore=llava_3d.IGNORE,
    new=("(lift|click_embed)/.*",),
  )


def test_the_second_generation_finds_boxes_at_the_decoders_width():
  model = build("iccv-7b", vit={"image": 28}, grounding={"queries": 6})
  batch = {
    name: np.repeat(x[:1], 2, axis=0) for name, x in make_batch(0, P).items()
  }
  for name in ("images", "depth"):  # 2 x 2 patches of 14 pixels
    x = batch[name]
    sides = [(0, 0), (0, 0), (0, 12), (0, 12), (0, 0)]
    batch[name] = np.pad(x, sides[: x.ndim])
  batch["boxes"] = np.ones((2, 3, 6), np.float32)
  batch["boxes_mask"] = np.ones((2, 3), bool)
  init = functools.partial(model.init, jax.random.key(0))
  params = jax.eval_shape(lambda: init(**llava_3d.arguments(batch)))["params"]
  assert params["lift"]["embed"]["up"]["kernel"].shape == (3, 3584)
  sharding.parameters(params, sharding.mesh())
  loss = functools.partial(llava_3d.loss, model)
  value, (metrics, out) = jax.eval_shape(loss, params, batch)
  assert value.shape == () and {"diou", "info_nce"} <= metrics.keys()
  assert out["ground/boxes"].shape == (4, 2, 6, 6)
  assert out["visual/tokens"].shape == (2, P, 3584)  # no pooling


def test_gaps_between_slots_close():
  positions = np.tile(np.arange(7), (1, 3, 1))
  is_slot = np.array([[0, 1, 1, 1, 1, 0, 0]], bool)
  mask = np.array([[1, 1, 0, 0]], bool)
  got, segments, empty = slots.close_gaps(
    positions, np.ones((1, 7), int), is_slot, mask
  )
  np.testing.assert_array_equal(segments[0], [1, 1, 1, 0, 0, 1, 1])
  np.testing.assert_array_equal(got[0, 0][segments[0] > 0], [0, 1, 2, 3, 4])
  assert int(empty[0]) == 2


def test_more_slots_change_nothing():
  model, params, batch = setup()
  logits, out = apply(model, params, batch)
  count = int(out["lift/count"][0])
  assert count < P - 1
  fewer = tiny(capacity=P - 1)
  cut = make_batch(0, P)
  for name in ("tokens", "segments", "labels", "loss_weight", "positions"):
    # Without the last slot; texts keep their last but padding.
    at = np.delete(np.arange(P + 12), 3 + P - 1)
    cut[name] = batch[name][..., at]
    if name == "positions":
      cut[name] = batch[name][..., :-1]
  some, out = apply(fewer, params, cut)
  real = np.asarray(out["segments"]) > 0
  scene = [0, 1]  # the text row lost a word
  for b in scene:
    want = np.delete(logits[b], 3 + P - 1, axis=0)[real[b]]
    np.testing.assert_allclose(some[b][real[b]], want, atol=2e-5)


def test_generation_goes_on_behind_closed_gaps():
  model, params, batch = setup()
  prompt = llava_3d.arguments(batch)
  got, _ = generate.generate(
    model, params, prompt, max_new_tokens=3, stop_ids=()
  )
  # The answers in place of padding: one word fits, behind others.
  T = batch["tokens"].shape[1]
  wide = {
    name: np.pad(batch[name], [(0, 0)] * (batch[name].ndim - 1) + [(0, 2)])
    for name in ("tokens", "segments")
  }
  wide["tokens"][:, T - 1 :] = got
  wide["segments"][:] = 1
  wide["positions"] = np.tile(np.arange(T + 2), (3, 3, 1)).astype(np.int32)
  logits, out = apply(model, params, {**batch, **wide})
  assert np.any(np.asarray(out["segments"]) == 0)
  said = np.argmax(logits[:, T - 2 : T + 1], axis=-1)
  np.testing.assert_array_equal(said, got)


def test_2d_images_are_tokens_as_they_are():
  model, params, batch = setup()
  logits, _ = apply(model, params, batch)
  flat = make_batch(0, P // F, kinds=("image",))
  at = np.r_[:3, 3 : 3 + P // F, 3 + P : 12 + P]  # its slots, not those of F
  for name in ("tokens", "segments", "labels", "loss_weight"):
    flat[name] = batch[name][1:2][..., at]
  flat["images"] = batch["images"][1:2, :1]
  for name in ("depth", "intrinsics", "world_from_camera", "is_scene"):
    del flat[name]
  alone, _ = apply(model, params, flat)
  np.testing.assert_allclose(alone[0], logits[1][at], atol=2e-5)


def lift_params(width=4):
  embed = {
    "up": {"kernel": np.zeros((3, width)), "bias": np.zeros(width)},
    "norm": {"scale": np.zeros(width), "bias": np.zeros(width)},
    "down": {"kernel": np.zeros((width, width)), "bias": np.zeros(width)},
  }
  return {"params": {"embed": random(embed)}}


def test_patches_without_depth_change_no_token_unless_kept():
  rng = np.random.default_rng(1)
  batch = make_batch(1, P, kinds=("scene",))
  keys = ("depth", "intrinsics", "world_from_camera")
  views = {name: batch[name] for name in keys}
  views["depth"][0, 0, 0, 0] = 0
  views["world_from_camera"][0, 2] = -np.inf  # a lost camera
  features = rng.normal(size=(1, F, 2, 2, 4)).astype(np.float32)
  other = features.copy()
  other[0, 0, 0, 0] += 1  # without depth
  params = lift_params()
  for keep in (False, True):
    lift = Lift(capacity=P, voxel_size=0.5, keep_invalid=keep)
    one, mask, _ = pool(lift, params, features, views)
    two, _, _ = pool(lift, params, other, views)
    assert np.array_equal(one, two) != keep
    assert np.all(np.isfinite(one)) and np.sum(mask) > 1
    lost = features.copy()
    lost[0, 2] += 1
    again, _, _ = pool(lift, params, lost, views)
    np.testing.assert_array_equal(again, one)


def test_farthest_points_and_all_patches_are_other_ways_to_pool():
  batch = make_batch(2, P, kinds=("scene",))
  keys = ("depth", "intrinsics", "world_from_camera")
  views = {name: batch[name] for name in keys}
  features = np.ones((1, F, 2, 2, 4), np.float32)
  lift = Lift(pool="none")
  params = lift_params()
  patches, mask, _ = pool(lift, params, features, views)
  valid = int(mask.sum())
  assert patches.shape == (1, P, 4) and 8 < valid < P
  lift = Lift(pool="fps", capacity=valid + 1)
  some, seen, out = pool(lift, params, features, views)
  assert int(seen.sum()) == valid  # all of them, in another order
  chosen = np.asarray(out["lift/chosen"][0, :valid])
  assert set(chosen) == set(np.flatnonzero(mask[0]))
  np.testing.assert_array_equal(some[0, :valid], patches[0, chosen])
  with pytest.raises(ValueError, match="voxel, fps or none"):
    jax.eval_shape(lambda: pool(Lift(pool="mean"), params, features, views))


def test_one_program_for_each_bucket_of_mixed_batches():
  model, params, _ = setup()
  traced = []

  @jax.jit
  def loss(params, batch):
    traced.append(batch["images"].shape)
    return llava_3d.loss(model, params, batch)[0]

  rng = np.random.default_rng(3)
  for step in range(20):
    if step % 4 == 3:  # pictures alone, without depth
      kinds = rng.choice(["image", "text"], 3)
      batch = make_batch(step, P // F, frames=1, kinds=tuple(kinds))
      for name in ("depth", "intrinsics", "world_from_camera", "is_scene"):
        del batch[name]
    else:
      kinds = rng.choice(["scene", "image", "text"], 3)
      batch = make_batch(step, P, kinds=tuple(kinds))
    assert np.isfinite(loss(params, batch))
  assert len(traced) == 2


def test_gradients_reach_every_part_and_are_finite():
  model, params, batch = setup()
  batch = {k: v.copy() for k, v in batch.items()}
  batch["world_from_camera"][0, 1] = np.nan
  grads = jax.jit(jax.grad(lambda p: llava_3d.loss(model, p, batch)[0]))(params)
  flat = trees.flatten(grads)
  for name, grad in flat.items():
    assert np.all(np.isfinite(grad)), name
  for name in (
    "vit/blocks/mlp/up/kernel",
    "lift/embed/up/kernel",
    "click_embed/up/kernel",
    "projector/down/kernel",
  ):
    assert np.any(flat[name]), name
  # The block that is only there to be saved again.
  assert not np.any(flat["vit/blocks/mlp/up/kernel"][-1])


def test_bfloat16_geometry_is_the_references_to_the_last_bit():
  room = load_file(GOLDEN / "real_room" / "outputs.safetensors")
  points, _ = jax.jit(lambda *x: patch_points(*x, (24, 24), bfloat16=True))(
    room["depth_mm"].astype(np.float32) / 1000,
    rgbd.to_centres(room["intrinsics"]),
    room["poses"],
  )
  np.testing.assert_array_equal(points, room["patch_xyz_bf16_run"])
  assign = jax.jit(voxels.assign, static_argnums=(1, 2))
  flat = points.reshape(-1, 3).astype(jnp.bfloat16)
  assert int(assign(flat, 0.2, len(flat)).count) == 1055
  case = load_file(GOLDEN / "geometry" / "outputs.safetensors")
  for points, want in zip(
    case["patch_xyz_bf16_run"], case["n_voxels_bf16_run"], strict=True
  ):
    flat = jnp.asarray(points.reshape(-1, 3), jnp.bfloat16)
    assert int(assign(flat, 0.5, len(flat)).count) == want
