"""A radar picture: several models' scores, one axis a category."""

import math
from typing import Mapping

import numpy as np

from openmoe_jax import paths
from openmoe_jax.analysis import plots
from openmoe_jax.config import require


def radar_figure(scores: Mapping[str, Mapping[str, float]], highest: float = 10., title: str = ''):
  """A closed line for each model; a matplotlib figure.

  Args:
    scores: {model: {category: score}}, scores from 0 to `highest`. Where a model lacks a category that others have, its
      line is open.
    highest: the outermost ring.
    title: above the picture.

  Raises:
    ConfigError: fewer than three categories, which make no area; more models than there are colours.
  """
  categories = list(dict.fromkeys(name for own in scores.values() for name in own))
  require(len(categories) >= 3, f'a radar needs at least three categories; there are {len(categories)}')
  most = len(plots.COLOURS)
  require(len(scores) <= most, f'a radar shows at most {most} models; there are {len(scores)}')
  pyplot = plots.styled_pyplot()
  figure = pyplot.figure(figsize=(8.5, 6.), layout='constrained')
  axes = figure.add_subplot(polar=True)
  axes.set_theta_offset(math.pi / 2)  # the first category at the top, the others clockwise
  axes.set_theta_direction(-1)
  angles = np.arange(len(categories)) * 2 * math.pi / len(categories)
  closed = np.append(angles, angles[0])
  for colour, (model, own) in zip(plots.COLOURS, scores.items()):
    values = np.array([own.get(name, math.nan) for name in categories])
    axes.plot(closed, np.append(values, values[0]), color=colour, linewidth=1.8, marker='o', markersize=3.5,
              label=f'{model}  {np.nanmean(values):.2f}')
    if len(scores) <= 3 and not np.isnan(values).any():  # more areas would only cover each other
      axes.fill(closed, np.append(values, values[0]), color=colour, alpha=.08)
  axes.set_ylim(0, highest)
  axes.set_yticks(np.linspace(0, highest, 6)[1:])
  axes.set_yticklabels([f'{tick:g}' for tick in np.linspace(0, highest, 6)[1:]], fontsize=8, color='#52606d')
  axes.set_rlabel_position(math.degrees(angles[1]) / 2)  # between two axes, where no line passes a number
  axes.set_xticks(angles, categories)
  for label, angle in zip(axes.get_xticklabels(), angles):
    side = math.sin(angle)
    label.set_horizontalalignment('center' if abs(side) < .1 else 'left' if side > 0 else 'right')
  axes.spines['polar'].set_alpha(.25)
  figure.legend(loc='outside right upper', frameon=False, title='mean of the categories', alignment='left')
  if title:
    figure.suptitle(title, x=.01, ha='left', fontweight='bold')
  return figure


def write_radar(file: paths.PathLike, scores: Mapping[str, Mapping[str, float]], **options) -> None:
  """Writes `radar_figure` as a PNG file."""
  plots.write_figure(radar_figure(scores, **options), file)
