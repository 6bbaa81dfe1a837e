"""Figures and findings of recorded routing: routers whose answers are known, the files that are written, mistakes."""

import csv
import functools
import json
import pathlib
import shutil

import numpy as np
import pytest

from openmoe_jax import analyze
from openmoe_jax.analysis.figures import (context, drops, early, eviction, load, pieces, selection, specialisation,
                                          tables)
from openmoe_jax.analysis.figures.report import Report, mean_of
from openmoe_jax.analysis.resampling import Estimate
from openmoe_jax.config import ConfigError
from openmoe_jax.recording import files
from tests import synthetic_recording

DOMAINS = ('demo_code_full_lm', 'demo_prose_full_lm')
POLICIES = ('none', 't5x_train', 'colossalai')
SETTINGS = context.Settings((), (), str)


class Numbers(Report):
  """Keeps the numbers of figures instead of drawing them."""

  def figure(self, name, paper, section, title, caption, picture, header, rows):
    self._entry(name, paper, section, title, caption)
    self.rows = {**getattr(self, 'rows', {}), name: [dict(zip(header, row, strict=True)) for row in rows]}

  def value(self, name, **where):
    found = [f for f in self.findings if f.name == name and all(getattr(f, k) == v for k, v in where.items())]
    assert len(found) == 1, [f for f in self.findings if f.name == name]
    return found[0]


@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
  """Two domains, three policies, three steps."""
  return synthetic_recording.write(tmp_path_factory.mktemp('mixed') / 'routing', steps=(0, 10, 40), names=POLICIES)


@pytest.mark.parametrize('kind, name', [('token', 'token_id'), ('position', 'position'), ('domain', 'domain'),
                                        ('random', None)])
def test_what_decides_is_found(tmp_path, kind, name):
  """Normalised mutual information is 1 for the variable that decides, and 0 for others, which are independent of it."""
  folder = synthetic_recording.write(tmp_path, kind, alike=True, num_layers=2)
  chosen, report = selection.Selection(folder), Numbers(tmp_path / 'out', {})
  context._information(report, chosen)
  rows = {row['variable']: row for row in report.rows['what_decides'] if row['given'] == 'alone'}
  names = {'token_id': 'token id', 'previous_token': 'previous token', 'position': 'position', 'domain': 'domain'}
  for variable, label in names.items():
    if variable == name:
      assert rows[label]['normalized_information'] == pytest.approx(1., abs=1e-6) and rows[label]['p_value'] < .05
    else:
      assert abs(rows[label]['normalized_information']) < .04  # the first id of a row is always 0: of 1 in 64 tokens
  found = report.value('context_independence')
  assert found.headline and (found.value == pytest.approx(1., abs=1e-6)) == (kind == 'token')
  accuracy = report.value('token_id_accuracy')
  assert accuracy.value == 1. if kind == 'token' else accuracy.low < 1.


def test_shares_by_domain(mixed, tmp_path):
  chosen, report = selection.Selection(mixed), Numbers(tmp_path, {})
  specialisation.add(report, chosen)
  assert [f['name'] for f in report.figures] == ['fig05_domains', 'fig05_domains_layer1', 'fig05_domains_layer3']
  tokens = chosen.recording.read(files.Key(40, 'none', DOMAINS[1]), 3, ['expert_0', 'expert_1'])
  of_two = np.mean([tokens['expert_0'] == 2, tokens['expert_1'] == 2])
  row, = [r for r in report.rows['fig05_domains'] if (r['layer'], r['domain'], r['expert']) == (3, 'prose', 2)]
  assert row['relative_share'] == pytest.approx(8 * of_two, rel=1e-12)
  assert report.value('domains_information', layer=1).low > 0


