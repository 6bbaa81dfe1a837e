"""What the benchmarks share: CPU-seconds of this process, and times of calls that block on their results."""

import resource
import time
from typing import Any, Callable, List

import jax


def cpu_seconds() -> float:
  """Of this process, all threads."""
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return usage.ru_utime + usage.ru_stime


class Timer:
  """Wall and CPU-seconds of calls that block on their results."""

  def __init__(self):
    self.wall: List[float] = []
    self.cpu: List[float] = []

  def __call__(self, function: Callable, *args) -> Any:
    wall, cpu = time.perf_counter(), cpu_seconds()
    out = jax.block_until_ready(function(*args))
    self.wall.append(time.perf_counter() - wall)
    self.cpu.append(cpu_seconds() - cpu)
    return out
