"""Tasks and mixtures by name: registered, checked against the settings, and with errors that say what to do.

`DataConfig.mixture_schedule` names several mixtures and from which batch on each of them counts.
"""

import contextlib
import difflib
import importlib
import os
import re
import sys
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from openmoe_jax import paths, vocabulary
from openmoe_jax.config import ConfigError, DataConfig, require
from openmoe_jax.tensorflow_setup import import_seqio

_SETTING = 'DataConfig.mixture_or_task'
_PREPARE = 'prepare them (python -m openmoe_jax.tools.prepare_data, docs/data.md)'


def load_tasks(data: DataConfig, name: str) -> None:
  """Imports everything that registers tasks, and makes them use the configured vocabulary and TFDS folder.

  Args:
    data: the settings.
    name: what is going to be looked up; NAME_OBJECTIVE of a data set NAME in the TFDS folder becomes a task now.
  """
  vocabulary.configure(data.vocabulary, data.extra_ids)
  vocabulary.get()
  if data.module_imports and os.getcwd() not in sys.path:
    # Users' modules are found beside their gin files, as Python itself would but for the installed command. At the end:
    # nothing in the current folder (gin/ of a checkout, say) may hide a package.
    sys.path.append(os.getcwd())
  for module in ('openmoe_jax.tasks',) + data.module_imports:
    try:
      importlib.import_module(module)
    except ModuleNotFoundError as error:
      if error.name is None or not (module == error.name or module.startswith(error.name + '.')):
        raise  # The module is there; something that it imports is not.
      raise ConfigError('the package of tasks, openmoe_jax.tasks, is not installed; in a checkout run '
                        '`pip install -e . --no-deps`' if module == 'openmoe_jax.tasks' else
                        f'DataConfig.module_imports: there is no module {module!r} in the current folder or on the path '
                        'of Python (PYTHONPATH)') from error
  if data.tfds_data_dir:
    import_seqio().set_tfds_data_dir_override(data.tfds_data_dir)
    importlib.import_module('openmoe_jax.tasks.pretraining').register_prepared(name, data.tfds_data_dir)


def find_mixture(name: str, setting: str = _SETTING) -> Any:
  """The registered seqio task or mixture; an unknown name raises `ConfigError` with the closest known ones."""
  seqio = import_seqio()
  known = set(seqio.TaskRegistry.names()) | set(seqio.MixtureRegistry.names())
  if name not in known:
    close = difflib.get_close_matches(name, sorted(known), n=4, cutoff=0.5)
    mixtures = [known_name for known_name in sorted(seqio.MixtureRegistry.names())
                if known_name.startswith(('demo_', 'mix_'))]
    advice = f'did you mean {" or ".join(close)}?' if close else f'known: {", ".join(mixtures)} and their tasks'
    raise ConfigError(f'{setting} = {name!r} is not a registered mixture or task; {advice}')
  return seqio.get_mixture_or_task(name)


def tasks_with_rates(provider: Any) -> List[Any]:
  """[(task, rate)] of a task or mixture."""
  if isinstance(provider, import_seqio().Mixture):
    return [(task, provider.get_rate(task)) for task in provider.tasks]
  return [(provider, 1.0)]


def provider_for(data: DataConfig, name: str, split: str, setting: str = _SETTING,
                 targets_alone: bool = False) -> Any:
  """The task or mixture `name`, whose features, splits, vocabularies and data sets fit `data`.

  Args:
    data: the settings.
    name: of a task or mixture; also NAME_OBJECTIVE for a data set NAME of texts that lies in `data.tfds_data_dir`.
    split: that is wanted.
    setting: what the name was read from, for error messages.
    targets_alone: whether it may have targets only although `data` gives a length for inputs, too.
  """
  load_tasks(data, name)
  provider = find_mixture(name, setting)
  features, lengths = set(provider.output_features), set(data.task_feature_lengths)
  require(features == lengths or targets_alone and features == {'targets'}, f'{name} has the features '
          f'{_listed(features)}, but DataConfig.task_feature_lengths gives lengths for {_listed(lengths)}; for example '
          + str({name: 256 for name in sorted(features)}))
  tasks = [task for task, _ in tasks_with_rates(provider)]
  for task in tasks:
    _check_vocabularies(task)
    require(not data.use_cached or task.supports_caching, f'DataConfig.use_cached = True, but task {task.name} cannot '
            'be cached: it has no seqio.CacheDatasetPlaceholder among its preprocessors, or its source forbids it')
  if not data.use_cached:
    _require_prepared(name, tasks, data.tfds_data_dir)
  with reading(provider):  # TFDS looks for its files then.
    splits = set(provider.splits)
  require(split in splits, f'{name} has no split {split!r}; it has {_listed(splits)}' + (
      "; DataConfig.eval_split = '' trains without evaluation" if split == data.eval_split else ''))
  return provider


