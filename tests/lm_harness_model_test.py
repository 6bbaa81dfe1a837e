"""The model as lm-evaluation-harness sees it: its log-likelihoods, windows, continuations and cache."""

import logging

import jax
import numpy as np
import pytest

from tests import tiny_harness  # first: skips without lm-eval
from lm_eval.api.model import CachingLM, LM

from openmoe_jax import decoding, partitioning, scoring, text_decoding
from openmoe_jax.config import ConfigError, MeshConfig
from openmoe_jax.lm_harness_model import HarnessModel
from openmoe_jax.loading import Model
from openmoe_jax.model import OpenMoE
from tests.tiny_harness import WINDOW, model, requests

pytestmark = pytest.mark.lm_eval

CLOSE = dict(rtol=0, atol=1e-5)  # of sums of up to 30 log-probabilities of about -9
# Vocabulary and splits agree: these continuations have the same pieces behind their contexts as alone.
PAIRS = (('def main(', 'self):'), ('import os', '\nprint(1)'), ('', 'import os'), ('x = [1, 2, 3]\ny =', ' x'),
         ('Über allem', ' steht'), ('if a is None', ':\n  return'), ('class A:\n  def f(self): return self', '.x'))


def harness(batch_size=2, **options):
  return HarnessModel(model(), batch_size, **options)


def encode(text):
  return text_decoding.encode(model(), [text])[0]


@jax.jit
def forward(ids):
  """Log-probabilities [1, L, V] of a plain forward pass over ids, [1, L]."""
  batch = {'decoder_input_tokens': jax.numpy.pad(ids, ((0, 0), (1, 0)))[:, :-1], 'decoder_target_tokens': ids}
  config = model().config.replace(capacity_mode='none')
  return jax.nn.log_softmax(OpenMoE(config).apply({'params': model().params}, batch))


def log_probs_of(ids):
  """[len(ids), V], at each of the ids."""
  row = np.zeros((1, 40), np.int32)  # one program for all
  row[0, :len(ids)] = ids
  return np.asarray(forward(row), np.float64)[0, :len(ids)]


def directly(context, continuation):
  """Log-likelihood and greedy match of ids by one forward pass."""
  log_probs = log_probs_of(context + continuation)[len(context):]
  return log_probs[np.arange(len(continuation)), continuation].sum(), (log_probs.argmax(-1) == continuation).all()


def test_log_likelihoods_by_lm_eval_by_ids_by_text_and_by_a_forward_pass():
  got = harness().loglikelihood(requests(*PAIRS), disable_tqdm=True)
  by_text = model().score(*zip(*PAIRS))
  for i, (context, continuation) in enumerate(PAIRS):
    a, b = encode(context), encode(continuation)
    assert encode(context + continuation) == a + b, 'choose texts that the vocabulary splits here'
    by_ids = scoring.score(model().config, model().params, [a + b], [len(a + b)], [len(a)])
    want, greedy = directly(a, b)
    np.testing.assert_allclose([got[i][0], by_text.log_probs[i], by_ids.log_probs[0]], want, **CLOSE)
    assert got[i][1] == by_text.greedy[i] == by_ids.greedy[0] == greedy
  assert isinstance(got[0][0], float) and isinstance(got[0][1], bool)


def test_is_greedy():
  ids, likeliest = encode('def main('), []
  for _ in range(3):
    likeliest.append(int(log_probs_of(ids + likeliest + [1])[-1].argmax()))
  other = [*likeliest[:2], likeliest[2] % 100 + 1]
  got = harness()._loglikelihood_tokens([(None, ids, likeliest), (None, ids, other)], disable_tqdm=True)
  assert [greedy for _, greedy in got] == [True, False]


@pytest.mark.parametrize('context, continuation, split', (
    ('x = ', '1', ('x =', ' 1')), ('x =\n\n', 'y', ('x =', '\n\ny')), ('ret', 'urn x', None), ('  ', 'x', ('', '  x'))))
