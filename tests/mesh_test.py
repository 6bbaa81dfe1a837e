"""A mesh of devices changes nothing: loss, gradients, one update and initial values on 8 fake CPU devices against one.

Every shape data x expert x model of 8, 4 and 2 devices is tried; one of them is a quick test, three are slow ones.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from openmoe_jax import partitioning
from openmoe_jax.config import ConfigError, MeshConfig, ModelConfig
from openmoe_jax.names import from_t5x_names, to_t5x_names
from openmoe_jax.optimizers import adafactor, adamw
from openmoe_jax.train_state import init_params, init_train_state, state_shardings
from openmoe_jax.train_step import make_eval_step, make_train_step, split_microbatches
from tests import numpy_reference

ROWS, LENGTH = 8, 12
ADAFACTOR = adafactor(learning_rate=0.01, min_dim_size_to_factor=8)
ADAMW = adamw(learning_rate=0.01, epsilon=0.1)


def shapes_of(count):
  return [(d, e, count // d // e) for d in range(1, count + 1) if count % d == 0
          for e in range(1, count + 1) if (count // d) % e == 0]


QUICK = ((2, 2, 2),)
MORE = functools.partial(pytest.param, marks=pytest.mark.exhaustive)
SLOW = ((8, 1, 1), (1, 1, 8), (2, 2, 1))
ALL = tuple(shape for count in (8, 4, 2) for shape in shapes_of(count))


def model(**changes) -> ModelConfig:
  values = dict(vocab_size=48, emb_dim=8, mlp_dim=16, num_heads=8, head_dim=2, num_layers=2, moe_interval=2,
                num_experts=8, group_size=8, dtype='float32', scan_blocks=True, attention_query_blocks=2,
                loss_chunk_tokens=16)
  return ModelConfig(**{**values, **changes})


def make_mesh(shape):
  config = MeshConfig(data=shape[0], expert=shape[1], model=shape[2])
  return partitioning.make_mesh(config, jax.devices()[:shape[0] * shape[1] * shape[2]])


def make_batch(rows=ROWS, length=LENGTH):
  rng = np.random.RandomState(0)
  target = rng.randint(1, 48, (rows, length))
  for row in range(0, rows, 2):
    target[row, rng.randint(length // 2, length):] = 0
  tokens = np.concatenate([np.zeros((rows, 1), int), target[:, :-1]], axis=1)
  return {'decoder_input_tokens': tokens.astype(np.int32), 'decoder_target_tokens': target.astype(np.int32),
          'decoder_loss_weights': (target > 0).astype(np.int32)}


def params_of(config):
  return jax.tree.map(np.asarray, from_t5x_names(config, numpy_reference.random_params(config, 0)))


def keeping_gradients(optimizer) -> optax.GradientTransformation:
  """`optimizer` with a state (its own, the last gradients): one compiled step shows all there is to compare."""
  def update(grads, state, params):
    updates, inner = optimizer.update(grads, state[0], params)
    return updates, (inner, grads)
  init = lambda params: (optimizer.init(params), jax.tree.map(jnp.zeros_like, params))
  return optax.GradientTransformation(init, update)


def one_update(config, microbatches=1, mesh=None, mesh_config=MeshConfig(), optimizer=ADAFACTOR):
  """(gradients, metrics of the step, parameters after it), T5X names, as numpy."""
  optimizer = keeping_gradients(optimizer)
  params, batch = params_of(config), split_microbatches(make_batch(), microbatches)
  before = init_train_state(config, optimizer, jax.tree.map(jnp.asarray, params))
  if mesh is not None:
    where = state_shardings(before, mesh, mesh_config)
    before = jax.device_put(before, where)
    batch = jax.device_put(batch, partitioning.batch_sharding(mesh, microbatched=True))
  step = make_train_step(config, optimizer, microbatches, mesh=mesh, mesh_config=mesh_config)
  state, metrics = step.lower(before, batch).compile()(before, batch)
  assert int(state.step) == 1
  # Donated: the old parameters and statistics live on as the new ones.
  assert all(x.is_deleted() for x in jax.tree.leaves((before.params, before.opt_state[0])) if x.ndim)
  if mesh is not None:
    for new, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
      assert new.sharding.is_equivalent_to(sharding, new.ndim)  # it comes out as it went in
  named = lambda tree: to_t5x_names(config, jax.device_get(tree))
  return named(state.opt_state[1]), jax.device_get(metrics), named(state.params)


@functools.lru_cache(maxsize=None)
def one_device(config, microbatches=1, optimizer=ADAFACTOR):
  return one_update(config, microbatches, optimizer=optimizer)


def compare(config, shape, microbatches=1, mesh_config=MeshConfig(), optimizer=ADAFACTOR):
  want_grads, want_metrics, want_params = one_device(config, microbatches, optimizer)
  grads, metrics, params = one_update(config, microbatches, make_mesh(shape), mesh_config, optimizer)
  assert metrics.keys() == want_metrics.keys()
  for name, want in want_metrics.items():
    np.testing.assert_allclose(metrics[name], want, rtol=3e-6, atol=1e-6, err_msg=name)
  for name, want in want_grads.items():
    # As the golden gradients: sums of 90 tokens in another order, which cancel to a tenth of their terms in norms.
    np.testing.assert_allclose(grads[name], want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=name)
  for name, want in want_params.items():
    np.testing.assert_allclose(params[name], want, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize('shape', QUICK, ids=str)
def test_mesh_equals_one_device(shape):
  compare(model(), shape)


@pytest.mark.parametrize('shape', [pytest.param(shape, marks=pytest.mark.slow if shape in SLOW else pytest.mark.exhaustive)
                                   for shape in ALL], ids=str)
def test_every_mesh_equals_one_device(shape):
  compare(model(num_layers=1, moe_interval=1, scan_blocks=False, attention_query_blocks=1), shape)


@pytest.mark.slow
@pytest.mark.parametrize('changes, shape, microbatches', (
    (dict(dispatch='einsum'), (2, 4, 1), 1), MORE(dict(dispatch='sort'), (2, 2, 2), 1),
    MORE(dict(remat='minimal'), (2, 2, 2), 2),
    (dict(dispatch='dropless', capacity_mode='none', remat='full'), (2, 2, 2), 2),
    MORE(dict(scan_blocks=False, remat='minimal'), (2, 2, 2), 1),
    MORE({}, (2, 1, 2), 2), MORE(dict(num_experts=3, group_size=64), (8, 1, 1), 1),
    (dict(num_experts=6, group_size=7), (4, 2, 1), 1), MORE(dict(num_experts=0, moe_interval=1), (2, 2, 2), 1),
    MORE(dict(batch_prioritized=True, ignore_padding_tokens=True), (2, 2, 2), 1),
    MORE(dict(router='sigmoid', normalize_gates=True, num_shared_experts=1), (2, 2, 2), 1),
    (dict(router='expert_choice', allow_future_leak=True, parallel_attention=True), (2, 2, 2), 1),
    MORE(dict(priority='random', router_jitter=0.1), (2, 4, 1), 1)), ids=str)
def test_other_models_on_a_mesh(changes, shape, microbatches):
  """Among them groups whose number the mesh does not divide."""
  compare(model(**changes), shape, microbatches)


@pytest.mark.parametrize('changes, shape, fsdp', (
    pytest.param({}, (2, 2, 2), ('data', 'expert'), marks=pytest.mark.slow),
    MORE({}, (2, 4, 1), ('data',)), MORE({}, (4, 2, 1), ('expert',)),
    MORE(dict(scan_blocks=False, remat='full'), (8, 1, 1), ('data', 'expert')),
    MORE(dict(remat='dots'), (1, 4, 2), ('data', 'expert')),
    MORE(dict(dispatch='einsum', remat='minimal'), (2, 4, 1), ('data', 'expert')),
    pytest.param(dict(dispatch='dropless', capacity_mode='none'), (2, 2, 2), ('data', 'expert'), marks=pytest.mark.slow),
    MORE(dict(num_experts=0, moe_interval=1), (4, 1, 2), ('data',))), ids=str)
def test_split_parameters_equal_one_device(changes, shape, fsdp):
  compare(model(**changes), shape, mesh_config=MeshConfig(fsdp=fsdp))


@pytest.mark.slow
@pytest.mark.parametrize('mesh_config', (MORE(MeshConfig(shard_optimizer=('data', 'expert'))),
                                         MeshConfig(fsdp=('expert',), shard_optimizer=('data',))), ids=str)
def test_split_optimizer_equals_one_device(mesh_config):
  """Parameters whole or halved, Adam's moments in more pieces."""
  # Large epsilon: in the first step the update is the sign of the gradient, and zero gradients differ by rounding.
  compare(model(), (2, 2, 2), 2, mesh_config, ADAMW)


