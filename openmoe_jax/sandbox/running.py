"""Starts a program in a sandbox and hears how it ended."""

import dataclasses
import functools
import json
import os
import pathlib
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from typing import List, NamedTuple, Sequence, Tuple

from openmoe_jax.config import require

PASSED, FAILED, TIMED_OUT, OUT_OF_MEMORY = STATUSES = ('passed', 'failed', 'timed out', 'out of memory')
_INSIDE = pathlib.Path(__file__).with_name('inside.py')
_PATIENCE = 20.  # seconds for starting and ending, on a machine that is busy
# Besides Python's own folders: libraries, time zones, and devices that hold nothing.
_SHARED = ('/usr', '/lib', '/lib32', '/lib64', '/nix/store', '/etc/ld.so.cache', '/etc/localtime', '/dev/null',
           '/dev/zero', '/dev/random', '/dev/urandom')


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a program may use.

  Attributes:
    seconds: from its start to its end, waiting included.
    memory_bytes: address space of a process.
    processes: processes and threads together; where seccomp is used, threads only.
    file_bytes: of one file.
    folder_bytes: of all files together, where the folder is kept in memory (namespaces, bubblewrap 0.7).
    output_bytes: written to stdout and stderr; a program that writes more is ended.
  """
  seconds: float = 10.
  memory_bytes: int = 1 << 30
  processes: int = 16
  file_bytes: int = 16 << 20
  folder_bytes: int = 64 << 20
  output_bytes: int = 1 << 20

  def __post_init__(self):
    require(self.seconds > 0, f'Limits.seconds = {self.seconds} must be positive')
    require(self.memory_bytes >= 64 << 20, f'Limits.memory_bytes = {self.memory_bytes} must be at least {64 << 20} '
            '(64 MB): Python itself needs half of that')
    for name in ('processes', 'file_bytes', 'folder_bytes', 'output_bytes'):
      require(getattr(self, name) >= 1, f'Limits.{name} = {getattr(self, name)} must be at least 1')


class Outcome(NamedTuple):
  """How a program ended.

  Attributes:
    status: one of STATUSES.
    error: one line; '' if it passed.
    seconds: that it ran.
    output: what it wrote, up to the limit.
    outlived: whether a process of it was still there at the end.
  """
  status: str
  error: str
  seconds: float
  output: str
  outlived: bool


class ToolError(RuntimeError):
  """A tool of isolation that does not work here: `tool` and the reason."""

  def __init__(self, tool: str, reason: str):
    super().__init__(f'{tool}: {reason}')
    self.tool = tool


@functools.cache
def needed_paths() -> Tuple[List[str], List[Tuple[str, str]]]:
  """What Python needs to run: files and folders, none of them below another; and symbolic links (path, target)."""
  python = [sys.prefix, sys.base_prefix, sys.exec_prefix, sysconfig.get_path('stdlib'), sysconfig.get_path('purelib'),
            sysconfig.get_path('platlib'), os.path.dirname(sys.executable),
            os.path.dirname(os.path.realpath(sys.executable)), str(_INSIDE.parent)]
  links = [(path, os.readlink(path)) for path in _SHARED if os.path.islink(path) and os.path.dirname(path) == '/']
  linked = {path for path, _ in links}
  given = {os.path.abspath(path) for path in (*_SHARED, *python) if os.path.exists(path) and path not in linked}
  given |= {os.path.realpath(path) for path in given}
  kept: List[str] = []
  for path in sorted(given):
    if not any(path.startswith(f'{folder}/') for folder in kept):
      kept.append(path)
  return kept, links


@functools.cache
def _limits_folders(bubblewrap: str) -> bool:
  """Whether this version (0.7 or later) takes the size of a folder."""
  done = subprocess.run([bubblewrap, '--help'], env={}, capture_output=True, text=True, timeout=_PATIENCE, check=False)
  return '--size' in done.stdout + done.stderr


def _command(tools: Sequence[str], order: dict) -> List[str]:
  # Without -S, start-up files of every package that is installed would run, in each program's time.
  python = [sys.executable, '-I', '-S', '-B', str(_INSIDE)]
  if 'bubblewrap' not in tools:
    return python
  bubblewrap = shutil.which('bwrap')
  if not bubblewrap:
    raise ToolError('bubblewrap', 'no program bwrap')
  command = [bubblewrap, '--die-with-parent', '--unshare-ipc', '--unshare-pid', '--unshare-net', '--unshare-uts',
             '--unshare-cgroup-try']
  if _limits_folders(bubblewrap):
    command += ['--size', str(order['limits']['folder_bytes'])]
  command += ['--tmpfs', '/tmp']
  for path in order['readable']:
    for parent in reversed(pathlib.PurePath(path).parents[:-1]):
      command += ['--dir', str(parent)]  # else closed to others where the original is, as /root
    command += ['--dev-bind' if path.startswith('/dev/') else '--ro-bind', path, path]
  for path, target in order['links']:
    command += ['--symlink', target, path]
  order.update(folder='/tmp', readable=['/'])
  return [*command, '--remount-ro', '/', '--chdir', '/tmp', '--', *python]


def run(program: str, tools: Sequence[str], limits: Limits = Limits()) -> Outcome:
  """Runs a program to its end, or to the end of its limits, in processes of its own.

  Args:
    program: Python; it passes if it comes to its end. It runs in an empty temporary folder, without the caller's
      environment and without input.
    tools: some of 'bubblewrap' or 'namespaces', 'landlock', 'seccomp', applied on top of the limits; see
      `isolation.isolation` for those that work here.

  Raises:
    ToolError: one of the tools does not work.
  """
  with tempfile.TemporaryDirectory(prefix='openmoe_sandbox_', ignore_cleanup_errors=True) as folder:
    readable, links = needed_paths()
    report_reader, report_writer = os.pipe()
    output_reader, output_writer = os.pipe()
    try:
      order = {'program': program, 'tools': list(tools), 'limits': dataclasses.asdict(limits), 'folder': folder,
               'readable': readable, 'links': links,
               'packages': sorted({sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}),
               'report_fd': report_writer}
      command = _command(tools, order)
      with tempfile.TemporaryFile('w+') as stdin:
        json.dump(order, stdin)
        stdin.seek(0)
        process = subprocess.Popen(  # pylint: disable=consider-using-with  # ended below, as a group
            command, stdin=stdin, stdout=output_writer, stderr=output_writer, pass_fds=[report_writer], env={}, cwd='/',
            start_new_session=True)
      os.close(report_writer)
      os.close(output_writer)
      report_writer = output_writer = None
      try:
        report, output, flooded = _listen(report_reader, output_reader, limits)
      finally:
        _end_group(process)
      outlived = _is_held(output_reader)
    finally:
      for end in (report_reader, report_writer, output_reader, output_writer):
        if end is not None:
          os.close(end)
  return _outcome(report, output, flooded, outlived, limits)


def _listen(report: int, output: int, limits: Limits) -> Tuple[bytes, bytes, bool]:
  """Reads both pipes until the report is complete: report, output, and whether there was too much of it."""
  said = {report: b'', output: b''}
  deadline = time.monotonic() + limits.seconds + _PATIENCE
  with selectors.DefaultSelector() as pipes:  # poll or better: file descriptors may have numbers too large for select
    pipes.register(report, selectors.EVENT_READ)
    pipes.register(output, selectors.EVENT_READ)
    while waited := set(pipes.get_map()):
      # After the report, only what is in the pipe already.
      ready = pipes.select(max(deadline - time.monotonic(), 0) if report in waited else 0)
      if not ready:
        break
      for key, _ in ready:
        data = os.read(key.fd, 1 << 16)
        said[key.fd] += data
        if not data:
          pipes.unregister(key.fd)
      if len(said[output]) > limits.output_bytes:
        return said[report], said[output][:limits.output_bytes], True
  return said[report], said[output], False


def _end_group(process: subprocess.Popen) -> None:
  try:
    os.killpg(process.pid, signal.SIGKILL)
  except ProcessLookupError:
    pass
  process.wait()


def _is_held(output: int) -> bool:
  """Whether somebody still has the other end of the pipe; killed processes get a moment to go."""
  deadline = time.monotonic() + .5
  with selectors.DefaultSelector() as pipes:
    pipes.register(output, selectors.EVENT_READ)
    while (left := deadline - time.monotonic()) > 0:
      if pipes.select(left) and not os.read(output, 1 << 16):
        return False
  return True


def _outcome(report: bytes, output: bytes, flooded: bool, outlived: bool, limits: Limits) -> Outcome:
  text = output.decode('utf-8', 'replace')
  if flooded:
    return Outcome(FAILED, f'wrote more than {limits.output_bytes:,} bytes', 0., text, outlived)
  try:
    said = json.loads(report)
  except ValueError:  # nothing, or a beginning: the program ended its supervisor, or the tool could not start
    said = None
  if said is None:
    last = (text.strip().splitlines() or ['no reason given'])[-1]
    if text.startswith('bwrap:'):
      raise ToolError('bubblewrap', last)
    return Outcome(FAILED, f'ended without a report: {last}', 0., text, outlived)
  if said['status'] == 'setup':
    raise ToolError(said['tool'], said['error'])
  return Outcome(said['status'], said['error'], said['seconds'], text, outlived)
