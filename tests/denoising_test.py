"""Corrected UL2: nothing lost, nothing twice, nothing too long, and the shares that are asked for."""

import functools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from openmoe_jax import data as data_lib
from openmoe_jax import denoising, feature_converters, objectives, vocabulary
from openmoe_jax.analysis import mixture_report
from openmoe_jax.config import ConfigError, DataConfig
from openmoe_jax.objectives import Denoiser
from openmoe_jax.tasks import standard_library
from openmoe_jax.tensorflow_setup import import_seqio, import_tensorflow

tf = import_tensorflow()
seqio = import_seqio()

EOS = 1
WORDS = 'def return the of value index π 漢字 with list naïve 0x1F {} ( ) \n\n  tab\t'.split(' ')
# One prompt each, so that examples tell what made them; segments of all kinds.
NAMED = tuple(Denoiser(f'[{name}] ', rate, density, span) for name, rate, density, span in [
    ('A', .2, .15, 3), ('B', .1, .5, 3), ('C', .2, .5, 64), ('D', .5, 0., 0.)])


def features():
  return {name: feature_converters.WindowFeature(vocabulary.shared()) for name in ('inputs', 'targets')}


def produce(texts, lengths, seed=1, **arguments):
  """All examples of `ul2_corrected` on the texts."""
  dataset = tf.data.Dataset.from_tensor_slices({'text': tf.constant(texts, tf.string)})
  with seqio.utils.map_seed_manager(seed):
    dataset = denoising.ul2_corrected(dataset, lengths, features(), **arguments)
  return list(dataset.as_numpy_iterator())


def corpus(count, longest, seed):
  rng = np.random.default_rng(seed)
  return [' '.join(rng.choice(WORDS, rng.integers(1, longest))) + f' {i}' for i in range(count)]


@functools.lru_cache(maxsize=None)
def prompts():
  return {tuple(vocabulary.get().encode(denoiser.prompt)): i for i, denoiser in enumerate(NAMED)}


def restore(inputs, targets, vocab_size=None, sentinels=300):
  """The tokens that a span-corrupted example without a prompt was made of."""
  vocab_size = vocab_size or vocabulary.get().vocab_size

  def spans(tokens):
    assert tokens[-1] == EOS
    groups = [[]]
    for token in tokens[:-1]:
      if token >= vocab_size - sentinels:
        assert token == vocab_size - len(groups), 'sentinels go down one by one'
        groups.append([])
      else:
        groups[-1].append(int(token))
    return groups

  kept, noise = spans(inputs), spans(targets)
  assert not noise[0] and len(noise) == max(len(kept), 2), 'a single token has a sentinel in targets only'
  return [token for i, span in enumerate(kept) for token in span + (noise[i + 1] if i + 1 < len(noise) else [])]


def segment_of(example):
  """(denoiser, tokens of text) of an example of `NAMED`."""
  inputs, targets = example['inputs'].tolist(), example['targets'].tolist()
  denoiser, size = next((i, len(prompt)) for prompt, i in prompts().items() if tuple(inputs[:len(prompt)]) == prompt)
  inputs = inputs[size:]
  return denoiser, restore(inputs, targets) if NAMED[denoiser].density else inputs + targets


# Lengths.


def test_full_segments_fill_the_row():
  table = [(d.prompt, d.mean_span, segment) for d, segment in zip(
      objectives.UL2_DENOISERS, denoising.plan(objectives.UL2_DENOISERS, 2048, vocabulary.get()).segments)]
  prompt = {text: len(vocabulary.get().encode(text)) for text in ('[NLU] ', '[NLG] ', '[S2S] ')}
  for (text, _, segment), denoiser in zip(table, objectives.UL2_DENOISERS):
    length, _ = denoising.example_length(denoiser, segment, prompt[text])
    # One more token of text can cost a sentinel in inputs and one in targets.
    assert 2048 - 2 <= length <= 2048
    assert denoising.example_length(denoiser, segment + 1, prompt[text])[0] > 2048
  assert table[-1][2] == 2048 - prompt['[S2S] ']


