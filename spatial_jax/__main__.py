# SPDX-License-Identifier: Apache-2.0
"""The command line: python -m spatial_jax COMMAND --config=FILE --workdir=DIR.

jax is imported by the command, after its arguments were found good.
"""

from __future__ import annotations

import difflib
import gc
import importlib.util
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# name -> (module with main(config, workdir), what it does); "module:function"
# also gets the command's OPTIONS
COMMANDS = {
  "train": ("train", "train, or go on from the workdir's last checkpoint"),
  "evaluate": ("evaluate", "run config.evals on the workdir's checkpoint"),
  "generate": ("answer", "answer questions with the workdir's checkpoint"),
  "import": ("convert:load", "published weights into a workdir's checkpoint"),
  "export": ("convert:save", "a workdir's checkpoint as published weights"),
  "cache": ("cache", "VGGT's tokens of the recipe's videos, into files"),
  "analyse": ("analyse", "probe, patch and steer the workdir's checkpoint"),
  "plan": ("plan", "whether the recipe fits a pod, and how fast at best"),
  "view": ("report", "draw rooms of the recipe's data into view.html"),
  "reconstruct": ("reconstruct", "images to cameras, depth and a point cloud"),
}
# They need no recipe and read their own options: module.command(argv).
OWN_OPTIONS = ("reconstruct",)
# They may do without a workdir.
OPTIONS = {
  "import": {"from": "", "dry_run": False},
  "export": {"from": "", "to": "", "dtype": "", "like": ""},
  "cache": {"from": ""},
  "plan": {
    "topology": "v5e:4x4",
    "json": False,
    "search": False,
    "serve": False,
  },
}

HELP = """\
usage: python -m spatial_jax COMMAND --config=FILE[:ARGS] --workdir=DIR
                             [--config.KEY=VALUE ...]

commands:
{commands}

options:
  --config=FILE[:ARGS]  a recipe, for instance configs/demo.py:test; ARGS are
                        the recipe's own, comma-separated (its docstring lists
                        them; most know `test`: tiny, 2 steps, CPU)
  --config.KEY=VALUE    overrides a key of the recipe, for instance
                        --config.optimizer.lr=1e-3
  --workdir=DIR         where checkpoints, metrics and reports go
  --multihost           one of several processes, started with the same command
                        everywhere; see spatial_jax/hosts.py. After SIGTERM the
                        status is 143: start it again
  --from=SOURCE         import: a folder or file of weights, or a hub id
                        (org/name[@revision]); export: a workdir; cache:
                        weights of VGGT
  --dry-run             import: print what would be read, and read nothing
  --to=FOLDER           export: where the files go
  --dtype=bfloat16      export: of all numbers; by default as they are
  --like=FOLDER         export: copies config.json and tokenizer from there
  --topology=v5e:4x4    plan: the chips, KIND:SIZES, or one GPU, h100:1
  --json, --search      plan: as JSON; the smallest topology that fits
  --serve               plan: generation instead of training
  --debug               show the traceback of an error
  --help                this; with --config also the recipe's keys and values
"""


class Usage(ValueError):
  """The command line is wrong."""


def _close(word: str, known: Sequence[str]) -> str:
  near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
  return f"; did you mean {near[0]!r}?" if near else ""


def _help() -> str:
  rows = [f"  {name:<20}  {text}" for name, (_, text) in COMMANDS.items()]
  return HELP.format(commands="\n".join(rows))


def _keys(config: Any, prefix: str = "config") -> dict[str, Any]:
  """Every key of a config by its dotted name."""
  out = {}
  for key, value in config.items(preserve_field_references=True):
    name = f"{prefix}.{key}"
    out |= _keys(value, name) if hasattr(value, "items") else {name: value}
  return out


