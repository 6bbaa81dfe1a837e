"""A profile of a few training steps, for TensorBoard's profile plugin and for Perfetto (ui.perfetto.dev)."""

from typing import Callable, Optional, Tuple

import jax

from openmoe_jax import paths
from openmoe_jax.config import ConfigError, require

FOLDER = 'profile'


def parse_steps(text: str) -> Tuple[int, int]:
  """'100:105' -> (100, 105), both included; '100' is that step alone.

  Raises:
    ConfigError: anything else.
  """
  parts = text.split(':')
  try:
    first, last = int(parts[0]), int(parts[-1])
  except ValueError:
    first = last = 0
  if len(parts) > 2 or first < 1 or last < first:
    raise ConfigError(f'--profile_steps={text} must be a step or FIRST:LAST, from 1 on, such as 100:104')
  return first, last


class StepProfiler:
  """Records some steps into a folder: `before` and `after` are called around every step.

  Args:
    folder: local; every process of a run writes files of its own there.
    steps: first and last step; None records nothing.
    say: prints a line.
  """

  def __init__(self, folder: paths.PathLike, steps: Optional[Tuple[int, int]], say: Callable[[str], None] = print):
    require(steps is None or paths.is_local(folder), f'--profile_steps writes to a local folder, not to {folder}')
    self._folder, self._steps, self._say = str(paths.path(folder)), steps, say
    self._running = False

  def before(self, step: int) -> None:
    """Step `step` is about to be started."""
    if self._steps and not self._running and self._steps[0] <= step <= self._steps[1]:
      jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
      self._running = True

  def due(self, step: int) -> bool:
    """Whether `after` has to be called with this step, once its results are there."""
    return self._running and step >= self._steps[1]

  def after(self, step: int) -> None:
    """Step `step` is finished."""
    if self.due(step):
      self.stop()

  def stop(self) -> None:
    """Writes what was recorded; what comes later is not."""
    if self._running:
      self._running, self._steps = False, None
      jax.profiler.stop_trace()
      self._say(f'profile of the steps is in {self._folder}: tensorboard --logdir={self._folder} (with the package '
                'tensorboard-plugin-profile), or perfetto_trace.json.gz therein at ui.perfetto.dev')
