"""Task features to model features, with packing that starts at once and keeps little in memory.

seqio's own packing waits for as many examples as a row has tokens (2,048 examples, four million tokens, for one data
stream of the 8B recipe) before it gives the first row, and a saved data position would hold all of them. The packing
here gives exactly the same rows from one unfinished row of state.
"""

import dataclasses
import functools
from typing import Any, Mapping, Tuple

from openmoe_jax.config import DataConfig
from openmoe_jax.tensorflow_setup import import_seqio, import_tensorflow

tf = import_tensorflow()
seqio = import_seqio()


@dataclasses.dataclass(frozen=True)
class WindowFeature(seqio.Feature):
  """A feature of a task whose features share the row: only all of them together have a length, that of the row."""


def share_window(provider: Any) -> bool:
  """Whether a task, or any task of a mixture, has `WindowFeature`s."""
  tasks = provider.tasks if isinstance(provider, seqio.Mixture) else [provider]
  return any(isinstance(feature, WindowFeature) for task in tasks for feature in task.output_features.values())


def pack(dataset: Any, lengths: Mapping[str, int]) -> Any:
  """Greedy packing in order: the rows of `seqio.utils.trim_and_pack_dataset`.

  Args:
    dataset: of dictionaries of int32 vectors; an example counts up to its number of non-zero tokens.
    lengths: row length of each feature; other features are dropped.

  Returns:
    A data set of rows: each feature padded to its length, with `<feature>_segment_ids` (from 1; padding 0) and
    `<feature>_positions` (restarting in every segment). As in seqio a row is also ended after every max(lengths)
    examples, and after the last one.
  """
  names = sorted(lengths)
  empty = {name: tf.zeros([0], tf.int32) for name in names}
  unfinished = dict(tokens=empty, segments=empty, positions=empty, examples=tf.constant(0))
  step = _packing_step(tuple((name, lengths[name]) for name in names))
  dataset = dataset.map(lambda example: ({name: tf.cast(example[name], tf.int32) for name in names}, False))
  dataset = dataset.concatenate(tf.data.Dataset.from_tensors((empty, True)))
  return dataset.scan(unfinished, step).unbatch()


@functools.lru_cache(maxsize=None)
def _packing_step(name_lengths: Tuple[Tuple[str, int], ...]) -> Any:
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
      tokens = example[name][:length]
      added[name] = tokens[:tf.math.count_nonzero(tokens, dtype=tf.int32)]
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


class _StreamedPacking:
  """Mixed into a seqio converter: the same rows, without waiting for a batch of examples.

  These converters need no AutoGraph, whose rewriting of Python code would be most of the time to set up a stream.
  They also cut each feature to its length, so that tasks need not, unless the features share the row.
  """
  shared_window = False

  @tf.autograph.experimental.do_not_convert
  def __call__(self, ds, task_feature_lengths):
    def trim(example):
      if self.shared_window:
        return {name: example[name] for name in task_feature_lengths}
      return {name: example[name][:length] for name, length in task_feature_lengths.items()}

    return super().__call__(ds.map(trim), task_feature_lengths)

  def _pack_or_pad(self, ds, packed_lengths):
    return pack(ds, packed_lengths) if self.pack else super()._pack_or_pad(ds, packed_lengths)


class _LM(_StreamedPacking, seqio.LMFeatureConverter):
  pass


class _PrefixLM(_StreamedPacking, seqio.PrefixLMFeatureConverter):
  pass


def decoder_converter(lengths: Mapping[str, int], packed: bool, loss_on_targets_only: bool = True,
                      shared_window: bool = False) -> Any:
  """The converter of a decoder-only model; what `seqio.DecoderFeatureConverter` does for features of these names.

  With 'inputs' among `lengths` a row is inputs followed by targets (prefix LM), with loss weights on the targets only
  unless told otherwise; with only 'targets' it is a language model's row. A row has sum(lengths) tokens. With a
  `shared_window` an example is cut at the row's end, not each feature at its own length.
  """
  if 'inputs' in lengths:
    converter = _PrefixLM(pack=packed, loss_on_targets_only=loss_on_targets_only, apply_length_check=False)
  else:
    converter = _LM(pack=packed, apply_length_check=False)
  converter.shared_window = shared_window
  return converter


def converter_for(provider: Any, data: DataConfig, lengths: Mapping[str, int]) -> Any:
  """The converter for a task or mixture, by the settings, with `lengths` of its features."""
  return decoder_converter(lengths, data.pack, data.loss_on_targets_only, share_window(provider))
