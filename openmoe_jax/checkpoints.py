"""Checkpoints: everything a run needs to go on exactly as if it had never stopped. The only module that runs Orbax.

    model_dir/checkpoints/<step>/params        parameters          (layout on disk: openmoe_jax.checkpoint_layout)
                                /opt_state     optimizer state
                                /router_state  routers' own arrays, where there are any
                                /data          position of each data stream, a file a stream
                                /config        config.json: the whole run; progress.json: step, tokens, checksums
    model_dir/damaged/<step>                   steps that could not be read, moved out of the way

A step is written in the background and appears as a whole or not at all.
"""

import json
import logging
import sys
import traceback
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Tuple

from absl import logging as absl_logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from openmoe_jax import checkpoint_layout as layout
from openmoe_jax import launch
from openmoe_jax import paths
from openmoe_jax.checkpoint_files import FilesSave, read_files
from openmoe_jax.config import ConfigError, ModelConfig, RunConfig, from_dict, require, to_dict

CHECKPOINTS, DAMAGED = 'checkpoints', 'damaged'
_MOST_DIFFERENCES = 8
# Not signs of a damaged checkpoint: the next older step would fail the same way, or must not be taken instead.
_NOT_DAMAGE = (MemoryError, PermissionError, KeyboardInterrupt)
_NOT_DAMAGE_TEXT = ('RESOURCE_EXHAUSTED', 'PERMISSION_DENIED', 'UNAUTHENTICATED', 'Out of memory')


class CheckpointError(RuntimeError):
  """A checkpoint could not be written, or none of those there could be read. The message says what is kept."""


class Restored(NamedTuple):
  """What a step held. `damaged`: {step: reason} of newer ones that could not be read."""
  step: int
  state: Any
  data_state: Dict[int, bytes]
  progress: Dict[str, Any]
  damaged: Dict[int, str]


