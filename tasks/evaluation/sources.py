"""Where evaluation tasks get their records: files of JSON lines in a folder, else data sets prepared by TFDS.

The folder has the layout DATASET/SPLIT.jsonl or DATASET/CONFIG/SPLIT.jsonl, under the names of TFDS, gzip allowed:

    trivia_qa/unfiltered.nocontext/validation.jsonl     bool_q/validation.jsonl
    mmlu/train.jsonl                                    ai2_arc/ARC-Challenge/test.jsonl
    lambada/test.jsonl                                  ai2_arc/ARC-Easy/test.jsonl
    human_eval/train.jsonl                              wmt16_translate/ro-en/test.jsonl

Published files may keep their names (human_eval/HumanEval.jsonl.gz). Nothing is read before a task is used, and nothing
is ever downloaded. A slice such as test[:32] counts records in the order of the file; TFDS keeps an order of its own.
"""

import itertools
import os
import re
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from openmoe_jax import paths
from openmoe_jax.config import ConfigError, require
from openmoe_jax.tasks.evaluation import records
from openmoe_jax.tensorflow_setup import import_seqio, import_tensorflow

tf = import_tensorflow()
seqio = import_seqio()

_DTYPES = {'string': tf.string, 'strings': tf.string, 'bool': tf.bool, 'int': tf.int32}
_folder = ''


def configure(data_dir: str = '') -> None:
  """Chooses the folder of local files of this process; '' is none.

  Raises:
    ConfigError: there is no such folder.
  """
  global _folder
  data_dir = os.fspath(data_dir)
  require(not data_dir or paths.path(data_dir).is_dir(),
          f'EvalConfig.data_dir = {data_dir!r}: no such folder; give one that holds, for example, bool_q/validation.jsonl')
  _folder = data_dir


def folder() -> str:
  """The configured folder of local files, or ''."""
  return _folder


class RecordSource(seqio.DataSource):
  """The records of one task, each a dictionary of its data set's fields; they are few, so a shard reads all of them."""

  def __init__(self, task: str, dataset: records.Dataset, splits: Mapping[str, str],
               keep: Optional[Callable[[Mapping[str, Any]], Any]] = None):
    """
    Args:
      task: named in error messages.
      dataset: what is read.
      splits: {split of the task: split of the data set, or its beginning such as test[:32]}.
      keep: which records to keep; applied after the slice.
    """
    super().__init__(splits=tuple(splits), caching_permitted=True)
    self._task, self._dataset, self._keep = task, dataset, keep
    self._slices = {split: _parse_slice(expression) for split, expression in splits.items()}

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> List[str]:
    return [split]

  def get_dataset(self, split: str = 'validation', shuffle: bool = False, seed: Optional[int] = None,
                  shard_info: Optional[Any] = None) -> Any:
    """A `tf.data.Dataset`.

    Raises:
      ConfigError: there is no data, a record lacks a field, or no record is left.
    """
    file, (base, count) = self._file(split), self._slices[split]
    dataset = self._from_file(file, count) if file else self._from_tfds(base, count)
    if self._keep:
      dataset = dataset.filter(self._keep)
    found = any(True for _ in dataset.take(1).as_numpy_iterator())
    require(found, f'task {self._task}: {file or self._dataset.tfds_name + ", split " + base + ","} has no record that '
            'the task can use')
    if shard_info:
      dataset = dataset.shard(shard_info.num_shards, shard_info.index)
    return dataset.shuffle(10_000, seed=seed) if shuffle else dataset

  def _file(self, split: str) -> str:
    """The local file of a split of the task, or ''."""
    candidates = [os.path.join(_folder, self._dataset.name, name)
                  for name in self._dataset.file_names(self._slices[split][0])] if _folder else []
    return next((file for file in candidates if paths.path(file).exists()), '')

  def _from_file(self, file: str, count: Optional[int]) -> Any:
    read = [self._dataset.read(record) for record in itertools.islice(records.lines(file), count)]
    columns = {}
    for field, (_, kind) in self._dataset.fields.items():
      values = [record[field] for record in read]
      columns[field] = (tf.ragged.constant(values, tf.string, ragged_rank=1) if kind == 'strings' else
                        tf.constant(values, _DTYPES[kind], shape=[len(values)]))
    return tf.data.Dataset.from_tensor_slices(columns)

  def _from_tfds(self, base: str, count: Optional[int]) -> Any:
    import tensorflow_datasets as tfds
    name = self._dataset.tfds_name
    data_dir = seqio.LazyTfdsLoader(name).data_dir  # What --tfds_data_dir has set.
    try:
      builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
      splits = builder.info.splits
    except Exception as error:  # Unknown names, versions and unreadable folders have no common base class.
      raise ConfigError(self._no_data(base, data_dir or tfds.core.constants.DATA_DIR)) from error
    require(base in splits, self._no_data(base, data_dir or tfds.core.constants.DATA_DIR))
    examples = builder.as_dataset(split=base, shuffle_files=False).take(-1 if count is None else count)
    for field, (place, _) in self._dataset.fields.items():
      require(_has(examples.element_spec, place), f'task {self._task}: examples of the TFDS data set {name} have no field '
              f'{place!r}')
    return examples.map(self._fields_of)

  def _fields_of(self, example: Mapping[str, Any]) -> Dict[str, Any]:
    """A TFDS example as the fields that files give, too."""
    fields = {}
    for field, (place, kind) in self._dataset.fields.items():
      value = example
      for part in place.split('/'):
        value = value[part]
      fields[field] = tf.cast(value, tf.int32) if kind == 'int' else value
    return fields

  def _no_data(self, base: str, tfds_folder: str) -> str:
    where = os.path.join(_folder, self._dataset.name, self._dataset.file_names(base)[0]) if _folder else ''
    return (f'task {self._task} has no data: {"there is no " + where + "[.gz]" if where else "EvalConfig.data_dir is not set"}'
            f', and {tfds_folder} holds no prepared TFDS data set {self._dataset.tfds_name} with split {base!r}; put '
            f'{self._dataset.name}/{self._dataset.file_names(base)[0]} into a folder and give that as EvalConfig.data_dir, or '
            'give the folder of the prepared data set as --tfds_data_dir')


def _has(spec: Any, place: str) -> bool:
  for part in place.split('/'):
    if not isinstance(spec, dict) or part not in spec:
      return False
    spec = spec[part]
  return True


def _parse_slice(expression: str) -> Tuple[str, Optional[int]]:
  """'test[:32]' -> ('test', 32); 'test' -> ('test', None)."""
  base, count = re.fullmatch(r'(\w+)(?:\[:(\d+)\])?', expression).groups()
  return base, int(count) if count else None