def test_loss_where_groups_do_not_divide():
  """3 groups of 32 tokens over 8 devices, in evaluation."""
  config = model(num_experts=3, group_size=64, scan_blocks=False)
  params, batch = params_of(config), make_batch()
  want = make_eval_step(config)(params, batch)
  mesh = make_mesh((8, 1, 1))
  sharded = jax.device_put(params, partitioning.tree_shardings(params, mesh))
  got = make_eval_step(config, mesh=mesh)(sharded, jax.device_put(batch, partitioning.batch_sharding(mesh)))
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=3e-6, atol=1e-6, err_msg=name)


def test_initial_values_are_the_same_everywhere():
  """Born sharded, and the same numbers: bits follow from the seed, the position and the parameter's name alone."""
  config = model()
  shapes = jax.eval_shape(lambda: init_params(config, 3))
  want = jax.device_get(jax.jit(lambda: init_params(config, 3))())
  shardings = partitioning.tree_shardings(shapes, make_mesh((2, 2, 2)))
  got = jax.jit(lambda: init_params(config, 3), out_shardings=shardings)()
  for x, sharding in zip(jax.tree.leaves(got), jax.tree.leaves(shardings), strict=True):
    assert x.sharding.is_equivalent_to(sharding, x.ndim)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), jax.device_get(got), want)


