"""Routers and options besides the default, by hand and against slow references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax import decoding, routers, scoring
from openmoe_jax.config import ConfigError, ModelConfig
from openmoe_jax.routers import groups as groups_lib
from openmoe_jax.routers import frozen, hashing, noisy_top_k, sigmoid, switch
from openmoe_jax.routers.types import RouterContext
from tests import router_variants_reference as reference, routing_reference

GROUPS, TOKENS, EXPERTS = 2, 12, 4


def model(**changes) -> ModelConfig:
  values = dict(vocab_size=40, emb_dim=4, mlp_dim=4, num_heads=1, head_dim=2, num_layers=1, num_experts=EXPERTS)
  return ModelConfig(**{**values, **changes})


@functools.partial(jax.jit, static_argnames=('config', 'capacity'))
def run(config, logits, is_token, capacity, context):
  return routers.route(config, logits, is_token, capacity, context)


def route(config, logits, capacity, is_token=None, **context):
  logits = np.asarray(logits, np.float32)
  is_token = np.ones(logits.shape[:2], bool) if is_token is None else is_token
  return jax.tree.map(np.asarray, run(config, logits, is_token, capacity, RouterContext(**context)))


def random_logits(seed, scale=2.):
  return (scale * np.random.RandomState(seed).randn(GROUPS, TOKENS, EXPERTS)).astype(np.float32)


def check(got, wants, gate, orders, capacity):
  slot, kept = reference.serve(wants, orders, capacity, EXPERTS)
  asked = slot >= 0
  np.testing.assert_array_equal(got.assignment.kept, kept)
  np.testing.assert_array_equal(got.assignment.expert_index[asked], np.array(wants)[asked])
  np.testing.assert_array_equal(got.assignment.slot[asked], slot[asked])
  np.testing.assert_allclose(got.assignment.gate, gate * kept, rtol=3e-6, atol=1e-7)
  np.testing.assert_allclose(got.expert_usage, kept.sum() / (EXPERTS * capacity * GROUPS), rtol=1e-6)
  np.testing.assert_allclose(got.router_confidence, (gate * kept).sum() / kept.sum(), rtol=1e-6)
  load = np.array([(np.array(wants)[asked] == e).sum() for e in range(EXPERTS)])
  np.testing.assert_allclose(got.expert_load, load * EXPERTS / load.sum(), rtol=1e-6)


POSITIONS = [list(range(TOKENS))] * GROUPS


# Switch.


@pytest.mark.parametrize('seed', range(3))
def test_switch(seed):
  logits = random_logits(seed)
  got = route(model(router='switch', num_selected_experts=1), logits, 3)
  probs = routing_reference.softmax(logits.astype(np.float64))
  wants = reference.chosen(probs, 1)
  check(got, wants, reference.pick(probs, wants), POSITIONS, 3)
  np.testing.assert_allclose(got.auxiliary_loss, reference.balance(probs, wants), rtol=3e-6)


def test_switch_is_top_k_with_one_choice():
  logits = random_logits(5)
  logits[0, :4] = 0.  # ties go to expert 0
  is_token = logits.any(axis=-1)
  for ignore in (False, True):
    options = dict(num_selected_experts=1, ignore_padding_tokens=ignore)
    a, b = (route(model(router=name, **options), logits, 3, is_token) for name in ('switch', 'top_k'))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), a, b)


def test_jitter_stays_within_its_bounds():
  x = jnp.linspace(-2., 2., 500).reshape(1, 100, 5)
  got = np.asarray(switch.jitter(x, 0.1, jax.random.key(0)) / x)
  assert 0.9 <= got.min() < 0.92 and 1.08 < got.max() <= 1.1
  assert abs(got.mean() - 1) < 0.01
  assert (np.asarray(switch.jitter(x, 0.1, jax.random.key(1)) / x) != got).mean() > 0.9


# Sigmoid gates with loss-free balancing.


@pytest.mark.parametrize('seed, ignore, normalize', ((0, False, False), (1, True, True), (2, False, True)))
def test_sigmoid(seed, ignore, normalize):
  rng = np.random.RandomState(seed)
  logits, bias = random_logits(seed), (0.3 * rng.randn(EXPERTS)).astype(np.float32)
  is_token = rng.rand(GROUPS, TOKENS) < 0.8
  logits *= is_token[..., None]
  config = model(router='sigmoid', ignore_padding_tokens=ignore, normalize_gates=normalize)
  got = route(config, logits, 3, is_token, state={'bias': bias})
  affinity = reference.sigmoid(logits)
  wants = reference.chosen(affinity + bias, 2)
  gate = reference.pick(affinity, wants)
  gate = gate / gate.sum(axis=-1, keepdims=True) if normalize else gate
  orders = [[t for t in range(TOKENS) if is_token[g, t] or not ignore] for g in range(GROUPS)]
  check(got, wants, gate, orders, 3)
  shares = affinity / affinity.sum(axis=-1, keepdims=True)
  np.testing.assert_allclose(got.auxiliary_loss, reference.balance(shares, wants, is_token if ignore else None),
                             rtol=3e-6)


def test_bias_chooses_but_is_not_in_the_gate():
  """Two experts at affinity 1/2 and a third at sigmoid(-1): a bias of 1 brings it to the front, with its own gate."""
  logits = [[[0., 0., -1., -5.]]]
  config = model(router='sigmoid')
  plain = route(config, logits, 4, state={'bias': np.zeros(4, np.float32)})
  biased = route(config, logits, 4, state={'bias': np.array([0, 0, 1, 0], np.float32)})
  assert plain.assignment.expert_index.tolist() == [[[0, 1]]]
  assert biased.assignment.expert_index.tolist() == [[[2, 0]]]
  np.testing.assert_allclose(biased.assignment.gate, [[[1 / (1 + np.e), 0.5]]], rtol=1e-6)


def test_no_gradient_reaches_the_bias():
  config = model(router='sigmoid')
  def total(bias, logits):
    got = routers.route(config, logits, jnp.ones(logits.shape[:2], bool), 3, RouterContext(state={'bias': bias}))
    return jnp.sum(got.assignment.gate) + got.auxiliary_loss + got.router_z_loss
  by_bias, by_logits = jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.zeros(EXPERTS), jnp.asarray(random_logits(3)))
  assert not np.asarray(by_bias).any() and np.asarray(by_logits).all()


def test_update_of_the_bias_by_hand():
  bias = np.array([[0.1, 0., -0.1, 0.]], np.float32)
  got = sigmoid.update_bias(bias, np.array([[2., 0.5, 1., 0.5]], np.float32), 0.01)
  np.testing.assert_allclose(got, [[0.09, 0.01, -0.1, 0.01]], rtol=1e-6)


def test_bias_balances_experts_that_all_tokens_prefer():
  """All tokens prefer expert 0 by a little; after enough updates all experts are asked for about equally often."""
  config = model(router='sigmoid', num_selected_experts=1)
  logits = random_logits(7, 0.5) + np.array([1., 0, 0, 0], np.float32)
  bias = np.zeros(EXPERTS, np.float32)
  first = route(config, logits, TOKENS, state={'bias': bias}).expert_load
  for _ in range(60):
    load = route(config, logits, TOKENS, state={'bias': bias}).expert_load
    bias = np.asarray(sigmoid.update_bias(bias, load, 0.01))
  assert first.max() > 2.5 and load.max() < 1.7 and load.min() > 0.4


# Noisy top-k gating.


@pytest.mark.parametrize('noise', (True, False))
def test_noisy_top_k(noise):
  logits, raw, key = random_logits(11, 1.), random_logits(12, 1.), jax.random.key(5)
  got = route(model(router='noisy_top_k'), logits, 3, more_logits=raw, key=key if noise else None)
  drawn = np.asarray(jax.random.normal(jax.random.split(key)[0], logits.shape)) * noise
  wants, gates, importance, load = reference.noisy_top_k(logits, raw, drawn, 2)
  check(got, wants, gates, POSITIONS, 3)
  np.testing.assert_allclose(gates.sum(axis=-1), 1.)
  np.testing.assert_allclose(got.auxiliary_loss, importance + load, rtol=2e-5)


def test_losses_of_noisy_top_k_by_hand():
  given = np.float32([[[1., 0.], [0.5, 0.5], [1., 0.], [0.5, 0.5]]])  # 3 and 1: mean 2, variance 1
  np.testing.assert_allclose(noisy_top_k.importance_loss(given), 1 / 4, rtol=1e-6)
  np.testing.assert_allclose(noisy_top_k.load_loss(given[:, :0]), 0.)
  # Of the logits 2, 1, 0 with noise of size 1 two are chosen; expert 1 stays if it exceeds 0, expert 2 must exceed 1.
  top = np.float32([2., 1., 0.])
  got = noisy_top_k.probability_of_choice(top, top, np.ones(3, np.float32), top)
  np.testing.assert_allclose(got, [reference.normal_cdf(x) for x in (2., 1., -1.)], rtol=1e-5)


def test_both_losses_of_noisy_top_k_push_at_the_favourite():
  """All tokens prefer expert 0; the load loss reaches its logits although who is chosen is a decision."""
  logits = jnp.asarray(random_logits(13, 0.1) + np.float32([1, 0, 0, 0]))
  config, raw = model(router='noisy_top_k'), jnp.zeros_like(logits)
  def loss(logits):
    is_token = jnp.ones(logits.shape[:2], bool)
    return routers.route(config, logits, is_token, 3, RouterContext(more_logits=raw)).auxiliary_loss
  slope = np.asarray(jax.jit(jax.grad(loss))(logits)).sum(axis=(0, 1))
  assert slope[0] > 0 and slope[0] == slope.max()


def test_padding_is_not_in_the_losses_of_noisy_top_k():
  config = model(router='noisy_top_k', ignore_padding_tokens=True)
  logits, raw = random_logits(14), random_logits(15)
  is_token = np.ones((GROUPS, TOKENS), bool)
  is_token[:, 8:] = False
  logits[:, 8:] = 0
  got = route(config, logits, 3, is_token, more_logits=raw)
  _, _, importance, load = reference.noisy_top_k(logits[:, :8], raw[:, :8], np.zeros((GROUPS, 8, EXPERTS)), 2)
  np.testing.assert_allclose(got.auxiliary_loss, importance + load, rtol=2e-5)
  assert not got.assignment.kept[:, 8:].any()


# Routing by token id.


def test_hash_gives_different_experts_evenly():
  config = model(router='hash', num_experts=5, num_selected_experts=3)
  experts = np.asarray(jax.jit(lambda ids: hashing.experts_of(config, ids))(jnp.arange(5000)))
  assert all(len(set(row)) == 3 for row in experts.tolist())
  for choice in range(3):
    counts = np.bincount(experts[:, choice], minlength=5)
    assert abs(counts - 1000).max() < 5 * np.sqrt(5000 * 0.2 * 0.8), counts
  pairs = np.bincount(experts[:-1, 0] * 5 + experts[1:, 0], minlength=25)  # neighbours have nothing to do with each other
  assert abs(pairs - 200).max() < 5 * np.sqrt(200)
  other = np.asarray(jax.jit(lambda ids: hashing.experts_of(config.replace(hash_seed=1), ids))(jnp.arange(5000)))
  assert 0.15 < (other[:, 0] == experts[:, 0]).mean() < 0.25


def test_hash_by_hand():
  """MurmurHash3's finalizer in plain integers; the same two experts wherever an id stands."""
  def mix(x):
    x = (x ^ (x >> 16)) * 0x85ebca6b % 2**32
    x = (x ^ (x >> 13)) * 0xc2b2ae35 % 2**32
    return x ^ (x >> 16)
  config, ids = model(router='hash', hash_seed=7), np.array([[3, 9, 3, 39], [9, 0, 1, 2]], np.int32)
  wants = [[reference.largest([mix((int(t) * EXPERTS + e + mix(7)) % 2**32) >> 1 for e in range(EXPERTS)], 2)
            for t in row] for row in ids]
  got = jax.tree.map(np.asarray, jax.jit(lambda: routers.route(config, None, jnp.ones(ids.shape, bool), 2,
                                                           RouterContext(token_ids=ids)))())
  assert got.assignment.expert_index.tolist() == wants
  slot, kept = reference.serve(wants, [[0, 1, 2, 3]] * 2, 2, EXPERTS)
  np.testing.assert_array_equal(got.assignment.slot, slot)
  np.testing.assert_array_equal(got.assignment.gate, 0.5 * kept)
  assert got.auxiliary_loss == 0 and got.router_z_loss == 0
  np.testing.assert_allclose(got.expert_load.sum(), EXPERTS)


