"""Rotary self-attention without 1/sqrt(d) in the forward pass, computed in causal blocks of queries (SPEC 1.6 to 1.8).

Shapes: B batch, L length, D emb, H heads, K head_dim; q and k index positions of queries and keys.
"""

import math
from typing import NamedTuple, Optional, Tuple, Union

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from openmoe_jax import splash
from openmoe_jax.config import ConfigError, ModelConfig, require
from openmoe_jax.layers import Dropout, Kernel, linear, normal_init
from openmoe_jax.partitioning import constrain, device_kind

# What the model and its loss read of a batch (SPEC 10); decoder_positions is ignored, as in the original.
FEATURES = ('decoder_input_tokens', 'decoder_target_tokens', 'decoder_loss_weights', 'decoder_segment_ids',
            'decoder_causal_attention')
MASKED = -1e10  # far below any score, so that exp gives exactly 0


class BlockContext(NamedTuple):
  """What every layer may look at besides its input: the batch's tokens and what follows from them.

  Attributes:
    token_ids: int32 [B, L], decoder_input_tokens.
    positions: int32 [B, L] index in the row; packed segments do not restart (SPEC 1.8).
    is_target: bool [B, L], decoder_target_tokens > 0: positions that attend and are attended to.
    logit_mask: bool [B, L], SPEC 1.2.
    segment_ids: int32 [B, L] or None, of a packed batch.
    bidirectional: bool [B, L] or None: positions that see each other both ways.
    slot: int32 [] or None: where in the cache a single-token step puts its key and value.
    cached: bool [B, S] or None: slots of the cache that it sees, its own included.
    block: int32 [] or None: the block being run, where caches carry a leading axis of blocks.
  """
  token_ids: jax.Array
  positions: jax.Array
  is_target: jax.Array
  logit_mask: jax.Array
  segment_ids: Optional[jax.Array] = None
  bidirectional: Optional[jax.Array] = None
  slot: Optional[jax.Array] = None
  cached: Optional[jax.Array] = None
  block: Optional[jax.Array] = None


class KeysValues(NamedTuple):
  """Rotated keys, and values, of one layer: [B, H, S, K] each, in the activation dtype.

  A key is turned by its own position once and for all, so the order of the slots means nothing.
  """
  key: jax.Array
  value: jax.Array


def make_logit_mask(token_ids: jax.Array) -> jax.Array:
  """True where the token, or the next one, is not 0, and at the first position: bool [B, L] (SPEC 1.2)."""
  nonzero = token_ids > 0
  following = jnp.pad(nonzero[:, 1:], ((0, 0), (0, 1)))
  return (nonzero | following).at[:, 0].set(True)


def make_context(config: ModelConfig, batch) -> BlockContext:
  """The context of a feature dictionary (SPEC 10).

  Raises:
    ConfigError: a feature is missing (decoder_causal_attention only where the configuration needs it), is not of the
      shape [B, L] that all share, or tokens are not integers.
  """
  needed = ['decoder_input_tokens', 'decoder_target_tokens']
  if config.inputs_bidirectional_attention:
    needed.append('decoder_causal_attention')
  missing = [name for name in needed if name not in batch]
  if missing:
    raise ConfigError(f'the batch lacks {", ".join(missing)}; it has {", ".join(sorted(batch))}')
  shape = jnp.shape(batch['decoder_input_tokens'])
  for name in FEATURES:
    require(name not in batch or jnp.shape(batch[name]) == shape and len(shape) == 2, f'{name} has another shape than '
            f'[batch, length], the same for all features: {jnp.shape(batch.get(name, 0))}; that of decoder_input_tokens '
            f'is {shape}')
  tokens = jnp.asarray(batch['decoder_input_tokens'])
  for name in needed[:2]:
    dtype = jnp.asarray(batch[name]).dtype
    require(jnp.issubdtype(dtype, jnp.integer), f'{name} has the dtype {dtype}; token ids are integers')
  tokens = tokens.astype(jnp.int32)
  segment_ids = batch.get('decoder_segment_ids')
  return BlockContext(
      token_ids=tokens,
      positions=jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape),
      is_target=jnp.asarray(batch['decoder_target_tokens']) > 0,
      logit_mask=make_logit_mask(tokens),
      segment_ids=None if segment_ids is None else jnp.asarray(segment_ids),
      bidirectional=(jnp.asarray(batch['decoder_causal_attention']) > 0
                     if config.inputs_bidirectional_attention else None))


def attention_mask(context: BlockContext, queries: slice, keys: slice) -> jax.Array:
  """Which keys each query sees: bool [B, 1, q, k] (SPEC 1.7)."""
  q, k = context.positions[:, queries, None], context.positions[:, None, keys]
  mask = q >= k
  if context.bidirectional is not None:
    mask |= context.bidirectional[:, queries, None] & context.bidirectional[:, None, keys]
  mask &= context.is_target[:, queries, None] & context.is_target[:, None, keys]
  if context.segment_ids is not None:
    mask &= context.segment_ids[:, queries, None] == context.segment_ids[:, None, keys]
  return mask[:, None]


