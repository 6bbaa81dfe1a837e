"""Training objectives as seqio preprocessors: UL2 with six denoisers, prefix LM, full LM (SPEC section 10).

Each takes a data set of {'text': string} and gives token examples of the lengths in `sequence_length`. Everything
random is drawn from the seeds that seqio hands to a task, so the same seed gives the same examples.
"""

import dataclasses
import functools
from typing import Any, Mapping, NamedTuple, Optional, Sequence

from openmoe_jax.config import require
from openmoe_jax.tensorflow_setup import import_seqio, import_tensorflow

tf = import_tensorflow()
seqio = import_seqio()

Dataset = Any  # tf.data.Dataset
Features = Mapping[str, Any]  # name -> seqio.Feature
Lengths = Optional[Mapping[str, int]]

CHUNK_TOKENS = 65536
CONCATENATED_DOCUMENTS = 128


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """One of UL2's objectives.

  Attributes:
    prompt: text in front of the inputs that tells the model which kind of objective it sees.
    rate: share of the examples.
    density: share of the tokens that is corrupted; 0 means prefix LM instead of span corruption.
    mean_span: mean length of a corrupted span, in tokens.
  """
  prompt: str
  rate: float
  density: float = 0.0
  mean_span: float = 0.0


UL2_DENOISERS = (
    Denoiser('[NLU] ', 0.1, density=0.15, mean_span=3),
    Denoiser('[NLU] ', 0.1, density=0.15, mean_span=8),
    Denoiser('[NLG] ', 0.1, density=0.5, mean_span=3),
    Denoiser('[NLG] ', 0.1, density=0.5, mean_span=8),
    Denoiser('[NLG] ', 0.1, density=0.5, mean_span=64),
    Denoiser('[S2S] ', 0.5),
)


# Documents to segments. Few functions do much each: setting up a stream costs about as much time as it has functions.


def random_chunk(tokens: Any, seed: Any, max_tokens: int = CHUNK_TOKENS) -> Any:
  """One stretch of the tokens, at a random multiple of `max_tokens`; all of them if there are no more."""
  num_chunks = (tf.size(tokens) + max_tokens - 1) // max_tokens
  start = max_tokens * tf.random.stateless_uniform([], seed, maxval=tf.maximum(num_chunks, 1), dtype=tf.int32)
  return tokens[start:start + max_tokens]


def tokenize(dataset: Dataset, output_features: Features, append_eos: bool = False) -> Dataset:
  """{'text'} -> {'targets': int32 ids}: a random chunk of each document, with EOS behind it if `append_eos`.

  Elements may also be (number, {'text'}), as `enumerate` gives them.
  """
  vocabulary = output_features['targets'].vocabulary
  ending = [vocabulary.eos_id] if append_eos else []

  @seqio.map_over_dataset(num_seeds=1)
  def tokens(example, seed):
    text = (example[1] if isinstance(example, tuple) else example)['text']
    chunk = random_chunk(vocabulary.encode_tf(text), seed)
    # An empty document stays empty.
    return {'targets': tf.concat([chunk, tf.constant(ending, tf.int32)[:tf.size(chunk)]], 0)}

  return tokens(dataset)


def drop_empty(dataset: Dataset) -> Dataset:
  """Drops documents without tokens."""
  return dataset.filter(lambda example: tf.size(example['targets']) > 0)


def concatenate_documents(dataset: Dataset, documents: int = CONCATENATED_DOCUMENTS) -> Dataset:
  """Joins every `documents` examples into one, with nothing between them; id 0 (padding) is removed."""

  def join(batch):
    tokens = batch['targets'].flat_values
    return {'targets': tf.boolean_mask(tokens, tokens != 0)}

  return dataset.ragged_batch(documents).map(join)


def split_into_segments(dataset: Dataset, length: int) -> Dataset:
  """Cuts each example into segments of `length` tokens; the last one of an example may be shorter."""

  require(length > 0, "DataConfig.task_feature_lengths['inputs'] is too short to hold a token beside the end of sequence")

  def segments(example):
    tokens = example['targets']
    count = (tf.size(tokens, out_type=tf.int64) + length - 1) // length
    return tf.data.Dataset.range(count).map(lambda i: {'targets': tokens[i * length:(i + 1) * length]})

  return dataset.flat_map(segments)


# Span corruption.


class SpanLengths(NamedTuple):
  """Tokens of one full span-corruption example: of raw text, of its inputs and of its targets, both with EOS."""
  segment: int
  inputs: int
  targets: int


def _lengths_of_segment(segment: int, density: float, mean_span: float) -> SpanLengths:
  noise = int(round(segment * density))
  spans = int(round(noise / mean_span))
  return SpanLengths(segment, segment - noise + spans + 1, noise + spans + 1)


