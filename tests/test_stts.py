# SPDX-License-Identifier: Apache-2.0
"""STTS: what is dropped, packing, the decoder's rows, published names."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from configs import stts_sft
from spatial_jax import generate, hf, models, sharding, trees
from spatial_jax import system as systems
from spatial_jax.data import molmo2 as processing
from spatial_jax.data import stts as data
from spatial_jax.models import llm, molmo2, stts, stts_vit, vit
from spatial_jax.nn import packing, pruning
from tests import manifests
from tests.towers import TOLERANCE, jit, worst, worst_gradient

B, F, SIDE = 2, 4, 64  # frames of 4 x 4 groups of 2 x 2 patches
IMAGE = 100  # the token of a patch


def config(**more):
  c = ConfigDict({"model_name": "stts", "batch_size": B, "model": more})
  c.data = {"length": 100, "frames": F}
  return c


@functools.cache
def shapes_of(variant):
  c = config(variant=variant)
  c.data.length = F * 81 + 60  # groups of 3 x 3 patches
  model, mod = models.build(c)
  return jax.eval_shape(
    lambda key, batch: model.init(key, **mod.arguments(batch))["params"],
    jax.random.key(0),
    mod.INPUTS(c),
  )


def scorer_tensors():
  parts = manifests.read("stts")
  return next(v for k, v in parts.items() if k.startswith("STTS"))


def plan(table, tensors, shapes):
  start = time.process_time()
  entries = hf.plan(table, tensors, shapes)
  assert time.process_time() - start < 1
  assert {entry.path for entry in entries} == set(trees.flatten(shapes))


@pytest.mark.parametrize("size", ["4b", "8b"])
@pytest.mark.parametrize("naming", ["released", "transformers"])
def test_published_names_fit_with_the_scorers(size, naming):
  parts = manifests.read("stts")
  base = next(
    v for k, v in parts.items() if size.upper() in k[:20] and naming in k
  )
  scorer = {f"model.{name}": shape for name, shape in scorer_tensors().items()}
  plan(stts.KEYS, {**base, **scorer}, shapes_of(size))
  # A plain Molmo2 starts with a fresh scorer.
  entries = hf.plan(stts.KEYS, base, shapes_of(size), new=("vision/scorer/.*",))
  assert len(entries) == len(trees.flatten(shapes_of(size))) - 14


def test_the_scorers_own_tensors_fit():
  start = "vision_backbone.image_vit.transformer.temporal_token_scorer."
  tensors = manifests.below(scorer_tensors(), start)
  plan(stts.SCORER_KEYS, tensors, shapes_of("4b")["vision"]["scorer"])


@pytest.mark.parametrize("variant", stts.VARIANTS)
def test_every_parameter_has_a_sharding_rule(variant):
  mesh = sharding.mesh(fsdp=4, tensor=2)
  specs = trees.flatten(sharding.parameters(shapes_of(variant), mesh))
  place = specs["vision/scorer/query/kernel"].spec
  assert place == specs["vision/connector/query/kernel"].spec


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.5, 0.9])
def test_every_video_loses_its_lowest_groups_and_as_many_as_it_must(drop):
  videos = np.array([[1, 1, 1, 0, 2, 2, -1], [0, 0, 3, 3, 3, 3, 3]], np.int32)
  rng = np.random.default_rng(0)
  scores = rng.random((*videos.shape, 9)).astype(np.float32)
  scores = np.round(scores, 1)  # many are equal
  kept = np.asarray(pruning.keep(scores, videos, drop))
  for row in range(len(videos)):
    for video in (1, 2, 3):
      frames = np.flatnonzero(videos[row] == video)
      if not len(frames):
        continue
      here = scores[row, frames].copy()
      here[0] = 100
      lost = data.budget(len(frames), 9, drop)
      order = np.argsort(here.reshape(-1), kind="stable")
      want = np.ones(here.size, bool)
      want[order[:lost]] = False
      np.testing.assert_array_equal(kept[row, frames].reshape(-1), want)
    assert kept[row, videos[row] == 0].all()
    assert not kept[row, videos[row] < 0].any()


def test_budgets_round_down_as_published():
  assert data.budget(64, 81, 0.5) == 2592
  assert data.budget(4, 81, 0.3) == 97
  # 2 samples of 64 frames, 2048 tokens of text and 203 others: the sequence
  # length of the published command.
  assert 2 * (64 * 81 - data.budget(64, 81, 0.5) + 2048 + 203) == 9686


def test_packed_patches_come_back_and_gradients_with_them():
  rng = np.random.default_rng(1)
  kept = rng.random((3, 7, 10)) < rng.random((3, 7, 1))
  kept[0, 2], kept[1, 4], kept[2, :2] = False, True, False
  x = jnp.asarray(rng.normal(size=(3, 7, 10, 2)).astype("f"))
  pack = jax.jit(packing.pack, static_argnames="refill")
  pick = jax.jit(packing.pick)
  for refill in (False, True):
    p = pack(kept, refill=refill)
    frame = np.asarray(p.frame)
    for row in range(3):
      used = frame[row].max(axis=1) > 0
      assert used[: int(p.count[row])].all() and used.sum() == p.count[row]
      for number in range(7):  # whole, in one bin, side by side
        bins, slots = np.nonzero(frame[row] == number + 1)
        assert len(set(bins)) <= 1
        assert np.all(np.diff(slots) == 1)
        assert refill or len(slots) == kept[row, number].sum()
    back = jnp.where(kept, p.target, -1)
    y = pick(pick(x, p.source, p.target), back, p.source)
    np.testing.assert_array_equal(y, np.where(kept[..., None], x, 0))
  gradient = jax.jit(
    jax.grad(lambda x: jnp.sum(packing.pick(x, p.source, p.target) ** 2))
  )(x)
  there = np.asarray(p.target) >= 0
  np.testing.assert_array_equal(gradient, np.where(there[..., None], 2 * x, 0))


def tiny(vision=None, **more):
  vision = {"drop": 0.5, **(vision or {})}
  c = config(variant="tiny", image_token=IMAGE, vision=vision, **more)
  return models.build(c)[0]


@functools.cache
def params():
  """Random ones, in which biases and norms differ too."""
  rows = batch()
  shapes = jax.eval_shape(
    lambda key: tiny().init(key, **rows), jax.random.key(0)
  )
  rng = np.random.default_rng(3)

  def draw(name, leaf):
    x = rng.normal(size=leaf.shape).astype("f")
    if name.endswith(("kernel", "embedding")):
      return x / leaf.shape[-2] ** 0.5
    return 0.1 * x + name.endswith("scale")

  return trees.map_names(draw, shapes["params"])


def batch(text=7, seed=0, rows=B):
  """Rows of frames with a word after each, text, and padding at the end."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(1, 90, (rows, 3 + F * 17 + text + 4), dtype=np.int32)
  for frame in range(F):
    start = 3 + 17 * frame
    tokens[:, start : start + 16] = IMAGE
  segments = np.ones_like(tokens)
  segments[:, -4:] = 0
  positions = np.arange(tokens.shape[1], dtype=np.int32)
  return {
    "tokens": tokens,
    "positions": np.tile(positions, (rows, 1)),
    "segments": segments,
    "images": rng.normal(size=(rows, F, SIDE, SIDE, 3)).astype("f"),
  }