@hypothesis.settings(max_examples=200)
@hypothesis.given(density=st.floats(.05, .9), mean_span=st.floats(1, 64), segment=st.integers(1, 1500),
                  seed=st.integers(0, 2**31 - 1))
def test_lengths_are_those_of_the_examples(density, mean_span, segment, seed):
  denoiser = Denoiser('', 1., density, mean_span)
  tokens = tf.constant(np.random.default_rng(seed).integers(3, 8000, segment), tf.int32)
  constants = (tf.constant([density], tf.float32), tf.constant([mean_span], tf.float32), tf.zeros([0], tf.int32),
               tf.constant([0]), tf.constant([10000, EOS]))
  inputs, targets = denoising._example_function()(tokens, 0, tf.constant([[seed, 1], [seed, 2]], tf.int64), *constants)
  length, spans = denoising.example_length(denoiser, segment, 0)
  assert tf.size(inputs) + tf.size(targets) == length
  assert (inputs.numpy() >= 8000).sum() == spans
  assert restore(inputs.numpy(), targets.numpy(), 10000, 2000) == tokens.numpy().tolist()


def test_a_long_row_is_limited_by_the_sentinels():
  chosen = denoising.plan(objectives.UL2_DENOISERS, 8192, vocabulary.get())
  spans = [denoising.example_length(denoiser, segment, 3)[1]
           for denoiser, segment in zip(objectives.UL2_DENOISERS, chosen.segments)]
  assert max(spans) == spans[2] == 300 - denoising.RESERVED_SENTINELS
  assert chosen.segments[2] < 2000 and chosen.segments[5] > 8180


# Nothing is lost.


@hypothesis.settings(max_examples=8)
@hypothesis.given(count=st.integers(1, 60), longest=st.integers(2, 120), window=st.integers(24, 160),
                  seed=st.integers(0, 10**6))
@pytest.mark.slow
def test_every_text_comes_out_once(count, longest, window, seed):
  texts = corpus(count, longest, seed)
  examples = produce(texts + ['', ' \n'], {'inputs': window - 8, 'targets': 8}, seed, denoisers=NAMED)
  joined = {i: [] for i in range(len(NAMED))}
  for example in examples:
    assert 1 <= len(example['inputs']) + len(example['targets']) <= window
    denoiser, tokens = segment_of(example)
    joined[denoiser] += tokens
  order = {tuple(vocabulary.get().encode(text)): i for i, text in enumerate(texts)}
  found = []
  for tokens in joined.values():
    if tokens:
      assert tokens[-1] == EOS
    ends = [i for i, token in enumerate(tokens) if token == EOS]
    numbers = [order[tuple(tokens[begin:end])] for begin, end in zip([0] + [end + 1 for end in ends[:-1]], ends)]
    assert numbers == sorted(numbers), 'a denoiser keeps the order of its texts'
    found += numbers
  assert sorted(found) == list(range(count))


def test_only_rests_are_shorter_than_planned():
  texts = corpus(200, 80, 3)
  window = 96
  chosen = denoising.plan(NAMED, window, vocabulary.get())
  short = 0
  for example in produce(texts, {'inputs': 48, 'targets': 48}, denoisers=NAMED):
    denoiser, tokens = segment_of(example)
    assert len(tokens) <= chosen.segments[denoiser]
    short += len(tokens) < chosen.segments[denoiser]
  assert short <= len(NAMED)


def test_prefixes_are_of_any_length():
  examples = produce(corpus(400, 60, 5), {'inputs': 32, 'targets': 32}, denoisers=(Denoiser('', 1.),))
  full = [example for example in examples if len(example['inputs']) + len(example['targets']) == 64]
  lengths = np.array([len(example['inputs']) for example in full])
  assert len(full) >= len(examples) - 1 > 200 and lengths.min() < 5 and lengths.max() > 58
  assert lengths.min() >= 1 and lengths.max() <= 63 and abs(lengths.mean() - 32) < 3


# Shares.