def span_lengths(inputs_length: int, density: float, mean_span: float) -> SpanLengths:
  """The longest segment whose corrupted inputs, one sentinel a span and EOS included, fit into `inputs_length`.

  At density 0.5 targets may come out one longer than inputs; the segment is then one shorter (as in T5).
  """
  segment = inputs_length - 1
  while _lengths_of_segment(segment + 1, density, mean_span).inputs <= inputs_length:
    segment += 1
  lengths = _lengths_of_segment(segment, density, mean_span)
  if density == 0.5 and lengths.targets > inputs_length:
    lengths = SpanLengths(segment - 1, lengths.inputs, lengths.targets - 1)
  return lengths


def _random_partition(total: Any, parts: Any, seed: Any) -> Any:
  """`parts` positive integers that add up to `total`, all such ordered choices equally likely."""
  order = tf.argsort(tf.random.stateless_uniform([total - 1], seed))
  cuts = tf.sort(order[:parts - 1]) + 1
  return tf.concat([cuts, [total]], 0) - tf.concat([[0], cuts], 0)


def noise_mask(length: Any, density: float, mean_span: float, seeds: Sequence[Any]) -> Any:
  """bool [length]: which tokens are corrupted. Kept and corrupted spans alternate, a kept one comes first.

  `seeds` are two pairs of integers. A single token is never corrupted.
  """
  whole = tf.maximum(length, 2)
  noise = tf.cast(tf.round(tf.cast(whole, tf.float32) * density), tf.int32)
  noise = tf.clip_by_value(noise, 1, whole - 1)
  # At least one kept token goes with each span.
  spans = tf.clip_by_value(tf.cast(tf.round(tf.cast(noise, tf.float32) / mean_span), tf.int32), 1, whole - noise)
  kept_lengths = _random_partition(whole - noise, spans, seeds[0])
  noise_lengths = _random_partition(noise, spans, seeds[1])
  lengths = tf.reshape(tf.stack([kept_lengths, noise_lengths], axis=1), [-1])
  span = tf.repeat(tf.range(2 * spans), lengths)
  return (span % 2 == 1)[:length]


def replace_spans(tokens: Any, mask: Any, vocab_size: Any) -> Any:
  """Replaces each run of tokens under `mask` by one sentinel: the first by `vocab_size` - 1, then descending."""
  starts = mask & ~tf.concat([[False], mask[:-1]], 0)
  sentinels = vocab_size - tf.cumsum(tf.cast(starts, tokens.dtype))
  return tf.boolean_mask(tf.where(starts, sentinels, tokens), starts | ~mask)


def corrupt_spans(dataset: Dataset, sequence_length: Lengths, output_features: Features, density: float,
                  mean_span: float, prompt: str = '') -> Dataset:
  """Segments of text become inputs with spans replaced by sentinels, and targets with the spans (T5, UL2).

  The prompt comes in front of the inputs and is not counted into the length of the segments.
  """
  vocabulary = output_features['inputs'].vocabulary
  inputs_length, targets_length = _length(sequence_length, 'inputs'), _length(sequence_length, 'targets')
  lengths = span_lengths(inputs_length, density, mean_span)
  require(lengths.targets <= targets_length, f"DataConfig.task_feature_lengths['targets'] = {targets_length} is too "
          f'short: corrupting {density:.0%} of the text in spans of {mean_span} with inputs of {inputs_length} needs '
          f'targets of {lengths.targets}')
  spans = max(int(round(int(round(lengths.segment * density)) / mean_span)), 1)
  require(spans <= vocabulary.extra_ids, f"DataConfig.task_feature_lengths['inputs'] = {inputs_length}: corrupting "
          f'{density:.0%} of the text in spans of {mean_span} needs {spans} sentinels, but DataConfig.extra_ids = '
          f'{vocabulary.extra_ids}')
  prompt_ids, vocab_size = _prompt_ids(prompt, output_features), vocabulary.vocab_size

  @seqio.map_over_dataset(num_seeds=2)
  def corrupt(example, seeds):
    tokens = example['targets']
    inputs, targets = _corrupt(tokens, density, mean_span, vocab_size, tf.stack(seeds))
    return {'inputs': tf.concat([prompt_ids, inputs], 0), 'targets': targets}

  return corrupt(split_into_segments(dataset, lengths.segment))


@functools.lru_cache(maxsize=None)
def _compiled_corruption() -> Any:
  """`noise_mask` and `replace_spans` as one function that is traced once, not once a denoiser, task and stream."""

  @tf.function(autograph=False, input_signature=[
      tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.float32), tf.TensorSpec([], tf.float32),
      tf.TensorSpec([], tf.int32), tf.TensorSpec([2, 2], tf.int64)])
  def corrupt(tokens, density, mean_span, vocab_size, seeds):
    mask = noise_mask(tf.size(tokens), density, mean_span, (seeds[0], seeds[1]))
    return replace_spans(tokens, mask, vocab_size), replace_spans(tokens, ~mask, vocab_size)

  return corrupt


