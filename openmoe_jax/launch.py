"""Starting and stopping a run: several processes that agree, and the signals that ask for an end."""

import itertools
import signal
import time
import traceback
from typing import Any, Callable, NoReturn, Optional

import jax
from jax._src import distributed  # the client has no public name; Orbax takes it from here as well
from jax.experimental import multihost_utils

from openmoe_jax import cluster_environment, ending, heartbeat
from openmoe_jax.config import ConfigError, require

_START_SECONDS = 300
_BARRIER_SECONDS = 600
_LOST_SECONDS = 60.
_LINGER_SECONDS = 10.
_heartbeat: Optional[heartbeat.Heartbeat] = None
# In errors that Orbax passes on in types of its own.
_PEER_IS_GONE = ('Connection reset by peer', 'Connection closed by peer', 'Gloo')
_calls = itertools.count()  # every process makes the same ones in the same order


class ProcessError(RuntimeError):
  """Other processes did not do their part; the message says which."""


def initialize(coordinator_address: Optional[str] = None, num_processes: Optional[int] = None,
               process_id: Optional[int] = None, lost_after: float = _LOST_SECONDS, timeout: int = _START_SECONDS) -> None:
  """Joins the other processes of this run, if flags or the environment say that there are any.

  Args:
    coordinator_address: host:port of process 0; all three or none.
    num_processes: how many there are.
    process_id: which one this is, from 0.
    lost_after: seconds without a sign of life after which a process counts as lost, and the run ends on the others.
    timeout: seconds to wait for the others.

  Raises:
    ConfigError: flags that do not go together, variables that cannot be, or the others did not come.
  """
  flags = {'coordinator_address': coordinator_address, 'num_processes': num_processes, 'process_id': process_id}
  given = [name for name, value in flags.items() if value is not None]
  require(len(given) in (0, 3), f'--{" and --".join(given)} given, but not --'
          f'{" and --".join(name for name in flags if name not in given)}: give all three or none')
  several = cluster_environment.several_processes()
  if not given and several:
    problems = cluster_environment.problems()
    require(not problems, '; '.join(problems))
    if cluster_environment.jax_flags():
      flags = cluster_environment.jax_flags()._asdict()
      given = list(flags)
  if given:
    count, index = flags['num_processes'], flags['process_id']
    require(count > 0 and 0 <= index < count, f'--process_id={index} must be from 0 to --num_processes={count} minus 1')
    if count == 1:
      return
  elif not several and not cluster_environment.on_tpu():
    return
  about = ', '.join(f'{name} = {value}' for name, value in (flags if given else cluster_environment.variables()).items())
  coordinator, end = flags['coordinator_address'], time.monotonic() + timeout
  while coordinator and flags['process_id'] and not heartbeat.answers(coordinator):
    require(time.monotonic() < end, _not_together(coordinator, timeout, about))
    time.sleep(1)
  heartbeat.explain_aborts(lambda: (_not_together(coordinator, timeout, about), 2))
  try:
    # Ours notices a lost process first: JAX would end this one by an abort.
    jax.distributed.initialize(initialization_timeout=timeout, heartbeat_timeout_seconds=int(lost_after) + 60,
                               **{k: v for k, v in flags.items() if given})
  except (ValueError, OSError, RuntimeError) as error:
    if not given and not several and not isinstance(error, RuntimeError):
      return  # a TPU machine of its own, outside any cluster
    raise ConfigError(f'{_not_together(coordinator, timeout, about)} ({error})') from error
  finally:
    heartbeat.explain_aborts(lambda: None)
  state = distributed.global_state
  if state.num_processes > 1:
    global _heartbeat
    _heartbeat = heartbeat.Heartbeat(state.client, state.process_id, state.num_processes, lost_after,
                                     state.coordinator_address)
    _heartbeat.start()


def _not_together(coordinator: Optional[str], timeout: int, about: str) -> str:
  """What is known when the processes did not find each other."""
  if coordinator and not heartbeat.answers(coordinator):
    what = f'process 0 does not answer at {coordinator}: it was not started, or this machine cannot reach it'
  else:
    what = 'process 0 is there, but not all of the others' if coordinator else 'not all of them were started'
  return f'the processes of this run did not come together within {timeout} s; {what}; {about or "asked of the TPU"}'