class Checkpointer:
  """Saves the steps of one run and restores the newest good one."""

  def __init__(self, run: RunConfig):
    require(run.model_dir != '', 'model_dir is empty: give --model_dir=DIR')
    self._run = run
    self._model_dir = paths.path(run.model_dir)
    self.directory = self._model_dir / CHECKPOINTS
    self._owned: Optional[List[int]] = None
    self._under_way: Optional[int] = None  # the step whose save was begun last
    # Orbax logs every phase of a save, and each failure besides raising it.
    absl_logging.set_verbosity(absl_logging.FATAL)
    _hide_echoes_of_failed_writes()
    keep = run.checkpoint
    self._manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
        max_to_keep=keep.max_to_keep or None, keep_period=keep.keep_period or None, cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False)))

  def steps(self) -> List[int]:
    """Finished steps, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, state: Any, data_state: Mapping[int, bytes], progress: Mapping[str, Any] = {}, wait: bool = False):
    """Writes the state as step `state.step`, in the background unless `wait`. A step that is there already is kept.

    The state's arrays are copied before this returns, so they may be donated.

    Args:
      state: has step, params, opt_state, router_state.
      data_state: {stream: position}; every process gives the streams that it reads, which may be others' streams too.
      progress: JSON values that `restore` gives back (tokens seen, metrics under way).

    Raises:
      CheckpointError: this write, or the last one in the background, failed.
    """
    self.wait()  # so that its failure is told as its own
    step = self._under_way = int(state.step)
    try:
      if step in self._manager.all_steps():
        return
      items, sums = {}, {}
      for item in layout.ITEMS:
        flat = layout.to_disk(self._run.model, getattr(state, item))
        if flat:
          items[item] = _arrays_to_save(flat)
          sums[item] = layout.checksums(flat)
      record = {**progress, 'step': step, 'checksums': sums}
      files = {'config.json': json.dumps(to_dict(self._run), indent=2), 'progress.json': json.dumps(record)}
      texts = {name: text.encode() for name, text in files.items()} if jax.process_index() == 0 else {}
      streams = {_stream_file(stream): data_state[stream] for stream in self._own_streams(data_state)}
      self._manager.save(step, force=True, args=ocp.args.Composite(
          **items, data=FilesSave(streams), config=FilesSave(texts)))
      if wait:
        self._manager.wait_until_finished()
    except Exception as error:
      raise self._write_error(error) from error

  def _own_streams(self, streams: Iterable[int]) -> List[int]:
    """Of the streams that this process reads, those that no process before it reads as well."""
    streams = sorted(streams)
    if jax.process_count() == 1:
      return streams
    if self._owned is None:
      reads = np.zeros(self._run.data.num_streams, bool)
      reads[streams] = True
      first = np.argmax(multihost_utils.process_allgather(reads), axis=0)
      self._owned = [s for s in streams if first[s] == jax.process_index()]
    return self._owned

  def wait(self) -> None:
    """Blocks until the save under way is on disk; raises `CheckpointError` if it failed."""
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as error:
      raise self._write_error(error) from error

  def check(self) -> None:
    """Raises `CheckpointError` if a save in the background has failed already; does not wait."""
    try:
      self._manager.check_for_errors()
    except Exception as error:
      raise self._write_error(error) from error

  def close(self) -> None:
    try:
      self._manager.close()
    except Exception as error:
      raise self._write_error(error) from error

  def _write_error(self, error: Exception) -> CheckpointError:
    kept = [s for s in finished_steps(self.directory) if s != self._under_way]
    reason = 'the disk is full' if paths.is_disk_full(error) else one_line(error)
    remains = f'the newest complete checkpoint is step {kept[-1]}' if kept else 'there is no complete checkpoint yet'
    advice = 'Make room and start' if paths.is_disk_full(error) else 'Start'
    return CheckpointError(f'checkpoint of step {self._under_way} could not be written to {self.directory}: {reason}; '
                           f'{remains}. {advice} the same command again.')

  def restore(self, template: Any, streams: Iterable[int] = (), with_data: bool = True) -> Optional[Restored]:
    """The newest step that can be read, or None where there is no step at all.

    Steps that cannot be read are reported in `Restored.damaged` and moved to model_dir/damaged. All processes take the
    same step.

    Args:
      template: state of ShapeDtypeStructs with shardings: the layout and mesh wanted now, whatever it was when saved.
      streams: the data streams whose positions this process needs.
      with_data: read positions at all.

    Raises:
      ConfigError: names or shapes on disk are not those of `template`.
      CheckpointError: there are steps, and none can be read.
    """
    damaged: Dict[int, str] = {}
    for step in reversed(_agreed_steps(self.steps())):
      directory = self.directory / str(step)
      found, reason = _attempt(lambda d=directory: read_step(d, self._run.model, template, streams, with_data))
      if found is None:
        damaged[step] = reason
        continue
      state, data_state, progress = found
      self._move_aside(damaged)
      return Restored(step, state, data_state, progress, damaged)
    if damaged:
      raise CheckpointError(f'no checkpoint in {self.directory} can be read; nothing was changed. ' +
                            '; '.join(f'step {step}: {reason}' for step, reason in damaged.items()))
    return None

  def _move_aside(self, damaged: Mapping[int, str]) -> None:
    if not damaged:
      return
    if jax.process_index() == 0:
      for step in damaged:
        folder = self._model_dir / DAMAGED
        folder.mkdir(parents=True, exist_ok=True)
        names = [str(step)] + [f'{step}_{i}' for i in range(2, len(paths.entries(folder)) + 3)]
        target = folder / next(name for name in names if not (folder / name).exists())
        (self.directory / str(step)).rename(target)
    launch.barrier('openmoe_damaged_moved')
    self._manager.reload()


def _hide_echoes_of_failed_writes() -> None:
  """Keeps two kinds of noise off stderr, each a traceback for every array of a write that failed.

  The save itself raises the first failure. The others stay in tasks that Orbax does not look at again, which asyncio
  reports whenever they are collected; and TensorStore calls back into event loops that Orbax has closed.
  """
  asyncio_log = logging.getLogger('asyncio')
  if _not_from_a_write not in asyncio_log.filters:
    asyncio_log.addFilter(_not_from_a_write)
  previous = sys.unraisablehook

  def hook(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
      previous(unraisable)
  if getattr(previous, '__name__', '') != 'hook':
    sys.unraisablehook = hook


def _not_from_a_write(record: logging.LogRecord) -> bool:
  """Of a task, or of several that were gathered: the message names only the former's coroutine."""
  if 'exception was never retrieved' not in record.getMessage():
    return True
  error = record.exc_info[1] if record.exc_info else None
  files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)] if error else []
  return not any('orbax' in file for file in files)


