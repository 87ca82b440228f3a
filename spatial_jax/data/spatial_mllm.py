# SPDX-License-Identifier: Apache-2.0
"""Spatial-MLLM's text: prompts of both generations, dialogues. numpy only.

<|im_start|>system ... <|im_start|>user
<|vision_start|><|video_pad|>...<|vision_end|>QUESTION<|im_end|>
<|im_start|>assistant
ANSWER<|im_end|>

What precedes the question is the same for all questions about a video, so that
they can share it. v1.1 answers in a word or a letter, v1.0 between `<answer>`
and `</answer>`; `evaluators.qa.clean_text` reads both, `qa.first_word` is how
the benchmark itself reads the former.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spatial_jax.data import text

SYSTEM = "You are a helpful assistant."
PLACEHOLDERS = {"<video>": "<|video_pad|>", "<image>": "<|image_pad|>"}
GENERATIONS = ("v1_0", "v1_1")
_USER = "<|im_start|>user\n"
_ASSISTANT = "<|im_start|>assistant\n"
_END = "<|im_end|>\n"


def vsi_question(
  question: str, options: Sequence[str] = (), generation: str = "v1_1"
) -> str:
  """A question of VSI-Bench as the published models are asked.

  Args:
    options: with their letters, "A. left"; none where a number is asked.
  """
  if generation not in GENERATIONS:
    raise ValueError(
      f"generation={generation!r} is unknown; use one of {GENERATIONS}"
    )
  if generation == "v1_1" and options:
    return (
      "\n".join([question, "Options:", *options])
      + "\nAnswer with the option's letter from the given choices directly."
    )
  if generation == "v1_1":
    return (
      f"{question}\nPlease answer the question using a single word or phrase."
    )
  tags = "within the <answer> </answer> tags."
  if options:
    listed = "".join(f"{option}\n" for option in options)
    return (
      f"{question}Options:\n{listed} Please answer with the option's letter "
      f"from the given choices (e.g., A, B, etc.) {tags}"
    )
  return (
    f"{question} Please answer with the only numerical value (e.g., 42, 3.14, "
    f"etc.) {tags}"
  )


def split(question: str) -> tuple[str, str]:
  """First question up to its last placeholder, and what follows.

  "<video>\\nHow many?" -> ("<video>", "\\nHow many?").
  """
  ends = [question.rfind(p) + len(p) for p in PLACEHOLDERS if p in question]
  at = max(ends, default=0)
  return question[:at], question[at:]


def opening(head: str, counts: Sequence[int]) -> str:
  """System turn and the first question's head.

  Args:
    head: with one placeholder for each video or image.
    counts: visual tokens of each.
  """
  kinds = [p for p in PLACEHOLDERS if p in head]
  if len(kinds) > 1 or (counts and not kinds):
    raise ValueError(
      f"the question begins {head[:60]!r}; expected one placeholder "
      f"({' or '.join(PLACEHOLDERS)}) for each of {len(counts)} video or images"
    )
  for kind in kinds:
    pad = PLACEHOLDERS[kind]
    head = head.replace(kind, f"<|vision_start|>{pad}<|vision_end|>")
    head = text.expand(head, pad, counts)
  return f"<|im_start|>system\n{SYSTEM}{_END}{_USER}{head}"


def prompt(question: str, visual_tokens: int = 0) -> str:
  """One question about a video, to be answered; the video comes first."""
  head = opening("", [])
  if visual_tokens:
    head = opening("<video>", [visual_tokens])
  return f"{head}{question}{_END}{_ASSISTANT}"


def dialogue(
  tokenizer: text.Tokenizer, turns: Sequence[tuple[str, str]]
) -> tuple[np.ndarray, np.ndarray]:
  """Ids i32[T] behind the opening, and what the assistant says of them.

  Args:
    turns: (question, answer), the first question without its head.
  """
  header = len(tokenizer.encode(_ASSISTANT))
  ids: list[int] = []
  said: list[bool] = []
  for number, (question, answer) in enumerate(turns):
    asked = tokenizer.encode(f"{_USER * bool(number)}{question}{_END}")
    told = tokenizer.encode(f"{_ASSISTANT}{answer}{_END}")
    ids += asked + told
    said += [False] * (len(asked) + header)
    said += [True] * (len(told) - header)
  return np.array(ids, np.int32), np.array(said, bool)
