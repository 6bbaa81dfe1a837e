"""Two-level experts: a gate over groups of experts, and in each a gate over its experts (Shazeer et al. 2017,
arXiv 1701.06538, appendix B; without its noise).

The probability of an expert is that of its group times its own within the group, so that these are probabilities of all
experts together; a token asks for the S / S_g most probable experts in each of its S_g most probable groups.
"""

import jax
import jax.numpy as jnp

from openmoe_jax.config import ModelConfig
from openmoe_jax.routers import slots
from openmoe_jax.routers.report import load_balance_loss, report, router_z_loss
from openmoe_jax.routers.types import RouterContext, RouterOutput


def route(config: ModelConfig, logits: jax.Array, is_token: jax.Array, capacity: int, context: RouterContext
          ) -> RouterOutput:
  """Assigns tokens to expert slots; gates are the products of the two probabilities.

  Args:
    config: num_expert_groups and num_selected_groups, and what `top_k.route` reads. Experts e * E / num_expert_groups
      and following are group e.
    logits, is_token, capacity: as for `top_k.route`.
    context: more_logits [G, T, num_expert_groups]; the key of a random order.

  Returns:
    As `top_k.route`, with the load-balance loss of the products. The z-loss is that of the groups' logits plus the mean
    over groups of their experts'.
  """
  groups = config.num_expert_groups
  size, per_group = config.num_experts // groups, config.num_selected_experts // config.num_selected_groups
  group_logits = slots.without_padding(config, context.more_logits, is_token)
  logits = slots.without_padding(config, logits, is_token)
  within = logits.reshape(*logits.shape[:2], groups, size)
  of_group, of_expert = jax.nn.softmax(group_logits, axis=-1), jax.nn.softmax(within, axis=-1)

  _, group_index = jax.lax.top_k(of_group, config.num_selected_groups)
  _, inner_index = jax.lax.top_k(jnp.take_along_axis(of_expert, group_index[..., None], axis=2), per_group)
  expert_index = (group_index[..., None] * size + inner_index).reshape(*logits.shape[:2], -1)
  probs = (of_group[..., None] * of_expert).reshape(logits.shape)
  # The most wanted first, which decides who gets slots.
  gate, order = jax.lax.top_k(jnp.take_along_axis(probs, expert_index, axis=-1), config.num_selected_experts)
  expert_index = jnp.take_along_axis(expert_index, order, axis=-1)
  assignment = slots.assign(config, expert_index, gate, is_token, capacity, context.key)
  balance = load_balance_loss(slots.without_padding(config, probs, is_token), assignment.expert_index)
  return report(config, assignment, is_token, capacity, balance, router_z_loss(group_logits) + router_z_loss(within))
