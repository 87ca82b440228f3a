# SPDX-License-Identifier: Apache-2.0
"""Attention over masks. The one place where a kernel is chosen.

The kernel is that of the mesh in force: `jax.set_mesh` of TPUs that aren't
there (see `plan`) compiles what runs on them.

Letters: B batch, T queries, S keys, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spatial_jax import sharding
from spatial_jax.types import Array, Bool, Float, Int

# Finite, so that a fully masked row has a finite gradient.
_MASKED = -1e30
# Scores that `unmasked` holds at once: 1 GiB in float32.
_MOST_SCORES = 2**28
# Rows with fewer queries or keys aren't worth a kernel: a window of 64 patches.
# Without a mask it is worth cuDNN's, which writes no scores.
_LEAST, _LEAST_CUDNN = 256, 64
# Most parts of the queries under a causal mask, and fewest queries of a part:
# (1 + 1 / parts) / 2 of the scores are computed.
_PARTS, _PART = 8, 48
# Scopes by which `plan` knows products of scores, and those under a square
# mask, of which half is hidden.
SCORES, CAUSAL = "attention_scores", "attention_scores_causal"
# And how many of the layers take a branch, of the queries a turn.
_SHARE = re.compile(r"taken_(\d+)_of_(\d+)")
TURN = re.compile(r"turn_(\d+)_of_(\d+)")
# What `jax.checkpoint` calls the scope of what a gradient computes once more.
AGAIN = "rematted_computation"
# What the gradient of attention needs of it, for policies of `jax.checkpoint`.
KEPT = "attention_kept"
# What it reads, as models rotate it: for policies that keep products, too.
READ = "attention_read"
# Heads that cuDNN takes.
_CUDNN_HEAD = 128


def attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K H"],
  mask: Bool[Array, "#B #T S"] | None = None,
  bias: Float[Array, "#B #T S"] | None = None,
  *,
  causal: bool = False,
  implementation: str = "auto",
) -> Float[Array, "B T N H"]:
  """Softmax attention with grouped heads; scores and softmax in float32.

  Args:
    mask: True where a query may see a key. Queries that see no key give zeros.
    bias: added to the scaled scores of all heads.
    causal: promises that the mask, a square, hides all keys after a query's
      own: most of them are then left out on CPU and GPU.
    implementation: "xla", "splash" (TPU), "cudnn" (GPU), or "auto": that of the
      mesh's platform, where it takes these arrays.
  """
  kind = implementation
  if kind == "auto":
    kind = choose(query, key, bias is not None, mask is not None)
  if kind == "xla":
    square = mask is not None and mask.shape[1] == key.shape[1] > 1
    with jax.named_scope(CAUSAL if square else SCORES):
      parts = _parts(query, key) if causal and bias is None else 1
      return _read(query, key, value, mask, bias, parts).astype(value.dtype)
  if bias is not None:
    raise ValueError(f"implementation={kind!r} knows no bias; use 'xla'")
  from spatial_jax.nn import kernels  # imports Pallas: only where it is used

  if kind == "cudnn":
    return kernels.cudnn(query, key, value, mask, causal)
  if kind == "splash":
    return kernels.splash(query, key, value, mask)
  raise ValueError(
    f"implementation={kind!r} is unknown; use auto, xla, splash, cudnn"
  )


def choose(
  query: Any, key: Any, has_bias: bool = False, has_mask: bool = False
) -> str:
  """Implementation for such arrays on the mesh in force; without one, xla."""
  platform, length = sharding.platform(), min(query.shape[1], key.shape[1])
  least = _LEAST_CUDNN if platform == "gpu" and not has_mask else _LEAST
  if has_bias or length < least:
    return "xla"
  if platform == "tpu":
    return "splash"
  head = query.shape[-1]
  half = query.dtype in (jnp.bfloat16, jnp.float16)
  if platform == "gpu" and half and head % 8 == 0:
    return "cudnn" if head <= _CUDNN_HEAD else "xla"
  return "xla"


def _parts(query, key):
  """Of a square under a causal mask; one in programs that count products."""
  if sharding.platform() not in ("cpu", "gpu"):
    return 1
  context = jax.sharding.get_abstract_mesh().shape.get("context", 1)
  if context > 1 or query.shape[1] != key.shape[1]:
    return 1
  return max(min(query.shape[1] // _PART, _PARTS), 1)


def _spans(length, parts):
  size = -(-length // parts)
  return [(i, min(i + size, length)) for i in range(0, length, size)]


def _part(span, parts, query, key, value, mask, bias):
  """Queries of a span by key heads [B K G*t H], and what they may see."""
  start, end = span
  if parts > 1:
    query, mask = query[:, start:end], mask[:, start:end, :end]
    key, value = key[:, :end], value[:, :end]
  # Heads before time: the products then need no transposed copies, which makes
  # the gradient twice as fast on CPU.
  query = _by_key(query, key.shape[2])
  return query, key.swapaxes(1, 2), value.swapaxes(1, 2), mask, bias


def _by_key(x, heads):
  """[B T N H] as [B K G*T H]: those that read a head one after another."""
  B, T, N, H = x.shape
  x = x.reshape(B, T, heads, N // heads, H).transpose(0, 2, 3, 1, 4)
  return x.reshape(B, heads, -1, H)


def _by_query(x, heads):
  """The inverse of `_by_key`."""
  B, K, _, H = x.shape
  x = x.reshape(B, K, heads // K, -1, H).transpose(0, 3, 1, 2, 4)
  return x.reshape(B, -1, heads, H)


def _scores(query, key, mask, bias):
  """Scaled scores [B K G T S] of queries [B K G*T H]."""
  scores = jnp.einsum(
    "bkth,bksh->bkts", query, key, preferred_element_type=jnp.float32
  )
  B, K, rows, S = scores.shape
  seen = [x for x in (mask, bias) if x is not None]
  T = max((x.shape[1] for x in seen), default=1)
  T = rows if T == 1 else T  # all rows alike
  scores = scores.reshape(B, K, rows // T, T, S) * query.shape[-1] ** -0.5
  if bias is not None:
    scores = scores + bias.astype(jnp.float32)[:, None, None]
  if mask is not None:
    scores = jnp.where(mask[:, None, None], scores, _MASKED)
  return scores


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _read(query, key, value, mask, bias, parts):
  """What queries have read, in float32 [B T N H].

  In parts of the queries, each with the keys up to its own; or all at once. The
  gradient computes the scores again: a stack of them over layers would have to
  be written and read, and costs more than the product.
  """
  return _read_forward(query, key, value, mask, bias, parts)[0]


def _read_forward(query, key, value, mask, bias, parts):
  given = query, key, value, mask, bias
  outs, log_totals = [], []
  for span in _spans(query.shape[1], parts):
    q, k, v, *seen = _part(span, parts, *given)
    scores = _scores(q, k, *seen)
    # Above what is masked, so that a row that sees no key has weights of zero.
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), _MASKED / 2)
    weights = jnp.exp(scores - top)
    # Divided later, where numbers are fewer. What a row sees totals at least 1.
    total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-9)
    weights = weights.astype(value.dtype).reshape(*q.shape[:3], -1)
    out = jnp.einsum(
      "bkts,bksh->bkth", weights, v, preferred_element_type=jnp.float32
    )
    out = out / total.reshape(*q.shape[:3], 1)
    outs.append(_by_query(out, query.shape[2]))
    log_totals.append(checkpoint_name(top + jnp.log(total), KEPT))
  out = checkpoint_name(_joined(outs), KEPT)
  return out, (*given, out, log_totals)


def _joined(parts):
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _read_backward(parts, kept, gradient):
  *given, out, log_totals = kept
  query, key, value, _, bias = given
  N, K = query.shape[2], key.shape[2]
  slope = jnp.sum(gradient * out, axis=-1, keepdims=True)
  if sharding.platform() == "cpu":
    # Whole before it is read: else a library takes it and the product as one,
    # which is slower than both.
    slope = jax.lax.optimization_barrier(slope)
  gradient = gradient.astype(value.dtype)
  of_queries, of_keys, of_values, of_bias = [], [], [], None
  spans = _spans(query.shape[1], parts)
  for (start, end), log_total in zip(spans, log_totals, strict=True):
    q, k, v, *seen = _part((start, end), parts, *given)
    g = _by_key(gradient[:, start:end], K)
    with jax.named_scope(AGAIN):
      weights = jnp.exp(_scores(q, k, *seen) - log_total)
    of_weights = jnp.einsum(
      "bkth,bksh->bkts", g, v, preferred_element_type=jnp.float32
    )
    drop = _by_key(slope[:, start:end], K).reshape(*weights.shape[:4], 1)
    of_scores = weights * (of_weights.reshape(weights.shape) - drop)
    if bias is not None:
      of_bias = _like(bias, jnp.sum(of_scores, axis=(1, 2)))
    flat = *q.shape[:3], -1
    weights = weights.astype(value.dtype).reshape(flat)
    of_scores = of_scores * query.shape[-1] ** -0.5
    of_scores = of_scores.astype(query.dtype).reshape(flat)
    of_query = jnp.einsum("bkts,bksh->bkth", of_scores, k)
    of_queries.append(_by_query(of_query, N))
    # Large matrices are not turned: on CPU, that takes as long as the product.
    of_keys.append(jnp.einsum("bkth,bkts->bkhs", q, of_scores))
    of_values.append(jnp.einsum("bkth,bkts->bkhs", g, weights))
  of_key, of_value = _summed(of_keys), _summed(of_values)
  return _joined(of_queries), of_key, of_value, None, of_bias


def _summed(parts):
  """Gradients [B K H s] of the first keys, added: [B S K H]."""
  *others, out = parts
  for part in others:
    out = out.at[..., : part.shape[-1]].add(part)
  if others:
    # Whole before it is turned: else each reader adds it all up once more.
    out = jax.lax.optimization_barrier(out)
  return out.transpose(0, 3, 1, 2)


def _like(x, gradient):
  """A sum over the axes along which x was broadcast."""
  axes = [i for i, n in enumerate(x.shape) if n == 1]
  return jnp.sum(gradient, axis=axes, keepdims=True).astype(x.dtype)


_read.defvjp(_read_forward, _read_backward)


def unmasked(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K H"],
) -> Float[Array, "B T N H"]:
  """`attention` where all see all, for rows of any length.

  When there are more scores than fit, queries are taken some at a time.
  """
  B, T, N, H = query.shape
  count = -(-B * N * T * key.shape[1] // _MOST_SCORES)
  if count == 1 or choose(query, key) != "xla":
    return attention(query, key, value)
  count = min(count, T)
  size = -(-T // count)
  query = jnp.pad(query, [(0, 0), (0, count * size - T), (0, 0), (0, 0)])
  parts = query.reshape(B, count, size, N, H).swapaxes(0, 1)

  # Keys and values, the same in each turn, are not kept once for each.
  policy = jax.checkpoint_policies.save_only_these_names(KEPT)

  @functools.partial(jax.checkpoint, policy=policy)
  @jax.named_scope(f"turn_{size}_of_{T}")
  def some(part):
    return attention(part, key, value)

  out = jax.lax.map(some, parts).swapaxes(0, 1)
  return out.reshape(B, count * size, N, H)[:, :T]


def share(function: Callable, taken: int, of: int) -> Callable:
  """A branch of a conditional that so many of all layers take; for `plan`."""
  return jax.named_scope(f"taken_{taken}_of_{of}")(function)


def share_in(names: str) -> float | None:
  """What `share` wrote into a stack of names, the innermost; None: nothing."""
  found = _SHARE.findall(names)
  return int(found[-1][0]) / int(found[-1][1]) if found else None


def packed_mask(
  q_segments: Int[Array, "B T"],
  k_segments: Int[Array, "B S"],
  k_shared: Bool[Array, "B S"] | None = None,
  offset: Int[Array, ""] | int = 0,
  *,
  mutual: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
) -> Bool[Array, "B T S"]:
  """Causal mask of packed rows, with groups that see each other both ways.

  A query at slot `offset + t` sees the keys at slots up to its own, of its own
  segment or shared; segment 0 is padding. With segments [1 1 2 2 0] and shared
  [T F F F F]:

        keys 0 1 2 3 4
    q 0      T . . . .
    q 1      T T . . .
    q 2      T . T . .
    q 3      T . T T .
    q 4      T . . . .   (padding: its output is never used)

  `mutual` numbers the groups of queries and of keys: a query also sees later
  keys of its own segment that have its number, unless this is 0. One segment
  with [1 1 1 0 0] is a prefix and text ("prefix LM"), [1 1 2 3 3] are blocks
  that see each other and all before them (see `blocks`), and the tokens of a
  group need not be neighbours:

        [1 1 1 0 0]     [1 1 2 3 3]     [0 1 0 1 0]
    q 0  T T T . .       T T . . .       T . . . .
    q 1  T T T . .       T T . . .       T T . T .
    q 2  T T T . .       T T T . .       T T T . .
    q 3  T T T T .       T T T T T       T T T T .
    q 4  T T T T T       T T T T T       T T T T T
  """
  T, S = q_segments.shape[1], k_segments.shape[1]
  same = q_segments[:, :, None] == k_segments[:, None, :]
  if k_shared is not None:
    same = same | k_shared[:, None, :]
  causal = (jnp.arange(T) + offset)[:, None] >= jnp.arange(S)[None, :]
  seen = causal[None]
  if mutual is not None:
    q_group, k_group = mutual[0][:, :, None], mutual[1][:, None, :]
    seen = seen | ((q_group == k_group) & (q_group > 0))
  return same & (k_segments > 0)[:, None, :] & seen


def blocks(autoregressive: Bool[Array, "B T"]) -> Int[Array, "B T"]:
  """Groups of `packed_mask` for rows whose True tokens each start a block.

  [F F T T F] becomes [1 1 2 3 3].
  """
  return jnp.cumsum(autoregressive, axis=1) + 1


def chunked(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  mask: Bool[Array, "B T T"],
  prefix: int,
  size: int,
) -> Float[Array, "B T N H"]:
  """`attention` of rows whose segments stay within chunks after a prefix.

  The first `prefix` tokens may be seen by all; the others come in chunks of
  `size`, and no segment crosses a chunk's border. Scores are then computed
  against the prefix and the own chunk only: (prefix + size) / T of the work.
  """
  B, T, N, H = query.shape
  if (T - prefix) % size:
    raise ValueError(
      f"{T} tokens are no prefix of {prefix} and chunks of {size}: "
      "config.model.llm.packing must fit the rows of the data"
    )
  count = (T - prefix) // size
  head = slice(0, prefix)
  first = attention(
    query[:, head], key[:, head], value[:, head], mask[:, head, head]
  )

  def cut(x):
    return x[:, prefix:].reshape(B * count, size, *x.shape[2:])

  def seen(x):
    front = jnp.repeat(x[:, head], count, axis=0)
    return jnp.concatenate([front, cut(x)], axis=1)

  rows = mask[:, prefix:].reshape(B, count, size, T)
  own = rows[..., prefix:].reshape(B, count, size, count, size)
  own = jnp.stack([own[:, i, :, i] for i in range(count)], axis=1)
  near = jnp.concatenate([rows[..., head], own], axis=-1)
  near = near.reshape(B * count, size, prefix + size)
  rest = attention(cut(query), seen(key), seen(value), near)
  return jnp.concatenate([first, rest.reshape(B, T - prefix, N, H)], axis=1)
