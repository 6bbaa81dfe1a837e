"""Processes that are really killed, machines that are taken away, disks that fill up: nothing is lost, and the loss
curve goes on bit for bit."""

import contextlib
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time
import warnings

import numpy as np
import pytest

from openmoe_jax import checkpoints, history
import tiny_run

pytestmark = pytest.mark.slow
STEPS = 100
TRAIN = dict(train_steps=STEPS, log_period=1, eval_period=50)
ENDLESS = dict(TRAIN, train_steps=1_000_000)  # what is interrupted cannot end by itself before, however fast the machine
STEP_LINE = re.compile(r'^step +(\d+)/', re.MULTILINE)


def write_gin(folder, run):
  file = pathlib.Path(folder) / 'run.gin'
  file.write_text(tiny_run.gin_text(run))
  return file


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """The curve of a run that nobody disturbs, and its folder."""
  folder = tmp_path_factory.mktemp('undisturbed')
  gin = write_gin(folder, tiny_run.tiny_run(folder / 'run', train=TRAIN, checkpoint=dict(period=50)))
  done = tiny_run.run_process(gin)
  assert done.returncode == 0, done.stderr
  records = tiny_run.curve(folder / 'run')
  assert [r['step'] for r in records if r['kind'] == 'train'] == list(range(1, STEPS + 1))
  return folder / 'run', records


def as_undisturbed(run_dir, undisturbed, folder, end):
  """A run that was disturbed and then trained to step `end` has the curve and the checkpoint of one that was not."""
  expected = undisturbed[0]
  if end > STEPS:  # a fast machine came further than the undisturbed run of all these tests
    expected = folder / 'further'
    shutil.copytree(undisturbed[0], expected)
    done = tiny_run.run_process(write_gin(folder, tiny_run.tiny_run(
        expected, train=dict(TRAIN, train_steps=end), checkpoint=dict(period=50))))
    assert done.returncode == 0, done.stderr
  assert tiny_run.curve(run_dir) == tiny_run.curve(expected)
  same_arrays(run_dir, expected)


