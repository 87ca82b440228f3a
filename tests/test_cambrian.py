# SPDX-License-Identifier: Apache-2.0
"""Cambrian-1 beyond its recordings: names, masks, places, decoding, data."""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import cambrian as recipe
from spatial_jax import generate, hf, models, optim, sharding, trees
from spatial_jax.data import cambrian as data
from spatial_jax.data import text
from spatial_jax.models import cambrian, sva
from tests import manifests

# Parameters without the towers, as the published files have them.
COUNTS = {"8b": 8333022208, "13b": 13350085632, "34b": 34764002304}
T, SIDE, AT = 48, 4, 5
SQUARE, WIDE, TALL = (64, 64), (64, 24), (20, 64)
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def build(variant="tiny", **overrides):
  model = {"variant": variant, **overrides}
  config = ConfigDict({"model_name": "cambrian", "model": model})
  return models.build(config)[0]


@functools.cache
def shapes(variant):
  model = build(variant)
  tokens = jax.ShapeDtypeStruct((1, 700), jnp.int32)
  batch = {
    f"pixels/{name}": jax.ShapeDtypeStruct((1, 1, side, side, 3), jnp.float32)
    for name, side in zip(model.towers, model.pixels, strict=True)
  }
  batch |= {"tokens": tokens, "segments": tokens}
  batch["positions"] = jax.ShapeDtypeStruct((1, 3, 700), jnp.int32)
  return jax.eval_shape(
    lambda key, batch: model.init(key, **cambrian.arguments(batch))["params"],
    jax.random.key(0),
    batch,
  )


@pytest.mark.parametrize("variant", COUNTS)
def test_the_table_fits_the_published_checkpoints(variant):
  params = {k: v for k, v in shapes(variant).items() if k in ("llm", "sva")}
  assert trees.count(params) == COUNTS[variant]
  tensors = manifests.read("cambrian")[f"nyu-visionx/cambrian-{variant}"]
  start = time.process_time()
  entries = hf.plan(cambrian.KEYS, tensors, params)
  assert time.process_time() - start < 1
  assert {entry.path for entry in entries} == set(trees.flatten(params))
  sharding.parameters(shapes(variant), sharding.mesh(fsdp=4, tensor=2))


@pytest.mark.parametrize("name", cambrian.PART_KEYS)
def test_each_tower_fits_its_own_published_file(name):
  files = manifests.read("cambrian")
  tensors = next(v for k, v in files.items() if k.startswith(f"tower.{name}"))
  table, params = cambrian.PART_KEYS[name], shapes("8b")[name]
  hf.plan(table, tensors, params, ignore=cambrian.PART_IGNORE)


@pytest.mark.parametrize(
  ("stage", "parts"), [(1, ("sva",)), (2, ("sva", "llm"))]
)
def test_a_stage_trains_what_the_paper_trains(stage, parts):
  config = recipe.get_config(f"stage={stage},data=x")
  params = shapes("8b")
  optimizer = optim.make(config.optimizer, config.steps, params)
  trained = optim.subset(params, optimizer.trainable)
  assert trees.count(trained) == sum(trees.count(params[p]) for p in parts)


