"""Evaluation tasks during training: when, with which figures, and after a stop."""

import dataclasses
import json

import pytest

from openmoe_jax import eval as eval_lib, train as train_lib
from openmoe_jax.config import ConfigError, EvalConfig
from openmoe_jax.tasks import evaluation
from tests import tiny_run
from tests.evaluation_tasks_test import BOOL, write

pytestmark = pytest.mark.slow  # many programs are compiled, or processes started


@pytest.fixture(autouse=True)
def forget_folder():
  yield
  evaluation.configure('')


@pytest.fixture
def folder(tmp_path):
  return write(tmp_path / 'data', {'bool_q/validation.jsonl': [
      {**BOOL, 'passage': 'x', 'question': text, 'answer': i % 2 == 0} for i, text in enumerate('abc')]})


def settings(folder, model_dir, train_steps=4, **changes):
  run = tiny_run.tiny_run(model_dir, data={'task_feature_lengths': {'targets': 64}}, checkpoint={'period': 0},
                          train=dict(train_steps=train_steps, eval_period=0, log_period=1, plots=True))
  return dataclasses.replace(run, eval=EvalConfig(**{**dict(tasks=('boolq',), period=2, data_dir=str(folder)), **changes}))


def tasks_of(model_dir):
  lines = [json.loads(line) for line in (model_dir / 'metrics.jsonl').read_text().splitlines()]
  return [line for line in lines if line['kind'] == 'task']


def test_when_and_what(folder, tmp_path, capfd, monkeypatch):
  monkeypatch.syspath_prepend(str(tiny_run.TESTS))
  train_lib.train(settings(folder, tmp_path / 'run', train_steps=3))
  got = tasks_of(tmp_path / 'run')
  assert [(line['step'], line['task'], line['tokens']) for line in got] == [
      (2, 'boolq', 2 * 8 * 64), (3, 'boolq', 3 * 8 * 64)]  # when due, and at the end
  said = capfd.readouterr().out
  assert 'boolq at step 2: accuracy' in said and 'loss.png' in said
  # The figures of the last step are those of openmoe-eval.
  eval_lib.main([f'--model_dir={tmp_path}/run', '--gin.EvalConfig.tasks=boolq', f'--gin.EvalConfig.data_dir={folder}'])
  record = json.loads((tmp_path / 'run' / 'eval' / 'results.json').read_text())[0]
  assert record['figures'] == {name: pytest.approx(got[1][name], rel=1e-6) for name in record['figures']}
  # A run that goes on evaluates what comes, and nothing twice.
  train_lib.train(settings(folder, tmp_path / 'run', train_steps=5))
  assert [line['step'] for line in tasks_of(tmp_path / 'run')] == [2, 3, 4, 5]


def test_mistakes_come_before_training(folder, tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(str(tiny_run.TESTS))
  for changes, message in (({'data_dir': ''}, 'task boolq has no data'), ({'tasks': ('boolk',)}, 'did you mean boolq')):
    with pytest.raises(ConfigError, match=message):
      train_lib.train(settings(folder, tmp_path / 'run', **changes))
  run = settings(folder, tmp_path / 'run')
  chooses = dataclasses.replace(run, model=run.model.replace(router='expert_choice', allow_future_leak=True))
  with pytest.raises(ConfigError, match="generate and score text, which ModelConfig.router = 'expert_choice' cannot"):
    train_lib.train(chooses)
  assert not (tmp_path / 'run').exists()
