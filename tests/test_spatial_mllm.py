# SPDX-License-Identifier: Apache-2.0
"""Spatial-MLLM: published names fit, images work, a cache changes nothing."""

import functools
import json
import re
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from safetensors import safe_open

from configs import spatial_mllm_sft
from spatial_jax import cache, hf, models, sharding, trees
from spatial_jax.data import positions, vision, workers
from spatial_jax.models import qwen_vit, spatial_mllm, vggt
from tests import manifests

SIDE, T = 32, 40  # 2 x 2 merged tokens a temporal patch
IMAGE, VIDEO = 120, 121
VARIANTS = {"v1_1": "v1.1-Instruct-135K", "v1_0": "subset-sft"}
SMALL = {
  "vit": {"width": 16, "mlp": 24, "out_width": 32},
  "llm": {"width": 32, "heads": 2, "kv_heads": 1, "mlp": 48, "tied": True},
  "vggt": {"width": 16},
}
# Compiling takes most of the time here.
OPTIONS = {"xla_backend_optimization_level": 0}


def build(variant="tiny", **overrides):
  config = {"model_name": "spatial_mllm", "model": {"variant": variant}}
  config["model"] |= overrides
  return models.build(ConfigDict(config))[0]


def make_batch(kinds, *, seed=0, count=2, media="frames", scale=2):
  """Rows [text, visual tokens, text]; "text" rows have none of the second.

  Args:
    count: temporal patches of a row.
    scale: frames for each of them.
  """
  rng = np.random.default_rng(seed)
  B = len(kinds)
  token = VIDEO if media == "frames" else IMAGE
  batch = {
    "tokens": rng.integers(3, 100, (B, T)).astype(np.int32),
    "segments": np.ones((B, T), np.int32),
    "labels": rng.integers(3, 100, (B, T)).astype(np.int32),
    "loss_weight": np.zeros((B, T), np.float32),
  }
  batch["loss_weight"][:, -4:-1] = 1
  batch["segments"][:, -1] = 0
  side = SIDE // 8
  grids = [(count, side, side)]
  if media == "images":
    grids = [(1, side, side)] * count
  each = side * side // 4
  place = []
  for row, kind in zip(batch["tokens"], kinds, strict=True):
    if kind == "text":
      place.append(np.tile(np.arange(T, dtype=np.int32), (3, 1)))
      continue
    for i in range(count):
      gap = i if media == "images" else 0  # a word between images
      row[3 + gap + i * each : 3 + gap + (i + 1) * each] = token
    place.append(
      positions.mrope(row, grids, image_token=IMAGE, video_token=VIDEO)[0]
    )
  batch["positions"] = np.stack(place)
  frames = count * scale if media == "frames" else count
  pixels = rng.integers(0, 256, (B, frames, SIDE, SIDE, 3)).astype(np.uint8)
  return {**batch, media: pixels}


@functools.partial(jax.jit, static_argnums=0, compiler_options=OPTIONS)
def apply(model, params, batch):
  arguments = spatial_mllm.arguments(batch)
  return model.apply({"params": params}, **arguments)


def shapes_of(model, batch):
  arguments = spatial_mllm.arguments(batch)
  init = jax.eval_shape(lambda: model.init(jax.random.key(0), **arguments))
  return init["params"]


