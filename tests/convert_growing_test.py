"""Upcycling, larger vocabularies and averages: what the grown models compute, and how they are read."""

import concurrent.futures
import functools
import json

from hypothesis import given, strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore

from openmoe_jax.config import ConfigError, ModelConfig, RunConfig, from_dict, to_dict
from openmoe_jax.convert import tensors as tensors_lib
from openmoe_jax.convert.growing import AveragedSource, ExtendedVocabularySource, UpcycledSource
from openmoe_jax.convert.orbax import OrbaxSink, OrbaxSource
from openmoe_jax.convert.tensors import PARAMS, SLOTS, Source, TensorInfo, sum_bits
from openmoe_jax.convert.transfer import transfer
from openmoe_jax.model import OpenMoE
from openmoe_jax.names import from_t5x_names, t5x_shapes, to_t5x_names
from openmoe_jax.train_step import loss_and_metrics
from tests import numpy_reference

DENSE = ModelConfig(vocab_size=48, emb_dim=8, mlp_dim=10, num_heads=2, head_dim=4, num_layers=2, dtype='float32',
                    scan_blocks=False, attention_query_blocks=2)
# Capacities that drop tokens: 48 tokens and 4 experts make 4 groups of 12, in which each expert has 2 slots.
SPARSE = DENSE.replace(moe_interval=2, num_experts=4, group_size=16, eval_capacity_factor=0.5, min_expert_capacity=2)
EMBEDDING, LOGITS = PARAMS + 'token_embedder/embedding', PARAMS + 'decoder/logits_dense/kernel'
# Sums of float32 in another order, or with factors that sum to 1 but for rounding; activations are of order 1.
ROUNDING = 2e-6


class Memory(Source):
  """A checkpoint in memory, with a slot of an optimizer; counts what is read of it."""

  def __init__(self, model, seed=0, dtype=np.float32, step=7, axis=0, arrays=None):
    arrays = arrays or numpy_reference.random_params(model, seed)
    self.arrays = {PARAMS + name: array.astype(dtype) for name, array in arrays.items()}
    self.arrays[SLOTS + 'token_embedder/embedding/v'] = np.ones(arrays['token_embedder/embedding'].shape, np.float32)
    self.where, self.model, self.step, self.preferred = f'memory {seed}', model, step, axis
    self.run = to_dict(RunConfig(model=model))
    self.tensors = {name: TensorInfo(x.shape, x.dtype) for name, x in self.arrays.items()}
    self.fingerprint = {name: sum_bits(x) for name, x in self.arrays.items()}
    self.reads, self.checked = [], None

  def axis(self, name):
    return self.preferred if len(self.tensors[name].shape) > 1 else 0

  def read(self, name, axis=0, start=0, stop=None):
    x = self.arrays[name]
    part = x[tuple(slice(start, stop) if i == axis else slice(None) for i in range(x.ndim))]
    self.reads.append((name, part.nbytes))
    return part

  def check(self, sums):
    self.checked = dict(sums)


def read(source):
  """Every tensor, whole, under its T5X name; they are as announced."""
  arrays = {}
  for name, info in source.tensors.items():
    array = source.read(name)
    assert array.shape == info.shape and array.dtype == info.dtype, name
    assert name.startswith(PARAMS)
    arrays[name.removeprefix(PARAMS)] = array
  assert {name: x.shape for name, x in arrays.items()} == t5x_shapes(source.model)
  return arrays


def make_batch():
  """Three rows, two of them padded."""
  rng = np.random.RandomState(1)
  target = rng.randint(1, 48, (3, 16))
  target[1, 11:] = target[2, 6:] = 0
  tokens = np.concatenate([np.zeros((3, 1), int), target[:, :-1]], axis=1)
  return {'decoder_input_tokens': tokens.astype(np.int32), 'decoder_target_tokens': target.astype(np.int32)}


@functools.partial(jax.jit, static_argnums=0)
def _apply(config, params, batch):
  return OpenMoE(config).apply({'params': params}, batch)


def logits(config, arrays):
  """float32 [B, L, V] of the batch."""
  params = jax.tree.map(jnp.asarray, from_t5x_names(config, arrays))
  return np.asarray(_apply(config, params, make_batch()))


