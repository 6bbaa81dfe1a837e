"""The program that `running` starts: confines itself, runs a Python program, and reports how that ended.

Three processes, each trusted less: the launcher makes namespaces; the supervisor, the first process in them, holds the
time limit and ends what is left over; the confined process gives up its rights and then runs the program, without
starting another interpreter. Reads its order as JSON from stdin and writes one JSON object to the file descriptor named
in it. Imports the standard library only.
"""

import errno
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
import types
from typing import Any, Callable, Dict, Optional, Tuple

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import kernel  # pylint: disable=wrong-import-position
del sys.path[0]

_NOBODY = 65534
_LONGEST = 300  # characters of an error
_NAME = 'solution'  # of the module that the program becomes: not '__main__', as in the original harness


def main() -> None:
  """Entry point."""
  order = json.load(sys.stdin)
  os.umask(0o022)
  sys.path += order['packages']
  try:
    kernel.die_with_parent()
    if 'namespaces' in order['tools']:
      _in_step('namespaces', kernel.unshare)
      supervisor = os.fork()  # the first process of the new namespace: when it ends, all in there do
      if supervisor:
        os.waitpid(supervisor, 0)
        return
      kernel.die_with_parent()
      _in_step('namespaces', lambda: _build_root(order))
    report = _supervise(order)
  except _StepError as error:
    report = error.report()
  os.write(order['report_fd'], json.dumps(report).encode())
  os._exit(0)


class _StepError(Exception):
  """A tool of isolation that cannot be used."""

  def __init__(self, tool: str, error: BaseException):
    super().__init__(f'{type(error).__name__}: {error}')
    self.tool = tool

  def report(self) -> Dict[str, Any]:
    return {'status': 'setup', 'tool': self.tool, 'error': str(self)}


def _in_step(tool: str, step: Callable[[], None]) -> None:
  try:
    step()
  except (OSError, AttributeError, ValueError) as error:  # AttributeError: a libc without the function
    raise _StepError(tool, error) from error


def _build_root(order: Dict[str, Any]) -> None:
  """A root of its own: what Python needs, to read; an empty /tmp of limited size, to write; nothing else."""
  root = order['folder']
  kernel.keep_mounts_private()
  kernel.mount_memory(root, 1 << 20, 0o755)
  os.mkdir(f'{root}/tmp')
  kernel.mount_memory(f'{root}/tmp', order['limits']['folder_bytes'], 0o755)
  for path, target in order['links']:
    os.symlink(target, root + path)
  for path in order['readable']:
    if os.path.isdir(path):
      os.makedirs(root + path, exist_ok=True)
    else:
      os.makedirs(os.path.dirname(root + path), exist_ok=True)
      os.close(os.open(root + path, os.O_CREAT | os.O_WRONLY, 0o644))
    kernel.bind(path, root + path)
    kernel.set_mount_flags(root + path, kernel.READ_ONLY | kernel.NO_SETUID, recursive=True)
  kernel.set_mount_flags(root, kernel.READ_ONLY | kernel.NO_SETUID | kernel.NO_DEVICES, recursive=False)
  kernel.enter_root(root)
  order['folder'] = '/tmp'
  order['readable'] = ['/']


def _supervise(order: Dict[str, Any]) -> Dict[str, Any]:
  """Starts the confined process, ends it when its time is over, and whatever it left behind."""
  kernel.adopt_orphans()
  signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
  reader, writer = os.pipe()
  secret = os.urandom(16).hex()  # what the program does not know, it cannot report by accident
  begin = time.monotonic()
  child = os.fork()
  if child == 0:
    os.close(reader)
    os.close(order['report_fd'])
    _confined(order, writer, secret)
  os.close(writer)
  ended = _wait(child, begin + order['limits']['seconds'])
  seconds = time.monotonic() - begin
  if ended is None:
    os.kill(child, signal.SIGKILL)
    ended = (os.waitpid(child, 0)[1], None)
  if not {'namespaces', 'bubblewrap'} & set(order['tools']):
    _end_descendants()
  return {**_conclusion(order, ended, _verdict(reader, secret)), 'seconds': seconds}


def _wait(child: int, deadline: float) -> Optional[Tuple[int, Any]]:
  """Wait status and resource usage of a child; None if it is still running at the deadline."""
  while True:
    pid, status, usage = os.wait4(-1, os.WNOHANG)
    if pid == child:
      return status, usage
    if pid:
      continue  # an orphan that was adopted
    left = deadline - time.monotonic()
    if left <= 0:
      return None
    signal.sigtimedwait([signal.SIGCHLD], left)


def _end_descendants() -> None:
  """Kills children until there are none; the children of those become ours, and are next."""
  list_of_children = f'/proc/self/task/{os.getpid()}/children'
  while os.path.exists(list_of_children):  # an option of the kernel
    with open(list_of_children, encoding='ascii') as file:
      children = [int(pid) for pid in file.read().split()]
    if not children:
      return
    for pid in children:
      os.kill(pid, signal.SIGKILL)
    for pid in children:
      os.waitpid(pid, 0)


def _verdict(reader: int, secret: str) -> Optional[Dict[str, Any]]:
  """What the confined process said last; the program may have written to its pipe, too."""
  said = os.read(reader, 1 << 16) if select.select([reader], [], [], 0)[0] else b''
  for line in reversed(said.split(b'\n')):
    if line.startswith(secret.encode()):
      return json.loads(line[len(secret):])
  return None