def test_pairs_are_tokenised_as_one_text(context, continuation, split):
  """Spaces at the end of a context belong to the continuation, which is as many pieces of the whole text as the context
  leaves."""
  own = encode(context.rstrip())
  want, _ = directly(own, encode(context + continuation)[len(own):])
  (got, _), = harness().loglikelihood(requests((context, continuation)), disable_tqdm=True)
  np.testing.assert_allclose(got, want, **CLOSE)
  if split:
    assert harness().loglikelihood(requests(split), disable_tqdm=True)[0][0] == got


def test_neither_batch_nor_order_nor_padding_matters():
  want = np.array(harness().loglikelihood(requests(*PAIRS), disable_tqdm=True))
  for size in (1, 16):
    got = harness(batch_size=size).loglikelihood(requests(*PAIRS[::-1]), disable_tqdm=True)
    np.testing.assert_allclose(got[::-1], want, **CLOSE)
  longer = harness(window=200).loglikelihood(requests(*PAIRS, ('x' * 150, 'y')), disable_tqdm=True)
  np.testing.assert_allclose(longer[:-1], want, **CLOSE)


def test_one_program_for_each_size():
  long = ('x = [1, 2, 3]\n' * 5, 'y')
  scoring.run.clear_cache()
  asked = [long] * 4 + [('y =', f' {i}') for i in range(8)] + list(PAIRS[:4])
  assert {decoding.bucket(len(encode(a + b))) for a, b in asked} == {32, 64}
  HarnessModel(model(), 4, 100).loglikelihood(requests(*asked), disable_tqdm=True)
  assert scoring.run._cache_size() == 2


TEXT = 'def main(args):\n  for arg in args:\n    print(arg, len(arg))\n  return [len(arg) for arg in args]\n' * 2


@pytest.mark.parametrize('text', (TEXT, 'import os', ''))
def test_rolling(text):
  """Every token once, WINDOW - 1 at a time: with the start id and a token before them they fill a window, whose last
  token is not fed. The rest of the text gets a window full of context."""
  ids, span = encode(text), WINDOW - 1
  want = [directly(ids[max(min(at + span, len(ids)) - WINDOW, 0):at], ids[at:at + span])[0]
          for at in range(0, len(ids), span)]
  got = harness().loglikelihood_rolling(requests((text,), ('x',), (text,)), disable_tqdm=True)
  # One unit in the last place of the float32 sums (629 of the long text: 6e-5), and of each token's log-probability.
  np.testing.assert_allclose(got[0], sum(want), rtol=2**-23, atol=1e-5 * max(len(want), 1))
  np.testing.assert_allclose(got[1], directly([], encode('x'))[0], **CLOSE)
  assert abs(got[2] - got[0]) <= 1e-5 * len(want) + 2**-23 * abs(got[0]) and (len(ids) > 2 * span) == (text == TEXT)


def test_contexts_are_cut_from_the_left(caplog):
  lm = harness()
  ids = encode(TEXT.rstrip() + ' x')
  start = len(encode(TEXT.rstrip()))
  context, continuation = ids[:start], ids[start:]
  with caplog.at_level(logging.WARNING):
    (got, _), (other, _) = lm.loglikelihood(requests((TEXT.rstrip(), ' x'), ('y =', ' x')), disable_tqdm=True)
  want, _ = directly(context[-(WINDOW - len(continuation)):], continuation)
  np.testing.assert_allclose(got, want, **CLOSE)
  np.testing.assert_allclose(other, directly(encode('y ='), encode(' x'))[0], **CLOSE)
  assert caplog.messages == [f'loglikelihood: 1 of 2 contexts do not fit the window of {WINDOW} positions and are cut '
                             'from the left']
  assert lm.get_model_info()['truncated_contexts'] == {'loglikelihood': 1}


