"""Dispatch back ends against each other and against a loop over tokens: values and every gradient."""

import functools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax import routers
from openmoe_jax.config import ModelConfig
from openmoe_jax.dispatch import apply_experts
from openmoe_jax.routers.types import SlotAssignment, TokenAssignment, tokens_from_slots

GROUPS, TOKENS, EXPERTS, EMB, HIDDEN = 2, 12, 4, 6, 5


def make_inputs(seed, dtype=jnp.float32):
  rng = np.random.RandomState(seed)
  kernels = (rng.randn(EXPERTS, EMB, HIDDEN) / 2, rng.randn(EXPERTS, HIDDEN, EMB) / 2)
  return (jnp.asarray(rng.randn(GROUPS, TOKENS, EMB), dtype), tuple(jnp.asarray(k, jnp.float32) for k in kernels),
          jnp.asarray(rng.randn(GROUPS, TOKENS, EMB), jnp.float32))


@functools.partial(jax.jit, static_argnames=('selected', 'capacity', 'ignore_padding'))
def assign(logits, is_token, selected, capacity, ignore_padding=False) -> TokenAssignment:
  config = ModelConfig(vocab_size=8, emb_dim=EMB, mlp_dim=4, num_heads=1, head_dim=2, num_layers=1,
                       num_experts=EXPERTS, num_selected_experts=selected, ignore_padding_tokens=ignore_padding)
  return routers.route(config, logits, is_token, capacity).assignment


def apply(backend, x, gate, kernels, assignment, capacity):
  def experts(slots):
    h = jax.nn.silu(jnp.einsum('egcd,edf->egcf', slots, kernels[0].astype(slots.dtype)))
    return jnp.einsum('egcf,efd->egcd', h, kernels[1].astype(slots.dtype))
  return apply_experts(backend, x, assignment._replace(gate=gate), experts, EXPERTS, capacity)


@functools.partial(jax.jit, static_argnames=('backend', 'capacity'))
def value_and_gradients(backend, x, kernels, out, assignment, capacity):
  """Output, and gradients by x, gates and expert kernels of its product with `out`."""
  def loss(x, gate, kernels):
    y = apply(backend, x, gate, kernels, assignment, capacity)
    return jnp.sum(y * out), y
  grads, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, assignment.gate, kernels)
  # The gate of a choice that was not kept is the constant 0: nobody reads its gradient.
  return y, grads[0], jnp.where(assignment.kept, grads[1], 0), grads[2]


def by_token(x, kernels, assignment):
  """The mixture token by token, in float64."""
  x, kernels = np.asarray(x, np.float64), [np.asarray(k, np.float64) for k in kernels]
  y = np.zeros(x.shape)
  for g, t, s in zip(*np.nonzero(np.asarray(assignment.kept))):
    e = int(assignment.expert_index[g, t, s])
    h = x[g, t] @ kernels[0][e]
    y[g, t] += float(assignment.gate[g, t, s]) * ((h / (1 + np.exp(-h))) @ kernels[1][e])
  return y


def assert_equal_to_rounding(got, want, rounding=2e-6):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, rtol=0, atol=rounding * max(np.abs(b).max(), 1e-3))


def compare(seed, assignment, capacity):
  x, kernels, out = make_inputs(seed)
  results = [value_and_gradients(backend, x, kernels, out, assignment, capacity) for backend in ('sort', 'einsum')]
  assert_equal_to_rounding(*results)
  np.testing.assert_allclose(results[0][0], by_token(x, kernels, assignment), rtol=0, atol=5e-6)
  return results[0]


def random_assignment(seed, selected, capacity, ignore_padding=False) -> TokenAssignment:
  rng = np.random.RandomState(seed)
  is_token = rng.rand(GROUPS, TOKENS) < 0.75
  logits = (2 * rng.randn(GROUPS, TOKENS, EXPERTS) * is_token[..., None]).astype(np.float32)
  return assign(logits, is_token, selected, capacity, ignore_padding)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), case=st.sampled_from(((1, 2), (2, 12), (3, 2))))
def test_backends_agree(seed, case):
  """Capacity 2 drops most choices, 12 none."""
  selected, capacity = case
  compare(seed % 1000, random_assignment(seed, selected, capacity), capacity)


def test_ignored_padding_goes_nowhere():
  assignment = random_assignment(1, 2, 2, ignore_padding=True)
  assert (np.asarray(assignment.expert_index) == EXPERTS).any()
  compare(1, assignment, 2)


