# SPDX-License-Identifier: Apache-2.0
"""Cambrian-1 from pixels to text, as its reference computes it."""

import functools
import json
import math
import tempfile

import jax
import numpy as np
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file

from spatial_jax import generate, hf
from spatial_jax.data import cambrian as data
from spatial_jax.data import images
from spatial_jax.evaluators import choices
from spatial_jax.models import cambrian, llm, sva, sva_keys, vit

TOWERS = {
  "siglip": "siglip",
  "clip": "clip",
  "dino": "dinov2",
  "convnext": "convnext",
}
# What runs once is not worth many optimizations.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
SOURCES = {"ade": "ADE", "coco": "COCO", "omni": "Omni3D", "mmvp": "MMVP"}


def preprocess(folder, config):
  inputs = load_file(folder / "inputs.safetensors")
  got = {}
  for j in range(len(inputs)):
    for i, tower in enumerate(config["order"]):
      pixels = images.cambrian(
        inputs[f"image_{j}"], TOWERS[tower], config["sizes"][tower]
      )
      got[f"pixels_{j}_{i}"] = pixels.transpose(2, 0, 1)
  return got, load_file(folder / "outputs.safetensors")


def prompts(folder, config):
  del config
  cases = json.loads((folder / "cases.json").read_text())
  got = {
    name: np.array([data.prompt(c["turns"], name) == c["prompt"] for c in rows])
    for name, rows in cases.items()
  }
  got = {name: same.astype(np.int32) for name, same in got.items()}
  return got, {name: np.ones_like(same) for name, same in got.items()}


def mcq_extract(folder, config):
  del config
  cases = json.loads((folder / "cases.json").read_text())
  got = {
    key: np.array([choices.extract(c["text"], source) == c[key] for c in cases])
    for key, source in SOURCES.items()
  }
  got = {name: same.astype(np.int32) for name, same in got.items()}
  return got, {name: np.ones_like(same) for name, same in got.items()}


def collator(folder, config):
  inputs = load_file(folder / "inputs.safetensors")
  side = math.isqrt(config["image_token_len"])
  numbers = range(len(config["samples"]))
  sizes = [inputs[f"image_size_wh_{n}"].tolist() for n in numbers]
  rows = [
    data.expand(
      inputs[f"input_ids_{n}"],
      inputs[f"labels_{n}"],
      size,
      length=config["model_max_length"],
      side=side,
      image_position=config["image_position"],
      pad_id=config["pad_token_id"],
    )
    for n, size in enumerate(sizes)
  ]
  got = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  cells = map(math.isqrt, config["image_aux_token_len_list"])
  got |= _masks("aux_mask_{}", sizes, list(cells), side)
  return got, _integers(load_file(folder / "outputs.safetensors"))


def sampler(folder, config):
  inputs = load_file(folder / "inputs.safetensors")
  encoders = range(len(config["kv_size_list"]))
  windows, masks = (
    tuple(inputs[f"{name}_{i}"][:, None] for i in encoders)
    for name in ("kv", "mask")
  )
  context, queries = inputs["context"][:, 0], inputs["queries"]
  model = sva.Sampler(
    config["hidden_dim"],
    config["num_layers"],
    config["num_heads"],
    separate=config["layer_type"] == "sep",
  )
  seen = sva.Seen(context, windows, masks)
  shapes = jax.eval_shape(model.init, jax.random.key(0), queries, seen)
  params = hf.load(
    sva_keys.SAMPLER, folder / "weights.safetensors", shapes["params"]
  )
  run = jit(lambda p, *args: model.apply({"params": p}, *args))
  got = {}
  got["out_masked"], layers = run(params, queries, seen)
  got["out_nomask"], _ = run(params, queries, seen._replace(masks=None))
  got |= {f"layer_{j}_masked": x for j, x in enumerate(layers)}
  return _arrays(got), load_file(folder / "outputs.safetensors")