@functools.lru_cache(maxsize=None)
def dense_logits(model=DENSE):
  return logits(model, read_params(Memory(model)))


def read_params(source):
  return {name.removeprefix(PARAMS): x for name, x in source.arrays.items() if name.startswith(PARAMS)}


# Upcycling.


@pytest.mark.parametrize('changes', (
    dict(), dict(scan_blocks=True), dict(capacity_mode='none', parallel_moe=True), dict(capacity_mode='colossalai'),
    dict(moe_interval=1, parallel_moe=True, scan_blocks=True, batch_prioritized=True)), ids=str)
def test_experts_behind_change_no_logit(changes):
  model = SPARSE.replace(**changes)
  got = logits(model, read(UpcycledSource(Memory(DENSE), model, noise=0.5)))
  np.testing.assert_allclose(got, dense_logits(), rtol=0, atol=ROUNDING)


def test_experts_behind_for_other_activations():
  changes = dict(mlp_activations=('silu', 'linear'), num_layers=1)
  dense, model = DENSE.replace(**changes), SPARSE.replace(moe_interval=1, **changes)
  got = logits(model, read(UpcycledSource(Memory(dense), model)))
  np.testing.assert_allclose(got, dense_logits(dense), rtol=0, atol=ROUNDING)


def test_experts_behind_learn():
  """The first gradient reaches wo, and nothing in front of it; after a step of wo it reaches everything."""
  model = SPARSE.replace(capacity_mode='none', aux_loss_factor=0., router_z_loss_factor=0.)
  batch = make_batch()
  gradients = jax.jit(jax.grad(lambda params: loss_and_metrics(model, params, batch)[0]))
  params = jax.tree.map(jnp.asarray, from_t5x_names(model, read(UpcycledSource(Memory(DENSE), model, seed=3))))
  first = gradients(params)
  second = to_t5x_names(model, gradients(jax.tree.map(lambda p, g: p - 0.1 * g, params, first)))
  first = to_t5x_names(model, first)
  experts = {w: f'decoder/layers_1/mlp/expert/{w}/kernel' for w in ('wi_0', 'wi_1', 'wo')}
  largest = lambda kernel: np.abs(kernel).max(axis=(1, 2))  # of every expert
  assert np.all(largest(first[experts['wo']]) > 1e-4)
  for w in ('wi_0', 'wi_1'):
    assert np.all(largest(first[experts[w]]) == 0) and np.all(largest(second[experts[w]]) > 1e-6)
  router = 'decoder/layers_1/mlp/router/router_weights/w/kernel'
  assert np.all(first[router] == 0) and np.abs(second[router]).max() > 1e-6
  # The dense FFN goes on learning, and no two experts learn the same.
  assert np.abs(first['decoder/layers_1/extra_mlp/wi_0/kernel']).max() > 1e-4
  steps = np.asarray(first[experts['wo']]).reshape(4, -1)
  assert all(np.abs(steps[i] - steps[j]).max() > 1e-4 for i in range(4) for j in range(i))


@pytest.mark.parametrize('changes', (dict(), dict(scan_blocks=True, parallel_moe=True), dict(extra_mlp=False)), ids=str)
def test_copies_are_the_dense_model_if_gates_sum_to_one(changes):
  model = SPARSE.replace(num_selected_experts=4, capacity_mode='none', **changes)
  got = logits(model, read(UpcycledSource(Memory(DENSE), model, 'copies')))
  # Four products with gates instead of one: a few roundings more than ROUNDING is for.
  np.testing.assert_allclose(got, dense_logits(), rtol=0, atol=4 * ROUNDING)
  noisy = logits(model, read(UpcycledSource(Memory(DENSE), model, 'copies', noise=0.1)))
  assert np.abs(noisy - dense_logits()).max() > 1e-2


