"""Expert parallelism written out: `sort` on every device's own groups, and an exchange over the mesh axis `expert`.

A device sends each of its groups' slots to the device that holds their experts, and gets the results back (Lepikhin et
al. 2020, GShard). Left to find that exchange by itself, the compiler makes gathers and permutations of it that move
more. Groups, slots and experts are those of `sort`, bit for bit; without a mesh it is `sort`.
"""

import functools
from typing import Callable, Union

import jax
from jax.sharding import PartitionSpec

from openmoe_jax.dispatch import sort
from openmoe_jax.partitioning import BATCH_AXES, num_shards
from openmoe_jax.routers.types import SlotAssignment, TokenAssignment

_BY_GROUP = PartitionSpec(BATCH_AXES)  # [G, ..]: groups where their tokens are
_BY_EXPERT = PartitionSpec('expert', 'data')  # [E, G, ..]: slots where their experts are


def apply_experts(x: jax.Array, assignment: Union[TokenAssignment, SlotAssignment],
                  experts: Callable[[jax.Array], jax.Array], num_experts: int, capacity: int) -> jax.Array:
  """See `openmoe_jax.dispatch.apply_experts`.

  Groups whose number the mesh does not divide (of small batches in generation, say) have no device of their own; they
  are left to the compiler, as `sort` leaves all.
  """
  if num_shards('expert') == 1 or x.shape[0] % num_shards('group'):
    return sort.apply_experts(x, assignment, experts, num_experts, capacity)
  # Unchecked, gradients are averaged over the axis `model`, where they are equal; what is mapped over stages of a
  # pipeline cannot be checked.
  shard_map = functools.partial(jax.shard_map, check_vma=num_shards('stage') == 1)

  @functools.partial(shard_map, in_specs=_BY_GROUP, out_specs=(_BY_EXPERT, _BY_GROUP))
  def send(x, assignment):
    slots, back = sort.to_slots(x, assignment, num_experts, capacity)
    slots = jax.lax.all_to_all(slots, 'expert', split_axis=1, concat_axis=0, tiled=True)
    return slots.swapaxes(0, 1), back

  @functools.partial(shard_map, in_specs=(_BY_EXPERT, _BY_GROUP), out_specs=_BY_GROUP)
  def fetch(y, back):
    y = jax.lax.all_to_all(y.swapaxes(0, 1), 'expert', split_axis=0, concat_axis=1, tiled=True)
    return sort.from_slots(y, back, x.shape[1])

  slots, back = send(x, assignment)
  return fetch(experts(slots), back)
