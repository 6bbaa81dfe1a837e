"""Optimizers and schedules: the original's numbers, independence of layers and experts, sharding, memory traffic."""

import functools
import re

import hypothesis
from hypothesis import strategies as st
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from openmoe_jax import optimizers, partitioning
from openmoe_jax.config import ConfigError, OptimizerConfig
from openmoe_jax.schedules import learning_rate_schedule
from tests import golden

AXES = {  # of the parameters of most tests below
    'matrix': ('embed', 'mlp'),
    'tall': ('vocab', 'embed'),
    'scale': ('embed',),
    'router': ('embed', 'unmodeled'),
    'expert_wi': ('expert', 'mlp_embed', 'expert_mlp'),
    'expert_wo': ('expert', 'expert_mlp', 'mlp_embed'),
}
SHAPES = {'matrix': (128, 136), 'tall': (144, 128), 'scale': (24,), 'router': (128, 4), 'expert_wi': (3, 5, 8),
          'expert_wo': (3, 8, 5)}


def logical_axes(path, ndim):
  axes = AXES[path[-1]]
  return axes if ndim == len(axes) else ('layers',) + axes


def random_tree(seed, shapes=None, scale=1.0):
  rng = np.random.default_rng(seed)
  return {name: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)
          for name, shape in (shapes or SHAPES).items()}


ADAFACTOR = optimizers.adafactor(logical_axes=logical_axes)


@functools.lru_cache(maxsize=None)
def jitted_step(optimizer):
  def step(params, state, grads):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state
  return jax.jit(step)


def run(optimizer, params, gradients):
  """Parameters and state after the updates of a list of gradients."""
  state = optimizer.init(params)
  for grads in gradients:
    params, state = jitted_step(optimizer)(params, state, grads)
  return params, state


def reference(param, grads, batch, row, column, lr=0.01, eps1=1e-30, eps2=1e-3):
  """SPEC 4 word for word in float64 numpy; returns the parameter after each gradient."""
  p, result = np.asarray(param, np.float64), []
  inner = tuple(d for d in range(p.ndim) if d not in batch)
  rms = lambda x: np.sqrt(np.mean(x * x, inner, keepdims=True))
  vr = vc = v = 0.0
  for s, g in enumerate(grads):
    g = np.asarray(g, np.float64)
    beta2 = 1 - (s + 1.0) ** -0.8
    g2 = g * g + eps1
    if row is not None:
      vr = beta2 * vr + (1 - beta2) * np.mean(g2, column, keepdims=True)
      vc = beta2 * vc + (1 - beta2) * np.mean(g2, row, keepdims=True)
      y = g * (vr / np.mean(vr, row, keepdims=True)) ** -0.5 * vc ** -0.5
    else:
      v = beta2 * v + (1 - beta2) * g2
      y = g * v ** -0.5
    y = y / np.maximum(1.0, rms(y))
    p = p - lr * np.maximum(rms(p), eps2) * y
    result.append(p)
  return result


