# SPDX-License-Identifier: Apache-2.0
"""Spatial-MLLM: the whole model, its connectors, positions, frames, scores."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file

from spatial_jax import generate, hf
from spatial_jax.data import positions, vision
from spatial_jax.evaluators import qa
from spatial_jax.geometry import coverage
from spatial_jax.models import spatial_mllm

IGNORED = -100
# Compiling takes most of the time here.
OPTIONS = {"xla_backend_optimization_level": 0}


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


# --- the whole model --------------------------------------------------------


def build(config):
  text, vision_config, vggt = config["text"], config["vision"], config["vggt"]
  return spatial_mllm.Model(
    **FrozenConfigDict(
      {
        "vit": {
          "width": vision_config["hidden_size"],
          "layers": vision_config["depth"],
          "heads": vision_config["num_heads"],
          "mlp": vision_config["intermediate_size"],
          "out_width": vision_config["out_hidden_size"],
          "patch": vision_config["patch_size"],
          "temporal_patch": vision_config["temporal_patch_size"],
          "merge": vision_config["spatial_merge_size"],
          "window": vision_config["window_size"],
          "full_layers": tuple(vision_config["fullatt_block_indexes"]),
        },
        "llm": {
          "vocab": text["vocab_size"],
          "width": text["hidden_size"],
          "layers": text["num_hidden_layers"],
          "heads": text["num_attention_heads"],
          "kv_heads": text["num_key_value_heads"],
          "mlp": text["intermediate_size"],
          "tied": text["tie_word_embeddings"],
          "theta": text["rope_theta"],
          "eps": text["rms_norm_eps"],
          "sections": tuple(text["rope_scaling"]["mrope_section"]),
        },
        "vggt": {
          "precision": "pure_bf16",
          "width": vggt["embed_dim"],
          "depth": vggt["depth"],
          "heads": vggt["num_heads"],
          "image_size": vggt["img_size"],
          "registers": vggt["num_register_tokens"],
          "vit_depth": vggt["dino_depth"],
          "vit_heads": vggt["dino_num_heads"],
        },
        "geometry_layer": config["spatial_embeds_layer_idx"],
        "image_token": text["image_token_id"],
        "video_token": text["video_token_id"],
      }
    )
  )


def rows(config, inputs):
  """One batch for each sample, since their frames differ in shape."""
  text, B = config["text"], len(inputs["input_ids"])
  grids = inputs["grid_thw"].tolist()
  seconds = list(config["second_per_grid_ts"] or [1.0] * len(grids))
  temporal = config["vision"]["temporal_patch_size"]
  for b in range(B):
    frames = inputs[f"tchw_s{b}"].transpose(0, 2, 3, 1)[None]
    mine, count = [], 0
    while count < frames.shape[1]:
      mine.append(grids.pop(0))
      count += mine[-1][0] * temporal
    valid = inputs["attention_mask"][b] > 0
    tokens = inputs["input_ids"][b]
    place, delta = positions.mrope(
      tokens,
      mine,
      image_token=text["image_token_id"],
      video_token=text["video_token_id"],
      merge=config["vision"]["spatial_merge_size"],
      second_per_grid=[seconds.pop(0) for _ in mine],
      tokens_per_second=config["vision"]["tokens_per_second"],
      valid_mask=valid,
    )
    following = np.append(inputs["labels"][b][1:], IGNORED)
    batch = {
      "tokens": tokens[None].astype(np.int32),
      "positions": place[None],
      "segments": valid[None].astype(np.int32),
      "labels": np.maximum(following, 0)[None].astype(np.int32),
      "loss_weight": (following != IGNORED)[None].astype(np.float32),
    }
    if config["kind"] == "image":
      batch["images"] = frames[:, ::temporal]
      again = np.repeat(batch["images"], temporal, axis=1)
      np.testing.assert_array_equal(again, frames)
    else:
      batch["frames"] = frames
    # This transformers counts from the row's length with its padding.
    yield batch, delta + int(valid.sum()) - len(tokens)


@functools.partial(jax.jit, static_argnums=0, compiler_options=OPTIONS)
def run(model, params, batch, share):
  """Share of the loss, its gradient, logits and intermediates."""

  def loss(part):
    value, _ = spatial_mllm.loss(model, {**params, **part}, batch)
    return share * value

  arguments = spatial_mllm.arguments(batch)
  logits, out = model.apply({"params": params}, **arguments)
  part = {"connector": params["connector"]}
  value, grads = jax.value_and_grad(loss)(part)
  return value, grads, logits, out


def abstract(model, batch):
  arguments = spatial_mllm.arguments(batch)
  init = jax.eval_shape(lambda: model.init(jax.random.key(0), **arguments))
  return init["params"]


def frames_last(x):
  """Merged patches as v1.1 orders them: (y, x, channel, frame)."""
  return x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)


def full(folder, config):
  inputs, want = (
    load_file(folder / f"{name}.safetensors") for name in ("inputs", "outputs")
  )
  model = build(config)
  samples = list(rows(config, inputs))
  params = hf.load(
    spatial_mllm.KEYS,
    folder / "weights.safetensors",
    abstract(model, samples[0][0]),
    ignore=spatial_mllm.IGNORE,
  )
  total = sum(batch["loss_weight"].sum() for batch, _ in samples)
  seen, losses, gradients = {}, [], []
  for b, (batch, delta) in enumerate(samples):
    share = batch["loss_weight"].sum() / total
    loss, grads, logits, out = run(model, params, batch, share)
    losses.append(loss)
    gradients.append(grads)
    made = {
      "visual_embeds": out["vit/merged"][0],
      "connector_merged": frames_last(out["connector/merged"])[0],
      "connector_mlp_out": out["connector/tokens"][0],
      "fused_embeds": out["visual/tokens"][0],
      "inputs_embeds": out["inputs"],
      "hidden_layer1": out["llm/blocks"][0],
      "logits": logits,
      "position_ids": batch["positions"].transpose(1, 0, 2),
      "rope_deltas": np.array([[delta]]),
      f"spatial_embeds_s{b}": out["geometry/tokens"][0],
    }
    if "greedy_tokens" in want:
      made["greedy_tokens"] = generate.generate(
        model,
        params,
        spatial_mllm.arguments(batch),
        max_new_tokens=want["greedy_tokens"].shape[1],
        stop_ids=(),
      )[0]
    for name, array in made.items():
      seen.setdefault(name, []).append(np.asarray(array))
  got = {
    name: np.concatenate(arrays, axis=1 if name == "position_ids" else 0)
    for name, arrays in seen.items()
  }
  got["loss"] = np.asarray(sum(losses)).reshape(1)
  summed = jax.tree.map(lambda *x: np.asarray(sum(x)), *gradients)
  for tensor in hf.tensors(spatial_mllm.KEYS, summed):
    got[f"grad.{tensor.name}"] = tensor.make()
  # What padding makes of itself is of no concern to anyone.
  valid = inputs["attention_mask"][..., None] > 0
  for name in ("hidden_layer1", "logits"):
    got[name], want[name] = (np.where(valid, x[name], 0) for x in (got, want))
  return got, want


def connector_v1_0(folder, config):
  tokens = load_file(folder / "inputs.safetensors")["vggt_tokens"]
  h, w = config["patch_h"], config["patch_w"]
  patches = tokens[:, :, tokens.shape[2] - h * w :]
  patches = patches.reshape(*tokens.shape[:2], h, w, -1)
  cases = {"video": patches, "images": np.repeat(patches, 2, axis=1)}
  stages = spatial_mllm.VARIANTS["v1_0"]["stages"]
  model = spatial_mllm.Connector(stages, config["output_dim"])
  merged = {k: spatial_mllm.side_by_side(x) for k, x in cases.items()}
  shapes = jax.eval_shape(model.init, jax.random.key(0), merged["video"])
  params = hf.load(
    spatial_mllm.KEYS,
    folder / "weights.safetensors",
    {"connector": shapes["params"]},
  )
  params = {"params": params["connector"]}
  got = {}
  for name, x in merged.items():
    y = jax.jit(model.apply)(params, jnp.asarray(x))
    shape = (len(y), -1, h // 2, w // 2, config["output_dim"])
    got[name] = np.asarray(y.reshape(shape))
  return got, load_file(folder / "outputs.safetensors")


def sa_sampling(folder, config):
  inputs = load_file(folder / "inputs.safetensors")
  got = {}
  for number, case in enumerate(config["cases"]):
    points = inputs[f"case{number}_world_points"]
    confidence = inputs[f"case{number}_conf"]
    made = coverage.voxels(points, confidence)
    order, gains = coverage.greedy(made.seen, case["K"])
    outputs = {
      "selected_in_greedy_order": order,
      "selected_sorted": coverage.choose(points, confidence, case["K"]),
      "gains": gains,
      "voxels_per_frame": made.seen.sum(axis=1),
      "mask": made.mask,
      "percentile50": np.array([made.threshold]),
      "origin_voxelsize": np.array([*made.origin, made.size], np.float64),
    }
    got |= {f"case{number}_{name}": x for name, x in outputs.items()}
  return got, load_file(folder / "outputs.safetensors")


ADAPTERS = {
  ("spatial_mllm", "sa_sampling"): sa_sampling,
  ("spatial_mllm", "full"): full,
  ("spatial_mllm", "connector_v1_0"): connector_v1_0,
  ("spatial_mllm", "metrics"): metrics,
  ("spatial_mllm", "mrope_train"): mrope_train,
  ("spatial_mllm", "smart_resize"): smart_resize,
  ("spatial_mllm", "preprocess"): preprocess,
}
