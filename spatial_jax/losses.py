# SPDX-License-Identifier: Apache-2.0
"""Losses of token predictions.

Letters: B batch, T length, D width, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from spatial_jax import sharding
from spatial_jax.nn import attention, slots
from spatial_jax.types import Array, Float, Int

Metrics = dict[str, Array]

_FEW = 512  # tokens of a device, of which none is left out


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def token_losses(
  logits: Float[Array, ...], labels: Int[Array, "*b"], axis: int = -1
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
  """Cross-entropy and correctness (0 or 1) of each prediction, in float32.

  The gradient, of the cross-entropy alone, computes the probabilities again:
  kept, they are as large as the logits.

  Args:
    logits: [*b V], or [V *b] if `axis`, that of the words, is 0.
  """
  return _token_losses(logits, labels, axis)[0]


def _token_losses(logits, labels, axis):
  kept = logits, labels
  logits = logits.astype(jnp.float32)
  top = jnp.max(logits, axis)
  total = jnp.sum(jnp.exp(logits - jnp.expand_dims(top, axis)), axis)
  log_total = top + jnp.log(total)
  if sharding.platform() == "cpu":
    # There, what the sum below adds up is written first, large as the logits.
    words = jnp.expand_dims(labels, axis)
    chosen = jnp.take_along_axis(logits, words, axis, mode="clip")
    chosen = jnp.squeeze(chosen, axis)
  else:
    # No gather: a sharded vocabulary stays sharded.
    hit = _hit(logits, labels, axis)
    chosen = jnp.sum(jnp.where(hit, logits, 0.0), axis)
  correct = (chosen >= top).astype(jnp.float32)
  return (log_total - chosen, correct), (*kept, log_total)


def _hit(logits, labels, axis):
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis % logits.ndim)
  return ids == jnp.expand_dims(labels, axis)


def _of_logits(axis, kept, gradients):
  logits, labels, log_total = kept
  weight, log_total = (
    jnp.expand_dims(x, axis) for x in (gradients[0], log_total)
  )
  share = jnp.exp(logits.astype(jnp.float32) - log_total)
  # No scatter into zeros, but a comparison.
  out = jnp.where(_hit(logits, labels, axis), share - 1, share) * weight
  return out.astype(logits.dtype), None


token_losses.defvjp(_token_losses, _of_logits)


def next_token(
  logits: Float[Array, "B T V"],
  labels: Int[Array, "B T"],
  weight: Float[Array, "B T"],
) -> tuple[Float[Array, ""], Metrics]:
  """sum(weight * cross-entropy) / sum(weight); labels are already shifted."""
  return _reduce(*token_losses(logits, labels), _shares(weight))


def next_token_of(
  hidden: Float[Array, "B T D"],
  head: Float[Array, "D V"] | Float[Array, "V D"],
  labels: Int[Array, "B T"],
  weight: Float[Array, "B T"],
  tokens: int = 0,
  *,
  tied: bool = False,
) -> tuple[Float[Array, ""], Metrics]:
  """`next_token` of hidden @ head, of which unlabelled rows may be left out.

  A device with rows of its own takes tokens with labels first, a part at a
  time, and leaves out what is behind them: questions, images and padding.
  (A TPU leaves out whole parts only.) Gradients are computed with the losses,
  while logits are at hand: no product is done again.

  Args:
    head: the kernel, or, `tied`, the table of words; so both gradients of a
      table are added first, and then over devices.
    weight: 0 of tokens without a label. It is data: it gets no gradient.
    tokens: most whose logits a device holds at once; 0: all. To read and write
      the head's gradient, each part takes as long as for some 500 tokens more.

  Raises:
    ValueError: `tokens` is less than 0.
  """
  if tokens < 0:
    raise ValueError(
      f"config.model.loss_tokens={tokens}: expected how many tokens' logits a "
      "device may hold, 1 or more, or 0 for all"
    )
  shares = _shares(jax.lax.stop_gradient(weight))
  return _of_hidden((tokens, tied), hidden, head, labels, shares)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_hidden(how, hidden, head, labels, shares):
  parts, _ = _on_devices((*how, False), hidden, head, labels, shares)
  return _reduce(*parts, shares)


def _forward(how, hidden, head, labels, shares):
  parts, of_head = _on_devices((*how, True), hidden, head, labels, shares)
  *parts, of_hidden = parts
  return _reduce(*parts, shares), (of_hidden, of_head)


def _backward(how, kept, gradients):
  del how
  of_loss = gradients[0] + gradients[1]["loss"]
  return *(x * of_loss.astype(x.dtype) for x in kept), None, None


_of_hidden.defvjp(_forward, _backward)


def _on_devices(how, hidden, head, labels, shares):
  """Losses of all tokens; with gradients also of hidden states and head."""
  rows = sharding.rows_alone(hidden.shape[0])
  if rows is None:
    run = _of_labelled if sharding.single() else _in_parts
    return run(how, hidden, head, labels, shares)

  # The compiler would sum the head's gradient over devices in every part.
  def run(*arguments):
    parts, of_head = _of_labelled(how, *arguments)
    return parts, jax.lax.psum(of_head, rows[0])

  specs = rows, P(), rows, rows
  run = jax.shard_map(
    run, in_specs=specs, out_specs=(rows, P()), check_vma=False
  )
  return run(hidden, head, labels, shares)


def _of_labelled(how, hidden, head, labels, shares):
  """`_in_parts` of a device's tokens, those with labels in front."""
  B, T = labels.shape
  one = not how[0] or how[0] >= B * T
  if B * T < _FEW or (one and sharding.platform() == "tpu"):
    return _in_parts(how, hidden, head, labels, shares)
  labelled = (shares != 0).reshape(1, B * T)
  order, place = slots.in_front(labelled, B * T)

  def moved(x, order, shape):
    y = slots.take(x.reshape(1, B * T, *x.shape[2:]), order)
    return y.reshape(*shape, *x.shape[2:])

  rows = (moved(x, order, (1, B * T)) for x in (hidden, labels, shares))
  hidden, labels, shares = rows
  count = jnp.sum(labelled)
  parts, of_head = _in_parts(how, hidden, head, labels, shares, count)
  return tuple(moved(x, place, (B, T)) for x in parts), of_head


