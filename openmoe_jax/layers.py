"""Small layers shared by the whole model: kernels, RMS norm, embedding, gated feed-forward network, dropout."""

import functools
import math
from typing import Callable, Optional, Sequence, Tuple

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec
import jax.numpy as jnp

from openmoe_jax.config import ModelConfig
from openmoe_jax.partitioning import (BATCH_AXES, add_up, gather, is_partitioned, kept_over, pad_rows, param_axes,
                                      split_over)


def normal_init(scale: float, fan_in: int) -> Callable:
  """Normal distribution with variance scale / fan_in."""
  return nn.initializers.normal(math.sqrt(scale / fan_in))


def truncated_normal_init(scale: float) -> Callable:
  """Normal cut at two standard deviations and widened so that its variance is scale / fan_in; kernels [in, out]."""
  return nn.initializers.variance_scaling(scale, 'fan_in', 'truncated_normal')


class Kernel(nn.Module):
  """One float32 parameter named `kernel`; calling it returns the array, in another dtype if asked, ready for use.

  The sub-module's name and `kernel` are the parameter's name in T5X. On a mesh the array is cast before it is gathered
  from where it is kept: half the bytes on the way.
  """
  shape: Tuple[int, ...]
  init: Callable

  @nn.compact
  def __call__(self, dtype: Optional[jnp.dtype] = None, gathered: bool = True) -> jax.Array:
    kernel = self.param('kernel', self.init, self.shape, jnp.float32)
    kernel = kernel if dtype is None else kernel.astype(dtype)
    axes = param_axes(self.path + ('kernel',), len(self.shape), in_block=True)
    return gather(kernel, *axes) if gathered else kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, kernel: jax.Array, precision: Optional[str] = None) -> jax.Array:
  """x @ kernel: [..., D], [D, F] -> [..., F], in `jax.lax.Precision`'s sense.

  With a gradient of its own because of the order of operands, which doubles to quadruples the speed of the kernel's
  gradient on a CPU: one operand has to be laid out anew for that product, and it should be the narrow one.
  """
  return jnp.matmul(x, kernel, precision=precision)


def _linear_bwd(precision, residuals, dy):
  x, kernel = residuals
  if x.shape[-1] <= dy.shape[-1]:
    dkernel = jnp.einsum('...d,...f->df', x, dy, precision=precision)
  else:  # the barrier keeps XLA from turning the product around again
    dkernel = jax.lax.optimization_barrier(jnp.einsum('...f,...d->fd', dy, x, precision=precision)).T
  return jnp.matmul(dy, kernel.T, precision=precision), dkernel


# A plain product, which remat policies know as one.
linear.defvjp(lambda x, kernel, precision: (jnp.matmul(x, kernel, precision=precision), (x, kernel)), _linear_bwd)


class RMSNorm(nn.Module):
  """x * rsqrt(mean(x^2) + eps) in float32, then scale in the activation dtype (Zhang and Sennrich 2019; T5)."""
  dtype: jnp.dtype
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],), jnp.float32)
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
    return x.astype(self.dtype) * scale.astype(self.dtype)


class TokenEmbedder(nn.Module):
  """Token embedding, not scaled. An id outside [0, V) gives a zero vector (SPEC 1.1)."""
  config: ModelConfig

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    config = self.config
    table = self.param('embedding', nn.initializers.normal(1.), (config.vocab_size, config.emb_dim), jnp.float32)
    if not is_partitioned():
      return _rows_of(jnp.asarray(table), ids).astype(config.dtype)
    return _embed(jnp.asarray(table), ids, jnp.dtype(config.dtype))


