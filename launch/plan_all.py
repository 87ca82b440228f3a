# SPDX-License-Identifier: Apache-2.0
"""Plans every full-size recipe and writes the table in launch/README.md.

  python launch/plan_all.py [--only=WORD] [--seconds=600]

Each row is a process of its own, one at a time: 1 to 6 minutes of a CPU core
and 2 to 6 GB each. Rows whose process fails or takes longer keep their place in
the table, with the reason. Needs `pip install 'spatial-jax[tpu,cuda]'`, and no
chip.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "launch" / "README.md"
BEGIN, END = "<!-- plans -->\n", "<!-- end of plans -->\n"

# On a cube of 4 x 4 x 4 the compiler gathers over all 64 chips by sums of whole
# arrays, twice the bytes; over 16 by parts.
_CUBE = ("--config.mesh.data=-1", "--config.mesh.fsdp=16")

# (what, recipe, topology, overrides)
ROWS = (
  ("Qwen2.5-VL-3B", "qwen2_5_vl_sft.py:variant=3b", "v5e:4x4", ()),
  ("Qwen2.5-VL-3B", "qwen2_5_vl_sft.py:variant=3b", "v6e:4x4", ()),
  ("Spatial-MLLM v1.1", "spatial_mllm_sft.py:variant=v1_1", "v5e:4x4", ()),
  ("Spatial-MLLM v1.1", "spatial_mllm_sft.py:variant=v1_1", "v6e:4x4", ()),
  ("Qwen2.5-VL-7B", "qwen2_5_vl_sft.py:variant=7b", "v5p:2x2x4", ()),
  (
    "Cambrian-1-8B",
    "cambrian.py:variant=8b,stage=2,data=F,images=P,tokenizer=L",
    "v5p:4x4x4",
    _CUBE,
  ),
  (
    "Cambrian-1-8B, rooms",
    "cambrian.py:variant=8b,stage=2",
    "v5p:4x4x4",
    _CUBE,
  ),
  ("LLaVA-3D-7B", "llava_3d_sft.py:stage=2", "v5p:2x2x4", ()),
  ("Molmo2-8B, STTS 50 %", "stts_sft.py:variant=8b", "v5p:4x4x4", _CUBE),
  ("pi0 and VGGT", "spatial_forcing.py:policy=pi0", "v5p:2x2x4", ()),
  *(
    (what, recipe, "h200:1", (f"--config.batch_size={rows}",))
    for what, recipe, rows in (
      ("Qwen2.5-VL-3B", "qwen2_5_vl_sft.py:variant=3b", 4),
      ("Spatial-MLLM v1.1", "spatial_mllm_sft.py:variant=v1_1", 4),
      ("Molmo2-4B, STTS 50 %", "stts_sft.py:variant=4b", 1),
    )
  ),
  *(
    (
      f"Qwen2.5-VL-3B, {chips} chips",
      "qwen2_5_vl_sft.py:variant=3b",
      topology,
      (
        f"--config.batch_size={chips}",
        *_CUBE,
      ),
    )
    for chips, topology in (
      (16, "v5p:2x2x4"),
      (256, "v5p:4x8x8"),
      (4096, "v5p:16x16x16"),
    )
  ),
)
HEAD = (
  "| recipe | chips | batch | GiB a device: parameters, optimizer, "
  "activations, peak (of) | all-gather, reduction, other GiB (to formula) | "
  "TFLOP a device: model, padded | floor s (bound) | tokens/s/chip | compile "
  "CPU-s, GiB |\n|" + " --- |" * 9 + "\n"
)


def main() -> None:
  options = argparse.ArgumentParser(description=__doc__)
  options.add_argument("--only", default="", help="rows whose names have this")
  options.add_argument("--seconds", type=int, default=600)
  given = options.parse_args()
  old = _old()
  for what, recipe, topology, overrides in ROWS:
    key = f"| {what} | {topology} |"
    if given.only.lower() not in key.lower():
      continue
    old[key] = _row(key, recipe, topology, overrides, given.seconds)
    print(old[key], flush=True)
    _write(old)


def _row(key, recipe, topology, overrides, seconds) -> str:
  command = [sys.executable, "-m", "spatial_jax", "plan", "--json"]
  command += [f"--config={ROOT}/configs/{recipe}", f"--topology={topology}"]
  try:
    done = subprocess.run(
      [*command, *overrides],
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=seconds,
    )
  except subprocess.TimeoutExpired:
    return f"{key} not compiled within {seconds} s |"
  if done.returncode:
    return f"{key} {done.stderr.strip().splitlines()[-1][:200]} |"
  plan = json.loads(done.stdout[done.stdout.index("{") :])
  return key + " | ".join(_cells(plan)) + " |"


def _cells(plan):
  gib = 2**30

  def sizes(*names):
    return ", ".join(f"{plan[name] / gib:.2f}" for name in names)

  moved = {kind: size for kind, (_, size) in plan["collectives"].items()}
  gathered = moved.pop("all-gather", 0)
  reduced = moved.pop("all-reduce", 0) + moved.pop("reduce-scatter", 0)
  parts = ", ".join(
    f"{size / gib:.2f}" for size in (gathered, reduced, sum(moved.values()))
  )
  fits = "" if plan["fits"] else ", does not fit"
  memory = sizes("parameters", "optimizer", "activations", "peak")
  flops = ", ".join(
    f"{plan[name] / 1e12:.0f}" for name in ("model_flops", "padded_flops")
  )
  return (
    f" {plan['batch_size']}",
    f"{memory} ({sizes('hbm')}){fits}",
    f"{parts} ({plan['difference']:+.1%})",
    flops,
    f"{plan['seconds']:.2f} ({plan['bound']})",
    f"{plan['tokens_per_second']:,.0f}",
    f"{plan['compile_cpu_seconds']:.0f}, {sizes('compile_memory')}",
  )


def _old() -> dict[str, str]:
  """Rows that the table has, by their first cells."""
  if not README.exists() or BEGIN not in README.read_text():
    return {}
  table = README.read_text().split(BEGIN)[1].split(END)[0]
  rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
  return {" |".join(row.split(" |")[:2]) + " |": row for row in rows}


def _write(rows) -> None:
  text = README.read_text() if README.exists() else "# Launch\n\n"
  if BEGIN not in text:
    text += f"\n## Plans\n\n{BEGIN}{END}"
  before, _, rest = text.partition(BEGIN)
  after = rest.partition(END)[2]
  order = [f"| {what} | {topology} |" for what, _, topology, _ in ROWS]
  table = "".join(rows[key] + "\n" for key in order if key in rows)
  README.write_text(f"{before}{BEGIN}{HEAD}{table}{END}{after}")


if __name__ == "__main__":
  main()