def test_frozen_looks_up_experts_and_learns_gates():
  logits, table = random_logits(16), np.array([[3, 1], [0, 2], [1, 0]], np.int32)
  ids = np.random.RandomState(0).randint(0, 3, (GROUPS, TOKENS)).astype(np.int32)
  got = route(model(router='frozen'), logits, 4, token_ids=ids, state={'experts': table})
  probs, wants = routing_reference.softmax(logits.astype(np.float64)), table[ids].tolist()
  check(got, wants, reference.pick(probs, wants), POSITIONS, 4)
  assert got.auxiliary_loss == 0
  def gates(x):
    context = RouterContext(token_ids=ids, state={'experts': table})
    return jnp.sum(routers.route(model(router='frozen'), x, jnp.ones(ids.shape, bool), 4, context).assignment.gate)
  assert np.asarray(jax.jit(jax.grad(gates))(jnp.asarray(logits))).any()


def test_table_of_mean_probabilities():
  """Two layers; id 1 is seen twice, id 2 once and once as padding, id 0 never."""
  config = model(num_selected_experts=1, num_layers=2, vocab_size=3, num_experts=3)
  probs = np.float32([[[.1, .6, .3], [.7, .2, .1], [0, 0, 1], [1, 0, 0]],
                      [[.5, .4, .1], [.2, .5, .3], [.6, .3, .1], [0, 1, 0]]])
  ids, is_token = np.array([1, 1, 2, 2]), np.array([True, True, True, False])
  totals = frozen.count_probabilities((jnp.zeros((2, 3, 3)), jnp.zeros(3)), probs, ids, is_token)
  got = np.asarray(frozen.table(config, totals))
  by_hash = int(hashing.experts_of(config, jnp.array(0))[0])
  assert totals[1].tolist() == [0, 2, 1]
  assert got[:, :, 0].tolist() == [[by_hash, 0, 2], [by_hash, 1, 0]]  # id 1: .8 .8 .4 (a tie), and .7 .9 .4
  chosen = np.argmax(probs, axis=-1)[..., None]
  np.testing.assert_allclose(frozen.agreement(got, chosen, ids, is_token), [2 / 3, 2 / 3], rtol=1e-6)


