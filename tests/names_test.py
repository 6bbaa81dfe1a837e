"""Names and shapes: against the original's, and the way from flat to nested to stacked and back."""

import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from openmoe_jax import names, optimizers
from openmoe_jax.config import ConfigError, ModelConfig
from tests import golden

V = 256384
REAL = {
    'base': dict(vocab_size=V, emb_dim=768, mlp_dim=2048, num_heads=12, head_dim=64, num_layers=12, num_experts=16,
                 moe_interval=4),
    'large': dict(vocab_size=V, emb_dim=2048, mlp_dim=8192, num_heads=24, head_dim=128, num_layers=24, num_experts=32,
                  moe_interval=6),
    'xl': dict(vocab_size=V, emb_dim=3072, mlp_dim=12288, num_heads=24, head_dim=128, num_layers=32, num_experts=32,
               moe_interval=4),
}
SMALL = ModelConfig(vocab_size=24, emb_dim=8, mlp_dim=6, num_heads=2, head_dim=2, num_layers=6, moe_interval=3,
                    num_experts=4)
CONFIGS = {
    'sparse': SMALL,
    'dense': SMALL.replace(num_experts=0, moe_interval=1),
    'dense_blocks': SMALL.replace(num_experts=0),
    'all_sparse': SMALL.replace(moe_interval=1),
    'plain_swiglu': SMALL.replace(mlp_activations=('silu', 'linear')),
    'no_extra_mlp': SMALL.replace(extra_mlp=False),
    'parallel': SMALL.replace(parallel_moe=True),
}


def total(shapes):
  return sum(math.prod(shape) for shape in shapes.values())


def random_flat(config, seed=0):
  rng = np.random.default_rng(seed)
  return {name: rng.standard_normal(shape, np.float32) for name, shape in names.t5x_shapes(config).items()}


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('size,count', [('base', 799663104), ('large', 11855046656), ('xl', 46270737408)])
def test_names_and_shapes_are_the_originals(size, count):
  expected = golden.load_json('real_param_shapes.json')[size]['shapes']
  shapes = names.t5x_shapes(ModelConfig(**REAL[size]))
  assert shapes == {name: tuple(shape) for name, shape in expected.items()}
  assert total(shapes) == count


@pytest.mark.parametrize('size,count', [('base', 497634048), ('large', 3264841728)])
def test_dense_twins(size, count):
  shapes = names.t5x_shapes(ModelConfig(**{**REAL[size], 'num_experts': 0, 'moe_interval': 1}))
  assert total(shapes) == count
  assert not any('expert' in name or 'extra' in name for name in shapes)


def test_golden_model():
  config = ModelConfig(vocab_size=384, emb_dim=64, mlp_dim=80, num_heads=4, head_dim=16, num_layers=4, moe_interval=2,
                       num_experts=8)
  assert set(names.t5x_shapes(config)) == set(golden.load_json('factor_map.json'))
  params = golden.load_arrays('params.npz')
  assert names.t5x_shapes(config) == {name: array.shape for name, array in params.items()}
  for scan_blocks in (False, True):
    config = config.replace(scan_blocks=scan_blocks)
    assert_same(names.to_t5x_names(config, names.from_t5x_names(config, params)), params)


def test_plain_swiglu_shapes():
  shapes = names.t5x_shapes(SMALL.replace(mlp_activations=('silu', 'linear')))
  assert shapes['decoder/layers_0/mlp/wi_0/kernel'] == (8, 6)
  assert shapes['decoder/layers_2/mlp/expert/wi_0/kernel'] == (4, 8, 6)
  doubled = names.t5x_shapes(SMALL)
  assert doubled['decoder/layers_0/mlp/wi_0/kernel'] == (8, 12)
  assert doubled['decoder/layers_2/mlp/expert/wi_0/kernel'] == (4, 8, 12)
  assert {name: shape for name, shape in shapes.items() if 'wi_0' not in name} == {
      name: shape for name, shape in doubled.items() if 'wi_0' not in name}


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('scan_blocks', [False, True])
def test_the_model_has_these_parameters(name, scan_blocks):
  train_state = pytest.importorskip('openmoe_jax.train_state')
  config = CONFIGS[name].replace(scan_blocks=scan_blocks)
  params = jax.eval_shape(lambda: train_state.init_params(config, 0))
  shapes = {name: tuple(x.shape) for name, x in names.to_t5x_names(config, params).items()}
  assert shapes == names.t5x_shapes(config)


