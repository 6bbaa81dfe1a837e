"""Fill-in-the-middle as a seqio preprocessor (Bavarian et al. 2022): language modelling on texts whose parts are moved.

Some of the texts become, with a loss on every token,

  PREFIX prefix SUFFIX suffix MIDDLE middle EOS       PSM
  PREFIX SUFFIX suffix MIDDLE prefix middle EOS       SPM, in which what is generated goes on where the prefix ends

and the others stay as they are. The marks are three sentinels, which `openmoe_jax.denoising` does not use.
"""

import functools
from typing import Any, Mapping, NamedTuple, Optional

from openmoe_jax.config import require
from openmoe_jax.denoising import RESERVED_SENTINELS, TEXT_BYTES, cut_texts
from openmoe_jax.tensorflow_setup import import_seqio, import_tensorflow

tf = import_tensorflow()
seqio = import_seqio()

Dataset = Any  # tf.data.Dataset
Features = Mapping[str, Any]  # name -> seqio.Feature
Lengths = Optional[Mapping[str, int]]

# Tokens beside the text: three marks and EOS.
_MARKS_AND_END = 4
# A character that is no piece of the vocabulary is up to four tokens, between which no text is cut.
_CHARACTER_TOKENS = 4


class Marks(NamedTuple):
  """The ids in front of the prefix, the suffix and the middle."""
  prefix: int
  suffix: int
  middle: int


def marks(vocabulary: Any) -> Marks:
  """The marks of a vocabulary: its last sentinels, <extra_id_299>, <extra_id_298> and <extra_id_297> of 300."""
  require(vocabulary.extra_ids >= RESERVED_SENTINELS, f'DataConfig.extra_ids = {vocabulary.extra_ids}: '
          f'fill-in-the-middle needs {RESERVED_SENTINELS} sentinels')
  first = vocabulary.vocab_size - vocabulary.extra_ids
  return Marks(first, first + 1, first + 2)


