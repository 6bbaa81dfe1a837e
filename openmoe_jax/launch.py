"""Starting and stopping a run: several processes that agree, and the signals that ask for an end."""

import glob
import os
import signal
from typing import Optional

import jax
from jax.experimental import multihost_utils
import numpy as np

from openmoe_jax.config import ConfigError, require

# Each says that this process is one of several, in one of the ways `jax.distributed.initialize` understands.
_ENVIRONMENT = ('JAX_COORDINATOR_ADDRESS', 'MEGASCALE_COORDINATOR_ADDRESS')
_COUNTS = ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE', 'JAX_NUM_PROCESSES')
_TIMEOUT_SECONDS = 300


def _on_tpu() -> bool:
  chips = glob.glob('/dev/accel*') + glob.glob('/dev/vfio/[0-9]*')
  return bool(chips) and 'cpu' not in os.environ.get('JAX_PLATFORMS', '')


def _several_processes() -> bool:
  if any(os.environ.get(name) for name in _ENVIRONMENT):
    return True
  if any(os.environ.get(name, '').isdigit() and int(os.environ[name]) > 1 for name in _COUNTS):
    return True
  return ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')


def initialize(coordinator_address: Optional[str] = None, num_processes: Optional[int] = None,
               process_id: Optional[int] = None) -> None:
  """Joins the other processes of this run, if flags or the environment say that there are any.

  Args:
    coordinator_address: host:port of process 0; all three or none.
    num_processes: how many there are.
    process_id: which one this is, from 0.

  Raises:
    ConfigError: flags that do not go together, or the others did not come.
  """
  flags = {'coordinator_address': coordinator_address, 'num_processes': num_processes, 'process_id': process_id}
  given = [name for name, value in flags.items() if value is not None]
  require(len(given) in (0, 3), f'--{" and --".join(given)} given, but not --'
          f'{" and --".join(name for name in flags if name not in given)}: give all three or none')
  if given:
    require(num_processes > 0 and 0 <= process_id < num_processes, f'--process_id={process_id} must be from 0 to '
            f'--num_processes={num_processes} minus 1')
    if num_processes == 1:
      return
  elif not _several_processes() and not _on_tpu():
    return
  try:
    jax.distributed.initialize(initialization_timeout=_TIMEOUT_SECONDS, **{k: v for k, v in flags.items() if given})
  except (ValueError, RuntimeError) as error:
    if not given and not _several_processes():
      return  # a TPU machine of its own, outside any cluster
    raise ConfigError(f'the processes of this run did not come together within {_TIMEOUT_SECONDS} s ({error}); '
                      f'coordinator {coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS", "found by JAX")}'
                      ) from error


def barrier(name: str) -> None:
  """Waits until every process is here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def every_process(value: bool) -> bool:
  """Whether `value` is true on every process."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.process_allgather(np.asarray(value)).all())


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