# Expert choice.


def choose(logits, capacity, is_token=None, **changes):
  return route(model(router='expert_choice', allow_future_leak=True, **changes), logits, capacity, is_token)


@pytest.mark.parametrize('seed, capacity', ((0, 1), (1, 3), (2, 12), (3, 20)))
def test_expert_choice(seed, capacity):
  logits = random_logits(seed)
  logits[0, 3:6] = logits[0, 2]  # equals: the first comes first
  got = choose(logits, capacity)
  slots = min(capacity, TOKENS)
  token, gate = reference.expert_choice(logits, slots)
  np.testing.assert_array_equal(got.assignment.token, token)
  np.testing.assert_allclose(got.assignment.gate, gate, rtol=2e-6)
  taken = [set(group.reshape(-1).tolist()) for group in token]
  np.testing.assert_allclose(got.fraction_tokens_left_behind, 1 - sum(map(len, taken)) / (GROUPS * TOKENS), atol=1e-6)
  np.testing.assert_allclose(got.router_confidence, gate.mean(), rtol=1e-5)
  assert got.expert_usage == 1 and got.auxiliary_loss == 0 and got.expert_load.tolist() == [1] * EXPERTS
  log_z = np.log(np.exp(logits.astype(np.float64)).sum(axis=-1))
  np.testing.assert_allclose(got.router_z_loss, (log_z ** 2).mean(), rtol=1e-5)


