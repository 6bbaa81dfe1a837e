"""The model beyond parity: equal variants, gradients, precision, initial values, dropout, padding, odd input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax.config import ConfigError, ModelConfig
from openmoe_jax.layers import Dropout, linear
from openmoe_jax.model import OpenMoE
from openmoe_jax.names import from_t5x_names, to_t5x_names
from openmoe_jax.train_state import init_params
from openmoe_jax.train_step import gradients, loss_and_metrics, split_microbatches, target_weights
from tests import golden, numpy_reference


def model(**changes) -> ModelConfig:
  values = dict(vocab_size=48, emb_dim=8, mlp_dim=10, num_heads=2, head_dim=4, num_layers=2, moe_interval=2,
                num_experts=4, group_size=16, dtype='float32', scan_blocks=False, attention_query_blocks=2,
                loss_chunk_tokens=16)
  return ModelConfig(**{**values, **changes})


def make_batch(seed=0, rows=3, length=12, vocab_size=48):
  rng = np.random.RandomState(seed)
  target = rng.randint(1, vocab_size, (rows, length))
  for row in range(1, rows):
    target[row, rng.randint(length // 2, length):] = 0
  tokens = np.concatenate([np.zeros((rows, 1), int), target[:, :-1]], axis=1)
  return {'decoder_input_tokens': tokens.astype(np.int32), 'decoder_target_tokens': target.astype(np.int32),
          'decoder_loss_weights': (target > 0).astype(np.int32)}


@functools.partial(jax.jit, static_argnames=('config', 'train'))
def loss_and_gradients(config, params, batch, train=True, key=None):
  (loss, metrics), grads = jax.value_and_grad(
      lambda p: loss_and_metrics(config, p, batch, train, key), has_aux=True)(params)
  return loss, metrics, grads


@functools.partial(jax.jit, static_argnames=('config', 'train'))
def apply(config, params, batch, train=False, key=None):
  return OpenMoE(config).apply({'params': params}, batch, train, rngs={} if key is None else {'dropout': key})


@functools.lru_cache(maxsize=None)
def flat_params(config, seed=0):
  return numpy_reference.random_params(config, seed)


def params_of(config):
  return from_t5x_names(config, flat_params(config.replace(scan_blocks=False, remat='none', dropout_rate=0.)))


@functools.lru_cache(maxsize=None)
def plain_run(config=model(moe_interval=1)):
  """Loss, metrics and gradients (T5X names) of an unrolled model without remat."""
  loss, metrics, grads = loss_and_gradients(config, params_of(config), make_batch())
  return loss, metrics, to_t5x_names(config, grads)


def assert_gradients_equal(got, want, rounding=2e-6):
  assert got.keys() == want.keys()
  for name in want:
    scale = max(float(jnp.abs(want[name]).max()), 1e-6)
    np.testing.assert_allclose(got[name], want[name], rtol=0, atol=rounding * scale, err_msg=name)


# Variants that must not change a number.


def check_variant(config, key=None):
  """Loss, metrics and gradients equal those of the same model unrolled and without remat."""
  loss, metrics, grads = loss_and_gradients(config, params_of(config), make_batch(), key=key)
  plain = config.replace(remat='none', scan_blocks=config.scan_blocks and key is not None)
  if key is None:
    want_loss, want_metrics, want_grads = plain_run(plain)
  else:  # scanned and unrolled blocks split their keys differently
    want_loss, want_metrics, want_grads = loss_and_gradients(plain, params_of(plain), make_batch(), key=key)
    want_grads = to_t5x_names(plain, want_grads)
  np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
  assert metrics.keys() == want_metrics.keys()
  for name in metrics:
    np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=2e-6, atol=1e-7, err_msg=name)
  assert_gradients_equal(to_t5x_names(config, grads), want_grads)


@pytest.mark.slow
@pytest.mark.parametrize('changes', (dict(scan_blocks=True), dict(scan_blocks=True, remat='minimal')), ids=str)
def test_scan_and_remat_change_nothing(changes):
  check_variant(model(moe_interval=1, **changes))


@pytest.mark.slow
@pytest.mark.parametrize('scan', (pytest.param(False, marks=pytest.mark.exhaustive), True), ids=('unrolled', 'scanned'))
@pytest.mark.parametrize('remat', ('none', 'dots', 'minimal', 'full'))
def test_every_remat_policy(scan, remat):
  check_variant(model(num_layers=4, scan_blocks=scan, remat=remat))


@pytest.mark.slow
@pytest.mark.parametrize('scan', (False, True), ids=('unrolled', 'scanned'))
@pytest.mark.parametrize('remat', ('minimal', 'full'))
def test_remat_drops_the_same_again(scan, remat):
  check_variant(model(scan_blocks=scan, remat=remat, dropout_rate=0.2), jax.random.key(3))


def test_unknown_remat_is_refused():
  with pytest.raises(ConfigError, match='remat'):
    model(remat='some')


# Gradients.


def test_gradients_by_finite_differences():
  """Every tensor of the tiny model, along its own gradient.

  The loss is about 5 and known to 2^-21; with a step that changes it by 0.004 between its ends, the difference of two
  values is good to 3e-4 of itself, and its curvature cancels in central differences. Routing is constant on the way
  (this batch was chosen for it), or the loss would jump; that is checked.
  """
  config = model(capacity_mode='none')
  batch, params = make_batch(4), params_of(config)

  @jax.jit
  def value(params):
    _, _, record = OpenMoE(config, record_routing=True).apply({'params': params}, batch, True, method='features')
    return loss_and_metrics(config, params, batch, True)[0], record.assignment.expert_index

  _, _, grads = loss_and_gradients(config, params, batch)
  _, routing = value(params)
  leaves, tree = jax.tree_util.tree_flatten(params)
  slopes = jax.tree.leaves(grads)
  names = ['/'.join(str(k.key) for k in path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
  tried = 0
  for i, (name, leaf, grad) in enumerate(zip(names, leaves, slopes)):
    norm = float(jnp.linalg.norm(grad))
    step = 0.002 / norm
    ends = []
    for sign in (step, -step):
      loss, expert = value(tree.unflatten(leaves[:i] + [leaf + sign * grad / norm] + leaves[i + 1:]))
      np.testing.assert_array_equal(expert, routing, err_msg=name)
      ends.append(float(loss))
    assert abs((ends[0] - ends[1]) / (2 * step) - norm) < 2e-3 * norm, name
    tried += 1
  assert tried == len(numpy_reference.shapes(config))


@functools.partial(jax.jit, static_argnames='function')
def value_and_products(function, x, kernel, out):
  """function(x, kernel), d x and d kernel, pulled back from `out`."""
  y, pull = jax.vjp(function, x, kernel)
  return y, *pull(out)


@pytest.mark.parametrize('dtype', (jnp.float32, jnp.bfloat16), ids=('float32', 'bfloat16'))
@pytest.mark.parametrize('lead', ((7,), (2, 5), ()), ids=str)
@pytest.mark.parametrize('width, features', ((3, 24), (24, 3), (8, 8), (1, 5), (5, 1)))
def test_linear(width, features, lead, dtype):
  """The kernel's gradient is written out in both orders; it is that of `x @ kernel`, in the dtype of what goes in."""
  rng = np.random.RandomState(0)
  x, kernel, out = (jnp.asarray(rng.randn(*shape), dtype)
                    for shape in ((*lead, width), (width, features), (*lead, features)))
  got = value_and_products(linear, x, kernel, out)
  want = value_and_products(jnp.matmul, x, kernel, out)
  rounding = 1e-6 if dtype == jnp.float32 else 2**-7
  for name, a, b in zip(('value', 'dx', 'dkernel'), got, want, strict=True):
    assert a.dtype == b.dtype == dtype and a.shape == b.shape, name
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=0, atol=rounding * np.abs(b).max(), err_msg=name)


