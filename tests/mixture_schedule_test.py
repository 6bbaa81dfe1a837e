"""Mixtures that change during training: rates at every step, identity over hosts and restarts, mistakes."""

import dataclasses

import numpy as np
import pytest

from openmoe_jax import data as data_lib
from openmoe_jax import gin_utils, mixtures
from openmoe_jax.config import ConfigError, DataConfig
from openmoe_jax.tensorflow_setup import import_seqio, import_tensorflow

tf = import_tensorflow()
seqio = import_seqio()


class CountingSource(seqio.DataSource):
  """Documents base + 0, 1, 2, ... as one number each, repeated `length` times; with inputs where wanted."""

  def __init__(self, base, length, inputs=False):
    super().__init__(splits=('train', 'validation'))
    self._base, self._length, self._inputs = base, length, inputs

  @property
  def supports_arbitrary_sharding(self):
    return True

  def list_shards(self, split):
    return [split]

  def get_dataset(self, split='train', shuffle=True, seed=None, shard_info=None):
    numbers = tf.data.Dataset.range(1000)
    if shard_info:
      numbers = numbers.shard(shard_info.num_shards, shard_info.index)

    def document(n):
      tokens = tf.fill([self._length], tf.cast(self._base + n, tf.int32))
      return {'inputs': tokens[:1], 'targets': tokens} if self._inputs else {'targets': tokens}

    return numbers.map(document)


def _register():
  feature = seqio.Feature(seqio.PassThroughVocabulary(8000), add_eos=False)
  for name, base, inputs in (('schedule_a', 1000, False), ('schedule_b', 2000, False), ('schedule_c', 3000, False),
                             ('schedule_pairs', 4000, True)):
    names = ('inputs', 'targets') if inputs else ('targets',)
    seqio.TaskRegistry.add(name, CountingSource(base, 4, inputs), dict.fromkeys(names, feature), [],
                           shuffle_buffer_size=1)
  seqio.MixtureRegistry.add('schedule_ab', [('schedule_a', 3), ('schedule_b', 1)])
  seqio.MixtureRegistry.add('schedule_bc', [('schedule_b', 1), ('schedule_c', 1)])


_register()

STAGES = ('0: schedule_ab', '5: 0.5 schedule_ab + 0.5 schedule_c', '12: schedule_bc')


def settings(**changes):
  values = dict(mixture_or_task='schedule_ab', mixture_schedule=STAGES, task_feature_lengths={'targets': 8},
                batch_size=80, num_streams=2, seed=3)
  return DataConfig(**{**values, **changes})


def take(streams, count):
  return [next(streams) for _ in range(count)]


def sources(batch):
  """Which thousand each row's tokens are of; a row is filled from one source."""
  rows = batch['decoder_target_tokens'].reshape(-1, batch['decoder_target_tokens'].shape[-1])
  thousands = rows // 1000
  assert ((thousands == thousands[:, :1]) | (rows == 0)).all()
  return thousands[:, 0]


def assert_same(batches, expected):
  for batch, other in zip(batches, expected, strict=True):
    for key in other:
      np.testing.assert_array_equal(batch[key], other[key])


def test_phases_have_the_rates_of_their_mixtures():
  tasks, phases = mixtures.schedule(settings())
  assert [task.name for task in tasks] == ['schedule_a', 'schedule_b', 'schedule_c']
  assert phases == [(0, {'schedule_a': .75, 'schedule_b': .25}),
                    (5, {'schedule_a': .375, 'schedule_b': .125, 'schedule_c': .5}),
                    (12, {'schedule_b': .5, 'schedule_c': .5})]


def test_rates_hold_from_their_batch_on():
  batches = take(data_lib.TrainStreams(settings()), 20)
  found = [sources(batch) for batch in batches]
  for first, last, rates in ((0, 5, (.75, .25, 0)), (5, 12, (.375, .125, .5)), (12, 20, (0, .5, .5))):
    rows = np.concatenate(found[first:last])
    for source, rate in zip((1, 2, 3), rates):
      share = (rows == source).mean()
      if rate == 0:
        assert share == 0
      # Four standard deviations of so many rows.
      assert abs(share - rate) <= 4 * (rate * (1 - rate) / len(rows))**.5
  assert 3 not in found[4] and 3 in found[5] and 1 in found[11] and 1 not in found[12]


@pytest.mark.slow
def test_one_percent_over_ten_thousand_rows():
  data = settings(batch_size=10_000, num_streams=1, mixture_schedule=('0: schedule_ab', '1: schedule_bc'))
  streams = data_lib.TrainStreams(data)
  for rates in ({1: .75, 2: .25}, {2: .5, 3: .5}):
    rows = sources(next(streams))
    for source, rate in rates.items():
      assert abs((rows == source).mean() - rate) < .01


