"""Task features to model features, by seqio's converters but for how examples are packed into rows (`packing`)."""

import dataclasses
from typing import Any, Mapping

from openmoe_jax import packing
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


class _StreamedPacking:
  """Mixed into a seqio converter: the same rows, without waiting for a batch of examples.

  These converters need no AutoGraph, whose rewriting of Python code would be most of the time to set up a stream.
  They also cut each feature to its length, so that tasks need not, unless the features share the row.
  """
  shared_window = False
  open_rows = 1

  @tf.autograph.experimental.do_not_convert
  def __call__(self, ds, task_feature_lengths):
    def trim(example):
      if self.shared_window:
        return {name: example[name] for name in task_feature_lengths}
      return {name: example[name][:length] for name, length in task_feature_lengths.items()}

    return super().__call__(ds.map(trim), task_feature_lengths)

  def _pack_or_pad(self, ds, packed_lengths):
    if not self.pack:
      return super()._pack_or_pad(ds, packed_lengths)
    return packing.pack(ds, packed_lengths, self.open_rows)


class _LM(_StreamedPacking, seqio.LMFeatureConverter):
  pass


class _PrefixLM(_StreamedPacking, seqio.PrefixLMFeatureConverter):
  pass


def decoder_converter(lengths: Mapping[str, int], packed: bool, loss_on_targets_only: bool = True,
                      shared_window: bool = False, open_rows: int = 1) -> Any:
  """The converter of a decoder-only model; what `seqio.DecoderFeatureConverter` does for features of these names.

  With 'inputs' among `lengths` a row is inputs followed by targets (prefix LM), with loss weights on the targets only
  unless told otherwise; with only 'targets' it is a language model's row. A row has sum(lengths) tokens. With a
  `shared_window` an example is cut at the row's end, not each feature at its own length. `open_rows`: see `packing`.
  """
  if 'inputs' in lengths:
    converter = _PrefixLM(pack=packed, loss_on_targets_only=loss_on_targets_only, apply_length_check=False)
  else:
    converter = _LM(pack=packed, apply_length_check=False)
  converter.shared_window, converter.open_rows = shared_window, open_rows
  return converter


def converter_for(provider: Any, data: DataConfig, lengths: Mapping[str, int]) -> Any:
  """The converter for a task or mixture, by the settings, with `lengths` of its features."""
  return decoder_converter(lengths, data.pack, data.loss_on_targets_only, share_window(provider), data.open_rows)
