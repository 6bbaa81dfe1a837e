"""The study of routers: statistics over seeds by hand, equal FLOPs, and a tiny study that is killed and goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax import gin_utils
from openmoe_jax.analysis import flops, seeds
from openmoe_jax.model import variables
from openmoe_jax.tools import router_speed, router_study
from openmoe_jax.tools.router_variants import VARIANTS, dense_twin, model_of
from openmoe_jax.train_state import init_params
from openmoe_jax.train_step import make_eval_step
from tests import tiny_run

TINY = ['--steps=8', '--warmup=4', '--batches=2', '--seeds=0,1', '--variants=default,dropless,frozen_after_warmup',
        '--domains=language_c,language_markdown', '--speed_rounds=2', "--gin.TASK_FEATURE_LENGTHS={'targets': 64}",
        '--gin.GROUP_SIZE=64', '--gin.ModelConfig.emb_dim=16', '--gin.ModelConfig.mlp_dim=16',
        '--gin.ModelConfig.num_heads=2', '--gin.ModelConfig.head_dim=8', '--gin.ModelConfig.num_layers=2',
        '--gin.ModelConfig.num_experts=4']


def results(**values):
  """[{variant, seed, x}] from the values of each variant, by seed."""
  return [{'variant': name, 'seed': seed, 'x': x} for name, own in values.items() for seed, x in enumerate(own)]


def demo():
  return gin_utils.load_run_config(['recipes/demo.gin'], ['MODEL_DIR=none'])


def test_interval_by_hand():
  """1, 2, 3: standard deviation 1; the 97.5 % quantile of t with 2 degrees of freedom is 4.30265 (any table)."""
  value, low, high = seeds.interval([1., 2., 3.])
  assert value == 2
  np.testing.assert_allclose([low, high], [2 - 4.30265 / 3 ** .5, 2 + 4.30265 / 3 ** .5], rtol=1e-5)
  assert np.isnan(seeds.interval([1.]).low)


def test_differences_are_within_seeds():
  """Seeds that differ much, and a difference that is nearly the same in all: only the pairs show it."""
  found = seeds.summarise(results(base=[1., 5., 9.], other=[1.1, 5.2, 9.3, 77.]), 'x', 'base')
  assert found['base'].difference is None and found['other'].seeds == 4
  value, low, high = found['other'].difference  # .1, .2, .3 of the three seeds that both have
  half = .1 * 4.30265 / 3 ** .5
  np.testing.assert_allclose([value, low, high], [.2, .2 - half, .2 + half], rtol=1e-5)


@pytest.mark.parametrize('other, cell', (
    ([1.3, 2.31, 3.29], '**+0.300 ± 0.025**'), ([.7, 1.69, 2.71], '**-0.300 ± 0.025**'),
    ([1.1, 2.2, 3.3], '+0.200 ± 0.248')))
def test_table_says_what_leaves_out_nought(other, cell):
  lines = seeds.table(results(base=[1., 2., 3.], other=other), {'x': 'figure'}, 'base')
  assert lines[0] == '| variant | seeds | figure | minus base |'
  assert lines[2] == '| `base` | 3 | 2.000 ± 2.484 |  |'
  assert lines[3].endswith(f' | {cell} |')


def test_a_variant_without_a_figure_has_empty_cells():
  lines = seeds.table([*results(base=[1., 2.]), {'variant': 'dense', 'seed': 0}], {'x': 'figure'}, 'base')
  assert lines[3] == '| `dense` | 1 |  |  |'


@pytest.mark.parametrize('experts, slots', (('trained', 1.25), ('chosen', 2)))
def test_dense_twins(experts, slots):
  """Of four layers two have an MLP, two have an extra MLP and experts. A unit of width costs 2 * D * 4 FLOPs in a
  layer, a router 2 * D * 8: as much as two units of one layer."""
  model = demo().model
  width = (2 + 2 * (1 + slots)) * model.mlp_dim / 4 + 2 * 2 / 4
  twin = dense_twin(model, 256, 4, experts)
  assert width == twin.mlp_dim and twin.num_experts == 0 and twin.num_layers == 4
  if experts == 'trained':
    assert flops.train_flops_per_token(twin, 256, 4) == flops.train_flops_per_token(model, 256, 4)


def test_variants_differ_in_what_they_say():
  run = demo()
  assert model_of(run, VARIANTS['default']) == run.model
  models = [model_of(run, variant) for variant in VARIANTS.values()]
  assert len(set(models)) == len(models) - 2  # conversations and freezing come during training


@pytest.mark.parametrize('flag, message', (
    ('--variants=default,sorted', "'sorted' is not known; valid: default, capacity_times_k"),
    ('--seeds=0,0', '--seeds=0,0 must be different whole numbers'), ('--seeds=a', '--seeds=a must be'),
    ('--steps=3', '--steps=3 must be at least 4'), ('--warmup=300', '--warmup=300 must be at least 1 and less'),
    ('--batches=1', '--batches=1 must be at least 2'), ('--speed_rounds=-1', '--speed_rounds=-1 must not be'),
    ('--mt_bench=nowhere', 'nowhere: no such file'), ('--domain=x', 'unknown argument --domain'),
    ('--gin.ModelConfig.num_experts=0', 'the study is of models with experts')))
def test_mistakes_are_one_line(flag, message, capsys, tmp_path):
  with pytest.raises(SystemExit) as stop:
    router_study.main([f'--output={tmp_path / "out"}', flag])
  text = capsys.readouterr().err
  assert stop.value.code == 2 and message in text and text.count('\n') == 1
  assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_passes_against_the_evaluation_step():
  """Losses and drops of passes over batches are those that evaluation and training report."""
  config = tiny_run.MODEL.replace(num_layers=4)
  params = jax.jit(init_params, static_argnums=0)(config, 0)
  ids = np.random.default_rng(0).integers(3, 500, (2, 8, 33)).astype(np.int32)
  batches = [{'decoder_input_tokens': x[:, :-1], 'decoder_target_tokens': x[:, 1:]} for x in ids]
  got = router_study.run_over(config, variables(params), batches)
  assert got.kept.shape == got.expert.shape == (2, 16, 32, 2) and got.is_token.all()
  step = make_eval_step(config)
  sums = [step(params, {name: jnp.asarray(x) for name, x in batch.items()}) for batch in batches]
  loss = sum(float(s['cross_ent_loss']) for s in sums) / (2 * 8 * 32)
  np.testing.assert_allclose(-got.log_prob.mean(dtype=np.float64), loss, rtol=1e-6)
  behind = sum(float(s['fraction_tokens_left_behind']) for s in sums) / (2 * 8 * 32)
  np.testing.assert_allclose((~got.kept).all(axis=-1).mean(), behind, rtol=1e-6)
  training = router_study.run_over(config, variables(params), batches, train=True)
  assert training.kept.sum() < got.kept.sum()  # capacity factors 1.25 and 2


def _without_times(result):
  return {name: value for name, value in result.items() if 'seconds' not in name}


def _read(folder):
  return {file.name: _without_times(json.loads(file.read_text())) for file in (folder / 'runs').iterdir()}


@pytest.mark.exhaustive
def test_a_study_is_killed_and_goes_on(tmp_path, capsys):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  command = [sys.executable, '-m', 'openmoe_jax.tools.router_study', f'--output={killed}', *TINY]
  process = subprocess.Popen(command, env=tiny_run.environment(8), stdout=subprocess.DEVNULL)
  try:
    deadline = time.monotonic() + 500
    while not (killed / 'runs').is_dir() or not os.listdir(killed / 'runs'):
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(.05)
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  there = len(_read(killed))
  router_study.main([f'--output={whole}', *TINY])
  assert 1 <= there < 6
  capsys.readouterr()
  router_study.main([f'--output={killed}', *TINY])
  out = capsys.readouterr().out
  assert out.count('loss in domain 8') + out.count('loss in domain 9') == 6 - there  # the others were there
  found = _read(whole)
  assert found == _read(killed) and len(found) == 6

  for seed in (0, 1):
    default, dropless, frozen = (found[f'{name}_{seed}.json']
                                 for name in ('default', 'dropless', 'frozen_after_warmup'))
    assert dropless['drop'] == 0 and not any(dropless['drop_by_position']) and default['drop'] > .37
    assert default['losses'][0] == pytest.approx(dropless['losses'][0], abs=.01)  # the same start and batches
    assert default['losses'][:4] == frozen['losses'][:4] and default['losses'][4:] != frozen['losses'][4:]
    assert frozen['kappa'] == 1 and default['tokens'] == 8 * 4 * 64
  assert found['default_0.json']['losses'] != found['default_1.json']['losses']

  # Reports: everything is there, and a second call only reads.
  names = {'results.csv', 'summary.json', 'tables.md', 'losses.png', 'drops.png', router_speed.FILE, 'study.json'}
  assert names <= set(os.listdir(killed))
  summary = json.loads((killed / 'summary.json').read_text())
  assert summary['drop']['dropless']['mean'] == [0, 0, 0] and summary['cpu_seconds']['default']['seeds'] == 2
  assert summary['loss_in']['dropless']['difference'][0] == pytest.approx(
      np.mean([found[f'dropless_{s}.json']['loss_in'] - found[f'default_{s}.json']['loss_in'] for s in (0, 1)]))
  assert len((killed / 'results.csv').read_text().splitlines()) == 7
  began = time.monotonic()
  router_study.main([f'--output={killed}', *TINY])
  assert time.monotonic() - began < 20
  with pytest.raises(SystemExit):
    router_study.main([f'--output={killed}', *TINY, '--steps=9'])
  assert 'holds a study with other settings (steps)' in capsys.readouterr().err
