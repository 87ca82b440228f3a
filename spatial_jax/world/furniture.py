# SPDX-License-Identifier: Apache-2.0
"""What each category of object looks like, in a unit box.

A model is a few boxes and round parts inside [-.5, .5] x [-.5, .5] x [0, 1], so
it can be stretched into any upright box: also into those of real rooms. The
front looks to -y, the back (a sofa's, a headboard) to +y. Every model touches
all six faces of its unit box: the box is the object's true extent.

Categories have a detailed model (at most `DETAILED` parts) and a plain one (at
most `PLAIN`) for small renderings. numpy only.
"""

from __future__ import annotations

import dataclasses

import numpy as np

BOX, CYLINDER, ELLIPSOID = 1, 2, 3
PLAIN, DETAILED = 4, 8

# Colours that stay what they are, whatever colour the object has.
MATERIALS = {
  "dark": (0.13, 0.13, 0.15),
  "white": (0.93, 0.93, 0.91),
  "steel": (0.62, 0.64, 0.67),
  "wood": (0.52, 0.36, 0.22),
  "soil": (0.25, 0.17, 0.11),
  "glass": (0.62, 0.80, 0.92),
  "light": (1.0, 0.95, 0.78),
  "screen": (0.16, 0.22, 0.34),
}


@dataclasses.dataclass(frozen=True)
class Part:
  """A primitive between `low` and `high`; `tint` scales the base colour."""

  shape: int
  low: tuple[float, float, float]
  high: tuple[float, float, float]
  tint: float = 1.0
  material: str = ""


def box(x0, x1, y0, y1, z0, z1, tint=1.0, material="") -> Part:
  return Part(BOX, (x0, y0, z0), (x1, y1, z1), tint, material)


def rod(x, y, radius, z0, z1, tint=1.0, material="", radius_y=None) -> Part:
  ry = radius if radius_y is None else radius_y
  low, high = (x - radius, y - ry, z0), (x + radius, y + ry, z1)
  return Part(CYLINDER, low, high, tint, material)


def ball(x0, x1, y0, y1, z0, z1, tint=1.0, material="") -> Part:
  return Part(ELLIPSOID, (x0, y0, z0), (x1, y1, z1), tint, material)


def legs(thick: float, top: float, tint=1.0, material="") -> tuple[Part, ...]:
  """Four square legs in the corners."""
  edges = ((-0.5, -0.5 + thick), (0.5 - thick, 0.5))
  return tuple(
    box(*x, *y, 0, top, tint, material) for x in edges for y in edges
  )


def panels(thick: float, top: float, inset: float, tint=1.0):
  """Two side panels in place of four legs."""
  y = (-0.5 + inset, 0.5 - inset)
  return (
    box(-0.5, -0.5 + thick, *y, 0, top, tint),
    box(0.5 - thick, 0.5, *y, 0, top, tint),
  )


@dataclasses.dataclass(frozen=True)
class Category:
  """A kind of object.

  Attributes:
    size: usual length (x), width (y), height (z) in metres.
    color: base colour.
    plain, detailed: models in the unit box.
    stacks: small enough to stand on a piece of furniture.
    supports: has a flat top that covers its footprint.
  """

  name: str
  size: tuple[float, float, float]
  color: tuple[float, float, float]
  plain: tuple[Part, ...]
  detailed: tuple[Part, ...]
  stacks: bool = False
  supports: bool = False