def test_expert_choice_by_hand():
  """Three tokens, two experts with a slot each, probabilities of expert 0: 0.9, 0.6, 0.2."""
  p = np.float32([.9, .6, .2])
  got = route(model(router='expert_choice', allow_future_leak=True, num_experts=2), np.log([[*zip(p, 1 - p)]]), 1)
  assert got.assignment.token.tolist() == [[[0], [2]]]
  np.testing.assert_allclose(got.assignment.gate, [[[.9], [.8]]], rtol=1e-6)
  np.testing.assert_allclose(got.fraction_tokens_left_behind, 1 / 3, rtol=1e-6)


def test_expert_choice_takes_no_ignored_padding():
  logits, is_token = random_logits(20), np.arange(TOKENS)[None] < np.array([[5], [0]])
  logits *= is_token[..., None]
  got = choose(logits, 7, is_token, ignore_padding_tokens=True)
  token, gate = reference.expert_choice(logits[:1, :5], 5)
  np.testing.assert_array_equal(got.assignment.token[0, :, :5], token[0])
  np.testing.assert_allclose(got.assignment.gate[0, :, :5], gate[0], rtol=2e-6)
  assert (got.assignment.token[0, :, 5:] == TOKENS).all() and (got.assignment.token[1] == TOKENS).all()
  assert not got.assignment.gate[0, :, 5:].any() and not got.assignment.gate[1].any()
  assert got.fraction_tokens_left_behind == 0
  np.testing.assert_allclose(got.expert_usage, 5 / 14, rtol=1e-6)
  everything = choose(logits, 7, is_token)
  assert (everything.assignment.token < TOKENS).all()


