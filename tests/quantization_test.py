"""int8 kernels: the numbers, the memory, and models that run on them."""

import functools

from hypothesis import given, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax import decoding, loading, partitioning, quantization, scoring
from openmoe_jax.config import ConfigError, MeshConfig, ModelConfig
from openmoe_jax.convert import int8
from openmoe_jax.model import OpenMoE
from openmoe_jax.names import from_t5x_names
from openmoe_jax.quantization import Int8Kernel
from tests import numpy_reference


def model(**changes) -> ModelConfig:
  values = dict(vocab_size=48, emb_dim=16, mlp_dim=32, num_heads=4, head_dim=4, num_layers=4, moe_interval=2,
                num_experts=8, group_size=16, dtype='float32', scan_blocks=False)
  return ModelConfig(**{**values, **changes})


@functools.lru_cache(maxsize=None)
def params_of(config):
  return jax.tree.map(jnp.asarray, from_t5x_names(config, numpy_reference.random_params(config, 0)))


def is_int8(x):
  return isinstance(x, Int8Kernel)


@given(st.integers(0, 2**31), st.sampled_from([(5, 3), (2, 4, 3), (2, 3, 4, 2)]), st.sampled_from([1e-4, 1., 300.]))
def test_values_are_within_half_a_step(seed, shape, size):
  kernel = (np.random.RandomState(seed).randn(*shape) * size).astype(np.float32)
  kernel[..., 0] *= np.random.RandomState(seed).randint(2)  # a column of zeros now and then
  got = quantization.quantize_kernel(kernel)
  assert got.values.dtype == jnp.int8 and got.scale.shape == (*shape[:-2], 1, shape[-1]) and got.shape == shape
  error = np.abs(np.asarray(got.astype(jnp.float32)) - kernel)
  assert (error <= np.asarray(got.scale) * (0.5 + 1e-5)).all()
  assert np.abs(np.asarray(got.values)).max() <= 127


def test_as_the_export_does_it():
  kernel = np.random.RandomState(0).randn(3, 8, 5).astype(np.float32)
  values, scale = int8.quantize(kernel)
  got = quantization.quantize_kernel(kernel)
  np.testing.assert_array_equal(got.values, values)
  np.testing.assert_allclose(got.scale, scale, rtol=1e-7)


@pytest.mark.parametrize('changes', (
    {}, pytest.param({'scan_blocks': True}, marks=pytest.mark.slow),
    pytest.param({'dtype': 'bfloat16'}, marks=pytest.mark.exhaustive),
    pytest.param({'mlp_activations': ('silu', 'linear'), 'parallel_moe': True}, marks=pytest.mark.exhaustive)))
def test_a_model_computes_with_the_rounded_kernels(changes):
  """Exactly what the model computes with the same kernels multiplied out beforehand."""
  config = decoding.dropless(model(**changes))
  quantized = quantization.quantize(params_of(config))
  rounded = jax.tree.map(lambda x: x.astype(jnp.float32) if is_int8(x) else x, quantized, is_leaf=is_int8)
  tokens = np.random.RandomState(0).randint(1, 48, (3, 12))
  batch = {'decoder_input_tokens': np.pad(tokens, ((0, 0), (1, 0)))[:, :-1], 'decoder_target_tokens': tokens}
  for dispatch in ('dropless', 'sort', 'einsum'):
    apply = jax.jit(lambda p: OpenMoE(config.replace(dispatch=dispatch)).apply({'params': p}, batch))
    got, want, whole = apply(quantized), apply(rounded), apply(params_of(config))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    # Of the median, because a token whose routing flips changes by any amount.
    assert 1e-4 < np.median(np.abs(np.asarray(got) - np.asarray(whole))) < 0.1


def test_which_kernels_and_how_much_memory():
  config = model()
  quantized = quantization.quantize(params_of(config))
  flat = jax.tree_util.tree_leaves_with_path(quantized, is_leaf=is_int8)
  kinds = {jax.tree_util.keystr(path): is_int8(x) for path, x in flat}
  assert all(kind == (name.endswith("['kernel']") and 'router' not in name and 'logits' not in name)
             for name, kind in kinds.items())
  assert sum(kinds.values()) == 4 * 4 + 4 * 3 + 2 * 3  # attention, FFN or extra FFN, experts
  before = sum(params.nbytes for (_, x), params in zip(flat, jax.tree.leaves(params_of(config))) if is_int8(x))
  after = sum(x.values.nbytes + x.scale.nbytes for _, x in flat if is_int8(x))
  assert after < 0.35 * before  # a quarter, and a scale of four bytes for each of these very short columns
  with pytest.raises(ConfigError, match='int8 already'):
    quantization.quantize(quantized)


@pytest.mark.slow
def test_generating_and_scoring():
  config = model()
  whole = loading.Model(config, params_of(config), 0, {})
  small = quantization.quantize_model(whole)
  tokens, lengths = np.random.RandomState(1).randint(1, 48, (3, 9)), np.array([9, 4, 1])
  got = decoding.generate(config, small.params, tokens, lengths, 6, eos_id=None)
  scores = [scoring.score(config, m.params, tokens, np.array([9, 9, 9]), [2, 0, 5]).log_probs for m in (small, whole)]
  np.testing.assert_allclose(*scores, rtol=0, atol=0.2)
  assert not np.array_equal(*scores) and got.tokens.shape == (3, 6)


@pytest.mark.slow
def test_experts_on_many_devices():
  config = model()
  mesh = partitioning.make_mesh(MeshConfig(2, 4, 1))
  params = jax.device_put(params_of(config), partitioning.tree_shardings(params_of(config), mesh))
  quantized = quantization.quantize_model(loading.Model(config, params, 0, {}, mesh))
  kernel = quantized.params['decoder']['layers_1']['mlp']['expert']['wo']['kernel']
  assert kernel.values.sharding.spec[0] == 'expert' and kernel.values.addressable_shards[0].data.shape[0] == 2
  tokens, lengths = np.random.RandomState(1).randint(1, 48, (3, 9)), np.array([9, 4, 1])
  one = decoding.generate(config, quantization.quantize(params_of(config)), tokens, lengths, 6, eos_id=None)
  many = decoding.generate(config, quantized.params, tokens, lengths, 6, eos_id=None, mesh=mesh)
  np.testing.assert_array_equal(many.tokens, one.tokens)
  np.testing.assert_allclose(many.log_probs, one.log_probs, rtol=0, atol=5e-6)  # float32 sums in another order
  split = loading.Model(config, params, 0, {}, partitioning.make_mesh(MeshConfig(2, 2, 2)))
  with pytest.raises(ConfigError, match="mesh axis 'model', which has 2 devices"):
    quantization.quantize_model(split)
