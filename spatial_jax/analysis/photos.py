# SPDX-License-Identifier: Apache-2.0
"""Questions about photos with boxes: COCO-spatial's captions, COCO's boxes.

captions JSON of What'sUp's benchmark ([image id, right caption, wrong caption]
per row) + instances JSON of COCO -> items with two orders of options each.

  "A photo of a cat to the left of a dog", image 7, boxes of both -> Item

numpy only.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

AXES = {"horizontal": ("left", "right"), "vertical": ("above", "below")}
CAPTIONS = (
  re.compile(r"A photo of (.+?) to the (left|right) of (.+)$"),
  re.compile(r"A photo of (.+?) (above|below)(?: of)? (.+)$"),
)
ONE_WORD = "Answer with one word"
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


@dataclasses.dataclass(frozen=True)
class Item:
  """Two things in a photo; boxes are None where none has the noun's name."""

  image: int  # COCO's id
  subject: str
  object: str
  truth: str  # the subject is ... of the object
  axis: str
  size: tuple[int, int] | None = None  # width, height
  subject_box: Box | None = None
  object_box: Box | None = None

  @property
  def order(self) -> int | None:
    """Side on which the boxes say the subject is: 0 is left or above.

    None without boxes. Items in which it isn't that of `truth` are no use.
    """
    if self.subject_box is None or self.object_box is None:
      return None
    first = 0 if self.axis == "horizontal" else 1
    middles = [
      box[first] + box[first + 2] for box in (self.subject_box, self.object_box)
    ]
    return int(middles[0] > middles[1])

  @property
  def label(self) -> int:
    return AXES[self.axis].index(self.truth)

  def prompt(self, flipped: bool = False, direct: bool = False) -> str:
    """The question, with one or the other option first.

    Args:
      flipped: "right or left" instead of "left or right".
      direct: the wording for Gemma, else the one with a reference point.
    """
    options = AXES[self.axis][:: -1 if flipped else 1]
    either = " or ".join(options)
    if direct and self.axis == "horizontal":
      where = " or ".join(f"to the {word}" for word in options) + " of"
      return f"Is the {self.subject} {where} the {self.object}? {ONE_WORD}."
    if direct:
      return f"Is the {self.subject} {either} the {self.object}? {ONE_WORD}."
    where = f"where is the {self.subject} located"
    if self.axis == "horizontal":
      where = f"which side is the {self.subject} on"
    return (
      f"Using the {self.object} as the reference point, {where}? "
      f"{ONE_WORD}: {either}."
    )


def parse(caption: str) -> tuple[str, str, str, str] | None:
  """Subject, direction, object and axis of a caption, without articles.

  None: it speaks of no side.
  """
  for pattern in CAPTIONS:
    if found := pattern.match(caption):
      subject, direction, thing = found.groups()
      axis = next(a for a, words in AXES.items() if direction in words)
      return strip(subject), direction, strip(thing), axis
  return None


def strip(noun: str) -> str:
  return re.sub(r"^(a|an|the)\s+", "", noun.strip(), flags=re.IGNORECASE)


class Boxes:
  """COCO's instances by image and category.

  Args:
    annotations: the content of instances_*.json.
  """

  def __init__(self, annotations: Mapping):
    names = {c["id"]: c["name"].lower() for c in annotations["categories"]}
    self.size = {
      i["id"]: (i["width"], i["height"]) for i in annotations["images"]
    }
    self._found: dict[tuple[int, str], list[Box]] = {}
    for row in annotations["annotations"]:
      x, y, width, height = map(float, row["bbox"])
      key = row["image_id"], names[row["category_id"]]
      self._found.setdefault(key, []).append((x, y, x + width, y + height))

  def largest(self, image: int, noun: str) -> Box | None:
    found = self._found.get((image, noun.strip().lower()), ())
    return max(found, key=_area, default=None)


def _area(box: Box) -> float:
  return (box[2] - box[0]) * (box[3] - box[1])


def items(
  captions: Iterable[Sequence], boxes: Boxes | None = None
) -> list[Item]:
  """Items of all rows whose caption names a side."""
  out = []
  for image, caption, *_ in captions:
    if (parsed := parse(caption)) is None:
      continue
    subject, truth, thing, axis = parsed
    more = {}
    if boxes is not None:
      more = {
        "size": boxes.size.get(int(image)),
        "subject_box": boxes.largest(int(image), subject),
        "object_box": boxes.largest(int(image), thing),
      }
    out.append(Item(int(image), subject, thing, truth, axis, **more))
  return out


def load(
  captions: str | pathlib.Path, instances: str | pathlib.Path | None = None
) -> list[Item]:
  """Reads the two JSON files.

  Raises:
    ValueError: a file isn't of that kind.
  """
  rows = json.loads(pathlib.Path(captions).read_text(encoding="utf-8"))
  if not isinstance(rows, list) or any(len(row) < 2 for row in rows):
    raise ValueError(
      f"{captions}: expected a list of [image id, right caption, wrong "
      "caption], the format of coco_qa_two_obj.json"
    )
  boxes = None
  if instances:
    known = json.loads(pathlib.Path(instances).read_text(encoding="utf-8"))
    if missing := {"images", "annotations", "categories"} - known.keys():
      raise ValueError(
        f"{instances}: has no {', '.join(sorted(missing))}; expected COCO's "
        "instances_val2017.json"
      )
    boxes = Boxes(known)
  return items(rows, boxes)
