"""Dropless dispatch: against a loop over tokens, against the slots of the other back ends, and over a mesh."""

import functools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax import partitioning
from openmoe_jax.config import ConfigError, MeshConfig, ModelConfig
from openmoe_jax.dispatch import dropless, rounds
from openmoe_jax.model import OpenMoE
from openmoe_jax.names import from_t5x_names
from openmoe_jax.routers.types import TokenAssignment
from tests import numpy_reference

EMB, HIDDEN = 6, 5
ACTIVATIONS = ('silu', 'linear')


def make_inputs(seed, tokens, experts, selected, kept=1.):
  """x [1, T, D], an assignment with random gates, of which a share is kept, and kernels."""
  rng = np.random.RandomState(seed)
  index = np.stack([rng.permutation(experts)[:selected] for _ in range(tokens)])
  kept = rng.rand(tokens, selected) < kept
  gate = rng.rand(tokens, selected) * kept
  slot = np.full(index.shape, -7)  # must not be read
  assignment = TokenAssignment(jnp.asarray(index)[None], jnp.asarray(gate, jnp.float32)[None], jnp.asarray(slot)[None],
                               jnp.asarray(kept)[None])
  kernels = [jnp.asarray(rng.randn(experts, *shape) / 2, jnp.float32)
             for shape in ((EMB, HIDDEN), (EMB, HIDDEN), (HIDDEN, EMB))]
  return jnp.asarray(rng.randn(1, tokens, EMB), jnp.float32), assignment, kernels[:2], kernels[2]


def by_token(x, assignment, wi, wo):
  """The mixture token by token, in float64."""
  x, wo, wi = np.asarray(x, np.float64)[0], np.asarray(wo, np.float64), [np.asarray(w, np.float64) for w in wi]
  y = np.zeros(x.shape)
  for t, s in zip(*np.nonzero(np.asarray(assignment.kept[0]))):
    e = int(assignment.expert_index[0, t, s])
    a, b = x[t] @ wi[0][e], x[t] @ wi[1][e]
    y[t] += float(assignment.gate[0, t, s]) * ((a / (1 + np.exp(-a)) * b) @ wo[e])
  return y[None]


run = jax.jit(functools.partial(dropless.apply_experts, activations=ACTIVATIONS))


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), shape=st.sampled_from(((1, 4, 2), (3, 4, 1), (9, 3, 3), (40, 5, 2), (300, 2, 1))),
       kept=st.sampled_from((0., 0.5, 1.)))
def test_every_kept_choice_is_served(seed, shape, kept):
  """One token, fewer rows than a block, several blocks of an expert, experts without rows, nothing kept."""
  x, assignment, wi, wo = make_inputs(seed, *shape, kept)
  np.testing.assert_allclose(run(x, assignment, wi, wo), by_token(x, assignment, wi, wo), rtol=0, atol=1e-5)


def test_all_tokens_to_one_expert():
  """The most unequal shares: one expert computes everything, in many blocks."""
  x, assignment, wi, wo = make_inputs(0, 500, 4, 1)
  assignment = assignment._replace(expert_index=jnp.full_like(assignment.expert_index, 2))
  np.testing.assert_allclose(run(x, assignment, wi, wo), by_token(x, assignment, wi, wo), rtol=0, atol=1e-5)


@pytest.mark.parametrize('tokens, rows', ((1, 1), (2, 2), (16, 4), (64, 16), (4096, 128)))
def test_block_rows(tokens, rows):
  assert dropless.block_rows(tokens, 2, 16) == rows


def test_blocks_equal_the_instruction_of_tpus():
  """`with_ragged_dot` is what TPUs run; here on a CPU, with gradients."""
  rng = np.random.RandomState(1)
  sizes = jnp.asarray([5, 0, 11, 1], jnp.int32)
  _, _, wi, wo = make_inputs(1, 4, 4, 2)
  rows, out = (jnp.asarray(rng.randn(20, EMB), jnp.float32) for _ in range(2))
  served = (jnp.arange(20) < 17)[:, None]  # rows past the last run have no meaning

  @functools.partial(jax.jit, static_argnums=0)
  def value_and_gradients(function, rows, kernels):
    return jax.value_and_grad(lambda *args: jnp.sum(jnp.where(served, function(*args) * out, 0)), (0, 1))(rows, kernels)

  blocks = lambda rows, kernels: dropless.in_blocks(ACTIVATIONS, 4, rows, kernels, sizes)
  ragged = lambda rows, kernels: dropless.with_ragged_dot(ACTIVATIONS, rows, kernels, sizes)
  got, want = (value_and_gradients(f, rows, (tuple(wi), wo)) for f in (blocks, ragged))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def model(**changes) -> ModelConfig:
  values = dict(vocab_size=48, emb_dim=8, mlp_dim=16, num_heads=8, head_dim=2, num_layers=2, moe_interval=2,
                num_experts=8, group_size=8, dtype='float32', scan_blocks=True, capacity_mode='none')
  return ModelConfig(**{**values, **changes})


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(config, params, batch):
  loss = lambda params: jnp.mean(jnp.sin(OpenMoE(config).apply({'params': params}, batch, True)))
  return jax.value_and_grad(loss)(params)


