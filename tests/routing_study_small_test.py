"""The small study: what it records, and the way from checkpoints to the report."""

import json

import pytest

from openmoe_jax.config import ConfigError
from openmoe_jax.recording import files
from openmoe_jax.tasks import domains
from openmoe_jax.tools import routing_study_small
from tests import tiny_checkpoint


def test_without_a_demo_it_says_what_makes_one(tmp_path, capsys):
  with pytest.raises(SystemExit) as stopped:
    routing_study_small.main([f'--model_dir={tmp_path}'])
  error = capsys.readouterr().err
  assert stopped.value.code == 2 and error.count('\n') == 1
  assert f'--model_dir={tmp_path} holds no checkpoint of the demo: `make demo` trains it' in error


def test_texts_follow_the_objective_of_the_run_and_what_the_machine_has(monkeypatch):
  monkeypatch.setattr(domains, 'available', lambda kind: [kind] if kind in ('language_cpp', 'part_comments') else [])
  run = {'data': {'mixture_or_task': 'demo_ul2'}}
  assert routing_study_small.default_mixtures(run, '') == ['demo_ul2', 'language_cpp_ul2', 'part_comments_ul2']
  with pytest.raises(ConfigError, match=r"trained on 'mix_ul2', which is none of the mixtures demo_\*; give --mixture"):
    routing_study_small.default_mixtures({'data': {'mixture_or_task': 'mix_ul2'}}, 'run')
  assert set(routing_study_small.OTHERS) <= set(domains.KINDS)


@pytest.mark.slow
def test_from_checkpoints_to_the_report(tmp_path, capsys):
  model_dir = tiny_checkpoint.write(tmp_path / 'run', steps=(3, 6), row_length=32)
  command = [f'--model_dir={model_dir}', '--tokens=1500', '--mixture=demo_full_lm,part_docstrings_full_lm']
  routing_study_small.main(command)
  out = capsys.readouterr().out
  study = tmp_path / 'run' / 'routing_study'
  assert f'{study}/figures/report.html' in out.splitlines()[-1]
  recording = files.Recording(study / 'recording')
  assert {key.step for key in recording.keys()} == {0, 3, 6} and len(recording.keys()) == 3 * 3 * 4
  findings = json.loads((study / 'figures' / 'findings.json').read_text())['findings']
  headlines = [finding['statement'] for finding in findings if finding['headline']]
  assert headlines and all(f'* {statement}' in out.splitlines() for statement in headlines)
  assert headlines[0].split()[0] in (study / 'figures' / 'report.html').read_text()