# Rules and messages.


def test_constrain_refuses_mistakes():
  x = jnp.zeros((4, 4))
  with pytest.raises(ConfigError, match="logical axis 'lenght' is not known"):
    partitioning.constrain(x, 'batch', 'lenght')
  with pytest.raises(ConfigError, match='put the mesh axis .*model.* on two dimensions'):
    partitioning.constrain(x, 'vocab', 'mlp')
  with pytest.raises(ConfigError, match='put the mesh axis .*expert.* on two dimensions'):
    partitioning.constrain(x, 'batch', 'expert')
  with pytest.raises(ConfigError, match='2 dimensions'):
    partitioning.constrain(x, 'batch')
  np.testing.assert_array_equal(partitioning.constrain(x, 'batch', None), x)


def test_rules_name_mesh_axes_only():
  for name, rule in partitioning.RULES.items():
    for axis in (rule.used,) if isinstance(rule.used, str) else rule.used or ():
      assert axis in partitioning.MESH_AXES, name
    assert set(rule.kept) <= set(partitioning.BATCH_AXES), name


def test_every_parameter_has_axes_that_exist():
  config = model()
  axes = partitioning.params_axes(jax.eval_shape(lambda: init_params(config, 0)))
  named = {'/'.join(partitioning.key_names(path)): names for path, names in
           jax.tree_util.tree_flatten_with_path(axes, is_leaf=partitioning.is_axes)[0]}
  specs = {name: partitioning.mesh_axes(names) for name, names in named.items()}
  assert specs['decoder/blocks/layers_1/mlp/expert/wi_0/kernel'] == PartitionSpec('pipe', 'expert', None, 'model')
  assert specs['decoder/blocks/layers_0/mlp/wo/kernel'] == PartitionSpec('pipe', 'model', None)
  assert specs['token_embedder/embedding'] == PartitionSpec(('model', 'pipe'), None)
  # The same where they are kept with fsdp: large arrays alone are split further, experts not twice over one axis.
  kept = {name: partitioning.mesh_axes(names, ('data', 'expert')) for name, names in named.items()}
  assert kept['decoder/blocks/layers_1/mlp/expert/wi_0/kernel'] == PartitionSpec('pipe', 'expert', 'data', 'model')
  assert kept['decoder/blocks/layers_0/mlp/wo/kernel'] == PartitionSpec('pipe', 'model', ('data', 'expert'))
  assert kept['decoder/blocks/layers_0/pre_mlp_layer_norm/scale'] == PartitionSpec('pipe', None)
  assert kept['decoder/blocks/layers_1/mlp/router/router_weights/w/kernel'] == PartitionSpec('pipe', None, None)
  assert partitioning.mesh_axes(named['token_embedder/embedding'], ('data',)) == PartitionSpec(('model', 'pipe'), 'data')
  with pytest.raises(ConfigError, match='decoder/new_thing has no logical axes'):
    partitioning.param_axes(('decoder', 'new_thing'), 2)
  with pytest.raises(ConfigError, match='has 3 dimensions'):
    partitioning.param_axes(('decoder', 'logits_dense', 'kernel'), 3)