def test_examples_come_at_the_rates():
  rng = np.random.default_rng(0)
  # Lengths that differ much; the longest are cut to a hundredth of all text.
  texts = [' '.join(rng.choice(WORDS, int(n))) for n in 5 + rng.pareto(1.2, 1500) * 20]
  examples = produce(texts, {'inputs': 32, 'targets': 32}, denoisers=NAMED, text_bytes=2000)
  counts = np.bincount([segment_of(example)[0] for example in examples], minlength=4) / len(examples)
  assert len(examples) > 1000
  np.testing.assert_allclose(counts, [denoiser.rate for denoiser in NAMED], atol=.01)


@hypothesis.given(sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=200), seed=st.integers(0, 10**6),
                  rates=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_no_denoiser_falls_behind(sizes, seed, rates):
  shares = np.array(rates) / sum(rates)
  behind = tf.zeros(len(rates), tf.float64)
  given_to = np.zeros(len(rates))
  for size, draw in zip(sizes, np.random.default_rng(seed).random(len(sizes))):
    text = 'x' * (size % 997 + 1)
    behind, dealt = denoising._deal_one(tf.constant(shares), behind, (tf.constant(text), tf.constant(draw)))
    given_to[int(dealt['denoiser'])] += len(text)
  np.testing.assert_allclose(behind, shares * given_to.sum() - given_to, atol=1e-6)
  # Only who is behind gets a text, so nobody is further ahead than one text, and all together nobody far behind.
  assert (given_to - shares * given_to.sum()).max() <= 997


# Long texts.