def sample(size=None, at=AT, words=12, length=T, seed=0):
  """A row with an image of that size at a place, or without one."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(1, 100, words + 1).astype(np.int32)
  labels = np.where(np.arange(words + 1) > words - 4, ids, data.IGNORE)
  if size is not None:
    ids[at] = data.IMAGE
  options = {"length": length, "side": SIDE, "image_position": AT}
  row = data.expand(ids, labels, size or SQUARE, **options)
  row = data.to_batch(row, SIDE)
  cells = [data.padding(size or SQUARE, side) for side in (4, 8)]
  row["padding"] = np.array([cells], np.int32)
  row["features/siglip"] = rng.normal(size=(1, 16, 24)).astype(np.float32)
  row["features/clip"] = rng.normal(size=(1, 64, 24)).astype(np.float32)
  return row


def stack(*rows):
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@functools.cache
def params():
  """Random numbers everywhere: a new aggregator is nearly silent."""
  batch = stack(sample(WIDE), sample(WIDE))
  model = build()
  tree = jax.eval_shape(
    lambda: model.init(jax.random.key(0), **cambrian.arguments(batch))
  )["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: (rng.normal(size=x.shape) * 0.3).astype(np.float32), tree
  )


@jit
def run(params, batch):
  return build().apply({"params": params}, **cambrian.arguments(batch))


def close(a, b):
  return np.max(np.abs(a - b)) <= 1e-4 * np.max(np.abs(b))


def test_one_trace_serves_images_of_all_shapes_and_text():
  traces = []

  @jit
  def loss(params, batch):
    traces.append(batch["tokens"].shape)
    return cambrian.loss(build(), params, batch)[0]

  rng = np.random.default_rng(0)
  for number in range(20):
    length = (T, 56)[number % 2]
    sizes = [(*rng.integers(8, 99, 2).tolist(),), None]
    rows = [
      sample(size, at=int(rng.integers(1, 9)), length=length, seed=number)
      for size in sizes
    ]
    assert np.isfinite(loss(params(), stack(*rows)))
  assert sorted(traces) == [(2, T), (2, 56)]


def test_what_is_in_the_padding_of_an_image_changes_no_answer():
  batch = stack(sample(WIDE), sample(TALL, seed=1))
  changed = {**batch, "features/clip": batch["features/clip"].copy()}
  for row, size in zip(changed["features/clip"], (WIDE, TALL), strict=True):
    rows, columns = data.padding(size, 8)
    assert rows + columns > 1
    grid = row.reshape(8, 8, -1)
    grid[:rows] = grid[8 - rows :] = 9
    grid[:, :columns] = grid[:, 8 - columns :] = 9
  valid = batch["segments"] > 0
  (a, _), (b, _) = run(params(), batch), run(params(), changed)
  assert close(a[valid], b[valid])
  # What isn't in the padding does.
  changed["features/clip"] = batch["features/clip"] + 1
  assert not close(run(params(), changed)[0][valid], a[valid])


def test_text_is_the_same_with_a_masked_image_and_without_any():
  masked = sample(None)
  index = np.flatnonzero(masked["segments"])
  plain = {**masked, "tokens": np.zeros_like(masked["tokens"])}
  for name in ("tokens", "segments", "shared", "positions"):
    plain[name] = np.zeros_like(masked[name])
    plain[name][..., : len(index)] = masked[name][..., index]
  assert not np.any(plain["tokens"] == data.IMAGE)
  logits, _ = run(params(), stack(masked, plain))
  assert close(logits[1, : len(index)], logits[0, index])
  plain["features/clip"] = plain["features/clip"] + 5
  again, _ = run(params(), stack(masked, plain))
  np.testing.assert_array_equal(again[1], logits[1])


def test_an_image_may_stand_anywhere_in_a_row():
  first, later = sample(WIDE, at=2), sample(WIDE, at=9)
  _, out = run(params(), stack(first, later))
  # The same row of a batch: how one is rounded may depend on which it is.
  _, moved = run(params(), stack(later, first))
  count = SIDE * (SIDE + 1)
  np.testing.assert_array_equal(
    out["inputs"][0, 2 : 2 + count], moved["inputs"][0, 9 : 9 + count]
  )
  # Shifted by padding on the left, everything stays the same.
  left = {**first}
  for name in ("tokens", "segments", "shared", "positions"):
    left[name] = np.roll(first[name], 7, axis=-1)
    assert not np.any(first["segments"][-7:])
  logits, _ = run(params(), stack(first, left))
  valid = first["segments"] > 0
  assert close(np.roll(logits[1], -7, axis=0)[valid], logits[0][valid])


def test_layers_act_on_image_tokens_after_their_blocks_only():
  batch = stack(sample(SQUARE), sample(WIDE, seed=1))
  _, out = run(params(), batch)
  model = build(sva={"layers": 0})
  rest = {k: v for k, v in params()["sva"].items() if k != "between"}
  _, without = jit(
    lambda p: model.apply({"params": p}, **cambrian.arguments(batch))
  )({**params(), "sva": rest})
  got, want = out["llm/blocks"], without["llm/blocks"]
  assert build().sva["start"] == 1
  # Two programs may round differently; what the layers add is far more.
  rounding = 1e-5 * np.max(np.abs(want))
  np.testing.assert_allclose(got[0], want[0], atol=rounding)
  count = SIDE * (SIDE + 1)
  moved = np.any(np.abs(got[1] - want[1]) > rounding, axis=-1)
  grid = np.zeros((2, T), bool)
  grid[:, AT : AT + count] = np.arange(count) % (SIDE + 1) < SIDE
  np.testing.assert_array_equal(moved, grid)


def test_a_query_sees_the_cells_below_it_and_no_others():
  model = sva.Aggregator(8, side=2, width=8, groups=(2,), depth=2, heads=2)
  rng = np.random.default_rng(0)
  features = [rng.normal(size=(1, n, 8)).astype("f") for n in (4, 16, 36)]

  @jit
  def reach(features):
    init = model.init(jax.random.key(1), features)

    def query(rest):
      _, _, out = model.apply(init, [features[0], *rest])
      return jnp.sum(out["sva/group_0"][0, 1] ** 2)  # top right

    return jax.grad(query)(features[1:])

  for grad, side in zip(reach(features), (4, 6), strict=True):
    seen = np.any(np.reshape(grad, (side, side, -1)), axis=-1)
    want = np.zeros((side, side), bool)
    want[: side // 2, side // 2 :] = True
    np.testing.assert_array_equal(seen, want)


def test_cached_decoding_equals_the_whole_forward_pass():
  rows = [sample(WIDE, words=8), sample(TALL, at=3, words=10, seed=1)]
  batch = stack(*rows)
  new, _ = generate.generate(
    build(),
    params(),
    cambrian.arguments(batch),
    max_new_tokens=4,
    stop_ids=(),
  )
  for row, answer in zip(rows, np.array(new), strict=True):
    end = int(np.flatnonzero(row["segments"])[-1]) + 1
    here = slice(end, end + 4)
    row["tokens"][here], row["segments"][here] = answer, 1
    row["shared"][here] = True
    last = row["positions"][:, end - 1 : end]
    row["positions"][:, here] = last + 1 + np.arange(4)[None]
    row["end"] = np.array(end)
  ends = [row.pop("end") for row in rows]
  logits, _ = run(params(), stack(*rows))
  for row, answer, end in zip(logits, np.array(new), ends, strict=True):
    said = np.argmax(row[end - 1 : end + 3], axis=-1)
    np.testing.assert_array_equal(said, answer)


def write(folder, lines):
  file = folder / "train.jsonl"
  file.write_text("\n".join(json.dumps(line) for line in lines))
  return str(file)


def turns(*texts):
  roles = ("human", "gpt") * len(texts)
  pairs = zip(roles, texts, strict=False)
  return [{"from": role, "value": value} for role, value in pairs]


def source(folder, lines, length=96):
  return data.Dialogues(
    write(folder, lines),
    template="chatml_direct",
    length=length,
    side=SIDE,
    towers=(("siglip", 40, 4), ("clip", 64, 8)),
    image_position=8,
  )


def test_conversations_become_rows_that_the_model_takes(tmp_path, monkeypatch):
  # The template's introduction is long for the world's small vocabulary.
  short = data.Template(
    "", ("<|im_start|>user ", "<|im_end|>"), "is ", ("", ".")
  )
  monkeypatch.setitem(data.TEMPLATES, "chatml_direct", short)
  Image.new("RGB", (60, 24), "red").save(tmp_path / "wide.png")
  rows = source(
    tmp_path,
    [
      {
        "image": "wide.png",
        "conversations": turns("How many chairs? <image>", "2", "Left?", "no"),
      },
      {"conversations": turns("Which is closer?", "the table")},
    ],
  )
  tokenizer = text.Tokenizer.load()
  image, plain = rows[0], rows[1]
  assert np.sum(image["tokens"] == data.IMAGE) == SIDE * (SIDE + 1)
  start = int(np.argmax(image["tokens"] == data.IMAGE))
  slots = image["segments"][start : start + 20].reshape(SIDE, SIDE + 1)
  # 4 * 24 / 60 is one row of the grid, so that one is cut at each end.
  np.testing.assert_array_equal(slots.all(1), [False, True, True, False])
  np.testing.assert_array_equal(image["padding"], [[[1, 0], [2, 0]]])
  assert image["pixels/clip"].shape == (1, 64, 64, 3)
  assert not np.any(plain["pixels/clip"])
  block = plain["segments"][8:28]
  assert not np.any(block) and np.all(plain["tokens"][8:28] == data.IMAGE)
  for row, said in ((image, "2.no."), (plain, "the table.")):
    learnt = row["labels"][row["loss_weight"] > 0]
    assert tokenizer.decode(learnt) == said
    follows = np.flatnonzero(row["loss_weight"]) + 1
    np.testing.assert_array_equal(row["tokens"][follows], learnt)


def test_what_cannot_be_learnt_from_is_an_error_with_its_line(tmp_path):
  Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
  (tmp_path / "cut.png").write_bytes(b"\x89PNG")
  wrong = {
    "no answer is left": {"conversations": turns("Where?")},
    "says otherwise": {"image": "a.png", "conversations": turns("Hm?", "a")},
    "cannot be decoded": {
      "image": "cut.png",
      "conversations": turns("<image>?", "a"),
    },
    "user first": {"conversations": turns("", "a")[1:]},
  }
  rows = source(tmp_path, [*wrong.values()], length=512)
  for number, message in enumerate(wrong):
    with pytest.raises(ValueError, match=rf"line {number + 1}: .*{message}"):
      rows[number]
  with pytest.raises(ValueError, match="template 'llama_2' is unknown"):
    data.prompt([("Hi", None)], "llama_2")


def test_a_grid_must_be_a_multiple_of_the_queries():
  with pytest.raises(ValueError, match="multiple of 4"):
    sva.windows(np.zeros((1, 81, 2)), 4)
  with pytest.raises(ValueError, match="do not fit in rows of 12"):
    sva.place(
      np.zeros((1, 12, 2)), np.zeros((1, 20, 2)), np.ones((1, 12), bool)
    )
