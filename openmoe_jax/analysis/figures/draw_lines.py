"""Curves and dots with their intervals, in small multiples; see `draw` for colours."""

from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from openmoe_jax.analysis.figures.draw import COLOURS, FAINT, GREY, MARKERS, WIDTH, grid, legend, outer_labels, text
from openmoe_jax.analysis.resampling import Estimate

_MOST = len(COLOURS)


class Curve(NamedTuple):
  """A line with its interval: name, x [N], Estimate of arrays [N]; a dashed one is there to compare with."""
  name: str
  x: np.ndarray
  y: Estimate
  dashed: bool = False


class Panel(NamedTuple):
  """A title and its curves."""
  title: str
  curves: Sequence[Curve]


def estimates(own: Sequence[Estimate]) -> Estimate:
  """Estimates of numbers as one of arrays."""
  return Estimate(*(np.asarray(column, float) for column in zip(*own)))


def curves(panels: Sequence[Panel], title: str, x: str, y: str, percent: bool = True, ordered: bool = False,
           markers: bool = False, least_top: float = 0., log: bool = False) -> Any:
  """A panel for each, with the same axes.

  Args:
    panels: with the same names of curves, or some of them.
    title: of the whole.
    x, y: names of the axes, with units.
    percent: whether y is shares, drawn as percentages.
    ordered: whether curves have an order (layers), which colours from dark to light show.
    markers: whether points are marked.
    least_top: the upper end of the y axis is at least this.
    log: whether x is logarithmic (zero included).
  """
  names = list(dict.fromkeys(curve.name for panel in panels for curve in panel.curves if not curve.dashed))
  colours = _colours(panels, names, ordered)
  columns = min(len(panels), 3 if len(panels) != 4 else 2)
  figure, axes = grid(len(panels), columns, (max(WIDTH / columns, 3.), 2.5 if columns < 3 else 2.2), title, sharex=True,
                      sharey=True)
  scale = 100. if percent else 1.
  for axis, panel in zip(axes, panels):
    for curve in sorted(panel.curves, key=lambda c: colours.get(c.name) != FAINT):
      colour = GREY if curve.dashed else colours[curve.name]
      known = np.isfinite(curve.y.value)
      at = curve.x[known]
      value, low, high = (scale * np.asarray(part, float)[known] for part in curve.y)
      marker = MARKERS[names.index(curve.name) % len(MARKERS)] if markers and not curve.dashed else None
      axis.plot(at, value, color=colour, linewidth=1. if colour == FAINT else 1.6, marker=marker, markersize=3.5,
                linestyle=(0, (4, 2)) if curve.dashed else '-', label=text(curve.name))
      if colour != FAINT:
        axis.fill_between(at, low, high, color=colour, alpha=.15 if len(panel.curves) <= 4 else .06, linewidth=0)
    axis.set_title(text(panel.title))
  low, high = axes[0].get_ylim()
  axes[0].set_ylim(min(low, 0.) if low > -.05 * high else low, max(high, least_top * scale, .01 * scale))
  if log:
    smallest = min(float(c.x[c.x > 0].min()) for panel in panels for c in panel.curves if (c.x > 0).any())
    axes[0].set_xscale('symlog', linthresh=smallest)
    axes[0].set_xlim(left=0)
  outer_labels(axes, columns, x, y + (' (%)' if percent else ''))
  _legend(figure, axes, colours)
  return figure


def _colours(panels: Sequence[Panel], names: Sequence[str], ordered: bool) -> Mapping[str, Any]:
  """A colour for each name; where there are too many, for those that change most, and grey for the others."""
  if ordered and len(names) > 3:
    import matplotlib
    palette = matplotlib.colormaps['viridis']
    return {name: matplotlib.colors.to_hex(palette(.88 * i / (len(names) - 1))) for i, name in enumerate(names)}
  if len(names) <= _MOST:
    return dict(zip(names, COLOURS))
  spread = {name: max(float(np.nanmax(c.y.value) - np.nanmin(c.y.value)) for panel in panels for c in panel.curves
                      if c.name == name) for name in names}
  first = sorted(names, key=lambda name: -spread[name])[:_MOST - 1]
  return {name: COLOURS[first.index(name)] if name in first else FAINT for name in names}


