"""A gcloud for tests: slices are folders with two workers, each a home folder in which scripts really run.

Run as the executable `gcloud` with $FAKE_GCLOUD naming the folder. Every call is a line of calls.jsonl. A request waits for
two looks before it is active. `preempt` does what Google does: the workers' processes are killed, their disks are gone.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

WORKERS = 2
STATES = ('WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE')


def worker_home(folder, name, worker):
  return pathlib.Path(folder) / name / f'worker_{worker}'


def calls(folder):
  file = pathlib.Path(folder) / 'calls.jsonl'
  return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _state_file(folder, name):
  return pathlib.Path(folder) / f'{name}.state'


def _remove_workers(folder, name):
  for worker in range(WORKERS):
    for pid in worker_home(folder, name, worker).glob('openmoe_runs/*/pid'):
      try:
        os.killpg(int(pid.read_text()), signal.SIGKILL)
      except (OSError, ValueError):
        pass
  shutil.rmtree(pathlib.Path(folder) / name, ignore_errors=True)


def preempt(folder, name):
  _remove_workers(folder, name)
  _state_file(folder, name).write_text('SUSPENDED')


def _flag(args, name, default=None):
  return next((arg.partition('=')[2] for arg in args if arg.startswith(f'--{name}=')), default)


def _environment(home):
  return {**os.environ, 'HOME': str(home), 'PATH': f'{home.parents[1] / "bin"}:{os.environ["PATH"]}', 'WORKER': home.name}


def main(args):
  folder = pathlib.Path(os.environ['FAKE_GCLOUD'])
  with open(folder / 'calls.jsonl', 'a') as file:
    file.write(json.dumps(args) + '\n')
  assert args[:2] == ['compute', 'tpus'] and _flag(args, 'zone') == 'zone-a', args
  group, verb = args[2:4]
  name = args[5].partition(':')[0] if verb == 'scp' else args[4]
  state = _state_file(folder, name)
  if (group, verb) == ('queued-resources', 'create'):
    if (folder / 'no_quota').exists():
      sys.exit('ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit has been exceeded.')
    assert not state.exists(), 'there already'
    state.write_text('0')
    return 0
  if not state.exists():
    sys.exit(f'ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource {name} was not found')
  text = state.read_text()
  if (group, verb) == ('queued-resources', 'describe'):
    if text.isdigit():
      look = min(int(text), len(STATES) - 1)
      state.write_text(str(look + 1))
      text = STATES[look]
      if text == 'ACTIVE':
        for worker in range(WORKERS):
          worker_home(folder, name, worker).mkdir(parents=True, exist_ok=True)
    print(json.dumps({'name': name, 'state': {'state': text}}))
  elif (group, verb) == ('queued-resources', 'delete'):
    assert '--force' in args and '--quiet' in args
    _remove_workers(folder, name)
    state.unlink()
  elif (group, verb) == ('tpu-vm', 'describe'):
    print('READY')
  elif (group, verb) == ('tpu-vm', 'ssh'):
    chosen = range(WORKERS) if _flag(args, 'worker') == 'all' else [int(_flag(args, 'worker', '0'))]
    homes = [worker_home(folder, name, worker) for worker in chosen]
    if not all(home.exists() for home in homes):
      sys.exit('ERROR: (gcloud.compute.tpus.tpu-vm.ssh) Could not SSH into the instance.')
    started = [subprocess.Popen(['bash', '-c', _flag(args, 'command')], env=_environment(home), cwd=home) for home in homes]
    return max([process.wait() for process in started])
  elif (group, verb) == ('tpu-vm', 'scp'):
    assert _flag(args, 'worker') == 'all'
    for worker in range(WORKERS):
      shutil.copy(args[4], worker_home(folder, name, worker) / args[5].partition(':')[2])
  else:
    raise AssertionError(args)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
