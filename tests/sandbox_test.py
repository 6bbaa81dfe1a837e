"""Programs that misbehave, under every combination of tools that works on this machine: what the report says is held.

Where a combination does not contain something, the misbehaviour here is harmless: it stays in folders of the test, in
processes that end by themselves, and on local sockets.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time

from openmoe_jax import config
from openmoe_jax.sandbox import isolation as isolation_lib
from openmoe_jax.sandbox import running
import pytest

LIMITS = running.Limits(seconds=20., memory_bytes=256 << 20, processes=6)
COMBINATIONS = (('bubblewrap', 'landlock', 'seccomp'), ('bubblewrap',), ('namespaces', 'landlock', 'seccomp'),
                ('namespaces',), ('landlock', 'seccomp'), ('landlock',), ('seccomp',), ())


@functools.cache
def report_on(tools):
  """The isolation measured with tools; the reason where they do not work."""
  try:
    return isolation_lib.measure(tools)
  except running.ToolError as error:
    return str(error)


@pytest.fixture(params=COMBINATIONS, ids=lambda tools: '+'.join(tools) or 'limits')
def report(request):
  found = report_on(request.param)
  if isinstance(found, str):
    pytest.skip(found)
  return found


@pytest.fixture
def outside():
  """A folder that anybody may write to, and that no tool knows about."""
  with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o777)
    yield pathlib.Path(folder)


@pytest.fixture(params=[True, False], ids=['strongest', 'limits'])
def ends(request):
  """The strongest isolation and the weakest, for what does not depend on the tools between."""
  return isolation_lib.isolation() if request.param else isolation_lib.measure(())


def run(program, report, **changes):
  return running.run(program, report.tools, dataclasses.replace(LIMITS, **changes))


def said(outcome):
  """What a program printed as JSON in its last line."""
  assert outcome.status == running.PASSED, outcome
  return json.loads(outcome.output.splitlines()[-1])


def test_an_ordinary_program(report):
  outcome = run('import collections, fractions\nprint(fractions.Fraction(1, 3) + 1)', report)
  assert outcome.status == running.PASSED and outcome.error == '' and outcome.output == '4/3\n'
  assert not outcome.outlived and 0 < outcome.seconds < LIMITS.seconds


def test_threads_and_files_of_its_own(report):
  program = '''
import json, os, tempfile, threading
found = []
thread = threading.Thread(target=lambda: found.append(1))
thread.start()
thread.join()
with open('mine', 'w') as file:
  file.write('text')
with tempfile.NamedTemporaryFile('w') as file:
  file.write('more')
  found.append(os.path.dirname(file.name) == os.getcwd())
print(json.dumps([*found, open('mine').read()]))
'''
  assert said(run(program, report)) == [1, True, 'text']


def test_errors_are_named(ends):
  assert run('x = 1\nassert x == 2, "x is\\nnot two"', ends)[:2] == (running.FAILED, 'not two')
  assert run('def f(:', ends).error == 'SyntaxError: invalid syntax'
  assert run('f()', ends).error == "NameError: name 'f' is not defined"
  assert run('raise MemoryError', ends)[:2] == (running.OUT_OF_MEMORY, 'MemoryError')
  assert run('class E(Exception):\n  def __str__(self):\n    return 1 / 0\nraise E', ends).status == running.FAILED


def test_leaving_early_does_not_pass(ends):
  assert run('import sys\nsys.exit(0)', ends)[:2] == (running.FAILED, 'SystemExit: 0')
  outcome = run('import os\nos._exit(0)', ends)
  assert outcome[:2] == (running.FAILED, 'ended with exit status 0 before it was through')
  assert run('import os\nos.abort()', ends)[:2] == (running.FAILED, 'killed by SIGABRT')
  # Wherever the verdict goes, a program does not know what to write.
  assert run('''
import os
for number in range(3, 20):
  try:
    os.write(number, b'{"status": "passed", "error": ""}\\n')
  except OSError:
    pass
os._exit(0)
''', ends).status == running.FAILED


def test_replaced_functions_change_nothing(ends):
  assert run('import os, json\nos.write = os._exit = json.dumps = os.getpid = None', ends).status == running.PASSED


def test_endless_loop(report):
  outcome = run('while True: pass', report, seconds=1.)
  assert outcome.status == running.TIMED_OUT and 1 <= outcome.seconds < 1 + LIMITS.seconds and not outcome.outlived


def test_waiting_without_end(ends):
  outcome = run('import signal, time\nfor s in range(1, 65):\n  try:\n    signal.signal(s, signal.SIG_IGN)\n'
                '  except (OSError, ValueError):\n    pass\nwhile True:\n  time.sleep(100)', ends, seconds=.5)
  assert outcome.status == running.TIMED_OUT and outcome.error == 'still running after 0.5 s' and not outcome.outlived


@pytest.mark.parametrize('hog', ['x = []\nwhile True: x.append(bytearray(1 << 20))', 'bytearray(1 << 40)',
                                 'import mmap\nx = [mmap.mmap(-1, 1 << 24) for _ in range(1000)]'])
def test_memory_hog(report, hog):
  assert run(hog, report).status == running.OUT_OF_MEMORY


def test_limits_cannot_be_raised(report):
  program = '''
import json, resource
refused = []
for name in ('AS', 'NPROC', 'FSIZE', 'NOFILE', 'CPU'):
  kind = getattr(resource, 'RLIMIT_' + name)
  try:
    resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
  except (OSError, ValueError):
    refused.append(name)
print(json.dumps([refused, resource.getrlimit(resource.RLIMIT_AS)[1]]))
'''
  assert said(run(program, report)) == [['AS', 'NPROC', 'FSIZE', 'NOFILE', 'CPU'], LIMITS.memory_bytes]


def test_large_file(ends):
  outcome = run('with open("big", "wb") as file:\n  for _ in range(8): file.write(bytes(1 << 20))', ends,
                file_bytes=4 << 20)
  assert outcome[:2] == (running.FAILED, 'OSError: [Errno 27] File too large')


def test_many_files():
  """A folder kept in memory has a size of its own."""
  found = report_on(('namespaces', 'landlock', 'seccomp'))
  if isinstance(found, str):
    pytest.skip(found)
  outcome = run('for i in range(32):\n  with open(str(i), "wb") as file: file.write(bytes(1 << 20))', found,
                folder_bytes=8 << 20)
  assert outcome[:2] == (running.FAILED, 'OSError: [Errno 28] No space left on device')


def test_output_flood(report):
  outcome = run('while True: print("x" * 1000)', report, output_bytes=10_000)
  assert outcome[:2] == (running.FAILED, 'wrote more than 10,000 bytes')
  assert len(outcome.output) == 10_000 and not outcome.outlived
  assert run('import sys\nprint("x" * 9000)', report, output_bytes=10_000).status == running.PASSED


FORKS = '''
import json, os, time
count = 0
for _ in range(40):
  try:
    child = os.fork()
  except OSError:
    break
  if child == 0:
    time.sleep(3)
    os._exit(0)
  count += 1
print(json.dumps(count))
'''


def test_fork_bomb(report):
  outcome = run(FORKS, report)
  assert said(outcome) < LIMITS.processes or not report.processes
  assert not outcome.outlived  # even with limits alone: the program did not attack its supervisor


def named(name):
  """Processes of this machine with a name."""
  found = []
  for folder in pathlib.Path('/proc').glob('[0-9]*'):
    with contextlib.suppress(OSError):
      if (folder / 'comm').read_text().strip() == name:
        found.append(int(folder.name))
  return found


def test_child_that_outlives_its_parent(report):
  name = f'orphan{os.getpid()}'
  program = f'''
import ctypes, json, os, time
try:
  child = os.fork()
except OSError:
  child = None
if child == 0:
  try:
    os.setsid()
    grandchild = os.fork()
  except OSError:
    os._exit(1)
  if grandchild == 0:
    ctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0)
    os.closerange(0, 64)
    time.sleep(100)
  os._exit(0)
if child:
  os.waitpid(child, 0)
print(json.dumps(child is not None))
'''
  said(run(program, report))
  wait_for(lambda: not named(name), 20)


def test_program_that_ends_its_supervisor(report):
  """Then nobody but a wall ends what it has left behind, and the report has said so."""
  name = f'left{os.getpid()}'
  program = f'''
import ctypes, os, signal, time
supervisor = os.getppid()
try:
  child = os.fork()
except OSError:
  child = None
if child == 0:
  ctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0)
  try:
    os.setsid()
  except OSError:
    pass
  os.closerange(0, 64)
  time.sleep(100)
  os._exit(0)
time.sleep(.3)
os.kill(supervisor, signal.SIGKILL)
time.sleep(1)
'''
  outcome = run(program, report)
  assert outcome.status in (running.PASSED, running.FAILED)
  try:
    if report.processes:
      wait_for(lambda: not named(name), 20)
  finally:
    for pid in named(name):
      os.kill(pid, 9)


def test_writes_outside(report, outside):
  (outside / 'existing').write_text('before')
  os.chmod(outside / 'existing', 0o666)
  program = f'''
import os
def attempt(action):
  try:
    action()
  except OSError:
    pass
attempt(lambda: open({str(outside / 'new')!r}, 'w').write('text'))
attempt(lambda: open({str(outside / 'existing')!r}, 'a').write('after'))
attempt(lambda: os.truncate({str(outside / 'existing')!r}, 1))
attempt(lambda: os.mkdir({str(outside / 'folder')!r}))
attempt(lambda: os.symlink('x', {str(outside / 'link')!r}))
attempt(lambda: os.chmod({str(outside / 'existing')!r}, 0o600))
attempt(lambda: os.utime({str(outside / 'existing')!r}, (0, 0)))
attempt(lambda: os.rename({str(outside / 'existing')!r}, {str(outside / 'moved')!r}))
'''
  state = lambda: {path.name: (path.lstat().st_mode, path.lstat().st_mtime, path.lstat().st_size)
                   for path in outside.iterdir()}
  before = state()
  assert run(program, report).status == running.PASSED
  assert (state() == before) or not report.writes
  if not report.tools:
    assert (state() == before) == report.writes  # what is reported as open is open


def test_secrets_of_the_caller(report, outside):
  (outside / 'secret').write_text('hidden')
  holder = subprocess.Popen([sys.executable, '-S', '-c', 'input()'], stdin=subprocess.PIPE, env={'TOKEN': 'hidden'})
  try:
    os.environ['OPENMOE_TEST_TOKEN'] = 'hidden'
    program = f'''
import json, os
found = ['environment'] if 'hidden' in str(os.environ) else []
for path in ({str(outside / 'secret')!r}, '/proc/{holder.pid}/environ', '/proc/{os.getpid()}/environ'):
  try:
    found += ['file'] if open(path).read() else []
  except OSError:
    pass
print(json.dumps(found))
'''
    found = said(run(program, report))
  finally:
    del os.environ['OPENMOE_TEST_TOKEN']
    holder.communicate(b'\n')
  assert 'environment' not in found
  assert not found or not report.reads
  if not report.tools:
    assert bool(found) != report.reads


def test_network(report, outside):
  heard = []
  with socket.create_server(('127.0.0.1', 0)) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, \
      socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
    udp.bind(('127.0.0.1', 0))
    door.bind(str(outside / 'door'))
    os.chmod(outside / 'door', 0o777)
    door.listen()
    for listener in (tcp, udp, door):
      listener.settimeout(.2)
    program = f'''
import socket
for family, kind, address in ((socket.AF_INET, socket.SOCK_STREAM, ('127.0.0.1', {tcp.getsockname()[1]})),
                              (socket.AF_INET, socket.SOCK_DGRAM, ('127.0.0.1', {udp.getsockname()[1]})),
                              (socket.AF_UNIX, socket.SOCK_STREAM, {str(outside / 'door')!r})):
  try:
    with socket.socket(family, kind) as connection:
      connection.connect(address)
      connection.send(b'hidden')
  except OSError:
    pass
'''
    assert run(program, report).status == running.PASSED
    with contextlib.suppress(TimeoutError):
      heard.append(tcp.accept())
    with contextlib.suppress(TimeoutError):
      heard.append(udp.recv(100))
    with contextlib.suppress(TimeoutError):
      heard.append(door.accept())
  assert not heard or not report.network
  if not report.tools:
    assert bool(heard) != report.network


def test_folder_is_gone_afterwards(ends):
  outcome = run('import os\nos.makedirs("a/b")\nopen("a/b/c", "w").write("x")\nos.symlink("/", "a/root")\n'
                'print(os.getcwd())', ends)
  assert outcome.status == running.PASSED
  assert outcome.output.strip() == '/tmp' or not os.path.exists(outcome.output.strip())


def test_the_strongest_is_chosen():
  found = isolation_lib.isolation()
  working = [one for one in map(report_on, COMBINATIONS) if not isinstance(one, str)]
  count = lambda one: one.network + one.writes + one.processes + one.reads
  assert count(found) == max(map(count, working))
  if found.complete:
    assert found.tools in COMBINATIONS and 'WARNING' not in found.sentence()


def test_where_nothing_works_it_says_so(monkeypatch):
  def measure(tools):
    if tools:
      raise running.ToolError(tools[-1], 'not on this machine')
    return isolation_lib.Isolation((), False, False, False, False, {})
  monkeypatch.setattr(isolation_lib, 'measure', measure)
  found = isolation_lib.isolation.__wrapped__()
  assert found.tools == () and set(found.missing) == {'bubblewrap', 'namespaces', 'landlock', 'seccomp'}
  assert found.sentence() == (
      'Generated code runs in processes of its own with limits alone of time, memory, file size and output. WARNING: '
      'this machine does not contain everything: the network can be used, files outside the temporary folder can be '
      'CHANGED, processes can be left behind, or be many, other files can be read.')
  assert 'no network.' in found._replace(network=True).sentence()

  def refuse(tools):
    raise running.ToolError(tools[-1] if tools else 'limits', 'nothing starts')
  monkeypatch.setattr(isolation_lib, 'measure', refuse)
  with pytest.raises(config.ConfigError, match='no Python can be started for generated code: limits: nothing starts'):
    isolation_lib.isolation.__wrapped__()


def test_a_wall_that_leaks_is_left_for_one_that_does_not(monkeypatch):
  def measure(tools):
    if 'bubblewrap' in tools:
      return isolation_lib.Isolation(tuple(tools), True, False, True, True, {})
    if 'namespaces' in tools:
      raise running.ToolError('namespaces', 'refused')
    return isolation_lib.Isolation(tuple(tools), True, True, True, True, {})
  monkeypatch.setattr(isolation_lib, 'measure', measure)
  assert isolation_lib.isolation.__wrapped__().tools == ('landlock', 'seccomp')


def test_tools_that_do_not_work_are_named(monkeypatch):
  monkeypatch.setattr(shutil, 'which', lambda name: None)
  with pytest.raises(running.ToolError, match='bubblewrap: no program bwrap'):
    running.run('pass', ['bubblewrap'])


def test_a_bubblewrap_that_fails(monkeypatch, tmp_path):
  broken = tmp_path / 'bwrap'
  broken.write_text('#!/bin/sh\necho "bwrap: setting up uid map: Permission denied" >&2\nexit 1\n')
  broken.chmod(0o755)
  monkeypatch.setattr(shutil, 'which', lambda name: str(broken))
  with pytest.raises(running.ToolError, match='setting up uid map: Permission denied'):
    running.run('pass', ['bubblewrap'])


@pytest.mark.parametrize('changes, message', [({'seconds': 0}, 'seconds = 0 must be positive'),
                                              ({'memory_bytes': 1000}, 'memory_bytes = 1000 must be at least'),
                                              ({'processes': 0}, 'processes = 0 must be at least 1')])
def test_impossible_limits(changes, message):
  with pytest.raises(config.ConfigError, match=message):
    running.Limits(**changes)


def test_a_caller_that_dies_takes_the_program_with_it(tmp_path):
  """The program's processes notice by themselves: nobody is there to end them."""
  name = f'alone{os.getpid()}'
  program = f'import ctypes\nctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0)\nwhile True: pass'
  caller = ('from openmoe_jax.sandbox import isolation, running\n'
            f'running.run({program!r}, isolation.isolation().tools, running.Limits(seconds=100))')
  process = subprocess.Popen([sys.executable, '-c', caller], env={**os.environ, 'TMPDIR': str(tmp_path)})
  try:
    wait_for(lambda: named(name))
  finally:
    process.kill()
    process.wait()
  wait_for(lambda: not named(name))


def wait_for(condition, seconds=60):
  """Until a condition holds."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(.02)