def test_routing_over_training(mixed, tmp_path):
  """The token decides with a probability that rises to a half."""
  chosen, report = selection.Selection(mixed), Numbers(tmp_path, {})
  early.add(report, chosen, SETTINGS)
  headline = report.value('early_routing')
  assert headline.step == 10 and headline.chance < headline.low < headline.value < 1
  assert '25 % of the way' in headline.statement
  first = {(step, domain): chosen.recording.read(files.Key(step, 'none', domain), 1, ['expert_0'])['expert_0']
           for step in (0, 40) for domain in DOMAINS}
  same = np.mean([first[0, domain] == first[40, domain] for domain in DOMAINS])
  assert report.value('agreement_with_last', layer=1, step=0).value == pytest.approx(same, rel=1e-12)
  information = [row['normalized_information'] for row in report.rows['token_id_information_over_training']
                 if row['layer'] == 3]
  assert information == sorted(information) and len(information) == 3
  assert len(report.rows['fig11_token_ids_over_training_layer1']) == early.TOKENS * 3 * 8


def test_drops_and_evictions(mixed, tmp_path):
  chosen, report = selection.Selection(mixed), Numbers(tmp_path, {})
  assert chosen.drop_policies == ['t5x_train', 'colossalai']
  drops.add(report, chosen)
  key = files.Key(40, 't5x_train', DOMAINS[0])
  tokens = chosen.recording.read(key, 1, ['position', 'kept_0', 'kept_1', 'token_slot_1', 'log_prob'])
  row = [r for r in report.rows['fig12_domains_t5x_train'] if (r['layer'], r['domain']) == (1, DOMAINS[0])][0]
  first = tokens['position'] < 4  # 16 bins of 64 positions
  assert row['position'] == 1.5
  assert row['dropped'] == pytest.approx(1 - np.mean([tokens['kept_0'][first], tokens['kept_1'][first]]), rel=1e-12)
  assert report.value('drop_towards_the_end').policy == 'colossalai'
  slopes = [f for f in report.findings if f.name == 'drop_slope' and f.policy == 'colossalai' and f.layer]
  assert len(slopes) == 2 and all(f.low > 0 for f in slopes)  # expert 0 is asked for more and more
  cost = report.value('loss_of_drops', policy='t5x_train')
  assert cost.value == pytest.approx(.2 * sum(2 * report.value('dropped_choices', policy='t5x_train', layer=layer).value
                                              for layer in (1, 3)), rel=1e-3)  # each dropped choice costs 0.2
  eviction.add(report, chosen)
  capacity = chosen.capacity(40, 't5x_train')
  headline = report.value('eviction')
  assert headline.policy == 't5x_train' and 0 < headline.low < headline.value < headline.high
  fates = {r['fate']: r for r in report.rows['eviction_loss'] if r['policy'] == 't5x_train'}
  assert fates['nothing dropped']['loss'] == pytest.approx(0, abs=1e-6)
  assert .2 < fates['evicted only']['loss'] < .41
  one = report.value('evicted_choices', policy='t5x_train', layer=1)
  evicted = [~own['kept_1'] & (own['token_slot_1'] < capacity) for own in (
      chosen.recording.read(key._replace(domain=domain), 1, ['kept_1', 'token_slot_1']) for domain in DOMAINS)]
  assert one.value == pytest.approx(np.mean(np.concatenate(evicted)), rel=1e-12)


def test_models_are_compared(mixed, tmp_path):
  other = synthetic_recording.write(tmp_path / 'tuned', 'random', names=POLICIES)
  chosen = selection.Selection(mixed, selection.Wanted(policies=['t5x_train']))
  tuned = selection.compared(chosen, other, selection.Wanted(policies=['t5x_train']))
  report = Numbers(tmp_path, {})
  drops.add(report, chosen, [tuned])
  labels = {row['recording'] for row in report.rows['fig12_compared_t5x_train']}
  assert labels == {'routing step 40', 'tuned step 100'}
  assert report.value('drop_slope_compared').value < report.value('drop_slope', layer=1).value


def test_load_and_similar_experts(tmp_path):
  folder = synthetic_recording.write(tmp_path, 'domain', domains=('a_x', 'b_x'), num_layers=2)
  chosen, report = selection.Selection(folder), Numbers(tmp_path, {})
  load.add(report, chosen)
  assert report.value('dead_experts')[3:6] == (0., 0., 0.)  # second choices are random: everybody is asked for
  assert report.value('busiest_expert').value == pytest.approx(8 * (.25 + .5 * .5 / 7), rel=.05)
  similarity = {(r['expert'], r['other_expert']): r['similarity'] for r in report.rows['expert_similarity']}
  assert len(similarity) == 28 and similarity[2, 3] > similarity[0, 1]  # the first two serve one domain each


