# SPDX-License-Identifier: Apache-2.0
"""Text from a model: one pass over the prompts, then token by token.

A model that can generate has `init_cache(batch, length)` and an `__call__`
that takes tokens, positions, segments, cache and last; see `models.llm.Model`.

Letters: B batch, T prompt length, V vocabulary.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from spatial_jax import sharding
from spatial_jax.types import Array, Float, Int


def generate(
  model: nn.Module,
  params: Any,
  batch: Mapping[str, Any],
  *,
  max_new_tokens: int,
  stop_ids: tuple[int, ...],
  temperature: float = 0.0,
  top_p: float = 1.0,
  key: Array | None = None,
  pad_id: int = 0,
) -> tuple[Int[Array, "B new"], Int[Array, " B"]]:
  """Continues every row of a batch.

  Prompts may be padded on either side, where `segments` is 0. Each row has one
  segment, apart from shared tokens. Compiles two programs: one reads prompts,
  one writes answers.

  Args:
    model: hashable, as `models.build` makes it.
    batch: keyword arguments of the model: tokens, positions, segments and, for
      prompts with images, patches and layout.
    stop_ids: tokens that end a row; they count as part of the answer.
    temperature: 0 takes the most likely token.
    top_p: samples among the likeliest tokens that reach this probability.
    key: of `jax.random`, needed when temperature is above 0.
    pad_id: what fills a row after its end.

  Returns:
    new tokens and how many of each row are valid.
  """
  if temperature > 0 and key is None:
    raise ValueError(f"temperature={temperature} needs a random key")
  if isinstance(batch["tokens"], jax.core.Tracer):
    options = (), ()  # those of the program that this is a part of
  else:
    options = (
      tuple(sharding.compiler_options(few_rows=x).items())
      for x in (False, True)
    )
  keep = (sharding.platform() or jax.default_backend()) == "tpu"
  read, write = _programs(*options, keep=keep)
  cache, found = read(model, params, dict(batch), max_new_tokens)
  tokens, lengths, _ = write(
    model,
    params,
    cache,
    found,
    jax.random.key(0) if key is None else key,
    max_new_tokens=max_new_tokens,
    stop_ids=stop_ids,
    temperature=temperature,
    top_p=top_p,
    pad_id=pad_id,
    keep=keep,
  )
  return tokens, lengths


@functools.cache
def _programs(of_read, of_write, *, keep):
  """`_read` and `_write`, compiled with these options.

  With `keep` the stacks of layers stay, and the cache is written where it lies.
  """
  names = "model max_new_tokens stop_ids temperature top_p pad_id keep"
  write = jax.jit(
    _write,
    static_argnames=tuple(names.split()),
    donate_argnames=("cache",) if keep else (),
    compiler_options=dict(of_write),
  )
  read = jax.jit(_read, static_argnums=(0, 3), compiler_options=dict(of_read))
  return read, write


def _read(model, params, batch, room):
  """Cache of the prompts with room for so many tokens, and what comes next."""
  tokens, segments = batch["tokens"], batch["segments"]
  B, T = tokens.shape
  # The last valid token of each row, whichever side the padding is on.
  last = T - 1 - jnp.argmax((segments > 0)[:, ::-1], axis=1)
  positions = batch["positions"]  # [B T] or [B 3 T]
  axes = tuple(range(1, positions.ndim))
  valid = jnp.expand_dims(segments > 0, axes[:-1])
  position = jnp.max(jnp.where(valid, positions, 0), axis=axes) + 1
  cache = model.init_cache(B, T + room)
  logits, cache = _call(model, params, **batch, cache=cache, last=last)
  return (
    cache,
    {
      "logits": logits,
      "segment": jnp.take_along_axis(segments, last[:, None], axis=1),  # [B 1]
      "position": jnp.broadcast_to(
        jnp.expand_dims(position, axes), (*positions.shape[:-1], 1)
      ),
    },
  )


def _call(model, params, **kwargs):
  logits, out = model.apply({"params": params}, **kwargs)
  return logits[:, 0], out["cache"]


def _write(
  model,
  params,
  cache,
  found,
  key,
  *,
  max_new_tokens,
  stop_ids,
  temperature,
  top_p,
  pad_id,
  keep,
):
  """Tokens after what `_read` has read, how many are valid, and the cache."""
  segment, position = found["segment"], found["position"]
  B = len(segment)
  keys = jax.random.split(key, max_new_tokens)
  stops = jnp.array(stop_ids or (-1,), jnp.int32)
  if not keep:
    params, cache = apart(params, cache)

  def is_running(state):
    return (state["step"] < max_new_tokens) & ~jnp.all(state["done"])

  def step(state):
    # Rows that have ended write tokens of segment 0, which nobody sees.
    logits, cache = _call(
      model,
      params,
      tokens=state["token"][:, None],
      positions=state["position"],
      segments=jnp.where(state["done"][:, None], 0, segment),
      cache=state["cache"],
      last=jnp.zeros(B, jnp.int32),
    )
    return emit({**state, "cache": cache}, logits)

  def emit(state, logits):
    token = sample(
      logits, keys[state["step"]], temperature=temperature, top_p=top_p
    )
    token = jnp.where(state["done"], pad_id, token)
    return {
      "cache": state["cache"],
      "token": token,
      "tokens": state["tokens"].at[:, state["step"]].set(token),
      "position": state["position"] + 1,
      "length": state["length"] + ~state["done"],
      "done": state["done"] | jnp.isin(token, stops),
      "step": state["step"] + 1,
    }

  state = emit(
    {
      "cache": cache,
      "tokens": jnp.full((B, max_new_tokens), pad_id, jnp.int32),
      # One before: `emit` adds one for the token that it picks.
      "position": position - 1,
      "length": jnp.zeros(B, jnp.int32),
      "done": jnp.zeros(B, bool),
      "step": jnp.zeros((), jnp.int32),
    },
    found["logits"],
  )
  state = jax.lax.while_loop(is_running, step, state)
  # What is donated must be returned to be written where it lies.
  return state["tokens"], state["length"], state["cache"] if keep else None


def apart(params: Any, cache: Any) -> tuple[Any, Any]:
  """Parameters and cache of a decoder by layer, without their stacks.

  On CPU and GPU, XLA copies a layer out of its stack before it multiplies with
  it: a token would move all weights three times.
  """
  if "llm" in params:
    inner, cache = apart(params["llm"], cache)
    return {**params, "llm": inner}, cache
  layers = range(len(cache["key"]))

  def take(stack):
    return [jax.tree.map(operator.itemgetter(i), stack) for i in layers]

  both = {name: take(cache[name]) for name in ("key", "value")}
  return {**params, "blocks": take(params["blocks"])}, {**cache, **both}


def sample(
  logits: Float[Array, "B V"],
  key: Array,
  *,
  temperature: float,
  top_p: float,
) -> Int[Array, " B"]:
  """One token of each row."""
  if temperature <= 0:
    # As `argmax`, whose pairs of numbers and places XLA reduces one by one on
    # CPU: a fiftieth of a small model's token.
    top = jnp.max(logits, axis=-1, keepdims=True)
    place = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.min(
      jnp.where(logits >= top, place, logits.shape[-1] - 1), axis=-1
    )
  logits = logits.astype(jnp.float32) / temperature
  if top_p < 1:
    ordered = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # The likeliest token stays even with top_p = 0.
    kept = jnp.sum(before < top_p, axis=-1).clip(1)
    least = jnp.take_along_axis(ordered, kept[:, None] - 1, axis=-1)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
