# SPDX-License-Identifier: Apache-2.0
"""Conversations for Cambrian-1: prompts, labels, and the slots of an image.

Paper: https://arxiv.org/abs/2406.16860. A line of a JSONL file (see
`data.sources`) -> the template's text -> tokens with IMAGE where the image is
-> its L * (L + 1) slots, of which those in the padding of a non-square image
are masked -> a row of the batch. `data.images.cambrian` prepares the pixels.

Departures from the published code:
1. A conversation without an answer, or with an image that can't be read, is an
   error; there, the first line of the file takes its place.
2. What the assistant said is found by characters, not by tokenising turns one
   by one and counting, which drops the whole sample when the counts differ.

numpy and Pillow only: data workers call this.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spatial_jax.data import images, sources, text
from spatial_jax.types import Array, Int

IMAGE = -200  # stands for an image among tokens
IGNORE = -100  # label of what isn't learnt
PLACEHOLDER = sources.PLACEHOLDER
Row = dict[str, np.ndarray]
Turns = Sequence[Sequence[str | None]]  # (question, answer) each

_INTRODUCTION = (
  "You are Cambrian, a highly intelligent multimodal AI trained by NYU Vision X"
)
_IMAGES = (
  "As a multimodal AI, you have the ability to process and analyze images. "
  "Whenever an image is present in the conversation, very carefully examine it "
  "and consider its content when formulating your response."
)
_LENGTH = (
  "You should give concise responses to very simple questions, but provide "
  "thorough responses to more complex and open-ended questions."
)


@dataclasses.dataclass(frozen=True)
class Template:
  """Text around what is said."""

  start: str
  user: tuple[str, str]  # before and after
  assistant: str  # what announces an answer
  answer: tuple[str, str]  # before and after; learnt together with the answer
  between: str = ""  # turns
  tail: bool = False  # announces an answer even after the last one
  bos: str = ""  # token in front, where the text itself has none


TEMPLATES = {
  # Cambrian-8B. The blanks are those of a text with indented lines.
  "llama_3": Template(
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>"
    f"{_INTRODUCTION}. \n    {_IMAGES}\n    {_LENGTH} <|eot_id|>",
    ("<|start_header_id|>user<|end_header_id|>", "<|eot_id|>"),
    "<|start_header_id|>assistant<|end_header_id|>",
    ("", "<|eot_id|>"),
    tail=True,
  ),
  # Cambrian-13B
  "vicuna_v1": Template(
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's "
    "questions. ",
    ("USER: ", " "),
    "ASSISTANT:",
    (" ", "</s>"),
    bos="<s>",
  ),
  # Cambrian-34B
  "chatml_direct": Template(
    f"<|im_start|>system\n{_INTRODUCTION}. {_IMAGES} {_LENGTH}<|im_end|>",
    ("<|im_start|>user\n", "<|im_end|>"),
    "<|im_start|>assistant\n",
    ("", "<|im_end|>"),
  ),
  "phi3": Template(
    "<|system|>\nYou are a helpful AI assistant.<|end|>\n",
    ("<|user|>\n", "<|end|>\n"),
    "<|assistant|>\n",
    ("", "<|end|>"),
    between="\n",
  ),
}


def pieces(turns: Turns, template: str) -> list[tuple[str, bool]]:
  """Texts that follow each other, and whether they are to be learnt.

  Args:
    turns: (question, answer); no answer asks for one.
    template: a name in `TEMPLATES`.
  """
  if template not in TEMPLATES:
    raise ValueError(
      f"template {template!r} is unknown; use one of {', '.join(TEMPLATES)}"
    )
  t = TEMPLATES[template]
  out = [(t.start, False)]
  for number, (question, answer) in enumerate(turns):
    before = (t.between if number else "") + t.user[0]
    out.append((f"{before}{question}{t.user[1]}{t.assistant}", False))
    if answer is not None:
      out.append((f"{t.answer[0]}{answer}{t.answer[1]}", True))
  if t.tail and out[-1][1]:
    out.append((t.assistant, False))
  return out


def prompt(turns: Turns, template: str) -> str:
  """The template's text of a conversation."""
  return "".join(piece for piece, _ in pieces(turns, template))


