# SPDX-License-Identifier: Apache-2.0
"""Optimizer and schedule from config.optimizer.

Choices by parameter are ordered lists of (regex over the whole name, value):
the first match wins, every parameter must match, and a regex that matches
nothing is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict
from optax import contrib

from spatial_jax import trees

# The last two dimensions are a matrix (in, out); a scanned layer axis before
# them is batched over, so each layer is orthogonalised by itself.
_MATRIX = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


class Optimizer(NamedTuple):
  tx: optax.GradientTransformation  # on the trainable subset of the parameters
  schedule: Callable[[Any], Any]  # step -> learning rate
  trainable: Any  # tree of bool


class Master(NamedTuple):
  """State of an optimizer that steps float32 copies of the parameters."""

  master: Any
  inner: Any


def make_schedule(
  lr: float,
  steps: int,
  *,
  warmup: float,
  constant: float,
  decay: str,
  final: float,
) -> Callable[[Any], Any]:
  """Learning rate by step; warmup and constant are fractions of steps."""
  if decay not in ("linear", "cosine", "none"):
    raise ValueError(
      f"config.optimizer.schedule.decay={decay!r}; expected 'linear', 'cosine' "
      "or 'none'"
    )
  if not (0 <= warmup <= 1 and 0 <= constant <= 1):
    raise ValueError(
      "config.optimizer.schedule.warmup and .constant are fractions of "
      f"config.steps between 0 and 1, got {warmup} and {constant}"
    )
  rise = max(round(warmup * steps), 1)
  hold = max(round(constant * steps), rise)

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    up = jnp.minimum((step + 1) / rise, 1.0)
    done = jnp.clip((step - hold) / max(steps - hold, 1), 0.0, 1.0)
    if decay == "none":
      left = 1.0
    elif decay == "linear":
      left = 1 - done
    else:
      left = 0.5 * (1 + jnp.cos(jnp.pi * done))
    return lr * up * (final + (1 - final) * left)

  return schedule


def subset(params: Any, mask: Any) -> Any:
  """Leaves where the mask is True; None, an empty subtree, elsewhere."""
  return jax.tree.map(lambda m, p: p if m else None, mask, params)


def merge(part: Any, whole: Any) -> Any:
  """`whole` with the leaves that `part` has."""
  return jax.tree.map(
    lambda p, w: w if p is None else p, part, whole, is_leaf=_is_none
  )


def _is_none(x: Any) -> bool:
  return x is None


def apply(params: Any, updates: Any, state: Any) -> Any:
  """Parameters after a step that led to this optimizer state."""
  if not isinstance(state, Master):
    return optax.apply_updates(params, updates)
  # Not by adding updates: those below half a unit of the last place are lost.
  return jax.tree.map(lambda p, m: m.astype(p.dtype), params, state.master)


def _in_float32(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """State in float32 from the start, as gradients are, whatever parameters are.

  Moments would begin in the parameters' type and change theirs in the first
  step, so that the second one is compiled anew.
  """

  def init(params):
    return tx.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))

  return optax.GradientTransformation(init, tx.update)


def _with_master(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
  def init(params):
    master = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    return Master(master, tx.init(master))

  def update(updates, state, params=None):
    del params
    updates, inner = tx.update(updates, state.inner, state.master)
    master = optax.apply_updates(state.master, updates)
    return updates, Master(master, inner)

  return optax.GradientTransformation(init, update)


def _clip(most: float) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm` with one factor instead of two for each number.

  A product is computed where it is read; quotients would be written first, as
  large as the parameters.
  """

  def clip(updates, _):
    factor = jnp.minimum(1.0, most / optax.tree.norm(updates))
    return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)

  return optax.stateless(clip)


def _scale(factors: Any) -> optax.GradientTransformation:
  return optax.stateless(
    lambda updates, _: jax.tree.map(lambda f, u: f * u, factors, updates)
  )


def _shape_factor(update: jax.Array) -> jax.Array:
  """sqrt(max(1, out / in)): https://github.com/KellerJordan/Muon."""
  fan_in, fan_out = update.shape[-2:]
  return math.sqrt(max(1.0, fan_out / fan_in)) * update


def _muon(
  config: ConfigDict, shapes: Any, adam: optax.GradientTransformation
) -> tuple[optax.GradientTransformation, Any]:
  """Muon for the chosen matrices, Adam for the rest; and the lr factors."""
  chosen = trees.match(
    shapes, config.muon.matrices, "config.optimizer.muon.matrices"
  )
  for name, leaf in trees.flatten(subset(shapes, chosen)).items():
    if len(leaf.shape) < 2:
      raise ValueError(
        f"config.optimizer.muon.matrices picks {name} of shape {leaf.shape}; "
        "Muon updates matrices (scanned or not) only"
      )
  muon = optax.chain(
    contrib.scale_by_muon(
      ns_steps=config.muon.iterations,
      beta=config.muon.momentum,
      weight_dimension_numbers=lambda tree: jax.tree.map(
        lambda _: _MATRIX, tree
      ),
    ),
    optax.stateless(lambda updates, _: jax.tree.map(_shape_factor, updates)),
  )
  labels = jax.tree.map(lambda m: "muon" if m else "adam", chosen)
  factors = jax.tree.map(lambda m: 1.0 if m else config.muon.adam_lr, chosen)
  return optax.partition({"muon": muon, "adam": adam}, labels), factors


def make(config: ConfigDict, steps: int, params: Any) -> Optimizer:
  """Optimizer of config.optimizer for parameters (or their shapes)."""
  frozen = trees.match(params, config.freeze, "config.optimizer.freeze")
  trainable = jax.tree.map(lambda f: not f, frozen)
  if not any(jax.tree.leaves(trainable)):
    raise ValueError("config.optimizer.freeze leaves no parameter to train")
  # Rules are matched on all parameters: freezing some must not turn a rule
  # about them into an error.
  decay = trees.match(params, config.decay, "config.optimizer.decay")
  factors = trees.match(params, config.lr_mult, "config.optimizer.lr_mult")
  schedule = make_schedule(config.lr, steps, **config.schedule.to_dict())

  direction = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
  if config.name == "muon":
    shapes = subset(params, trainable)
    direction, extra = _muon(config, shapes, direction)
    factors = jax.tree.map(
      lambda e, f: e * f, extra, subset(factors, trainable)
    )
  elif config.name != "adamw":
    raise ValueError(
      f"config.optimizer.name={config.name!r}; expected 'adamw' or 'muon'"
    )
  parts = [_clip(config.clip)] if config.clip else []
  parts.append(direction)
  if config.weight_decay:
    parts.append(
      optax.add_decayed_weights(config.weight_decay, subset(decay, trainable))
    )
  parts.append(_scale(subset(factors, trainable)))
  parts.append(optax.scale_by_learning_rate(schedule))
  tx = optax.chain(*parts)
  tx = _with_master(tx) if config.master else _in_float32(tx)
  return Optimizer(tx, schedule, trainable)
