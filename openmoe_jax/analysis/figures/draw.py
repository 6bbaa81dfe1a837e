"""Heat maps and radars in small multiples: a panel for each layer, domain or policy. `draw_lines` has curves and dots.

Colours are Okabe and Ito's (2008), which colour-blind people tell apart; a map from blue over white to red where 1 is
the middle; and viridis.
"""

import functools
import math
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from openmoe_jax.analysis.plots import styled_pyplot

COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#5b4a9e', '#000000')
MARKERS = 'osD^vPX*'
GREY, FAINT = '#52606d', '#b8c1cc'
WIDTH = 9.5  # inches
_FONTS = ('DejaVu Sans', 'Noto Sans CJK JP', 'Noto Sans Arabic', 'Noto Sans Hebrew', 'Noto Sans Devanagari')


class Map(NamedTuple):
  """A panel of a heat map: title, values [rows, columns], names of its rows."""
  title: str
  values: np.ndarray
  rows: Sequence[str]


@functools.lru_cache(maxsize=1)
def _fonts() -> List[str]:
  from matplotlib import font_manager
  there = set(font_manager.get_font_names())
  return [name for name in _FONTS if name in there] or ['sans-serif']


def pyplot() -> Any:
  """pyplot with the library's look, small titles of panels, and characters of other scripts."""
  plt = styled_pyplot()
  plt.rcParams.update({'font.size': 9, 'axes.titlesize': 9.5, 'font.family': _fonts(), 'svg.fonttype': 'none'})
  return plt


