# SPDX-License-Identifier: Apache-2.0
"""Qwen2 / Qwen2.5 decoder: embed -> blocks (attention, gated MLP) -> logits.

Paper: https://arxiv.org/abs/2412.15115 (Qwen2.5). Weights: Qwen/Qwen2.5-*.
tokens -> embed [B T D] -> L x (RMSNorm, attention, RMSNorm, SwiGLU) -> RMSNorm
-> head [B T V].

Blocks are one scanned module: every block parameter has a leading layer axis.

Departures from the paper:
1. Positions are always (t, h, w) triples; text has three equal ones, which
   gives the one-dimensional rotary embedding of the text-only models.
2. Rows may hold several segments and keys shared by all of them; see
   `nn.attention.packed_mask`.

Letters: B batch, T queries, S keys, D width, N query heads, K kv heads,
H head dim, M mlp width, V vocabulary, L layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from spatial_jax import sharding
from spatial_jax.nn import rope
from spatial_jax.nn.attention import attention, chunked, packed_mask
from spatial_jax.nn.layers import (
  Dense,
  Embed,
  GatedMlp,
  RMSNorm,
  adapted_kernel,
)
from spatial_jax.types import Array, Bool, Float, Int

Cache = dict[str, Array]
Out = dict[str, Any]


def _variant(width, layers, heads, kv_heads, mlp, tied, vocab):
  return {
    "width": width,
    "layers": layers,
    "heads": heads,
    "kv_heads": kv_heads,
    "mlp": mlp,
    "tied": tied,
    "vocab": vocab,
  }


# width, layers, heads, kv heads, mlp, tied head, vocabulary
VARIANTS = {
  "qwen2.5-0.5b": _variant(896, 24, 14, 2, 4864, True, 151936),
  "qwen2.5-1.5b": _variant(1536, 28, 12, 2, 8960, True, 151936),
  "qwen2.5-3b": _variant(2048, 36, 16, 2, 11008, True, 151936),
  "qwen2.5-7b": _variant(3584, 28, 28, 4, 18944, False, 152064),
  "qwen2.5-14b": _variant(5120, 48, 40, 8, 13824, False, 152064),
  "qwen2.5-32b": _variant(5120, 64, 40, 8, 27648, False, 152064),
  "qwen2.5-72b": _variant(8192, 80, 64, 8, 29568, False, 152064),
}

# Names below "model." of a checkpoint; the head stands outside.
KEYS = (
  ("embed_tokens.weight", "embed/embedding"),
  *(
    (f"layers.{{i}}.{theirs}", f"blocks/{ours}")
    for theirs, ours in (
      ("input_layernorm.weight", "attention_norm/scale"),
      ("self_attn.q_proj.weight", "attention/query/kernel"),
      ("self_attn.q_proj.bias", "attention/query/bias"),
      ("self_attn.k_proj.weight", "attention/key/kernel"),
      ("self_attn.k_proj.bias", "attention/key/bias"),
      ("self_attn.v_proj.weight", "attention/value/kernel"),
      ("self_attn.v_proj.bias", "attention/value/bias"),
      ("self_attn.o_proj.weight", "attention/out/kernel"),
      ("post_attention_layernorm.weight", "mlp_norm/scale"),
      ("mlp.gate_proj.weight", "mlp/gate/kernel"),
      ("mlp.up_proj.weight", "mlp/up/kernel"),
      ("mlp.down_proj.weight", "mlp/down/kernel"),
    )
  ),
  ("norm.weight", "norm/scale"),
)


class Attention(nn.Module):
  """Grouped-query attention with a bias on query, key and value."""

  heads: int
  kv_heads: int
  head_dim: int
  dtype: str = "float32"
  packing: tuple[int, int] | None = None

  @nn.compact
  def __call__(self, x, mask, rotary, cache, index):
    B, T, D = x.shape

    def project(heads, name):
      y = Dense(heads * self.head_dim, dtype=self.dtype, name=name)(x)
      y = y.reshape(B, T, heads, self.head_dim)
      return sharding.constrain(y, "batch length act_heads head_dim")

    query = rope.rotate(project(self.heads, "query"), rotary)
    key = rope.rotate(project(self.kv_heads, "key"), rotary)
    value = project(self.kv_heads, "value")
    if cache is not None:
      # Every row writes the same slots; `segments` tells which are padding.
      key, value = cache = tuple(
        jax.lax.dynamic_update_slice_in_dim(
          old, new.astype(old.dtype), index, axis=1
        )
        for old, new in zip(cache, (key, value), strict=True)
      )
    if self.packing and cache is None:
      y = chunked(query, key, value, mask, *self.packing)
    else:
      y = attention(query, key, value, mask)
    y = y.reshape(B, T, -1)
    return Dense(D, use_bias=False, dtype=self.dtype, name="out")(y), cache


class Block(nn.Module):
  """One decoder layer, shaped for a scan: (x, ...) -> (x, (x, cache))."""

  heads: int
  kv_heads: int
  head_dim: int
  mlp: int
  eps: float
  dtype: str
  packing: tuple[int, int] | None

  @nn.compact
  def __call__(self, x, cache, mask, rotary, index):
    y = RMSNorm(self.eps, self.dtype, name="attention_norm")(x)
    y, cache = Attention(
      self.heads,
      self.kv_heads,
      self.head_dim,
      self.dtype,
      self.packing,
      name="attention",
    )(y, mask, rotary, cache, index)
    x = sharding.constrain(x + y, "batch length act_embed")
    y = RMSNorm(self.eps, self.dtype, name="mlp_norm")(x)
    y = GatedMlp(self.mlp, dtype=self.dtype, name="mlp")(y)
    x = sharding.constrain(x + y, "batch length act_embed")
    return x, (x, cache)


class Model(nn.Module):
  """Decoder of tokens or of embeddings that a caller has mixed."""

  vocab: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  mlp: int
  head_dim: int = 0  # 0: width / heads
  tied: bool = True
  theta: float = 1e6
  sections: tuple[int, ...] = (16, 24, 24)  # as published, for H = 128
  eps: float = 1e-6
  dtype: str = "float32"
  remat: str = "none"  # or "full", or a name in jax.checkpoint_policies
  unroll: int = 1  # layers per step of the scan
  embed_std: float = 0.02
  one_hot: bool = False  # read the table by a matrix product; see Embed
  # Tokens of the shared prefix and of a chunk after it: see attention.chunked.
  packing: tuple[int, int] | None = None

  def setup(self) -> None:
    self.embed = Embed(
      self.vocab, self.width, self.embed_std, self.one_hot, self.dtype
    )
    self.blocks = nn.scan(
      remat(Block, self.remat),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=self.layers,
      unroll=self.unroll,
    )(
      self.heads,
      self.kv_heads,
      self._head_dim,
      self.mlp,
      self.eps,
      self.dtype,
      self.packing,
    )
    self.norm = RMSNorm(self.eps, self.dtype)
    if not self.tied:
      self.head = Dense(self.vocab, use_bias=False, dtype=self.dtype)

  @property
  def _head_dim(self) -> int:
    return self.head_dim or self.width // self.heads

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B 3 T"],
    segments: Int[Array, "B T"],
    shared: Bool[Array, "B T"] | None = None,
    cache: Cache | None = None,
    *,
    embeddings: Float[Array, "B T D"] | None = None,
    last: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B logits V"], Out]:
    """Logits and intermediates.

    Args:
      segments: 0 is padding; tokens see their own segment only.
      shared: True for keys that every segment sees.
      cache: from `init_cache` or the `out` of the call before; the new tokens
        take its next T slots. The one to go on with is `out["cache"]`.
      embeddings: read instead of the tokens' rows of the table.
      last: the only token of each row whose logits are wanted [B 1 V].
    """
    x = self.embed(tokens) if embeddings is None else embeddings
    index = 0 if cache is None else cache["index"]
    if cache is None:
      mask = packed_mask(segments, segments, shared)
      pairs = None
    else:
      cache = _append(cache, segments, shared)
      mask = packed_mask(segments, cache["segments"], cache["shared"], index)
      pairs = cache["key"], cache["value"]
    rotary = rope.multimodal(
      positions, self._head_dim, self.theta, self.sections
    )
    out = {"llm/embedding": self.embed.embedding}
    x = sharding.constrain(x.astype(self.dtype), "batch length act_embed")
    x, (out["llm/blocks"], pairs) = self.blocks(x, pairs, mask, rotary, index)
    if cache is not None:
      out["cache"] = {**cache, "key": pairs[0], "value": pairs[1]}
    x = out["llm/hidden"] = self.norm(x)
    if last is not None:
      x = jnp.take_along_axis(x, last[:, None, None], axis=1)
    logits = self.embed.attend(x) if self.tied else self.head(x)
    return sharding.constrain(logits, "batch length act_vocab"), out

  def init_cache(self, batch: int, length: int) -> Cache:
    """Empty cache of `length` slots; needs no parameters."""
    shape = (self.layers, batch, length, self.kv_heads, self._head_dim)
    return {
      "key": jnp.zeros(shape, self.dtype),
      "value": jnp.zeros(shape, self.dtype),
      "segments": jnp.zeros((batch, length), jnp.int32),
      "shared": jnp.zeros((batch, length), bool),
      "index": jnp.zeros((), jnp.int32),
    }


def _append(cache, segments, shared):
  """Cache whose next slots belong to the given segments."""
  if shared is None:
    shared = jnp.zeros(segments.shape, bool)

  def write(old, new):
    new = new.astype(old.dtype)
    return jax.lax.dynamic_update_slice_in_dim(old, new, cache["index"], axis=1)

  return {
    **cache,
    "segments": write(cache["segments"], segments),
    "shared": write(cache["shared"], shared),
    "index": cache["index"] + segments.shape[1],
  }


def remat(block: type[nn.Module], policy: str) -> type[nn.Module]:
  """Block that recomputes its activations in the backward pass."""
  if policy == "none":
    return block
  known = None
  if policy != "full":
    known = getattr(jax.checkpoint_policies, policy, None)
    if known is None:
      raise ValueError(
        f"remat={policy!r} is unknown; use 'none', 'full' or a name in "
        "jax.checkpoint_policies such as 'dots_with_no_batch_dims_saveable'"
      )
  # The scan around it already prevents common subexpression elimination.
  return nn.remat(block, prevent_cse=False, policy=known)


def head_kernel(params: dict) -> Float[Array, "D V"]:
  """Output projection of a decoder's parameters, tied or not."""
  if "head" in params:
    return adapted_kernel(params["head"])
  return params["embed"]["embedding"].T


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
