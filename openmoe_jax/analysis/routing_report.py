"""One HTML file of what `openmoe-analyze figures` wrote: findings, figures by section, tables, and what they are of.

The file holds its pictures and loads nothing. Everything that comes from files is escaped: tokens are often HTML.
"""

import base64
import csv
import html
import io
import json
import math
import re
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import openmoe_jax
from openmoe_jax import paths
from openmoe_jax.analysis.figures.report import FIGURES, FINDINGS
from openmoe_jax.analysis.report_style import CSS
from openmoe_jax.config import ConfigError, require

REPORT = 'report.html'
# In the order of the report; `tables` comes last.
SECTIONS = {
    'specialisation': 'Specialisation of experts',
    'context': 'Token or context',
    'early': 'Routing over training',
    'drops': 'Dropped tokens',
    'eviction': 'Places taken by later tokens',
    'load': 'Load of experts',
    'tables': 'Tables',
}
# What figures.json says about the recording, in the order of the report; anything else follows under its own name.
_ABOUT = ('checkpoint', 'model', 'recordings', 'steps', 'policies', 'domains', 'tokens')
_LARGEST_SVG = 400_000  # bytes; of a picture with more the PNG is smaller
_MOST_ROWS = 200  # of a table; the rest stays in its file
_NUMBER = re.compile(r'(-?[0-9][0-9,]*(\.[0-9]+)?(e[-+]?[0-9]+)?|nan|-|)')
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write(folder: paths.PathLike) -> str:
  """Writes report.html into a folder of figures; returns its path.

  Args:
    folder: what `openmoe-analyze figures` wrote; local or gs://.

  Raises:
    ConfigError: it holds no figures, or a file that is damaged or missing.
  """
  folder = paths.path(folder)
  figures = _read(folder / FIGURES)
  findings = _read(folder / FINDINGS).get('findings', [])
  file = folder / REPORT
  try:
    text = page(folder, figures.get('about', {}), figures.get('figures', []), findings)
  except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
    raise ConfigError(f'{folder}: {FIGURES} or {FINDINGS} is damaged: {type(error).__name__} {error}') from error
  paths.write_text(file, text)
  return str(file)


def _read(file: Any) -> Dict[str, Any]:
  require(file.exists(), f'{file.parent} holds no figures: there is no {file.name}; `openmoe-analyze figures` writes '
          'it')
  try:
    found = json.loads(file.read_text())
  except ValueError as error:
    raise ConfigError(f'{file} is damaged: {error}') from error
  require(isinstance(found, dict), f'{file} is damaged: it holds no object')
  return found


def page(folder: Any, about: Mapping[str, Any], figures: Sequence[Mapping[str, Any]],
         findings: Sequence[Mapping[str, Any]]) -> str:
  """The whole report; `folder` is where the paths of the figures begin."""
  names = [name for name in SECTIONS if any(_section(figure) == name for figure in figures)]
  links = [('findings', 'Findings'), *((name, SECTIONS[name]) for name in names), ('numbers', 'All findings'),
           ('about', 'What this is of')]
  parts = [
      '<header>', f'<h1>{_text(_title(about))}</h1>', f'<p class="soft">{_text(_summary(about))}</p>', '<nav>',
      *(f'<a href="#{name}">{_text(title)}</a>' for name, title in links), '</nav>', '</header>', '<main>',
      *_section_of('findings', 'Findings', _headlines(findings))]
  for name in names:
    own = [figure for figure in figures if _section(figure) == name]
    body = [line for figure in own for line in _figure(folder, figure)]
    parts += _section_of(name, SECTIONS[name], [*_more_findings(findings, name), *body])
  parts += _section_of('numbers', 'All findings', _finding_table(findings))
  parts += _section_of('about', 'What this is of', _about(about))
  parts += ['</main>']
  head = ['<!DOCTYPE html>', '<html lang="en">', '<head>', '<meta charset="utf-8">',
          '<meta name="viewport" content="width=device-width, initial-scale=1">',
          f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">', '<link rel="icon" href="data:,">',
          f'<title>{_text(_title(about))}</title>', f'<style>{CSS}</style>', '</head>', '<body>']
  return '\n'.join([*head, *parts, '</body>', '</html>', ''])


