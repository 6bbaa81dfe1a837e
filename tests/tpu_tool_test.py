"""The tool for slices of TPUs, against a gcloud whose workers are folders: the scripts that it sends really run."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import pytest

from openmoe_jax.tools.tpu import __main__ as tpu
from openmoe_jax.tools.tpu import jobs, workers
from tests import fake_gcloud

GCLOUD = pathlib.Path(fake_gcloud.__file__)
CREATE = ('create', 'pod', '--zone=zone-a', '--accelerator=v4-16', '--spot', '--poll_seconds=0.01')
FLAGS = ('--gin_file=recipes/demo.gin', '--model_dir=gs://bucket/run', "--gin.DataConfig.mixture_or_task='a b'")

# Stand for Python on a worker: they note what they are asked, and "make" the environment.
PYTHON = '''#!/bin/bash
echo "$(basename "$0") $*" >> ~/python_calls
case "$*" in
  "-m uv venv"*) mkdir -p .venv/bin; cp "$FAKE_GCLOUD/bin/python3" .venv/bin/python;;
  *"--editable ."*) cp "$FAKE_GCLOUD/openmoe-train" .venv/bin/openmoe-train;;
esac
'''
# Stands for training: ends with the statuses that the test asks for, one a start, and then trains until it is told to stop.
TRAIN = '''#!/bin/bash
printf '%s\\n' "$@" > ~/train_flags
echo start >> ~/starts
status=$(sed -n "$(wc -l < ~/starts)p" "$FAKE_GCLOUD/statuses" 2> /dev/null)
if [ -n "$status" ]; then echo "ends with $status"; exit $status; fi
trap 'echo "checkpoint 5 is saved"; exit 0' TERM
echo "step 5"
while true; do sleep 0.05; done
'''


def executable(file, text):
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(text)
  file.chmod(0o755)


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  """The folder of a fake Google Cloud."""
  folder = tmp_path / 'cloud'
  executable(tmp_path / 'path' / 'gcloud', f'#!/bin/bash\nexec {sys.executable} {GCLOUD} "$@"\n')
  executable(folder / 'bin' / 'python3', PYTHON)
  executable(folder / 'bin' / 'hostname', '#!/bin/bash\necho $WORKER\n')
  executable(folder / 'openmoe-train', TRAIN)
  monkeypatch.setenv('PATH', f'{tmp_path / "path"}:{os.environ["PATH"]}')
  monkeypatch.setenv('FAKE_GCLOUD', str(folder))
  monkeypatch.setenv('OPENMOE_TPU_JOBS', str(tmp_path / 'jobs'))
  monkeypatch.setattr(workers, '_SECONDS_BEFORE_RESTART', 0)
  yield folder
  for slice_ in folder.glob('*.state'):
    fake_gcloud.preempt(folder, slice_.stem)


def tool(*args):
  """Exit status of the tool."""
  with pytest.raises(SystemExit) as end:
    tpu.main(args)
  return end.value.code or 0


@pytest.fixture
def checkout(tmp_path):
  """A repository with something to install."""
  folder = tmp_path / 'checkout'
  folder.mkdir()
  (folder / 'requirements.lock').write_text('flax==1\njax==0.10.2\njaxlib==0.10.2\n')
  for command in (['init', '--quiet'], ['add', '.'], ['-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'x']):
    subprocess.run(['git', '-C', str(folder), *command], check=True)
  return folder


@pytest.fixture
def installed(cloud, checkout):
  """A slice 'pod' with everything installed."""
  assert tool(*CREATE) == 0 and tool('install', 'pod', f'--checkout={checkout}') == 0
  return cloud


def home(cloud, worker=0):
  return fake_gcloud.worker_home(cloud, 'pod', worker)


def wait_for(condition, seconds=30.):
  end = time.time() + seconds
  while not condition():
    assert time.time() < end, 'nothing happened'
    time.sleep(.02)


def trains(cloud):
  logs = [home(cloud, worker) / 'openmoe_runs' / 'pod' / 'log' for worker in range(2)]
  return all(log.exists() and log.read_text().endswith('step 5\n') for log in logs)


def ended(cloud, status):
  files = [home(cloud, worker) / 'openmoe_runs' / 'pod' for worker in range(2)]
  return all((file / 'status').exists() and (file / 'status').read_text() == f'{status}\n' and
             not pathlib.Path(f'/proc/{(file / "pid").read_text().strip()}').exists() for file in files)


def test_create_asks_once_and_waits(cloud, capsys):
  assert tool(*CREATE, '--gcloud_flag=--network=mine') == 0
  calls = fake_gcloud.calls(cloud)
  assert calls[0] == ['compute', 'tpus', 'queued-resources', 'create', 'pod', '--node-id=pod', '--zone=zone-a',
                      '--accelerator-type=v4-16', '--runtime-version=tpu-ubuntu2204-base', '--spot', '--network=mine',
                      '--quiet']
  assert calls[1] == ['compute', 'tpus', 'queued-resources', 'describe', 'pod', '--zone=zone-a', '--format=json']
  assert capsys.readouterr().out.splitlines() == ['pod: WAITING_FOR_RESOURCES', 'pod: PROVISIONING', 'pod is there']
  assert jobs.load('pod').accelerator == 'v4-16'


@pytest.mark.parametrize('accelerator, version', (('v3-8', 'tpu-ubuntu2204-base'), ('v5litepod-16', 'v2-alpha-tpuv5-lite'),
                                                  ('v5p-8', 'v2-alpha-tpuv5'), ('v6e-4', 'v2-alpha-tpuv6e')))
def test_the_image_follows_from_the_accelerator(accelerator, version):
  assert jobs.runtime_version(accelerator) == version


def test_install_takes_what_is_committed_to_every_worker(cloud, checkout, capsys):
  tool(*CREATE)
  (checkout / 'requirements.lock').write_text('not committed')
  assert tool('install', 'pod', f'--checkout={checkout}') == 0
  out = capsys.readouterr().out
  assert 'not committed are not installed' in out and 'worker_0: installed' in out and 'worker_1: installed' in out
  for worker in range(2):
    assert 'jax==0.10.2' in (home(cloud, worker) / 'openmoe_jax' / 'requirements.lock').read_text()
    asked = (home(cloud, worker) / 'python_calls').read_text().splitlines()
    assert 'python3 -m uv venv --quiet --seed --python 3.12 .venv' in asked
    assert asked[-1] == 'python -m pip install --quiet jax[tpu]==0.10.2'
  (home(cloud) / 'openmoe_jax' / 'old_file').write_text('')
  assert tool('install', 'pod', f'--checkout={checkout}') == 0  # again: the environment is kept, old files are not
  assert not (home(cloud) / 'openmoe_jax' / 'old_file').exists()
  assert (home(cloud) / 'python_calls').read_text().count('uv venv') == 1


def test_start_status_follow_stop(installed, capfd):
  cloud = installed
  assert tool('start', 'pod', '--', *FLAGS) == 0
  wait_for(lambda: trains(cloud))
  assert (home(cloud, 1) / 'train_flags').read_text().splitlines() == list(FLAGS)
  assert tool('start', 'pod') == 0
  assert tool('status', 'pod') == 0
  out = capfd.readouterr().out
  assert out.count(': started') == 2 and out.count(': runs already') == 2
  assert 'pod: ACTIVE\nworker_0: running   step 5\nworker_1: running   step 5\n' in out
  following = threading.Thread(target=tool, args=('follow', 'pod'))
  following.start()
  wait_for(lambda: any('tail -n' in str(call) for call in fake_gcloud.calls(cloud)))
  assert tool('stop', 'pod') == 0
  following.join(30)
  assert not following.is_alive()
  wait_for(lambda: ended(cloud, 0))
  assert tool('status', 'pod') == 0
  out = capfd.readouterr().out
  order = [out.index(line) for line in ('step 5\n', 'checkpoint 5 is saved\n', 'ended with status 0\n')]
  assert order == sorted(order)
  assert 'worker_1: ended 0   checkpoint 5 is saved' in out
  assert (home(cloud) / 'starts').read_text().count('start') == 1


@pytest.mark.slow
@pytest.mark.parametrize('statuses, starts, last', (('3\n137\n', 3, None), ('1\n', 1, 1), ('2\n', 1, 2), ('0\n', 1, 0)))
def test_a_worker_starts_again_what_was_lost_and_not_what_is_wrong(installed, statuses, starts, last):
  (installed / 'statuses').write_text(statuses)
  tool('start', 'pod', '--', *FLAGS)
  wait_for(lambda: trains(installed) if last is None else ended(installed, last))
  assert (home(installed) / 'starts').read_text().count('start') == starts


@pytest.mark.slow
def test_restarts_end(installed):
  (installed / 'statuses').write_text('3\n' * 9)
  tool('start', 'pod', '--restarts=2', '--', *FLAGS)
  wait_for(lambda: ended(installed, 3))
  assert (home(installed, 1) / 'starts').read_text().count('start') == 3


@pytest.mark.slow
def test_resume_after_a_preemption_makes_the_slice_again(installed, checkout, capsys):
  cloud = installed
  tool('start', 'pod', '--', *FLAGS)
  wait_for(lambda: trains(cloud))
  fake_gcloud.preempt(cloud, 'pod')
  assert tool('status', 'pod') == 0 and 'pod: SUSPENDED' in capsys.readouterr().out
  before = len(fake_gcloud.calls(cloud))
  assert tool('resume', 'pod', '--poll_seconds=0.01', f'--checkout={checkout}') == 0
  wait_for(lambda: trains(cloud))
  assert (home(cloud) / 'train_flags').read_text().splitlines() == list(FLAGS)
  verbs = [call[3] for call in fake_gcloud.calls(cloud)[before:]]
  assert verbs == ['describe', 'delete', 'create', *['describe'] * 4, 'scp', 'ssh', 'ssh', 'ssh']
  assert [call for call in fake_gcloud.calls(cloud) if call[3] == 'create'][0] == [
      call for call in fake_gcloud.calls(cloud) if call[3] == 'create'][1]  # spot again, in the same place
  assert tool('resume', 'pod') == 0 and 'pod is training' in capsys.readouterr().out


@pytest.mark.slow
def test_resume_starts_what_has_stopped_on_a_slice_that_is_there(installed):
  (installed / 'statuses').write_text('1\n')
  tool('start', 'pod', '--', *FLAGS)
  wait_for(lambda: ended(installed, 1))
  assert tool('resume', 'pod') == 0
  wait_for(lambda: trains(installed))


@pytest.mark.slow
def test_resume_keeps_a_run_alive_until_it_has_ended(installed, checkout, capsys):
  cloud = installed
  tool('start', 'pod', '--', *FLAGS)
  codes = []
  keeper = threading.Thread(target=lambda: codes.append(
      tool('resume', 'pod', '--keep', '--poll_seconds=0.05', f'--checkout={checkout}')))
  keeper.start()
  for _ in range(2):
    wait_for(lambda: trains(cloud))
    fake_gcloud.preempt(cloud, 'pod')
    wait_for(lambda: home(cloud).exists() and trains(cloud))
  tool('stop', 'pod')
  keeper.join(30)
  assert codes == [0] and 'pod: training ended 0' in capsys.readouterr().out
  assert [call[3] for call in fake_gcloud.calls(cloud)].count('create') == 3


@pytest.mark.slow
def test_a_run_that_ends_with_an_error_is_not_started_for_ever(installed, capsys):
  (installed / 'statuses').write_text('1\n1\n1\n')
  tool('start', 'pod', '--', *FLAGS)
  wait_for(lambda: ended(installed, 1))
  assert tool('resume', 'pod', '--keep', '--poll_seconds=0.01') == 1
  assert 'pod: training ended 1' in capsys.readouterr().out


def test_delete_forgets(installed):
  assert tool('delete', 'pod') == 0
  assert not home(installed).exists() and not list(jobs.folder().iterdir())


def test_dry_run_prints_every_command_and_runs_none(cloud, checkout, capsys):
  """What is printed is what is run: the lines, run by a shell, make a slice and train on it."""
  tool(*CREATE, '--dry_run')
  tool('install', 'pod', '--zone=zone-a', f'--checkout={checkout}', '--dry_run')
  tool('start', 'pod', '--zone=zone-a', '--dry_run', '--', *FLAGS)
  assert not fake_gcloud.calls(cloud) and not jobs.folder().exists()
  script = capsys.readouterr().out
  folder = script.split('--output=')[1].split(f'/{workers.ARCHIVE}')[0]  # a temporary folder, gone by now
  pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
  script = script.replace('# pod is there', 'for i in 1 2 3; do gcloud compute tpus queued-resources describe pod '
                          '--zone=zone-a; done')
  subprocess.run(['bash', '-e', '-c', script], check=True, capture_output=True)
  shutil.rmtree(folder)
  wait_for(lambda: trains(cloud))
  assert (home(cloud, 1) / 'train_flags').read_text().splitlines() == list(FLAGS)


def test_dry_run_of_everything_else(cloud, capsys):
  tool(*CREATE)
  before = fake_gcloud.calls(cloud)
  capsys.readouterr()
  for command, parts in (('resume', ('--force', ' create pod', ' scp ', ' ssh ')), ('status', (' describe ', ' ssh ')),
                         ('stop', (' ssh ',)), ('follow', (' ssh ', '--worker=0')), ('delete', (' delete pod', '--force'))):
    assert tool(command, 'pod', '--dry_run') == 0
    out = capsys.readouterr().out
    assert all(part in out for part in parts), out
  assert fake_gcloud.calls(cloud) == before and jobs.load('pod').tier == 'spot'


MISTAKES = (
    (('create', 'pod', '--accelerator=v4-8'), 'give --zone'),
    (('create', 'pod', '--zone=zone-a', '--accelerator=x9-8'), '--accelerator=x9-8 is of no kind that is known here'),
    (('create', 'Pod_1', '--zone=zone-a', '--accelerator=v4-8'), "'Pod_1' cannot be the name of a slice"),
    (('status', 'other'), "'other' was not created from this machine"),
    (('start', 'pod', '--zone=zone-a'), 'give the flags of openmoe-train after --'),
    (('start', 'pod', '--zone=zone-a', '--', '--gin_file=a.gin'), 'give --model_dir=gs://'),
    (('start', 'pod', '--zone=zone-a', '--', '--model_dir=runs/a'), '--model_dir=runs/a is on the'),
    (('resume', 'pod', '--zone=zone-a'), 'was not started from this machine'),
    (('stop', 'pod', '--zone=zone-a', '--', '--x'), 'belong to "start"'),
    (('install', 'pod', '--zone=zone-a', '--checkout=/dev'), 'is no checkout'), ((), 'COMMAND'))


@pytest.mark.parametrize('args, part', MISTAKES)
def test_mistakes_are_one_line(cloud, capsys, args, part):
  assert tool(*args) == 2
  err = capsys.readouterr().err
  assert part in err and len(err.strip().splitlines()) == 1 and not fake_gcloud.calls(cloud)


def test_what_gcloud_says_is_passed_on(cloud, capsys):
  (cloud / 'no_quota').touch()
  assert tool(*CREATE) == 1
  err = capsys.readouterr().err
  assert 'Quota limit has been exceeded.' in err and len(err.strip().splitlines()) == 1
  assert tool('resume', 'pod') == 2  # not started


def test_without_gcloud(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('PATH', str(tmp_path))
  monkeypatch.setenv('OPENMOE_TPU_JOBS', str(tmp_path / 'jobs'))
  assert tool(*CREATE) == 2
  assert 'gcloud is not installed or not on the PATH: https://' in capsys.readouterr().err


def test_a_damaged_memory_is_told(cloud, capsys):
  jobs.folder().mkdir(parents=True)
  (jobs.folder() / 'pod.json').write_text(json.dumps({'name': 'pod'}))
  assert tool('status', 'pod') == 2 and 'pod.json is damaged' in capsys.readouterr().err
