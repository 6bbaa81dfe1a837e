"""Hash routing: a token's experts follow from its id alone (Roller et al. 2021, arXiv 2106.04426).

There is nothing to learn and no kernel. The hash is the same in every layer; `hash_seed` chooses another one.
"""

import jax
import jax.numpy as jnp

from openmoe_jax.config import ModelConfig
from openmoe_jax.routers import slots
from openmoe_jax.routers.report import report
from openmoe_jax.routers.types import RouterContext, RouterOutput


def route(config: ModelConfig, logits: None, is_token: jax.Array, capacity: int, context: RouterContext
          ) -> RouterOutput:
  """Assigns tokens to expert slots; every gate is 1 / S, and both losses are 0.

  Args:
    config, is_token, capacity: as for `top_k.route`.
    logits: there are none.
    context: token_ids, and the key of a random order.
  """
  del logits
  expert_index = experts_of(config, context.token_ids)
  gate = jnp.full(expert_index.shape, 1. / config.num_selected_experts, jnp.float32)
  assignment = slots.assign(config, expert_index, gate, is_token, capacity, context.key)
  return report(config, assignment, is_token, capacity, jnp.zeros(()), jnp.zeros(()))


def experts_of(config: ModelConfig, token_ids: jax.Array) -> jax.Array:
  """S different experts of each id, as if drawn at random: int32 [..] -> int32 [.., S]."""
  pairs = token_ids[..., None].astype(jnp.uint32) * jnp.uint32(config.num_experts)
  pairs = pairs + jnp.arange(config.num_experts, dtype=jnp.uint32)
  values = _mix(pairs + _mix(jnp.uint32(config.hash_seed % 2**32)))
  return jax.lax.top_k((values >> 1).astype(jnp.int32), config.num_selected_experts)[1]


def _mix(x: jax.Array) -> jax.Array:
  """The last step of MurmurHash3: a permutation of the 32-bit numbers in which every bit depends on all."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85ebca6b)
  x = (x ^ (x >> 13)) * jnp.uint32(0xc2b2ae35)
  return x ^ (x >> 16)
