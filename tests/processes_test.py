"""Two and four real processes: the numbers and batches of one; one that is killed, stopped or fails ends all, in time and
with a clear line; and the run goes on with any number of processes."""

import functools
import re
import signal
import time

import numpy as np
import pytest

import tiny_run
from tiny_processes import Processes

pytestmark = pytest.mark.slow
MORE = functools.partial(pytest.param, marks=pytest.mark.exhaustive)
LOST = 20  # seconds of silence; a busy machine needs some
BOUND = LOST + 40  # and the time to say so and end
STEPS = 8
TRAIN = dict(train_steps=STEPS, log_period=1, eval_period=0, lost_process_seconds=LOST, plots=False)
ENDLESS = dict(TRAIN, train_steps=10**6)


def gin(folder, **settings):
  """--gin_file of a tiny run in folder/run."""
  file = folder / 'run.gin'
  file.write_text(tiny_run.gin_text(tiny_run.tiny_run(folder / 'run', data=dict(eval_split=''), **settings)))
  return file


def records(folder):
  return {r['step']: r for r in tiny_run.curve(folder / 'run') if r['kind'] == 'train'}


def same_run(ours, theirs):
  """The same batches, and numbers that differ by rounding only: sums over devices are added up in another order."""
  assert [r['batch_hashes'] for r in ours.values()] == [r['batch_hashes'] for r in theirs.values()]
  for name in ('loss', 'cross_ent_loss', 'grad_norm', 'param_norm'):
    np.testing.assert_allclose([r[name] for r in ours.values()], [r[name] for r in theirs.values()], rtol=2e-5, err_msg=name)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """What one process with one device logs."""
  folder = tmp_path_factory.mktemp('alone')
  done = tiny_run.run_process(gin(folder, train=TRAIN))
  assert done.returncode == 0, done.stderr
  return records(folder)


@pytest.mark.parametrize('count, devices, mesh', (
    MORE(2, 1, {}), (4, 1, dict(expert=2)), MORE(2, 2, dict(expert=2, model=2))))
def test_several_processes_compute_what_one_does(tmp_path, alone, count, devices, mesh):
  with Processes(count, tmp_path, gin(tmp_path, train=TRAIN, mesh=mesh), devices=devices) as job:
    assert job.statuses() == [0] * count, job.text()
    assert f'on {count} hosts' in job.text() and f'step {STEPS}/{STEPS}' in job.text()
    for i in range(1, count):  # one host logs; what is there comes from gloo and seqio
      assert not re.search('model_dir|loss|step|finished', job.text(i)), job.text(i)
  same_run(records(tmp_path), alone)


def lost(job, i, ending='The same command (on every machine of the run) goes on from the last checkpoint.'):
  """The one line with which process i ended."""
  line = job.last_line(i)
  assert line.startswith('train: ') and line.endswith(ending), job.text(i)
  assert 'Traceback' not in job.text(i), job.text(i)
  return line


def goes_on(folder, count, end, theirs):
  """The run that was cut off, with `count` processes to step `end`; its curve is the undisturbed one."""
  with Processes(count, folder, gin(folder, train=dict(TRAIN, train_steps=end), checkpoint=dict(period=2))) as job:
    assert job.statuses() == [0] * count, job.text()
    assert 'resuming from checkpoint' in job.text()
  ours = records(folder)
  assert sorted(ours) == list(range(1, end + 1))
  steps = range(1, min(end, STEPS) + 1)
  same_run({s: ours[s] for s in steps}, {s: theirs[s] for s in steps})


@pytest.mark.parametrize('count, victim, then', ((2, 1, 1), MORE(4, 2, 2), MORE(2, 0, 4)))
def test_one_is_killed_the_others_end_and_the_run_goes_on_with_another_number(tmp_path, alone, count, victim, then):
  with Processes(count, tmp_path, gin(tmp_path, train=ENDLESS, checkpoint=dict(period=2))) as job:
    job.wait_for('step       3/')
    job.send(victim)
    began = time.monotonic()
    others = [i for i in range(count) if i != victim]
    assert job.statuses(BOUND, without=[victim]) == [3] * len(others), [job.text(i) for i in others]
    assert time.monotonic() - began < BOUND
    for i in others:
      line = lost(job, i)
      assert re.search(rf'process {victim} (\(.*pid {job.processes[victim].pid}\)|at localhost)', line), line
    last = max(int(step) for step in re.findall(r'^step +(\d+)/', job.text(), re.MULTILINE))
  goes_on(tmp_path, then, max(STEPS, last + 2), alone)


