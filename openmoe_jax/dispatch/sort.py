"""Dispatch by gather: no arithmetic is spent on moving tokens.

Where tokens choose, both directions know their inverse (a slot knows its token, a token knows its slots), so the backward
passes are gathers as well: no scatter-add, hence the same bits on every run.
"""

import functools
from typing import Any, Callable, Tuple, Union

import jax
import jax.numpy as jnp

from openmoe_jax.partitioning import constrain
from openmoe_jax.routers.types import SlotAssignment, TokenAssignment, flat_slots, slots_from_tokens


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
  """x[g, index[g, ...]] with zero rows for an index past the end: [G, N, D], [G, ...] -> [G, ..., D]."""
  take = lambda rows, at: rows.at[at].get(mode='fill', fill_value=0)
  return jax.vmap(take)(x, index)


@jax.custom_vjp
def _to_slots(x, token, slots):
  """x [G, T, D], token [G, E, C], slots [G, T, S] -> [G, E, C, D]."""
  del slots
  return _rows(x, token)


def _to_slots_fwd(x, token, slots):
  return _rows(x, token), (slots, x.shape)


def _to_slots_bwd(residuals, dy):
  slots, shape = residuals
  dx = jnp.sum(_rows(dy.reshape(shape[0], -1, shape[2]), slots), axis=2)
  return dx, None, None


_to_slots.defvjp(_to_slots_fwd, _to_slots_bwd)


@functools.partial(jax.custom_vjp)
def _from_slots(y, gate, token, slot_gate, slots):
  """y [G, E, C, D], gate [G, T, S], token and slot_gate [G, E, C], slots [G, T, S] -> float32 [G, T, D]."""
  del token, slot_gate
  picked = _rows(y.reshape(y.shape[0], -1, y.shape[-1]), slots).astype(jnp.float32)
  return jnp.sum(gate[..., None] * picked, axis=2)


def _from_slots_fwd(y, gate, token, slot_gate, slots):
  return _from_slots(y, gate, token, slot_gate, slots), (y, token, slot_gate, slots)


def _from_slots_bwd(residuals, dout):
  y, token, slot_gate, slots = residuals
  dy = (slot_gate[..., None] * _rows(dout, token)).astype(y.dtype)
  picked = _rows(y.reshape(y.shape[0], -1, y.shape[-1]), slots).astype(jnp.float32)
  return dy, jnp.sum(picked * dout[:, :, None, :], axis=-1), None, None, None


_from_slots.defvjp(_from_slots_fwd, _from_slots_bwd)


def to_slots(x: jax.Array, assignment: Union[TokenAssignment, SlotAssignment], num_experts: int, capacity: int
             ) -> Tuple[jax.Array, Any]:
  """The experts' slots [G, E, C, D] of tokens [G, T, D], and the way back that `from_slots` takes: arrays that lead
  with G. `num_experts` and `capacity` are read of a TokenAssignment."""
  if isinstance(assignment, SlotAssignment):
    return _rows(x, assignment.token), assignment
  slots = flat_slots(assignment, num_experts, capacity)
  by_slot = slots_from_tokens(assignment._replace(gate=jax.lax.stop_gradient(assignment.gate)), num_experts, capacity)
  return _to_slots(x, by_slot.token, slots), (assignment.gate, by_slot.token, by_slot.gate, slots)


def from_slots(y: jax.Array, back: Any, num_tokens: int) -> jax.Array:
  """What experts gave [G, E, C, D], gated and added up at its token: float32 [G, T, D].

  Where experts choose, how many slots a token has is not bounded by less than E, so results are added up by a scatter,
  as are gradients by x: on an accelerator the order of additions, and with it the last bit, may differ from run to run.
  """
  if not isinstance(back, SlotAssignment):
    return _from_slots(y, *back)
  y = back.gate[..., None] * y.astype(jnp.float32)
  add = lambda token, rows: jnp.zeros((num_tokens, y.shape[-1]), jnp.float32).at[token].add(rows, mode='drop')
  return jax.vmap(add)(back.token, y)


def apply_experts(x: jax.Array, assignment: Union[TokenAssignment, SlotAssignment],
                  experts: Callable[[jax.Array], jax.Array], num_experts: int, capacity: int) -> jax.Array:
  """See `openmoe_jax.dispatch.apply_experts`."""
  slots, back = to_slots(x, assignment, num_experts, capacity)
  # Slots are filled and emptied where their tokens are, and exchanged as a whole in between, backward as well.
  at_home = lambda y: constrain(y, 'group', None, 'capacity', None)
  return from_slots(at_home(experts(at_home(slots).swapaxes(0, 1)).swapaxes(0, 1)), back, x.shape[1])
