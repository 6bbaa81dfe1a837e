"""What holds of every router whatever it is given: capacity, gates, symmetry, and who sees the future."""

import functools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax import routers
from openmoe_jax.config import ROUTERS, ModelConfig
from openmoe_jax.model import OpenMoE
from openmoe_jax.routers.types import RouterContext, SlotAssignment, tokens_from_slots
from openmoe_jax.train_state import init_params

GROUPS, TOKENS, EXPERTS, VOCAB = 8, 10, 4, 20
VARIANTS = {
    'top_k': dict(),
    'top_k, 3 choices, normalized': dict(num_selected_experts=3, normalize_gates=True),
    'top_k, surest first': dict(batch_prioritized=True),
    'top_k, last first': dict(priority='reversed'),
    'top_k, random order': dict(priority='random'),
    'switch': dict(router='switch', num_selected_experts=1),
    'sigmoid': dict(router='sigmoid'),
    'noisy_top_k': dict(router='noisy_top_k'),
    'hash': dict(router='hash'),
    'frozen': dict(router='frozen'),
    'hierarchical': dict(router='hierarchical'),
    'expert_choice': dict(router='expert_choice', allow_future_leak=True),
}


def model(**changes) -> ModelConfig:
  values = dict(vocab_size=VOCAB, emb_dim=4, mlp_dim=4, num_heads=1, head_dim=2, num_layers=1, num_experts=EXPERTS)
  return ModelConfig(**{**values, **changes})


@functools.partial(jax.jit, static_argnames=('config', 'capacity'))
def run(config, capacity, inputs):
  """The output, its assignment from the tokens' side, and what each expert's result is multiplied with: [G, T, E]."""
  logits, is_token, context = inputs
  got = routers.route(config, logits, is_token, capacity, context)
  assignment = got.assignment
  if isinstance(assignment, SlotAssignment):
    assignment = tokens_from_slots(assignment, TOKENS, EXPERTS)
  weights = jnp.sum(jax.nn.one_hot(assignment.expert_index, EXPERTS) * (assignment.gate * assignment.kept)[..., None], 2)
  return got, assignment, weights


def route(name, capacity, inputs, **changes):
  return jax.tree.map(np.asarray, run(model(**{**VARIANTS[name], **changes}), capacity, inputs))


def make_inputs(name, seed, coarse=False):
  """Logits (whole numbers if `coarse`: many ties), who is a token, and the context that the router reads."""
  rng = np.random.RandomState(seed)
  draw = lambda width: (rng.randint(-2, 3, (GROUPS, TOKENS, width)) if coarse else
                        rng.randn(GROUPS, TOKENS, width)).astype(np.float32)
  router = VARIANTS[name].get('router', 'top_k')
  state = {'sigmoid': {'bias': (0.2 * rng.randn(EXPERTS)).astype(np.float32)},
           'frozen': {'experts': np.array([rng.permutation(EXPERTS)[:2] for _ in range(VOCAB)], np.int32)}}.get(router)
  more = draw({'noisy_top_k': EXPERTS, 'hierarchical': 2}[router]) if router in ('noisy_top_k', 'hierarchical') else None
  ids = rng.randint(1, VOCAB, (GROUPS, TOKENS)).astype(np.int32)
  is_token = rng.rand(GROUPS, TOKENS) < 0.8
  return draw(EXPERTS), is_token, RouterContext(ids, more, state, jax.random.key(seed) if seed % 2 else None)


def test_every_router_is_tried():
  assert {changes.get('router', 'top_k') for changes in VARIANTS.values()} == set(ROUTERS)


