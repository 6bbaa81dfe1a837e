"""Text in, text out: stop strings, streaming, letters of several bytes, order, and scores."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax import decoding, scoring, text_decoding, vocabulary
from openmoe_jax.config import ConfigError, ModelConfig
from openmoe_jax.loading import Model
from openmoe_jax.names import from_t5x_names
from tests import numpy_reference

TEXTS = ('def main(', 'x', 'Über allem steht', 'import os\n\nprint(os.')


@functools.lru_cache(maxsize=None)
def model():
  """A model of random numbers: it writes pieces at random, bytes among them."""
  config = ModelConfig(vocab_size=8576, emb_dim=16, mlp_dim=16, num_heads=4, head_dim=4, num_layers=2, moe_interval=2,
                       num_experts=4, group_size=16, dtype='float32', scan_blocks=False)
  params = jax.tree.map(jnp.asarray, from_t5x_names(config, numpy_reference.random_params(config, 0)))
  return Model(config, params, 0, {'data': {'vocabulary': '', 'extra_ids': 300}})


def generated(texts=TEXTS, new=20, **options):
  return model().generate(texts, new, **{'eos_id': None, **options})


class Scripted:
  """In the place of `decoding.Generation`: what the model writes is given, a token a step for each prompt."""

  def __init__(self, rows):
    self.rows, self.count = rows, 0
    self.ended = np.zeros((len(rows), 1), bool)

  def __call__(self, config, params, ids, lengths, max_new_tokens, **options):
    self.max_new_tokens = max_new_tokens
    return self

  def advance(self, num_tokens):
    self.count = min(self.count + max(num_tokens, 0), self.max_new_tokens)

  def finish(self, rows):
    self.ended |= rows

  def done(self):
    return self.ended | np.array([[self.count >= len(row)] for row in self.rows])

  def result(self):
    tokens = np.zeros((len(self.rows), 1, self.max_new_tokens), np.int32)
    lengths = np.zeros((len(self.rows), 1), np.int32)
    for i, row in enumerate(self.rows):
      n = min(self.count, len(row))
      tokens[i, 0, :n], lengths[i, 0] = row[:n], n
    return decoding.Generated(tokens, lengths, np.zeros(tokens.shape, np.float32))


@pytest.fixture
def scripted(monkeypatch):
  """Lets the model continue a prompt with given texts."""
  def script(prompt, continuation, **options):
    tokenizer = model().vocabulary
    whole, start = tokenizer.encode(prompt + continuation), tokenizer.encode(prompt)
    assert whole[:len(start)] == start, 'choose another prompt: its last piece changes with what follows'
    monkeypatch.setattr(decoding, 'Generation', Scripted([[int(t) for t in whole[len(start):]]]))
    return [prompt], options
  return script


LETTERS = 'return 1\n\nclass 鼎 naïve 🦊: pass # end'


def test_the_text_is_what_the_tokens_say(scripted):
  texts, options = scripted('def f():\n  ', LETTERS)
  assert text_decoding.generate_texts(model(), texts, 200, eos_id=None, **options) == [LETTERS]


@pytest.mark.parametrize('stop, want', (
    ('\n\nclass', 'return 1'), (['zzz', ' naïve'], 'return 1\n\nclass 鼎'), ('🦊', 'return 1\n\nclass 鼎 naïve '),
    (['# end', '1'], 'return '), ('nothing of this', LETTERS), ((), LETTERS)))
def test_stop_strings_end_a_text_wherever_tokens_are_cut(scripted, stop, want):
  texts, _ = scripted('def f():\n  ', LETTERS)
  assert text_decoding.generate_texts(model(), texts, 200, stop=stop, eos_id=None) == [want]


@pytest.mark.parametrize('chunk', (1, 3, 100))
@pytest.mark.parametrize('stop', ((), ('\n\nclass',), ('🦊', 'zzz')))
def test_pieces_are_whole_letters_and_add_up(scripted, chunk, stop):
  texts, _ = scripted('def f():\n  ', LETTERS)
  want, = text_decoding.generate_texts(model(), texts, 200, stop=stop, eos_id=None)
  scripted('def f():\n  ', LETTERS)
  pieces = list(text_decoding.stream_texts(model(), texts, 200, stop=stop, eos_id=None, chunk=chunk))
  assert ''.join(piece.text for piece in pieces) == want
  assert not any('\ufffd' in piece.text for piece in pieces)
  assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
  assert chunk == 100 or len(pieces) > 1


def test_streaming_gives_what_generate_gives():
  want, got = generated(), [''] * len(TEXTS)
  for piece in text_decoding.stream_texts(model(), TEXTS, 20, eos_id=None, chunk=7):
    got[piece.prompt] += piece.text
  assert got == want and all(want)


@pytest.mark.slow
def test_neither_order_nor_batch_size_matters():
  want = generated(temperature=1., seed=5)
  assert generated(temperature=1., seed=5, batch_size=1) == want == generated(temperature=1., seed=5, batch_size=3)
  greedy = generated()
  assert generated(TEXTS[::-1]) == greedy[::-1]
  assert greedy != want


def test_prompts_may_be_ids():
  ids = text_decoding.encode(model(), TEXTS)
  assert generated([ids[0], TEXTS[1], *ids[2:]]) == generated()


@pytest.mark.slow
def test_samples_of_a_text():
  samples = generated(TEXTS[:2], temperature=1., num_samples=3)
  assert [len(row) for row in samples] == [3, 3] and len({text for row in samples for text in row}) == 6
  assert [row[0] for row in samples] == generated(TEXTS[:2], temperature=1.)


@pytest.mark.slow
def test_a_part_of_a_longer_list():
  """A list that is gone on with later, as a resumed file is: numbers of the whole list give the same draws."""
  want = generated(temperature=1., seed=5)
  assert generated(TEXTS[2:], temperature=1., seed=5, row_ids=[2, 3]) == want[2:]
  assert generated(TEXTS[2:], temperature=1., seed=5) != want[2:]
  pieces = text_decoding.stream_texts(model(), TEXTS[3:], 20, eos_id=None, temperature=1., seed=5, row_ids=[3], chunk=20)
  assert ''.join(piece.text for piece in pieces) == want[3]


def test_an_eos_within_the_prompt_ends_nothing(monkeypatch):
  """Some vocabularies make one of a written-out '</s>': what counts is what is generated."""
  tokenizer = model().vocabulary
  encode = lambda text: [i for n, part in enumerate(text.split('</s>')) for i in [1] * (n > 0) + tokenizer.encode(part)]
  known = types.SimpleNamespace(encode=encode, eos_id=1, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.tokenizer)
  fake = types.SimpleNamespace(config=model().config, variables=None, vocabulary=known)
  script = [int(i) for i in tokenizer.encode('f()') + [1] + tokenizer.encode('g()')]
  monkeypatch.setattr(decoding, 'Generation', Scripted([script]))
  assert text_decoding.generate_texts(fake, ['x</s>y ='], 50, eos_id=None) == ['f()']


@pytest.mark.slow
def test_eos_is_the_vocabularys():
  free = decoding.generate(model().config, model().params, [model().vocabulary.encode('x')], [1], 20, eos_id=None)
  with_eos = types.SimpleNamespace(encode=model().vocabulary.encode, eos_id=int(free.tokens[0, 4]),
                                   vocab_size=8492, tokenizer=model().vocabulary.tokenizer)
  fake = types.SimpleNamespace(config=model().config, variables=model().variables, vocabulary=with_eos)
  text, = text_decoding.generate_texts(fake, ['x'], 20)
  end = free.tokens[0].tolist().index(with_eos.eos_id)
  assert text == text_decoding.decode(model(), model().vocabulary.encode('x') + free.tokens[0, :end].tolist())[1:]


def test_scores_are_those_of_the_ids():
  inputs, targets = ['def main(', '', 'x = '], ['self):', 'import os', '1']
  got = model().score(inputs, targets)
  encode = model().vocabulary.encode
  for i, (a, b) in enumerate(zip(inputs, targets)):
    ids = np.asarray([encode(a) + encode(b)])
    want = scoring.score(model().config, model().params, ids, [ids.shape[1]], [len(encode(a))])
    np.testing.assert_allclose(got.log_probs[i], want.log_probs[0], rtol=0, atol=1e-5)  # other shapes, other sums
    assert got.num_targets[i] == len(encode(b))
  with_eos = model().score(inputs, targets, append_eos=True, batch_size=1)
  assert (with_eos.num_targets == got.num_targets + 1).all() and (with_eos.log_probs < got.log_probs).all()


@pytest.mark.parametrize('call, message', (
    (lambda m: m.generate('def main('), 'must be a list of strings; one string was given'),
    (lambda m: m.generate([b'x', 3]), r'texts\[0\] is a bytes'),
    (lambda m: m.generate(['x', '']), r"texts\[1\] = '' has no tokens"),
    (lambda m: m.generate(['x'], stop=['']), 'stop holds an empty string'),
    (lambda m: m.generate(['x'], num_samples=0), 'num_samples = 0'),
    (lambda m: m.generate(['x', 'y'], row_ids=[3]), '1 row_ids for 2 texts'),
    (lambda m: m.generate(['a b c d e f g'], window=4), r'texts\[0\] has \d+ tokens: .* window of 4'),
    (lambda m: m.score(['x'], ['y', 'z']), '1 inputs, but 2 targets'),
    (lambda m: m.score(['x'], ['']), r"targets\[0\] = '' has no tokens"),
    (lambda m: m.score(['a b c d e f'], ['g h'], window=4), 'more than the window of 4 positions'),
    (lambda m: m.generate(['x'], max_new_tokens=0), 'max_new_tokens = 0')))
def test_mistakes_are_named(call, message):
  with pytest.raises(ConfigError, match=message):
    call(model())


def test_another_vocabulary_is_noticed():
  small = types.SimpleNamespace(config=model().config.replace(vocab_size=128), variables=None,
                                vocabulary=vocabulary.get())
  with pytest.raises(ConfigError, match='this is not the vocabulary it was trained with'):
    text_decoding.generate_texts(small, ['def main('], 3)
