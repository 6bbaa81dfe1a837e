"""Several examples in a row: in order, as the original did, or where they fit best among some unfinished rows.

seqio's own packing waits for as many examples as a row has tokens (2,048 examples, four million tokens, for one data
stream of the 8B recipe) before it gives the first row, and a saved data position would hold all of them. Here rows are
given as soon as they are finished, and the unfinished ones are all of the state.
"""

import functools
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from openmoe_jax.tensorflow_setup import import_tensorflow

tf = import_tensorflow()

# Rows given, for each open row, before one that was begun before them is given whatever its fill.
_PATIENCE = 32


def pack(dataset: Any, lengths: Mapping[str, int], open_rows: int = 1) -> Any:
  """Examples side by side in rows.

  Args:
    dataset: of dictionaries of int32 vectors; an example counts up to its number of non-zero tokens.
    lengths: row length of each feature; other features are dropped.
    open_rows: 1 packs in order (`greedy`), more take the best of so many unfinished rows (`best_fit`).

  Returns:
    A data set of rows: each feature padded to its length, with `<feature>_segment_ids` (from 1; padding 0) and
    `<feature>_positions` (restarting in every segment).
  """
  return greedy(dataset, lengths) if open_rows == 1 else best_fit(dataset, lengths, open_rows)


def _features(example: Mapping[str, Any], names: Sequence[str]) -> Dict[str, Any]:
  return {name: tf.cast(example[name], tf.int32) for name in names}


def _counted(tokens: Any, length: int) -> Any:
  """The part of a feature that is packed: what fits into a row, up to the number of non-zero tokens."""
  tokens = tokens[:length]
  return tokens[:tf.math.count_nonzero(tokens, dtype=tf.int32)]


def greedy(dataset: Any, lengths: Mapping[str, int]) -> Any:
  """Packing in order: the rows of `seqio.utils.trim_and_pack_dataset`.

  As in seqio a row is also ended after every max(lengths) examples, and after the last one.
  """
  names = sorted(lengths)
  empty = {name: tf.zeros([0], tf.int32) for name in names}
  unfinished = dict(tokens=empty, segments=empty, positions=empty, examples=tf.constant(0))
  step = _greedy_step(tuple((name, lengths[name]) for name in names))
  dataset = dataset.map(lambda example: (_features(example, names), False))
  dataset = dataset.concatenate(tf.data.Dataset.from_tensors((empty, True)))
  return dataset.scan(unfinished, step).unbatch()


@functools.lru_cache(maxsize=None)
def _greedy_step(name_lengths: Tuple[Tuple[str, int], ...]) -> Any:
  """Adds one example to the unfinished row: (state, (example, at_end)) -> (state, rows that are finished now).

  One function for all streams, so that it is traced once.
  """
  lengths = dict(name_lengths)
  examples_per_flush = max(lengths.values())
  suffixes = {'tokens': '', 'segments': '_segment_ids', 'positions': '_positions'}
  vectors = {name: tf.TensorSpec([None], tf.int32) for name in lengths}
  state_spec = dict({part: vectors for part in suffixes}, examples=tf.TensorSpec([], tf.int32))

  def first(state, wanted):
    """The row of `state`, or an empty one if not `wanted`."""
    return {part: {name: state[part][name][:tf.where(wanted, tf.size(state[part][name]), 0)] for name in lengths}
            for part in suffixes}

  def finished(state, wanted):
    """The row of `state` padded to its lengths, [1, length] each, or [0, length] if not `wanted`."""
    rows = {}
    for name, length in lengths.items():
      for part, suffix in suffixes.items():
        row = tf.pad(state[part][name], [[0, length - tf.size(state[part][name])]])
        rows[name + suffix] = tf.ensure_shape(row, [length])[tf.newaxis][:tf.cast(wanted, tf.int32)]
    return rows

  @tf.function(autograph=False, input_signature=[state_spec, (vectors, tf.TensorSpec([], tf.bool))])
  def step(state, item):
    example, at_end = item
    added = {}
    for name, length in lengths.items():
      added[name] = _counted(example[name], length)
    fits = tf.reduce_all([tf.size(state['tokens'][name]) + tf.size(added[name]) <= lengths[name] for name in lengths])
    kept = first(state, fits)
    grown = dict(tokens={}, segments={}, positions={})
    for name, tokens in added.items():
      size = tf.size(tokens)
      segment = tf.reduce_max(tf.concat([[0], kept['segments'][name]], 0)) + 1
      grown['tokens'][name] = tf.concat([kept['tokens'][name], tokens], 0)
      grown['segments'][name] = tf.concat([kept['segments'][name], tf.fill([size], segment)], 0)
      grown['positions'][name] = tf.concat([kept['positions'][name], tf.range(size)], 0)
    examples = state['examples'] + 1
    # The end counts as an example; after a flush there is nothing left for it to write.
    flush = (examples == examples_per_flush) | (at_end & (examples > 1))
    before, after = finished(state, ~fits), finished(grown, flush)
    new_state = dict(first(grown, ~flush), examples=tf.where(flush, 0, examples))
    return new_state, {key: tf.concat([before[key], after[key]], 0) for key in before}

  return step


