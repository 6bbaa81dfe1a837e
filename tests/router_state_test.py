"""Arrays that routers keep: moved by the training step, saved and restored, and used by everything that runs a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from openmoe_jax import loading, resume
from openmoe_jax.checkpoints import Checkpointer
from openmoe_jax.config import CheckpointConfig, ConfigError, ModelConfig
from openmoe_jax.convert.orbax import OrbaxSource
from openmoe_jax.model import OpenMoE, variables
from openmoe_jax.names import from_t5x_names, stack_blocks
from openmoe_jax.optimizers import make_optimizer
from openmoe_jax.partitioning import make_mesh
from openmoe_jax.train import born_sharded
from openmoe_jax.train_state import init_train_state
from openmoe_jax.train_step import loss_and_metrics, make_eval_step, make_train_step
from tests import numpy_reference, tiny_run

ROWS, LENGTH = 4, 8
MODEL = ModelConfig(vocab_size=32, emb_dim=8, mlp_dim=8, num_heads=1, head_dim=4, num_layers=2, moe_interval=1,
                    num_experts=4, group_size=16, dtype='float32', scan_blocks=False, attention_query_blocks=1,
                    router='sigmoid', aux_loss_factor=0., bias_update_rate=0.05)


def make_batch(seed=0):
  target = np.random.RandomState(seed).randint(1, MODEL.vocab_size, (ROWS, LENGTH)).astype(np.int32)
  return {'decoder_input_tokens': np.pad(target[:, :-1], ((0, 0), (1, 0))), 'decoder_target_tokens': target}


def first_state(config):
  params = from_t5x_names(config, {n: jnp.asarray(x) for n, x in numpy_reference.random_params(config, 0).items()})
  return init_train_state(config, optax.sgd(0.1), params)


def compiled_step(config, state, **options):
  step = make_train_step(config, optax.sgd(0.1), **options)
  return step.lower(state, make_batch()).compile()


@pytest.fixture(scope='module')
def compiled():
  return compiled_step(MODEL, first_state(MODEL))


@pytest.fixture(scope='module')
def three_steps(compiled):
  """States (as numpy arrays) and metrics of three steps."""
  state, history = first_state(MODEL), []
  for i in range(3):
    state, metrics = compiled(state, make_batch(i))
    history.append(jax.device_get((state, metrics)))
  return history


def test_the_step_moves_biases_towards_equal_loads(three_steps):
  bias = np.zeros((2, 4), np.float32)
  for state, metrics in three_steps:
    bias = bias + np.float32(0.05) * np.sign(1 - metrics['expert_load'])
    np.testing.assert_allclose(state.router_state['bias'], bias, rtol=1e-6)
  assert (bias > 0).any() and (bias < 0).any()


@pytest.mark.slow
def test_biases_change_what_is_computed(three_steps):
  state = three_steps[-1][0]
  run = jax.jit(lambda v: OpenMoE(MODEL).apply(v, make_batch()))
  fresh, trained = run(variables(state.params, {'bias': np.zeros((2, 4), np.float32)})), run(state.variables)
  assert np.abs(fresh - trained).max() > 0.01
  evaluated = make_eval_step(MODEL).lower(state.variables, make_batch()).compile()(
      state.variables, make_batch())
  loss = jax.jit(lambda v: loss_and_metrics(MODEL, v, make_batch(), train=False)[0])(state.variables)
  np.testing.assert_allclose(evaluated['loss'] / evaluated['num_target_tokens'], loss, rtol=1e-5)


def test_scanned_blocks_get_their_own_biases(three_steps):
  state = three_steps[-1][0]
  scanned = MODEL.replace(scan_blocks=True)
  got = jax.jit(lambda p, s: OpenMoE(scanned).apply(variables(p, s), make_batch()))(
      stack_blocks(scanned, state.params), state.router_state)
  want = jax.jit(lambda v: OpenMoE(MODEL).apply(v, make_batch()))(state.variables)
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_microbatches_move_biases_once_by_their_common_load(three_steps):
  """The loads of a step do not depend on how it is cut where nothing is dropped: no dropping, equal weights."""
  config = MODEL.replace(capacity_mode='none')
  states = []
  for count in (1, 2):
    state = first_state(config)
    states.append(compiled_step(config, state, num_microbatches=count)(state, make_batch())[0].router_state['bias'])
  np.testing.assert_array_equal(*states)
  assert np.asarray(states[0]).any()


@pytest.mark.slow
def test_saved_restored_and_gone_on_with(compiled, three_steps, tmp_path):
  run = dataclasses.replace(tiny_run.tiny_run(tmp_path / 'run'), model=MODEL)
  optimizer = make_optimizer(run.optimizer, run.train.train_steps)
  mesh = make_mesh(run.mesh, jax.devices()[:1])
  template, _ = born_sharded(run, optimizer, mesh)
  state = init_train_state(MODEL, optimizer, three_steps[1][0].params).replace(
      step=jnp.int32(2), router_state=jax.tree.map(jnp.asarray, three_steps[1][0].router_state))
  checkpointer = Checkpointer(run)
  checkpointer.save(state, {0: b''}, wait=True)
  restored = checkpointer.restore(template).state
  checkpointer.close()
  np.testing.assert_array_equal(restored.router_state['bias'], state.router_state['bias'])

  back = first_state(MODEL).replace(params=restored.params, router_state=restored.router_state, step=jnp.int32(2))
  again = compiled(jax.tree.map(jnp.asarray, jax.device_get(back)), make_batch(2))[0]
  np.testing.assert_array_equal(again.router_state['bias'], three_steps[2][0].router_state['bias'])

  model = loading.load(run.model_dir)
  np.testing.assert_array_equal(model.router_state['bias'], state.router_state['bias'])
  np.testing.assert_allclose(jax.jit(lambda v: OpenMoE(MODEL).apply(v, make_batch()))(model.variables),
                             jax.jit(lambda v: OpenMoE(MODEL).apply(v, make_batch()))(state.variables), atol=1e-6)

  with pytest.raises(ConfigError, match='holds a router_state .*, which no conversion carries over'):
    OrbaxSource(run.model_dir)

  # Parameters alone, as a warm start, come with the state that belongs to them.
  warm = dataclasses.replace(run, model_dir=str(tmp_path / 'warm'),
                             checkpoint=CheckpointConfig(initial_checkpoint_path=run.model_dir))
  started, what = resume.warm_start(warm, template, lambda: template_of_zeros(template))
  np.testing.assert_array_equal(started.router_state['bias'], state.router_state['bias'])
  assert 'parameters and router state of' in what
  plain = dataclasses.replace(run, model=MODEL.replace(router='top_k'))
  plain_template, _ = born_sharded(plain, optimizer, mesh)
  assert resume.warm_start(dataclasses.replace(warm, model=plain.model), plain_template,
                           lambda: template_of_zeros(plain_template))[0].router_state == {}


def template_of_zeros(template):
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), template)


def test_a_checkpoint_of_another_router_is_no_damage(tmp_path):
  run = dataclasses.replace(tiny_run.tiny_run(tmp_path / 'run'), model=MODEL.replace(router='top_k'))
  optimizer = make_optimizer(run.optimizer, run.train.train_steps)
  checkpointer = Checkpointer(run)
  checkpointer.save(init_train_state(run.model, optimizer, first_state(run.model).params), {0: b''}, wait=True)
  checkpointer.close()
  changed = dataclasses.replace(run, model=MODEL)
  template, _ = born_sharded(changed, optimizer, make_mesh(run.mesh, jax.devices()[:1]))
  with pytest.raises(ConfigError, match="holds no router_state, which ModelConfig.router = 'sigmoid' needs"):
    Checkpointer(changed).restore(template)


@pytest.mark.parametrize('state, message', (
    (None, "router = 'sigmoid' needs the router state bias [2, 4], not of no arrays"),
    ({'bias': np.zeros((1, 4), np.float32)}, 'needs the router state bias [2, 4], not bias [1, 4]')))
def test_a_missing_or_foreign_state_is_one_line(state, message):
  params = first_state(MODEL).params
  with pytest.raises(ConfigError) as error:
    OpenMoE(MODEL).apply(variables(params, state), make_batch())
  assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.slow
def test_jitter_needs_a_key_and_draws_anew_in_every_step():
  config = MODEL.replace(router='top_k', router_jitter=0.3)
  params = first_state(config).params
  with pytest.raises(ConfigError, match='needs a random key in training'):
    OpenMoE(config).apply({'params': params}, make_batch(), True)
  loss = jax.jit(lambda key: loss_and_metrics(config, params, make_batch(), True, key)[1]['router_z_loss'])
  a, b, again = (float(loss(jax.random.key(seed))) for seed in (1, 2, 1))
  assert a != b and a == again
  jax.eval_shape(lambda: loss_and_metrics(config, params, make_batch(), train=False))  # no noise in evaluation
  step = compiled_step(config, first_state(config))
  losses = [float(step(first_state(config).replace(step=jnp.int32(s)), make_batch())[1]['router_z_loss'])
            for s in (0, 1, 0)]
  assert losses[0] != losses[1] and losses[0] == losses[2]
