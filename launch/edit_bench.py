# SPDX-License-Identifier: Apache-2.0
"""Time of a sweep of edits over all slots of a decoder, beside plain forwards.

  python launch/edit_bench.py --layers=28

Prints milliseconds of as many forward passes as there are slots, without edits
and with one: CPU time of this process, so that other work counts little, and
time by the clock, which is what counts on an accelerator.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

DEFAULTS = {
  "layers": 28,
  "width": 64,
  "rows": 8,
  "length": 64,  # tokens of a row
  "rounds": 7,  # of which the best counts
}


def main() -> None:
  parser = argparse.ArgumentParser()
  for name, value in DEFAULTS.items():
    parser.add_argument(f"--{name}", type=type(value), default=value)
  args = parser.parse_args()

  import jax
  import jax.numpy as jnp
  import numpy as np

  from spatial_jax.models import llm
  from spatial_jax.nn.edit import Edit, residuals

  L, D, B, T = args.layers, args.width, args.rows, args.length
  model = llm.Model(512, D, L, 4, 2, 4 * D, sections=None)
  rng = np.random.default_rng(0)
  batch = {
    "tokens": rng.integers(0, 512, (B, T)).astype(np.int32),
    "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
    "segments": np.ones((B, T), np.int32),
  }
  params = jax.jit(lambda key: model.init(key, **batch)["params"])(
    jax.random.key(0)
  )
  mask = jnp.asarray(rng.random((B, T)) < 0.5)

  def logits(params, edit=None):
    last = jnp.full(B, T - 1)
    return model.apply({"params": params}, **batch, edit=edit, last=last)[0]

  plain = jax.jit(logits)
  edited = jax.jit(
    lambda params, slot, values: logits(params, Edit(slot, mask, values[slot]))
  )
  capture = jax.jit(
    lambda params: residuals(model.apply({"params": params}, **batch)[1])
  )
  values = capture(params) + 1
  slots = [jnp.asarray(slot, jnp.int32) for slot in range(L + 1)]

  def best(call):
    jax.block_until_ready([call(slot) for slot in slots])
    times = []
    for _ in range(args.rounds):
      start = time.process_time(), time.perf_counter()
      jax.block_until_ready([call(slot) for slot in slots])
      times.append(
        (time.process_time() - start[0], time.perf_counter() - start[1])
      )
    return [1e3 * min(column) for column in zip(*times, strict=True)]

  without = best(lambda _: plain(params))
  swept = best(lambda slot: edited(params, slot, values))
  print(f"{L + 1} slots, {edited._cache_size()} program for all of them")
  for clock, a, b in zip(("CPU", "wall"), without, swept, strict=True):
    print(f"{clock}: plain {a:.1f} ms, edited {b:.1f} ms, ratio {b / a:.2f}")


if __name__ == "__main__":
  main()
