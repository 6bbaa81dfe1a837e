"""Rotary tables, masks and blocked attention against the original's numbers and a plain masked softmax."""

import functools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax.attention import (SelfAttention, apply_rope, attention_mask, blocked_attention, make_context,
                                   make_logit_mask, rope_tables)
from openmoe_jax.config import ConfigError, ModelConfig
from tests import golden

EVERYTHING = slice(None)
UNITS = 'units.npz'


def config(**changes) -> ModelConfig:
  values = dict(vocab_size=8, emb_dim=12, mlp_dim=4, num_heads=2, head_dim=4, num_layers=1, dtype='float32')
  return ModelConfig(**{**values, **changes})


def golden_context(name, bidirectional=False):
  batch = golden.load_arrays(f'batch_{name}.npz')
  return make_context(config(inputs_bidirectional_attention=bidirectional), batch)


# Units of the original.


def test_rope_tables():
  """sin and cos of up to 63 radians: an angle is known to 63 * 2^-24 = 4e-6, whoever computes it."""
  want = golden.load_arrays(UNITS)
  sin, cos = jax.jit(rope_tables, static_argnums=(0, 1))(64, 16)
  np.testing.assert_allclose(sin, want['rope_sin'], rtol=0, atol=4e-6)
  np.testing.assert_allclose(cos, want['rope_cos'], rtol=0, atol=4e-6)
  angle = np.arange(64)[:, None] * 10000. ** (-np.arange(0, 16, 2) / 16)
  np.testing.assert_allclose(sin, np.tile(np.sin(angle), 2), rtol=0, atol=4e-6)
  np.testing.assert_allclose(cos, np.tile(np.cos(angle), 2), rtol=0, atol=4e-6)


def test_rope_tables_of_full_size():
  """Every angle is a float32: a frequency below 1 is known to 2^-24, which 2,047 positions make 2^-13, and angles above
  1,024 are rounded by up to 2^-14 again."""
  length, head_dim = 2048, 128
  angle = np.arange(length)[:, None] * 10000. ** (-np.arange(0, head_dim, 2) / head_dim)
  for got, function in zip(rope_tables(length, head_dim), (np.sin, np.cos), strict=True):
    assert got.dtype == jnp.float32 and got.shape == (length, head_dim)
    np.testing.assert_allclose(got, np.tile(function(angle), 2), rtol=0, atol=2**-13 + 2**-14)


def test_rope_tables_are_constants():
  """Else XLA computes sines of every head and row again."""
  primitives = {eqn.primitive.name for eqn in jax.make_jaxpr(lambda: rope_tables(64, 16))().eqns}
  assert not primitives & {'sin', 'cos', 'pow', 'exp'}


def test_rope_with_the_tables_of_the_original():
  want = golden.load_arrays(UNITS)
  for name in ('q', 'k'):
    got = jax.jit(apply_rope)(want[f'rope_{name}'], want['rope_sin'], want['rope_cos'])
    np.testing.assert_allclose(got, want[f'rope_out_{name}'], rtol=1e-6, atol=1e-6)


def test_rope_from_positions():
  want = golden.load_arrays(UNITS)
  for name in ('q', 'k'):
    got = jax.jit(apply_rope)(want[f'rope_{name}'], *rope_tables(64, 16))
    np.testing.assert_allclose(got, want[f'rope_out_{name}'], rtol=0, atol=2e-5)  # values up to 4, times 4e-6


def test_rope_depends_on_distance_only():
  rng = np.random.RandomState(0)
  q, k = (np.tile(rng.randn(1, 1, 1, 8), (1, 40, 1, 1)).astype(np.float32) for _ in range(2))
  tables = rope_tables(40, 8)
  scores = np.einsum('bqhd,bkhd->qk', apply_rope(q, *tables), apply_rope(k, *tables))
  for distance in (0, 1, 7, 30):
    diagonal = np.diagonal(scores, -distance)
    np.testing.assert_allclose(diagonal, diagonal[0], rtol=0, atol=5e-5)
  np.testing.assert_allclose(np.linalg.norm(apply_rope(q, *tables), axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-6)


@pytest.mark.parametrize('name', ('lm', 'packed'))
def test_logit_masks(name):
  got = make_logit_mask(golden.load_arrays(f'batch_{name}.npz')['decoder_input_tokens'])
  np.testing.assert_array_equal(np.asarray(got)[..., None], golden.load_arrays(UNITS)[f'logit_mask_{name}'])


@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(0, 2), min_size=7, max_size=7), min_size=1, max_size=4))
def test_logit_mask_by_its_words(rows):
  got = np.asarray(make_logit_mask(jnp.asarray(rows)))
  for b, row in enumerate(rows):
    for t, token in enumerate(row):
      assert got[b, t] == (token > 0 or t == 0 or (t + 1 < len(row) and row[t + 1] > 0))


