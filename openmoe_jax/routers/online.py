"""Figures about an assignment that cost next to nothing, for curves during training.

Each is a share that is kept as a sum and what it is divided by, so that microbatches and hosts add up to the same figure.
Padding is left out: it is dropped like others, and stands at the end of rows.
"""

import math
from typing import Any, Optional, Tuple

import jax
import jax.numpy as jnp

from openmoe_jax.config import ModelConfig
from openmoe_jax.routers import slots
from openmoe_jax.routers.groups import Grouping

_ENTROPY = ('top_k', 'switch', 'sigmoid', 'noisy_top_k', 'frozen', 'expert_choice')  # routers with logits of all experts


def names(config: ModelConfig) -> Tuple[str, ...]:
  """What `counts` has of a model.

  * router_entropy: of the probabilities of a token's experts, over its maximum log E; 1 knows nothing. Of 'sigmoid' these
    are the affinities over their sum.
  * fraction_dropped_rank_0, ..: of first, second, .. choices.
  * fraction_dropped_first_quarter, fraction_dropped_last_quarter: of the choices of tokens in that part of a row.
  * fraction_evicted: of the choices behind the first, those that were dropped but would have been kept, had no later
    token been there (`analysis.drop_statistics.Evictions`).
  """
  found = ('router_entropy',) if config.router in _ENTROPY and config.num_experts > 1 else ()
  if config.router == 'expert_choice' or config.capacity_mode == 'none':
    return found  # nobody is dropped, or it is not a token's choice that is
  selected = config.num_selected_experts
  found += tuple(f'fraction_dropped_rank_{rank}' for rank in range(selected))
  found += ('fraction_dropped_first_quarter', 'fraction_dropped_last_quarter')
  return found + (('fraction_evicted',) if selected > 1 else ())


def counts(config: ModelConfig, assignment: Any, logits: Optional[jax.Array], is_token: jax.Array, grouping: Grouping,
           length: int) -> jax.Array:
  """Sums and what they are divided by, in the order of `names`: float32 [names, 2].

  Args:
    config, logits, is_token: as for `top_k.route`.
    assignment: what the router gave.
    grouping: of the tokens.
    length: of a row without the padding of the grouping.
  """
  total, pairs = jnp.sum(is_token), {}
  if 'router_entropy' in names(config):
    pairs['router_entropy'] = jnp.sum(jnp.where(is_token, _entropy(config, logits), 0.)), total
  if 'fraction_dropped_rank_0' in names(config):
    dropped = ~assignment.kept & is_token[..., None]
    for rank in range(config.num_selected_experts):
      pairs[f'fraction_dropped_rank_{rank}'] = jnp.sum(dropped[..., rank]), total
    column = (jnp.arange(is_token.size) % grouping.length).reshape(is_token.shape)
    for name, inside in (('first', 4 * column < length), ('last', (4 * column >= 3 * length) & (column < length))):
      share = jnp.sum(dropped & inside[..., None]), jnp.sum(is_token & inside) * config.num_selected_experts
      pairs[f'fraction_dropped_{name}_quarter'] = share
  if 'fraction_evicted' in names(config):
    evicted = dropped & (slots.in_token_order(assignment.expert_index, config.num_experts) < grouping.capacity)
    pairs['fraction_evicted'] = jnp.sum(evicted[..., 1:]), total * (config.num_selected_experts - 1)
  return jnp.asarray([pairs[name] for name in names(config)], jnp.float32).reshape(-1, 2)


def _entropy(config: ModelConfig, logits: jax.Array) -> jax.Array:
  """[G, T, E] -> [G, T], 1 at most."""
  probs = jax.nn.softmax(logits, axis=-1)
  if config.router == 'sigmoid':
    affinity = jax.nn.sigmoid(logits)
    probs = affinity / jnp.sum(affinity, axis=-1, keepdims=True)
  return jnp.sum(jax.scipy.special.entr(probs), axis=-1) / math.log(config.num_experts)
