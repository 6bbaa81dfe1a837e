"""The objectives and packing against the original's examples, and their properties."""

import functools
import os

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from openmoe_jax import feature_converters, objectives, vocabulary
from openmoe_jax.config import ConfigError
from openmoe_jax.tensorflow_setup import import_seqio, import_tensorflow
from tests.golden import load_arrays, load_json

tf = import_tensorflow()
seqio = import_seqio()

# The golden examples were made with the little vocabulary that seqio tests itself with.
TEST_MODEL = os.path.join(os.path.dirname(seqio.__file__), 'test_data', 'sentencepiece', 'sentencepiece.model')
VOCAB_SIZE = 326
EOS = 1


@functools.lru_cache(maxsize=None)
def features():
  model = seqio.SentencePieceVocabulary(TEST_MODEL, extra_ids=300)
  assert model.vocab_size == VOCAB_SIZE
  return {name: seqio.Feature(vocabulary=model, add_eos=True) for name in ('inputs', 'targets')}


@functools.lru_cache(maxsize=None)
def golden_documents():
  """The token ids of each golden document."""
  return tuple(tuple(features()['targets'].vocabulary.encode(text)) for text in load_json('ul2_docs.json'))


@functools.lru_cache(maxsize=None)
def produce(objective, take=None, seed=42, **arguments):
  """Examples of an objective on the golden documents, in order."""
  dataset = tf.data.Dataset.from_tensor_slices({'text': load_json('ul2_docs.json')})
  lengths = {'targets': 256} if objective is objectives.full_lm else {'inputs': 128, 'targets': 128}
  own = {name: features()[name] for name in lengths}
  with seqio.utils.map_seed_manager(seed):
    dataset = objective(dataset, sequence_length=lengths, output_features=own, **arguments)
  return list(dataset.take(take if take else -1).as_numpy_iterator())


def golden_examples(objective):
  arrays = load_arrays('ul2.npz')
  examples = []
  while f'g_{objective}/{len(examples)}/targets' in arrays:
    prefix = f'g_{objective}/{len(examples)}/'
    examples.append({key[len(prefix):]: value for key, value in arrays.items() if key.startswith(prefix)})
  assert examples
  return examples


def restore(inputs, targets):
  """The raw tokens of a span-corrupted example (both with EOS, inputs without prompt)."""
  def spans(tokens):
    assert tokens[-1] == EOS
    groups = [[]]
    for token in tokens[:-1]:
      if token >= VOCAB_SIZE - 300:
        assert token == VOCAB_SIZE - len(groups), 'sentinels go down one by one'
        groups.append([])
      else:
        groups[-1].append(int(token))
    return groups
  kept, noise = spans(inputs), spans(targets)
  raw = []
  for i, span in enumerate(kept):
    raw += span
    if i + 1 < len(noise):
      raw += noise[i + 1]
  return raw


def is_span_corruption(example):
  return example['targets'][0] == VOCAB_SIZE - 1


# Lengths.


@pytest.mark.parametrize('inputs, density, mean_span, segment, targets', [
    (1024, .15, 3, 1137, 229), (1024, .15, 8, 1178, 200), (1024, .5, 3, 1534, 1024), (1024, .5, 8, 1818, 1024),
    (1024, .5, 64, 2014, 1024), (128, .15, 3, 141, 29), (128, .15, 8, 146, 26), (128, .5, 3, 190, 128),
    (128, .5, 8, 226, 128), (128, .5, 64, 250, 128), (512, .15, 3, 568, 114)])
def test_span_lengths_are_those_of_the_specification(inputs, density, mean_span, segment, targets):
  lengths = objectives.span_lengths(inputs, density, mean_span)
  assert (lengths.segment, lengths.targets) == (segment, targets)
  assert lengths.inputs <= inputs


def test_span_lengths_match_the_golden_table():
  for row in load_json('ul2_examples.json')['random_spans_helper']:
    for inputs in (128, 1024):
      lengths = objectives.span_lengths(inputs, row['density'], row['mean'])
      assert [lengths.segment, lengths.targets] == row[f'L{inputs}']


@pytest.mark.parametrize('prompt', ['[NLU]', '[NLG]', '[S2S]'])
def test_prompts_have_the_golden_ids(prompt):
  golden = load_arrays('ul2.npz')[f'prompt/{prompt}']
  assert features()['inputs'].vocabulary.encode(f'{prompt} ') == golden.tolist()


