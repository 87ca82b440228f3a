# SPDX-License-Identifier: Apache-2.0
"""Attention kernels of accelerators, as functions of whole sharded arrays.

`splash` is jax's Pallas kernel for TPU, `cudnn` NVIDIA's. Neither can be split
by the compiler: both run inside `shard_map`, each device on its own rows and
heads. Queries may also be split along their length (the context axis): keys and
values are then gathered, and every device sees its part of the mask.

Letters: B batch, T queries, S keys, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from spatial_jax import sharding
from spatial_jax.nn.attention import KEPT
from spatial_jax.types import Array, Bool, Float

LANES = 128
# Rows and columns of the scores that a TPU core holds at once. One block of
# keys may be longer: two short ones would be padded by more.
_BLOCK, _ONE_BLOCK = 1024, 1664
# Rows where each block of the mask is read, too, as int32: two of them at once.
_MASKED_BLOCK = 512
# Scores of a block where only padding is masked, so that most blocks read none.
_MOST_SCORES = 2**20


def splash(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K H"],
  mask: Bool[Array, "#B #T S"] | None = None,
  *,
  interpret: bool = False,
) -> Float[Array, "B T N H"]:
  """`attention` by jax's splash kernel; without a mesh on one device.

  Blocks of the scores in which nothing is seen are skipped, whether the mask
  is known to the compiler or not. Lengths are padded to blocks here; heads of
  any size are padded to lanes by the compiler.
  """

  def local(query, key, value, mask):
    return _splash(query, key, value, mask, interpret)

  return _sharded(local, query, key, value, mask)


def cudnn(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K H"],
  mask: Bool[Array, "#B #T S"] | None = None,
  causal: bool = False,
) -> Float[Array, "B T N H"]:
  """`attention` by cuDNN: half precision, H a multiple of 8 up to 128.

  A mask is read as a bias, for which cuDNN computes all scores, and a gradient
  that nobody wants. Where `causal` promises it, the device looks whether the
  mask hides no more than that and padding behind the rows; then cuDNN is told
  so instead, and leaves half of the scores out.
  """

  def local(query, key, value, mask):
    T, S = query.shape[1], key.shape[1]
    query, key, value = (_even(x, 1) for x in (query, key, value))
    if mask is None:
      return _cudnn_whole(query, key, value, T, S)[:, :T]
    mask = _even(mask, 2) if mask.shape[1] == 1 else _even(_even(mask, 2), 1)
    if not causal or query.shape[1] != key.shape[1]:
      return _cudnn_masked(query, key, value, mask)[:, :T]
    lengths, is_whole = _causal_lengths(mask)
    out = jax.lax.cond(
      is_whole,
      lambda *heads: _cudnn_causal(*heads, lengths),
      lambda *heads: _cudnn_masked(*heads, mask),
      query,
      key,
      value,
    )
    return out[:, :T]

  return _sharded(local, query, key, value, mask)


def _cudnn(query, key, value, **more):
  return jax.nn.dot_product_attention(
    query, key, value, implementation="cudnn", **more
  )


def _even(x, axis):
  """Zeros behind an odd length, of which cuDNN has no gradient."""
  pad = [(0, 0)] * x.ndim
  pad[axis] = 0, x.shape[axis] % 2
  return jnp.pad(x, pad)


def _cudnn_whole(query, key, value, T, S):
  """All queries see the first S keys; the first T are wanted."""
  if (query.shape[1], key.shape[1]) == (T, S):
    return _cudnn(query, key, value)
  lengths = {
    name: jnp.full(query.shape[0], count, jnp.int32)
    for name, count in (("query", T), ("key_value", S))
  }
  lengths = {f"{name}_seq_lengths": x for name, x in lengths.items()}
  return _cudnn(query, key, value, **lengths)


def _cudnn_masked(query, key, value, mask):
  mask, seen = _see_something(mask)
  shape = (query.shape[0], 1, query.shape[1], key.shape[1])
  mask = jnp.broadcast_to(mask[:, None], shape)
  out = _cudnn(query, key, value, mask=mask)
  return jnp.where(seen[..., None, None], out, 0)


def _causal_lengths(mask):
  """Tokens of each row of a causal mask [B T T], and whether it is one."""
  tokens = jnp.arange(mask.shape[-1])
  lengths = jnp.sum(jnp.diagonal(mask, axis1=1, axis2=2), axis=-1)
  causal = tokens[:, None] >= tokens[None]
  valid = tokens[None] < lengths[:, None]
  return lengths, jnp.all(mask == (causal[None] & valid[:, :, None]))


def _cudnn_causal(query, key, value, lengths):
  valid = jnp.arange(query.shape[1])[None] < lengths[:, None]

  def kept(x):
    # What is computed of padding, and of its gradients, is not promised.
    return jnp.where(valid[..., None, None], x, 0)

  lengths = jnp.broadcast_to(jnp.maximum(lengths, 1), query.shape[:1])
  out = _cudnn(
    kept(query),
    kept(key),
    kept(value),
    is_causal=True,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
  )
  return kept(out)


def _sharded(local: Callable, query, key, value, mask):
  """`local` on each device's rows, heads and queries of the mesh in force."""
  mesh = jax.sharding.get_abstract_mesh()
  if sharding.single() or AxisType.Manual in mesh.axis_types:
    return local(query, key, value, mask)
  axes = ["batch", "length", "act_heads", "head_dim"]
  rows, length, heads, _ = _padded(sharding.spec(axes, query.shape), 4)
  # As many parts of the query heads as of those that they share.
  if _padded(sharding.spec(axes, key.shape), 4)[2] != heads:
    heads = None
  q_spec, k_spec = P(rows, length, heads), P(rows, None, heads)
  if mask is None:
    return jax.shard_map(
      lambda q, k, v: local(q, k, v, None),
      in_specs=(q_spec, k_spec, k_spec),
      out_specs=q_spec,
      check_vma=False,
    )(query, key, value)
  m_spec = P(
    rows if mask.shape[0] == query.shape[0] else None,
    length if mask.shape[1] == query.shape[1] else None,
  )
  return jax.shard_map(
    local,
    in_specs=(q_spec, k_spec, k_spec, m_spec),
    out_specs=q_spec,
    check_vma=False,
  )(query, key, value, mask)