def random(shapes, dtype=np.float32, seed=0):
  """Parameters of these shapes; drawing them in JAX would be compiled."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(0, 0.2, x.shape).astype(dtype), shapes
  )


@functools.cache
def setup(variant="v1_1"):
  known = spatial_mllm.VARIANTS[variant]
  generation = {k: known[k] for k in ("stages", "image_once") if k in known}
  model = build(**SMALL, **generation)
  batch = make_batch(["video", "text"])
  return model, random(shapes_of(model, batch)), batch


@functools.cache
def published(variant):
  """Shapes of a published size."""
  model = build(variant, dtype="bfloat16")

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct((1, *shape), dtype)

  batch = {
    "tokens": array(jnp.int32, 8),
    "positions": array(jnp.int32, 3, 8),
    "segments": array(jnp.int32, 8),
    "frames": array(jnp.uint8, 2, 28, 28, 3),
  }
  init = functools.partial(model.init, jax.random.key(0))
  return jax.eval_shape(lambda x: init(**x), batch)["params"]


def checkpoint(variant):
  found = [
    tensors
    for name, tensors in manifests.read("spatial_mllm").items()
    if VARIANTS[variant] in name
  ]
  assert len(found) == 1
  return found[0]


# --- published checkpoints --------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_checkpoints_fit_exactly_in_under_a_second(variant):
  params, tensors = published(variant), checkpoint(variant)
  before = time.process_time()
  entries = hf.plan(
    spatial_mllm.KEYS, tensors, params, ignore=spatial_mllm.IGNORE
  )
  assert time.process_time() - before < 1
  assert {entry.path for entry in entries} == set(trees.flatten(params))
  # All that is left is what VGGT has beside its aggregator, and a tied head.
  read = {name for entry in entries for name in entry.names}
  left = {
    re.sub(r"^(spatial_encoder\.vggt_model|vggt)\.", "", name)
    for name in tensors.keys() - read
  }
  heads = ("camera_head.", "depth_head.", "point_head.", "track_head.")
  rest = {name for name in left if not name.startswith(heads)}
  assert rest <= {*vggt.IGNORE, "lm_head.weight"}
  size = trees.count(params)
  connector = {"v1_1": 302_024_704, "v1_0": 302_024_704 + 8_394_752}[variant]
  assert trees.count(params["connector"]) == connector
  assert size == 3_754_622_976 + 909_112_320 - 1024 + connector


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_a_rule_and_nearly_all_are_split(variant):
  shapes = published(variant)
  mesh = sharding.mesh(fsdp=4, tensor=2)
  placed = trees.flatten(sharding.parameters(shapes, mesh))
  flat = trees.flatten(shapes)
  held = sum(
    np.prod(placed[name].shard_shape(x.shape)) for name, x in flat.items()
  )
  assert held < trees.count(shapes) / 8 * 1.2
  up = "connector/fuse/up" if variant == "v1_1" else "connector/merge/up"
  assert placed[f"{up}/kernel"].shard_shape((16384, 16384)) == (4096, 8192)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_gives_published_names_and_loading_the_bits(variant, tmp_path):
  model, _, batch = setup(variant)
  params = random(shapes_of(model, batch), ml_dtypes.bfloat16)
  # v1.0's name of VGGT comes second, as does a later one of Qwen2.5-VL.
  hf.save(spatial_mllm.KEYS, params, tmp_path, release=int(variant == "v1_0"))
  with safe_open(tmp_path / "model.safetensors", "numpy") as file:
    names = set(file.keys())
  known = {re.sub(r"\d+", "#", name) for name in checkpoint(variant)}
  if variant == "v1_0":
    names = {n.replace("model.visual.", "visual.") for n in names}
    names = {n.replace("language_model.", "") for n in names}
  assert {re.sub(r"\d+", "#", name) for name in names} <= known
  loaded = hf.load(spatial_mllm.KEYS, tmp_path, params)
  assert trees.diff(loaded, params) == ""
  for a, b in zip(
    jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True
  ):
    np.testing.assert_array_equal(
      np.asarray(a).view(np.uint16), b.view(np.uint16)
    )


# --- images -----------------------------------------------------------------


def test_a_single_image_is_a_video_of_two_equal_frames():
  model, params, _ = setup()
  batch = make_batch(["image", "text"], count=1, media="images")
  logits, out = apply(model, params, batch)
  doubled = {k: v for k, v in batch.items() if k != "images"}
  doubled["frames"] = np.repeat(batch["images"], 2, axis=1)
  want, other = apply(model, params, doubled)
  np.testing.assert_allclose(logits, want, atol=1e-5)
  assert out["geometry/tokens"].shape[1] == 2
  np.testing.assert_allclose(
    out["visual/tokens"], other["visual/tokens"], atol=1e-5
  )


def test_the_first_generation_shows_vggt_each_image_once():
  model, params, _ = setup("v1_0")
  batch = make_batch(["image"], count=2, media="images")
  _, out = apply(model, params, batch)
  assert out["geometry/tokens"].shape[1] == 2
  # Both frames of a temporal patch are the same image.
  merged = out["connector/merged"].reshape(1, 2 * 4, 2, -1)
  np.testing.assert_array_equal(merged[:, :, 0], merged[:, :, 1])


def test_frames_side_by_side_are_in_the_order_of_merged_tokens():
  F, h, w, E = 4, 4, 6, 3
  frame, y, x, c = np.mgrid[:F, :h, :w, :E]
  code = frame * 1000 + y * 100 + x * 10 + c
  got = spatial_mllm.side_by_side(code[None].astype(np.float32))
  assert got.shape == (1, 2 * 2 * 3, 8 * E)
  # Second temporal patch, second row, third column.
  want = [
    (2 + dt) * 1000 + (2 + dy) * 100 + (4 + dx) * 10 + c
    for dt in range(2)
    for dy in range(2)
    for dx in range(2)
    for c in range(E)
  ]
  np.testing.assert_array_equal(got[0, 6 + 3 + 2], want)


def test_whole_frames_are_embedded_as_the_processors_patches():
  rng = np.random.default_rng(0)
  frames = rng.random((2, 4, 16, 48, 3), np.float32)  # 2 x 6 patches of 8
  frames = np.array(qwen_vit.normalise(frames))
  patches = np.stack([vision.patchify(x, patch=8) for x in frames])
  embed = qwen_vit.PatchEmbed(16, (2, 8, 8, 3), 2, "float32")
  params = jax.jit(embed.init)(jax.random.key(0), patches)
  want = jax.jit(embed.apply)(params, patches)
  got = jax.jit(embed.apply)(params, frames)
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 16, 48), (4, 12, 48), (4, 16, 32)])
def test_frames_of_another_size_than_the_grids_are_an_error(shape):
  vit = qwen_vit.Model(patch=8, window=0)
  frames = jax.ShapeDtypeStruct((1, *shape, 3), np.float32)
  with pytest.raises(ValueError, match=r"for grid \(2, 2, 6\) 4 of 16 x 48"):
    jax.eval_shape(
      functools.partial(vit.init, grid=(2, 2, 6)), jax.random.key(0), frames
    )
  with pytest.raises(ValueError, match="whole frames need a grid"):
    jax.eval_shape(
      functools.partial(vit.init, layout={}), jax.random.key(0), frames
    )


# --- caches, packing, programs ----------------------------------------------


def test_cached_geometry_changes_nothing_and_needs_no_vggt():
  model, params, batch = setup()
  logits, out = apply(model, params, batch)
  tokens = out["geometry/tokens"][:, :, 5:]
  without = build(**{**SMALL, "vggt": None})
  rest = {name: part for name, part in params.items() if name != "vggt"}
  given = {**batch, "geometry": tokens}
  assert trees.diff(shapes_of(without, given), rest) == ""
  got, _ = apply(without, rest, given)
  np.testing.assert_array_equal(got, logits)
  with pytest.raises(ValueError, match="must hold its tokens"):
    apply(without, rest, batch)
  with pytest.raises(ValueError, match=r"4 frames of 4 x 4 patches"):
    apply(without, rest, {**given, "geometry": tokens[:, :3]})


def test_a_recipe_that_names_no_dtype_may_read_cached_tokens():
  recipe = spatial_mllm_sft.get_config("world")
  recipe.model.vggt = None
  recipe.data.media.geometry = (4, 16, 64)
  geometry = spatial_mllm.INPUTS(recipe)["geometry"]
  assert geometry.shape == (16, 4, 16, 64) and geometry.dtype == jnp.float32


def test_the_cache_command_writes_what_training_reads(tmp_path):
  rng = np.random.default_rng(0)
  (tmp_path / "a").mkdir()
  for i in range(4):
    pixels = rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a" / f"{i}.png")
  turns = [
    {"from": "human", "value": "<video>how many?"},
    {"from": "gpt", "value": "4"},
  ]
  file = tmp_path / "train.json"
  file.write_text(json.dumps([{"video": "a", "conversations": turns}] * 2))
  recipe = spatial_mllm_sft.get_config(
    f"variant=tiny,questions=1,data={file},cache={tmp_path}/cache"
  )
  recipe.model.update({"dtype": "float32", "remat": "none", "loss_tokens": 0})
  recipe.optimizer.master = False
  recipe.data.media.update({"frames": 4, "height": SIDE, "width": SIDE})
  recipe.data.media.update({"patch": 8, "geometry": (4, 16, 64)})
  recipe.data.length = 192
  model, mod = models.build(recipe)
  assert model.vggt is None
  whole = build()
  params = random(shapes_of(whole, setup()[2]))
  hf.save(mod.PART_KEYS["vggt"], params["vggt"], tmp_path / "vggt")
  recipe.lock()
  assert cache.main(recipe, None, source=str(tmp_path / "vggt")) == 1
  assert cache.main(recipe, None, source=str(tmp_path / "vggt")) == 0
  row = workers.make(recipe, "train")[0]
  frames = row["frames"][None]
  want, _ = jax.jit(
    functools.partial(whole.apply, method="look"), compiler_options=OPTIONS
  )({"params": {"vggt": params["vggt"]}}, frames)
  np.testing.assert_allclose(row["geometry"], want[0], rtol=1e-3, atol=1e-4)
  wanted = {k: v.shape for k, v in mod.INPUTS(recipe).items()}
  got = {k: (recipe.batch_size, *np.shape(v)) for k, v in row.items()}
  assert got == wanted


def test_packed_questions_get_the_answers_of_each_alone():
  model, params, _ = setup()
  batch = make_batch(["video"])
  prefix, size = 12, 9
  parts = [slice(prefix + i * size, prefix + (i + 1) * size) for i in range(3)]
  batch["shared"] = np.zeros((1, T), bool)
  batch["shared"][:, :prefix] = True
  start = batch["positions"][:, :, prefix].copy()
  for number, part in enumerate(parts):
    batch["segments"][:, part] = 2 + number
    batch["positions"][:, :, part] = start[..., None] + np.arange(size)
  packed, _ = apply(model, params, batch)
  for part in parts:
    alone = dict(batch)
    keep = np.r_[:prefix, part]
    for name in ("tokens", "segments", "shared", "positions"):
      value = np.zeros_like(batch[name])
      value[..., : len(keep)] = batch[name][..., keep]
      alone[name] = value
    got, _ = apply(model, params, alone)
    np.testing.assert_allclose(
      got[:, prefix : len(keep)], packed[:, part], atol=2e-5
    )


def test_one_program_for_each_bucket_of_mixed_batches():
  model, params, _ = setup()
  traced = []

  @functools.partial(jax.jit, compiler_options=OPTIONS)
  def loss(params, batch):
    traced.append(sorted(batch))
    return spatial_mllm.loss(model, params, batch)[0]

  rng = np.random.default_rng(3)
  for step in range(20):
    kinds = list(rng.choice(["media", "text"], 3))
    media = "images" if step % 3 == 0 else "frames"
    value = loss(params, make_batch(kinds, seed=step, media=media))
    assert np.isfinite(value)
  assert len(traced) == 2


def test_gradients_reach_every_part_that_is_read():
  model, params, batch = setup()
  grads = jax.jit(
    jax.grad(lambda p: spatial_mllm.loss(model, p, batch)[0]),
    compiler_options=OPTIONS,
  )(params)
  for name, grad in trees.flatten(jax.device_get(grads)).items():
    assert np.all(np.isfinite(grad)), name
    assert np.any(grad) or re.search("(key|qkv)/bias", name), name


def test_frames_that_do_not_fit_are_refused():
  model, params, batch = setup()
  with pytest.raises(ValueError, match="expected a multiple of 2 frames"):
    apply(model, params, {**batch, "frames": batch["frames"][:, :3]})
  with pytest.raises(ValueError, match="one of the two"):
    apply(model, params, {**batch, "images": batch["frames"]})