def goes_on(folder, undisturbed, **settings):
  """Trains folder/run, which was interrupted, to its end; returns what the process printed."""
  saved = checkpoints.finished_steps(folder / 'run' / 'checkpoints')[-1]
  end = max(STEPS, 50 * (saved // 50 + 1))  # where the undisturbed run is evaluated too
  done = tiny_run.run_process(write_gin(folder, tiny_run.tiny_run(
      folder / 'run', train=dict(TRAIN, train_steps=end), **settings)))
  assert done.returncode == 0, done.stderr
  assert 'damaged' not in done.stdout
  as_undisturbed(folder / 'run', undisturbed, folder, end)
  return done.stdout


def steps_shown(log):
  return [int(step) for step in STEP_LINE.findall(log.read_text())]


def wait_for(condition, process, seconds=300.):
  end = time.time() + seconds
  while time.time() < end:
    if condition():
      return
    if process.poll() is not None:
      return
    time.sleep(.005)
  raise AssertionError('nothing happened for too long')


@pytest.mark.parametrize('kills', (4, pytest.param(10, marks=pytest.mark.exhaustive)))
def test_kill_nine_at_random_moments(tmp_path, undisturbed, kills):
  rng = random.Random(0)
  checkpoint = dict(period=3, max_to_keep=2)
  gin = write_gin(tmp_path, tiny_run.tiny_run(tmp_path / 'run', train=ENDLESS, checkpoint=checkpoint))
  log = tmp_path / 'log'
  for kill in range(kills):
    log.write_text('')
    process = tiny_run.start(gin, log=log)
    if kill % 5 == 3:  # while starting, restoring or compiling
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(rng.uniform(2, 8))
    else:  # after some steps: while training, saving, evaluating
      count = rng.randint(1, 12)
      wait_for(lambda: len(steps_shown(log)) >= count, process)
      time.sleep(rng.uniform(0, .3))
    assert process.poll() is None, log.read_text()
    process.kill()
    process.wait()
    assert 'Traceback' not in log.read_text(), log.read_text()
    if (tmp_path / 'run' / 'metrics.jsonl').exists():  # the history is readable at any moment
      records = history.read(tmp_path / 'run' / 'metrics.jsonl')
      steps = [record['step'] for record in records if record['kind'] == 'train']
      assert steps == list(range(1, len(steps) + 1))
  assert 'resuming from checkpoint' in goes_on(tmp_path, undisturbed, checkpoint=checkpoint)


def same_arrays(a, b):
  """The final checkpoints of two runs hold the same bits: their arrays have the same checksums."""
  sums = [checkpoints.read_progress(checkpoints.resolve(folder))['checksums'] for folder in (a, b)]
  assert sums[0] == sums[1] and len(sums[0]['params']) > 10


def test_sigterm_saves_and_ends_cleanly(tmp_path, undisturbed):
  gin = write_gin(tmp_path, tiny_run.tiny_run(tmp_path / 'run', train=ENDLESS, checkpoint=dict(period=0)))
  log = tmp_path / 'log'
  for number in (signal.SIGTERM, signal.SIGINT):
    log.write_text('')
    process = tiny_run.start(gin, log=log)
    wait_for(lambda: len(steps_shown(log)) >= 5, process)
    process.send_signal(number)
    assert process.wait(120) == 0, log.read_text()
    name = signal.Signals(number).name
    saved = int(re.search(rf'{name}: stopped, checkpoint (\d+) is saved', log.read_text()).group(1))
    assert checkpoints.finished_steps(tmp_path / 'run' / 'checkpoints')[-1] == saved
  assert f'resuming from checkpoint {saved}' in goes_on(tmp_path, undisturbed, checkpoint=dict(period=0))


def test_a_damaged_newest_step_goes_on_from_the_one_before(tmp_path, undisturbed):
  shutil.copytree(undisturbed[0], tmp_path / 'run')
  step = tmp_path / 'run' / 'checkpoints' / str(STEPS)
  largest = max((f for f in (step / 'params').rglob('*') if f.is_file()), key=lambda f: f.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:largest.stat().st_size // 2])
  run = tiny_run.tiny_run(tmp_path / 'run', train=TRAIN, checkpoint=dict(period=50))
  done = tiny_run.run_process(write_gin(tmp_path, run))
  assert done.returncode == 0, done.stderr
  assert f'checkpoint {STEPS} is damaged and was moved' in done.stdout and 'resuming from checkpoint 50' in done.stdout
  assert tiny_run.curve(tmp_path / 'run') == undisturbed[1]
  same_arrays(tmp_path / 'run', undisturbed[0])


def one_error_line(done):
  lines = [line for line in done.stderr.splitlines() if line.startswith('openmoe-train:')]
  assert done.returncode == 1 and len(lines) == 1 and 'Traceback' not in done.stderr, done.stderr
  return lines[0]


def test_full_disk(tmp_path, undisturbed):
  """On a disk of its own, a memory file system of 10 MB."""
  disk = tmp_path / 'disk'
  disk.mkdir()
  mount = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=10m', 'tmpfs', str(disk)], capture_output=True, check=False)
  if mount.returncode:
    message = f'a small disk cannot be mounted here, so a full one is NOT tested: {mount.stderr.decode().strip()}'
    warnings.warn(message)
    pytest.skip(message)
  try:
    run = tiny_run.tiny_run(disk / 'run', train=TRAIN, checkpoint=dict(period=5, max_to_keep=0))
    gin = write_gin(tmp_path, run)
    line = one_error_line(tiny_run.run_process(gin))
    assert 'full' in line and 'Make room and start the same command again' in line
    kept = checkpoints.finished_steps(disk / 'run' / 'checkpoints')
    assert kept and f'{kept[-1]}' in line, line
    subprocess.run(['mount', '-o', 'remount,size=200m', str(disk)], check=True)
    done = tiny_run.run_process(gin)
    assert done.returncode == 0 and f'resuming from checkpoint {kept[-1]}' in done.stdout, done.stderr
    assert tiny_run.curve(disk / 'run') == undisturbed[1]
    same_arrays(disk / 'run', undisturbed[0])
  finally:
    subprocess.run(['umount', str(disk)], check=False)


@pytest.mark.exhaustive
def test_files_may_not_grow(tmp_path, undisturbed):
  """The same where nothing can be mounted: this process may write only small files after it has begun."""
  run = tiny_run.tiny_run(tmp_path / 'run', train=TRAIN, checkpoint=dict(period=5))
  gin = write_gin(tmp_path, run)
  limited = subprocess.run(['bash', '-c', 'trap "" XFSZ; ulimit -f 400; exec "$@"', '-', *tiny_run.command(gin)],
                           env=tiny_run.environment(), capture_output=True, text=True, timeout=600, check=False)
  assert 'Make room and start the same command again' in one_error_line(limited)
  done = tiny_run.run_process(gin)
  assert done.returncode == 0, done.stderr
  assert tiny_run.curve(tmp_path / 'run') == undisturbed[1]


def start_two(gin, tmp_path):
  port, processes, logs = tiny_run.free_port(), [], []
  for i in range(2):
    logs.append(tmp_path / f'log_{i}')
    logs[-1].write_text('')
    processes.append(tiny_run.start(gin, f'--coordinator_address=localhost:{port}', '--num_processes=2',
                                    f'--process_id={i}', log=logs[-1]))
  return processes, logs


@pytest.mark.exhaustive
def test_two_processes_share_a_run_and_one_goes_on_alone(tmp_path, undisturbed):
  run = tiny_run.tiny_run(tmp_path / 'run', train=dict(ENDLESS, eval_period=0), checkpoint=dict(period=5))
  gin = write_gin(tmp_path, run)
  processes, logs = start_two(gin, tmp_path)
  try:
    wait_for(lambda: len(steps_shown(logs[0])) >= 8, processes[0])
    processes[1].send_signal(signal.SIGTERM)  # one is told to stop; both save the same step and end
    for process, log in zip(processes, logs):
      assert process.wait(180) == 0, log.read_text()
  finally:
    for process in processes:
      process.kill()
  saved = checkpoints.finished_steps(tmp_path / 'run' / 'checkpoints')[-1]
  assert f'stopped, checkpoint {saved} is saved' in logs[0].read_text()
  assert not steps_shown(logs[1])  # only the first one talks
  step = tmp_path / 'run' / 'checkpoints' / str(saved)
  assert sorted(p.name for p in (step / 'data').iterdir() if p.name.startswith('stream_')) == [
      f'stream_{i:05d}' for i in range(4)]
  assert {'checksums_0.json', 'checksums_1.json'} <= {p.name for p in (step / 'data').iterdir()}
  done = tiny_run.run_process(write_gin(tmp_path, tiny_run.tiny_run(
      tmp_path / 'run', train=dict(TRAIN, train_steps=saved + 10, eval_period=0), checkpoint=dict(period=5))))
  assert done.returncode == 0 and f'resuming from checkpoint {saved}' in done.stdout, done.stderr
  # the same batches, so the same numbers but for the order in which sums over devices are added up
  train = lambda records: [r for r in records if r['kind'] == 'train'][:min(saved + 10, STEPS)]
  ours, theirs = train(tiny_run.curve(tmp_path / 'run')), train(undisturbed[1])
  for name in ('step', 'tokens', 'target_tokens'):
    assert [r[name] for r in ours] == [r[name] for r in theirs]
  np.testing.assert_allclose([r['loss'] for r in ours[:20]], [r['loss'] for r in theirs[:20]], rtol=1e-5)


@pytest.mark.exhaustive
def test_kill_nine_of_two_processes(tmp_path):
  tiny = lambda steps: tiny_run.tiny_run(tmp_path / 'run', train=dict(TRAIN, train_steps=steps, eval_period=0),
                                         checkpoint=dict(period=3))
  processes, logs = start_two(write_gin(tmp_path, tiny(ENDLESS['train_steps'])), tmp_path)
  wait_for(lambda: len(steps_shown(logs[0])) >= 5, processes[0])
  for process in processes:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
  end = max(steps_shown(logs[0])) + 7
  processes, logs = start_two(write_gin(tmp_path, tiny(end)), tmp_path)
  for process, log in zip(processes, logs):
    assert process.wait(300) == 0, log.read_text()
  assert 'resuming from checkpoint' in logs[0].read_text()
  assert [r['step'] for r in tiny_run.curve(tmp_path / 'run') if r['kind'] == 'train'] == list(range(1, end + 1))
