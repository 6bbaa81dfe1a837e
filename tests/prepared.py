"""Small data sets in TFDS's format, under the names and versions that tasks read."""

import contextlib
import io
import os
from typing import Any, Mapping, Sequence, Union

import pytest
import tensorflow_datasets as tfds

from openmoe_jax.tensorflow_setup import import_seqio

Record = Mapping[str, Union[str, Sequence[str]]]


@pytest.fixture(scope='module', autouse=True)
def forget_folder():
  """For modules that import it: later ones find no data sets in the folders of these tests."""
  seqio = import_seqio()
  before = seqio.utils._TFDS_DATA_DIR_OVERRIDE
  yield
  seqio.set_tfds_data_dir_override(before)
  for name in seqio.TaskRegistry.names():
    source = seqio.TaskRegistry.get(name).source
    if isinstance(source, seqio.TfdsDataSource):
      source.tfds_dataset.override_data_dir(None)
      type(source).list_shards.cache_clear()


def write(folder: Any, name: str, splits: Mapping[str, Sequence[Record]], version: str = '1.0.0', config: str = '',
          records_per_file: int = 1000) -> None:
  """Writes FOLDER/NAME[/CONFIG]/VERSION; strings become text, lists of strings sequences of text.

  Args:
    folder: the data folder (`DataConfig.tfds_data_dir`).
    name, config, version: of the data set.
    splits: {split: records}, all with the same fields.
    records_per_file: at most.
  """
  record = next(iter(splits.values()))[0]
  text = tfds.features.Text()
  features = tfds.features.FeaturesDict(
      {key: text if isinstance(value, str) else tfds.features.Sequence(text) for key, value in record.items()})
  target = os.path.join(folder, name, config, version)
  os.makedirs(target)
  identity = tfds.core.DatasetIdentity(name=name, version=tfds.core.Version(version), data_dir=target, module_name='',
                                       config_name=config or None)
  writer = tfds.core.SequentialWriter(tfds.core.DatasetInfo(builder=identity, features=features), records_per_file)
  with contextlib.redirect_stderr(io.StringIO()):
    writer.initialize_splits(list(splits))
    writer.add_examples(dict(splits))
    writer.close_all()


def corpora(folder: Any, names: Mapping[str, Sequence[str]], **arguments: Any) -> None:
  """Writes data sets of texts, {name[/config]: texts}, with the features text and meta and only a training split."""
  for name, texts in names.items():
    name, _, config = name.partition('/')
    records = [{'text': text, 'meta': '{}'} for text in texts]
    write(folder, name, {'train': records}, config=config, **arguments)