def test_denoisers_are_those_of_the_specification():
  table = [(d.prompt, d.rate, d.mean_span, d.density) for d in objectives.UL2_DENOISERS]
  assert table == [('[NLU] ', .1, 3, .15), ('[NLU] ', .1, 8, .15), ('[NLG] ', .1, 3, .5), ('[NLG] ', .1, 8, .5),
                   ('[NLG] ', .1, 64, .5), ('[S2S] ', .5, 0, 0)]
  assert (objectives.CHUNK_TOKENS, objectives.CONCATENATED_DOCUMENTS) == (65536, 128)


# Whole objectives on the golden documents.


def test_full_lm_equals_the_original():
  got = produce(objectives.full_lm)
  for i, example in enumerate(golden_examples('full_lm')):
    np.testing.assert_array_equal(got[i]['targets'], example['targets'])
  assert all(example['targets'][-1] == EOS for example in got)
  joined = [[t for d in golden_documents()[128 * i:128 * (i + 1)] for t in d + (EOS,)] for i in range(12)]
  assert len(got) == sum(-(-len(tokens) // 256) for tokens in joined)


def test_full_lm_of_a_short_document_ends_with_two_eos():
  for i, example in enumerate(produce(objectives.full_lm, take=3, documents=1)):
    assert example['targets'].tolist() == list(golden_documents()[i]) + [EOS, EOS]


def test_prefix_lm_cuts_the_same_segments_as_the_original():
  got = produce(objectives.prefix_lm, take=24)
  for mine, golden in zip(got, golden_examples('prefix_lm')):
    for example in (mine, golden):
      assert example['inputs'][-1] == EOS and example['targets'][-1] == EOS
      assert len(example['inputs']) >= 2 and len(example['targets']) >= 2
    np.testing.assert_array_equal(np.concatenate([mine['inputs'][:-1], mine['targets'][:-1]]),
                                  np.concatenate([golden['inputs'][:-1], golden['targets'][:-1]]))


def raw_segments(examples):
  """The raw tokens of each example, by denoiser as far as it shows; full inputs were cut, so theirs are prefixes."""
  s2s, corrupted = [], []
  for example in examples:
    inputs, targets = example['inputs'], example['targets']
    assert inputs[:2].tolist() == [3, 2] and inputs[-1] == EOS and targets[-1] == EOS
    if not is_span_corruption(example):
      whole = len(inputs) < 128  # Else the prompt pushed out the end of the prefix.
      s2s.append(inputs[2:-1].tolist() + (targets[:-1].tolist() if whole else []))
    else:
      # Where the prompt pushed out the end of the inputs, only what is in front of the last kept span is certain.
      raw = restore(inputs[2:], targets)
      corrupted.append(raw if len(inputs) < 128 else raw[:64])
  return s2s, corrupted


def test_ul2_gives_each_denoiser_the_same_text_as_the_original():
  elements = [[t for d in golden_documents()[128 * i:128 * (i + 1)] for t in d] for i in range(12)]
  segments = {d: objectives.span_lengths(128, denoiser.density, denoiser.mean_span).segment
              for d, denoiser in enumerate(objectives.UL2_DENOISERS) if denoiser.density}
  starts = {tuple(elements[d][k * size:k * size + 40]): d for d, size in segments.items()
            for k in range(len(elements[d]) // size)}
  for examples in (golden_examples('ul2'), produce(objectives.ul2, take=200)):
    s2s, corrupted = raw_segments(examples)
    for k, raw in enumerate(s2s):
      assert raw == elements[5][127 * k:127 * (k + 1)][:max(len(raw), 125)]
    for raw in corrupted:
      assert tuple(raw[:40]) in starts


def test_ul2_lengths_and_rates():
  examples = produce(objectives.ul2)
  counts = {'s2s': 0, 'sparse': 0, 'dense': 0}
  for example in examples[:400]:
    assert len(example['inputs']) <= 128 and len(example['targets']) <= 128
    if not is_span_corruption(example):
      counts['s2s'] += 1
      assert len(example['inputs']) + len(example['targets']) <= 127 + 2 + 2
    elif len(example['targets']) <= 29:
      counts['sparse'] += 1
    else:
      counts['dense'] += 1
  # Rates .5, .2, .3 over 400 draws: four standard deviations.
  for kind, rate in (('s2s', .5), ('sparse', .2), ('dense', .3)):
    assert abs(counts[kind] / 400 - rate) < 4 * (rate * (1 - rate) / 400)**.5, counts


def test_same_seed_same_examples_other_seed_other_examples():
  def flat(examples):
    return [(e['inputs'].tolist(), e['targets'].tolist()) for e in examples]
  once = flat(produce(objectives.prefix_lm, take=24))
  produce.cache_clear()
  assert flat(produce(objectives.prefix_lm, take=24)) == once
  assert flat(produce(objectives.prefix_lm, take=24, seed=43)) != once


def test_long_documents_give_one_random_chunk():
  tokens = tf.range(1, 101)
  starts = {int(objectives.random_chunk(tokens, [0, i], max_tokens=30)[0]) for i in range(40)}
  assert starts == {1, 31, 61, 91}
  assert objectives.random_chunk(tokens, [0, 0], max_tokens=100).shape == 100
  assert objectives.random_chunk(tokens[:0], [0, 0]).shape == 0


# Span corruption as a function.


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(length=st.integers(1, 400), density=st.sampled_from([.15, .5]), mean_span=st.sampled_from([3, 8, 64]),
                  seed=st.integers(0, 2**31 - 1))
def test_corruption_can_be_undone(length, density, mean_span, seed):
  tokens = np.random.RandomState(seed).randint(3, VOCAB_SIZE - 300, length).astype(np.int32)
  mask = objectives.noise_mask(tf.constant(length), density, mean_span, ([seed, 1], [seed, 2])).numpy()
  assert mask.shape == (length,) and not mask[0]
  noise = min(max(int(np.round(np.float32(length) * np.float32(density))), 1), max(length - 1, 1))
  assert mask.sum() == (noise if length > 1 else 0)
  inputs, targets = objectives._corrupt(tokens, density, mean_span, VOCAB_SIZE, tf.constant([[seed, 1], [seed, 2]],
                                                                                          tf.int64))
  inputs, targets = inputs.numpy().tolist() + [EOS], targets.numpy().tolist() + [EOS]
  assert restore(inputs, targets) == tokens.tolist()
  spans = sum(mask[1:] & ~mask[:-1])
  assert spans == (max(int(np.round(np.float32(noise) / np.float32(mean_span))), 1) if length > 1 else 0)


def test_noise_is_spread_evenly():
  masks = tf.data.Dataset.range(200).map(lambda i: objectives.noise_mask(100, .5, 3.0, ([i, 1], [i, 2])))
  share = np.mean(list(masks.as_numpy_iterator()), axis=0)
  assert abs(share.mean() - .5) < 1e-6 and share[10:90].min() > .3 and share[10:90].max() < .7


def test_too_many_spans_for_the_sentinels_are_refused():
  dataset = tf.data.Dataset.from_tensor_slices({'targets': [[3, 4, 5]]})
  with pytest.raises(ConfigError, match='sentinels'):
    objectives.corrupt_spans(dataset, {'inputs': 2048, 'targets': 2048}, features(), .5, 3)


@pytest.mark.parametrize('density, mean_span', [(d.density, d.mean_span) for d in objectives.UL2_DENOISERS
                                                if d.density])
def test_targets_that_are_too_short_for_the_spans_are_refused(density, mean_span):
  dataset = tf.data.Dataset.from_tensor_slices({'targets': [[3, 4, 5]]})
  needed = objectives.span_lengths(128, density, mean_span).targets
  objectives.corrupt_spans(dataset, {'inputs': 128, 'targets': needed}, features(), density, mean_span)
  with pytest.raises(ConfigError, match=f"'targets'\\] = {needed - 1} is too short: .* needs targets of {needed}$"):
    objectives.corrupt_spans(dataset, {'inputs': 128, 'targets': needed - 1}, features(), density, mean_span)


@pytest.mark.parametrize('objective', [objectives.ul2, objectives.prefix_lm])
def test_inputs_without_room_for_a_token_are_refused(objective):
  dataset = tf.data.Dataset.from_tensor_slices({'text': ['some text']})
  with seqio.utils.map_seed_manager(1), pytest.raises(ConfigError, match=r"\['inputs'\] is too short"):
    objective(dataset, sequence_length={'inputs': 1, 'targets': 128}, output_features=features())


@pytest.mark.parametrize('objective', [objectives.ul2, objectives.prefix_lm, objectives.full_lm])
def test_missing_lengths_are_refused(objective):
  dataset = tf.data.Dataset.from_tensor_slices({'text': ['some text']})
  with pytest.raises(ConfigError, match='task_feature_lengths'):
    objective(dataset, sequence_length={}, output_features=features())


# Feature conversion and packing.

TINY = [dict(inputs=[9, 4, 6, 1], targets=[3, 9, 1]), dict(inputs=[7, 8, 1], targets=[5, 1]),
        dict(inputs=[11, 12, 13, 1], targets=[14, 15, 16, 17, 1])]


def ragged(examples):
  """A data set of dictionaries of vectors of different lengths."""
  columns = {name: tf.ragged.constant([e[name] for e in examples], tf.int32) for name in examples[0]}
  dataset = tf.data.Dataset.range(len(examples))
  return dataset.map(lambda i: {name: column[i] for name, column in columns.items()})


def rows(dataset, converter, lengths):
  found = list(converter(dataset, lengths).as_numpy_iterator())
  return {key: np.stack([row[key] for row in found]) for key in found[0]}


@pytest.mark.parametrize('name, packed, targets_only', [('tiny_pack', True, True), ('tiny_nopack', False, True),
                                                        ('tiny_pack_lossall', True, False),
                                                        ('tiny_nopack_lossall', False, False)])
def test_tiny_examples_convert_to_the_golden_rows(name, packed, targets_only):
  lengths = {'inputs': 7, 'targets': 8}
  got = rows(ragged(TINY), feature_converters.decoder_converter(lengths, packed, targets_only), lengths)
  golden = {key.split('/')[1]: value for key, value in load_arrays('ul2.npz').items() if key.startswith(name + '/')}
  assert golden
  for key, value in golden.items():
    np.testing.assert_array_equal(got[key], value, err_msg=key)


@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('objective, conversion', [('ul2', 'ul2'), ('full_lm', 'fulllm')])
def test_golden_examples_convert_to_the_golden_rows(objective, conversion, packed):
  golden = {key.split('/')[1]: value for key, value in load_arrays('ul2.npz').items()
            if key.startswith(f'conv_{conversion}_{"pack" if packed else "nopack"}/')}
  lengths = {'targets': 256} if objective == 'full_lm' else {'inputs': 128, 'targets': 128}
  examples = [{key: value.tolist() for key, value in e.items()} for e in golden_examples(objective)]
  got = rows(ragged(examples), feature_converters.decoder_converter(lengths, packed), lengths)
  assert golden
  for key, value in golden.items():
    assert len(value) > 0
    np.testing.assert_array_equal(got[key][:len(value)], value, err_msg=key)


@pytest.mark.parametrize('seed, count, with_inputs', [(1, 60, False), (2, 60, True), (3, 12, False), (4, 1, False)])
def test_packing_equals_seqio(seed, count, with_inputs):
  random = np.random.RandomState(seed)
  lengths = {'inputs': 9, 'targets': 12} if with_inputs else {'targets': 12}
  examples = [{name: random.randint(1, 50, random.randint(1, length + 4)).tolist()
               for name, length in lengths.items()} for _ in range(count)]
  expected = rows(ragged([{k: v[:lengths[k]] for k, v in e.items()} for e in examples]),
                  seqio.DecoderFeatureConverter(pack=True), lengths)
  got = rows(ragged(examples), feature_converters.decoder_converter(lengths, packed=True), lengths)
  assert set(got) == set(expected)
  for key, value in expected.items():
    np.testing.assert_array_equal(got[key], value, err_msg=key)


def test_shared_vocabulary_is_what_objectives_see():
  vocabulary.configure(TEST_MODEL, 300)
  try:
    shared = {name: seqio.Feature(vocabulary=vocabulary.shared(), add_eos=True) for name in ('inputs', 'targets')}
    dataset = tf.data.Dataset.from_tensors({'text': load_json('ul2_docs.json')[0]})
    with seqio.utils.map_seed_manager(1):
      dataset = objectives.tokenize(dataset, shared)
    assert tuple(next(iter(dataset))['targets'].numpy()) == golden_documents()[0]
  finally:
    vocabulary.configure()
