"""Trains on a slice of Cloud TPUs: makes it, installs this checkout on all its workers, starts, follows and resumes a run.

  python -m openmoe_jax.tools.tpu create NAME --zone=us-central2-b --accelerator=v4-32 --spot
  python -m openmoe_jax.tools.tpu install NAME
  python -m openmoe_jax.tools.tpu start NAME -- --gin_file=recipes/openmoe_8b.gin --model_dir=gs://BUCKET/run
  python -m openmoe_jax.tools.tpu follow NAME
  python -m openmoe_jax.tools.tpu resume NAME --keep      # makes the slice again whenever it is taken away
  python -m openmoe_jax.tools.tpu status|stop|delete NAME

With --dry_run every command is printed and none is run. Needs gcloud, with a project and a login.
"""

import functools
import os
import re
import sys
import tempfile
import time
from typing import Dict, Optional, Sequence, Tuple

from openmoe_jax import command_line
from openmoe_jax.checks import require
from openmoe_jax.tools.tpu import gcloud, jobs, workers
from openmoe_jax.tools.tpu.gcloud import CommandError, Runner
from openmoe_jax.tools.tpu.jobs import Job

CHECKOUT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Exit status: 0 done, 2 a mistake in the arguments, 1 a command of gcloud failed or the run has ended with an error."""
  try:
    sys.exit(command_line.run_main(_main, argv))
  except CommandError as error:
    print(f'tpu: {error}', file=sys.stderr)
    sys.exit(1)


def _main(argv: Optional[Sequence[str]]) -> int:
  argv = list(sys.argv[1:] if argv is None else argv)
  own, train_flags = (argv[:argv.index('--')], argv[argv.index('--') + 1:]) if '--' in argv else (argv, [])
  args = _parser().parse_args(own)
  require(not train_flags or args.command is start, 'flags of training after -- belong to "start"')
  require(re.fullmatch('[a-z]([-a-z0-9]*[a-z0-9])?', args.name) is not None, f'{args.name!r} cannot be the name of a slice: '
          'small letters, digits and -, beginning with a letter')
  args.train_flags = train_flags
  run = Runner(args.dry_run)
  if args.command is create:
    return create(run, args)
  return args.command(run, jobs.load(args.name, args.zone, args.project), args)


def _parser() -> command_line.Parser:
  parser = command_line.Parser(configured=False, prog='python -m openmoe_jax.tools.tpu', description=__doc__)
  commands = parser.add_subparsers(required=True, metavar='COMMAND', parser_class=functools.partial(
      command_line.Parser, configured=False))

  def add(function, text):
    command = commands.add_parser(function.__name__, description=text, help=text)
    command.set_defaults(command=function)
    command.add_argument('name', metavar='NAME', help='of the slice')
    command.add_argument('--zone', default='', help='needed once: it is remembered')
    command.add_argument('--project', default='', help="default: gcloud's own")
    command.add_argument('--dry_run', action='store_true', help='print the commands instead')
    command.add_argument('--poll_seconds', type=float, default=30., help='between two looks at a slice')
    return command

  made = add(create, 'asks for a slice and waits for it')
  made.add_argument('--accelerator', required=True, help='such as v4-32 or v5litepod-16')
  made.add_argument('--runtime_version', default='', help='image; default: the one for the accelerator')
  tier = made.add_mutually_exclusive_group()
  tier.add_argument('--spot', dest='tier', action='store_const', const='spot', default='', help='cheap, and taken away '
                    'when somebody else needs it')
  tier.add_argument('--reserved', dest='tier', action='store_const', const='reserved', help="from the project's "
                    'reservation')
  made.add_argument('--gcloud_flag', action='append', default=[], metavar='FLAG', help='a further flag of gcloud compute '
                    'tpus queued-resources create, as in --gcloud_flag=--valid-until-duration=6h; may be repeated')
  made.add_argument('--no_wait', action='store_true', help='return while the request waits in its queue')
  installed = add(install, 'copies the committed state of a checkout to all workers and installs it')
  started = add(start, 'starts training on all workers; its flags follow after --')
  resumed = add(resume, 'starts again what has stopped, on a new slice if the old one is gone')
  for command in (installed, resumed):
    command.add_argument('--checkout', default=CHECKOUT, metavar='DIR', help='what to install; default: this one')
  started.add_argument('--restarts', type=int, default=10, help='how often training is started again after status 3: a '
                       'lost process, or no step for too long')
  started.add_argument('--allow_local_dir', action='store_true', help="a model_dir on the machines' own disks")
  resumed.add_argument('--keep', action='store_true', help='watch, and do that whenever needed, until training has ended')
  add(follow, 'shows the log of worker 0 until training ends').add_argument('--lines', type=int, default=50)
  add(status, 'tells the state of the slice and of every worker')
  add(stop, 'lets training save a checkpoint and end')
  add(delete, 'gives the slice back; what is not in gs:// is lost')
  return parser


def create(run: Runner, args) -> int:
  require(args.zone != '', 'give --zone: the zone of Google Cloud that has such slices')
  job = Job(args.name, args.zone, args.project, args.accelerator,
            args.runtime_version or jobs.runtime_version(args.accelerator), args.tier, tuple(args.gcloud_flag))
  if not run.dry_run:
    jobs.save(job)
  gcloud.create(run, job)
  if not args.no_wait:
    gcloud.wait_until_active(run, job, args.poll_seconds)
    run.say(f'{job.name} is there')
  return 0


def install(run: Runner, job: Job, args) -> int:
  _install(run, job, args.checkout)
  return 0


def _install(run: Runner, job: Job, checkout: str) -> None:
  require(os.path.exists(os.path.join(checkout, 'requirements.lock')), f'--checkout={checkout} is no checkout of '
          'openmoe_jax: requirements.lock is not there')
  changed = run(['git', '-C', checkout, 'status', '--porcelain', '--untracked-files=no'])
  if changed.stdout.strip():
    run.say(f'changes in {checkout} that are not committed are not installed')
  with tempfile.TemporaryDirectory() as folder:
    archive = os.path.join(folder, workers.ARCHIVE)
    run(['git', '-C', checkout, 'archive', '--format=tar.gz', f'--output={archive}', 'HEAD'])
    run(gcloud.scp(job, archive, workers.ARCHIVE))
  run.say(f'installing on all workers of {job.name}, some minutes')
  _show(run, job, workers.INSTALL)


def start(run: Runner, job: Job, args) -> int:
  flags = tuple(args.train_flags) or job.train_flags
  require(flags != (), 'give the flags of openmoe-train after --')
  model_dir = [flag.partition('=')[2] for flag in flags if flag.startswith(('--model_dir=', '--gin.MODEL_DIR='))]
  require(bool(model_dir), 'give --model_dir=gs://BUCKET/DIR after --')
  require(args.allow_local_dir or model_dir[-1].strip('\'"').startswith('gs://'), f'--model_dir={model_dir[-1]} is on the '
          "machines' own disks, which are lost with the slice, and which several workers do not share: give "
          'gs://BUCKET/DIR, or --allow_local_dir')
  job = job.replace(train_flags=flags, restarts=args.restarts)
  if not run.dry_run:
    jobs.save(job)
  _show(run, job, workers.start(job))
  return 0


def follow(run: Runner, job: Job, args) -> int:
  return run.attached(gcloud.ssh(job, workers.follow(job, args.lines), worker='0'))


def status(run: Runner, job: Job, args) -> int:
  del args
  found = gcloud.state(run, job)
  run.say(f'{job.name}: {found}')
  if found == 'ACTIVE':
    for host, (state, last) in sorted(_answers(run, job).items()):
      run.say(f'{host}: {state}   {last}')
  return 0


def stop(run: Runner, job: Job, args) -> int:
  del args
  _show(run, job, workers.stop(job))
  return 0


def delete(run: Runner, job: Job, args) -> int:
  del args
  gcloud.delete(run, job)
  if not run.dry_run:
    jobs.forget(job.name)
  return 0


def resume(run: Runner, job: Job, args) -> int:
  """Brings a run back to life; with --keep until it has ended."""
  require(job.train_flags != () or run.dry_run, f'{job.name!r} was not started from this machine: use "start"')
  while True:
    try:
      ended = _resume_once(run, job, args)
    except CommandError as error:
      if not args.keep:
        raise
      ended = None
      run.say(f'{job.name}: {error}; trying again')
    if run.dry_run:
      _say_what_else(run, job, args)
    if ended is not None or not args.keep or run.dry_run:
      return ended or 0
    time.sleep(args.poll_seconds)


def _resume_once(run: Runner, job: Job, args) -> Optional[int]:
  """Looks at slice and run and starts what does not run; the status to end with, or None while it trains."""
  found = gcloud.state(run, job)
  if found in gcloud.GONE:
    _replace(run, job, found, args)
  elif found != 'ACTIVE':
    gcloud.wait_until_active(run, job, args.poll_seconds)
    _install(run, job, args.checkout)
  states = {state for state, _ in _answers(run, job).values()}
  if workers.RUNNING in states or run.dry_run:
    run.say(f'{job.name} is training')
    return None
  if args.keep and states and states <= {'ended 0', 'ended 1', 'ended 2'}:  # not again: it would end in the same way
    run.say(f'{job.name}: training {" and ".join(sorted(states))}')
    return int(states != {'ended 0'})
  run.say(f'{job.name}: {" and ".join(sorted(states)) or "no answer"}; starting')
  _show(run, job, workers.start(job))
  return None


def _say_what_else(run: Runner, job: Job, args) -> None:
  """The rest of a dry run: the commands for a slice that is gone, and for a run that has stopped."""
  run.say('if the slice is gone:')
  if job.accelerator:
    _replace(run, job, 'SUSPENDED', args)
  else:
    run.say(f'nothing: {job.name} was not created from this machine')
  run.say('if training does not run:')
  _show(run, job, workers.start(job))


def _replace(run: Runner, job: Job, found: str, args) -> None:
  """A new slice in place of one that is gone, with everything installed."""
  require(job.accelerator != '', f'{job.name!r} is {found} and was not created from this machine: use "create"')
  run.say(f'{job.name}: {found}; making it again')
  if found != 'MISSING':
    gcloud.delete(run, job)
  gcloud.create(run, job)
  gcloud.wait_until_active(run, job, args.poll_seconds)
  _install(run, job, args.checkout)


def _show(run: Runner, job: Job, script: str) -> None:
  """Runs a script on all workers and prints what they say."""
  for line in run(gcloud.ssh(job, script)).stdout.splitlines():
    run.say(line)


def _answers(run: Runner, job: Job) -> Dict[str, Tuple[str, str]]:
  """{host: (state, last line of its log)}."""
  return workers.answers(run(gcloud.ssh(job, workers.status(job))).stdout)


if __name__ == '__main__':
  sys.argv[0] = 'tpu'  # the name in front of errors
  main()
