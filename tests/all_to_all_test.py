"""Explicit expert parallelism on 8 fake devices: the slots of `sort` bit for bit, its gradients, and what is sent."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax import dispatch, partitioning
from openmoe_jax.config import MeshConfig
from openmoe_jax.dispatch import apply_experts
from openmoe_jax.routers.types import SlotAssignment, TokenAssignment

TOKENS, EXPERTS, EMB, CAPACITY = 5, 4, 6, 3


def make_inputs(groups):
  """x, an assignment of two choices a token with some dropped, one kernel an expert, and the output's gradient."""
  rng = np.random.RandomState(0)
  index = np.stack([[rng.permutation(EXPERTS)[:2] for _ in range(TOKENS)] for _ in range(groups)])
  slot = np.zeros_like(index)
  for g in range(groups):
    for e in range(EXPERTS):
      slot[g][index[g] == e] = rng.permutation(np.sum(index[g] == e))
  kept = (slot < CAPACITY) & (rng.rand(*slot.shape) < 0.8)
  gate = np.where(kept, rng.rand(*slot.shape), 0)
  assignment = TokenAssignment(jnp.asarray(index), jnp.asarray(gate, jnp.float32), jnp.asarray(slot), jnp.asarray(kept))
  normal = lambda *shape: jnp.asarray(rng.randn(*shape), jnp.float32)
  return normal(groups, TOKENS, EMB), assignment, normal(EXPERTS, EMB, EMB), normal(groups, TOKENS, EMB)


def make_slots(groups):
  rng = np.random.RandomState(1)
  token = np.stack([[rng.permutation(TOKENS + 1)[:CAPACITY] for _ in range(EXPERTS)] for _ in range(groups)])
  gate = np.where(token < TOKENS, rng.rand(*token.shape), 0)
  return SlotAssignment(jnp.asarray(token, jnp.int32), jnp.asarray(gate, jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def run(backend, x, assignment, kernel, out):
  """(output, slots that the experts saw), and gradients by x, gates and kernels of the output's product with `out`."""
  def loss(x, gate, kernel):
    seen = []
    def experts(slots):
      seen.append(slots)
      return jnp.tanh(jnp.einsum('egcd,edf->egcf', slots, kernel))
    y = apply_experts(backend, x, assignment._replace(gate=gate), experts, EXPERTS, CAPACITY)
    return jnp.sum(y * out), (y, seen[0])
  return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, assignment.gate, kernel)


def on_mesh(shape, backend, *args):
  with jax.set_mesh(partitioning.make_mesh(MeshConfig(*shape), jax.devices()[:np.prod(shape)])):
    return run(backend, *args)


@pytest.mark.parametrize('shape, groups', (((2, 2, 2), 8), ((1, 4, 1), 4), ((2, 4, 1), 12)), ids=str)
def test_equals_sort_on_one_device(shape, groups):
  """12 groups are no multiple of 8 devices and go the way of `sort`."""
  x, assignment, kernel, out = make_inputs(groups)
  (_, (y, slots)), grads = run('sort', x, assignment, kernel, out)
  (_, (got, got_slots)), got_grads = on_mesh(shape, 'all_to_all', x, assignment, kernel, out)
  np.testing.assert_array_equal(got_slots, slots)
  # The products are those of one device, expert by expert; only the kernels' gradients add up shards of groups.
  for a, b in zip((got, *got_grads), (y, *grads), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * float(jnp.abs(b).max()))


def test_experts_choose():
  x, _, kernel, out = make_inputs(8)
  want = run('sort', x, make_slots(8), kernel, out)
  got = on_mesh((2, 4, 1), 'all_to_all', x, make_slots(8), kernel, out)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * float(jnp.abs(b).max()))


def test_what_is_sent():
  """Slots to experts and back, twice with gradients, and one sum for the gradient of the kernels; nothing is gathered."""
  x, assignment, kernel, out = make_inputs(8)
  mesh = partitioning.make_mesh(MeshConfig(2, 4, 1))
  with jax.set_mesh(mesh):
    place = lambda tree, *spec: jax.device_put(tree, jax.NamedSharding(mesh, jax.P(*spec)))
    args = place((x, assignment), ('data', 'expert')) + (place(kernel, 'expert'), place(out, ('data', 'expert')))
    text = run.lower('all_to_all', *args).compile().as_text()
  sent = re.findall(r' (all-to-all|all-gather|collective-permute|reduce-scatter)\(', text)
  assert sent == ['all-to-all'] * 4, sent


def test_automatic_choice():
  assert dispatch.automatic() == 'sort'
  for shape, want in (((2, 4, 1), 'all_to_all'), ((8, 1, 1), 'sort'), ((1, 1, 8), 'sort')):
    with jax.set_mesh(partitioning.make_mesh(MeshConfig(*shape))):
      assert dispatch.automatic() == want