def full_infer(folder, config):
  inputs = load_file(folder / "inputs.safetensors")
  names = [TOWERS[x] for x in config["llm"]["mm_vision_tower_aux_list"]]
  model = _model(config["llm"], towers=tuple(names), **_tower_sizes(config))
  side = model.sva["side"]
  batch = _prompts(inputs, config["llm"], side)
  batch |= {
    f"pixels/{name}": inputs[f"pixels_{i}"].transpose(0, 2, 3, 1)[:, None]
    for i, name in enumerate(names)
  }
  params = _load(model, folder, batch)
  # The towers once, for the two runs that follow.
  pixels = cambrian.arguments(batch).pop("pixels")
  features = jit(lambda p, x: model.apply({"params": p}, x, method="encode"))(
    params, pixels
  )
  batch = {k: v for k, v in batch.items() if not k.startswith("pixels")}
  batch |= {f"features/{name}": x for name, x in features.items()}
  logits, out = _run(model, params, batch)
  outputs = load_file(folder / "outputs.safetensors")
  sizes = inputs["image_sizes_wh"].tolist()
  got, want = _inference(outputs, batch, logits, out, sizes, side)
  for i, name in enumerate(names):
    got[f"tower_{i}_tokens"] = features[name][:, 0]
    got[f"aux_{i}_projected"] = out[f"sva/projected_{i}"]
    windows = sva.windows(np.asarray(out[f"sva/projected_{i}"]), side)
    got[f"llm_ctx_{i}"] = windows[_grid(sizes, side)]
  masks = _masks("llm_ctx_mask_{}", sizes, model.sides, side)
  got |= {name: mask[_grid(sizes, side)] for name, mask in masks.items()}
  got["global_context"] = out["sva/context"]
  got["sampler_out"] = out["sva/joined"]
  logits = _decoder_alone(model, params, batch, out["inputs"])
  got["logits_without_llm_sva"] = logits[batch["segments"] > 0]
  tokens, _ = generate.generate(
    model,
    params,
    cambrian.arguments(batch),
    max_new_tokens=outputs["greedy_tokens_0"].shape[0],
    stop_ids=(),
  )
  got |= {f"greedy_tokens_{b}": row for b, row in enumerate(np.array(tokens))}
  return _arrays(got), want


def multiscale_infer(folder, config):
  inputs = load_file(folder / "inputs.safetensors")
  model = _model(config["llm"])
  side = model.sva["side"]
  batch = _prompts(inputs, config["llm"], side) | _features(model, inputs)
  logits, out = _run(model, _load(model, folder, batch), batch)
  outputs = load_file(folder / "outputs.safetensors")
  sizes = inputs["image_sizes_wh"].tolist()
  got, want = _inference(outputs, batch, logits, out, sizes, side)
  got["mm_projector_in"] = out["sva/joined"]
  for g, own in enumerate(model.sva["groups"]):
    x = out[f"sva/group_{g}"]
    got[f"sampler_{g}_out"] = x.reshape(-1, 1, x.shape[-1])
    masks = _masks(f"group_{g}_window_mask_{{}}", sizes, model.sides, own)
    got |= {n: mask.reshape(-1, mask.shape[-1]) for n, mask in masks.items()}
  return _arrays(got), want


def train_static(folder, config):
  inputs = load_file(folder / "inputs.safetensors")
  model = _model(config["llm"])
  side = model.sva["side"]
  sizes = [size for *_, size in config["samples"]]
  batch = data.to_batch(inputs, side) | _features(model, inputs)
  batch["padding"] = _padding(sizes, model.sides)
  params = _load(model, folder, batch)
  step = jit(
    jax.value_and_grad(lambda p: cambrian.loss(model, p, batch), has_aux=True)
  )
  (value, (_, out)), grads = step(params)
  logits = out["llm/hidden"] @ params["llm"]["head"]["kernel"]
  valid = inputs["attention_mask"].astype(bool)
  outputs = load_file(folder / "outputs.safetensors")
  got = {
    "loss": value,
    "logits": logits[valid],
    "mm_projector_in": out["sva/joined"],
    "mm_projector_out": out["sva/projected"],
  }
  want = {**outputs, "logits": outputs["logits"][valid]}
  for j, x in enumerate(out["llm/blocks"]):
    name = f"hidden_after_layer_{j}"
    got[name], want[name] = x[valid], outputs[name][valid]
  for g in range(len(model.sva["groups"])):
    x = out[f"sva/group_{g}"]
    got[f"sampler_{g}_out"] = x.reshape(-1, 1, x.shape[-1])
  got |= _masks("aux_mask_{}", sizes, model.sides, side)
  want |= {k: v for k, v in inputs.items() if k.startswith("aux_mask")}
  with tempfile.TemporaryDirectory() as written:
    hf.save(cambrian.KEYS, grads, written)
    grads = load_file(f"{written}/model.safetensors")
  got |= {f"grad.{name}": grad for name, grad in grads.items()}
  norms = {n: v for n, v in config["grad_norms"].items() if v}
  assert norms.keys() <= grads.keys()
  ratio = [np.linalg.norm(grads[name]) / v for name, v in norms.items()]
  got["grad_norms"], want["grad_norms"] = np.array(ratio), np.ones(len(norms))
  return _arrays(got), _integers(want)


