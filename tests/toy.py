# SPDX-License-Identifier: Apache-2.0
"""The smallest model and recipe that fulfil the contracts.

--config=tests/toy.py; `nan=5` gives an infinite loss from step 5 on.
"""

import sys
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from configs import common
from tests import toy_data

VARIANTS = {"tiny": {"width": 8, "layers": 2}}


class Block(nn.Module):
  width: int

  @nn.compact
  def __call__(self, x, _):
    y = nn.Dense(2 * self.width, name="up")(nn.LayerNorm(name="norm")(x))
    return x + nn.Dense(self.width, name="down")(nn.gelu(y)), None


class Decoder(nn.Module):
  width: int
  layers: int

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(toy_data.VOCAB, self.width, name="embed")(tokens)
    blocks = nn.scan(
      Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.layers,
    )
    x, _ = blocks(self.width, name="blocks")(x, None)
    return nn.Dense(toy_data.VOCAB, use_bias=False, name="head")(x)


class Model(nn.Module):
  width: int
  layers: int
  nan_at: int = -1

  @nn.compact
  def __call__(self, tokens, train: bool = False):
    logits = Decoder(self.width, self.layers, name="llm")(tokens)
    return logits, {"logits": logits}


def arguments(batch: Mapping):
  return {"tokens": batch["tokens"]}


def loss(model, params, batch, *, rngs=None, train=True):
  logits, out = model.apply({"params": params}, **arguments(batch), rngs=rngs)
  labels, weight = batch["labels"], batch["loss_weight"]
  each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  value = (weight * each).sum() / weight.sum()
  if model.nan_at >= 0:  # in the batch that holds this row
    value = jnp.where((batch["index"] == model.nan_at).any(), jnp.nan, value)
  return value, ({"weight": weight.sum()}, out)


def INPUTS(config):
  shape = (config.batch_size, toy_data.LENGTH)
  return {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32)}


def evaluate(config, model, mod, params, mesh, *, rows=4):
  """An evaluator: mean accuracy on the first rows of the test split."""
  source = toy_data.make(config, "test")
  tokens = jnp.stack([source[i]["tokens"] for i in range(rows)])
  logits, _ = model.apply({"params": params}, tokens)
  return {"accuracy": float((logits.argmax(-1) == tokens).mean())}


def get_config(arg: str = "") -> ConfigDict:
  arg = common.parse_arg(arg, nan=-1, eval_every=0)
  config = common.defaults()
  config.steps, config.batch_size = 6, 8
  config.data.source = "tests.toy_data"
  config.data.slow_after, config.data.pause = 0, 0.0
  config.data.rows = ConfigDict({"train": 100, "test": 4})
  config.model_name = "toy"
  config.model = ConfigDict({"variant": "tiny", "width": 8, "nan_at": arg.nan})
  config.optimizer.lr = 1e-2
  config.logging.tensorboard = False
  config.checkpoint.every = 2
  config.evals.copy = ConfigDict(
    {"name": "tests.toy", "every": arg.eval_every, "rows": 4}
  )
  # models.build looks a model up by import path.
  from tests import toy

  sys.modules["spatial_jax.models.toy"] = toy
  return config
