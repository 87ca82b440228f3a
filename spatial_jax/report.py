# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page: scores, curves, rooms, questions and answers.

The page needs nothing beside itself: pictures are data URIs and drawings inline
SVG, so that it can be mailed, printed or opened on a phone.

`write(path, data)` takes a plain dict; every entry but the title is optional:

  title       str
  lead        str, one paragraph under the title
  headline    [{"value": "61.2", "label": "VSI macro", "note": "blind 39.0"}]
  table       [{"type", "seeing", "blind", "chance", "count"}], percent
  drawings    [str], inline SVG
  tables      [(title, head, rows)], rows of text as long as the head
  notes       [str], paragraphs under the tables
  runs        {name: rows of its metrics file}, each row with "step"
  curves      [(key of the rows, title)]; ("loss", "training loss") if absent
  settings    {name: value}, small print at the end
  rooms       [room], each
    name             str
    scene            arrays of `world/scene.py`
    world_from_camera f32[F 4 4]
    intrinsics       f32[3 3], in pixels of `rgb`
    fov_degrees      of the top view's cameras; 100 if absent
    rgb              [F h w 3], 0..1 or bytes
    depth            [F h w], metres
    object           i32[F h w], ids, -1 is the room itself
    questions        [{"question_type", "question", "options", "ground_truth",
                     "answer", "blind"}]; "answer" and "blind" are what the two
                     models said, as text, and may be absent
