"""Best-fit packing: every example whole and once, no row too long, nobody waits for ever, fuller rows than in order."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from openmoe_jax import data as data_lib
from openmoe_jax import feature_converters, packing
from openmoe_jax.config import ConfigError, DataConfig
from openmoe_jax.tensorflow_setup import import_seqio, import_tensorflow

tf = import_tensorflow()
seqio = import_seqio()

LENGTHS = {'inputs': 9, 'targets': 12}


class Packer:
  """The state of best-fit packing, fed by hand: the same function that a data set is scanned with."""

  def __init__(self, lengths, open_rows):
    self.lengths, self.open_rows, self.rows = lengths, open_rows, []
    self._step = packing._best_fit_step(tuple(sorted(lengths.items())), open_rows)
    empty = {name: tf.zeros([0], tf.int32) for name in lengths}
    zeros = tf.zeros([open_rows], tf.int32)
    self.state = dict(tokens=empty, sizes=empty, filled={name: zeros for name in lengths}, examples=zeros, waited=zeros)

  def add(self, example, at_end=False):
    vectors = {name: tf.constant(example.get(name, []), tf.int32) for name in self.lengths}
    self.state, rows = self._step(self.state, (vectors, tf.constant(at_end)))
    self.rows += _rows(rows)

  def finish(self):
    for _ in range(self.open_rows):
      self.add({}, at_end=True)
    return self.rows


def _rows(arrays):
  arrays = {key: value.numpy() for key, value in arrays.items()}
  return [{key: value[i] for key, value in arrays.items()} for i in range(len(arrays['targets']))]


def examples_of(sizes, lengths):
  """Examples whose tokens all are their number, from 1."""
  return [{name: [number] * min(size, lengths[name]) for name, size in zip(lengths, own)}
          for number, own in enumerate(sizes, 1)]


def check_rows(rows, examples, lengths):
  """Every example once, side by side in segments counted from 1, positions from 0, padding behind."""
  found = []
  for row in rows:
    columns = []
    for name, length in lengths.items():
      tokens, segments, positions = (row[name + suffix] for suffix in ('', '_segment_ids', '_positions'))
      assert len(tokens) == len(segments) == len(positions) == length
      used = int((tokens != 0).sum())
      assert (tokens[used:] == 0).all() and (segments[used:] == 0).all() and (positions[used:] == 0).all()
      own = {}
      for token, segment, position in zip(tokens[:used].tolist(), segments[:used].tolist(), positions[:used].tolist()):
        own.setdefault(segment, []).append(token)
        assert position == len(own[segment]) - 1
      assert list(own) == sorted(own)
      columns.append(own)
    count = max(max(own, default=0) for own in columns)
    assert count > 0, 'no row is empty'
    for segment in range(1, count + 1):
      found.append({name: own.get(segment, []) for name, own in zip(lengths, columns)})
  wanted = [example for example in examples if any(example.values())]
  key = lambda example: max(map(max, filter(None, example.values())))
  assert sorted(found, key=key) == wanted


sizes_of_examples = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 14)), max_size=50)


@hypothesis.settings(max_examples=40)
@hypothesis.given(sizes=sizes_of_examples, open_rows=st.sampled_from([2, 3, 8]))
def test_every_example_is_in_one_row(sizes, open_rows):
  packer, examples = Packer(LENGTHS, open_rows), examples_of(sizes, LENGTHS)
  for example in examples:
    packer.add(example)
  check_rows(packer.finish(), examples, LENGTHS)


@hypothesis.settings(max_examples=40)
@hypothesis.given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=150), open_rows=st.sampled_from([2, 5]),
                  first=st.integers(1, 20))
def test_nobody_waits_for_long(sizes, open_rows, first):
  lengths = {'targets': 20}
  packer, examples = Packer(lengths, open_rows), examples_of([(size,) for size in [first] + sizes], lengths)
  given_before = []
  for example in examples:
    given_before.append(len(packer.rows))
    packer.add(example)
  row_of = {token: i for i, row in enumerate(packer.finish()) for token in set(row['targets'].tolist())}
  assert all(row_of[number] - before <= 34 * open_rows for number, before in enumerate(given_before, 1))


def test_a_row_that_nothing_fits_into_is_given_in_the_end():
  # The first example's row is never the fullest, and 15 more never fit into it.
  packer = Packer({'targets': 20}, 2)
  packer.add({'targets': [7] * 10})
  for _ in range(80):
    packer.add({'targets': [8] * 15})
  places = [i for i, row in enumerate(packer.rows) if 7 in row['targets']]
  assert places == [64]


def test_examples_go_where_they_fit_best():
  packer = Packer({'targets': 10}, 3)
  for number, size in enumerate([6, 7, 5, 3, 5, 2, 9], 1):
    packer.add({'targets': [number] * size})
  # 3 fills up the row of 7 and 5 that of 5, which are given at once; 2 goes to the row of 6; 9 begins a row.
  assert [row['targets'].tolist() for row in packer.rows] == [[2] * 7 + [4] * 3, [3] * 5 + [5] * 5]
  assert [row['targets'].tolist() for row in packer.finish()[2:]] == [[7] * 9 + [0], [1] * 6 + [6] * 2 + [0] * 2]


def dataset_of(examples):
  columns = {name: tf.ragged.constant([example[name] for example in examples], tf.int32) for name in examples[0]}
  return tf.data.Dataset.range(len(examples)).map(lambda i: {name: column[i] for name, column in columns.items()})


@pytest.mark.parametrize('open_rows', [2, 6])
def test_a_data_set_gives_the_same_rows(open_rows):
  random = np.random.RandomState(open_rows)
  examples = examples_of(random.randint(1, 10, (60, 2)), LENGTHS)
  packer = Packer(LENGTHS, open_rows)
  for example in examples:
    packer.add(example)
  got = list(packing.pack(dataset_of(examples), LENGTHS, open_rows).as_numpy_iterator())
  for row, other in zip(got, packer.finish(), strict=True):
    for key in other:
      np.testing.assert_array_equal(row[key], other[key], err_msg=key)


def test_rows_are_fuller_than_in_order():
  random = np.random.RandomState(0)
  lengths = {'targets': 100}
  examples = [{'targets': [1] * size} for size in np.minimum(random.geometric(.03, 2000), 100)]
  tokens = sum(len(example['targets']) for example in examples)
  fill = {open_rows: tokens / 100 / sum(1 for _ in packing.pack(dataset_of(examples), lengths, open_rows))
          for open_rows in (1, 4, 16)}
  assert fill[1] < .85 and fill[4] > .95 and fill[16] > .98


def test_conversion_marks_inputs_and_targets_of_every_example():
  examples = [{'inputs': [5] * a, 'targets': [6] * b} for a, b in [(3, 4), (2, 2), (1, 5), (4, 4), (2, 1)]]
  convert = feature_converters.decoder_converter({'inputs': 5, 'targets': 7}, True, open_rows=3)
  rows = list(convert(dataset_of(examples), {'inputs': 5, 'targets': 7}).as_numpy_iterator())
  assert sum(int(row['decoder_segment_ids'].max()) for row in rows) == 5
  for row in rows:
    tokens, segments = row['decoder_target_tokens'], row['decoder_segment_ids']
    np.testing.assert_array_equal(row['decoder_loss_weights'], tokens == 6)
    np.testing.assert_array_equal(row['decoder_input_tokens'] == 0, (row['decoder_positions'] == 0) | (tokens == 0) & (
        segments == 0))
    # The inputs and the first place of the targets.
    for segment in range(1, segments.max() + 1):
      own = segments == segment
      assert row['decoder_causal_attention'][own].sum() == (tokens[own] == 5).sum() + 1


def settings(**changes):
  values = dict(mixture_or_task='demo_prose_fim', task_feature_lengths={'targets': 128}, batch_size=6, num_streams=2,
                seed=4, open_rows=5)
  return DataConfig(**{**values, **changes})


@pytest.mark.slow
def test_streams_continue_exactly_and_only_with_the_same_packing():
  streams = data_lib.TrainStreams(settings())
  batches = [next(streams) for _ in range(3)]
  state = streams.state()
  batches += [next(streams) for _ in range(6)]
  again = data_lib.TrainStreams(settings())
  again.restore(state)
  for expected in batches[3:]:
    for key, value in next(again).items():
      np.testing.assert_array_equal(value, expected[key], err_msg=key)
  with pytest.raises(ConfigError, match='open_rows: 5 then, 4 now'):
    data_lib.TrainStreams(settings(open_rows=4)).restore(state)
  in_order = data_lib.TrainStreams(settings(open_rows=1))
  fill = [np.mean([(next(s)['decoder_target_tokens'] != 0).mean() for _ in range(20)]) for s in (in_order, again)]
  assert fill[1] > .95 > .93 > fill[0]


def test_open_rows_must_be_positive():
  with pytest.raises(ConfigError, match='DataConfig.open_rows'):
    settings(open_rows=0)
