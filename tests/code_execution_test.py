"""HumanEval: problems read, programs built, marked and counted. What programs cannot do is tested in sandbox_test."""

import gzip
import itertools
import json
import math
import pathlib

import hypothesis
from hypothesis import strategies
import numpy as np
from openmoe_jax import code_execution
from openmoe_jax import config
import published_data
import pytest

OWN = pathlib.Path(__file__).with_name('data') / 'code_problems.jsonl'
LIMITS = code_execution.Limits(seconds=20., memory_bytes=256 << 20)


@pytest.fixture(scope='module')
def problems():
  return code_execution.read_problems(OWN)


def run(samples, **options):
  return code_execution.run_samples(samples, allow_code_execution=True, **{'limits': LIMITS, **options})


def canonical(problems):
  return [(problem, problem.canonical_solution) for problem in problems.values()]


def test_own_problems(problems):
  right = run(canonical(problems))
  assert [result.task_id for result in right] == list(problems) and len(right) == 5
  assert all(result.passed and result.error == '' and result.seconds > 0 for result in right)
  assert code_execution.pass_rates(right) == {'pass@1': 1.0}
  wrong = run([(problem, '') for problem in problems.values()])
  assert code_execution.pass_rates(wrong) == {'pass@1': 0.0}
  assert all(result.status == 'failed' and result.error for result in wrong)


@pytest.mark.parametrize('solution, rate', [
    pytest.param(True, 1.0, id='canonical'), pytest.param(False, 0.0, id='empty', marks=pytest.mark.slow)])
def test_published_problems(solution, rate):
  problems = code_execution.read_problems(published_data.require_published('HumanEval.jsonl.gz'))
  assert len(problems) == 164
  print(code_execution.isolation().sentence())
  results = run([(problem, problem.canonical_solution if solution else '') for problem in problems.values()])
  assert [result.passed for result in results] == [solution] * 164
  assert code_execution.pass_rates(results) == {'pass@1': rate}


def test_every_way_to_fail(problems):
  problem = problems['Own/0']
  completions = ['  return 1\n', '  return nothing\n', '  return (\n', '  while True:\n    pass\n',
                 '  return [bytearray(1 << 28) for _ in range(100)]\n', '  import os\n  os._exit(0)\n', '\x00',
                 '\ud800']
  results = run([(problem, completion) for completion in completions], limits=code_execution.Limits(
      seconds=2., memory_bytes=256 << 20), workers=4)
  assert [result.status for result in results] == [
      'failed', 'failed', 'failed', 'timed out', 'out of memory', 'failed', 'failed', 'failed']
  assert results[0].error == 'AssertionError'
  assert results[1].error == "NameError: name 'nothing' is not defined"
  assert results[2].error == "SyntaxError: '(' was never closed"
  assert results[3].error == 'still running after 2 s'
  assert not any(result.passed for result in results)


def test_a_completion_cannot_leave_before_its_tests(problems):
  results = run([(problems['Own/0'], f'  return 5\n{line}\n') for line in (
      'raise SystemExit(0)', 'exit(0)', 'def check(candidate): pass', 'if __name__ == "__main__": exit(0)')])
  assert [result.status for result in results] == ['failed'] * 4
  assert results[0].error == 'SystemExit: 0' and results[2].error == 'AssertionError'


def test_results_are_in_the_order_of_samples(problems):
  slow, quick = '  import time\n  time.sleep(.5)\n', ''
  samples = [(problems[f'Own/{i % 5}'], slow if i % 3 == 0 else quick) for i in range(10)]
  results = run(samples, workers=5)
  assert [result.task_id for result in results] == [problem.task_id for problem, _ in samples]
  assert [result.seconds >= .5 for result in results] == [i % 3 == 0 for i in range(10)]


def test_nothing_runs_without_leave(problems, monkeypatch):
  monkeypatch.setattr(code_execution.running, 'run', lambda *args: pytest.fail('code was run'))
  for leave in (False, None, 'yes'):
    with pytest.raises(config.ConfigError, match='--allow_code_execution'):
      code_execution.run_samples(canonical(problems), allow_code_execution=leave)


