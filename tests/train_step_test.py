"""The training and evaluation steps beyond parity: whose arrays they use, sums over microbatches, label smoothing, and
what they say about batches, keys and layouts that cannot work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from openmoe_jax.config import ConfigError, ModelConfig
from openmoe_jax.metrics import to_means
from openmoe_jax.model import OpenMoE
from openmoe_jax.names import from_t5x_names, stack_blocks, unstack_blocks
from openmoe_jax.train_state import init_train_state
from openmoe_jax.train_step import loss_and_metrics, make_eval_step, make_train_step, split_microbatches
from tests import numpy_reference

ROWS, LENGTH = 4, 12


def model(**changes) -> ModelConfig:
  """One sparse layer without a capacity, so that neither `train` nor neighbours decide what is dropped."""
  values = dict(vocab_size=48, emb_dim=8, mlp_dim=10, num_heads=2, head_dim=4, num_layers=1, moe_interval=1,
                num_experts=4, group_size=16, capacity_mode='none', dtype='float32', scan_blocks=False,
                attention_query_blocks=2, loss_chunk_tokens=16)
  return ModelConfig(**{**values, **changes})


def make_batch(vocab_size=48):
  """Rows of different lengths, so that microbatches weigh differently."""
  rng = np.random.RandomState(0)
  target = rng.randint(1, vocab_size, (ROWS, LENGTH))
  for row, length in enumerate((12, 7, 4, 9)):
    target[row, length:] = 0
  tokens = np.concatenate([np.zeros((ROWS, 1), int), target[:, :-1]], axis=1)
  return {'decoder_input_tokens': tokens.astype(np.int32), 'decoder_target_tokens': target.astype(np.int32)}


def t5x_params(config):
  return {name: jnp.asarray(x) for name, x in numpy_reference.random_params(config, 0).items()}


def params_of(config):
  return from_t5x_names(config, t5x_params(config))


@functools.partial(jax.jit, static_argnames=('config', 'train'))
def loss_of(config, params, batch, train=True):
  return loss_and_metrics(config, params, batch, train)


def evaluate(config, params, batch):
  return to_means(make_eval_step(config).lower(params, batch).compile()(params, batch))


def compile_step(config, params, batch, num_microbatches=1):
  """params -> (state after the first step, its metrics)."""
  optimizer = optax.sgd(1e-3)
  state = init_train_state(config, optimizer, params)
  step = make_train_step(config, optimizer, num_microbatches).lower(state, batch).compile()
  return lambda params: step(init_train_state(config, optimizer, params), batch)


def first_step(config, params, *args):
  return compile_step(config, params, *args)(params)


# Whose arrays.


@pytest.mark.parametrize('scan_blocks', (False, True), ids=('unrolled', 'scanned'))
def test_parameters_outlive_the_step(scan_blocks):
  """The step donates its state, which must not hold the caller's arrays: not the parameters', nor those of a checkpoint
  that the parameters are made of."""
  config = model(scan_blocks=scan_blocks)
  arrays = t5x_params(config)
  params = from_t5x_names(config, arrays)
  before = jax.tree.map(np.array, (arrays, params))
  step = compile_step(config, params, make_batch())
  first, metrics = step(params)
  again, metrics_again = step(params)
  for x in jax.tree.leaves((arrays, params)):
    assert not x.is_deleted()
  jax.tree.map(np.testing.assert_array_equal, (arrays, params), before)
  jax.tree.map(np.testing.assert_array_equal, (first, metrics), (again, metrics_again))
  changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), params, first.params)
  assert all(jax.tree.leaves(changed))


# Sums and means.


@pytest.mark.slow
def test_sums_are_the_same_for_any_number_of_microbatches():
  """loss_normalization 'sum' of a dense model: a sum over tokens, however they are divided. Metrics stay means."""
  config = model(num_experts=0, loss_normalization='sum')
  params, batch = params_of(config), make_batch()
  count = int((batch['decoder_target_tokens'] > 0).sum())
  want_state, want = first_step(config, params, batch)
  for num_microbatches in (2, 4):
    state, metrics = first_step(config, params, batch, num_microbatches)
    assert metrics.keys() == want.keys()
    for name in want:
      np.testing.assert_allclose(metrics[name], want[name], rtol=1e-5, err_msg=name)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), state.params, want_state.params)
  np.testing.assert_allclose(want['loss'], count * (want['cross_ent_loss'] + want['z_loss']), rtol=1e-5)
  assert float(want['num_target_tokens']) == count


def test_loss_of_microbatches_is_weighted_by_targets():
  config = model(num_experts=0)
  params, batch = params_of(config), make_batch()
  want, got = (first_step(config, params, batch, m)[1] for m in (1, 4))
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)


# Label smoothing and evaluation.


def test_label_smoothing_does_not_depend_on_train():
  config = model(label_smoothing=0.1)
  params, batch = params_of(config), make_batch()
  loss, metrics = loss_of(config, params, batch, train=True)
  eval_loss, eval_metrics = loss_of(config, params, batch, train=False)
  np.testing.assert_allclose(eval_loss, loss, rtol=1e-6)
  for name in metrics:
    np.testing.assert_allclose(eval_metrics[name], metrics[name], rtol=1e-6, atol=1e-7, err_msg=name)
  plain = loss_of(config.replace(label_smoothing=0.), params, batch, train=False)[0]
  assert abs(float(plain - loss)) > 1e-2


def test_evaluation_reports_the_data_own_cross_entropy():
  """Per token and without smoothing, whatever the training loss makes of it."""
  plain = model()
  params, batch = params_of(plain), make_batch()
  want_loss, want = loss_of(plain, params, batch, train=False)
  got = evaluate(plain.replace(label_smoothing=0.1, loss_normalization='sum'), params, batch)
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=2e-6, atol=1e-7, err_msg=name)
  np.testing.assert_allclose(got['loss'], want_loss, rtol=2e-6)


# Token ids.


@pytest.mark.parametrize('dtype, largest', ((np.int8, 127), (np.uint8, 199), (np.int16, 199), (np.int64, 199)))
def test_narrow_token_ids(dtype, largest):
  """200 ids do not fit into int8: neither may numbers that are computed from them."""
  config = model(vocab_size=200)
  params = params_of(config)
  batch = {name: np.minimum(x, largest) for name, x in make_batch(200).items()}
  assert max(x.max() for x in batch.values()) > 120
  batch['decoder_segment_ids'] = np.ones((ROWS, LENGTH), np.int32)
  want, want_metrics = loss_of(config, params, batch)
  loss, metrics = loss_of(config, params, {name: x.astype(dtype) for name, x in batch.items()})
  np.testing.assert_array_equal(loss, want)
  jax.tree.map(np.testing.assert_array_equal, metrics, want_metrics)


# What cannot work.


def refused(call, *parts):
  with pytest.raises(ConfigError) as error:
    call()
  message = str(error.value)
  assert '\n' not in message
  for part in parts:
    assert part in message
  return message


def both_calls(config, params, batch):
  """The two ways into the model."""
  return (lambda: loss_and_metrics(config, params, batch),
          lambda: OpenMoE(config).apply({'params': params}, batch, True))


def test_dropout_needs_a_key():
  config = model(dropout_rate=0.1)
  params, batch = params_of(config), make_batch()
  for call in both_calls(config, params, batch):
    refused(call, 'ModelConfig.dropout_rate = 0.1', 'dropout_key', "rngs={'dropout': key}")
  jax.eval_shape(lambda: loss_and_metrics(config, params, batch, train=False))  # needs none


@pytest.mark.parametrize('scan_blocks', (False, True), ids=('unrolled', 'scanned'))
def test_parameters_of_the_other_layout(scan_blocks):
  config = model(scan_blocks=scan_blocks, num_layers=2)
  params, batch = params_of(config), make_batch()
  other = (unstack_blocks if scan_blocks else stack_blocks)(config, params)
  for call in both_calls(config, other, batch):
    refused(call, f'ModelConfig.scan_blocks = {scan_blocks}', f'are {"not " if scan_blocks else ""}stacked',
            'names.stack_blocks')


@pytest.mark.parametrize('changes, parts', (
    (dict(decoder_target_tokens=np.ones((ROWS, LENGTH - 1), np.int32)),
     ('decoder_target_tokens', f'({ROWS}, {LENGTH - 1})', f'({ROWS}, {LENGTH})')),
    (dict(decoder_loss_weights=np.ones((ROWS, 1), np.float32)), ('decoder_loss_weights', f'({ROWS}, 1)')),
    (dict(decoder_input_tokens=np.ones(LENGTH, np.int32), decoder_target_tokens=np.ones(LENGTH, np.int32)),
     ('decoder_input_tokens', '[batch, length]', f'({LENGTH},)')),
    (dict(decoder_input_tokens=np.ones((ROWS, LENGTH), np.float32)), ('decoder_input_tokens', 'dtype float32')),
    (dict(decoder_target_tokens=np.ones((ROWS, LENGTH), np.float32)), ('decoder_target_tokens', 'dtype float32'))),
    ids=('targets', 'weights', 'one row', 'floats', 'float targets'))
def test_batches_that_cannot_be(changes, parts):
  config = model(num_experts=0)
  params = params_of(config)
  for call in both_calls(config, params, {**make_batch(), **changes}):
    refused(call, *parts)


def test_no_microbatches():
  for number in (0, -1):
    refused(lambda: split_microbatches(make_batch(), number), f'num_microbatches = {number}')
  config = model(num_experts=0)
  refused(lambda: first_step(config, params_of(config), make_batch(), 0), 'num_microbatches = 0')


def test_batches_that_cannot_be_split():
  refused(lambda: split_microbatches({name: x[0] for name, x in make_batch().items()}, 2), f'has the shape ({LENGTH},)')
  refused(lambda: split_microbatches({'decoder_input_tokens': make_batch()['decoder_input_tokens']}, 2),
          'lacks decoder_target_tokens')


def test_metrics_carry_no_gradient():
  config = model(num_experts=4)
  params, batch = params_of(config), make_batch()
  for name in ('loss', 'cross_ent_loss', 'auxiliary_loss', 'router_z_loss'):
    grads = jax.jit(jax.grad(lambda p, name=name: loss_and_metrics(config, p, batch)[1][name]))(params)
    assert all(not np.any(x) for x in jax.tree.leaves(grads)), name
