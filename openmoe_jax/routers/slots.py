"""Who gets an expert's slots: choices queue up by rank, then by a priority of tokens, until the capacity is reached."""

from typing import Optional

import jax
import jax.numpy as jnp

from openmoe_jax.config import ModelConfig
from openmoe_jax.routers.types import TokenAssignment

_BLOCK = 32  # choices of a queue that are compared with each other


def queue_positions(expert_index: jax.Array, num_experts: int) -> jax.Array:
  """Place of each choice in its expert's queue: all first choices in token order, then all second choices, ...

  Args:
    expert_index: int32 [G, T, S]; values outside [0, E) take no place and get -1.

  Returns:
    int32 [G, T, S], counted from 0, and counting choices beyond the capacity too.
  """
  groups, tokens, selected = expert_index.shape
  queue = expert_index.swapaxes(1, 2).reshape(groups, selected * tokens)
  return _places(queue, num_experts).reshape(groups, selected, tokens).swapaxes(1, 2)


def in_token_order(expert_index: jax.Array, num_experts: int) -> jax.Array:
  """As `queue_positions`, if tokens queued one after another with all of their choices."""
  return _places(expert_index.reshape(expert_index.shape[0], -1), num_experts).reshape(expert_index.shape)


def _places(queue: jax.Array, num_experts: int) -> jax.Array:
  """How many equal numbers stand before each one: int32 [G, Q] -> [G, Q]; -1 for those outside [0, E).

  Within a block by comparing all pairs, and from the blocks before by counting experts: a running sum of one-hot
  vectors over the whole queue would cost E * log(Q) a choice.
  """
  groups, length = queue.shape
  queue = jnp.pad(queue, ((0, 0), (0, -length % _BLOCK)), constant_values=num_experts).reshape(groups, -1, _BLOCK)
  earlier = jnp.tril(jnp.ones((_BLOCK, _BLOCK), bool), -1)
  within = jnp.sum((queue[..., :, None] == queue[..., None, :]) & earlier, axis=-1, dtype=jnp.int32)
  is_expert = queue[..., None] == jnp.arange(num_experts)
  counts = jnp.sum(is_expert, axis=2, dtype=jnp.int32)
  before = jnp.cumsum(counts, axis=1) - counts
  places = within + jnp.sum(jnp.where(is_expert, before[:, :, None], 0), axis=-1)
  places = jnp.where((queue >= 0) & (queue < num_experts), places, -1)
  return places.reshape(groups, -1)[:, :length]


def token_order(config: ModelConfig, confidence: jax.Array, key: Optional[jax.Array]) -> Optional[jax.Array]:
  """In which order the tokens of a group choose: int32 [G, T], or None for the order of their positions.

  Args:
    config: batch_prioritized and priority are read.
    confidence: float32 [G, T], the gate of the first choice.
    key: of the random order; without one (evaluation) it is the same order every time.
  """
  if config.batch_prioritized:  # Riquelme et al. 2021: the surest tokens choose first
    return jnp.argsort(-jax.lax.stop_gradient(confidence), axis=1, stable=True)
  if config.priority == 'reversed':
    return jnp.broadcast_to(jnp.arange(confidence.shape[1])[::-1], confidence.shape)
  if config.priority == 'random':
    return jnp.argsort(jax.random.uniform(jax.random.key(0) if key is None else key, confidence.shape), axis=1)
  return None


def without_padding(config: ModelConfig, values: jax.Array, is_token: jax.Array) -> jax.Array:
  """`values` [G, T, *], 0 at padding if `ignore_padding_tokens`."""
  return values * is_token[..., None] if config.ignore_padding_tokens else values


def assign(config: ModelConfig, expert_index: jax.Array, gate: jax.Array, is_token: jax.Array, capacity: int,
           key: Optional[jax.Array] = None) -> TokenAssignment:
  """Gives out slots: all first choices before all second ones, and within a rank in `token_order`.

  Args:
    config: batch_prioritized, priority, ignore_padding_tokens, normalize_gates and num_experts are read.
    expert_index, gate: [G, T, S], what each token asks for, most wanted first.
    is_token: bool [G, T]; others ask for nobody if `ignore_padding_tokens`.
    capacity: slots per expert and group.
    key: see `token_order`.
  """
  if config.ignore_padding_tokens:
    expert_index = jnp.where(is_token[..., None], expert_index, config.num_experts)
  order = token_order(config, gate[..., 0], key)
  if order is None:
    slot = queue_positions(expert_index, config.num_experts)
  else:
    order = order[..., None]
    position = queue_positions(jnp.take_along_axis(expert_index, order, axis=1), config.num_experts)
    slot = jnp.take_along_axis(position, jnp.argsort(order, axis=1), axis=1)
  if config.normalize_gates:  # over all choices, dropped ones too: what a token gets does not depend on others' luck
    gate = gate / jnp.sum(gate, axis=-1, keepdims=True)
  kept = (slot >= 0) & (slot < capacity)
  return TokenAssignment(expert_index, jnp.where(kept, gate, 0.), slot, kept)
