# SPDX-License-Identifier: Apache-2.0
"""Geometric auxiliary losses that any model here can switch on by config.

Reads a model's `out` dictionary ("vit/tokens", "visual/tokens" or else
"vit/merged", "llm/blocks", "llm/embedding"), adds linear heads and compares
with what the world knows (`observe.dense_targets`, `targets.GROUPS`). Heads
live under params["aux"] and are dropped at export. `config.auxiliary` maps a
term to its weight, or a token term to (weight, after which LLM block); a term
that isn't named isn't computed.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.types import Array, Batch
from spatial_jax.world import scene as scene_lib
from spatial_jax.world import targets

DENSE = ("category", "point", "room_point", "align")
# A merged token has to stand out against 16 words, not against their noise:
# with a cosine factor of 45 tiny cosines satisfied the loss and attention
# could not use them; 5 makes them large.
ALIGN_SCALE = 5.0
CATEGORIES = len(scene_lib.CATEGORIES)


class Bias(nn.Module):
  """One number."""

  @nn.compact
  def __call__(self) -> Array:
    return self.param("bias", nn.initializers.zeros, (1,))


class Heads(nn.Module):
  """Linear heads; `__call__` returns name -> prediction."""

  dense: tuple[str, ...]
  tokens: tuple[tuple[str, int], ...]  # group, LLM block
  merge: int  # patches per merged token

  @nn.compact
  def __call__(self, out: dict[str, Array]) -> dict[str, Array]:
    got = {}

    def head(name, x, width):
      flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
      # From zero: a random head would first teach the model noise.
      y = nn.Dense(width, kernel_init=nn.initializers.zeros, name=name)(flat)
      return y.reshape(*x.shape[:-1], width)

    if "category" in self.dense:
      got["category"] = head("category", out["vit/tokens"], CATEGORIES + 1)
    if "point" in self.dense:
      got["point"] = head("point", out["vit/tokens"], 3)
    if "room_point" in self.dense:
      y = head("room_point", visual(out), 3 * self.merge)
      got["room_point"] = y.reshape(y.shape[0], -1, 3)
    if "align" in self.dense:
      got["align_bias"] = Bias(name="align")()
    for group, block in self.tokens:
      width = targets.GROUPS[group].stop - targets.GROUPS[group].start
      got[group] = head(group, out["llm/blocks"][block - 1], width)
    return got


def visual(out: dict[str, Array]) -> Array:
  """What the language model reads of the frames [B M D]."""
  return out["visual/tokens"] if "visual/tokens" in out else out["vit/merged"]


def rms(x: Array) -> Array:
  scale = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
  return x * scale


def masked_mean(value: Array, weight: Array) -> Array:
  return (value * weight).sum() / jnp.maximum(weight.sum(), 1.0)


class Auxiliary:
  """Loss of a model plus the weighted auxiliary terms.

  Attributes:
    weights: term -> weight; "answer" is the model's own loss (0 skips the
      language model altogether: a vision-only stage).
  """

  def __init__(self, config, mod: Any):
    terms = dict(config.auxiliary)
    known = {"answer", *DENSE, *targets.GROUPS}
    if unknown := set(terms) - known:
      raise ValueError(
        f"config.auxiliary: unknown terms {sorted(unknown)}; known: "
        f"{sorted(known)}"
      )
    self.mod = mod
    self.answer = float(terms.get("answer", 1.0))
    self.dense = {k: float(terms[k]) for k in DENSE if k in terms}
    groups = {k: tuple(terms[k]) for k in targets.GROUPS if k in terms}
    self.groups = groups if self.answer else {}
    from spatial_jax.data import text

    tokenizer = text.Tokenizer.load()
    self.words = np.array(
      [tokenizer.token_id(name) for name in scene_lib.CATEGORIES]
    )
    merge = config.data.world.merge_size**2
    self.heads = Heads(
      tuple(self.dense),
      tuple((k, int(v[1])) for k, v in self.groups.items()),
      merge,
    )
    self.merge = merge

  def forward(self, model, params, batch, rngs, train):
    if self.answer:
      loss, (metrics, out) = self.mod.loss(
        model, params, batch, rngs=rngs, train=train
      )
      return self.answer * loss, dict(metrics), out
    _, out = model.apply(
      {"params": params}, batch["patches"], method=model.encode
    )
    return jnp.float32(0), {}, out

  def init(self, key: Array, model, params, batch: Batch) -> Any:
    """Parameters of the heads, for params["aux"]; trace it, don't run it."""
    _, _, out = self.forward(model, params, batch, None, False)
    return self.heads.init(key, out)["params"]

  def loss(self, model, params, batch, *, rngs=None, train=True):
    """Same signature as a model's loss: (scalar, (metrics, out))."""
    own = {k: v for k, v in params.items() if k != "aux"}
    total, metrics, out = self.forward(model, own, batch, rngs, train)
    got = self.heads.apply({"params": params["aux"]}, out)
    terms = {}
    if self.dense:
      terms |= self._dense(batch, out, got)
    for group in self.groups:
      terms[group] = token_loss(group, got[group], batch)
    for name, value in terms.items():
      weight = self.dense.get(name) or self.groups[name][0]
      total += weight * value
      metrics[f"aux/{name}"] = value
    return total, (metrics | {"loss": total}, out)

  def _dense(self, batch, out, got):
    kind = batch["dense/category"]  # B N
    weight = jnp.where(kind > 0, 1.0, 0.2)
    terms = {}
    if "category" in self.dense:
      log_p = jax.nn.log_softmax(got["category"])
      hot = jax.nn.one_hot(kind, CATEGORIES + 1)
      terms["category"] = masked_mean(-(log_p * hot).sum(-1), weight)
    if "point" in self.dense:
      error = jnp.abs(got["point"] - batch["dense/point"] / targets.SCALE)
      terms["point"] = masked_mean(error.mean(-1), weight)
    if "room_point" in self.dense:
      goal = batch["dense/room_point"] / targets.SCALE
      error = jnp.abs(got["room_point"] - goal)
      terms["room_point"] = masked_mean(
        error.mean(-1), jnp.where(kind > 0, 1.0, 0.3)
      )
    if "align" in self.dense:
      merged = visual(out).astype(jnp.float32)
      words = rms(out["llm/embedding"][self.words].astype(jnp.float32))
      flat = rms(merged).reshape(-1, merged.shape[-1])
      logits = flat @ words.T * (ALIGN_SCALE / merged.shape[-1])
      logits += got["align_bias"].reshape(1, 1)
      hot = jax.nn.one_hot(kind, CATEGORIES + 1)[..., 1:]
      hot = hot.reshape(-1, self.merge, CATEGORIES).max(1)
      terms["align"] = 4 * jnp.mean(
        -5 * hot * jax.nn.log_sigmoid(logits)
        - (1 - hot) * jax.nn.log_sigmoid(-logits)
      )
    return terms


def token_loss(group: str, got: Array, batch: Batch) -> Array:
  """Mean absolute error, or binary cross-entropy for "verify"."""
  channels = targets.GROUPS[group]
  goal = batch["targets"][..., channels]
  mask = batch["targets_mask"][..., channels].astype(jnp.float32)
  if group == "verify":
    # One option in two to four is right: balance the two sides.
    side = jnp.where(goal > 0, 3.0, 1.0)
    error = -side * jax.nn.log_sigmoid(jnp.where(goal > 0, got, -got))
  else:
    error = jnp.abs(got - goal)
  return masked_mean(error, mask)


def make(config, mod: Any) -> Auxiliary:
  return Auxiliary(config, mod)
