"""Ends this process at once with one clear line, whatever its other threads are doing."""

import os
import sys
import time
from typing import NoReturn

# Exit status where nothing is wrong with the run itself: a process of it was lost, or it hung. Starting it again helps.
START_AGAIN = 3
AGAIN = 'The same command (on every machine of the run) goes on from the last checkpoint.'
_SHOW_CURSOR = '\x1b[?25h'  # the live line of a terminal hides it


def program() -> str:
  """The name in front of errors."""
  return os.path.basename(sys.argv[0]).removesuffix('.py') or 'openmoe'


def say(text: str) -> None:
  """One line on stderr, not through Python's buffers, which the main thread may hold."""
  line = f'{program()}: {" ".join(text.split())}\n'
  if os.isatty(2):
    line = f'{_SHOW_CURSOR}\n{line}'
  os.write(2, line.encode('utf-8', 'replace'))


def end_process(text: str, status: int = START_AGAIN, linger: float = 0.) -> NoReturn:
  """Says `text` and, `linger` seconds later, ends without any clean-up, which could wait for what is not there any more."""
  say(text)
  time.sleep(linger)
  os._exit(status)
