# SPDX-License-Identifier: Apache-2.0
"""The `generate` command: a checkpoint answers questions of its recipe's data.

Rows of any source that follows the batch contract: a segment's prompt ends
where its answer is to be predicted (`loss_weight` > 0).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from spatial_jax import checkpoint, evaluate, generate, sharding
from spatial_jax import system as systems
from spatial_jax.data import pipeline, workers

Row = dict[str, np.ndarray]


def prompts(row: Row) -> list[tuple[Row, np.ndarray]]:
  """(row with one prompt alone, right-padded; the true answer's ids)."""
  out = []
  for segment in np.unique(row["segments"][row["segments"] > 0]):
    own = row["segments"] == segment
    said = np.flatnonzero(own & (row["loss_weight"] > 0))
    if not len(said):
      continue
    shared = row["shared"] if "shared" in row else np.zeros_like(own)
    # Padding among what is shared are slots of an image: they stay in place.
    index = np.arange(len(own))
    inside = (row["segments"] == 0) & (index < index[shared].max(initial=0))
    keep = np.flatnonzero((own | shared | inside) & (index <= said[0]))
    alone = dict(row)
    for name in ("tokens", "segments", "shared", "positions"):
      if name in row:
        value = np.zeros_like(row[name])
        value[..., : len(keep)] = row[name][..., keep]
        alone[name] = value
    out.append((alone, row["labels"][said]))
  return out


def main(config: Any, workdir: str) -> list[tuple[str, str, str]]:
  """Prints and returns (prompt, answer, truth) of `config.generate.rows` rows.

  Raises:
    FileNotFoundError: no checkpoint in the workdir.
  """
  if not checkpoint.is_workdir(workdir):
    raise FileNotFoundError(
      f"no checkpoint in {workdir}; train first, or give the --workdir of a "
      "trained model"
    )
  mesh = sharding.mesh(**config.mesh.to_dict())
  answers = []
  with jax.set_mesh(mesh):
    system = systems.build(config, pipeline.example(config), config.batch_size)
    params, _ = evaluate.load(workdir, system, mesh)
    for text in ask(config, system, params):
      print("\n{}\n-> {}   (truth: {})".format(*text), flush=True)
      answers.append(text)
  return answers


def ask(
  config: Any, system: systems.System, params: Any
) -> Iterator[tuple[str, str, str]]:
  """(prompt, answer, truth) of the prompts of `config.generate.rows` rows."""
  options = config.generate
  source = workers.make(config, options.split)
  tokenizer = source.tokenizer
  see = jax.jit(system.transform)
  rows = range(min(options.rows, len(source)))
  # A batch is full of prompts, be they of one row or of many.
  asked = [one for index in rows for one in prompts(source[index])]
  for first in range(0, len(asked), config.batch_size):
    group = asked[first : first + config.batch_size]
    rows = [row for row, _ in group]
    rows += [rows[-1]] * (config.batch_size - len(rows))  # static shape
    batch = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
    tokens, lengths = generate.generate(
      system.model,
      params,
      system.mod.arguments(see(batch)),
      max_new_tokens=options.max_new_tokens,
      stop_ids=(tokenizer.end_id,),
      temperature=options.temperature,
      top_p=options.top_p,
      key=jax.random.key(config.seed),
      pad_id=tokenizer.pad_id,
    )
    for (row, truth), ids, n in zip(group, tokens, lengths, strict=False):
      # Images may stand for ids that no vocabulary has.
      prompt = row["tokens"][(row["segments"] > 0) & (row["tokens"] >= 0)]
      yield tuple(
        tokenizer.decode(np.asarray(x)).strip()
        for x in (prompt, ids[: int(n)], truth)
      )
