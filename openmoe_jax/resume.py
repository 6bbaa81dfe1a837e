"""What a run starts from: its own model_dir, another checkpoint, or nothing; and what may have changed since.

Priority: a checkpoint in model_dir always wins; then `initial_checkpoint_path`; then random parameters.
"""

import contextlib
import json
from typing import Any, Callable, Dict, Iterator, List, Mapping, Tuple

import jax
import numpy as np

from openmoe_jax import checkpoint_layout as layout
from openmoe_jax import checkpoints
from openmoe_jax import config as config_lib
from openmoe_jax import launch
from openmoe_jax import paths
from openmoe_jax.config import ConfigError, RunConfig, require
from openmoe_jax.optimizers import with_count

CONFIG_FILE = 'config.json'

# What this program writes into a model_dir.
OWN_NAMES = (CONFIG_FILE, checkpoints.CHECKPOINTS, checkpoints.DAMAGED, 'metrics.jsonl', 'tensorboard', 'loss.png',
             'expert_load.png', 'routing.png', 'eval', 'profile')
_LOCK_FILE = '.lock'
# What shells, disks and file browsers leave in an otherwise empty folder.
_INNOCENT = ('lost+found', 'nohup.out')
_INNOCENT_ENDINGS = ('.log', '.txt', '.out', '.err')

# Settings that do not change which model is trained on which data in which order. They may change in a resumed run.
_HARMLESS = ('model_dir', 'mesh.', 'checkpoint.', 'optimizer.', 'eval.', 'train.train_steps', 'train.log_period',
             'train.eval_period', 'train.plots', 'train.stop_on_nan', 'train.routing_metrics', 'train.max_metric_keys',
             'train.max_skipped_steps', 'train.loss_spike_sigmas', 'train.dead_expert_load', 'train.hang_minutes',
             'train.lost_process_seconds', 'data.eval_', 'data.tfds_data_dir', 'data.module_imports',
             # the same function to rounding, computed in another way
             'model.dispatch', 'model.scan_blocks', 'model.remat', 'model.attention_query_blocks',
             'model.loss_chunk_tokens')
# Not worth a line when they differ.
_SILENT = ('model_dir', 'checkpoint.allow_setting_changes')
_MISSING = object()


def is_harmless(setting: str) -> bool:
  """Whether a run may be resumed with another value of 'section.name' without a flag."""
  return any(setting == name or name[-1] in '._' and setting.startswith(name) for name in _HARMLESS)


def flatten_saved(saved: Mapping[str, Any]) -> Dict[str, Any]:
  """config.json as {'model.emb_dim': 768, ...}, like `config.flatten`."""
  flat = {}
  for key, value in saved.items():
    if key in ('model', 'data', 'mesh', 'optimizer', 'checkpoint', 'train'):
      flat.update({f'{key}.{name}': setting for name, setting in value.items()})
    else:
      flat[key] = value
  return flat


def changes(saved: Mapping[str, Any], run: RunConfig) -> Dict[str, Tuple[Any, Any]]:
  """{setting: (saved value, value now)} where they differ. A setting that the saved run did not know had its default."""
  before, now = flatten_saved(saved), config_lib.flatten(run)
  defaults = config_lib.flatten(config_lib.RunConfig(model=run.model))
  different = {}
  for name, value in now.items():
    old = before.get(name, value if name.startswith('model.') else defaults[name])
    if json.loads(json.dumps(old)) != json.loads(json.dumps(value)):
      different[name] = (old, value)
  return different