def test_copies_with_fewer_gates_are_scaled_down():
  """One layer by hand, in float64: the FFN's output times the sum of the chosen experts' probabilities."""
  dense = DENSE.replace(num_layers=1)
  model = SPARSE.replace(num_layers=1, moe_interval=1, capacity_mode='none')
  arrays = read(UpcycledSource(Memory(dense), model, 'copies', seed=5))
  got = logits(model, arrays)
  batch = make_batch()
  p = {name: np.asarray(x, np.float64) for name, x in read_params(Memory(dense)).items()}
  of_layer = lambda name: p[f'decoder/layers_0/{name}']
  mask = numpy_reference.logit_mask(batch['decoder_input_tokens'])[..., None]
  norm = lambda x, name: mask * numpy_reference.rms_norm(x, of_layer(f'{name}/scale'))
  x = p['token_embedder/embedding'][batch['decoder_input_tokens']]
  kernels = {f'{name}/kernel': of_layer(f'self_attention/{name}/kernel') for name in ('query', 'key', 'value', 'out')}
  x = x + numpy_reference.attention(norm(x, 'pre_self_attention_layer_norm'), kernels,
                                    numpy_reference.attention_mask(batch, False), dense.num_heads, dense.head_dim)
  y = norm(x, 'pre_mlp_layer_norm')
  odds = np.exp(y @ arrays['decoder/layers_0/mlp/router/router_weights/w/kernel'].astype(np.float64))
  gates = np.sort(odds / odds.sum(-1, keepdims=True), -1)[..., -2:].sum(-1, keepdims=True)
  assert np.all(gates >= 0.5 - 1e-12) and np.all(gates < 0.9)  # at least 2 of 4
  ffn = numpy_reference.feed_forward(y, *(of_layer(f'mlp/{w}/kernel') for w in ('wi_0', 'wi_1', 'wo')), plain=False)
  final = numpy_reference.rms_norm(x + gates * ffn, p['decoder/decoder_norm/scale'])
  want = (mask * final) @ p['decoder/logits_dense/kernel']
  np.testing.assert_allclose(got, want, rtol=0, atol=5e-6)  # float32 against float64, logits up to 5
  assert np.abs(got - dense_logits(dense)).max() > 0.1


def test_where_upcycled_tensors_come_from():
  dense = Memory(DENSE)
  p = read_params(dense)
  for experts in ('behind', 'copies'):
    arrays = read(UpcycledSource(dense, SPARSE, experts))
    for name in p:
      if not name.startswith('decoder/layers_1/mlp/'):
        np.testing.assert_array_equal(arrays[name], p[name], err_msg=name)
    np.testing.assert_array_equal(arrays['decoder/layers_1/pre_extra_mlp_layer_norm/scale'],
                                  p['decoder/layers_1/pre_mlp_layer_norm/scale'])
    for w in ('wi_0', 'wi_1', 'wo'):
      want = p[f'decoder/layers_1/mlp/{w}/kernel']
      zero = np.zeros_like(want)
      extra, kernels = (arrays[f'decoder/layers_1/{part}/{w}/kernel'] for part in ('extra_mlp', 'mlp/expert'))
      np.testing.assert_array_equal(extra, zero if (w, experts) == ('wo', 'copies') else want)
      for e in range(4):
        np.testing.assert_array_equal(kernels[e], zero if (w, experts) == ('wo', 'behind') else want)


def test_noise_and_router_have_their_distributions():
  """A sampled standard deviation of n values is known to 1/sqrt(2n) of itself; five times that are allowed."""
  dense = DENSE.replace(emb_dim=64, mlp_dim=48, num_layers=1)
  model = SPARSE.replace(emb_dim=64, mlp_dim=48, num_layers=1, moe_interval=1, num_experts=8)
  source = Memory(dense)
  # Noise goes by the spread of a kernel, which its columns' means are part of, and not by its size.
  source.arrays[PARAMS + 'decoder/layers_0/mlp/wi_0/kernel'] += np.linspace(3, 5, 96)
  arrays = read(UpcycledSource(source, model, 'copies', noise=0.25))
  noises = []
  for w in ('wi_0', 'wi_1', 'wo'):
    kernel = source.arrays[PARAMS + f'decoder/layers_0/mlp/{w}/kernel']
    noise = (arrays[f'decoder/layers_0/mlp/expert/{w}/kernel'] - kernel) / (0.25 * kernel.std(dtype=np.float64))
    for expert in noise:
      assert abs(expert.std() - 1) < 5 / np.sqrt(2 * expert.size) and abs(expert.mean()) < 5 / np.sqrt(expert.size)
    noises += [expert[:48, :48].ravel() for expert in noise]
  correlation = np.corrcoef(noises) - np.eye(len(noises))
  assert np.abs(correlation).max() < 5 / 48  # every expert and every kernel by itself
  router = arrays['decoder/layers_0/mlp/router/router_weights/w/kernel']
  assert abs(router.std() / 0.02 - 1) < 5 / np.sqrt(2 * router.size)
  other = read(UpcycledSource(source, model, 'copies', noise=0.25, seed=1))
  for name in ('decoder/layers_0/mlp/router/router_weights/w/kernel', 'decoder/layers_0/mlp/expert/wi_0/kernel'):
    assert np.mean(other[name] == arrays[name]) < 0.01


