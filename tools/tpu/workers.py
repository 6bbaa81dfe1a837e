"""What the workers of a slice do: shell scripts that are sent to all of them, and what they answer.

A worker has ~/openmoe_jax (the checkout and its .venv) and ~/openmoe_runs/NAME: `log`; `pid` of the loop that starts
training, and again when it was killed or ended with status 3, which means that another process was lost or that the run
hung; `status` of the last start that ended; `stop` when it was told to.
"""

import shlex
from typing import Dict, Tuple

from openmoe_jax.tools.tpu.jobs import Job

ARCHIVE = 'openmoe_jax.tar.gz'
_ANSWER = 'openmoe_worker'
_SECONDS_BEFORE_RESTART = 10
RUNNING, NEVER = 'running', 'never started'

# The images come with Python 3.10, which is too old; uv brings one without root.
INSTALL = f'''set -e
mkdir -p ~/openmoe_jax
cd ~/openmoe_jax
find . -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {{}} +
tar -xzf ~/{ARCHIVE}
python3 -m pip --version > /dev/null 2>&1 || sudo apt-get install --yes --quiet python3-pip
python3 -m pip install --quiet --user uv
test -x .venv/bin/python || python3 -m uv venv --quiet --seed --python 3.12 .venv
.venv/bin/python -m pip install --quiet --no-deps -r requirements.lock
.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
.venv/bin/python -m pip install --quiet "jax[tpu]==$(sed -n 's/^jax==//p' requirements.lock)"
echo "$(hostname): installed"'''


def _folder(job: Job) -> str:
  return f'~/openmoe_runs/{shlex.quote(job.name)}'


def start(job: Job) -> str:
  """Starts training in the background, unless it runs already."""
  train = shlex.join(['.venv/bin/openmoe-train', *job.train_flags])
  loop = '\n'.join((
      f'for attempt in $(seq 0 {job.restarts}); do',
      f'  {train}',
      '  status=$?',
      '  echo $status > "$folder/status"',
      '  [ ! -e "$folder/stop" ] && { [ $status = 3 ] || [ $status -ge 128 ]; } || exit $status',
      '  echo "ended with status $status: starting again"',
      f'  sleep {_SECONDS_BEFORE_RESTART}',
      'done'))
  return f'''folder={_folder(job)}
mkdir -p "$folder"
cd ~/openmoe_jax || exit 1
if kill -0 "$(cat "$folder/pid" 2> /dev/null)" 2> /dev/null; then echo "$(hostname): runs already"; exit 0; fi
rm -f "$folder/status" "$folder/stop"
export folder
setsid nohup bash -c {shlex.quote(loop)} >> "$folder/log" 2>&1 < /dev/null &
echo $! > "$folder/pid"
echo "$(hostname): started"'''


def stop(job: Job) -> str:
  """Asks training to save a checkpoint and end. One worker that is told tells the others; all are, to be sure."""
  return f'''folder={_folder(job)}
touch "$folder/stop"
pkill -TERM -P "$(cat "$folder/pid" 2> /dev/null)" && echo "$(hostname): told to stop" || echo "$(hostname): runs not"'''


def status(job: Job) -> str:
  """Prints a line for `answers`."""
  return f'''folder={_folder(job)}
if kill -0 "$(cat "$folder/pid" 2> /dev/null)" 2> /dev/null; then state={RUNNING}
elif [ -e "$folder/status" ]; then state="ended $(cat "$folder/status")"
elif [ -e "$folder/pid" ]; then state="ended 137"
else state="{NEVER}"; fi
echo "{_ANSWER}|$(hostname)|$state|$(tail -n 1 "$folder/log" 2> /dev/null | tr -d '\\r')"'''


def follow(job: Job, lines: int) -> str:
  """Shows the log until training has ended."""
  return f'''folder={_folder(job)}
tail -n {lines} --pid="$(cat "$folder/pid")" -F "$folder/log" 2> /dev/null
echo "ended with status $(cat "$folder/status" 2> /dev/null)"'''


def answers(output: str) -> Dict[str, Tuple[str, str]]:
  """{host: (state, last line of its log)} from what `status` printed on all workers."""
  rows = [line.split('|', 3) for line in output.splitlines() if line.startswith(f'{_ANSWER}|')]
  return {host: (state, last) for _, host, state, last in rows}
