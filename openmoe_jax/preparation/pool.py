"""Pieces of work on the processes of one machine, with a bar."""

import concurrent.futures
from concurrent.futures.process import BrokenProcessPool
import multiprocessing
import os
import signal
import threading
from typing import Any, Callable, Iterator, List, Sequence, Tuple

from openmoe_jax.config import ConfigError
from openmoe_jax.bar import Bar
from openmoe_jax.preparation import pieces
from openmoe_jax.preparation.pieces import Shard
from openmoe_jax.preparation.plan import Plan

_SECONDS_BETWEEN_LOOKS = .2


def run(plan: Plan, todo: Sequence[int], processes: int, max_malformed: int, context: Any, done: int,
        say: Callable[[str], None]) -> Iterator[Tuple[int, List[Shard]]]:
  """Does the pieces `todo`, and gives (piece, its shards) when one is finished; stops the work if it is closed.

  Args:
    plan: of the data set.
    todo: numbers of pieces.
    processes: how many; 1: this one.
    max_malformed: records that may be skipped in a piece.
    context: of `DataSet.context`.
    done: input bytes that are read already.
    say: prints a line where there is no terminal.

  Raises:
    ConfigError: as `pieces.work`, or a process was killed.
  """
  total = sum(sum(piece.sizes) for piece in plan.pieces)
  with Bar(total, say, f'{plan.builder.name}: reading') as bar:
    bar.advance(done)
    if min(processes, len(todo)) <= 1:
      for i in todo:
        yield i, pieces.work(plan, i, max_malformed, _Steps(plan, i, bar.advance), context)
    else:
      yield from _run_processes(plan, todo, min(processes, len(todo)), max_malformed, context, bar)


class _Steps:
  """Makes steps of positions."""

  def __init__(self, plan: Plan, piece: int, advance: Callable[[int], None]):
    shards = pieces.finished_shards(plan, piece)
    self._last = shards[-1].done if shards else 0
    self._advance = advance

  def __call__(self, done: int) -> None:
    self._advance(done - self._last)
    self._last = done


def _run_processes(plan: Plan, todo: Sequence[int], processes: int, max_malformed: int, context: Any, bar: Bar
                   ) -> Iterator[Tuple[int, List[Shard]]]:
  # spawn: a fork would copy whatever threads of this process hold.
  method = multiprocessing.get_context('spawn')
  state = _State(method)
  shown = 0
  executor = concurrent.futures.ProcessPoolExecutor(
      processes, method, initializer=_begin, initargs=(plan, max_malformed, context, state))
  try:
    pending = {executor.submit(_work, i): i for i in todo}
    while pending:
      finished, _ = concurrent.futures.wait(pending, _SECONDS_BETWEEN_LOOKS, concurrent.futures.FIRST_COMPLETED)
      now = state.done.value
      bar.advance(now - shown)
      shown = now
      for future in finished:
        yield pending.pop(future), future.result()
  except BrokenProcessPool as error:
    raise ConfigError('a process that prepared data was killed, perhaps for lack of memory; the same command goes on, '
                      'with --processes=N on fewer') from error
  finally:
    state.stop.value = 1
    executor.shutdown(cancel_futures=True)


# In the processes.


class _State:
  """What the processes share: input bytes read, and whether they shall stop."""

  def __init__(self, method: Any):
    self.done, self.stop = method.Value('q', 0), method.Value('b', 0)

  def advance(self, count: int) -> None:
    with self.done.get_lock():
      self.done.value += count
    if self.stop.value:
      raise _Stopped


class _Stopped(Exception):
  """The work is not wanted any more."""


_own: Any = None


def _begin(*arguments: Any) -> None:
  global _own
  _own = arguments
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process stops the others.
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """A process whose parent was killed would wait for work for ever."""
  multiprocessing.parent_process().join()
  os._exit(1)


def _work(piece: int) -> List[Shard]:
  plan, max_malformed, context, state = _own
  return pieces.work(plan, piece, max_malformed, _Steps(plan, piece, state.advance), context)
