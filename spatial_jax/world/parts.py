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
