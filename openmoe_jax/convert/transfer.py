"""The engine of every conversion: tensors go part by part from a source to a sink; killed at any moment, it goes on.

What is written lies in DESTINATION.partial until it is complete; then the folder is renamed. Beside the tensors the
folder holds `conversion/`, one small file for every finished tensor, which is what a restart goes by. An object store
cannot rename folders: there the destination itself holds `conversion/` until the end, and what makes it readable
(index, metadata) is written last.
"""

import concurrent.futures
import contextlib
import fcntl
import json
import os
import shutil
import threading
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional

from etils import epath
import numpy as np

from openmoe_jax import paths
from openmoe_jax.bar import Bar
from openmoe_jax.config import ConfigError, require
from openmoe_jax.convert.tensors import PARAMS, PART_BYTES, Sink, Source, TensorInfo, part_rows, sum_bits

JOURNAL = 'conversion'
_PLAN = 'plan.json'
# A disk that is almost full would stop the conversion at its end.
_SPARE_BYTES = 16 << 20


def transfer(source: Source, sink: Sink, destination: paths.PathLike, dtype: Optional[Any] = None, workers: int = 0,
             say: Callable[[str], None] = print) -> Dict[str, Dict[str, Any]]:
  """Copies a checkpoint into a new folder; memory stays at a few parts, whatever the model's size.

  Args:
    source: where from.
    sink: the format to write.
    destination: a folder that does not exist yet, or is empty.
    dtype: of the parameters as written; as they are if None. Optimizer state is never cast.
    workers: tensors under way at a time; 0 for one per core, four at most.
    say: prints a line.

  Returns:
    Tensor name -> its record, as `Sink.finish` gets it.

  Raises:
    ConfigError: the destination is taken, there is no room for it, or the source is damaged. What is written stays in
      DESTINATION.partial, and the same command goes on from there.
  """
  target = paths.path(destination)
  check_free(target)
  tensors = {name: info._replace(dtype=np.dtype(dtype)) if dtype is not None and name.startswith(PARAMS) else info
             for name, info in source.tensors.items()}
  axes = {name: source.axis(name) if sink.axis(name) is None else sink.axis(name) for name in tensors}
  # The largest first: the last ones to finish are then small.
  order = sorted(tensors, key=lambda name: -tensors[name].nbytes)
  folder = target.parent / f'{target.name}.partial' if paths.is_local(target) else target
  with _alone(folder):
    plan = json.loads(json.dumps({'source': source.fingerprint, 'sink': sink.describe(),
                                  'tensors': {name: [list(i.shape), str(i.dtype), axes[name], part_rows(i, axes[name])]
                                              for name, i in tensors.items()}}))
    done = _resume(folder, plan, say)
    missing = [name for name in order if name not in done]
    _check_room(folder, sum(tensors[name].nbytes for name in missing))
    with _told_of_a_full_disk(folder):
      sink.begin(folder, tensors, axes, bool(done))
      paths.write_text(folder / JOURNAL / _PLAN, json.dumps(plan))
      with Bar(sum(info.nbytes for info in tensors.values()), say) as bar:
        bar.advance(sum(tensors[name].nbytes for name in done))
        done.update(_copy_all(source, sink, tensors, axes, missing, folder / JOURNAL, workers, bar))
      source.check({name: record['read'] for name, record in done.items()})
      sink.finish(done)
      _remove(folder / JOURNAL)
      if folder != target:
        _to_disk(folder)
        if target.exists():  # empty
          target.rmdir()
        folder.rename(target)
  return done


def read_all(source: Source, workers: int = 0, say: Callable[[str], None] = print) -> None:
  """Reads every tensor and compares it with the checksums of its checkpoint; raises `ConfigError` if it is damaged."""
  with Bar(sum(info.nbytes for info in source.tensors.values()), say, 'checking') as bar:
    def read(name: str) -> int:
      info, axis = source.tensors[name], source.axis(name)
      rows, length = part_rows(info, axis), info.shape[axis] if info.shape else 1
      total = 0
      for start in range(0, length, rows):
        part = source.read(name, axis, start, min(start + rows, length))
        total += sum_bits(part)
        bar.advance(part.nbytes)
      return total % 2**32
    with concurrent.futures.ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1)) as pool:
      sums = dict(zip(source.tensors, pool.map(read, source.tensors)))
  source.check(sums)


def upload(folder: epath.Path, target: epath.Path) -> None:
  """Copies a finished folder to an object store, the JSON files that make it readable last."""
  names = sorted(paths.entries(folder), key=lambda name: (name.endswith('.json'), name == 'config.json', name))
  for name in names:
    file, there = folder / name, target / name
    if not (there.exists() and there.stat().length == file.stat().length and not name.endswith('.json')):
      file.copy(there, overwrite=True)


def check_free(target: epath.Path) -> None:
  """Raises `ConfigError` if the destination holds anything but an unfinished conversion."""
  require(not target.exists() or target.is_dir(), f'the destination {target} is a file; give a new folder')
  names = paths.entries(target)
  require(not names or JOURNAL in names and not paths.is_local(target), f'the destination {target} is not empty '
          f'({", ".join(names[:3])}{", ..." if len(names) > 3 else ""}); nothing is overwritten: give a new folder')


