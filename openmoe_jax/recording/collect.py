"""Records the routing of a model over tasks: streams batches, runs every policy on each, writes parts as they fill."""

import dataclasses
import itertools
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Sequence

import numpy as np

from openmoe_jax import data as data_lib
from openmoe_jax import mixtures, paths, vocabulary
from openmoe_jax.bar import Bar
from openmoe_jax.config import DataConfig, from_dict, require, to_dict
from openmoe_jax.progress import short_number
from openmoe_jax.recording import files, policies, tables
from openmoe_jax.recording.forward import forward
from openmoe_jax.routers.groups import group_tokens


class Settings(NamedTuple):
  """Attributes:
    mixtures: tasks or mixtures; each of their tasks is a domain of its own.
    policies: see `policies`.
    tokens: positions of each task that are recorded, as far as it has them.
    split: of the tasks; of several, separated by commas, the first one that a mixture has.
    length: positions of a row; 0 takes the run's.
    batch_size: rows of a batch, which share routing groups under the policies t5x_*.
    part_tokens: tokens of a file.
  """
  mixtures: Sequence[str]
  policies: Sequence[str] = ('none',)
  tokens: int = 65536
  split: str = 'validation'
  length: int = 0
  batch_size: int = 16
  part_tokens: int = 131072


def check(settings: Settings) -> None:
  """Raises `ConfigError` for values that cannot be."""
  for name in ('tokens', 'batch_size', 'part_tokens'):
    require(getattr(settings, name) >= 1, f'--{name}={getattr(settings, name)} must be at least 1')
  require(settings.length >= 0, f'--length={settings.length} must be at least 1, or 0 for the row length of training')
  require(bool(settings.mixtures), 'nothing to record: give --mixture=NAME[,NAME]')
  require(bool(settings.policies), f'--policy is empty; valid: {", ".join(policies.POLICIES)}')
  for name in settings.policies:
    require(name in policies.POLICIES, f'--policy: {name!r} is not known; valid: {", ".join(policies.POLICIES)}')


def data_settings(run: Mapping[str, Any], settings: Settings) -> DataConfig:
  """How the batches are made: as in the run, where the settings do not say otherwise."""
  data = from_dict(DataConfig, run['data'])
  lengths = dict(data.task_feature_lengths)
  if settings.length:
    lengths = {name: settings.length // len(lengths) for name in lengths} or {'targets': settings.length}
  require(bool(lengths), "the checkpoint's run does not say how long its rows were; give --length")
  count = -(-settings.tokens // (settings.batch_size * sum(lengths.values())))
  return dataclasses.replace(data, task_feature_lengths=lengths, eval_batches=count, eval_batch_size=settings.batch_size)


def tasks(data: DataConfig, settings: Settings) -> Dict[str, DataConfig]:
  """The tasks of all mixtures, each once, with the data settings that read the split which is recorded of it."""
  found: Dict[str, DataConfig] = {}
  for name in settings.mixtures:
    split = _split(data, name, [own.strip() for own in settings.split.split(',')])
    provider = mixtures.provider_for(data, name, split, '--mixture')
    found.update((task.name, dataclasses.replace(data, eval_split=split))
                 for task, _ in mixtures.tasks_with_rates(provider) if split in task.splits)
  return found


def _split(data: DataConfig, name: str, wanted: Sequence[str]) -> str:
  """The first split that a mixture has of several."""
  if len(wanted) == 1:
    return wanted[0]
  mixtures.load_tasks(data, name)
  provider = mixtures.find_mixture(name, '--mixture')
  with mixtures.reading(provider):
    return next((split for split in wanted if split in provider.splits), wanted[0])


def record(model: Any, output: paths.PathLike, settings: Settings, checkpoint: str = '',
           say: Callable[[str], None] = print) -> List[files.Key]:
  """Records a model; what is there already is not recorded again.

  Args:
    model: `loading.Model`.
    output: folder of the recording; may hold those of other steps of the same run.
    settings: what is recorded.
    checkpoint: what the recording says it is of.
    say: prints a line.

  Returns:
    The keys that are now complete.

  Raises:
    ConfigError: settings that cannot be, a model without sparse layers, unknown tasks, or a folder of another model.
  """
  check(settings)
  configs = {name: policies.configure(model.config, name) for name in settings.policies}
  data = data_settings(model.run, settings)
  domains = tasks(data, settings)
  files.begin(output, {
      'checkpoint': checkpoint, 'model': to_dict(model.config), 'split': settings.split,
      'task_feature_lengths': dict(data.task_feature_lengths), 'batch_size': settings.batch_size, 'pack': data.pack,
      'vocabulary': {'path': data.vocabulary, 'extra_ids': data.extra_ids, 'fingerprint': vocabulary.fingerprint()}})
  keys = []
  for domain, own in domains.items():
    _record_domain(model, output, settings, own, domain, configs, say)
    keys += [files.Key(model.step, name, domain) for name in configs]
  return keys


def _record_domain(model: Any, output: paths.PathLike, settings: Settings, data: DataConfig, domain: str,
                   configs: Mapping[str, Any], say: Callable[[str], None]) -> None:
  """One task under all policies, batch by batch."""
  layers = tables.sparse_layers(model.config)
  writers = {name: files.KeyWriter(output, files.Key(model.step, name, domain), layers, settings.part_tokens)
             for name in configs}
  wanted, size = data.eval_batches, settings.batch_size * data.row_length
  first = min(writer.done.batches for writer in writers.values())
  label = f'step {model.step} {domain}'
  with Bar(wanted * size * len(configs), say, label, lambda n: f'{short_number(n)} tokens') as bar:
    bar.advance(sum(min(writer.done.batches, wanted) for writer in writers.values()) * size)
    if first < wanted:
      for number, batch in itertools.islice(enumerate(data_lib.eval_batches(data, domain)), first, None):
        for name, config in configs.items():
          if number >= writers[name].done.batches + writers[name].waiting:
            record_batch(model, config, policies.POLICIES[name], number, batch, writers[name])
            bar.advance(size)
    for name, config in configs.items():
      together = policies.POLICIES[name].rows_together or settings.batch_size
      writers[name].finish(group_tokens(config, together, data.row_length, train=False)._asdict())


def record_batch(model: Any, config: Any, policy: policies.Policy, number: int, batch: Mapping[str, np.ndarray],
                  writer: files.KeyWriter) -> None:
  """Runs one batch under one policy and gives it to the writer."""
  rows = len(batch['decoder_input_tokens'])
  token_parts, choice_parts, groups = [], [], 0
  for start, part in parts_of(batch, policy.rows_together or rows):
    routing = forward(config, model.variables, part, model.mesh)
    first_group = number * (rows // len(part['decoder_input_tokens'])) * routing.grouping.num_groups + groups
    token_parts.append(tables.token_columns(routing, part, number * rows + start, first_group))
    choice_parts.append([tables.layer_columns(routing, layer) for layer in range(config.num_sparse_layers)])
    groups += routing.grouping.num_groups
  join = lambda parts: {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  writer.add(join(token_parts), [join(own) for own in zip(*choice_parts)])


def parts_of(batch: Mapping[str, np.ndarray], rows: int) -> Iterator:
  """(first row, batch of `rows` rows) for the rows that hold text."""
  inside = np.asarray(batch['decoder_target_tokens']).any(axis=1)
  for start in range(0, len(inside), rows):
    if inside[start:start + rows].any() or start == 0:
      yield start, {name: value[start:start + rows] for name, value in batch.items()}