@pytest.mark.parametrize('name', VARIANTS)
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), ignore=st.booleans(), coarse=st.booleans())
def test_capacity_and_gates(name, seed, ignore, coarse):
  """No expert gets more than its slots, no slot is given twice, no token goes to an expert twice; gates are shares."""
  capacity, inputs = 3, make_inputs(name, seed, coarse)
  got, assignment, weights = route(name, capacity, inputs, ignore_padding_tokens=ignore)
  kept = assignment.kept
  for g in range(GROUPS):
    places = [(e, s) for e, s in zip(assignment.expert_index[g][kept[g]], assignment.slot[g][kept[g]])]
    assert len(set(places)) == len(places)
    assert all(0 <= e < EXPERTS and 0 <= s < capacity for e, s in places)
    for t in range(TOKENS):
      experts = assignment.expert_index[g, t][kept[g, t]].tolist()
      assert len(set(experts)) == len(experts)
  assert (assignment.gate >= 0).all() and (weights >= 0).all() and np.isfinite(weights).all()
  if name != 'sigmoid':  # whose affinities are no probabilities
    assert (weights.sum(axis=-1) <= 1 + 1e-5).all()
  if ignore:
    assert not kept[~inputs[1]].any() and not weights[~inputs[1]].any()
  assert 0 <= got.fraction_tokens_left_behind <= 1 and 0 <= got.expert_usage <= 1 and 0 <= got.router_confidence <= 1
  np.testing.assert_allclose(got.expert_load.sum(), EXPERTS if inputs[1].any() or not ignore else 0, rtol=1e-5)
  assert got.auxiliary_loss >= 0 and got.router_z_loss >= 0


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), coarse=st.booleans(), capacity=st.sampled_from((3, TOKENS)))
def test_every_expert_that_chooses_is_full(seed, coarse, capacity):
  got = route('expert_choice', capacity, make_inputs('expert_choice', seed, coarse))[0]
  token = got.assignment.token
  assert token.shape == (GROUPS, EXPERTS, capacity) and (token < TOKENS).all()
  assert (np.diff(np.sort(token, axis=-1), axis=-1) > 0).all()  # different tokens
  assert got.expert_usage == 1


# Symmetry.


def permuted(inputs, order, axis):
  """Inputs with tokens (axis 1) or experts (axis 2) in another order; the key is left out."""
  logits, is_token, context = inputs
  if axis == 1:
    take = lambda x: None if x is None else x[:, order]
    return take(logits), take(is_token), context._replace(token_ids=take(context.token_ids),
                                                          more_logits=take(context.more_logits), key=None)
  state = context.state and {'bias': context.state['bias'][order]}
  more = None if context.more_logits is None else context.more_logits[..., order]
  return logits[..., order], is_token, context._replace(more_logits=more, state=state, key=None)


def without_key(inputs):
  return (*inputs[:2], inputs[2]._replace(key=None))