def _in_parts(how, hidden, head, labels, shares, labelled=None):
  """As many equal parts of the length as it takes, in turn.

  What is behind the first `labelled` tokens may be left out: zeros.
  """
  tokens, tied, gradients = how
  B, T, D = hidden.shape
  count = -(-sharding.own_rows(B) * T // tokens) if tokens else 1
  count = min(1 << (count - 1).bit_length(), T)  # most lengths divide
  size = -(-T // count)
  # On CPUs, rows of 2^14 logits take twice as long to write as columns do.
  words = 0 if sharding.platform() == "cpu" else 1
  side = 0 if tied else 1  # of the head, its words

  def part(total, hidden, labels, shares):
    shape = labels.shape
    hidden = hidden.reshape(-1, D)
    kernel = head.astype(hidden.dtype)
    pair = (hidden, 1), (kernel, 1 - side)
    logits = _product(*pair if words else pair[::-1])
    parts, kept = _token_losses(logits, labels.reshape(-1), words)
    if gradients:
      of_logits, _ = _of_logits(words, kept, (shares.reshape(-1),))
      of_hidden = _product((of_logits, words), (kernel, side))
      of_table = _product((of_logits, 1 - words), (hidden, 0))
      of_table = of_table.astype(head.dtype)
      parts = *parts, of_hidden
      total = of_table if total is None else total + of_table
    return total, tuple(x.reshape(*shape, *x.shape[1:]) for x in parts)

  def some(length):
    def branch(total, *inputs):
      if length:
        total, parts = part(total, *(x[:, :length] for x in inputs))
      else:
        hidden, _, shares = inputs
        parts = [x[:, :0] for x in (shares, shares, hidden)[: 2 + gradients]]
        total = nothing if gradients and total is None else total
      return total, tuple(_longer(x, size) for x in parts)

    # A plan is of labels everywhere.
    return attention.share(branch, int(length == size), 1)

  def turn(total, inputs):
    start, *inputs = inputs
    if labelled is None:
      return part(total, *inputs)
    number = jnp.sum(labelled - start > jnp.array(lengths[:-1]))
    return jax.lax.switch(number, [some(x) for x in lengths], total, *inputs)

  # Each is a program more, for which a TPU's compiler takes 10 s.
  eighths = (0, 8) if sharding.platform() == "tpu" else (0, 1, 2, 4, 6, 8)
  lengths = [size * x // 8 for x in eighths]

  def split(x):
    x = _longer(x, count * size)
    return jnp.moveaxis(x.reshape(B, count, size, *x.shape[2:]), 1, 0)

  def join(x):
    return jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T]

  nothing = jnp.zeros(head.shape if tied else head.shape[::-1], head.dtype)
  inputs = jnp.arange(count) * size, *map(split, (hidden, labels, shares))
  if count > 1:
    total = nothing if gradients else None
    total, parts = jax.lax.scan(turn, total, inputs)
  else:
    total, parts = turn(None, [x[0] for x in inputs])
    parts = [x[None] for x in parts]
  if not gradients:
    return tuple(map(join, parts)), None
  if not tied and not words:
    # The product that is fast writes columns: in a row, they are turned once
    # and not by all who read them.
    row = jax.lax.optimization_barrier(total).T.reshape(-1)
    total = jax.lax.optimization_barrier(row).reshape(head.shape)
  elif not tied:
    total = total.T
  return tuple(map(join, parts)), total


def _longer(x, length):
  """With zeros behind, along the second axis."""
  missing = length - x.shape[1]
  return jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))


def _product(left, right):
  """Of two matrices, over an axis of each."""
  (left, i), (right, j) = left, right
  return jax.lax.dot_general(left, right, (((i,), (j,)), ((), ())))


def _shares(weight):
  weight = weight.astype(jnp.float32)
  # The floor only serves batches without any label: they give 0, not NaN.
  return weight / jnp.maximum(jnp.sum(weight), 1e-9)


def _reduce(cross_entropy, correct, shares):
  loss = jnp.sum(cross_entropy * shares)
  return loss, {"loss": loss, "accuracy": jnp.sum(correct * shares)}
