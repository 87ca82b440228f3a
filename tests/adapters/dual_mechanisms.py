# SPDX-License-Identifier: Apache-2.0
"""The Dual Mechanisms: index sets and drawings, probes, steering, patching."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from spatial_jax import hf
from spatial_jax.analysis import (
  answers,
  layouts,
  patching,
  probes,
  steering,
  stimuli,
  tokens,
)
from spatial_jax.models import llm
from spatial_jax.nn.edit import Edit, residuals

KEYS = (*hf.nest(llm.KEYS, "model.", ""), ("lm_head.weight", "head/kernel"))


def geometry(folder, config):
  want = json.loads((folder / "outputs.json").read_text())
  drawn = load_file(folder / "outputs.safetensors")
  got, expected, known = {}, {}, {}
  for name, case in want["models"].items():
    bands = {k: len(v) // case["num_tokens"] for k, v in case["strips"].items()}
    layout = known[name] = layouts.Layout(
      case["num_tokens"],
      case["token_px"],
      case["entity"],
      case["spacing"],
      tuple(bands[k] for k in layouts.HORIZONTAL),
      layouts.LAYOUTS[name].breaks if name in layouts.LAYOUTS else 0,
    )
    sets = {f"slots/{k}": v for k, v in layout.slots().items()}
    strips = layout.bands(True)
    strips |= {k: v for k, v in layout.bands(False).items() if k not in strips}
    sets |= {f"strips/{k}": v for k, v in strips.items()}
    side = layout.tokens
    place = tokens.contiguous(0, (1, side, side), breaks=layout.breaks)
    examples = case["lm_position_example"]
    sets["positions"] = place.at(np.array([e["grid"] for e in examples]))
    for key, value in sets.items():
      got[f"{name}/{key}"] = value
      kind, _, which = key.partition("/")
      expected[f"{name}/{key}"] = np.array(
        case[kind][which] if which else [e["offset"] for e in examples]
      )
  for number, case in enumerate(want["boxes"]):
    height, width = case["qwen_grid"]
    ids = np.zeros(height * width + 300, int)
    ids[7 : 7 + height * width // 4] = 151655
    ids[-260:-4] = 262144
    size = tuple(case["image"])
    maps = {
      "qwen": tokens.qwen(ids, (1, height, width)),
      "gemma": tokens.gemma3(ids),
    }
    for name, place in maps.items():
      got[f"box{number}/{name}"] = place.box(case["box"], size)
      expected[f"box{number}/{name}"] = np.array(case[f"{name}_tokens"])
  for name, image in drawn.items():
    model, kind, *rest = name.split("_")
    got[name] = _draw(known[model], kind, rest[0] == "h", image)
    expected[name] = image
  return (
    {k: np.asarray(v).astype(np.int64) for k, v in got.items()},
    {k: np.asarray(v).astype(np.int64) for k, v in expected.items()},
  )


def _draw(layout, kind, horizontal, image):
  """The drawing of a name, with the entities that the image shows."""
  if kind == "isolated":
    (entity,) = _entities(layout, image, layout.corners(True)[1:2], ("",))
    return stimuli.alone(layout, entity)
  shapes = ("",) if kind == "squares" else stimuli.SHAPES
  corners = layout.corners(horizontal)
  entities = _entities(layout, image, corners, shapes)
  return stimuli.three(layout, entities, horizontal)


def _entities(layout, image, corners, shapes):
  """(shape, colour) at each place: what the case doesn't say in words."""
  size, out = layout.entity * layout.pixels, []
  names = {color: name for name, color in stimuli.COLORS.items()}
  one = layouts.Layout(layout.entity, layout.pixels, layout.entity, 0, (0,) * 3)
  for row, column in corners:
    y, x = row * layout.pixels, column * layout.pixels
    part = image[y : y + size, x : x + size]
    inked = part[(part != 255).any(-1)]
    colors, counts = np.unique(inked, axis=0, return_counts=True)
    color = names[tuple(colors[counts.argmax()].tolist())]
    alike = []
    for shape in shapes:
      drawn = stimuli.render(one, [(0, 0)], [(shape, color)])
      alike.append((drawn != part).sum())
    out.append((shapes[int(np.argmin(alike))], color))
  return out


