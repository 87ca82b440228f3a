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

# Of a device's tokens, at which logits are computed if they hold all labels.
EIGHTHS = 1, 2, 4, 6
FEW = 512  # tokens of a device, of which all are computed


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

  A device with rows of its own computes the least of `EIGHTHS` of its tokens
  that holds all labels: questions, images and padding have none. Gradients are
  computed with the losses, while logits are at hand: no product is done again.

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
  """`_in_parts` of what `EIGHTHS` says; zeros for the other tokens."""
  B, T = labels.shape
  run = functools.partial(_in_parts, how)
  if B * T < FEW:
    return run(hidden, head, labels, shares)
  sizes = [B * T * x // 8 for x in EIGHTHS]
  labelled = (shares != 0).reshape(1, B * T)
  order, place = slots.in_front(labelled, sizes[-1])

  def some(size):
    def there(x):
      return slots.take(x.reshape(1, B * T, *x.shape[2:]), order[:, :size])

    def back(x):
      y = slots.take(x, jnp.minimum(place, size - 1))
      y = jnp.where(labelled.reshape(1, -1, *[1] * (x.ndim - 2)), y, 0)
      return y.reshape(B, T, *x.shape[2:])

    def branch(hidden, head, labels, shares):
      inputs = there(hidden), head, there(labels), there(shares)
      parts, of_head = run(*inputs)
      return tuple(map(back, parts)), of_head

    return attention.share(branch, 0, 1)  # plans are of labels everywhere

  branches = [*map(some, sizes), attention.share(run, 1, 1)]
  number = jnp.sum(jnp.sum(labelled) > jnp.array(sizes))
  return jax.lax.switch(number, branches, hidden, head, labels, shares)


def _in_parts(how, hidden, head, labels, shares):
  """As many equal parts of the length as it takes, in turn."""
  tokens, tied, gradients = how
  B, T, _ = hidden.shape
  count = -(-sharding.own_rows(B) * T // tokens) if tokens else 1
  count = min(1 << (count - 1).bit_length(), T)  # most lengths divide
  # On CPUs, rows of 2^14 logits take twice as long to write as columns do.
  words = 0 if sharding.platform() == "cpu" else 1
  side = 0 if tied else 1  # of the head, its words

  def part(total, inputs):
    shape = inputs[1].shape
    hidden, labels, shares = (x.reshape(-1, *x.shape[2:]) for x in inputs)
    kernel = head.astype(hidden.dtype)
    pair = (hidden, 1), (kernel, 1 - side)
    logits = _product(*pair if words else pair[::-1])
    parts, kept = _token_losses(logits, labels, words)
    if gradients:
      of_logits, _ = _of_logits(words, kept, (shares,))
      of_hidden = _product((of_logits, words), (kernel, side))
      of_table = _product((of_logits, 1 - words), (hidden, 0))
      parts, total = (*parts, of_hidden), total + of_table.astype(head.dtype)
    return total, tuple(x.reshape(*shape, *x.shape[1:]) for x in parts)

  def split(x):
    if missing := -T % count:
      x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(B, count, -1, *x.shape[2:]), 1, 0)

  def join(x):
    return jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T]

  total = jnp.zeros(head.shape if tied else head.shape[::-1], head.dtype)
  inputs = tuple(map(split, (hidden, labels, shares)))
  total, parts = jax.lax.scan(part, total, inputs)
  if not tied and not words:
    # The product that is fast writes columns: all in a row, they are turned once,
    # not by all who read them.
    row = jax.lax.optimization_barrier(total).T.reshape(-1)
    total = jax.lax.optimization_barrier(row).reshape(head.shape)
  elif not tied:
    total = total.T
  return tuple(map(join, parts)), total


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