def test_upcycling_keeps_dtype_and_run_but_not_the_step():
  grown = UpcycledSource(Memory(DENSE, dtype=ml_dtypes.bfloat16), SPARSE, 'copies', noise=0.1)
  dtypes = {name: x.dtype for name, x in read(grown).items()}
  router = 'decoder/layers_1/mlp/router/router_weights/w/kernel'
  assert dtypes.pop(router) == np.float32 and set(dtypes.values()) == {np.dtype(ml_dtypes.bfloat16)}
  assert grown.step == 0 and from_dict(RunConfig, grown.run) == RunConfig(model=SPARSE)
  unknown = Memory(DENSE)
  unknown.run = {}
  assert UpcycledSource(unknown, SPARSE).run == {}


@pytest.mark.parametrize('dense, model, options, message', (
    (DENSE, SPARSE.replace(emb_dim=16, num_heads=4), {}, 'emb_dim 8 and 16; num_heads 2 and 4$'),
    (DENSE, SPARSE.replace(mlp_activations=('silu', 'linear')), {}, "mlp_activations .'swiglu', 'linear'. and .'silu'"),
    (DENSE, DENSE, {}, 'num_experts = 0'),
    (SPARSE, SPARSE, {}, 'memory 0 has num_experts = 4; upcycling starts'),
    (DENSE, SPARSE.replace(extra_mlp=False), {}, "'behind' needs ModelConfig.extra_mlp = True"),
    (DENSE, SPARSE, dict(experts='beside'), "'beside' is not known; valid: 'behind', 'copies'"),
    (DENSE, SPARSE, dict(noise=-1.), 'noise = -1.0'), (DENSE, SPARSE, dict(noise=float('nan')), 'noise = nan'),
    (DENSE, SPARSE, dict(seed=-1), 'seed = -1'), (DENSE, SPARSE, dict(seed=0.5), 'seed = 0.5')), ids=str)
def test_what_cannot_be_upcycled(dense, model, options, message):
  with pytest.raises(ConfigError, match=message):
    UpcycledSource(Memory(dense), model, **options)


# Vocabulary.


def test_old_tokens_keep_their_logits():
  model = DENSE.replace(vocab_size=61)
  grown = ExtendedVocabularySource(Memory(DENSE), 61)
  assert grown.model == model and grown.step == 7 and from_dict(RunConfig, grown.run) == RunConfig(model=model)
  arrays, old = read(grown), read_params(Memory(DENSE))
  for name in old:
    kept = arrays[name][tuple(slice(size) for size in old[name].shape)]
    np.testing.assert_array_equal(kept, old[name], err_msg=name)
  got, before = logits(model, arrays), dense_logits()
  np.testing.assert_array_equal(got[..., :48], before)
  # A new token's logit is the mean of the old ones; together they stay below their share of the vocabulary.
  np.testing.assert_allclose(got[..., 48:], np.repeat(before.mean(-1, keepdims=True), 13, -1), rtol=0, atol=ROUNDING)
  probability = np.asarray(jax.nn.softmax(got))[..., 48:].sum(-1)
  assert np.all(probability <= 13 / 61 + 1e-6) and probability.min() < 0.1