def _section(figure: Mapping[str, Any]) -> str:
  """Figures of a section that is not known stand among the tables, at the end."""
  return figure['section'] if figure['section'] in SECTIONS else 'tables'


def _section_of(name: str, title: str, body: Sequence[str]) -> List[str]:
  return [f'<section id="{name}">', f'<h2>{_text(title)}</h2>', *body, '</section>']


# What it is of.


def _title(about: Mapping[str, Any]) -> str:
  name = str(about.get('checkpoint') or '').rstrip('/').rpartition('/')[2]
  return f'Routing of {name}' if name else 'Routing'


def _summary(about: Mapping[str, Any]) -> str:
  """'openmoe_jax 0.1.0 · steps 0, 1200 · ...'."""
  return ' · '.join([f'openmoe_jax {_version(about)}', *(f'{name} {plain(about[name])}'
                                                         for name in ('steps', 'policies', 'domains', 'tokens')
                                                         if about.get(name))])


def _version(about: Mapping[str, Any]) -> str:
  return str(about.get('version') or openmoe_jax.__version__)


def _about(about: Mapping[str, Any]) -> List[str]:
  names = [name for name in dict.fromkeys([*_ABOUT, *about])
           if name != 'version' and about.get(name) not in (None, [], '')]
  rows = [(name.replace('_', ' '), plain(about[name])) for name in names]
  rows.append(('version', f'openmoe_jax {_version(about)}'))
  return ['<dl>', *(f'<dt>{_text(name)}</dt><dd>{_text(value)}</dd>' for name, value in rows), '</dl>']


def plain(value: Any) -> str:
  """A value of figures.json as a reader wants it."""
  if isinstance(value, Mapping):
    return ', '.join(f'{name.replace("_", " ") if isinstance(name, str) else name} {plain(own)}'
                     for name, own in value.items())
  if isinstance(value, (list, tuple)):
    return ', '.join(map(plain, value))
  if isinstance(value, bool) or value is None:
    return {True: 'yes', False: 'no', None: '-'}[value]
  return number(value) if isinstance(value, (int, float)) else str(value)


def number(value: float) -> str:
  """Whole numbers in full, others with four digits."""
  if not math.isfinite(value):
    return '-'
  return f'{value:,}' if isinstance(value, int) else f'{value:.4g}'


# Findings.


def _headlines(findings: Sequence[Mapping[str, Any]]) -> List[str]:
  found = [finding for finding in findings if finding.get('headline')] or list(findings[:5])
  if not found:
    return ['<p>None were found.</p>']
  items = [f'<li><p>{_text(finding["statement"])}</p><div class="soft">{_text(_where(finding))}</div></li>'
           for finding in found]
  return ['<ul class="findings">', *items, '</ul>']


def _where(finding: Mapping[str, Any]) -> str:
  """'chance 0.125 · layer 3 · step 1,200 · policy none'."""
  names = ('chance', 'layer', 'step', 'policy', 'domain')
  return ' · '.join(f'{name} {plain(finding[name])}' for name in names if finding.get(name) is not None)


def _more_findings(findings: Sequence[Mapping[str, Any]], section: str) -> List[str]:
  """Those of a section that do not stand at the top."""
  own = [finding for finding in findings if finding['section'] == section and not finding.get('headline')]
  if not own:
    return []
  return ['<details>', f'<summary>{len(own)} more findings</summary>', '<ul>',
          *(f'<li>{_text(finding["statement"])}</li>' for finding in own), '</ul>', '</details>']


