"""Sigmoid affinities with loss-free balancing (DeepSeek-V3, arXiv 2412.19437; Wang et al. 2024, arXiv 2408.15664).

Every expert has a bias that is added to its affinity when experts are chosen, and only then: gates do not see it, and
no gradient reaches it. After each step the biases of experts that were asked for too often fall by a constant, those of
the others rise.
"""

import jax
import jax.numpy as jnp

from openmoe_jax.config import ModelConfig
from openmoe_jax.routers import slots
from openmoe_jax.routers.report import load_balance_loss, report, router_z_loss
from openmoe_jax.routers.types import RouterContext, RouterOutput


def route(config: ModelConfig, logits: jax.Array, is_token: jax.Array, capacity: int, context: RouterContext
          ) -> RouterOutput:
  """Assigns tokens to expert slots: the S largest of sigmoid(logit) + bias, with sigmoid(logit) as gates.

  The paper divides the gates by their sum over the S choices (`normalize_gates`). The auxiliary loss is the load-balance
  loss of the affinities divided by their sum over all experts; with `aux_loss_factor` = 0 it is only logged.

  Args:
    config, logits, is_token, capacity: as for `top_k.route`.
    context: state['bias'] float32 [E], and the key of a random order.
  """
  logits = slots.without_padding(config, logits, is_token)
  affinity = jax.nn.sigmoid(logits)
  _, expert_index = jax.lax.top_k(jax.lax.stop_gradient(affinity) + context.state['bias'], config.num_selected_experts)
  gate = jnp.take_along_axis(affinity, expert_index, axis=-1)
  assignment = slots.assign(config, expert_index, gate, is_token, capacity, context.key)
  shares = affinity / jnp.sum(affinity, axis=-1, keepdims=True)
  balance = load_balance_loss(slots.without_padding(config, shares, is_token), assignment.expert_index)
  return report(config, assignment, is_token, capacity, balance, router_z_loss(logits))


def update_bias(bias: jax.Array, expert_load: jax.Array, rate: float) -> jax.Array:
  """Biases [.., E] after a step in which the experts were asked for with `expert_load` [.., E] of the mean, before
  capacity: up by `rate` where it was below 1, down where it was above."""
  return bias + rate * jnp.sign(1. - expert_load)
