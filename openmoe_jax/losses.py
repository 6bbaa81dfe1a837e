"""Cross-entropy with z-loss over a large vocabulary, in chunks that never hold all float32 logits (SPEC 3).

The gradient is worked out while a chunk's logits exist: the backward pass only scales it, nothing is computed twice and
no logits are stored.

On a mesh every device runs the chunks of its own rows against its own part of the vocabulary, and gradients of the
kernel are added up once, at the end: left to itself, the compiler adds them up over all devices in every chunk.
"""

import functools
import math
from typing import NamedTuple, Optional, Tuple

import jax
from jax.sharding import PartitionSpec
import jax.numpy as jnp

from openmoe_jax import partitioning


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


class _Settings(NamedTuple):
  """What is compiled in: arguments of `chunked_cross_entropy`, and on a device of a mesh `vocab_axes`, the mesh axes
  over which the vocabulary is split; `kernel` then is a part of it."""
  z_loss: float
  label_smoothing: float
  chunk_tokens: int
  dtype: Optional[str]
  vocab_size: int
  vocab_axes: Tuple[str, ...] = ()


def _chunk(settings: _Settings, hidden, kernel, targets, weights, with_gradient: bool):
  """Sums of one chunk, [B, l, D] with targets [B, l]; and d loss / d hidden, d loss / d kernel if asked for."""
  axes, z_loss = settings.vocab_axes, settings.z_loss
  high, low, entropy = smoothing_constants(settings.vocab_size, settings.label_smoothing)
  total = (lambda x: jax.lax.psum(x, axes)) if axes else lambda x: x
  x = hidden.astype(kernel.dtype)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  logits = product('bld,dv->blv', x, kernel)
  top = jnp.max(logits, axis=-1)
  if axes:
    top = jax.lax.pmax(top, axes)
    targets_here = targets - jax.lax.axis_index(axes) * kernel.shape[1]
  else:
    targets_here = targets
  log_z = top + jnp.log(total(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)))
  is_target = jnp.arange(kernel.shape[1])[None, None, :] == targets_here[..., None]
  index = jnp.where(targets_here < 0, kernel.shape[1], targets_here)  # a negative one would count from the end
  target_logit = total(jnp.take_along_axis(logits, index[..., None], axis=-1, mode='fill', fill_value=0.)[..., 0])
  cross_entropy = log_z - (high - low) * target_logit - entropy
  if settings.label_smoothing:
    cross_entropy -= low * total(jnp.sum(logits, axis=-1))
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
  dlogits = dlogits.astype(kernel.dtype)
  dx = total(product('blv,dv->bld', dlogits, kernel)).astype(hidden.dtype)
  return sums, dx, product('bld,blv->dv', x, dlogits)


def _run(settings: _Settings, hidden, kernel, targets, weights, with_gradient: bool):
  """All chunks: sums, d hidden and d kernel, the latter split as its optimizer state is."""
  if not partitioning.is_partitioned():
    return _local(settings, hidden, kernel, targets, weights, with_gradient)
  rows, axes = hidden.shape[0], partitioning.BATCH_AXES
  vocab = partitioning.split_over('vocab', kernel.shape[1])
  kept = partitioning.kept_over('embed')
  batch = PartitionSpec(axes)
  kernel_in, kernel_out = (PartitionSpec(split or None, vocab or None) for split in kept)

  def local(hidden, kernel, targets, weights):
    if kept[0]:
      kernel = jax.lax.all_gather(_cast(kernel, settings.dtype), kept[0], axis=0, tiled=True)
    sums, dx, dkernel = _local(settings._replace(vocab_axes=vocab), hidden, kernel, targets, weights, with_gradient)
    sums = jax.lax.psum(sums, axes)
    return sums, dx, partitioning.add_up(dkernel, kept[1], 0) if with_gradient else None

  pad = partitioning.pad_rows
  out = (PartitionSpec(), batch if with_gradient else None, kernel_out if with_gradient else None)
  sums, dx, dkernel = jax.shard_map(local, in_specs=(batch, kernel_in, batch, batch), out_specs=out, check_vma=False)(
      pad(hidden), kernel, pad(targets), pad(weights))
  return sums, dx[:rows] if with_gradient else None, dkernel


def _cast(kernel, dtype: Optional[str]):
  return kernel if dtype is None else kernel.astype(dtype)


def _local(settings: _Settings, hidden, kernel, targets, weights, with_gradient: bool):
  """All chunks of one device; d kernel is float32."""
  batch, length, _ = hidden.shape
  kernel = _cast(kernel, settings.dtype)
  # Chunks are runs of columns: a slice of each row.
  columns = max(1, min(length, settings.chunk_tokens // batch))
  count = -(-length // columns)
  columns = -(-length // count)
  pad = count * columns - length

  def split(x):  # [B, L, ...] -> [count, B, columns, ...]
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(batch, count, columns, *x.shape[2:]).swapaxes(0, 1)

  def step(carry, chunk):
    sums, dkernel = carry
    new, dx, dw = _chunk(settings, chunk[0], kernel, *chunk[1:], with_gradient)
    return (jax.tree.map(jnp.add, sums, new), dkernel + dw if with_gradient else dkernel), dx

  carry = (LossSums(*(jnp.zeros((), jnp.float32),) * 4),
           jnp.zeros(kernel.shape, jnp.float32) if with_gradient else None)
  chunks = tuple(map(split, (hidden, targets, weights)))
  # A loop even over few chunks: laid out one after the other, XLA would keep several chunks' logits at a time.
  (sums, dkernel), dx = jax.lax.scan(step, carry, chunks)
  if with_gradient:
    dx = dx.swapaxes(0, 1).reshape(batch, count * columns, -1)[:, :length]
  return sums, dx, dkernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sums(settings, hidden, kernel, targets, weights):
  return _run(settings, hidden, kernel, targets, weights, with_gradient=False)[0]


def _loss_sums_fwd(settings, hidden, kernel, targets, weights):
  sums, dx, dkernel = _run(settings, hidden, kernel, targets, weights, with_gradient=True)
  return sums, (dx, dkernel)


def _loss_sums_bwd(settings, residuals, cotangents):
  del settings
  dx, dkernel = residuals
  return (cotangents.loss * dx).astype(dx.dtype), cotangents.loss * dkernel, None, None


_loss_sums.defvjp(_loss_sums_fwd, _loss_sums_bwd)


def chunked_cross_entropy(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, *,
                          z_loss: float = 0., label_smoothing: float = 0., chunk_tokens: int = 1024,
                          matmul_dtype: Optional[str] = None) -> LossSums:
  """Weighted sums of the token losses of logits = hidden @ kernel.

  Per token: cross-entropy against the (smoothed) target, minus the smoothed target's entropy, plus
  z_loss * logsumexp(logits)^2, as in Mesh TensorFlow and T5X; the gradient is the analytic one.

  Args:
    hidden: [B, L, D] in any float type; the product is taken in float32.
    kernel: float32 [D, V]; on a mesh, as it is kept (not `partitioning.gather`ed).
    targets: int32 [B, L].
    weights: float32 [B, L].
    z_loss, label_smoothing: Python numbers.
    chunk_tokens: tokens per batch shard whose logits exist at one time; the result depends on it only by rounding.
    matmul_dtype: to which factors of products with the kernel, and the logits' gradient, are rounded; sums are float32.
  """
  settings = _Settings(float(z_loss), float(label_smoothing), int(chunk_tokens),
                       None if matmul_dtype in (None, 'float32') else str(matmul_dtype), kernel.shape[1])
  return _loss_sums(settings, hidden, kernel, targets, weights.astype(jnp.float32))
