# SPDX-License-Identifier: Apache-2.0
"""A stream of scalars to stdout, JSONL and TensorBoard; throughput and MFU."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import tqdm

# Dense bfloat16 peak in FLOP/s by the start of jax's device_kind (the vendors'
# figures); the longest name that fits counts.
PEAK = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 2307e12 / 2,  # two devices a chip
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Peak of one device, or None where it isn't known."""
  names = [name for name in PEAK if device_kind.startswith(name)]
  return PEAK[max(names, key=len)] if names else None


def model_flops(
  shapes: Mapping[str, Any],
  tokens: Mapping[str, int],
  trained: Mapping[str, bool] | None = None,
) -> float:
  """FLOPs of one training step: 6 per weight of a matrix and token.

  A frozen matrix counts 4 where it has an adapter, for which gradients pass
  through it, else 2. Attention scores are left out, so the MFU made of it is a
  lower bound.

  Args:
    shapes: parameters by name.
    tokens: group (first part of the name) -> tokens that pass it in a step;
      "" is for groups without an entry.
    trained: by name, whether a parameter is trained; by default all are.
  """
  total = 0.0
  for name, leaf in shapes.items():
    if name.endswith("kernel") and len(leaf.shape) > 1:
      group = name.split("/")[0]
      each = 6.0
      if trained is not None and not trained[name]:
        each = 4.0 if f"{name.removesuffix('kernel')}lora_a" in shapes else 2.0
      total += each * math.prod(leaf.shape) * tokens.get(group, tokens[""])
  return total


class Throughput:
  """Rates since the last report, from what `add` counted."""

  def __init__(self, peak: float | None):
    self._peak = peak  # FLOP/s of all devices together
    self.restart()

  def restart(self) -> None:
    """Counts from here: compiling, saving and evaluating are left out."""
    self._counts: dict[str, float] = {}
    self._time = time.perf_counter()

  def add(self, **counts: float) -> None:
    """What one step did: steps, tokens, frames, flops."""
    for name, count in counts.items():
      self._counts[name] = self._counts.get(name, 0.0) + count

  def report(self) -> dict[str, float]:
    seconds = time.perf_counter() - self._time
    rates = {name: count / seconds for name, count in self._counts.items()}
    flops = rates.pop("flops", 0.0)
    out = {f"{name}_per_second": rate for name, rate in rates.items() if rate}
    if self._peak and flops:
      out["mfu"] = flops / self._peak
    self.restart()
    return out


class Goodput:
  """The share of a run's time in which it trained, and where the rest went."""

  def __init__(self):
    self.began = time.perf_counter()
    self._lost: dict[str, float] = {}

  def lose(self, part: str, seconds: float) -> None:
    self._lost[part] = self._lost.get(part, 0.0) + seconds

  @contextlib.contextmanager
  def losing(self, part: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    self.lose(part, time.perf_counter() - began)

  def share(self) -> float:
    total = time.perf_counter() - self.began
    return max(0.0, 1 - sum(self._lost.values()) / max(total, 1e-9))

  def line(self) -> str:
    parts = sorted(self._lost.items(), key=lambda item: -item[1])
    lost = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts)
    total = time.perf_counter() - self.began
    return f"goodput {self.share():.1%} of {total:.1f} s; the rest: {lost}"


def local_folder(workdir: str) -> pathlib.Path:
  """Where metrics are appended: object stores cannot, so a folder in runs/."""
  if "://" in workdir:
    return pathlib.Path("runs", workdir.rstrip("/").rpartition("/")[2])
  return pathlib.Path(workdir)


def _summary_writer() -> type:
  """tensorboardX's, without torch.

  Where torch is installed, tensorboardX imports it for what isn't used here,
  which takes longer than all other imports of a run.
  """
  free = "torch" not in sys.modules
  if free:
    sys.modules["torch"] = None  # as if it weren't installed
  try:
    from tensorboardX import SummaryWriter
  finally:
    if free:
      del sys.modules["torch"]
  return SummaryWriter


class Writer:
  """Metrics of a run in <workdir>/metrics.jsonl, TensorBoard and stdout."""

  def __init__(
    self,
    workdir: str,
    *,
    total: int,
    start: int = 0,
    tensorboard: bool = True,
    active: bool = True,
  ):
    self._active = active  # one process of a multi-host run writes
    self._total, self._start = total, start
    self._began = time.perf_counter()
    self.repeated = 0  # steps done before, after the checkpoint
    self._bar = self._board = None
    if not active:
      return
    folder = local_folder(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    self.repeated = _forget(path, start)
    self._file = path.open("a")
    if tensorboard:
      self._board = _summary_writer()(
        str(folder / "tensorboard"), purge_step=start + 1
      )
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        total=total, initial=start, desc="train", unit="step", smoothing=0.1
      )

  def advance(self) -> None:
    if self._bar is not None:
      self._bar.update()

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """One row; the keys are sorted into the same order in every sink."""
    if not self._active:
      return
    row = {"step": step, **{k: float(v) for k, v in scalars.items()}}
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()
    if self._board is not None:
      for name, value in scalars.items():
        self._board.add_scalar(name, float(value), step)

  def show(self, step: int, scalars: Mapping[str, float]) -> None:
    """The same for people, above the bar or as a line of its own."""
    if not self._active:
      return
    values = "  ".join(f"{k} {float(v):.4g}" for k, v in scalars.items())
    text = f"step {step}/{self._total}  {values}"
    if self._bar is None:
      done = step - self._start
      seconds = time.perf_counter() - self._began
      left = seconds / done * (self._total - step) if done > 0 else 0.0
      print(f"{text}  eta {tqdm.tqdm.format_interval(left)}", flush=True)
    else:
      self._bar.write(text, file=sys.stdout)

  def say(self, text: str) -> None:
    if self._active:
      if self._bar is None:
        print(text, flush=True)
      else:
        self._bar.write(text, file=sys.stdout)

  def close(self) -> None:
    if not self._active:
      return
    if self._bar is not None:
      self._bar.close()
    if self._board is not None:
      self._board.close()
    self._file.close()


def _forget(path: pathlib.Path, start: int) -> int:
  """Drops rows after the step a run resumes from, and a torn last line.

  Returns how many steps were after it.
  """
  if not path.exists():
    return 0
  kept, last = [], start
  for line in path.read_text().splitlines():
    try:
      step = json.loads(line)["step"]
    except (ValueError, KeyError):
      continue
    if step <= start:
      kept.append(line + "\n")
    last = max(last, step)
  path.write_text("".join(kept))
  return last - start


def read(workdir: str) -> list[dict[str, float]]:
  """Rows of <workdir>/metrics.jsonl."""
  path = local_folder(workdir) / "metrics.jsonl"
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]
