# SPDX-License-Identifier: Apache-2.0
"""Positions, frames and scores as Spatial-MLLM's reference computes them."""

import json

import numpy as np
from safetensors.numpy import load_file

from spatial_jax.data import positions, vision
from spatial_jax.evaluators import qa


def mrope_train(folder, config):
  inputs = load_file(folder / "inputs.safetensors")
  got = {}
  for number, case in enumerate(config["cases"]):
    tokens = inputs[f"case{number}_input_ids"]
    grids = inputs[f"case{number}_grid_thw"].tolist()
    ids, deltas = [], []
    for row in tokens:
      # Grids and times of a batch follow each other row by row.
      starts = row == config["vision_start"]
      count = int(np.count_nonzero(starts))
      mine, grids = grids[:count], grids[count:]
      row_ids, delta = positions.mrope(
        row,
        mine,
        image_token=config["image_token_id"],
        video_token=config["video_token_id"],
        second_per_grid=case["second_per_grid_ts"] or 1.0,
      )
      ids.append(row_ids)
      deltas.append([delta])
    got[f"case{number}_position_ids"] = np.stack(ids, axis=1)
    got[f"case{number}_rope_deltas"] = np.array(deltas)
  return got, load_file(folder / "outputs.safetensors")


def smart_resize(folder, config):
  cases = json.loads((folder / "cases.json").read_text())
  rows = [
    dict(zip(cases["columns"], row, strict=True)) for row in cases["rows"]
  ]
  want = np.array([[row.pop("out_h"), row.pop("out_w")] for row in rows])
  got = np.array([vision.smart_resize(**row) for row in rows])
  return {"size": got}, {"size": want}


def preprocess(folder, config):
  frames = load_file(folder / "inputs.safetensors")["frames_tchw_u8"]
  frames = frames.transpose(0, 2, 3, 1)
  got = {}
  for kind, some in (("video", frames), ("image", frames[:1])):
    patches, grid, pixels = vision.preprocess(
      some,
      min_pixels=config["min_pixels"],
      max_pixels=config["max_pixels"],
      mean=config["image_mean"],
      std=config["image_std"],
    )
    got[f"{kind}_pixel_values"] = patches
    got[f"{kind}_grid_thw"] = np.array([grid])
    got[f"{kind}_tchw_u8"] = pixels.transpose(0, 3, 1, 2)
  return got, load_file(folder / "outputs.safetensors")


def metrics(folder, config):
  cases = json.loads((folder / "cases.json").read_text())
  pairs = {
    "clean_text": [(qa.clean_text(a), b) for a, b in cases["clean_text"]],
    "mean_relative_accuracy": [
      (qa.mean_relative_accuracy(a, b), c)
      for a, b, c in cases["mean_relative_accuracy"]
    ],
    "vsi_reward": [
      (qa.vsi_reward(truth, answer, kind), value)
      for truth, answer, kind, value in cases["vsi_reward"]
    ],
  }
  rows = [tuple(row) for row in cases["aggregate_input"]]
  averages, types = qa.aggregate(rows), qa.per_type(rows)
  pairs["aggregate"] = [
    (averages[group][mean], value)
    for group, means in cases["aggregate"].items()
    for mean, value in means.items()
  ]
  pairs["per_question_type"] = [
    (types[name]["score"], value)
    for name, value in cases["per_question_type"].items()
  ]
  columns = {
    name: tuple(zip(*rows, strict=True)) for name, rows in pairs.items()
  }
  text = columns.pop("clean_text")
  same = np.array([a == b for a, b in zip(*text, strict=True)], np.int32)
  got = {name: np.array(pair[0]) for name, pair in columns.items()}
  want = {name: np.array(pair[1]) for name, pair in columns.items()}
  return {**got, "clean_text": same}, {**want, "clean_text": 0 * same + 1}


ADAPTERS = {
  ("spatial_mllm", "metrics"): metrics,
  ("spatial_mllm", "mrope_train"): mrope_train,
  ("spatial_mllm", "smart_resize"): smart_resize,
  ("spatial_mllm", "preprocess"): preprocess,
}
