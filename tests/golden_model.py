"""The golden model: the original's small configuration, parameters and batches, for the parity tests."""

import functools

from openmoe_jax import names
from openmoe_jax.config import ModelConfig
from tests import golden

FORWARD = {  # name of the golden forward: (batch, train capacity, bidirectional inputs)
    'lm_train': ('lm', True, False),
    'lm_eval': ('lm', False, False),
    'packed_train': ('packed', True, False),
    'prefix_causal_train': ('prefix', True, False),
    'prefix_causal_eval': ('prefix', False, False),
    'prefix_bidir_train': ('prefix', True, True),
}


def config(**changes) -> ModelConfig:
  """The configuration of golden/config.json."""
  g = golden.load_json('config.json')
  values = dict(
      vocab_size=g['NUM_EMBEDDINGS'], emb_dim=g['EMBED_DIM'], mlp_dim=g['MLP_DIM'], num_heads=g['NUM_HEADS'],
      head_dim=g['HEAD_DIM'], num_layers=g['NUM_DECODER_LAYERS'],
      moe_interval=g['NUM_DECODER_LAYERS'] // g['NUM_DECODER_SPARSE_LAYERS'], num_experts=g['NUM_EXPERTS'],
      group_size=g['GROUP_SIZE'], dtype='float32', scan_blocks=False)
  return ModelConfig(**{**values, **changes})


@functools.lru_cache(maxsize=None)
def flat_params() -> dict:
  return golden.load_arrays('params.npz')


def params(model: ModelConfig) -> dict:
  """The golden parameters in the layout of `model`."""
  return names.from_t5x_names(model, flat_params())


def batch(name: str) -> dict:
  """'lm', 'packed' or 'prefix'."""
  return golden.load_arrays(f'batch_{name}.npz')


def train_batch(step: int) -> dict:
  arrays = golden.load_arrays('batches_train.npz')
  return {name: arrays[f'{name}_{step}']
          for name in ('decoder_input_tokens', 'decoder_target_tokens', 'decoder_loss_weights')}