@pytest.mark.parametrize('axis', (0, 1))
def test_new_rows_are_the_mean_and_a_little_noise(monkeypatch, axis):
  monkeypatch.setattr(tensors_lib, 'PART_BYTES', 4 * 48 * 3)  # many parts along either axis
  source = Memory(DENSE, axis=axis)
  source.arrays[EMBEDDING] = source.arrays[EMBEDDING] * np.linspace(0.1, 2, 8, dtype=np.float32) + np.float32(1.5)
  table, kernel = (source.arrays[name].astype(np.float64) for name in (EMBEDDING, LOGITS))
  arrays = read(ExtendedVocabularySource(source, 2048 + 48))
  new = arrays['token_embedder/embedding'][48:].astype(np.float64)
  noise = (new - table.mean(0)) / (0.01 * table.std(0))
  assert np.all(np.abs(noise.std(0) - 1) < 5 / np.sqrt(2 * 2048)) and np.all(np.abs(noise.mean(0)) < 5 / np.sqrt(2048))
  assert len(np.unique(new, axis=0)) == 2048
  columns = arrays['decoder/logits_dense/kernel'][:, 48:]
  np.testing.assert_array_equal(columns, np.repeat(kernel.mean(1, keepdims=True).astype(np.float32), 2048, 1))
  other = read(ExtendedVocabularySource(source, 2048 + 48, seed=1))
  assert np.mean(other['token_embedder/embedding'][48:] == new) < 0.01


def test_the_mean_is_read_once():
  """However many threads ask for new rows; the old ones are read once for the mean and once for themselves."""
  source = Memory(DENSE)
  grown = ExtendedVocabularySource(source, 100)
  assert not source.reads
  with concurrent.futures.ThreadPoolExecutor(10) as pool:
    parts = list(pool.map(lambda start: grown.read(EMBEDDING, 0, start, start + 10), range(0, 100, 10)))
  np.testing.assert_array_equal(np.concatenate(parts), ExtendedVocabularySource(Memory(DENSE), 100).read(EMBEDDING))
  assert sum(size for name, size in source.reads) == 2 * source.arrays[EMBEDDING].nbytes


@pytest.mark.parametrize('size', (48, 47))
def test_a_vocabulary_only_grows(size):
  with pytest.raises(ConfigError, match=f'vocab_size = {size} must be larger than that of memory 0, which is 48'):
    ExtendedVocabularySource(Memory(DENSE), size)


# Averages.


@pytest.mark.parametrize('dtype', (np.float32, ml_dtypes.bfloat16, np.float16), ids=lambda dtype: dtype.__name__)
def test_the_average_of_copies_is_the_copy(dtype):
  sources = [Memory(SPARSE, dtype=dtype) for _ in range(3)]
  for source in sources:  # values that rounding, or adding to 0, would change
    source.arrays[EMBEDDING][0, :4] = -0., np.finfo(np.float16).smallest_subnormal, 3e4, -np.inf
  for weights in (None, [0.7, 0.2, 0.1], [3, 1e-9, 1e9]):
    for name, array in read(AveragedSource(sources, weights)).items():
      want = sources[0].arrays[PARAMS + name]
      bits = {2: np.uint16, 4: np.uint32}[want.itemsize]
      np.testing.assert_array_equal(array.view(bits), want.view(bits), err_msg=name)


def test_averages_are_weighted_and_rounded_once():
  sources = [Memory(SPARSE, seed, step=step) for seed, step in ((0, 10), (1, 30), (2, 20))]
  sources[2].run = to_dict(RunConfig(model=SPARSE, model_dir='last'))
  grown = AveragedSource(sources, [1, 2, 5])
  assert grown.step == 30 and grown.run['model_dir'] == 'last' and grown.model == SPARSE
  for name, array in read(grown).items():
    a, b, c = (source.arrays[PARAMS + name].astype(np.float64) for source in sources)
    np.testing.assert_allclose(array, (a + 2 * b + 5 * c) / 8, rtol=2**-24, atol=0)
  plain = read(AveragedSource(sources))
  a, b, c = (source.arrays[LOGITS].astype(np.float64) for source in sources)
  np.testing.assert_allclose(plain['decoder/logits_dense/kernel'], (a + b + c) / 3, rtol=2**-23, atol=1e-12)


def test_an_average_has_the_widest_dtype():
  narrow, wide = Memory(SPARSE, 0, ml_dtypes.bfloat16), Memory(SPARSE, 1)
  for sources in ([narrow, wide], [wide, narrow]):
    got = AveragedSource(sources).read(LOGITS)
    want = (narrow.arrays[LOGITS].astype(np.float64) + wide.arrays[LOGITS]) / 2
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want.astype(np.float32))


