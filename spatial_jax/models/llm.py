# SPDX-License-Identifier: Apache-2.0
"""Decoders by variant: Llama, Vicuna, Yi, DeepSeek, Qwen, Gemma, Molmo2.

Papers: https://arxiv.org/abs/2307.09288 (Llama 2), 2407.21783 (Llama 3),
2412.15115 (Qwen2.5), 2505.09388 (Qwen3), 2403.08295 (Gemma), 2503.19786 (Gemma
3). Weights and names of tensors: see `llm_variants`.
tokens -> embed [B T D] -> L x (RMSNorm, attention, RMSNorm, gated MLP)
-> RMSNorm -> head [B T V].

Blocks are one scanned module: every block parameter has a leading layer axis.

Departures from the papers:
1. Positions may be (t, h, w) triples, of which text has three equal ones; this
   equals the one-dimensional rotary embedding of the text-only models.
2. Rows may hold several segments, keys shared by all of them, and groups of
   tokens that see each other both ways; see `nn.attention.packed_mask`.

Letters: B batch, T queries, S keys, D width, N query heads, K kv heads,
H head dim, M mlp width, V vocabulary, L layers, C condition width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from spatial_jax import losses, sharding
from spatial_jax.models import llm_variants
from spatial_jax.nn import edit as edits
from spatial_jax.nn import kv_cache, rope, slots
from spatial_jax.nn.attention import (
  KEPT,
  READ,
  attention,
  chunked,
  packed_mask,
)
from spatial_jax.nn.layers import (
  AdaptiveRMSNorm,
  Dense,
  Embed,
  GatedMlp,
  RMSNorm,
  adapted_kernel,
  scan_layers,
)
from spatial_jax.types import Array, Bool, Float, Int

Cache = kv_cache.Cache
Out = dict[str, Any]

VARIANTS = llm_variants.VARIANTS
KEYS = llm_variants.KEYS  # below "model."; the head stands outside


class Mask(struct.PyTreeNode):
  """Which keys a query sees, and what is known of them while tracing."""

  seen: Bool[Array, "B T S"]
  causal: bool = struct.field(pytree_node=False)  # they end with its own
  alone: bool = struct.field(pytree_node=False)  # none is from the cache


class Attention(nn.Module):
  """The linear layers around grouped-query attention."""

  width: int
  heads: int
  kv_heads: int
  head_dim: int
  bias: bool = True  # of query, key and value
  qk_norm: bool = False
  eps: float = 1e-6
  dtype: str = "float32"
  norm_offset: float = 0.0

  def setup(self) -> None:
    def dense(heads):
      return Dense(heads * self.head_dim, self.bias, self.dtype)

    self.query = dense(self.heads)
    self.key = dense(self.kv_heads)
    self.value = dense(self.kv_heads)
    self.out = Dense(self.width, use_bias=False, dtype=self.dtype)
    if self.qk_norm:
      self.query_norm = RMSNorm(self.eps, self.dtype, self.norm_offset)
      self.key_norm = RMSNorm(self.eps, self.dtype, self.norm_offset)

  def project(
    self, x: Float[Array, "B T D"], rotary: rope.Rotary
  ) -> tuple[Array, Array, Array]:
    """Rotated query [B T N H] and key, and value [B T K H]."""

    def heads(dense):
      y = dense(x).reshape(*x.shape[:2], -1, self.head_dim)
      return sharding.constrain(y, "batch length act_heads head_dim")

    query, key = heads(self.query), heads(self.key)
    if self.qk_norm:
      query, key = self.query_norm(query), self.key_norm(key)
    query, key = rope.rotate(query, rotary), rope.rotate(key, rotary)
    return tuple(
      checkpoint_name(x, READ) for x in (query, key, heads(self.value))
    )

  def merge(self, y: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
    """What the heads have read, as one vector per token."""
    return self.out(y.reshape(*y.shape[:2], -1))


class Block(nn.Module):
  """One decoder layer, shaped for a scan: (x, ...) -> (x, (x, cache)).

  `project` and `merge` are its halves before and after attention, for models
  in which several streams attend to each other.
  """

  width: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp_width: int
  bias: bool = True
  qk_norm: bool = False
  activation: str = "silu"
  norm_offset: float = 0.0
  adaptive: bool = False
  eps: float = 1e-6
  dtype: str = "float32"
  packing: tuple[int, int] | None = None
  post_norm: bool = False
  full_every: int = 0  # above 0, masks and rotary tables are pairs

  def setup(self) -> None:
    self.attention_norm = _norm(self)
    self.attention = Attention(
      self.width,
      self.heads,
      self.kv_heads,
      self.head_dim,
      self.bias,
      self.qk_norm,
      self.eps,
      self.dtype,
      self.norm_offset,
    )
    self.mlp_norm = _norm(self)
    if self.post_norm:
      self.attention_post_norm = _norm(self)
      self.mlp_post_norm = _norm(self)
    self.mlp = GatedMlp(
      self.mlp_width, dtype=self.dtype, activation=self.activation
    )

  def __call__(
    self,
    x,
    cache,
    mask,
    rotary,
    index,
    condition=None,
    inject=None,
    number=None,
    edit=None,
  ):
    if self.full_every:
      is_full = (number + 1) % self.full_every == 0
      mask, rotary = (
        jax.tree.map(functools.partial(jnp.where, is_full), *pair)
        for pair in (mask, rotary)
      )
    heads, gate = self.project(x, rotary, condition)
    y, cache = self._attend(*heads, mask, cache, index)
    x = self.merge(x, y, gate, condition)
    if inject is not None:
      x = inject(x)
    if edit is not None:
      x = edits.apply(edit, x, number + 1)
    return x, (x, cache)

  def project(
    self,
    x: Float[Array, "B T D"],
    rotary: rope.Rotary,
    condition: Float[Array, "B C"] | None = None,
  ) -> tuple[tuple[Array, Array, Array], Float[Array, "B 1 D"] | None]:
    """Query, key and value of the residual stream, and the gate for `merge`."""
    y, gate = _normed(self.attention_norm, x, condition)
    return self.attention.project(y, rotary), gate

  def merge(
    self,
    x: Float[Array, "B T D"],
    y: Float[Array, "B T N H"],
    gate: Float[Array, "B 1 D"] | None = None,
    condition: Float[Array, "B C"] | None = None,
  ) -> Float[Array, "B T D"]:
    """Residual stream plus what the heads have read, plus the MLP."""
    y = self.attention.merge(y)
    x = _add(x, self.attention_post_norm(y) if self.post_norm else y, gate)
    y, gate = _normed(self.mlp_norm, x, condition)
    y = self.mlp(y)
    return _add(x, self.mlp_post_norm(y) if self.post_norm else y, gate)

  def _attend(self, query, key, value, mask, cache, index):
    if cache is not None:
      cache = kv_cache.store(cache, key, value, index)
    if mask.alone:
      key, value = (
        sharding.constrain(x, "batch keys act_heads head_dim")
        for x in (key, value)
      )
    else:
      key, value = cache[0].transpose(0, 3, 1, 2), cache[1].swapaxes(1, 2)
    if self.packing and cache is None:
      return chunked(query, key, value, mask.seen, *self.packing), cache
    return attention(query, key, value, mask.seen, causal=mask.causal), cache


def _norm(module):
  if module.adaptive:
    return AdaptiveRMSNorm(module.eps, module.dtype)
  return RMSNorm(module.eps, module.dtype, module.norm_offset)


def _normed(norm, x, condition):
  """Normed stream and, if the norm is adaptive, the gate of what is added."""
  if isinstance(norm, AdaptiveRMSNorm):
    return norm(x, condition)
  return norm(x), None


def _add(x, y, gate):
  y = y if gate is None else y * gate
  return sharding.constrain(x + y, "batch length act_embed")


class Model(nn.Module):
  """Decoder of tokens or of embeddings that a caller has mixed."""

  vocab: int  # 0: embeddings in, hidden states out
  width: int
  layers: int
  heads: int
  kv_heads: int
  mlp: int
  head_dim: int = 0  # 0: width / heads
  tied: bool = True
  theta: float = 1e6
  # Of the frequencies for t, h, w in turn. As published for Qwen2.5-VL, for
  # H = 128; None for text: only t counts.
  sections: tuple[int, ...] | None = (16, 24, 24)
  # (factor, low, high, length), see rope.stretch; (factor,) for all waves
  rope_scaling: tuple[float, ...] | None = None
  eps: float = 1e-6
  bias: bool = True  # of query, key and value
  qk_norm: bool = False  # of each head, before it is rotated
  activation: str = "silu"  # of the MLP's gate; see layers.activation
  norm_offset: float = 0.0  # 1: scales are what the factors have above one
  adaptive: bool = False  # norms follow a condition
  post_norm: bool = False  # of what attention and MLP add, too
  # Layers see the last `window` tokens only, and turn with `window_theta`, but
  # for each `full_every`-th; 0: all layers see all.
  window: int = 0
  window_theta: float = 1e4
  full_every: int = 6
  scale_embed: bool = False  # embeddings times sqrt(width)
  new_vocab: int = 0  # tokens after the vocabulary that are only read
  dtype: str = "float32"
  remat: str = "none"  # or what `remat` knows
  unroll: int = 1  # layers per step of the scan
  embed_std: float = 0.02
  one_hot: bool = False  # read the table by a matrix product; see Embed
  # Tokens of the shared prefix and of a chunk after it: see attention.chunked.
  packing: tuple[int, int] | None = None

  def setup(self) -> None:
    if self.vocab:
      self.embed = Embed(
        self.vocab,
        self.width,
        self.embed_std,
        self.one_hot,
        self.dtype,
        self.width**0.5 if self.scale_embed else 1.0,
        self.new_vocab,
      )
    self.blocks = scan_layers(
      remat(Block, self.remat),
      self.layers,
      in_axes=(0, *[nn.broadcast] * 4, 0, 0, nn.broadcast),
      unroll=self.unroll,
    )(**self.block_options)
    self.norm = _norm(self)
    if self.vocab and not self.tied:
      self.head = Dense(self.vocab, use_bias=False, dtype=self.dtype)

  @property
  def block_options(self) -> dict[str, Any]:
    """Arguments of this decoder's `Block`, for models that join streams."""
    return {
      "width": self.width,
      "heads": self.heads,
      "kv_heads": self.kv_heads,
      "head_dim": self._head_dim,
      "mlp_width": self.mlp,
      "bias": self.bias,
      "qk_norm": self.qk_norm,
      "activation": self.activation,
      "norm_offset": self.norm_offset,
      "adaptive": self.adaptive,
      "eps": self.eps,
      "dtype": self.dtype,
      "packing": self.packing,
      "post_norm": self.post_norm,
      "full_every": self.full_every if self.window else 0,
    }

  @property
  def _head_dim(self) -> int:
    return self.head_dim or self.width // self.heads

  def __call__(
    self,
    tokens: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"] | Int[Array, "B 3 T"],
    segments: Int[Array, "B T"],
    shared: Bool[Array, "B T"] | None = None,
    cache: Cache | None = None,
    *,
    mutual: Int[Array, "B T"] | None = None,
    embeddings: Float[Array, "B T D"] | None = None,
    condition: Float[Array, "B C"] | None = None,
    inject: jax.tree_util.Partial | None = None,
    edit: edits.Edits = None,
    last: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B logits V"], Out]:
    """Logits and intermediates.

    Without a vocabulary, the hidden states stand for the logits.

    Args:
      segments: 0 is padding; tokens see their own segment only.
      shared: True for keys that every segment sees.
      cache: from `init_cache` or the `out` of the call before; the new tokens
        take its next T slots. The one to go on with is `out["cache"]`.
      mutual: tokens of a segment with the same number above 0 see each other
        both ways; see `nn.attention.packed_mask`.
      embeddings: read instead of the tokens' rows of the table.
      condition: what adaptive norms follow.
      inject: function of the residual stream [B T D] after each block. Its
        arguments have a leading layer axis: every block gets its own.
      edit: what changes in the residual stream; see `nn.edit`.
      last: the only token of each row whose logits are wanted [B 1 V].
    """
    x = self.embed(tokens) if embeddings is None else embeddings
    keys = {"segments": segments, "shared": shared, "mutual": mutual}
    index, pairs = 0, None
    if cache is not None:
      index = cache["index"]
      cache = kv_cache.append(cache, segments, shared, mutual)
      pairs = cache["key"], cache["value"]
    # The first slots of a cache: what it holds needs no reading.
    alone = isinstance(index, int) and index == 0
    if not alone:
      keys = cache
    groups = None if mutual is None else (mutual, keys["mutual"])
    seen = packed_mask(
      segments, keys["segments"], keys["shared"], index, mutual=groups
    )
    mask = Mask(seen, causal=alone and mutual is None, alone=alone)
    rotary = self._rotary(positions, self.theta, self.rope_scaling)
    if self.window:
      place = jnp.arange(seen.shape[1]) + index, jnp.arange(seen.shape[2])
      near = place[0][:, None] - place[1][None] < self.window
      mask = mask, mask.replace(seen=seen & near[None])
      rotary = rotary, self._rotary(positions, self.window_theta)
    # Once for all blocks: XLA would compute cosines in each of them again.
    rotary = jax.lax.optimization_barrier(rotary)
    out = {"llm/embedding": self.embed.embedding} if self.vocab else {}
    x = sharding.constrain(x.astype(self.dtype), "batch length act_embed")
    number = None
    if edit is not None or self.window:
      number = jnp.arange(self.layers)
    out["llm/embedded"] = x = edits.apply(edit, x, 0)
    if cache is not None and isinstance(cache["key"], list):
      x, pairs = self._in_turn(x, pairs, mask, rotary, index, condition)
    else:
      x, (out["llm/blocks"], pairs) = self.blocks(
        x, pairs, mask, rotary, index, condition, inject, number, edit
      )
    if cache is not None:
      out["cache"] = {**cache, "key": pairs[0], "value": pairs[1]}
    x, _ = _normed(self.norm, x, condition)
    out["llm/hidden"] = x
    if last is not None:
      x = jnp.take_along_axis(x, last[:, None, None], axis=1)
    if not self.vocab:
      return x, out
    logits = self.embed.attend(x) if self.tied else self.head(x)
    return sharding.constrain(logits, "batch length act_vocab"), out

  def _in_turn(self, x, pairs, *others):
    """Blocks that `generate.apart` took out of their stack."""
    params = self.variables["params"]["blocks"]
    block = Block(**self.block_options, parent=None)
    keys, values = [], []
    for number, pair in enumerate(zip(*pairs, strict=True)):
      x, (_, (key, value)) = block.apply(
        {"params": params[number]}, x, pair, *others, number=number
      )
      keys.append(key)
      values.append(value)
    return x, (keys, values)

  def _rotary(self, positions, theta, scaling=None):
    options = self._head_dim, theta
    if positions.ndim == 3 and self.sections is not None:
      return rope.multimodal(positions, *options, self.sections, scaling)
    if positions.ndim == 3:
      positions = positions[:, 0]
    return rope.linear(positions, *options, scaling)

  def init_cache(self, batch: int, length: int) -> Cache:
    """Empty cache of `length` slots; needs no parameters. See `nn.kv_cache`."""
    return kv_cache.empty(
      self.layers, batch, length, self.kv_heads, self._head_dim, self.dtype
    )


def remat(
  block: type[nn.Module], policy: str, *, scanned: bool = True
) -> type[nn.Module]:
  """Block that recomputes its activations in the backward pass.

  Args:
    policy: "none", "full", "attention" (what `nn.attention` needs for its
      gradient is kept; on CPU), "products" (this, what it reads, and products
      with weights) or a name in `jax.checkpoint_policies`.
    scanned: it runs in a scan, which already prevents that what is computed
      twice is found to be the same.
  """
  if policy == "none":
    return block
  policies, known = jax.checkpoint_policies, None
  if policy in ("attention", "products"):
    known = policies.save_only_these_names(KEPT)
    if policy == "products":
      known = policies.save_from_both_policies(
        policies.save_only_these_names(KEPT, READ),
        policies.dots_with_no_batch_dims_saveable,
      )
  elif policy != "full":
    known = getattr(policies, policy, None)
    if known is None:
      raise ValueError(
        f"remat={policy!r} is unknown; use 'none', 'full', 'attention', "
        "'products' or a name in jax.checkpoint_policies such as "
        "'dots_with_no_batch_dims_saveable'"
      )
  return nn.remat(block, prevent_cse=not scanned, policy=known)


def place(
  embeddings: Float[Array, "B T D"],
  merged: Float[Array, "B M D"],
  is_image: Bool[Array, "B T"],
  *,
  one_hot: bool = False,
) -> Float[Array, "B T D"]:
  """Writes the k-th merged token of a row at the row's k-th image token."""
  index = jnp.cumsum(is_image, axis=1) - 1
  index = jnp.clip(index, 0, merged.shape[1] - 1)
  if one_hot:
    hot = jax.nn.one_hot(index, merged.shape[1], dtype=merged.dtype)
    image = jnp.einsum("btm,bmd->btd", hot, merged)
  else:
    M = merged.shape[1]
    count = jnp.cumsum(is_image, axis=1)[:, None]
    # Of the k-th image token; beyond the row if there is none.
    at = jnp.sum(count <= jnp.arange(M)[None, :, None], axis=-1)
    image = slots.pick(merged, index, at)
  return jnp.where(is_image[..., None], image, embeddings)


def next_token(
  params: dict, out: Out, batch: Mapping[str, Array], tokens: int = 0
) -> tuple[Float[Array, ""], losses.Metrics]:
  """Weighted next-token loss of what `Model` has returned.

  Its logits are computed again, a part at a time: under jit, the whole ones
  never are.

  Args:
    params: the decoder's own.
    batch: has labels and loss_weight [B T]; labels are shifted already.
    tokens: most whose logits a device holds at once; 0: all.
  """
  labels, weight = batch["labels"], batch["loss_weight"]
  if tied := "head" not in params:
    head = params["embed"]["embedding"]
  else:
    head = adapted_kernel(params["head"])
  arguments = out["llm/hidden"], head, labels, weight, tokens
  return losses.next_token_of(*arguments, tied=tied)


def answer_loss(arguments: Callable[[Mapping[str, Array]], dict[str, Any]]):
  """`loss` of a model file whose decoder, "llm", learns by `next_token`.

  Args:
    arguments: the file's own: what its `Model` takes of a batch.

  Returns:
    (model, params, batch, *, rngs, train) -> weighted next-token loss,
    (metrics, intermediates).
  """

  def loss(
    model: nn.Module,
    params: Any,
    batch: Mapping[str, Array],
    *,
    rngs: Any = None,
    train: bool = True,
  ) -> tuple[Float[Array, ""], tuple[losses.Metrics, Out]]:
    _, out = model.apply(
      {"params": params}, **arguments(batch), train=train, rngs=rngs
    )
    tokens = model.loss_tokens
    value, metrics = next_token(params["llm"], out, batch, tokens)
    return value, (metrics, out)

  return loss