def _legend(figure: Any, axes: Sequence[Any], colours: Mapping[str, Any]) -> None:
  handles = {}
  for axis in axes:
    for handle, name in zip(*axis.get_legend_handles_labels()):
      handles.setdefault('others' if colours.get(name) == FAINT else name, handle)
  legend(figure, list(handles.values()), list(handles))


class Dots(NamedTuple):
  """A series of points over categories: name, Estimate of arrays [categories]; chance [categories] as a grey line."""
  name: str
  y: Estimate
  chance: Optional[np.ndarray] = None


def dots(panels: Sequence[Tuple[str, Sequence[Dots]]], categories: Sequence[Any], title: str, x: str, y: str,
         percent: bool = True, top: Optional[float] = None) -> Any:
  """Points with intervals above categories (layers), a panel for each (title, series)."""
  columns = min(len(panels), 4 if len(categories) <= 6 else 2)
  width = max(WIDTH / max(columns, 2), 2.2)
  figure, axes = grid(len(panels), columns, (width, 2.4), title, sharex=True, sharey=True)
  names = list(dict.fromkeys(series.name for _, own in panels for series in own))
  scale = 100. if percent else 1.
  for axis, (name, own) in zip(axes, panels):
    for series in own:
      i = names.index(series.name)
      at = np.arange(len(categories)) + (i - (len(names) - 1) / 2) * .7 / max(len(names), 1)
      value, low, high = (scale * np.asarray(part, float) for part in series.y)
      axis.errorbar(at, value, yerr=np.maximum([value - low, high - value], 0), color=COLOURS[i], fmt=MARKERS[i],
                    markersize=5, elinewidth=1.4, capsize=2.5, label=text(series.name))
      if series.chance is not None:
        axis.hlines(scale * series.chance, at - .3 / len(names), at + .3 / len(names), color=GREY, linewidth=1.6,
                    linestyle=(0, (2, 1)), label='chance')
    axis.set_xticks(np.arange(len(categories)), [text(c) for c in categories])
    axis.set_xlim(-.6, len(categories) - .4)
    axis.grid(axis='x', visible=False)
    axis.set_title(text(name))
    axis.axhline(0., color=GREY, linewidth=.8)
  low, high = axes[0].get_ylim()
  axes[0].set_ylim(min(low, 0.) if low > -.1 * high else low, top * scale if top else high)
  outer_labels(axes, columns, x, y + (' (%)' if percent else ''))
  handles = {}
  for axis in axes:
    for handle, label in zip(*axis.get_legend_handles_labels()):
      handles.setdefault(label, handle)
  legend(figure, list(handles.values()), list(handles))
  return figure


def histograms(panels: Sequence[Tuple[str, Sequence[Tuple[str, np.ndarray]]]], title: str, x: str, y: str) -> Any:
  """Distributions, a panel for each (title, [(name, values)]); the last one of a panel is grey, to compare with."""
  columns = min(len(panels), 3 if len(panels) != 4 else 2)
  figure, axes = grid(len(panels), columns, (max(WIDTH / max(columns, 2), 3.), 2.3), title, sharex=True, sharey=True)
  values = np.concatenate([v for _, own in panels for _, v in own])
  edges = np.linspace(0, max(float(values.max()), 1e-9) * 1.02, 31)
  for axis, (name, own) in zip(axes, panels):
    for i, (label, data) in enumerate(own):
      grey = i == len(own) - 1
      axis.hist(data, edges, weights=np.full(len(data), 100. / max(len(data), 1)), label=text(label), alpha=.75,
                color=FAINT if grey else COLOURS[i], zorder=2 if grey else 3)
    axis.set_title(text(name))
  outer_labels(axes, columns, x, y)
  handles, labels = axes[0].get_legend_handles_labels()
  legend(figure, handles, labels)
  return figure
