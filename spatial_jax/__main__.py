# SPDX-License-Identifier: Apache-2.0
"""The command line: python -m spatial_jax COMMAND --config=FILE --workdir=DIR.

jax is imported by the command, after its arguments were found good.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

# name -> (module with main(config, workdir), what it does)
COMMANDS = {
  "train": ("train", "train, or go on from the workdir's last checkpoint"),
  "evaluate": ("evaluate", "run config.evals on the workdir's checkpoint"),
  "generate": ("generate", "answer questions with the workdir's checkpoint"),
  "view": ("report", "write pictures and curves of a run to report.html"),
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
  --multihost           one of several processes (jax.distributed)
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


def _file(argv: Sequence[str]) -> str:
  given = ""
  for i, word in enumerate(argv):
    if word.startswith("--config="):
      given = word.partition("=")[2]
    elif word == "--config" and i + 1 < len(argv):
      given = argv[i + 1]
  if not given:
    raise Usage("--config is missing: give a recipe, --config=configs/NAME.py")
  path = given.partition(":")[0]
  if not os.path.isfile(path):
    folder = os.path.dirname(path) or "."
    files = os.listdir(folder) if os.path.isdir(folder) else []
    known = [os.path.join(folder, f) for f in files if f.endswith(".py")]
    raise Usage(f"--config: no file {path!r}{_close(path, known)}")
  return path


def _parse(argv: Sequence[str]) -> Any:
  """The flags of a command, with the recipe loaded and overridden."""
  from absl import flags
  from ml_collections import config_flags

  # Recipes import each other as configs.NAME, from any working directory.
  root = os.path.dirname(os.path.dirname(os.path.abspath(_file(argv))))
  sys.path.insert(0, root)
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config", None, "recipe", lock_config=True, flag_values=values
  )
  flags.DEFINE_string("workdir", None, "folder", flag_values=values)
  flags.DEFINE_bool("multihost", False, "jax.distributed", flag_values=values)
  flags.DEFINE_bool("debug", False, "tracebacks", flag_values=values)
  try:
    rest = values(["spatial_jax", *argv])[1:]
  except flags.UnrecognizedFlagError as error:
    raise Usage(
      f"unknown option --{error.flagname}"
      + _close(error.flagname, [*values, "help"])
    ) from error
  except (KeyError, AttributeError) as error:
    _unknown_key(argv, error)
  except (flags.Error, ValueError, TypeError) as error:
    raise Usage(str(error)) from error
  if rest:
    raise Usage(f"unexpected argument {rest[0]!r}; options begin with --")
  return values


def _unknown_key(argv: Sequence[str], error: Exception) -> None:
  """Says which override names a key the recipe lacks; else `error` itself."""
  plain = [word for word in argv if not word.startswith("--config.")]
  if len(plain) == len(argv):
    raise error  # the recipe's own mistake
  keys = list(_keys(_parse(plain).config))
  for word in argv:
    name = word.partition("=")[0][2:]
    known = any(key == name or key.startswith(name + ".") for key in keys)
    if word.startswith("--config.") and not known:
      raise Usage(f"unknown key --{name}{_close(name, keys)}") from error
  raise error


def _command(argv: Sequence[str]) -> int:
  command, rest = argv[0], list(argv[1:])
  if command not in COMMANDS:
    raise Usage(
      f"unknown command {command!r}{_close(command, list(COMMANDS))} "
      f"Commands are {', '.join(COMMANDS)}; --help explains them"
    )
  wants_help = any(word in ("--help", "-h") for word in rest)
  if wants_help and not any(word.startswith("--config") for word in rest):
    print(_help())
    return 0
  rest = [word for word in rest if word not in ("--help", "-h")]
  values = _parse(rest)
  keys = _keys(values.config)
  if wants_help:
    print(_help() + f"\nkeys of {values['config'].config_filename}:")
    print("\n".join(f"  --{key}={value!r}" for key, value in keys.items()))
    return 0
  if not values.workdir:
    raise Usage("--workdir is missing: give a folder, --workdir=runs/NAME")
  module = importlib.import_module(f"spatial_jax.{COMMANDS[command][0]}")
  if values.multihost:
    import jax

    jax.distributed.initialize()
  module.main(values.config, values.workdir)
  return 0


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command; returns the exit status: 0, 1 (failed) or 2 (usage)."""
  argv = list(sys.argv[1:] if argv is None else argv)
  if not argv or argv[0] in ("--help", "-h", "help"):
    print(_help())
    return 0 if argv else 2
  try:
    return _command(argv)
  except (ValueError, OSError, ArithmeticError) as error:
    # The library's own errors are of these types, with a message that says
    # what to do. Any other type is a bug and keeps its traceback.
    if "--debug" in argv:
      raise
    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, Usage) else 1


def run() -> None:
  sys.exit(main())


if __name__ == "__main__":
  run()
