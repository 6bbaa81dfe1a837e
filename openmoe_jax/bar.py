"""How far a long work is: a bar on a terminal, a line now and then elsewhere."""

import threading
import time
from typing import Any, Callable, Optional

from rich import progress
from rich.console import Console

from openmoe_jax import paths
from openmoe_jax.progress import duration

_SECONDS_BETWEEN_LINES = 10.


class Bar:
  """Counts bytes, or something else, from several threads.

  Args:
    total: how many there will be.
    say: prints a line where there is no terminal.
    label: what is done to them.
    amount: writes a number of them, or of them per second.
  """

  def __init__(self, total: int, say: Callable[[str], None] = print, label: str = 'converting',
               amount: Callable[[float], str] = paths.human_bytes, console: Optional[Console] = None):
    self._total, self._say, self._label, self._amount = total, say, label, amount
    self._done = 0
    self._lock = threading.Lock()
    self._begin = self._said = time.monotonic()
    self._before: Optional[int] = None  # bytes done when this process began
    console = console or Console()
    self._bar: Any = None
    if console.is_terminal:
      self._bar = progress.Progress(
          progress.TextColumn('{task.description}'), progress.BarColumn(), progress.TextColumn('{task.fields[text]}'),
          progress.TimeRemainingColumn(), console=console)
      self._task = self._bar.add_task(label, total=total, text='')

  def __enter__(self) -> 'Bar':
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *error) -> None:
    if self._bar:
      self._bar.stop()
    elif not error[0]:
      seconds = max(time.monotonic() - self._begin, 1e-3)
      rate = self._amount((self._done - (self._before or 0)) / seconds)
      self._say(f'{self._label}: {self._amount(self._done)} in {duration(seconds)} ({rate}/s)')

  def advance(self, count: int) -> None:
    """`count` more bytes are done; the first call says what was done before."""
    with self._lock:
      self._done += count
      if self._before is None:
        self._before = count
      now = time.monotonic()
      rate = (self._done - self._before) / max(now - self._begin, 1e-3)
      if self._bar:
        text = f'{self._amount(self._done)} of {self._amount(self._total)}  {self._amount(rate)}/s'
        self._bar.update(self._task, completed=self._done, text=text)
        return
      if now - self._said < _SECONDS_BETWEEN_LINES:
        return
      self._said = now
      left = duration((self._total - self._done) / rate) if rate else '?'
      text = (f'{self._label}: {100 * self._done // max(self._total, 1)} % of {self._amount(self._total)}, '
              f'{self._amount(rate)}/s, ETA {left}')
    self._say(text)