"""

from __future__ import annotations

import base64
import html
import importlib
import io
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from spatial_jax import drawing, metrics
from spatial_jax.drawing import (
  draw_boxes,
  draw_curves,
  draw_depth,
  draw_ids,
  draw_top_view,
)
from spatial_jax.evaluators import qa

__all__ = [
  "draw_boxes",
  "draw_curves",
  "draw_depth",
  "draw_ids",
  "draw_top_view",
  "main",
  "write",
]

SECTIONS = (
  "title",
  "lead",
  "headline",
  "table",
  "drawings",
  "tables",
  "notes",
  "runs",
  "curves",
  "settings",
  "rooms",
)
NAMES = {
  "object_counting": "object count",
  "object_abs_distance": "absolute distance",
  "object_size_estimation": "object size",
  "room_size_estimation": "room size",
  "object_rel_distance": "relative distance",
  "object_rel_direction_easy": "relative direction, easy",
  "object_rel_direction_medium": "relative direction, medium",
  "object_rel_direction_hard": "relative direction, hard",
  "route_planning": "route planning",
  "obj_appearance_order": "appearance order",
}
STYLE = """
:root{--ink:#1d2430;--muted:#6b7480;--rule:#dfe3e8;--seeing:#1f5fa8;
--blind:#c4692a;--right:#22784a;--wrong:#b03a2e;color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:var(--ink);font:16px/1.55 system-ui,
-apple-system,"Segoe UI",sans-serif}
main{max-width:68rem;margin:0 auto;padding:3rem 1.25rem 5rem}
h1,h2,h3{font-family:Charter,"Iowan Old Style",Georgia,serif;line-height:1.2;
text-wrap:balance}
h1{font-size:clamp(1.7rem,4.5vw,2.5rem);margin:0 0 .8rem}
h2{font-size:1.5rem;margin:3.2rem 0 .9rem;padding-top:1.1rem;
border-top:1px solid var(--rule)}
h3{font-size:1.15rem;margin:0 0 .7rem}
p{max-width:44rem;margin:.6rem 0}
.lead{font-size:1.08rem}
.muted,figcaption,small{color:var(--muted)}
figcaption,small{font-size:.83rem;line-height:1.4}
.numbers{display:flex;flex-wrap:wrap;gap:1rem 3rem;margin:1.8rem 0 0}
.numbers b{display:block;font:600 2.3rem/1.1 Charter,"Iowan Old Style",Georgia,
serif;font-variant-numeric:tabular-nums}
.numbers div{max-width:15rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;
font-size:.93rem;width:100%}
th{font-weight:600;text-align:right;padding:.35rem .7rem;vertical-align:bottom;
border-bottom:1.5px solid var(--ink);white-space:nowrap}
td{text-align:right;padding:.3rem .7rem;border-bottom:1px solid var(--rule);
vertical-align:top}
th:first-child,td:first-child{text-align:left;padding-left:0}
tr.total td{font-weight:600;border-top:1.5px solid var(--ink)}
td.plot,th.plot{width:17rem;min-width:13rem;padding-right:0}
td.plot svg{display:block;width:100%;height:1.5rem;overflow:visible}
.curves-row{display:grid;gap:1.5rem 2.2rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr))}
svg.curves{width:100%;max-width:34rem;height:auto}
.room{margin:0 0 3.2rem}
.see{display:grid;gap:1.2rem 1.6rem;grid-template-columns:minmax(0,1fr)}
@media(min-width:52rem){.see{grid-template-columns:19rem minmax(0,1fr)}}
figure{margin:0}
svg.topview{width:100%;max-height:21rem}
.strip{display:grid;gap:.3rem;margin-bottom:.15rem;
grid-template-columns:repeat(var(--n),minmax(0,1fr))}
.strip img{width:100%;display:block;border-radius:2px;background:#eee}
.pixels img{image-rendering:pixelated}
.strip+figcaption{margin-bottom:.6rem}
.bar{display:inline-block;width:7rem;height:.55rem;margin:0 .4rem;
vertical-align:baseline;border-radius:2px}
.qa td{text-align:left}
.qa th{text-align:left}
.qa td:first-child{width:46%;min-width:15rem}
.qa ul{margin:.15rem 0 0;padding:0;list-style:none;color:var(--muted);
font-size:.86rem;display:flex;flex-wrap:wrap;gap:0 .9rem}
.right{color:var(--right)}.wrong{color:var(--wrong)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1.2rem;
font-size:.88rem;margin:0}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
.key i{display:inline-block;width:.72rem;height:.72rem;border-radius:50%;
margin:0 .35rem 0 1rem;vertical-align:-1px}
@media(max-width:40rem){
.numbers{display:grid;grid-template-columns:1fr 1fr;gap:1.2rem}
.numbers b{font-size:1.8rem}
th,td{padding-left:.35rem;padding-right:.35rem}
td.plot{min-width:9rem}
.qa thead{display:none}
.qa tr{display:block;padding:.5rem 0;border-bottom:1px solid var(--rule)}
.qa td{display:block;border:0;padding:.1rem 0}
.qa td[data-of]::before{content:attr(data-of) ": ";color:var(--muted)}
}
@media print{h2,.room,figure{break-inside:avoid}}
"""


def escape(value: Any) -> str:
  return html.escape(str(value))


def data_uri(image: Any) -> str:
  """An image as the `src` of an <img>."""
  buffer = io.BytesIO()
  image = Image.fromarray(drawing.to_uint8(image))
  image.save(buffer, "PNG", optimize=True)
  return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def percent(value: float | None) -> str:
  return (
    "&ndash;"
    if value is None or not math.isfinite(value)
    else f"{float(value):.1f}"
  )


def signed(value: float | None) -> str:
  if value is None or not math.isfinite(value):
    return "&ndash;"
  return f"{value:+.1f}".replace("-", "&minus;")


# --- sections ---------------------------------------------------------------


def headline(items: Sequence[Mapping]) -> str:
  cells = "".join(
    f"<div><b>{escape(item['value'])}</b>{escape(item['label'])}"
    f"<br><small>{escape(item.get('note', ''))}</small></div>"
    for item in items
  )
  return f'<div class="numbers">{cells}</div>'


def dots(row: Mapping) -> str:
  """Seeing, blind and chance of one type on a line from 0 to 100."""

  def at(name: str) -> float | None:
    value = row.get(name)
    if value is None or not math.isfinite(value):
      return None
    return 2 * min(max(float(value), 0), 100)

  seeing, blind, chance = at("seeing"), at("blind"), at("chance")
  parts = ['<path d="M0 11H200" stroke="#dfe3e8"/>']
  if seeing is not None and blind is not None:
    parts.append(
      f'<path d="M{blind:.1f} 11H{seeing:.1f}" stroke="#1f5fa8" '
      'stroke-opacity=".35" stroke-width="3"/>'
    )
  if chance is not None:
    parts.append(
      f'<path d="M{chance:.1f} 4v14" stroke="#6b7480" stroke-width="1.5"/>'
    )
  if blind is not None:
    parts.append(
      f'<circle cx="{blind:.1f}" cy="11" r="4.5" fill="#fff" '
      'stroke="#c4692a" stroke-width="2"/>'
    )
  if seeing is not None:
    parts.append(f'<circle cx="{seeing:.1f}" cy="11" r="5" fill="#1f5fa8"/>')
  return f'<svg viewBox="-6 0 212 22" aria-hidden="true">{"".join(parts)}</svg>'


def score_table(rows: Sequence[Mapping]) -> str:
  """A row per question type; rows whose type starts with "VSI" are totals."""
  lines = []
  for row in rows:
    kind = str(row["type"])
    gain = None
    if row.get("seeing") is not None and row.get("blind") is not None:
      gain = row["seeing"] - row["blind"]
    total = ' class="total"' if kind.startswith("VSI") else ""
    lines.append(
      f"<tr{total}><td>{escape(type_name(kind))}</td>"
      f"<td>{percent(row.get('seeing'))}</td>"
      f"<td>{percent(row.get('blind'))}</td>"
      f"<td>{percent(row.get('chance'))}</td>"
      f"<td>{signed(gain)}</td>"
      f'<td>{row.get("count", "")}</td><td class="plot">{dots(row)}</td></tr>'
    )
  return (
    '<div class="wide"><table><thead><tr><th>question type</th>'
    "<th>seeing</th><th>blind</th><th>chance</th><th>gain</th>"
    '<th>questions</th><th class="plot">0 &ndash; 100</th></tr></thead><tbody>'
    + "".join(lines)
    + '</tbody></table></div><p class="key"><small><i style="background:'
    '#1f5fa8;margin-left:0"></i>seeing <i style="border:2px solid #c4692a">'
    '</i>blind: the same text, no images <i style="width:2px;'
    'border-radius:0;background:#6b7480"></i>chance; gain: seeing &minus; '
    "blind</small></p>"
  )


def text_table(title: str, head: Sequence[str], rows: Sequence) -> str:
  def line(cells, tag):
    return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)

  body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
  return (
    f'<h2>{escape(title)}</h2><div class="wide"><table><thead><tr>'
    f"{line(head, 'th')}</tr></thead><tbody>{body}</tbody></table></div>"
  )


def type_name(kind: str) -> str:
  return NAMES.get(kind, kind.replace("_", " "))


def strip(images: Iterable[Any], caption: str, kind: str = "pixels") -> str:
  images = list(images)
  pictures = "".join(
    f'<img alt="frame {i + 1}" src="{data_uri(image)}">'
    for i, image in enumerate(images)
  )
  return (
    f'<div class="strip {kind}" style="--n:{len(images)}">{pictures}</div>'
    f"<figcaption>{caption}</figcaption>"
  )


def depth_caption(near: float, far: float) -> str:
  stops = ",".join(
    "rgb({:.0f} {:.0f} {:.0f})".format(*c) for c in drawing.DEPTH_COLORS
  )
  return (
    f"z-depth: {near:.1f} m"
    f'<span class="bar" style="background:linear-gradient(90deg,{stops})">'
    f"</span>{far:.1f} m"
  )


def room_section(room: Mapping) -> str:
  scene, poses = room["scene"], np.asarray(room["world_from_camera"])
  ids = room.get("object")
  strips = []
  if "rgb" in room:
    strips.append(
      strip(room["rgb"], "frames, in the order the model sees them")
    )
    boxes = []
    for frame, image in enumerate(room["rgb"]):
      shown = None if ids is None else seen(ids[frame], scene)
      boxes.append(
        draw_boxes(
          image, scene, poses[frame], room["intrinsics"], shown, least=384
        )
      )
    strips.append(
      strip(boxes, "oriented boxes of the objects in view", "smooth")
    )
  if "depth" in room:
    near, far = drawing.depth_range(room["depth"])
    strips.append(
      strip(
        [draw_depth(d, near, far) for d in room["depth"]],
        depth_caption(near, far),
      )
    )
  if ids is not None:
    strips.append(strip([draw_ids(i) for i in ids], "instance ids"))
  view = draw_top_view(scene, poses, room.get("fov_degrees", 100.0))
  return (
    f'<section class="room"><h3>{escape(room.get("name", "room"))}</h3>'
    f'<div class="see"><figure>{view}<figcaption>The room from above. Wedges '
    "are the cameras, numbered by frame.</figcaption></figure>"
    f"<figure>{''.join(strips)}</figure></div>"
    f"{questions_table(room.get('questions', ()))}</section>"
  )


def seen(ids: Any, scene: Mapping) -> list[int]:
  """Named objects of which a frame shows at least 1 % of the image."""
  ids = np.asarray(ids)
  found, count = np.unique(ids[ids >= 0], return_counts=True)
  large = set(found[count >= 0.01 * ids.size].tolist())
  return [i for i in drawing.named_objects(scene) if i in large]


def said(answer: Any, question: Mapping, label: str) -> str:
  """An answer with its mark; the letter is followed by what it stands for."""
  if answer is None:
    return f'<td data-of="{label}">&ndash;</td>'
  value = qa.score(
    str(answer), question["ground_truth"], bool(question.get("options"))
  )
  name, mark = ("right", "✓") if value >= 0.5 else ("wrong", "✗")
  text = escape(spell(answer, question))
  if not question.get("options"):
    text += f" <small>({value:.1f})</small>"
  return f'<td class="said {name}" data-of="{label}">{mark} {text}</td>'


def spell(answer: Any, question: Mapping) -> str:
  for option in question.get("options") or ():
    if option.split(".")[0].strip().lower() == str(answer).strip().lower():
      return option
  return f"{answer:g}" if isinstance(answer, float) else str(answer)


def questions_table(questions: Sequence[Mapping]) -> str:
  if not questions:
    return ""
  models = [m for m in ("answer", "blind") if any(m in q for q in questions)]
  heads = {"answer": "seeing", "blind": "blind"}
  lines = []
  for q in questions:
    options = "".join(f"<li>{escape(o)}</li>" for o in q.get("options") or ())
    truth = escape(spell(q["ground_truth"], q))
    lines.append(
      f"<tr><td>{escape(q['question'])}"
      f"{f'<ul>{options}</ul>' if options else ''}</td>"
      f'<td class="said" data-of="truth">{truth}</td>'
      + "".join(said(q.get(m), q, heads[m]) for m in models)
      + "</tr>"
    )
  titles = "".join(f"<th>{heads[m]}</th>" for m in models)
  return (
    '<div class="wide"><table class="qa"><thead><tr><th>question</th>'
    f"<th>truth</th>{titles}</tr></thead><tbody>{''.join(lines)}"
    "</tbody></table></div>"
    + (
      "<small>In brackets: mean relative accuracy of a number, 0 to 1.</small>"
      if models and any(not q.get("options") for q in questions)
      else ""
    )
  )


# --- the page ---------------------------------------------------------------


def page(data: Mapping) -> str:
  """The report as HTML (see the module's docstring for `data`)."""
  unknown = sorted(set(data) - set(SECTIONS))
  if unknown:
    raise ValueError(f"report: unknown entries {unknown}; known: {SECTIONS}")
  parts = [f"<h1>{escape(data['title'])}</h1>"]
  if data.get("lead"):
    parts.append(f'<p class="lead">{escape(data["lead"])}</p>')
  if data.get("headline"):
    parts.append(headline(data["headline"]))
  if data.get("table"):
    parts += ["<h2>Scores by question type</h2>", score_table(data["table"])]
  if data.get("drawings"):
    parts.append(f'<div class="curves-row">{"".join(data["drawings"])}</div>')
  parts += [text_table(*table) for table in data.get("tables", ())]
  parts += [f"<p>{escape(note)}</p>" for note in data.get("notes", ())]
  curves = [
    draw_curves(data.get("runs", {}), key, title)
    for key, title in data.get("curves", [("loss", "training loss")])
  ]
  if any(curves):
    parts.append(
      f'<h2>Training</h2><div class="curves-row">{"".join(curves)}</div>'
    )
  if data.get("rooms"):
    answered = any(
      "answer" in q for room in data["rooms"] for q in room.get("questions", ())
    )
    parts.append(f"<h2>Rooms{' and answers' * answered}</h2>")
    parts += [room_section(room) for room in data["rooms"]]
  if data.get("settings"):
    rows = "".join(
      f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>"
      for k, v in data["settings"].items()
    )
    parts.append(f"<h2>Settings</h2><dl>{rows}</dl>")
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    f"<title>{escape(data['title'])}</title><style>{STYLE}</style></head>"
    f"<body><main>{''.join(parts)}</main></body></html>\n"
  )


def write(path: str | pathlib.Path, data: Mapping) -> pathlib.Path:
  """Writes the report (see the module's docstring for `data`)."""
  path = pathlib.Path(path)
  text = page(data)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text, encoding="utf-8")
  return path


