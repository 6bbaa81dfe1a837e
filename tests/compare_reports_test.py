"""tools/compare_reports: rows and growth by hand, mistakes in one line."""

import copy
import json

import pytest

from openmoe_jax.command_line import run_main
from openmoe_jax.tools import compare_reports
from openmoe_jax.tpu_slices import GIB

BOUND = {'step_seconds': 2., 'mfu': .5, 'tokens_per_second': 1., 'days': 3., 'chip_hours': 1.}
REPORT = {
    'topology': 'v5p-8', 'chips': 4, 'devices': 4, 'mesh': {'pipe': 1, 'data': 2, 'expert': 2, 'model': 1},
    'batch_size': 64, 'row_length': 128, 'num_microbatches': 2, 'remat': 'full', 'hbm_bytes_per_device': 95 * GIB,
    'train': {'fits': True, 'memory_peak': 40 * GIB, 'memory_total': 45 * GIB, 'flops': {'compiled': 400., 'ratio': 1.25},
              'main_memory_bytes': 70., 'collectives': [{'network': 'ici', 'bytes': 5.}, {'network': 'ici', 'bytes': 3.}],
              'roofline': {'overlap': BOUND, 'no_overlap': {**BOUND, 'step_seconds': 4., 'mfu': .25}, 'limited_by': 'compute'}}}


def larger():
  """Twice the chips, a quarter more over the links."""
  report = copy.deepcopy(REPORT)
  report.update(topology='v5p-16', chips=8, devices=8)
  report['train']['flops']['compiled'] = 800.
  report['train']['collectives'].append({'network': 'ici', 'bytes': 2.})
  return report


def test_rows():
  bad = copy.deepcopy(REPORT)
  bad['train'] = {'fits': False, 'needed_bytes': 100 * GIB}
  lines = compare_reports.table([REPORT, bad]).splitlines()
  assert len({line.count('|') for line in lines}) == 1
  assert lines[2] == ('| v5p-8 | 4 | data 2 x expert 2 | 8,192 | 2 | full | 40.0 of 95 | 45.0 | 1.250 | 2,000 | 4,000 | 0.500 | 0.250 '
                      '| compute | 3.0 | 3.0 |')
  assert 'needs 100.0 of 95' in lines[3]


def test_growth_of_a_chips_costs():
  found = compare_reports.growth([larger(), REPORT])
  assert found == {'FLOPs': [(4, 1.), (8, 1.)], 'bytes of main memory': [(4, 1.), (8, 1.)],
                   'bytes over links': [(4, 1.), (8, 1.25)], 'memory': [(4, 1.), (8, 1.)]}


def test_files(tmp_path, capsys):
  for name, report in (('a', REPORT), ('b', larger())):
    (tmp_path / f'{name}.json').write_text(json.dumps(report))
  compare_reports.main([str(tmp_path / 'a.json'), str(tmp_path / 'b.json'), f'--plot={tmp_path}/growth'])
  out = capsys.readouterr().out
  assert '| v5p-16 | 8 |' in out and f'wrote {tmp_path}/growth.png' in out
  assert (tmp_path / 'growth.png').stat().st_size > 5000


@pytest.mark.parametrize('text, flags, message', (
    (None, [], 'no such file'), (json.dumps({**REPORT, 'train': {'fits': True}}), [], 'written by an older version'), ('{', [], 'is no JSON'), ('{"sweep": []}', [], 'is not the report of one mesh'),
    (json.dumps(REPORT), ['--plot=x.png'], 'needs two reports')))
def test_mistakes_are_one_line(text, flags, message, tmp_path, capsys):
  if text is not None:
    (tmp_path / 'a.json').write_text(text)
  with pytest.raises(SystemExit):
    run_main(compare_reports.main, [str(tmp_path / 'a.json'), *flags])
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and message in lines[0]
