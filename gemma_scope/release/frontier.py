"""The sparsity-fidelity frontier of a collection, as one picture.

Small multiples, a panel for each place: rows are types and kinds of site,
columns are layers; FVU on one side, delta loss on the other (below, where there
are many layers). Both axes are logarithmic, as in Gemma Scope
(arXiv 2408.05147, figure 5). A line is one width and architecture: dark to
light as width grows, or a colour each where there are only architectures to
tell apart; their marker and dashes differ too. The bars are 95 % intervals; the
grey dashes are the strongest control, an untrained dictionary of the same
sparsity. Lower and further left is better.

matplotlib is imported when something is drawn, and only its file-writing
canvas: no display, no global state. Equal rows give equal bytes.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Sequence

from gemma_scope import files, sites
from gemma_scope.release import table

_PANEL = (1.55, 1.30)  # inches
_COLUMNS = 6
_MARKERS = 'osD^vP*X<>'
_DASHES = ('-', ':', '-.', (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)))
# Okabe and Ito's, told apart by every eye; black is the text's.
_COLOURS = (
  *('#0072b2', '#d55e00', '#009e73', '#cc79a7'),
  *('#e69f00', '#56b4e9', '#8c510a', '#5e3c99', '#b2182b', '#4d4d4d'),
)
_GREY = '#8a8a8a'
_INK = '#222222'
_STYLE = {
  'font.family': 'sans-serif',
  'font.sans-serif': ['DejaVu Sans'],
  'font.size': 7,
  'axes.labelsize': 7,
  'axes.titlesize': 7,
  'axes.edgecolor': '#666666',
  'axes.labelcolor': _INK,
  'axes.linewidth': 0.6,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'xtick.color': '#666666',
  'ytick.color': '#666666',
  'xtick.labelcolor': _INK,
  'ytick.labelcolor': _INK,
  'xtick.labelsize': 6,
  'ytick.labelsize': 6,
  'legend.fontsize': 7,
  'svg.hashsalt': 'gemma_scope',
}
_MEASURES = (('fvu', 'FVU'), ('delta_loss', 'Delta loss (nats per token)'))


def has_points(row: table.Row) -> bool:
  """Whether a row has what a point needs: an L0 above 0 and an FVU."""
  metrics = row[1] or {}
  l0 = table.value(metrics.get('l0'))
  return bool(l0 and l0 > 0) and table.value(metrics.get('fvu')) is not None


def frontier(path: str | os.PathLike[str], rows: Sequence[table.Row]):
  """Draws the frontier; the suffix of `path` (.png, .svg, .pdf) is its format.

  Args:
    path: the picture; one that is there is replaced.
    rows: (card, metrics) pairs; those without a measured L0 are left out.

  Raises:
    ValueError: no row has anything to draw.
  """
  rows = [(card, table.comparable(metrics)) for card, metrics in rows]
  rows = sorted((row for row in rows if has_points(row)), key=table.order)
  if not rows:
    raise ValueError(
      'A frontier needs at least one member with a measured L0 and FVU.'
    )
  import matplotlib
  from matplotlib import figure

  path = pathlib.Path(path)
  grid = _grid([sites.wiring_of(card) for card, _ in rows])
  lines, columns = len(grid), max(len(line) for line in grid)
  side_by_side = columns <= 3
  with matplotlib.rc_context(_STYLE):
    picture = figure.Figure(
      figsize=(
        (2 if side_by_side else 1) * columns * _PANEL[0] + 0.9,
        (1 if side_by_side else 2) * lines * _PANEL[1] + 0.9,
      ),
      layout='constrained',
    )
    subfigures = picture.subfigures(
      *((1, 2) if side_by_side else (2, 1)), wspace=0.04
    )
    looks = _looks(rows)
    for subfigure, (key, label) in zip(subfigures, _MEASURES, strict=True):
      if key == 'fvu' and any(table.has_rule(metrics) for _, metrics in rows):
        label = 'FVU without outlier tokens'
      _draw(subfigure, grid, rows, (key, label), looks)
    _legend(picture, looks, any(table.control(metrics) for _, metrics in rows))
    metadata = {'.png': {'Software': None}, '.svg': {'Date': None}}
    metadata['.pdf'] = {'CreationDate': None}
    with files.whole_file(path) as file:
      picture.savefig(
        file,
        format=path.suffix[1:],
        dpi=200,
        metadata=metadata.get(path.suffix, {}),
      )


def _line_of(wiring: sites.Wiring) -> tuple[str, ...]:
  """Places of one line of panels, hence of one scale, share this."""
  return wiring.type, wiring.kind, wiring.targets[0].kind


def _grid(wirings: Sequence[sites.Wiring]) -> list[list[sites.Wiring]]:
  """Panels: a line of layers for each kind, long lines broken evenly."""
  lines = {}
  for wiring in sorted(set(wirings), key=sites.wiring_order):
    lines.setdefault(_line_of(wiring), []).append(wiring)
  longest = max(len(line) for line in lines.values())
  columns = math.ceil(longest / math.ceil(longest / _COLUMNS))
  return [
    line[i : i + columns]
    for line in lines.values()
    for i in range(0, len(line), columns)
  ]


def _title(wiring: sites.Wiring) -> str:
  if wiring.type == 'sae':
    return f'{wiring.kind}, layer {wiring.layers()}'
  separator = '\n' if wiring.several else '/'  # layers may be many
  return f'{wiring.type} {wiring.kind}{separator}{wiring.layers()}'


def _looks(rows: Sequence[table.Row]) -> dict[tuple[int, str], dict]:
  """(width, architecture) -> its colour, marker and dashes."""
  from matplotlib import colormaps

  keys = sorted({_look(card) for card, _ in rows})
  widths = sorted({width for width, _ in keys})
  architectures = sorted({architecture for _, architecture in keys})
  several = len(architectures) > 1
  looks = {}
  for width, architecture in keys:
    rank, number = widths.index(width), architectures.index(architecture)
    # viridis without its palest end, which white paper swallows.
    colour = colormaps['viridis'](0.12 + 0.66 * rank / max(len(widths) - 1, 1))
    name = f'{sites.width_name(width)} latents'
    label = f'{name}, {architecture}' if several else name
    if len(widths) == 1 and several:
      colour, label = _COLOURS[number % len(_COLOURS)], architecture
    looks[width, architecture] = {
      'color': colour,
      'marker': _MARKERS[(number if several else rank) % len(_MARKERS)],
      'markerfacecolor': 'white' if number % 2 else colour,
      'linestyle': _DASHES[number % len(_DASHES)],
      'label': label,
    }
  return looks


def _look(card: dict) -> tuple[int, str]:
  return card['width'], table.architecture(card)


def _draw(subfigure, grid, rows, measure, looks):
  """One measure: a panel for each place; equal kinds get equal scales."""
  key, label = measure
  columns = max(map(len, grid))
  axes = subfigure.subplots(
    len(grid), columns, sharex=True, sharey='row', squeeze=False
  )
  logarithmic = all(
    (number := table.value(figures.get(key))) is None or number > 0
    for _, metrics in rows
    for figures in (metrics, table.control(metrics))
  )
  for r, line in enumerate(grid):
    for c in range(columns):
      panel = axes[r, c]
      if c >= len(line):
        panel.set_axis_off()
        continue
      rows_here = [row for row in rows if sites.wiring_of(row[0]) == line[c]]
      _panel(panel, rows_here, key, looks)
      panel.set_title(_title(line[c]), pad=3)
      _scales(panel, logarithmic)
      if r == len(grid) - 1 or c >= len(grid[r + 1]):
        panel.tick_params(labelbottom=True)
  for r, line in enumerate(grid):
    # FVU means the same everywhere; nats lost do so within a kind only.
    limits = [
      axes[candidate, 0].get_ylim()
      for candidate in range(len(grid))
      if key == 'fvu' or _line_of(grid[candidate][0]) == _line_of(line[0])
    ]
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    if key == 'fvu':  # 1 is the mean vector alone: keep it in sight
      low, high = (low if logarithmic else min(low, 0)), max(high, 1.12)
    axes[r, 0].set_ylim(low, high)
  subfigure.supxlabel('L0 (active latents per token)', fontsize=7, color=_INK)
  subfigure.supylabel(label, fontsize=7, color=_INK)


def _panel(panel, rows, key, looks):
  """A line for each (width, architecture, seed), and its control."""
  groups = {}
  for card, metrics in rows:
    group_key = (_look(card), str(card.get('seed')))
    groups.setdefault(group_key, []).append(metrics)
  for (look, _), group_metrics in groups.items():
    control_points = [
      _point(table.control(metrics), key, metrics) for metrics in group_metrics
    ]
    control_points = sorted(point for point in control_points if point)
    if control_points:
      panel.plot(
        *list(zip(*control_points, strict=True))[:2],
        color=_GREY,
        linewidth=0.9,
        linestyle=(0, (4, 2)),
        marker=looks[look]['marker'],
        markersize=2.2,
        markerfacecolor='white',
        markeredgewidth=0.6,
        zorder=1,
      )
    points = sorted(
      point
      for point in (_point(metrics, key, metrics) for metrics in group_metrics)
      if point
    )
    if not points:
      continue
    l0, values, low, high = zip(*points, strict=True)
    panel.vlines(l0, low, high, color=looks[look]['color'], lw=0.8, zorder=2)
    style = {
      name: value for name, value in looks[look].items() if name != 'label'
    }
    panel.plot(
      l0,
      values,
      linewidth=1.1,
      markersize=3,
      markeredgewidth=0.7,
      zorder=3,
      **style,
    )


def _point(figures, key, member) -> tuple[float, float, float, float] | None:
  """(L0, value, low, high); a control without its own L0 takes its member's."""
  value = table.value(figures.get(key))
  l0 = table.value(figures.get('l0')) or table.value(member.get('l0'))
  if value is None or not l0 or l0 <= 0:
    return None
  metric = figures[key] if isinstance(figures[key], dict) else {}
  low, high = (
    table.value(metric.get('low')),
    table.value(metric.get('high')),
  )
  return l0, value, value if low is None else low, high or value