@functools.cache
def applied(model):
  return jit(lambda params, rows: model.apply({"params": params}, **rows))


def forward(rows, **more):
  return jax.device_get(applied(tiny(**more))(params(), rows))


@pytest.mark.parametrize("keep_positions", [False, True])
def test_the_decoder_reads_what_is_left_and_nothing_else(keep_positions):
  rows = batch()
  logits, out = forward(rows, keep_positions=keep_positions)
  T = rows["tokens"].shape[1]
  lost = data.budget(F, 16, 0.5)
  assert out["llm/inputs"].shape[1] == T - lost
  dropped = out["prune/dropped"]
  assert np.all(dropped.sum(axis=1) == lost)
  assert not dropped[rows["tokens"] != IMAGE].any()
  # By hand: rows without the dropped tokens.
  names = ("tokens", "positions", "segments")
  left = {k: rows[k][~dropped].reshape(B, T - lost) for k in names}
  if not keep_positions:
    left["positions"] = np.tile(np.arange(T - lost, dtype=np.int32), (B, 1))
  table = np.asarray(params()["llm"]["embed"]["embedding"])
  embeddings, is_image = table[left["tokens"]], left["tokens"] == IMAGE
  embeddings[is_image] += out["vit/merged"].reshape(-1, table.shape[1])
  want, _ = jit(llm.Model(**tiny().llm).apply)(
    {"params": params()["llm"]},
    None,
    left["positions"],
    left["segments"],
    mutual=is_image.astype(np.int32),
    embeddings=embeddings,
  )
  valid = left["segments"] > 0
  got = logits[~dropped].reshape(want.shape)
  assert worst(got[valid], np.asarray(want)[valid]) <= TOLERANCE
  assert not logits[dropped].any()


