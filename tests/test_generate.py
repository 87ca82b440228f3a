# SPDX-License-Identifier: Apache-2.0
"""Decoding with a cache equals running the whole model again and again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from spatial_jax import generate as decoding
from spatial_jax import sharding
from spatial_jax.generate import generate, sample
from spatial_jax.models import qwen2_5_vl

IMAGE, VOCAB, NEW = 31, 32, 10
MODEL = qwen2_5_vl.Model(
  vit=FrozenConfigDict(
    {
      "width": 16,
      "layers": 1,
      "heads": 2,
      "mlp": 16,
      "out_width": 32,
      "patch": 2,
      "temporal_patch": 1,
      "window": 0,
    }
  ),
  llm=FrozenConfigDict(
    {
      "vocab": VOCAB,
      "width": 32,
      "layers": 2,
      "heads": 4,
      "kv_heads": 2,
      "mlp": 32,
      "sections": (1, 1, 2),
      "embed_std": 0.1,
      "tied": False,
    }
  ),
  grid=(1, 4, 4),
  image_token=IMAGE,
)
FULL = jax.jit(
  lambda params, batch: MODEL.apply({"params": params}, **batch)[0]
)


def prompts(lengths, side, with_image=True, seed=0):
  """Prompts of these lengths, padded to the longest."""
  rng = np.random.default_rng(seed)
  B, T = len(lengths), max(lengths)
  tokens = np.zeros((B, T), np.int32)
  segments = np.zeros((B, T), np.int32)
  positions = np.ones((B, 3, T), np.int32)
  for b, n in enumerate(lengths):
    place = slice(T - n, T) if side == "left" else slice(0, n)
    tokens[b, place] = rng.integers(1, IMAGE, n)
    if with_image:
      tokens[b, place][1:5] = IMAGE
    segments[b, place], positions[b, :, place] = 1, np.arange(n)
  batch = {"tokens": tokens, "segments": segments, "positions": positions}
  if with_image:
    batch["patches"] = rng.normal(size=(B, 16, 12)).astype(np.float32)
  return batch


@functools.cache
def params():
  init = jax.jit(MODEL.init)
  return init(jax.random.key(1), **prompts([8, 6], "left"))["params"]


def without_cache(row, count):
  """Greedy continuation of one unpadded row by whole forward passes."""
  row = {name: array[None] for name, array in row.items()}
  n = row["tokens"].shape[1]
  pad = [(0, 0), (0, count)]
  batch = {
    **row,
    "tokens": np.pad(row["tokens"], pad),
    "segments": np.pad(row["segments"], pad, constant_values=1),
    "positions": np.broadcast_to(
      np.arange(n + count, dtype=np.int32), (1, 3, n + count)
    ),
  }
  for t in range(n, n + count):
    logits = FULL(params(), batch)
    batch["tokens"][:, t] = np.argmax(logits[:, t - 1], axis=-1)
  return batch["tokens"][0, n:]


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decoding_of_a_padded_batch_equals_single_full_rows(side):
  batch = prompts([8, 6], side)
  tokens, length = generate(
    MODEL, params(), batch, max_new_tokens=NEW, stop_ids=()
  )
  assert length.tolist() == [NEW, NEW]
  assert len(np.unique(tokens)) > 4  # not the same again and again
  assert not np.any(tokens == IMAGE)  # without patches it would be a word
  for b, n in enumerate([8, 6]):
    place = slice(8 - n, 8) if side == "left" else slice(0, n)
    row = {name: array[b] for name, array in batch.items()}
    row["tokens"], row["segments"] = (
      row["tokens"][place],
      row["segments"][place],
    )
    np.testing.assert_array_equal(tokens[b], without_cache(row, NEW))


def test_a_row_ends_at_a_stop_token_and_the_others_go_on():
  batch = prompts([8, 6], "left")
  free, _ = generate(MODEL, params(), batch, max_new_tokens=NEW, stop_ids=())
  free = np.asarray(free)
  stop = int(free[0, 2])
  tokens, length = generate(
    MODEL, params(), batch, max_new_tokens=NEW, stop_ids=(stop,), pad_id=7
  )
  for b in range(2):
    hits = np.flatnonzero(free[b] == stop)
    end = hits[0] + 1 if len(hits) else NEW
    assert length[b] == end
    np.testing.assert_array_equal(tokens[b, :end], free[b, :end])
    assert np.all(tokens[b, end:] == 7)
  assert length[0] <= 3


def test_text_without_images_is_continued():
  batch = prompts([5, 7], "right", with_image=False)
  tokens, _ = generate(MODEL, params(), batch, max_new_tokens=4, stop_ids=())
  row = {name: array[0][..., :5] for name, array in batch.items()}
  np.testing.assert_array_equal(tokens[0], without_cache(row, 4))


def test_decoding_inside_another_program_gives_the_same_tokens():
  batch = prompts([8, 6], "left")
  run = functools.partial(generate, MODEL, max_new_tokens=4, stop_ids=())
  want, _ = run(params(), batch)
  with jax.set_mesh(sharding.mesh(devices=jax.devices()[:1])):
    got, _ = jax.jit(run)(params(), batch)
  np.testing.assert_array_equal(got, want)


def test_on_a_tpu_a_cache_is_written_where_it_lies():
  batch = prompts([8, 6], "left")
  want, _ = generate(MODEL, params(), batch, max_new_tokens=4, stop_ids=())
  read, write = decoding._programs((), (), keep=True)
  cache, found = read(MODEL, params(), batch, 4)
  tokens, _, after = write(
    MODEL,
    params(),
    cache,
    found,
    jax.random.key(0),
    max_new_tokens=4,
    stop_ids=(),
    temperature=0.0,
    top_p=1.0,
    pad_id=0,
    keep=True,
  )
  np.testing.assert_array_equal(tokens, want)
  assert all(x.is_deleted() for x in jax.tree.leaves(cache))
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, cache)


def test_a_key_decides_what_is_sampled():
  batch = prompts([8, 6], "left")

  def draw(seed):
    return generate(
      MODEL,
      params(),
      batch,
      max_new_tokens=NEW,
      stop_ids=(),
      temperature=2.0,
      top_p=0.9,
      key=jax.random.key(seed),
    )[0]

  np.testing.assert_array_equal(draw(0), draw(0))
  assert np.any(draw(0) != draw(1))


def test_sampling_without_a_key_is_refused():
  with pytest.raises(ValueError, match="needs a random key"):
    generate(
      MODEL,
      params(),
      prompts([8, 6], "left"),
      max_new_tokens=2,
      stop_ids=(),
      temperature=1.0,
    )


def test_samples_follow_the_distribution_within_top_p():
  probability = np.array([0.5, 0.3, 0.15, 0.05])
  logits = jnp.broadcast_to(jnp.log(probability), (4000, 4))

  def frequency(top_p):
    ids = sample(logits, jax.random.key(0), temperature=1.0, top_p=top_p)
    return np.bincount(ids, minlength=4) / len(ids)

  np.testing.assert_allclose(frequency(1.0), probability, atol=0.03)
  # 0.5 + 0.3 reaches 0.7: the two others are never drawn.
  kept = np.array([0.625, 0.375, 0, 0])
  np.testing.assert_allclose(frequency(0.7), kept, atol=0.03)
  np.testing.assert_array_equal(frequency(0.0), [1, 0, 0, 0])
