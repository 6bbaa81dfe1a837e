"""Padding, groups, capacity and the top-k router against the original's table and a slow reference (SPEC 2)."""

import functools
import math

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax import routers
from openmoe_jax.config import ModelConfig
from openmoe_jax.routers import groups as groups_lib
from openmoe_jax.routers import slots
from openmoe_jax.routers.types import flat_slots, slots_from_tokens, tokens_from_slots
from tests import golden, routing_reference

TABLE = 'group_capacity_table.json'


def model(**changes) -> ModelConfig:
  values = dict(vocab_size=8, emb_dim=4, mlp_dim=4, num_heads=1, head_dim=2, num_layers=1, num_experts=4)
  return ModelConfig(**{**values, **changes})


@functools.partial(jax.jit, static_argnames=('config', 'capacity'))
def route(config, logits, is_token, capacity):
  return routers.route(config, logits, is_token, capacity)


def check(got, want: routing_reference.Routed, selected: int):
  """Decisions exact; probabilities and losses to float32 rounding."""
  assignment = jax.tree.map(np.asarray, got.assignment)
  asked = want.slot >= 0
  np.testing.assert_array_equal(assignment.kept, want.kept)
  np.testing.assert_array_equal(assignment.expert_index[asked], want.expert[asked])
  np.testing.assert_array_equal(assignment.slot[asked], want.slot[asked])
  np.testing.assert_allclose(assignment.gate, want.gate, rtol=2e-6, atol=1e-7)
  for name in ('auxiliary_loss', 'router_z_loss', 'expert_usage', 'router_confidence'):
    np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=5e-6, atol=1e-7, err_msg=name)
  np.testing.assert_allclose(got.fraction_tokens_left_behind, want.fraction_tokens_left_behind, rtol=1e-6, atol=1e-12)
  total = asked.any(axis=-1).sum() * selected
  np.testing.assert_allclose(got.expert_load, want.asked * len(want.asked) / max(total, 1), rtol=1e-6)


# Padding, groups, capacity.


@pytest.mark.parametrize('row', range(15))
def test_table_of_the_original(row):
  table = golden.load_json(TABLE)
  assert len(table) == 15
  want = table[row]
  config = model(num_experts=want['experts'], group_size=want['max_group_size'])
  for train, key in ((True, 'train_1.25'), (False, 'eval_2.0')):
    got = groups_lib.group_tokens(config, want['batch'], want['length'], train)
    assert [got.batch, got.length] == want['padded']
    assert (got.num_groups, got.group_size) == (want['num_groups'], want['group_size'])
    assert got.capacity == want[f'capacity_{key}']
    unclamped = groups_lib.expert_capacity(config.replace(min_expert_capacity=1), got.group_size, train)
    assert unclamped == max(want[f'unclamped_{key}'], 1)


@settings(max_examples=400)
@given(batch=st.integers(1, 40), length=st.integers(1, 300), experts=st.integers(1, 40),
       group_size=st.integers(1, 5000), replicas=st.integers(1, 6), train=st.booleans())
def test_grouping_of_any_shape(batch, length, experts, group_size, replicas, train):
  config = model(num_experts=experts, num_selected_experts=1, group_size=group_size, num_expert_replicas=replicas)
  got = groups_lib.group_tokens(config, batch, length, train)
  multiple = experts * replicas
  assert (got.batch, got.length) == routing_reference.padded_shape(batch, length, multiple)
  assert (got.batch, got.length) == (batch, length) or batch * length % multiple != 0
  tokens = got.batch * got.length
  assert got.num_groups == routing_reference.number_of_groups(tokens, group_size, multiple)
  assert got.num_groups * got.group_size == tokens and got.num_groups % multiple == 0
  assert got.capacity == routing_reference.capacity(1.25 if train else 2., got.group_size, experts)


def test_group_larger_than_asked_for():
  """The floor division of the original (SPEC 2.2)."""
  got = groups_lib.group_tokens(model(num_experts=1, num_selected_experts=1, group_size=64), 1, 100, True)
  assert (got.num_groups, got.group_size) == (1, 100)


