# SPDX-License-Identifier: Apache-2.0
"""Small random models of transformers to compare with, and how."""

import jax
import numpy as np
import pytest

from spatial_jax import hf

WHY = "parity is shown beside a live reference, which isn't installed"
# Compiling takes most of the time here.
OPTIONS = {"xla_backend_optimization_level": 0}


def packages():
  """torch and transformers, or a skip."""
  return tuple(
    pytest.importorskip(name, reason=WHY) for name in ("torch", "transformers")
  )


def randomize(model, seed=0):
  """Random numbers in every parameter of transformers' model."""
  torch, _ = packages()
  generator = torch.Generator().manual_seed(seed)
  model = model.float().eval()
  with torch.no_grad():
    for name, value in model.named_parameters():
      noise = torch.randn(value.shape, generator=generator)
      if value.ndim == 1:  # norms keep their mean of one, or of zero
        value.add_(0.3 * noise)
      elif "embed" in name and value.ndim == 2:
        value.copy_(0.1 * noise)
      else:
        fan_in = value.shape[0 if "mm_input" in name else 1 :].numel()
        value.copy_(1.5 * noise * fan_in**-0.5)
  return model


def load(model, mod, reference, folder, batch):
  """Parameters of our model from what transformers' writes."""
  reference.save_pretrained(folder)
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), **mod.arguments(batch))
  )
  return hf.load(mod.KEYS, folder, shapes["params"])


def renamed(names, *pairs):
  """Tensors with parts of their names replaced."""
  for old, new in pairs:
    names = {name.replace(old, new): x for name, x in names.items()}
  return names


def worst(got, want):
  """Largest difference relative to the largest number that is wanted."""
  return np.max(np.abs(got - want)) / np.max(np.abs(want))