def best_fit(dataset: Any, lengths: Mapping[str, int], open_rows: int) -> Any:
  """Packing into the fullest of `open_rows` unfinished rows that has room.

  A row that is full is given at once. Where none has room, the fullest is given, and the example begins another one. A
  row after whose beginning 32 * `open_rows` others were given is given next, so that no example waits for more than
  34 * `open_rows` rows. At the end the rest come, the fullest first.
  """
  names = sorted(lengths)
  empty = {name: tf.zeros([0], tf.int32) for name in names}
  unfinished = dict(tokens=empty, sizes=empty, filled={name: tf.zeros([open_rows], tf.int32) for name in names},
                    examples=tf.zeros([open_rows], tf.int32), waited=tf.zeros([open_rows], tf.int32))
  step = _best_fit_step(tuple((name, lengths[name]) for name in names), open_rows)
  dataset = dataset.map(lambda example: (_features(example, names), False))
  dataset = dataset.concatenate(tf.data.Dataset.from_tensors((empty, True)).repeat(open_rows))
  return dataset.scan(unfinished, step).unbatch()


@functools.lru_cache(maxsize=None)
def _best_fit_step(name_lengths: Tuple[Tuple[str, int], ...], open_rows: int) -> Any:
  """Adds one example: (unfinished rows, (example, whether to give a row instead)) -> (the same, finished rows).

  The state holds, one row after the other, the tokens of each feature and the sizes of its examples; how many of both
  a row has; and how many other rows were given since a row was begun. One function for all streams, so that it is
  traced once.
  """
  lengths = dict(name_lengths)
  vectors = {name: tf.TensorSpec([None], tf.int32) for name in lengths}
  counter = tf.TensorSpec([open_rows], tf.int32)
  counters = {name: counter for name in lengths}
  state_spec = dict(tokens=vectors, sizes=vectors, filled=counters, examples=counter, waited=counter)
  numbers = tf.range(open_rows)

  def bounds(counts, row):
    """Where a row begins and ends among things of which each row has `counts`."""
    end = tf.reduce_sum(counts[:row + 1])
    return end - counts[row], end

  def take_out(state, row, wanted):
    """(the state without this row, the row as [1, length] arrays); nothing is taken, [0, length], if not `wanted`."""
    keep = tf.where((numbers == row) & wanted, 0, 1)
    first, last = bounds(state['examples'], row)
    left = dict(tokens={}, sizes={}, filled={}, examples=state['examples'] * keep,
                waited=(state['waited'] + tf.cast(wanted, tf.int32)) * keep)
    taken = {}
    for name, length in lengths.items():
      begin, end = bounds(state['filled'][name], row)
      tokens, sizes = state['tokens'][name][begin:end], state['sizes'][name][first:last]
      starts = tf.cumsum(sizes, exclusive=True)
      parts = {'': tokens, '_segment_ids': tf.repeat(tf.range(1, last - first + 1), sizes),
               '_positions': tf.range(end - begin) - tf.repeat(starts, sizes)}
      for suffix, part in parts.items():
        padded = tf.ensure_shape(tf.pad(part, [[0, length - (end - begin)]]), [length])
        taken[name + suffix] = padded[tf.newaxis][:tf.cast(wanted, tf.int32)]
      left['tokens'][name] = without(state['tokens'][name], begin, end, wanted)
      left['sizes'][name] = without(state['sizes'][name], first, last, wanted)
      left['filled'][name] = state['filled'][name] * keep
    return left, taken

  def without(values, begin, end, wanted):
    return tf.concat([values[:begin], values[tf.where(wanted, end, begin):]], 0)

  def put_in(state, row, added, count):
    """The state with an example at the end of a row; `count` is 0 if there is none."""
    here = tf.cast(numbers == row, tf.int32)
    _, last = bounds(state['examples'], row)
    waited = tf.where((state['examples'] == 0) & (here > 0), 0, state['waited'])
    grown = dict(tokens={}, sizes={}, filled={}, examples=state['examples'] + count * here, waited=waited)
    for name, tokens in added.items():
      _, end = bounds(state['filled'][name], row)
      size = tf.size(tokens)
      old, old_sizes = state['tokens'][name], state['sizes'][name]
      grown['tokens'][name] = tf.concat([old[:end], tokens, old[end:]], 0)
      grown['sizes'][name] = tf.concat([old_sizes[:last], tf.fill([count], size), old_sizes[last:]], 0)
      grown['filled'][name] = state['filled'][name] + size * here
    return grown

  @tf.function(autograph=False, input_signature=[state_spec, (vectors, tf.TensorSpec([], tf.bool))])
  def step(state, item):
    example, at_end = item
    added = {name: _counted(example[name], length) for name, length in lengths.items()}
    count = tf.cast(tf.reduce_any([tf.size(tokens) > 0 for tokens in added.values()]), tf.int32)
    free: List[Any] = [length - state['filled'][name] for name, length in lengths.items()]
    room = tf.reduce_all([space >= tf.size(added[name]) for name, space in zip(lengths, free)], axis=0)
    spare = tf.add_n(free)
    waited = tf.where(state['examples'] > 0, state['waited'], 0)
    late = tf.reduce_max(waited) >= _PATIENCE * open_rows
    next_given = tf.where(late, tf.argmax(waited, output_type=tf.int32), tf.argmin(spare, output_type=tf.int32))
    best = tf.argmin(tf.where(room, spare, tf.int32.max), output_type=tf.int32)
    give = tf.where(at_end, state['examples'][next_given] > 0, late | ~tf.reduce_any(room))
    row = tf.where(give, next_given, best)
    state, before = take_out(state, row, give)
    state = put_in(state, row, added, count)
    full = tf.reduce_any([state['filled'][name][row] == length for name, length in lengths.items()])
    state, after = take_out(state, row, full)
    return state, {key: tf.concat([before[key], after[key]], 0) for key in before}

  return step