def _scales(panel, logarithmic: bool):
  from matplotlib import ticker

  panel.set_xscale('log')
  panel.margins(x=0.09, y=0.07)
  panel.grid(True, which='major', color='#e6e6e6', linewidth=0.5)
  panel.set_axisbelow(True)
  panel.tick_params(which='both', width=0.5, length=2)
  log_axes = [panel.xaxis]
  if logarithmic:
    panel.set_yscale('log')
    log_axes.append(panel.yaxis)
  else:
    panel.axhline(0, color='#b0b0b0', linewidth=0.6, zorder=0)
  for axis in log_axes:
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=5))
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f'{x:g}'))
    axis.set_minor_formatter(ticker.NullFormatter())


def _legend(picture, looks, has_control: bool):
  from matplotlib import lines

  handles = [
    lines.Line2D([], [], linewidth=1.1, markersize=3.5, **look)
    for look in looks.values()
  ]
  if has_control:
    handles.append(
      lines.Line2D(
        [],
        [],
        color=_GREY,
        linestyle=(0, (4, 2)),
        linewidth=0.9,
        label='strongest untrained control',
      )
    )
  longest_label = max(len(handle.get_label()) for handle in handles)
  columns_that_fit = int(
    picture.get_figwidth() / (0.4 + 0.043 * longest_label)
  )  # inches
  picture.legend(
    handles=handles,
    loc='outside upper center',
    ncols=max(1, min(len(handles), columns_that_fit, 5)),
    frameon=False,
    handlelength=2.4,
  )