def probe_and_steer(folder, config):
  inputs = load_file(folder / "inputs.safetensors")
  probe, losses = jax.jit(
    lambda p, x, y: probes.fit(
      p,
      x,
      y,
      steps=config["epochs"],
      rate=config["lr"],
      decay=config["weight_decay"],
    )
  )(probes.Probe(inputs["W0"], inputs["b0"]), inputs["X"], inputs["y"])
  # Of the recorded probe, so that steering is compared alone.
  want = load_file(folder / "outputs.safetensors")
  hidden = inputs["hidden"]
  mask = np.zeros(hidden.shape[:2], bool)
  mask[:, inputs["image_positions"]] = True
  got = {
    "W": probe.kernel,
    "b": probe.bias,
    "losses": losses,
    "all_probs": probes.probabilities(probe, inputs["all_tokens"]),
    "steered": steering.steer(hidden, mask, want["W"], config["alpha"]),
  }
  return jax.device_get(got), want


def patch(folder, config):
  inputs = load_file(folder / "inputs.safetensors")
  grid, start = config["grid"], config["image_start"]
  width = config["strip_width"]
  model = llm.Model(
    config["vocab"],
    config["hidden"],
    config["layers"],
    config["heads"],
    config["kv_heads"],
    config["intermediate"],
    tied=False,
    theta=config["rope_theta"],
    sections=None,
    eps=config["rms_eps"],
  )
  rows, length, _ = inputs["clean_embeds"].shape
  row = {
    "positions": jnp.broadcast_to(jnp.arange(length)[None], (rows, length)),
    "segments": jnp.ones((rows, length), jnp.int32),
  }
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), row["positions"], **row)
  )
  params = hf.load(KEYS, folder / "weights.safetensors", shapes["params"])
  layout = layouts.Layout(
    grid,
    1,
    config["slot_entity"],
    config["slot_spacing"],
    (width, grid - 2 * width, width),
  )
  place = tokens.contiguous(start, (1, grid, grid))
  slots = {k: place.at(v) for k, v in layout.slots().items()}
  bands = {k: place.at(v) for k, v in layout.bands(True).items()}
  assert sorted(inputs["swap_dst"]) == sorted([*bands["left"], *bands["right"]])
  last = np.full(rows, length - 1)

  @jax.jit
  def run(embeddings, edits):
    logits, out = model.apply(
      {"params": params}, None, **row, embeddings=embeddings, edit=edits
    )
    return logits[:, -1], residuals(out)

  def curve(clean, states, where):
    def probabilities(edits):
      return answers.label_probabilities(
        run(clean, edits)[0], inputs["label_ids"]
      )

    return patching.sweep(probabilities, states, *where).swapaxes(0, 1)

  nothing = Edit(-1, np.zeros((rows, length), bool), add=jnp.zeros((1, 1, 1)))
  clean, counter = inputs["clean_embeds"], inputs["counterfactual_embeds"]
  counter_logits, states = run(counter, (nothing,))
  middle = slots["middle"]
  isolated = jnp.stack([inputs["isolated_embeds"][:, middle]] * 3)
  entities = np.stack([slots[k] for k in layouts.HORIZONTAL])
  ablated = [
    patching.ablate_ordering(
      x, place.positions.ravel(), entities, isolated, inputs["empty_embeds"]
    )
    for x in (clean, counter)
  ]
  got = {
    "clean_logits": run(clean, (nothing,))[0],
    "counterfactual_logits": counter_logits,
    "residuals_counterfactual": states,
    "ablated_logits": run(ablated[0], (nothing,))[0],
    "last_token_patch": curve(clean, states, patching.last_token(last, length)),
    "strip_swap": curve(
      clean, states, patching.swap(length, bands["left"], bands["right"])
    ),
    "object_swap_under_ablation": curve(
      ablated[0],
      run(ablated[1], (nothing,))[1],
      patching.swap(length, slots["left"], slots["right"]),
    ),
  }
  return jax.device_get(got), load_file(folder / "outputs.safetensors")


ADAPTERS = {
  ("dual_mechanisms", "geometry"): geometry,
  ("dual_mechanisms", "probe_and_steer"): probe_and_steer,
  ("dual_mechanisms", "patching"): patch,
}
# As the cases say, after 200 steps in float32 and for the interventions.
TOLERANCES = {
  ("dual_mechanisms", "probe_and_steer"): (
    ("steered", 1e-5),
    (".*", 1e-4),
  ),
  ("dual_mechanisms", "patching"): ((".*", 2e-5),),
}