def _recipe(given: str) -> Any:
  """The config of FILE[:ARGS]."""
  if not given:
    raise Usage("--config is missing: give a recipe, --config=configs/NAME.py")
  path, _, arg = given.partition(":")
  if not os.path.isfile(path):
    folder = os.path.dirname(path)
    files = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    known = [os.path.join(folder, f) for f in files if f.endswith(".py")]
    raise Usage(f"--config: no file {path!r}{_close(path, known)}")
  # Recipes import each other as configs.NAME, from any working directory.
  sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(path))))
  spec = importlib.util.spec_from_file_location("recipe", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise Usage(f"--config: {path} has no get_config(arg), so it is no recipe")
  try:
    return module.get_config(arg)
  except ValueError as error:
    raise Usage(f"--config={given}: {error}") from error


def _parse(argv: Sequence[str], options: Mapping[str, Any]) -> Any:
  """The flags of a command, with the recipe loaded and overridden."""
  from absl import flags
  from ml_collections import config_flags

  given, rest = "", []
  for word in argv:
    if word.startswith("--config="):
      given = word.partition("=")[2]
    else:
      rest.append("--dry_run" if word == "--dry-run" else word)
  config = _recipe(given)
  keys = list(_keys(config))
  for word in rest:
    name = word.partition("=")[0].lstrip("-")
    if name.startswith("config.") and name not in keys:
      raise Usage(f"unknown key --{name}{_close(name, keys)}")

  argv = ["spatial_jax", *rest]
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict(
    "config", config, lock_config=True, flag_values=values, sys_argv=argv
  )
  flags.DEFINE_string("workdir", None, "folder", flag_values=values)
  flags.DEFINE_bool("multihost", False, "jax.distributed", flag_values=values)
  flags.DEFINE_bool("debug", False, "tracebacks", flag_values=values)
  for name, default in options.items():
    is_bool = isinstance(default, bool)
    define = flags.DEFINE_bool if is_bool else flags.DEFINE_string
    define(name, default, "see HELP", flag_values=values)
  try:
    extra = values(argv)[1:]
  except flags.UnrecognizedFlagError as error:
    near = _close(error.flagname, [*values, "help"])
    raise Usage(f"unknown option --{error.flagname}{near}") from error
  except (flags.Error, ValueError, TypeError) as error:
    raise Usage(str(error)) from error
  if extra:
    raise Usage(f"unexpected argument {extra[0]!r}; options begin with --")
  return values


def _command(argv: Sequence[str]) -> int:
  command, rest = argv[0], list(argv[1:])
  if command not in COMMANDS:
    raise Usage(
      f"unknown command {command!r}{_close(command, list(COMMANDS))} "
      f"Commands are {', '.join(COMMANDS)}; --help explains them"
    )
  if command in OWN_OPTIONS:
    rest = [word for word in rest if word != "--debug"]
    importlib.import_module(f"spatial_jax.{command}").command(rest)
    return 0
  wants_help = any(word in ("--help", "-h") for word in rest)
  if wants_help and not any(word.startswith("--config") for word in rest):
    print(_help())
    return 0
  rest = [word for word in rest if word not in ("--help", "-h")]
  options = OPTIONS.get(command, {})
  values = _parse(rest, options)
  keys = _keys(values.config)
  if wants_help:
    print(_help() + "\nkeys of this recipe:")
    print("\n".join(f"  --{key}={value!r}" for key, value in keys.items()))
    return 0
  if not values.workdir and command not in OPTIONS:
    raise Usage("--workdir is missing: give a folder, --workdir=runs/NAME")
  # Its notes on how it reads a folder say nothing to a user.
  logging.getLogger("absl").setLevel(logging.ERROR)
  module, _, function = COMMANDS[command][0].partition(":")
  run_command = getattr(
    importlib.import_module(f"spatial_jax.{module}"), function or "main"
  )
  if values.multihost:
    from spatial_jax import hosts

    hosts.start()
  # `from` is no name in Python.
  own = {name.replace("from", "source"): values[name].value for name in options}
  result = run_command(values.config, values.workdir, **own)
  # To what started the processes, a run that was told to stop isn't done. As
  # shells count SIGTERM.
  return 143 if values.multihost and getattr(result, "interrupted", 0) else 0


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command; returns the exit status: 0, 1 (failed) or 2 (usage)."""
  argv = list(sys.argv[1:] if argv is None else argv)
  if not argv or argv[0] in ("--help", "-h", "help"):
    print(_help())
    return 0 if argv else 2
  try:
    return _command(argv)
  except KeyboardInterrupt:
    print("interrupted; the last checkpoint is kept", file=sys.stderr)
    return 130  # as shells count SIGINT
  except (ValueError, OSError, ArithmeticError) as error:
    # The library's own errors are of these types, with a message that says
    # what to do. Any other type is a bug and keeps its traceback.
    if "--debug" in argv:
      raise
    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, Usage) else 1


def run() -> None:
  # A trace is many small objects, none of them garbage: collecting at the usual
  # pace is a tenth of the time before the first step.
  gc.set_threshold(100_000, 50, 100)
  sys.exit(main())


if __name__ == "__main__":
  run()
