# SPDX-License-Identifier: Apache-2.0
"""A tiny Qwen2.5-VL folder as one downloads it: weights, config, tokenizer.

transformers writes it where it is installed; elsewhere the library does, with
the same random weights.
"""

import importlib.util
import json
import pathlib
import shutil

import jax
import numpy as np

from configs import qwen2_5_vl_sft
from spatial_jax import hf
from spatial_jax import system as systems
from spatial_jax.data import pipeline, text

HAS_TORCH = all(
  importlib.util.find_spec(name) for name in ("torch", "transformers")
)
ONLY_TORCH = "torch and transformers are not installed"


def sizes() -> dict:
  """config.json; of the sizes that the recipe's `test` has."""
  tokenizer = text.Tokenizer.load()
  return {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "text_config": {
      "model_type": "qwen2_5_vl_text",
      "vocab_size": tokenizer.vocab_size,
      "hidden_size": 64,
      "intermediate_size": 96,
      "num_hidden_layers": 3,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "rms_norm_eps": 1e-6,
      "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [2, 3, 3],
      },
      "bos_token_id": None,
      "eos_token_id": tokenizer.end_id,
      "pad_token_id": tokenizer.pad_id,
    },
    "vision_config": {
      "model_type": "qwen2_5_vl",
      "depth": 4,
      "hidden_size": 32,
      "intermediate_size": 48,
      "num_heads": 2,
      "patch_size": 4,
      "temporal_patch_size": 2,
      "spatial_merge_size": 2,
      "window_size": 16,
      "fullatt_block_indexes": [1, 3],
      "out_hidden_size": 64,
      "tokens_per_second": 2,
    },
    "image_token_id": tokenizer.token_id("<|image_pad|>"),
    "video_token_id": tokenizer.token_id("<|video_pad|>"),
    "tie_word_embeddings": False,
  }


def write(folder: pathlib.Path) -> None:
  """Fills a folder with random weights of the recipe's tiny model."""
  folder.mkdir(exist_ok=True)
  config = qwen2_5_vl_sft.get_config("test")
  system = systems.build(config, pipeline.example(config), config.batch_size)
  shapes = jax.eval_shape(system.init, jax.random.key(0))
  rng = np.random.default_rng(0)

  def draw(path, x):
    name, noise = jax.tree_util.keystr(path), rng.normal(size=x.shape)
    if "norm" in name:
      noise = 1 + 0.2 * noise
    elif "bias" in name:
      noise = 0.2 * noise
    elif "kernel" in name:
      noise = noise * np.prod(x.shape[-2:-1]) ** -0.5
    return noise.astype(np.float32)

  params = jax.tree_util.tree_map_with_path(draw, shapes)
  hf.save(system.mod.KEYS, params, folder)
  (folder / "config.json").write_text(json.dumps(sizes(), indent=2))
  if HAS_TORCH:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
      folder, dtype=torch.float32
    )
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
  for file in text.WORLD_TOKENIZER.iterdir():
    shutil.copy(file, folder)
