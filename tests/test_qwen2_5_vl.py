# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL equals transformers': live where torch is, else as recorded."""

import functools
import importlib.util
import pathlib
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors import safe_open
from safetensors.numpy import save_file

from spatial_jax import generate, hf, models, sharding, trees
from spatial_jax.data import positions, vision
from spatial_jax.models import qwen2_5_vl

GOLDEN = pathlib.Path(__file__).parent / "golden"
WEIGHTS = GOLDEN / "qwen2_5_vl" / "weights.safetensors"
TOLERANCE = 1e-4
# Every case fits: one program serves them all.
LENGTH = 48
SIZES = {"patches": 192, "frames": 8, "frame_patches": 64, "windows": 24}

spec = importlib.util.spec_from_file_location(
  "make_qwen2_5_vl", GOLDEN / "make_qwen2_5_vl.py"
)
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
CASES = list(make.CASES)


def tiny(**overrides):
  config = {"model_name": "qwen2_5_vl", "batch_size": 2, "data": {"length": 16}}
  config["model"] = {"variant": "tiny", **overrides}
  return models.build(ConfigDict(config))


def abstract(model, mod):
  batch = to_batch(make.inputs("one_image"))
  init = jax.eval_shape(
    lambda: model.init(jax.random.key(0), **mod.arguments(batch))
  )
  return init["params"]


def pad(array, case):
  """Columns of zeros on the side where the case has its padding."""
  more = LENGTH - array.shape[1]
  sides = (more, 0) if case["is_left_padded"] else (0, more)
  return np.pad(array, ((0, 0), sides))


def to_batch(case):
  """A batch from the rows of a case, all padded to the same sizes."""
  tokens, valid = pad(case["tokens"], case), pad(case["valid"], case)
  tokens = tokens.astype(np.int32)
  video = iter(case["second_per_grid"] or [1.0] * 9)
  rows = []
  for row, mask, grids in zip(tokens, valid, case["grids"], strict=True):
    count = sum(grid[0] > 1 for grid in grids)
    ids, _ = positions.mrope(
      row,
      grids,
      image_token=make.IMAGE,
      video_token=make.VIDEO,
      second_per_grid=[next(video) for _ in range(count)],
      valid_mask=mask,
      block_end="grid",
      pad_position=0,
    )
    rows.append(ids)
  following = np.roll(tokens, -1, axis=1)
  follows = np.roll(valid, -1, axis=1) & valid
  follows[:, -1] = False
  is_text = (following != make.IMAGE) & (following != make.VIDEO)
  batch = {
    "tokens": tokens,
    "positions": np.stack(rows),
    "segments": valid.astype(np.int32),
    "labels": following,
    "loss_weight": (follows & is_text).astype(np.float32),
  }
  if not any(case["grids"]):
    return batch
  patches = np.zeros((len(rows), SIZES["patches"], 96), np.float32)
  for row, parts in zip(patches, case["patches"], strict=True):
    flat = np.concatenate(parts)
    row[: len(flat)] = flat
  arrays = vision.layout(case["grids"], SIZES, side=2)
  layout = {f"layout/{name}": array for name, array in arrays.items()}
  return {**batch, **layout, "patches": patches}


def worst(got, want):
  """Largest difference relative to the largest number that is wanted."""
  return np.max(np.abs(got - want)) / np.max(np.abs(want))


@functools.partial(jax.jit, static_argnums=0)
def evaluate(model, params, batch):
  def loss(params):
    return qwen2_5_vl.loss(model, params, batch)[0]

  arguments = qwen2_5_vl.arguments(batch)
  logits, _ = model.apply({"params": params}, **arguments)
  return logits, *jax.value_and_grad(loss)(params)


def gradients(outputs, folder, shapes, mod):
  """Gradients under transformers' names, as a tree of ours."""
  grads = {k[5:]: v for k, v in outputs.items() if k.startswith("grad.")}
  with safe_open(WEIGHTS, "numpy") as file:
    for name in file.keys():  # noqa: SIM118 (not a dict)
      if name not in grads:  # unused in this case: the vision tower
        grads[name] = np.zeros(file.get_slice(name).get_shape(), np.float32)
  save_file(grads, folder / "grads.safetensors")
  return hf.load(mod.KEYS, folder / "grads.safetensors", shapes)


