"""Streams, saved positions, evaluation batches, global arrays, and mistakes in the data settings."""

import contextlib
import dataclasses
import functools
import io
import json
import random
import subprocess
import sys
import textwrap
import zipfile

import jax
import numpy as np
import pytest

from openmoe_jax import data as data_lib
from openmoe_jax import objectives, vocabulary
from openmoe_jax.config import ConfigError, DataConfig, MeshConfig
from openmoe_jax.partitioning import batch_sharding, make_mesh
from openmoe_jax.tensorflow_setup import import_seqio, import_tensorflow

tf = import_tensorflow()
seqio = import_seqio()

COUNTS = {'train': 40, 'validation': 7}


class NumberedSource(seqio.DataSource):
  """Documents that are one number, 3 to 12 times; `base` tells sources apart."""

  def __init__(self, base, counts=None, shardable=True):
    self._counts = counts or COUNTS
    super().__init__(splits=tuple(self._counts))
    self._base, self._shardable = base, shardable

  @property
  def supports_arbitrary_sharding(self):
    return self._shardable

  def list_shards(self, split):
    return [split]

  def get_dataset(self, split='train', shuffle=True, seed=None, shard_info=None):
    numbers = tf.data.Dataset.range(self._counts[split])
    if shard_info:
      numbers = numbers.shard(shard_info.num_shards, shard_info.index)
    if shuffle:
      numbers = numbers.shuffle(100, seed=seed)
    return numbers.map(lambda n: {'targets': tf.fill([3 + n % 10], tf.cast(self._base + n, tf.int32))})


class TextSource(NumberedSource):
  """Documents with the given texts."""

  def __init__(self, texts):
    super().__init__(0, {'train': len(texts), 'validation': len(texts)})
    self._texts = texts

  def get_dataset(self, split='train', shuffle=True, seed=None, shard_info=None):
    dataset = tf.data.Dataset.from_tensor_slices({'text': tf.constant(self._texts, tf.string)})
    return dataset.shard(shard_info.num_shards, shard_info.index) if shard_info else dataset


class PairSource(NumberedSource):
  """Inputs that are 50s and targets that are 70s."""

  def get_dataset(self, split='train', shuffle=True, seed=None, shard_info=None):
    dataset = super().get_dataset(split, shuffle, seed, shard_info)
    return dataset.map(lambda e: {'inputs': tf.fill([4], 50), 'targets': tf.fill([tf.size(e['targets'])], 70)})


class FingerprintedSource(NumberedSource):
  """Documents that say themselves which ones they are, as the demo's do."""
  word = 'these'

  def fingerprint(self, split):
    return f'{self.word} of {split}'


@seqio.map_over_dataset(num_seeds=1)
def add_noise(example, seed):
  """Makes the last token random, to see that random choices continue after a restart."""
  noise = tf.random.stateless_uniform([1], seed, 1000, 2000, tf.int32)
  return {'targets': tf.concat([example['targets'], noise], 0)}


def _tokens_of_text(dataset, output_features):
  dataset = dataset.map(lambda e: {'targets': output_features['targets'].vocabulary.encode_tf(e['text'])})
  return dataset.filter(lambda e: tf.size(e['targets']) > 0)


def _in_turn(datasets, unused_rates, unused_seed):
  """A mixture's own way of sampling: one example of each task after the other."""
  return tf.data.Dataset.choose_from_datasets(datasets, tf.data.Dataset.range(len(datasets)).repeat())


def _register():
  numbers = {'targets': seqio.Feature(seqio.PassThroughVocabulary(5000), add_eos=False)}
  text = {'targets': seqio.Feature(vocabulary.shared())}
  for name, source, preprocessors in [
      ('numbers_a', NumberedSource(100), [add_noise]), ('numbers_b', NumberedSource(300), [add_noise]),
      ('numbers_plain', NumberedSource(100), []), ('numbers_one_file', NumberedSource(100, shardable=False), []),
      ('numbers_no_validation', NumberedSource(100, {'train': 9}), []),
      ('numbers_fingerprinted', FingerprintedSource(100), [])]:
    seqio.TaskRegistry.add(name, source, numbers, preprocessors, shuffle_buffer_size=7)
  seqio.TaskRegistry.add('numbers_unshuffled', NumberedSource(100), numbers, [], shuffle_buffer_size=None)
  seqio.TaskRegistry.add('pairs', PairSource(0), {name: numbers['targets'] for name in ('inputs', 'targets')}, [])
  seqio.MixtureRegistry.add('numbers_mix', [('numbers_a', 3), ('numbers_b', 1)])
  seqio.MixtureRegistry.add('numbers_in_turn', [('numbers_a', 3), ('numbers_b', 1)], sample_fn=_in_turn)
  demo = vocabulary.demo_model_path()
  for name, own in [
      ('ids_out_of_range', seqio.PassThroughVocabulary(100000)), ('foreign_bytes', seqio.ByteVocabulary()),
      ('foreign_sentinels', seqio.SentencePieceVocabulary(demo, extra_ids=100)),
      ('equal_vocabulary', seqio.SentencePieceVocabulary(demo, extra_ids=300))]:
    seqio.TaskRegistry.add(name, TextSource(['one text', 'two texts']), {'targets': seqio.Feature(own)},
                           [_tokens_of_text])
  seqio.TaskRegistry.add('blank_text', TextSource(['', '  ', '\n', ' ', '', '']), text, [_tokens_of_text])
  seqio.TaskRegistry.add('no_text', TextSource([]), text, [_tokens_of_text])
  seqio.TaskRegistry.add('absent_tfds', seqio.TfdsDataSource('no_such_dataset_anywhere:1.0.0', splits=('train',)),
                         text, [_tokens_of_text])
  # Its splits are only known from the files.
  seqio.TaskRegistry.add('absent_tfds_splits', seqio.TfdsDataSource('no_such_dataset_anywhere:1.0.0'), text,
                         [_tokens_of_text])
  seqio.TaskRegistry.add('broken_file', seqio.TextLineDataSource({'train': '/no/such/file-*'}), text,
                         [lambda ds: ds.map(lambda line: {'text': line}), _tokens_of_text])


