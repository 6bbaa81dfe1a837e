"""Expert choice: every expert takes the tokens of the group that it has the largest probability for (Zhou et al. 2022,
arXiv 2202.09368; SPEC 2.11).

All experts are full and nothing has to be balanced; a token may be taken by all of them or by none. Whether a token is
taken depends on the other tokens of the group, later ones included: a causal model trained with it sees the future, and
when it generates token by token that future is missing.
"""

import jax
import jax.numpy as jnp

from openmoe_jax.config import ModelConfig
from openmoe_jax.routers import slots
from openmoe_jax.routers.report import router_z_loss
from openmoe_jax.routers.types import NO_CONTEXT, RouterContext, RouterOutput, SlotAssignment


def route(config: ModelConfig, logits: jax.Array, is_token: jax.Array, capacity: int,
          context: RouterContext = NO_CONTEXT) -> RouterOutput:
  """Fills the experts' slots with tokens; of equally probable ones the first.

  Args:
    config: ignore_padding_tokens is read: padding is then never taken, and slots stay empty where tokens run out.
    logits, is_token, capacity: as for `top_k.route`; a group of fewer tokens has as many slots as tokens.
    context: not read.

  Returns:
    With a SlotAssignment [G, E, min(C, T)]; gates are probabilities, the auxiliary loss is 0, and `expert_load` counts
    slots that are filled.
  """
  del context
  groups, tokens, num_experts = logits.shape
  logits = slots.without_padding(config, logits, is_token)
  probs = jax.nn.softmax(logits, axis=-1).swapaxes(1, 2)
  if config.ignore_padding_tokens:
    probs = jnp.where(is_token[:, None, :], probs, 0.)
  gate, token = jax.lax.top_k(probs, min(capacity, tokens))
  filled = gate > 0 if config.ignore_padding_tokens else jnp.ones_like(gate, bool)
  assignment = SlotAssignment(jnp.where(filled, token, tokens), gate)

  num_tokens = jnp.sum(is_token) if config.ignore_padding_tokens else groups * tokens
  num_filled = jnp.sum(filled)
  taken = jax.vmap(lambda at: jnp.zeros(tokens, bool).at[at].set(True, mode='drop'))(assignment.token)
  return RouterOutput(
      assignment=assignment,
      auxiliary_loss=jnp.zeros(()),
      router_z_loss=router_z_loss(logits),
      fraction_tokens_left_behind=(num_tokens - jnp.sum(taken)) / jnp.maximum(num_tokens, 1),
      expert_usage=num_filled / filled.size,
      router_confidence=jnp.sum(gate) / jnp.maximum(num_filled, 1),
      expert_load=jnp.sum(filled, axis=(0, 2)) * (num_experts / jnp.maximum(num_filled, 1)))
