"""Token-id tables: the experts of a token are looked up by its id, and do not change any more.

OpenMoE (Xue et al. 2024, arXiv 2402.01739, section 5) found that a router learns to decide by token id, early on, and
asked whether it can be removed after warm-up; StableMoE (Dai et al. 2022, arXiv 2204.08396) froze routing before. The
tool `freeze_router` makes the table from a checkpoint. The router's kernel stays and gives the gates, which go on
learning: the softmax probabilities of the experts in the table.
"""

from typing import Tuple

import jax
import jax.numpy as jnp

from openmoe_jax.config import ModelConfig
from openmoe_jax.routers import hashing, slots
from openmoe_jax.routers.report import report, router_z_loss
from openmoe_jax.routers.types import RouterContext, RouterOutput


def route(config: ModelConfig, logits: jax.Array, is_token: jax.Array, capacity: int, context: RouterContext
          ) -> RouterOutput:
  """Assigns tokens to expert slots. The auxiliary loss is 0: nobody could follow it.

  Args:
    config, logits, is_token, capacity: as for `top_k.route`.
    context: token_ids; state['experts'] int32 [V, S]; the key of a random order.
  """
  logits = slots.without_padding(config, logits, is_token)
  expert_index = jnp.take(context.state['experts'], context.token_ids, axis=0, mode='clip')
  gate = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), expert_index, axis=-1)
  assignment = slots.assign(config, expert_index, gate, is_token, capacity, context.key)
  return report(config, assignment, is_token, capacity, jnp.zeros(()), router_z_loss(logits))


def hash_table(config: ModelConfig) -> jax.Array:
  """The table of hash routing, int32 [sparse layers, V, S]: what stands in a table before anything is known."""
  experts = hashing.experts_of(config, jnp.arange(config.vocab_size))
  return jnp.broadcast_to(experts, (config.num_sparse_layers, *experts.shape))


def count_probabilities(totals: Tuple[jax.Array, jax.Array], probs: jax.Array, token_ids: jax.Array,
                        is_token: jax.Array) -> Tuple[jax.Array, jax.Array]:
  """Adds a batch to what is known of each token id.

  Args:
    totals: sums of router probabilities float32 [sparse layers, V, E], and how often an id was seen float32 [V].
    probs: float32 [sparse layers, N, E].
    token_ids, is_token: [N].
  """
  sums, counts = totals
  probs = probs * is_token[:, None]
  return sums.at[:, token_ids].add(probs), counts.at[token_ids].add(is_token.astype(jnp.float32))


def table(config: ModelConfig, totals: Tuple[jax.Array, jax.Array]) -> jax.Array:
  """The S experts with the largest mean probability of each id, int32 [sparse layers, V, S]; of an id that was never
  seen, those of hash routing."""
  sums, counts = totals
  return jnp.where(counts[:, None] > 0, jax.lax.top_k(sums, config.num_selected_experts)[1], hash_table(config))


def agreement(experts: jax.Array, expert_index: jax.Array, token_ids: jax.Array, is_token: jax.Array) -> jax.Array:
  """How many of the choices that a router made are in a table.

  Args:
    experts: int32 [sparse layers, V, S].
    expert_index: int32 [sparse layers, N, S], the router's choices.
    token_ids, is_token: [N].

  Returns:
    float32 [sparse layers], a share of all choices of tokens.
  """
  same = (experts[:, token_ids][..., None, :] == expert_index[..., :, None]).any(axis=-1)
  return jnp.sum(jnp.mean(same, axis=-1) * is_token, axis=-1) / jnp.maximum(jnp.sum(is_token), 1)