def cut_to_length(dataset: Dataset, vocabulary: Any, length: int) -> Dataset:
  """{'text'} -> {'text', 'tokens', 'last'}: pieces of at most `length` tokens, cut between characters.

  `tokens` are those of the piece as a part of its text; `last` says whether it is the end of it.
  """
  stride = length - _CHARACTER_TOKENS + 1
  tokenizer = vocabulary.tf_tokenizer

  def pieces(example):
    text = example['text']
    tokens, starts, limits = tokenizer.tokenize_with_offsets(text)
    # A token may begin a piece if the one before it ends a character: of several bytes' tokens only the last does.
    whole = tf.concat([[True], limits[:-1] > starts[:-1]], 0)[:tf.size(tokens)]
    places = tf.cast(tf.where(whole)[:, 0], tf.int32)
    wanted = stride * tf.range((tf.size(tokens) + stride - 1) // stride)
    begins = tf.gather(places, tf.searchsorted(places, wanted, side='right') - 1)
    sizes = tf.concat([begins[1:], [tf.size(tokens)]], 0) - begins
    bytes_at = tf.cast(tf.gather(starts, begins), tf.int32)
    lengths = tf.concat([bytes_at[1:], [tf.strings.length(text)]], 0) - bytes_at
    return {'text': tf.strings.substr(tf.fill(tf.shape(begins), text), bytes_at, lengths),
            'tokens': tf.RaggedTensor.from_row_lengths(tf.cast(tokens, tf.int32), sizes).to_tensor(), 'size': sizes,
            'last': tf.range(tf.size(begins)) == tf.size(begins) - 1}

  def piece(row):
    return {'text': row['text'], 'tokens': row['tokens'][:row['size']], 'last': row['last']}

  return dataset.map(pieces).unbatch().map(piece)


def move_middle(dataset: Dataset, vocabulary: Any, length: int, rate: float, spm_rate: float) -> Dataset:
  """{'text', 'tokens', 'last'} -> {'targets'}: a share `rate` of the pieces with marks, `spm_rate` of these as SPM.

  Prefix, middle and suffix are divided at any characters, and each is tokenized by itself, as a prompt would be. Where
  that makes too many tokens for `length`, they are divided between tokens.
  """
  ids = marks(vocabulary)
  end = tf.constant([vocabulary.eos_id], tf.int32)

  def divided_by_characters(text, shares):
    cuts = _cuts(tf.strings.length(text, unit='UTF8_CHAR'), shares)
    parts = tf.strings.substr(tf.fill([3], text), cuts[:3], cuts[1:] - cuts[:3], unit='UTF8_CHAR')
    return tf.cast(vocabulary.tf_tokenizer.tokenize(parts), tf.int32)

  def divided_by_tokens(tokens, shares):
    return tf.RaggedTensor.from_row_splits(tokens, _cuts(tf.size(tokens), shares))

  def marked(example, draws):
    parts = divided_by_characters(example['text'], draws[2:])
    short = tf.size(parts.flat_values) + _MARKS_AND_END <= length
    by_tokens = divided_by_tokens(example['tokens'], draws[2:])
    prefix, middle, suffix = (tf.cond(short, functools.partial(parts.__getitem__, i),
                                      functools.partial(by_tokens.__getitem__, i)) for i in range(3))
    spm = draws[1] < spm_rate
    first = tf.cond(spm, lambda: prefix[:0], lambda: prefix)
    return tf.concat([[ids.prefix], first, [ids.suffix], suffix, [ids.middle], prefix[tf.size(first):], middle, end], 0)

  @seqio.map_over_dataset(num_seeds=1)
  def example(piece, seed):
    draws = tf.random.stateless_uniform([4], seed)
    plain = lambda: tf.concat([piece['tokens'], end[:tf.cast(piece['last'], tf.int32)]], 0)
    return {'targets': tf.ensure_shape(tf.cond(draws[0] < rate, lambda: marked(piece, draws), plain), [None])}

  return example(dataset)


def _cuts(size: Any, shares: Any) -> Any:
  """[0, first cut, second cut, size] for two random numbers in [0, 1); each cut is anywhere, ends included."""
  cuts = tf.sort(tf.cast(shares * tf.cast(size + 1, tf.float32), tf.int32))
  return tf.concat([[0], tf.minimum(cuts, size), [size]], 0)


@tf.autograph.experimental.do_not_convert
def fill_in_the_middle(dataset: Dataset, sequence_length: Lengths, output_features: Features, rate: float = 0.5,
                       spm_rate: float = 0.5, text_bytes: int = TEXT_BYTES) -> Dataset:
  """Texts in pieces of at most a row, a share of them with their middle at the end.

  Args:
    dataset: of {'text': string}; blank ones are dropped.
    sequence_length: of targets. A text that is longer becomes several examples; packing joins short ones.
    output_features: targets.
    rate: share of the examples whose middle is moved.
    spm_rate: share of these that are SPM, the others being PSM.
    text_bytes: see `denoising.cut_texts`.

  Returns:
    {'targets'}: int32 vectors no longer than `sequence_length`. Those with marks end with EOS; the others do if the
    text ends there.
  """
  require(bool(sequence_length) and 'targets' in sequence_length, "this objective needs the length of 'targets' in "
          'DataConfig.task_feature_lengths')
  require(0 <= rate <= 1 and 0 <= spm_rate <= 1, f'fill_in_the_middle: rate = {rate} and spm_rate = {spm_rate} must be '
          'between 0 and 1')
  length = sequence_length['targets']
  require(length >= _MARKS_AND_END + 2 * _CHARACTER_TOKENS, "DataConfig.task_feature_lengths['targets'] = "
          f'{length} is too short for fill-in-the-middle; the least is {_MARKS_AND_END + 2 * _CHARACTER_TOKENS}')
  vocabulary = output_features['targets'].vocabulary
  dataset = dataset.filter(lambda example: tf.strings.length(tf.strings.strip(example['text'])) > 0)
  dataset = cut_to_length(cut_texts(dataset, text_bytes), vocabulary, length - _MARKS_AND_END)
  return move_middle(dataset, vocabulary, length, rate, spm_rate)
