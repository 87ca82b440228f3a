# SPDX-License-Identifier: Apache-2.0
"""Figures of an analysis: curves and bars as SVG.

Each has a title that says what is shown, named axes and a line that says how to
read it, so that it stands alone. No plotting library; see `drawing`.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from spatial_jax.drawing import INK, LINE_COLORS, MUTED, RULE, ticks

WIDTH, HEIGHT = 640, 360


def _open(title: str, note: str, height: int) -> list[str]:
  """Title above, and how to read it below."""
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" role="img" '
    f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
    'font-family="sans-serif" font-size="12">'
    f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>'
    f'<text x="12" y="22" font-size="15" font-weight="600" fill="{INK}">'
    f"{html.escape(title)}</text>"
  ]
  lines = textwrap.wrap(note, 100)
  parts += [
    f'<text x="12" y="{height - 15 * (len(lines) - i) + 7}" fill="{MUTED}" '
    f'font-size="11.5">{html.escape(line)}</text>'
    for i, line in enumerate(lines)
  ]
  return parts


def _height(note: str) -> int:
  return HEIGHT + 10 + 15 * len(textwrap.wrap(note, 100))


def lines(
  curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  title: str,
  x_label: str,
  y_label: str,
  note: str,
  *,
  dashed: Sequence[str] = (),
  level: tuple[str, float] | None = None,
  low: float | None = None,
  high: float | None = None,
) -> str:
  """Curves by name over one axis.

  Args:
    curves: name -> (x, y).
    note: how to read it.
    dashed: names of controls.
    level: name and height of a horizontal line, such as chance.
    low, high: of the y axis; by default those of the numbers.
  """
  curves = {name: xy for name, xy in curves.items() if len(xy[0])}
  every_x = np.concatenate([np.asarray(x, float) for x, _ in curves.values()])
  every_y = np.concatenate([np.asarray(y, float) for _, y in curves.values()])
  if level:
    every_y = np.append(every_y, level[1])
  low = float(every_y.min()) if low is None else low
  high = float(every_y.max()) if high is None else high
  high = max(high, low + 1e-6)
  height = _height(note)
  left, right, top, bottom = 62, WIDTH - 190, 46, HEIGHT - 46

  def x(value):
    span = max(every_x.max() - every_x.min(), 1e-9)
    return left + (right - left) * (value - every_x.min()) / span

  def y(value):
    return bottom - (bottom - top) * (value - low) / (high - low)

  parts = _open(title, note, height)
  for value in ticks(low, high, 5):
    parts.append(
      f'<path d="M{left} {y(value):.1f}H{right}" stroke="{RULE}"/>'
      f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end" '
      f'fill="{MUTED}">{value:g}</text>'
    )
  for value in ticks(float(every_x.min()), float(every_x.max()), 8):
    parts.append(
      f'<text x="{x(value):.1f}" y="{bottom + 18}" text-anchor="middle" '
      f'fill="{MUTED}">{value:g}</text>'
    )
  middle = (top + bottom) / 2
  parts.append(
    f'<text x="{(left + right) / 2}" y="{bottom + 38}" text-anchor="middle" '
    f'fill="{INK}">{html.escape(x_label)}</text>'
    f'<text transform="rotate(-90 16 {middle})" x="16" y="{middle}" '
    f'text-anchor="middle" fill="{INK}">{html.escape(y_label)}</text>'
  )
  if level:
    parts.append(
      f'<path d="M{left} {y(level[1]):.1f}H{right}" stroke="{MUTED}" '
      f'stroke-dasharray="2 3"/><text x="{right + 6}" '
      f'y="{y(level[1]) + 4:.1f}" fill="{MUTED}">{html.escape(level[0])}</text>'
    )
  for i, (name, (xs, ys)) in enumerate(curves.items()):
    color = LINE_COLORS[i % len(LINE_COLORS)]
    points = [(x(a), y(b)) for a, b in zip(xs, ys, strict=True)]
    dash = ' stroke-dasharray="5 4"' if name in dashed else ""
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    parts.append(
      f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2"{dash}/>'
    )
    parts += [
      f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" fill="{color}"/>'
      for a, b in points
    ]
    at = top + 8 + 34 * i
    parts.append(
      f'<path d="M{right + 16} {at}h22" stroke="{color}" stroke-width="2.5"'
      f"{dash}/>"
    )
    for number, line in enumerate(textwrap.wrap(name, 21)[:2]):
      parts.append(
        f'<text x="{right + 44}" y="{at + 4 + 13 * number}" fill="{INK}">'
        f"{html.escape(line)}</text>"
      )
  return "".join([*parts, "</svg>"])


def bars(
  rows: Mapping[str, Mapping[str, float]],
  title: str,
  x_label: str,
  note: str,
  *,
  level: tuple[str, float] | None = None,
) -> str:
  """Horizontal bars: a group for each row, a bar for each of its columns."""
  names = list(next(iter(rows.values())))
  group = 16 * len(names) + 12
  left, right, top = 230, WIDTH - 50, 66
  bottom = top + group * len(rows)
  height = bottom + 54 + 15 * len(textwrap.wrap(note, 100))

  def x(value):
    return left + (right - left) * float(np.clip(value, 0, 1))

  parts = _open(title, note, height)
  for i, name in enumerate(names):
    color = LINE_COLORS[i % len(LINE_COLORS)]
    parts.append(
      f'<rect x="{12 + 170 * i}" y="38" width="11" height="11" '
      f'fill="{color}"/><text x="{28 + 170 * i}" y="48" fill="{INK}">'
      f"{html.escape(name)}</text>"
    )
  for value in (0, 0.25, 0.5, 0.75, 1):
    parts.append(
      f'<path d="M{x(value)} {top - 6}V{bottom}" stroke="{RULE}"/>'
      f'<text x="{x(value)}" y="{bottom + 16}" text-anchor="middle" '
      f'fill="{MUTED}">{value:g}</text>'
    )
  for i, (name, row) in enumerate(rows.items()):
    at = top + group * i
    parts.append(
      f'<text x="{left - 10}" y="{at + group / 2 - 2}" text-anchor="end" '
      f'fill="{INK}">{html.escape(name)}</text>'
    )
    for number, value in enumerate(row.values()):
      color = LINE_COLORS[number % len(LINE_COLORS)]
      y = at + 16 * number
      parts.append(
        f'<rect x="{left}" y="{y}" width="{x(value) - left:.1f}" height="13" '
        f'fill="{color}"/><text x="{x(value) + 5:.1f}" y="{y + 11}" '
        f'fill="{INK}" font-size="11">{value:.2f}</text>'
      )
  if level:
    parts.append(
      f'<path d="M{x(level[1])} {top - 6}V{bottom}" stroke="{INK}" '
      f'stroke-dasharray="3 3"/><text x="{right}" y="{top - 9}" '
      f'text-anchor="end" fill="{MUTED}" font-size="11">'
      f"{html.escape(level[0])}</text>"
    )
  parts.append(
    f'<text x="{(left + right) / 2}" y="{bottom + 34}" text-anchor="middle" '
    f'fill="{INK}">{html.escape(x_label)}</text>'
  )
  return "".join([*parts, "</svg>"])