def test_a_model_that_drops_nothing_is_molmo2():
  rows = batch()
  logits, _ = forward(rows, vision={"drop": 0.0})
  base = tiny().vision.to_dict()
  for name in ("after", "pool", "drop"):
    base.pop(name)
  model = molmo2.Model(
    vision=FrozenConfigDict(base), llm=tiny().llm, image_token=IMAGE
  )
  theirs = {**params(), "vision": dict(params()["vision"])}
  theirs["vision"].pop("scorer")
  pooling = np.stack([processing.pooling(F, 8, 8, 2)] * B)
  mutual = (rows["tokens"] == IMAGE).astype(np.int32)
  want, _ = jit(model.apply)(
    {"params": theirs}, **rows, pooling=pooling, mutual=mutual
  )
  valid = rows["segments"] > 0
  assert worst(logits[valid], np.asarray(want)[valid]) <= TOLERANCE


def test_fewer_bins_change_no_number_whether_they_suffice_or_not():
  tower = stts_vit.Tower(tiny().vision["vit"], (3, 2))
  rng = np.random.default_rng(5)
  counts = np.array([[64, 20, 20, 10], [40, 40, 20, 5]])  # in two bins each
  kept = rng.permuted(np.arange(64) < counts[..., None], axis=-1)
  x, *weights = rng.normal(size=(3, B, F, 64, 32)).astype("f")
  plan = jax.jit(packing.pack)(kept)
  assert list(plan.count) == [2, 2]

  def loss(params, x, bins):
    read = tower.apply(
      {"params": params}, x, kept, plan, 2, bins, method="run_packed"
    )
    terms = zip(weights, (read[3], read[2]), strict=True)
    return sum(jnp.sum(w.reshape(B, -1, 32) * y) for w, y in terms)

  step = jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
  want = jax.device_get(step(params()["vision"]["vit"], x, F))
  for bins in (2, 1):
    got = jax.device_get(step(params()["vision"]["vit"], x, bins))
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
      assert np.max(np.abs(a - b)) <= TOLERANCE * max(np.max(np.abs(b)), 1)


def test_rows_that_fill_tiles_change_no_number(monkeypatch):
  """Frames of 25 patches: 32 rows on a TPU, and the decoder knows nothing."""
  sizes = {"vit": {**tiny().vision["vit"], "image": 40}, "bins": 0.75}
  model = tiny(vision=sizes)
  rows = batch()
  rows["images"] = rows["images"][:, :, :40, :40]
  number = np.cumsum(rows["tokens"] == IMAGE, axis=1)
  rows["tokens"][number > F * 9] = 7  # tokens of 3 x 3 groups a frame are left
  own = dict(params(), vision=dict(params()["vision"]))
  own["vision"]["vit"] = dict(own["vision"]["vit"])
  own["vision"]["vit"]["position_embed"] = {
    "embedding": own["vision"]["vit"]["position_embed"]["embedding"][:25]
  }

  def loss(params):
    logits, out = model.apply({"params": params}, **rows)
    features = out["vit/features"]
    return jnp.sum(logits**2) + jnp.sum(features**2), (logits, features)

  step = jax.value_and_grad(loss, has_aux=True)
  want = jax.device_get(jit(step)(own))
  monkeypatch.setattr(sharding, "platform", lambda: "tpu")
  assert vit.on_tiles(jnp.zeros((1, 25, 2))).shape == (1, 32, 2)
  got = jax.device_get(jit(lambda params: step(params))(own))
  for a, b in zip(*map(jax.tree.leaves, (got[0], want[0])), strict=True):
    assert worst(a, b) <= TOLERANCE
  assert worst_gradient(got[1], want[1]) <= TOLERANCE


