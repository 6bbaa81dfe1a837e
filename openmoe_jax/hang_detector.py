"""Ends a run that makes no steps any more, and shows what every thread was doing."""

import faulthandler
import sys
import threading
from typing import Callable

from openmoe_jax import ending

_MOST_SECONDS_BETWEEN_LOOKS = 5.
_PATIENCE = 10  # times longer for what is no step


class HangDetector:
  """Counts the minutes since the last step; a context manager.

  The time counts that this process was awake: a suspended machine or a stopped process is no hang.

  Args:
    minutes: without a step until the process is ended with status 3; ten times as many while it compiles, evaluates or
      saves; 0 never does.
    end: called with what is to be said.
  """

  def __init__(self, minutes: float, end: Callable[[str], None] = ending.end_process):
    self._limit = 60 * minutes
    self._end = end
    self._paused = True
    self._idle = 0.
    self._step = 0
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._watch, name='openmoe_hang_detector', daemon=True)

  def __enter__(self) -> 'HangDetector':
    if self._limit:
      self._thread.start()
    return self

  def __exit__(self, *error) -> None:
    self._stop.set()
    if self._thread.is_alive():
      self._thread.join()

  def alive(self, step: int) -> None:
    """Step `step` is done, or something else has ended that takes long; the minutes count from here."""
    self._step, self._idle, self._paused = step, 0., False

  def pause(self) -> None:
    """What follows until `alive` takes longer: compiling, an evaluation, a checkpoint."""
    self._idle, self._paused = 0., True

  def _watch(self) -> None:
    period = min(self._limit / 10, _MOST_SECONDS_BETWEEN_LOOKS)
    while not self._stop.wait(period):
      self._idle += period
      limit = self._limit * (_PATIENCE if self._paused else 1)
      if self._idle >= limit:
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        self._end(f'no step for {limit / 60:g} minutes (TrainConfig.hang_minutes = {self._limit / 60:g}) after step '
                  f'{self._step}: what every thread was doing is shown above. {ending.AGAIN}')
        return