def check_changes(saved: Mapping[str, Any], run: RunConfig, where: Any) -> Tuple[List[str], bool]:
  """Compares a saved run with this one.

  Returns:
    Lines to print, and whether the stored data position still means something (no data setting changed).

  Raises:
    ConfigError: a setting that decides the model or the data order differs, and no flag allows it.
  """
  different = changes(saved, run)
  lines = [f'{name}: {old!r} -> {new!r}' for name, (old, new) in different.items() if name not in _SILENT]
  schedule = run.optimizer
  if 'train.train_steps' in different and not schedule.decay_steps and '_decay' in schedule.schedule.replace('rsqrt_', ''):
    lines.append('the learning rate falls until the end of the run, so it is another one from now on; '
                 'OptimizerConfig.decay_steps would keep the schedule')
  deciding = [name for name in different if not is_harmless(name)]
  if deciding and not run.checkpoint.allow_setting_changes:
    text = ', '.join(f'{name} was {different[name][0]!r}, is {different[name][1]!r}' for name in deciding)
    raise ConfigError(f'the run in {where} was made with other settings that decide the model or the data order: {text}. '
                      'Restore them, use another model_dir, or allow it with '
                      '--gin.CheckpointConfig.allow_setting_changes=True')
  order = [name for name in deciding if name.startswith('data.') or name == 'train.num_microbatches']
  return lines, not order


def claim_model_dir(run: RunConfig) -> List[int]:
  """Checks that model_dir is new or holds this program's run; makes nothing and changes nothing.

  Returns:
    The finished steps there.

  Raises:
    ConfigError: the folder holds something else.
  """
  require(run.model_dir != '', 'model_dir is empty: give --model_dir=DIR')
  directory = paths.path(run.model_dir)
  try:
    require(not directory.exists() or directory.is_dir(), f'model_dir = {run.model_dir!r} is a file')
    if not _is_run(directory):
      foreign = _foreign_names(directory)
      require(not foreign, f'model_dir = {run.model_dir!r} holds files of something else ({", ".join(foreign[:4])}'
              f'{", ..." if len(foreign) > 4 else ""}) and no {CONFIG_FILE} of a run; give an empty or new folder')
    return checkpoints.finished_steps(directory / checkpoints.CHECKPOINTS)
  except ConfigError:
    raise
  except Exception as error:  # whatever a disk, or the client library of a bucket, raises
    raise ConfigError(f'model_dir = {run.model_dir!r} cannot be used: {checkpoints.one_line(error)}') from error


def _is_run(directory: Any) -> bool:
  """Whether the folder's config.json was written by this program."""
  file = directory / CONFIG_FILE
  if not file.exists():
    return False
  try:
    content = json.loads(file.read_text())
  except ValueError:
    return False
  return isinstance(content, dict) and {'model', 'data', 'train', 'checkpoint'} <= set(content)


def _foreign_names(directory: Any) -> List[str]:
  """What lies in a folder without a config.json of ours and is not ours either."""
  known = tuple(name for name in OWN_NAMES if name != CONFIG_FILE) + _INNOCENT
  foreign = [name for name in paths.entries(directory) if name not in known and not name.startswith('.')
             and not name.endswith(_INNOCENT_ENDINGS)]
  folder = directory / checkpoints.CHECKPOINTS
  if folder.exists() and not folder.is_dir():
    return foreign + [f'the file {checkpoints.CHECKPOINTS}']
  steps = paths.entries(folder)
  return foreign + [f'{checkpoints.CHECKPOINTS}/{name}' for name in steps if not name.split('.')[0].isdigit()]


@contextlib.contextmanager
def hold_model_dir(run: RunConfig) -> Iterator[None]:
  """Keeps a second run out of model_dir, where it would delete the checkpoint that this one is writing.

  A lock of the operating system on a file in the folder: it is gone with the process, however that ends. Folders that
  cannot be locked (gs://, some network disks) are not guarded.

  Raises:
    ConfigError: another process holds it.
  """
  file = paths.path(run.model_dir) / _LOCK_FILE
  if jax.process_index() or not paths.is_local(run.model_dir):
    yield
    return
  file.parent.mkdir(parents=True, exist_ok=True)
  with paths.locked(file, f'model_dir = {run.model_dir!r} is in use'):
    yield


