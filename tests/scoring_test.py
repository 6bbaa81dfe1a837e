"""Log-likelihoods of given tokens: against a plain forward pass, and independence of the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax import partitioning, scoring
from openmoe_jax.config import ConfigError, MeshConfig, ModelConfig
from openmoe_jax.model import OpenMoE
from openmoe_jax.names import from_t5x_names
from tests import numpy_reference

DIRECT = 1e-5  # of a sum of up to 20 log-probabilities of about -4, each right to float32's last bits
LENGTHS = np.array([20, 1, 7, 13, 20])
PREFIXES = np.array([0, 0, 7, 5, 19])


def model(**changes) -> ModelConfig:
  values = dict(vocab_size=48, emb_dim=16, mlp_dim=16, num_heads=4, head_dim=4, num_layers=2, moe_interval=2,
                num_experts=8, group_size=16, dtype='float32', scan_blocks=False, loss_chunk_tokens=32)
  return ModelConfig(**{**values, **changes})


@functools.lru_cache(maxsize=None)
def params_of(config):
  return jax.tree.map(jnp.asarray, from_t5x_names(config, numpy_reference.random_params(config, 0)))


def rows():
  tokens = np.random.RandomState(0).randint(1, 48, (5, 20))
  return np.where(np.arange(20) < LENGTHS[:, None], tokens, 0)


def directly(config, tokens):
  """Log-probabilities [B, L, V] of one plain forward pass."""
  batch = {'decoder_input_tokens': np.pad(tokens, ((0, 0), (1, 0)))[:, :-1], 'decoder_target_tokens': tokens,
           'decoder_causal_attention': (np.arange(20) <= PREFIXES[:, None]).astype(np.int32)}
  return np.asarray(jax.nn.log_softmax(jax.jit(lambda p: OpenMoE(config).apply({'params': p}, batch))(params_of(config))))


def expected(config, tokens):
  log_probs = directly(config, tokens)
  counted = (np.arange(20) >= PREFIXES[:, None]) & (np.arange(20) < LENGTHS[:, None])
  chosen = np.take_along_axis(log_probs, tokens[..., None], -1)[..., 0]
  return np.where(counted, chosen, 0).sum(1, dtype=np.float64), (
      (log_probs.argmax(-1) == tokens) | ~counted).all(1)


@pytest.mark.parametrize('changes', ({}, {'scan_blocks': True}, {'inputs_bidirectional_attention': True}))
def test_equals_a_forward_pass(changes):
  config, tokens = model(**changes), rows()
  got = scoring.score(config, params_of(config), tokens, LENGTHS, PREFIXES)
  want, greedy = expected(config.replace(capacity_mode='none'), tokens)
  np.testing.assert_allclose(got.log_probs, want, rtol=0, atol=DIRECT)
  np.testing.assert_array_equal(got.greedy, greedy)
  np.testing.assert_array_equal(got.num_targets, LENGTHS - PREFIXES)
  assert got.log_probs[2] == 0 and got.greedy[2]  # nothing to score


def test_mode_t5x_drops_what_the_forward_pass_drops():
  config, tokens = model(eval_capacity_factor=.5), rows()
  got = scoring.score(config, params_of(config), tokens, LENGTHS, PREFIXES, 't5x')
  want, _ = expected(config, tokens)
  np.testing.assert_allclose(got.log_probs, want, rtol=0, atol=DIRECT)
  whole = scoring.score(config, params_of(config), tokens, LENGTHS, PREFIXES)
  assert np.abs(whole.log_probs - got.log_probs).max() > 1e-3


def test_rows_know_nothing_of_their_neighbours():
  config, tokens = model(), rows()
  together = scoring.score(config, params_of(config), tokens, LENGTHS, PREFIXES)
  for row, length in enumerate(LENGTHS):
    alone = scoring.score(config, params_of(config), tokens[row:row + 1, :length], LENGTHS[row:row + 1],
                          PREFIXES[row:row + 1])
    np.testing.assert_allclose(alone.log_probs[0], together.log_probs[row], rtol=0, atol=DIRECT)
  wide = scoring.score(config, params_of(config), np.pad(tokens, ((0, 0), (0, 50))), LENGTHS, PREFIXES)
  np.testing.assert_array_equal(wide.log_probs, together.log_probs)  # the same program


@pytest.mark.slow
def test_greedy_finds_the_likeliest_continuation():
  config = model()
  tokens, lengths = rows()[:1], np.array([20])
  row = tokens.copy()
  for position in range(17, 20):  # each position takes what the ones before make likeliest
    batch = {'decoder_input_tokens': np.pad(row, ((0, 0), (1, 0)))[:, :-1], 'decoder_target_tokens': row}
    logits = OpenMoE(config.replace(capacity_mode='none')).apply({'params': params_of(config)}, batch)
    row[0, position] = int(logits[0, position, 1:].argmax()) + 1
    if int(logits[0, position].argmax()) == 0:
      pytest.fail('the start id is the likeliest here: choose other tokens for this test')
  assert scoring.score(config, params_of(config), row, lengths, np.array([17])).greedy[0]
  row[0, 18] = row[0, 18] % 47 + 1
  assert not scoring.score(config, params_of(config), row, lengths, np.array([17])).greedy[0]


@pytest.mark.parametrize('shape', (pytest.param((2, 4, 1), marks=pytest.mark.slow), (2, 2, 2)))
def test_mesh_equals_one_device(shape):
  config, tokens = model(), rows()
  mesh = partitioning.make_mesh(MeshConfig(*shape))
  params = jax.device_put(params_of(config), partitioning.tree_shardings(params_of(config), mesh))
  got = scoring.score(config, params, tokens, LENGTHS, PREFIXES, mesh=mesh)
  want = scoring.score(config, params_of(config), tokens, LENGTHS, PREFIXES)
  np.testing.assert_allclose(got.log_probs, want.log_probs, rtol=0, atol=DIRECT)
  np.testing.assert_array_equal(got.greedy, want.greedy)


@pytest.mark.parametrize('chunk', (1, 7, 32, 1000))
def test_chunks_do_not_matter(chunk):
  rng = np.random.RandomState(0)
  hidden, kernel = (jnp.asarray(rng.randn(*shape), jnp.float32) for shape in ((3, 9, 4), (4, 11)))
  targets = jnp.asarray(rng.randint(0, 11, (3, 9)))
  log_probs, matches = scoring.log_likelihoods(hidden, kernel, targets, chunk)
  want = np.asarray(jax.nn.log_softmax(hidden @ kernel))
  np.testing.assert_allclose(log_probs, np.take_along_axis(want, np.asarray(targets)[..., None], -1)[..., 0], atol=2e-6)
  np.testing.assert_array_equal(matches, want.argmax(-1) == targets)


@pytest.mark.parametrize('change, message', (
    ({'prefix_lengths': [3, 3]}, r'prefix_lengths\[1\] = 3 must be 0 to the length of the row, 2'),
    ({'prefix_lengths': [1]}, 'prefix_lengths must be 2 integers'),
    ({'prefix_lengths': [1., 1.]}, 'not float64'),
    ({'lengths': [0, 1]}, r'lengths\[0\] = 0: a row has 1 to 3 tokens'),
    ({'tokens': [[5, 6, 48], [1, 2, 0]]}, r'tokens\[0, 2\] = 48 is no token'),
    ({'capacity_mode': 'colossalai'}, "valid: 't5x', 'none'")))
def test_mistakes_are_named(change, message):
  config = model()
  values = {'tokens': [[5, 6, 7], [1, 2, 0]], 'lengths': [3, 2], 'prefix_lengths': [1, 0], **change}
  with pytest.raises(ConfigError, match=message):
    scoring.score(config, params_of(config), **values)
