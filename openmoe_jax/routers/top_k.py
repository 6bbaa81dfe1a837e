"""Top-k token choice with capacity: every token asks for its k most probable experts (SPEC 2.4 to 2.11).

The routing of ST-MoE (Zoph et al. 2022, arXiv 2202.08906) and OpenMoE (Xue et al. 2024, arXiv 2402.01739), both with
k = 2: softmax over the experts, slots given out by choice rank first and token order second, raw probabilities as gates.
"""

import jax

from openmoe_jax.config import ModelConfig
from openmoe_jax.routers import slots
from openmoe_jax.routers.report import load_balance_loss, report, router_z_loss
from openmoe_jax.routers.types import NO_CONTEXT, RouterContext, RouterOutput


def route(config: ModelConfig, logits: jax.Array, is_token: jax.Array, capacity: int,
          context: RouterContext = NO_CONTEXT) -> RouterOutput:
  """Assigns tokens to expert slots.

  Args:
    config: num_selected_experts, and what `slots.assign` reads.
    logits: float32 [G, T, E].
    is_token: bool [G, T], False for padding (all-zero input vectors); read only if `ignore_padding_tokens`.
    capacity: slots per expert and group.
    context: the key of a random order.
  """
  logits = slots.without_padding(config, logits, is_token)
  probs = jax.nn.softmax(logits, axis=-1)
  gate, expert_index = jax.lax.top_k(probs, config.num_selected_experts)
  assignment = slots.assign(config, expert_index, gate, is_token, capacity, context.key)
  balance = load_balance_loss(slots.without_padding(config, probs, is_token), assignment.expert_index)
  return report(config, assignment, is_token, capacity, balance, router_z_loss(logits))
