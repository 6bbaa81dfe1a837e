"""What the benchmarks share: times of calls that block on their results, the matrix product they are compared with, and
the memory of compiled programs."""

import resource
import time
from typing import Any, Callable, Dict, List, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from openmoe_jax.profiling import StepProfiler

MATMUL = {'cpu': 2048}  # rows of the reference product; large enough to fill the device
_MATMUL_OTHER = 8192


def cpu_seconds() -> float:
  """Of this process, all threads."""
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return usage.ru_utime + usage.ru_stime


def peak_memory_gb() -> float:
  """Most memory of the host that this process ever had."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


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


class MatrixProduct:
  """A square product of the size in MATMUL, in one type: what the device can do.

  Attributes:
    size: rows of each factor.
    timer: of all products so far; the best one counts.
  """

  def __init__(self, dtype: str = 'float32'):
    self.size = MATMUL.get(jax.default_backend(), _MATMUL_OTHER)
    self.timer = Timer()
    self._factor = jnp.asarray(np.random.RandomState(1).randn(self.size, self.size), dtype)
    self._product = jax.jit(jnp.dot)
    jax.block_until_ready(self._product(self._factor, self._factor))

  def __call__(self, times: int = 8) -> None:
    for _ in range(times):
      self.timer(self._product, self._factor, self._factor)

  def flops_per_second(self) -> float:
    return 2 * self.size**3 / min(self.timer.wall)

  def flops_per_cpu_second(self) -> float:
    return 2 * self.size**3 / min(self.timer.cpu)


def timed(function: Callable, args: Sequence[Any], product: MatrixProduct, repeats: int, profiler: Any = None) -> Timer:
  """Times calls of a compiled function, and products before and after them.

  Args:
    profiler: `profiling.StepProfiler`, of the calls from 1 on.
  """
  profiler = profiler or StepProfiler('', None)
  jax.block_until_ready(function(*args))
  timer = Timer()
  product()
  for i in range(1, repeats + 1):
    profiler.before(i)
    timer(function, *args)
    profiler.after(i)
  profiler.stop()
  product()
  return timer


def compare(timer: Timer, product: MatrixProduct, flops: float) -> Dict[str, float]:
  """Medians of a call, and the share of the product's speed that its arithmetic reaches.

  Args:
    flops: of one call.
  """
  wall, cpu = float(np.median(timer.wall)), float(np.median(timer.cpu))
  shares = {'share_by_wall': flops / wall / product.flops_per_second()}
  if jax.default_backend() == 'cpu':  # elsewhere the host only waits
    shares['share_by_cpu_seconds'] = flops / cpu / product.flops_per_cpu_second()
  return {'gflop': flops / 1e9, 'seconds': wall, 'cpu_seconds': cpu,
          'matmul_gflop_per_second': product.flops_per_second() / 1e9,
          'matmul_gflop_per_cpu_second': product.flops_per_cpu_second() / 1e9, **shares}


def program_memory_gb(compiled: Any) -> float:
  """What a compiled program needs at once by the compiler's accounting: arguments, results and what lies between."""
  found = compiled.memory_analysis()
  if found is None:
    return float('nan')
  results = found.output_size_in_bytes - found.alias_size_in_bytes
  return (found.argument_size_in_bytes + results + found.temp_size_in_bytes) / 1e9