def tokenize(
  parts: Sequence[tuple[str, bool]],
  tokenizer: text.Tokenizer,
  bos: str = "",
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens i32[T] and labels i32[T] of `pieces`; IMAGE for each placeholder.

  The text on both sides of a placeholder is tokenised on its own.
  """
  whole = "".join(piece for piece, _ in parts)
  learnt = np.repeat([flag for _, flag in parts], [len(p) for p, _ in parts])
  ids = [tokenizer.token_id(bos)] if bos else []
  said, at = [False] * len(ids), 0
  for number, chunk in enumerate(whole.split(PLACEHOLDER)):
    if number:
      ids.append(IMAGE)
      said.append(False)
      at += len(PLACEHOLDER)
    found = tokenizer.backend.encode(chunk, add_special_tokens=False)
    ids += found.ids
    # A token belongs to the text that its last character is in.
    said += [
      end > begin and bool(learnt[at + end - 1]) for begin, end in found.offsets
    ]
    at += len(chunk)
  ids, said = np.array(ids, np.int32), np.array(said, bool)
  return ids, np.where(said, ids, IGNORE)


def to_turns(messages: Sequence[Mapping[str, str]]) -> list[tuple[str, Any]]:
  """(question, answer) pairs; the image comes first in the first question."""
  spoken = [m for m in messages if m["role"] != "system"]
  roles = [m["role"] for m in spoken]
  expected = ["user", "assistant"] * ((len(roles) + 1) // 2)
  if not roles or roles != expected[: len(roles)]:
    raise ValueError(
      f"turns are by {roles}; expected user and assistant by turns, user first"
    )
  has_image = any(PLACEHOLDER in m["content"] for m in spoken)
  said = [m["content"].replace(PLACEHOLDER, "").strip() for m in spoken]
  if has_image:
    said[0] = f"{PLACEHOLDER}\n{said[0]}".strip()
  return list(zip(said[::2], [*said[1::2], None], strict=False))


def padding(size: Sequence[int], side: int) -> tuple[int, int]:
  """Rows and columns at each end of a side x side grid that are padding.

  Args:
    size: (width, height) of the image before it was padded to a square.
  """
  width, height = (int(x) for x in size)
  if width > height:
    return (side - int(height * (side / width))) // 2, 0
  return 0, (side - int(width * (side / height))) // 2


def expand(
  ids: Int[Array, " t"],
  labels: Int[Array, " t"],
  size: Sequence[int],
  *,
  length: int,
  side: int,
  image_position: int,
  pad_id: int = 0,
) -> Row:
  """A sample with its image's slots, as the published collator makes it.

  Masked slots repeat the position before them. A sample without an image gets
  one that is masked as a whole, at `image_position`.

  Args:
    ids: tokens with one IMAGE, or none.
    size: (width, height) of the image.
    side: L; an image has L rows of L + 1 slots.

  Returns:
    input_ids (the first slot is IMAGE, the others 0), labels, position_ids
    i32[length] and attention_mask bool[length].
  """
  valid = np.arange(length) < len(ids)
  ids, labels = (
    text.pad(np.asarray(x[:length], np.int32), length, value)
    for x, value in ((ids, pad_id), (labels, IGNORE))
  )
  slots = np.ones((side, side + 1), bool)
  if has_image := IMAGE in ids:
    at = int(np.argmax(ids == IMAGE))
    rows, columns = padding(size, side)
    slots[:rows] = slots[side - rows : side] = False
    slots[:, :columns] = slots[:, side - columns : side] = False
    after = at + 1
  else:
    at = after = image_position
    slots[:] = False
  slots = slots.reshape(-1)
  block = np.zeros(len(slots), np.int32)
  places = at - 1 + np.cumsum(slots) if has_image else block
  follows = at + np.count_nonzero(slots) + np.arange(length - after)

  def join(x, block, rest=None):
    rest = x[after:] if rest is None else rest
    return np.concatenate([x[:at], block, rest])[:length]

  return {
    "input_ids": join(ids, np.where(np.arange(len(block)) == 0, IMAGE, block)),
    "labels": join(labels, block + IGNORE),
    "position_ids": join(np.arange(length), places, follows).astype(np.int32),
    "attention_mask": join(valid, slots),
  }


def to_batch(sample: Mapping[str, np.ndarray], side: int) -> Row:
  """`expand`'s arrays, of one sample or of many, as the batch's.

  All slots of an image hold IMAGE. Valid tokens are keys that everybody sees:
  so a masked slot in front of the text can predict its first token.
  """
  ids, labels = sample["input_ids"], np.asarray(sample["labels"], np.int32)
  valid = np.asarray(sample["attention_mask"], bool)
  is_image = ids == IMAGE
  start = np.argmax(is_image, axis=-1)[..., None]
  index = np.arange(ids.shape[-1])
  inside = (index >= start) & (index < start + side * (side + 1))
  inside &= is_image.any(axis=-1, keepdims=True)
  labels = np.roll(labels, -1, axis=-1)
  labels[..., -1] = IGNORE
  positions = np.asarray(sample["position_ids"], np.int32)
  return {
    "tokens": np.where(inside, IMAGE, ids).astype(np.int32),
    "positions": np.stack([positions] * 3, axis=-2),
    "segments": valid.astype(np.int32),
    "shared": valid,
    "labels": np.where(labels == IGNORE, 0, labels),
    "loss_weight": (labels != IGNORE).astype(np.float32),
  }


class Dialogues:
  """Random-access source of rows with one image or none (see `make`)."""

  def __init__(
    self,
    file: str,
    *,
    images: str = "",
    tokenizer: str = "",
    template: str,
    length: int,
    side: int,
    towers: Sequence[tuple[str, int, int]],
    image_position: int,
  ):
    self._file = pathlib.Path(file)
    self._images = pathlib.Path(images) if images else self._file.parent
    self.tokenizer = text.Tokenizer.load(tokenizer or None)
    self._template, self._towers = template, tuple(towers)
    self._side = side
    self._options = {
      "length": length,
      "side": side,
      "image_position": image_position,
      "pad_id": self.tokenizer.pad_id,
    }
    self._starts = sources.line_starts(self._file)

  def __len__(self) -> int:
    return len(self._starts)

  def __getitem__(self, index: int) -> Row:
    number, start = self._starts[index]
    with self._file.open("rb") as handle:
      handle.seek(start)
      line = handle.readline()
    try:
      return self._row(line)
    except (ValueError, OSError) as error:
      raise ValueError(f"{self._file}, line {number}: {error}") from error

  def _row(self, line: bytes) -> Row:
    names, messages = sources.parse(line)
    turns = to_turns(messages)
    if len(names) != turns[0][0].count(PLACEHOLDER):
      raise ValueError(
        f"{len(names)} image(s), but {PLACEHOLDER} says otherwise; a "
        "conversation has one image and one placeholder, or none"
      )
    bos = TEMPLATES[self._template].bos
    parts = pieces(turns, self._template)
    ids, labels = tokenize(parts, self.tokenizer, bos)
    image = sources.read_image(self._images / names[0]) if names else None
    size = image.size if names else (1, 1)
    row = to_batch(expand(ids, labels, size, **self._options), self._side)
    if not row["loss_weight"].any():
      raise ValueError(
        "no answer is left to learn; give one, or make config.data.length "
        f"longer than {self._options['length']}"
      )
    for name, pixels, _ in self._towers:
      row[f"pixels/{name}"] = _pixels(image, name, pixels)[None]
    cells = [padding(size, cells) for *_, cells in self._towers]
    return row | {"padding": np.array([cells], np.int32)}


def _pixels(image, name, side):
  if image is None:
    return np.zeros((side, side, 3), np.float32)
  return images.cambrian(image, name, side)


def make(config: Any, split: str) -> Dialogues:
  """Source of config.data: `files` by split, the rest are the arguments.

  `dialogues.towers` has (name, pixels, cells) of each tower, in the model's
  order: the side of its images, and of the grid that the aggregator sees.
  """
  data = config.data
  return Dialogues(
    sources.file_of(data, split),
    length=data.length,
    **data.dialogues.to_dict(),
  )