def assert_close(actual, expected, tolerance=1e-6):
  """Largest difference relative to the tensor's largest value."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape
  np.testing.assert_array_less(np.max(np.abs(actual - expected)), tolerance * np.max(np.abs(expected)) + 1e-30)


def trees_close(actual, expected, tolerance=1e-6):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(lambda a, b: assert_close(a, b, tolerance), actual, expected)


# The original's numbers.


@pytest.mark.parametrize('file', ['adafactor_unit_small.npz', 'adafactor_unit.npz'])
def test_golden_adafactor(file):
  arrays = golden.load_arrays(file)
  axes = golden.load_json('adafactor_unit_axes.json')
  params = {name.split('/')[1]: jnp.asarray(x) for name, x in arrays.items() if name.startswith('param0/')}
  rates = jnp.array([.01, .01, .01, .5])
  optimizer = optimizers.adafactor(lambda count: rates[count],
                                   logical_axes=lambda path, _: tuple(axes[path[-1]]['axes']))
  gradients = [{name: arrays[f'grad{s}/{name}'] for name in params} for s in range(4)]
  after, state = run(optimizer, params, gradients)
  assert state.count == 4 and state.count.dtype == jnp.int32
  for name in params:
    assert_close(after[name], arrays[f'param4/{name}'])
    expected = {slot: arrays[f'state4/{name}/{slot}'] for slot in ('v', 'v_row', 'v_col')
                if f'state4/{name}/{slot}' in arrays}
    assert set(state.stats[name]) == set(expected)
    for slot in expected:
      assert state.stats[name][slot].shape == expected[slot].shape
      np.testing.assert_allclose(state.stats[name][slot], expected[slot], rtol=1e-6)
  after, _ = run(optimizer, params, gradients[:1])
  for name in params:
    if f'param1/{name}' in arrays:
      assert_close(after[name], arrays[f'param1/{name}'])


def test_golden_factored_dimensions():
  """The original's map, made with no least size: every matrix outside router and norms is factored by its axes' names.

  Matrices outside the experts then fall back on the longer side being the column (SPEC 4), which agrees with the names
  only in part; what must agree is whether and, for experts, how they are factored.
  """
  shapes = golden.load_json('adafactor_state_shapes.json')
  for name, dims in golden.load_json('factor_map.json').items():
    dims = [dim.split('.')[1] for dim in dims]
    axes = partitioning.param_axes(tuple(name.split('/')), len(dims))
    roles = ['BATCH' if a == 'expert' else 'ROW' if a in optimizers._ROW else 'COLUMN' if a in optimizers._COLUMN
             else 'NONE' for a in axes]
    if 'NONE' in roles or len(roles) == 1:
      roles = ['NONE'] * len(roles)
    assert roles == dims, name
    how = optimizers.factoring(axes, (8, 64, 160)[3 - len(dims):], min_dim_size_to_factor=128)
    assert how.factored == ('BATCH' in dims) == (shapes[f'{name}/v'] == [1]), name
    if how.factored:
      assert how == (tuple(i for i, dim in enumerate(dims) if dim == 'BATCH'), dims.index('ROW'), dims.index('COLUMN'))


SCHEDULES = {
    'pretrain_rsqrt_10k': OptimizerConfig(),
    'finetune_constant_1e-3': OptimizerConfig(schedule='constant', learning_rate=1e-3),
    'default_t5x(constant*linear_warmup*rsqrt_decay,0.5,1000)': OptimizerConfig(
        schedule='constant * linear_warmup * rsqrt_decay', learning_rate=0.5, warmup_steps=1000),
}


def test_golden_schedules():
  table = golden.load_json('lr_schedule.json')
  assert set(table) == set(SCHEDULES)
  for name, rates in table.items():
    schedule = learning_rate_schedule(SCHEDULES[name], 500000)
    for step, rate in rates.items():
      for value in (schedule(int(step)), jax.jit(schedule)(jnp.int32(step))):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, rate, rtol=1e-6, err_msg=f'{name} {step}')


# Schedules.


def test_decays_reach_the_end_of_the_run():
  for factor in ('linear_decay', 'cosine_decay'):
    config = OptimizerConfig(schedule=f'constant*linear_warmup * {factor}', learning_rate=2., warmup_steps=100,
                             min_learning_rate=0.01)
    rate = learning_rate_schedule(config, 1100)
    np.testing.assert_allclose([rate(s) for s in (0, 50, 100, 600, 1100, 5000)], [.01, 1., 2., 1., .01, .01],
                               rtol=1e-6)
    config = OptimizerConfig(schedule=f'constant * {factor}', learning_rate=2., decay_steps=10)
    rate = learning_rate_schedule(config, 99)
    np.testing.assert_allclose([rate(s) for s in (0, 5, 10)], [2., 1., 1e-8], rtol=1e-5)
  rate = learning_rate_schedule(OptimizerConfig(schedule='constant * cosine_decay', learning_rate=1., decay_steps=4), 9)
  np.testing.assert_allclose(rate(1), 0.5 * (1 + np.sqrt(0.5)), rtol=1e-6)


def test_wrong_schedules_are_refused():
  with pytest.raises(ConfigError, match="unknown factors 'rsqrt'"):
    learning_rate_schedule(OptimizerConfig(schedule='constant * rsqrt'), 10)
  with pytest.raises(ConfigError, match='must be below TrainConfig.train_steps = 10'):
    learning_rate_schedule(OptimizerConfig(schedule='linear_warmup * cosine_decay', warmup_steps=10), 10)


@hypothesis.given(st.integers(0, 10**6), st.integers(0, 10**5), st.floats(1e-6, 10.), st.sets(st.sampled_from(
    ['constant', 'linear_warmup', 'linear_decay', 'rsqrt_decay', 'cosine_decay']), min_size=1))
@hypothesis.settings(max_examples=60)
def test_schedules_stay_between_floor_and_peak(step, warmup, rate, factors):
  config = OptimizerConfig(schedule=' * '.join(sorted(factors)), learning_rate=rate, warmup_steps=warmup)
  value = float(learning_rate_schedule(config, 2 * 10**5)(step))
  peak = (rate if 'constant' in factors else 1.0)
  assert 1e-8 * (1 - 1e-6) <= value <= max(peak, 1e-8) * (1 + 1e-6)


# Adafactor.


@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from(['matrix', 'tall', 'scale', 'router']), st.booleans(),
                  st.floats(-6, 2), st.floats(-4, 1))
@hypothesis.settings(max_examples=20)
def test_equals_the_specification(seed, name, stacked, grad_exponent, param_exponent):
  """Any scale of gradients and parameters; layers stacked or not."""
  shape = (3,) * stacked + SHAPES[name]
  how = optimizers.factoring(logical_axes((name,), len(shape)), shape)
  assert how.batch == ((0,) if stacked else ())
  params = random_tree(seed, {name: shape}, 10.0 ** param_exponent)
  gradients = [random_tree(seed + s, {name: shape}, 10.0 ** grad_exponent) for s in (1, 2, 3)]
  after, _ = run(ADAFACTOR, params, gradients)
  assert_close(after[name], reference(params[name], [g[name] for g in gradients], how.batch, how.row, how.column)[-1])


def test_rows_and_columns():
  factoring = optimizers.factoring
  assert factoring(('embed', 'mlp'), (128, 300)) == ((), 0, 1)
  assert factoring(('mlp', 'embed'), (300, 128)) == ((), 1, 0)
  assert factoring(('mlp', 'embed'), (128, 128)) == ((), 0, 1)  # equal sides: the first is the row, whatever its name
  assert factoring(('mlp', 'embed'), (128, 300)) == ((), 0, 1)  # so is the shorter
  assert factoring(('embed', 'mlp'), (127, 300)) == ((), None, None)
  assert factoring(('layers', 'mlp', 'embed'), (2, 300, 128)) == ((0,), 2, 1)
  assert factoring(('layers', 'embed'), (500, 500)) == ((0,), None, None)  # norm scales
  assert factoring(('expert', 'mlp_embed', 'expert_mlp'), (4, 2, 3)) == ((0,), 1, 2)
  assert factoring(('layers', 'expert', 'expert_mlp', 'mlp_embed'), (9, 4, 200, 900)) == ((0, 1), 3, 2)


def test_stacked_layers_equal_separate_ones():
  """Three layers with gradients of very different size: the same updates and statistics to rounding."""
  layers = [random_tree(i, scale=10.0 ** (i - 2)) for i in range(3)]
  gradients = [[random_tree(10 * i + s, scale=100.0 ** (1 - i)) for s in range(3)] for i in range(3)]
  stack = lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
  separate = [run(ADAFACTOR, params, grads) for params, grads in zip(layers, gradients)]
  params, state = run(ADAFACTOR, stack(*layers), [stack(*grads) for grads in zip(*gradients)])
  for i, (expected, expected_state) in enumerate(separate):
    trees_close(jax.tree.map(lambda x: x[i], params), expected)
    trees_close(jax.tree.map(lambda x: x[i], state.stats), expected_state.stats)


def test_stacked_experts():
  shapes = {name: (2,) + SHAPES[name] for name in ('expert_wi', 'expert_wo')}
  params, gradients = random_tree(0, shapes), [random_tree(s, shapes) for s in (1, 2)]
  after, state = run(ADAFACTOR, params, gradients)
  assert {slot: x.shape for slot, x in state.stats['expert_wo'].items()} == {'v_row': (2, 3, 5), 'v_col': (2, 3, 8)}
  for name, row, column in (('expert_wi', 2, 3), ('expert_wo', 3, 2)):
    assert_close(after[name], reference(params[name], [g[name] for g in gradients], (0, 1), row, column)[-1])


def test_experts_do_not_see_each_other():
  """Changing one expert's parameters and gradients leaves the others' bits alone."""
  shapes = {name: SHAPES[name] for name in ('expert_wi', 'expert_wo')}
  change = lambda tree: jax.tree.map(lambda x: x.at[1].multiply(-1e3), tree)
  params, gradients = random_tree(0, shapes), [random_tree(s, shapes) for s in (1, 2)]
  a, state_a = run(ADAFACTOR, params, gradients)
  b, state_b = run(ADAFACTOR, change(params), [change(g) for g in gradients])
  for before, after in zip(jax.tree.leaves((a, state_a.stats)), jax.tree.leaves((b, state_b.stats))):
    np.testing.assert_array_equal(before[0::2], after[0::2])
    assert not np.array_equal(before[1], after[1])


@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(SHAPES)), st.integers(-8, 8))
@hypothesis.settings(max_examples=20)
def test_scale_of_the_gradient_does_not_matter(seed, name, exponent):
  shapes = {name: SHAPES[name]}
  params, gradients = random_tree(seed, shapes), [random_tree(seed + s, shapes) for s in (1, 2)]
  plain, _ = run(ADAFACTOR, params, gradients)
  scaled, _ = run(ADAFACTOR, params, [jax.tree.map(lambda g: g * 10.0 ** exponent, grads) for grads in gradients])
  trees_close(plain, scaled, 2e-6)


@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(SHAPES)))
@hypothesis.settings(max_examples=10)
def test_an_update_is_no_larger_than_the_rate_times_the_parameter(seed, name):
  shape = SHAPES[name]
  params = random_tree(seed, {name: shape})
  grads = random_tree(seed + 1, {name: shape}, 1e3)
  after, _ = run(ADAFACTOR, params, [grads])
  updates = {name: after[name] - params[name]}
  inner = tuple(d for d in range(len(shape)) if AXES[name][d] != 'expert')
  rms = lambda x: jnp.sqrt(jnp.mean(x * x, inner))
  assert np.all(rms(updates[name]) <= 0.01 * jnp.maximum(rms(params[name]), 1e-3) * (1 + 1e-5))
  assert np.all(updates[name] * grads[name] <= 0)


def test_rows_without_gradient():
  """Unseen tokens and idle experts: zero gradients never make anything but zeros, however long, then all is normal."""
  params = random_tree(0)
  some = jax.tree.map(lambda g: g.at[:2].set(0.0), random_tree(1))
  after, _ = run(ADAFACTOR, params, [jax.tree.map(jnp.zeros_like, params)] * 3)
  jax.tree.map(np.testing.assert_array_equal, after, params)
  after, state = run(ADAFACTOR, params, [some] * 4 + [random_tree(2)])
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((after, state)))
  after, _ = run(ADAFACTOR, params, [some] * 2)
  for name in ('tall', 'expert_wi'):
    np.testing.assert_array_equal(after[name][:2], params[name][:2])
    assert np.all(after[name][2:] != params[name][2:])


def test_options():
  shapes = {name: SHAPES[name] for name in ('matrix', 'router', 'expert_wi')}
  params, grads = random_tree(0, shapes), random_tree(1, shapes, 5.0)
  def once(**options):
    optimizer = optimizers.adafactor(0.1, logical_axes=logical_axes, **options)
    _, state = optimizer.update(jax.tree.map(lambda g: 1e-3 * g, grads), optimizer.init(params), params)
    return optimizer.update(grads, state, params)  # larger than expected, so that it is clipped
  rms = lambda x: float(jnp.sqrt(jnp.mean(x * x)))
  updates, _ = once()
  absolute, _ = once(multiply_by_parameter_scale=False)
  for name in ('matrix', 'router'):
    np.testing.assert_allclose(absolute[name] * rms(params[name]), updates[name], rtol=1e-5)
  assert rms(once(clipping_threshold=0.5)[0]['matrix']) == pytest.approx(0.5 * rms(updates['matrix']), rel=1e-5)
  assert rms(once(clipping_threshold=0.0)[0]['matrix']) > 1.2 * rms(updates['matrix'])
  _, state = once(min_dim_size_to_factor=4)
  assert set(state.stats['router']) == {'v_row', 'v_col'}
  _, state = once(min_dim_size_to_factor=10**6)
  assert set(state.stats['matrix']) == {'v'} and set(state.stats['expert_wi']) == {'v_row', 'v_col'}


def test_bfloat16_gradients():
  params = random_tree(0)
  halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_tree(1))
  a, state = run(ADAFACTOR, params, [halves])
  b, _ = run(ADAFACTOR, params, [jax.tree.map(lambda x: x.astype(jnp.float32), halves)])
  trees_close(a, b)
  assert {x.dtype for x in jax.tree.leaves((a, state.stats))} == {jnp.dtype('float32')}


def test_scales_of_large_tensors_are_exact():
  """Sums over many elements in float32 must not lose the small ones."""
  params = {'matrix': jnp.full((2048, 8192), 0.1), 'router': jnp.full((128, 4), 0.1)}
  assert optimizers.global_norm(params) == pytest.approx(0.1 * np.sqrt(2048 * 8192 + 512), rel=1e-6)
  optimizer = optimizers.adafactor(1.0, logical_axes=logical_axes)
  after, _ = run(optimizer, params, [jax.tree.map(lambda x: 1e-3 * x, params)])
  np.testing.assert_allclose(after['matrix'], 0.0, atol=2e-7)  # p - 1 * rms(p) * 1


def test_no_memory_traffic_beyond_reading():
  """Compiled with the norms that training reports: nothing of the size of a gradient is written but the parameter."""
  params, grads = {'matrix': jnp.zeros((512, 1024))}, {'matrix': jnp.zeros((512, 1024))}

  def step(params, state, grads):
    updates, state = ADAFACTOR.update(grads, state, params)
    norms = optimizers.global_norm(grads), optimizers.global_norm(params)
    return optax.apply_updates(params, updates), state, norms

  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, ADAFACTOR.init(params), grads).compile()
  analysis = compiled.memory_analysis()
  assert analysis.temp_size_in_bytes < 0.1 * grads['matrix'].nbytes
  assert analysis.alias_size_in_bytes >= params['matrix'].nbytes
  entry = compiled.as_text().split('ENTRY')[1]
  reads = re.findall(r'= [^=]*fusion\([^)]*grads[^)]*\)', entry)
  assert len(reads) <= 4, reads  # two statistics, the clipping, the update


def test_donated_state_is_updated_in_place():
  params = random_tree(0)
  step = jax.jit(lambda p, s, g: ADAFACTOR.update(g, s, p), donate_argnums=1)
  state = ADAFACTOR.init(params)
  old = jax.tree.leaves(state)
  _, state = step(params, state, random_tree(1))
  assert all(x.is_deleted() for x in old)
  assert state.count == 1


# Shardings.


def is_axes(x):
  return type(x) is tuple and all(isinstance(name, str) for name in x)  # a state is a named tuple


def small_params():
  layer = {'self_attention': {'out': {'kernel': np.ones((2, 128, 128))}},
           'mlp': {'expert': {'wi_0': {'kernel': np.ones((2, 4, 8, 16))}, 'wo': {'kernel': np.ones((2, 4, 8, 8))}},
                   'router': {'router_weights': {'w': {'kernel': np.ones((2, 128, 4))}}}},
           'pre_mlp_layer_norm': {'scale': np.ones((2, 128))}}
  tree = {'token_embedder': {'embedding': np.ones((256, 128))},
          'decoder': {'blocks': {'layers_0': layer}, 'logits_dense': {'kernel': np.ones((128, 256))}}}
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), tree)


def test_state_axes_of_adafactor():
  params = jax.eval_shape(small_params)
  state = jax.eval_shape(optimizers.adafactor().init, params)
  axes = optimizers.state_axes(state, params)
  assert axes.count == ()
  layer = axes.stats['decoder']['blocks']['layers_0']
  assert axes.stats['token_embedder']['embedding'] == {'v_row': ('embed',), 'v_col': ('vocab',)}
  assert axes.stats['decoder']['logits_dense']['kernel'] == {'v_row': ('embed',), 'v_col': ('vocab',)}
  assert layer['self_attention']['out']['kernel'] == {'v_row': ('layers', 'joined_kv'), 'v_col': ('layers', 'embed')}
  assert layer['mlp']['expert']['wi_0']['kernel'] == {'v_row': ('layers', 'expert', 'expert_embed'),
                                                      'v_col': ('layers', 'expert', 'expert_mlp')}
  assert layer['mlp']['expert']['wo']['kernel'] == {'v_row': ('layers', 'expert', 'expert_embed'),
                                                    'v_col': ('layers', 'expert', 'expert_mlp')}
  assert layer['mlp']['router']['router_weights']['w']['kernel'] == {'v': ('layers', 'router_embed', 'unmodeled')}
  assert layer['pre_mlp_layer_norm']['scale'] == {'v': ('layers', 'norm')}


@pytest.mark.parametrize('optimizer', [optimizers.adamw(), optax.adamw(1e-3), optax.sgd(0.1, momentum=0.9),
                                       optax.chain(optax.clip_by_global_norm(1.0), optimizers.adafactor())])
def test_state_axes_follow_the_parameters(optimizer):
  params = jax.eval_shape(small_params)
  state = jax.eval_shape(optimizer.init, params)
  axes = jax.tree.leaves(optimizers.state_axes(state, params), is_leaf=is_axes)
  shapes = [x.shape for x in jax.tree.leaves(state)]
  assert [len(a) for a in axes] == [len(s) for s in shapes]
  experts = [a for a, s in zip(axes, shapes) if s == (2, 4, 8, 16)]
  assert set(experts) <= {('layers', 'expert', 'expert_embed', 'expert_mlp')}


def test_state_of_no_parameter_is_refused():
  params = jax.eval_shape(small_params)
  with pytest.raises(ConfigError, match=r'optimizer state mu/x with shape \(3,\) belongs to no parameter'):
    optimizers.state_axes({'mu': {'x': jax.ShapeDtypeStruct((3,), jnp.float32)}}, params)


@pytest.mark.parametrize('shape', [(2, 2, 2)] + [
    pytest.param(shape, marks=pytest.mark.slow) for shape in ((8, 1, 1), (2, 4, 1), (1, 4, 2))])
def test_sharded_equals_one_device(shape):
  if jax.device_count() < 8:
    pytest.skip('needs 8 devices')
  mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(1, *shape), partitioning.MESH_AXES, axis_types=(AxisType.Auto,) * 4)
  params = small_params()
  gradients = [jax.tree.map(lambda x, s=s: jnp.cos(x * s), params) for s in (3.0, 5.0)]
  optimizer = optimizers.adafactor()
  expected = run(optimizer, params, gradients)

  place = lambda axes: jax.tree.map(lambda a: NamedSharding(mesh, partitioning.mesh_axes(a)), axes, is_leaf=is_axes)
  shapes = jax.eval_shape(lambda: params)
  param_shardings = place(partitioning.params_axes(shapes))
  state_shardings = place(optimizers.state_axes(jax.eval_shape(optimizer.init, shapes), shapes))

  def step(params, state, grads):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state
  step = jax.jit(step, donate_argnums=(0, 1), in_shardings=(param_shardings, state_shardings, param_shardings),
                 out_shardings=(param_shardings, state_shardings))
  state = jax.jit(optimizer.init, out_shardings=state_shardings)(params)
  column = state.stats['decoder']['blocks']['layers_0']['mlp']['expert']['wi_0']['kernel']['v_col']
  assert column.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, 'expert', 'model')), 3)
  params = jax.device_put(params, param_shardings)
  for grads in gradients:
    params, state = step(params, state, jax.device_put(grads, param_shardings))
  trees_close(jax.device_get((params, state)), jax.device_get(expected))


# AdamW, clipping, construction.


def test_adamw_is_optax_adamw():
  params, gradients = random_tree(0), [random_tree(s) for s in (1, 2, 3)]
  rate = learning_rate_schedule(OptimizerConfig(learning_rate=0.1, warmup_steps=1), 10)
  ours = optimizers.adamw(rate, weight_decay=0.1, logical_axes=logical_axes)
  mask = {name: name != 'scale' for name in params}
  theirs = optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=mask)
  after, state = run(ours, params, gradients)
  trees_close(after, run(theirs, params, gradients)[0])
  assert state.count == 3


def test_norm_scales_of_stacked_layers_do_not_decay():
  params = {'scale': jnp.ones((3, 24)), 'matrix': jnp.ones((3, 128, 136))}
  optimizer = optimizers.adamw(1.0, weight_decay=0.5, logical_axes=logical_axes)
  after, _ = run(optimizer, params, [jax.tree.map(jnp.zeros_like, params)])
  assert np.all(after['scale'] == 1.0) and np.all(after['matrix'] == 0.5)


def test_global_norm():
  tree = random_tree(0)
  expected = np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree)))
  assert optimizers.global_norm(tree) == pytest.approx(expected, rel=1e-6)
  assert optimizers.global_norm(tree) == pytest.approx(float(optax.tree.norm(tree)), rel=1e-6)
  assert optimizers.global_norm({'a': jnp.float32(-3.0), 'b': jnp.array([4.0])}) == 5.0
  assert optimizers.global_norm({}) == 0.0


def test_clipping():
  params, grads = random_tree(0), random_tree(1)
  norm = float(optimizers.global_norm(grads))
  seen = optax.GradientTransformation(lambda p: optax.EmptyState(), lambda g, s, p=None: (g, s))
  clipped, _ = optimizers.clip_global_norm(seen, norm / 4).update(grads, optax.EmptyState(), params)
  trees_close(clipped, jax.tree.map(lambda g: g / 4, grads))
  same, _ = optimizers.clip_global_norm(seen, norm * 4).update(grads, optax.EmptyState(), params)
  jax.tree.map(np.testing.assert_array_equal, same, grads)
  zeros = jax.tree.map(jnp.zeros_like, grads)
  assert all(np.all(x == 0) for x in jax.tree.leaves(optimizers.clip_global_norm(seen, 1.0).update(zeros, (), None)[0]))


@pytest.mark.parametrize('name', ['adafactor', 'adamw'])
def test_make_optimizer(name):
  params, grads = random_tree(0), random_tree(1)
  config = OptimizerConfig(name=name, learning_rate=0.5, warmup_steps=4)
  expected = {'adafactor': optimizers.adafactor(0.25, logical_axes=logical_axes),
              'adamw': optimizers.adamw(0.25, logical_axes=logical_axes)}[name]
  optimizer = optimizers.make_optimizer(config, 10, logical_axes)
  trees_close(run(optimizer, params, [grads])[0], run(expected, params, [grads])[0])
  clipping = optimizers.make_optimizer(OptimizerConfig(name=name, max_grad_norm=0.1), 10, logical_axes)
  assert jax.tree.structure(clipping.init(params)) == jax.tree.structure(optimizer.init(params))


def test_adafactor_has_no_weight_decay():
  with pytest.raises(ConfigError, match='weight_decay = 0.1 has no effect'):
    optimizers.make_optimizer(OptimizerConfig(weight_decay=0.1), 10)


def test_parameters_are_needed():
  for optimizer in (optimizers.adafactor(logical_axes=logical_axes), optimizers.adamw(logical_axes=logical_axes)):
    with pytest.raises(ConfigError, match='needs the parameters'):
      optimizer.update(random_tree(0), optimizer.init(random_tree(0)))


def test_with_count():
  state = optax.chain(optimizers.adafactor(logical_axes=logical_axes)).init(random_tree(0))
  moved = optimizers.with_count(state, 500000)
  assert moved[0].count == 500000 and moved[0].count.dtype == jnp.int32
  trees_close(moved[0].stats, state[0].stats)