CHAIR = Category(
  "chair",
  (0.55, 0.55, 0.95),
  (0.85, 0.20, 0.18),
  plain=(
    box(-0.5, 0.5, -0.5, 0.5, 0.42, 0.5),
    box(-0.5, 0.5, 0.4, 0.5, 0.5, 1, 0.9),
    *panels(0.12, 0.42, 0.04, 0.6),
  ),
  detailed=(
    box(-0.5, 0.5, -0.5, 0.5, 0.43, 0.5),
    *legs(0.11, 0.43, 0.6),
    box(-0.42, 0.42, 0.4, 0.48, 0.62, 1, 0.9),
    box(-0.5, -0.39, 0.39, 0.5, 0.5, 1, 0.6),
    box(0.39, 0.5, 0.39, 0.5, 0.5, 1, 0.6),
  ),
)
TABLE = Category(
  "table",
  (1.3, 0.8, 0.75),
  (0.72, 0.47, 0.22),
  plain=(
    box(-0.5, 0.5, -0.5, 0.5, 0.92, 1),
    box(-0.44, -0.38, -0.42, 0.42, 0, 0.92, 0.7),
    box(0.38, 0.44, -0.42, 0.42, 0, 0.92, 0.7),
    box(-0.38, 0.38, -0.03, 0.03, 0.3, 0.4, 0.7),
  ),
  detailed=(
    box(-0.5, 0.5, -0.5, 0.5, 0.94, 1),
    *legs(0.07, 0.94, 0.75),
    box(-0.43, 0.43, -0.46, 0.46, 0.84, 0.94, 0.75),
  ),
  supports=True,
)
SOFA = Category(
  "sofa",
  (1.9, 0.9, 0.85),
  (0.16, 0.32, 0.75),
  plain=(
    box(-0.5, 0.5, -0.5, 0.5, 0, 0.5),
    box(-0.5, 0.5, 0.24, 0.5, 0.5, 1, 0.85),
    box(-0.5, -0.38, -0.5, 0.24, 0.5, 0.72, 0.75),
    box(0.38, 0.5, -0.5, 0.24, 0.5, 0.72, 0.75),
  ),
  detailed=(
    box(-0.5, 0.5, -0.48, 0.5, 0.08, 0.36, 0.8),
    box(-0.5, 0.5, 0.28, 0.5, 0.36, 1, 0.85),
    box(-0.5, -0.39, -0.48, 0.28, 0.36, 0.68, 0.75),
    box(0.39, 0.5, -0.48, 0.28, 0.36, 0.68, 0.75),
    box(-0.38, -0.01, -0.5, 0.28, 0.36, 0.53),
    box(0.01, 0.38, -0.5, 0.28, 0.36, 0.53),
    box(-0.47, 0.47, -0.45, 0.47, 0, 0.08, 1, "dark"),
    ball(-0.37, -0.17, 0.08, 0.28, 0.53, 0.9, 1.3),
  ),
)
BED = Category(
  "bed",
  (1.5, 2.0, 0.6),
  (0.90, 0.55, 0.75),
  plain=(
    box(-0.5, 0.5, -0.5, 0.46, 0, 0.62),
    box(-0.5, 0.5, 0.46, 0.5, 0, 1, 0.6),
    box(-0.4, 0.4, 0.22, 0.44, 0.62, 0.76, 1, "white"),
  ),
  detailed=(
    box(-0.5, 0.5, -0.48, 0.46, 0.12, 0.4, 1, "wood"),
    box(-0.5, 0.5, 0.46, 0.5, 0, 1, 1, "wood"),
    box(-0.48, 0.48, -0.47, 0.46, 0.4, 0.62, 1, "white"),
    box(-0.5, 0.5, -0.5, 0.12, 0.3, 0.66),
    box(-0.42, -0.04, 0.22, 0.43, 0.62, 0.78, 1, "white"),
    box(0.04, 0.42, 0.22, 0.43, 0.62, 0.78, 1, "white"),
    box(-0.48, -0.4, -0.47, -0.4, 0, 0.12, 1, "wood"),
    box(0.4, 0.48, -0.47, -0.4, 0, 0.12, 1, "wood"),
  ),
)
BOOKSHELF = Category(
  "bookshelf",
  (0.9, 0.35, 1.8),
  (0.45, 0.24, 0.10),
  plain=(
    box(-0.5, 0.5, 0.1, 0.5, 0, 1, 0.6),
    box(-0.5, 0.5, -0.5, 0.1, 0, 0.06),
    box(-0.5, 0.5, -0.5, 0.1, 0.5, 0.55),
    box(-0.5, 0.5, -0.5, 0.1, 0.94, 1),
  ),
  detailed=(
    box(-0.5, 0.5, 0.42, 0.5, 0, 1, 0.6),
    *panels(0.05, 1, 0, 0.9),
    box(-0.45, 0.45, -0.5, 0.42, 0, 0.06),
    box(-0.45, 0.45, -0.5, 0.42, 0.48, 0.52),
    box(-0.45, 0.45, -0.5, 0.42, 0.96, 1),
    box(-0.45, 0.15, -0.3, 0.42, 0.06, 0.36, 1, "steel"),
    box(-0.2, 0.45, -0.3, 0.42, 0.52, 0.84, 1, "light"),
  ),
)
LAMP = Category(
  "lamp",
  (0.4, 0.4, 1.5),
  (1.0, 0.84, 0.12),
  plain=(
    rod(0, 0, 0.36, 0, 0.04, 0.5),
    rod(0, 0, 0.07, 0.04, 0.72, 0.5),
    rod(0, 0, 0.5, 0.72, 1),
  ),
  detailed=(
    rod(0, 0, 0.38, 0, 0.03, 1, "dark"),
    rod(0, 0, 0.05, 0.03, 0.74, 1, "steel"),
    rod(0, 0, 0.5, 0.74, 1),
    rod(0, 0, 0.46, 0.735, 0.74, 1, "light"),
  ),
  stacks=True,
)
PLANT = Category(
  "plant",
  (0.5, 0.5, 1.0),
  (0.12, 0.55, 0.16),
  plain=(
    rod(0, 0, 0.3, 0, 0.34, 1, "wood"),
    ball(-0.5, 0.5, -0.5, 0.5, 0.34, 1),
  ),
  detailed=(
    rod(0, 0, 0.3, 0, 0.28, 1, "wood"),
    rod(0, 0, 0.27, 0.28, 0.285, 1, "soil"),
    rod(0, 0, 0.05, 0.285, 0.6, 1, "soil"),
    ball(-0.5, 0.12, -0.4, 0.22, 0.42, 0.8, 0.8),
    ball(-0.12, 0.5, -0.5, 0.12, 0.4, 0.75, 1.1),
    ball(-0.3, 0.35, -0.12, 0.5, 0.45, 0.85, 0.9),
    ball(-0.28, 0.28, -0.28, 0.28, 0.55, 1, 1.2),
  ),
  stacks=True,
)
TRASH_BIN = Category(
  "trash bin",
  (0.3, 0.3, 0.42),
  (0.30, 0.85, 0.80),
  plain=(
    rod(0, 0, 0.44, 0, 0.9),
    rod(0, 0, 0.5, 0.9, 1, 0.75),
    rod(0, 0, 0.4, 0.995, 1, 1, "dark"),
  ),
  detailed=(
    rod(0, 0, 0.42, 0, 0.9),
    rod(0, 0, 0.5, 0.9, 1, 0.75),
    rod(0, 0, 0.42, 0.993, 1, 1, "dark"),
    rod(0, 0, 0.45, 0.3, 0.36, 0.75),
  ),
  stacks=True,
)
MONITOR = Category(
  "monitor",
  (1.0, 0.14, 0.65),
  (0.22, 0.22, 0.26),
  plain=(
    box(-0.2, 0.2, -0.5, 0.5, 0, 0.04),
    box(-0.05, 0.05, -0.1, 0.2, 0.04, 0.25),
    box(-0.5, 0.5, -0.1, 0.3, 0.2, 1),
    box(-0.46, 0.46, -0.16, -0.1, 0.26, 0.95, 1, "screen"),
  ),
  detailed=(
    rod(0, 0, 0.2, 0, 0.04, radius_y=0.5),
    box(-0.05, 0.05, 0.05, 0.3, 0.04, 0.45),
    box(-0.5, 0.5, -0.12, 0.2, 0.2, 1),
    box(-0.47, 0.47, -0.18, -0.12, 0.25, 0.96, 1, "screen"),
  ),
  stacks=True,
)
REFRIGERATOR = Category(
  "refrigerator",
  (0.7, 0.7, 1.75),
  (0.80, 0.84, 0.88),
  plain=(
    box(-0.5, 0.5, -0.42, 0.5, 0, 1, 0.7),
    box(-0.5, 0.5, -0.48, -0.42, 0.03, 0.62),
    box(-0.5, 0.5, -0.48, -0.42, 0.65, 0.99),
    box(0.36, 0.42, -0.5, -0.48, 0.4, 0.9, 1, "dark"),
  ),
  detailed=(
    box(-0.5, 0.5, -0.4, 0.5, 0, 1, 0.8),
    box(-0.5, 0.5, -0.47, -0.4, 0.04, 0.62),
    box(-0.5, 0.5, -0.47, -0.4, 0.64, 0.99),
    box(0.38, 0.42, -0.5, -0.47, 0.38, 0.58, 1, "steel"),
    box(0.38, 0.42, -0.5, -0.47, 0.68, 0.84, 1, "steel"),
  ),
  supports=True,
)
CABINET = Category(
  "cabinet",
  (0.8, 0.45, 0.8),
  (0.95, 0.55, 0.10),
  plain=(
    box(-0.5, 0.5, -0.42, 0.5, 0, 1, 0.7),
    box(-0.47, -0.02, -0.48, -0.42, 0.06, 0.92),
    box(0.02, 0.47, -0.48, -0.42, 0.06, 0.92),
    box(-0.1, 0.1, -0.5, -0.48, 0.5, 0.56, 1, "dark"),
  ),
  detailed=(
    box(-0.48, 0.48, -0.42, 0.48, 0.05, 0.95, 0.75),
    box(-0.5, 0.5, -0.5, 0.5, 0.95, 1, 0.9),
    box(-0.46, -0.01, -0.46, -0.42, 0.08, 0.92),
    box(0.01, 0.46, -0.46, -0.42, 0.08, 0.92),
    ball(-0.09, -0.04, -0.5, -0.44, 0.5, 0.56, 1, "dark"),
    ball(0.04, 0.09, -0.5, -0.44, 0.5, 0.56, 1, "dark"),
    box(-0.44, 0.44, -0.38, 0.44, 0, 0.05, 1, "dark"),
  ),
  supports=True,
)
WASHING_MACHINE = Category(
  "washing machine",
  (0.6, 0.6, 0.85),
  (0.55, 0.78, 0.98),
  plain=(
    box(-0.5, 0.5, -0.46, 0.5, 0, 1),
    ball(-0.34, 0.34, -0.5, -0.42, 0.12, 0.72, 1, "dark"),
    box(-0.48, 0.48, -0.48, -0.46, 0.82, 0.97, 0.6),
  ),
  detailed=(
    box(-0.5, 0.5, -0.45, 0.5, 0, 1),
    ball(-0.36, 0.36, -0.49, -0.41, 0.14, 0.72, 1, "steel"),
    ball(-0.28, 0.28, -0.5, -0.38, 0.2, 0.66, 1, "screen"),
    box(-0.48, -0.1, -0.47, -0.45, 0.82, 0.97, 0.75),
    box(-0.08, 0.48, -0.46, -0.45, 0.82, 0.97, 1, "white"),
    ball(0.1, 0.22, -0.5, -0.42, 0.85, 0.94, 1, "steel"),
  ),
  supports=True,
)
BACKPACK = Category(
  "backpack",
  (0.35, 0.25, 0.5),
  (0.38, 0.15, 0.75),
  plain=(
    box(-0.5, 0.5, -0.2, 0.5, 0, 0.75),
    ball(-0.5, 0.5, -0.2, 0.5, 0.5, 1),
    box(-0.36, 0.36, -0.5, -0.2, 0.06, 0.45, 0.7),
  ),
  detailed=(
    box(-0.48, 0.48, -0.2, 0.42, 0, 0.75),
    ball(-0.48, 0.48, -0.2, 0.42, 0.52, 0.98),
    box(-0.34, 0.34, -0.5, -0.2, 0.06, 0.45, 0.75),
    box(-0.3, -0.16, 0.42, 0.5, 0.1, 0.8, 0.5),
    box(0.16, 0.3, 0.42, 0.5, 0.1, 0.8, 0.5),
    box(-0.1, 0.1, 0.05, 0.17, 0.94, 1, 0.5),
    ball(-0.5, -0.4, -0.15, 0.35, 0.1, 0.5, 0.75),
    ball(0.4, 0.5, -0.15, 0.35, 0.1, 0.5, 0.75),
  ),
  stacks=True,
)
STOOL = Category(
  "stool",
  (0.4, 0.4, 0.5),
  (0.85, 0.10, 0.60),
  plain=(
    rod(0, 0, 0.5, 0.82, 1),
    rod(0, 0, 0.12, 0.06, 0.82, 0.6),
    rod(0, 0, 0.42, 0, 0.06, 0.6),
  ),
  detailed=(
    rod(0, 0, 0.5, 0.86, 1),
    *(
      rod(x, y, 0.05, 0, 0.86, 1, "wood")
      for x in (-0.27, 0.27)
      for y in (-0.27, 0.27)
    ),
    box(-0.27, 0.27, -0.02, 0.02, 0.3, 0.38, 1, "wood"),
    box(-0.02, 0.02, -0.27, 0.27, 0.3, 0.38, 1, "wood"),
  ),
)
PIANO = Category(
  "piano",
  (1.4, 0.6, 1.1),
  (0.30, 0.05, 0.12),
  plain=(
    box(-0.5, 0.5, 0, 0.5, 0, 1),
    box(-0.5, 0.5, -0.5, 0, 0.5, 0.62, 0.8),
    box(-0.45, 0.45, -0.46, -0.08, 0.62, 0.66, 1, "white"),
    box(-0.48, 0.48, -0.4, 0, 0, 0.06, 0.8),
  ),
  detailed=(
    box(-0.5, 0.5, 0, 0.5, 0, 1),
    box(-0.5, 0.5, -0.5, 0, 0.5, 0.6, 0.8),
    box(-0.45, 0.45, -0.48, -0.06, 0.6, 0.64, 1, "white"),
    box(-0.45, 0.45, -0.28, -0.06, 0.64, 0.66, 1, "dark"),
    box(-0.48, -0.42, -0.46, -0.36, 0, 0.5, 0.8),
    box(0.42, 0.48, -0.46, -0.36, 0, 0.5, 0.8),
    box(-0.3, 0.3, -0.06, 0, 0.68, 0.9, 1.5),
  ),
)
HEATER = Category(
  "heater",
  (1.0, 0.2, 0.6),
  (0.97, 0.95, 0.70),
  plain=(
    box(-0.5, 0.5, 0, 0.5, 0.1, 0.95, 0.6),
    box(-0.46, -0.2, -0.5, 0, 0, 1),
    box(-0.13, 0.13, -0.5, 0, 0, 1),
    box(0.2, 0.46, -0.5, 0, 0, 1),
  ),
  detailed=(
    box(-0.5, 0.5, 0, 0.5, 0.1, 0.95, 0.6),
    *(
      box(x - 0.055, x + 0.055, -0.5, 0.3, 0, 1)
      for x in np.linspace(-0.42, 0.42, 6).tolist()
    ),
    box(-0.5, 0.5, -0.2, 0.1, 0.78, 0.84, 0.8),
  ),
)
DOOR = Category(
  "door",
  (0.9, 0.04, 2.05),
  (0.60, 0.44, 0.30),
  plain=(
    box(-0.5, 0.5, -0.2, 0.5, 0, 1, 1, "white"),
    box(-0.42, 0.42, -0.35, -0.2, 0, 0.96),
    box(0.28, 0.38, -0.5, -0.35, 0.48, 0.52, 1, "dark"),
  ),
  detailed=(
    box(-0.5, 0.5, -0.2, 0.5, 0, 1, 1, "white"),
    box(-0.42, 0.42, -0.3, -0.2, 0, 0.96),
    box(-0.3, 0.3, -0.4, -0.3, 0.1, 0.42, 0.85),
    box(-0.3, 0.3, -0.4, -0.3, 0.55, 0.88, 0.85),
    box(0.28, 0.38, -0.5, -0.3, 0.48, 0.51, 1, "steel"),
  ),
)
WINDOW = Category(
  "window",
  (1.2, 0.04, 1.1),
  (0.95, 0.95, 0.95),
  plain=(
    box(-0.5, 0.5, -0.4, 0.5, 0, 1),
    box(-0.44, -0.03, -0.45, -0.4, 0.06, 0.94, 1, "glass"),
    box(0.03, 0.44, -0.5, -0.4, 0.06, 0.94, 1, "glass"),
  ),
  detailed=(
    box(-0.5, 0.5, -0.3, 0.5, 0, 1),
    box(-0.44, -0.03, -0.4, -0.3, 0.06, 0.94, 1, "glass"),
    box(0.03, 0.44, -0.4, -0.3, 0.06, 0.94, 1, "glass"),
    box(-0.5, 0.5, -0.5, -0.3, 0, 0.03, 0.85),
  ),
)
# A plain box: what real rooms hold beside the known categories.
OTHER = Category(
  "other",
  (0.5, 0.5, 0.5),
  (0.6, 0.58, 0.55),
  plain=(box(-0.5, 0.5, -0.5, 0.5, 0, 1),),
  detailed=(box(-0.5, 0.5, -0.5, 0.5, 0, 1),),
)

ALL = (
  *(CHAIR, TABLE, SOFA, BED, BOOKSHELF, LAMP, PLANT, TRASH_BIN, MONITOR),
  *(REFRIGERATOR, CABINET, WASHING_MACHINE, BACKPACK, STOOL, PIANO, HEATER),
  *(DOOR, WINDOW, OTHER),
)