_register()


def settings(**changes):
  values = dict(mixture_or_task='numbers_mix', task_feature_lengths={'targets': 24}, batch_size=8, num_streams=4,
                seed=5)
  return DataConfig(**{**values, **changes})


@contextlib.contextmanager
def text_task(name, source, preprocessors, features=('targets',)):
  """A task over the run's vocabulary that is registered inside the `with`."""
  seqio.TaskRegistry.add(name, source, {feature: seqio.Feature(vocabulary.shared()) for feature in features},
                         preprocessors, shuffle_buffer_size=5)
  try:
    yield
  finally:
    seqio.TaskRegistry.remove(name)


def take(streams, count):
  return [next(streams) for _ in range(count)]


def assert_same(batches, expected):
  assert len(batches) == len(expected)
  for batch, other in zip(batches, expected):
    assert set(batch) == set(other)
    for key in other:
      np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


@pytest.fixture(scope='module')
def reference():
  """The first batches of the standard settings, and their streams (whose position tests may move)."""
  streams = data_lib.TrainStreams(settings())
  return take(streams, 40), streams


# Batches.


def test_batches_are_packed_rows(reference):
  batch = reference[0][0]
  assert set(batch) == {'decoder_target_tokens', 'decoder_input_tokens', 'decoder_loss_weights', 'decoder_segment_ids',
                        'decoder_positions'}
  for value in batch.values():
    assert value.shape == (1, 8, 24) and value.dtype == np.int32
  assert batch['decoder_segment_ids'].max() > 1
  assert (batch['decoder_input_tokens'][..., 0] == 0).all()


def test_any_number_of_hosts_gives_the_same_batches(reference):
  expected = reference[0][:6]
  for hosts in ([(0, 1), (2, 3)], [(3,), (2,), (1,), (0,)]):
    parts = {ids: take(data_lib.TrainStreams(settings(), stream_ids=ids), 6) for ids in hosts}
    for i, batch in enumerate(expected):
      joined = {key: np.concatenate([parts[ids][i][key] for ids in sorted(hosts)], axis=1) for key in batch}
      assert_same([joined], [batch])


def test_microbatches_divide_each_streams_rows(reference):
  batches = take(data_lib.TrainStreams(settings(), num_microbatches=2, stream_ids=(1, 2)), 3)
  for batch, whole in zip(batches, reference[0]):
    for key, value in batch.items():
      assert value.shape == (2, 2, 24)
      # Stream s has rows 2s and 2s+1 of the whole batch; microbatch i has the i-th of them.
      np.testing.assert_array_equal(value, whole[key].reshape(4, 2, 24)[1:3].swapaxes(0, 1))


def test_seed_decides_and_streams_differ(reference):
  other = take(data_lib.TrainStreams(settings(seed=6), stream_ids=[0]), 1)[0]['decoder_target_tokens']
  mine = reference[0][0]['decoder_target_tokens']
  assert not np.array_equal(other, mine[:, :2])
  assert len({mine[0, row].tobytes() for row in range(8)}) == 8


