# SPDX-License-Identifier: Apache-2.0
"""VSI-Bench's tasks on rooms of the world, scored as the benchmark scores them.

Each room's questions are answered in one packed forward pass. The answer is the
greedy token for choices; for numbers, the one with the highest expected mean
relative accuracy under the model's distribution (the same for every model).
"""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from spatial_jax import sharding
from spatial_jax.evaluators import qa
from spatial_jax.world import dataset, observe, questions, vocabulary


def answer_distributions(model, mod, config):
  """Jitted (params, batch) -> log p[B, Q, V] of the answers of packed rows."""
  see = observe.make(config) if config.data.get("render") else lambda x: x

  def forward(params, batch):
    batch = see(batch)
    logits, _ = model.apply({"params": params}, **mod.arguments(batch))
    at = jnp.maximum(batch["answer_at"], 0)
    picked = jnp.take_along_axis(logits, at[..., None], 1)
    return jax.nn.log_softmax(picked.astype(jnp.float32))

  return jax.jit(forward, compiler_options=sharding.compiler_options())


def read(log_p: np.ndarray, question, tokenizer, numbers) -> str:
  """Text of the answer that a distribution gives to a question."""
  if np.isnan(question.value):
    return tokenizer.decode([int(log_p.argmax())])
  ids, values = numbers
  return f"{qa.best_number(log_p[ids], values):g}"


def predict(config, model, mod, params, source, batch_size, progress=True):
  """Answers all questions of a source's rooms.

  Returns:
    list over rooms of (room, [(question, answer text), ...]).
  """
  forward = answer_distributions(model, mod, config)
  numbers = vocabulary.numbers(source.tokenizer)
  rooms = len(source)
  out = []
  bar = tqdm.tqdm(
    total=rooms, desc="evaluate", unit="room", disable=not progress
  )
  for first in range(0, rooms, batch_size):
    group = [
      source.room(i) for i in range(first, min(first + batch_size, rooms))
    ]
    rows = [source.row(r) for r in group]
    rows += [rows[-1]] * (batch_size - len(rows))  # static shape
    batch = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
    log_p = np.asarray(forward(params, batch))
    for index, room in enumerate(group):
      answers = [
        (q, read(log_p[index, n], q, source.tokenizer, numbers))
        for n, (q, *_) in enumerate(source.place(room.questions))
      ]
      out.append((room, answers))
    bar.update(len(group))
  bar.close()
  return out


def score(pairs, variant: str = "original") -> dict:
  """Scores (question, answer) pairs: per type, macro over the eight tasks."""
  rows = collections.defaultdict(list)
  for question, answer in pairs:
    truth = question.answer if question.options else question.value
    rows[question.type].append(
      qa.score(answer, truth, bool(question.options), variant)
    )
  chance = questions.chance(q for q, _ in pairs)
  per_type = {
    kind: {
      "score": 100 * float(np.mean(values)),
      "chance": 100 * chance[kind],
      "questions": len(values),
    }
    for kind, values in rows.items()
  }
  vsi = [
    (kind, float(value))
    for kind, values in rows.items()
    if kind in questions.VSI_TYPES
    for value in values
  ]
  total = qa.aggregate(vsi)["all"]
  return {
    "macro": 100 * (total["macro"] or 0.0),
    "micro": 100 * (total["micro"] or 0.0),
    "per_type": dict(sorted(per_type.items(), key=_order)),
  }


def _order(item) -> tuple:
  """The benchmark's tasks first, in its order."""
  known = questions.VSI_TYPES
  kind = item[0]
  return (known.index(kind) if kind in known else len(known), kind)


def evaluate(
  config,
  model,
  mod,
  params,
  mesh,
  *,
  split: str = "test",
  rooms: int = 256,
  batch_size: int = 16,
  variant: str = "original",
  keep: int = 0,
) -> dict:
  """Per-type table; `keep` rooms' questions and answers ride along."""
  del mesh
  config = config.copy_and_resolve_references()
  config.data.world.rooms = rooms
  source = dataset.make(config, split)
  got = predict(config, model, mod, params, source, batch_size)
  result = score([pair for _, pairs in got for pair in pairs], variant)
  result["examples"] = [
    {
      "room": index,
      "answers": [q.asdict() | {"answer": a} for q, a in pairs],
    }
    for index, (_, pairs) in enumerate(got[:keep])
  ]
  return result
