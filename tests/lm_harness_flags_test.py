"""openmoe-lm-eval where lm-eval may be missing: what is refused before it is asked for, and that it is missing."""

import sys

import pytest

from openmoe_jax import lm_harness


@pytest.fixture
def run_folder(tmp_path):
  """What looks like a checkpoint until it is read."""
  (tmp_path / 'run' / 'params').mkdir(parents=True)
  return str(tmp_path / 'run')


def refused(capsys, *args):
  """The one line on stderr of a call that ends with status 2."""
  with pytest.raises(SystemExit) as caught:
    lm_harness.main(args)
  out, err = capsys.readouterr()
  assert caught.value.code == 2 and out == '' and err.count('\n') == 1, (out, err)
  return err


@pytest.mark.parametrize('flags, message', (
    ((), 'the following arguments are required: --tasks'), (('--tasks=piqa,',), "--tasks='piqa,' must be names"),
    (('--tasks=piqa', '--limit=0'), '--limit=0.0 must be a number of examples, or a share below 1'),
    (('--tasks=piqa', '--limit=1.5'), '--limit=1.5 must be'),
    (('--tasks=piqa', '--num_fewshot=-1'), '--num_fewshot=-1 must not be negative'),
    (('--tasks=piqa', '--seed=-1'), '--seed=-1'),
    (('--tasks=piqa', '--log_samples'), '--log_samples needs --output=DIR'),
    (('--tasks=piqa', '--output=/dev/null/x'), '--output=/dev/null/x cannot be written to'),
    (('--task=piqa',), 'unknown argument|required: --tasks')))
def test_flags(run_folder, capsys, flags, message):
  said = refused(capsys, run_folder, *flags)
  assert any(part in said for part in message.split('|')), said


def test_a_checkpoint_that_is_not_there(tmp_path, capsys):
  assert f'{tmp_path} holds no checkpoint: expected a model_dir' in refused(capsys, str(tmp_path), '--tasks=piqa')


def test_without_lm_eval(run_folder, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  said = refused(capsys, run_folder, '--tasks=piqa')
  assert 'lm-evaluation-harness is missing' in said and 'pip install openmoe_jax[eval], or make install-eval' in said
