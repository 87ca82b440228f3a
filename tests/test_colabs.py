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

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted(ROOT.glob("colabs/*.ipynb")))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_notebooks_run(path, tmp_path, monkeypatch):
  monkeypatch.setenv("SPATIAL_JAX_FAST", "1")
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  # As a user has it: one CPU device. Compiling takes most of the time here.
  monkeypatch.setenv("XLA_FLAGS", "")
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  book = nbformat.read(path, as_version=4)
  assert not any(cell.get("outputs") for cell in book.cells), "clear outputs"
  nbclient.NotebookClient(
    book,
    timeout=300,
    kernel_name="python3",
    resources={"metadata": {"path": str(path.parent)}},
  ).execute()
  printed = "".join(
    output.get("text", "")
    for cell in book.cells
    for output in cell.get("outputs", ())
  )
  assert "chance" in printed
  assert list(tmp_path.glob("quickstart-*/report.html"))


def test_the_example_of_the_readme_runs(tmp_path):
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert "depth" in done.stdout
  assert (tmp_path / "room.svg").read_text().startswith("<svg")
