"""The next token: against numpy, and by counting."""

import functools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax import sampling
from openmoe_jax.config import ConfigError
from openmoe_jax.sampling import Sampling

VOCAB = 12
DRAWS = 4000


def softmax(x):
  x = np.exp(x - x.max())
  return x / x.sum()


def reference(logits, temperature, top_k, top_p):
  """The distribution one draws from: float64 [V]."""
  logits = np.asarray(logits, np.float64) / temperature
  order = np.argsort(-logits, kind='stable')
  keep = order[:top_k or len(order)]
  p = np.zeros(len(logits))
  p[keep] = softmax(logits[keep])
  ranked = np.argsort(-p, kind='stable')
  fewest = 1 + int(np.searchsorted(np.cumsum(p[ranked]), top_p - 1e-9))
  p[ranked[fewest:]] = 0
  return p / p.sum()


@functools.partial(jax.jit, static_argnames=('greedy', 'top_k', 'nucleus'))
def choose(logits, keys, temperature, top_p, greedy, top_k, nucleus):
  return sampling.choose(logits, keys, temperature, top_p, greedy=greedy, top_k=top_k, nucleus=nucleus)


def draw(logits, s: Sampling, seed=0, draws=DRAWS):
  """Tokens and log-probabilities of many rows with the same logits."""
  keys = sampling.row_keys(seed, jnp.arange(draws), 1)
  rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, len(logits)))
  return tuple(map(np.asarray, choose(rows, keys, s.temperature or 1., s.top_p, s.temperature == 0, s.top_k,
                                       s.top_p < 1)))


@pytest.mark.parametrize('s', (Sampling(1.), Sampling(0.5), Sampling(2., 5), Sampling(1., 0, 0.7), Sampling(1.5, 6, 0.8),
                               Sampling(1., 1), Sampling(1., 0, 0.01)))
def test_frequencies(s):
  """Chi-squared against the numpy distribution; ids that should never come, never do."""
  logits = np.random.RandomState(1).randn(VOCAB) * 1.5
  want = reference(logits, *s)
  tokens, log_probs = draw(logits, s)
  counts = np.bincount(tokens, minlength=VOCAB)
  assert not counts[want == 0].any()
  possible = want > 0
  chi_squared = np.sum((counts - DRAWS * want)[possible] ** 2 / (DRAWS * want[possible]))
  assert chi_squared < 35  # 11 degrees of freedom: exceeded once in 4,000 seeds, and the seed is fixed
  np.testing.assert_allclose(log_probs, np.log(softmax(logits))[tokens], rtol=0, atol=1e-5)


@settings(max_examples=40)
@given(seed=st.integers(0, 10000), top_k=st.sampled_from((0, 1, 3, VOCAB)),
       top_p=st.sampled_from((0.05, 0.4, 0.8, 1.)), temperature=st.sampled_from((0.3, 1., 3.)))
def test_draws_come_from_the_candidates_and_reach_them(seed, top_k, top_p, temperature):
  """top_k first, top_p among what it leaves, after temperature: nothing else ever comes, everything likely does."""
  logits = np.random.RandomState(seed).randn(VOCAB) * 1.5
  want = reference(logits, temperature, top_k, top_p)
  counts = np.bincount(draw(logits, Sampling(temperature, top_k, top_p), seed, 500)[0], minlength=VOCAB)
  assert not counts[want == 0].any()
  assert counts[want > 0.05].all()  # missing one has a chance below 1e-11


def test_greedy_takes_the_lowest_of_equals():
  logits = np.zeros((3, VOCAB), np.float32)
  logits[0, [4, 7]] = 2.
  logits[1, VOCAB - 1] = 1.
  tokens, log_probs = choose(logits, sampling.row_keys(0, jnp.arange(3), 1), 1., 1., True, 0, False)
  np.testing.assert_array_equal(tokens, [4, VOCAB - 1, 0])
  np.testing.assert_allclose(log_probs[2], -np.log(VOCAB), rtol=1e-6)


@settings(max_examples=50)
@given(seed=st.integers(0, 10000), top_p=st.sampled_from((0.001, 0.3, 0.5, 0.9, 0.999, 1.)))
def test_nucleus_is_the_fewest_likeliest(seed, top_p):
  p = np.random.RandomState(seed).dirichlet(np.full(50, 0.3)).astype(np.float32)
  kept = np.asarray(jax.jit(sampling.in_nucleus)(p[None], top_p))[0]
  assert kept.any() and p[kept].min() > np.append(p[~kept], -1).max()
  if top_p < 1:  # the float32 sum of all may be just below 1
    assert p[kept].sum(dtype=np.float64) >= top_p - 1e-6
  assert p[kept].sum(dtype=np.float64) - p[kept].min() < top_p + 1e-6


def test_keys_follow_from_the_row_and_the_sample_alone():
  few = jax.random.key_data(sampling.row_keys(3, jnp.asarray([7, 2]), 2))
  many = jax.random.key_data(sampling.row_keys(3, jnp.arange(9), 5)).reshape(9, 5, -1)
  np.testing.assert_array_equal(few.reshape(2, 2, -1), many[np.asarray([7, 2]), :2])
  assert len(np.unique(many.reshape(45, -1), axis=0)) == 45
  other = jax.random.key_data(sampling.row_keys(4, jnp.arange(9), 5)).reshape(9, 5, -1)
  assert (other != many).any(axis=-1).all()


@pytest.mark.parametrize('s, message', (
    (Sampling(-1.), 'temperature = -1.0'), (Sampling(float('nan')), 'temperature = nan'),
    (Sampling(1., -1), 'top_k = -1'), (Sampling(1., VOCAB + 1), "top_k = 13 must be 0 .* vocabulary's 12"),
    (Sampling(1., 0, 0.), 'top_p = 0.0'), (Sampling(1., 0, 1.5), 'top_p = 1.5')))
def test_settings_out_of_range(s, message):
  with pytest.raises(ConfigError, match=message):
    sampling.check(s, VOCAB)
