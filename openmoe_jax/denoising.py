"""UL2 without what the original loses: every text once, every token once, and examples as long as the row.

Three differences from `objectives.ul2`, on purpose:

* Texts are dealt to the denoisers before they are tokenized, in one pass. Each text goes to one denoiser, so that
  nothing is read or tokenized twice, and none waits until another has its share.
* Each denoiser joins its texts with EOS behind each, and cuts the whole into segments without a rest: what is left of
  a text begins the next segment.
* Inputs and targets share the row (`feature_converters.WindowFeature`). A segment is as long as the row allows beside
  the prompt, sentinels and ends, for prefix LM as well; so a row is one example, and nothing is cut off.
"""

import functools
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from openmoe_jax import objectives
from openmoe_jax.config import require
from openmoe_jax.objectives import UL2_DENOISERS, Denoiser
from openmoe_jax.tensorflow_setup import import_seqio, import_tensorflow

tf = import_tensorflow()
seqio = import_seqio()

Dataset = Any  # tf.data.Dataset
Features = Mapping[str, Any]  # name -> seqio.Feature
Lengths = Optional[Mapping[str, int]]

# A longer text is cut into texts of about this many bytes: books would otherwise give one denoiser hundreds of rows in
# a row, and a saved data position would hold all of their tokens.
TEXT_BYTES = 2**17
# How far in front of that place a space is looked for, to cut there.
_SEARCHED_BYTES = 1024
# The highest-numbered sentinels are left to fill-in-the-middle.
RESERVED_SENTINELS = 3
# Documents that span corruption by itself corrupts as T5 does.
T5_DENOISERS = (Denoiser('', 1.0, density=0.15, mean_span=3),)


class Plan(NamedTuple):
  """How a window is filled by each of some denoisers.

  Attributes:
    segments: tokens of text in a full example of each.
    shares: of the text that each gets, so that their examples come at the denoisers' rates; the sum is 1.
    prompts: token ids in front of the inputs.
  """
  segments: Tuple[int, ...]
  shares: Tuple[float, ...]
  prompts: Tuple[Tuple[int, ...], ...]


def example_length(denoiser: Denoiser, segment: int, prompt: int) -> Tuple[int, int]:
  """(tokens of the example, sentinels in its inputs) for `segment` tokens of text and a prompt of `prompt` tokens."""
  if not denoiser.density:
    return segment + prompt, 0
  if segment < 2:
    return segment + prompt + 3, 0  # One token is never corrupted: targets are a sentinel that stands for it, and EOS.
  # In float32, as `objectives.noise_mask` does it.
  noise = int(np.clip(np.round(np.float32(segment) * np.float32(denoiser.density)), 1, segment - 1))
  spans = int(np.clip(np.round(np.float32(noise) / np.float32(denoiser.mean_span)), 1, segment - noise))
  return segment + 2 * spans + prompt + 2, spans


def plan(denoisers: Sequence[Denoiser], window: int, vocabulary: Any) -> Plan:
  """The longest segments that fit into `window` tokens, and into the sentinels that the vocabulary has.

  Raises:
    ConfigError: the window holds no text, or there are too few sentinels.
  """
  sentinels = vocabulary.extra_ids - RESERVED_SENTINELS
  prompts = tuple(tuple(vocabulary.encode(denoiser.prompt)) if denoiser.prompt else () for denoiser in denoisers)
  segments: List[int] = []
  for denoiser, prompt in zip(denoisers, prompts):
    require(not denoiser.density or sentinels > 0, f'DataConfig.extra_ids = {vocabulary.extra_ids}: span corruption '
            f'needs more than {RESERVED_SENTINELS} sentinels')
    fitting = (length for length in range(window, 1, -1)
               if _fits(example_length(denoiser, length, len(prompt)), window, sentinels))
    segment = next(fitting, 0)
    require(segment > 0, f'DataConfig.task_feature_lengths: rows of {window} tokens are too short; the prompt '
            f'{denoiser.prompt!r} and the ends leave no room for text')
    segments.append(segment)
  weights = [denoiser.rate * segment for denoiser, segment in zip(denoisers, segments)]
  return Plan(tuple(segments), tuple(weight / sum(weights) for weight in weights), prompts)


def _fits(length_and_spans: Tuple[int, int], window: int, sentinels: int) -> bool:
  length, spans = length_and_spans
  return length <= window and spans <= sentinels


# Texts.