def products(jaxpr):
  """Every dot_general of a program, inner programs included."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      yield eqn
    for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, 'eqns')):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        yield from products(inner)


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
def test_router_logits_are_not_rounded(dtype):
  """An accelerator's default precision would flip decisions: the router's product and its gradients say 'highest'."""
  config = model(num_layers=1, moe_interval=1, num_experts=5, dtype=dtype)  # no other kernel is 8 x 5
  batch, params = make_batch(), params_of(config)
  program = jax.make_jaxpr(jax.grad(lambda p: loss_and_metrics(config, p, batch)[0]))(params)
  router = [eqn for eqn in products(program.jaxpr)
            if any(sorted(v.aval.shape) == [5, 8] for v in (*eqn.invars, *eqn.outvars))]
  assert len(router) == 3
  for eqn in router:
    assert eqn.params['precision'] == (jax.lax.Precision.HIGHEST,) * 2
    assert all(v.aval.dtype == jnp.float32 for v in (*eqn.invars, *eqn.outvars))


# Initial values (SPEC 5).


@functools.lru_cache(maxsize=None)
def initial(scan):
  config = ModelConfig(vocab_size=384, emb_dim=64, mlp_dim=80, num_heads=4, head_dim=16, num_layers=4, moe_interval=2,
                       num_experts=8, group_size=32, dtype='float32', scan_blocks=scan)
  params = jax.jit(init_params, static_argnums=0)(config, 0)
  return {name: np.asarray(x, np.float64) for name, x in to_t5x_names(config, params).items()}


TRUNCATED = ('/mlp/wi_0', '/mlp/wi_1', '/mlp/wo', 'extra_mlp', 'logits_dense')
_CUT = 0.87962566103423978  # standard deviation of a unit normal cut at two


def expected_std(name, shape):
  if name == 'token_embedder/embedding':
    return 1.
  if 'router' in name:
    return 0.02
  std = np.sqrt(0.1 / shape[-2])
  return std / np.sqrt(16) if 'query' in name else std


SCAN = pytest.mark.parametrize('scan', (pytest.param(False, marks=pytest.mark.slow), True), ids=('unrolled', 'scanned'))


@SCAN
def test_initial_distributions(scan):
  """Against the formulas of SPEC 5 and the original's measured figures; a sampled std of n values is known to
  1/sqrt(2n) of itself, and the difference of two such to 1/sqrt(n); five times that are allowed."""
  want = golden.load_json('init_stats.json')
  got = initial(scan)
  assert got.keys() == want.keys()
  for name, x in got.items():
    assert list(x.shape) == want[name]['shape']
    if name.endswith('scale'):
      np.testing.assert_array_equal(x, 1.)
      continue
    std = expected_std(name, x.shape)
    assert abs(x.std() / std - 1) < 5 / np.sqrt(2 * x.size), name
    assert abs(x.std() / want[name]['std'] - 1) < 5 / np.sqrt(x.size), name
    assert abs(x.mean()) < 5 * std / np.sqrt(x.size), name
    largest = np.abs(x).max() / std
    if any(part in name for part in TRUNCATED):
      assert 1.9 / _CUT < largest <= 2 / _CUT + 1e-6, name
      assert max(abs(want[name]['min']), want[name]['max']) / std <= 2 / _CUT + 1e-6
    else:
      assert 2.5 < largest < 6, name


@SCAN
def test_experts_and_layers_start_independent(scan):
  params = initial(scan)
  for name, x in params.items():
    if '/expert/' not in name:
      continue
    rows = x.reshape(x.shape[0], -1)
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 5 / np.sqrt(rows.shape[1]), name
    std = rows.std(axis=1) / expected_std(name, x.shape)
    assert np.abs(std - 1).max() < 5 / np.sqrt(2 * rows.shape[1]), name  # every expert by itself
  same = ('decoder/layers_{}/mlp/expert/wi_0/kernel', 'decoder/layers_{}/extra_mlp/wo/kernel')
  pairs = [(pattern.format(1), pattern.format(3)) for pattern in same]
  pairs += [('decoder/layers_0/self_attention/key/kernel', f'decoder/layers_{i}/self_attention/{n}/kernel')
            for i in range(4) for n in ('key', 'value') if (i, n) != (0, 'key')]
  for a, b in pairs:
    a, b = params[a].ravel(), params[b].ravel()
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(a.size)


def test_initial_values_follow_seed_and_scale():
  config = model(num_layers=1, moe_interval=1)
  init = jax.jit(init_params, static_argnums=0)
  one, again, other = init(config, 1), init(config, 1), init(config, 2)
  jax.tree.map(np.testing.assert_array_equal, one, again)
  kernel = lambda p: np.asarray(p['decoder']['layers_0']['extra_mlp']['wi_0']['kernel'])
  assert np.abs(kernel(one) - kernel(other)).max() > 0.01
  scaled = init(config.replace(init_scale=1.), 1)
  np.testing.assert_allclose(kernel(scaled), kernel(one) * np.sqrt(10), rtol=1e-5)
  router = lambda p: np.asarray(p['decoder']['layers_0']['mlp']['router']['router_weights']['w']['kernel'])
  np.testing.assert_array_equal(router(scaled), router(one))


# Inputs.


def test_ids_outside_the_vocabulary_are_zero_rows():
  """One-hot look-up of the original: no clamping, no counting from the end (SPEC 1.1)."""
  config = model()
  batch = make_batch()
  batch['decoder_input_tokens'][0, 3:6] = (48, 10**6, -1)
  want, _ = numpy_reference.forward(config, flat_params(config), batch, False)
  np.testing.assert_allclose(apply(config, params_of(config), batch), want, rtol=0, atol=2e-5)


def test_neighbours_and_padding_do_not_matter_without_capacity():
  """capacity_mode 'none': a row's logits depend on nothing but the row, and not on what lies behind its end."""
  config = model(capacity_mode='none')
  params, batch = params_of(config), make_batch()
  logits = apply(config, params, batch)
  other = {name: x.copy() for name, x in batch.items()}
  replaced = make_batch(7)
  for name in batch:
    other[name][1:] = replaced[name][1:]
  np.testing.assert_allclose(apply(config, params, other)[0], logits[0], rtol=0, atol=2e-5)

  behind = {name: x.copy() for name, x in batch.items()}
  target = batch['decoder_target_tokens']
  for row in range(1, 3):
    end = int((target[row] > 0).sum())
    assert end + 2 < 12
    behind['decoder_input_tokens'][row, end + 1:] = 5
    np.testing.assert_allclose(apply(config, params, behind)[row, :end], logits[row, :end], rtol=0, atol=2e-5)
  # With a capacity, neighbours do matter: this is what the mode is for.
  tight = config.replace(capacity_mode='colossalai', eval_capacity_factor=0.5)  # one group
  other['decoder_input_tokens'][2], other['decoder_target_tokens'][2] = (
      batch['decoder_input_tokens'][2], batch['decoder_target_tokens'][2])
  changed = apply(tight, params, other)[2] - apply(tight, params, batch)[2]
  assert np.abs(changed).max() > 1e-2


