# SPDX-License-Identifier: Apache-2.0
"""Tokenizer, chat templates, label masks, padding buckets and packing.

numpy and `tokenizers` only: data workers call this.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers

WORLD_TOKENIZER = pathlib.Path(__file__).with_name("world_tokenizer")
Message = dict[str, object]


class Tokenizer:
  """A Hugging Face `tokenizer.json` with the chat template beside it.

  Attributes:
    vocab_size: number of ids, added tokens included.
    pad_id, end_id: ids of `<|endoftext|>` and `<|im_end|>` (or the names that
      the folder's `tokenizer_config.json` gives as pad and eos token).
  """

  def __init__(
    self, backend: tokenizers.Tokenizer, template: str, config: dict
  ):
    self.backend = backend
    self.template = template
    self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
    names = {
      key: value["content"] if isinstance(value, dict) else value
      for key, value in config.items()
      if key.endswith("_token") and value
    }
    self.pad_id = self.token_id(names.get("pad_token", "<|endoftext|>"))
    self.end_id = self.token_id(names.get("eos_token", "<|im_end|>"))

  @classmethod
  def load(cls, path: str | pathlib.Path | None = None) -> Tokenizer:
    """Reads a folder or a `tokenizer.json`; None is the world's own.

    Raises:
      ValueError: no readable tokenizer there.
    """
    path = WORLD_TOKENIZER if path is None else pathlib.Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists():
      raise ValueError(
        f"tokenizer {str(path)!r}: expected a tokenizer.json or a folder "
        "holding one, found neither; give the folder of the checkpoint"
      )
    try:
      backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises bare Exception
      raise ValueError(
        f"tokenizer {str(file)!r} can't be read ({error}); expected the "
        "tokenizer.json that the tokenizers library writes"
      ) from error
    config = {}
    beside = file.with_name("tokenizer_config.json")
    if beside.exists():
      config = json.loads(beside.read_text())
    template = config.get("chat_template", "")
    if not isinstance(template, str):  # several named templates
      template = {t["name"]: t["template"] for t in template}["default"]
    for name in ("chat_template.jinja", "chat_template.json"):
      extra = file.with_name(name)
      if extra.exists():
        template = extra.read_text()
        if name.endswith("json"):
          template = json.loads(template)["chat_template"]
    return cls(backend, template, config)

  def encode(self, text: str) -> list[int]:
    return self.backend.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable, skip_special: bool = True) -> str:
    ids = [int(i) for i in ids]
    return self.backend.decode(ids, skip_special_tokens=skip_special)

  def token_id(self, token: str) -> int:
    index = self.backend.token_to_id(token)
    if index is None:
      raise ValueError(
        f"token {token!r} is not in the tokenizer's vocabulary of "
        f"{self.vocab_size}; is it the tokenizer of this model?"
      )
    return index

  def chat(self, messages: Sequence[Message], generation: bool = False) -> str:
    """Messages (role, content) as the template's text."""
    if not self.template:
      raise ValueError(
        "the tokenizer has no chat template: expected `chat_template` in "
        "tokenizer_config.json, or chat_template.jinja, beside tokenizer.json"
      )
    return _compiled(self.template).render(
      messages=list(messages), add_generation_prompt=generation
    )

  def chat_ids(
    self, messages: Sequence[Message]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Tokens i32[T] and a mask that is True on what the assistant said.

    The end-of-turn token and what the template puts after it are part of what
    the assistant said; the turn's header is not.

    Raises:
      ValueError: the template rewrites earlier turns when one is added.
    """
    ids: list[int] = []
    said: list[bool] = []
    done = ""
    for turn, message in enumerate(messages):
      if message["role"] != "assistant":
        continue
      prompt = self.chat(messages[:turn], generation=True)
      full = self.chat(messages[: turn + 1])
      if not (prompt.startswith(done) and full.startswith(prompt)):
        raise ValueError(
          f"turn {turn}: the chat template changes earlier text when a turn is "
          "added, so answers can't be told from prompts; use a template that "
          "only appends"
        )
      for piece, flag in ((prompt[len(done) :], 0), (full[len(prompt) :], 1)):
        new = self.encode(piece)
        ids += new
        said += [bool(flag)] * len(new)
      done = full
    return np.array(ids, np.int32), np.array(said, bool)


@functools.lru_cache(maxsize=8)
def _compiled(template: str):
  from jinja2.sandbox import ImmutableSandboxedEnvironment

  env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

  def raise_exception(message):
    raise ValueError(f"chat template: {message}")

  env.globals["raise_exception"] = raise_exception
  return env.from_string(template)


def expand(text: str, token: str, numbers: Sequence[int]) -> str:
  """Repeats the k-th occurrence of a placeholder `numbers[k]` times."""
  parts = text.split(token)
  if len(parts) != len(numbers) + 1:
    raise ValueError(
      f"the text has {len(parts) - 1} {token!r} placeholders for "
      f"{len(numbers)} images or videos; write one placeholder for each"
    )
  out = [parts[0]]
  for number, part in zip(numbers, parts[1:], strict=True):
    out += [token * number, part]
  return "".join(out)


def next_token(
  ids: np.ndarray, said: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Labels and loss weights: position t predicts token t+1 where it was said.

  ids      [ 7  8  9  4  2 ]        said   [ 0  0  0  1  1 ]
  labels   [ 8  9  4  2  0 ]        weight [ 0  0  1  1  0 ]
  """
  labels = np.append(ids[1:], 0).astype(np.int32)
  weight = np.append(said[1:], False).astype(np.float32)
  return labels, weight * (labels >= 0)


def bucket(length: int, buckets: Sequence[int], what: str = "row") -> int:
  """Smallest bucket that holds `length` tokens."""
  for size in sorted(buckets):
    if length <= size:
      return size
  raise ValueError(
    f"{what} has {length} tokens, longer than the longest bucket "
    f"{max(buckets)} of {sorted(buckets)}; shorten it or add a bucket"
  )


def pad(array: np.ndarray, length: int, value=0, axis: int = -1) -> np.ndarray:
  """Pads one axis at its end; refuses to cut."""
  missing = length - array.shape[axis]
  if missing < 0:
    raise ValueError(
      f"axis {axis} of shape {array.shape} is longer than {length}; use a "
      "longer bucket"
    )
  widths = [(0, 0)] * array.ndim
  widths[axis] = (0, missing)
  return np.pad(array, widths, constant_values=value)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
  """First-fit packing in the given order: indices of the items of each row."""
  rows: list[list[int]] = []
  room: list[int] = []
  for index, length in enumerate(lengths):
    bucket(length, [capacity], f"item {index}")
    for row, left in enumerate(room):
      if length <= left:
        rows[row].append(index)
        room[row] -= length
        break
    else:
      rows.append([index])
      room.append(capacity - length)
  return rows
