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
from spatial_jax.types import Array, Float, Int

Metrics = dict[str, Array]


@jax.custom_vjp
def token_losses(
  logits: Float[Array, "*b V"], labels: Int[Array, "*b"]
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
  """Cross-entropy and correctness (0 or 1) of each prediction, in float32.

  The gradient, of the cross-entropy alone, computes the probabilities again:
  kept, they are as large as the logits.
  """
  return _token_losses(logits, labels)[0]


def _token_losses(logits, labels):
  kept = logits, labels
  logits = logits.astype(jnp.float32)
  top = jnp.max(logits, axis=-1)
  total = jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
  log_total = top + jnp.log(total)
  if sharding.platform() == "cpu":
    # There, what the sum below adds up is written first, large as the logits.
    chosen = jnp.take_along_axis(logits, labels[..., None], -1, mode="clip")
    chosen = chosen[..., 0]
  else:
    # No gather: a sharded vocabulary stays sharded.
    chosen = jnp.sum(jnp.where(_hit(logits, labels), logits, 0.0), axis=-1)
  correct = (chosen >= top).astype(jnp.float32)
  return (log_total - chosen, correct), (*kept, log_total)


def _hit(logits, labels):
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, labels.ndim)
  return ids == labels[..., None]


def _of_logits(kept, gradients):
  logits, labels, log_total = kept
  weight = gradients[0][..., None]
  share = jnp.exp(logits.astype(jnp.float32) - log_total[..., None])
  # No scatter into zeros, but a comparison.
  out = jnp.where(_hit(logits, labels), share - 1, share) * weight
  return out.astype(logits.dtype), None


token_losses.defvjp(_token_losses, _of_logits)


def next_token(
  logits: Float[Array, "B T V"],
  labels: Int[Array, "B T"],
  weight: Float[Array, "B T"],
) -> tuple[Float[Array, ""], Metrics]:
  """sum(weight * cross-entropy) / sum(weight); labels are already shifted."""
  return _reduce(*token_losses(logits, labels), _shares(weight))


def next_token_chunked(
  hidden: Float[Array, "B T D"],
  kernel: Float[Array, "D V"],
  labels: Int[Array, "B T"],
  weight: Float[Array, "B T"],
  tokens: int,
) -> tuple[Float[Array, ""], Metrics]:
  """`next_token` in as many equal parts of the length as it takes.

  Gradients are computed with the losses, while a part's logits are at hand: no
  product is done again.

  Args:
    tokens: most whose logits a device holds at once. To read and write the
      kernel's gradient, each part takes as long as for some 500 tokens more.

  Raises:
    ValueError: `tokens` is less than 1.
  """
  if tokens < 1:
    raise ValueError(
      f"config.model.loss_tokens={tokens}: expected how many tokens' logits a "
      "device may hold, 1 or more, or 0 for all"
    )
  B, T, _ = hidden.shape
  parts = -(-sharding.own_rows(B) * T // tokens)
  chunks = min(1 << (parts - 1).bit_length(), T)  # most lengths divide
  if missing := -T % chunks:
    hidden = jnp.pad(hidden, ((0, 0), (0, missing), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, missing)))
    weight = jnp.pad(weight, ((0, 0), (0, missing)))
  # The kernel goes in as a table of words lies: of a tied one, both gradients
  # are added first, and then over devices.
  return _in_chunks(chunks, hidden, kernel.T, labels, _shares(weight))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_chunks(chunks, hidden, table, labels, shares):
  parts, _ = _scan(chunks, False, hidden, table, labels, shares)
  return _reduce(*parts, shares)


def _forward(chunks, hidden, table, labels, shares):
  parts, of_table = _scan(chunks, True, hidden, table, labels, shares)
  *parts, of_hidden = parts
  return _reduce(*parts, shares), (*parts, of_hidden, of_table)


def _backward(chunks, kept, gradients):
  del chunks
  cross_entropy, correct, of_hidden, of_table = kept
  of_loss = gradients[0] + gradients[1]["loss"]
  of_shares = of_loss * cross_entropy + gradients[1]["accuracy"] * correct
  scaled = (x * of_loss.astype(x.dtype) for x in (of_hidden, of_table))
  return *scaled, None, of_shares


_in_chunks.defvjp(_forward, _backward)


def _scan(chunks, gradients, hidden, table, labels, shares):
  """Losses of all tokens; with gradients also of hidden states and table."""

  def run(hidden, table, labels, shares):
    def chunk(total, inputs):
      hidden, labels, shares = inputs

      def losses(hidden, table):
        return token_losses(_logits(hidden, table), labels)

      if not gradients:
        return total, losses(hidden, table)
      parts, pull = jax.vjp(losses, hidden, table)
      of_hidden, of_table = pull((shares, jnp.zeros_like(shares)))
      return total + of_table, (*parts, of_hidden)

    def split(x):
      x = x.reshape(-1, chunks, x.shape[1] // chunks, *x.shape[2:])
      return jnp.moveaxis(x, 1, 0)

    def join(x):
      return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])

    total = jnp.zeros(table.shape, table.dtype)
    inputs = tuple(map(split, (hidden, labels, shares)))
    total, parts = jax.lax.scan(chunk, total, inputs)
    return tuple(map(join, parts)), jax.lax.psum(total, axes)

  # The compiler would sum the table's gradient over devices in every chunk.
  rows, axes = sharding.rows_alone(hidden.shape[0]), ()
  if rows:
    axes = rows[0]
    run = jax.shard_map(
      run,
      in_specs=(rows, P(), rows, rows),
      out_specs=(rows, P()),
      check_vma=False,
    )
  return run(hidden, table, labels, shares)


def _logits(hidden, table):
  B, T, D = hidden.shape
  logits = hidden.reshape(-1, D) @ table.astype(hidden.dtype).T
  return logits.reshape(B, T, -1)


def _shares(weight):
  weight = weight.astype(jnp.float32)
  # The floor only serves batches without any label: they give 0, not NaN.
  return weight / jnp.maximum(jnp.sum(weight), 1e-9)


def _reduce(cross_entropy, correct, shares):
  loss = jnp.sum(cross_entropy * shares)
  return loss, {"loss": loss, "accuracy": jnp.sum(correct * shares)}