def _corrupt(tokens: Any, density: float, mean_span: float, vocab_size: int, seeds: Any) -> Any:
  return _compiled_corruption()(tokens, density, mean_span, vocab_size, seeds)


def split_prefix(dataset: Dataset, sequence_length: Lengths, output_features: Features, prompt: str = '') -> Dataset:
  """Segments that fit into inputs are cut in two: a prefix of 1 to n-1 tokens as inputs, the rest as targets.

  A segment of a single token has an empty prefix. The prompt comes in front of the inputs and is not counted into the
  length of the segments.
  """
  length = _length(sequence_length, 'inputs') - int(output_features['inputs'].add_eos)
  prompt_ids = _prompt_ids(prompt, output_features)

  @seqio.map_over_dataset(num_seeds=1)
  def cut(example, seed):
    tokens = example['targets']
    longest = tf.size(tokens) - 1
    prefix = tf.random.stateless_uniform([], seed, minval=tf.minimum(longest, 1), maxval=longest + 1, dtype=tf.int32)
    return {'inputs': tf.concat([prompt_ids, tokens[:prefix]], 0), 'targets': tokens[prefix:]}

  return cut(split_into_segments(dataset, length))


def _prompt_ids(prompt: str, output_features: Features) -> Any:
  return tf.constant(output_features['inputs'].vocabulary.encode(prompt), tf.int32)


def _length(sequence_length: Lengths, feature: str) -> int:
  require(sequence_length is not None and feature in sequence_length,
          f"this objective needs the length of {feature!r} in DataConfig.task_feature_lengths, which has "
          f'{dict(sequence_length or {})}')
  return sequence_length[feature]


# The objectives: preprocessors for seqio.Task, each on {'text'}. None of their functions needs AutoGraph, whose
# rewriting of Python code takes several times longer than everything else in setting up a stream.


@tf.autograph.experimental.do_not_convert
def full_lm(dataset: Dataset, sequence_length: Lengths, output_features: Features,
            documents: int = CONCATENATED_DOCUMENTS) -> Dataset:
  """Plain language modelling: documents with EOS behind each, joined, and cut to the length of the targets.

  The last token of every segment is overwritten by EOS.
  """
  length = _length(sequence_length, 'targets')
  dataset = drop_empty(tokenize(dataset, output_features, append_eos=True))
  dataset = split_into_segments(concatenate_documents(dataset, documents), length)
  return seqio.preprocessors.append_eos_after_trim(dataset, output_features, sequence_length)


@tf.autograph.experimental.do_not_convert
def prefix_lm(dataset: Dataset, sequence_length: Lengths, output_features: Features) -> Dataset:
  """Each document in segments, each segment cut at a random place into inputs and targets."""
  dataset = drop_empty(tokenize(dataset, output_features))
  dataset = split_prefix(dataset, sequence_length, output_features)
  return seqio.preprocessors.append_eos_after_trim(dataset, output_features, sequence_length)


@tf.autograph.experimental.do_not_convert
def ul2(dataset: Dataset, sequence_length: Lengths, output_features: Features,
        documents: int = CONCATENATED_DOCUMENTS, denoisers: Sequence[Denoiser] = UL2_DENOISERS,
        sampling_seed: int = 7) -> Dataset:
  """The mixture of denoisers.

  Every `documents` documents are joined; the i-th such element goes to denoiser i modulo their number, so that there
  must be at least `documents` times that many documents for all denoisers to have data. Each denoiser goes through its
  share at its own pace. Prompts are not counted: full inputs lose as many tokens at their end.

  The data set is iterated once for each denoiser, so it must give the same order every time. The original tokenized
  every document in each of these passes; here each pass only tokenizes what it keeps.
  """
  dataset = dataset.filter(lambda example: tf.strings.length(tf.strings.strip(example['text'])) > 0).enumerate()
  streams = []
  for i, denoiser in enumerate(denoisers):

    def is_mine(number, unused_example, i=i):
      return number // documents % len(denoisers) == i

    stream = concatenate_documents(tokenize(dataset.filter(is_mine), output_features), documents)
    if denoiser.density:
      stream = corrupt_spans(stream, sequence_length, output_features, denoiser.density, denoiser.mean_span,
                             denoiser.prompt)
    else:
      stream = split_prefix(_random_chunks(stream), sequence_length, output_features, denoiser.prompt)
    streams.append(stream)
  dataset = tf.data.Dataset.sample_from_datasets(streams, [d.rate for d in denoisers], seed=sampling_seed)
  return seqio.preprocessors.append_eos_after_trim(dataset, output_features, sequence_length)


def _random_chunks(dataset: Dataset) -> Dataset:
  """A random chunk of each element (the original's prefix LM takes one of the joined documents again)."""
  return seqio.map_over_dataset(num_seeds=1)(
      lambda example, seed: {'targets': random_chunk(example['targets'], seed)})(dataset)
