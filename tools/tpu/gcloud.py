"""Runs gcloud, or prints what it would run; queued resources and their states."""

import json
import shlex
import shutil
import subprocess
import time
from typing import Callable, List, Sequence

from openmoe_jax.checks import require
from openmoe_jax.tools.tpu.jobs import Job

_TPUS = ('gcloud', 'compute', 'tpus')
WAITING = ('CREATING', 'ACCEPTED', 'WAITING_FOR_RESOURCES', 'PROVISIONING')
GONE = ('FAILED', 'SUSPENDING', 'SUSPENDED', 'DELETING', 'MISSING', 'PREEMPTED')


class CommandError(RuntimeError):
  """A command failed; the message says which and why."""


class Runner:
  """Runs commands; with `dry_run` prints each, and takes every slice for active and every run for running."""

  def __init__(self, dry_run: bool = False):
    self.dry_run = dry_run

  def say(self, text: str) -> None:
    print(f'# {text}' if self.dry_run else text, flush=True)

  def __call__(self, command: Sequence[str], may_fail: bool = False) -> subprocess.CompletedProcess:
    """Runs a command and returns what it printed.

    Raises:
      CommandError: it cannot be run, or ended with another status than 0 (unless `may_fail`).
    """
    if self._printed(command):
      return subprocess.CompletedProcess(command, 0, '', '')
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and not may_fail:
      reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or [f'status {done.returncode}']
      raise CommandError(f'{shlex.join(command)[:200]}: {reason[0]}')
    return done

  def attached(self, command: Sequence[str]) -> int:
    """Runs a command on this terminal; returns its status."""
    return 0 if self._printed(command) else subprocess.call(command)

  def _printed(self, command: Sequence[str]) -> bool:
    if self.dry_run:
      print(shlex.join(command), flush=True)
      return True
    require(shutil.which(command[0]) is not None, f'{command[0]} is not installed or not on the PATH' + (
        ': https://cloud.google.com/sdk/docs/install' if command[0] == 'gcloud' else ''))
    return False


def _place(job: Job) -> List[str]:
  return [f'--zone={job.zone}'] + ([f'--project={job.project}'] if job.project else [])


def create(run: Runner, job: Job) -> None:
  """Asks for the slice; it comes when there is room."""
  tier = [f'--{job.tier}'] if job.tier else []
  run([*_TPUS, 'queued-resources', 'create', job.name, f'--node-id={job.name}', *_place(job),
       f'--accelerator-type={job.accelerator}', f'--runtime-version={job.runtime_version}', *tier, *job.gcloud_flags,
       '--quiet'])


def delete(run: Runner, job: Job) -> None:
  """Gives the slice back. --force: its machines first; a request that has ended counts against the quota until then."""
  run([*_TPUS, 'queued-resources', 'delete', job.name, *_place(job), '--force', '--quiet'])


def state(run: Runner, job: Job) -> str:
  """State of the queued resource, or MISSING; PREEMPTED where its machines are gone and it has not noticed yet."""
  done = run([*_TPUS, 'queued-resources', 'describe', job.name, *_place(job), '--format=json'], may_fail=True)
  if run.dry_run:
    return 'ACTIVE'
  if done.returncode:
    if 'NOT_FOUND' in done.stderr:
      return 'MISSING'
    raise CommandError(f'gcloud cannot describe {job.name}: {(done.stderr.strip().splitlines() or ["?"])[-1]}')
  found = json.loads(done.stdout)['state']['state']
  if found != 'ACTIVE':
    return found
  node = run([*_TPUS, 'tpu-vm', 'describe', job.name, *_place(job), '--format=value(state)'], may_fail=True)
  lost = node.returncode and 'NOT_FOUND' in node.stderr or node.stdout.strip() in ('PREEMPTED', 'TERMINATED')
  return 'PREEMPTED' if lost else 'ACTIVE'


def wait_until_active(run: Runner, job: Job, poll_seconds: float, sleep: Callable[[float], None] = time.sleep) -> None:
  """Waits for the slice, for as long as it takes, and says when its state changes.

  Raises:
    CommandError: the request has failed.
  """
  before = ''
  while True:
    now = state(run, job)
    if now == 'ACTIVE':
      return
    if now in GONE:
      raise CommandError(f'the request for {job.name} is {now}: "gcloud compute tpus queued-resources describe {job.name} '
                         f'--zone={job.zone}" says why')
    if now != before:
      run.say(f'{job.name}: {now}')
    before = now
    sleep(poll_seconds)


def ssh(job: Job, script: str, worker: str = 'all') -> List[str]:
  """The command that runs a shell script on a worker, or on all at the same time."""
  return [*_TPUS, 'tpu-vm', 'ssh', job.name, *_place(job), f'--worker={worker}', f'--command={script}', '--quiet']


def scp(job: Job, file: str, target: str) -> List[str]:
  """The command that copies a file to every worker's home folder."""
  return [*_TPUS, 'tpu-vm', 'scp', file, f'{job.name}:{target}', *_place(job), '--worker=all', '--quiet']
