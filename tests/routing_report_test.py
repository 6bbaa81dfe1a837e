"""The report: one file that loads nothing, in which what comes from data stays text."""

import base64
import html.parser
import json

import pytest

from openmoe_jax import analyze
from openmoe_jax.analysis import routing_report

PNG = base64.b64decode('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==')
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"><script>alert(1)</script></svg>'
TOKEN = '<script>alert("&")</script>'
FIGURES = [
    {'name': 'fig09_tokens', 'paper': 'figure 9', 'section': 'specialisation', 'title': f'Tokens like {TOKEN}',
     'caption': f'The token {TOKEN}.', 'svg': 'fig09_tokens.svg', 'png': 'fig09_tokens.png', 'csv': 'fig09_tokens.csv'},
    {'name': 'load', 'paper': '', 'section': 'load', 'title': 'Load', 'caption': '', 'png': 'load.png'},
    {'name': 'table_tokens', 'paper': 'table 6', 'section': 'tables', 'title': 'Favourites', 'caption': 'Of each expert.',
     'csv': 'fig09_tokens.csv'}]
FINDINGS = [
    {'name': 'token_dependence', 'section': 'context', 'statement': 'The token id explains 51 % [49, 53] of the expert.',
     'value': .51, 'low': .49, 'high': .53, 'unit': 'share', 'chance': 0., 'layer': 3, 'step': 1200, 'policy': 'none',
     'domain': None, 'headline': True},
    {'name': 'load_balance', 'section': 'load', 'statement': f'Expert 2 likes {TOKEN}.', 'value': 2, 'low': None,
     'high': float('nan'), 'unit': '', 'chance': None, 'layer': 1, 'step': 1200, 'policy': 'none', 'domain': 'a_b',
     'headline': False}]
ABOUT = {'checkpoint': '/runs/<demo>', 'model': {'num_experts': 8, 'emb_dim': 128}, 'recordings': ['routing'], 'skipped': [],
         'steps': [0, 1200], 'policies': ['none', 't5x_eval'], 'domains': ['code', 'prose'], 'tokens': 32768}
VOID = {'meta', 'link', 'img', 'br'}


class Page(html.parser.HTMLParser):
  """Elements with their attributes, the text of each, and whether every element was closed."""

  def __init__(self, text):
    super().__init__()
    self.elements, self.text, self.open = [], {}, []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if data.strip():
      self.text.setdefault(self.open[-1], []).append(data)

  def all(self, tag):
    return [attributes for name, attributes in self.elements if name == tag]


def folder(path, figures=None, findings=None, rows=()):
  path.mkdir(exist_ok=True)
  (path / 'figures.json').write_text(json.dumps({'about': ABOUT, 'figures': FIGURES if figures is None else figures}))
  (path / 'findings.json').write_text(json.dumps({'findings': FINDINGS if findings is None else findings}))
  (path / 'fig09_tokens.svg').write_bytes(SVG)
  (path / 'fig09_tokens.png').write_bytes(PNG)
  (path / 'load.png').write_bytes(PNG)
  quoted = TOKEN.replace('"', '""')
  (path / 'fig09_tokens.csv').write_text('\n'.join(['token,top_share,count', f'"{quoted}",0.123456,1200', 'nan,1e-05,7',
                                                    *rows]) + '\n')
  return path


def report(path):
  analyze.main(['report', str(path)])
  return (path / 'report.html').read_text()


def test_a_report_is_one_file_and_what_is_data_stays_text(tmp_path, capsys):
  text = report(folder(tmp_path / 'figures'))
  assert capsys.readouterr().out == f'wrote {tmp_path}/figures/report.html\n'
  page = Page(text)
  assert not page.all('script') and '<script' not in text
  assert [a for _, a in page.elements if 'src' in a and not a['src'].startswith('data:')] == []
  assert all(a['href'].startswith(('#', 'data:')) for _, a in page.elements if 'href' in a)
  assert 'url(' not in text and '@import' not in text and 'http:' not in text and 'https:' not in text
  policy, = (a['content'] for a in page.all('meta') if 'http-equiv' in a)
  assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
  assert page.text['h1'] == ['Routing of <demo>'] and f'The token {TOKEN}.' in page.text['figcaption']
  cells = page.text['td']
  assert TOKEN in cells and 'nan' in cells  # a token, not a number
  assert {'0.1235', '1200', '1e-05', '0.51', '0.53'} <= set(cells)
  ids = {a['id'] for _, a in page.elements if 'id' in a}
  assert {a['href'][1:] for a in page.all('a')} <= ids


def test_findings_first_then_figures_then_tables(tmp_path):
  page = Page(report(folder(tmp_path / 'figures')))
  assert page.text['h2'] == ['Findings', routing_report.SECTIONS['specialisation'], routing_report.SECTIONS['load'],
                             'Tables', 'All findings', 'What this is of']
  assert page.text['h3'] == [f'Tokens like {TOKEN} (figure 9 of the paper)', 'Load', 'Favourites (table 6 of the paper)']
  assert page.text['p'][1:] == [FINDINGS[0]['statement']]
  assert page.text['div'] == ['chance 0 · layer 3 · step 1,200 · policy none']
  assert page.text['li'] == [FINDINGS[1]['statement']]
  images = [a['src'].split(',', 1) for a in page.all('img')]
  assert [kind for kind, _ in images] == ['data:image/svg+xml;base64', 'data:image/png;base64']
  assert [base64.b64decode(content) for _, content in images] == [SVG, PNG]
  about = dict(zip(page.text['dt'], page.text['dd']))
  assert about['steps'] == '0, 1,200' and about['model'] == 'num experts 8, emb dim 128' and about['tokens'] == '32,768'
  assert about['version'].startswith('openmoe_jax ') and 'skipped' not in about


def test_a_large_svg_gives_way_to_its_png_and_a_long_table_to_its_file(tmp_path, monkeypatch):
  monkeypatch.setattr(routing_report, '_LARGEST_SVG', 10)
  page = Page(report(folder(tmp_path / 'figures', rows=[f't{i},.5,{i}' for i in range(250)])))
  assert all(a['src'].startswith('data:image/png') for a in page.all('img'))
  assert 'Of each expert. The first 200 of 252 rows; fig09_tokens.csv has all.' in page.text['caption']
  assert 't197' in page.text['td'] and 't198' not in page.text['td']


@pytest.mark.parametrize('damage, message', [
    (lambda path: (path / 'figures.json').unlink(), 'holds no figures: there is no figures.json; `openmoe-analyze figures`'),
    (lambda path: (path / 'findings.json').write_text('{'), 'findings.json is damaged: '),
    (lambda path: (path / 'load.png').unlink(), 'load.png is missing, which figures.json names'),
    (lambda path: folder(path, findings=[{'name': 'x'}]), "is damaged: KeyError 'statement'"),
    (lambda path: (path / 'fig09_tokens.csv').write_text(''), 'fig09_tokens.csv is empty'),
])
def test_mistakes_take_one_line(tmp_path, capsys, damage, message):
  path = folder(tmp_path / 'figures')
  damage(path)
  with pytest.raises(SystemExit) as stopped:
    report(path)
  error = capsys.readouterr().err
  assert stopped.value.code == 2 and message in error and error.count('\n') == 1
