# SPDX-License-Identifier: Apache-2.0
"""What a model answers: probabilities of labels over spellings, two orders."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.types import Array, Bool, Float, Int


def spellings(label: str) -> tuple[str, str, str, str]:
  """Lower and capitalised, each also after a space: one token each."""
  low, high = label.lower(), label.capitalize()
  return low, high, f" {low}", f" {high}"


def spelling_ids(
  encode: Callable[[str], Sequence[int]], labels: Iterable[str]
) -> Int[np.ndarray, "K 4"]:
  """Ids of each label's spellings.

  Args:
    encode: text to ids, without special tokens.

  Raises:
    ValueError: a spelling is several tokens.
  """
  rows = []
  for label in labels:
    coded = [list(encode(text)) for text in spellings(label)]
    named = zip(spellings(label), coded, strict=True)
    if bad := [text for text, ids in named if len(ids) != 1]:
      raise ValueError(
        f"{bad} are several tokens each; the probability of a label is that of "
        "the first token of the answer: choose labels that are one token"
      )
    rows.append([ids[0] for ids in coded])
  return np.array(rows, np.int32)


def label_probabilities(
  logits: Float[Array, "*n V"], ids: Int[Array, "K S"]
) -> Float[Array, "*n K"]:
  """Of the next token being any spelling of each label."""
  p = jax.nn.softmax(logits.astype(jnp.float32))
  return p[..., ids].sum(-1)


def normal(text: str) -> str:
  """An answer without case, spaces and marks."""
  return re.sub(r"[^a-z0-9]", "", text.lower())


def two_order_accuracy(right: Bool[Array, "N 2"]) -> dict[str, float]:
  """Accuracy over both orders of options: strict, loose, and one by one.

  By guessing, strict is 0.25, as a model that always says the same letter has
  exactly one of two orders right, a strict score of 0.
  """
  right = np.asarray(right, bool)
  return {
    "strict": float(right.all(1).mean()),
    "any": float(right.any(1).mean()),
    "first": float(right[:, 0].mean()),
    "second": float(right[:, 1].mean()),
  }
