"""A seqio task of a few hundred short made-up texts, so that tests which start whole training runs start quickly."""

import os
import time

import numpy as np

from openmoe_jax import vocabulary
from openmoe_jax.tensorflow_setup import import_seqio, import_tensorflow

NAME = 'tiny_task'
BROKEN = 'tiny_broken_validation'
_WORDS = ('def return import for in while class self None print value index of the module function object if not else '
          'string number list is a this that with from error').split()


def _texts(count: int, seed: int) -> list:
  rng = np.random.default_rng(seed)
  return [' '.join(rng.choice(_WORDS, rng.integers(20, 60))) for _ in range(count)]


def _dataset(split, shuffle_files, seed=None):
  tf = import_tensorflow()
  texts = _texts(*{'train': (200, 1), 'validation': (40, 2)}[split])
  dataset = tf.data.Dataset.from_tensor_slices({'targets': texts})
  for fault, happens in (('TINY_TASK_FAILS_WHEN', _fail), ('TINY_TASK_HANGS_WHEN', _hang)):
    if os.environ.get(fault):
      dataset = _when(tf, dataset, os.environ[fault], happens)
  return dataset.shuffle(200, seed=seed) if shuffle_files else dataset


def _when(tf, dataset, file, happens):
  """The dataset, in which something happens once a file is there."""
  def look(text):
    if os.path.exists(file):
      happens()
    return text

  def same(example):
    targets = tf.py_function(look, [example['targets']], tf.string)
    targets.set_shape([])
    return {'targets': targets}
  return dataset.map(same)


def _fail():
  raise OSError('the disk of the texts is gone')


def _hang():
  time.sleep(1000)


def _broken_validation(split, shuffle_files, seed=None):
  """The files of the validation split turn out to be missing when they are read."""
  if split == 'train':
    return _dataset(split, shuffle_files, seed)
  return import_tensorflow().data.TextLineDataset('/no/such/file.txt').map(lambda line: {'targets': line})


def register() -> None:
  seqio = import_seqio()
  for name, dataset in ((NAME, _dataset), (BROKEN, _broken_validation)):
    if name not in seqio.TaskRegistry.names():
      seqio.TaskRegistry.add(
          name, source=seqio.FunctionDataSource(dataset, splits=('train', 'validation')),
          preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
          output_features={'targets': seqio.Feature(vocabulary.shared(), add_eos=True)})


register()