def _resume(folder: epath.Path, plan: Mapping[str, Any], say: Callable[[str], None]) -> Dict[str, Dict[str, Any]]:
  """The records of tensors that an interrupted conversion of the same plan has finished."""
  journal = folder / JOURNAL
  if not paths.entries(folder):
    return {}
  require(journal.exists(), f'{folder} is in the way and was not made by a conversion; remove it or give another '
          'destination')
  try:
    same = json.loads((journal / _PLAN).read_text()) == plan
  except (OSError, ValueError):
    same = False
  if not same:
    say(f'{folder} holds an unfinished conversion of something else; it is begun again')
    _remove(folder)
    return {}
  done = {}
  for name in paths.entries(journal):
    if name != _PLAN and not name.startswith('.'):
      with contextlib.suppress(ValueError):
        record = json.loads((journal / name).read_text())
        done[record.pop('name')] = record
  if done:
    say(f'going on: {len(done)} of {len(plan["tensors"])} tensors are in {folder.name} already')
  return done


def _copy_all(source: Source, sink: Sink, tensors: Mapping[str, TensorInfo], axes: Mapping[str, int], names: List[str],
              journal: epath.Path, workers: int, bar: Bar) -> Dict[str, Dict[str, Any]]:
  workers = workers or min(4, os.cpu_count() or 1)
  stop = threading.Event()
  large = threading.Lock()  # a chunk of the source that is larger than a part is decoded as a whole: one at a time

  def copy(name: str) -> Dict[str, Any]:
    chunk = source.tensors[name].chunk
    size = source.tensors[name]._replace(shape=chunk).nbytes if chunk else 0
    with large if size > 2 * PART_BYTES else contextlib.nullcontext():
      if stop.is_set():
        raise concurrent.futures.CancelledError
      record = _copy(source, sink, name, tensors[name], axes[name], bar, stop)
    paths.write_text(journal / f'{list(tensors).index(name):06d}.json', json.dumps({'name': name, **record}))
    return record

  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    futures = {name: pool.submit(copy, name) for name in names}
    try:
      for future in concurrent.futures.as_completed(futures.values()):
        future.result()
    except BaseException:
      stop.set()
      pool.shutdown(cancel_futures=True)
      raise
  return {name: future.result() for name, future in futures.items()}


def _copy(source: Source, sink: Sink, name: str, info: TensorInfo, axis: int, bar: Bar,
          stop: threading.Event) -> Dict[str, Any]:
  """One tensor, part by part."""
  rows = part_rows(info, axis)
  length = info.shape[axis] if info.shape else 1
  read = written = 0
  for start in range(0, length, rows):
    if stop.is_set():
      raise concurrent.futures.CancelledError
    part = source.read(name, axis, start, min(start + rows, length))
    read += sum_bits(part)
    if part.dtype != info.dtype:
      part = _cast(source, name, part, info.dtype)
    written += sum_bits(part)
    sink.write(name, start, part)
    bar.advance(part.nbytes)
  return {'read': read % 2**32, 'sum': written % 2**32, **sink.close(name)}


def _cast(source: Source, name: str, part: np.ndarray, dtype: np.dtype) -> np.ndarray:
  with np.errstate(over='ignore'):
    cast = part.astype(dtype)
  if dtype == np.float16:
    require(bool(np.isfinite(cast).all()) or not np.isfinite(part).all(), f'{source.where}: {name} has values beyond '
            'the range of float16; use bfloat16 or float32')
  return cast


@contextlib.contextmanager
def _alone(folder: epath.Path) -> Iterator[None]:
  """Keeps a second conversion into the same folder out, on disks that can lock."""
  if not paths.is_local(folder):
    yield
    return
  lock_file = folder.parent / f'.{folder.name}.lock'
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = open(lock_file, 'a', encoding='utf-8')
  except OSError as error:
    raise ConfigError(f'{folder.parent} cannot be written to: {error}') from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ConfigError(f'another conversion is writing {folder}; wait for it, or give another destination') from error
    except OSError:
      pass  # not a disk that can lock
    try:
      yield
    finally:
      lock_file.unlink(missing_ok=True)


def _check_room(folder: epath.Path, needed: int) -> None:
  free = paths.free_bytes(folder)
  if free is not None and needed + _SPARE_BYTES > free:
    raise ConfigError(f'{folder.parent} has {paths.human_bytes(free)} left; the conversion needs '
                      f'{paths.human_bytes(needed)} more')


@contextlib.contextmanager
def _told_of_a_full_disk(folder: epath.Path) -> Iterator[None]:
  try:
    yield
  except ConfigError:
    raise
  except Exception as error:
    if not paths.is_disk_full(error):
      raise
    raise ConfigError(f'the disk of {folder} is full; what is written is kept: make room and start the same command '
                      'again') from error


def _remove(folder: epath.Path) -> None:
  if paths.is_local(folder):
    shutil.rmtree(folder)
  else:
    folder.rmtree()


def _to_disk(folder: epath.Path) -> None:
  """The files reach the disk before the name does: after a power cut a complete name means complete files."""
  for root, _, files in os.walk(folder):
    for name in (*files, '.'):
      descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
      try:
        os.fsync(descriptor)
      finally:
        os.close(descriptor)
