"""The folder that is written: pictures as PNG and SVG with the numbers behind them as csv, and findings.

    DIR/figures.json    {'about': .., 'figures': [{name, paper, section, title, caption, png, svg, csv}, ..]}; tables
                        have csv alone; paths are relative to DIR
    DIR/findings.json   {'findings': [the fields of `Finding`, ..]}; a number that is not known is null
"""

import csv
import io
import json
import math
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np

from openmoe_jax import paths
from openmoe_jax.analysis.plots import styled_pyplot
from openmoe_jax.analysis.resampling import Estimate
from openmoe_jax.config import require

FIGURES, FINDINGS = 'figures.json', 'findings.json'
SECTIONS = ('specialisation', 'context', 'early', 'drops', 'eviction', 'load', 'tables')


class Finding(NamedTuple):
  """A number and what it says.

  Attributes:
    name: what is measured, the same for all layers, steps, policies and domains.
    section: one of `SECTIONS`.
    statement: one sentence with the number and its interval.
    value, low, high: the number and its 95 % interval.
    unit: 'share' is of 1.
    chance: the number that chance would give, where there is one.
    layer, step, policy, domain: None for all of them together, or where it does not apply.
    headline: whether it is among the few that come first.
  """
  name: str
  section: str
  statement: str
  value: float
  low: float
  high: float
  unit: str
  chance: Optional[float] = None
  layer: Optional[int] = None
  step: Optional[int] = None
  policy: Optional[str] = None
  domain: Optional[str] = None
  headline: bool = False


class Report:
  """Collects figures, tables and findings; pictures are written at once, the two lists by `finish`.

  Args:
    folder: where to.
    about: what figures.json says of the recording.
  """

  def __init__(self, folder: paths.PathLike, about: Mapping[str, Any]):
    self._folder, self._about = paths.path(folder), dict(about)
    self.figures: List[Dict[str, str]] = []
    self.findings: List[Finding] = []

  def figure(self, name: str, paper: str, section: str, title: str, caption: str, picture: Callable[[], Any],
             header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Writes a picture, which `picture` draws as a matplotlib figure, and its numbers."""
    entry = self._entry(name, paper, section, title, caption)
    entry.update(png=f'figures/{name}.png', svg=f'figures/{name}.svg', csv=f'figures/{name}.csv')
    pyplot, figure = styled_pyplot(), picture()
    for kind in ('png', 'svg'):
      stream = io.BytesIO()
      # Always the same bytes; the layout leaves no margins to cut off, which would take as long as drawing.
      with pyplot.rc_context({'svg.hashsalt': name, 'savefig.bbox': 'standard'}):
        figure.savefig(stream, format=kind, metadata={'Date': None} if kind == 'svg' else None)
      paths.write_bytes(self._folder / entry[kind], stream.getvalue())
      figure.set_layout_engine('none')  # everything has its place now
    pyplot.close(figure)
    self._csv(entry['csv'], header, rows)

  def table(self, name: str, paper: str, section: str, title: str, caption: str, header: Sequence[str],
            rows: Sequence[Sequence[Any]]) -> None:
    """Writes a table."""
    entry = self._entry(name, paper, section, title, caption)
    entry['csv'] = f'figures/{name}.csv'
    self._csv(entry['csv'], header, rows)

  def finding(self, name: str, section: str, statement: str, estimate: Estimate, unit: str = 'share', **more) -> None:
    """Adds a finding; `more` are its other fields."""
    require(section in SECTIONS, f'section = {section!r} is not known')
    self.findings.append(Finding(name, section, statement, *(float(x) for x in estimate), unit, **more))

  def finish(self, skipped: Sequence[str]) -> None:
    """Writes both lists; `skipped` says in a line each what could not be made."""
    about = {**self._about, 'skipped': list(skipped)}
    paths.write_text(self._folder / FIGURES, _json({'about': about, 'figures': self.figures}))
    paths.write_text(self._folder / FINDINGS, _json({'findings': [finding._asdict() for finding in self.findings]}))

  def _entry(self, name: str, paper: str, section: str, title: str, caption: str) -> Dict[str, str]:
    require(section in SECTIONS, f'section = {section!r} is not known')
    self.figures.append({'name': name, 'paper': paper, 'section': section, 'title': title, 'caption': caption})
    return self.figures[-1]

  def _csv(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator='\n')
    writer.writerow(header)
    writer.writerows([[_cell(cell) for cell in row] for row in rows])
    paths.write_text(self._folder / name, stream.getvalue())


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
  """The mean of figures from the same tokens, such as those of all layers.

  Their errors go together in a way that is not known; the mean of their intervals is as wide as if they were the same,
  which is the widest that it can be.
  """
  return Estimate(*(float(np.mean(column)) for column in zip(*estimates)))


def percent(estimate: Estimate, digits: int = 1) -> str:
  """'12.3 % [11.0, 13.6]' of shares."""
  value, low, high = (f'{100 * x:.{digits}f}' for x in estimate)
  return f'{value} % [{low}, {high}]'


def points(estimate: Estimate, digits: int = 1) -> str:
  """'+1.2 [-0.1, 2.5] percentage points' of a difference of shares."""
  value, low, high = (f'{100 * x:+.{digits}f}' for x in estimate)
  return f'{value} [{low}, {high}] percentage points'


def _cell(value: Any) -> Any:
  if isinstance(value, (float, np.floating)):
    return '' if math.isnan(value) else f'{value:.6g}'
  return value


def _json(value: Any) -> str:
  def plain(x):
    if isinstance(x, dict):
      return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
      return [plain(v) for v in x]
    if isinstance(x, (float, np.floating)):
      return float(x) if math.isfinite(x) else None
    return int(x) if isinstance(x, np.integer) else x
  return json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + '\n'