def run_together(main: Callable[[], Any]) -> Any:
  """Calls `main`; where this is one of several processes, an error in it ends the others too, instead of leaving them
  waiting for this one."""
  try:
    result = main()
  except BaseException as error:
    if _heartbeat is None or isinstance(error, SystemExit) and not error.code:
      raise
    _end_all(error)
  if _heartbeat is not None:
    _heartbeat.stop()
  return result


def _end_all(error: BaseException) -> NoReturn:
  """Ends this process for an error, and the others with it."""
  ended = isinstance(error, SystemExit)  # after a line of its own, by `command_line.run_main` for example
  cause = error.__context__ or error if ended else error
  if _comes_from_others(cause):
    _heartbeat.wait_for_verdict()
  if not ended:
    traceback.print_exception(error)
  status = error.code if ended and isinstance(error.code, int) else 1
  what = ' '.join(str(cause).split())[:300] or type(cause).__name__
  _heartbeat.end_all(f'process {distributed.global_state.process_id} ended with an error: {what}', status)


def _comes_from_others(error: Optional[BaseException]) -> bool:
  """Whether an error may be nothing but the echo of a lost process: a collective operation that failed."""
  while error is not None:
    if isinstance(error, ProcessError) or isinstance(error, jax.errors.JaxRuntimeError) and (
        'RESOURCE_EXHAUSTED' not in str(error)) or any(text in str(error) for text in _PEER_IS_GONE):
      return True
    error = error.__cause__ or error.__context__
  return False


def _count() -> int:
  """How many processes there are, without waiting for their devices as `jax.process_count` does."""
  return distributed.global_state.num_processes


def linger() -> float:
  """Seconds that a process which ends by itself stays, so that others can do the same before they lose process 0."""
  return _LINGER_SECONDS if jax.process_count() > 1 and jax.process_index() == 0 else 0.


def barrier(name: str, timeout: float = _BARRIER_SECONDS) -> None:
  """Waits until every process is here.

  Raises:
    ProcessError: some did not come within `timeout` seconds; the message names them.
  """
  if _count() == 1:
    return
  client, place = distributed.global_state.client, f'openmoe/barrier/{name}/{next(_calls)}'
  client.key_value_set(f'{place}/{distributed.global_state.process_id}', 'here')
  try:
    client.wait_at_barrier(place, int(1000 * timeout))
  except jax.errors.JaxRuntimeError as error:
    here = {int(key.rpartition('/')[2]) for key, _ in client.key_value_dir_get(place)}
    away = [str(process) for process in range(_count()) if process not in here]
    who = f'process {" and ".join(away)} of {_count()} had not come' if away else 'this process came after the others gave up'
    raise ProcessError(f'at {name!r} {who}, after {timeout:g} s; its own log says why') from error


def every_process(value: bool) -> bool:
  """Whether `value` is true on every process.

  Raises:
    ProcessError: as `barrier`.
  """
  if _count() == 1:
    return value
  client, place = distributed.global_state.client, f'openmoe/every/{next(_calls)}'
  client.key_value_set(f'{place}/{distributed.global_state.process_id}', str(int(value)))
  barrier('every_process')
  return all(text == '1' for _, text in client.key_value_dir_get(place))


def describe_devices(mesh: jax.sharding.Mesh) -> str:
  """'8 x TPU v4 on 2 hosts as data 4 x expert 2 x model 1'."""
  device = mesh.devices.flat[0]
  hosts = '' if jax.process_count() == 1 else f' on {jax.process_count()} hosts'
  shape = ' x '.join(f'{name} {size}' for name, size in mesh.shape.items())
  return f'{mesh.size} x {device.device_kind}{hosts} as {shape}'


class StopRequest:
  """Notices SIGTERM (a machine is taken away) and Ctrl-C, so that the loop can save and end. A second Ctrl-C ends at
  once.

  With several processes, JAX listens for SIGTERM: one process that is told to stop tells the others, and all stop after
  the same step. Ctrl-C then ends at once.
  """

  def __init__(self):
    self.signal: Optional[str] = None
    self._several = jax.process_count() > 1
    self._old = {}

  def __enter__(self) -> 'StopRequest':
    if not self._several:
      self._old = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, *error) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _handle(self, number, frame) -> None:
    del frame
    if self.signal and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.signal = signal.Signals(number).name

  def after(self, step: int) -> bool:
    """Whether the run should end now; with several processes, all of them must ask after every step."""
    if self._several and multihost_utils.reached_preemption_sync_point(step):
      self.signal = 'SIGTERM'
    return self.signal is not None