def grid(count: int, columns: int, size: Tuple[float, float], title: str, **options) -> Tuple[Any, List[Any]]:
  """A figure with `count` axes of `size` inches each; those of the grid that are left over are not shown."""
  columns = max(min(columns, count), 1)
  rows = -(-count // columns)
  figure, axes = pyplot().subplots(rows, columns, figsize=(columns * size[0], rows * size[1] + .5), squeeze=False,
                                   layout='constrained', **options)
  for axis in axes.flat[count:]:
    axis.set_visible(False)
  heading(figure, title)
  return figure, list(axes.flat[:count])


def heading(figure: Any, title: str) -> None:
  figure.suptitle(title, x=.01, ha='left', fontweight='bold', fontsize=11)


def legend(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
  """Below the panels, in lines of the same length; nothing for a single entry."""
  if len(handles) > 1:
    lines = -(-len(handles) // 7)
    figure.legend(handles, labels, loc='outside lower center', ncols=-(-len(handles) // lines), frameon=False,
                  fontsize=8)


def text(value: Any) -> str:
  """Text that is shown as it is: no formulas between dollar signs."""
  return str(value).replace('$', r'\$')


def share_maps(panels: Sequence[Map], title: str, row_name: str, unit: str = 'x equal share',
               column_name: str = 'expert', columns: Optional[Sequence[Any]] = None, square: bool = False) -> Any:
  """Heat maps whose colours are multiples of 1, on a logarithmic scale: white is 1."""
  from matplotlib import colors
  values = np.concatenate([panel.values.ravel() for panel in panels])
  values = values[np.isfinite(values)]
  most = min(max(2., float(np.quantile(values, .995))), 16.)
  norm = colors.LogNorm(vmin=1 / most, vmax=most)
  figure, axes, mesh = _maps(panels, title, row_name, column_name, columns, norm, 'RdBu_r', square,
                             lambda x: np.maximum(x, 1 / most / 4))
  bar = _bar(figure, axes, mesh, extend='both')
  ticks = [t for t in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16) if 1 / most - 1e-9 <= t <= most + 1e-9]
  bar.set_ticks(ticks, labels=[f'{t:g}x' if t >= 1 else f'1/{1 / t:g}x' for t in ticks])
  bar.minorticks_off()
  bar.set_label(unit)
  return figure


def maps(panels: Sequence[Map], title: str, row_name: str, column_name: str, unit: str, limits: Tuple[float, float],
         columns: Optional[Sequence[Any]] = None, numbers: bool = False, square: bool = False,
         colour_map: str = 'viridis') -> Any:
  """Heat maps between two limits; with `numbers` each cell says what it holds, in percent."""
  from matplotlib import colors
  norm = colors.Normalize(*limits)
  figure, axes, mesh = _maps(panels, title, row_name, column_name, columns, norm, colour_map, square, lambda x: x)
  if numbers:
    for axis, panel in zip(axes, panels):
      for (i, j), value in np.ndenumerate(panel.values):
        if np.isfinite(value):
          axis.text(j, i, f'{100 * value:.0f}', ha='center', va='center', fontsize=7.5,
                    color='white' if norm(value) < .6 else 'black')
  bar = _bar(figure, axes, mesh)
  bar.set_label(unit)
  return figure


def _bar(figure: Any, axes: Sequence[Any], mesh: Any, **options) -> Any:
  """A colour bar at the upper right, of the same length in all figures."""
  return figure.colorbar(mesh, ax=axes, shrink=min(1., 2.6 / figure.get_size_inches()[1]), pad=.015, aspect=25,
                         anchor=(0., 1.), **options)


def _maps(panels, title, row_name, column_name, columns, norm, colour_map, square, change):
  import matplotlib
  cells, rows = panels[0].values.shape[1], max(len(panel.rows) for panel in panels)
  labels = max(len(name) for panel in panels for name in panel.rows)
  wide = max(cells * (.17 if len(panels) <= 3 else .1), 1.9) + min(labels, 24) * .06 + .5 if not square else 2.8
  most = max(1, min(int((WIDTH - .8) / wide), len(panels), 4))
  side_by_side = min(range(max(most - 1, 1), most + 1), key=lambda n: (-len(panels) % n, -n))  # few empty places
  width = min((WIDTH - .8) / side_by_side, max(wide * 1.6, 3.4))
  if square:  # rows are what columns are
    width = min(width, 3.4)
  height = width * .82 if square else max(rows * .2, 1.15)
  figure, axes = grid(len(panels), side_by_side, (width + .8 / side_by_side, height + .55), title)
  palette = matplotlib.colormaps[colour_map].with_extremes(bad='#e5e8ec')
  for axis, panel in zip(axes, panels):
    mesh = axis.pcolormesh(np.arange(cells + 1) - .5, np.arange(len(panel.rows) + 1) - .5,
                           change(np.ma.masked_invalid(panel.values)), norm=norm, cmap=palette,
                           edgecolors='white' if cells <= 16 else 'face', linewidth=.5 if cells <= 16 else .1)
    axis.invert_yaxis()
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.set_title(text(panel.title))
    ticks = np.arange(0, cells, 1 if columns is not None else max(1, cells // 8))
    axis.set_xticks(ticks, [text(columns[i]) for i in ticks] if columns is not None else ticks)
    every = max(1, len(panel.rows) // 8) if square and columns is None else 1
    axis.set_yticks(np.arange(0, len(panel.rows), every), [text(name[:24]) for name in panel.rows[::every]], fontsize=8)
    axis.tick_params(length=0)
  outer_labels(axes, side_by_side, column_name, row_name)
  return figure, axes, mesh


def outer_labels(axes: Sequence[Any], columns: int, x: str, y: str) -> None:
  """Names axes where no panel follows below, and at the left."""
  for i, axis in enumerate(axes):
    if i + columns >= len(axes):
      axis.set_xlabel(x)
    if i % columns == 0:
      axis.set_ylabel(y)


def radars(panels: Sequence[Tuple[str, np.ndarray]], title: str, unit: str) -> Any:
  """A radar for each panel (title, values [experts]): spokes are experts, the dashed ring is 1.

  Drawn on plain axes: matplotlib's polar ones take ten times as long.
  """
  count = len(panels[0][1])
  most = max(1.6, max(float(values.max()) for _, values in panels))
  columns = min(len(panels), 4 if len(panels) != 5 else 3)
  figure, axes = grid(len(panels), columns, (WIDTH / max(columns, 3), 2.6), title)
  angles = np.arange(count) * 2 * math.pi / count
  at = lambda radius, angle: (radius * np.sin(angle), radius * np.cos(angle))  # the first expert at the top, clockwise
  closed, circle = np.append(angles, 0.), np.linspace(0, 2 * math.pi, 120)
  between = (count // 16 + .5) * 2 * math.pi / count  # two spokes, where the numbers of rings stand
  rings = [t for t in ((1, 2, 4, 6, 8) if most > 3 else (.5, 1, 1.5, 2, 2.5)) if t <= most]
  for i, (axis, (name, values)) in enumerate(zip(axes, panels)):
    colour, outline = COLOURS[i % (len(COLOURS) - 1)], at(np.append(values, values[0]), closed)
    for ring in (*rings, most):
      axis.plot(*at(ring, circle), color='#c3cad2', linewidth=.5, zorder=1)
    axis.plot(*np.stack([at(0, angles), at(most, angles)]).transpose(1, 0, 2), color='#e1e5ea', linewidth=.5, zorder=1)
    axis.fill(*outline, color=colour, alpha=.25, linewidth=0, zorder=2)
    axis.plot(*outline, color=colour, linewidth=1.5, zorder=3)
    axis.plot(*at(1., circle), color='black', linewidth=.9, linestyle=(0, (4, 2)), zorder=4)
    for ring in rings:
      axis.text(*at(ring, between), f'{ring:g}x', fontsize=6.5, color=GREY, ha='center', va='center', zorder=5)
    for e in range(0, count, -(-count // 16)):
      axis.text(*at(1.12 * most, angles[e]), str(e), fontsize=7.5, ha='center', va='center')
    axis.set(aspect='equal', xlim=(-1.2 * most, 1.2 * most), ylim=(-1.2 * most, 1.2 * most))
    axis.axis('off')
    axis.set_title(text(name), loc='center')
  figure.supxlabel(unit, fontsize=8.5, color=GREY)
  return figure
