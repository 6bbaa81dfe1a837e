"""Five training steps, the micro-batched step and the optimizer state against the original's numbers."""

import functools
import gzip
import tarfile

import jax
import numpy as np
import pytest

from openmoe_jax.names import adafactor_to_t5x, to_t5x_names
from openmoe_jax.optimizers import adafactor
from openmoe_jax.schedules import learning_rate_schedule
from openmoe_jax.config import OptimizerConfig
from openmoe_jax.train_state import init_train_state
from openmoe_jax.train_step import gradients, make_train_step, split_microbatches
from tests import golden, golden_model

# Parameters are of order 1 and move by 1 % a step; an update is a ratio of statistics, so float32 rounding of the
# gradients (1e-6 of their maximum) shows where a gradient is small against its row.
PARAMETERS = 1e-5


@functools.lru_cache(maxsize=None)
def five_steps(scan: bool):
  """Parameters after each of 5 steps (T5X names), metrics of each, the Adafactor state in T5X form."""
  config = golden_model.config(scan_blocks=scan)
  optimizer = adafactor(learning_rate=learning_rate_schedule(OptimizerConfig(), 5))
  state = init_train_state(config, optimizer, jax.tree.map(np.array, golden_model.params(config)))
  step = make_train_step(config, optimizer)
  history, metrics = [], []
  for i in range(5):
    state, new = step(state, golden_model.train_batch(i))
    metrics.append(jax.device_get(new))
    history.append({name: np.array(x) for name, x in to_t5x_names(config, state.params).items()})
  return history, metrics, adafactor_to_t5x(config, state.opt_state.count, state.opt_state.stats)


def assert_params(got, want):
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=PARAMETERS, atol=PARAMETERS, err_msg=name)


@pytest.mark.parametrize('scan', (False, pytest.param(True, marks=pytest.mark.slow)), ids=('unrolled', 'scanned'))
def test_metrics_of_five_steps(scan):
  want = golden.load_json('train_metrics.json')
  _, metrics, _ = five_steps(scan)
  for i, (got, expected) in enumerate(zip(metrics, want)):
    for name in ('loss', 'cross_ent_loss', 'z_loss'):
      np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, err_msg=f'{name}, step {i}')
    np.testing.assert_allclose(got['auxiliary_loss'] * 0.01, expected['experts/auxiliary_loss'], rtol=1e-5)
    np.testing.assert_allclose(got['router_z_loss'] * 1e-4, expected['experts/router_z_loss'], rtol=1e-5)
    for name in ('fraction_tokens_left_behind', 'expert_usage', 'router_confidence'):
      np.testing.assert_allclose(got[name], expected[f'experts/{name}'], rtol=1e-5)
    assert got['num_target_tokens'] == expected['accuracy__count']
    assert round(float(got['accuracy'] * got['num_target_tokens'])) == expected['accuracy__total']


@pytest.mark.parametrize('scan', (False, True), ids=('unrolled', 'scanned'))
def test_parameters_after_one_step(scan):
  assert_params(five_steps(scan)[0][0], golden.load_arrays('train_params_step1.npz'))


def read_t5x_checkpoint(path) -> dict:
  """The target arrays of a T5X checkpoint archive: zarr v2, one gzip chunk or more, C order."""
  arrays = {}
  with tarfile.open(path) as archive:
    files = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
  for name, content in files.items():
    folder, _, base = name.rpartition('/')
    if base != '.zarray' or not folder.rpartition('/')[2].startswith('target.'):
      continue
    meta = golden.json.loads(content)
    array = np.zeros(meta['shape'], meta['dtype'])
    for at in np.ndindex(*(-(-s // c) for s, c in zip(meta['shape'], meta['chunks']))):
      raw = files[f'{folder}/{".".join(map(str, at))}']
      chunk = np.frombuffer(gzip.decompress(raw), meta['dtype']).reshape(meta['chunks'])
      where = tuple(slice(i * c, min((i + 1) * c, s)) for i, c, s in zip(at, meta['chunks'], meta['shape']))
      array[where] = chunk[tuple(slice(0, w.stop - w.start) for w in where)]
    arrays[folder.rpartition('/')[2][len('target.'):].replace('.', '/')] = array
  return arrays


@pytest.mark.parametrize('scan', (False, True), ids=('unrolled', 'scanned'))
def test_parameters_after_five_steps(scan):
  want = read_t5x_checkpoint(golden.require_golden('t5x_checkpoint.tar.gz'))
  assert len(want) == 49
  assert_params(five_steps(scan)[0][4], want)


@pytest.mark.parametrize('scan', (False, True), ids=('unrolled', 'scanned'))
def test_adafactor_state_after_five_steps(scan):
  want = golden.load_arrays('train_adafactor_step5.npz')
  step, state = five_steps(scan)[2]
  assert int(step) == 5
  for name, array in want.items():
    if '/expert/' in name:  # upstream multiplied experts' gradients by num_expert_partitions = 8 (SPEC 4)
      array = array / 8**2
    got = np.asarray(state[name])
    np.testing.assert_allclose(got, array, rtol=1e-5, atol=1e-5 * np.abs(array).max(), err_msg=name)


@pytest.mark.slow
def test_microbatches():
  """The original adds up the gradients of microbatches; ours are means weighted by target tokens (SPEC 15.2)."""
  config = golden_model.config()
  params = golden_model.params(config)
  batch = split_microbatches(golden_model.train_batch(0), 2)
  want = golden.load_json('train_micro2_metrics_step1.json')
  grad = jax.jit(lambda b: gradients(config, params, b))
  both, metrics = grad(batch)
  halves = [grad(jax.tree.map(lambda x: x[i:i + 1], batch)) for i in range(2)]
  tokens = [float(m['num_target_tokens']) for _, m in halves]
  share = [t / sum(tokens) for t in tokens]
  for name in ('loss', 'cross_ent_loss', 'z_loss', 'auxiliary_loss', 'expert_usage', 'router_confidence'):
    np.testing.assert_allclose(metrics[name], sum(s * m[name] for s, (_, m) in zip(share, halves)), rtol=1e-5)
  mean = jax.tree.map(lambda a, b: share[0] * a + share[1] * b, halves[0][0], halves[1][0])
  for got, expected in zip(jax.tree.leaves(both), jax.tree.leaves(mean)):
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

  # Multiplied back: sums over microbatches are the original's figures, and its update follows.
  assert sum(tokens) == want['accuracy__count']
  total = {name: sum(float(m[name]) for _, m in halves) for name in halves[0][1] if not halves[0][1][name].ndim}
  for name in ('loss', 'cross_ent_loss', 'z_loss'):
    np.testing.assert_allclose(total[name], want[name], rtol=1e-5)
  for name in ('fraction_tokens_left_behind', 'expert_usage', 'router_confidence'):
    np.testing.assert_allclose(total[name], want[f'experts/{name}'], rtol=1e-5)
  optimizer = adafactor(learning_rate=0.01)
  summed = jax.tree.map(lambda a, b: a + b, halves[0][0], halves[1][0])
  updates, _ = jax.jit(optimizer.update)(summed, optimizer.init(params), params)
  new = to_t5x_names(config, jax.tree.map(lambda p, u: np.asarray(p + u), params, updates))
  expected = golden.load_arrays('train_micro2_params_step1_subset.npz')
  assert_params({name: new[name] for name in expected}, expected)