def _stream_file(stream: int) -> str:
  return f'stream_{stream:05d}'


def _arrays_to_save(flat: layout.Flat) -> Any:
  save_args = {name: layout.chunking(name, x.shape, x.dtype) for name, x in flat.items()}
  return ocp.args.PyTreeSave(layout.nest(flat), save_args=layout.nest(save_args))


def one_line(error: BaseException, limit: int = 300) -> str:
  """The first lines of an exception as one short line."""
  text = ' '.join(str(error).split()) or type(error).__name__
  return text if len(text) <= limit else text[:limit] + ' ...'


def _agreed_steps(steps: List[int]) -> List[int]:
  """The steps that every process sees."""
  if jax.process_count() == 1:
    return steps
  padded = np.full(1024, -1, np.int64)
  padded[:len(steps[-1024:])] = steps[-1024:]
  everyone = multihost_utils.process_allgather(padded)
  return sorted(set.intersection(*(set(int(s) for s in row if s >= 0) for row in everyone)))


def _attempt(read: Callable[[], Any]) -> Tuple[Optional[Any], str]:
  """(result, '') or (None, why not); None on every process as soon as one of them fails.

  Raises:
    Whatever says that the checkpoint is not at fault (another model's shapes, no permission, no memory).
  """
  result, reason, fatal = None, '', None
  try:
    result = read()
  except Exception as error:
    if isinstance(error, (ConfigError,) + _NOT_DAMAGE) or any(t in str(error) for t in _NOT_DAMAGE_TEXT):
      fatal = error
    reason = one_line(error)
  if jax.process_count() > 1:
    failed = multihost_utils.process_allgather(np.asarray(result is None))
    if failed.any() and not reason:
      result, reason = None, f'process {int(np.argmax(failed))} could not read it'
  if fatal is not None:
    raise fatal
  return result, reason


def finished_steps(directory: epath.PathLike) -> List[int]:
  """Steps under a checkpoints folder that were written completely, oldest first; opens nothing."""
  directory = paths.path(directory)
  return sorted(int(name) for name in paths.entries(directory)
                if name.isdigit() and ocp.utils.is_checkpoint_finalized(directory / name))


def read_config(step_directory: epath.PathLike) -> Dict[str, Any]:
  """The run's configuration as it was saved beside a step: the dictionary of `config.to_dict(RunConfig)`."""
  return json.loads(read_files(paths.path(step_directory) / 'config', ['config.json'])['config.json'])


def read_progress(step_directory: epath.PathLike) -> Dict[str, Any]:
  return json.loads(read_files(paths.path(step_directory) / 'config', ['progress.json'])['progress.json'])


def read_model_config(step_directory: epath.PathLike) -> ModelConfig:
  return from_dict(ModelConfig, read_config(step_directory)['model'])


def read_step(directory: epath.Path, model: ModelConfig, template: Any, streams: Iterable[int] = (),
              with_data: bool = True) -> Tuple[Any, Dict[int, bytes], Dict[str, Any]]:
  """(state, {stream: position}, progress) of one step; see `Checkpointer.restore`."""
  progress = read_progress(directory)
  read_config(directory)  # without it nobody could tell later what the step is of
  items = {item: read_item(directory, item, model, getattr(template, item), progress) for item in layout.ITEMS}
  data_state = read_streams(directory, streams if with_data else ())
  scalar = jax.device_put(np.asarray(progress['step'], np.int32), template.step.sharding)
  return template.replace(step=scalar, **items), data_state, progress