def _finding_table(findings: Sequence[Mapping[str, Any]]) -> List[str]:
  columns = ('name', 'value', 'low', 'high', 'unit', 'chance', 'layer', 'step', 'policy', 'domain')
  rows = [[plain(finding.get(name)) for name in columns] for finding in findings]
  return table(columns, rows, 'Each with its 95 % interval (low, high) and, where there is one, what chance gives. '
               f'The sentences stand in {FINDINGS}.')


# Figures and tables.


def _figure(folder: Any, figure: Mapping[str, Any]) -> List[str]:
  """A picture with its caption and its numbers; or a table, which has no picture."""
  paper = f' ({figure["paper"]} of the paper)' if figure.get('paper') else ''
  title = f'<h3>{_text(figure["title"] + paper)}</h3>'
  rows = _csv(folder, figure['csv']) if figure.get('csv') else None
  if not (figure.get('svg') or figure.get('png')):
    caption = figure.get('caption', '')
    return [f'<div id="{_text(figure["name"])}">', title, *table(*rows, caption, figure['csv']), '</div>']
  image = _picture(folder, figure)
  lines = [f'<figure id="{_text(figure["name"])}">', title,
           f'<div class="wide picture" tabindex="0"><img alt="{_text(figure["title"])}" src="{image}"></div>',
           f'<figcaption>{_text(figure.get("caption", ""))}</figcaption>']
  if rows:
    lines += ['<details>', '<summary>Its numbers</summary>', *table(*rows, '', figure['csv']), '</details>']
  return [*lines, '</figure>']


def _picture(folder: Any, figure: Mapping[str, Any]) -> str:
  """The data URI of a figure. As an image, not in the page: an SVG's ids and scripts are then its own."""
  if figure.get('svg'):
    content = _bytes(folder, figure['svg'])
    if len(content) <= _LARGEST_SVG or not figure.get('png'):
      return f'data:image/svg+xml;base64,{base64.b64encode(content).decode()}'
  return f'data:image/png;base64,{base64.b64encode(_bytes(folder, figure["png"])).decode()}'


def _bytes(folder: Any, name: str) -> bytes:
  file = folder / name
  require(file.exists(), f'{file} is missing, which {FIGURES} names; `openmoe-analyze figures` writes it again')
  return file.read_bytes()


def _csv(folder: Any, name: str) -> Tuple[Sequence[str], List[Sequence[str]]]:
  """Heading and rows of a CSV file."""
  rows = list(csv.reader(io.StringIO(_bytes(folder, name).decode(), newline='')))
  require(bool(rows), f'{folder / name} is empty')
  return rows[0], rows[1:]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = '', file: str = '') -> List[str]:
  """A table that scrolls sideways; of a long one the first rows, and the name of the file with all."""
  shown = rows[:_MOST_ROWS]
  if len(rows) > len(shown):
    caption = f'{caption} The first {len(shown):,} of {len(rows):,} rows; {file} has all.'.strip()
  # A column of tokens may hold '1e5' or 'nan' too: only where all are numbers they are shown as such.
  numeric = [all(_NUMBER.fullmatch(row[i]) for row in rows if i < len(row)) for i in range(len(columns))]
  head = ''.join(f'<th{" class=number" * own}>{_text(name.replace("_", " "))}</th>'
                 for name, own in zip(columns, numeric))
  body = [f'<tr>{"".join(_cell(value, own) for value, own in zip(row, numeric))}</tr>' for row in shown]
  return ['<div class="wide" tabindex="0">', '<table>', *([f'<caption>{_text(caption)}</caption>'] if caption else []),
          f'<thead><tr>{head}</tr></thead>', '<tbody>', *body, '</tbody>', '</table>', '</div>']


def _cell(value: str, numeric: bool) -> str:
  if numeric:
    fraction = set(value) & set('.e') and value != '-'
    return f'<td class="number">{_text(number(float(value)) if fraction else value)}</td>'
  return f'<td{" class=text" if len(value) > 40 else ""}>{_text(value)}</td>'


def _text(value: str) -> str:
  return html.escape(value, quote=True)