CONTEXTS = ('def main(', 'x', 'Über allem steht', 'import os\n\nprint(os.', 'x', 'class A')


def generate(*args, **options):
  return harness(**options).generate_until(requests(*args), disable_tqdm=True)


def test_continuations_are_the_models():
  kwargs = {'until': [], 'max_gen_toks': 12}
  want = model().generate(CONTEXTS, 12, batch_size=2)
  assert generate(*((context, kwargs) for context in CONTEXTS)) == want and all(want)
  stop = want[0][2:4]
  mixed = [(c, {'until': [stop], 'max_gen_toks': 12}) if i % 2 == 0 else (c, {'until': stop, 'max_new_tokens': 5})
           for i, c in enumerate(CONTEXTS)]
  got = generate(*mixed)
  shorter = model().generate(CONTEXTS, 5, batch_size=2)
  assert got == [text_decoding.cut((want if i % 2 == 0 else shorter)[i], [stop])[0] for i in range(len(CONTEXTS))]
  assert got[0] == want[0][:want[0].index(stop)]


def test_long_prompts_are_cut_from_the_left():
  lm = harness()
  got = lm.generate_until(requests((TEXT, {'max_gen_toks': 10}), ('x', {'max_gen_toks': 10})), disable_tqdm=True)
  assert got == model().generate([encode(TEXT)[-(WINDOW - 10):], 'x'], 10, batch_size=2)
  assert lm.truncated == {'generate_until': 1}


def test_sampling():
  sampled = {'do_sample': True, 'max_gen_toks': 8, 'top_k': 500, 'top_p': 0.9, 'temperature': 0.7}
  args = [(context, sampled) for context in CONTEXTS]
  got = generate(*args)
  assert got[1] != got[4], 'a prompt that is asked twice is answered twice'
  assert generate(*args[2:]) == [*got[2:4], got[1], got[5]], 'what is asked beside it does not matter'
  assert generate(*args, seed=1) != got


@pytest.mark.parametrize('kwargs, wanted', (
    ({}, (256, (0, 0, 1))), ({'do_sample': True, 'max_tokens': 8, 'num_beams': 1}, (8, (1, 0, 1))),
    ({'temperature': 0.5, 'top_k': 3}, (256, (0.5, 3, 1))),
    ({'do_sample': False, 'temperature': 0.5}, (256, (0, 0, 1))),
    ({'do_sample': True, 'temperature': 0.5, 'top_p': 0.9}, (256, (0.5, 0, 0.9)))))
def test_settings(kwargs, wanted):
  assert harness(window=300).settings(kwargs) == (*wanted, ())
  assert harness(window=300).settings({**kwargs, 'until': ['a', '', 'b']}) == (*wanted, ('a', 'b'))


def test_a_cache_is_filled_batch_by_batch_and_used(tmp_path, monkeypatch):
  asked = [('loglikelihood', list(PAIRS)), ('loglikelihood_rolling', [(TEXT,)]),
           ('generate_until', [(context, {'max_gen_toks': 4}) for context in CONTEXTS[:4]])]
  first = CachingLM(harness(batch_size=2), str(tmp_path / 'cache.db'))
  answers = [getattr(first, kind)(requests(*args)) for kind, args in asked]

  def refuse(*args, **kwargs):
    raise AssertionError('the model is asked again')

  monkeypatch.setattr(scoring, 'score', refuse)
  monkeypatch.setattr(text_decoding, 'generate_texts', refuse)
  again = CachingLM(harness(), str(tmp_path / 'cache.db'))
  got = [getattr(again, kind)(requests(*args)) for kind, args in asked]
  assert [list(map(tuple, got[0])), *got[1:]] == answers

  kept = []
  stopped = harness(batch_size=2)
  stopped.cache_hook = type('Hook', (), {'add_partial': lambda self, *what: kept.append(what)})()
  monkeypatch.undo()
  real, calls = scoring.score, []

  def once(*args, **kwargs):
    if calls:
      raise KeyboardInterrupt
    calls.append(1)
    return real(*args, **kwargs)

  monkeypatch.setattr(scoring, 'score', once)
  with pytest.raises(KeyboardInterrupt):
    stopped.loglikelihood(requests(*PAIRS), disable_tqdm=True)
  longest = sorted(PAIRS, key=lambda pair: -len(encode(''.join(pair))))[:2]
  assert [(kind, key) for kind, key, _ in kept] == [('loglikelihood', pair) for pair in longest]