def _padded(spec, count):
  return (*spec, *(None,) * (count - len(spec)))


def _see_something(mask):
  """A mask in which every query sees a key, and which queries did."""
  seen = jnp.any(mask, axis=-1)
  first = jnp.arange(mask.shape[-1]) == 0
  return mask | (~seen[..., None] & first[None, None]), seen


def blocks(length: int, longest: int = _BLOCK) -> tuple[int, int]:
  """(block, padded length): blocks of lanes that pad a length least."""
  most = math.ceil(length / longest)
  pairs = [
    (count * (size := LANES * math.ceil(length / count / LANES)), -size)
    for count in range(most, most + 2)
  ]
  padded, size = min(pairs)
  return -size, padded


class _Keys(splash_attention.splash_attention_mask.Mask):
  """All queries see the first `count` keys, and none the padding."""

  def __init__(self, shape: tuple[int, int], count: int):
    self._shape, self._count = shape, count

  @property
  def shape(self) -> tuple[int, int]:
    return self._shape

  def __getitem__(self, index) -> np.ndarray:
    rows, columns = (
      np.arange(size)[part]
      for size, part in zip(self._shape, index, strict=True)
    )
    row = columns < self._count
    return np.broadcast_to(row[None], (len(rows), len(columns)))

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Keys) and vars(self) == vars(other)

  def __hash__(self) -> int:
    return hash((self._shape, self._count))


def _splash(query, key, value, mask, interpret):
  B, T, N, H = query.shape
  S = key.shape[1]
  is_dynamic = mask is not None and (mask.shape[1] > 1 or T == 1)
  block_k, columns = blocks(S, S if S <= _ONE_BLOCK else _BLOCK)
  has_mask = is_dynamic or (mask is None and columns > S)
  longest = _BLOCK
  if has_mask:
    longest = _MASKED_BLOCK if is_dynamic else _MOST_SCORES // block_k
  block_q, rows = blocks(T, min(longest // LANES * LANES, _BLOCK))
  # The gradient holds four blocks of scores, not one.
  back_q = block_q
  if has_mask:
    back_q = max(
      size
      for size in range(LANES, _MASKED_BLOCK + 1, LANES)
      if rows % size == 0
    )
  query = (query.astype(jnp.float32) * H**-0.5).astype(key.dtype)

  def heads_first(x, length):
    pad = [(0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)]
    return jnp.pad(x, pad).swapaxes(1, 2)

  arrays = (
    heads_first(query, rows),
    *(heads_first(x, columns) for x in (key, value)),
  )
  sizes = splash_attention.BlockSizes(
    block_q=block_q,
    block_kv=block_k,
    block_kv_compute=block_k,
    block_q_dkv=back_q,
    block_kv_dkv=block_k,
    block_kv_dkv_compute=block_k,
    block_q_dq=back_q,
    block_kv_dq=block_k,
  )

  def kernel(mask):
    made = splash_attention.make_splash_mha(
      mask,
      block_sizes=sizes,
      head_shards=1,
      q_seq_shards=1,
      residual_checkpoint_name=KEPT,
      interpret=interpret,
    )
    # A traced flag, for a name alone, on which Python would have to decide.
    for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
      info = getattr(made, name)._replace(is_dynamic_mask=None)
      setattr(made, name, info)
    return made

  def static(count):
    if count == columns:
      one = splash_attention.FullMask((rows, columns))
    else:
      one = _Keys((rows, columns), count)
    return kernel(splash_attention.MultiHeadMask([one] * N))

  seen = None
  if mask is None:
    out = jax.vmap(static(S))(*arrays)
  elif not is_dynamic:  # of keys alone
    mask, seen = _see_something(mask)
    mask = jnp.pad(mask, [(0, 0), (0, 0), (0, columns - S)])[:, 0]
    ids = jnp.broadcast_to(mask.astype(jnp.int32), (B, columns))
    out = jax.vmap(
      lambda q, k, v, i: static(columns)(
        q, k, v, splash_attention.SegmentIds(jnp.ones(rows, jnp.int32), i)
      )
    )(*arrays, ids)
  else:
    mask, seen = _see_something(mask)
    pad = [(0, 0), (0, rows - mask.shape[1]), (0, columns - S)]
    mask = jnp.pad(mask, pad)
    if mask.shape[0] == 1:
      out = jax.vmap(kernel(mask))(*arrays)
    else:  # one by one: each row has blocks of its own to skip
      out = jax.lax.map(lambda x: kernel(x[3][None])(*x[:3]), (*arrays, mask))
  out = out.swapaxes(1, 2)[:, :T]
  return out if seen is None else jnp.where(seen[..., None, None], out, 0)