def test_only_models_of_one_function_are_averaged():
  last = Memory(SPARSE)
  changed = SPARSE.replace(num_experts=8, parallel_moe=True, layer_norm_epsilon=1e-5)
  with pytest.raises(ConfigError, match='layer_norm_epsilon 1e-05 and 1e-06; num_experts 8 and 4; parallel_moe True'):
    AveragedSource([last, Memory(changed), last])
  with pytest.raises(ConfigError, match='num_experts 0 and 4'):
    AveragedSource([Memory(DENSE), last])
  # What is not part of the function may differ: stages of one run do.
  AveragedSource([Memory(SPARSE.replace(group_size=8, z_loss=0., dtype='bfloat16', scan_blocks=True)), last])
  AveragedSource([Memory(DENSE), Memory(DENSE.replace(moe_interval=2, num_selected_experts=1))])


@pytest.mark.parametrize('weights, message', (([1.], '1 weights for 2'), ([1, -1], 'must be positive'),
                                              ([1, 0], 'must be positive'), ([1, float('inf')], 'must be positive')))
def test_weights_are_checked(weights, message):
  with pytest.raises(ConfigError, match=message):
    AveragedSource([Memory(SPARSE), Memory(SPARSE)], weights)


def test_an_average_of_nothing():
  with pytest.raises(ConfigError, match='at least one'):
    AveragedSource([])


# Reading, checking, resuming.


@functools.lru_cache(maxsize=None)
def grown_sources():
  dense = Memory(DENSE)
  sources = [UpcycledSource(dense, SPARSE), UpcycledSource(dense, SPARSE, 'copies', 0.3, 4),
             ExtendedVocabularySource(Memory(DENSE, dtype=ml_dtypes.bfloat16), 60),
             AveragedSource([Memory(SPARSE, 0), Memory(SPARSE, 1)], [1, 2])]
  return [(source, read(source)) for source in sources]


@given(st.integers(0, 3), st.floats(0, 1, exclude_max=True), st.floats(0, 1))
def test_reads_cut_anyhow_are_slices_of_the_whole(which, first, share):
  """Of every tensor, along every axis."""
  source, whole = grown_sources()[which]
  for name, array in whole.items():
    for axis, size in enumerate(array.shape):
      start = int(first * size)
      stop = start + max(round(share * (size - start)), 1)
      index = tuple(slice(start, stop) if i == axis else slice(None) for i in range(array.ndim))
      np.testing.assert_array_equal(source.read(PARAMS + name, axis, start, stop), array[index], err_msg=name)


def test_parts_lie_along_the_axis_of_the_source():
  dense = Memory(DENSE, axis=1)
  sources = UpcycledSource(dense, SPARSE), ExtendedVocabularySource(dense, 60), AveragedSource([dense, Memory(DENSE)])
  for source in sources:
    for name, info in source.tensors.items():
      of_source = len(info.shape) == 2 and 'router' not in name
      assert source.axis(name) == (1 if of_source else 0), name


def test_an_expert_is_never_read_beside_others():
  """Parts of one expert ask the dense model for one kernel, and columns of all experts for those columns of it."""
  dense = Memory(DENSE)
  grown = UpcycledSource(dense, SPARSE, 'copies')
  name = PARAMS + 'decoder/layers_1/mlp/expert/wi_0/kernel'
  assert grown.tensors[name].chunk == (1, 8, 20) and grown.axis(name) == 0
  part = grown.read(name, 0, 2, 3)
  assert dense.reads == [(PARAMS + 'decoder/layers_1/mlp/wi_0/kernel', part.nbytes)]
  dense.reads.clear()
  grown.read(name, 2, 5, 8)
  assert dense.reads == [(PARAMS + 'decoder/layers_1/mlp/wi_0/kernel', 4 * 8 * 3)]