@pytest.mark.parametrize('name', ('top_k', 'switch', 'sigmoid', 'noisy_top_k', 'expert_choice', 'top_k, surest first'))
@settings(max_examples=5)
@given(seed=st.integers(0, 10**6))
def test_names_of_experts_mean_nothing(name, seed):
  """Experts in another order are chosen as before, where no table or hash knows them by number."""
  inputs, order = make_inputs(name, seed), np.random.RandomState(seed).permutation(EXPERTS)
  weights = route(name, 3, without_key(inputs))[2]
  np.testing.assert_allclose(route(name, 3, permuted(inputs, order, 2))[2], weights[..., order], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('name', [name for name in VARIANTS if name != 'expert_choice'])
@settings(max_examples=4)
@given(seed=st.integers(0, 10**6))
def test_tokens_are_independent_where_all_are_served(name, seed):
  inputs, order = make_inputs(name, seed), np.random.RandomState(seed).permutation(TOKENS)
  weights = route(name, TOKENS, without_key(inputs))[2]
  np.testing.assert_allclose(route(name, TOKENS, permuted(inputs, order, 1))[2], weights[:, order], rtol=1e-5, atol=1e-7)


ORDERLESS = ('top_k, surest first', 'expert_choice')


@pytest.mark.parametrize('name', ORDERLESS)
@settings(max_examples=5)
@given(seed=st.integers(0, 10**6))
def test_the_order_of_tokens_does_not_matter_to_some(name, seed):
  inputs, order = make_inputs(name, seed), np.random.RandomState(seed).permutation(TOKENS)
  weights = route(name, 2, without_key(inputs))[2]
  np.testing.assert_allclose(route(name, 2, permuted(inputs, order, 1))[2], weights[:, order], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('name', [name for name in VARIANTS if name not in ORDERLESS])
def test_and_matters_to_the_others_where_experts_are_full(name):
  inputs, order = make_inputs(name, 4), np.arange(TOKENS)[::-1]
  weights = route(name, 2, without_key(inputs))[2]
  assert np.abs(route(name, 2, permuted(inputs, order, 1))[2] - weights[:, order]).max() > 0.01


# Causality. The groups are as many trials.

LEAKS = {  # whether an earlier token's routing can depend on a later token, with experts that fill up
    'top_k': True,  # a later token's first choice comes before an earlier one's second
    'top_k, 3 choices, normalized': True,
    'top_k, surest first': True,
    'top_k, last first': True,
    'top_k, random order': True,
    'switch': False,
    'sigmoid': True,
    'noisy_top_k': True,
    'hash': True,
    'frozen': True,
    'hierarchical': True,
    'expert_choice': True,
}
ONE_CHOICE = {  # the same with a single choice, where the router can have one
    'top_k': False,
    'top_k, surest first': True,
    'top_k, last first': True,
    'top_k, random order': True,
    'switch': False,
    'sigmoid': False,
    'hash': False,
    'hierarchical': False,
    'expert_choice': True,
}
KEPT = 6  # tokens that stay as they are; those behind them change


def changed(name, seed, capacity, **changes):
  """Whether the routing of a kept token differs in any group when the later ones are replaced."""
  before, other = make_inputs(name, seed), make_inputs(name, seed + 1)
  mix = lambda a, b: None if a is None else np.concatenate([a[:, :KEPT], b[:, KEPT:]], axis=1)
  context = before[2]._replace(token_ids=mix(before[2].token_ids, other[2].token_ids),
                               more_logits=mix(before[2].more_logits, other[2].more_logits))
  after = (mix(before[0], other[0]), mix(before[1], other[1]), context)
  a, b = (route(name, capacity, inputs, **changes)[2][:, :KEPT] for inputs in (before, after))
  return (a != b).any()


@pytest.mark.parametrize('name, selected, leaks', (
    *((name, None, leaks) for name, leaks in LEAKS.items()), *((name, 1, leaks) for name, leaks in ONE_CHOICE.items())))
def test_who_sees_the_future(name, selected, leaks):
  changes = dict(num_selected_experts=selected) if selected else {}
  if selected and name == 'hierarchical':
    changes['num_selected_groups'] = 1
  found = [changed(name, seed, 2, **changes) for seed in range(0, 20, 2)]
  assert any(found) if leaks else not any(found)


@pytest.mark.parametrize('name', [name for name in VARIANTS if name != 'expert_choice'])
def test_nobody_sees_it_where_all_are_served(name):
  assert not any(changed(name, seed, TOKENS) for seed in range(0, 10, 2))


@pytest.mark.parametrize('changes, leaks', (
    (dict(), True), (dict(capacity_mode='none'), False), (dict(router='switch', num_selected_experts=1), False)), ids=str)
def test_logits_of_the_whole_model(changes, leaks):
  """The same of what a model computes in training: a row of 24 tokens in groups of 12, eight slots an expert."""
  config = ModelConfig(vocab_size=64, emb_dim=8, mlp_dim=8, num_heads=1, head_dim=4, num_layers=1, moe_interval=1,
                       num_experts=2, group_size=12, min_expert_capacity=1, train_capacity_factor=1.25, dtype='float32',
                       scan_blocks=False, attention_query_blocks=1, init_scale=1., **changes)
  tokens = np.random.RandomState(0).randint(1, 64, (30, 24)).astype(np.int32)
  tokens[1:, :18] = tokens[0, :18]
  params = jax.jit(init_params, static_argnums=0)(config, 0)
  apply = jax.jit(lambda row: OpenMoE(config).apply({'params': params}, {
      'decoder_input_tokens': row[None], 'decoder_target_tokens': row[None]}, True)[0, :17])
  logits = np.stack([apply(row) for row in tokens])
  spread = np.abs(logits - logits[0]).max()
  assert spread > 1e-3 if leaks else spread == 0