def make_batch():
  target = np.random.RandomState(0).randint(1, 48, (8, 12)).astype(np.int32)
  target[::2, 9:] = 0
  return {'decoder_input_tokens': np.pad(target, ((0, 0), (1, 0)))[:, :-1], 'decoder_target_tokens': target}


def assert_same(got, want):
  assert abs(float(got[0]) - float(want[0])) < 1e-6
  for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(float(jnp.abs(b).max()), 1e-6))  # other orders of addition


@functools.lru_cache(maxsize=None)
def with_slots(**changes):
  config = model(**changes)
  params = jax.tree.map(np.asarray, from_t5x_names(config, numpy_reference.random_params(config, 0)))
  return params, value_and_gradients(config, params, make_batch())


@pytest.mark.slow
@pytest.mark.parametrize('changes', ({}, {'mlp_activations': ('silu', 'linear')}, {'ignore_padding_tokens': True}))
def test_model_equals_one_with_slots_for_everybody(changes):
  """dispatch = 'sort' with capacity_mode = 'none': loss and every parameter's gradient."""
  params, want = with_slots(**changes)
  assert_same(value_and_gradients(model(dispatch='dropless', **changes), params, make_batch()), want)


@functools.partial(jax.jit, static_argnums=5)
def output_and_gradients(x, gate, wi, wo, assignment, activations):
  out = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

  def loss(x, gate, wi, wo):
    y = dropless.apply_experts(x, assignment._replace(gate=gate), wi, wo, activations)
    return jnp.sum(y * out), y

  grads, y = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(x, gate, wi, wo)
  return y, grads[0], jnp.where(assignment.kept, grads[1], 0), grads[2:]


@pytest.mark.parametrize('shape', ((2, 2, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in ((2, 4, 1), (1, 1, 8)))))
@pytest.mark.parametrize('experts', ('random', 'of one device'))
def test_mesh(shape, experts):
  """Rows travel, in one round or as many as it takes; hidden layers are split over the axis model.

  'swiglu' kernels hold two halves side by side.
  """
  x, assignment, _, _ = make_inputs(4, 48, 8, 2, kept=0.8)
  if experts == 'of one device':  # and all but one of its rows to the same expert
    index = jnp.asarray(np.random.RandomState(0).permutation(48)[:, None] == 0).astype(int) + jnp.asarray([6, 5])
    assignment = assignment._replace(expert_index=index[None])
  kernels = [jnp.asarray(np.random.RandomState(i).randn(8, *k) / 2, jnp.float32)
             for i, k in enumerate(((EMB, 16), (EMB, 8), (8, EMB)))]
  args = (x, assignment.gate, kernels[:2], kernels[2], assignment, ('swiglu', 'linear'))
  want = output_and_gradients(*args)
  with jax.set_mesh(partitioning.make_mesh(MeshConfig(*shape))):
    got = output_and_gradients(*args)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * float(jnp.abs(b).max()))


def test_rounds_are_bounded():
  """A device receives 1.5 times its share a round, or all that others can ask for if that is less."""
  assert rounds.most_rows(4096, 2, 8, 4) == 3072
  assert rounds.most_rows(4096, 1, 1, 2) == 3072
  assert rounds.most_rows(100, 4, 2, 2) == 200
  assert rounds.most_rows(1, 2, 4, 8) == 1


def test_tokens_that_do_not_divide_over_the_mesh():
  x, assignment, wi, wo = make_inputs(3, 13, 4, 2)
  with jax.set_mesh(partitioning.make_mesh(MeshConfig(2, 4, 1))):
    got = run(x, assignment, wi, wo)
  np.testing.assert_allclose(got, by_token(x, assignment, wi, wo), rtol=0, atol=1e-5)


def test_configuration_says_what_it_needs():
  with pytest.raises(ConfigError, match="needs capacity_mode = 'none', not 't5x'"):
    model(dispatch='dropless', capacity_mode='t5x')
  with pytest.raises(ConfigError, match='needs dropout_rate = 0, not 0.1'):
    model(dispatch='dropless', dropout_rate=0.1)
