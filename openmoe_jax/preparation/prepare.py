"""All pieces of a plan, on several processes or under Apache Beam, and the data set that they make together.

  OUTPUT/NAME/VERSION.unfinished   plan.json, shards and their reports; finished.json once all are there
  OUTPUT/NAME/VERSION              the data set (`finishing`)

The same call goes on after any end, kill -9 included.
"""

import concurrent.futures
import json
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from openmoe_jax import paths
from openmoe_jax.config import ConfigError, require
from openmoe_jax.preparation import beam, finishing, pieces, pool
from openmoe_jax.preparation.finishing import Summary
from openmoe_jax.preparation.pieces import Shard
from openmoe_jax.preparation.plan import Plan
from openmoe_jax.preparation.reading import Segment

_PLAN_FILE, _FINISHED_FILE, _LOCK_FILE = 'plan.json', 'finished.json', 'lock'
_THREADS = 16  # that look at files


def prepare(plan: Plan, processes: int = 1, max_malformed: int = 0, beam_options: Optional[Sequence[str]] = None,
            say: Callable[[str], None] = print) -> Summary:
  """Makes the data set of a plan, or goes on with it; one that is there already stays as it is.

  Args:
    plan: `plan.make`.
    processes: on this machine; 1: this one.
    max_malformed: records that may be skipped, in all files together.
    beam_options: of the Apache Beam pipeline that is to do it; None: without Beam.
    say: prints a line.

  Raises:
    ConfigError: raw files cannot be read or have too many malformed records, nothing is left for a split, there is no
      space left, or what is in the output folder comes from something else. Finished shards stay.
  """
  try:
    before = _there_already(plan)
    if before:
      say(f'{plan.folder} is there already')
      return before
    paths.require_writable(plan.work)
    plan.work.mkdir(parents=True, exist_ok=True)
    with paths.locked(plan.work / _LOCK_FILE, f'{plan.work} is in use'):
      shards = _shards(plan, processes, max_malformed, beam_options, say)
      finishing.move(plan, shards)
      summary = finishing.describe(plan, shards)
      plan.work.rmtree()
    return summary
  except OSError as error:
    if paths.is_disk_full(error):
      raise ConfigError(f'no space is left for {plan.folder}; free some, and the same command goes on') from error
    raise ConfigError(f'{plan.folder} cannot be written: {error}') from error


def _there_already(plan: Plan) -> Optional[Summary]:
  before = finishing.read(plan)
  if before is None:
    require(plan.work.exists() or not paths.entries(plan.folder), f'{plan.folder} is there already, and comes from '
            'somewhere else; remove it, or choose another --output')
    return None
  difference = _difference(before[0], plan.identity())
  require(not difference, f'{plan.folder} was prepared with {difference}; remove it, or choose another --output')
  plan.work.rmtree(missing_ok=True)  # The end came while it was being removed.
  return before[1]


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
  """What was different in an old plan; '' if nothing was."""
  for name, value in json.loads(json.dumps(new)).items():
    if old.get(name) == value:
      continue
    if name != 'input files':
      return f'another {name} ({old.get(name)}, not {value})'
    before, now = ({file[0]: file[2] for file in files} for files in (old.get(name, []), value))
    changed = sorted(file for file in before.keys() | now.keys() if before.get(file) != now.get(file))
    return f'other input files ({len(changed)} differ, first {changed[0]})' if changed else 'another order of files'
  return ''


def _shards(plan: Plan, processes: int, max_malformed: int, beam_options: Optional[Sequence[str]],
            say: Callable[[str], None]) -> List[Shard]:
  """The finished shards of all pieces, in order, after the work that is needed for that."""
  all_of_them = plan.work / _FINISHED_FILE
  found = _found(plan, say)
  if all_of_them.exists():  # and some of them have been moved.
    return [pieces.from_plain(values) for values in json.loads(all_of_them.read_text())]
  limit = _Limit(max_malformed)
  for shards in found.values():
    limit.add(shards)
  todo = [i for i in range(len(plan.pieces)) if not _is_finished(found.get(i))]
  context = plan.builder.context([Segment(file.path, file.name) for file in plan.files], plan.limits)
  if beam_options is not None:
    beam.run(plan, todo, max_malformed, context, beam_options)
    results: Iterator[Tuple[int, List[Shard]]] = zip(todo, _look(plan, todo))
  else:
    done = sum(shards[-1].done for shards in found.values() if shards)
    results = pool.run(plan, todo, processes, max_malformed, context, done, say)
  for i, shards in results:
    limit.add(shards[len(found.get(i, [])):])
    found[i] = shards
  shards = [shard for i in range(len(plan.pieces)) for shard in found[i]]
  finishing.require_examples(plan, shards)
  paths.write_text(all_of_them, json.dumps([pieces.as_plain(shard) for shard in shards]))
  return shards


def _found(plan: Plan, say: Callable[[str], None]) -> Dict[int, List[Shard]]:
  """{piece: its finished shards} of earlier calls with the same plan."""
  file = plan.work / _PLAN_FILE
  if not file.exists():
    paths.write_text(file, json.dumps(plan.identity()))
    return {}
  difference = _difference(json.loads(file.read_text()), plan.identity())
  require(not difference, f'{plan.work} was begun with {difference}; remove it to begin anew')
  found = dict(enumerate(_look(plan, range(len(plan.pieces)))))
  count = sum(map(_is_finished, found.values()))
  say(f'going on in {plan.work}: {count:,} of {len(plan.pieces):,} pieces are finished')
  return found


def _look(plan: Plan, numbers: Sequence[int]) -> List[List[Shard]]:
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    return list(threads.map(lambda i: pieces.finished_shards(plan, i), numbers))


def _is_finished(shards: Optional[Sequence[Shard]]) -> bool:
  return bool(shards) and shards[-1].last


class _Limit:
  """Counts malformed records, and raises `ConfigError` once there are too many."""

  def __init__(self, most: int):
    self._most, self._count = most, 0

  def add(self, shards: Sequence[Shard]) -> None:
    for shard in shards:
      self._count += len(shard.malformed)
      if self._count > self._most:
        raise pieces.too_many(shard.malformed[-1], self._most)