def _model(sizes, **towers):
  side = math.isqrt(sizes["image_token_len"])
  layers = sizes["num_of_vision_sampler_layers"]
  aggregator = {
    "features": sizes["hidden_size"],
    "side": side,
    "width": sizes["vision_hidden_size"],
    "groups": tuple(map(math.isqrt, sizes["query_num_list"])),
    "depth": sizes["connector_depth"],
    "layers": 0 if sizes["connector_only"] else layers,
    "start": sizes["start_of_vision_sampler_layers"],
    "stride": sizes["stride_of_vision_sampler_layers"],
  }
  decoder = {
    **llm.VARIANTS["llama3-8b"],
    "vocab": sizes["vocab_size"],
    "width": sizes["hidden_size"],
    "layers": sizes["num_hidden_layers"],
    "heads": sizes["num_attention_heads"],
    "kv_heads": sizes["num_key_value_heads"],
    "mlp": sizes["intermediate_size"],
    "eps": sizes["rms_norm_eps"],
    "theta": sizes["rope_theta"],
    "tied": sizes["tie_word_embeddings"],
  }
  cells = sizes["mm_vision_tower_aux_token_len_list"]
  kwargs = {
    "towers": tuple(sizes["mm_vision_tower_aux_list"]),
    "sides": tuple(map(math.isqrt, cells)),
    "sva": FrozenConfigDict(aggregator),
    "llm": FrozenConfigDict(decoder),
  }
  return cambrian.Model(**{**kwargs, **towers})


def _tower_sizes(config):
  def tower(variant, sizes, **more):
    return FrozenConfigDict(
      {
        **vit.VARIANTS[variant],
        "width": sizes["dim"],
        "layers": sizes["depth"],
        "heads": sizes["heads"],
        "patch": sizes["patch"],
        "image": sizes["img"],
        **more,
      }
    )

  siglip, clip, dino = (config[name] for name in ("siglip", "clip", "dino"))
  # transformers rounds two thirds of the plain MLP's width up to eights.
  gated = (int(dino["dim"] * 4 * 2 / 3) + 7) // 8 * 8
  return {
    "siglip": tower(
      "timm-siglip-so400m-14-384",
      siglip,
      mlp=int(siglip["dim"] * siglip["mlp_ratio"]),
    ),
    "clip": tower(
      "clip-l-14-336",
      clip,
      mlp=clip["mlp"],
      output_layer=config["llm"]["mm_vision_select_layer"],
    ),
    "dinov2": tower(
      "dinov2-g-14",
      dino,
      mlp=gated,
      image=dino["pos_img"],
      resample=cambrian.VARIANTS["8b"]["dinov2"]["resample"],
    ),
    "convnext": FrozenConfigDict(
      {
        **cambrian.VARIANTS["8b"]["convnext"],
        "widths": tuple(config["convnext"]["dims"]),
        "depths": tuple(config["convnext"]["depths"]),
      }
    ),
  }


def _load(model, folder, batch):
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), **cambrian.arguments(batch))
  )
  # Towers are numbered in the case's order.
  towers = [
    row
    for number, name in enumerate(model.towers)
    for row in hf.nest(
      cambrian.PART_KEYS.get(name, ()), f"towers.{number}.", f"{name}/"
    )
  ]
  return hf.load(
    (*towers, *cambrian.KEYS),
    folder / "weights.safetensors",
    shapes["params"],
    ignore=cambrian.IGNORE,
  )


