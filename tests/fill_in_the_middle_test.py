"""Fill-in-the-middle: the text comes back, rows are never exceeded, and both orders come at their rates."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from openmoe_jax import data as data_lib
from openmoe_jax import denoising, fill_in_the_middle, vocabulary
from openmoe_jax.analysis import mixture_report
from openmoe_jax.config import ConfigError, DataConfig
from openmoe_jax.tasks import standard_library
from openmoe_jax.tensorflow_setup import import_seqio, import_tensorflow

tf = import_tensorflow()
seqio = import_seqio()

EOS = 1


def produce(texts, length, seed=1, **arguments):
  """All examples of the objective on the texts, as lists."""
  dataset = tf.data.Dataset.from_tensor_slices({'text': tf.constant(texts, tf.string)})
  features = {'targets': seqio.Feature(vocabulary.shared())}
  with seqio.utils.map_seed_manager(seed):
    dataset = fill_in_the_middle.fill_in_the_middle(dataset, {'targets': length}, features, **arguments)
  return [example['targets'].tolist() for example in dataset.as_numpy_iterator()]


def parts_of(tokens):
  """('PSM' or 'SPM', prefix, middle, suffix) of an example with marks, or ('', tokens without EOS).

  In SPM prefix and middle stand together, so they come as the prefix; so does the middle of PSM with an empty prefix.
  """
  pre, suf, mid = fill_in_the_middle.marks(vocabulary.get())
  if tokens[0] != pre:
    assert not {pre, suf, mid} & set(tokens)
    return ('', tokens[:-1] if tokens[-1] == EOS else tokens)
  assert tokens[-1] == EOS and EOS not in tokens[:-1] and sorted({pre, suf, mid} & set(tokens)) == [pre, suf, mid]
  s, m = tokens.index(suf), tokens.index(mid)
  rest = tokens[m + 1:-1]
  return ('PSM', tokens[1:s], rest, tokens[s + 1:m]) if s > 1 else ('SPM', rest, [], tokens[s + 1:m])


def text_of(tokens):
  """The piece of text that an example was made of. Each part was tokenized by itself, so it is decoded by itself."""
  return ''.join(map(vocabulary.get().tokenizer.decode, parts_of(tokens)[1:]))


@hypothesis.settings(max_examples=8)
@hypothesis.given(texts=st.lists(st.text(alphabet='ab  \néλ漢😀x', min_size=1, max_size=150), min_size=1, max_size=8),
                  length=st.integers(12, 60), rate=st.sampled_from([0., .5, 1.]), seed=st.integers(0, 10**6))
@pytest.mark.slow
def test_the_texts_come_back(texts, length, rate, seed):
  examples = produce(texts, length, seed, rate=rate)
  assert all(len(tokens) <= length for tokens in examples)
  assert ''.join(map(text_of, examples)) == ''.join(text for text in texts if text.strip())
  plain = [tokens for tokens in examples if not parts_of(tokens)[0]]
  assert not plain if rate == 1 else len(plain) == len(examples) if rate == 0 else True


def test_without_marks_the_tokens_are_those_of_the_text():
  text = max((document.text for document in standard_library.documents('prose', 'train')), key=len)[:20000]
  examples = produce([text], 256, rate=0.)
  assert len(examples) > 10 and sum(examples, []) == vocabulary.get().encode(text) + [EOS]


def test_orders_come_at_their_rates_and_cuts_are_anywhere():
  text = 'abcdefghij klmnopqrst'
  examples = produce([text] * 1500, 64, rate=.6, spm_rate=.25)
  kinds = [parts_of(tokens) for tokens in examples]
  marked = [parts for parts in kinds if parts[0]]
  spm = [parts for parts in marked if parts[0] == 'SPM']
  # Three standard deviations are .04; PSM with an empty prefix looks like SPM, once in 22 / 2 + 1 or so.
  assert abs(len(marked) / 1500 - .6) < .04 and .25 - .06 < len(spm) / len(marked) < .25 + .11
  decode = vocabulary.get().tokenizer.decode
  places = {(len(decode(prefix)), len(decode(middle))) for kind, prefix, middle, _ in marked if kind == 'PSM'}
  assert {first for first, _ in places} >= set(range(1, 18)) and {size for _, size in places} >= {0, 1, 2, 10}


def test_marks_are_not_those_of_span_corruption():
  chosen = vocabulary.get()
  plan = denoising.plan(denoising.UL2_DENOISERS, 8192, chosen)
  spans = max(denoising.example_length(denoiser, segment, 0)[1]
              for denoiser, segment in zip(denoising.UL2_DENOISERS, plan.segments))
  assert chosen.vocab_size - spans > max(fill_in_the_middle.marks(chosen))
  assert vocabulary.decode(fill_in_the_middle.marks(chosen)) == '<extra_id_299><extra_id_298><extra_id_297>'


def test_task_gives_packed_rows_with_loss_everywhere_and_continues_after_a_restart():
  data = DataConfig(mixture_or_task='demo_prose_fim', task_feature_lengths={'targets': 256}, batch_size=4,
                    num_streams=2, seed=3)
  streams = data_lib.TrainStreams(data)
  next(streams)
  state, batch = streams.state(), next(streams)
  tokens = batch['decoder_target_tokens']
  np.testing.assert_array_equal(batch['decoder_loss_weights'], tokens != 0)
  again = data_lib.TrainStreams(data)
  again.restore(state)
  np.testing.assert_array_equal(next(again)['decoder_target_tokens'], tokens)


def test_reports_name_the_orders():
  data = DataConfig(mixture_or_task='demo_prose_fim', task_feature_lengths={'targets': 256}, num_streams=1)
  report = mixture_report.measure(data, 300, pages=4)
  assert report.tokens_cut == 0
  shares = {name: share.examples for name, share in report.objectives.items()}
  assert set(shares) == {'language modelling', 'fill in the middle, PSM', 'fill in the middle, SPM'}
  assert abs(shares['language modelling'] - .5) < .12 and abs(shares['fill in the middle, PSM'] - .25) < .12


@pytest.mark.parametrize('arguments, message', [
    (dict(length=11), r"\['targets'\] = 11 is too short for fill-in-the-middle; the least is 12"),
    (dict(length=64, rate=1.5), 'rate = 1.5'), (dict(length=64, spm_rate=-1), 'spm_rate = -1 must be between')])
def test_mistakes_are_one_clear_line(arguments, message):
  with pytest.raises(ConfigError, match=message) as error:
    produce(['text'], **arguments)
  assert '\n' not in str(error.value)


def test_too_few_sentinels_are_refused():
  vocabulary.configure('', 2)
  try:
    with pytest.raises(ConfigError, match='extra_ids = 2: fill-in-the-middle needs 3'):
      produce(['text'], 64)
  finally:
    vocabulary.configure()
