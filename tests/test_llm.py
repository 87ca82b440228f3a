# SPDX-License-Identifier: Apache-2.0
"""What the options of masks and decoders promise holds for any weights."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from safetensors import safe_open

from spatial_jax import generate, hf, trees
from spatial_jax.models import janus, llm
from spatial_jax.nn import attention, layers, rope

TOKENS = np.zeros((1, 8), np.int32)
GEMMA = {
  **llm.VARIANTS["gemma-2b"],
  "vocab": 20,
  "width": 16,
  "layers": 2,
  "heads": 4,
  "kv_heads": 2,
  "mlp": 24,
  "head_dim": 8,
}

# --- masks ------------------------------------------------------------------


def seen(mutual, segments=None):
  mutual = np.array([mutual])
  segments = np.ones_like(mutual) if segments is None else np.array([segments])
  mask = attention.packed_mask(segments, segments, mutual=(mutual, mutual))
  return np.asarray(mask[0]).astype(int).tolist()


def test_groups_see_each_other_both_ways():
  assert seen([1, 1, 1, 0, 0]) == [
    [1, 1, 1, 0, 0],
    [1, 1, 1, 0, 0],
    [1, 1, 1, 0, 0],
    [1, 1, 1, 1, 0],
    [1, 1, 1, 1, 1],
  ]
  blocks = attention.blocks(np.array([[False, False, True, True, False]]))
  assert blocks.tolist() == [[1, 1, 2, 3, 3]]
  assert seen(blocks[0]) == [
    [1, 1, 0, 0, 0],
    [1, 1, 0, 0, 0],
    [1, 1, 1, 0, 0],
    [1, 1, 1, 1, 1],
    [1, 1, 1, 1, 1],
  ]
  assert seen([0, 1, 0, 1, 0]) == [
    [1, 0, 0, 0, 0],
    [1, 1, 0, 1, 0],
    [1, 1, 1, 0, 0],
    [1, 1, 1, 1, 0],
    [1, 1, 1, 1, 1],
  ]
  # Not beyond a segment, nor in the padding.
  assert seen([1, 1, 1, 1, 1], [1, 1, 2, 2, 0]) == [
    [1, 1, 0, 0, 0],
    [1, 1, 0, 0, 0],
    [0, 0, 1, 1, 0],
    [0, 0, 1, 1, 0],
    [0, 0, 0, 0, 0],
  ]


def test_blocks_are_those_of_an_autoregressive_mask():
  rng = np.random.default_rng(0)
  starts = rng.random((20, 12)) < 0.4
  block = np.cumsum(starts, axis=1)
  want = block[:, None, :] <= block[:, :, None]
  mutual = attention.blocks(starts)
  segments = np.ones(starts.shape, np.int32)
  got = attention.packed_mask(segments, segments, mutual=(mutual, mutual))
  np.testing.assert_array_equal(got, want)


# --- the decoder ------------------------------------------------------------


@functools.cache
def tiny():
  """A decoder with all that Gemma has, its norms not at their start."""
  model = llm.Model(**GEMMA)
  params = jax.jit(model.init)(jax.random.key(0), TOKENS, TOKENS, TOKENS)
  params = jax.device_get(params["params"])
  rng = np.random.default_rng(0)
  noise = {
    name: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32)
    for name, leaf in trees.flatten(params).items()
  }
  return model, trees.unflatten(noise)


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, *args, **kwargs):
  return model.apply({"params": params}, *args, **kwargs)


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def text(B=2, T=10):
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, 20, (B, T), dtype=np.int32)
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
  return tokens, positions, np.ones((B, T), np.int32)


def test_text_may_have_one_row_of_positions_or_three():
  model, params = tiny()
  tokens, positions, segments = text()
  want, _ = run(model, params, tokens, positions, segments)
  three = np.stack([positions] * 3, axis=1)
  multimodal = llm.Model(**{**GEMMA, "sections": (1, 1, 2)})
  for other, ids in (
    (model, three),
    (multimodal, positions),
    (multimodal, three),
  ):
    close(run(other, params, tokens, ids, segments)[0], want)
  # Where the axes differ, only sections see it.
  three[:, 1:] = 0
  close(run(model, params, tokens, three, segments)[0], want)
  got, _ = run(multimodal, params, tokens, three, segments)
  assert np.max(np.abs(got - want)) > 1e-2


def test_cached_calls_in_blocks_equal_one_call():
  model, params = tiny()
  tokens, positions, segments = text()
  mutual = np.array([[1, 1, 1, 1, 2, 3, 3, 3, 0, 0]] * 2, np.int32)
  want, _ = run(model, params, tokens, positions, segments, mutual=mutual)
  causal, _ = run(model, params, tokens, positions, segments)
  assert np.max(np.abs(want - causal)) > 1e-2
  cache, parts = model.init_cache(2, 10), []
  for start, end in ((0, 5), (5, 10)):
    place = slice(start, end)
    logits, out = run(
      model,
      params,
      *(x[:, place] for x in (tokens, positions, segments)),
      cache=cache,
      mutual=mutual[:, place],
    )
    parts.append(logits)
    cache = out["cache"]
  close(np.concatenate(parts, axis=1), want)
  # A group may even go on in the next call, for its later tokens.
  assert cache["mutual"].tolist() == mutual.tolist()


def test_one_row_of_positions_serves_decoding():
  model, params = tiny()
  tokens, positions, segments = text()
  names = ("tokens", "positions", "segments")
  answers = [
    generate.generate(
      model,
      params,
      dict(zip(names, (tokens, ids, segments), strict=True)),
      max_new_tokens=4,
      stop_ids=(),
    )[0]
    for ids in (positions, np.stack([positions] * 3, axis=1))
  ]
  np.testing.assert_array_equal(*answers)


def test_new_tokens_are_read_from_a_table_of_their_own():
  embed = layers.Embed(5, 3, extra=2, scale=2.0)
  ids = np.array([[0, 4, 5, 6]])
  params = jax.jit(embed.init)(jax.random.key(0), ids)
  tables = trees.flatten(params["params"])
  both = np.concatenate([tables["embedding"], tables["new/embedding"]])
  close(embed.apply(params, ids), 2 * both[ids])
  hot = layers.Embed(5, 3, extra=2, scale=2.0, one_hot=True)
  close(hot.apply(params, ids), 2 * both[ids])
  logits = embed.apply(params, np.ones((1, 1, 3)), method="attend")
  close(logits[0, 0], tables["embedding"].sum(axis=1))


def test_stretched_frequencies_by_hand():
  freqs = np.array([1.0, 0.1, 0.01, 0.001], np.float32)
  # In 2 pi * 100 positions they turn 100, 10, 1 and 0.1 times.
  got = rope.stretch(freqs, 8.0, 1.0, 19.0, 2 * np.pi * 100)
  # 10 turns are half of the way from 1 to 19.
  np.testing.assert_allclose(
    got, [1.0, 0.5 * 0.1 + 0.5 * 0.1 / 8, 0.01 / 8, 0.001 / 8], rtol=1e-6
  )


def test_a_new_adaptive_block_adds_nothing():
  model = llm.Model(**{**GEMMA, "vocab": 0, "adaptive": True})
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 10, 16)).astype(np.float32)
  given = {
    "embeddings": x,
    "condition": rng.normal(size=(2, 16)).astype(np.float32),
  }
  _, positions, segments = text()
  params = jax.jit(model.init)(
    jax.random.key(0), None, positions, segments, **given
  )["params"]
  hidden, out = run(model, params, None, positions, segments, **given)
  assert "llm/embedding" not in out
  close(out["llm/blocks"], np.stack([x, x]))
  close(hidden, x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True)))


def test_an_adaptive_norm_by_hand():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, 4)).astype(np.float32)
  condition = rng.normal(size=(2, 5)).astype(np.float32)
  kernel = rng.normal(size=(5, 12)).astype(np.float32)
  bias = rng.normal(size=12).astype(np.float32)
  params = {"modulation": {"kernel": kernel, "bias": bias}}
  norm = layers.AdaptiveRMSNorm(1e-6)
  y, gate = norm.apply({"params": params}, x, condition)
  scale, shift, wanted = np.split((condition @ kernel + bias)[:, None], 3, -1)
  close(gate, wanted)
  rms = np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
  close(y, x / rms * (1 + scale) + shift)


def test_an_unset_image_token_is_an_error():
  tower = {"width": 8, "layers": 1, "heads": 2, "mlp": 12, "patch": 2}
  model = janus.Model(
    vit=FrozenConfigDict({**tower, "image": 4}), llm=FrozenConfigDict(GEMMA)
  )
  images = np.zeros((1, 1, 4, 4, 3), np.float32)
  with pytest.raises(ValueError, match="image_token is not set"):
    jax.eval_shape(
      lambda: model.init(jax.random.key(0), TOKENS, TOKENS, TOKENS, images)
    )


def test_two_streams_join_through_the_halves_of_a_block():
  """As in pi0.5, of whose PyTorch port the numbers are."""
  file = pathlib.Path(__file__).parent / "golden" / "llm"
  with safe_open(file / "joined_streams.safetensors", "numpy") as stream:
    data = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
  sizes = {"layers": 3, "heads": 4, "kv_heads": 1, "head_dim": 8, "vocab": 0}
  trunk = {**GEMMA, **sizes, "width": 32, "mlp": 48}
  action = {**GEMMA, **sizes, "width": 24, "mlp": 40, "adaptive": True}
  prefixes = "paligemma.model.language_model.", "gemma_expert.model."
  streams = []
  for options, prefix in zip((trunk, action), prefixes, strict=True):
    model = llm.Model(**options)
    given = {"embeddings": jnp.zeros((1, 8, options["width"]))}
    if model.adaptive:
      given["condition"] = jnp.zeros((1, 24))
    init = functools.partial(model.init, jax.random.key(0))
    shapes = jax.eval_shape(
      lambda x, init=init: init(None, TOKENS, TOKENS, **x)["params"], given
    )
    params = hf.load(
      hf.nest(llm.KEYS, f"paligemma_with_expert.{prefix}", ""),
      file / "joined_streams.safetensors",
      shapes,
      ignore=("",),  # the other stream, the time's MLP and outputs
    )
    streams.append((llm.Block(**model.block_options), params))

  def linear(x, name):
    return x @ data[f"{name}.weight"].T + data[f"{name}.bias"][None]

  condition = jax.nn.silu(linear(data["out.time_embedding"], "time_mlp_in"))
  condition = jax.nn.silu(linear(condition, "time_mlp_out"))
  conditions = None, condition
  rotary = rope.linear(data["out.position_ids"], 8, 1e4)
  mask = data["out.attn_allowed"]
  valid = np.diagonal(mask, axis1=1, axis2=2)
  split = data["out.prefix_hidden_0"].shape[1]
  parts = slice(0, split), slice(split, None)

  @jax.jit
  def layer(blocks, xs):
    halves = [
      block.apply(
        {"params": p},
        x,
        tuple(table[:, part] for table in rotary),
        given,
        method="project",
      )
      for (block, _), p, x, part, given in zip(
        streams, blocks, xs, parts, conditions, strict=True
      )
    ]
    heads = zip(*(half for half, _ in halves), strict=True)
    y = attention.attention(*(jnp.concatenate(h, 1) for h in heads), mask)
    return [
      block.apply({"params": p}, x, y[:, part], gate, given, method="merge")
      for (block, _), p, x, part, (_, gate), given in zip(
        streams, blocks, xs, parts, halves, conditions, strict=True
      )
    ]

  xs = [data["out.prefix_hidden_0"], data["out.suffix_hidden_0"]]
  for number in range(3):
    blocks = [
      jax.tree.map(lambda x: np.asarray(x)[number], p["blocks"])  # noqa: B023
      for _, p in streams
    ]
    xs = layer(blocks, xs)
    if number == 2:
      norm = layers.RMSNorm(1e-6, offset=1.0)
      xs[0] = norm.apply({"params": streams[0][1]["norm"]}, xs[0])
      norm = layers.AdaptiveRMSNorm(1e-6)
      xs[1], _ = norm.apply({"params": streams[1][1]["norm"]}, xs[1], condition)
    for x, name, part in zip(xs, ("prefix", "suffix"), parts, strict=True):
      want = data[f"out.{name}_hidden_{number + 1}"]
      error = np.max(np.abs(x - want)[valid[:, part]])
      assert error <= 1e-4 * np.max(np.abs(want)), (name, number)