def test_impossible_requests(problems):
  with pytest.raises(config.ConfigError, match='workers = 0 must be at least 1'):
    run(canonical(problems), workers=0)
  with pytest.raises(config.ConfigError, match='Own/0: a completion is a NoneType, not a string'):
    run([(problems['Own/0'], None)])
  with pytest.raises(config.ConfigError, match='no results'):
    code_execution.pass_rates([])


def test_a_tool_that_stops_working_stops_the_run(problems, monkeypatch):
  def run_one(*args):
    raise code_execution.running.ToolError('seccomp', 'gone')
  monkeypatch.setattr(code_execution.running, 'run', run_one)
  with pytest.raises(code_execution.running.ToolError, match='seccomp: gone'):
    run(canonical(problems))


@hypothesis.given(strategies.integers(1, 8).flatmap(lambda n: strategies.tuples(
    strategies.just(n), strategies.integers(0, n), strategies.integers(1, n))))
def test_pass_at_k_counts_choices(numbers):
  """Against its definition: the share of all choices of k samples that hold one that passed."""
  n, c, k = numbers
  choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
  share = np.mean([any(choice) for choice in choices])
  np.testing.assert_allclose(code_execution.pass_at_k(n, c, k), share, rtol=1e-14)


def test_pass_at_k_of_many_samples():
  # 1 - C(190, 100) / C(200, 100), by whole numbers.
  exact = 1 - math.comb(190, 100) / math.comb(200, 100)
  assert code_execution.pass_at_k(200, 10, 100) == pytest.approx(exact, rel=1e-13)
  assert code_execution.pass_at_k(200, 0, 100) == 0 and code_execution.pass_at_k(200, 200, 1) == 1
  for n, c, k in ((5, 6, 1), (5, 1, 6), (5, 1, 0), (5, -1, 1)):
    with pytest.raises(config.ConfigError, match='k must be between 1 and the number of samples'):
      code_execution.pass_at_k(n, c, k)


def test_rates_are_means_over_problems():
  result = lambda task, status: code_execution.Result(task, status, '', 1.)
  results = [result('a', 'passed')] * 4 + [result('b', 'passed')] + [result('b', 'failed')] * 3
  assert code_execution.pass_rates(results, (1, 2, 5)) == {'pass@1': (1 + .25) / 2, 'pass@2': (1 + .5) / 2}


def test_files_of_problems(tmp_path, problems):
  packed = tmp_path / 'packed.jsonl.gz'
  packed.write_bytes(gzip.compress(OWN.read_bytes()))
  assert code_execution.read_problems(packed) == problems
  lines = OWN.read_text().splitlines()
  record = json.loads(lines[0])
  for text, message in (('', 'has no problems'), ('{', 'line 1: not JSON'), ('[]', "line 1: no text 'task_id'"),
                        (f'{lines[0]}\n\n{lines[0]}', 'line 3: Own/0 is there twice'),
                        (json.dumps({**record, 'test': None}), "line 1: no text 'test'"),
                        (json.dumps({**record, 'entry_point': 'f(); g'}), "entry_point = 'f.*g' is not the name")):
    (tmp_path / 'bad.jsonl').write_text(text)
    with pytest.raises(config.ConfigError, match=message):
      code_execution.read_problems(tmp_path / 'bad.jsonl')
  with pytest.raises(config.ConfigError, match='no such file'):
    code_execution.read_problems(tmp_path / 'none.jsonl')
  (tmp_path / 'bad.jsonl').write_bytes(gzip.compress(OWN.read_bytes())[:-20])
  with pytest.raises(config.ConfigError, match='cannot be read'):
    code_execution.read_problems(tmp_path / 'bad.jsonl')


def test_program_of_a_completion(problems):
  problem = problems['Own/0']
  text = code_execution.program(problem, '  return 0')
  assert text == f'{problem.prompt}  return 0\n{problem.test}\ncheck(largest_gap)\n'