@pytest.mark.parametrize('what', ('nothing', 'second choices', 'first choices', 'one choice'))
def test_only_some_choices_are_kept(what):
  assignment = random_assignment(2, 2, 12)
  kept = np.zeros(assignment.kept.shape, bool)
  if what == 'one choice':
    kept[1, 3, 1] = True
  elif what != 'nothing':
    kept[..., 1 if what == 'second choices' else 0] = True
  kept &= np.asarray(assignment.kept)
  assignment = assignment._replace(kept=jnp.asarray(kept), gate=jnp.where(kept, assignment.gate, 0))
  y, dx, dgate, dkernels = compare(2, assignment, 12)
  dropped = ~kept.any(axis=-1)
  assert not np.asarray(y)[dropped].any() and not np.asarray(dx)[dropped].any()
  assert np.asarray(dgate)[kept].all()
  if what == 'nothing':
    assert not any(np.asarray(k).any() for k in jax.tree.leaves(dkernels))


def test_gradients_against_the_mixture_written_out():
  """Every expert on every token, weighted by gates: no dispatch at all."""
  selected, capacity = 2, 3
  assignment = random_assignment(4, selected, capacity)
  x, kernels, out = make_inputs(4)
  weight = jax.nn.one_hot(assignment.expert_index, EXPERTS) * assignment.kept[..., None]

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1, 2))
  def want(x, gate, kernels):
    every = jnp.einsum('gtef,efd->gted', jax.nn.silu(jnp.einsum('gtd,edf->gtef', x, kernels[0])), kernels[1])
    return jnp.sum(out * jnp.einsum('gts,gtse,gted->gtd', gate, weight, every))

  for backend in ('sort', 'einsum'):
    got = value_and_gradients(backend, x, kernels, out, assignment, capacity)[1:]
    assert_equal_to_rounding(got, want(x, assignment.gate, kernels))


def test_bfloat16():
  """Experts see the same bfloat16 numbers in both back ends, and gates stay float32; dx rounds to bfloat16 (2^-8)."""
  assignment = random_assignment(5, 2, 3)
  x, kernels, out = make_inputs(5, jnp.bfloat16)
  got, want = (value_and_gradients(backend, x, kernels, out, assignment, 3) for backend in ('sort', 'einsum'))
  assert got[0].dtype == jnp.float32 and got[1].dtype == jnp.bfloat16
  assert_equal_to_rounding((got[0], got[2]), (want[0], want[2]), rounding=2e-6)
  assert_equal_to_rounding((got[1], got[3]), (want[1], want[3]), rounding=2**-7)


def test_same_bits_on_every_run():
  """No scatter-add whose order could change."""
  assignment = random_assignment(6, 2, 3)
  x, kernels, out = make_inputs(6)
  first, second = (value_and_gradients('sort', x, kernels, out, assignment, 3) for _ in range(2))
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
    np.testing.assert_array_equal(a, b)


def random_slots(seed, capacity, share_filled=1.) -> SlotAssignment:
  """Different tokens in the slots of each expert, some slots empty."""
  rng = np.random.RandomState(seed)
  token = np.array([[rng.permutation(TOKENS)[:capacity] for _ in range(EXPERTS)] for _ in range(GROUPS)])
  filled = rng.rand(*token.shape) < share_filled
  gate = np.where(filled, rng.rand(*token.shape), 0).astype(np.float32)
  return SlotAssignment(jnp.asarray(np.where(filled, token, TOKENS), jnp.int32), jnp.asarray(gate))


@pytest.mark.parametrize('seed, capacity, share_filled', ((0, 5, 1.), (1, 12, 0.6)))
def test_experts_choose(seed, capacity, share_filled):
  """The back ends for SlotAssignment against a loop, and against the same tokens seen from their side."""
  slots = random_slots(seed, capacity, share_filled)
  x, kernels, out = make_inputs(seed)

  @functools.partial(jax.jit, static_argnames='backend')
  def run(backend, x, gate, kernels, slots):
    def loss(x, gate, kernels):
      y = apply(backend, x, gate, kernels, slots, None)
      return jnp.sum(y * out), y
    grads, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, gate, kernels)
    # The gate of an empty slot is the constant 0.
    return y, grads[0], jnp.where(slots.token < TOKENS, grads[1], 0), grads[2]

  results = [run(backend, x, slots.gate, kernels, slots) for backend in ('sort', 'einsum')]
  assert_equal_to_rounding(*results)
  assignment = tokens_from_slots(slots, TOKENS, EXPERTS)
  np.testing.assert_allclose(results[0][0], by_token(x, kernels, assignment), rtol=0, atol=5e-6)
  y, dx, _, dkernels = value_and_gradients('sort', x, kernels, out, assignment, capacity)
  assert_equal_to_rounding((results[0][0], results[0][1], results[0][3]), (y, dx, dkernels))


def test_sort_moves_tokens_without_matrix_products():
  """`einsum` spends 2 * T * E * C * D multiplications each way; `sort` none."""
  assignment = random_assignment(7, 2, 3)
  x, _, _ = make_inputs(7)
  def flops(backend):
    run = jax.jit(lambda x: apply_experts(backend, x, assignment, lambda slots: slots, EXPERTS, 3))
    return str(run.lower(x).as_text()).count('dot_general')
  assert flops('sort') == 0 and flops('einsum') >= 2