def read_streams(directory: epath.Path, streams: Iterable[int]) -> Dict[int, bytes]:
  """{stream: position} as saved with one step."""
  names = {_stream_file(stream): stream for stream in streams}
  files = read_files(directory / 'data', names) if names else {}
  return {names[name]: content for name, content in files.items()}


def read_item(directory: epath.Path, item: str, model: ModelConfig, template: Any,
              progress: Optional[Mapping[str, Any]] = None) -> Any:
  """One item of a step ('params', 'opt_state', 'router_state') with `template`'s structure and shardings.

  Raises:
    ConfigError: names or shapes differ; the message lists them.
    Exception: of many kinds, when files are damaged.
  """
  wanted = layout.disk_shapes(model, template)
  if not wanted:
    return template
  sums = (progress or read_progress(directory))['checksums'].get(item, {})
  require(sums or item != 'router_state', f'the checkpoint {directory} holds no router_state, which ModelConfig.router = '
          f'{model.router!r} needs: it was made with another router')
  handler = ocp.PyTreeCheckpointHandler()
  folder = directory / item
  require_same_arrays(folder, stored_shapes(folder), wanted)
  nested = layout.nest(wanted)
  flat = layout.flatten(handler.restore(folder, args=ocp.args.PyTreeRestore(
      nested, restore_args=ocp.checkpoint_utils.construct_restore_args(nested))))
  for name, value in layout.checksums(flat).items():
    if sums.get(name) != value:
      raise ValueError(f'{folder}: the array {name} does not have the checksum it was written with')
  return layout.from_disk(model, template, flat)


def stored_shapes(folder: epath.Path) -> Dict[str, Tuple[int, ...]]:
  """{array name: shape} of one item on disk, from its metadata alone."""
  metadata = ocp.PyTreeCheckpointHandler().metadata(folder)
  tree = getattr(metadata, 'tree', metadata)
  if not tree:
    raise ValueError(f'{folder} describes no arrays')
  is_array = lambda x: hasattr(x, 'shape')
  return {name: tuple(leaf.shape) for name, leaf in layout.flatten(tree, is_array).items()}


def require_same_arrays(folder: epath.Path, stored: Mapping[str, Tuple[int, ...]], wanted: layout.Flat) -> None:
  """Raises `ConfigError` naming every array that is missing, unknown or of another shape."""
  differences = []
  for name in sorted(set(stored) | set(wanted), key=lambda n: (n.count('/'), n)):
    if name not in wanted:
      differences.append(f'{name}: in the checkpoint only')
    elif name not in stored:
      differences.append(f'{name}: not in the checkpoint')
    elif tuple(stored[name]) != tuple(wanted[name].shape):
      differences.append(f'{name}: {list(stored[name])} in the checkpoint, {list(wanted[name].shape)} wanted')
  if differences:
    more = len(differences) - _MOST_DIFFERENCES
    what = 'the state of another optimizer (or model)' if folder.name == 'opt_state' else 'another model'
    raise ConfigError(f'the checkpoint {folder} holds {what}: ' + '; '.join(differences[:_MOST_DIFFERENCES]) +
                      (f'; and {more} more' if more > 0 else ''))


def resolve(name: paths.PathLike) -> epath.Path:
  """The folder of one step, from that folder, a checkpoints folder or a model_dir (their newest step).

  Raises:
    ConfigError: there is no checkpoint.
  """
  directory = paths.path(name)
  if (directory / 'params').exists():
    return directory
  for candidate in (directory / CHECKPOINTS, directory):
    steps = finished_steps(candidate)
    if steps:
      return candidate / str(steps[-1])
  raise ConfigError(f'{name} holds no checkpoint: expected a model_dir, its {CHECKPOINTS} folder or one of its steps')
