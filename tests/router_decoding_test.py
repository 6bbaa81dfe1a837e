"""Generation with routers besides the default: token by token what the whole forward pass would choose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax import decoding
from openmoe_jax.config import ModelConfig
from openmoe_jax.model import OpenMoE, variables
from openmoe_jax.names import t5x_shapes, unflatten_names

PROMPT, NEW = 5, 3
MODEL = ModelConfig(vocab_size=32, emb_dim=8, mlp_dim=8, num_heads=1, head_dim=4, num_layers=1, moe_interval=1,
                    num_experts=4, group_size=16, dtype='float32', scan_blocks=False, attention_query_blocks=1)


@pytest.mark.parametrize('changes', (
    dict(router='sigmoid', num_shared_experts=1),
    pytest.param(dict(router='frozen', parallel_attention=True), marks=pytest.mark.slow),
    pytest.param(dict(router='hierarchical', normalize_gates=True), marks=pytest.mark.slow)), ids=str)
def test_greedy_is_the_argmax_of_the_forward_pass(changes):
  config, rng = MODEL.replace(**changes), np.random.RandomState(0)
  params = unflatten_names({name: jnp.asarray(rng.randn(*shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1), jnp.float32)
                            for name, shape in t5x_shapes(config).items()})
  state = {'sigmoid': {'bias': (0.5 * rng.randn(1, 4)).astype(np.float32)},
           'frozen': {'experts': np.array([[rng.permutation(4)[:2] for _ in range(32)]], np.int32)}}.get(config.router)
  prompt = rng.randint(1, 32, (2, PROMPT)).astype(np.int32)
  got = decoding.generate(config, variables(params, state), prompt, [PROMPT] * 2, NEW, eos_id=None)
  tokens = np.concatenate([np.zeros((2, 1), np.int32), prompt, got.tokens], axis=1)[:, :-1]
  batch = {'decoder_input_tokens': tokens, 'decoder_target_tokens': np.ones_like(tokens)}
  logits = jax.jit(lambda v: OpenMoE(config.replace(capacity_mode='none')).apply(v, batch))(variables(params, state))
  np.testing.assert_array_equal(got.tokens, np.argmax(logits[:, PROMPT:], axis=-1))
  want = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits[:, PROMPT:])), got.tokens[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(got.log_probs, want, atol=2e-4)
