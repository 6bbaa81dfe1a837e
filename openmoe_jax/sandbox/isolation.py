"""What this machine can enforce on a program, found out by running one that tries.

The report is measured, not derived from versions: a trial program connects, writes, reads and starts processes where it
should not be able to, and what it managed is what is reported.
"""

import contextlib
import functools
import json
import os
import socket
import sys
import tempfile
from typing import Dict, List, NamedTuple, Sequence, Tuple

from openmoe_jax.config import require
from openmoe_jax.sandbox import running

# Walls around a program, the strongest first, and what is taken away from it within any of them.
WALLS = ('bubblewrap', 'namespaces', '')
FILTERS = ('landlock', 'seccomp')

_TRIAL_LIMITS = running.Limits(seconds=10., memory_bytes=512 << 20, processes=4, output_bytes=1 << 16)
_MOST_CHILDREN = 8

# Its last line of output is a dictionary. What it has written is looked for outside.
_TRIAL = '''
import json, os, socket, time
order, got = json.loads(ORDER), {'network': False, 'reads': False, 'signals': False, 'children': 0}

def attempt(action):
  try:
    return action()
  except (OSError, MemoryError):
    return None

import statistics  # not loaded so far: the library can be read
open('own', 'w').write('a file of its own')

for family, address in ((socket.AF_INET, ('127.0.0.1', order['port'])), (socket.AF_UNIX, order['door'])):
  def connect():
    with socket.socket(family, socket.SOCK_STREAM) as connection:
      connection.settimeout(2)
      connection.connect(address)
      return True
  got['network'] |= bool(attempt(connect))
got['reads'] |= bool(attempt(lambda: open(order['existing']).read()))
got['reads'] |= bool(attempt(lambda: open('/proc/%d/environ' % order['caller']).read()))
got['signals'] = bool(attempt(lambda: os.kill(os.getppid(), 0) is None))
attempt(lambda: open(order['existing'], 'a').write('more'))
attempt(lambda: open(order['new'], 'w').write('text'))
attempt(lambda: os.chmod(order['existing'], 0o600))
while got['children'] < order['children']:
  child = attempt(os.fork)
  if child is None:
    break
  if child == 0:
    attempt(os.setsid)
    time.sleep(3)  # holds stdout, by which it is noticed if it outlives this program
    os._exit(0)
  got['children'] += 1
print(json.dumps(got))
'''


class Isolation(NamedTuple):
  """What holds for a program run with `tools`, on top of the limits of time, memory, file size and output.

  Attributes:
    tools: for `running.run`.
    network: it can neither connect to this machine nor to another.
    writes: it cannot change files outside its temporary folder.
    processes: the processes it starts are limited in number, and none is left when it ends.
    reads: it can read neither files other than Python's and the system's libraries nor the caller's environment.
    missing: why stronger tools are not used, {tool: reason}.
  """
  tools: Tuple[str, ...]
  network: bool
  writes: bool
  processes: bool
  reads: bool
  missing: Dict[str, str]

  @property
  def complete(self) -> bool:
    return self.network and self.writes and self.processes and self.reads

  def sentence(self) -> str:
    """What to print before anything is run."""
    with_tools = f'with {", ".join(self.tools)} and limits' if self.tools else 'with limits alone'
    held = {'no network': self.network, 'no writes outside a temporary folder': self.writes,
            'no processes left behind': self.processes, 'no reading of other files or of the environment': self.reads}
    open_ = {'the network can be used': self.network, 'files outside the temporary folder can be CHANGED': self.writes,
             'processes can be left behind, or be many': self.processes, 'other files can be read': self.reads}
    text = f'Generated code runs in processes of its own {with_tools} of time, memory, file size and output'
    good, bad = [name for name, holds in held.items() if holds], [name for name, holds in open_.items() if not holds]
    text += f': {", ".join(good)}.' if good else '.'
    if bad:
      text += f' WARNING: this machine does not contain everything: {", ".join(bad)}.'
    return text


def measure(tools: Sequence[str]) -> Isolation:
  """Runs the trial program with some tools.

  Raises:
    running.ToolError: one of them does not work here.
  """
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix='openmoe_trial_'))
    os.chmod(folder, 0o777)  # whatever user the program becomes: only isolation may keep it out
    place = {name: os.path.join(folder, name) for name in ('existing', 'new', 'door')}
    with open(place['existing'], 'w', encoding='ascii') as file:
      file.write('secret')
    os.chmod(place['existing'], 0o666)
    before = os.stat(place['existing'])
    tcp = stack.enter_context(socket.create_server(('127.0.0.1', 0)))
    door = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    door.bind(place['door'])
    os.chmod(place['door'], 0o777)
    door.listen()
    order = {**place, 'port': tcp.getsockname()[1], 'caller': os.getpid(), 'children': _MOST_CHILDREN}
    outcome = running.run(f'ORDER = {json.dumps(order)!r}\n{_TRIAL}', tools, _TRIAL_LIMITS)
    after = os.stat(place['existing'])
    changed = (before.st_size, before.st_mode) != (after.st_size, after.st_mode) or os.path.exists(place['new'])
  if outcome.status != running.PASSED:
    raise running.ToolError(tools[0] if tools else 'limits', f'the trial program {outcome.status}: {outcome.error}')
  got = json.loads(outcome.output.splitlines()[-1])
  # A program that can end its supervisor leaves nobody to end its children, except within a wall: they go with that.
  watched = not got['signals'] or bool({'bubblewrap', 'namespaces'} & set(tools))
  few = got['children'] < _TRIAL_LIMITS.processes
  return Isolation(tuple(tools), network=not got['network'], writes=not changed,
                   processes=few and watched and not outcome.outlived, reads=not got['reads'], missing={})


@functools.cache
def isolation() -> Isolation:
  """The strongest isolation that works on this machine; takes a second or less, the first time.

  Raises:
    ConfigError: this is not Linux, or no Python can be started at all.
  """
  require(sys.platform == 'linux', f'generated code is run on Linux only: nothing isolates it on {sys.platform}')
  missing: Dict[str, str] = {}
  found: List[Isolation] = []
  for wall in WALLS:
    found += _within(wall, missing)
    if found and found[-1].complete:
      return found[-1]._replace(missing=missing)
  require(bool(found), f'no Python can be started for generated code: {missing.get("limits")}')
  return max(found, key=lambda one: one.network + one.writes + one.processes + one.reads)._replace(missing=missing)


def _within(wall: str, missing: Dict[str, str]) -> List[Isolation]:
  """What holds within a wall and as many filters as work; empty if the wall does not. Adds to `missing`."""
  tools = [tool for tool in (wall, *FILTERS) if tool and tool not in missing]
  while True:
    try:
      return [measure(tools)]
    except running.ToolError as error:
      missing[error.tool] = str(error)
      if error.tool not in tools or error.tool == wall:
        return []
      tools.remove(error.tool)