def test_missing_features_are_named():
  config = model(inputs_bidirectional_attention=True)
  batch = make_batch()
  with pytest.raises(ConfigError, match='lacks decoder_causal_attention; it has decoder_input_tokens'):
    OpenMoE(config).apply({'params': {}}, batch)
  del batch['decoder_target_tokens']
  with pytest.raises(ConfigError, match='lacks decoder_target_tokens'):
    OpenMoE(model()).apply({'params': {}}, batch)


def test_weights_default_to_targets_that_are_not_padding():
  batch = make_batch()
  weights = batch.pop('decoder_loss_weights')
  np.testing.assert_array_equal(target_weights(batch), weights)
  np.testing.assert_array_equal(target_weights({**batch, 'decoder_loss_weights': 0.5 * weights}), 0.5 * weights)


def test_loss_is_its_parts():
  """SPEC 3: with unscaled auxiliary losses (SPEC 15)."""
  config = model(moe_interval=1)
  loss, m, _ = plain_run(config)
  parts = (m['cross_ent_loss'] + m['z_loss'] + config.aux_loss_factor * m['auxiliary_loss'] +
           config.router_z_loss_factor * m['router_z_loss'])
  np.testing.assert_allclose(loss, parts, rtol=1e-6)
  np.testing.assert_array_equal(m['loss'], loss)
  for name in ('auxiliary_loss', 'expert_usage', 'fraction_tokens_left_behind'):
    assert m[f'{name}_per_layer'].shape == (2,)
    np.testing.assert_allclose(m[name], np.mean(m[f'{name}_per_layer']), rtol=1e-6)
  assert m['expert_load'].shape == (2, 4)
  np.testing.assert_allclose(np.mean(m['expert_load'], axis=1), 1., rtol=1e-6)