@pytest.mark.parametrize('skip', (False, True), ids=('all at once', 'resumed'))
def test_sources_are_checked_by_what_was_read(skip):
  """A resumed conversion has not read everything: the rest is read for the check."""
  makers = (lambda dense: UpcycledSource(dense, SPARSE, 'copies', 0.1), lambda dense: UpcycledSource(dense, SPARSE),
            lambda dense: ExtendedVocabularySource(dense, 60), lambda dense: AveragedSource([dense, Memory(DENSE, 1)]))
  for make in makers:
    dense = Memory(DENSE)
    grown = make(dense)
    for name in list(grown.tensors)[3 if skip else 0:]:
      rows = grown.tensors[name].shape[0]
      for start in range(0, rows, 3):
        grown.read(name, 0, start, min(start + 3, rows))
    grown.check({})
    assert dense.checked == {name: sum_bits(x) for name, x in dense.arrays.items() if name.startswith(PARAMS)}


def test_fingerprints_change_with_every_option_and_with_the_source():
  a, b = Memory(DENSE, 0), Memory(DENSE, 1)
  upcycled = functools.partial(UpcycledSource, model=SPARSE)
  sources = [upcycled(a), upcycled(b), UpcycledSource(a, SPARSE.replace(num_experts=2)), upcycled(a, experts='copies'),
             upcycled(a, noise=0.1), upcycled(a, seed=1), ExtendedVocabularySource(a, 60),
             ExtendedVocabularySource(b, 60), ExtendedVocabularySource(a, 61), ExtendedVocabularySource(a, 60, 1),
             AveragedSource([a, b]), AveragedSource([b, a]), AveragedSource([a, b], [1, 2]), AveragedSource([a, b, b])]
  prints = [json.dumps(source.fingerprint) for source in sources]
  assert len(set(prints)) == len(prints)
  assert json.dumps(upcycled(Memory(DENSE, 0)).fingerprint) == prints[0]


def to_disk(source, folder):
  """Writes a checkpoint of parameters, in parts of several threads, and opens it."""
  sink = OrbaxSink(from_dict(RunConfig, source.run), source.step)
  transfer(source, sink, folder, workers=3, say=lambda text: None)
  return OrbaxSource(folder)


def without_state(source):
  source.tensors = {name: info for name, info in source.tensors.items() if name.startswith(PARAMS)}
  return source


@pytest.mark.parametrize('experts, noise', (('behind', 0.), ('copies', 0.1)))
def test_grown_checkpoints_go_through_a_conversion(tmp_path, experts, noise):
  """Dense, upcycled, with a larger vocabulary, averaged: steps on the disk, each checked against its checksums."""
  dense = to_disk(without_state(Memory(DENSE)), tmp_path / 'dense')
  sparse = to_disk(UpcycledSource(dense, SPARSE, experts, noise), tmp_path / 'sparse')
  larger = to_disk(ExtendedVocabularySource(sparse, 60), tmp_path / 'larger')
  got = to_disk(AveragedSource([larger, larger]), tmp_path / 'average')
  assert got.model == SPARSE.replace(vocab_size=60) and got.step == 0
  sparse = Memory(SPARSE, arrays=read(UpcycledSource(Memory(DENSE), SPARSE, experts, noise)))
  want = read(ExtendedVocabularySource(sparse, 60))
  for name, array in read(got).items():
    np.testing.assert_array_equal(array, want[name], err_msg=name)


@pytest.mark.parametrize('grow', (lambda dense: UpcycledSource(dense, SPARSE, 'copies', 0.1),
                                  lambda dense: ExtendedVocabularySource(dense, 60),
                                  lambda dense: AveragedSource([Memory(DENSE, 1), dense])), ids=('up', 'vocab', 'mean'))
def test_damage_is_found(tmp_path, grow):
  """A kernel of which only noisy copies are written is checked as well."""
  to_disk(without_state(Memory(DENSE)), tmp_path / 'dense')
  folder = next((tmp_path / 'dense').rglob('decoder.blocks.layers_0.mlp.wo.kernel'))
  stored = tensorstore.open({'driver': 'zarr', 'kvstore': f'file://{folder}/'}).result()
  stored[1, 2, 3] = 7.
  with pytest.raises(ConfigError, match='mlp/wo/kernel does not have the checksum'):
    to_disk(grow(OrbaxSource(tmp_path / 'dense')), tmp_path / 'grown')
