"""What a router returns: pure data that every dispatch back end and every analysis reads.

Shapes: G groups, T tokens per group, S selected experts per token, E experts, C slots per expert and group.
"""

from typing import Dict, NamedTuple, Optional, Union

import jax
import jax.numpy as jnp


class TokenAssignment(NamedTuple):
  """Per token and choice, where it goes.

  Attributes:
    expert_index: int32 [G, T, S].
    gate: float32 [G, T, S], the router probability of that expert; not renormalised, and 0 where not kept.
    slot: int32 [G, T, S], place in the expert's queue; may be beyond the capacity where not kept.
    kept: bool [G, T, S], False where the expert was full (or the token is padding that is ignored).
  """
  expert_index: jax.Array
  gate: jax.Array
  slot: jax.Array
  kept: jax.Array


class SlotAssignment(NamedTuple):
  """Per expert and slot, which token fills it.

  Attributes:
    token: int32 [G, E, C]; T (one past the last token) marks an empty slot.
    gate: float32 [G, E, C]; 0 for an empty slot.
  """
  token: jax.Array
  gate: jax.Array


class RouterContext(NamedTuple):
  """What some routers look at besides their logits; each is None where the layer does not have it.

  Attributes:
    token_ids: int32 [G, T], the input tokens; 0 for padding.
    more_logits: float32 [G, T, *], product with the router's second kernel.
    state: this layer's arrays of the router state, see `openmoe_jax.routers.state`.
    key: random key, in training; without one nothing is drawn.
  """
  token_ids: Optional[jax.Array] = None
  more_logits: Optional[jax.Array] = None
  state: Optional[Dict[str, jax.Array]] = None
  key: Optional[jax.Array] = None


NO_CONTEXT = RouterContext()


class RouterOutput(NamedTuple):
  """An assignment and what is learnt and logged about it.

  Attributes:
    assignment: TokenAssignment, or SlotAssignment of routers in which experts choose.
    auxiliary_loss: float32 [], the router's own balancing loss, unscaled; of those with the load-balance loss of SPEC
      2.9, S when perfectly balanced; 0 of routers that have none.
    router_z_loss: float32 [], unscaled.
    fraction_tokens_left_behind, expert_usage, router_confidence: float32 [] (SPEC 2.10).
    expert_load: float32 [E], share of all choices that asked for each expert, times E: mean 1, before capacity.
  """
  assignment: Union[TokenAssignment, SlotAssignment]
  auxiliary_loss: jax.Array
  router_z_loss: jax.Array
  fraction_tokens_left_behind: jax.Array
  expert_usage: jax.Array
  router_confidence: jax.Array
  expert_load: jax.Array


def flat_slots(assignment: TokenAssignment, num_experts: int, capacity: int) -> jax.Array:
  """Index into the group's E * C slots of each token and choice, E * C where not kept: int32 [G, T, S]."""
  index = assignment.expert_index * capacity + assignment.slot
  return jnp.where(assignment.kept, index, num_experts * capacity)


def slots_from_tokens(assignment: TokenAssignment, num_experts: int, capacity: int) -> SlotAssignment:
  """The same assignment seen from the experts' side. No two kept choices share a slot, so nothing is lost."""
  groups, tokens, selected = assignment.expert_index.shape
  slots = flat_slots(assignment, num_experts, capacity).reshape(groups, tokens * selected)
  token = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[None, :, None], assignment.slot.shape)

  def scatter(empty, values):
    place = lambda row, index: jnp.full(num_experts * capacity, empty, values.dtype).at[index].set(row, mode='drop')
    flat = jax.vmap(place)(values.reshape(groups, tokens * selected), slots)
    return flat.reshape(groups, num_experts, capacity)

  return SlotAssignment(scatter(tokens, token), scatter(0, assignment.gate))


def tokens_from_slots(assignment: SlotAssignment, num_tokens: int, num_selected: int) -> TokenAssignment:
  """The inverse of `slots_from_tokens`, choices of a token in ascending order of the expert.

  Works for any slot assignment in which a token stands in at most `num_selected` slots of its group (expert choice:
  pass E). Choices that a token does not have are marked not kept.
  """
  groups, experts, capacity = assignment.token.shape
  flat = assignment.token.reshape(groups, experts * capacity)
  # Stable sort by token brings each token's slots together in ascending expert order; empty slots go last.
  order = jnp.argsort(flat, axis=1, stable=True)
  token = jnp.take_along_axis(flat, order, axis=1)
  first = jax.vmap(lambda row: jnp.searchsorted(row, jnp.arange(num_tokens)))(token)
  rank = first[:, :, None] + jnp.arange(num_selected)
  at = jnp.minimum(rank, experts * capacity - 1).reshape(groups, -1)
  shape = (groups, num_tokens, num_selected)
  slot = jnp.take_along_axis(order, at, axis=1).reshape(shape)
  owner = jnp.take_along_axis(token, at, axis=1).reshape(shape)
  kept = (rank < experts * capacity) & (owner == jnp.arange(num_tokens)[None, :, None])
  gate = jnp.take_along_axis(assignment.gate.reshape(groups, -1), slot.reshape(groups, -1), axis=1).reshape(shape)
  return TokenAssignment((slot // capacity).astype(jnp.int32), jnp.where(kept, gate, 0),
                         (slot % capacity).astype(jnp.int32), kept)