def rope_tables(length: int, head_dim: int) -> Tuple[jax.Array, jax.Array]:
  """float32 sin and cos [L, K] of position times 10000^(-2j/K), the K/2 angles tiled twice (Su et al. 2021, NeoX)."""
  # NumPy makes constants of them. A compiler may compute sines and cosines again for every head, row, layer and use.
  frequency = np.float32(10000.) ** (-np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
  angle = np.arange(length, dtype=np.float32)[:, None] * frequency
  angle = np.concatenate([angle, angle], axis=-1)
  return jnp.asarray(np.sin(angle)), jnp.asarray(np.cos(angle))


def apply_rope(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Rotates [B, L, H, K] by tables [L, K], or [B, L, K]; the two halves of K are the pairs."""
  sin, cos = (t[..., :, None, :].astype(x.dtype) for t in (sin, cos))
  x1, x2 = jnp.split(x, 2, axis=-1)
  return x * cos + jnp.concatenate([-x2, x1], axis=-1) * sin


class SelfAttention(nn.Module):
  """Multi-head self-attention: x [B, L, D] -> [B, L, D]. Kernels are 2-D, heads outermost in their columns.

  If `decoding` there is a second result: the `KeysValues` of these L positions, or, given a `cache` (then L = 1), the
  cache with the position's key and value in it.
  """
  config: ModelConfig
  decoding: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, context: BlockContext, train: bool, cache: Optional[KeysValues] = None
               ) -> Union[jax.Array, Tuple[jax.Array, KeysValues]]:
    config = self.config
    heads, head_dim = config.num_heads, config.head_dim
    init = normal_init(config.init_scale, config.emb_dim)
    # The usual 1/sqrt(K) on the scores is in the query's initial values instead.
    query_init = normal_init(config.init_scale / head_dim, config.emb_dim)

    def project(name, kernel_init):
      kernel = Kernel((config.emb_dim, heads * head_dim), kernel_init, name=name)(config.dtype)
      return constrain(linear(x, kernel).reshape(*x.shape[:2], heads, head_dim), 'batch', 'length', 'heads', 'kv')

    q, k, v = project('query', query_init), project('key', init), project('value', init)
    if cache is None:
      sin, cos = rope_tables(x.shape[1], head_dim)
    else:
      sin, cos = (table[context.positions] for table in rope_tables(cache.key.shape[-2] + 1, head_dim))
    q, k = apply_rope(q, sin, cos), apply_rope(k, sin, cos)
    keep = None
    if train and config.dropout_rate:  # one mask of keys for all queries of a row and head, as in T5X
      keep = Dropout(config.dropout_rate)(jnp.ones((x.shape[0], heads, 1, x.shape[1]), x.dtype), train)
    new = KeysValues(k.swapaxes(1, 2), v.swapaxes(1, 2))
    if cache is None and config.attention == 'splash' and splash.usable(x.shape[1]) and splash.runs_on(device_kind()):
      out = splash_attention(q, k, v, context)
    elif cache is None:
      out = blocked_attention(q, k, v, context, config.attention_query_blocks, keep)
    else:  # Written before it is read: the other way round XLA would copy the cache in every step.
      new = write_slot(cache, new, context)
      out = cached_attention(q, read_block(new, context), context.cached)
    out = constrain(out, 'batch', 'length', 'heads', 'kv').reshape(*x.shape[:2], heads * head_dim)
    out_init = normal_init(config.init_scale, heads * head_dim)
    out = linear(out, Kernel((heads * head_dim, config.emb_dim), out_init, name='out')(config.dtype))
    return (out, new) if self.decoding else out


def write_slot(cache: KeysValues, new: KeysValues, context: BlockContext) -> KeysValues:
  """`cache` [.., B, H, S, K] with `new` [B, H, 1, K] in the step's slot, of the block being run if there are several."""
  if context.block is None:
    at = (0, 0, context.slot, 0)
  else:
    at, new = (context.block, 0, 0, context.slot, 0), jax.tree.map(lambda x: x[None], new)
  return jax.tree.map(lambda cache, x: jax.lax.dynamic_update_slice(cache, x, at), cache, new)


def read_block(cache: KeysValues, context: BlockContext) -> KeysValues:
  """The [B, H, S, K] of the block being run."""
  if context.block is None:
    return cache
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, context.block, keepdims=False), cache)


def cached_attention(q: jax.Array, cache: KeysValues, seen: jax.Array) -> jax.Array:
  """One query a row, [B, 1, H, K], against the slots `seen` [B, S] of the cache: [B, 1, H, K]."""
  scores = jnp.einsum('bqhd,bhsd->bhqs', q, cache.key).astype(jnp.float32)
  scores = jnp.where(seen[:, None, None, :], scores, MASKED)
  weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  out = jnp.einsum('bhqs,bhsd->bhqd', weights.astype(q.dtype), cache.value)
  return (out / total).astype(q.dtype).swapaxes(1, 2)