@pytest.mark.slow
def test_mesh_equals_one_device():
  mesh = partitioning.make_mesh(MeshConfig(2, 2, 2))
  params = jax.device_put(model().params, partitioning.tree_shardings(model().params, mesh))
  lm = HarnessModel(Model(model().config, params, 0, model().run, mesh))
  got, want = (m.loglikelihood(requests(*PAIRS), disable_tqdm=True) for m in (lm, harness()))
  np.testing.assert_allclose(got, want, **CLOSE)
  kwargs = {'max_gen_toks': 6}
  assert lm.generate_until(requests(('x', kwargs), ('def main(', kwargs)), disable_tqdm=True) == generate(
      ('x', kwargs), ('def main(', kwargs))


def test_mode_t5x():
  """Every setting reaches the model: here the scores are those of the original's capacities."""
  config = model().config.replace(eval_capacity_factor=0.25, min_expert_capacity=1)
  tight = Model(config, model().params, 0, model().run)
  (got, _), = HarnessModel(tight, capacity_mode='t5x').loglikelihood(requests(PAIRS[0]), disable_tqdm=True)
  a, b = map(encode, PAIRS[0])
  want = scoring.score(config, tight.params, [a + b], [len(a + b)], [len(a)], 't5x').log_probs[0]
  assert got == want != pytest.approx(directly(a, b)[0], abs=1e-3)


def test_what_lm_eval_asks_for():
  lm = harness()
  assert isinstance(lm, LM) and (lm.rank, lm.world_size) == (0, 1)
  assert (lm.max_length, lm.prefix_token_id, lm.eot_token_id) == (WINDOW, 0, 1)
  assert harness(window=100).max_length == 100
  assert HarnessModel(Model(model().config, {}, 0, {'data': {}})).max_length == 2048
  info = lm.get_model_info()
  assert info['model_num_parameters'] == sum(np.size(x) for x in jax.tree.leaves(model().params))
  assert lm.loglikelihood([], disable_tqdm=True) == lm.generate_until([], disable_tqdm=True) == []


@pytest.mark.parametrize('call, message', (
    (lambda: harness(batch_size=0), 'batch_size = 0 must be at least 1'),
    (lambda: harness(window=1), 'window = 1 must be at least 2'),
    (lambda: harness().loglikelihood(requests(('x =', ''))), "the continuation '' of the context 'x =' has no token"),
    (lambda: harness().loglikelihood(requests(('x =', TEXT))), r'has \d+ tokens: more than the window of 32'),
    (lambda: generate(('x', {'max_gen_toks': 32})), 'max_gen_toks = 32 must be from 1 to 31: a context needs room'),
    (lambda: generate(('x', {})), 'max_gen_toks = 256 must be from 1 to 31'),
    (lambda: generate(('', {'max_gen_toks': 3})), 'the context of a continuation is an empty string'),
    (lambda: generate(('x', {'max_gen_toks': 3, 'num_beams': 4})), 'the generation setting num_beams = 4 is not known'),
    (lambda: generate(('x', {'max_gen_toks': 3, 'until': [3]})), r'until = \[3\] must be strings'),
    (lambda: generate(('x', {'max_gen_toks': 3, 'do_sample': True, 'top_p': 0})), 'top_p = 0')))
def test_mistakes_are_named(call, message):
  with pytest.raises(ConfigError, match=message):
    call()