# Data sets that have to be prepared.


def _require_prepared(name: str, tasks: Sequence[Any], folder: str) -> None:
  """Raises one `ConfigError` that names every TFDS data set of the tasks which is not there.

  Also makes the tasks look in `folder`, whatever they were told before.
  """
  wanted = sorted({dataset for dataset in map(_tfds_name, tasks) if dataset})
  if wanted:
    require(not folder or paths.path(folder).is_dir(), f'the data of {name} cannot be read: DataConfig.tfds_data_dir = '
            f'{folder!r} is not a folder; it should hold {", ".join(wanted)}; {_PREPARE}')
  missing = {}
  for task in tasks:
    dataset = _tfds_name(task)
    if dataset and dataset not in missing:
      loader = task.source.tfds_dataset
      if folder and loader.data_dir != folder:
        loader.override_data_dir(folder)
        type(task.source).list_shards.cache_clear()  # It would go on naming the files of the other folder.
      problem = _problem(loader)
      if problem is not None:
        missing[dataset] = problem
  where = f'DataConfig.tfds_data_dir = {folder!r}' if folder else (
      "TFDS's own folder (DataConfig.tfds_data_dir is not set)")
  listed = ', '.join(dataset + (f' ({problem})' if problem else '') for dataset, problem in sorted(missing.items()))
  require(not missing, f'the data of {name} cannot be read: {where} lacks {listed}; {_PREPARE} '
          'or point DataConfig.tfds_data_dir (--tfds_data_dir) to the folder that holds them')


def _tfds_name(task: Any) -> str:
  """The data set that a task reads through TFDS, '' if it reads something else."""
  source = task.source
  return (source.tfds_dataset.name or '') if isinstance(source, import_seqio().TfdsDataSource) else ''


def _problem(loader: Any) -> Optional[str]:
  """What is wrong with a data set: None if nothing, '' if it is not there, else what is there instead."""
  try:
    if loader.info.splits:
      return None
  except Exception:  # pylint: disable=broad-except  TFDS raises many kinds; all mean that it cannot be read.
    pass
  name, _, version = loader.name.partition(':')
  if not loader.data_dir:
    return ''
  entries = paths.entries(paths.path(loader.data_dir) / name)
  there = [entry for entry in entries if re.fullmatch(r'\d+\.\d+\.\d+', entry)]
  if version in there:
    return 'there, but damaged or not finished'
  return f'there is version {", ".join(there)}' if there else ''


# Schedules.


class Phase(NamedTuple):
  """Attributes:
    first_batch: from which batch on it counts; the first one of a run is 0.
    rates: {task name: share of the rows}; the sum is 1.
  """
  first_batch: int
  rates: Dict[str, float]


