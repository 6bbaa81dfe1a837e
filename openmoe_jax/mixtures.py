"""Tasks and mixtures by name: registered, checked against the settings, and with errors that say what to do."""

import contextlib
import difflib
import importlib
import os
import sys
from typing import Any, Iterator, List

from openmoe_jax import vocabulary
from openmoe_jax.config import ConfigError, DataConfig, require
from openmoe_jax.tensorflow_setup import import_seqio

# Pretraining and fine-tuning mixtures that recipes name (SPEC sections 10, 12 and 13).
OF_THE_ORIGINAL = frozenset([
    'mix_ul2', 'mix_full_lm', 'mix_ul2_stage2', 'mix_full_lm_stage2', 'mix_ul2_v2', 'mix_full_lm_v2',
    'mix_lesscode_ul2', 'mix_ul2_noprefix', 'c4_v220_ul2_pack', 'wildchat_gpt4_sft', 'orca_sft'])


def load_tasks(data: DataConfig) -> None:
  """Imports everything that registers tasks, and makes them use the configured vocabulary and TFDS folder."""
  vocabulary.configure(data.vocabulary, data.extra_ids)
  vocabulary.get()
  if data.module_imports and os.getcwd() not in sys.path:
    # Users' modules are found beside their gin files, as Python itself would but for the installed command. At the end:
    # nothing in the current folder (gin/ of a checkout, say) may hide a package.
    sys.path.append(os.getcwd())
  for name in ('openmoe_jax.tasks',) + data.module_imports:
    try:
      importlib.import_module(name)
    except ModuleNotFoundError as error:
      if error.name is None or not (name == error.name or name.startswith(error.name + '.')):
        raise  # The module is there; something that it imports is not.
      raise ConfigError('the package of tasks, openmoe_jax.tasks, is not installed; in a checkout run '
                        '`pip install -e . --no-deps`' if name == 'openmoe_jax.tasks' else
                        f'DataConfig.module_imports: there is no module {name!r} in the current folder or on the path '
                        'of Python (PYTHONPATH)') from error
  if data.tfds_data_dir:
    import_seqio().set_tfds_data_dir_override(data.tfds_data_dir)


def find_mixture(name: str, setting: str = 'DataConfig.mixture_or_task') -> Any:
  """The registered seqio task or mixture; an unknown name raises `ConfigError` with the closest known ones."""
  seqio = import_seqio()
  known = set(seqio.TaskRegistry.names()) | set(seqio.MixtureRegistry.names())
  if name not in known:
    if name in OF_THE_ORIGINAL:
      raise ConfigError(f'{setting} = {name!r} needs corpora that this version does not register yet; register it in a '
                        'module and name that in DataConfig.module_imports, or try demo_full_lm or demo_ul2')
    close = difflib.get_close_matches(name, sorted(known), n=4, cutoff=0.5)
    advice = f'did you mean {" or ".join(close)}?' if close else f'known: {", ".join(sorted(known))}'
    raise ConfigError(f'{setting} = {name!r} is not a registered mixture or task; {advice}')
  return seqio.get_mixture_or_task(name)


def tasks_with_rates(provider: Any) -> List[Any]:
  """[(task, rate)] of a task or mixture."""
  if isinstance(provider, import_seqio().Mixture):
    return [(task, provider.get_rate(task)) for task in provider.tasks]
  return [(provider, 1.0)]


def provider_for(data: DataConfig, name: str, split: str, setting: str = 'DataConfig.mixture_or_task') -> Any:
  """The task or mixture `name`, whose features, splits and vocabularies fit `data`."""
  load_tasks(data)
  provider = find_mixture(name, setting)
  features, lengths = set(provider.output_features), set(data.task_feature_lengths)
  require(features == lengths, f'{name} has the features {_listed(features)}, but DataConfig.task_feature_lengths '
          f'gives lengths for {_listed(lengths)}; for example ' + str({name: 256 for name in sorted(features)}))
  for task, _ in tasks_with_rates(provider):
    _check_vocabularies(task)
    require(not data.use_cached or task.supports_caching, f'DataConfig.use_cached = True, but task {task.name} cannot '
            'be cached: it has no seqio.CacheDatasetPlaceholder among its preprocessors, or its source forbids it')
  with reading(provider):  # TFDS looks for its files then.
    splits = set(provider.splits)
  require(split in splits, f'{name} has no split {split!r}; it has {_listed(splits)}' + (
      "; DataConfig.eval_split = '' trains without evaluation" if split == data.eval_split else ''))
  return provider


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
  elif 'cache' in first:
    advice = ('write its cache with seqio, name the folder with seqio.add_global_cache_dirs in a module of '
              'DataConfig.module_imports, or set DataConfig.use_cached = False (USE_CACHED_TASKS)')
  return ConfigError(f'the data of {task.name} cannot be read ({type(error).__name__}: {first}); {advice}')
