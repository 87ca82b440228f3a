# SPDX-License-Identifier: Apache-2.0
"""Starting values of a decoder that learn to look at what is alike sooner."""

from __future__ import annotations

import jax.numpy as jnp


def match_query_key(
  params: dict,
  layers: int,
  gain: float,
  head_dim: int = 128,
  repel: float = 0.0,
) -> dict:
  """Parameters whose first layers start with equal queries and keys.

  Attention then starts as similarity of contents, so that a word looks at
  tokens like it from the first step on. Both projections become `gain` times
  the key projection; each query head equals the key head of its group.

  What is most like a word is the word itself, which would take nearly all of
  the attention. So words also get a vector in common, and the first half of
  the heads a query bias against it: these heads look away from text, at images.

  Args:
    params: those of a decoder, or of a model that holds one under "llm".
    layers: how many of the first layers.
    gain: factor of both projections.
    head_dim: width of a head.
    repel: strength of the bias; 1 cancels the attraction of equal words by
      about half, 0 leaves words and biases as they are.
  """
  if "llm" in params:
    llm = match_query_key(params["llm"], layers, gain, head_dim, repel)
    return {**params, "llm": llm}
  block = params["blocks"]
  attention = block["attention"]
  query = attention["query"]["kernel"]  # [L D N*H]
  key = attention["key"]["kernel"]  # [L D K*H]
  same = key
  if query.shape != key.shape:
    heads = key.reshape(*key.shape[:2], -1, head_dim)  # [L D K H]
    groups = query.shape[-1] // key.shape[-1]
    same = jnp.repeat(heads, groups, axis=2).reshape(query.shape)
  first = jnp.arange(query.shape[0])[:, None, None] < layers
  query = jnp.where(first, gain * same, query)
  key = jnp.where(first, gain * key, key)
  attention = {
    **attention,
    "query": {**attention["query"], "kernel": query},
    "key": {**attention["key"], "kernel": key},
  }
  params = {**params, "blocks": {**block, "attention": attention}}
  if not repel:
    return params
  table = params["embed"]["embedding"]
  common = jnp.where(jnp.arange(table.shape[1]) % 2, 1.0, -1.0)
  common = common * jnp.sqrt(jnp.mean(table**2))
  # As the norm before the projections sees it, for rows of the table's size.
  seen = common / jnp.sqrt(jnp.mean(table**2) + jnp.mean(common**2))
  bias = attention["query"]["bias"]  # [L N*H]
  away = -repel * jnp.einsum("d,ldk->lk", seen, query)
  half = jnp.arange(bias.shape[1]) < bias.shape[1] // head_dim // 2 * head_dim
  bias = bias + jnp.where(first[..., 0] & half[None], away, 0.0)
  attention["query"]["bias"] = bias
  params["embed"] = {**params["embed"], "embedding": table + common[None]}
  return params