def test_groups_of_all_frames_are_the_tokens_where_none_are_given():
  """Their gradients are found, not added up."""
  model, rows = tiny(), batch()
  pooling = np.stack([processing.pooling(F, 8, 8, 2)] * B)

  def loss(params, pooling):
    logits, out = model.apply({"params": params}, **rows, pooling=pooling)
    return jnp.mean(logits**2) + jnp.mean(out["vit/merged"] ** 2)

  step = jit(jax.value_and_grad(loss))
  want = jax.device_get(step(params(), pooling))
  got = jax.device_get(step(params(), None))
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    assert np.max(np.abs(a - b)) <= TOLERANCE * max(np.max(np.abs(b)), 1)


def test_generation_goes_on_behind_the_tokens_left():
  rows = batch()
  model = tiny()
  new, _ = generate.generate(
    model, params(), rows, max_new_tokens=3, stop_ids=()
  )
  new = np.asarray(new)
  # As if the first two had been said before.
  longer = {k: np.array(v) for k, v in rows.items()}
  longer["tokens"][:, -4:-2] = new[:, :2]
  longer["segments"][:, -4:-2] = 1
  logits, _ = forward(longer)
  np.testing.assert_array_equal(logits[:, -5:-2].argmax(-1), new)


def test_mixed_batches_are_traced_once_for_each_bucket():
  """Twenty batches of images, videos of any length and pairs of videos."""
  model, traces = tiny(), []
  kinds = [[1, 1, 1, 1], [0, 1, 1, -1], [1, 1, 2, 2], [0, 0, -1, -1]]

  @jit
  def step(params, rows):
    traces.append(rows["tokens"].shape)
    value, (metrics, _) = stts.loss(model, params, rows)
    return value, metrics["labels_cut"]

  rng = np.random.default_rng(4)
  for i in range(20):
    text = (7, 19)[i % 2]  # two buckets
    rows = batch(text, seed=i)
    T = rows["tokens"].shape[1]
    rows["videos"] = np.array(rng.choice(kinds, B), np.int32)
    tokens = rows["tokens"]
    # Padding frames have no tokens.
    patch = np.cumsum(tokens == IMAGE, axis=1) - 1
    frame = np.minimum(patch // 16, F - 1)
    absent = np.take_along_axis(rows["videos"], frame, axis=1) < 0
    tokens[(tokens == IMAGE) & absent] = 5
    rows["kept_mask"] = np.stack(
      [
        data.kept_mask(s, v, groups=16, drop=0.5, length=T)
        for s, v in zip(rows["segments"], rows["videos"], strict=True)
      ]
    )
    rows["labels"] = tokens
    rows["loss_weight"] = np.float32(rows["segments"])
    value, cut = step(params(), rows)
    assert np.isfinite(value) and cut == 0
  assert len(traces) == 2, traces


def test_a_row_in_a_mixed_batch_is_as_if_alone():
  rows = batch()
  want, _ = forward(rows)
  T = rows["tokens"].shape[1]
  mixed = {**rows, "videos": np.array([[0, 7, 7, 0], [4] * 4], np.int32)}
  length = T - data.budget(2, 16, 0.5)
  mixed["kept_mask"] = np.stack(
    [
      data.kept_mask(s, v, groups=16, drop=0.5, length=length)
      for s, v in zip(mixed["segments"], mixed["videos"], strict=True)
    ]
  )
  got, out = forward(mixed)
  valid = rows["segments"][1] > 0
  assert worst(got[1][valid], want[1][valid]) <= TOLERANCE
  stays = out["prune/stays"].reshape(B, F, 16)
  assert stays[0, [0, 1, 3]].all() and not stays[0, 2].any()
  with pytest.raises(ValueError, match="more than the 60 of config"):
    data.kept_mask(
      rows["segments"][0], mixed["videos"][0], groups=16, drop=0.5, length=60
    )


def test_only_towers_as_molmo2s_are_scored():
  with pytest.raises(ValueError, match="without a class token"):
    model = tiny(vision={"vit": {"final_norm": "applied"}})
    jax.eval_shape(lambda key: model.init(key, **batch()), jax.random.key(0))


def qwen(prune, **vit):
  c = ConfigDict({"model_name": "qwen2_5_vl", "batch_size": B})
  vit = {"prune": prune, **vit}
  c.model = {"variant": "tiny", "grid": (F, 8, 8), "vit": vit}
  c.data = {"length": F * 16 + 12}
  return models.build(c)


@functools.cache
def qwen_params(model):
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), **qwen_batch())["params"]
  )
  rng = np.random.default_rng(3)
  return jax.tree.map(
    lambda x: (rng.normal(size=x.shape) / x.shape[-1] ** 0.5).astype("f"),
    shapes,
  )


