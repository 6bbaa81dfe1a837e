"""What a run may start from, and which settings may change in between."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from openmoe_jax import config as config_lib
from openmoe_jax import resume
from openmoe_jax.config import ConfigError
import tiny_run


def saved(run):
  return json.loads(json.dumps(config_lib.to_dict(run)))


def test_no_change_no_line(tmp_path):
  run = tiny_run.tiny_run(tmp_path)
  assert resume.check_changes(saved(run), run, tmp_path) == ([], True)


HARMLESS = [dict(train=dict(train_steps=99)), dict(train=dict(log_period=7)), dict(checkpoint=dict(max_to_keep=9)),
            dict(model=dict(scan_blocks=True)), dict(model=dict(remat='full')), dict(mesh=dict(expert=4)),
            dict(optimizer=dict(learning_rate=.5)), dict(data=dict(eval_batches=7)), dict(model=dict(dispatch='einsum'))]


@pytest.mark.parametrize('changes', HARMLESS)
def test_harmless_changes_are_printed(tmp_path, changes):
  run = tiny_run.tiny_run(tmp_path)
  lines, same_data = resume.check_changes(saved(run), tiny_run.tiny_run(tmp_path, **changes), tmp_path)
  (section, setting), = changes.items()
  (name, value), = setting.items()
  assert lines and lines[0].startswith(f'{section}.{name}: ') and lines[0].endswith(f'-> {value!r}') and same_data


DECIDING = [(dict(data=dict(seed=1)), False), (dict(data=dict(batch_size=16)), False),
            (dict(data=dict(mixture_or_task='other')), False), (dict(data=dict(pack=False)), False),
            (dict(train=dict(num_microbatches=2)), False), (dict(model=dict(emb_dim=64)), True),
            (dict(model=dict(train_capacity_factor=2.)), True), (dict(train=dict(seed=4)), True),
            (dict(model=dict(dtype='bfloat16')), True)]


@pytest.mark.parametrize('changes, same_data', DECIDING)
def test_deciding_changes_are_refused_without_the_flag(tmp_path, changes, same_data):
  run = tiny_run.tiny_run(tmp_path)
  (section, setting), = changes.items()
  with pytest.raises(ConfigError, match=f'{section}.{list(setting)[0]} was .*allow_setting_changes=True'):
    resume.check_changes(saved(run), tiny_run.tiny_run(tmp_path, **changes), tmp_path)
  allowed = tiny_run.tiny_run(tmp_path, **changes, checkpoint=dict(allow_setting_changes=True))
  lines, same = resume.check_changes(saved(run), allowed, tmp_path)
  assert len(lines) == 1 and same == same_data


def test_every_setting_is_decided_on():
  """A new setting counts as deciding until somebody says otherwise; this list is for looking at."""
  deciding = [n for n in config_lib.flatten(tiny_run.tiny_run('x')) if not resume.is_harmless(n)]
  assert 'data.seed' in deciding and 'model.group_size' in deciding and 'train.seed' in deciding
  assert all(name.split('.')[0] in ('model', 'data', 'train') for name in deciding)


def test_a_setting_that_the_saved_run_did_not_know_had_its_default(tmp_path):
  run = tiny_run.tiny_run(tmp_path)
  before = saved(run)
  del before['data']['use_cached'], before['train']['stop_on_nan']
  assert resume.check_changes(before, run, tmp_path) == ([], True)


def test_model_dir_of_something_else_is_refused(tmp_path):
  run = tiny_run.tiny_run(tmp_path)
  assert resume.claim_model_dir(run) == []
  (tmp_path / 'log.txt').write_text('a log is no harm')
  (tmp_path / '.hidden').write_text('')
  (tmp_path / 'lost+found').mkdir()
  assert resume.claim_model_dir(run) == []
  (tmp_path / 'thesis.tex').write_text('important')
  with pytest.raises(ConfigError, match='holds files of something else .thesis.tex.'):
    resume.claim_model_dir(run)
  resume.write_config(run)  # a file added to an existing run's folder is fine
  assert resume.claim_model_dir(run) == []
  with pytest.raises(ConfigError, match='is a file'):
    resume.claim_model_dir(dataclasses.replace(run, model_dir=str(tmp_path / 'thesis.tex')))
  with pytest.raises(ConfigError, match='model_dir is empty'):
    resume.claim_model_dir(dataclasses.replace(run, model_dir=''))


@pytest.mark.parametrize('name, content', [
    ('config.json', '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'), ('config.json', '[1, 2'),
    ('checkpoints/epoch_1/last.ckpt', 'weights'), ('checkpoints', 'a file')])
def test_a_folder_that_only_looks_like_a_run_is_left_alone(tmp_path, name, content):
  """A Hugging Face model has a config.json too, and other trainers have checkpoints."""
  (tmp_path / 'weights.safetensors').write_text('weights')
  if name.startswith('checkpoints'):
    (tmp_path / 'weights.safetensors').unlink()
  file = tmp_path / name
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(content)
  run = tiny_run.tiny_run(tmp_path)
  with pytest.raises(ConfigError, match='holds files of something else'):
    resume.claim_model_dir(run)
  assert file.read_text() == content


def test_folders_that_cannot_be_made_are_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  (tmp_path / 'link').symlink_to(tmp_path / 'nowhere' / 'else')
  for name in ('file/run', 'link/run', 'link'):
    run = tiny_run.tiny_run(tmp_path / name)
    with pytest.raises(ConfigError, match='cannot be (used|written to)') as error:
      resume.claim_model_dir(run)
      resume.check_room(run, {})
    assert '\n' not in str(error.value)


def test_one_run_at_a_time(tmp_path):
  """The second is told who holds the folder; kill -9 lets go of it."""
  run = tiny_run.tiny_run(tmp_path / 'run')
  holder = subprocess.Popen([sys.executable, '-c', textwrap.dedent('''
      import sys, time, tiny_run
      from openmoe_jax import resume
      with resume.hold_model_dir(tiny_run.tiny_run(sys.argv[1])):
        print('held', flush=True)
        time.sleep(600)
  '''), run.model_dir], env=tiny_run.environment(), stdout=subprocess.PIPE, text=True)
  try:
    assert holder.stdout.readline() == 'held\n'
    with pytest.raises(ConfigError, match=f'in use by another process .pid {holder.pid} on '):
      with resume.hold_model_dir(run):
        pass
  finally:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
  for _ in range(2):
    with resume.hold_model_dir(run):
      pass


def test_a_stretched_schedule_is_said(tmp_path):
  decaying = dict(optimizer=dict(schedule='constant * linear_decay'))
  run = tiny_run.tiny_run(tmp_path, **decaying)
  lines, _ = resume.check_changes(saved(run), tiny_run.tiny_run(tmp_path, train=dict(train_steps=99), **decaying), tmp_path)
  assert len(lines) == 2 and 'decay_steps would keep the schedule' in lines[1]
  run = tiny_run.tiny_run(tmp_path)
  assert len(resume.check_changes(saved(run), tiny_run.tiny_run(tmp_path, train=dict(train_steps=99)), tmp_path)[0]) == 1
