# SPDX-License-Identifier: Apache-2.0
"""Published weights become a workdir by command, and the other way round."""

import importlib.util
import json
import pathlib
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import qwen2_5_vl_sft
from spatial_jax import __main__ as cli
from spatial_jax import checkpoint, hf, train
from spatial_jax import system as systems
from tests import published

ROOT = pathlib.Path(__file__).parents[1]
RECIPE = f"--config={ROOT}/configs/qwen2_5_vl_sft.py:test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tiny Qwen2.5-VL as one downloads it."""
  where = tmp_path_factory.mktemp("published") / "model"
  published.write(where)
  return where


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):
  where = tmp_path_factory.mktemp("imported")
  assert (
    cli.main(["import", RECIPE, f"--from={folder}", f"--workdir={where}"]) == 0
  )
  return where


def test_a_dry_run_prints_the_plan_and_reads_nothing(
  folder, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(hf.Reader, "slice", None)
  argv = ["import", RECIPE, f"--from={folder}", "--dry-run"]
  assert cli.main([*argv, f"--workdir={tmp_path}/run"]) == 0
  assert cli.main(argv) == 0
  text = capsys.readouterr().out
  rows = {line.split()[0]: line for line in text.splitlines() if "/" in line}
  row = " ".join(rows["llm/blocks/mlp/gate/kernel"].split()[1:])
  assert row.startswith("[3, 64, 96] float32 3 x model.")
  assert row.endswith("layers.0.mlp.gate_proj.weight [96, 64] float32")
  tensors = load_file(folder / "model.safetensors")
  assert f"read: {len(tensors)} tensors" in text
  total = sum(x.size for x in tensors.values())
  assert f"loaded: {total:,} parameters" in text
  assert "new, start fresh: none" in text and "ignored: 0 tensors" in text
  assert not (tmp_path / "run").exists()


def test_a_dry_run_of_a_hub_id_fetches_no_weights(folder, capsys, monkeypatch):
  hub = pytest.importorskip("huggingface_hub", reason="not installed")

  def metadata(repository, *, revision):
    assert (repository, revision) == ("org/name", "v1")
    file = types.SimpleNamespace(
      tensors={
        name: types.SimpleNamespace(dtype="F32", shape=list(x.shape))
        for name, x in load_file(folder / "model.safetensors").items()
      }
    )
    return types.SimpleNamespace(files_metadata={"model.safetensors": file})

  monkeypatch.setattr(hub, "get_safetensors_metadata", metadata)
  monkeypatch.setattr(hub, "snapshot_download", None)
  argv = ["import", RECIPE, "--dry-run"]
  assert cli.main([*argv, "--from=org/name@v1"]) == 0
  there = capsys.readouterr().out
  assert cli.main([*argv, f"--from={folder}"]) == 0
  assert there == capsys.readouterr().out


def test_a_dry_run_lists_all_that_does_not_fit(folder, capsys):
  argv = ["import", RECIPE, f"--from={folder}", "--dry-run"]
  assert cli.main([*argv, "--config.model.llm.vocab=100"]) == 1
  error = capsys.readouterr().err
  assert "(2 problems)" in error and "embed_tokens.weight is [" in error
  assert cli.main([*argv, "--config.init_new=('llm/(embed|head)/.*',)"]) == 0
  text = capsys.readouterr().out
  assert "new, start fresh: llm/embed/embedding, llm/head/kernel" in text
  assert "ignored: 2 tensors" in text


@pytest.mark.usefixtures("kept_programs")
def test_training_starts_from_what_was_imported(folder, tmp_path, one_device):
  config = qwen2_5_vl_sft.get_config("test")
  config.steps = 1
  config.init_from = str(folder)
  direct = train.main(config.lock(), str(tmp_path / "direct"))
  config = qwen2_5_vl_sft.get_config("test")
  config.steps = 1
  inside = tmp_path / "inside"
  argv = ["import", RECIPE, f"--from={folder}", f"--workdir={inside}"]
  assert cli.main(argv) == 0
  assert checkpoint.is_import(str(inside))
  again = train.main(config.lock(), str(inside))
  jax.tree.map(np.testing.assert_array_equal, again.state, direct.state)
  assert not checkpoint.is_import(str(inside))
  assert cli.main(argv) == 1  # never over a run


@pytest.mark.filterwarnings("ignore")
def test_an_export_equals_what_was_imported(folder, workdir, tmp_path, capsys):
  argv = ["export", RECIPE, f"--from={workdir}"]
  out = tmp_path / "out"
  assert cli.main([*argv, f"--to={out}", f"--like={folder}"]) == 0
  assert "with config.json" in capsys.readouterr().out
  shapes, mod = systems.shapes(qwen2_5_vl_sft.get_config("test"))
  first, again = (hf.load(mod.KEYS, f, shapes) for f in (folder, out))
  jax.tree.map(np.testing.assert_array_equal, again, first)
  assert (out / "tokenizer.json").read_bytes() == (
    folder / "tokenizer.json"
  ).read_bytes()
  assert cli.main([*argv, f"--to={tmp_path}/half", "--dtype=bfloat16"]) == 0
  half = load_file(tmp_path / "half" / "model.safetensors")
  assert {str(x.dtype) for x in half.values()} == {"bfloat16"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not published.HAS_TORCH, reason=published.ONLY_TORCH)
def test_transformers_answers_the_same_with_our_export(
  folder, workdir, tmp_path
):
  import torch
  from transformers import Qwen2_5_VLForConditionalGeneration as Model

  argv = ["export", RECIPE, f"--from={workdir}", f"--to={tmp_path}"]
  assert cli.main([*argv, f"--like={folder}"]) == 0
  config = json.loads((tmp_path / "config.json").read_text())
  rng = np.random.default_rng(0)
  tokens = rng.integers(5, 90, (1, 12))
  tokens[0, 3:5] = config["image_token_id"]
  vision = config["vision_config"]
  patch = vision["patch_size"] ** 2 * vision["temporal_patch_size"] * 3
  inputs = {
    "input_ids": torch.tensor(tokens),
    "pixel_values": torch.tensor(
      rng.normal(size=(8, patch)), dtype=torch.float32
    ),
    "image_grid_thw": torch.tensor([[1, 2, 4]]),
    "mm_token_type_ids": torch.tensor(tokens == config["image_token_id"]).int(),
  }
  logits = []
  for source in (folder, tmp_path):
    model, info = Model.from_pretrained(
      source, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
      logits.append(model.eval()(**inputs).logits.numpy())
  np.testing.assert_array_equal(*logits)
  assert np.ptp(logits[0]) > 0.1


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["import"], "--from is missing"),
    (["import", "--from=x/y/z"], "--workdir is missing"),
    (["import", "--from=x/y/z", "--dry-run"], "x/y/z does not exist"),
    (["export", "--from=x"], "--to is missing"),
    (["export", "--to=x"], "--from is missing"),
    (["export", "--from=x", "--to=y"], "no checkpoint in x"),
    (["export", "--from=x", "--to=y", "--dtype=int8"], "expected bfloat16"),
    (["export", "--from=x", "--to=y", "--like=z"], "--like=z: there is no"),
  ],
)
def test_a_wrong_command_says_what_is_missing(argv, message, capsys):
  assert cli.main([argv[0], RECIPE, *argv[1:]]) == 1
  assert message in capsys.readouterr().err


def test_an_export_by_another_recipe_is_refused(workdir, tmp_path, capsys):
  argv = ["export", RECIPE, f"--from={workdir}", f"--to={tmp_path}/out"]
  assert cli.main([*argv, "--config.model.llm.vocab=100"]) == 1
  error = capsys.readouterr().err
  assert "of another model than the config" in error
  assert "llm/embed/embedding: got float32[" in error
  assert not (tmp_path / "out").exists()


def test_the_benchmark_reports_both_programs(tmp_path, capsys):
  path = ROOT / "launch" / "import_bench.py"
  spec = importlib.util.spec_from_file_location("import_bench", path)
  bench = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(bench)
  got = bench.main([f"--folder={tmp_path}", "--variant=tiny", "--rounds=1"])
  text = capsys.readouterr().out
  assert "4 files" in text and "round 1: safetensors alone" in text
  assert got["ratio"] > 0 and 0 < got["over"] < 1.5
