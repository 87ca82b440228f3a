# SPDX-License-Identifier: Apache-2.0
"""Losses of token predictions.

Letters: B batch, T length, D width, V vocabulary.
"""

from __future__ import annotations

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
  return _reduce(*token_losses(logits, labels), weight)


def next_token_chunked(
  hidden: Float[Array, "B T D"],
  kernel: Float[Array, "D V"],
  labels: Int[Array, "B T"],
  weight: Float[Array, "B T"],
  chunks: int,
) -> tuple[Float[Array, ""], Metrics]:
  """`next_token` that never holds the logits of more than T / chunks tokens."""
  B, T, D = hidden.shape
  if T % chunks:
    raise ValueError(
      f"a length of {T} tokens cannot be cut in {chunks} equal loss chunks; "
      "set model.loss_chunks to a divisor"
    )

  def run(hidden, table, labels):
    @jax.checkpoint
    def chunk(_, inputs):
      hidden, labels = inputs
      logits = hidden.reshape(-1, D) @ table.astype(hidden.dtype).T
      return None, token_losses(logits.reshape(*labels.shape, -1), labels)

    def split(x):
      x = x.reshape(-1, chunks, T // chunks, *x.shape[2:])
      return jnp.moveaxis(x, 1, 0)

    _, parts = jax.lax.scan(chunk, None, (split(hidden), split(labels)))
    return tuple(jnp.moveaxis(part, 0, 1).reshape(-1, T) for part in parts)

  # The compiler would sum the kernel's gradient over devices in every chunk. It
  # goes in as a table of words lies: then those of a tied one are added first.
  rows = sharding.rows_alone(B)
  if rows:
    run = jax.shard_map(
      run, in_specs=(rows, P(), rows), out_specs=(rows, rows), check_vma=False
    )
  return _reduce(*run(hidden, kernel.T, labels), weight)


def _reduce(cross_entropy, correct, weight):
  weight = weight.astype(jnp.float32)
  # The floor only serves batches without any label: they give 0, not NaN.
  total = jnp.maximum(jnp.sum(weight), 1e-9)
  loss = jnp.sum(cross_entropy * weight) / total
  accuracy = jnp.sum(correct * weight) / total
  return loss, {"loss": loss, "accuracy": accuracy}
