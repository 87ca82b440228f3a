# SPDX-License-Identifier: Apache-2.0
"""World rows, what the device adds to them, and the auxiliary losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import demo
from spatial_jax import models, system
from spatial_jax.data import pipeline, text
from spatial_jax.evaluators import vsi
from spatial_jax.world import auxiliary, dataset, observe, targets
from tests import tiny


def config(arg="test"):
  c = demo.get_config(arg)
  return c


@pytest.fixture(scope="module")
def source():
  return dataset.make(config(), "train")


def batch_of(source, indices):
  rows = [source[i] for i in indices]
  return {k: np.stack([r[k] for r in rows]) for k in rows[0]}


def test_rows_depend_on_split_and_index_only(source):
  again = dataset.make(config(), "train")[3]
  for key, value in source[3].items():
    np.testing.assert_array_equal(value, again[key])
  other = dataset.make(config(), "test")[3]
  assert any((source[3][k] != other[k]).any() for k in other)


def test_rows_have_one_shape(source):
  first = pipeline.spec(source[0])
  assert all(pipeline.spec(source[i]) == first for i in range(1, 12))


def test_no_question_crosses_a_chunk_and_answers_are_trained(source):
  tokenizer = text.Tokenizer.load()
  for index in range(8):
    room = source.room(index)
    row = source.row(room)
    start = len(source.prefix[0])
    assert (row["segments"][:start] == 1).all() and row["shared"][:start].all()
    assert not row["shared"][start:].any()
    placed = source.place(room.questions)
    assert len(placed) > 4
    for number, (question, *_) in enumerate(placed):
      at = np.flatnonzero(row["segments"] == 2 + number)
      chunks = (at - start) // source.chunk
      assert (chunks == chunks[0]).all() and (np.diff(at) == 1).all()
      said = at[row["loss_weight"][at] > 0]
      spelled = tokenizer.decode(row["labels"][said])
      if question.options:
        assert spelled == question.answer
      assert row["answer_at"][number] == said[0]
      assert row["positions"][0, at[0]] == source.prefix[1].max() + 1
    assert row["loss_weight"][row["segments"] == 0].sum() == 0


def test_blind_rows_hold_the_same_questions_and_no_images(source):
  blind = dataset.make(config("blind,test"), "train")
  row = blind[2]
  assert not any(k.startswith("scene/") for k in row)
  pad = text.Tokenizer.load().token_id("<|video_pad|>")
  assert (row["tokens"] != pad).all()
  texts = [
    [q.prompt for q, *_ in s.place(s.room(2).questions)]
    for s in (source, blind)
  ]
  assert texts[0] == texts[1]


def test_a_question_longer_than_a_chunk_is_one_clear_error():
  c = config()
  c.data.world.chunk, c.data.world.text_length = 8, 48
  with pytest.raises(ValueError, match=r"data\.world\.chunk is 8 tokens"):
    dataset.make(c, "train")[0]


def test_an_image_size_that_is_no_multiple_of_the_patches_is_refused():
  c = config()
  c.data.world.image_size = 60
  with pytest.raises(ValueError, match=r"data\.world\.image_size 60"):
    dataset.make(c, "train")


def test_dense_targets_match_a_loop_over_pixels(source):
  c = config()
  batch = batch_of(source, range(2))
  got = observe.make(c)(jax.tree.map(jnp.asarray, batch))
  from spatial_jax.world import render

  scene = {k[6:]: v for k, v in batch.items() if k.startswith("scene/")}
  view = render.render_batch(
    scene, batch["world_from_camera"], batch["intrinsics"], 64, 64
  )
  ids, points = np.asarray(view["object"]), np.asarray(view["point"])
  assert got["patches"].shape == (2, 256, 192)
  rng = np.random.default_rng(0)
  for _ in range(200):
    b, f, y, x = rng.integers([2, 4, 8, 8])
    # Qwen order: 2x2 groups of patches, row by row.
    n = f * 64 + ((y // 2) * 4 + x // 2) * 4 + (y % 2) * 2 + x % 2
    window = slice(8 * y, 8 * y + 8), slice(8 * x, 8 * x + 8)
    patch, place = ids[b, f][window], points[b, f][window]
    found, count = np.unique(patch[patch >= 0], return_counts=True)
    member, kind = np.ones_like(patch, bool), 0
    if len(found) and count.max() >= 6:
      if (count == count.max()).sum() > 1:
        continue  # a tie may go either way
      top = found[count.argmax()]
      member, kind = patch == top, 1 + scene["object_category"][b, top]
    assert got["dense/category"][b, n] == kind
    mean = place[member].mean(0)
    for name, frame in (("point", f), ("room_point", 0)):
      pose = batch["world_from_camera"][b, frame]
      expected = targets.to_heading(pose, mean[None])[0]
      np.testing.assert_allclose(
        got[f"dense/{name}"][b, n], expected, atol=2e-3
      )
    # The first colour channel of the patch's pixels leads its columns.
    red = np.asarray(view["rgb"])[b, f][window][..., 0].ravel()
    red = (red - observe.MEAN[0]) / observe.STD[0]
    np.testing.assert_allclose(got["patches"][b, n, :64], red, atol=1e-4)


def test_auxiliary_terms_are_checked_and_their_heads_dropped():
  c = config()
  c.auxiliary.nonsense = 1.0
  with pytest.raises(ValueError, match="nonsense"):
    auxiliary.make(c, None)
  params = {"llm": {}, "vit": {}, "aux": {}}
  assert set(system.drop_auxiliary(params)) == {"llm", "vit"}


def test_token_loss_is_zero_only_at_the_target(source):
  batch = jax.tree.map(jnp.asarray, batch_of(source, range(2)))
  for group, channels in targets.GROUPS.items():
    right = batch["targets"][..., channels]
    if group == "verify":
      sure = jnp.where(right > 0, 40.0, -40.0)
      assert auxiliary.token_loss(group, sure, batch) < 1e-6
      assert auxiliary.token_loss(group, -sure, batch) > 10
      continue
    assert auxiliary.token_loss(group, right, batch) == 0
    assert batch["targets_mask"][..., channels].any(), group
    off = auxiliary.token_loss(group, right + 1, batch)
    np.testing.assert_allclose(off, 1, rtol=1e-5)


def build(c):
  return system.build(c, pipeline.example(c), c.batch_size)


def test_the_vision_stage_leaves_the_language_model_alone(source):
  c = config("stage=vision,test")
  c.batch_size = 2
  built = build(c)
  params = tiny.random(jax.eval_shape(built.init, jax.random.key(0)))
  batch = jax.jit(built.transform)(batch_of(source, range(2)))
  grads = jax.jit(jax.grad(lambda p: built.loss(p, batch)[0]))(params)
  for leaf in jax.tree.leaves(grads["llm"]["blocks"]):
    assert not leaf.any()
  assert grads["vit"]["blocks"]["qkv"]["kernel"].any()
  assert grads["llm"]["embed"]["embedding"].any()  # words are aligned


def test_a_packed_answer_is_what_the_question_alone_gets(source):
  c = config()
  c.batch_size = 1
  model, mod = models.build(c)
  room = source.room(1)
  asked = [q for q, *_ in source.place(room.questions)][:6]
  forward = vsi.answer_distributions(model, mod, c)

  def answers(questions):
    row = source.row(
      room.__class__(room.scene, room.world_from_camera, room.view, questions)
    )
    return forward(params, {k: v[None] for k, v in row.items()})[0]

  params = tiny.random(jax.eval_shape(build(c).init, jax.random.key(0)))
  packed = answers(asked)
  for number, question in enumerate(asked[:3]):
    alone = answers([question])[0]
    np.testing.assert_allclose(packed[number], alone, rtol=1e-4, atol=1e-4)


def test_scores_are_the_benchmarks():
  from spatial_jax.world.questions import Question

  pairs = [
    (
      Question("object_rel_direction_easy", "", "A", ("A. left", "B. right")),
      "A",
    ),
    (Question("object_rel_direction_hard", "", "B", ("A. a", "B. b")), "A"),
    (Question("room_size_estimation", "", "20.0", value=20.0), "20"),
    (Question("camera_nearer", "", "A", ("A. a", "B. b")), "A"),
  ]
  got = vsi.score(pairs)
  assert got["macro"] == pytest.approx((50 + 100) / 2)
  assert got["per_type"]["camera_nearer"]["score"] == 100
  assert got["per_type"]["room_size_estimation"]["chance"] == 100