@hypothesis.settings(max_examples=20)
@hypothesis.given(text=st.text(alphabet='ab  \néλ漢😀', max_size=300), limit=st.integers(8, 60))
def test_long_texts_are_cut_between_characters(text, limit):
  dataset = tf.data.Dataset.from_tensors({'text': tf.constant(text)})
  parts = [part['text'] for part in denoising.cut_texts(dataset, limit).as_numpy_iterator()]
  assert b''.join(parts) == text.encode()
  assert len(parts) == max(-(-len(text.encode()) // limit), 1)
  for part in parts:
    part.decode()
    assert len(part) < 2 * limit


def test_long_texts_are_cut_at_spaces_and_give_the_same_tokens():
  text = max((document.text for document in standard_library.documents('code', 'train')), key=len)
  dataset = tf.data.Dataset.from_tensors({'text': tf.constant(text)})
  parts = [part['text'] for part in denoising.cut_texts(dataset, 4096).as_numpy_iterator()]
  assert len(parts) == -(-len(text.encode()) // 4096) > 10
  assert all(part[:1] in b' \n' for part in parts[1:]) and all(len(part) <= 4096 + 1024 for part in parts)
  encode = vocabulary.get().encode
  differing = sum(len(encode(part.decode())) for part in parts) - len(encode(text))
  assert 0 <= differing <= len(parts), 'a cut costs a token at most, where a run of line ends is divided'


def test_a_long_text_is_dealt_to_several_denoisers():
  examples = produce([' '.join(['word'] * 4000)], {'inputs': 64, 'targets': 64}, denoisers=NAMED, text_bytes=500)
  assert {segment_of(example)[0] for example in examples} == {0, 1, 2, 3}


# Seeds, streams, tasks.


def flat(examples):
  return [(example['inputs'].tolist(), example['targets'].tolist()) for example in examples]


def test_the_seed_decides():
  texts, lengths = corpus(80, 50, 1), {'inputs': 40, 'targets': 40}
  once = flat(produce(texts, lengths, 3))
  assert flat(produce(texts, lengths, 3)) == once != flat(produce(texts, lengths, 4))


def settings(**changes):
  values = dict(mixture_or_task='demo_prose_ul2_corrected', task_feature_lengths={'inputs': 100, 'targets': 156},
                batch_size=4, num_streams=2, seed=5)
  return DataConfig(**{**values, **changes})


@pytest.mark.slow
def test_streams_continue_exactly_after_any_number_of_interruptions():
  data = settings()
  whole = data_lib.TrainStreams(data)
  expected = [next(whole) for _ in range(13)]
  states, got = {}, []
  for batches in (1, 7, 5):
    parts = [data_lib.TrainStreams(data, stream_ids=[i]) for i in (1, 0)]  # Two hosts.
    for part in parts:
      if states:
        part.restore(states)
    for _ in range(batches):
      second, first = (next(part) for part in parts)
      got.append({key: np.concatenate([first[key], second[key]], axis=1) for key in first})
    states = {stream: state for part in parts for stream, state in part.state().items()}
  for batch, other in zip(got, expected):
    for key in other:
      np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


def test_rows_are_full_and_loss_is_on_the_targets():
  batch = next(data_lib.TrainStreams(settings(mixture_or_task='demo_prose_span_corruption')))
  tokens, weights = batch['decoder_target_tokens'][0], batch['decoder_loss_weights'][0]
  first = vocabulary.get().vocab_size - 1
  for row, weight in zip(tokens, weights):
    begin = np.argmax(weight)
    assert (row != 0).mean() > .97 and (weight[begin:] == (row[begin:] != 0)).all()
    assert row[begin] == first and row[begin - 1] == EOS and (row == first).sum() == 2


def test_reports_show_shares_and_that_nothing_is_cut():
  report = mixture_report.measure(settings(num_streams=1), 400)
  assert report.tokens_cut == 0 and report.fill > .98 and report.segments < 1.05
  assert {name: share.configured for name, share in report.objectives.items()} == {
      'spans of 3, 15%': .1, 'spans of 8, 15%': .1, 'spans of 3, 50%': .1, 'spans of 8, 50%': .1,
      'spans of 64, 50%': .1, 'prefix LM': .5}
  assert all(abs(share.examples - share.configured) < .1 for share in report.objectives.values())


def test_validation_goes_through_all_texts_the_same_way_every_time():
  data = settings(batch_size=16, eval_batches=0, pack=False)
  once, again = ([batch['decoder_target_tokens'] for batch in data_lib.eval_batches(data, data.mixture_or_task)]
                 for _ in range(2))
  np.testing.assert_array_equal(once, again)
  documents = standard_library.documents('prose', 'validation')
  first_sentinel = vocabulary.get().vocab_size - vocabulary.get().extra_ids
  rows = [row[row != 0] for row in np.concatenate(once) if row.any()]
  prompt = {text: len(vocabulary.get().encode(text)) for text in ('[NLU] ', '[S2S] ')}
  text = 0
  for row in rows:
    corrupted = (row >= first_sentinel).any()
    text += (row < first_sentinel).sum() - (prompt['[NLU] '] + 2 if corrupted else prompt['[S2S] '])
  assert text == sum(len(vocabulary.get().encode(document.text)) + 1 for document in documents)


def test_an_example_may_be_longer_than_its_feature():
  dataset = tf.data.Dataset.from_tensors({'inputs': tf.range(3, 12), 'targets': tf.range(20, 23)})
  lengths = {'inputs': 6, 'targets': 6}
  for packed in (True, False):
    convert = feature_converters.decoder_converter(lengths, packed, shared_window=True)
    row, = convert(dataset, lengths).as_numpy_iterator()
    assert row['decoder_target_tokens'].tolist() == [*range(3, 12), 20, 21, 22]
    assert row['decoder_loss_weights'].tolist() == [0] * 9 + [1] * 3
    row, = feature_converters.decoder_converter(lengths, packed)(dataset, lengths).as_numpy_iterator()
    assert row['decoder_target_tokens'].tolist() == [*range(3, 9), 20, 21, 22, 0, 0, 0]


def test_both_kinds_of_task_are_told_apart():
  registry = seqio.MixtureRegistry
  assert feature_converters.share_window(registry.get('demo_ul2_corrected'))
  assert not feature_converters.share_window(registry.get('demo_ul2'))
  assert feature_converters.share_window(registry.get('mix_ul2_corrected'))


@pytest.mark.parametrize('lengths, extra_ids, message', [
    ({'inputs': 3, 'targets': 2}, 300, 'rows of 5 tokens are too short'), ({}, 300, 'task_feature_lengths'),
    ({'inputs': 50, 'targets': 50}, 3, 'extra_ids = 3: span corruption needs more than 3 sentinels')])
def test_mistakes_are_one_clear_line(lengths, extra_ids, message):
  vocabulary.configure('', extra_ids)
  try:
    with pytest.raises(ConfigError, match=message) as error:
      produce(['text'], lengths)
    assert '\n' not in str(error.value)
  finally:
    vocabulary.configure()
