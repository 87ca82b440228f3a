# SPDX-License-Identifier: Apache-2.0
"""The figures of an analysis, from what `pipeline.run` gives."""

from __future__ import annotations

from typing import Any

from PIL import Image

from spatial_jax.analysis import figures, heatmaps, rooms
from spatial_jax.analysis.pipeline import Shown

SLOT = "slot: 0 is the decoder's input, k the output of its block k"


def draw(result: dict[str, Any], shown: dict[str, Shown], pixels: int) -> dict:
  """Figures by file name: SVG text or an image."""
  out: dict[str, str | Image.Image] = {}
  for axis, found in result["axes"].items():
    out |= _draw_axis(axis, found, range(result["slots"]))
    look, words = shown[axis], rooms.AXES[axis][1]
    out[f"heat_{axis}.png"] = heatmaps.sheet(
      look.frames, look.items, look.maps, look.mean, words, pixels
    )
  left = result["axes"]["left_right"]
  out |= figures_of_patching(left, range(result["slots"]))
  return out


def figures_of_patching(found: dict, slots: range) -> dict[str, str]:
  """Curves over slots of what a patch from the mirrored image does."""
  out, patching = {}, found["patching"]
  flip = patching["flip"]
  kept = f"{patching['kept']} of {patching['items']} questions, "
  kept += "those answered rightly in both images and both orders of options."
  if patching["kept"]:
    names = {
      "frame": "all tokens of the frame",
      "background": "its background",
      "objects": "the two things",
    }
    out["patching.svg"] = figures.lines(
      {text: (slots, flip[name]) for name, text in names.items()},
      "Which tokens carry left and right?",
      SLOT,
      "probability of the opposite word",
      "At one slot, tokens are replaced by those of the mirrored image at "
      "their mirrored places: the same content, the opposite order. High: "
      f"these tokens decide the answer up to this slot. {kept}",
      low=0.0,
      high=1.0,
    )
    names = {
      "same question": "same order of options",
      "other order": "other order of options",
    }
    out["last_token.svg"] = figures.lines(
      {text: (slots, flip[name]) for name, text in names.items()},
      "When does the answer reach the last token?",
      SLOT,
      "probability of the opposite word",
      "The token before the answer is replaced by that of the mirrored image. "
      "Where both curves are high it carries the word; where only the first "
      f"is, it carries the option's letter. {kept}",
      low=0.0,
      high=1.0,
    )
  again = found["ablation"]["criss_cross"]
  if again["kept"] and patching["kept"]:
    out["rebuilt.svg"] = figures.lines(
      {
        "image as it is": (slots, flip["objects"]),
        "order ablated": (slots, again["flip"]),
      },
      "Does the decoder rebuild the order on the things themselves?",
      SLOT,
      "probability of the opposite word",
      "Tokens of the two things are replaced by those of the mirrored image, "
      "with the image as it is and with all order taken out of the decoder's "
      "input. A curve that starts low and rises: the decoder puts order there. "
      f"Under ablation {again['kept']} questions qualify.",
      low=0.0,
      high=1.0,
    )
  return out


def _draw_axis(axis: str, found: dict, slots: range) -> dict[str, str]:
  words = " / ".join(rooms.AXES[axis][1])
  probe, things = found["probe"], found["things"]["held_out"]
  ablated = found["ablation"]["accuracy"]
  steering = found["steering"]
  alphas = steering["alphas"]
  ordering, random = steering["ordering"], steering["random"]
  honest = ordering["honest"]
  note = (
    f"Best alpha on other items: {honest['alpha']}; gain on the "
    f"{honest['items']} items shown {honest['gain']:+.3f} "
    f"+- {honest['error']:.3f} (one standard error), random directions "
    f"{random['honest']['gain']:+.3f}."
  )
  return {
    f"probe_{axis}.svg": figures.lines(
      {
        "probe": (slots, probe["held_out"]),
        "random directions": (slots, probe["random"]),
        "shuffled labels": (slots, probe["shuffled"]),
      },
      f"Can {words} be read off a thing's tokens?",
      SLOT,
      "accuracy on rooms never seen",
      "A linear probe reads the mean of a thing's visual tokens; "
      f"{things} things of rooms that neither it nor the model has seen. "
      "Controls: a probe of two random directions, and one that learned "
      "shuffled labels.",
      dashed=("random directions", "shuffled labels"),
      level=("chance", 0.5),
      low=0.3,
      high=1.0,
    ),
    f"ablation_{axis}.svg": figures.bars(
      {
        name: {
          "right in both orders": row["strict"],
          "right in the first order": row["first"],
        }
        for name, row in ablated.items()
      },
      f"What is {words} answered from?",
      "accuracy",
      "Visual tokens before the decoder's first block are replaced. “From the "
      "middle”: a thing's tokens come from an image in which it stands alone "
      "in the middle, so that nothing in the image says where it is.",
      level=("dashed: chance in both", 0.25),
    ),
    f"steering_{axis}.svg": figures.lines(
      {
        "ordering directions": (alphas, ordering["honest"]["strict"]),
        "random directions": (alphas, random["honest"]["strict"]),
      },
      f"Does amplifying the order help with {words}?",
      "alpha, how much of the probe's directions is added to all visual tokens",
      "accuracy in both orders",
      note,
      dashed=("random directions",),
      level=("unsteered", ordering["honest"]["before"]),
      low=0.0,
      high=1.0,
    ),
    f"fixes_{axis}.svg": figures.lines(
      {
        "ordering directions": (alphas, ordering["paper"]["fix_rate"]),
        "random directions": (alphas, random["paper"]["fix_rate"]),
      },
      f"The paper's count: failures about {words} that steering fixes",
      "alpha",
      "share of failures",
      f"Of {ordering['paper']['failures']} failures; the best alpha is chosen "
      "on these very failures, and what steering breaks isn't counted. See the "
      "honest count beside it.",
      dashed=("random directions",),
      low=0.0,
    ),
  }
