"""How far a conversion is: a bar on a terminal, a line now and then elsewhere."""

import threading
import time
from typing import Any, Callable, Optional

from rich import progress
from rich.console import Console

from openmoe_jax import paths
from openmoe_jax.progress import duration

_SECONDS_BETWEEN_LINES = 10.


class Bar:
  """Counts bytes, from several threads.

  Args:
    total: bytes.
    say: prints a line where there is no terminal.
    label: what is counted.
  """

  def __init__(self, total: int, say: Callable[[str], None] = print, label: str = 'converting',
               console: Optional[Console] = None):
    self._total, self._say, self._label = total, say, label
    self._done = 0
    self._lock = threading.Lock()
    self._begin = self._said = time.monotonic()
    self._before: Optional[int] = None  # bytes done when this process began
    console = console or Console()
    self._bar: Any = None
    if console.is_terminal:
      self._bar = progress.Progress(
          progress.TextColumn('{task.description}'), progress.BarColumn(), progress.DownloadColumn(),
          progress.TransferSpeedColumn(), progress.TimeRemainingColumn(), console=console)
      self._task = self._bar.add_task(label, total=total)

  def __enter__(self) -> 'Bar':
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *error) -> None:
    if self._bar:
      self._bar.stop()
    elif not error[0]:
      seconds = max(time.monotonic() - self._begin, 1e-3)
      rate = paths.human_bytes((self._done - (self._before or 0)) / seconds)
      self._say(f'{self._label}: {paths.human_bytes(self._done)} in {duration(seconds)} ({rate}/s)')

  def advance(self, count: int) -> None:
    """`count` more bytes are done; the first call says what was done before."""
    with self._lock:
      self._done += count
      if self._before is None:
        self._before = count
      if self._bar:
        self._bar.update(self._task, completed=self._done)
        return
      now = time.monotonic()
      if now - self._said < _SECONDS_BETWEEN_LINES:
        return
      self._said = now
      rate = (self._done - self._before) / (now - self._begin)
      left = duration((self._total - self._done) / rate) if rate else '?'
      text = (f'{self._label}: {100 * self._done // max(self._total, 1)} % of {paths.human_bytes(self._total)}, '
              f'{paths.human_bytes(rate)}/s, ETA {left}')
    self._say(text)