def test_top_tokens(tmp_path):
  folder = synthetic_recording.write(tmp_path, 'token', num_layers=2)
  chosen, report = selection.Selection(folder), Numbers(tmp_path / 'out', {})
  tables.top_tokens(report, chosen, str)
  with open(tmp_path / 'out' / 'figures' / 'table15_top_tokens.csv', encoding='utf-8') as stream:
    lines = list(csv.DictReader(stream))
  own = [line for line in lines if (line['expert'], line['by']) == ('3', 'typical')]
  assert {int(line['token_id']) % 8 for line in own[:6]} == {3}  # these have it as first choice
  line = next(line for line in lines if line['by'] == 'frequent')
  tokens = chosen.read(1, ['expert', 'token_id'])
  count = np.sum((tokens['expert'] == 0) & (tokens['token_id'] == int(line['token_id']))[:, None])
  assert int(line['choices']) == count and float(line['share_of_expert']) == pytest.approx(
      count / np.sum(tokens['expert'] == 0), rel=1e-5)


def test_vocabulary_of_a_recording(mixed, tmp_path):
  chosen = selection.Selection(mixed)
  tokenizer = pieces.recorded(chosen.recording.about)
  name = pieces.namer(tokenizer)
  line_end = tokenizer.piece_to_id('\n')
  assert [name(i) for i in (0, 302, line_end, 8500)] == ['<start>', '␣in', '⏎', '<8500>']
  texts = tables.recorded_texts(chosen, tokenizer)
  assert list(texts) == list(DOMAINS) and len(texts[DOMAINS[0]]) == 40  # a document a row
  count = lambda own, both: [type('C', (tuple,), dict(characters=1, utf8_bytes=8, tokens=4, used=2))((1, 8, 4, 2))] * 2
  report = Numbers(tmp_path, {})
  tables.vocabularies(report, chosen, {'one': tokenizer, 'two': tokenizer}, count)
  assert 'all,1,4,2,2,4,2,2,1,1' in (tmp_path / 'figures' / 'table10_vocabularies.csv').read_text()
  about = {'vocabulary': {**chosen.recording.about['vocabulary'], 'fingerprint': 'x'}}
  with pytest.raises(ConfigError, match="vocabulary '' is not the one that this was recorded with"):
    pieces.recorded(about)


def test_the_token_before():
  table = {'row': np.asarray([0, 0, 0, 1, 1]), 'segment': np.asarray([1, 1, 2, 1, 1]), 'token_id': np.arange(5, 10)}
  assert selection._previous(table).tolist() == [-1, 5, -1, -1, 8]


def test_short_names():
  assert selection.short_names(['demo_code_full_lm', 'demo_prose_full_lm']) == ['code', 'prose']
  assert selection.short_names(['language_c_full_lm', 'language_c_header_full_lm']) == ['c', 'c_header']
  assert selection.short_names(['a_b', 'a_b_c']) == ['b', 'b_c'] and selection.short_names(['a_b']) == ['a_b']


def test_mean_of_estimates():
  assert mean_of([Estimate(1., 0., 2.), Estimate(3., 2., 4.)]) == (2., 1., 3.)


def run(recording, output, *flags):
  analyze.main(['figures', str(recording), f'--output={output}', *flags])