def qwen_batch():
  rng = np.random.default_rng(0)
  T = F * 16 + 12
  tokens = rng.integers(1, 100, (B, T), dtype=np.int32)
  tokens[:, 2 : 2 + F * 16] = 121
  return {
    "tokens": tokens,
    "positions": np.tile(np.arange(T, dtype=np.int32), (B, 3, 1)),
    "segments": np.ones((B, T), np.int32),
    "patches": rng.normal(size=(B, F * 64, 96)).astype("f"),
  }


def test_qwen_is_pruned_by_one_config_value():
  rows = qwen_batch()
  model, mod = qwen({"drop": 0.5, "after": 0}, window=0, layers=2)
  params, T = qwen_params(model), rows["tokens"].shape[1]
  labels = {
    "labels": rows["tokens"],
    "loss_weight": np.ones((B, T), np.float32),
  }

  def loss(params):
    value, (metrics, out) = mod.loss(model, params, {**rows, **labels})
    return value, (metrics, out)

  step = jit(jax.value_and_grad(loss, has_aux=True))
  (_, (metrics, out)), gradient = jax.device_get(step(params))
  lost = data.budget(F, 16, 0.5)
  assert out["llm/order"].shape == (B, T - lost)
  assert np.all(np.sum(out["prune/stays"], axis=1) == F * 16 - lost)
  assert 0 < metrics["temporal"] < 4
  scorer = gradient["vit"]["scorer"]
  assert all(np.any(x != 0) for x in jax.tree.leaves(scorer))
  # The decoder has read the tokens left, at their old positions.
  left = np.asarray(out["llm/order"])
  decoder = llm.Model(**model.llm)
  embeddings = params["llm"]["embed"]["embedding"][rows["tokens"]]
  embeddings[:, 2 : 2 + F * 16] = out["vit/merged"]
  _, want = jit(decoder.apply)(
    {"params": params["llm"]},
    None,
    np.take_along_axis(rows["positions"], left[:, None], axis=2),
    np.ones_like(left),
    embeddings=np.take_along_axis(embeddings, left[..., None], axis=1),
  )
  got = np.take_along_axis(out["llm/hidden"], left[..., None], axis=1)
  assert worst(got, want["llm/hidden"]) <= TOLERANCE
  names = hf.tensors(mod.KEYS, params)
  assert sum("token_scorer" in one.name for one in names) == 14


def test_qwen_that_drops_nothing_is_qwen():
  rows = qwen_batch()
  model, _ = qwen({"drop": 0.0, "after": 1})
  plain, _ = qwen(None)
  params = qwen_params(model)
  got, _ = jit(model.apply)({"params": params}, **rows)
  less = {
    **params,
    "vit": {k: v for k, v in params["vit"].items() if k != "scorer"},
  }
  want, _ = jit(plain.apply)({"params": less}, **rows)
  assert worst(got, want) <= TOLERANCE


def test_pruning_of_qwen_says_what_it_needs():
  model, _ = qwen({"drop": 0.5, "after": 3})
  rows = qwen_batch()
  with pytest.raises(ValueError, match="`after` from 0 to 2"):
    jax.eval_shape(lambda: model.init(jax.random.key(0), **rows))


def test_the_tiny_model_goes_out_under_published_names(tmp_path):
  recipe = stts_sft.get_config("test")
  shapes, mod = systems.shapes(recipe)
  params = jax.tree.map(
    lambda x: np.random.default_rng(x.size).standard_normal(x.shape, "f"),
    shapes,
  )
  hf.save(mod.KEYS, params, tmp_path)
  again = hf.load(mod.KEYS, tmp_path, shapes)
  jax.tree.map(np.testing.assert_array_equal, again, params)
