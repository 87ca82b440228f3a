# SPDX-License-Identifier: Apache-2.0
"""Notebooks run from top to bottom, shortened; the README's example too."""

import os
import pathlib
import re
import subprocess
import sys

import nbclient
import nbformat
import pytest

from spatial_jax import metrics
from tests import published

ROOT = pathlib.Path(__file__).parents[1]


def run(name, tmp_path, monkeypatch):
  """Executes a notebook; what it printed."""
  path = ROOT / "colabs" / name
  monkeypatch.setenv("SPATIAL_JAX_FAST", "1")
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  # As a user has it: one CPU device.
  monkeypatch.setenv("XLA_FLAGS", os.environ["ONE_DEVICE"])
  book = nbformat.read(path, as_version=4)
  assert not any(cell.get("outputs") for cell in book.cells), "clear outputs"
  nbclient.NotebookClient(
    book,
    timeout=300,
    kernel_name="python3",
    resources={"metadata": {"path": str(path.parent)}},
  ).execute()
  return "".join(
    output.get("text", "")
    for cell in book.cells
    for output in cell.get("outputs", ())
  )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_first_look_runs(tmp_path, monkeypatch):
  printed = run("quickstart.ipynb", tmp_path, monkeypatch)
  assert "chance" in printed
  assert list(tmp_path.glob("quickstart-*/report.html"))


@pytest.mark.filterwarnings("ignore")
def test_fine_tuning_runs_and_writes_weights_that_load(tmp_path, monkeypatch):
  published.write(tmp_path / "base")
  monkeypatch.setenv("SPATIAL_JAX_CHECKPOINT", str(tmp_path / "base"))
  printed = run("finetune_from_safetensors.ipynb", tmp_path, monkeypatch)
  assert "before: " in printed and "after: " in printed
  (folder,) = tmp_path.glob("finetune-*")
  assert (folder / "adapter" / "adapter_config.json").exists()
  names = {file.name for file in (tmp_path / "base").iterdir()}
  assert names - {"model.safetensors"} < {
    file.name for file in (folder / "merged").iterdir()
  }
  rows = metrics.read(str(folder / "run"))
  assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
  if published.HAS_TORCH:
    from transformers import Qwen2_5_VLForConditionalGeneration

    _, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
      folder / "merged", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_is_probed_patched_and_steered(tmp_path, monkeypatch):
  printed = run("dual_mechanisms.ipynb", tmp_path, monkeypatch)
  assert "to the left or the right" in printed
  assert re.search(r"probe, decoder's input +[01]\.\d", printed)
  assert re.search(r"steering, honest gain +-?[01]\.\d", printed)


def test_every_notebook_is_run_here():
  names = {path.stem for path in ROOT.glob("colabs/*.ipynb")}
  assert names == {
    "quickstart",
    "finetune_from_safetensors",
    "dual_mechanisms",
  }


def test_the_example_of_the_readme_runs(tmp_path):
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=tmp_path,
    env={
      **os.environ,
      "PYTHONPATH": str(ROOT),
      "XLA_FLAGS": os.environ["ONE_DEVICE"],
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert "depth" in done.stdout
  assert (tmp_path / "room.svg").read_text().startswith("<svg")
