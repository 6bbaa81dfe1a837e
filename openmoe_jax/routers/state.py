"""Arrays that a router keeps besides its parameters: saved and restored with them, and not differentiated.

The state of a model is a dictionary of arrays with a leading axis of sparse layers; {} for most routers.
"""

from typing import Dict, Mapping

import jax
import jax.numpy as jnp

from openmoe_jax.config import ModelConfig, require
from openmoe_jax.routers import frozen, sigmoid

State = Dict[str, jax.Array]


def init_state(config: ModelConfig) -> State:
  """The state before the first step.

  'sigmoid': 'bias' float32 [sparse layers, E], zeros. 'frozen': 'experts' int32 [sparse layers, V, S], by hash.
  """
  if config.num_experts and config.router == 'frozen':
    return {'experts': frozen.hash_table(config)}
  if config.num_experts and config.router == 'sigmoid':
    return {'bias': jnp.zeros((config.num_sparse_layers, config.num_experts), jnp.float32)}
  return {}


def update_state(config: ModelConfig, state: Mapping[str, jax.Array], metrics: Mapping[str, jax.Array]) -> State:
  """The state after a step.

  Args:
    metrics: of the whole step; 'expert_load' [sparse layers, E] is read.
  """
  if 'bias' in state:
    return {**state, 'bias': sigmoid.update_bias(state['bias'], metrics['expert_load'], config.bias_update_rate)}
  return dict(state)


def check_state(config: ModelConfig, state: Mapping[str, jax.Array]) -> None:
  """Raises `ConfigError` unless a state has the arrays that the router needs."""
  wanted = {name: x.shape for name, x in jax.eval_shape(lambda: init_state(config)).items()}
  given = {name: tuple(jnp.shape(x)) for name, x in state.items()}
  require(wanted == given, f'ModelConfig.router = {config.router!r} needs the router state {_shapes(wanted)}, not '
          f'{_shapes(given)}; it is train_state.router_state, or Model.variables of a loaded checkpoint')


def _shapes(shapes: Mapping[str, tuple]) -> str:
  return ', '.join(f'{name} {list(shape)}' for name, shape in sorted(shapes.items())) or 'of no arrays'
