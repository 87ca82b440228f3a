# SPDX-License-Identifier: Apache-2.0
"""The command line: help, overrides, and errors that say what to do."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from configs import common
from spatial_jax import __main__ as cli

ROOT = pathlib.Path(__file__).parents[1]
TOY = f"--config={ROOT}/tests/toy.py"


def test_help_lists_every_command(capsys):
  assert cli.main(["--help"]) == 0
  text = capsys.readouterr().out
  for command in cli.COMMANDS:
    assert command in text


def test_help_with_a_recipe_lists_its_keys(capsys):
  assert cli.main(["train", TOY, "--help"]) == 0
  assert "--config.optimizer.lr=0.01" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["trian"], "unknown command 'trian'; did you mean 'train'?"),
    (["train"], "--config is missing"),
    (["train", "--config=tests/toi.py"], "did you mean 'tests/toy.py'?"),
    (["train", TOY], "--workdir is missing"),
    (["train", TOY, "--workdr=x"], "did you mean 'workdir'?"),
    (["train", TOY, "--workdir=x", "extra"], "unexpected argument 'extra'"),
    (
      ["train", TOY, "--workdir=x", "--config.optimizer.lrr=1.0"],
      "unknown key --config.optimizer.lrr; did you mean 'config.optimizer.lr'",
    ),
    (
      ["train", TOY, "--workdir=x", "--config.steps=many"],
      "--config.steps=many",
    ),
    (
      ["train", TOY, "--workdir=x", "--config.seed=1.5"],
      "--config.seed=1.5",
    ),
    (["train", f"{TOY}:nam=3", "--workdir=x"], "'nam' is unknown; known are"),
    (["train", f"{TOY}:nan=x", "--workdir=x"], "nan='x': expected int"),
  ],
)
def test_a_wrong_command_line_is_one_clear_line(
  argv, message, capsys, monkeypatch
):
  monkeypatch.chdir(ROOT)
  assert cli.main(argv) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.startswith("error: ") and error.count("\n") == 1


def test_a_failure_of_the_command_is_status_1(capsys, tmp_path):
  argv = ["train", TOY, f"--workdir={tmp_path}", "--config.model.variant=big"]
  assert cli.main(argv) == 1
  assert "config.model.variant='big'" in capsys.readouterr().err


def test_train_then_evaluate_from_the_shell(tmp_path):
  where = ("--config=tests/toy.py", f"--workdir={tmp_path}")

  def run(command, *more):
    return subprocess.run(
      [sys.executable, "-m", "spatial_jax", command, *where, *more],
      cwd=ROOT,
      env={**os.environ, "XLA_FLAGS": os.environ["ONE_DEVICE"]},
      capture_output=True,
      text=True,
    )

  done = run("train", "--config.steps=4", "--config.optimizer.lr=0.05")
  assert done.returncode == 0, done.stderr
  assert "step 4/4" in done.stdout and "1 x cpu" in done.stdout
  saved = json.loads((tmp_path / "config.json").read_text())
  assert saved["optimizer"]["lr"] == 0.05
  done = run("evaluate")
  assert done.returncode == 0, done.stderr
  scores = json.loads((tmp_path / "evaluations" / "4.json").read_text())
  assert scores["step"] == 4 and 0 <= scores["copy"]["accuracy"] <= 1
  assert "eval/copy/accuracy" in done.stdout


def test_arguments_of_a_recipe_keep_the_types_of_their_defaults():
  got = common.parse_arg("size=3b,res=224,test", size="", res=8, test=False)
  assert got.size == "3b" and got.res == 224 and got.test is True
  assert common.parse_arg("test=false", test=True).test is False
  assert common.parse_arg("", res=8).res == 8
  with pytest.raises(ValueError, match="res needs a value"):
    common.parse_arg("res", res=8)
  with pytest.raises(ValueError, match="expected true or false"):
    common.parse_arg("test=maybe", test=False)
