# SPDX-License-Identifier: Apache-2.0
"""Linear probes of what tokens know, and the directions they find.

features [N D], labels [N] -> a linear layer (D -> classes) after 200 steps of
full-batch AdamW, as arXiv 2603.22278 trains it. All steps are one `lax.scan`;
`vmap` trains many probes at once (slots, axes, controls).

Letters: N tokens, D width, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from spatial_jax.types import Array, Bool, Float, Int

STEPS, RATE, DECAY = 200, 1e-3, 1e-4


class Probe(NamedTuple):
  """A linear layer; its columns are the directions of the classes."""

  kernel: Float[Array, "*n D C"]
  bias: Float[Array, "*n C"]


def start(key: jax.Array, width: int, classes: int) -> Probe:
  """Weights and bias with deviation 1/sqrt(D)."""
  first, second = jax.random.split(key)
  scale = width**-0.5
  return Probe(
    scale * jax.random.normal(first, (width, classes)),
    scale * jax.random.normal(second, (classes,)),
  )


def loss(
  probe: Probe,
  x: Float[Array, "N D"],
  y: Int[Array, " N"],
  mask: Bool[Array, " N"] | None = None,
) -> Float[Array, ""]:
  """Mean cross-entropy of the rows of a mask (of all without one)."""
  value = optax.softmax_cross_entropy_with_integer_labels(logits(probe, x), y)
  if mask is None:
    return value.mean()
  return jnp.where(mask, value, 0).sum() / jnp.maximum(mask.sum(), 1)


def fit(
  probe: Probe,
  x: Float[Array, "N D"],
  y: Int[Array, " N"],
  mask: Bool[Array, " N"] | None = None,
  *,
  steps: int = STEPS,
  rate: float = RATE,
  decay: float = DECAY,
) -> tuple[Probe, Float[Array, " steps"]]:
  """Trains a probe; also the loss before each step.

  Args:
    mask: rows that count.
    decay: of the bias as well.
  """
  optimizer = optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=decay)

  def step(carry, _):
    probe, state = carry
    value, gradient = jax.value_and_grad(loss)(probe, x, y, mask)
    update, state = optimizer.update(gradient, state, probe)
    return (optax.apply_updates(probe, update), state), value

  carry = probe, optimizer.init(probe)
  (probe, _), values = jax.lax.scan(step, carry, None, length=steps)
  return probe, values


def logits(probe: Probe, x: Float[Array, "*n D"]) -> Float[Array, "*n C"]:
  """Scores of the classes, in float32 on every device."""
  y = jnp.einsum("...d,dc->...c", x, probe.kernel, precision="highest")
  return y + jnp.expand_dims(probe.bias, tuple(range(x.ndim - 1)))


def probabilities(
  probe: Probe, x: Float[Array, "*n D"]
) -> Float[Array, "*n C"]:
  """Of the classes, at any tokens: the paper's heat maps."""
  return jax.nn.softmax(logits(probe, x))


def accuracy(
  probe: Probe,
  x: Float[Array, "N D"],
  y: Int[Array, " N"],
  mask: Bool[Array, " N"] | None = None,
) -> Float[Array, ""]:
  """Share of the rows of a mask whose likeliest class is right."""
  right = logits(probe, x).argmax(-1) == y
  if mask is None:
    return right.mean()
  return (right & mask).sum() / jnp.maximum(mask.sum(), 1)


def random_like(key: jax.Array, probe: Probe) -> Probe:
  """A probe with Gaussian directions of length 1 and no bias."""
  kernel = jax.random.normal(key, probe.kernel.shape)
  kernel /= jnp.linalg.norm(kernel, axis=-2, keepdims=True)
  return Probe(kernel, jnp.zeros_like(probe.bias))


def fit_with_controls(
  key: jax.Array,
  x: Float[Array, "N D"],
  y: Int[Array, " N"],
  held_x: Float[Array, "K D"],
  held_y: Int[Array, " K"],
  *,
  classes: int,
  steps: int = STEPS,
) -> tuple[Probe, dict[str, Float[Array, ""]]]:
  """A probe, its score on held-out rows, and those of two controls.

  Features are divided by their deviation over the training rows, so that one
  learning rate serves every layer; the probe returned reads features as they
  are. `shuffled` learned labels in another order; `random` reads only two
  random directions of the features, and learns what it can from these.
  """
  keys = jax.random.split(key, 4)
  center = x.mean(0, keepdims=True)
  scale = jnp.sqrt(jnp.mean((x - center) ** 2)) + 1e-6
  x, held_x = (x - center) / scale, (held_x - center) / scale
  first = start(keys[0], x.shape[1], classes)
  other = jax.random.permutation(keys[1], y)
  both, _ = jax.vmap(lambda y: fit(first, x, y, steps=steps))(
    jnp.stack([y, other])
  )
  probe, shuffled = (Probe(*row) for row in zip(*both, strict=True))
  # As many directions as classes: what any subspace of this size tells.
  lens = jax.random.normal(keys[2], (x.shape[1], classes))
  lens /= jnp.linalg.norm(lens, axis=0, keepdims=True)
  lens_x = jnp.einsum("nd,dc->nc", x, lens)
  blind, _ = fit(start(keys[3], classes, classes), lens_x, y, steps=steps)
  scores = {
    "train": accuracy(probe, x, y),
    "held_out": accuracy(probe, held_x, held_y),
    "shuffled": accuracy(shuffled, held_x, held_y),
    "random": accuracy(blind, jnp.einsum("nd,dc->nc", held_x, lens), held_y),
  }
  kernel = probe.kernel / scale
  shift = jnp.einsum("kd,dc->kc", center, kernel)[0]
  return Probe(kernel, probe.bias - shift), scores
