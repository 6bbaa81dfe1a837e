"""Signs of life between the processes of a run, so that all end with one clear line when one is lost.

Every process writes a counter into the key-value store of JAX's coordination service, which process 0 holds. Process 0
looks at them, and writes there why the run ends; everybody reads that. JAX has signs of life of its own, but ends a process
by an abort with a C++ stack; where that is faster (process 0 itself is lost) the abort is caught and explained.
"""

import ctypes
import json
import os
import signal
import socket
import threading
import time
from typing import Any, Callable, Dict, NoReturn, Optional, Tuple

from openmoe_jax import ending

_ALIVE, _END = 'openmoe/alive', 'openmoe/end'
_DONE = 'done'  # instead of a counter: silence is no loss any more
_GRACE = 5.  # seconds in which a process may end with an error of its own after another has


class Heartbeat:
  """The signs of life of one process; `start` and `stop` them.

  Args:
    client: of JAX's coordination service.
    process, count: which of how many this is.
    lost_after: seconds of silence after which a process counts as lost.
    coordinator: host:port of process 0.
  """

  def __init__(self, client: Any, process: int, count: int, lost_after: float, coordinator: str):
    self._client = client
    self._process, self._count = process, count
    self._lost_after = lost_after
    self._coordinator = coordinator
    self.period = min(max(lost_after / 10, .5), 5.)
    self._name = f'{socket.gethostname()}, pid {os.getpid()}'
    self._beat = 0
    self._heard: Dict[int, tuple] = {}  # process -> (what it wrote last, when that was first seen)
    self._stop, self._ending = threading.Event(), threading.Event()
    self._thread = threading.Thread(target=self._run, name='openmoe_heartbeat', daemon=True)

  def start(self) -> None:
    explain_aborts(lambda: lost_process_0(self._coordinator) if self._process else None)
    self._write(f'0 {self._name}')
    self._thread.start()

  def stop(self) -> None:
    """This process has done its part."""
    self._stop.set()
    self._thread.join()
    try:
      self._write(_DONE)
    except RuntimeError:  # process 0 is gone already
      pass

  def wait_for_verdict(self) -> None:
    """Returns when another process would have been found lost by now if it were: then this one is ended instead."""
    if self._ending.wait(self._lost_after + 3 * self.period):
      threading.Event().wait()

  def end_all(self, text: str, status: int) -> NoReturn:
    """Makes every other process end with this text and status, and ends this one, which has said so itself."""
    try:
      self._client.key_value_set(_END, json.dumps({'text': text, 'status': status, 'by': self._process}),
                                 allow_overwrite=True)
      self._write(_DONE)
    except RuntimeError:
      pass
    self._leave(status)

  def _write(self, text: str) -> None:
    self._client.key_value_set(f'{_ALIVE}/{self._process}', text, allow_overwrite=True)

  def _run(self) -> None:
    while not self._stop.wait(self.period):
      try:
        self._beat += 1
        self._write(f'{self._beat} {self._name}')
        verdict = self._verdict()
        if verdict is None and self._process == 0:
          verdict = self._lost()
          if verdict:
            self._client.key_value_set(_END, json.dumps(verdict), allow_overwrite=True)
      except RuntimeError:  # process 0 cannot be reached: JAX notices, and `explain_aborts` says so
        continue
      if verdict and verdict['by'] != self._process:
        if verdict['by'] is not None:
          time.sleep(_GRACE)
        self._ending.set()
        more = ending.AGAIN if verdict['status'] == ending.START_AGAIN else 'Its own log says more.'
        ending.say(f'{verdict["text"]}. The run ends on all {self._count} processes. {more}')
        self._leave(verdict['status'])

  def _verdict(self) -> Optional[Dict[str, Any]]:
    """Why the run ends, if somebody has said so."""
    try:
      return json.loads(self._client.key_value_try_get(_END))
    except RuntimeError as error:
      if 'NOT_FOUND' in str(error):
        return None
      raise

  def _lost(self) -> Optional[Dict[str, Any]]:
    """The verdict on processes that are silent."""
    now = time.monotonic()
    for key, text in self._client.key_value_dir_get(_ALIVE):
      process = int(key.rpartition('/')[2])
      if self._heard.get(process, ('',))[0] != text:
        self._heard[process] = text, now
    silent = [(process, text.partition(' ')[2], now - since) for process, (text, since) in sorted(self._heard.items())
              if text != _DONE and now - since > self._lost_after]
    if not silent:
      return None
    named = ' and '.join(f'process {process} ({name})' for process, name, _ in silent)
    text = (f'{named} of {self._count} gave no sign of life for {max(seconds for *_, seconds in silent):.0f} s: killed, '
            'stopped, or its machine is gone')
    return {'text': text, 'status': ending.START_AGAIN, 'by': None}

  def _leave(self, status: int) -> NoReturn:
    """Ends this process; process 0 after the others, because they read from it."""
    if self._process == 0:
      time.sleep(2 * self.period + _GRACE + 1)
    os._exit(status)


_handlers = []  # kept for as long as the process lives: C calls them


def explain_aborts(explain: Callable[[], Optional[Tuple[str, int]]]) -> None:
  """From now on an abort of JAX's runtime, which comes with a C++ stack, ends with one line more and a status of ours.

  Args:
    explain: gives the line and the status; None for an abort that has another reason, which then stays one.
  """

  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def handle(number):
    del number
    found = explain()
    if found:
      ending.end_process(*found)

  _handlers.append(handle)
  c_library = ctypes.CDLL(None)
  c_library.signal.argtypes, c_library.signal.restype = [ctypes.c_int, ctypes.CFUNCTYPE(None, ctypes.c_int)], ctypes.c_void_p
  c_library.signal(signal.SIGABRT, handle)


def lost_process_0(coordinator: str) -> Optional[Tuple[str, int]]:
  """The explanation of an abort, if process 0 does not answer."""
  if answers(coordinator):
    return None
  return (f'process 0 at {coordinator}, which holds the processes of this run together, is gone: killed, or its machine is. '
          f'{ending.AGAIN}', ending.START_AGAIN)


def answers(coordinator: str) -> bool:
  """Whether somebody listens at HOST:PORT."""
  host, _, port = coordinator.rpartition(':')
  try:
    with socket.create_connection((host.strip('[]'), int(port)), timeout=2):
      return True
  except (OSError, ValueError):
    return False