def schedule(data: DataConfig) -> Tuple[List[Any], List[Phase]]:
  """The tasks and phases of `data.mixture_schedule`.

  Raises:
    ConfigError: an entry is not like '1000: 0.9 mix_a + 0.1 task_b', the first does not begin at 0, batches do not
      increase, or a mixture does not fit the settings. Tasks with only the feature targets are allowed beside others.
  """
  tasks: Dict[str, Any] = {}
  phases: List[Phase] = []
  for entry in data.mixture_schedule:
    where = f'DataConfig.mixture_schedule: {entry!r}'
    first_batch, parts = _parse_phase(entry, where)
    require(first_batch > phases[-1].first_batch if phases else first_batch == 0, f'{where} must begin ' + (
        f'after batch {phases[-1].first_batch} of the entry before it' if phases else 'at batch 0, as the first one'))
    rates: Dict[str, float] = {}
    for name, weight in parts:
      provider = provider_for(data, name, data.train_split, where, targets_alone=True)
      own = [(task, rate) for task, rate in tasks_with_rates(provider) if data.train_split in task.splits]
      for task, rate in own:
        tasks[task.name] = task
        rates[task.name] = rates.get(task.name, 0.) + weight * float(rate) / sum(float(rate) for _, rate in own)
    total = sum(rates.values())
    phases.append(Phase(first_batch, {name: rate / total for name, rate in sorted(rates.items())}))
  return [tasks[name] for name in sorted(tasks)], phases


def _parse_phase(entry: str, where: str) -> Tuple[int, List[Tuple[str, float]]]:
  """'1000: 0.9 mix_a + 0.1 task_b' -> (1000, [('mix_a', 0.9), ('task_b', 0.1)])."""
  first_batch, _, text = entry.partition(':')
  found = [re.fullmatch(r'\s*(?:([0-9.]+(?:[eE][-+]?\d+)?)\s*\*?\s+)?([A-Za-z_][\w./:-]*)\s*', part)
           for part in text.split('+')]
  require(re.fullmatch(r'\s*\d+\s*', first_batch) is not None and all(found),
          f"{where} must be like '1000: 0.9 mix_a + 0.1 task_b': a batch, a colon, mixtures or tasks with their rates")
  try:
    parts = [(match[2], float(match[1] or 1)) for match in found]
  except ValueError:
    parts = []
  require(bool(parts) and all(0 < weight < float('inf') for _, weight in parts),
          f'{where}: rates must be positive numbers')
  require(len({name for name, _ in parts}) == len(parts), f'{where} names something twice')
  return int(first_batch), parts


# Checks and messages.


def _check_vocabularies(task: Any) -> None:
  """Raises `ConfigError` where a feature would not follow the vocabulary of the run.

  Tokens that were made elsewhere (`seqio.PassThroughVocabulary`) are allowed as far as their ids are in range.
  """
  configured = vocabulary.get()
  for name, feature in task.output_features.items():
    own, where = feature.vocabulary, f"task {task.name}, feature '{name}'"
    if isinstance(own, import_seqio().PassThroughVocabulary):
      require(own.vocab_size <= configured.vocab_size, f'{where}: ids go up to {own.vocab_size - 1}, but the vocabulary '
              f'DataConfig.vocabulary has only {configured.vocab_size}')
    else:
      require(own is vocabulary.shared() or own == configured, f'{where} has a vocabulary of its own, which is not '
              'DataConfig.vocabulary; give the feature openmoe_jax.vocabulary.shared() and set VOCABULARY')


def _listed(names: Any) -> str:
  return ', '.join(map(repr, sorted(names))) or 'nothing'


@contextlib.contextmanager
def reading(task: Any) -> Iterator[None]:
  """Whatever a source's reader raises in this block is about the user's data, and becomes a `ConfigError` that says so."""
  try:
    yield
  except ConfigError:
    raise
  except Exception as error:
    raise read_error(task, error) from error


def read_error(task: Any, error: BaseException) -> ConfigError:
  first = str(error).strip().split('\n', 1)[0]
  advice = 'prepare it, or point DataConfig.tfds_data_dir to the folder that holds it'
  if 'Shuffling is disallowed' in first:
    advice = 'set DataConfig.shuffle = False (SHUFFLE_TRAIN_EXAMPLES)'
  elif 'slice' in first and 'incompatible' in first:
    advice = 'it is too small: the task keeps that many of its last examples for validation'
  elif 'cache' in first:
    advice = ('write its cache with seqio, name the folder with seqio.add_global_cache_dirs in a module of '
              'DataConfig.module_imports, or set DataConfig.use_cached = False (USE_CACHED_TASKS)')
  return ConfigError(f'the data of {task.name} cannot be read ({type(error).__name__}: {first}); {advice}')