@pytest.mark.parametrize('settings, count, message', (
    (dict(data=2, expert=2, model=4), 8, r'2 x 2 x 4 = 16 devices, but there are 8; data = 1 or -1 would fit'),
    (dict(data=-1, expert=3), 8, r'8: expert x model must divide 8; expert = 2 would'),
    (dict(expert=4, model=4), 8, r'expert x model must divide 8; expert = 2 or model = 2 would'),
    (dict(data=3), 8, r'3 x 1 x 1 = 3 devices, but there are 8; data = 8 or -1 would fit'),
    (dict(expert=16), 8, r'but there are 8: expert x model must divide 8')))
def test_meshes_that_do_not_fit(settings, count, message):
  with pytest.raises(ConfigError, match=message):
    partitioning.make_mesh(MeshConfig(**settings), jax.devices()[:count])


def test_mesh_takes_the_remaining_devices():
  mesh = partitioning.make_mesh(MeshConfig(expert=2, model=2), jax.devices()[:8])
  assert dict(mesh.shape) == {'pipe': 1, 'data': 2, 'expert': 2, 'model': 2}


def test_platform_that_is_not_there():
  missing = 'tpu' if jax.default_backend() != 'tpu' else 'gpu'
  with pytest.raises(ConfigError, match=f"MeshConfig.platform = '{missing}' was asked for, but JAX finds only"):
    partitioning.make_mesh(MeshConfig(platform=missing))


@pytest.mark.parametrize('changes, mesh, rows, message', (
    (dict(num_heads=3, head_dim=2), dict(model=4), 8,
     r'num_heads \* head_dim = 6 must be a multiple of MeshConfig.model = 4; 3 would fit'),
    (dict(mlp_dim=18), dict(model=4), 8, 'mlp_dim = 18 must be a multiple of MeshConfig.model = 4'),
    (dict(vocab_size=50), dict(model=4), 8, 'vocab_size = 50 must be a multiple of MeshConfig.model = 4'),
    (dict(num_experts=6), dict(expert=4), 8, 'num_experts = 6 must be a multiple of MeshConfig.expert = 4; 3 would fit'),
    ({}, dict(data=2, expert=4), 12, '12 rows of a microbatch must be a multiple of MeshConfig data x expert = 8')))
def test_models_that_do_not_fit_a_mesh(changes, mesh, rows, message):
  shape = {'pipe': 1, 'data': 1, 'expert': 1, 'model': 1, **mesh}
  with pytest.raises(ConfigError, match=message):
    partitioning.validate_mesh(model(**changes), shape, rows)
  partitioning.validate_mesh(model(), {'pipe': 1, 'data': 1, 'expert': 1, 'model': 1}, 3)


def test_splits_that_do_not_divide_the_width():
  with pytest.raises(ConfigError, match=r"fsdp or shard_optimizer = \('data', 'expert'\) splits ModelConfig.emb_dim = 8 into 16 "
                     r"parts, which do not divide it; \(\) or \('data',\) or \('expert',\) would fit"):
    partitioning.validate_mesh(model(), {'pipe': 1, 'data': 4, 'expert': 4, 'model': 1}, 16, ('data', 'expert'))
  with pytest.raises(ConfigError, match=r"MeshConfig.fsdp = \('model',\) must be one of"):
    MeshConfig(fsdp=('model',))
  assert MeshConfig(fsdp=['expert', 'data']) == MeshConfig(fsdp=('data', 'expert'))
  assert MeshConfig(fsdp='expert', shard_optimizer=('data',)).optimizer_fsdp == ('data', 'expert')