@pytest.mark.parametrize('task', ['numbers_plain', 'numbers_one_file'])
def test_every_pass_covers_all_documents_once_in_a_new_order(task):
  # Documents of one row each: a stream of 10 documents, 2 rows a batch, so 5 batches are a pass.
  streams = data_lib.TrainStreams(settings(mixture_or_task=task, pack=False))
  rows = [batch['decoder_target_tokens'][0, :, 0] for batch in take(streams, 60)]
  per_stream = np.stack(rows).reshape(60, 4, 2).swapaxes(0, 1).reshape(4, 120)
  counts = np.stack([np.bincount(stream - 100, minlength=40) for stream in per_stream])
  if task == 'numbers_plain':  # One file's documents are dealt out anew in every pass.
    assert ((counts > 0).sum(axis=0) == 1).all(), 'each document belongs to one stream'
  # 120 rows are 12 passes; the shuffle buffer of 7 rows may hold a document back over the end.
  assert (counts.sum(axis=0) >= 11).all() and (counts.sum(axis=0) <= 13).all()
  assert not np.array_equal(per_stream[0, :50], per_stream[0, 50:100])


def test_every_stream_honours_the_rates_of_the_mixture():
  rows = 1024
  batch = next(data_lib.TrainStreams(settings(pack=False, batch_size=4 * rows)))
  share = (batch['decoder_target_tokens'][0, :, 0].reshape(4, rows) < 300).mean(axis=1)
  # Rate 3 of 4, within four standard deviations.
  assert (abs(share - .75) < 4 * (.75 * .25 / rows)**.5).all(), share


def test_a_mixture_samples_in_its_own_way():
  batch = next(data_lib.TrainStreams(settings(mixture_or_task='numbers_in_turn', pack=False, num_streams=1)))
  assert (batch['decoder_target_tokens'][0, :, 0] < 300).tolist() == [True, False] * 4


@pytest.mark.parametrize('pack', [True, False])
@pytest.mark.parametrize('targets_only', [True, False])
def test_loss_on_targets_only_is_honoured(targets_only, pack):
  data = settings(mixture_or_task='pairs', task_feature_lengths={'inputs': 12, 'targets': 24}, pack=pack,
                  loss_on_targets_only=targets_only, num_streams=1)
  for batch in (next(data_lib.TrainStreams(data)), next(data_lib.eval_batches(data, 'pairs'))):
    tokens = batch['decoder_target_tokens']
    assert {50, 70} <= set(tokens.flat)
    np.testing.assert_array_equal(batch['decoder_loss_weights'], tokens == 70 if targets_only else tokens > 0)


def test_a_task_that_forbids_shuffling_streams_without():
  data = settings(mixture_or_task='numbers_unshuffled', pack=False, shuffle=False)
  assert next(data_lib.TrainStreams(data))['decoder_target_tokens'][0, :2, 0].tolist() == [100, 104]


def test_an_equal_vocabulary_is_accepted():
  data = settings(mixture_or_task='equal_vocabulary', num_streams=1, pack=False)
  batch = next(data_lib.TrainStreams(data))
  assert {vocabulary.decode(row) for row in batch['decoder_target_tokens'][0]} == {'one text', 'two texts'}


def test_without_shuffling_documents_come_in_order():
  streams = data_lib.TrainStreams(settings(mixture_or_task='numbers_plain', pack=False, shuffle=False))
  first = np.concatenate([batch['decoder_target_tokens'][0, :2, 0] for batch in take(streams, 6)])
  np.testing.assert_array_equal(first[:10], np.arange(100, 140, 4))
  np.testing.assert_array_equal(first[10:], first[:2])


# Positions.