@pytest.mark.parametrize('factor, tokens, experts, want', (
    (1.25, 36, 10, 4), (1.25, 52, 10, 6), (1.25, 44, 10, 6), (1.0, 90, 20, 4), (1.0, 110, 20, 6), (1.0, 130, 20, 6),
    (1.0, 150, 20, 8)))
def test_capacity_rounds_half_to_even(factor, tokens, experts, want):
  config = model(num_experts=experts, train_capacity_factor=factor)
  assert groups_lib.expert_capacity(config, tokens, True) == want
  assert routing_reference.capacity(factor, tokens, experts) == want


@settings(max_examples=200)
@given(tokens=st.integers(1, 4000), experts=st.integers(2, 40), selected=st.integers(1, 2),
       factor=st.sampled_from((0.5, 1., 1.25, 1.5, 2.)), least=st.integers(1, 9))
def test_capacity_modes(tokens, experts, selected, factor, least):
  config = model(num_experts=experts, num_selected_experts=selected, eval_capacity_factor=factor,
                 min_expert_capacity=least)
  assert groups_lib.expert_capacity(config.replace(capacity_mode='none'), tokens, False) == tokens
  assert groups_lib.expert_capacity(config, tokens, False) == routing_reference.capacity(factor, tokens, experts, least)
  port = math.floor(selected * factor * tokens / experts)
  port = max(port + (port % 2), least)
  assert groups_lib.expert_capacity(config.replace(capacity_mode='colossalai'), tokens, False) == port


def test_colossalai_routes_one_group_without_padding():
  got = groups_lib.group_tokens(model(num_experts=8, capacity_mode='colossalai', group_size=4), 3, 7, False)
  assert got == (3, 7, 1, 21, 10)  # floor(2 * 2 * 21 / 8) = 10


# Assignment.


@settings(max_examples=60)
@given(data=st.data(), selected=st.integers(1, 3), capacity=st.sampled_from((1, 3, 6)))
def test_assignment(data, selected, capacity):
  """Logits on a coarse grid, so that ties, full experts and equal rows are common."""
  groups, tokens, experts = 2, 10, 4
  grid = data.draw(st.lists(st.integers(-2, 2), min_size=groups * tokens * experts, max_size=groups * tokens * experts))
  logits = np.array(grid, np.float32).reshape(groups, tokens, experts)
  got = route(model(num_selected_experts=selected), logits, np.ones((groups, tokens), bool), capacity)
  check(got, routing_reference.route(logits, selected, capacity), selected)


@pytest.mark.parametrize('selected', (1, 2, 3))
@pytest.mark.parametrize('batch_prioritized', (False, True))
@pytest.mark.parametrize('ignore_padding', (False, True))
def test_variants(selected, batch_prioritized, ignore_padding):
  config = model(num_experts=5, num_selected_experts=selected, batch_prioritized=batch_prioritized,
                 ignore_padding_tokens=ignore_padding)
  for seed in range(6):
    rng = np.random.RandomState(seed)
    is_token = rng.rand(3, 24) < (0.7 if seed else 0.)  # seed 0: nothing but padding
    logits = (2 * rng.randn(3, 24, 5) * is_token[..., None]).astype(np.float32)
    got = route(config, logits, is_token, 4)
    want = routing_reference.route(logits, selected, 4, is_token if ignore_padding else None, batch_prioritized)
    check(got, want, selected)
    if ignore_padding:
      assert not np.asarray(got.assignment.kept)[~is_token].any()
      assert not np.asarray(got.assignment.gate)[~is_token].any()


def test_batch_prioritized_serves_the_surest():
  """Three tokens want expert 0 with rising certainty and there is one slot: it is the last one's."""
  logits = np.array([[[1, 0, 0], [2, 0, 0], [3, 0, 0]]], np.float32)
  is_token = np.ones((1, 3), bool)
  config = model(num_experts=3, num_selected_experts=1)
  first = route(config, logits, is_token, 1)
  surest = route(config.replace(batch_prioritized=True), logits, is_token, 1)
  assert np.asarray(first.assignment.kept)[0, :, 0].tolist() == [True, False, False]
  assert np.asarray(surest.assignment.kept)[0, :, 0].tolist() == [False, False, True]


