"""OpenMoE in JAX: train, study and use Mixture-of-Experts language models.

The names below are loaded on first use, so that importing the package costs nothing.
"""

import importlib

_WHERE = {
    'ModelConfig': 'config',
    'RunConfig': 'config',
    'ConfigError': 'config',
    'OpenMoE': 'model',
    'from_t5x_names': 'names',
    'to_t5x_names': 'names',
    'loss_and_metrics': 'train_step',
    'init_train_state': 'train_state',
    'make_train_step': 'train_step',
    'make_eval_step': 'train_step',
    'load': 'loading',
    'generate': 'decoding',
    'score': 'scoring',
}
__all__ = sorted(_WHERE)
__version__ = '0.1.0'


def __getattr__(name):
  if name in _WHERE:
    return getattr(importlib.import_module(f'openmoe_jax.{_WHERE[name]}'), name)
  raise AttributeError(f'module openmoe_jax has no attribute {name!r}')


def __dir__():
  return sorted(set(globals()) | set(_WHERE))
