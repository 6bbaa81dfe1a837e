"""The data benchmark runs, its figures agree with each other, and mistakes are one line."""

import json

import pytest

from openmoe_jax.tools import bench_data

pytestmark = pytest.mark.slow  # many programs are compiled, or processes started


def test_figures_agree(capsys, tmp_path):
  written = tmp_path / 'figures.json'
  bench_data.main(['--data_set=demo_prose', '--objectives=ul2,ul2_corrected', '--row_length=128', '--batch_size=2',
                   '--batches=12', '--turns=2', '--tokens_per_second_per_chip=1e6', f'--json={written}'])
  text = capsys.readouterr().out
  found = json.loads(written.read_text())
  assert set(found) == {'ul2', 'ul2_corrected'}
  for own in found.values():
    assert own['tokens'] == pytest.approx(own['fill'] * 2 * 12 * 2 * 128)
    assert 0 < own['useful'] < own['fill'] <= 1 and own['setup_cpu_seconds'] > 0
  old, new = found['ul2'], found['ul2_corrected']
  assert new['fill'] > .98 > old['fill'] and new['useful'] > old['useful']
  assert f'{new["useful"] / old["useful"]:.2f} times the useful tokens per batch' in text
  assert f'ul2_corrected {1e6 * new["fill"] / new["tokens_per_cpu_second"]:.3f}' in text


def test_medians_and_shares_are_over_the_turns():
  turns = [bench_data.Turn(80, 40, 100, 2., 1.), bench_data.Turn(60, 20, 100, 1., 3.),
           bench_data.Turn(100, 60, 100, 1., 2.)]
  own = bench_data.figures(turns, 4.)
  assert own == dict(tokens_per_second=60., tokens_per_cpu_second=50., useful_tokens_per_cpu_second=30., fill=.8,
                     useful=.4, setup_cpu_seconds=4., tokens=240)


@pytest.mark.parametrize('arguments, message', [
    (['--turns=0'], '--turns=0 must be positive'), (['--row_length=7'], '--row_length=7 must be even'),
    (['--objectives=ul3'], "'demo_ul3' is not a registered mixture or task"),
    (['--batch=3'], 'unknown argument --batch'),
    (['--data_set=mix', '--tfds_data_dir=/no/such/folder'], 'is not a folder')])
def test_mistakes_are_one_line(capsys, arguments, message):
  with pytest.raises(SystemExit) as stopped:
    bench_data.main(arguments)
  error = capsys.readouterr().err
  assert stopped.value.code == 2 and message in error and error.count('\n') == 1
