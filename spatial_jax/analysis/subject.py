# SPDX-License-Identifier: Apache-2.0
"""A trained model as something to experiment on.

Any system that reads rows of `world.dataset` and takes `edits` of its decoder:

  subject = Subject(config, model, mod, params)
  batch = subject.look(items)            # frames rendered, two orders per row
  p, slots = subject.ask(batch.inputs)   # p[i, order, word], slots [S B T D]
  p, _ = subject.ask(batch.inputs, edit)  # the same under an edit

Letters: B items (rows), T length, S slots, D width, M visual tokens of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.analysis import patching, rooms, steering, tokens
from spatial_jax.nn.edit import Edit, Edits, residuals
from spatial_jax.types import Array, Bool, Float, Int
from spatial_jax.world import dataset, observe

ORDERS = 2
# Ids of the images' tokens in world rows.
VISUAL = ("<|image_pad|>", "<|video_pad|>")


class Batch(NamedTuple):
  """Items and what the model gets of them."""

  items: list[rooms.Pair]
  rows: dict[str, np.ndarray]  # of the source, with scenes
  inputs: dict[str, Array]  # rendered, on the device
  label: Int[np.ndarray, " B"]  # of the true word


class Subject:
  """Compiles each program once; batches must have one size.

  Args:
    config: of the trained model; its data are rooms of the world.
    model, mod, params: as `system.build` and `evaluate.load` give them.
    rooms: how many rooms a split has.

  Raises:
    ValueError: the config isn't of a model that sees rooms as a grid of tokens.
  """

  def __init__(
    self, config: Any, model: Any, mod: Any, params: Any, rooms: int = 4096
  ):
    config = config.copy_and_resolve_references()
    world = config.data.get("world")
    if world is None or world.get("blind") or not config.data.get("render"):
      raise ValueError(
        "analysis needs a model that sees rooms of the world: a config with "
        "data.world and data.render, such as configs/demo.py without `blind`"
      )
    world.rooms, world.text_length = rooms, ORDERS * world.chunk
    self.config, self.model, self.mod, self.params = config, model, mod, params
    self.sources = {
      split: dataset.make(config, split) for split in dataset.SPLITS
    }
    source = self.sources["test"]
    if not source.has_grid:
      raise ValueError(
        "config.data.world.visual_tokens pools patches by where they are, so "
        "no token belongs to a place in a frame; analyse a row with a grid"
      )
    ids = source.prefix[0]
    visual = [source.tokenizer.token_id(name) for name in VISUAL]
    self.map = tokens.of_ids(ids, visual, source.grid)
    self.size = source.image_size
    self.token = self.size / source.grid[2]  # pixels of a token's side
    self.length = source.length
    letters = [source.tokenizer.token_id(letter) for letter in "AB"]
    # [order, word]: the letter that stands for the word.
    self.letters = np.array([letters, letters[::-1]])
    self._see = jax.jit(observe.make(config))
    self._found: dict[tuple, list] = {}  # rooms take time to make

  @property
  def slots(self) -> int:
    return self.model.llm["layers"] + 1

  def batches(
    self, split: str, axis: str, count: int, size: int
  ) -> Iterator[Batch]:
    """Pairs of a split's rooms, in batches of one size."""
    if count % size:
      raise ValueError(f"{count} pairs are no multiple of the batch, {size}")
    known = split, axis, count
    if known not in self._found:
      source = self.sources[split]
      self._found[known] = rooms.collect(source, axis, count)
    found = self._found[known]
    for first in range(0, count, size):
      yield self.look(found[first : first + size])

  def look(self, found: Sequence[tuple[Any, rooms.Pair]]) -> Batch:
    """Rows of (room, pair), rendered."""
    source = self.sources["test"]
    made = [rooms.row(source, room, pair) for room, pair in found]
    rows = {key: np.stack([row[key] for row in made]) for key in made[0]}
    items = [pair for _, pair in found]
    label = np.array([pair.label for pair in items])
    return Batch(items, rows, self.see(rows), label)

  def see(
    self, rows: dict[str, Array], told: dict[str, Array] | None = None
  ) -> dict[str, Array]:
    """What the model gets of rows; its camera is that of `told`, if given."""
    inputs = self._see(rows)
    if told is not None:
      for key in ("intrinsics", "world_from_camera"):
        if key in inputs:
          inputs[key] = told[key]
    return {k: v for k, v in inputs.items() if not k.startswith("dense/")}

  def mirrored(self, batch: Batch) -> dict[str, Array]:
    """The same questions about the frames in a mirror."""
    return self.see(rooms.mirrored(batch.rows), batch.inputs)

  def forward(self, params: Any, inputs: dict[str, Array], edits: Edits):
    """(p[B, order, word], out), to be part of a jitted program."""
    batch = dict(inputs)
    if edits is not None:
      batch["edits"] = {"llm": edits}
    logits, out = self.model.apply(
      {"params": params}, **self.mod.arguments(batch)
    )
    at = inputs["answer_at"][:, :ORDERS]
    picked = jnp.take_along_axis(logits, at[..., None], axis=1)
    p = jax.nn.softmax(picked.astype(jnp.float32))
    index = jnp.broadcast_to(
      jnp.asarray(self.letters)[None], (len(at), *self.letters.shape)
    )
    return jnp.take_along_axis(p, index, axis=2), out

  @functools.cached_property
  def _ask(self):
    def ask(params, inputs, edits):
      p, out = self.forward(params, inputs, edits)
      return p, residuals(out)

    return jax.jit(ask)

  @functools.cached_property
  def _embedded(self):
    # The decoder's blocks are dead code here.
    return jax.jit(lambda *args: self.forward(*args, None)[1]["llm/embedded"])

  @functools.cached_property
  def _sweep(self):
    def run(params, inputs, slots, mask, index, before):
      def words(edits):
        return self.forward(params, inputs, edits)[0]

      return patching.sweep(words, slots, mask, index, before)

    return jax.jit(run)

  @functools.cached_property
  def _steer(self):
    def run(params, inputs, kernel, alphas):
      mask = jnp.broadcast_to(self.image_mask, inputs["tokens"].shape)

      def words(alpha):
        edit = steering.amplify(mask, kernel, alpha)
        return self.forward(params, inputs, edit)[0]

      # Some at a time: all together would need gigabytes.
      return jax.lax.map(words, alphas, batch_size=4)

    return jax.jit(run)

  def nothing(self, inputs: dict[str, Array]) -> Edit:
    """An edit without effect: one program serves plain runs too."""
    rows, length = inputs["tokens"].shape
    values = jnp.zeros((rows, length, self.model.llm["width"]))
    return Edit(-1, jnp.zeros((rows, length), bool), replace=values)

  def ask(self, inputs: dict[str, Array], before: Edit | None = None):
    """Probabilities of the words [B order word], all slots [S B T D].

    Args:
      before: an edit that replaces tokens.
    """
    before = self.nothing(inputs) if before is None else before
    return self._ask(self.params, inputs, before)

  def embedded(self, inputs: dict[str, Array]) -> Float[Array, "B T D"]:
    """What the decoder's first block reads."""
    return self._embedded(self.params, inputs)

  def sweep(
    self,
    inputs: dict[str, Array],
    slots: Float[Array, "S B T D"],
    where: patching.Where,
    before: Edit | None = None,
  ) -> Float[np.ndarray, "S B order word"]:
    """Words with a patch from another run's slots, at each slot in turn."""
    before = self.nothing(inputs) if before is None else before
    run = self._sweep(self.params, inputs, slots, *where, (before,))
    return np.asarray(run)

  def steer(
    self,
    inputs: dict[str, Array],
    kernel: Float[Array, "D C"],
    alphas: Sequence[float],
  ) -> Float[np.ndarray, "A B order word"]:
    """Words with all visual tokens steered, at all alphas in one program."""
    alphas = jnp.asarray(alphas, jnp.float32)
    return np.asarray(self._steer(self.params, inputs, kernel, alphas))

  # --- which tokens --------------------------------------------------------

  def object_tokens(self, pair: rooms.Pair, which: int) -> Int[Array, " n"]:
    """Flat grid indices of a thing's box in the asked frame."""
    box = tuple(pair.boxes[which].tolist())
    return self.map.box(box, (self.size, self.size), pair.frame)

  def object_mask(self, items: Sequence[rooms.Pair]) -> Bool[Array, "B 2 M"]:
    """True at the visual tokens of each thing."""
    mask = np.zeros((len(items), 2, self.map.positions.size), bool)
    for i, pair in enumerate(items):
      for which in (0, 1):
        mask[i, which, self.object_tokens(pair, which)] = True
    return mask

  def frame_tokens(self, pair: rooms.Pair) -> Int[Array, " n"]:
    _, height, width = self.map.grid
    return self.map.flat(pair.frame, range(height), range(width))

  @property
  def image_mask(self) -> Bool[Array, "1 T"]:
    """True at all visual tokens of a row."""
    every = np.arange(self.map.positions.size)
    return self.map.mask(every, self.length)[None]


def right(
  p: Float[Array, "*n order word"], label: Int[Array, " B"]
) -> Bool[np.ndarray, "*n order"]:
  """Whether the likelier word is the true one, in each order of options."""
  said = np.asarray(p).argmax(-1)
  return said == np.asarray(label)[:, None]
