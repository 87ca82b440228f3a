# SPDX-License-Identifier: Apache-2.0
"""The other side of the rows of Qwen2.5-VL: transformers, as it comes."""

from __future__ import annotations

import pathlib
import time

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from launch.speed import qwen
from launch.speed.program import Program


def load(folder: pathlib.Path, case: dict):
  """The model with fused attention, and the arguments of its call."""
  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
    folder,
    dtype=getattr(torch, case["dtype"]),
    attn_implementation="sdpa",
  )
  model = model.eval().to(device)
  batch = qwen.batch(case)
  tokens = torch.tensor(batch["tokens"]).long()
  inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
  if "patches" in batch:
    side = case["side"] // qwen.PATCH
    count = case["rows"] * case["images"]
    patches = batch["patches"].reshape(-1, batch["patches"].shape[-1])
    inputs |= {
      "pixel_values": torch.tensor(patches).to(model.dtype),
      "image_grid_thw": torch.tensor([[1, side, side]] * count),
      "mm_token_type_ids": (tokens == qwen.IMAGE).int(),
    }
  return model, {k: v.to(device) for k, v in inputs.items()}, batch


def labelled(inputs: dict, batch: dict) -> dict:
  """Labels as the model shifts them, and positions, which it needn't make."""
  tokens = inputs["input_ids"]
  counts = np.roll(batch["loss_weight"], 1, axis=1) > 0
  labels = tokens.masked_fill(~torch.tensor(counts).to(tokens.device), -100)
  positions = torch.tensor(batch["positions"]).long().permute(1, 0, 2)
  return {
    **inputs,
    "labels": labels,
    "position_ids": positions.contiguous().to(tokens.device),
    "use_cache": False,
  }


def wait() -> None:
  if torch.cuda.is_available():
    torch.cuda.synchronize()


def forward(folder: pathlib.Path, case: dict) -> Program:
  """Loss of a batch, without gradients."""
  model, inputs, batch = load(folder, case)
  inputs = labelled(inputs, batch)
  call = torch.compile(model) if case.get("compile") else model

  def run():
    with torch.inference_mode():
      value = call(**inputs).loss
    wait()
    return value

  start = time.perf_counter()
  value = float(run())
  first = time.perf_counter() - start
  flops = qwen.flops(case, train=False)
  return Program(run, {"loss": np.array([value])}, first, flops=flops)


def step(folder: pathlib.Path, case: dict) -> Program:
  """Loss, gradients, clipping, fused AdamW."""
  model, inputs, batch = load(folder, case)
  inputs = labelled(inputs, batch)
  if case.get("checkpointing"):
    model.train()
    model.gradient_checkpointing_enable()
  call = torch.compile(model) if case.get("compile") else model
  optimizer = torch.optim.AdamW(
    model.parameters(),
    lr=1e-4,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.1,
    fused=True,
  )

  def run():
    optimizer.zero_grad(set_to_none=True)
    loss = call(**inputs).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    value = float(loss)
    wait()
    return value

  start = time.perf_counter()
  losses = [run()]
  first = time.perf_counter() - start
  losses += [run() for _ in range(2)]
  flops = qwen.flops(case, train=True)
  return Program(run, {"loss": np.array(losses)}, first, flops=flops)


def decode(folder: pathlib.Path, case: dict) -> Program:
  """Greedy tokens after a prompt; time includes the prompt's pass."""
  model, inputs, _ = load(folder, case)

  def run():
    with torch.inference_mode():
      tokens = model.generate(
        **inputs,
        max_new_tokens=case["new"],
        do_sample=False,
        use_cache=True,
        **case.get("generate", {}),
      )
    wait()
    return tokens[:, inputs["input_ids"].shape[1] :]

  start = time.perf_counter()
  tokens = run().cpu().numpy()
  first = time.perf_counter() - start
  return Program(run, {"tokens": tokens}, first, units=tokens.size)


def matmul(folder: pathlib.Path, case: dict) -> Program:
  """The most that this machine multiplies: a large product."""
  del folder
  size = case["size"]
  rng = np.random.default_rng(0)
  a, b = (rng.standard_normal((size, size), np.float32) for _ in range(2))
  device = "cuda" if torch.cuda.is_available() else "cpu"
  dtype = getattr(torch, case["dtype"])
  a, b = (torch.tensor(x).to(device, dtype) for x in (a, b))

  def run():
    out = a @ b
    wait()
    return out

  start = time.perf_counter()
  out = run().float().cpu().numpy()
  first = time.perf_counter() - start
  return Program(run, {"product": out}, first, flops=2.0 * size**3)
