# SPDX-License-Identifier: Apache-2.0
"""The world's tokenizer: phrases of the questions as atoms, bytes for the rest.

A model of a few million parameters should spend its capacity on space, not on
spelling, so every fixed phrase of a question template, every category, every
lettered direction and every number an answer can take is one token. Any other
text falls back to byte-level pieces. Rebuild the shipped file after a change
of the templates with `python -m spatial_jax.world.vocabulary`.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import tokenizers

from spatial_jax.data import text
from spatial_jax.world import questions
from spatial_jax.world import scene as scene_lib

SPECIAL = (
  "<|endoftext|>",
  "<|im_start|>",
  "<|im_end|>",
  "<|vision_start|>",
  "<|vision_end|>",
  "<|image_pad|>",
  "<|video_pad|>",
)
# One user turn and one answer: the turn marker stands before the answer only.
TEMPLATE = (
  "{% for m in messages %}"
  "{% if m.role == 'assistant' %}<|im_start|>{{ m.content }}<|im_end|>"
  "{% else %}{{ m.content }}{% endif %}"
  "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
COUNTS = tuple(str(i) for i in range(100))
DISTANCES = tuple(f"{i / 10:.1f}" for i in range(1, 110))
SIZES = tuple(str(i) for i in range(10, 310, 10))
PHRASES = (
  questions.PREAMBLE,
  questions.ASK_NUMBER,
  questions.ASK_LETTER,
  "\nOptions:",
  "?\nOptions:",
  ", ",
  "How many ",
  "(s) are in this room?",
  "Measuring from the closest point of each object, what is the distance "
  "between the ",
  " and the ",
  " (in meters)?",
  "What is the length of the longest dimension (length, width, or height) of "
  "the ",
  ", measured in centimeters?",
  "What is the size of this room (in square meters)? If multiple rooms are "
  "shown, estimate the size of the combined space.",
  "Measuring from the closest point of each object, which of these objects (",
  ") is the closest to the ",
  "If I am standing by the ",
  " and facing the ",
  ", is the ",
  " to the left or the right of the ",
  " to my left, right, or back?\nAn object is to my back if I would have to "
  "turn at least 135 degrees in order to face it.",
  " to my front-left, front-right, back-left, or back-right?\nThe directions "
  "refer to the quadrants of a Cartesian plane (if I am standing at the origin "
  "and facing along the positive y-axis).",
  "You are a robot beginning at the ",
  " facing the ",
  ". You want to navigate to the ",
  ". You will perform the following actions (Note: for each [please fill in], "
  "choose either 'turn back,' 'turn left,' or 'turn right.'): 1. Go forward "
  "until the ",
  *(
    f" {i}. [please fill in] {i + 1}. Go forward until the " for i in (2, 4, 6)
  ),
  ". You have reached the final destination.",
  "What will be the first-time appearance order of the following categories in "
  "the video: ",
  "In frame ",
  "Seen from the camera of frame ",
  " in front of or behind the ",
  ", which is nearer to the camera, the ",
  " or the ",
  ", what is the depth of the point at pixel (",
  ") (in meters)?",
)
LETTERED = (
  "left",
  "right",
  "back",
  "front-left",
  "front-right",
  "back-left",
  "back-right",
  "Turn Left",
  "Turn Right",
  "Turn Back",
  "in front",
  "behind",
)
# Categories that begin like one of these would be cut after it.
CLASHING = tuple(c for c in scene_lib.CATEGORIES if c.startswith(LETTERED))


def build() -> tokenizers.Tokenizer:
  """Byte-level alphabet plus the atoms above."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  model = tokenizers.models.BPE(
    vocab={c: i for i, c in enumerate(alphabet)}, merges=[]
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(list(SPECIAL))
  letters = questions.LETTERS[:4]
  atoms = [
    *scene_lib.CATEGORIES,
    *dict.fromkeys((*COUNTS, *DISTANCES, *SIZES)),
    *(f"\n{letter}. " for letter in letters),
    *(f"\n{letter}. {word}" for letter in letters for word in LETTERED),
    *(f"\n{letter}. {word}" for letter in letters for word in CLASHING),
    *PHRASES,
  ]
  # Letters A-D are answers; inside words they are bytes already.
  tokenizer.add_tokens(
    [tokenizers.AddedToken(a, normalized=False) for a in atoms]
  )
  return tokenizer


def numbers(tokenizer: text.Tokenizer) -> tuple[np.ndarray, np.ndarray]:
  """Ids and values of all tokens that spell one number, by rising value."""
  found = {
    float(n): tokenizer.token_id(n) for n in (*DISTANCES, *SIZES, *COUNTS)
  }
  values = np.array(sorted(found))
  return np.array([found[v] for v in values], np.int32), values


def answer_number(kind: str, value: float) -> str:
  """The world's number nearest to an exact answer of a question type."""
  if kind in ("object_abs_distance", "camera_depth"):
    return f"{min(max(value, 0.1), 10.9):.1f}"
  if kind == "object_size_estimation":
    return str(int(min(max(round(value / 10), 1), 30) * 10))
  return str(int(min(max(round(value), 0), 99)))


def main() -> None:
  folder = pathlib.Path(text.WORLD_TOKENIZER)
  folder.mkdir(exist_ok=True)
  build().save(str(folder / "tokenizer.json"))
  config = {
    "chat_template": TEMPLATE,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
  }
  (folder / "tokenizer_config.json").write_text(
    json.dumps(config, indent=1) + "\n"
  )


if __name__ == "__main__":
  main()
