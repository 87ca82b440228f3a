# SPDX-License-Identifier: Apache-2.0
"""Kills a run of several processes again and again; nothing may be lost.

  python launch/chaos.py --workdir=runs/chaos

Trains a tiny model on two processes of four fake CPU devices, undisturbed. Then
the same once more, while one or all of the processes get SIGTERM or SIGKILL at
random moments: after some step, or some time after the start. After each kill
all must end by themselves, and the same command goes on. In the end parameters,
optimizer, losses and the place in the data must have the same bits. A kill that
comes after the last step doesn't count; another is drawn.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pathlib
import random
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# The survivors of a kill notice after this time, if no collective fails first.
HEARTBEAT_SECONDS = 10
MOST_SECONDS = 120  # that a killed run may take to end
WHOLE_SECONDS = 1800  # and one that trains to its last step


def child(
  argv: Sequence[str], environment: Mapping[str, str], log: str
) -> None:
  """One process of a run."""
  out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(out, 1)
  os.dup2(out, 2)
  os.environ.update(environment)
  from spatial_jax import __main__ as cli

  sys.exit(cli.main(list(argv)))


class Pod:
  """Processes that train together; `devices` fake ones each."""

  def __init__(self, argv, log, *, processes=2, devices=4):
    # The server has imported everything once and forks in no time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["spatial_jax.train"])
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [f for f in flags if "device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    shared = {
      "XLA_FLAGS": " ".join(flags),
      "NPROC": "64",  # threads; fewer than devices could wait for each other
      "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
      "JAX_NUM_PROCESSES": str(processes),
      "JAX_HEARTBEAT_TIMEOUT_SECONDS": str(HEARTBEAT_SECONDS),
    }
    self.processes = [
      context.Process(
        target=child,
        args=(
          [*argv, *(["--multihost"] if processes > 1 else [])],
          {**shared, "JAX_PROCESS_ID": str(index)},
          f"{log}.{index}",
        ),
      )
      for index in range(processes)
    ]
    for process in self.processes:
      process.start()

  def running(self) -> bool:
    return all(process.is_alive() for process in self.processes)

  def kill(self, how: int, victims: Sequence[int]) -> None:
    for victim in victims:
      if self.processes[victim].is_alive():
        os.kill(self.processes[victim].pid, how)

  def join(self, seconds: float = MOST_SECONDS) -> list[int]:
    """Exit codes; a process that doesn't end in this time is an error."""
    until = time.monotonic() + seconds
    for process in self.processes:
      process.join(max(0.0, until - time.monotonic()))
    stuck = [i for i, p in enumerate(self.processes) if p.is_alive()]
    for index in stuck:
      self.processes[index].kill()
      self.processes[index].join()
    if stuck:
      raise TimeoutError(f"processes {stuck} still ran after {seconds} s")
    return [process.exitcode for process in self.processes]


def steps_done(workdir: pathlib.Path) -> int:
  """Of the last whole line of the metrics."""
  from spatial_jax import metrics

  try:
    rows = metrics.read(str(workdir))
  except ValueError:  # a torn line
    return 0
  return int(rows[-1]["step"]) if rows else 0