def cut_texts(dataset: Dataset, text_bytes: int = TEXT_BYTES) -> Dataset:
  """{'text'} -> {'text'}: texts longer than `text_bytes` become several, each cut in front of a space if there is one.

  A text is at most `text_bytes` + 1,024 bytes long; together they are the text that was there.
  """

  def starts(text, count):
    """Where the texts after the first begin: at a space behind something else, or else at a character's first byte."""

    def start(number):
      begin = tf.maximum(number * text_bytes - _SEARCHED_BYTES, (number - 1) * text_bytes + 1)
      found = tf.io.decode_raw(tf.strings.substr(text, begin - 1, number * text_bytes - begin + 1), tf.uint8)
      places = tf.range(tf.size(found) - 1)
      blank = (found == 32) | (found == 10)
      spaces = tf.reduce_max(tf.where(blank[1:] & ~blank[:-1], places, -1))
      characters = tf.reduce_max(tf.where(tf.bitwise.bitwise_and(found[1:], 0xc0) != 0x80, places, 0))
      return begin + tf.where(spaces >= 0, spaces, characters)

    return tf.map_fn(start, tf.range(1, count))

  def cut(text):
    size = tf.strings.length(text)
    begins = tf.concat([[0], starts(text, (size + text_bytes - 1) // text_bytes)], 0)
    lengths = tf.concat([begins[1:], [size]], 0) - begins
    return tf.map_fn(lambda part: tf.strings.substr(text, part[0], part[1]), (begins, lengths),
                     fn_output_signature=tf.string)

  def texts(example):
    text = example['text']
    return {'text': tf.cond(tf.strings.length(text) > text_bytes, lambda: cut(text), lambda: text[tf.newaxis])}

  return dataset.map(texts).unbatch()


def deal(dataset: Dataset, shares: Sequence[float]) -> Dataset:
  """{'text'} -> {'text', 'denoiser'}: each text goes to one denoiser, so that each gets its share of the bytes.

  A denoiser is drawn with the probability by which it is behind its share, which makes up for long texts.
  """

  @seqio.map_over_dataset(num_seeds=1)
  def draw(example, seed):
    return example['text'], tf.random.stateless_uniform([], seed, dtype=tf.float64)

  shares = tf.constant(shares, tf.float64)
  return draw(dataset).scan(tf.zeros_like(shares), functools.partial(_deal_one, shares))


def _deal_one(shares, behind, item):
  """(bytes that each denoiser is behind, (text, draw)) -> (the same after this text, the text and its denoiser)."""
  text, draw = item
  size = tf.cast(tf.strings.length(text), tf.float64)
  behind = behind + shares * size
  chances = tf.cumsum(tf.maximum(behind, 0.))
  denoiser = tf.searchsorted(chances, draw[tf.newaxis] * chances[-1], side='right')[0]
  denoiser = tf.minimum(denoiser, tf.size(shares) - 1)
  behind -= size * tf.one_hot(denoiser, tf.size(shares), dtype=tf.float64)
  return behind, {'text': text, 'denoiser': denoiser}


def tokenize(dataset: Dataset, output_features: Features) -> Dataset:
  """{'text', 'denoiser'} -> {'tokens', 'denoiser'}, with EOS behind each text."""
  vocabulary = output_features['targets'].vocabulary
  end = tf.constant([vocabulary.eos_id], tf.int32)
  return dataset.map(lambda example: {'tokens': tf.concat([vocabulary.encode_tf(example['text']), end], 0),
                                      'denoiser': example['denoiser']})


# Segments.


def cut_segments(dataset: Dataset, segments: Sequence[int]) -> Dataset:
  """{'tokens', 'denoiser'} -> the same, the tokens of denoiser i being `segments[i]` at a time.

  They are joined, and what does not fill a segment waits for the next tokens of the same denoiser. At the end of the
  data set the rests come out as shorter segments.
  """
  lengths = tf.constant(segments, tf.int32)
  empty = tf.zeros([0], tf.int32)
  dataset = dataset.map(lambda example: (example['tokens'], example['denoiser'], False))
  dataset = dataset.concatenate(tf.data.Dataset.from_tensors((empty, tf.constant(0, tf.int32), True)))
  unfinished = (empty, tf.zeros_like(lengths))
  step = _segments_step()
  dataset = dataset.scan(unfinished, lambda state, item: step(lengths, state, item)).unbatch()
  return dataset.map(lambda row: {'tokens': row['tokens'][:row['length']], 'denoiser': row['denoiser']})


@functools.lru_cache(maxsize=None)
def _segments_step() -> Any:
  """(lengths [D], (waiting tokens of all denoisers one after the other, their numbers [D]), (tokens, denoiser, whether
  the data set has ended)) -> (new state, {'tokens': [n, longest], 'length': [n], 'denoiser': [n]}).

  One function for all streams, so that it is traced once.
  """
  vector, scalar = tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int32)

  @tf.function(autograph=False, input_signature=[
      vector, (vector, vector), (vector, scalar, tf.TensorSpec([], tf.bool))])
  def step(lengths, state, item):
    waiting, sizes = state
    tokens, denoiser, at_end = item
    end = tf.reduce_sum(sizes[:denoiser + 1])
    begin = end - sizes[denoiser]
    joined = tf.concat([waiting[begin:end], tokens], 0)
    length = lengths[denoiser]
    count = tf.size(joined) // length
    rest = joined[count * length:]
    new_waiting = tf.concat([waiting[:begin], rest, waiting[end:]], 0)
    new_sizes = tf.tensor_scatter_nd_update(sizes, [[denoiser]], [tf.size(rest)])

    def full():
      return tf.reshape(joined[:count * length], [count, length]), tf.fill([count], length), tf.fill([count], denoiser)

    def rests():
      of = tf.reshape(tf.where(sizes > 0), [-1])
      own = tf.gather(sizes, of)
      return tf.RaggedTensor.from_row_lengths(waiting, own).to_tensor(), own, tf.cast(of, tf.int32)

    rows, counts, denoisers = tf.cond(at_end, rests, full)
    segments = {'tokens': tf.ensure_shape(rows, [None, None]), 'length': tf.ensure_shape(counts, [None]),
                'denoiser': tf.ensure_shape(denoisers, [None])}
    return (new_waiting, tf.ensure_shape(new_sizes, [None])), segments

  return step


# Examples.


def corrupt(dataset: Dataset, output_features: Features, denoisers: Sequence[Denoiser], prompts: Sequence[Sequence[int]]
            ) -> Dataset:
  """{'tokens', 'denoiser'} -> {'inputs', 'targets'}.

  Span corruption ends inputs and targets with EOS, as T5 does. Prefix LM does not: the text goes on, and an EOS in it
  is the end of a document.
  """
  vocabulary = output_features['targets'].vocabulary
  constants = (tf.constant([denoiser.density for denoiser in denoisers], tf.float32),
               tf.constant([denoiser.mean_span or 1. for denoiser in denoisers], tf.float32),
               tf.constant(np.concatenate([np.zeros(0), *prompts]), tf.int32),
               tf.constant([len(prompt) for prompt in prompts], tf.int32),
               tf.constant([vocabulary.vocab_size, vocabulary.eos_id], tf.int32))
  example_of = _example_function()

  @seqio.map_over_dataset(num_seeds=2)
  def example(segment, seeds):
    inputs, targets = example_of(segment['tokens'], segment['denoiser'], tf.stack(seeds), *constants)
    return {'inputs': inputs, 'targets': targets}

  return example(dataset)


@functools.lru_cache(maxsize=None)
def _example_function() -> Any:
  """The (inputs, targets) of a segment; one function that is traced once, not once a task and stream."""
  vector, scalar = tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int32)
  numbers = tf.TensorSpec([None], tf.float32)

  @tf.function(autograph=False, input_signature=[vector, scalar, tf.TensorSpec([2, 2], tf.int64), numbers, numbers,
                                                 vector, vector, tf.TensorSpec([2], tf.int32)])
  def example(tokens, denoiser, seeds, densities, mean_spans, prompts, prompt_lengths, size_and_eos):
    size, end = tf.size(tokens), size_and_eos[1:]

    def spans():
      mask = objectives.noise_mask(size, densities[denoiser], mean_spans[denoiser], (seeds[0], seeds[1]))
      inputs, targets = (objectives.replace_spans(tokens, part, size_and_eos[0]) for part in (mask, ~mask))
      return tf.concat([inputs, end], 0), tf.concat([targets, end], 0)

    def prefix():
      length = tf.random.stateless_uniform([], seeds[0], tf.minimum(size - 1, 1), tf.maximum(size, 1), tf.int32)
      return tokens[:length], tokens[length:]

    inputs, targets = tf.cond(densities[denoiser] > 0, spans, prefix)
    before = tf.reduce_sum(prompt_lengths[:denoiser])
    prompt = prompts[before:before + prompt_lengths[denoiser]]
    return tf.ensure_shape(tf.concat([prompt, inputs], 0), [None]), tf.ensure_shape(targets, [None])

  return example


# The objectives: preprocessors for seqio.Task, each on {'text'}, for features that are `WindowFeature`s.


@tf.autograph.experimental.do_not_convert
def ul2_corrected(dataset: Dataset, sequence_length: Lengths, output_features: Features,
                  denoisers: Sequence[Denoiser] = UL2_DENOISERS, text_bytes: int = TEXT_BYTES) -> Dataset:
  """The mixture of denoisers; the denoisers' rates are shares of the examples.

  Args:
    dataset: of {'text': string}; blank ones are dropped.
    sequence_length: only its sum counts, the tokens of a row.
    output_features: inputs and targets.
    denoisers: what is mixed.
    text_bytes: see `cut_texts`.

  Returns:
    {'inputs', 'targets'}, int32 vectors that together are no longer than a row.
  """
  require(bool(sequence_length), 'this objective needs DataConfig.task_feature_lengths')
  chosen = plan(denoisers, sum(sequence_length.values()), output_features['targets'].vocabulary)
  dataset = dataset.filter(lambda example: tf.strings.length(tf.strings.strip(example['text'])) > 0)
  dataset = tokenize(deal(cut_texts(dataset, text_bytes), chosen.shares), output_features)
  return corrupt(cut_segments(dataset, chosen.segments), output_features, denoisers, chosen.prompts)


def span_corruption(dataset: Dataset, sequence_length: Lengths, output_features: Features,
                    denoisers: Sequence[Denoiser] = T5_DENOISERS, text_bytes: int = TEXT_BYTES) -> Dataset:
  """Span corruption by itself, without a prompt: 15 % of the tokens in spans of 3, as in T5."""
  return ul2_corrected(dataset, sequence_length, output_features, denoisers, text_bytes)
