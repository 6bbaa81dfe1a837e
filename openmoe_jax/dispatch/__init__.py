"""Dispatch back ends: tokens to experts and back, one file each behind one signature."""

from typing import Callable, Union

import jax

from openmoe_jax.config import DISPATCH_BACKENDS
from openmoe_jax.dispatch import all_to_all, einsum, sort
from openmoe_jax.partitioning import num_shards
from openmoe_jax.routers.types import SlotAssignment, TokenAssignment

_BACKENDS = {'sort': sort.apply_experts, 'einsum': einsum.apply_experts, 'all_to_all': all_to_all.apply_experts}
# 'dropless' has no slots, hence a signature of its own: see dropless.py.
assert {*_BACKENDS, 'auto', 'dropless'} == set(DISPATCH_BACKENDS)


def automatic() -> str:
  """What 'auto' stands for on the mesh in force.

  `sort` where all experts are on one device: the fastest measured on a CPU, and of the least arithmetic and memory
  anywhere. `all_to_all` where they are not: it sends slots, and nothing else.
  """
  return 'sort' if num_shards('expert') == 1 else 'all_to_all'


def apply_experts(backend: str, x: jax.Array, assignment: Union[TokenAssignment, SlotAssignment],
                  experts: Callable[[jax.Array], jax.Array], num_experts: int, capacity: int) -> jax.Array:
  """Sends tokens to their experts, runs these, and adds up the gated results.

  Args:
    backend: 'sort', 'einsum' or 'all_to_all', or 'auto' for one of them; they agree to rounding, gradients included.
    x: [G, T, D] tokens in the activation dtype.
    assignment: where each token goes.
    experts: [E, G, C, D] -> [E, G, C, D]; an empty slot is a zero vector.
    num_experts, capacity: E and C; a SlotAssignment has its own.

  Returns:
    float32 [G, T, D]; zero for a token none of whose choices was kept, or that no expert took.
  """
  return _BACKENDS[automatic() if backend == 'auto' else backend](x, assignment, experts, num_experts, capacity)