def test_sum_normalization_of_the_dense_twins():
  """SPEC 13: loss and gradient are sums over tokens; metrics stay means."""
  mean = model(num_layers=1, num_experts=0, moe_interval=1)
  total = mean.replace(loss_normalization='sum')
  params, batch = params_of(mean), make_batch(rows=4)
  count = batch['decoder_loss_weights'].sum()
  loss, metrics, grads = loss_and_gradients(mean, params, batch)
  sum_loss, sum_metrics, sum_grads = loss_and_gradients(total, params, batch)
  np.testing.assert_allclose(sum_loss, loss * count, rtol=1e-6)
  np.testing.assert_allclose(sum_metrics['cross_ent_loss'], metrics['cross_ent_loss'], rtol=1e-6)
  flat = lambda tree: to_t5x_names(mean, tree)
  assert_gradients_equal(flat(sum_grads), {name: g * count for name, g in flat(grads).items()})


@pytest.mark.slow
@pytest.mark.parametrize('normalization', ('sum', 'target_tokens'))
def test_microbatches_of_a_dense_model_change_nothing(normalization):
  config = model(num_layers=1, num_experts=0, moe_interval=1, loss_normalization=normalization)
  params, batch = params_of(config), make_batch(rows=4)
  _, _, want = loss_and_gradients(config, params, batch)
  split = jax.jit(lambda p: gradients(config, p, split_microbatches(batch, 2))[0])(params)
  assert_gradients_equal(to_t5x_names(config, split), to_t5x_names(config, want), 5e-6)