@pytest.mark.parametrize('name', CONFIGS)
def test_round_trips(name):
  config = CONFIGS[name]
  flat = random_flat(config)
  unrolled = names.from_t5x_names(config.replace(scan_blocks=False), flat)
  stacked = names.from_t5x_names(config.replace(scan_blocks=True), flat)
  assert set(stacked['decoder']) == {'blocks', 'decoder_norm', 'logits_dense'}
  assert set(stacked['decoder']['blocks']) == {f'layers_{j}' for j in range(config.moe_interval)}
  assert_same(names.stack_blocks(config, unrolled), stacked)
  assert_same(names.unstack_blocks(config, stacked), unrolled)
  assert_same(names.stack_blocks(config, stacked), stacked)  # what is stacked stays so
  assert_same(names.unstack_blocks(config, unrolled), unrolled)
  for tree in (stacked, unrolled):
    assert_same(names.to_t5x_names(config, tree), flat)


def test_which_layer_goes_where():
  flat = {name: np.full(shape, int(name.split('/')[1].rpartition('_')[2]) if '/layers_' in name else -1, np.float32)
          for name, shape in names.t5x_shapes(SMALL).items()}
  blocks = names.from_t5x_names(SMALL, flat)['decoder']['blocks']
  for j in range(SMALL.moe_interval):
    kernel = blocks[f'layers_{j}']['self_attention']['query']['kernel']
    assert kernel.shape == (2, 8, 4)
    assert [set(row.ravel()) for row in kernel] == [{j}, {3 + j}]
  assert blocks['layers_2']['mlp']['expert']['wo']['kernel'].shape == (2, 4, 6, 8)


def test_leaf_types_and_sources_are_kept():
  flat = random_flat(SMALL)
  stacked = names.from_t5x_names(SMALL, flat)
  assert isinstance(stacked['decoder']['blocks']['layers_0']['mlp']['wo']['kernel'], np.ndarray)
  before = jax.tree.map(np.copy, flat)
  names.unstack_blocks(SMALL, stacked)
  assert_same(flat, before)
  on_device = names.from_t5x_names(SMALL, jax.tree.map(jnp.asarray, flat))
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(on_device))
  assert_same(names.to_t5x_names(SMALL, on_device), flat)
  abstract = names.from_t5x_names(SMALL, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, flat)))
  assert jax.tree.map(lambda x: x.shape, abstract) == jax.tree.map(lambda x: x.shape, stacked)
  back = names.to_t5x_names(SMALL, abstract)
  assert {name: x.shape for name, x in back.items()} == names.t5x_shapes(SMALL)


def test_inside_jit():
  flat = jax.tree.map(jnp.asarray, random_flat(SMALL))
  unrolled = names.from_t5x_names(SMALL.replace(scan_blocks=False), flat)
  there_and_back = jax.jit(lambda tree: names.unstack_blocks(SMALL, names.stack_blocks(SMALL, tree)))
  assert_same(there_and_back(unrolled), unrolled)


@pytest.mark.parametrize('optimizer', [optimizers.adafactor(), optimizers.adamw(),
                                       optax.chain(optax.clip_by_global_norm(1.0), optimizers.adafactor()),
                                       optax.adamw(1e-3)])
def test_optimizer_states(optimizer):
  config = SMALL
  params = names.from_t5x_names(config.replace(scan_blocks=False), random_flat(config))
  state = optimizer.init(jax.tree.map(jnp.asarray, params))
  state = jax.tree.map(lambda x: np.random.default_rng(x.size).standard_normal(x.shape), state)
  stacked = names.stack_blocks(config, state)
  assert jax.tree.structure(stacked) == jax.tree.structure(
      optimizer.init(jax.tree.map(jnp.asarray, names.stack_blocks(config, params))))
  assert_same(names.unstack_blocks(config, stacked), state)


def test_whole_train_state():
  @flax.struct.dataclass
  class State:
    step: int
    params: dict
  params = names.from_t5x_names(SMALL, random_flat(SMALL))
  state = names.unstack_blocks(SMALL, State(3, params))
  assert state.step == 3 and 'layers_5' in state.params['decoder']
  assert_same(names.stack_blocks(SMALL, state).params, params)


def test_other_float_types_become_float32():
  flat = random_flat(SMALL)
  halves = {name: jnp.asarray(array, jnp.bfloat16) for name, array in flat.items()}
  params = names.from_t5x_names(SMALL, halves)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  flat['decoder/decoder_norm/scale'] = np.zeros(8, np.int32)
  with pytest.raises(ConfigError, match='decoder_norm/scale has dtype int32'):
    names.from_t5x_names(SMALL, flat)


