# SPDX-License-Identifier: Apache-2.0
"""The order of imports, sizes of files, start-up time, and stray text."""

import ast
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "spatial_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# A part may import what stands in an earlier row, and itself.
ORDER = (
  ("types", "trees", "hosts"),
  ("sharding", "geometry"),
  ("optim", "checkpoint", "data", "metrics"),  # these know no model
  ("nn", "world"),
  ("losses",),  # of the tokens that `nn.slots` puts in front
  ("hf_arrays", "hf_flax", "hf_hub"),
  ("hf_files",),
  ("hf_plan", "hf_write"),
  ("hf", "lora"),
  ("models", "peft"),
  ("system",),
  ("generate",),
  ("evaluators", "drawing"),
  ("evaluate", "clouds"),
  ("fusion", "analysis"),
  ("train", "report", "answer", "reconstruct", "convert", "cache", "analyse"),
  ("plan",),
  ("__main__",),
)
RANK = {part: rank for rank, row in enumerate(ORDER) for part in row}

# Data workers and question generation start without jax.
WITHOUT_JAX = (
  "types",
  "analysis.layouts",
  "analysis.photos",
  "analysis.rooms",
  "analysis.stimuli",
  "analysis.tokens",
  "data.actions",
  "data.cambrian",
  "data.images",
  "data.libero",
  "data.molmo2",
  "data.molmo2_videos",
  "data.pipeline",
  "data.stts",
  "data.text",
  "data.tfrecord",
  "data.vision",
  "evaluators.choices",
  "evaluators.qa",
  "geometry.boxes",
  "geometry.camera",
  "geometry.resample",
  "drawing",
  "report",
  "world.cameras",
  "world.camera_questions",
  "world.dataset",
  "world.layouts",
  "world.questions",
  "world.reaching",
  "world.scene",
  "world.targets",
  "world.visibility",
  "world.vocabulary",
)


def imports(path, top_level_only=False):
  """Dotted names that a file imports."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  found = set()
  for node in tree.body if top_level_only else ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def part_of(path):
  return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_part_imports_only_what_stands_before_it(path):
  part = part_of(path)
  if part == "__init__":
    return
  assert part in RANK, f"{part} has no place in ORDER"
  for name in imports(path):
    words = name.split(".")
    if words[0] != "spatial_jax" or words[1] in (part, "__version__"):
      continue
    assert RANK[words[1]] < RANK[part], f"{part} imports {name}"


def test_host_modules_do_not_import_jax():
  paths = [PACKAGE / f"{name.replace('.', '/')}.py" for name in WITHOUT_JAX]
  for path in paths:
    if path.exists():
      for name in imports(path, top_level_only=True):
        assert name.split(".")[0] not in ("jax", "flax"), f"{path}: {name}"


def test_host_modules_load_no_jax():
  # grain itself imports jax, so whatever imports grain is left out here.
  names = [
    f"spatial_jax.{name}"
    for name in WITHOUT_JAX
    if (PACKAGE / f"{name.replace('.', '/')}.py").exists()
    and name != "data.pipeline"
  ]
  code = (
    f"import importlib, sys\nfor name in {names!r}:\n"
    "  importlib.import_module(name)\n"
    "  assert 'jax' not in sys.modules, name"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


def code_files():
  folders = ("spatial_jax", "configs", "launch", "tests")
  return [p for f in folders for p in sorted((ROOT / f).rglob("*.py"))]


def test_files_are_short():
  lines = {p: len(p.read_text().splitlines()) for p in code_files()}
  long = {str(p.relative_to(ROOT)): n for p, n in lines.items() if n > 600}
  assert not long, f"split by subject: {long}"
  ours = [n for p, n in lines.items() if "tests" not in p.parts and n > 5]
  assert statistics.median(ours) <= 180


def test_help_answers_at_once():
  if not (PACKAGE / "__main__.py").exists():
    pytest.skip("no command line yet")
  seconds = []
  for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
      [sys.executable, "-m", "spatial_jax", "--help"],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU seconds: other work on the machine doesn't count.
    seconds.append(
      after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    )
  assert done.returncode == 0, done.stderr
  for word in ("train", "evaluate", "generate", "view", "--config"):
    assert word in done.stdout
  assert min(seconds) <= 1.5


# Spelt in two parts so that this file doesn't find itself.
FORBIDDEN = {
  "a path of one machine": r"(?<![\w.:/])/(?:wor" + r"k|roo" + r"t|home)/\w",
  "a registry's host": r"(?:py" + r"pi|pythonhosted|debian)\.(?:org|net)|"
  r"(?:extra-)?index-" + r"url|find-" + r"links",
}
TEXT = {".py", ".md", ".toml", ".txt", ".ipynb", ".yaml", ".yml", ".sh", ""}


def test_files_name_no_machine_and_no_registry():
  listed = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  if listed.returncode:
    pytest.skip("not a git checkout")
  for name in listed.stdout.splitlines():
    path = ROOT / name
    if path.suffix not in TEXT or not path.is_file() or "golden" in path.parts:
      continue
    text = path.read_text(encoding="utf-8")
    for what, pattern in FORBIDDEN.items():
      found = re.search(pattern, text)
      assert not found, f"{name} holds {what}: {found and found.group()}"


def test_tests_run_on_eight_cpu_devices():
  import jax

  assert os.environ["JAX_PLATFORMS"] == "cpu"
  assert jax.device_count() == 8
