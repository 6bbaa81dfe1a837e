"""Losses that routers share, and what is logged about an assignment (SPEC 2.9, 2.10)."""

import jax
import jax.numpy as jnp

from openmoe_jax.config import ModelConfig
from openmoe_jax.routers.types import RouterOutput, TokenAssignment


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


def router_z_loss(logits: jax.Array) -> jax.Array:
  """Mean square of logsumexp (Zoph et al. 2022, ST-MoE): [.., E] -> float32 []."""
  return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)


def report(config: ModelConfig, assignment: TokenAssignment, is_token: jax.Array, capacity: int,
           auxiliary_loss: jax.Array, z_loss: jax.Array) -> RouterOutput:
  """The output of a router in which tokens choose.

  Args:
    config: ignore_padding_tokens is read, by which padding does not count as tokens.
    assignment: [G, T, S].
    is_token: bool [G, T].
    capacity: slots per expert and group.
    auxiliary_loss, z_loss: float32 [], unscaled.
  """
  groups, tokens, selected = assignment.expert_index.shape
  num_tokens = jnp.sum(is_token) if config.ignore_padding_tokens else groups * tokens
  num_kept = jnp.sum(assignment.kept)
  load = jnp.sum(jax.nn.one_hot(assignment.expert_index, config.num_experts, dtype=jnp.float32), axis=(0, 1, 2))
  served = jnp.sum(jnp.any(assignment.kept, axis=-1))
  return RouterOutput(
      assignment=assignment,
      auxiliary_loss=auxiliary_loss,
      router_z_loss=z_loss,
      # Not 1 - served / tokens, which rounding makes negative where every token is served.
      fraction_tokens_left_behind=(num_tokens - served) / jnp.maximum(num_tokens, 1),
      expert_usage=num_kept / (config.num_experts * capacity * groups),
      router_confidence=jnp.sum(assignment.gate) / jnp.maximum(num_kept, 1),
      expert_load=load * (config.num_experts / jnp.maximum(num_tokens * selected, 1)))