def test_differences_are_listed():
  flat = random_flat(SMALL)
  flat['decoder/layers_6/mlp/wo/kernel'] = flat.pop('decoder/layers_5/mlp/router/router_weights/w/kernel')
  flat['decoder/decoder_norm/scale'] = np.zeros(9, np.float32)
  with pytest.raises(ConfigError) as error:
    names.from_t5x_names(SMALL, flat)
  lines = str(error.value).split('\n')
  assert '1 of 67 names missing (-), 1 unexpected (+), 1 with another shape (!)' in lines[0]
  assert lines[1:] == ['  - decoder/layers_5/mlp/router/router_weights/w/kernel (8, 4)',
                       '  + decoder/layers_6/mlp/wo/kernel (8, 4)',
                       '  ! decoder/decoder_norm/scale (9,) instead of (8,)']


def test_long_differences_are_cut():
  with pytest.raises(ConfigError) as error:
    names.from_t5x_names(SMALL, {})
  assert '67 of 67 names missing' in str(error.value) and '... and 59 more' in str(error.value)
  assert len(str(error.value).split('\n')) == 10


def test_wrong_trees_are_refused():
  params = names.from_t5x_names(SMALL.replace(scan_blocks=False), random_flat(SMALL))
  with pytest.raises(ConfigError, match=r'- layers_6 \(missing\)'):
    names.stack_blocks(SMALL.replace(num_layers=9), params)
  with pytest.raises(ConfigError, match='is moe_interval right'):
    names.stack_blocks(SMALL.replace(moe_interval=2), params)
  stacked = names.stack_blocks(SMALL, params)
  with pytest.raises(ConfigError, match='num_layers / moe_interval = 3'):
    names.unstack_blocks(SMALL.replace(num_layers=9), stacked)
  with pytest.raises(ConfigError, match='moe_interval = 6'):
    names.unstack_blocks(SMALL.replace(moe_interval=6), stacked)
  with pytest.raises(ConfigError, match=r'shape \(24, 8\) instead of \(25, 8\)'):
    names.to_t5x_names(SMALL.replace(vocab_size=25), stacked)
  del params['decoder']['layers_0']['mlp']['wo']
  with pytest.raises(ConfigError, match=r'- decoder/layers_0/mlp/wo/kernel \(missing\)'):
    names.to_t5x_names(SMALL, params)


@pytest.mark.parametrize('scan_blocks', [False, True])
def test_adafactor_state_in_t5x_layout(scan_blocks):
  config = ModelConfig(vocab_size=384, emb_dim=64, mlp_dim=80, num_heads=4, head_dim=16, num_layers=4, moe_interval=2,
                       num_experts=8, scan_blocks=scan_blocks)
  state = optimizers.adafactor().init(jax.tree.map(jnp.asarray, names.from_t5x_names(config, random_flat(config))))
  state = jax.tree.map(lambda x: np.random.default_rng(x.size).standard_normal(x.shape).astype(np.float32), state)
  step, flat = names.adafactor_to_t5x(config, *state)
  assert {name: list(array.shape) for name, array in flat.items()} == golden.load_json('adafactor_state_shapes.json')
  assert_same(optimizers.AdafactorState(*names.adafactor_from_t5x(config, step, flat)), state)

  used = {name: array for name, array in flat.items() if array.shape != (1,)}  # as golden/train_adafactor_step5.npz
  assert_same(names.adafactor_from_t5x(config, step, used)[1], state.stats)
  wrong = {**used, 'decoder/layers_1/mlp/expert/wo/kernel/v_row': np.zeros((8, 65), np.float32)}
  with pytest.raises(ConfigError, match=r'! decoder/layers_1/mlp/expert/wo/kernel \(8, 80, 64\)'):
    names.adafactor_from_t5x(config, step, wrong)
  with pytest.raises(ConfigError, match='belong to no parameter'):
    names.adafactor_from_t5x(config, step, {**used, 'decoder/layers_9/x/v': np.zeros(3, np.float32)})
  momentum = {**used, 'decoder/decoder_norm/scale/m': np.zeros(64, np.float32)}
  with pytest.raises(ConfigError, match='decoder_norm/scale'):
    names.adafactor_from_t5x(config, step, momentum)


def test_golden_adafactor_state():
  config = ModelConfig(vocab_size=384, emb_dim=64, mlp_dim=80, num_heads=4, head_dim=16, num_layers=4, moe_interval=2,
                       num_experts=8)
  arrays = golden.load_arrays('train_adafactor_step5.npz')
  step, stats = names.adafactor_from_t5x(config, np.int32(5), arrays)
  _, flat = names.adafactor_to_t5x(config, step, stats)
  assert_same({name: array for name, array in flat.items() if array.shape != (1,)}, arrays)