def first_step(run: RunConfig) -> int:
  """The step counter that a run without a checkpoint of its own begins with."""
  settings = run.checkpoint
  if not settings.initial_checkpoint_path or settings.restore != 'full' or settings.reset_step:
    return 0
  return checkpoints.read_progress(checkpoints.resolve(settings.initial_checkpoint_path))['step']


def write_config(run: RunConfig) -> None:
  """Writes model_dir/config.json; every host must see it, or checkpoints would be in pieces on several disks.

  Raises:
    ConfigError: this host does not see what the first one wrote.
  """
  file = paths.path(run.model_dir) / CONFIG_FILE
  text = json.dumps(config_lib.to_dict(run), indent=2) + '\n'
  if jax.process_index() == 0:
    paths.write_text(file, text)
  launch.barrier('openmoe_config_written')
  if jax.process_count() > 1:
    seen = file.exists() and file.read_text() == text
    all_see = launch.every_process(seen)
    require(all_see, f'model_dir = {run.model_dir!r} must be on storage that all {jax.process_count()} hosts share, and '
            'all must be started with the same settings')


def warm_start(run: RunConfig, template: Any, initialise: Callable[[], Any]) -> Tuple[Any, str]:
  """The first state of a run from `checkpoint.initial_checkpoint_path`: parameters only, or everything but the data.

  Args:
    template: state of ShapeDtypeStructs with shardings.
    initialise: makes a random state, born sharded; used for what the checkpoint is not asked for.

  Returns:
    The state, and a line that says what was read.

  Raises:
    ConfigError: no checkpoint there, or one of another model.
    CheckpointError: it cannot be read.
  """
  settings = run.checkpoint
  directory = checkpoints.resolve(settings.initial_checkpoint_path)
  try:
    progress = checkpoints.read_progress(directory)
    items = layout.ITEMS if settings.restore == 'full' else ('params',)
    require(run.model.router != 'frozen' or progress['checksums'].get('router_state'), f'initial_checkpoint_path = '
            f"{settings.initial_checkpoint_path!r} holds no table of experts, which ModelConfig.router = 'frozen' needs; "
            'python -m openmoe_jax.tools.freeze_router CHECKPOINT OUT makes a checkpoint with one')
    if template.router_state and progress['checksums'].get('router_state'):
      items = tuple(dict.fromkeys((*items, 'router_state')))  # a part of what the parameters compute
    read = {item: checkpoints.read_item(directory, item, run.model, getattr(template, item), progress)
            for item in items}
  except ConfigError:
    raise
  except Exception as error:
    raise checkpoints.CheckpointError(f'initial_checkpoint_path = {settings.initial_checkpoint_path!r}: {directory} '
                                      f'cannot be read: {checkpoints.one_line(error)}') from error
  step = progress['step'] if settings.restore == 'full' and not settings.reset_step else 0
  state = template.replace(**read) if len(items) == len(layout.ITEMS) else initialise().replace(**read)
  if settings.reset_step:
    # Schedules and running averages begin again too.
    state = state.replace(opt_state=jax.jit(lambda s: with_count(s, 0), donate_argnums=0)(state.opt_state))
  what = 'parameters, optimizer and router state' if settings.restore == 'full' else ' and '.join(
      {'params': 'parameters', 'router_state': 'router state'}[item] for item in items)
  scalar = jax.device_put(np.asarray(step, np.int32), template.step.sharding)
  return state.replace(step=scalar), f'warm start: {what} of {directory}; beginning at step {step}'


def check_room(run: RunConfig, template: Any) -> None:
  """Raises `ConfigError` where nothing can be written to model_dir, or not even one checkpoint of this state fits there."""
  try:
    paths.require_writable(run.model_dir)
  except OSError as error:
    raise ConfigError(f'model_dir = {run.model_dir!r} cannot be written to: {error}') from error
  free, needed = paths.free_bytes(run.model_dir), layout.nbytes(template)
  if free is not None:
    require(free >= needed, f'the disk of model_dir = {run.model_dir!r} has {paths.human_bytes(free)} left; one '
            f'checkpoint needs {paths.human_bytes(needed)}')
