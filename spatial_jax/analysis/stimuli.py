# SPDX-License-Identifier: Apache-2.0
"""The drawn stimuli of arXiv 2603.22278: squares, shapes and grids of them.

Pixels equal those of the authors' Pillow drawings. An item is a picture of
three entities and a question about a neighbour of the middle one:

    for item in stimuli.squares(LAYOUTS["qwen2vl"]):
      item.image, item.prompt, item.answer

numpy and Pillow only.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw

from spatial_jax.analysis.layouts import Layout
from spatial_jax.types import UInt8

COLORS = {
  "Red": (255, 0, 0),
  "Green": (0, 255, 0),
  "Blue": (0, 0, 255),
  "Black": (0, 0, 0),
  "Brown": (150, 75, 0),
  "Gray": (128, 128, 128),
  "Orange": (255, 165, 0),  # Pixtral's, in place of brown
}
SIX = ("Red", "Green", "Blue", "Black", "Brown", "Gray")
SHAPES = ("Square", "Circle", "Triangle", "Star", "Cross", "Heart")
# direction -> where the answer stands
ANSWERS = {
  "left": ("left", "to the left of"),
  "right": ("right", "to the right of"),
  "above": ("top", "above"),
  "below": ("bottom", "below"),
}
INNER = 0.381966  # radius of a star's dents
Entity = tuple[str, str]  # shape, colour


@dataclasses.dataclass(frozen=True)
class Item:
  """A drawing, its question and the entities from first to last."""

  image: UInt8[np.ndarray, "y x 3"]
  prompt: str
  answer: str
  entities: tuple[Entity, Entity, Entity]
  direction: str  # of ANSWERS


def outline(shape: str, size: int) -> list[tuple[float, float]]:
  """Corners of a triangle, star or heart in a square of so many pixels."""
  last = size - 1
  if shape == "Triangle":
    height = size * math.sqrt(3) / 2
    return [(size / 2, 0), (0, height), (last, height)]
  if shape == "Star":
    turns = [i * math.pi / 5 - math.pi / 2 for i in range(10)]
    radii = [1.0 if i % 2 == 0 else INNER for i in range(10)]
    unit = [
      (r * math.cos(a), r * math.sin(a))
      for r, a in zip(radii, turns, strict=True)
    ]
    stretch = 1.0 / max(abs(x) for x, _ in unit)  # as wide as the square
    half = last / 2
    return [(half + x * half * stretch, half + y * half) for x, y in unit]
  turns = [2 * math.pi * i / 100 for i in range(100)]
  x = [16 * math.sin(t) ** 3 for t in turns]
  y = [
    13 * math.cos(t)
    - 5 * math.cos(2 * t)
    - 2 * math.cos(3 * t)
    - math.cos(4 * t)
    for t in turns
  ]
  wide, high = max(x) - min(x), max(y) - min(y)
  return [
    ((a - min(x)) / wide * last, (1 - (b - min(y)) / high) * last)
    for a, b in zip(x, y, strict=True)
  ]


def draw(pen: ImageDraw.ImageDraw, shape: str, size: int, color) -> None:
  """A shape into the square of so many pixels at the origin."""
  if shape in ("Square", "Circle"):
    side = (0.8 if shape == "Square" else 0.9) * size
    low = (size - side) / 2
    box = [low, low, low + side - 1, low + side - 1]
    (pen.rectangle if shape == "Square" else pen.ellipse)(box, fill=color)
  elif shape == "Cross":
    width = size // 3
    low = (size - width) / 2
    high = low + width - 1
    pen.rectangle([low, 0, high, size - 1], fill=color)
    pen.rectangle([0, low, size - 1, high], fill=color)
  else:
    pen.polygon(outline(shape, size), fill=color)


def render(
  layout: Layout,
  places: Sequence[tuple[int, int]],
  entities: Sequence[Entity | None],
) -> UInt8[np.ndarray, "y x 3"]:
  """A white canvas with entities at (row, column) tokens; None draws nothing.

  The shape "" is a square as large as the entity, in "the squares setting".
  """
  side = layout.tokens * layout.pixels
  canvas = Image.new("RGB", (side, side), (255, 255, 255))
  size = layout.entity * layout.pixels
  for (row, column), entity in zip(places, entities, strict=True):
    if entity is None:
      continue
    shape, color = entity[0], COLORS[entity[1]]
    sprite = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    pen = ImageDraw.Draw(sprite)
    if shape:
      draw(pen, shape, size, color)
    else:
      pen.rectangle([0, 0, size, size], fill=color)
    at = (column * layout.pixels, row * layout.pixels)
    canvas.paste(sprite, at, mask=sprite.getchannel("A"))
  return np.asarray(canvas)


def three(
  layout: Layout, entities: Sequence[Entity | None], horizontal: bool
) -> UInt8[np.ndarray, "y x 3"]:
  """Three entities in a centred row or column."""
  return render(layout, layout.corners(horizontal), entities)


def alone(layout: Layout, entity: Entity) -> UInt8[np.ndarray, "y x 3"]:
  """An entity in the middle and nothing else, for the ordering ablation."""
  return three(layout, (None, entity, None), True)


def empty(layout: Layout) -> UInt8[np.ndarray, "y x 3"]:
  """The canvas without entities."""
  return three(layout, (None,) * 3, True)


def grid(
  layout: Layout, entities: Sequence[Sequence[Entity | None]]
) -> UInt8[np.ndarray, "y x 3"]:
  """Rows of entities, as many as columns, spread evenly and centred."""
  count = len(entities)
  size = count * layout.entity + (count - 1) * layout.gap
  first = (layout.tokens - size) // 2
  if first < 0:
    raise ValueError(
      f"{count} entities of {layout.entity} tokens with gaps of {layout.gap} "
      f"are wider than the canvas of {layout.tokens} tokens"
    )
  steps = [first + i * (layout.entity + layout.gap) for i in range(count)]
  places = list(itertools.product(steps, steps))
  return render(layout, places, list(itertools.chain.from_iterable(entities)))


def item(
  layout: Layout, entities: Sequence[Entity], direction: str, noun: str
) -> Item:
  """Drawing and cloze about the neighbour of the middle entity."""
  place, words = ANSWERS[direction]
  image = three(layout, entities, direction in ("left", "right"))
  shape, color = entities[1]
  middle = f"{color.lower()} {shape.lower() or 'square'}"
  prompt = f"The color of the {noun} {words} the {middle} is "
  answer = entities[0 if place in ("left", "top") else 2][1]
  return Item(image, prompt, answer.lower(), tuple(entities), direction)


def squares(layout: Layout, colors: Sequence[str] = SIX) -> Iterator[Item]:
  """All ordered triples of colours x 4 directions: 480 for six colours."""
  for triple in itertools.permutations(colors, 3):
    for direction in ANSWERS:
      entities = [("", color) for color in triple]
      yield item(layout, entities, direction, "square")


def shapes(layout: Layout, colors: Sequence[str] = SIX) -> Iterator[Item]:
  """As `squares`; each colour has its own shape."""
  shape = dict(zip(colors, SHAPES, strict=True))
  for triple in itertools.permutations(colors, 3):
    for direction in ANSWERS:
      entities = [(shape[color], color) for color in triple]
      yield item(layout, entities, direction, "shape")