def _run(model, params, batch):
  run = jit(lambda p, kwargs: model.apply({"params": p}, **kwargs))
  return run(params, cambrian.arguments(batch))


def _decoder_alone(model, params, batch, embeddings):
  """Logits without the aggregator's layers between the decoder's blocks."""
  decoder = llm.Model(**model.llm)
  names = ("tokens", "positions", "segments", "shared")
  run = jit(
    lambda p, args, x: decoder.apply({"params": p}, *args, embeddings=x)
  )
  logits, _ = run(params["llm"], [batch[name] for name in names], embeddings)
  return logits


def _prompts(inputs, sizes, side):
  """Prompts of an inference case as rows of the static path."""
  ids, wh = inputs["input_ids"], inputs["image_sizes_wh"].tolist()
  rows = [
    data.expand(
      row,
      np.full(len(row), data.IGNORE),
      size,
      length=len(row) - 1 + side * (side + 1),
      side=side,
      image_position=sizes["image_position"],
    )
    for row, size in zip(ids, wh, strict=True)
  ]
  rows = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  cells = map(math.isqrt, sizes["mm_vision_tower_aux_token_len_list"])
  return data.to_batch(rows, side) | {"padding": _padding(wh, list(cells))}


def _features(model, inputs):
  return {
    f"features/{name}": inputs[f"tower_tokens_{i}"][:, None]
    for i, name in enumerate(model.towers)
  }


def _inference(outputs, batch, logits, out, sizes, side):
  """Outputs of both inference cases; the reference's rows have no gaps."""
  valid, kept = batch["segments"] > 0, outputs["attention_mask"] > 0
  got = {
    "attention_mask": np.arange(kept.shape[1])[None] < valid.sum(1)[:, None],
    "final_size_hw": [
      side - 2 * np.array(data.padding(x, side)) for x in sizes
    ],
    "mm_projector_out": out["sva/projected"],
    "inputs_embeds": out["inputs"][valid],
    "last_hidden_normed": out["llm/hidden"][valid],
    "logits": logits[valid],
  }
  for j, x in enumerate(out["llm/blocks"]):
    got[f"hidden_after_layer_{j}"] = x[valid]
  rows = ("inputs_embeds", "last_hidden_normed", "logits", "hidden_after")
  want = {
    name: x[kept] if name.startswith(rows) else x for name, x in outputs.items()
  }
  return got, _integers(want)


def _grid(sizes, side):
  """Cells of the tokens' grid that show the image [B L*L]."""
  out = np.zeros((len(sizes), side, side), bool)
  for cells, size in zip(out, sizes, strict=True):
    rows, columns = data.padding(size, side)
    cells[rows : side - rows, columns : side - columns] = True
  return out.reshape(len(sizes), -1)


def _padding(sizes, sides):
  cells = [[data.padding(size, side) for side in sides] for size in sizes]
  return np.array(cells, np.int32)[:, None]


def _masks(name, sizes, sides, side):
  """Masks in windows, of every encoder."""
  padding = np.array([[data.padding(x, s) for s in sides] for x in sizes])
  masks = jit(
    lambda x: [
      sva.window_masks(x[:, i], cells, side) for i, cells in enumerate(sides)
    ]
  )(padding)
  return {name.format(i): np.asarray(mask) for i, mask in enumerate(masks)}


def _integers(outputs):
  return {
    name: x.astype(np.int64) if x.dtype == bool else x
    for name, x in outputs.items()
  }


def _arrays(got):
  return {name: np.asarray(x) for name, x in got.items()}


ADAPTERS = {
  ("cambrian", "collator"): collator,
  ("cambrian", "full_infer"): full_infer,
  ("cambrian", "mcq_extract"): mcq_extract,
  ("cambrian", "multiscale_infer"): multiscale_infer,
  ("cambrian", "preprocess"): preprocess,
  ("cambrian", "prompts"): prompts,
  ("cambrian", "sva"): sampler,
  ("cambrian", "train_static"): train_static,
}
