"""Splash attention, run step by step on a CPU, against attention in blocks of queries: values and gradients.

tests/compile_report_test.py compiles it for a TPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax import splash
from openmoe_jax.analysis import flops
from openmoe_jax.attention import BlockContext, _in_blocks, _with_blind
from openmoe_jax.config import ConfigError, ModelConfig


def context_of(target, segments):
  positions = jnp.broadcast_to(jnp.arange(target.shape[1]), target.shape)
  return BlockContext(target, positions, target > 0, target > 0, segments)


@pytest.mark.slow
@pytest.mark.parametrize('packed', (False, True))
def test_equals_blocks(packed):
  """Rows with padding at the end; packed, with several segments. Unscaled scores of a size at which softmax is sharp."""
  rng = np.random.RandomState(0)
  batch, length, heads, width = 2, 256, 2, 16
  q, k, v, dout = (jnp.asarray(rng.randn(batch, length, heads, width), jnp.float32) for _ in range(4))
  target = np.ones((batch, length), np.int32)
  target[1, 200:] = 0
  segments = jnp.asarray(1 + (np.arange(length) >= 77) + (np.arange(length) >= 130))[None] * (target > 0) if packed else None
  context = context_of(jnp.asarray(target), segments)

  def with_splash(q, k, v):
    return splash.attention(q, k, v, splash.ids_of(context.is_target, context.segment_ids), interpret=True)

  def in_blocks(q, k, v):
    return _in_blocks(q, k, v, context, 2, None)

  got, want = (jax.jit(lambda *a, f=f: jax.vjp(lambda *x: _with_blind(f(*x), *x, context), *a))(q, k, v)
               for f in (with_splash, in_blocks))
  # Sums of up to 256 terms in another order.
  np.testing.assert_allclose(got[0], want[0], rtol=0, atol=2e-5)
  for a, b in zip(got[1](dout), want[1](dout), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())


def test_blocks():
  assert [splash.block_size(n) for n in (128, 256, 512, 640, 2048, 1152)] == [128, 256, 512, 128, 512, 384]
  assert not splash.usable(200)
  assert [splash.runs_on(f'TPU {kind}') for kind in ('v3', 'v4', 'v5 lite', 'v6 lite')] == [False, True, True, True]
  assert not splash.runs_on('cpu') and not splash.runs_on('NVIDIA H100')
  assert splash.computed_keys(2048) == (1 + 2 + 3 + 4) * 512 / 4


def test_what_splash_does_not_do():
  sizes = dict(vocab_size=16, emb_dim=8, mlp_dim=8, num_heads=1, head_dim=8, num_layers=1, attention='splash')
  for changes in (dict(dropout_rate=0.1), dict(inputs_bidirectional_attention=True)):
    with pytest.raises(ConfigError, match="ModelConfig.attention = 'splash' is causal"):
      ModelConfig(**sizes, **changes)


def test_flops_count_the_kernels_blocks():
  config = ModelConfig(vocab_size=8, emb_dim=16, mlp_dim=16, num_heads=2, head_dim=8, num_layers=2, moe_interval=2,
                       num_experts=4, attention='splash')
  assert flops.computed_keys(config, 256) == 256 and flops.computed_keys(config, 2048) == 1280
  assert flops.computed_keys(config, 200) == flops.computed_keys(config.replace(attention='blocked'), 200) < 200
