# SPDX-License-Identifier: Apache-2.0
"""What transformers' Qwen2.5-VL computes with small random weights.

`python tests/golden/make_qwen2_5_vl.py` records it in tests/golden/qwen2_5_vl,
for machines without PyTorch; where PyTorch is there, the tests call `run`
themselves. Needs torch and transformers 5.
"""

import json
import pathlib

import numpy as np

# Sizes as transformers names them; the library's "tiny" variant is the same.
VISION = {
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
}
TEXT = {
  "vocab_size": 128,
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
  "eos_token_id": None,
  "pad_token_id": 0,
}
IMAGE, VIDEO, START, END = 120, 121, 122, 123
NEW_TOKENS = 32

# A row is a list of numbers of text tokens and of (kind, grid) blocks. Windows
# are 4 x 4 patches, so that many of these grids cut them.
CASES = {
  "one_image": {
    "rows": [[3, ("image", (1, 8, 8)), 6], [4, ("image", (1, 6, 6)), 1]],
    "side": "left",
  },
  "images_left": {
    "rows": [
      [2, ("image", (1, 6, 10)), 3, ("image", (1, 4, 2)), 7],
      [5, ("image", (1, 2, 12)), 4],
    ],
    "side": "left",
  },
  "images_right": {
    "rows": [
      [4, ("image", (1, 10, 6)), 5],
      [1, ("image", (1, 4, 4)), 1, ("image", (1, 6, 6)), 9],
    ],
    "side": "right",
  },
  "video": {
    "rows": [
      [2, ("video", (5, 4, 6)), 6],
      [3, ("video", (2, 8, 4)), 2, ("image", (1, 6, 4)), 4],
    ],
    "side": "left",
    "second_per_grid": [0.7, 1.0],
  },
  "text": {"rows": [[17], [9]], "side": "left"},
}


def inputs(name: str) -> dict:
  """Tokens, masks and, row by row, grids and patches of a case."""
  case = CASES[name]
  rng = np.random.default_rng(sorted(CASES).index(name))
  rows, grids, patches, kinds = [], [], [], []
  for row in case["rows"]:
    tokens, row_grids, row_patches = [], [], []
    for part in row:
      if isinstance(part, int):
        tokens += rng.integers(1, 120, part).tolist()
        continue
      kind, grid = part
      pad = IMAGE if kind == "image" else VIDEO
      tokens += [START, *[pad] * (np.prod(grid) // 4), END]
      row_grids.append(grid)
      kinds.append(kind)
      row_patches.append(rng.normal(size=(np.prod(grid), 96)))
    rows.append(tokens)
    grids.append(row_grids)
    patches.append([p.astype(np.float32) for p in row_patches])
  length = max(map(len, rows))
  tokens = np.zeros((len(rows), length), np.int64)
  valid = np.zeros((len(rows), length), bool)
  for b, row in enumerate(rows):
    left = case["side"] == "left"
    place = slice(length - len(row), None) if left else slice(0, len(row))
    tokens[b, place], valid[b, place] = row, True
  return {
    "tokens": tokens,
    "valid": valid,
    "grids": grids,
    "patches": patches,
    "kinds": kinds,
    "second_per_grid": case.get("second_per_grid", []),
    "is_left_padded": case["side"] == "left",
  }


def reference():
  """transformers' model with random weights in every parameter."""
  import torch
  from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

  config = Qwen2_5_VLConfig(
    text_config=TEXT,
    vision_config=VISION,
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=START,
    vision_end_token_id=END,
    tie_word_embeddings=False,
  )
  config._attn_implementation = "eager"
  model = Qwen2_5_VLForConditionalGeneration(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, value in model.named_parameters():
      noise = torch.randn(value.shape, generator=generator)
      if "norm" in name or "ln_q" in name:
        value.copy_(1 + 0.2 * noise)
      elif name.endswith("bias"):
        value.copy_(0.2 * noise)
      elif "embed_tokens" in name:
        value.copy_(noise)
      else:
        value.copy_(noise * value[0].numel() ** -0.5)
  return model


def run(model, name: str) -> dict[str, np.ndarray]:
  """Positions, logits, loss, gradients (by parameter name), greedy tokens."""
  import torch

  case = inputs(name)
  tokens = torch.tensor(case["tokens"])
  kwargs = {
    "input_ids": tokens,
    "attention_mask": torch.tensor(case["valid"]).long(),
  }
  flat = [
    (kind, torch.tensor(grid), torch.tensor(patches))
    for kind, (grid, patches) in zip(
      case["kinds"],
      [
        pair
        for row in zip(case["grids"], case["patches"], strict=True)
        for pair in zip(*row, strict=True)
      ],
      strict=True,
    )
  ]
  types = (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()
  for kind, pixels, grid in (
    ("image", "pixel_values", "image_grid_thw"),
    ("video", "pixel_values_videos", "video_grid_thw"),
  ):
    mine = [part for part in flat if part[0] == kind]
    if mine:
      kwargs[pixels] = torch.cat([part[2] for part in mine])
      kwargs[grid] = torch.stack([part[1] for part in mine])
      kwargs["mm_token_type_ids"] = types
  if case["second_per_grid"]:
    kwargs["second_per_grid_ts"] = torch.tensor(case["second_per_grid"])
  labels = tokens.masked_fill(~torch.tensor(case["valid"]), -100)
  labels[types > 0] = -100
  # A first token is not predicted from the padding before it.
  labels[:, 1:][~torch.tensor(case["valid"][:, :-1])] = -100
  model.zero_grad()
  model.model.rope_deltas = None
  out = model(**kwargs, labels=labels)
  out.loss.backward()
  result = {
    "logits": out.logits.detach().numpy(),
    "loss": out.loss.detach().numpy(),
  }
  for parameter, value in model.named_parameters():
    if value.grad is not None:
      result[f"grad.{parameter}"] = value.grad.numpy().copy()
  if flat:
    with torch.no_grad():
      positions, _ = model.model.get_rope_index(
        tokens,
        types,
        kwargs.get("image_grid_thw"),
        kwargs.get("video_grid_thw"),
        kwargs.get("second_per_grid_ts"),
        kwargs["attention_mask"],
      )
    result["positions"] = positions.numpy()
  if case["is_left_padded"]:
    model.model.rope_deltas = None
    answer = model.generate(
      **kwargs, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True
    )
    result["greedy"] = answer[:, tokens.shape[1] :].numpy()
  return result


def main() -> None:
  import torch
  from safetensors.numpy import save_file

  torch.set_num_threads(1)
  model = reference()
  folder = pathlib.Path(__file__).parent / "qwen2_5_vl"
  folder.mkdir(exist_ok=True)
  weights = {n: p.detach().numpy() for n, p in model.named_parameters()}
  save_file(weights, folder / "weights.safetensors")
  for name in CASES:
    outputs = run(model, name)
    if name != "images_left":  # one set of gradients is enough on disk
      outputs = {k: v for k, v in outputs.items() if not k.startswith("grad.")}
    outputs = {k: np.ascontiguousarray(v) for k, v in outputs.items()}
    save_file(outputs, folder / f"{name}.safetensors")
  print(json.dumps({f.name: f.stat().st_size for f in folder.iterdir()}))


if __name__ == "__main__":
  main()
