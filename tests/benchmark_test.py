"""tools/benchmark: tiny cases of every section, what is known is not timed again, growth by hand, mistakes in one line."""

import json

import pytest

from openmoe_jax.command_line import run_main
from openmoe_jax.tools import bench_layer, bench_timing, benchmark, benchmark_plots

LAYER = ['--sections=experts,tokens', '--experts=2,4', '--tokens=256', '--backends=sort,einsum', '--repeats=1']


def test_growth_is_relative_to_the_fewest_experts():
  case = lambda dispatch, experts, cost: {'dispatch': dispatch, 'experts': experts, 'microseconds_per_token': cost}
  own = {str(i): case(*of) for i, of in enumerate((('sort', 16, 3.), ('sort', 8, 2.), ('einsum', 8, 5.)))}
  assert benchmark_plots.growth(own) == {'sort': [(16, 1.5), (8, 1.)], 'einsum': [(8, 1.)]}


def test_work_per_token_does_not_depend_on_the_number_of_experts():
  router = lambda case: 3 * case.tokens * 2 * case.emb_dim * case.experts
  found = {(bench_layer.flops_of(case) - router(case)) / case.tokens
           for case in (bench_layer.Case(experts, 256 * experts) for experts in (8, 64, 256))}
  # Forward and backward, one slot a token; kernels of 2 (SwiGLU), 1 and 1 times the hidden width.
  assert found == {3 * 2 * (2 + 1 + 1) * 256 * 1024}


@pytest.mark.parametrize('flags, message', (
    (['--sections=nothing'], "--sections: 'nothing' is not known; valid: experts, tokens"),
    (['--tokens=100'], '100 tokens of the layer must be a multiple of 256'),
    (['--experts=1'], '--experts must be numbers of at least 2'), (['--repeats=0'], '--repeats=0 must be at least 1')))
def test_mistakes_are_one_line(flags, message, tmp_path, capsys):
  with pytest.raises(SystemExit):
    run_main(benchmark.main, [f'--output={tmp_path}', *flags])
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and message in lines[0]


@pytest.mark.slow
def test_layers_are_timed_once(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(bench_timing.MATMUL, 'cpu', 256)
  benchmark.main([f'--output={tmp_path}', *LAYER])
  text = (tmp_path / 'benchmark.json').read_text()
  cases = json.loads(text)['cases']
  assert set(cases['experts']) == {'sort 2', 'sort 4', 'einsum 2', 'einsum 4'} and set(cases['tokens']) == {'sort 256'}
  for case in (*cases['experts'].values(), *cases['tokens'].values()):
    assert case['seconds'] > 0 and case['share_by_wall'] > 0 and case['program_memory_gb'] > 0
  assert (tmp_path / 'cost_growth.png').stat().st_size > 5000
  assert '1 of 5: experts, sort 2' in capsys.readouterr().out
  benchmark.main([f'--output={tmp_path}', *LAYER])
  assert 'of 5:' not in capsys.readouterr().out and (tmp_path / 'benchmark.json').read_text() == text


@pytest.mark.slow
def test_decoding_is_timed(monkeypatch):
  monkeypatch.setitem(bench_timing.MATMUL, 'cpu', 256)
  monkeypatch.setattr(benchmark, '_PROMPT', 4)
  monkeypatch.setattr(benchmark, '_NEW', 4)
  monkeypatch.setattr(benchmark.bench_train_step, 'CONFIG', benchmark.bench_train_step.CONFIG.replace(
      vocab_size=64, emb_dim=16, mlp_dim=16, num_heads=2, head_dim=8, num_layers=2, moe_interval=2, num_experts=4))
  found = benchmark.decode(2, bench_timing.MatrixProduct(), 1)
  assert found['rows'] == 2 and found['tokens_per_second'] > 0
  step = benchmark.bench_train_step.run(benchmark.bench_train_step.CONFIG, 2, 16, bench_timing.MatrixProduct(), 1)
  assert step['tokens_per_second'] > 0 and step['loss'] > 0
