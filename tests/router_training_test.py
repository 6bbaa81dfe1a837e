"""Every router and block trains: the loss of a tiny model on one batch falls, and what is reported makes sense."""

import jax
import numpy as np
import optax
import pytest

from openmoe_jax import partitioning
from openmoe_jax.config import ROUTERS, ModelConfig
from openmoe_jax.names import flatten_names, t5x_shapes
from openmoe_jax.train_state import init_params, init_train_state
from openmoe_jax.train_step import make_train_step

pytestmark = pytest.mark.slow  # many programs are compiled, or processes started

ROWS, LENGTH, STEPS = 4, 8, 15
MODEL = ModelConfig(vocab_size=32, emb_dim=8, mlp_dim=8, num_heads=1, head_dim=4, num_layers=1, moe_interval=1,
                    num_experts=4, group_size=16, dtype='float32', scan_blocks=False, attention_query_blocks=1,
                    extra_mlp=False, init_scale=1., min_expert_capacity=2)
VARIANTS = {
    'top_k': dict(),
    'normalized': dict(normalize_gates=True, capacity_times_k=True),
    'random priority': dict(priority='random'),
    'switch': dict(router='switch', num_selected_experts=1, router_jitter=0.01),
    'sigmoid': dict(router='sigmoid', normalize_gates=True, aux_loss_factor=0., router_z_loss_factor=0.),
    'hash': dict(router='hash'),
    'frozen': dict(router='frozen', normalize_gates=True),
    'expert_choice': dict(router='expert_choice', allow_future_leak=True),
    'hierarchical': dict(router='hierarchical', num_selected_groups=1),
    'shared experts': dict(num_shared_experts=1),
    'parallel attention': dict(parallel_attention=True, extra_mlp=True),
    'noisy_top_k': dict(router='noisy_top_k', aux_loss_factor=0.1),
}


def test_which_routers_draw():
  drawing = {name for name, changes in VARIANTS.items() if MODEL.replace(**changes).router_draws}
  assert drawing == {'random priority', 'switch', 'noisy_top_k'}  # switch: by its jitter
  assert not MODEL.replace(num_experts=0, router_jitter=0.1).router_draws


def make_batch():
  target = np.random.RandomState(0).randint(1, MODEL.vocab_size, (ROWS, LENGTH)).astype(np.int32)
  return {'decoder_input_tokens': np.pad(target[:, :-1], ((0, 0), (1, 0))), 'decoder_target_tokens': target}


def test_every_router_is_tried():
  assert set(ROUTERS) == {MODEL.replace(**changes).router for changes in VARIANTS.values()}


@pytest.mark.parametrize('name', VARIANTS)
def test_loss_falls(name):
  config = MODEL.replace(**VARIANTS[name])
  optimizer = optax.adam(0.02)
  params = jax.jit(init_params, static_argnums=0)(config, 0)
  shapes = {name: x.shape for name, x in flatten_names(params).items()}
  assert shapes == t5x_shapes(config)
  partitioning.params_axes(params)  # every parameter has its logical axes
  state = init_train_state(config, optimizer, params)
  step = make_train_step(config, optimizer).lower(state, make_batch()).compile()
  history = []
  for _ in range(STEPS):
    state, metrics = step(state, make_batch())
    history.append(jax.device_get(metrics))
  losses = [m['cross_ent_loss'] for m in history]
  assert np.isfinite(losses).all() and losses[-1] < 0.75 * losses[0], losses
  for metrics in history:
    assert 0 <= metrics['fraction_tokens_left_behind'] <= 1 and 0 < metrics['expert_usage'] <= 1
    np.testing.assert_allclose(metrics['expert_load'].mean(), 1., rtol=1e-5)
  moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), params, state.params)
  assert all(jax.tree.leaves(moved)), moved  # every parameter learns, the router's included
