"""Top-k token choice with capacity: every token asks for its k most probable experts (SPEC 2.4 to 2.11).

The routing of Switch (k = 1), ST-MoE and OpenMoE (k = 2): softmax over the experts, slots given out by choice rank
first and token order second, raw probabilities as gates.
"""

import jax
import jax.numpy as jnp

from openmoe_jax.config import ModelConfig
from openmoe_jax.routers.types import RouterOutput, TokenAssignment


def queue_positions(expert_index: jax.Array, num_experts: int) -> jax.Array:
  """Place of each choice in its expert's queue: all first choices in token order, then all second choices, ...

  Args:
    expert_index: int32 [G, T, S]; values outside [0, E) take no place and get -1.

  Returns:
    int32 [G, T, S], counted from 0, and counting choices beyond the capacity too.
  """
  groups, tokens, selected = expert_index.shape
  queue = expert_index.swapaxes(1, 2).reshape(groups, selected * tokens)
  one_hot = jax.nn.one_hot(queue, num_experts, dtype=jnp.int32)
  position = jnp.sum(jnp.cumsum(one_hot, axis=1) * one_hot, axis=2) - 1
  return position.reshape(groups, selected, tokens).swapaxes(1, 2)


def load_balance_loss(probs: jax.Array, expert_index: jax.Array) -> jax.Array:
  """Auxiliary loss of Switch (Fedus et al. 2021, eq. 4 to 6), per group and averaged over groups.

  Args:
    probs: float32 [G, T, E].
    expert_index: int32 [G, T, S], before capacity; values outside [0, E) do not count.

  Returns:
    float32 []: mean over groups of E * sum_e f_e P_e, with f_e the fraction of the group's tokens that have e among
    their choices and P_e the mean probability of e; S when balanced.
  """
  num_experts = probs.shape[-1]
  chosen = jnp.sum(jax.nn.one_hot(expert_index, num_experts, dtype=jnp.float32), axis=2)
  return num_experts * jnp.mean(jnp.sum(jnp.mean(chosen, axis=1) * jnp.mean(probs, axis=1), axis=-1))


def route(config: ModelConfig, logits: jax.Array, is_token: jax.Array, capacity: int) -> RouterOutput:
  """Assigns tokens to expert slots.

  Args:
    config: num_selected_experts, batch_prioritized and ignore_padding_tokens are read.
    logits: float32 [G, T, E].
    is_token: bool [G, T], False for padding (all-zero input vectors); read only if `ignore_padding_tokens`.
    capacity: slots per expert and group.
  """
  groups, tokens, num_experts = logits.shape
  selected = config.num_selected_experts
  if config.ignore_padding_tokens:
    logits = logits * is_token[..., None]
  probs = jax.nn.softmax(logits, axis=-1)
  gate, expert_index = jax.lax.top_k(probs, selected)
  if config.ignore_padding_tokens:
    probs = probs * is_token[..., None]
    expert_index = jnp.where(is_token[..., None], expert_index, num_experts)  # asks for nobody
    num_tokens = jnp.sum(is_token)
  else:
    num_tokens = groups * tokens

  if config.batch_prioritized:  # Riquelme et al. 2021: the surest tokens choose first
    order = jnp.argsort(-jax.lax.stop_gradient(gate[..., 0]), axis=1, stable=True)[..., None]
    position = queue_positions(jnp.take_along_axis(expert_index, order, axis=1), num_experts)
    slot = jnp.take_along_axis(position, jnp.argsort(order, axis=1), axis=1)
  else:
    slot = queue_positions(expert_index, num_experts)
  kept = (slot >= 0) & (slot < capacity)
  gate = jnp.where(kept, gate, 0.)

  num_kept = jnp.sum(kept)
  load = jnp.sum(jax.nn.one_hot(expert_index, num_experts, dtype=jnp.float32), axis=(0, 1, 2))
  return RouterOutput(
      assignment=TokenAssignment(expert_index, gate, slot, kept),
      auxiliary_loss=load_balance_loss(probs, expert_index),
      router_z_loss=jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2),
      # Not 1 - served / tokens, which rounding makes negative where every token is served.
      fraction_tokens_left_behind=(num_tokens - jnp.sum(jnp.any(kept, axis=-1))) / jnp.maximum(num_tokens, 1),
      expert_usage=num_kept / (num_experts * capacity * groups),
      router_confidence=jnp.sum(gate) / jnp.maximum(num_kept, 1),
      expert_load=load * (num_experts / jnp.maximum(num_tokens * selected, 1)))
