"""Switch: every token goes to its one most probable expert (Fedus et al. 2021, arXiv 2101.03961).

What distinguishes it from top-k besides k = 1 is what the paper trains it with: noise on the router's input
(`router_jitter`, 0.01 there) and the load-balance loss with the factor 0.01.
"""

import jax
import jax.numpy as jnp

from openmoe_jax.config import ModelConfig
from openmoe_jax.routers import slots
from openmoe_jax.routers.report import load_balance_loss, report, router_z_loss
from openmoe_jax.routers.types import NO_CONTEXT, RouterContext, RouterOutput


def route(config: ModelConfig, logits: jax.Array, is_token: jax.Array, capacity: int,
          context: RouterContext = NO_CONTEXT) -> RouterOutput:
  """Assigns tokens to expert slots, S = 1; the gate is the expert's probability. See `top_k.route` for the arguments."""
  logits = slots.without_padding(config, logits, is_token)
  probs = jax.nn.softmax(logits, axis=-1)
  expert_index = jnp.argmax(probs, axis=-1, keepdims=True).astype(jnp.int32)
  gate = jnp.max(probs, axis=-1, keepdims=True)
  assignment = slots.assign(config, expert_index, gate, is_token, capacity, context.key)
  balance = load_balance_loss(slots.without_padding(config, probs, is_token), assignment.expert_index)
  return report(config, assignment, is_token, capacity, balance, router_z_loss(logits))


def jitter(x: jax.Array, amount: float, key: jax.Array) -> jax.Array:
  """The router's input [G, T, D], every number multiplied by a factor drawn from [1 - amount, 1 + amount]."""
  return x * jax.random.uniform(key, x.shape, x.dtype, 1. - amount, 1. + amount)