def blocked_attention(q: jax.Array, k: jax.Array, v: jax.Array, context: BlockContext, num_blocks: int,
                      keep: Optional[jax.Array] = None) -> jax.Array:
  """Softmax attention, unscaled: [B, L, H, K] each -> [B, L, H, K]. `keep` [B, H, 1, L] multiplies the weights.

  A block of queries meets only the keys up to its end, which saves almost half of the causal square. Queries whose
  target is padding may see nothing and are put in separately, see `_blind_attention`.
  """
  out = _in_blocks(q, k, v, context, num_blocks, keep)
  return _with_blind(out, q, k, v, context, keep)


def splash_attention(q: jax.Array, k: jax.Array, v: jax.Array, context: BlockContext) -> jax.Array:
  """As `blocked_attention`, by a kernel for TPU."""
  out = splash.attention(q, k, v, splash.ids_of(context.is_target, context.segment_ids))
  return _with_blind(out, q, k, v, context)


def _with_blind(out, q, k, v, context: BlockContext, keep=None):
  return jnp.where(context.is_target[:, :, None, None], out, _blind_attention(q, k, v, keep))


def _in_blocks(q, k, v, context: BlockContext, num_blocks: int, keep):
  length = q.shape[1]
  if context.bidirectional is not None:
    num_blocks = 1
  size = math.ceil(length / num_blocks)
  outs = []
  for start in range(0, length, size):
    stop = min(start + size, length)
    keys = slice(0, stop if context.bidirectional is None else length)
    mask = attention_mask(context, slice(start, stop), keys)
    factor = None if keep is None else keep[..., keys]
    outs.append(_attend(q[:, start:stop], k[:, keys], v[:, keys], mask, factor))
  return jnp.concatenate(outs, axis=1)


@jax.custom_vjp
def _attend(q, k, v, mask, keep):
  """One block of queries [B, q, H, K] against keys and values [B, k, H, K] under a mask [B, 1, q, k].

  The [B, H, q, k] arrays are computed again in the backward pass from the saved log-sum-exp (as in Dao et al. 2022):
  cheaper than writing and reading them, on any device.
  """
  return _attend_fwd(q, k, v, mask, keep)[0]


def _attend_fwd(q, k, v, mask, keep):
  scores = jnp.where(mask, jnp.einsum('bqhd,bkhd->bhqk', q, k).astype(jnp.float32), MASKED)
  top = jnp.max(scores, axis=-1, keepdims=True)
  weights = jnp.exp(scores - top)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  weights = weights.astype(q.dtype)
  out = jnp.einsum('bhqk,bkhd->bhqd', weights if keep is None else weights * keep, v)
  out = (out / total).astype(q.dtype)
  return out.swapaxes(1, 2), (q, k, v, mask, keep, out, top + jnp.log(total))


def _attend_bwd(residuals, dout):
  q, k, v, mask, keep, out, log_total = residuals
  dout = dout.swapaxes(1, 2)
  # Keys lead in everything here: the key and value gradients then need no transposed operand. Scores and weight
  # gradients are one product, so that the compiler can neither merge these scores with the forward pass's nor compute
  # them ahead of time; either would keep the scores of all layers in memory after all.
  across = lambda x: x.swapaxes(-1, -2)
  scores, dweights = jnp.einsum('nbkhd,nbhqd->nbhkq', jnp.stack([k, v]), jnp.stack([q.swapaxes(1, 2), dout]))
  weights = jnp.exp(jnp.where(across(mask), scores.astype(jnp.float32), MASKED) - across(log_total))
  dweights = dweights.astype(jnp.float32)
  kept = weights if keep is None else weights * across(keep)
  dweights = dweights if keep is None else dweights * across(keep)
  dv = jnp.einsum('bhkq,bhqd->bkhd', kept.astype(v.dtype), dout)
  mean = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)[:, :, None, :]
  dscores = (weights * (dweights - mean)).astype(q.dtype)
  dk = jnp.einsum('bhkq,bqhd->bkhd', dscores, q)
  dq = jnp.einsum('bhkq,bkhd->bqhd', dscores, k)
  return dq, dk, dv, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _blind_attention(q: jax.Array, k: jax.Array, v: jax.Array, keep: Optional[jax.Array] = None) -> jax.Array:
  """What a query gets that is allowed no key at all: the average of all L values (SPEC 1.6).

  A bias of -1e10 swallows every score, so that they come out equal; but the softmax is still differentiated at that
  point, and so d out / d score_k = (v_k - mean v) / L reaches q and k. The second term has the value 0 and exactly this
  gradient, at the cost of a [K, K] matrix a head instead of [L, L] scores. Dropout of the equal weights is the same as
  dropout of the values.
  """
  if keep is not None:
    v = v * keep[:, :, 0, :].swapaxes(1, 2)[..., None]
  mean = jnp.mean(v, axis=1, keepdims=True)
  slope = jnp.einsum('bkhd,bkhe->bhde', k, jax.lax.stop_gradient(v - mean)) / v.shape[1]
  linear = jnp.einsum('bqhd,bhde->bqhe', q, slope)
  return mean + (linear - jax.lax.stop_gradient(linear))