def disturbed(
  command: Sequence[str],
  workdir: pathlib.Path,
  *,
  kills: int,
  steps: int,
  rng: random.Random,
  processes: int = 2,
  devices: int = 4,
) -> list[str]:
  """Trains to the end through that many kills; a line on each."""
  lines = []
  while True:
    log = workdir.parent / f"{workdir.name}.{len(lines)}.log"
    pod = Pod(command, log, processes=processes, devices=devices)
    if len(lines) == kills:
      codes = pod.join(WHOLE_SECONDS)
      if any(codes):
        raise RuntimeError(f"the last run ended with {codes}; see {log}.*")
      return lines
    how = rng.choice((signal.SIGTERM, signal.SIGKILL))
    victims = rng.choice(
      [[i] for i in range(processes)] + [list(range(processes))]
    )
    done = steps_done(workdir)
    # Steps that are left, shared by the kills that are left.
    most = max(2, 2 * (steps - done) // (kills - len(lines) + 1))
    goal = min(done + rng.randint(1, most), steps - 1)
    if rng.random() < 0.25:  # while it starts, compiles or restores
      until, moment = time.monotonic() + rng.uniform(0, 8), "a while"
      while pod.running() and time.monotonic() < until:
        time.sleep(0.01)
    else:
      moment = f"step {goal}"
      while pod.running() and steps_done(workdir) < goal:
        time.sleep(0.01)
      time.sleep(rng.uniform(0, 0.05))
    if pod.running():
      pod.kill(how, victims)
      began = time.monotonic()
      codes = pod.join()
      if not any(codes):
        raise RuntimeError(
          f"after {how.name} of {victims} all said that they were done; steps "
          "are too fast for this"
        )
      took = time.monotonic() - began
      lines.append(
        f"kill {len(lines) + 1}: {how.name} of {victims} after {moment}, at "
        f"step {steps_done(workdir)}; all ended {took:.1f} s later with {codes}"
      )
      print(lines[-1], flush=True)
    else:
      codes = pod.join()
      raise RuntimeError(f"ended with {codes} before a kill; see {log}.*")


def final(workdir: pathlib.Path, step: int) -> dict[str, Any]:
  """All bits of a finished run."""
  import jax
  import numpy as np
  import orbax.checkpoint as ocp

  from spatial_jax import metrics, trees

  folder = workdir.absolute() / "checkpoints" / str(step)
  out = {}
  with ocp.PyTreeCheckpointer() as reader:
    for item in ("params", "opt"):
      shapes = reader.metadata(folder / item).item_metadata.tree
      plain = ocp.ArrayRestoreArgs(restore_type=np.ndarray)
      leaves = jax.tree.structure(shapes).num_leaves
      args = jax.tree.unflatten(jax.tree.structure(shapes), [plain] * leaves)
      got = reader.restore(folder / item, restore_args=args)
      for name, x in trees.flatten(got).items():
        out[f"{item}/{name}"] = np.asarray(x).tobytes()
  places = [json.loads(p.read_text()) for p in (folder / "data").glob("pro*")]
  rows = {row["step"]: row["loss"] for row in metrics.read(str(workdir))}
  return {**out, "data": places[0], "losses": rows}


def main(argv: Sequence[str] | None = None) -> list[str]:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  toy = f"{ROOT}/tests/toy.py"
  parser.add_argument("--config", default=toy)
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--steps", type=int, default=200)
  parser.add_argument("--every", type=int, default=10, help="checkpoints")
  parser.add_argument("--seed", type=int, default=0)
  args, more = parser.parse_known_args(argv)
  if args.config == toy and not more:
    more = ["--config.data.pause=0.01"]  # or it is over before it is killed
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  args.workdir.mkdir(parents=True, exist_ok=True)

  def command(name):
    return [
      "train",
      f"--config={args.config}",
      f"--workdir={args.workdir / name}",
      f"--config.steps={args.steps}",
      f"--config.checkpoint.every={args.every}",
      *more,
    ]

  whole = Pod(command("whole"), args.workdir / "whole.log")
  if any(codes := whole.join(WHOLE_SECONDS)):
    raise RuntimeError(f"undisturbed, it ended with {codes}")
  lines = disturbed(
    command("killed"),
    args.workdir / "killed",
    kills=args.kills,
    steps=args.steps,
    rng=random.Random(args.seed),
  )
  got = final(args.workdir / "killed", args.steps)
  want = final(args.workdir / "whole", args.steps)
  wrong = sorted(k for k in {*got, *want} if got.get(k) != want.get(k))
  if wrong:
    raise AssertionError(f"not as if undisturbed: {wrong}")
  print(f"{len(lines)} kills: all {len(got)} arrays and lists are equal")
  return lines


if __name__ == "__main__":
  main()