@pytest.mark.parametrize('name, bidirectional', (('packed', False), ('prefix', True)))
def test_attention_masks(name, bidirectional):
  got = attention_mask(golden_context(name, bidirectional), EVERYTHING, EVERYTHING)
  want = golden.load_arrays(UNITS)[f'attn_mask_{name}']
  np.testing.assert_array_equal(got, want)
  if bidirectional:
    assert np.triu(want[0, 0], 1).any()
    causal = attention_mask(golden_context(name), EVERYTHING, EVERYTHING)
    np.testing.assert_array_equal(causal, np.tril(want))


# Blocked attention.


def make_batch(seed, batch, length, segments=False):
  """Rows with padding targets at the end, in the middle and, one row, everywhere."""
  rng = np.random.RandomState(seed)
  target = rng.randint(1, 8, (batch, length))
  for row in range(batch):
    target[row, rng.randint(1, length + 1):] = 0
  target[:, 1:] *= rng.rand(batch, length - 1) < 0.9
  if batch > 2:
    target[-1] = 0
  features = {'decoder_input_tokens': np.maximum(target, 1), 'decoder_target_tokens': target}
  features['decoder_causal_attention'] = (np.arange(length) < rng.randint(0, length + 1, (batch, 1))).astype(int)
  if segments:
    features['decoder_segment_ids'] = 1 + np.cumsum(rng.rand(batch, length) < 0.2, axis=1)
  return {name: x.astype(np.int32) for name, x in features.items()}


def plain_attention(q, k, v, context, keep=None):
  """SPEC 1.6 literally: a bias of -1e10 is added to the scores, which swallows them; then dropout of the weights."""
  scores = jnp.einsum('bqhd,bkhd->bhqk', q, k) + jnp.where(attention_mask(context, EVERYTHING, EVERYTHING), 0., -1e10)
  weights = jax.nn.softmax(scores, axis=-1)
  return jnp.einsum('bhqk,bkhd->bqhd', weights if keep is None else weights * keep, v)


@functools.partial(jax.jit, static_argnames=('model', 'num_blocks'))
def value_and_gradients(model, q, k, v, out, batch, num_blocks, keep=None):
  """Of blocked attention, or, with num_blocks 0, of the plain one."""
  context = make_context(model, batch)
  def loss(q, k, v):
    y = (blocked_attention(q, k, v, context, num_blocks, keep) if num_blocks else
         plain_attention(q, k, v, context, keep))
    return jnp.sum(y * out), y
  grads, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
  return y, *grads


def compare(seed, batch, length, num_blocks, segments=False, bidirectional=False, dropout=0.):
  features = make_batch(seed, batch, length, segments)
  q, k, v, out = (np.random.RandomState(seed + i).randn(batch, length, 2, 4).astype(np.float32) for i in range(4))
  model = config(inputs_bidirectional_attention=bidirectional)
  keep = None
  if dropout:
    keep = (np.random.RandomState(seed).rand(batch, 2, 1, length) >= dropout).astype(np.float32) / (1 - dropout)
  got = value_and_gradients(model, q, k, v, out, features, num_blocks, keep)
  want = value_and_gradients(model, q, k, v, out, features, 0, keep)
  for name, a, b in zip(('value', 'dq', 'dk', 'dv'), got, want):
    np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * max(1., np.abs(b).max()), err_msg=name)
  return features, got


@pytest.mark.parametrize('length, num_blocks', ((1, 1), (13, 1), (13, 4), (16, 4), (5, 99)))
def test_blocks_equal_the_whole_square(length, num_blocks):
  for seed in range(3):
    compare(seed, 3, length, num_blocks)


@pytest.mark.parametrize('segments, bidirectional', ((True, False), (False, True), (True, True)))
def test_segments_and_both_ways(segments, bidirectional):
  for seed in range(3):
    compare(seed, 3, 13, 4, segments, bidirectional)


def test_blind_queries_get_the_mean_of_all_values():
  """And their gradient reaches q and k although every score is swallowed (SPEC 1.6)."""
  features, (y, dq, dk, _) = compare(5, 3, 13, 4)
  blind = features['decoder_target_tokens'] == 0
  assert blind.any(axis=1).all() and blind[-1].all()
  v = np.random.RandomState(7).randn(3, 13, 2, 4)
  np.testing.assert_allclose(np.asarray(y)[blind], np.broadcast_to(v.mean(axis=1, keepdims=True), v.shape)[blind],
                             rtol=0, atol=1e-6)
  assert np.abs(np.asarray(dq)[blind]).max() > 1e-3 and np.abs(np.asarray(dk)[-1]).max() > 1e-3