def _rows_of(table: jax.Array, ids: jax.Array) -> jax.Array:
  ids = jnp.where(ids < 0, table.shape[0], ids)  # a negative index would count from the end
  return table.at[ids].get(mode='fill', fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _embed(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """On a mesh: a device looks up the ids of its own rows in its part of the vocabulary, [V, D], [B, L] -> [B, L, D].

  The table is cast before it is brought together; its gradient is added up in float32.
  """
  vocab, (fsdp, _) = split_over('vocab', table.shape[0]), kept_over('embed')

  def local(table, ids):
    table = table.astype(dtype)
    if fsdp:
      table = jax.lax.all_gather(table, fsdp, axis=1, tiled=True)
    if not vocab:
      return _rows_of(table, ids)
    return jax.lax.psum(_rows_of(table, ids - jax.lax.axis_index(vocab) * table.shape[0]), vocab)

  rows = PartitionSpec(BATCH_AXES)
  return jax.shard_map(local, in_specs=(PartitionSpec(vocab or None, fsdp or None), rows), out_specs=rows, check_vma=False)(
      table, pad_rows(ids, -1))[:ids.shape[0]]


def _embed_bwd(dtype, residuals, dy):
  del dtype
  table, ids = residuals
  vocab, (_, fsdp) = split_over('vocab', table.shape[0]), kept_over('embed')

  def local(ids, dy):
    size = table.shape[0] // (jax.lax.axis_size(vocab) if vocab else 1)
    at = ids - jax.lax.axis_index(vocab) * size if vocab else ids
    at = jnp.where(at < 0, size, at)
    dtable = jnp.zeros((size, table.shape[1]), jnp.float32).at[at].add(dy.astype(jnp.float32), mode='drop')
    return add_up(dtable, fsdp, 1)

  rows = PartitionSpec(BATCH_AXES)
  dtable = jax.shard_map(local, in_specs=(rows, rows), out_specs=PartitionSpec(vocab or None, fsdp or None), check_vma=False)(
      pad_rows(ids, -1), pad_rows(dy))
  return dtable, None


_embed.defvjp(lambda table, ids, dtype: (_embed(table, ids, dtype), (table, ids)), _embed_bwd)


class Dropout(nn.Module):
  """Dropout with one mask along `broadcast_dim` (the length: the same features drop at every position, as in T5)."""
  rate: float
  broadcast_dim: int = -2

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    return nn.Dropout(self.rate, broadcast_dims=(self.broadcast_dim,))(x, deterministic=not train)


@jax.custom_vjp
def _double_gate(a: jax.Array, b: jax.Array) -> jax.Array:
  """(a1 * silu(a2)) * b with a = [a1, a2] along the last axis: the released models' three-factor gate (SPEC 1.9)."""
  a1, a2 = jnp.split(a, 2, axis=-1)
  return (a1 * jax.nn.silu(a2)) * b


def _double_gate_bwd(residuals, dh):
  # Written out so that only a and b are kept: what autodiff would save besides costs more memory traffic than exp.
  a, b = residuals
  a1, a2 = jnp.split(a, 2, axis=-1)
  sigmoid = jax.nn.sigmoid(a2)
  silu = a2 * sigmoid
  db = dh * a1 * silu
  da1 = dh * b * silu
  da2 = dh * b * a1 * (sigmoid * (1 + a2 * (1 - sigmoid)))
  return jnp.concatenate([da1, da2], axis=-1), db


_double_gate.defvjp(lambda a, b: (_double_gate(a, b), (a, b)), _double_gate_bwd)


def gate(hidden: Sequence[jax.Array], activations: Sequence[str]) -> jax.Array:
  """The product over i of activation_i(hidden_i).

  Args:
    hidden: one array per activation, [..., F], or [..., 2F] for 'swiglu' (first half linear, second half silu).
    activations: names of `config.ACTIVATIONS`.
  """
  if tuple(activations) == ('swiglu', 'linear'):
    return _double_gate(*hidden)
  functions = {'silu': jax.nn.silu, 'gelu': jax.nn.gelu, 'relu': jax.nn.relu, 'linear': lambda x: x,
               'swiglu': lambda x: (lambda a: a[0] * jax.nn.silu(a[1]))(jnp.split(x, 2, axis=-1))}
  return math.prod((functions[name](h) for name, h in zip(activations, hidden)), start=1)


def hidden_widths(config: ModelConfig) -> Tuple[int, ...]:
  """Output width of wi_0 and wi_1: 2F for 'swiglu', else F."""
  return tuple(config.mlp_dim * (2 if name == 'swiglu' else 1) for name in config.mlp_activations)


class GatedMLP(nn.Module):
  """Feed-forward network with two input kernels wi_0, wi_1 and one output kernel wo, no bias: [B, L, D] -> same."""
  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    config = self.config
    init = truncated_normal_init(config.init_scale)
    hidden = [linear(x, Kernel((config.emb_dim, width), init, name=f'wi_{i}')(config.dtype))
              for i, width in enumerate(hidden_widths(config))]
    h = gate(hidden, config.mlp_activations)
    h = Dropout(config.dropout_rate)(h, train)
    return linear(h, Kernel((config.mlp_dim, config.emb_dim), init, name='wo')(config.dtype))
