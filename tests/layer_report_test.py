"""tools/layer_report: a tiny layer compiled for one TPU chip, growth by hand, mistakes in one line."""

import json

import pytest

from openmoe_jax.command_line import run_main
from openmoe_jax.config import ConfigError
from openmoe_jax.tools import layer_report


def case(dispatch, experts, cost, fits=True):
  values = {'flops_per_token': 3., 'model_flops_per_token': 2., 'bytes_per_token': 10., 'nanoseconds_overlap': cost / 2,
            'nanoseconds_no_overlap': cost, 'unknown': []} if fits else {}
  return {'dispatch': dispatch, 'experts': experts, 'tokens': 256 * experts, 'fits': fits, **values}


def test_growth_is_relative_to_the_fewest_experts():
  cases = [case('sort', 16, 3.), case('sort', 8, 2.), case('einsum', 8, 5.), case('einsum', 16, 0., fits=False)]
  assert layer_report.growth(cases, 'nanoseconds_no_overlap') == {'sort': [(16, 1.5), (8, 1.)], 'einsum': [(8, 1.)]}
  lines = layer_report.table(cases).splitlines()
  assert lines[2].split(' | ')[3:] == ['1.500', '10', '1.5', '3.0', '1.500', '1.500 |'] and 'does not fit' in lines[5]


@pytest.mark.parametrize('flags, message', (
    (['--backends=ragged'], "--backends: 'ragged' is not known; valid: "), (['--experts=1'], 'must be numbers of at least 2'),
    (['--tokens_per_expert=100'], '800 tokens, --experts times --tokens_per_expert, must be a multiple of 256')))
def test_mistakes_are_one_line(flags, message, tmp_path, capsys):
  with pytest.raises(SystemExit):
    run_main(layer_report.main, [f'--output={tmp_path}', *flags])
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and message in lines[0]


@pytest.mark.tpu
def test_a_layer_for_one_chip(tmp_path, capsys):
  layer_report.main([f'--output={tmp_path}', '--experts=2,4', '--tokens_per_expert=128', '--emb_dim=128', '--mlp_dim=256',
                     '--backends=sort,einsum'])
  found = json.loads((tmp_path / 'layer_report.json').read_text())
  assert found['topology'] == 'v5e-1' and (tmp_path / 'layer_report.png').stat().st_size > 5000
  ratios = {(c['dispatch'], c['experts']): c['flops_per_token'] / c['model_flops_per_token'] for c in found['cases']}
  assert ratios.keys() == {('sort', 2), ('sort', 4), ('einsum', 2), ('einsum', 4)}
  for (backend, _), ratio in ratios.items():
    assert (0.95 < ratio < 1.06) if backend == 'sort' else ratio > 1.3
  assert all(not c['unknown'] and c['bytes_per_token'] > 0 for c in found['cases'])
  assert '| sort | 4 | 512 |' in capsys.readouterr().out
  layer_report.main([f'--output={tmp_path}', '--experts=2,4', '--tokens_per_expert=128', '--emb_dim=128', '--mlp_dim=256',
                     '--backends=sort,einsum'])
  assert 'experts ...' not in capsys.readouterr().out  # nothing is compiled again


@pytest.mark.parametrize('text, message', (
    ('{', 'is damaged'), ('{"topology": "v4-8", "cases": []}', 'is of v4-8, this is v5e-1; give another --output')))
def test_files_that_are_there(text, message, tmp_path):
  (tmp_path / 'layer_report.json').write_text(text)
  with pytest.raises(ConfigError, match=message):
    layer_report.read(tmp_path / 'layer_report.json', 'v5e-1')
