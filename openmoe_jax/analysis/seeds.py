"""Several ways of training, each with several seeds: means, intervals over seeds, and differences within seeds.

A result is a dictionary with 'variant', 'seed' and figures. Where the same seed means the same initialisation and the
same data for every variant, differences within seeds leave out what the seed alone does: their intervals are narrower.
"""

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np
from scipy import stats

from openmoe_jax.analysis.resampling import Estimate

Result = Mapping[str, Any]


class Summary(NamedTuple):
  """One figure of one variant.

  Attributes:
    mean: over its seeds, with the 95 % interval.
    difference: to the baseline, over the seeds that both have; None for the baseline itself.
    seeds: how many went into the mean.
  """
  mean: Estimate
  difference: Optional[Estimate]
  seeds: int


def interval(values: Sequence[float]) -> Estimate:
  """Mean of independent values and its 95 % interval by Student's t; of a single value the ends are NaN."""
  values = np.asarray(values, np.float64)
  if len(values) < 2:
    return Estimate(float(values.mean()), np.nan, np.nan)
  half = stats.t.ppf(.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
  return Estimate(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


def summarise(results: Sequence[Result], figure: str, baseline: str) -> Dict[str, Summary]:
  """{variant: Summary} of one figure, in the order in which variants come; results without the figure are left out."""
  values: Dict[str, Dict[int, float]] = {}
  for result in results:
    if result.get(figure) is not None:
      values.setdefault(result['variant'], {})[result['seed']] = float(result[figure])
  summaries = {}
  for variant, own in values.items():
    pairs = [own[seed] - values[baseline][seed] for seed in own if seed in values.get(baseline, {})]
    difference = interval(pairs) if pairs and variant != baseline else None
    summaries[variant] = Summary(interval(list(own.values())), difference, len(own))
  return summaries


def sign(difference: Estimate) -> str:
  """'+' or '-' where the interval leaves out 0, 'o' where it does not."""
  return '+' if difference.low > 0 else '-' if difference.high < 0 else 'o'


def table(results: Sequence[Result], columns: Mapping[str, str], baseline: str, digits: int = 3,
          counted: str = 'seeds') -> List[str]:
  """A Markdown table: a row a variant; of each figure the mean ± half of its interval, then the difference to the
  baseline, bold where its interval leaves out 0.

  Args:
    columns: {figure: title}.
    counted: what a variant has several of.
  """
  found = {figure: summarise(results, figure, baseline) for figure in columns}
  variants = list(dict.fromkeys(result['variant'] for result in results))
  seeds = lambda variant: sum(result['variant'] == variant for result in results)
  titles = [cell for title in columns.values() for cell in (title, f'minus {baseline}')]
  lines = [f'| variant | {counted} | {" | ".join(titles)} |', '|---' * (2 + len(titles)) + '|']
  for variant in variants:
    cells = [f'`{variant}`', str(seeds(variant))]
    for figure in columns:
      own = found[figure].get(variant)
      cells += [_cell(own.mean, digits), _difference(own.difference, digits)] if own else ['', '']
    lines.append(f'| {" | ".join(cells)} |')
  return lines


def _cell(estimate: Estimate, digits: int, plus: str = '') -> str:
  half = '' if np.isnan(estimate.low) else f' ± {(estimate.high - estimate.low) / 2:.{digits}f}'
  return f'{estimate.value:{plus}.{digits}f}{half}'


def _difference(estimate: Optional[Estimate], digits: int) -> str:
  if estimate is None:
    return ''
  text = _cell(estimate, digits, '+')
  return f'**{text}**' if sign(estimate) != 'o' else text


# Pictures.


def difference_figure(results: Sequence[Result], columns: Mapping[str, str], baseline: str, xlabel: str) -> Any:
  """A panel a figure: for every variant the difference to the baseline, each seed a dot, and the interval."""
  from openmoe_jax.analysis.plots import COLOURS, styled_pyplot
  pyplot = styled_pyplot()
  variants = [variant for variant in dict.fromkeys(result['variant'] for result in results) if variant != baseline]
  figure, axes = pyplot.subplots(1, len(columns), figsize=(2.2 + 2.7 * len(columns), 1.2 + .3 * len(variants)),
                                 sharey=True, squeeze=False, layout='constrained')
  for axis, (name, title) in zip(axes[0], columns.items()):
    summaries = summarise(results, name, baseline)
    values = {(r['variant'], r['seed']): r[name] for r in results if r.get(name) is not None}
    axis.axvline(0, color='#52606d', linewidth=1.)
    for height, variant in enumerate(variants):
      if variant not in summaries or summaries[variant].difference is None:
        continue
      value, low, high = summaries[variant].difference
      colour = COLOURS[1] if low > 0 else COLOURS[2] if high < 0 else '#52606d'
      dots = [value - values[baseline, seed] for (own, seed), value in values.items()
              if own == variant and (baseline, seed) in values]
      axis.plot(dots, [height] * len(dots), linestyle='', marker='o', markersize=3.5, color=colour, alpha=.4)
      axis.plot([low, high], [height, height], color=colour, linewidth=1.6)
      axis.plot([value], [height], marker='|', markersize=11, color=colour)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(xlabel)
  axes[0, 0].set_yticks(range(len(variants)), variants)
  axes[0, 0].invert_yaxis()
  return figure


def curve_figure(results: Sequence[Result], curve: str, title: str, xlabel: str) -> Any:
  """A panel a variant: the mean over seeds of a curve [points], with its interval; those without one are left out."""
  from openmoe_jax.analysis.plots import COLOURS, styled_pyplot
  pyplot = styled_pyplot()
  curves: Dict[str, List[Any]] = {}
  for result in results:
    if result.get(curve) is not None:
      curves.setdefault(result['variant'], []).append(result[curve])
  columns = min(len(curves), 4)
  rows = -(-len(curves) // columns)
  figure, axes = pyplot.subplots(rows, columns, figsize=(2.4 * columns + .6, 1.7 * rows + .6), sharex=True, sharey=True,
                                 squeeze=False, layout='constrained')
  for axis, (variant, own) in zip(axes.flat, curves.items()):
    value, low, high = np.asarray([interval(column) for column in np.asarray(own).T]).T
    at = (np.arange(len(value)) + .5) / len(value)
    axis.fill_between(at, low, high, color=COLOURS[0], alpha=.2, linewidth=0)
    axis.plot(at, value, color=COLOURS[0], linewidth=1.6)
    axis.set_title(variant, fontsize=9)
  for axis in list(axes.flat)[len(curves):]:
    axis.set_visible(False)
  top = axes[0, 0].get_ylim()[1]
  axes[0, 0].set_ylim(-.04 * top, top)  # a line at 0 is seen
  figure.supxlabel(xlabel, fontsize=9)
  figure.suptitle(title, x=.01, ha='left', fontweight='bold')
  return figure