def test_one_that_is_stopped_counts_as_lost(tmp_path):
  """As a machine that is there but does nothing."""
  with Processes(2, tmp_path, gin(tmp_path, train=ENDLESS)) as job:
    job.wait_for('step       3/')
    job.send(1, signal.SIGSTOP)
    assert job.statuses(BOUND, without=[1]) == [3], job.text()
    assert 'process 1' in lost(job, 0) and 'gave no sign of life' in job.last_line(0)


def test_an_error_of_one_ends_all_with_its_text(tmp_path):
  run = gin(tmp_path, train=ENDLESS)
  with Processes(2, tmp_path, run, environments={1: {'TINY_TASK_FAILS_WHEN': str(tmp_path / 'now')}}) as job:
    job.wait_for('step       3/')
    (tmp_path / 'now').touch()
    assert job.statuses(BOUND + 60) == [1, 1], job.text()
    assert 'Traceback' in job.text(1) and 'the disk of the texts is gone' in job.text(1)
    assert 'process 1 ended with an error: ' in lost(job, 0, 'Its own log says more.')
    assert 'Error in user-defined function' in job.last_line(0)  # what TensorFlow puts first


def test_a_hang_of_one_is_noticed_by_all(tmp_path):
  # Without checkpoints: one that waits for the data's position would be given ten times as long.
  run = gin(tmp_path, train=dict(ENDLESS, hang_minutes=.2), checkpoint=dict(period=10**6))
  with Processes(2, tmp_path, run, environments={1: {'TINY_TASK_HANGS_WHEN': str(tmp_path / 'now')}}) as job:
    job.wait_for('step       3/')
    (tmp_path / 'now').touch()
    assert job.statuses(120) == [3, 3], job.text()
    # Each by itself; a busy machine may find the other one gone before it finds itself hanging.
    hanging = [i for i in range(2) if 'no step for 0.2 minutes' in lost(job, i)]
    assert hanging and all('most recent call first' in job.text(i) for i in hanging)
    assert all('gave no sign of life' in job.last_line(i) for i in range(2) if i not in hanging)


SCRIPT = '''
import sys, time
from openmoe_jax import launch
from openmoe_jax.config import ConfigError
port, count, process = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
'''
BARRIER = SCRIPT + '''
launch.initialize(f'localhost:{port}', count, process)
def main():
  if process > 1:
    time.sleep(15)
  try:
    launch.barrier('the bridge', 5)
  except launch.ProcessError as error:
    print(error, flush=True)
  assert launch.every_process(True) and not launch.every_process(process != 1)
launch.run_together(main)
'''


def test_a_barrier_names_who_is_missing(tmp_path):
  with Processes(4, tmp_path, script=BARRIER) as job:
    assert job.statuses() == [0] * 4, job.text()
    for i in range(2):
      assert "at 'the bridge' process 2 and 3 of 4 had not come, after 5 s" in job.text(i)


ALONE = SCRIPT + '''
try:
  launch.initialize(f'localhost:{port}', count, process, timeout=5)
except ConfigError as error:
  print('ConfigError', error)
  sys.exit(2)
'''


@pytest.mark.parametrize('process, part', ((0, 'process 0 is there, but not all of the others'),
                                           (1, 'process 0 does not answer at localhost:')))
def test_the_others_do_not_come(process, part):
  import subprocess
  import sys
  port = tiny_run.free_port()
  done = subprocess.run([sys.executable, '-c', ALONE, str(port), '2', str(process)], env=tiny_run.environment(), text=True,
                        capture_output=True, timeout=200, check=False)
  said = (done.stdout + done.stderr).strip().splitlines()[-1]
  assert done.returncode == 2 and f'did not come together within 5 s; {part}' in said, done.stderr
  assert f'coordinator_address = localhost:{port}, num_processes = 2, process_id = {process}' in said
