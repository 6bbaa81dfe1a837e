"""The demo from raw files to a trained model: its raw files, and its verdict. (`make data-demo` runs it.)"""

import json
import sys

import pytest

from openmoe_jax.preparation import datasets
from openmoe_jax.tasks import pretraining
from openmoe_jax.tools import data_demo, prepare_data
from tests import raw_data

pytestmark = pytest.mark.slow  # many programs are compiled, or processes started

TEXTS = [f'Text {i}, ünïcödé 漢字.\n' * 3 for i in range(9)]


@pytest.mark.parametrize('name', data_demo.CORPORA)
def test_its_raw_files_become_the_data_sets_of_the_mixture(tmp_path, name):
  assert set(data_demo.CORPORA) == set(pretraining.RATES[''])
  data_demo.write_raw_files(tmp_path / 'raw', {name: TEXTS})
  command = data_demo.prepare_command(name, tmp_path / 'raw', tmp_path / 'tfds')
  assert command[:3] == [sys.executable, '-m', 'openmoe_jax.tools.prepare_data']
  prepare_data.main(command[3:] + ['--processes=1'])
  found = raw_data.examples(tmp_path / 'tfds', name)
  assert sorted(example['text'] for example in found) == TEXTS
  assert all(json.loads(example['meta']) for example in found)


def test_its_text_is_enough():
  """UL2 joins 128 documents for each of its six objectives."""
  corpora = data_demo.corpora()
  assert set(corpora) == set(data_demo.CORPORA) <= set(datasets.KNOWN)
  assert len(corpora['redpajama_c4']) > 2 * 2000, 'of which 2,000 are for validation'
  assert all(len(texts) >= 128 for texts in corpora.values())


@pytest.mark.parametrize('last, verdict', [(5., 'fell'), (8.9, 'did not fall')])
def test_its_verdict(tmp_path, monkeypatch, capsys, last, verdict):
  """With programs that are not run, and a history as a run would leave it."""
  (tmp_path / 'raw').mkdir()
  (tmp_path / 'raw' / 'complete').write_text('')
  (tmp_path / 'run').mkdir()
  commands = []

  def run(command, check):
    commands.append(command)
    loss = [9.] * 2 + [7.] * 16 + [last] * 2
    with open(tmp_path / 'run' / data_demo.history.FILE, 'w', encoding='utf-8') as file:
      for step, value in enumerate(loss):
        file.write(json.dumps({'kind': 'train', 'step': step, 'loss': value}) + '\n')
    return data_demo.subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(data_demo.subprocess, 'run', run)
  if verdict == 'fell':
    data_demo.main([f'--work_dir={tmp_path}'])
  else:
    with pytest.raises(SystemExit) as status:
      data_demo.main([f'--work_dir={tmp_path}'])
    assert status.value.code == 1
  assert f'The training loss {verdict}: 9.00 in the first tenth of the steps, {last:.2f} in the last.' in (
      capsys.readouterr().out)
  assert len(commands) == 9 and commands[-1][2] == 'openmoe_jax.train'
