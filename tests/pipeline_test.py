"""Stages of blocks on 8 fake devices against one device: loss, gradients, metrics, what is drawn, and what is refused."""

import functools

import jax
import numpy as np
import pytest

from openmoe_jax import partitioning, pipeline
from openmoe_jax.config import ConfigError, MeshConfig
from openmoe_jax.routers.state import init_state
from openmoe_jax.train_step import gradients, make_eval_step
from tests.mesh_test import make_batch, model, params_of


def four_blocks(**changes):
  return model(num_layers=4, moe_interval=1, attention_query_blocks=1, **changes)


@functools.partial(jax.jit, static_argnums=0)
def step_gradients(config, params, batch, key, router_state):
  return gradients(config, params, batch, key, router_state)


def run(config, microbatches, mesh=None):
  """Gradients and metrics of a step."""
  params = params_of(config)
  batch = {name: x.reshape(microbatches, -1, *x.shape[1:]) for name, x in make_batch().items()}
  key = jax.random.key(5) if config.dropout_rate or config.router_draws else None
  state = jax.tree.map(lambda x: np.random.RandomState(0).randn(*x.shape).astype(np.float32) / 10, init_state(config))
  if mesh is None:
    return jax.device_get(step_gradients(config, params, batch, key, state))
  params = jax.device_put(params, partitioning.tree_shardings(params, mesh))
  batch = jax.device_put(batch, partitioning.batch_sharding(mesh, microbatched=True))
  with jax.set_mesh(mesh):
    return jax.device_get(step_gradients(config, params, batch, key, state))


def make_mesh(**sizes):
  config = MeshConfig(**{'data': 1, **sizes})
  return partitioning.make_mesh(config, jax.devices()[:np.prod([config.data, config.expert, config.model, config.pipe])])


@pytest.mark.slow
@pytest.mark.parametrize('changes, microbatches, mesh', (
    ({}, 2, dict(pipe=2, expert=2)), (dict(dropout_rate=0.1, priority='random', router='sigmoid'), 4, dict(pipe=2)),
    (dict(remat='minimal'), 4, dict(pipe=2, data=2, model=2)), (dict(remat='full', moe_interval=2), 1, dict(pipe=2, expert=4)),
    pytest.param(dict(dispatch='einsum'), 2, dict(pipe=2, expert=2, model=2), marks=pytest.mark.exhaustive),
    (dict(dispatch='sort'), 2, dict(pipe=4, data=2)),
    pytest.param(dict(dispatch='dropless', capacity_mode='none'), 2, dict(pipe=2, data=2, expert=2),
                 marks=pytest.mark.exhaustive),
    (dict(router='expert_choice', allow_future_leak=True), 8, dict(pipe=4)),
    (dict(loss_normalization='sum', num_experts=0), 4, dict(pipe=4, model=2))), ids=str)
def test_equals_one_device(changes, microbatches, mesh):
  compare(changes, microbatches, mesh)


def compare(changes, microbatches, mesh):
  config = four_blocks(**changes) if 'moe_interval' not in changes else model(num_layers=4, **changes)
  want_grads, want = run(config, microbatches)
  grads, metrics = run(config, microbatches, make_mesh(**mesh))
  assert metrics.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(metrics[name], want[name], rtol=3e-6, atol=1e-6, err_msg=name)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
    # Three times what mesh_test allows one sparse layer: here they are four, and rounding of one reaches all below it.
    np.testing.assert_allclose(a, b, rtol=0, atol=3e-5 * np.abs(b).max())


def test_evaluation():
  """One microbatch, which passes through all stages alone."""
  config, batch = model(num_layers=2, moe_interval=1, attention_query_blocks=1), make_batch()
  params = params_of(config)
  want = make_eval_step(config)(params, batch)
  mesh = make_mesh(pipe=2)
  got = make_eval_step(config, mesh=mesh)(jax.device_put(params, partitioning.tree_shardings(params, mesh)),
                                          jax.device_put(batch, partitioning.batch_sharding(mesh)))
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=3e-6, atol=1e-6, err_msg=name)


def test_bubble():
  assert pipeline.bubble(1, 4) == 0
  assert pipeline.bubble(4, 1) == 3 / 4  # one of four stages computes at a time
  assert pipeline.bubble(4, 9) == 3 / 12


def test_a_stage_holds_its_own_blocks():
  params = params_of(four_blocks())
  where = partitioning.tree_shardings(params, make_mesh(pipe=4))
  kernel = params['decoder']['blocks']['layers_0']['mlp']['expert']['wi_0']['kernel']
  assert where['decoder']['blocks']['layers_0']['mlp']['expert']['wi_0']['kernel'].shard_shape(kernel.shape)[0] == 1


@pytest.mark.parametrize('changes, message', (
    (dict(scan_blocks=False), 'pipe = 4 splits stacked blocks: it needs ModelConfig.scan_blocks = True'),
    (dict(num_layers=6), 'pipe = 4 must divide the number of blocks of the model, 6 .*; 3 would fit'),
    (dict(vocab_size=50), 'vocab_size = 50 must be a multiple of MeshConfig model x pipe = 4')))
def test_what_does_not_fit(changes, message):
  shape = {'pipe': 4, 'data': 1, 'expert': 1, 'model': 1}
  with pytest.raises(ConfigError, match=message):
    partitioning.validate_mesh(model(**{'num_layers': 4, 'moe_interval': 1, **changes}), shape, 8)