def test_expert_choice_does_not_generate_or_score_without_capacity():
  config = model(router='expert_choice', allow_future_leak=True)
  tokens, lengths = np.ones((1, 3), np.int32), np.array([3])
  for mode in ('none', 't5x'):
    with pytest.raises(ConfigError, match="router = 'expert_choice' cannot generate"):
      decoding.generate(config, None, tokens, lengths, 1, capacity_mode=mode)
  with pytest.raises(ConfigError, match="cannot have capacity_mode = 'none', which generation, scoring"):
    scoring.score(config, None, tokens, lengths, np.array([1]))


# Two-level experts.


@pytest.mark.parametrize('groups, chosen, selected, normalize', ((2, 1, 2, False), (2, 2, 2, True), (4, 2, 2, False)))
def test_hierarchical(groups, chosen, selected, normalize):
  logits = random_logits(21)
  group_logits = np.random.RandomState(22).randn(GROUPS, TOKENS, groups).astype(np.float32)
  config = model(router='hierarchical', num_expert_groups=groups, num_selected_groups=chosen,
                 num_selected_experts=selected, normalize_gates=normalize)
  got = route(config, logits, 3, more_logits=group_logits)
  wants, probs = reference.hierarchical(logits, group_logits, selected // chosen, chosen)
  gate = reference.pick(probs, wants)
  gate = gate / gate.sum(axis=-1, keepdims=True) if normalize else gate
  check(got, wants, gate, POSITIONS, 3)
  np.testing.assert_allclose(got.auxiliary_loss, reference.balance(probs, wants), rtol=3e-6)


def test_hierarchical_by_hand():
  """Group 1 has probability 3/4, its experts 1/3 and 2/3: 1/4 and 1/2; group 0 has 1/4, of which 7/8 are expert 1's."""
  logits, group_logits = np.log([[[1., 7., 1., 2.]]]), np.log([[[1., 3.]]])
  config = model(router='hierarchical')
  both = route(config, logits, 4, more_logits=group_logits.astype(np.float32)).assignment
  one = route(config.replace(num_selected_groups=1), logits, 4, more_logits=group_logits.astype(np.float32)).assignment
  assert both.expert_index.tolist() == [[[3, 1]]] and one.expert_index.tolist() == [[[3, 2]]]
  np.testing.assert_allclose(both.gate, [[[1 / 2, 7 / 32]]], rtol=1e-6)
  np.testing.assert_allclose(one.gate, [[[1 / 2, 1 / 4]]], rtol=1e-6)


# Options of all routers in which tokens choose.


@pytest.mark.parametrize('priority', ('reversed', 'random'))
@pytest.mark.parametrize('ignore', (False, True))
def test_priority(priority, ignore):
  logits, key = random_logits(8), jax.random.key(3)
  is_token = np.arange(TOKENS) % 5 != 4
  logits[:, ~is_token] = 0
  is_token = np.broadcast_to(is_token, (GROUPS, TOKENS))
  got = route(model(priority=priority, ignore_padding_tokens=ignore), logits, 2, is_token, key=key)
  orders = [list(range(TOKENS))[::-1]] * GROUPS
  if priority == 'random':
    orders = np.argsort(jax.random.uniform(key, (GROUPS, TOKENS)), axis=1).tolist()
    assert orders[0] != orders[1]
  orders = [[t for t in order if is_token[0, t] or not ignore] for order in orders]
  probs = routing_reference.softmax(logits.astype(np.float64))
  wants = reference.chosen(probs, 2)
  check(got, wants, reference.pick(probs, wants), orders, 2)


def test_random_order_differs_in_training_and_not_in_evaluation():
  logits = np.tile(np.float32([3, 2, 0, 0]), (GROUPS, TOKENS, 1))  # all want the same: the order decides
  config = model(priority='random')
  a, b = (route(config, logits, 3, key=jax.random.key(seed)).assignment.kept for seed in (1, 2))
  c, d = (route(config, logits, 3).assignment.kept for _ in range(2))
  assert (a != b).any() and (c == d).all()
  assert a.sum() == b.sum() == c.sum() == 2 * 3 * GROUPS


def test_normalized_gates_count_dropped_choices_too():
  """Both tokens ask for expert 0 and then for different ones; the second token's first choice finds no slot."""
  logits = np.log(np.float32([[[4, 1, 2, 1], [6, 1, 1, 2]]]))
  got = route(model(normalize_gates=True), logits, 1).assignment
  np.testing.assert_allclose(got.gate, [[[4 / 6, 2 / 6], [0., 2 / 8]]], rtol=1e-6)


@pytest.mark.parametrize('selected', (1, 2, 3))
def test_capacity_times_k(selected):
  config = model(num_experts=8, num_selected_experts=selected, capacity_times_k=True, min_expert_capacity=1)
  for tokens in (16, 40, 100):
    want = routing_reference.half_to_even(routing_reference.fractions.Fraction(5, 4) * selected * tokens / 8)
    assert groups_lib.expert_capacity(config, tokens, True) == want


@pytest.mark.parametrize('changes, message', (
    (dict(router='switch'), "router = 'switch' needs num_selected_experts = 1, not 2"),
    (dict(router='expert_choice'), 'leaks the future in training and evaluation; allow_future_leak = True accepts that'),
    (dict(router='expert_choice', allow_future_leak=True, capacity_mode='none'), "cannot have capacity_mode = 'none'"),
    (dict(router='expert_choice', allow_future_leak=True, priority='random'), 'has no order of tokens'),
    (dict(router='expert_choice', allow_future_leak=True, capacity_mode='none', dispatch='dropless'),
     "dispatch = 'dropless' go with"),
    (dict(router='hierarchical', num_expert_groups=3), 'num_expert_groups = 3 must divide num_experts = 4'),
    (dict(router='hierarchical', num_selected_groups=3), 'must be at most num_expert_groups = 2 and divide'),
    (dict(router='hierarchical', num_selected_groups=1, num_selected_experts=3),
     'num_selected_experts = 3 is more than 1 groups of 2 experts hold'),
    (dict(num_shared_experts=-1), 'num_shared_experts = -1 must be an integer of at least 0'),
    (dict(router='hash', router_jitter=0.1), "router = 'hash' does not look at the input: it needs router_jitter = 0"),
    (dict(router='hash', normalize_gates=True), "it is for 'top_k', 'sigmoid', 'frozen', 'hierarchical'"),
    (dict(router='noisy_top_k', num_selected_experts=1), "router = 'noisy_top_k' needs num_selected_experts of at least 2"),
    (dict(router='swich'), "router = 'swich' is not known; valid: 'top_k', 'switch'"),
    (dict(priority='first'), "priority = 'first' is not known; valid: 'position', 'reversed', 'random'"),
    (dict(priority='random', batch_prioritized=True), "needs priority = 'position', not 'random'"),
    (dict(normalize_gates=True, num_selected_experts=1), 'normalize_gates = True needs num_selected_experts of at least 2'),
    (dict(normalize_gates=True, router='switch', num_selected_experts=1), "normalize_gates = True is not for router ="),
    (dict(capacity_times_k=True, capacity_mode='colossalai'), 'multiplied by num_selected_experts already'),
    (dict(router_jitter=1.), 'router_jitter = 1.0 must be below 1'),
    (dict(bias_update_rate=-1.), 'bias_update_rate = -1.0 must be a number that is not negative')))
def test_settings_that_cannot_work(changes, message):
  with pytest.raises(ConfigError) as error:
    model(**changes)
  assert message in str(error.value) and '\n' not in str(error.value)