def test_first_choices_come_before_second_ones():
  """Token 0 asks for expert 1 second, token 1 first: the only slot is token 1's. And a dropped first choice does not
  stop the second."""
  logits = np.array([[[3, 2, 0], [2, 3, 0], [3, 0, 2]]], np.float32)
  got = route(model(num_experts=3), logits, np.ones((1, 3), bool), 1)
  #                                             first  second
  assert np.asarray(got.assignment.kept)[0].tolist() == [[True, False], [True, False], [False, True]]
  assert np.asarray(got.assignment.slot)[0].tolist() == [[0, 1], [0, 2], [1, 0]]


@pytest.mark.parametrize('tokens', (1, 16, 17, 75))  # blocks of 32 choices: parts of one, one, more
def test_places_in_long_queues(tokens):
  """Choices outside of the experts stand in no queue."""
  expert = np.random.RandomState(tokens).randint(-1, 8, (2, tokens, 2))
  by_rank, by_token = np.full((2, *expert.shape), -1)
  for g in range(2):
    for places, order in ((by_rank, [(t, s) for s in range(2) for t in range(tokens)]),
                          (by_token, [(t, s) for t in range(tokens) for s in range(2)])):
      length = dict.fromkeys(range(7), 0)
      for t, s in order:
        if expert[g, t, s] in length:
          places[g, t, s] = length[expert[g, t, s]]
          length[expert[g, t, s]] += 1
  both = jax.jit(lambda e: (slots.queue_positions(e, 7), slots.in_token_order(e, 7)))
  for got, want in zip(both(expert), (by_rank, by_token)):
    np.testing.assert_array_equal(got, want)


def test_ties_go_to_the_lowest_expert():
  want = golden.load_arrays('units.npz')['topk_tie_values']
  assert want.tolist() == [[0, 1], [1, 3]]  # of four equal values, and of values whose two largest are the 2nd and 4th
  logits = np.array([[[0, 0, 0, 0], [-1, 2, 1, 2]]], np.float32)
  got = route(model(), logits, np.ones((1, 2), bool), 4)
  np.testing.assert_array_equal(got.assignment.expert_index[0], want)
  three = route(model(num_selected_experts=3), np.zeros((1, 5, 4), np.float32), np.ones((1, 5), bool), 4)
  assert np.asarray(three.assignment.expert_index).tolist() == [[[0, 1, 2]] * 5]


def test_masked_tokens_take_slots_of_experts_0_and_1():
  """SPEC 2.6: a zero vector has equal probabilities; it counts in capacity and losses unless padding is ignored."""
  rng = np.random.RandomState(3)
  logits = rng.randn(1, 12, 4).astype(np.float32)
  logits[0, 6:8, 0] = 5.
  is_token = np.arange(12)[None] >= 6
  logits[~is_token] = 0
  config = model()
  assignment = jax.tree.map(np.asarray, route(config, logits, is_token, 6).assignment)
  assert assignment.expert_index[0, :6].tolist() == [[0, 1]] * 6
  np.testing.assert_array_equal(assignment.gate[0, :6], 0.25 * assignment.kept[0, :6])
  assert assignment.kept[0, :6, 0].all()
  after = assignment.expert_index[0, 6:, 0] == 0
  assert after.any() and not assignment.kept[0, 6:, 0][after].any()  # expert 0 is full of padding
  ignoring = route(config.replace(ignore_padding_tokens=True), logits, is_token, 6)
  assert np.asarray(ignoring.assignment.kept)[0, 6:8, 0].all()
  assert float(ignoring.fraction_tokens_left_behind) == 0.
  np.testing.assert_allclose(ignoring.router_z_loss, route(config, logits, is_token, 6).router_z_loss)


@pytest.mark.parametrize('prioritized', (False, True))
def test_capacity_mode_none_drops_nothing(prioritized):
  config = model(num_experts=3, num_selected_experts=3, capacity_mode='none', group_size=8,
                 batch_prioritized=prioritized)
  grouping = groups_lib.group_tokens(config, 2, 12, True)
  shape = (grouping.num_groups, grouping.group_size)
  logits = np.tile(np.array([5., 1., 0.], np.float32), (*shape, 1))  # all want the same
  got = route(config, logits, np.ones(shape, bool), grouping.capacity)
  assert np.asarray(got.assignment.kept).all() and float(got.fraction_tokens_left_behind) == 0.
  assert float(got.router_confidence) == pytest.approx(1 / 3)