@pytest.mark.slow
def test_files_are_what_the_report_expects(mixed, tmp_path, capsys):
  run(mixed, tmp_path)
  assert "wrote" in capsys.readouterr().out
  figures = json.loads((tmp_path / 'figures.json').read_text())
  findings = json.loads((tmp_path / 'findings.json').read_text())['findings']
  assert figures['about']['domains'] == list(DOMAINS) and figures['about']['steps'] == [0, 10, 40]
  assert figures['about']['model']['num_experts'] == 8 and figures['about']['tokens'] == 2 * 40 * 64
  names = [f['name'] for f in figures['figures']]
  assert len(set(names)) == len(names)
  papers = {f['paper'] for f in figures['figures']}
  assert {f'figure {i}' for i in (5, 9, 10, 11, 12, 13, 14)} | {'table 9', 'table 15', ''} == papers
  for figure in figures['figures']:
    table = figure['paper'].startswith('table') or figure['name'] == 'drops_by_domain'
    kinds = ('csv',) if table else ('png', 'svg', 'csv')
    assert set(figure) == {'name', 'paper', 'section', 'title', 'caption', *kinds}
    for kind in kinds:
      content = (tmp_path / figure[kind]).read_bytes()
      assert content.startswith({'png': b'\x89PNG', 'svg': b'<?xml', 'csv': b''}[kind]) and len(content) > 100
  assert {f['name'] for f in findings if f['headline']} == {'context_independence', 'early_routing',
                                                            'drop_towards_the_end', 'dropless', 'eviction'}
  for finding in findings:
    assert set(finding) == {'name', 'section', 'statement', 'value', 'low', 'high', 'unit', 'chance', 'layer', 'step',
                            'policy', 'domain', 'headline'}
    assert finding['low'] <= finding['value'] + 1e-9 and finding['value'] <= finding['high'] + 1e-9
    assert finding['statement'].endswith('.') and 'nan' not in finding['statement']


def mistake(recording, tmp_path, capsys, *flags):
  with pytest.raises(SystemExit) as stopped:
    run(recording, tmp_path / 'out', *flags)
  error = capsys.readouterr().err
  assert stopped.value.code == 2 and error.count('\n') == 1
  return error


@pytest.mark.parametrize('flags, message', [
    (['--layers=2'], '--layers: 2 is not recorded in'), (['--layers=x'], "--layers=x: 'x' is no whole number"),
    (['--steps=7'], 'there is 0, 10, 40'), (['--policies=t5x_eval'], 'there is none, t5x_train, colossalai'),
    (['--tasks=gsm8k'], '--tasks: gsm8k is not recorded in'), (['--compare=/no/such'], 'holds no recorded routing'),
    (['--positions=64'], '--positions: 64 is beyond the rows, which have 64 positions'),
    (['--token_ids=7'], '--token_ids: 7 does not occur'),
    (['--vocabulary='], "--vocabulary='' is that of the recording"), (['--gin.X=1'], 'takes its configuration from'),
])
def test_mistakes_take_one_line(mixed, tmp_path, capsys, flags, message):
  assert message in mistake(mixed, tmp_path, capsys, *flags)
  assert not (tmp_path / 'out').exists()


def test_recordings_that_cannot_be_shown(mixed, tmp_path, capsys):
  write = functools.partial(synthetic_recording.write, num_layers=2)
  assert 'no recorded routing' in mistake(tmp_path, tmp_path, capsys)
  dense = write(tmp_path / 'dense', rows=8)
  about = json.loads((tmp_path / 'dense' / 'recording.json').read_text())
  about['model']['num_experts'] = 0
  (tmp_path / 'dense' / 'recording.json').write_text(json.dumps(about))
  assert 'this model has no sparse layers' in mistake(dense, tmp_path, capsys)
  few = write(tmp_path / 'few', rows=4, domains=DOMAINS[:1])
  assert 'demo_code_full_lm has 4 rows at step 100; statistics need at least 8' in mistake(few, tmp_path, capsys)
  other = write(tmp_path / 'other', num_experts=4)
  error = mistake(mixed, tmp_path, capsys, f'--compare={other}')
  assert 'is of another model: ModelConfig.num_layers = 2, that of' in error
  part = files.Key(100, 'none', DOMAINS[0]).folder() + '/part-00000.parquet'
  parts, foreign = write(tmp_path / 'parts'), write(tmp_path / 'foreign', moe_interval=1)
  shutil.copy(pathlib.Path(foreign) / part, pathlib.Path(parts) / part)
  error = mistake(parts, tmp_path, capsys)
  assert 'holds files of another model: layer 0, expert 7, where layer 1 of 8 experts' in error