def compare(case, outputs, source, folder):
  model, mod = tiny()
  shapes = abstract(model, mod)
  params = hf.load(mod.KEYS, source, shapes)
  batch = to_batch(case)
  valid = batch["segments"] > 0
  if "positions" in outputs:
    got = batch["positions"].transpose(1, 0, 2)[:, valid]
    np.testing.assert_array_equal(got, outputs["positions"][:, case["valid"]])
  logits, loss, grads = jax.device_get(evaluate(model, params, batch))
  report = {
    "logits": worst(logits[valid], outputs["logits"][case["valid"]]),
    "loss": worst(loss, outputs["loss"]),
  }
  if any(name.startswith("grad.") for name in outputs):
    wanted = trees.flatten(gradients(outputs, folder, shapes, mod))
    for name, grad in trees.flatten(grads).items():
      want = wanted[name]
      if not np.any(want):
        assert not np.any(grad), name
      else:
        report[name] = worst(grad, want)
  if "greedy" in outputs:
    answer, length = generate.generate(
      model,
      params,
      mod.arguments(batch),
      max_new_tokens=make.NEW_TOKENS,
      stop_ids=(),
    )
    np.testing.assert_array_equal(answer, outputs["greedy"])
    assert np.all(length == make.NEW_TOKENS)
  print({name: f"{value:.1e}" for name, value in report.items()})
  bad = {name: v for name, v in report.items() if not v <= TOLERANCE}
  assert not bad


def test_bfloat16_rounds_logits_and_intermediates_only():
  model, mod = tiny(dtype="bfloat16")
  params = hf.load(mod.KEYS, WEIGHTS, abstract(model, mod))
  batch = to_batch(make.inputs("images_left"))
  valid = batch["segments"] > 0

  @jax.jit
  def run(params, batch):
    return model.apply({"params": params}, **mod.arguments(batch))

  logits, out = run(params, batch)
  assert logits.dtype == out["vit/merged"].dtype == "bfloat16"
  with safe_open(WEIGHTS.with_name("images_left.safetensors"), "numpy") as f:
    want = f.get_tensor("logits")[make.inputs("images_left")["valid"]]
  assert worst(np.asarray(logits, np.float32)[valid], want) < 0.05


def test_a_mesh_changes_no_number():
  model, mod = tiny()
  params = hf.load(mod.KEYS, WEIGHTS, abstract(model, mod))
  batch = to_batch(make.inputs("images_left"))
  want = evaluate(model, params, batch)
  mesh = sharding.mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    split = jax.device_put(batch, sharding.batch_sharding(mesh))
    placed = jax.device_put(params, sharding.parameters(params, mesh))
    got = evaluate(model, placed, split)
  query = got[2]["llm"]["blocks"]["attention"]["query"]["kernel"]
  assert not query.sharding.is_fully_replicated
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert worst(np.asarray(a), np.asarray(b)) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_those_recorded_from_transformers(name, tmp_path):
  with safe_open(GOLDEN / "qwen2_5_vl" / f"{name}.safetensors", "numpy") as f:
    outputs = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
  compare(make.inputs(name), outputs, WEIGHTS, tmp_path)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  for package in ("torch", "transformers"):
    if importlib.util.find_spec(package) is None:
      pytest.skip(
        f"{package} is not installed: outputs are compared with recorded ones "
        "only, not with a live model"
      )
  model = make.reference()
  folder = tmp_path_factory.mktemp("published")
  model.save_pretrained(folder)
  return model, folder


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_outputs_equal_those_of_transformers(name, reference, tmp_path):
  model, folder = reference
  compare(make.inputs(name), make.run(model, name), folder, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("release", [0, 1])
def test_transformers_reads_what_we_write(release, reference, tmp_path):
  published, folder = reference
  model, mod = tiny()
  params = hf.load(mod.KEYS, folder, abstract(model, mod))
  hf.save(mod.KEYS, params, tmp_path, release=release, shard_bytes=200_000)
  shutil.copy(folder / "config.json", tmp_path)
  again, info = type(published).from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  for name, value in published.named_parameters():
    assert (again.get_parameter(name) == value).all(), name
