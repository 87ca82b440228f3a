# SPDX-License-Identifier: Apache-2.0
"""What must hold of a decoder with any weights: causality, padding, packing."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax import losses, sharding
from spatial_jax.data import positions
from spatial_jax.models import llm, llm_start
from spatial_jax.nn import attention as attentions
from spatial_jax.plan import cost

LLM = {
  "vocab": 40,
  "width": 32,
  "layers": 2,
  "heads": 4,
  "kv_heads": 2,
  "mlp": 32,
  "sections": (1, 1, 2),
  "embed_std": 1.0,
}
IMAGE = 39


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, *args, **kwargs):
  return model.apply(params, *args, **kwargs)


def rng_tokens(*shape, seed=0):
  return np.random.default_rng(seed).integers(1, IMAGE, shape, dtype=np.int32)


def text_batch(tokens, segments=None):
  B, T = tokens.shape
  if segments is None:
    segments = np.ones((B, T), np.int32)
  ids = np.stack(
    [
      positions.mrope(row, segments=mine)[0]
      for row, mine in zip(tokens, segments, strict=True)
    ]
  )
  return {"tokens": tokens, "segments": segments, "positions": ids}


@functools.cache
def decoder(**overrides):
  model = llm.Model(**LLM, **overrides)
  params = jax.jit(model.init)(
    jax.random.key(0), **text_batch(rng_tokens(1, 4))
  )
  return model, params


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("position", [0, 3, 6])
def test_a_logit_depends_on_earlier_tokens_only(position):
  model, params = decoder()
  batch = text_batch(rng_tokens(1, 7))
  embeddings = jax.random.normal(jax.random.key(1), (1, 7, 32))

  def chosen(embeddings):
    logits, _ = run(model, params, **batch, embeddings=embeddings)
    return jnp.sum(logits[0, position] ** 2)

  reach = np.any(
    np.asarray(jax.jit(jax.grad(chosen))(embeddings)[0]) != 0, axis=-1
  )
  np.testing.assert_array_equal(reach, np.arange(7) <= position)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logit(side):
  model, params = decoder()
  tokens = rng_tokens(2, 6)
  want, _ = run(model, params, **text_batch(tokens))
  pad = ((0, 0), (3, 0) if side == "left" else (0, 3))
  place = slice(3, 9) if side == "left" else slice(0, 6)
  batch = text_batch(
    np.pad(tokens, pad, constant_values=17), np.pad(np.ones((2, 6), int), pad)
  )
  got, _ = run(model, params, **batch)
  close(got[:, place], want)


def test_packed_segments_equal_rows_of_their_own():
  model, params = decoder()
  a, b = rng_tokens(1, 5), rng_tokens(1, 4, seed=1)
  packed = text_batch(
    np.concatenate([a, b, 0 * b[:, :2]], axis=1),
    np.array([[1] * 5 + [2] * 4 + [0] * 2]),
  )
  got, _ = run(model, params, **packed)
  close(got[:, :5], run(model, params, **text_batch(a))[0])
  close(got[:, 5:9], run(model, params, **text_batch(b))[0])


def test_questions_after_shared_tokens_equal_rows_of_one_question():
  model, params = decoder()
  prefix, a, b = rng_tokens(6), rng_tokens(4, seed=1), rng_tokens(3, seed=2)
  tokens = np.concatenate([prefix, a, b])
  segments = np.array([1] * 6 + [2] * 4 + [3] * 3, np.int32)
  shared = segments == 1
  ids, _ = positions.mrope(tokens, segments=segments, shared=shared)
  np.testing.assert_array_equal(ids[0], [*range(6), 6, 7, 8, 9, 6, 7, 8])
  batch = (tokens[None], ids[None], segments[None], shared[None])
  got, _ = run(model, params, *batch)
  for question, place in ((a, slice(6, 10)), (b, slice(10, 13))):
    row = np.concatenate([prefix, question])[None]
    want, _ = run(model, params, **text_batch(row))
    close(got[:, place], want[:, 6:])
  # The same in chunks, as rows of a fixed form are computed.
  row = np.concatenate([prefix, a, b, rng_tokens(1)])
  segments = np.array([1] * 6 + [2] * 4 + [3] * 3 + [0], np.int32)
  shared = segments == 1
  ids, _ = positions.mrope(row, segments=segments, shared=shared)
  batch = (row[None], ids[None], segments[None], shared[None])
  chunked = llm.Model(**LLM, packing=(6, 4))
  close(run(chunked, params, *batch)[0][:, :13], got)


def test_scan_and_recomputation_options_change_no_number():
  params = decoder()[1]
  batch = text_batch(rng_tokens(2, 6))

  def outcome(**overrides):
    model = llm.Model(**LLM, **overrides)

    def loss(params):
      logits, _ = run(model, params, **batch)
      return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

    return jax.jit(jax.value_and_grad(loss))(params)

  want = outcome()
  for overrides in (
    {"unroll": 2},
    {"remat": "full"},
    {"remat": "attention"},
    {"remat": "products"},
    {"remat": "dots_with_no_batch_dims_saveable"},
    {"one_hot": True},
  ):
    jax.tree.map(close, outcome(**overrides), want)
  with pytest.raises(ValueError, match="remat='dots' is unknown"):
    outcome(remat="dots")


@pytest.mark.parametrize(
  "tokens, parts", [(0, 1), (12, 1), (6, 2), (5, 4), (1, 6)]
)
def test_a_chunked_loss_equals_the_whole_loss(tokens, parts):
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(2, 6, 8)).astype(np.float32)
  kernel = rng.normal(size=(8, 11)).astype(np.float32)
  labels = rng.integers(0, 11, (2, 6))
  weight = rng.random((2, 6)).astype(np.float32)

  def whole(hidden, kernel):
    loss, metrics = losses.next_token(hidden @ kernel, labels, weight)
    return 3 * loss, metrics

  def chunked(hidden, kernel):
    loss, metrics = losses.next_token_of(hidden, kernel, labels, weight, tokens)
    return 3 * loss, metrics

  arguments = hidden, kernel
  got, want = (
    jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(*arguments)
    for f in (chunked, whole)
  )
  jax.tree.map(close, got, want)
  close(jax.jit(chunked)(*arguments)[0], want[0][0])  # without gradients
  # One product there and two back, of as many parts, and none done again.
  step = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))
  counted = cost.flops(cost.trace(step, *arguments), 128)
  length = parts * -(-6 // parts)
  assert counted.model == counted.program == 3 * 2 * 2 * length * 8 * 11
  # The gradient of a kernel that isn't trained is not computed.
  frozen = jax.jit(jax.grad(chunked, has_aux=True)).lower(*arguments).compile()
  assert frozen.as_text().count(" dot(") == 2
  # By hand: log-softmax of the labels.
  log_p = jax.nn.log_softmax(hidden @ kernel)
  chosen = np.take_along_axis(np.asarray(log_p), labels[..., None], -1)[..., 0]
  close(want[0][0], -3 * np.sum(chosen * weight) / np.sum(weight))
  with pytest.raises(ValueError, match="loss_tokens=-1"):
    losses.next_token_of(hidden, kernel, labels, weight, -1)


@pytest.mark.parametrize("devices, tied", [(1, False), (4, True)])
@pytest.mark.parametrize("labelled", [0, 1, 64, 65, 200, 300, 385, 512])
def test_a_loss_reads_about_as_many_tokens_as_have_labels(
  devices, tied, labelled
):
  """512 tokens a device; the first device has as many labels, others one."""
  rng = np.random.default_rng(labelled)
  rows, D, V = 4, 8, 11
  hidden = rng.normal(size=(devices, 512, D)).astype(np.float32)
  kernel = rng.normal(size=(D, V)).astype(np.float32)
  labels = rng.integers(0, V, (devices, 512))
  weight = np.zeros((devices, 512), np.float32)
  for device, count in enumerate([labelled, 1, 1, 1][:devices]):
    chosen = rng.permutation(512)[:count]
    weight[device, chosen] = rng.random(count) + 0.1
  shape = devices * rows, 512 // rows
  arrays = hidden.reshape(*shape, D), labels.reshape(shape)
  hidden, labels, weight = *arrays, weight.reshape(shape)

  def whole(hidden, kernel):
    loss, metrics = losses.next_token(hidden @ kernel, labels, weight)
    return 3 * loss, metrics

  def of_labels(hidden, kernel):
    loss, metrics = losses.next_token_of(
      hidden, kernel.T if tied else kernel, labels, weight, 200, tied=tied
    )
    return 3 * loss, metrics

  def run(function, *arguments):
    step = jax.value_and_grad(function, (0, 1), has_aux=True)
    return jax.jit(step)(*arguments)

  want = run(whole, hidden, kernel)
  # What isn't read can't spoil the rest: numbers that no label needs.
  # Of four parts of 128 tokens, the last one up to 1, 2, 4, 6 or 8 eighths.
  whole_parts, rest = divmod(labelled, 128)
  least = 128 * whole_parts
  least += next(x for x in (0, 16, 32, 64, 96, 128) if rest <= x)
  unread = np.flatnonzero(weight[:rows] == 0)[least - labelled :]
  spoiled = hidden.copy()
  spoiled.reshape(-1, D)[unread] = np.nan
  mesh = sharding.mesh(fsdp=devices, devices=jax.devices()[:devices])
  with jax.set_mesh(mesh):
    jax.tree.map(close, run(of_labels, spoiled, kernel), want)
    alone = jax.jit(of_labels)(spoiled, kernel)
  jax.tree.map(close, alone, want[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("on_mesh", [False, True])
def test_the_gradient_of_cross_entropy_is_that_of_its_definition(
  dtype, on_mesh
):
  rng = np.random.default_rng(0)
  logits = jnp.asarray(4 * rng.normal(size=(3, 5, 11)), dtype)
  logits = logits.at[0, 0, 2].set(-jnp.inf)  # a word that can't be
  labels = jnp.asarray(rng.integers(3, 11, (3, 5)))
  weight = jnp.asarray(rng.random((3, 5)), jnp.float32)

  def plain(logits):
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    return jnp.sum(-chosen * weight)

  def ours(logits):
    return jnp.sum(losses.token_losses(logits, labels)[0] * weight)

  mesh = sharding.mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh) if on_mesh else contextlib.nullcontext():
    got = jax.jit(jax.value_and_grad(ours))(logits)
    # What stands for no label counts nothing, and spoils nothing.
    _, correct = losses.token_losses(logits, labels)
    none, _ = losses.token_losses(logits, jnp.full_like(labels, -100))
  want = jax.value_and_grad(plain)(logits)
  assert got[1].dtype == logits.dtype
  for a, b in zip(got, want, strict=True):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  top = np.argmax(np.asarray(logits, np.float32), axis=-1)
  np.testing.assert_array_equal(correct, top == np.asarray(labels))
  assert np.all(np.isfinite(none))


def test_a_batch_without_labels_has_loss_zero():
  value, _ = losses.next_token(
    jnp.ones((1, 2, 3)), jnp.zeros((1, 2), int), jnp.zeros((1, 2))
  )
  assert value == 0


def test_layers_start_with_values_of_their_own():
  kernels = decoder()[1]["params"]["blocks"]["mlp"]
  for name, layer in kernels.items():
    first, second = np.asarray(layer["kernel"])
    assert not np.array_equal(first, second), name


def test_matched_layers_start_with_equal_queries_and_keys():
  _, params = decoder()
  params = params["params"]
  matched = llm_start.match_query_key({"llm": params}, 1, 1.5, head_dim=8)[
    "llm"
  ]
  old, new = (p["blocks"]["attention"] for p in (params, matched))
  key = np.asarray(old["key"]["kernel"]).reshape(2, 32, 2, 8)
  query = np.asarray(new["query"]["kernel"]).reshape(2, 32, 2, 2, 8)
  for group in range(2):
    close(query[0, :, :, group], 1.5 * key[0])
  close(new["key"]["kernel"][0], 1.5 * old["key"]["kernel"][0])
  for name in ("query", "key"):
    close(new[name]["kernel"][1], old[name]["kernel"][1])


# --- attention --------------------------------------------------------------


def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients():
  x = jax.random.normal(jax.random.key(0), (1, 3, 2, 4))
  mask = np.array([[[1, 0, 0], [0, 0, 0], [1, 1, 1]]], bool)
  attend = jax.jit(attentions.attention)
  out = np.asarray(attend(x, x, x, mask))
  assert np.all(out[0, 1] == 0)
  assert np.all(out[0, [0, 2]] != 0)
  grad = jax.jit(jax.grad(lambda x: jnp.sum(attend(x, x, x, mask))))(x)
  assert np.all(np.isfinite(np.asarray(grad)))


@pytest.mark.parametrize(
  "masked, biased",
  [
    (None, None),
    ((2, 5, 6), None),
    ((1, 1, 6), (2, 1, 6)),
    ((2, 1, 6), (1, 5, 6)),
    (None, (1, 1, 6)),
  ],
)
def test_attention_and_its_gradients_equal_their_definition(masked, biased):
  rng = np.random.default_rng(0)
  q = rng.normal(size=(2, 5, 4, 8)).astype(np.float32)
  k, v = rng.normal(size=(2, 2, 6, 2, 8)).astype(np.float32)
  mask = bias = None
  if masked:
    mask = rng.random(masked) < 0.6
    mask[..., 0] = True
  if biased:
    bias = rng.normal(size=biased).astype(np.float32)
  weight = rng.normal(size=q.shape).astype(np.float32)

  def definition(q, k, v, bias):
    k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(8)
    if biased:
      scores = scores + bias[:, None]
    if masked:
      scores = jnp.where(mask[:, None], scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)

  def ours(q, k, v, bias):
    return attentions.attention(q, k, v, mask, bias)

  def total(function, q, k, v, bias):
    out = function(q, k, v, bias)
    return jnp.sum(weight * out), out

  wanted = (0, 1, 2, 3) if biased else (0, 1, 2)
  got, want = (
    jax.jit(
      jax.grad(functools.partial(total, f), argnums=wanted, has_aux=True)
    )(q, k, v, bias)
    for f in (ours, definition)
  )
  jax.tree.map(close, got, want)


def test_what_attention_keeps_saves_its_products_in_the_backward_pass():
  def products(remat):
    model = llm.Model(**LLM, remat=remat)
    batch = text_batch(rng_tokens(2, 6))

    def loss(params):
      return jnp.sum(run(model, params, **batch)[0])

    text = str(jax.make_jaxpr(jax.grad(loss))(decoder()[1]))
    return text.count("dot_general[")

  # The scores, and what they read.
  assert products("full") - products("attention") == 2
