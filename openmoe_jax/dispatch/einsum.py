"""Dispatch by one-hot matrix products: the reference, as in Mesh TensorFlow MoE and the original OpenMoE.

Costs 2 * T * E * C * D multiplications a group each way; the other back ends are compared with it.
"""

from typing import Callable, Union

import jax
import jax.numpy as jnp

from openmoe_jax.routers.types import SlotAssignment, TokenAssignment


def _one_hot_slots(assignment: TokenAssignment, num_experts: int, capacity: int, dtype) -> jax.Array:
  """[G, T, S, E, C], 1 where a kept choice sits."""
  slot = jnp.where(assignment.kept, assignment.slot, capacity)
  return (jax.nn.one_hot(assignment.expert_index, num_experts, dtype=dtype)[..., :, None] *
          jax.nn.one_hot(slot, capacity, dtype=dtype)[..., None, :])


def apply_experts(x: jax.Array, assignment: Union[TokenAssignment, SlotAssignment],
                  experts: Callable[[jax.Array], jax.Array], num_experts: int, capacity: int) -> jax.Array:
  """See `openmoe_jax.dispatch.apply_experts`."""
  if isinstance(assignment, SlotAssignment):
    one_hot = jnp.moveaxis(jax.nn.one_hot(assignment.token, x.shape[1], dtype=jnp.float32), -1, 1)
    mask, combine = one_hot.astype(x.dtype), assignment.gate[:, None] * one_hot
  else:
    mask = jnp.sum(_one_hot_slots(assignment, num_experts, capacity, x.dtype), axis=2)
    combine = jnp.sum(assignment.gate[..., None, None] *
                      _one_hot_slots(assignment, num_experts, capacity, jnp.float32), axis=2)
  y = experts(jnp.einsum('GTEC,GTD->EGCD', mask, x))
  return jnp.einsum('GTEC,EGCD->GTD', combine, y.astype(jnp.float32))
