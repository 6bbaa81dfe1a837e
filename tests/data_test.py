"""Streams, saved positions, evaluation batches, global arrays, and mistakes in the data settings."""

import dataclasses
import random
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from openmoe_jax import data as data_lib
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


@seqio.map_over_dataset(num_seeds=1)
def add_noise(example, seed):
  """Makes the last token random, to see that random choices continue after a restart."""
  noise = tf.random.stateless_uniform([1], seed, 1000, 2000, tf.int32)
  return {'targets': tf.concat([example['targets'], noise], 0)}


def _tokens_of_text(dataset, output_features):
  dataset = dataset.map(lambda e: {'targets': output_features['targets'].vocabulary.encode_tf(e['text'])})
  return dataset.filter(lambda e: tf.size(e['targets']) > 0)


def _register():
  numbers = {'targets': seqio.Feature(seqio.PassThroughVocabulary(5000), add_eos=False)}
  from openmoe_jax import vocabulary
  text = {'targets': seqio.Feature(vocabulary.shared())}
  for name, source, preprocessors in [
      ('numbers_a', NumberedSource(100), [add_noise]), ('numbers_b', NumberedSource(300), [add_noise]),
      ('numbers_plain', NumberedSource(100), []), ('numbers_one_file', NumberedSource(100, shardable=False), []),
      ('numbers_no_validation', NumberedSource(100, {'train': 9}), [])]:
    seqio.TaskRegistry.add(name, source, numbers, preprocessors, shuffle_buffer_size=7)
  seqio.MixtureRegistry.add('numbers_mix', [('numbers_a', 3), ('numbers_b', 1)])
  seqio.TaskRegistry.add('blank_text', TextSource(['', '  ', '\n', ' ', '', '']), text, [_tokens_of_text])
  seqio.TaskRegistry.add('no_text', TextSource([]), text, [_tokens_of_text])
  seqio.TaskRegistry.add('absent_tfds', seqio.TfdsDataSource('no_such_dataset_anywhere:1.0.0', splits=('train',)),
                         text, [_tokens_of_text])
  seqio.TaskRegistry.add('broken_file', seqio.TextLineDataSource({'train': '/no/such/file-*'}), text,
                         [lambda ds: ds.map(lambda line: {'text': line}), _tokens_of_text])


_register()


def settings(**changes):
  values = dict(mixture_or_task='numbers_mix', task_feature_lengths={'targets': 24}, batch_size=8, num_streams=4,
                seed=5)
  return DataConfig(**{**values, **changes})


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
    dict(num_streams=4), dict(num_streams=1, pack=False), dict(num_streams=2, shuffle=False),
    dict(num_streams=2, mixture_or_task='numbers_one_file'),
    dict(num_streams=2, mixture_or_task='demo_full_lm'),
    dict(num_streams=1, mixture_or_task='demo_ul2', task_feature_lengths={'inputs': 32, 'targets': 32}),
    dict(num_streams=1, mixture_or_task='demo_prefix_lm', task_feature_lengths={'inputs': 32, 'targets': 32})])
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
  from openmoe_jax import vocabulary
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
  with pytest.raises(ConfigError, match='not of the same step'):
    streams.restore({**streams.state(), 0: beginning[0]})


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
  with pytest.raises(ConfigError, match="no split 'validation'"):
    data_lib.eval_sources(settings(eval_mixture_or_task='numbers_no_validation'))


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
    (dict(mixture_or_task='mix_ul2'), "mixture_or_task = 'mix_ul2' needs corpora"),
    (dict(mixture_or_task='qqqq'), 'known: .*demo_full_lm'),
    (dict(mixture_or_task=''), 'mixture_or_task is not set'),
    (dict(task_feature_lengths={}), "has the features 'targets', but .* lengths for nothing"),
    (dict(task_feature_lengths={'inputs': 4, 'targets': 4}), "lengths for 'inputs', 'targets'"),
    (dict(mixture_or_task='demo_ul2'), "has the features 'inputs', 'targets', but"),
    (dict(vocabulary='/no/such.model'), 'no such file'),
    (dict(vocabulary=__file__), 'not a sentencepiece model'),
    (dict(train_split='testing'), "no split 'testing'"),
    (dict(module_imports=('no_such_module_of_tasks',)), "no module 'no_such_module_of_tasks'"),
    (dict(mixture_or_task='blank_text'), 'has no text for stream 0 of 4'),
    (dict(mixture_or_task='no_text'), 'has no text'),
    (dict(mixture_or_task='absent_tfds'), 'data of absent_tfds cannot be read .*no_such_dataset_anywhere'),
    (dict(mixture_or_task='broken_file'), 'broken_file'),
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