# --- the command ------------------------------------------------------------


def main(config: Any, workdir: str, rooms: int = 4) -> pathlib.Path:
  """The `view` command: a few of the config's rooms, to `workdir/view.html`.

  With `config.data.rgbd` it shows real RGB-D frames instead: see `fusion`.
  """
  if config.data.get("rgbd"):
    from spatial_jax import fusion

    fusion.main(config, workdir)
    return pathlib.Path(workdir) / "view.png"
  source = importlib.import_module(config.data.source).make(config, "test")
  if not hasattr(source, "room"):
    raise ValueError(
      f"view shows rooms of the world, but data.source is "
      f"{config.data.source!r}; choose a config such as configs/demo.py"
    )
  shown = [
    room_data(source.room(i), source, f"room {i}")
    for i in range(min(rooms, len(source)))
  ]
  data = {
    "title": "Rooms and questions",
    "lead": f"The first rooms of the test split of {config.data.source}, "
    "rendered larger than the model sees them.",
    "runs": {config.model_name: metrics.read(workdir)},
    "rooms": shown,
    "settings": dict(config.data.get("world", {})),
  }
  return write(pathlib.Path(workdir) / "view.html", data)


def room_data(room: Any, source: Any, name: str, size: int = 160) -> dict:
  """A room of the world as an entry of `rooms`, rendered anew at `size`."""
  from spatial_jax.world import render

  intrinsics = np.array(source.intrinsics, np.float32)
  intrinsics[:2] *= size / source.image_size
  poses = np.asarray(room.world_from_camera, np.float32)
  shown = render.render(room.scene, poses, intrinsics, size, size)
  focal = float(intrinsics[0, 0])
  return {
    "name": name,
    "scene": room.scene,
    "world_from_camera": poses,
    "intrinsics": intrinsics,
    "fov_degrees": 2 * math.degrees(math.atan(size / 2 / focal)),
    "questions": [q.asdict() for q in room.questions],
    **{key: np.asarray(shown[key]) for key in ("rgb", "depth", "object")},
  }