def _conclusion(order: Dict[str, Any], ended: Tuple[int, Any], verdict: Optional[Dict[str, Any]]) -> Dict[str, Any]:
  status, usage = ended
  if usage is None:
    return {'status': 'timed out', 'error': f"still running after {order['limits']['seconds']:g} s"}
  if verdict is not None:
    return verdict
  if not os.WIFSIGNALED(status):
    return {'status': 'failed', 'error': f'ended with exit status {os.WEXITSTATUS(status)} before it was through'}
  number = os.WTERMSIG(status)
  if number == signal.SIGXCPU or number == signal.SIGKILL and usage.ru_utime + usage.ru_stime >= _cpu_limit(order):
    return {'status': 'timed out', 'error': f'computed for more than {_cpu_limit(order)} s'}
  if number == signal.SIGKILL:  # not by us: the system ends processes like that when its memory is used up
    return {'status': 'out of memory', 'error': 'killed, presumably for its memory'}
  return {'status': 'failed', 'error': f'killed by {signal.Signals(number).name}'}


def _cpu_limit(order: Dict[str, Any]) -> int:
  return int(order['limits']['seconds']) + 1


def _confined(order: Dict[str, Any], writer: int, secret: str) -> None:
  """The rest of the confined process's life."""
  # The program may replace these functions.
  leave, write, text, whoami, pid = os._exit, os.write, json.dumps, os.getpid, os.getpid()
  try:
    _confine(order)
    verdict = None
  except _StepError as error:
    verdict = error.report()
  except BaseException as error:  # pylint: disable=broad-exception-caught
    verdict = _StepError('limits', error).report()
  if verdict is None:
    verdict = _run(order['program'])
  if whoami() == pid:  # else a fork that came to the end, too
    write(writer, f'\n{secret}{text(verdict)}\n'.encode())
  leave(0)


def _confine(order: Dict[str, Any]) -> None:
  """Gives up rights, for good; raises _StepError."""
  folder = order['folder']
  null = os.open('/dev/null', os.O_RDWR)
  os.dup2(null, 0)
  os.close(null)
  signal.pthread_sigmask(signal.SIG_SETMASK, [])
  # Threads of numerical libraries would be as many as there are cores, whatever the limits.
  os.environ.update(TMPDIR=folder, HOME=folder, OPENBLAS_NUM_THREADS='1', OMP_NUM_THREADS='1')
  if os.geteuid() == 0 and _readable_for_all(os.__file__):
    _become_nobody(folder)
  os.chdir(folder)
  _set_limits(order)
  kernel.drop_capabilities()
  if 'landlock' in order['tools']:
    _in_step('landlock', lambda: kernel.landlock(order['readable'], [folder]))
  if 'seccomp' in order['tools']:
    _in_step('seccomp', kernel.seccomp)


def _readable_for_all(path: str) -> bool:
  """Whether any user may read a file: root's own Python cannot be used by another."""
  if not os.stat(path).st_mode & 0o004:
    return False
  while path != '/':
    path = os.path.dirname(path)
    if not os.stat(path).st_mode & 0o001:
      return False
  return True


def _become_nobody(folder: str) -> None:
  """Limits do not bind root, and root may change what belongs to others."""
  try:
    os.chown(folder, _NOBODY, _NOBODY)
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
  except OSError:  # a namespace that has no such user: root only by name
    os.chown(folder, os.geteuid(), os.getegid())


def _set_limits(order: Dict[str, Any]) -> None:
  limits = order['limits']
  processes = limits['processes']
  try:
    kernel.unshare_user()
  except OSError:  # then the limit is one for all that this user runs
    processes += _threads_of_this_user()
  for name, value in (('AS', limits['memory_bytes']), ('FSIZE', limits['file_bytes']), ('NPROC', processes),
                      ('CPU', _cpu_limit(order)), ('NOFILE', 64), ('CORE', 0), ('MEMLOCK', 0), ('MSGQUEUE', 0)):
    kind = getattr(resource, f'RLIMIT_{name}')
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _threads_of_this_user() -> int:
  count = 0
  for name in os.listdir('/proc') if os.path.exists('/proc') else ():
    try:
      if name.isdecimal() and os.stat(f'/proc/{name}').st_uid == os.getuid():
        count += len(os.listdir(f'/proc/{name}/task'))
    except OSError:  # it has ended meanwhile
      pass
  return count


def _run(program: str) -> Dict[str, Any]:
  """Runs a program as a module; its verdict. An exit is an error: the program is asked to come to its end."""
  module = types.ModuleType(_NAME)
  sys.modules[_NAME] = module
  try:
    exec(compile(program, f'{_NAME}.py', 'exec'), module.__dict__)  # pylint: disable=exec-used  # confined above
    sys.stdout.flush()
  except BaseException as error:  # pylint: disable=broad-exception-caught
    memory = isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno == errno.ENOMEM
    return {'status': 'out of memory' if memory else 'failed', 'error': _last_line(error)}
  return {'status': 'passed', 'error': ''}


def _last_line(error: BaseException) -> str:
  try:
    lines = ''.join(traceback.format_exception_only(type(error), error)).strip().splitlines()
    return lines[-1][:_LONGEST]
  except BaseException:  # pylint: disable=broad-exception-caught  # of a class of the program
    return 'an error that cannot be printed'


if __name__ == '__main__':
  main()