def test_batch_without_weight_gives_finite_numbers():
  config, batch = model(moe_interval=1), make_batch()
  batch['decoder_loss_weights'][:] = 0
  loss, metrics, grads = loss_and_gradients(config, params_of(config), batch)
  for leaf in jax.tree.leaves((loss, metrics, grads)):
    assert np.isfinite(leaf).all()
  assert float(metrics['cross_ent_loss']) == 0.


# Dropout.


def test_dropout_drops_the_same_features_at_every_position():
  run = jax.jit(lambda key: Dropout(0.5).apply({}, jnp.ones((4, 9, 64)), True, rngs={'dropout': key}))
  got = np.asarray(run(jax.random.key(0)))
  np.testing.assert_array_equal(got, np.broadcast_to(got[:, :1], got.shape))
  assert set(np.unique(got)) == {0., 2.}
  assert (got[0] != got[1]).any() and 0.3 < (got[:, 0] == 0).mean() < 0.7
  np.testing.assert_array_equal(got, run(jax.random.key(0)))
  assert (got != np.asarray(run(jax.random.key(1)))).any()


def test_dropout_of_the_model():
  """Follows its key in training, is off in evaluation, and 0 needs no key."""
  config = model(num_layers=1, moe_interval=1, dropout_rate=0.3)
  params, batch = params_of(config), make_batch()
  one, same, other = (np.asarray(apply(config, params, batch, True, jax.random.key(k))) for k in (1, 1, 2))
  np.testing.assert_array_equal(one, same)
  assert np.abs(one - other).max() > 1e-2
  plain = config.replace(dropout_rate=0.)
  np.testing.assert_array_equal(apply(config, params, batch), apply(plain, params, batch))