def check_interrupted_runs(data, batches, rounds, seed):
  """Runs that are interrupted at random points, some of them in new objects, as in a new process."""
  expected = take(data_lib.TrainStreams(data), batches)
  streams = data_lib.TrainStreams(data)
  beginning = streams.state()
  chance = random.Random(seed)
  for _ in range(rounds):
    streams.restore(beginning)
    done = 0
    while done < batches:
      count = min(chance.randint(0, batches // 2), batches - done)
      assert_same(take(streams, count), expected[done:done + count])
      done += count
      state = streams.state()
      assert streams.position == done
      take(streams, chance.randint(0, 3))  # What a killed run still reads is not part of the position.
      if chance.random() < 0.3:
        streams = data_lib.TrainStreams(data)
      streams.restore(state)


def test_interrupted_runs_continue_identically():
  # 60 batches are several passes over a stream's documents.
  check_interrupted_runs(settings(num_streams=2), 60, rounds=1, seed=11)


@pytest.mark.slow
@pytest.mark.parametrize('changes', [
    dict(num_streams=4),
    *(pytest.param(changes, marks=pytest.mark.exhaustive) for changes in (
        dict(num_streams=1, pack=False), dict(num_streams=2, shuffle=False), dict(num_streams=2, open_rows=3),
        dict(num_streams=2, mixture_or_task='numbers_one_file'), dict(num_streams=2, mixture_or_task='demo_full_lm'),
        dict(num_streams=1, mixture_or_task='demo_prefix_lm', task_feature_lengths={'inputs': 32, 'targets': 32}),
        dict(num_streams=1, mixture_or_task='demo_ul2_corrected', task_feature_lengths={'inputs': 32, 'targets': 32}))),
    pytest.param(dict(num_streams=1, mixture_or_task='demo_ul2', task_feature_lengths={'inputs': 32, 'targets': 32}),
                 marks=pytest.mark.exhaustive),
    pytest.param(dict(num_streams=1, mixture_or_task='demo_fim', task_feature_lengths={'targets': 64}, open_rows=2),
                 marks=pytest.mark.exhaustive)])
def test_many_interrupted_runs_continue_identically(changes):
  check_interrupted_runs(settings(**changes), 100, rounds=2, seed=7)


def test_a_position_continues_on_another_number_of_hosts():
  data = settings(num_streams=2)
  streams = data_lib.TrainStreams(data)
  take(streams, 13)
  state = streams.state()
  assert sorted(state) == [0, 1] and all(isinstance(value, bytes) for value in state.values())
  expected = take(streams, 8)
  parts = []
  for ids in ((0,), (1,)):
    host = data_lib.TrainStreams(data, stream_ids=ids)
    host.restore(state)
    parts.append((take(host, 5), host.state()))
  joined = [{key: np.concatenate([a[key], b[key]], axis=1) for key in a} for a, b in zip(parts[0][0], parts[1][0])]
  assert_same(joined, expected[:5])
  streams.restore({**parts[0][1], **parts[1][1]})
  assert_same(take(streams, 3), expected[5:])


@pytest.mark.parametrize('files', [3, 1])
def test_files_are_shared_among_streams_and_shuffled_reproducibly(tmp_path, files):
  for i in range(files):
    (tmp_path / f'part-{i}.txt').write_text(''.join(f'{i * 10 + line} text\n' for line in range(10)))
  name = f'text_files_{files}'
  seqio.TaskRegistry.add(name, seqio.TextLineDataSource({'train': str(tmp_path / 'part-*.txt')}),
                         preprocessors=[lambda dataset: dataset.map(lambda line: {'text': line}), _tokens_of_text],
                         output_features={'targets': seqio.Feature(vocabulary.shared())}, shuffle_buffer_size=3)
  try:
    data = settings(mixture_or_task=name, num_streams=3, batch_size=3, pack=False)
    streams = data_lib.TrainStreams(data)
    take(streams, 9)
    state = streams.state()
    expected = take(streams, 21)
    streams.restore(state)
    assert_same(take(streams, 21), expected)
    lines = [[vocabulary.decode(row) for row in batch['decoder_target_tokens'][0]] for batch in expected]
    if files == 3:
      assert all(len({line.split()[0].zfill(2)[0] for line in stream}) == 1 for stream in zip(*lines))
    assert len({line for batch in lines for line in batch}) == files * 10
  finally:
    seqio.TaskRegistry.remove(name)


def test_batch_of_a_step():
  data = settings(num_streams=1)
  streams = data_lib.TrainStreams(data)
  take(streams, 7)
  state = streams.state()
  expected = take(streams, 3)[2]
  assert_same([data_lib.batch_at(data, 1, 9)], [expected])
  assert_same([data_lib.batch_at(data, 1, 9, state)], [expected])
  with pytest.raises(ConfigError, match='after step 6'):
    data_lib.batch_at(data, 1, 6, state)


def test_positions_of_other_settings_are_refused():
  data = settings(num_streams=2)
  streams = data_lib.TrainStreams(data)
  beginning = streams.state()
  take(streams, 2)
  with pytest.raises(ConfigError, match='seed: 5 then, 6 now'):
    data_lib.TrainStreams(dataclasses.replace(data, seed=6), stream_ids=[0]).restore(beginning)
  with pytest.raises(ConfigError, match=r'no stream \[1\]'):
    streams.restore({0: beginning[0]})
  state = streams.state()
  expected = take(streams, 2)
  streams.restore(state)
  with pytest.raises(ConfigError, match='not of the same step'):
    streams.restore({**state, 0: beginning[0]})
  assert streams.position == 2
  assert_same(take(streams, 2), expected)  # Also stream 0 is where it was.


def _with_header(position, change):
  """The saved position with other settings in its header."""
  buffer = io.BytesIO()
  with zipfile.ZipFile(io.BytesIO(position)) as old, zipfile.ZipFile(buffer, 'w') as new:
    for name in old.namelist():
      content = old.read(name)
      if name == 'header.json':
        header = json.loads(content)
        header['settings'] = change(header['settings'])
        content = json.dumps(header)
      new.writestr(name, content)
  return buffer.getvalue()


def test_positions_of_other_files_are_refused(tmp_path):
  for i in range(3):
    (tmp_path / f'part-{i}.txt').write_text(''.join(f'{i * 10 + line} text\n' for line in range(10)))
  data = settings(mixture_or_task='text_files', num_streams=2, batch_size=4)

  def streams():
    # No pattern: within a process seqio looks for a pattern's files once.
    files = sorted(map(str, tmp_path.glob('part-*.txt')))
    with text_task('text_files', seqio.TextLineDataSource({'train': files}),
                   [lambda dataset: dataset.map(lambda line: {'text': line}), _tokens_of_text]):
      return data_lib.TrainStreams(data)

  before = streams()
  expected = take(before, 4)
  state = before.state()
  streams().restore(state)  # The same files.
  (tmp_path / 'part-2.txt').rename(tmp_path / 'part-3.txt')
  renamed = streams()
  begun = take(renamed, 1)
  with pytest.raises(ConfigError, match='documents of text_files: .* then, .* now') as error:
    renamed.restore(state)
  assert '\n' not in str(error.value) and renamed.position == 1
  assert_same(begun + take(renamed, 3), expected)  # The text is the same, and the refusal changed nothing.


def test_positions_of_other_documents_are_refused_and_old_headers_are_not(monkeypatch):
  data = settings(mixture_or_task='numbers_fingerprinted', num_streams=1)
  streams = data_lib.TrainStreams(data)
  take(streams, 2)
  state = streams.state()
  expected = take(streams, 3)
  monkeypatch.setattr(FingerprintedSource, 'word', 'others')
  changed = data_lib.TrainStreams(data)
  with pytest.raises(ConfigError, match="documents of numbers_fingerprinted: 'these of train' then, 'others of train'"):
    changed.restore(state)
  assert changed.position == 0

  def without_new_keys(saved):
    assert {'use_cached', 'documents of numbers_fingerprinted'} <= set(saved)
    return {key: value for key, value in saved.items() if key != 'use_cached' and not key.startswith('documents of')}

  changed.restore({0: _with_header(state[0], without_new_keys)})
  assert changed.position == 2
  assert_same(take(changed, 3), expected)
  with pytest.raises(ConfigError, match='use_cached: True then, False now'):
    changed.restore({0: _with_header(state[0], lambda saved: {**without_new_keys(saved), 'use_cached': True})})


def test_positions_of_other_rates_or_tasks_are_refused():
  data = settings(mixture_or_task='numbers_changing', num_streams=1)
  state = None
  for tasks in ([('numbers_a', 3), ('numbers_b', 1)], [('numbers_a', 1), ('numbers_b', 3)], [('numbers_a', 3)]):
    seqio.MixtureRegistry.add('numbers_changing', tasks)
    try:
      streams = data_lib.TrainStreams(data)
      state = state or streams.state()
      if tasks[0] == ('numbers_a', 3) and len(tasks) == 2:
        streams.restore(state)
        continue
      with pytest.raises(ConfigError, match=r"rates: {'numbers_a': 3.0, 'numbers_b': 1.0} then, {.*} now") as error:
        streams.restore(state)
      assert '\n' not in str(error.value)
    finally:
      seqio.MixtureRegistry.remove('numbers_changing')


def test_positions_after_skipping_can_be_restored():
  data = settings(num_streams=2)
  streams = data_lib.TrainStreams(data)
  streams.skip(3)
  state = streams.state()
  expected = take(streams, 3)
  whole = data_lib.TrainStreams(data)
  assert_same(take(whole, 6)[3:], expected)
  whole.restore(state)
  assert whole.position == 3
  assert_same(take(whole, 3), expected)


# Data sets on disk.


@pytest.fixture
def tfds_override():
  """Puts seqio's folder for TFDS back."""
  before = seqio.utils._TFDS_DATA_DIR_OVERRIDE
  yield
  seqio.set_tfds_data_dir_override(before)


def test_tfds_data_sets_are_looked_for_in_their_folder(tmp_path, tfds_override):
  import tensorflow_datasets as tfds
  with tfds.core.registered.skip_registration():  # It is only known by its files, as on another machine.
    class TinyTexts(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version('1.0.0')

      def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({'text': tfds.features.Text()}))

      def _split_generators(self, dl_manager):
        return {'train': ((i, {'text': f'text {i}'}) for i in range(20))}

      def _generate_examples(self):
        raise NotImplementedError

  TinyTexts(data_dir=str(tmp_path / 'here')).download_and_prepare()
  texts = {f'text {i}' for i in range(20)}

  def streams(folder, **changes):
    # A source of its own: seqio's keep the folder that they have first seen.
    with text_task('tiny_tfds', seqio.TfdsDataSource('tiny_texts:1.0.0'), [_tokens_of_text]):
      return data_lib.TrainStreams(settings(mixture_or_task='tiny_tfds', num_streams=2, batch_size=20, pack=False,
                                            tfds_data_dir=str(tmp_path / folder), **changes))

  with pytest.raises(ConfigError, match='tfds_data_dir.*not a folder.*tiny_texts'):
    streams('there')
  # Two streams share the only file: each keeps every other document.
  rows = next(streams('here', shuffle=False))['decoder_target_tokens'][0]
  assert len(rows) == 20 and set(map(vocabulary.decode, rows)) == texts
  shuffled = streams('here')
  seen = {vocabulary.decode(row) for batch in take(shuffled, 4) for row in batch['decoder_target_tokens'][0]}
  assert seen == texts
  state = shuffled.state()
  expected = take(shuffled, 4)
  again = streams('here')
  again.restore(state)
  assert_same(take(again, 4), expected)


CACHED = [f'document {i} ' + 'word ' * (i % 7) + f'ends {i}' for i in range(60)]


@pytest.fixture
def cache(tmp_path):
  """Writes a task's texts as seqio's cache tool does, into a folder where seqio looks for caches."""
  before = list(seqio.get_global_cache_dirs())
  seqio.set_global_cache_dirs([str(tmp_path)])

  def write(task, files):
    folder = tmp_path / task
    folder.mkdir()
    for split in ('train', 'validation'):
      for i in range(files):
        with tf.io.TFRecordWriter(f'{folder}/{split}.tfrecord-{i:05d}-of-{files:05d}') as writer:
          for text in CACHED[i::files]:
            value = tf.train.Feature(bytes_list=tf.train.BytesList(value=[text.encode()]))
            writer.write(tf.train.Example(features=tf.train.Features(feature={'text': value})).SerializeToString())
      info = dict(num_shards=files, features={'text': dict(dtype='string', shape=[])}, seqio_version='0.0.20')
      (folder / f'info.{split}.json').write_text(json.dumps(info))
      (folder / f'stats.{split}.json').write_text(json.dumps(dict(examples=len(CACHED))))
    (folder / 'COMPLETED').write_text('')

  yield write
  seqio.set_global_cache_dirs(before)


def _not_with_a_cache(split=None, shuffle_files=False, seed=None):
  raise AssertionError('with use_cached neither the source nor the steps before the cache are used')


def _uncached_source():
  return seqio.FunctionDataSource(_not_with_a_cache, splits=('train', 'validation'))


@pytest.mark.parametrize('files', [1, 4])
def test_cached_tasks_stream_from_their_files(files, cache):
  cache('cached_text', files)
  data = settings(mixture_or_task='cached_text', num_streams=2, batch_size=12, pack=False, use_cached=True)
  with text_task('cached_text', _uncached_source(),
                 [lambda dataset: _not_with_a_cache(), seqio.CacheDatasetPlaceholder(), _tokens_of_text]):
    streams = data_lib.TrainStreams(data)
    # A pass is 5 batches (60 texts); the buffer of 5 rows holds some back. Five passes and a half.
    texts = [vocabulary.decode(row) for batch in take(streams, 28) for row in batch['decoder_target_tokens'][0]]
    assert set(texts) == set(CACHED)
    assert all(3 <= texts.count(text) <= 9 for text in CACHED)
    state = streams.state()
    expected = take(streams, 10)
    again = data_lib.TrainStreams(data)
    again.restore(state)
    assert_same(take(again, 10), expected)
    assert len(list(data_lib.eval_batches(dataclasses.replace(data, eval_batches=0), 'cached_text'))) == 5


@pytest.mark.slow
def test_ul2_of_a_cached_task_continues_identically(cache):
  """Its six denoisers iterate the cached files, each for itself, and must see one order of them."""
  cache('cached_ul2', 4)
  data = settings(mixture_or_task='cached_ul2', task_feature_lengths={'inputs': 24, 'targets': 24}, num_streams=1,
                  use_cached=True)
  with text_task('cached_ul2', _uncached_source(), [
      seqio.CacheDatasetPlaceholder(), functools.partial(objectives.ul2, documents=1)], ('inputs', 'targets')):
    streams = data_lib.TrainStreams(data)
    beginning = streams.state()
    # 160 rows are several passes over 60 short documents.
    first = take(streams, 20)
    state = streams.state()
    expected = take(streams, 10)
    for position, batches in ((beginning, first), (state, expected)):
      streams.restore(position)  # In iterators of their own.
      assert_same(take(streams, len(batches)), batches)
    text = vocabulary.decode(np.concatenate([batch['decoder_target_tokens'] for batch in first]).flatten())
    assert all(f'[{prompt}] document' in text for prompt in ('NLU', 'NLG', 'S2S'))


def test_tasks_without_a_cache_are_one_clear_line(cache):
  with text_task('never_cached', _uncached_source(), [seqio.CacheDatasetPlaceholder(), _tokens_of_text]):
    for name, message in (('numbers_plain', 'task numbers_plain cannot be cached: it has no seqio.CacheDatasetPlace'),
                          ('never_cached', 'the data of never_cached cannot be read .*; write its cache with seqio')):
      with pytest.raises(ConfigError, match=message) as error:
        data_lib.TrainStreams(settings(mixture_or_task=name, use_cached=True))
      assert '\n' not in str(error.value)


def test_modules_are_found_in_the_current_folder(tmp_path, monkeypatch):
  # As under the installed command, whose path has no current folder.
  monkeypatch.setattr(sys, 'path', [path for path in sys.path if path])
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'my_tasks_of_data_test.py').write_text(textwrap.dedent('''
      import seqio
      from tests.data_test import NumberedSource
      feature = seqio.Feature(seqio.PassThroughVocabulary(5000), add_eos=False)
      seqio.TaskRegistry.add('numbers_of_a_module', NumberedSource(500), {'targets': feature}, [])
  '''))
  (tmp_path / 'broken_tasks_of_data_test.py').write_text('import no_such_package_of_theirs')
  data = settings(mixture_or_task='numbers_of_a_module', module_imports=('my_tasks_of_data_test',))
  try:
    tokens = next(data_lib.TrainStreams(data))['decoder_target_tokens']
    assert set(tokens.flat) <= {0} | set(range(500, 540))
    assert sys.path[-1] == str(tmp_path), 'nothing in the folder hides a package'
    # A module that is there is not called missing.
    with pytest.raises(ModuleNotFoundError, match='no_such_package_of_theirs'):
      data_lib.TrainStreams(dataclasses.replace(data, module_imports=('broken_tasks_of_data_test',)))
  finally:
    sys.modules.pop('my_tasks_of_data_test', None)
    if 'numbers_of_a_module' in seqio.TaskRegistry.names():
      seqio.TaskRegistry.remove('numbers_of_a_module')


# Evaluation.


def test_evaluation_is_per_source_finite_and_the_same_every_time():
  data = settings(batch_size=8, eval_batches=0, eval_batch_size=3, pack=False)
  assert data_lib.eval_sources(data) == ['numbers_a', 'numbers_b']
  for source, base in (('numbers_a', 100), ('numbers_b', 300)):
    batches = list(data_lib.eval_batches(data, source))
    assert [batch['decoder_target_tokens'].shape for batch in batches] == [(3, 24)] * 3
    first = np.concatenate([batch['decoder_target_tokens'][:, 0] for batch in batches])
    np.testing.assert_array_equal(first, [base + n for n in range(7)] + [0, 0])
    for value in batches[-1].values():
      assert value.dtype == np.int32 and (value[1:] == 0).all()
    assert_same(list(data_lib.eval_batches(data, source)), batches)
    limited = dataclasses.replace(data, eval_batches=2)
    assert_same(list(data_lib.eval_batches(limited, source)), batches[:2])


def test_another_mixture_can_be_evaluated():
  assert data_lib.eval_sources(settings(eval_mixture_or_task='numbers_b')) == ['numbers_b']
  with pytest.raises(ConfigError, match='eval_mixture_or_task'):
    data_lib.eval_sources(settings(eval_mixture_or_task='numbers_c'))
  with pytest.raises(ConfigError, match=r"no split 'validation'; it has 'train'; DataConfig\.eval_split = '' trains"):
    data_lib.eval_sources(settings(eval_mixture_or_task='numbers_no_validation'))


def test_without_an_evaluation_split_nothing_is_evaluated():
  data = settings(mixture_or_task='numbers_no_validation', eval_split='')
  assert data_lib.eval_sources(data) == []
  next(data_lib.TrainStreams(data))


# Devices.


@pytest.mark.parametrize('data_axis, expert, model', [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)])
@pytest.mark.parametrize('order', [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_global_arrays_hold_each_streams_rows_in_its_block(data_axis, expert, model, order):
  mesh = make_mesh(MeshConfig(data=data_axis, expert=expert, model=model))
  whole = {'decoder_target_tokens': np.arange(3 * 16 * 5, dtype=np.int32).reshape(3, 16, 5)}
  local = {key: np.concatenate([value[:, 4 * s:4 * s + 4] for s in order], axis=1) for key, value in whole.items()}
  for array in data_lib.to_global(local, mesh, stream_ids=order, num_streams=4).values():
    np.testing.assert_array_equal(array, whole['decoder_target_tokens'])
    assert array.sharding == batch_sharding(mesh, microbatched=True)
    assert array.addressable_shards[0].data.shape == (3, 16 // (data_axis * expert), 5)
  rows = {key: value[0] for key, value in whole.items()}
  for array in data_lib.to_global(rows, mesh, microbatched=False).values():
    np.testing.assert_array_equal(array, rows['decoder_target_tokens'])
    assert array.sharding == batch_sharding(mesh)


def test_one_process_reads_all_streams():
  mesh = make_mesh(MeshConfig(expert=2, model=2), jax.devices()[:8])
  assert data_lib.local_stream_ids(mesh, settings()) == [0, 1, 2, 3]


@pytest.mark.parametrize('ranges, rows, streams, expected', [
    ([(0, 4)], 8, 4, [0, 1]), ([(4, 8)], 8, 4, [2, 3]), ([(0, 1)], 8, 4, [0]), ([(3, 4), (4, 5)], 8, 4, [1, 2]),
    ([(2, 4)], 12, 4, [0, 1]), ([(0, 12)], 12, 1, [0]), ([(6, 8), (0, 2)], 8, 4, [0, 3])])
def test_streams_of_the_rows_of_a_process(ranges, rows, streams, expected):
  assert data_lib._streams_of_rows(ranges, rows, streams) == expected


# Mistakes.


@pytest.mark.parametrize('changes, message', [
    (dict(mixture_or_task='numbers_mux'), "'numbers_mux' is not a registered mixture or task; did you mean numbers_m"),
    (dict(mixture_or_task='mix_full_lm'), 'data of mix_full_lm cannot be read: .* lacks redpajama_arxiv:1.0.0, .*'
     'the_stack_dedup:1.0.0; prepare them .*docs/data.md'),
    (dict(mixture_or_task='mix_ul3'), 'did you mean mix_ul2'),
    (dict(mixture_or_task='qqqq'), 'known: .*demo_full_lm'),
    (dict(mixture_or_task=''), 'mixture_or_task is not set'),
    (dict(task_feature_lengths={}), "has the features 'targets', but .* lengths for nothing"),
    (dict(task_feature_lengths={'inputs': 4, 'targets': 4}), "lengths for 'inputs', 'targets'"),
    (dict(mixture_or_task='demo_ul2'), "has the features 'inputs', 'targets', but"),
    (dict(vocabulary='/no/such.model'), 'no such file'),
    (dict(vocabulary=__file__), 'not a sentencepiece model'),
    (dict(train_split='testing'), "no split 'testing'"),
    (dict(module_imports=('no_such_module_of_tasks',)), "module_imports: there is no module 'no_such_module_of_tasks'"),
    (dict(mixture_or_task='blank_text'), 'has no text for stream 0 of 4'),
    (dict(mixture_or_task='no_text'), 'has no text'),
    (dict(mixture_or_task='absent_tfds'), 'data of absent_tfds cannot be read: .*no_such_dataset_anywhere'),
    (dict(mixture_or_task='absent_tfds_splits'), 'data of absent_tfds_splits cannot be read: .*tfds_data_dir'),
    (dict(mixture_or_task='broken_file'), 'broken_file'),
    (dict(mixture_or_task='numbers_unshuffled'), r'numbers_unshuffled.*set DataConfig\.shuffle = False'),
    (dict(mixture_or_task='foreign_bytes'), "task foreign_bytes, feature 'targets' has a vocabulary of its own"),
    (dict(mixture_or_task='foreign_sentinels'), 'has a vocabulary of its own'),
    (dict(mixture_or_task='ids_out_of_range'), 'ids go up to 99999, but the vocabulary .* has only 8492'),
    (dict(mixture_or_task='demo_prose_ul2', task_feature_lengths={'inputs': 32, 'targets': 31}),
     r"\['targets'\] = 31 is too short: .* inputs of 32 needs targets of 32"),
    (dict(mixture_or_task='demo_prose_ul2', task_feature_lengths={'inputs': 1, 'targets': 32}),
     r"task_feature_lengths\['inputs'\] is too short"),
    (dict(mixture_or_task='demo_prefix_lm', task_feature_lengths={'inputs': 1, 'targets': 32}),
     r"task_feature_lengths\['inputs'\] is too short"),
    (dict(seed=-1), r'DataConfig\.seed'),
    (dict(mixture_or_task='numbers_plain', num_streams=64, batch_size=64), 'for stream 40 of 64'),
])
def test_mistakes_are_one_clear_line(changes, message):
  with pytest.raises(ConfigError, match=message) as error:
    data_lib.TrainStreams(settings(**changes))
  assert '\n' not in str(error.value)


def test_streams_that_do_not_exist_or_divide_are_refused():
  with pytest.raises(ConfigError, match='streams'):
    data_lib.TrainStreams(settings(), stream_ids=[4])
  with pytest.raises(ConfigError, match='multiple of 3 microbatches'):
    data_lib.TrainStreams(settings(), num_microbatches=3)


@pytest.mark.slow
def test_importing_data_is_quick_and_tensorflow_is_quiet():
  program = textwrap.dedent('''
      import sys
      import openmoe_jax.data as data
      assert 'tensorflow' not in sys.modules and 'seqio' not in sys.modules
      tf = data.import_tensorflow()
      assert tf.config.get_visible_devices('GPU') == [] and tf.config.get_visible_devices('TPU') == []
      data.import_seqio()
  ''')
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stderr == '' and done.stdout == ''