def test_a_source_goes_on_where_it_was():
  """Over all phases each stream sees its documents of a task once, in their order, none left out."""
  batches = take(data_lib.TrainStreams(settings(shuffle=False, batch_size=16)), 20)
  rows = np.concatenate([batch['decoder_target_tokens'][0, :8] for batch in batches])
  for base in (1000, 2000, 3000):
    documents = rows[rows // 1000 == base // 1000][::4] - base
    np.testing.assert_array_equal(documents, np.arange(len(documents)) * 2)


@pytest.mark.slow
def test_hosts_and_restarts_change_nothing():
  data = settings()
  expected = take(data_lib.TrainStreams(data), 16)
  hosts = [data_lib.TrainStreams(data, stream_ids=[i]) for i in (0, 1)]
  parts = [take(host, 9) for host in hosts]
  joined = [{key: np.concatenate([a[key], b[key]], axis=1) for key in a} for a, b in zip(*parts)]
  assert_same(joined, expected[:9])
  state = {**hosts[0].state(), **hosts[1].state()}
  one = data_lib.TrainStreams(data)
  one.restore(state)
  assert_same(take(one, 7), expected[9:])


def test_a_position_knows_its_rates():
  streams = data_lib.TrainStreams(settings(num_streams=1))
  take(streams, 2)
  state = streams.state()
  for changed in (dict(mixture_schedule=STAGES[:2]), dict(mixture_schedule=('0: schedule_ab', *STAGES[2:])),
                  dict(mixture_schedule=())):
    with pytest.raises(ConfigError, match='rates: .* then, .* now'):
      data_lib.TrainStreams(settings(num_streams=1, **changed)).restore(state)


def test_prefix_and_plain_rows_can_follow_each_other():
  """Rows with and without inputs have the same length and the same arrays; targets alone are scored in the whole row."""
  data = settings(mixture_schedule=('0: schedule_pairs', '1: 0.5 schedule_pairs + 0.5 schedule_a', '2: schedule_a'),
                  task_feature_lengths={'inputs': 4, 'targets': 12}, mixture_or_task='schedule_pairs')
  first, mixed, last = take(data_lib.TrainStreams(data), 3)
  assert set(first) == set(mixed) == set(last)
  assert set(sources(first)) == {4} and set(sources(mixed)) == {1, 4} and set(sources(last)) == {1}
  assert (last['decoder_loss_weights'] == 1).all() and not last['decoder_causal_attention'].any()
  assert first['decoder_loss_weights'].mean() < 1 and first['decoder_causal_attention'].any()
  assert data_lib.eval_sources(data) == ['schedule_pairs']


@pytest.mark.parametrize('schedule, message', [
    (('1: schedule_a',), "'1: schedule_a' must begin at batch 0"),
    (('0: schedule_a', '9: schedule_b', '9: schedule_a'), 'must begin after batch 9 of the entry before'),
    (('0: schedule_x',), "mixture_schedule: '0: schedule_x' = 'schedule_x' is not a registered .* did you mean schedule_"),
    (('schedule_a',), 'must be like'), (('0: two words',), 'must be like'), (('0:',), 'must be like'),
    (('0: 0 schedule_a',), 'rates must be positive'), (('0: 1.2.3 schedule_a',), 'rates must be positive'),
    (('0: schedule_a + schedule_a',), 'twice'),
    (('0: demo_ul2',), "has the features 'inputs', 'targets', but")])
def test_mistakes_are_one_clear_line(schedule, message):
  with pytest.raises(ConfigError, match=message) as error:
    data_lib.TrainStreams(settings(mixture_schedule=schedule))
  assert '\n' not in str(error.value)


def test_gin_and_the_command_line_give_schedules(tmp_path):
  file = tmp_path / 'run.gin'
  file.write_text("include 'recipes/demo.gin'\nDataConfig.mixture_schedule = ('0: 0.9 demo_full_lm + 0.1 x', '10: y')\n")
  run = gin_utils.load_run_config([str(file)], ['MODEL_DIR=x'])
  assert run.data.mixture_schedule == ('0: 0.9 demo_full_lm + 0.1 x', '10: y')
  run = gin_utils.load_run_config([str(file)], ['MODEL_DIR=x', 'DataConfig.mixture_schedule=0: a + 2 b,10: c'])
  assert run.data.mixture_schedule == ('0: a + 2 b', '10: c')
  assert dataclasses.asdict(run.data)['mixture_schedule'] == ('0: a + 2 b', '10: c')