@pytest.mark.parametrize('segments, bidirectional', ((False, False), (True, False), (True, True)))
def test_dropout_of_weights(segments, bidirectional):
  """Of every row's, also of those that see nothing: their L equal weights are dropped like any others."""
  for seed in range(3):
    features, (y, dq, dk, _) = compare(seed, 3, 13, 4, segments, bidirectional, dropout=0.4)
    blind = features['decoder_target_tokens'] == 0
    assert blind[-1].all() and np.abs(np.asarray(dk)[-1]).max() > 1e-3  # their gradient is there, too
    assert np.abs(np.asarray(dq)[blind]).max() > 1e-3
  plain = compare(seed, 3, 13, 4, segments, bidirectional)[1][0]
  assert np.abs(np.asarray(y) - np.asarray(plain))[blind].max() > 1e-2


def test_a_query_sees_nothing_after_itself():
  features = make_batch(0, 3, 13)
  features['decoder_target_tokens'][:] = 3
  q, k, v = (np.random.RandomState(i).randn(3, 13, 2, 4).astype(np.float32) for i in range(3))
  run = lambda k, v: value_and_gradients(config(), q, k, v, np.ones_like(q), features, 4)[0]
  later_k, later_v = k.copy(), v.copy()
  later_k[:, 8:], later_v[:, 8:] = 7., -9.
  np.testing.assert_array_equal(run(k, v)[:, :8], run(later_k, later_v)[:, :8])


def test_layer_by_hand():
  """Projections, heads outermost, no 1/sqrt(d), no bias."""
  model = config(attention_query_blocks=3)
  features = make_batch(1, 2, 9)
  x = np.random.RandomState(0).randn(2, 9, 12).astype(np.float32)
  layer = SelfAttention(model)
  context = make_context(model, features)
  shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, context, False)['params'])
  rng = np.random.RandomState(1)
  params = jax.tree.map(lambda p: (rng.randn(*p.shape) / 2).astype(np.float32), shapes)
  got = jax.jit(lambda p: layer.apply({'params': p}, x, context, False))(params)
  kernel = {name: np.asarray(params[name]['kernel'], np.float64) for name in ('query', 'key', 'value', 'out')}
  angle = np.arange(9)[:, None] * 10000. ** (-np.arange(0, 4, 2) / 4)
  want = np.zeros((2, 9, 8))
  for b in range(2):
    for h in range(2):
      q, k, v = (x[b] @ kernel[name][:, 4 * h:4 * h + 4] for name in ('query', 'key', 'value'))
      turn = lambda z: np.concatenate([z[:, :2] * np.cos(angle) - z[:, 2:] * np.sin(angle),
                                       z[:, 2:] * np.cos(angle) + z[:, :2] * np.sin(angle)], axis=1)
      scores = turn(q) @ turn(k).T
      allowed = np.asarray(attention_mask(context, EVERYTHING, EVERYTHING))[b, 0]
      weights = np.where(allowed, np.exp(scores), 0)
      weights[~allowed.any(axis=1)] = 1.
      want[b, :, 4 * h:4 * h + 4] = weights / weights.sum(axis=1, keepdims=True) @ v
  np.testing.assert_allclose(got, want @ kernel['out'], rtol=0, atol=2e-5)


def test_missing_features_are_named():
  batch = make_batch(0, 2, 4)
  for name in ('decoder_input_tokens', 'decoder_target_tokens'):
    with pytest.raises(ConfigError, match=f'lacks {name}'):
      make_context(config(), {k: v for k, v in batch.items() if k != name})
  del batch['decoder_causal_attention']
  assert make_context(config(), batch).bidirectional is None
  with pytest.raises(ConfigError, match='lacks decoder_causal_attention'):
    make_context(config(inputs_bidirectional_attention=True), batch)


def test_features_of_other_shapes_are_named():
  batch = make_batch(0, 2, 4, segments=True)
  for name in ('decoder_target_tokens', 'decoder_segment_ids', 'decoder_causal_attention'):
    with pytest.raises(ConfigError, match=rf'{name} has another shape .*\(2, 3\); .* is \(2, 4\)$'):
      make_context(config(), {**batch, name: batch[name][:, :3]})
  with pytest.raises(ConfigError, match=r'decoder_loss_weights has another shape .*\(2, 1\)'):
    make_context(config(), {**batch, 'decoder_loss_weights': np.ones((2, 1))})
  for shape in ((4,), (2, 2, 2), ()):
    with pytest.raises(ConfigError, match='decoder_input_tokens has another shape than .batch, length.'):
      make_context(config(), {name: np.ones(shape, np.int32) for name in batch})
  for dtype in (np.float32, bool):
    with pytest.raises(ConfigError, match='decoder_input_tokens has the dtype (float32|bool); token ids are integers'):
      make_context(config(), {**batch, 'decoder_input_tokens': batch['decoder_input_tokens'].astype(dtype)})


@pytest.mark.slow
@settings(max_examples=12)
@given(batch=st.integers(1, 3), length=st.integers(1, 24), num_blocks=st.integers(1, 30), segments=st.booleans(),
       bidirectional=st.booleans(), seed=st.integers(0, 1000))
def test_any_shape(batch, length, num_blocks, segments, bidirectional, seed):
  compare(seed, batch, length, num_blocks, segments, bidirectional)
