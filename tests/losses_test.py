"""Chunked cross-entropy against the plain formula: values, gradients, edge cases, a vocabulary over several devices,
and what it keeps in memory."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from openmoe_jax.config import MeshConfig
from openmoe_jax.losses import chunked_cross_entropy
from openmoe_jax.partitioning import batch_sharding, make_mesh, num_shards

B, L, D, V = 3, 11, 5, 17


def inputs(seed=0, fractional=True):
  rng = np.random.RandomState(seed)
  weights = (rng.rand(B, L) * (rng.rand(B, L) < 0.7)) if fractional else np.ones((B, L))
  return (jnp.asarray(rng.randn(B, L, D), jnp.float32), jnp.asarray(rng.randn(D, V), jnp.float32),
          jnp.asarray(rng.randint(0, V, (B, L)), jnp.int32), jnp.asarray(weights, jnp.float32))


def plain(hidden, kernel, targets, weights, z_loss=0., label_smoothing=0.):
  """The formula with the full logits and explicit soft targets: (loss, cross entropy, z-loss, correct)."""
  logits = hidden.astype(jnp.float32) @ kernel
  vocab = kernel.shape[1]
  soft = jnp.full(logits.shape, label_smoothing / (vocab - 1))
  soft = jnp.where(jax.nn.one_hot(targets, vocab) > 0, 1 - label_smoothing, soft)
  entropy = -jnp.sum(jax.scipy.special.xlogy(soft, soft), axis=-1)
  cross_entropy = jnp.sum(weights * (-jnp.sum(soft * jax.nn.log_softmax(logits), axis=-1) - entropy))
  z = jnp.sum(weights * z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2)
  return cross_entropy + z, cross_entropy, z, jnp.sum(weights * (jnp.argmax(logits, axis=-1) == targets))


@functools.partial(jax.jit, static_argnames=('z_loss', 'label_smoothing', 'chunk_tokens'))
def value_and_gradients(hidden, kernel, targets, weights, z_loss=0., label_smoothing=0., chunk_tokens=None):
  """(four sums), d loss / d hidden, d loss / d kernel; plain if `chunk_tokens` is None."""
  def loss(hidden, kernel):
    if chunk_tokens is None:
      sums = plain(hidden, kernel, targets, weights, z_loss, label_smoothing)
    else:
      sums = tuple(chunked_cross_entropy(hidden, kernel, targets, weights, z_loss=z_loss,
                                         label_smoothing=label_smoothing, chunk_tokens=chunk_tokens))
    return sums[0], sums
  grads, sums = jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, kernel)
  return sums, *grads


def compare(got, want):
  np.testing.assert_allclose(got[0], want[0], rtol=2e-6, atol=2e-6)
  for a, b in zip(got[1:], want[1:], strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(1., float(jnp.abs(b).max())))


@pytest.mark.parametrize('chunk_tokens', (1, 7, 10**6))  # 1 column, 2 columns (6 chunks, one column padded), all 11
def test_chunks_equal_the_plain_loss(chunk_tokens):
  compare(value_and_gradients(*inputs(), z_loss=1e-2, chunk_tokens=chunk_tokens),
          value_and_gradients(*inputs(), z_loss=1e-2))


def test_label_smoothing():
  """Against soft targets written out; the constant takes their entropy off, so that the optimum stays at 0."""
  settings = dict(z_loss=1e-2, label_smoothing=0.3)
  compare(value_and_gradients(*inputs(), **settings, chunk_tokens=7), value_and_gradients(*inputs(), **settings))


def test_label_smoothing_has_its_optimum_at_zero():
  soft = np.full(V, 0.1 / (V - 1))
  soft[3] = 0.9
  sums = chunked_cross_entropy(jnp.ones((1, 1, 1)), jnp.log(jnp.asarray(soft, jnp.float32))[None],
                               jnp.full((1, 1), 3), jnp.ones((1, 1)), label_smoothing=0.1)
  np.testing.assert_allclose(sums.loss, 0., atol=1e-6)


def test_sums_by_numpy():
  hidden, kernel, targets, weights = (np.asarray(x, np.float64) for x in inputs())
  targets = targets.astype(int)
  logits = hidden @ kernel
  log_z = np.log(np.exp(logits).sum(axis=-1))
  cross_entropy = (weights * (log_z - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0])).sum()
  z = (weights * 1e-2 * log_z ** 2).sum()
  sums = value_and_gradients(*inputs(), z_loss=1e-2, chunk_tokens=7)[0]
  np.testing.assert_allclose(sums, (cross_entropy + z, cross_entropy, z,
                                    (weights * (logits.argmax(axis=-1) == targets)).sum()), rtol=2e-6)


def test_gradient_of_one_token_is_the_analytic_one():
  """SPEC 3: dlogits = (1 + 2 * z * logZ) * softmax - onehot, seen through an identity kernel."""
  logits = np.random.RandomState(1).randn(1, 1, V).astype(np.float32)
  loss = lambda x: chunked_cross_entropy(x, jnp.eye(V), jnp.full((1, 1), 4), jnp.ones((1, 1)), z_loss=1e-2).loss
  log_z = np.log(np.exp(logits).sum())
  want = (1 + 2e-2 * log_z) * np.exp(logits - log_z) - (np.arange(V) == 4)
  np.testing.assert_allclose(jax.jit(jax.grad(loss))(logits), want, rtol=0, atol=1e-6)


def test_finite_differences():
  """Central differences along the gradient and along random directions.

  The sums are about 100, so a float32 difference knows its slope to 100 * 2^-23 / (2 * step) = 6e-4 with a step of
  0.01; the third derivative adds step^2 / 6 times something of order 10. Slopes along the gradient are about 10.
  """
  hidden, kernel, targets, weights = inputs()
  settings = dict(z_loss=1e-2, label_smoothing=0.3, chunk_tokens=7)
  _, *grads = value_and_gradients(hidden, kernel, targets, weights, **settings)
  value = jax.jit(lambda h, k: chunked_cross_entropy(h, k, targets, weights, **settings).loss)
  step = 0.01
  for seed in range(4):
    rng = np.random.RandomState(seed)
    direction = grads if seed == 0 else [rng.randn(*g.shape).astype(np.float32) for g in grads]
    norm = np.sqrt(sum(float(jnp.sum(d * d)) for d in direction))
    direction = [d / norm for d in direction]
    slope = float(sum(jnp.sum(g * d) for g, d in zip(grads, direction)))
    ahead, behind = (float(value(hidden + s * direction[0], kernel + s * direction[1])) for s in (step, -step))
    assert abs((ahead - behind) / (2 * step) - slope) < 2e-3 + 1e-3 * abs(slope)


def test_no_weight_no_loss():
  hidden, kernel, targets, weights = inputs()
  sums, dx, dkernel = value_and_gradients(hidden, kernel, targets, jnp.zeros_like(weights), z_loss=1e-2, chunk_tokens=7)
  assert not any(map(float, sums)) and not np.asarray(dx).any() and not np.asarray(dkernel).any()


def test_a_token_of_weight_zero_does_not_count():
  hidden, kernel, targets, weights = inputs(fractional=False)
  weights = weights.at[1, 4].set(0.)
  first = value_and_gradients(hidden, kernel, targets, weights, z_loss=1e-2, chunk_tokens=7)
  changed = value_and_gradients(hidden.at[1, 4].set(9.), kernel, targets.at[1, 4].set(0), weights, z_loss=1e-2,
                                chunk_tokens=7)
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(changed)):
    np.testing.assert_array_equal(a, b)
  assert not np.asarray(first[1])[1, 4].any()


# Masked positions: a hidden row of zeros, so that all logits are 0.


def with_masked_rows(hidden, targets):
  """Every third position masked; the target of every second of those is 0, the argmax of logits that are all alike."""
  masked = jnp.arange(targets.size).reshape(targets.shape) % 3 == 0
  zero_target = jnp.arange(targets.size).reshape(targets.shape) % 6 == 0
  targets = jnp.where(zero_target, 0, jnp.where(masked, jnp.maximum(targets, 1), targets))
  return jnp.where(masked[..., None], 0., hidden), targets, masked


def test_accuracy_at_masked_positions():
  hidden, kernel, targets, weights = inputs(fractional=False)
  hidden, targets, masked = with_masked_rows(hidden, targets)
  only_masked = masked.astype(jnp.float32)
  sums = value_and_gradients(hidden, kernel, targets, only_masked, chunk_tokens=7)[0]
  assert float(sums[3]) == float(jnp.sum(masked & (targets == 0))) > 0
  np.testing.assert_allclose(sums[1], only_masked.sum() * np.log(V), rtol=1e-6)
  compare(value_and_gradients(hidden, kernel, targets, weights, z_loss=1e-2, chunk_tokens=7),
          value_and_gradients(hidden, kernel, targets, weights, z_loss=1e-2))


@pytest.mark.parametrize('label_smoothing', (0., 0.3))
def test_sharded_vocabulary(label_smoothing):
  """Sums and gradients on data 2 x expert 2 x model 2 devices, fractional weights and masked positions among them."""
  rng = np.random.RandomState(3)
  batch, vocab = 4, 18
  hidden = jnp.asarray(rng.randn(batch, L, D), jnp.float32)
  hidden, targets, _ = with_masked_rows(hidden, jnp.asarray(rng.randint(0, vocab, (batch, L)), jnp.int32))
  kernel = jnp.asarray(rng.randn(D, vocab), jnp.float32)
  weights = jnp.asarray(rng.rand(batch, L) * (rng.rand(batch, L) < 0.7), jnp.float32)
  settings = dict(z_loss=1e-2, label_smoothing=label_smoothing)
  want = value_and_gradients(hidden, kernel, targets, weights, **settings)
  assert num_shards('vocab') == num_shards('batch') == 1
  compare(value_and_gradients(hidden, kernel, targets, weights, **settings, chunk_tokens=7), want)
  mesh = make_mesh(MeshConfig(expert=2, model=2), jax.devices()[:8])
  kernel = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec(None, 'model')))
  hidden, targets, weights = jax.device_put((hidden, targets, weights), batch_sharding(mesh))
  with jax.set_mesh(mesh):
    assert num_shards('vocab') == 2 and num_shards('batch') == 4
    compare(value_and_gradients(hidden, kernel, targets, weights, **settings, chunk_tokens=7), want)


def test_large_logits_stay_finite():
  hidden, kernel, targets, weights = inputs()
  for leaf in jax.tree.leaves(value_and_gradients(1e3 * hidden, kernel, targets, weights, z_loss=1e-2, chunk_tokens=7)):
    assert np.isfinite(leaf).all()


def test_bfloat16_hidden():
  """Logits are taken in float32 whatever comes in; the gradient goes back in bfloat16."""
  hidden, kernel, targets, weights = inputs()
  half = hidden.astype(jnp.bfloat16)
  sums, dx, dkernel = value_and_gradients(half, kernel, targets, weights, z_loss=1e-2, chunk_tokens=7)
  want = value_and_gradients(half.astype(jnp.float32), kernel, targets, weights, z_loss=1e-2)
  assert dx.dtype == jnp.bfloat16
  compare((sums, dkernel), (want[0], want[2]))
  np.testing.assert_allclose(dx.astype(jnp.float32), want[1], rtol=2**-8, atol=1e-6)


def test_full_logits_are_never_held():
  """1,024 tokens of 16,384 float32 logits are 64 MiB; of 64-token chunks, 4 MiB. Gradients included, a compiled program
  may hold a few chunks' worth of temporaries, never half of the whole."""
  batch, length, width, vocab = 2, 512, 8, 16384
  shape = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
  args = (shape(batch, length, width), shape(width, vocab), shape(batch, length, dtype=jnp.int32), shape(batch, length))
  full = 4 * batch * length * vocab

  def temporaries(loss, **settings):
    grad = jax.jit(jax.grad(lambda *a: loss(*a, z_loss=1e-4, **settings)[0], argnums=(0, 1)))
    return grad.lower(*args).compile().memory_analysis().temp_size_in_bytes

  assert temporaries(plain) >= full
  by_chunk = {tokens: temporaries(chunked_cross_entropy, chunk_tokens=tokens) for tokens in (64, 256)}
  small_things = 4 * 4 * (width * vocab + batch * length * width)
  for tokens, size in by_chunk.items():
    assert size < 4 * (full * tokens // (batch * length)) + small_things, by_chunk
  assert by_chunk[64] < full / 4
