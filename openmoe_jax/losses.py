"""Cross-entropy with z-loss over a large vocabulary, in chunks that never hold all float32 logits (SPEC 3).

The gradient is worked out while a chunk's logits exist: the backward pass only scales it, nothing is computed twice and
no logits are stored.
"""

import functools
import math
from typing import NamedTuple, Tuple

import jax
import jax.numpy as jnp

from openmoe_jax.partitioning import constrain, num_shards


class LossSums(NamedTuple):
  """Weighted sums over tokens, float32 []. `loss` = cross_entropy + z_loss carries the gradient, the rest do not."""
  loss: jax.Array
  cross_entropy: jax.Array
  z_loss: jax.Array
  correct: jax.Array


def smoothing_constants(vocab_size: int, label_smoothing: float) -> Tuple[float, float, float]:
  """Probability of the target, of every other token, and the entropy that is taken off so that 0 stays the optimum."""
  low = label_smoothing / (vocab_size - 1)
  high = 1. - label_smoothing
  entropy = -(high * math.log(high) + (vocab_size - 1) * low * math.log(low + 1e-20))
  return high, low, entropy


def _chunk(hidden, kernel, targets, weights, z_loss: float, label_smoothing: float, with_gradient: bool):
  """Sums of one chunk, [B, l, D] with targets [B, l]; and d loss / d hidden, d loss / d kernel if asked for."""
  vocab_size = kernel.shape[1]
  high, low, entropy = smoothing_constants(vocab_size, label_smoothing)
  x = hidden.astype(jnp.float32)
  logits = constrain(jnp.einsum('bld,dv->blv', x, kernel), 'batch', 'length', 'vocab')
  top = jnp.max(logits, axis=-1)
  log_z = top + jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))
  is_target = jnp.arange(vocab_size)[None, None, :] == targets[..., None]
  if num_shards('vocab') == 1:
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode='fill', fill_value=0.)[..., 0]
  else:  # takes a pass over the logits, but stays local
    target_logit = jnp.sum(jnp.where(is_target, logits, 0.), axis=-1)
  cross_entropy = log_z - (high - low) * target_logit - entropy
  if label_smoothing:
    cross_entropy -= low * jnp.sum(logits, axis=-1)
  squared = z_loss * log_z ** 2
  # Not argmax: comparing the maximum needs no further pass over the logits. Only an exact tie would tell them apart, as
  # at masked positions, where all logits are 0 and the first id is the argmax.
  correct = jnp.where(jnp.any(x != 0, axis=-1), target_logit >= top, targets == 0)
  sums = LossSums(loss=jnp.sum(weights * (cross_entropy + squared)), cross_entropy=jnp.sum(weights * cross_entropy),
                  z_loss=jnp.sum(weights * squared), correct=jnp.sum(weights * correct))
  if not with_gradient:
    return sums, None, None
  softmax_weight = weights * (1. + 2. * z_loss * log_z)
  dlogits = softmax_weight[..., None] * jnp.exp(logits - log_z[..., None]) - weights[..., None] * (
      jnp.where(is_target, high, low))
  dlogits = constrain(dlogits, 'batch', 'length', 'vocab')
  dx = jnp.einsum('blv,dv->bld', dlogits, kernel).astype(hidden.dtype)
  return sums, dx, jnp.einsum('bld,blv->dv', x, dlogits)


def _run(hidden, kernel, targets, weights, z_loss, label_smoothing, chunk_tokens, with_gradient):
  """All chunks: sums, d hidden and d kernel."""
  batch, length, _ = hidden.shape
  # Chunks are runs of columns, so that each holds tokens of every batch shard.
  columns = max(1, min(length, chunk_tokens * num_shards('batch') // batch))
  count = -(-length // columns)
  columns = -(-length // count)
  pad = count * columns - length

  def split(x):  # [B, L, ...] -> [count, B, columns, ...]
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(batch, count, columns, *x.shape[2:]).swapaxes(0, 1)

  def step(carry, chunk):
    sums, dkernel = carry
    new, dx, dw = _chunk(chunk[0], kernel, *chunk[1:], z_loss, label_smoothing, with_gradient)
    return (jax.tree.map(jnp.add, sums, new), dkernel + dw if with_gradient else dkernel), dx

  carry = (LossSums(*(jnp.zeros((), jnp.float32),) * 4), jnp.zeros_like(kernel) if with_gradient else None)
  chunks = tuple(map(split, (hidden, targets, weights)))
  # A loop even over few chunks: laid out one after the other, XLA would keep several chunks' logits at a time.
  (sums, dkernel), dx = jax.lax.scan(step, carry, chunks)
  if with_gradient:
    dx = dx.swapaxes(0, 1).reshape(batch, count * columns, -1)[:, :length]
  return sums, dx, dkernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _loss_sums(hidden, kernel, targets, weights, z_loss, label_smoothing, chunk_tokens):
  return _run(hidden, kernel, targets, weights, z_loss, label_smoothing, chunk_tokens, with_gradient=False)[0]


def _loss_sums_fwd(hidden, kernel, targets, weights, z_loss, label_smoothing, chunk_tokens):
  sums, dx, dkernel = _run(hidden, kernel, targets, weights, z_loss, label_smoothing, chunk_tokens, with_gradient=True)
  return sums, (dx, dkernel)


def _loss_sums_bwd(z_loss, label_smoothing, chunk_tokens, residuals, cotangents):
  dx, dkernel = residuals
  return (cotangents.loss * dx).astype(dx.dtype), cotangents.loss * dkernel, None, None


_loss_sums.defvjp(_loss_sums_fwd, _loss_sums_bwd)


def chunked_cross_entropy(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, *,
                          z_loss: float = 0., label_smoothing: float = 0., chunk_tokens: int = 1024) -> LossSums:
  """Weighted sums of the token losses of logits = hidden @ kernel.

  Per token: cross-entropy against the (smoothed) target, minus the smoothed target's entropy, plus
  z_loss * logsumexp(logits)^2, as in Mesh TensorFlow and T5X; the gradient is the analytic one.

  Args:
    hidden: [B, L, D] in any float type; the product is taken in float32.
    kernel: float32 [D, V].
    targets: int32 [B, L].
    weights: float32 [B, L].
    z_loss, label_smoothing: Python numbers.
    chunk_tokens: tokens per batch shard whose logits exist at one time; the result depends on it only by rounding.
  """
  return _loss_sums(hidden, kernel, targets, weights.astype(jnp.float32), float(z_loss), float(label_smoothing),
                    int(chunk_tokens))
