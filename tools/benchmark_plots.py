"""How costs grow with sizes, drawn from benchmark.json."""

from typing import Any, Callable, Dict, Iterable, List

import numpy as np

from openmoe_jax import paths
from openmoe_jax.analysis.plots import COLOURS, styled_pyplot, write_figure


def write(found: Dict[str, Any], folder: paths.PathLike) -> List[str]:
  """Writes cost_growth.png if there is anything to draw; returns what was written."""
  cases = found['cases']
  panels = [panel for panel in (_experts(cases), _tokens(cases), _lengths(cases)) if panel]
  if not panels:
    return []
  pyplot = styled_pyplot()
  figure, axes = pyplot.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.8), squeeze=False, layout='constrained')
  for axis, (title, unit, label, curves) in zip(axes[0], panels):
    draw_curves(axis, curves, unit, label)
    axis.tick_params(axis='x', labelrotation=30)
    axis.set_title(title, fontsize=10)
  figure.suptitle(f'How costs grow: {found["device"]}', x=.01, ha='left', fontweight='bold')
  return write_figure(figure, paths.path(folder) / 'cost_growth.png')


def draw_curves(axis: Any, curves: Dict[str, List[tuple]], unit: str, label: str) -> None:
  """Draws {name: [(size, cost)]} over sizes in powers of two."""
  for colour, (name, points) in zip(COLOURS, sorted(curves.items())):
    x, y = np.array(sorted(points)).T
    axis.plot(x, y, color=colour, marker='o', markersize=4, label=name)
  axis.set_xscale('log', base=2)
  axis.set_xticks(sorted({x for points in curves.values() for x, _ in points}))
  axis.xaxis.set_major_formatter(lambda x, _: f'{x:,.0f}')
  axis.set_ylim(0, 1.08 * max((y for points in curves.values() for _, y in points), default=1))
  axis.set_xlabel(unit)
  axis.set_ylabel(label)
  axis.legend(fontsize=8)


def draw_picture(file: paths.PathLike, curves: Dict[str, List[tuple]], unit: str, label: str, title: str) -> str:
  """Writes a picture of such curves alone; returns its path."""
  figure, axis = styled_pyplot().subplots(figsize=(5.6, 3.8), layout='constrained')
  draw_curves(axis, curves, unit, label)
  axis.set_title(title, loc='left', fontweight='bold')
  return write_figure(figure, file)[0]


def cost(case: Dict[str, Any]) -> float:
  """Of a token, in CPU-microseconds on a CPU, which other programs disturb least, else in microseconds."""
  return case['cpu_microseconds_per_token' if 'share_by_cpu_seconds' in case else 'microseconds_per_token']


def growth(own: Dict[str, Dict[str, Any]]) -> Dict[str, List[tuple]]:
  """{back end: [(experts, cost of a token over that of the fewest experts)]}."""
  return growth_of(own.values(), cost)


def growth_of(cases: Iterable[Dict[str, Any]], cost_of: Callable[[Dict[str, Any]], float]) -> Dict[str, List[tuple]]:
  """`growth` by any cost of a case."""
  curves: Dict[str, List[tuple]] = {}
  for case in cases:
    curves.setdefault(case['dispatch'], []).append((case['experts'], cost_of(case)))
  return {name: [(x, y / min(points)[1]) for x, y in points] for name, points in curves.items()}


def _experts(cases):
  own = cases.get('experts')
  return own and ('MoE layer, as many tokens an expert', 'experts', 'cost of a token / that of the fewest experts',
                  growth(own))


def _tokens(cases):
  own = cases.get('tokens')
  return own and ('MoE layer, 16 experts', 'tokens', 'microseconds a token',
                  {'sort': [(case['tokens'], cost(case)) for case in own.values()]})


def _lengths(cases):
  own = cases.get('lengths')
  return own and ('Training step, as many tokens', 'length of a row', 'tokens a second',
                  {'sort': [(case['length'], case['tokens_per_second']) for case in own.values()]})
