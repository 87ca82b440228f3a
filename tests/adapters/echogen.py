# SPDX-License-Identifier: Apache-2.0
"""Janus-Pro, the base of EchoGen, as its reference computes it."""

import jax
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file

from spatial_jax import hf
from spatial_jax.models import janus


def understanding(folder, config):
  """The path from images and text to logits."""
  published = janus.VARIANTS["1b"]
  model = janus.Model(
    vit=FrozenConfigDict(
      {
        **published["vit"],
        "width": config["vit_dim"],
        "layers": config["vit_depth"],
        "heads": config["vit_heads"],
        "mlp": 4 * config["vit_dim"],
        "patch": config["patch_size"],
        "image": config["image_size"],
      }
    ),
    llm=FrozenConfigDict(
      {
        **published["llm"],
        "vocab": config["vocab"],
        "width": config["hidden"],
        "layers": config["layers"],
        "heads": config["heads"],
        "kv_heads": config["heads"],
        "mlp": config["inter"],
      }
    ),
    image_token=config["ids"]["image"],
  )
  inputs = load_file(folder / "inputs.safetensors")
  tokens = inputs["und_input_ids"].astype("int32")
  rows, length = tokens.shape
  positions = jax.numpy.broadcast_to(jax.numpy.arange(length), tokens.shape)
  images = inputs["pixel_values"].transpose(0, 2, 3, 1)
  batch = {
    "tokens": tokens,
    "positions": positions,
    "segments": jax.numpy.ones_like(tokens),
    "images": images.reshape(rows, -1, *images.shape[1:]),
  }
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **batch))
  params = hf.load(
    janus.KEYS,
    folder / "weights.safetensors",
    shapes["params"],
    ignore=janus.IGNORE,
  )
  logits, out = jax.jit(lambda p, b: model.apply({"params": p}, **b))(
    params, batch
  )
  got = {
    "und_logits": logits,
    "und_aligned": out["vit/connected"].reshape(
      len(images), -1, model.llm.width
    ),
    "und_vision": out["vit/tokens"],
  }
  got = {name: jax.device_get(value) for name, value in got.items()}
  return got, load_file(folder / "outputs.safetensors")


ADAPTERS = {("echogen", "janus"): understanding}