def test_balanced_loss_is_the_number_of_choices():
  logits = jnp.asarray(20. * np.eye(4)[np.arange(16) % 4] + 10. * np.eye(4)[(np.arange(16) + 1) % 4], jnp.float32)[None]
  got = route(model(), logits, np.ones((1, 16), bool), 16)
  np.testing.assert_allclose(got.auxiliary_loss, 2., rtol=1e-6)
  np.testing.assert_allclose(got.expert_load, 1.)


def test_gradient_reaches_the_router_by_gates_and_losses_only():
  """SPEC 2.8: d/dlogits of gates, mean probability and logsumexp; the fraction of choices is a constant."""
  rng = np.random.RandomState(5)
  logits = jnp.asarray(rng.randn(2, 8, 4), jnp.float32)
  out = jnp.asarray(rng.randn(2, 8, 2), jnp.float32)
  config, is_token = model(), jnp.ones((2, 8), bool)
  fixed = route(config, logits, is_token, 3)

  def through_library(x):
    got = routers.route(config, x, is_token, 3)
    return jnp.sum(out * got.assignment.gate) + got.auxiliary_loss + got.router_z_loss

  def by_hand(x):
    probs = jax.nn.softmax(x)
    index = fixed.assignment.expert_index
    gate = jnp.take_along_axis(probs, index, axis=-1) * fixed.assignment.kept
    f = jax.nn.one_hot(index, 4).sum(axis=2).mean(axis=1)
    aux = 4 * jnp.mean(jnp.sum(f * probs.mean(axis=1), axis=-1))
    return jnp.sum(out * gate) + aux + jnp.mean(jax.nn.logsumexp(x, axis=-1) ** 2)

  np.testing.assert_allclose(jax.jit(jax.grad(through_library))(logits), jax.jit(jax.grad(by_hand))(logits), atol=1e-6)


# The two result types.


@pytest.mark.parametrize('selected, ignore_padding', ((1, True), (2, False), (3, True)))
def test_slots_and_tokens_are_inverse(selected, ignore_padding):
  groups, tokens, experts, capacity = 3, 14, 5, 4
  config = model(num_experts=experts, num_selected_experts=selected, ignore_padding_tokens=ignore_padding)

  @jax.jit
  def both(logits, is_token):
    assignment = routers.route(config, logits, is_token, capacity).assignment
    slots = slots_from_tokens(assignment, experts, capacity)
    return assignment, slots, tokens_from_slots(slots, tokens, selected), flat_slots(assignment, experts, capacity)

  for seed in range(4):
    rng = np.random.RandomState(seed)
    is_token = rng.rand(groups, tokens) < 0.8
    logits = (rng.randn(groups, tokens, experts) * is_token[..., None]).astype(np.float32)
    assignment, slots, back, flat = jax.tree.map(np.asarray, both(logits, is_token))
    want_token = np.full((groups, experts, capacity), tokens)
    want_gate = np.zeros((groups, experts, capacity), np.float32)
    for g, t, s in zip(*np.nonzero(assignment.kept)):
      at = (g, assignment.expert_index[g, t, s], assignment.slot[g, t, s])
      assert want_token[at] == tokens  # nobody else's
      want_token[at], want_gate[at] = t, assignment.gate[g, t, s]
      assert flat[g, t, s] == at[1] * capacity + at[2]
    assert (flat[~assignment.kept] == experts * capacity).all()
    np.testing.assert_array_equal(slots.token, want_token)
    np.testing.assert_array_equal(slots.gate, want_gate)

    def choices(a):  # per token, what it got, whatever the order
      return [[sorted((int(e), int(c), float(p)) for e, c, p, k in zip(*row) if k) for row in zip(*group)]
              for group in zip(a.expert_index, a.slot, a.gate, a.kept)]
    assert choices(back) == choices(assignment)
    assert not back.gate[~back.kept].any()
